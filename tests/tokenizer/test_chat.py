"""The rules of `chat.py` and what is under it; `test_chat_reference.py` compares whole texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mini_infer.chats import ChatOptions, read_chat
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason, InvalidRequestError, MiniInferError, ModelFolderError
from mini_infer.messages import EncodeChat, WireChatMessage
from mini_infer_tokenizer.chat import ChatTemplates
from mini_infer_tokenizer.template_rendering import MAX_RENDERED_CHARACTERS, TemplateSet

SPECIAL = {"bos_token": "<s>", "image_token": "<image>"}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def render(source: str | dict[str, str], messages: Any = MESSAGES, **options: Any) -> str:
    sources = {"default": source} if isinstance(source, str) else source
    given: ChatOptions = {**options}  # type: ignore[typeddict-item]
    return TemplateSet(sources, SPECIAL).render(read_chat(messages, given))


def refusal(source: str | dict[str, str], messages: Any = MESSAGES, **options: Any) -> str:
    """What is told of an INVALID_FIELD."""
    with pytest.raises(MiniInferError) as caught:
        render(source, messages, **options)
    assert caught.value.reason is ErrorReason.INVALID_FIELD
    return caught.value.message


class TestChoice:
    NAMED = {"default": "D", "tool_use": "T", "rag": "R"}  # noqa: RUF012

    def test_default(self) -> None:
        assert render(self.NAMED) == "D"

    def test_tools_have_their_own(self) -> None:
        assert render(self.NAMED, tools=[{}]) == "T"
        assert render(self.NAMED, tools=[]) == "D"
        assert render({"default": "D"}, tools=[{}]) == "D"

    def test_a_name_comes_before_both(self) -> None:
        assert render(self.NAMED, chat_template="rag") == "R"
        assert render(self.NAMED, chat_template="default", tools=[{}]) == "D"

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        message = refusal(self.NAMED, chat_template="{{ messages }}")
        assert "default, rag, tool_use" in message
        assert "{{ messages }}" in message

    def test_without_a_default_a_name_is_needed(self) -> None:
        assert "rag" in refusal({"rag": "R"})
        assert render({"rag": "R"}, chat_template="rag") == "R"


class TestKwargs:
    SOURCE = """{% if mood is defined %}{{ mood }}{% endif %}{% set own = 1 %}{{ own }}
    {%- macro m(p) %}{{ p ~ inner }}{% endmacro %}{{ bos_token ~ strftime_now('%%') ~ tools }}"""

    @pytest.mark.parametrize("value", ["glad", 3, 1.5, None, True, [1, "a"], {"b": {"a": 1}}])
    def test_what_the_template_reads_is_taken(self, value: object) -> None:
        text = render("{{ mood | tojson }}", template_kwargs={"mood": value})
        assert json.loads(text) == value

    @pytest.mark.parametrize(
        "name",
        [
            "other",
            "own",
            "p",
            "messages",
            "tools",
            "documents",
            "add_generation_prompt",
            "bos_token",
            "eos_token",
            "image_token",
            "strftime_now",
            "raise_exception",
            "range",
            "namespace",
            "self",
            "",
        ],
    )
    def test_what_it_does_not_read_or_is_set_already_is_refused(self, name: str) -> None:
        message = refusal(self.SOURCE, template_kwargs={"mood": 1, name: 1})
        assert "(inner, mood)" in message
        assert repr(name) in message

    def test_a_template_that_reads_nothing(self) -> None:
        assert "none at all" in refusal("x", template_kwargs={"mood": 1})


class TestContinuation:
    def test_the_text_ends_with_the_content(self) -> None:
        source = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        assert render(source, continue_final_message=True) == "[Hi][Ho"

    def test_a_content_that_is_written_twice_leaves_no_trace(self) -> None:
        source = "{{ messages[-1].content }}|{{ messages[-1].content | trim }}|"
        assert render(source, continue_final_message=True) == "Ho|Ho"

    @pytest.mark.parametrize("source", ["", "{{ messages[0].content }}", "{{ messages[-1].role }}"])
    def test_a_template_that_leaves_the_content_out_fails(self, source: str) -> None:
        with pytest.raises(MiniInferError, match="cannot be continued") as caught:
            render(source, continue_final_message=True)
        assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED

    def test_nothing_to_continue(self) -> None:
        message = {"role": "assistant", "reasoning_content": "Hm"}
        with pytest.raises(InvalidRequestError) as caught:
            render("x", [*MESSAGES, message], continue_final_message=True)
        assert [each.field for each in caught.value.violations] == ["chat.messages[2].content"]

    def test_an_opening_behind_it_is_refused(self) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            render("x", continue_final_message=True, add_generation_prompt=True)
        assert caught.value.violations[0].field == "chat.continue_final_message"

    def test_the_opening_is_there_unless_it_is_continued_or_refused(self) -> None:
        source = "{{ messages[-1].content }}{{ add_generation_prompt }}"
        assert render(source) == "HoTrue"
        assert render(source, add_generation_prompt=False) == "HoFalse"
        assert render("{{ add_generation_prompt }}" + source, continue_final_message=True) == (
            "FalseHo"
        )


class TestMessages:
    def test_what_is_absent_has_no_key(self) -> None:
        message = {"role": "assistant", "content": None, "reasoning_content": "Hm"}
        assert json.loads(render("{{ messages | tojson }}", [message])) == [
            {"thinking": "Hm", "role": "assistant", "reasoning_content": "Hm"}
        ]

    def test_all_fields(self) -> None:
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"b": 1}}}]
        message = {
            "role": "assistant",
            "content": "",
            "name": "Ann",
            "tool_calls": calls,
            "tool_call_id": "0",
            "reasoning_content": "Hm",
        }
        assert json.loads(render("{{ messages | tojson }}", [message])) == [
            {"thinking": "Hm", **message}
        ]

    def test_arguments_that_are_text_stay_text(self) -> None:
        call = {"function": {"name": "f", "arguments": '{"b":1}'}}
        source = "{{ messages[0].tool_calls[0] | tojson }}"
        text = render(source, [{"role": "assistant", "tool_calls": [call]}])
        assert json.loads(text) == {"type": "function", **call}

    def test_numbers_and_the_order_of_keys_are_kept(self) -> None:
        tool = {"z": 1, "a": [1.0, 10**30, -0.5], "m": {"y": True, "b": None}}
        assert render("{{ tools[0] | tojson }}", tools=[tool]) == json.dumps(tool)
        assert render("{{ documents[0] | tojson }}", documents=[tool]) == json.dumps(tool)

    def test_no_message(self) -> None:
        refusal("x", [])

    def test_json_that_is_none(self) -> None:
        message = [WireChatMessage("user", "")]
        for text in ("", "3", "[1]", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000):
            for field in ("tools", "documents"):
                chat = EncodeChat(0, message, True, **{field: [text]})
                with pytest.raises(MiniInferError) as caught:
                    TemplateSet({"default": "x"}, {}).render(chat)
                assert caught.value.reason is ErrorReason.INVALID_FIELD

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("1e999", "finite"),
            ("-1e999", "finite"),
            ("Infinity", "finite"),
            ("NaN", "finite"),
            ("9" * 4301, "at most 4300 digits"),
            ("[" * 100_000 + "]" * 100_000, "less deep"),
            (r'"\ud800"', "half of a surrogate pair"),
            (r'"\uDFFF\ud83d"', "half of a surrogate pair"),
            (r'{"\ud800": 1}', "half of a surrogate pair"),
        ],
        ids=lambda value: value[:20],
    )
    def test_json_of_what_cannot_be_written(self, value: str, message: str) -> None:
        chat = EncodeChat(0, [WireChatMessage("user", "")], True, tools=[f'{{"a": {value}}}'])
        with pytest.raises(MiniInferError, match=message) as caught:
            TemplateSet({"default": "x"}, {}).render(chat)
        assert caught.value.reason is ErrorReason.INVALID_FIELD
        assert "set_int_max_str_digits" not in caught.value.message

    @pytest.mark.parametrize("value", ["9" * 4300, "1e308", r'"\ud83d\ude00"', r'"\\ud800"'])
    def test_json_that_just_can(self, value: str) -> None:
        text = f'{{"a": {value}}}'
        chat = EncodeChat(0, [WireChatMessage("user", "")], True, tools=[text])
        written = TemplateSet({"default": "{{ tools[0] | tojson }}"}, {}).render(chat)
        assert json.loads(written) == json.loads(text)


@pytest.mark.parametrize(
    ("messages", "options", "field"),
    [
        ([{"role": 7}], {}, "chat.messages[0].role"),
        ([{"content": "a"}], {}, "chat.messages[0]"),
        (["Hi"], {}, "chat.messages[0]"),
        ([*MESSAGES, {"role": "user", "text": "a"}], {}, "chat.messages[2]"),
        ([{"role": "user", "content": 3}], {}, "chat.messages[0].content"),
        (
            [{"role": "a", "tool_calls": [{"function": {"arguments": {}}}]}],
            {},
            "chat.messages[0].tool_calls[0].function",
        ),
        (
            [{"role": "a", "tool_calls": [{"type": "x", "function": {"name": "f"}}]}],
            {},
            "chat.messages[0].tool_calls[0].type",
        ),
        (MESSAGES, {"tools": "x"}, "chat.tools"),
        (MESSAGES, {"tools": [{}, 3]}, "chat.tools[1]"),
        (MESSAGES, {"tools": [{}, {"a": object()}]}, "chat.tools[1]"),
        (MESSAGES, {"documents": [{"a": float("nan")}]}, "chat.documents[0]"),
        (MESSAGES, {"template_kwargs": {"a": {1, 2}}}, "chat.template_kwargs"),
        (MESSAGES, {"chat_template": 3}, "chat.chat_template"),
        (MESSAGES, {"add_generation_prompt": "yes"}, "chat.add_generation_prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_of_a_wrong_type_are_named(messages: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_chat(messages, options)
    assert [each.field for each in caught.value.violations] == [field]


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="tool_choice"):
        read_chat(MESSAGES, {"tool_choice": "auto"})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for _ in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "it wrote more than"),
    ],
)
def test_failure_is_typed_and_in_the_templates_words(source: str, message: str) -> None:
    with pytest.raises(MiniInferError, match=message) as caught:
        render(source)
    assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED


@pytest.mark.parametrize("source", ["{{ 1 | nothing }}", "{{ 1 is nothing }}", "{% nothing %}"])
def test_unknown_name_is_told_with_its_line_in_one(source: str) -> None:
    with pytest.raises(MiniInferError, match=r"'nothing'.*\(line 2\)$") as caught:
        render(f"first\n{source}")
    assert "\n" not in caught.value.message


def test_longest_allowed_text_is_rendered() -> None:
    messages = [{"role": "user", "content": "x" * MAX_RENDERED_CHARACTERS}]
    assert len(render("{{ messages[0].content }}", messages)) == MAX_RENDERED_CHARACTERS


def test_a_generation_block_is_its_content_in_a_scope_of_its_own() -> None:
    source = "{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}{{ x is defined }}"
    assert render(source) == "a1False"


class TestTemplates:
    """The whole of it, with real processes."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path

    @pytest.fixture
    def templates(self, folder: Path) -> Iterator[ChatTemplates]:
        (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
        templates = ChatTemplates(folder, SPECIAL)
        yield templates
        templates.close()

    def test_renders(self, templates: ChatTemplates) -> None:
        templates.start()
        assert templates.names == ("default",)
        assert templates.render(read_chat(MESSAGES, {})) == "<s>Hi"

    def test_a_model_without_templates(self, folder: Path) -> None:
        templates = ChatTemplates(folder, SPECIAL)
        templates.start()
        assert templates.names == ()
        with pytest.raises(MiniInferError, match="no chat template") as caught:
            templates.render(read_chat(MESSAGES, {}))
        assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED
        templates.close()

    def test_what_does_not_compile_is_told_at_the_start(self, folder: Path) -> None:
        named = folder / "additional_chat_templates"
        named.mkdir()
        (named / "rag.jinja").write_text("{% if %}")
        templates = ChatTemplates(folder, SPECIAL)
        with pytest.raises(ModelFolderError, match="'rag' is no template"):
            templates.start()
        templates.close()

    def test_the_demo_model(self) -> None:
        templates = ChatTemplates(bundled_model("demo"), {"bos_token": "<|bos|>"})
        text = templates.render(read_chat(MESSAGES[:1], {}))
        assert text == "<|bos|><|user|>Hi<|end|><|assistant|>"
        templates.close()
