"""Options of chats that the clients refuse; `test_client.py` has those that reach the server."""

from __future__ import annotations

from typing import Any

import pytest
from mini_infer.client_wire import generate_request, tokenize_request
from mini_infer.errors import InvalidRequestError

CHAT = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def test_absent_chat_options_stay_absent() -> None:
    chat = generate_request(CHAT, {"tools": None, "documents": [], "template_kwargs": {}}).chat
    assert {field.name for field, _ in chat.ListFields()} == {"messages"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"template_kwargs": {"a": [{"b": 2**53 + 1}]}}, "chat.template_kwargs"),
        ({"template_kwargs": {"a": "\ud800"}}, "chat.template_kwargs"),
        ({"chat_template": "\ud800"}, "chat.chat_template"),
        ({"tools": [3]}, "chat.tools[0]"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "chat.continue_final_message",
        ),
    ],
    ids=["large integer", "surrogate", "surrogate in a name", "tool", "continuation"],
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
