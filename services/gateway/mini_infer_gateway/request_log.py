"""One log line for every Generate call, when it has ended. Never holds prompt or output text."""

from __future__ import annotations

import math
import time
from types import TracebackType

import grpc
import structlog
from mini_infer.errors import ErrorReason, MiniInferError

from mini_infer_gateway.request import TIMEOUT_ROUNDING
from mini_infer_gateway.status import CODES

_log = structlog.get_logger()


class RequestLine:
    """What the line will say. Entered when the call begins; written when the block is left.

    Attributes:
        request_id: None where the call was refused before it had one.
        num_prompt_tokens: Length of the encoded prompt.
        num_output_tokens: Ids delivered.
    """

    def __init__(self, time_remaining_s: float | None) -> None:
        """Starts the clock.

        Args:
            time_remaining_s: Seconds until the call's deadline, or None.
        """
        self.request_id: str | None = None
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self._started_at = time.monotonic()
        self._budget_ms = math.inf if time_remaining_s is None else time_remaining_s * 1000
        self._ttft_ms: float | None = None

    def first_token_sent(self) -> None:
        """Stops the clock of the time to the first token, the first time it is called."""
        if self._ttft_ms is None:
            self._ttft_ms = self._elapsed_ms()

    def __enter__(self) -> RequestLine:
        """Begins the call."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Writes the line; how the block was left tells how the call ended."""
        status, reason = self._outcome(error)
        _log.info(
            "request finished",
            request_id=self.request_id,
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=self.num_output_tokens,
            ttft_ms=self._ttft_ms,
            total_ms=self._elapsed_ms(),
            status=status,
            reason=reason,
        )

    def _outcome(self, error: BaseException | None) -> tuple[str, str | None]:
        """Names of status code and reason."""
        if error is None:
            return grpc.StatusCode.OK.name, None
        if isinstance(error, MiniInferError):
            return CODES[error.reason].name, error.reason.value
        if isinstance(error, Exception) and not isinstance(error, grpc.aio.BaseError):
            return grpc.StatusCode.INTERNAL.name, ErrorReason.INTERNAL_ERROR.value
        # The call was taken away: its deadline has passed, or the client is gone. A client's clock
        # is ahead by what its timeout was rounded up on the way.
        if self._elapsed_ms() >= self._budget_ms * (1 - TIMEOUT_ROUNDING):
            return grpc.StatusCode.DEADLINE_EXCEEDED.name, ErrorReason.DEADLINE.value
        return grpc.StatusCode.CANCELLED.name, None

    def _elapsed_ms(self) -> float:
        return round((time.monotonic() - self._started_at) * 1000, 3)
