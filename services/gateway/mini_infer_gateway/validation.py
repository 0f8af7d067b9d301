"""Checks of what clients send: every violation of a request is told at once.

Lists come first, alone: their lengths are known without reading them, and reading one of millions
would keep the loop from all other requests.

Fields that are not built yet are refused where they are set, never ignored. Each field of a
request message stands in exactly one of two tables, `SUPPORTED_FIELDS` and `UNSUPPORTED_FIELDS`;
a test walks the descriptors and compares.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from itertools import islice

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from mini_infer.errors import ErrorReason, FieldViolation, InvalidRequestError, MiniInferError
from mini_infer.messages import EngineWelcome
from mini_infer.sampling_params import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS
from mini_infer.scheduling_params import scheduling_violations
from mini_infer.v1 import generate_pb2, inference_service_pb2

from mini_infer_gateway import wire
from mini_infer_gateway.chat_validation import chat_lists, chat_violations, size_violations
from mini_infer_gateway.request import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt
from mini_infer_gateway.status import MAX_VIOLATIONS

SUPPORTED_FIELDS = frozenset(
    {
        "GenerateRequest.text",
        "GenerateRequest.token_ids",
        "GenerateRequest.chat",
        "GenerateRequest.model",
        "GenerateRequest.request_id",
        "GenerateRequest.priority",
        "GenerateRequest.cache_salt",
        "GenerateRequest.sampling",
        "GenerateRequest.stopping",
        "GenerateRequest.output",
        "GenerateRequest.add_special_tokens",
        "TokenIds.ids",
        "Chat.messages",
        "Chat.add_generation_prompt",
        "Chat.tools",
        "Chat.template_kwargs",
        "Chat.template_kwargs_json",
        "Chat.tools_json",
        "Chat.documents_json",
        "Chat.chat_template",
        "Chat.continue_final_message",
        "ChatMessage.role",
        "ChatMessage.content",
        "ChatMessage.name",
        "ChatMessage.tool_calls",
        "ChatMessage.tool_call_id",
        "ChatMessage.reasoning_content",
        "ToolCall.id",
        "ToolCall.function_name",
        "ToolCall.arguments_json",
        "ToolCall.arguments_text",
        "ContentPart.text",
        "SamplingOptions.temperature",
        "SamplingOptions.top_k",
        "SamplingOptions.top_p",
        "SamplingOptions.seed",
        "SamplingOptions.n",
        "StoppingOptions.max_tokens",
        "StoppingOptions.min_tokens",
        "StoppingOptions.stop",
        "StoppingOptions.stop_token_ids",
        "StoppingOptions.ignore_eos",
        "OutputOptions.ids_only",
        "OutputOptions.stream_interval",
        "OutputOptions.skip_special_tokens",
        "OutputOptions.include_stop_str_in_output",
        "TokenizeRequest.text",
        "TokenizeRequest.chat",
        "TokenizeRequest.add_special_tokens",
        "DetokenizeRequest.token_ids",
        "DetokenizeRequest.skip_special_tokens",
        "AbortRequest.request_id",
    }
)
UNSUPPORTED_FIELDS = {
    "GenerateRequest.adapter": ErrorReason.FIELD_NOT_SUPPORTED,
    "GenerateRequest.structured_output": ErrorReason.FIELD_NOT_SUPPORTED,
    "ContentPart.image_url": ErrorReason.UNSUPPORTED_MODALITY,
    "ContentPart.audio_url": ErrorReason.UNSUPPORTED_MODALITY,
    "OutputOptions.logprobs": ErrorReason.FIELD_NOT_SUPPORTED,
    "OutputOptions.prompt_logprobs": ErrorReason.FIELD_NOT_SUPPORTED,
}
"""A message type that stands here as a field is refused as a whole."""

MAX_STREAM_INTERVAL = 1024
MAX_DECODED_IDS = 2**20
"""Of a Detokenize call."""
MAX_LISTED_TOKEN_IDS = 8
"""Bad ids that are named; a prompt may hold millions of them."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def check_generate(
    message: generate_pb2.GenerateRequest, model: EngineWelcome, max_prompt_bytes: int
) -> GenerationRequest:
    """The request that a message stands for.

    Raises:
        MiniInferError: MODEL_NOT_FOUND where another model is asked for,
            CONTEXT_LENGTH_EXCEEDED where there are too many ids.
        InvalidRequestError: With every violation.
    """
    _check_model(message.model, model)
    stopping = message.stopping
    _check_lists(
        ("stopping.stop", len(stopping.stop), MAX_STOP_STRINGS, "strings"),
        ("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids"),
        *chat_lists(message.chat),
    )
    params = wire.read_sampling_params(message)
    num_ids, max_model_len = len(message.token_ids.ids), model.max_model_len
    if num_ids >= max_model_len:
        # Raises what any prompt of so many tokens does, before the ids are read.
        params.resolve(
            model.defaults, num_prompt_tokens=num_ids, max_model_len=max_model_len, seed=0
        )
    prompt = wire.read_prompt(message)
    violations = [
        *_unsupported_fields(message),
        *_prompt_violations(prompt, message, model.vocab_size, max_prompt_bytes),
        *params.violations(model.vocab_size),
        *_option_violations(message),
    ]
    if violations or prompt is None:
        raise InvalidRequestError(violations)
    return GenerationRequest(
        request_id=wire.optional_field(message, "request_id", uuid.uuid4().hex),
        prompt=prompt,
        params=params,
        ids_only=message.output.ids_only,
        stream_interval=wire.optional_field(message.output, "stream_interval", 1),
        priority=message.priority,
        cache_salt=message.cache_salt,
    )


