"""Errors as gRPC statuses with google.rpc details.

Each reason has one status code. Details travel in trailing metadata, of which clients accept
8 KiB by default, so their size is bounded here.
"""

from __future__ import annotations

import math
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from mini_infer.errors import ErrorReason, InvalidRequestError, MiniInferError

ERROR_DOMAIN = "mini-infer"
MAX_MESSAGE_BYTES = 256
"""Of the status message, which travels twice, once percent-encoded."""
MAX_DETAIL_BYTES = 112
"""Of a field, a description or a metadata value."""
MAX_VIOLATIONS = 16
"""Violations that are told; a request with more is told the first ones."""

CODES = {
    ErrorReason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.FIELD_NOT_SUPPORTED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.UNSUPPORTED_MODALITY: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.PROMPT_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.CONTEXT_LENGTH_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.CHAT_TEMPLATE_FAILED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.GRAMMAR_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.NO_TOKEN_ALLOWED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.REQUEST_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.DUPLICATE_REQUEST_ID: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.KV_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.SLOW_CONSUMER: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.DEADLINE_UNREACHABLE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorReason.ENGINE_STARTING: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ENGINE_LOST: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.TOKENIZER_LOST: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.NUMERICAL_ERROR: grpc.StatusCode.INTERNAL,
    ErrorReason.INTERNAL_ERROR: grpc.StatusCode.INTERNAL,
    ErrorReason.UNKNOWN: grpc.StatusCode.UNKNOWN,
}
RETRY_AFTER_S = {
    ErrorReason.QUEUE_FULL: 1.0,
    ErrorReason.DEADLINE_UNREACHABLE: 1.0,
    ErrorReason.ENGINE_STARTING: 2.0,
    ErrorReason.ENGINE_LOST: 2.0,
    ErrorReason.TOKENIZER_LOST: 2.0,
    ErrorReason.DRAINING: 1.0,
}
"""When trying again can help, where the error itself does not say so."""
_PUSHBACK = frozenset({ErrorReason.QUEUE_FULL, ErrorReason.DEADLINE_UNREACHABLE})
"""Overload, which also pushes back on the retries of gRPC itself."""


async def abort(
    context: grpc.aio.ServicerContext[object, object], error: MiniInferError
) -> NoReturn:
    """Ends a call with the status of an error."""
    status = to_status(error)
    metadata: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString())
    ]
    retry_after_s = _retry_after_s(error)
    if error.reason in _PUSHBACK and retry_after_s is not None:
        pushback_ms = math.ceil(retry_after_s * 1000)
        metadata.append(("grpc-retry-pushback-ms", str(pushback_ms)))
    await context.abort(CODES[error.reason], status.message, tuple(metadata))
    raise AssertionError("context.abort always raises")


def to_status(error: MiniInferError) -> status_pb2.Status:
    """The status with all its details."""
    status = status_pb2.Status(
        code=CODES[error.reason].value[0], message=_cut(error.message, MAX_MESSAGE_BYTES)
    )
    details: list[
        error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo
    ] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason.value,
            domain=ERROR_DOMAIN,
            metadata={key: _cut(value, MAX_DETAIL_BYTES) for key, value in error.metadata.items()},
        )
    ]
    if isinstance(error, InvalidRequestError):
        details.append(_bad_request(error))
    retry_after_s = _retry_after_s(error)
    if retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _retry_after_s(error: MiniInferError) -> float | None:
    if error.retry_after_s is not None:
        return error.retry_after_s
    return RETRY_AFTER_S.get(error.reason)


def _bad_request(error: InvalidRequestError) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(each.field, MAX_DETAIL_BYTES),
                description=_cut(each.description, MAX_DETAIL_BYTES),
                reason=each.reason.value,
            )
            for each in error.violations[:MAX_VIOLATIONS]
        ]
    )


def _cut(text: str, max_bytes: int) -> str:
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    return encoded[: max_bytes - 3].decode(errors="ignore") + "..."
