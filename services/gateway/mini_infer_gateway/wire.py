"""Between protobuf and the gateway's own types: prompts, and what is told of model and server.

`sampling_wire.py` reads the options of requests, `response_writer.py` writes what Generate answers.
Reading never fails: what a message says is carried over, and `validation.py` judges it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec
from google.protobuf import struct_pb2
from google.protobuf.message import Message
from mini_infer.messages import (
    EncodeChat,
    EngineBeat,
    EngineWelcome,
    WireChatMessage,
    WireToolCall,
)
from mini_infer.v1 import generate_pb2, inference_service_pb2

from mini_infer_gateway.request import ChatPrompt, TextPrompt, TokenPrompt

_MAX_EXACT_INTEGER = 2**53


def optional_field(message: Message, name: str, default: Any = None) -> Any:
    """The value of an `optional` field, or the default where it is absent."""
    return getattr(message, name) if message.HasField(name) else default


def read_prompt(
    message: generate_pb2.GenerateRequest,
) -> TextPrompt | ChatPrompt | TokenPrompt | None:
    """The prompt of a request, None where none is set."""
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text, optional_field(message, "add_special_tokens", True))
        case "chat":
            return read_chat(message.chat)
        case "token_ids":
            return TokenPrompt(list(message.token_ids.ids))
        case _:
            return None


def read_tokenize_input(
    message: inference_service_pb2.TokenizeRequest,
) -> TextPrompt | ChatPrompt | None:
    """The input of a Tokenize call, None where none is set."""
    match message.WhichOneof("input"):
        case "text":
            return TextPrompt(message.text, optional_field(message, "add_special_tokens", True))
        case "chat":
            return read_chat(message.chat)
        case _:
            return None


def read_chat(chat: generate_pb2.Chat) -> ChatPrompt:
    """A conversation; the texts of a message's parts are joined."""
    continues = optional_field(chat, "continue_final_message", False)
    return ChatPrompt(
        EncodeChat(
            job=0,
            messages=[_read_message(each) for each in chat.messages],
            add_generation_prompt=optional_field(chat, "add_generation_prompt", not continues),
            tools=[*map(struct_as_json, chat.tools), *chat.tools_json],
            documents=list(chat.documents_json),
            template_kwargs=(
                struct_as_json(chat.template_kwargs)
                if chat.template_kwargs.fields
                else chat.template_kwargs_json
            ),
            chat_template=chat.chat_template,
            continue_final_message=continues,
        )
    )


def _read_message(message: generate_pb2.ChatMessage) -> WireChatMessage:
    return WireChatMessage(
        role=message.role,
        content="".join(part.text for part in message.content) if message.content else None,
        name=optional_field(message, "name"),
        tool_calls=[_read_tool_call(each) for each in message.tool_calls],
        tool_call_id=optional_field(message, "tool_call_id"),
        reasoning_content=optional_field(message, "reasoning_content"),
    )


def _read_tool_call(call: generate_pb2.ToolCall) -> WireToolCall:
    is_text = call.WhichOneof("arguments") == "arguments_text"
    has_json = call.WhichOneof("arguments") == "arguments_json"
    arguments = call.arguments_text if is_text else call.arguments_json if has_json else "{}"
    return WireToolCall(call.function_name, arguments, not is_text, optional_field(call, "id"))


def struct_as_json(struct: struct_pb2.Struct) -> str:
    """JSON of a Struct, with its keys in alphabetical order since it keeps none.

    What JSON has no word for becomes NaN, which no reader of JSON takes.
    """
    return json.dumps(_plain_object(struct), ensure_ascii=False, sort_keys=True)


def _plain_object(struct: struct_pb2.Struct) -> dict[str, Any]:
    return {name: _plain(value) for name, value in struct.fields.items()}


def _plain(value: struct_pb2.Value) -> Any:
    match value.WhichOneof("kind"):
        case "struct_value":
            return _plain_object(value.struct_value)
        case "list_value":
            return [_plain(each) for each in value.list_value.values]
        case "number_value":
            number = value.number_value
            # A Struct has no integers; up to here a double means one and no other.
            is_integer = abs(number) <= _MAX_EXACT_INTEGER and number.is_integer()
            return int(number) if is_integer else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "null_value":
            return None
        case _:
            return math.nan


def model_info(
    engine: EngineWelcome, *, has_chat_template: bool
) -> inference_service_pb2.GetModelInfoResponse:
    """The model that is served."""
    defaults = engine.defaults
    return inference_service_pb2.GetModelInfoResponse(
        model=engine.model,
        architecture=engine.architecture,
        max_context_tokens=engine.max_model_len,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        has_chat_template=has_chat_template,
        dtype=engine.dtype,
        default_sampling=generate_pb2.SamplingOptions(
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
            typical_p=defaults.typical_p,
            repetition_penalty=defaults.repetition_penalty,
        ),
        fingerprint=engine.fingerprint,
        default_stopping=generate_pb2.StoppingOptions(max_tokens=defaults.max_tokens),
    )


def server_info(
    *,
    version: str,
    uptime_s: float,
    num_active_requests: int,
    draining: bool,
    engines: Sequence[tuple[EngineWelcome | None, EngineBeat | None]],
) -> inference_service_pb2.GetServerInfoResponse:
    """The state of the server."""
    return inference_service_pb2.GetServerInfoResponse(
        version=version,
        uptime_seconds=uptime_s,
        num_active_requests=num_active_requests,
        draining=draining,
        engines=[_engine_info(welcome, beat) for welcome, beat in engines],
    )


def _engine_info(
    welcome: EngineWelcome | None, beat: EngineBeat | None
) -> inference_service_pb2.EngineInfo:
    info = inference_service_pb2.EngineInfo(ready=welcome is not None)
    if welcome is not None:
        info.engine_id = welcome.engine_id
        info.epoch = welcome.epoch
        info.num_blocks = welcome.num_blocks
        info.block_size = welcome.block_size
    if welcome is not None and beat is not None:
        info.num_steps = beat.num_steps
        info.num_running = beat.num_running
        info.num_waiting = beat.num_waiting
        info.num_used_blocks = beat.num_used_blocks
        info.num_preemptions = beat.num_preemptions
        info.num_swapped = beat.num_swapped
        info.num_cached_blocks = beat.num_cached_blocks
        num_taken_blocks = beat.num_used_blocks + beat.num_cached_blocks
        info.num_free_blocks = max(0, welcome.num_blocks - num_taken_blocks)
        info.MergeFrom(inference_service_pb2.EngineInfo(**msgspec.structs.asdict(beat.counters)))
    return info
