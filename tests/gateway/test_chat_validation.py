"""What is wrong with chats, field by field; `test_validation.py` has the rest of a request."""

from __future__ import annotations

from typing import Any

import pytest
from gateway.request_samples import (
    HELLO,
    INVALID,
    MAX_PROMPT_BYTES,
    TOO_LARGE,
    chat,
    message,
    violations_of,
)
from gateway.stand_ins import ENGINE_WELCOME
from google.protobuf import struct_pb2 as pb_struct
from mini_infer.errors import ErrorReason, InvalidRequestError
from mini_infer.v1 import generate_pb2 as pb2
from mini_infer_gateway.status import MAX_VIOLATIONS
from mini_infer_gateway.validation import check_generate


def called(*calls: pb2.ToolCall) -> pb2.ChatMessage:
    return pb2.ChatMessage(role="assistant", tool_calls=calls)


def call(arguments: str) -> pb2.ToolCall:
    return pb2.ToolCall(function_name="f", arguments_json=arguments)


def as_struct(**fields: Any) -> pb_struct.Struct:
    struct = pb_struct.Struct()
    struct.update(fields)
    return struct


VALUELESS = pb_struct.Struct(fields={"a": pb_struct.Value()})
LONG = '{"a": "' + "x" * 1000 + '"}'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"chat": chat()}, ("chat.messages", INVALID), id="empty chat"),
        pytest.param(
            {"chat": chat(message("", HELLO))}, ("chat.messages[0].role", INVALID), id="no role"
        ),
        pytest.param(
            {"chat": chat(message("x" * 65, HELLO))},
            ("chat.messages[0].role", INVALID),
            id="long role",
        ),
        pytest.param(
            {"chat": chat(message("user"))}, ("chat.messages[0].content", INVALID), id="no content"
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO, pb2.ContentPart()))},
            ("chat.messages[0].content[1]", INVALID),
            id="empty part",
        ),
        pytest.param(
            {"chat": chat(message("user", pb2.ContentPart(text="x" * 1001)))},
            ("chat", TOO_LARGE),
            id="large chat",
        ),
        pytest.param(
            {"chat": chat(called(pb2.ToolCall()))},
            ("chat.messages[0].tool_calls[0].function_name", INVALID),
            id="call without a name",
        ),
        pytest.param(
            {"chat": chat(called(call("[]")))},
            ("chat.messages[0].tool_calls[0].arguments_json", INVALID),
            id="arguments that are no object",
        ),
        pytest.param(
            {"chat": chat(called(call('{"a":')))},
            ("chat.messages[0].tool_calls[0].arguments_json", INVALID),
            id="arguments that are no JSON",
        ),
        pytest.param(
            {"chat": chat(called(pb2.ToolCall(function_name="f", arguments_text="x" * 1001)))},
            ("chat", TOO_LARGE),
            id="large arguments",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools=[as_struct(a=float("nan"))])},
            ("chat.tools[0]", INVALID),
            id="tool with NaN",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools=[as_struct(a=float("inf"))])},
            ("chat.tools[0]", INVALID),
            id="tool with infinity",
        ),
        pytest.param(
            {
                "chat": chat(
                    message("user", HELLO),
                    tools=[pb_struct.Struct(fields={"a": pb_struct.Value()})],
                )
            },
            ("chat.tools[0]", INVALID),
            id="tool with a value of no kind",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools=[{}], tools_json=["{}"])},
            ("chat.tools", INVALID),
            id="tools in two ways",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools_json=["{}", "[1]"])},
            ("chat.tools_json[1]", INVALID),
            id="tool that is no object",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools_json=["[" * 900])},
            ("chat.tools_json[0]", INVALID),
            id="tool that is no JSON",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools_json=['{"a": NaN}'])},
            ("chat.tools_json[0]", INVALID),
            id="tool with NaN as JSON",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), documents_json=[""])},
            ("chat.documents_json[0]", INVALID),
            id="empty document",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools_json=[LONG])},
            ("chat", TOO_LARGE),
            id="large tool",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), documents_json=[LONG])},
            ("chat", TOO_LARGE),
            id="large document",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), template_kwargs=as_struct(a="x" * 1001))},
            ("chat", TOO_LARGE),
            id="large kwargs",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), tools=[as_struct(a="x" * 1001)])},
            ("chat", TOO_LARGE),
            id="large tool as a struct",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), template_kwargs=as_struct(a=float("nan")))},
            ("chat.template_kwargs", INVALID),
            id="kwargs with NaN",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), template_kwargs_json=LONG)},
            ("chat", TOO_LARGE),
            id="large kwargs as JSON",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), template_kwargs_json="")},
            ("chat.template_kwargs_json", INVALID),
            id="empty kwargs",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), template_kwargs_json="[1]")},
            ("chat.template_kwargs_json", INVALID),
            id="kwargs that are no object",
        ),
        pytest.param(
            {
                "chat": chat(
                    message("user", HELLO), template_kwargs={}, template_kwargs_json='{"a": 1}'
                )
            },
            ("chat.template_kwargs", INVALID),
            id="kwargs in two ways",
        ),
        pytest.param(
            {"chat": chat(message("user", HELLO), chat_template="x" * 1001)},
            ("chat", TOO_LARGE),
            id="large template name",
        ),
        pytest.param(
            {
                "chat": chat(
                    message("user", HELLO), continue_final_message=True, add_generation_prompt=True
                )
            },
            ("chat.continue_final_message", INVALID),
            id="continuation and opening",
        ),
        pytest.param(
            {"chat": chat(called(call("{}")), continue_final_message=True)},
            ("chat.messages[0].content", INVALID),
            id="nothing to continue",
        ),
        pytest.param(
            {
                "chat": chat(
                    pb2.ChatMessage(role="a", content=[HELLO], reasoning_content="x" * 1001)
                )
            },
            ("chat", TOO_LARGE),
            id="large reasoning",
        ),
        pytest.param(
            {"chat": chat(pb2.ChatMessage(role="a", content=[HELLO], name="x" * 1001))},
            ("chat", TOO_LARGE),
            id="large name",
        ),
        pytest.param(
            {"chat": chat(pb2.ChatMessage(role="a", content=[HELLO], tool_call_id="x" * 1001))},
            ("chat", TOO_LARGE),
            id="large id",
        ),
    ],
)
def test_bad_field_is_named(fields: dict[str, Any], expected: tuple[str, ErrorReason]) -> None:
    assert violations_of(**fields) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        (r'{"a": "\udC00\ud83d\ude00"}', "half of a surrogate pair"),
        (r'{"a": "\ud83d\ude00"', "truncated"),
        ("[" * 900, "JSON object"),
        ('{"a":' * 100_000, "less deep"),
    ],
    ids=["surrogate", "second half", "pair", "list", "depth"],
)
def test_bad_json_is_explained(text: str, expected: str) -> None:
    message_of_all = pb2.GenerateRequest(chat=chat(message("user", HELLO), tools_json=[text]))
    with pytest.raises(InvalidRequestError, match=expected):
        check_generate(message_of_all, ENGINE_WELCOME, 10**6)


