"""Templates in the manner of the common families, rendered as transformers renders them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mini_infer.chats import ChatOptions, read_chat
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer_tokenizer.template_pool import TemplatePool
from tokenizers import Tokenizer

FOLDER = Path(__file__).parent / "templates"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
DEMO = bundled_model("demo")
SOURCES["demo"] = (DEMO / "chat_template.jinja").read_text()
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How <warm> it is & 'so on'",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Où? 狐"},
                "days": {"type": "integer", "default": 3, "minimum": 0.5},
                "units": {"type": "array", "items": {"type": "string"}},
                "more": {"type": "object", "additionalProperties": {"type": "number"}},
            },
            "required": ["place"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {}}}


def said(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    turns = [
        {"role": "assistant" if index % 2 else "user", "content": content}
        for index, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def call(arguments: Any, number: str = "call01234") -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": number, "type": "function", "function": function}


def called(*calls: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    answers = [
        {"role": "tool", "content": f"{index}°", "name": "weather", "tool_call_id": each["id"]}
        for index, each in enumerate(calls)
    ]
    return [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", **fields, "tool_calls": list(calls)},
        *answers,
    ]


ARGUMENTS = {"place": "Köln", "days": 2, "exact": 1.0, "deep": {"b": [None, True], "a": "<"}}
THOUGHT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "\nTwo and two.\n"},
]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], ChatOptions]] = {
    "one turn": (said("Hi"), {"add_generation_prompt": True}),
    "history": (said("Hi", "Ho", "And?"), {"add_generation_prompt": False}),
    "system": (said("Hi", "Ho", "And?", system=" Be kind. "), {"add_generation_prompt": True}),
    "unicode": (
        said("  Füchsin <b>狐</b> 👩‍👩‍👧 \"'&\\n \n", "\tنعم\u200f e\u0301 \x00\n", ""),
        {"add_generation_prompt": True},
    ),
    "special tokens in the text": (said("<s>[INST] </s><|im_end|> {{ x }} {% if %}"), {}),
    "roles that do not alternate": (
        [*said("Hi"), *said("Hi"), *said("Hi", "Ho")],
        {"add_generation_prompt": True},
    ),
    "unknown role": ([{"role": "wizard", "content": "Abracadabra"}], {}),
    "only a system message": (said(system="Be kind."), {"add_generation_prompt": True}),
    "tools": (said("Warm?"), {"tools": [WEATHER, TIME], "add_generation_prompt": True}),
    "tools and system": (said("Warm?", system="Use them."), {"tools": [WEATHER]}),
    "one call": (called(call(ARGUMENTS)), {"tools": [WEATHER], "add_generation_prompt": True}),
    "two calls": (
        called(call(ARGUMENTS), call({}, "call56789"), content="Let me see."),
        {"tools": [TIME, WEATHER], "add_generation_prompt": True},
    ),
    "arguments as text": (called(call('{"place": "Rom"}')), {"add_generation_prompt": True}),
    "calls without tools": (
        [*called(call({"place": "Rom"}, "short")), {"role": "assistant", "content": "Yes."}],
        {},
    ),
    "documents": (
        said("What do foxes eat?"),
        {
            "documents": [{"title": "Foxes", "text": "Mice."}, {"text": "Füchse", "number": 1.0}],
            "add_generation_prompt": True,
        },
    ),
    "tools and documents": (
        said("Warm?"),
        {"tools": [TIME], "documents": [{"text": "x"}], "add_generation_prompt": True},
    ),
    "reasoning": (
        [*THOUGHT, *said("And 3 + 3?")],
        {"add_generation_prompt": True},
    ),
    "reasoning at the end": (THOUGHT, {}),
    "think tags": (said("2 + 2?", "<think>\nHm.\n</think>\n\n4"), {}),
    "continued": (said("Tell me", "Once upon a"), {"continue_final_message": True}),
    "continued with spaces": (
        said("Tell me", " Once \n upon a \n"),
        {"continue_final_message": True},
    ),
    "continued user": (said("Tell me that", system="."), {"continue_final_message": True}),
    "continued repetition": (said("a", "a", "a", "a"), {"continue_final_message": True}),
    "continued thought": (
        said("2 + 2?", "<think>\nHm.\n</think>\n\n4"),
        {"continue_final_message": True},
    ),
    "continued nothing": (said("Tell me", ""), {"continue_final_message": True}),
    "continued call": (called(call({}))[:2], {"continue_final_message": True}),
    "names": ([{"role": "user", "content": "Hi", "name": "Ann"}], {}),
}  # fmt: skip
KWARGS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3_thinking", "one turn", {"enable_thinking": False}),
    ("llama31_tools", "tools", {"tools_in_user_message": False, "date_string": "1 Jan 2026"}),
    ("llama31_tools", "tools", {"builtin_tools": ["search", "code_interpreter"]}),
    ("llama31_tools", "calls without tools", {"builtin_tools": ["weather"]}),
    ("command_r", "documents", {"citation_mode": "fast"}),
    ("granite", "documents", {"controls": {"citations": True, "length": "long"}}),
    ("granite", "one turn", {"thinking": True, "controls": {}}),
]

Render = Callable[[str, list[dict[str, Any]], ChatOptions], str]


@pytest.fixture(scope="module")
def rendered() -> Iterator[Render]:
    """By this project, through its processes."""
    pool = TemplatePool(SOURCES, SPECIAL, num_processes=1)

    def render(name: str, messages: list[dict[str, Any]], options: ChatOptions) -> str:
        given: ChatOptions = {"add_generation_prompt": False, **options, "chat_template": name}
        return pool.render(read_chat(messages, given))

    yield render
    pool.close()


@pytest.fixture(scope="module")
def expected() -> Render:
    """By transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

        library = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        oracle = PreTrainedTokenizerFast(tokenizer_object=library, **SPECIAL)

    def render(name: str, messages: list[dict[str, Any]], options: ChatOptions) -> str:
        given: dict[str, Any] = {"add_generation_prompt": False, **options}
        kwargs = given.pop("template_kwargs", {})
        text: str = oracle.apply_chat_template(
            messages, chat_template=SOURCES[name], tokenize=False, **given, **kwargs
        )
        # Where a template writes the last content twice, transformers leaves its mark in the first.
        return text.replace("CONTINUE_FINAL_MESSAGE_TAG ", "")

    return render