def check_tokenize(
    message: inference_service_pb2.TokenizeRequest, max_prompt_bytes: int
) -> TextPrompt | ChatPrompt:
    """What a message asks to encode; an empty text is fine.

    Raises:
        InvalidRequestError: With every violation.
    """
    _check_lists(*chat_lists(message.chat))
    source = wire.read_tokenize_input(message)
    violations = _unsupported_fields(message)
    match source:
        case None:
            violations.append(FieldViolation("input", "expected text or chat, got neither"))
        case TextPrompt():
            violations += size_violations("text", [source.text], max_prompt_bytes)
        case ChatPrompt():
            violations += chat_violations(source, message.chat, max_prompt_bytes)
    if violations or source is None:
        raise InvalidRequestError(violations)
    return source


def check_detokenize(
    message: inference_service_pb2.DetokenizeRequest, model: EngineWelcome
) -> tuple[list[int], bool]:
    """The ids that a message asks to decode, and whether special tokens are left out.

    Raises:
        InvalidRequestError: With every violation.
    """
    _check_lists(("token_ids", len(message.token_ids), MAX_DECODED_IDS, "ids"))
    token_ids = list(message.token_ids)
    violations = _token_id_violations("token_ids", token_ids, model.vocab_size)
    if violations:
        raise InvalidRequestError(violations)
    return token_ids, wire.optional_field(message, "skip_special_tokens", True)


def check_abort(message: inference_service_pb2.AbortRequest) -> str:
    """The id of the request that a message asks to end.

    Raises:
        InvalidRequestError: Where it cannot be an id.
    """
    violations = _request_id_violations(message.request_id)
    if violations:
        raise InvalidRequestError(violations)
    return message.request_id


def _check_model(name: str, model: EngineWelcome) -> None:
    if name and name != model.model:
        raise MiniInferError(
            ErrorReason.MODEL_NOT_FOUND,
            f"expected model {model.model}, got {name[:128]}",
            {"model": name[:128], "served": model.model},
        )


