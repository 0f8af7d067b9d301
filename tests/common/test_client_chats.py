"""Options of chats that the clients refuse; `test_client_requests.py` has those that they send."""

from __future__ import annotations

from typing import Any

import pytest
from mini_infer.chats import MAX_DEPTH, read_chat
from mini_infer.client_wire import generate_request, tokenize_request
from mini_infer.errors import ErrorReason, FieldViolation, InvalidRequestError
from mini_infer.v1 import generate_pb2 as pb2

CHAT = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def test_absent_chat_options_stay_absent() -> None:
    chat = generate_request(CHAT, {"tools": None, "documents": [], "template_kwargs": {}}).chat
    assert {field.name for field, _ in chat.ListFields()} == {"messages"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"template_kwargs": {"a": [{"b": 10**5000}]}}, "chat.template_kwargs"),
        ({"template_kwargs": {"a": {"\udfff": 1}}}, "chat.template_kwargs"),
        ({"template_kwargs": {"a": "\ud800"}}, "chat.template_kwargs"),
        ({"chat_template": "\ud800"}, "chat.chat_template"),
        ({"tools": [3]}, "chat.tools[0]"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "chat.continue_final_message",
        ),
    ],
    ids=[
        "large integer",
        "surrogate in a key",
        "surrogate",
        "surrogate in a name",
        "tool",
        "continuation",
    ],
)
def test_chat_option_that_no_field_holds_is_named(options: Any, field: str) -> None:
    for request in (
        lambda: generate_request(CHAT, options),
        lambda: tokenize_request(CHAT, None, options),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            request()
        assert [each.field for each in caught.value.violations] == [field]


@pytest.mark.parametrize("prompt", ["hi", [4, 5]])
def test_options_of_chats_are_for_chats(prompt: Any) -> None:
    with pytest.raises(TypeError, match="tools"):
        generate_request(prompt, {"tools": [TOOL]})
    if isinstance(prompt, str):
        with pytest.raises(TypeError, match="tools"):
            tokenize_request(prompt, None, {"tools": [TOOL]})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 500, 100_000])
def test_objects_are_so_deep_and_no_deeper(depth: int) -> None:
    """Counted with the object that holds them."""
    options: Any = {"template_kwargs": {"a": nested(depth - 1)}}
    if depth == MAX_DEPTH:
        chat = generate_request(CHAT, options).chat
        assert chat.template_kwargs_json == '{"a": ' + "[" * 99 + "1" + "]" * 99 + "}"
    else:
        (violation,) = refused(CHAT, options)
        assert violation.field == "chat.template_kwargs"
        assert f"at most {MAX_DEPTH} deep" in violation.description


def test_a_list_in_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert [each.field for each in refused(CHAT, {"tools": [{"a": endless}]})] == ["chat.tools[0]"]


def test_large_integers_are_no_lesson_in_python() -> None:
    (violation,) = refused(CHAT, {"tools": [{"a": 10**5000}]})
    assert "set_int_max_str_digits" not in violation.description


@pytest.mark.parametrize(
    "prompt", [CHAT[0], iter(CHAT), None, 3], ids=["one message", "iterator", "None", "number"]
)
def test_prompt_that_is_no_list_is_refused_with_its_type(prompt: Any) -> None:
    for request in (
        lambda: generate_request(prompt, {}),
        lambda: tokenize_request(prompt, None, {}),
    ):
        with pytest.raises(InvalidRequestError, match=f"got {type(prompt).__name__}"):
            request()


def test_chat_options_that_are_none_are_absent_beside_a_text() -> None:
    assert generate_request("hi", {"tools": None}) == pb2.GenerateRequest(text="hi")
    tokenize_request("hi", None, {"template_kwargs": None})


def refused(messages: Any, options: Any) -> tuple[FieldViolation, ...]:
    with pytest.raises(InvalidRequestError) as caught:
        read_chat(messages, options)
    return caught.value.violations


class TestOpenAIMessages:
    """What `model_dump()` of a message of the OpenAI client holds, and what its users write."""

    def test_text_parts_are_joined(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "annotations": []}]
        (message,) = read_chat([{"role": "user", "content": parts}], {}).messages
        assert message.content == "ab"

    @pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
    def test_other_parts_are_named(self, kind: str) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
        (violation,) = refused([{"role": "user", "content": parts}], {})
        assert violation.field == "chat.messages[0].content[1]"
        assert violation.reason is ErrorReason.UNSUPPORTED_MODALITY
        assert repr(kind) in violation.description

    @pytest.mark.parametrize("part", ["a", {"type": "text"}, {"text": "a"}, {"type": 3}])
    def test_what_is_no_part_is_named(self, part: Any) -> None:
        (violation,) = refused([{"role": "user", "content": [part]}], {})
        assert violation.field.startswith("chat.messages[0].content[0]")
        assert violation.reason is ErrorReason.INVALID_FIELD

    def test_what_carries_nothing_is_absent(self) -> None:
        call: dict[str, Any] = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        odd_call = {**call, "index": 0, "type": "function", "custom": None}
        odd = {"refusal": None, "annotations": [], "audio": None, "tool_calls": [odd_call]}
        assert read_chat([{**message, **odd}], {}) == read_chat([message], {})

    def test_what_carries_something_is_refused(self) -> None:
        for key in ({"refusal": "no"}, {"annotations": [1]}, {"weight": 0}):
            (violation,) = refused([{**CHAT[0], **key}], {})
            assert next(iter(key)) in violation.description

    def test_an_index_is_the_place_of_its_call(self) -> None:
        calls = [{"index": place, "function": {"name": "f"}} for place in (0, 0)]
        (violation,) = refused([{"role": "assistant", "tool_calls": calls}], {})
        assert violation.field == "chat.messages[0].tool_calls[1].index"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "", "content": "a"}, "role"),
        ({"role": "é" * 33, "content": "a"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": None, "tool_calls": []}, "content"),
        ({"role": "a", "tool_calls": [{"function": {"name": ""}}]}, "tool_calls[0].function_name"),
    ],
    ids=["no role", "long role", "no content", "no parts", "no calls", "no name"],
)
def test_message_that_a_server_would_refuse(message: Any, field: str) -> None:
    """`LLMEngine.chat` has no server to say so; `test_chat_validation.py` has the same cases."""
    (violation,) = refused([CHAT[0], message], {})
    assert violation.field == f"chat.messages[1].{field}"


def test_a_chat_of_no_message() -> None:
    assert [each.field for each in refused([], {})] == ["chat.messages"]