@pytest.mark.parametrize("field", ["tools", "template_kwargs"])
def test_large_structs_are_told_their_other_field_once(field: str) -> None:
    large = as_struct(a="x" * 2**17)
    given = chat(message("u"), **{field: [large] if field == "tools" else large})
    with pytest.raises(InvalidRequestError) as caught:
        check_generate(pb2.GenerateRequest(chat=given), ENGINE_WELCOME, MAX_PROMPT_BYTES)
    assert caught.value.message.count(f"{field}_json") == 1


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"chat": chat(*[message("u", HELLO)] * 4097)}, "chat.messages"),
        ({"chat": chat(*[message("u", *[HELLO] * 64)] * 257)}, "chat.messages"),
        ({"chat": chat(message("u", *[HELLO] * 65))}, "chat.messages[0].content"),
        ({"chat": chat(called(*[call("")] * 65))}, "chat.messages[0].tool_calls"),
        ({"chat": chat(*[called(*[call("")] * 64)] * 257)}, "chat.messages"),
        ({"chat": chat(message("u"), tools=[{}] * 1025)}, "chat.tools"),
        ({"chat": chat(message("u"), tools=[as_struct(a="x" * 2**17)])}, "chat.tools"),
        ({"chat": chat(message("u"), tools_json=[""] * 1025)}, "chat.tools_json"),
        ({"chat": chat(message("u"), documents_json=[""] * 1025)}, "chat.documents_json"),
        (
            {"chat": chat(message("u"), template_kwargs=as_struct(a="x" * 2**17))},
            "chat.template_kwargs",
        ),
    ],
    ids=[
        "messages",
        "parts",
        "parts of a message",
        "calls of a message",
        "calls",
        "tools",
        "bytes of tools",
        "tools as JSON",
        "documents",
        "bytes of kwargs",
    ],
)
def test_long_lists_are_refused_alone(fields: dict[str, Any], path: str) -> None:
    """Whatever else is wrong: nothing of the request is read."""
    assert violations_of(**fields, request_id="?") == [(path, INVALID)]


@pytest.mark.parametrize(
    "parts", [[pb2.ContentPart()], [pb2.ContentPart(image_url="x")]], ids=["empty", "image"]
)
def test_many_bad_parts_are_told_in_few_violations(parts: list[Any]) -> None:
    found = violations_of(chat=chat(*[message("u", *parts * 4)] * 4096))
    assert len(found) <= 2 * MAX_VIOLATIONS


def test_many_long_lists_are_told_in_few_violations() -> None:
    found = violations_of(chat=chat(*[message("u", *[HELLO] * 65)] * 4096))
    assert len(found) == MAX_VIOLATIONS


def test_roles_count_as_text_of_the_chat() -> None:
    assert violations_of(chat=chat(*[message("r" * 64, HELLO)] * 16)) == [("chat", TOO_LARGE)]