def _check_lists(*lists: tuple[str, int, int, str]) -> None:
    """Checks the lengths of lists.

    Args:
        lists: Of each the path of its field, its length, the greatest length, and of what.

    Raises:
        InvalidRequestError: With every list that is too long.
    """
    too_long = [
        FieldViolation(field, f"expected at most {maximum} {unit}, got {length}")
        for field, length, maximum, unit in lists
        if length > maximum
    ]
    if too_long:
        raise InvalidRequestError(too_long[:MAX_VIOLATIONS])


def _unsupported_fields(message: Message) -> list[FieldViolation]:
    """The fields that are set and not supported, as far as they are told."""
    return list(islice(_walk(message, ""), MAX_VIOLATIONS))


def _walk(message: Message, prefix: str) -> Iterator[FieldViolation]:
    for field, value in message.ListFields():
        path = prefix + field.name
        reason = UNSUPPORTED_FIELDS.get(f"{message.DESCRIPTOR.name}.{field.name}")
        if reason is not None:
            yield FieldViolation(path, "is not supported: leave it unset", reason)
        elif field.type != FieldDescriptor.TYPE_MESSAGE or _is_well_known(field):
            continue
        elif isinstance(value, Message):
            yield from _walk(value, path + ".")
        else:
            for index, element in enumerate(value):
                yield from _walk(element, f"{path}[{index}].")


def _is_well_known(field: FieldDescriptor) -> bool:
    """Whether a field holds a message of protobuf itself: a value, with no fields of ours."""
    kind = field.message_type
    return kind is not None and kind.file.package == "google.protobuf"


def _prompt_violations(
    prompt: TextPrompt | ChatPrompt | TokenPrompt | None,
    message: generate_pb2.GenerateRequest,
    vocab_size: int,
    max_prompt_bytes: int,
) -> list[FieldViolation]:
    match prompt:
        case None:
            return [FieldViolation("prompt", "expected text, token_ids or chat, got none")]
        case TextPrompt(text=""):
            return [FieldViolation("text", "expected a text, got an empty one")]
        case TextPrompt(text=text):
            return size_violations("text", [text], max_prompt_bytes)
        case TokenPrompt(token_ids=[]):
            return [FieldViolation("token_ids.ids", "expected at least 1 id, got none")]
        case TokenPrompt(token_ids=token_ids):
            return _token_id_violations("token_ids.ids", token_ids, vocab_size)
        case ChatPrompt():
            return chat_violations(prompt, message.chat, max_prompt_bytes)


def _token_id_violations(
    field: str, token_ids: Sequence[int], vocab_size: int
) -> list[FieldViolation]:
    if not token_ids or max(token_ids) < vocab_size:
        return []
    bad = (index for index, token_id in enumerate(token_ids) if token_id >= vocab_size)
    return [
        FieldViolation(
            f"{field}[{index}]", f"expected 0 to {vocab_size - 1}, got {token_ids[index]}"
        )
        for index in islice(bad, MAX_LISTED_TOKEN_IDS)
    ]


def _option_violations(message: generate_pb2.GenerateRequest) -> list[FieldViolation]:
    """What is wrong with the fields that are neither prompt, sampling nor stopping."""
    violations = []
    if message.HasField("request_id"):
        violations += _request_id_violations(message.request_id)
    violations += scheduling_violations(message.priority, message.cache_salt)
    if message.HasField("cache_salt") and not message.cache_salt:
        violations.append(FieldViolation("cache_salt", "expected at least 1 byte, got none"))
    stream_interval = wire.optional_field(message.output, "stream_interval", 1)
    if not 1 <= stream_interval <= MAX_STREAM_INTERVAL:
        expected = f"expected 1 to {MAX_STREAM_INTERVAL}, got {stream_interval}"
        violations.append(FieldViolation("output.stream_interval", expected))
    return violations


def _request_id_violations(request_id: str) -> list[FieldViolation]:
    if _REQUEST_ID.fullmatch(request_id):
        return []
    expected = "expected 1 to 128 characters of [A-Za-z0-9._-]"
    return [FieldViolation("request_id", f"{expected}, got {request_id[:128]!r}")]