def check(
    rendered: Render,
    expected: Render,
    name: str,
    messages: list[dict[str, Any]],
    options: ChatOptions,
) -> bool:
    """Whether transformers renders it; then this project does so equally, and else refuses."""
    try:
        text = expected(name, messages, options)
    except Exception:
        with pytest.raises(MiniInferError) as caught:
            rendered(name, messages, options)
        reasons = {ErrorReason.CHAT_TEMPLATE_FAILED, ErrorReason.INVALID_FIELD}
        assert caught.value.reason in reasons
        return False
    assert rendered(name, messages, options) == text
    return True


@pytest.mark.parametrize("name", SOURCES)
def test_renders_as_transformers_does(rendered: Render, expected: Render, name: str) -> None:
    outcomes = [
        check(rendered, expected, name, messages, options)
        for messages, options in CONVERSATIONS.values()
    ]
    assert sum(outcomes) >= 8


@pytest.mark.parametrize(("name", "conversation", "kwargs"), KWARGS)
def test_template_kwargs_as_in_transformers(
    rendered: Render, expected: Render, name: str, conversation: str, kwargs: dict[str, Any]
) -> None:
    messages, options = CONVERSATIONS[conversation]
    given: ChatOptions = {**options, "template_kwargs": kwargs}
    assert check(rendered, expected, name, messages, given)
    assert rendered(name, messages, given) != rendered(name, messages, options)


def test_every_conversation_is_rendered_by_some_template_and_most_by_many(
    rendered: Render, expected: Render
) -> None:
    """Else the comparison above would compare refusals."""
    num_rendered = 0
    for messages, options in CONVERSATIONS.values():
        outcomes = [check(rendered, expected, name, messages, options) for name in SOURCES]
        if options.get("continue_final_message") and "content" not in messages[-1]:
            assert not any(outcomes)
        else:
            assert sum(outcomes) >= 3
        num_rendered += sum(outcomes)
    assert num_rendered >= 300
