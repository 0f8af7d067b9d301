"""What can go wrong, as types: one reason per cause, the same for gRPC and in-process users.

The gateway turns these into gRPC statuses (`mini_infer_gateway/status.py`); the in-process API
raises them as they are. A message says what was expected, what came, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class ErrorReason(str, Enum):
    """Stable names of causes; they travel as `google.rpc.ErrorInfo.reason`."""

    INVALID_FIELD = "INVALID_FIELD"
    FIELD_NOT_SUPPORTED = "FIELD_NOT_SUPPORTED"
    UNSUPPORTED_MODALITY = "UNSUPPORTED_MODALITY"
    PROMPT_TOO_LARGE = "PROMPT_TOO_LARGE"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    CHAT_TEMPLATE_FAILED = "CHAT_TEMPLATE_FAILED"
    GRAMMAR_INVALID = "GRAMMAR_INVALID"
    NO_TOKEN_ALLOWED = "NO_TOKEN_ALLOWED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    DUPLICATE_REQUEST_ID = "DUPLICATE_REQUEST_ID"
    QUEUE_FULL = "QUEUE_FULL"
    KV_EXHAUSTED = "KV_EXHAUSTED"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    DEADLINE = "DEADLINE"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"
    ENGINE_STARTING = "ENGINE_STARTING"
    ENGINE_LOST = "ENGINE_LOST"
    TOKENIZER_LOST = "TOKENIZER_LOST"
    DRAINING = "DRAINING"
    NUMERICAL_ERROR = "NUMERICAL_ERROR"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    UNKNOWN = "UNKNOWN"


class MiniInferError(Exception):
    """Base of every error that this project raises on purpose.

    Attributes:
        reason: The cause.
        message: One sentence for a person.
        metadata: Machine-readable details, such as the limit and the value given.
        retry_after_s: Seconds after which trying again can help, where that is known.
    """

    def __init__(
        self,
        reason: ErrorReason,
        message: str,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Makes an error of a cause."""
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request: its path (`sampling.top_p`) and what is wrong with it."""

    field: str
    description: str
    reason: ErrorReason = ErrorReason.INVALID_FIELD


class InvalidRequestError(MiniInferError):
    """A request with bad fields; `violations` holds all of them."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        """Makes one error of all violations; the first one names its reason."""
        if not violations:
            raise ValueError("an invalid request has at least one violation")
        message = "; ".join(f"{each.field}: {each.description}" for each in violations)
        super().__init__(violations[0].reason, message)
        self.violations = tuple(violations)


class ConfigError(Exception):
    """A setting, model folder or environment that the process cannot start with.

    The message is one sentence that says what to do; command lines print it and exit with 2.
    """


class ModelFolderError(ConfigError):
    """A model folder that is missing, damaged, or holds something that is not supported."""
