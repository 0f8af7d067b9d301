from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from mini_infer.errors import ErrorReason, FieldViolation, InvalidRequestError, MiniInferError
from mini_infer_gateway import status

MAX_METADATA_BYTES = 8 * 1024


def details(error: MiniInferError) -> dict[str, object]:
    found: dict[str, object] = {}
    for packed in status.to_status(error).details:
        name = packed.type_url.rpartition(".")[2]
        detail = getattr(error_details_pb2, name)()
        assert packed.Unpack(detail)
        assert name not in found
        found[name] = detail
    return found


@pytest.mark.parametrize("reason", ErrorReason)
def test_every_reason_has_a_code_and_error_info(reason: ErrorReason) -> None:
    made = status.to_status(MiniInferError(reason, "because", {"limit": "3"}))
    assert made.code == status.CODES[reason].value[0]
    assert made.message == "because"
    info = details(MiniInferError(reason, "because", {"limit": "3"}))["ErrorInfo"]
    assert info == error_details_pb2.ErrorInfo(
        reason=reason.value, domain="mini-infer", metadata={"limit": "3"}
    )


@pytest.mark.parametrize("reason", ErrorReason)
def test_what_can_be_retried_says_when(reason: ErrorReason) -> None:
    retryable = {
        ErrorReason.QUEUE_FULL,
        ErrorReason.DEADLINE_UNREACHABLE,
        ErrorReason.ENGINE_STARTING,
        ErrorReason.ENGINE_LOST,
        ErrorReason.TOKENIZER_LOST,
        ErrorReason.DRAINING,
    }
    assert ("RetryInfo" in details(MiniInferError(reason, ""))) == (reason in retryable)


@pytest.mark.parametrize(
    ("reason", "usual_s"),
    [(ErrorReason.QUEUE_FULL, 1.0), (ErrorReason.KV_EXHAUSTED, None)],
    ids=["usual", "none usual"],
)
def test_time_that_an_error_tells_counts(reason: ErrorReason, usual_s: float | None) -> None:
    def told_s(error: MiniInferError) -> float | None:
        retry = details(error).get("RetryInfo")
        if retry is None:
            return None
        assert isinstance(retry, error_details_pb2.RetryInfo)
        return retry.retry_delay.ToTimedelta().total_seconds()

    assert told_s(MiniInferError(reason, "")) == usual_s
    assert told_s(MiniInferError(reason, "", retry_after_s=0.0)) == 0
    assert told_s(MiniInferError(reason, "", retry_after_s=2.25)) == 2.25


def test_violations_are_told() -> None:
    error = InvalidRequestError(
        [
            FieldViolation("sampling.n", "is not supported", ErrorReason.FIELD_NOT_SUPPORTED),
            FieldViolation("stopping.max_tokens", "expected at least 1, got 0"),
        ]
    )
    found = details(error)
    assert isinstance(found["ErrorInfo"], error_details_pb2.ErrorInfo)
    assert found["ErrorInfo"].reason == "FIELD_NOT_SUPPORTED"
    assert isinstance(found["BadRequest"], error_details_pb2.BadRequest)
    assert [
        (each.field, each.description, each.reason) for each in found["BadRequest"].field_violations
    ] == [
        ("sampling.n", "is not supported", "FIELD_NOT_SUPPORTED"),
        ("stopping.max_tokens", "expected at least 1, got 0", "INVALID_FIELD"),
    ]


def test_details_fit_into_metadata() -> None:
    violations = [FieldViolation(f"field{number}" * 100, "é" * 1000) for number in range(1000)]
    error = InvalidRequestError(violations)
    error.metadata.update({"given": "é" * 10_000})
    made = status.to_status(error)
    # On the wire: details in base64, and the message once more, percent-encoded.
    assert (
        len(made.SerializeToString()) * 4 / 3 + 3 * len(made.message.encode()) < MAX_METADATA_BYTES
    )


def test_codes_are_those_that_clients_retry_on() -> None:
    unavailable = [
        reason for reason, code in status.CODES.items() if code is grpc.StatusCode.UNAVAILABLE
    ]
    assert set(unavailable) <= set(status.RETRY_AFTER_S)
