"""Checks of what clients send: every violation of a request is told at once.

Lists come first, alone: their lengths are known without reading them, and reading one of millions
would keep the loop from all other requests.

`supported_fields.py` knows the fields that are refused wherever they are set.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from itertools import islice

from mini_infer.errors import ErrorReason, FieldViolation, InvalidRequestError, MiniInferError
from mini_infer.messages import EngineWelcome
from mini_infer.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from mini_infer.scheduling_params import scheduling_violations
from mini_infer.structured_output import MAX_CHOICE_TEXTS, MAX_GRAMMAR_BYTES
from mini_infer.v1 import generate_pb2, inference_service_pb2

from mini_infer_gateway import wire
from mini_infer_gateway.chat_validation import chat_lists, chat_violations, size_violations
from mini_infer_gateway.request import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt
from mini_infer_gateway.sampling_wire import read_sampling_params
from mini_infer_gateway.status import MAX_VIOLATIONS
from mini_infer_gateway.supported_fields import unsupported_fields

MAX_STREAM_INTERVAL = 1024
MAX_DECODED_IDS = 2**20
"""Of a Detokenize call."""
MAX_LISTED_TOKEN_IDS = 8
"""Bad ids that are named; a prompt may hold millions of them."""
_LANGUAGE_FRAME_BYTES = 4
"""What protobuf adds to a language of `MAX_GRAMMAR_BYTES`."""
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
    _check_lists(*_option_lists(message), *chat_lists(message.chat))
    params = read_sampling_params(message)
    num_ids, max_model_len = len(message.token_ids.ids), model.max_model_len
    if num_ids >= max_model_len:
        # Raises what any prompt of so many tokens does, before the ids are read.
        params.resolve(
            model.defaults, num_prompt_tokens=num_ids, max_model_len=max_model_len, seed=0
        )
    prompt = wire.read_prompt(message)
    violations = [
        *unsupported_fields(message),
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
    violations = unsupported_fields(message)
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


def _option_lists(message: generate_pb2.GenerateRequest) -> list[tuple[str, int, int, str]]:
    """The lists of a request's options: path of the field, length, greatest length, of what."""
    sampling, stopping = message.sampling, message.stopping
    structured = message.structured_output
    return [
        ("sampling.logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIASES, "ids"),
        (
            "sampling.allowed_token_ids",
            len(sampling.allowed_token_ids),
            MAX_ALLOWED_TOKEN_IDS,
            "ids",
        ),
        ("sampling.bad_words", len(sampling.bad_words), MAX_BAD_WORDS, "strings"),
        ("stopping.stop", len(stopping.stop), MAX_STOP_STRINGS, "strings"),
        ("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids"),
        (
            "structured_output.choice",
            len(structured.choice.texts),
            MAX_CHOICE_TEXTS,
            "texts",
        ),
        (
            "structured_output",
            structured.ByteSize() - _LANGUAGE_FRAME_BYTES,
            MAX_GRAMMAR_BYTES,
            "bytes",
        ),
    ]


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
    structured = message.structured_output
    if structured.WhichOneof("language") == "json_object" and not structured.json_object:
        violations.append(
            FieldViolation("structured_output.json_object", "must be true, got false")
        )
    return violations


def _request_id_violations(request_id: str) -> list[FieldViolation]:
    if _REQUEST_ID.fullmatch(request_id):
        return []
    expected = "expected 1 to 128 characters of [A-Za-z0-9._-]"
    return [FieldViolation("request_id", f"{expected}, got {request_id[:128]!r}")]
