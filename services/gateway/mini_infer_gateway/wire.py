"""Between protobuf and the gateway's own types: the one place that knows both.

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
    FinishAccounting,
    WireChatMessage,
    WireToolCall,
)
from mini_infer.sampling_params import SamplingParams
from mini_infer.v1 import generate_pb2, inference_service_pb2

from mini_infer_gateway.mailbox import Ending, EndReason
from mini_infer_gateway.request import ChatPrompt, TextPrompt, TokenPrompt

_MAX_EXACT_INTEGER = 2**53

_FINISH_REASONS = {
    EndReason.STOP: generate_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    EndReason.ABORTED: generate_pb2.FINISH_REASON_ABORTED,
}


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


def read_sampling_params(message: generate_pb2.GenerateRequest) -> SamplingParams:
    """Sampling and stopping of a request."""
    sampling, stopping, output = message.sampling, message.stopping, message.output
    return SamplingParams(
        temperature=optional_field(sampling, "temperature"),
        top_k=optional_field(sampling, "top_k"),
        top_p=optional_field(sampling, "top_p"),
        n=optional_field(sampling, "n", 1),
        seed=optional_field(sampling, "seed"),
        max_tokens=optional_field(stopping, "max_tokens"),
        min_tokens=stopping.min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        skip_special_tokens=optional_field(output, "skip_special_tokens", True),
        include_stop_str_in_output=output.include_stop_str_in_output,
    )


class ResponseWriter:
    """Makes the messages of one Generate stream, numbered from 0."""

    def __init__(self, request_id: str, num_prompt_tokens: int, seed: int) -> None:
        """Begins a stream.

        Args:
            request_id: Told in the first message.
            num_prompt_tokens: Told in the first message and in the usage.
            seed: Told in the last message.
        """
        self._request_id = request_id
        self._num_prompt_tokens = num_prompt_tokens
        self._seed = seed
        self._seq = 0

    def delta(
        self, choice_index: int, text: str, token_ids: list[int]
    ) -> generate_pb2.GenerateResponse:
        """More output of a choice."""
        delta = generate_pb2.Delta(text=text, token_ids=token_ids)
        return self._number(generate_pb2.GenerateResponse(choice_index=choice_index, delta=delta))

    def choice_finished(self, choice_index: int, ending: Ending) -> generate_pb2.GenerateResponse:
        """The end of a choice."""
        finished = generate_pb2.ChoiceFinished(
            finish_reason=_FINISH_REASONS[ending.reason],
            num_output_tokens=ending.num_output_tokens,
            stop_string=ending.stop_string,
            stop_token_id=ending.stop_token_id,
        )
        return self._number(
            generate_pb2.GenerateResponse(choice_index=choice_index, choice_finished=finished)
        )

    def finished(self, endings: Sequence[Ending]) -> generate_pb2.GenerateResponse:
        """The end of the call.

        Args:
            endings: By choice index.
        """
        accounting = endings[0].accounting
        usage = generate_pb2.Usage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=sum(each.num_output_tokens for each in endings),
            num_cached_tokens=accounting.num_cached_tokens if accounting else 0,
        )
        finished = generate_pb2.Finished(usage=usage, seed=self._seed)
        return self._number(generate_pb2.GenerateResponse(finished=finished))

    def _number(self, response: generate_pb2.GenerateResponse) -> generate_pb2.GenerateResponse:
        if self._seq == 0:
            response.request_id = self._request_id
            response.num_prompt_tokens = self._num_prompt_tokens
        response.seq = self._seq
        self._seq += 1
        return response


def accounting_metadata(accounting: FinishAccounting) -> tuple[tuple[str, str], ...]:
    """Where a call's time went, as trailing metadata."""
    return (
        ("mini-infer-queue-ms", f"{accounting.queue_ms:.3f}"),
        ("mini-infer-prefill-ms", f"{accounting.prefill_ms:.3f}"),
        ("mini-infer-decode-ms", f"{accounting.decode_ms:.3f}"),
        ("mini-infer-cached-tokens", str(accounting.num_cached_tokens)),
        ("mini-infer-preemptions", str(accounting.num_preemptions)),
        ("mini-infer-steps", str(accounting.num_steps)),
    )


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
            temperature=defaults.temperature, top_k=defaults.top_k, top_p=defaults.top_p
        ),
        fingerprint=engine.fingerprint,
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
