"""Between protobuf and what users of the clients see: requests and errors.

`generation_progress.py` has the responses.
Both clients are thin over this module; nothing here sends or receives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from mini_infer.chats import ChatMessage, ChatOptions
from mini_infer.config import DEFAULT_PORT
from mini_infer.errors import (
    ErrorReason,
    FieldViolation,
    InvalidRequestError,
    MiniInferError,
)
from mini_infer.request_writer import RequestWriter
from mini_infer.sampling_params import RepetitionDetection
from mini_infer.v1 import generate_pb2, inference_service_pb2

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids, or a conversation."""

DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"
_LOOPBACK = re.compile(r"((ipv4|ipv6|dns):/*)?(localhost|127\.[\d.]+|\[::1\])(:\d+)?")
READINESS = health_pb2.HealthCheckRequest(service="readiness")
READINESS_POLL_S = 0.05

_REQUEST_FIELDS = frozenset({"model", "request_id", "priority", "cache_salt", "add_special_tokens"})
_CHAT_OPTIONS = frozenset(ChatOptions.__annotations__)
_SAMPLING_FIELDS = frozenset(generate_pb2.SamplingOptions.DESCRIPTOR.fields_by_name)
_STOPPING_FIELDS = frozenset(generate_pb2.StoppingOptions.DESCRIPTOR.fields_by_name)
_OUTPUT_FIELDS = frozenset(generate_pb2.OutputOptions.DESCRIPTOR.fields_by_name)
_LANGUAGE_FIELDS = frozenset(generate_pb2.StructuredOutput.DESCRIPTOR.fields_by_name)
_REASONS_OF_CODES = {grpc.StatusCode.DEADLINE_EXCEEDED: ErrorReason.DEADLINE}


class GenerateOptions(ChatOptions, total=False):
    """Options of `generate`; an absent one takes the server's or the model's default.

    The fields of the same names in `proto/mini_infer/v1/generate.proto` say what they mean, and
    `ChatOptions` those that conversations alone have. At most one of `json_schema`, `json_object`,
    `regex`, `grammar` and `choice` may be set: the language that the output belongs to.
    """

    model: str
    request_id: str
    priority: int
    cache_salt: str
    add_special_tokens: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    repetition_detection: RepetitionDetection | Mapping[str, int]
    ids_only: bool
    stream_interval: int
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    logprobs: int
    prompt_logprobs: int
    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]


