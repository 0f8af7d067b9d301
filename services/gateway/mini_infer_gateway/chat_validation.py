"""Checks of the chats that clients send; `validation.py` checks the requests around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec
from mini_infer.chats import NO_MESSAGES, continuation_violations, message_violations
from mini_infer.errors import ErrorReason, FieldViolation
from mini_infer.v1 import generate_pb2

from mini_infer_gateway.request import ChatPrompt
from mini_infer_gateway.status import MAX_VIOLATIONS

MAX_MESSAGES = 4096
"""Of a chat."""
MAX_MESSAGE_PARTS = 64
MAX_PARTS = 16_384
"""Of all messages of a chat together; tool calls are counted in the same way."""
MAX_TOOLS = 1024
MAX_DOCUMENTS = 1024
MAX_STRUCT_BYTES = 128 * 2**10
"""Reading a Struct takes the loop up to 0.08 ms a KiB; JSON, which is only looked at, 0.001 ms."""


class _AnyObject(msgspec.Struct):
    """Decodes from any JSON object, and takes nothing of it in."""


_object_decoder = msgspec.json.Decoder(_AnyObject)
_HALF_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
"""As JSON escapes it."""


def chat_lists(chat: generate_pb2.Chat) -> list[tuple[str, int, int, str]]:
    """The lists of a chat: path of the field, length, greatest length, and of what.

    Those of messages and tools are told as far as there may be messages and tools.
    """
    messages = list(islice(chat.messages, MAX_MESSAGES))
    num_parts = [len(each.content) for each in messages]
    num_calls = [len(each.tool_calls) for each in messages]
    num_tool_bytes = sum(each.ByteSize() for each in islice(chat.tools, MAX_TOOLS))
    num_kwarg_bytes = chat.template_kwargs.ByteSize()
    return [
        ("chat.messages", len(chat.messages), MAX_MESSAGES, "messages"),
        ("chat.messages", sum(num_parts), MAX_PARTS, "parts"),
        ("chat.messages", sum(num_calls), MAX_PARTS, "tool calls"),
        ("chat.tools", len(chat.tools), MAX_TOOLS, "tools"),
        ("chat.tools", num_tool_bytes, MAX_STRUCT_BYTES, "bytes (more in tools_json)"),
        ("chat.tools_json", len(chat.tools_json), MAX_TOOLS, "tools"),
        ("chat.documents_json", len(chat.documents_json), MAX_DOCUMENTS, "documents"),
        (
            "chat.template_kwargs",
            num_kwarg_bytes,
            MAX_STRUCT_BYTES,
            "bytes (more in template_kwargs_json)",
        ),
        *(
            (f"chat.messages[{index}].content", length, MAX_MESSAGE_PARTS, "parts")
            for index, length in enumerate(num_parts)
        ),
        *(
            (f"chat.messages[{index}].tool_calls", length, MAX_MESSAGE_PARTS, "tool calls")
            for index, length in enumerate(num_calls)
        ),
    ]


def chat_violations(
    prompt: ChatPrompt, chat: generate_pb2.Chat, max_prompt_bytes: int
) -> list[FieldViolation]:
    """What is wrong with a chat whose lists are of allowed lengths.

    Args:
        prompt: The chat as it was read.
        chat: The same as it was sent.
        max_prompt_bytes: Of all its texts together.
    """
    if not chat.messages:
        return [NO_MESSAGES]
    return [
        *size_violations("chat", prompt.texts(), max_prompt_bytes),
        *islice(_message_violations(prompt, chat), MAX_VIOLATIONS),
        *islice(_option_violations(prompt, chat), MAX_VIOLATIONS),
    ]


def size_violations(
    field: str, texts: Iterable[str], max_prompt_bytes: int
) -> list[FieldViolation]:
    """A violation where texts are too large together."""
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes <= max_prompt_bytes:
        return []
    description = f"expected at most {max_prompt_bytes} bytes of UTF-8, got {num_bytes}"
    return [FieldViolation(field, description, ErrorReason.PROMPT_TOO_LARGE)]


def _message_violations(prompt: ChatPrompt, chat: generate_pb2.Chat) -> Iterator[FieldViolation]:
    for index, message in enumerate(chat.messages):
        field = f"chat.messages[{index}]"
        yield from message_violations(field, prompt.chat.messages[index])
        for part_index, part in enumerate(message.content):
            if part.WhichOneof("part") is None:
                path = f"{field}.content[{part_index}]"
                yield FieldViolation(path, "expected a text, got none")
        for call_index, call in enumerate(message.tool_calls):
            if call.HasField("arguments_json"):
                path = f"{field}.tool_calls[{call_index}].arguments_json"
                yield from _object_violations(path, call.arguments_json)


def _option_violations(prompt: ChatPrompt, chat: generate_pb2.Chat) -> Iterator[FieldViolation]:
    if chat.tools and chat.tools_json:
        yield FieldViolation("chat.tools", "expected either tools or tools_json, got both")
    # What was sent as a Struct is JSON by now.
    tools_field = "chat.tools" if chat.tools else "chat.tools_json"
    for index, tool in enumerate(prompt.chat.tools):
        yield from _object_violations(f"{tools_field}[{index}]", tool)
    for index, document in enumerate(prompt.chat.documents):
        yield from _object_violations(f"chat.documents_json[{index}]", document)
    has_kwargs_json = chat.HasField("template_kwargs_json")
    if chat.HasField("template_kwargs") and has_kwargs_json:
        expected = "expected either template_kwargs or template_kwargs_json, got both"
        yield FieldViolation("chat.template_kwargs", expected)
    elif has_kwargs_json or prompt.chat.template_kwargs:
        kwargs_field = "chat.template_kwargs_json" if has_kwargs_json else "chat.template_kwargs"
        yield from _object_violations(kwargs_field, prompt.chat.template_kwargs)
    yield from continuation_violations(prompt.chat)


def _object_violations(field: str, text: str) -> Iterator[FieldViolation]:
    try:
        _object_decoder.decode(text)
    except RecursionError:
        yield FieldViolation(field, "expected objects and lists less deep in each other")
    except msgspec.DecodeError as error:
        if _HALF_SURROGATE.search(text):
            yield FieldViolation(field, "expected Unicode text, got half of a surrogate pair")
        else:
            yield FieldViolation(field, f"expected a JSON object, got another text: {error}")
