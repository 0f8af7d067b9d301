"""Conversations as Python users write them, checked, and turned into what processes send.

The clients and the in-process engine take the same dicts, and refuse the same ones: messages as in
the OpenAI API, whose contents are text. JSON objects are kept as text from here on: only a text
keeps the order of the keys and tells 1 from 1.0, and chat templates write out both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import msgspec

from mini_infer.errors import ErrorReason, FieldViolation, InvalidRequestError
from mini_infer.messages import EncodeChat, WireChatMessage, WireToolCall

ChatMessage = Mapping[str, Any]
"""A turn of a conversation: {"role": "user", "content": "Hello"}.

The content is a text or a list of {"type": "text", "text": ...}. Beside these two, a message may
have a "name", "tool_calls" (a list of {"id": ..., "type": "function", "function": {"name": ...,
"arguments": dict or text}}), a "tool_call_id" and "reasoning_content". What is None counts as
absent, and so do other keys with an empty value.
"""

MAX_ROLE_BYTES = 64
MAX_DEPTH = 100
"""Of objects and lists in each other; templates and the readers of JSON have little room."""
_TOO_DEEP = f"objects and lists are at most {MAX_DEPTH} deep in each other"
_MAX_INTEGER_BITS = 14_000
"""Python reads integers of up to 4,300 digits."""


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
    function: Any
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class _TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[Any] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
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
        read = self._messages(messages)
        continues = bool(given.continue_final_message)
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
        if None not in read:
            self._violations += continuation_violations(chat)
        if self._violations:
            raise InvalidRequestError(self._violations)
        return chat

    def _messages(self, messages: Sequence[ChatMessage]) -> list[WireChatMessage | None]:
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            expected = f"expected a list of messages, got {type(messages).__name__}"
            self._refuse("chat.messages", expected)
            return []
        if not messages:
            self._violations.append(NO_MESSAGES)
        return [
            self._message(f"chat.messages[{index}]", each) for index, each in enumerate(messages)
        ]

    def _message(self, path: str, message: ChatMessage) -> WireChatMessage | None:
        num_violations = len(self._violations)
        read = self._convert(path, message, _Message)
        if read is None:
            return None
        content = self._content(f"{path}.content", read.content)
        calls = [
            self._tool_call(f"{path}.tool_calls[{index}]", index, call)
            for index, call in enumerate(read.tool_calls or ())
        ]
        made = WireChatMessage(
            read.role,
            content,
            read.name,
            [each for each in calls if each is not None],
            read.tool_call_id,
            read.reasoning_content,
        )
        if len(self._violations) > num_violations:
            return None
        self._violations += message_violations(path, made)
        return made

    def _content(self, path: str, content: str | list[Any] | None) -> str | None:
        """The text of a content; a list of no parts is none."""
        if not isinstance(content, list):
            return content
        texts = [self._text(f"{path}[{index}]", part) for index, part in enumerate(content)]
        return "".join(texts) if texts else None

    def _text(self, path: str, part: Any) -> str:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            unsupported = f"expected a part of type 'text': {kind!r:.80} is not supported"
            self._refuse(path, unsupported, ErrorReason.UNSUPPORTED_MODALITY)
            return ""
        read = self._convert(path, part, _TextPart)
        return "" if read is None else read.text

    def _tool_call(self, path: str, index: int, call: Any) -> WireToolCall | None:
        read = self._convert(path, call, _ToolCall)
        if read is None:
            return None
        function = self._convert(f"{path}.function", read.function, _Function)
        if function is None:
            return None
        if read.index not in (None, index):
            # An index that is the call's place says nothing; another one would be lost.
            self._refuse(f"{path}.index", f"expected {index}, its place, got {read.index}")
        arguments = function.arguments
        is_object = isinstance(arguments, dict)
        text = arguments if isinstance(arguments, str) else self._json(path, arguments)
        return WireToolCall(function.name, text, is_object, read.id)

    def _objects(self, path: str, objects: list[dict[str, Any]] | None) -> list[str]:
        return [self._json(f"{path}[{index}]", each) for index, each in enumerate(objects or ())]

    def _json(self, path: str, value: dict[str, Any]) -> str:
        try:
            _check_bounds(value)
            text = json.dumps(value, allow_nan=False, ensure_ascii=False)
            text.encode()
        except UnicodeEncodeError:
            self._refuse(path, "expected Unicode text, got half of a surrogate pair")
        except (TypeError, ValueError) as error:
            self._refuse(path, f"expected what JSON can hold: {error}")
        else:
            return text
        return ""

    def _convert(self, path: str, value: Any, kind: type[_M]) -> _M | None:
        """Checks a dict; what carries nothing in it counts as absent."""
        if isinstance(value, Mapping):
            value = {
                name: each
                for name, each in value.items()
                if each is not None and (name in kind.__struct_fields__ or not _is_empty(each))
            }
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            description, _, where = str(error).partition(" - at `$")
            self._refuse(path + where.removesuffix("`"), description)
        except RecursionError:
            self._refuse(path, _TOO_DEEP)
        return None

    def _refuse(
        self, path: str, description: str, reason: ErrorReason = ErrorReason.INVALID_FIELD
    ) -> None:
        self._violations.append(FieldViolation(path, description, reason))


NO_MESSAGES = FieldViolation("chat.messages", "expected at least 1 message, got none")


def message_violations(path: str, message: WireChatMessage) -> Iterator[FieldViolation]:
    """What no message may lack, whoever sends it."""
    num_role_bytes = len(message.role.encode(errors="surrogatepass"))
    if not 1 <= num_role_bytes <= MAX_ROLE_BYTES:
        expected = f"expected 1 to {MAX_ROLE_BYTES} bytes of UTF-8, got {num_role_bytes}"
        yield FieldViolation(f"{path}.role", expected)
    if message.content is None and not message.tool_calls and message.reasoning_content is None:
        expected = "expected content, tool calls or reasoning, got none of them"
        yield FieldViolation(f"{path}.content", expected)
    for index, call in enumerate(message.tool_calls):
        if not call.name:
            field = f"{path}.tool_calls[{index}].function_name"
            yield FieldViolation(field, "expected a name, got none")


def continuation_violations(chat: EncodeChat) -> Iterator[FieldViolation]:
    """What keeps a chat's last message from being continued, where it is to be."""
    if not chat.continue_final_message:
        return
    if chat.add_generation_prompt:
        yield FieldViolation(
            "chat.continue_final_message",
            "expected add_generation_prompt to be false with it: a message that goes on is not "
            "followed by the opening of another one",
        )
    if chat.messages and chat.messages[-1].content is None:
        field = f"chat.messages[{len(chat.messages) - 1}].content"
        yield FieldViolation(field, "expected content to continue, got none")


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | Sequence | Mapping) and not value


def _check_bounds(value: Any, depth: int = 0) -> None:
    """Refuses what some reader of JSON would not take.

    Raises:
        ValueError: With what is wrong.
    """
    if depth > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            _check_bounds(each, depth + 1)
    elif isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise ValueError(f"integers have at most {_MAX_INTEGER_BITS} bits")