class RequestFailed(MiniInferError):
    """The server ended a request with an error, or could not be reached.

    Attributes:
        code: The gRPC status code.
        reason: The cause; UNKNOWN where the server named none, or one that is not known here.
        message: One sentence for a person.
        metadata: Machine-readable details.
        violations: Every bad field of the request.
        retry_after_s: Seconds after which trying again can help, or None.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: ErrorReason,
        message: str,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        """Makes an error of what a status says."""
        super().__init__(reason, message, metadata, retry_after_s)
        self.code = code
        self.violations = tuple(violations)

    def __str__(self) -> str:
        """Code, reason and message."""
        return f"{self.code.name} ({self.reason.value}): {self.message}"


def channel_options(address: str) -> tuple[tuple[str, int], ...]:
    """The options of a connection.

    Args:
        address: Host and port.
    """
    options = [
        ("grpc.max_receive_message_length", -1),
        # A server that starts up is noticed within half a second.
        ("grpc.max_reconnect_backoff_ms", 500),
    ]
    if _LOOPBACK.fullmatch(address):
        # A proxy that the environment names is another machine: its loopback is not this one.
        options.append(("grpc.enable_http_proxy", 0))
    return tuple(options)


def generate_request(prompt: Prompt, options: GenerateOptions) -> generate_pb2.GenerateRequest:
    """The message of a `generate` call.

    Raises:
        TypeError: Where an option is not known.
        InvalidRequestError: With every value that its field cannot hold.
    """
    if not isinstance(prompt, Sequence):
        expected = "expected a text, a list of token ids or a list of messages, got "
        violation = FieldViolation("prompt", expected + type(prompt).__name__)
        raise InvalidRequestError([violation])
    given: dict[str, Any] = {**options}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if isinstance(given.get("repetition_detection"), RepetitionDetection):
        given["repetition_detection"] = asdict(given["repetition_detection"])
    chat_options = cast(ChatOptions, _take(given, _CHAT_OPTIONS))
    request = generate_pb2.GenerateRequest()
    writer = RequestWriter()
    writer.write(request, "", _take(given, _REQUEST_FIELDS))
    writer.write(request.sampling, "sampling.", _take(given, _SAMPLING_FIELDS))
    writer.write(request.stopping, "stopping.", _take(given, _STOPPING_FIELDS))
    writer.write(request.output, "output.", _take(given, _OUTPUT_FIELDS))
    writer.write_structured_output(request, _take(given, _LANGUAGE_FIELDS))
    if given:
        raise TypeError(f"generate() got unknown options: {', '.join(sorted(given))}")
    if isinstance(prompt, str):
        writer.write(request, "", {"text": prompt})
    elif prompt and isinstance(prompt[0], Mapping):
        writer.write_chat(request.chat, cast(Sequence[ChatMessage], prompt), chat_options)
        chat_options = {}
    else:
        request.token_ids.SetInParent()
        writer.write(request.token_ids, "token_ids.", {"ids": prompt})
    _refuse_without_chat(chat_options)
    writer.raise_violations()
    return request


def tokenize_request(
    source: str | Sequence[ChatMessage],
    add_special_tokens: bool | None,
    chat_options: ChatOptions,
) -> inference_service_pb2.TokenizeRequest:
    """The message of a `tokenize` call.

    Raises:
        TypeError: Where an option is not known.
        InvalidRequestError: With every value that its field cannot hold.
    """
    request = inference_service_pb2.TokenizeRequest()
    writer = RequestWriter()
    writer.write(request, "", {"add_special_tokens": add_special_tokens})
    if isinstance(source, str):
        _refuse_without_chat(chat_options)
        writer.write(request, "", {"text": source})
    else:
        writer.write_chat(request.chat, source, chat_options)
    writer.raise_violations()
    return request


def detokenize_request(
    token_ids: Sequence[int], skip_special_tokens: bool | None
) -> inference_service_pb2.DetokenizeRequest:
    """The message of a `detokenize` call.

    Raises:
        InvalidRequestError: With every value that its field cannot hold.
    """
    request = inference_service_pb2.DetokenizeRequest()
    writer = RequestWriter()
    fields = {"token_ids": token_ids, "skip_special_tokens": skip_special_tokens}
    writer.write(request, "", fields)
    writer.raise_violations()
    return request


def request_failed(error: grpc.RpcError) -> RequestFailed:
    """What the status of a failed call says."""
    # Every RpcError of a client's call is such a call itself; the stubs do not say so.
    call: Any = error
    code, message = call.code(), call.details() or ""
    reason = _REASONS_OF_CODES.get(code, ErrorReason.UNKNOWN)
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_s = None
    for detail in _details(call):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason, metadata = _reason(detail.reason), dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.BadRequest):
            violations = [
                FieldViolation(each.field, each.description, _reason(each.reason))
                for each in detail.field_violations
            ]
        else:
            retry_after_s = detail.retry_delay.ToTimedelta().total_seconds()
    return RequestFailed(code, reason, message, metadata, violations, retry_after_s)


def cancelled() -> RequestFailed:
    """What reading a stream raises after its `cancel`."""
    return RequestFailed(grpc.StatusCode.CANCELLED, ErrorReason.UNKNOWN, "cancelled by the client")


def not_ready_in_time(timeout: float) -> RequestFailed:
    """What `wait_until_ready` raises."""
    return RequestFailed(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        ErrorReason.DEADLINE,
        f"the server was not ready within {timeout:g} s",
    )


def _details(
    call: Any,
) -> list[error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo]:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(call)
    except ValueError:  # Details that contradict the status: some proxy made the one or other.
        return []
    found = []
    for packed in status.details if status else ():
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
        ):
            detail = kind()
            if packed.Unpack(detail):
                found.append(detail)
    return found


def _reason(name: str) -> ErrorReason:
    try:
        return ErrorReason(name)
    except ValueError:  # Of a newer server.
        return ErrorReason.UNKNOWN


def _take(given: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Moves the named options out."""
    return {name: given.pop(name) for name in names & given.keys()}


def _refuse_without_chat(chat_options: ChatOptions) -> None:
    names = ", ".join(sorted(name for name, value in chat_options.items() if value is not None))
    if names:
        raise TypeError(f"options of conversations, given with another prompt: {names}")
