from __future__ import annotations

import asyncio

import grpc
import pytest
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer_gateway.request_log import RequestLine
from structlog.testing import capture_logs


@pytest.mark.parametrize(
    ("error", "time_remaining_s", "status", "reason"),
    [
        pytest.param(None, None, "OK", None, id="ok"),
        pytest.param(
            MiniInferError(ErrorReason.QUEUE_FULL, ""),
            9.0,
            "RESOURCE_EXHAUSTED",
            "QUEUE_FULL",
            id="error",
        ),
        pytest.param(KeyError("bug"), None, "INTERNAL", "INTERNAL_ERROR", id="bug"),
        pytest.param(asyncio.CancelledError(), 9.0, "CANCELLED", None, id="cancelled"),
        pytest.param(asyncio.CancelledError(), None, "CANCELLED", None, id="no deadline"),
        pytest.param(grpc.aio.UsageError(), None, "CANCELLED", None, id="connection gone"),
        pytest.param(asyncio.CancelledError(), 0.0, "DEADLINE_EXCEEDED", "DEADLINE", id="deadline"),
    ],
)
def test_outcome(
    error: BaseException | None, time_remaining_s: float | None, status: str, reason: str | None
) -> None:
    def call() -> None:
        with RequestLine(time_remaining_s) as line:
            line.request_id = "r"
            line.num_prompt_tokens, line.num_output_tokens = 3, 4
            line.first_token_sent()
            if error is not None:
                raise error

    with capture_logs() as lines:
        if error is None:
            call()
        else:
            with pytest.raises(type(error)):
                call()
    (line,) = lines
    assert (line["status"], line["reason"]) == (status, reason)
    assert (line["request_id"], line["prompt_tokens"], line["output_tokens"]) == ("r", 3, 4)
    assert line["total_ms"] >= line["ttft_ms"] >= 0
