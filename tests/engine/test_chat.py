"""Chats in this process: what `LLMEngine.chat` makes of its options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mini_infer import EngineConfig, LLMEngine
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason, InvalidRequestError, MiniInferError, ModelFolderError

DEMO = bundled_model("demo")
EVERYTHING = """{{ {'messages': messages, 'tools': tools, 'documents': documents,
'opened': add_generation_prompt, 'mood': mood | default('none')} | tojson }}"""
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 1.0}}}


def model_folder(folder: Path, **templates: str) -> Path:
    """The demo model with other chat templates."""
    for file in DEMO.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    named = folder / "additional_chat_templates"
    named.mkdir()
    for name, source in templates.items():
        (named / f"{name}.jinja").write_text(source)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLMEngine]:
    folder = model_folder(
        tmp_path_factory.mktemp("model"),
        default=EVERYTHING,
        tool_use="TOOLS {{ tools | tojson }}",
        plain="{% for m in messages %}[{{ m.content }}]{% endfor %}",
        endless="{% for _ in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    )
    with LLMEngine(EngineConfig(model=str(folder))) as engine:
        yield engine


def prompt(engine: LLMEngine, *messages: Any, **options: Any) -> str:
    """The prompt that a conversation becomes."""
    (output,) = engine.chat(list(messages) or [USER], max_tokens=1, **options)
    return engine._tokenizer.decode(output.prompt_token_ids, False)


def test_everything_reaches_the_template(engine: LLMEngine) -> None:
    messages = [USER, {"role": "assistant", "tool_calls": [CALL]}]
    tools = [{"z": 1, "a": 1.0}]
    text = prompt(
        engine,
        *messages,
        tools=tools,
        documents=tools * 2,
        template_kwargs={"mood": "glad"},
        chat_template="default",
        add_generation_prompt=False,
    )
    assert json.dumps(json.loads(text)) == json.dumps(
        {
            "messages": messages,
            "tools": tools,
            "documents": tools * 2,
            "opened": False,
            "mood": "glad",
        }
    )


def test_templates_are_chosen_and_continued(engine: LLMEngine) -> None:
    assert prompt(engine, tools=[{"a": 1}]) == 'TOOLS [{"a": 1}]'
    assert prompt(engine, chat_template="plain") == "[Hi]"
    assert prompt(engine, chat_template="plain", continue_final_message=True) == "[Hi"
    assert json.loads(prompt(engine))["opened"] is True


def test_bad_chats_are_typed_errors_and_the_engine_goes_on(engine: LLMEngine) -> None:
    with pytest.raises(InvalidRequestError, match="role"):
        prompt(engine, {"role": 7})
    with pytest.raises(MiniInferError, match="mode") as caught:
        prompt(engine, template_kwargs={"mode": 1})
    assert caught.value.reason is ErrorReason.INVALID_FIELD
    with pytest.raises(MiniInferError, match="time") as caught:
        prompt(engine, chat_template="endless")
    assert caught.value.reason is ErrorReason.CHAT_TEMPLATE_FAILED
    assert prompt(engine, chat_template="plain") == "[Hi]"


@pytest.mark.parametrize(
    "chats", [USER, iter([USER]), "Hi", [iter([USER])]], ids=["dict", "iterator", "text", "list"]
)
def test_what_is_no_list_of_messages_is_told(engine: LLMEngine, chats: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected a list of messages, got "):
        engine.chat(chats, max_tokens=1)


def test_messages_need_what_a_server_asks_for(engine: LLMEngine) -> None:
    for message in ({"role": "user"}, {"role": "", "content": "a"}):
        with pytest.raises(InvalidRequestError, match=r"chat\.messages\[0\]"):
            prompt(engine, message)
    assert (
        prompt(
            engine,
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            chat_template="plain",
        )
        == "[Hi]"
    )


def test_a_template_that_does_not_compile_is_told_at_the_first_chat(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, default="{% if %}")
    with LLMEngine(EngineConfig(model=str(folder))) as engine:
        assert engine.generate("Once", max_tokens=1)
        for _ in range(2):
            with pytest.raises(ModelFolderError, match="no template"):
                engine.chat([USER])


def test_closing_ends_the_template_process() -> None:
    before = set(psutil.Process().children())
    with LLMEngine() as engine:
        engine.chat([USER], max_tokens=1)
        assert len(set(psutil.Process().children()) - before) == 1
    assert set(psutil.Process().children()) <= before
    for use in (lambda: engine.chat([USER]), lambda: engine.generate("Once")):
        with pytest.raises(RuntimeError, match="this LLMEngine is closed: make a new one"):
            use()
