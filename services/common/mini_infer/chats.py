"""Conversations as Python users write them, checked, and turned into what processes send.

The clients and the in-process engine take the same dicts, those of the OpenAI API and of
`transformers`, and refuse the same ones. JSON objects are kept as text from here on: only a text
keeps the order of the keys and tells 1 from 1.0, and chat templates write out both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import msgspec

from mini_infer.errors import FieldViolation, InvalidRequestError
from mini_infer.messages import EncodeChat, WireChatMessage, WireToolCall

ChatMessage = Mapping[str, Any]
"""A turn of a conversation: {"role": "user", "content": "Hello"}.

Beside these two, a message may have a "name", "tool_calls" (a list of {"id": ..., "type":
"function", "function": {"name": ..., "arguments": dict or text}}), a "tool_call_id" and
"reasoning_content".
"""


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt; docs/chat.md says more.

    Attributes:
        add_generation_prompt: Whether the prompt ends with the opening of the assistant's turn.
            Absent: True, unless the final message is continued.
        continue_final_message: Whether the prompt ends with the content of the last message.
        tools: JSON schemas of functions that the model may call.
        documents: What the answer may rest on, such as {"title": ..., "text": ...}.
        template_kwargs: More variables for the chat template, such as {"enable_thinking": False}.
        chat_template: Name of the template, where the model has several.
    """

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    template_kwargs: Mapping[str, Any] | None
    chat_template: str | None


class _Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] | str = msgspec.field(default_factory=dict)


class _ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    function: _Function
    id: str | None = None
    type: Literal["function"] = "function"


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None


def read_chat(messages: Sequence[ChatMessage], options: ChatOptions) -> EncodeChat:
    """What a conversation means to the processes.

    Raises:
        TypeError: Where an option is not known.
        InvalidRequestError: With every value that is of a wrong type.
    """
    unknown = options.keys() - set(_Options.__struct_fields__)
    if unknown:
        raise TypeError(f"got unknown options: {', '.join(sorted(unknown))}")
    return _Reader().read(messages, options)


_M = TypeVar("_M", bound=msgspec.Struct)


class _Reader:
    """Reads a conversation, and remembers what is wrong with it."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def read(self, messages: Sequence[ChatMessage], options: ChatOptions) -> EncodeChat:
        given = self._convert("chat", options, _Options) or _Options()
        read = [
            self._message(f"chat.messages[{index}]", each) for index, each in enumerate(messages)
        ]
        continues = bool(given.continue_final_message)
        if continues and given.add_generation_prompt:
            self._violations.append(cannot_continue_and_open())
        chat = EncodeChat(
            job=0,
            messages=[each for each in read if each is not None],
            add_generation_prompt=(
                not continues
                if given.add_generation_prompt is None
                else given.add_generation_prompt
            ),
            tools=self._objects("chat.tools", given.tools),
            documents=self._objects("chat.documents", given.documents),
            template_kwargs=(
                self._json("chat.template_kwargs", given.template_kwargs)
                if given.template_kwargs
                else ""
            ),
            chat_template=given.chat_template or "",
            continue_final_message=continues,
        )
        if self._violations:
            raise InvalidRequestError(self._violations)
        return chat

    def _message(self, path: str, message: ChatMessage) -> WireChatMessage | None:
        read = self._convert(path, message, _Message)
        if read is None:
            return None
        calls = [
            self._tool_call(f"{path}.tool_calls[{index}]", call)
            for index, call in enumerate(read.tool_calls or ())
        ]
        return WireChatMessage(
            read.role, read.content, read.name, calls, read.tool_call_id, read.reasoning_content
        )

    def _tool_call(self, path: str, call: _ToolCall) -> WireToolCall:
        arguments = call.function.arguments
        is_object = isinstance(arguments, dict)
        text = arguments if isinstance(arguments, str) else self._json(path, arguments)
        return WireToolCall(call.function.name, text, is_object, call.id)

    def _objects(self, path: str, objects: list[dict[str, Any]] | None) -> list[str]:
        return [self._json(f"{path}[{index}]", each) for index, each in enumerate(objects or ())]

    def _json(self, path: str, value: dict[str, Any]) -> str:
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            self._violations.append(FieldViolation(path, f"expected what JSON can hold: {error}"))
            return ""

    def _convert(self, path: str, value: Any, kind: type[_M]) -> _M | None:
        """Checks a dict; what is None in it counts as absent."""
        if isinstance(value, Mapping):
            value = {name: each for name, each in value.items() if each is not None}
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            description, _, where = str(error).partition(" - at `$")
            field = path + where.removesuffix("`")
            self._violations.append(FieldViolation(field, description))
            return None


def cannot_continue_and_open() -> FieldViolation:
    """What is wrong with a chat that sets both flags."""
    return FieldViolation(
        "chat.continue_final_message",
        "expected add_generation_prompt to be false with it: a message that goes on is not "
        "followed by the opening of another one",
    )
