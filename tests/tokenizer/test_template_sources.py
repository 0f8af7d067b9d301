"""Where chat templates come from in a model folder, and what is refused there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from mini_infer.errors import ModelFolderError
from mini_infer_tokenizer.template_sources import MAX_TEMPLATE_BYTES, read_chat_templates


def configure(folder: Path, value: object, file: str = "tokenizer_config.json") -> None:
    (folder / file).write_text(json.dumps({"chat_template": value}))


def test_files_come_before_configs(tmp_path: Path) -> None:
    configure(tmp_path, "from chat_template.json", "chat_template.json")
    assert read_chat_templates(tmp_path) == {"default": "from chat_template.json"}
    configure(tmp_path, "from config")
    assert read_chat_templates(tmp_path) == {"default": "from config"}
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert read_chat_templates(tmp_path) == {"default": "from file"}


def test_named_files_are_beside_the_main_one(tmp_path: Path) -> None:
    configure(tmp_path, [{"name": "rag", "template": "from config"}])
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("T")
    (folder / "notes.txt").write_text("no template")
    assert read_chat_templates(tmp_path) == {"tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("D")
    assert read_chat_templates(tmp_path) == {"default": "D", "tool_use": "T"}


def test_named_templates_of_the_config(tmp_path: Path) -> None:
    names = ("tool_use", "default")
    configure(tmp_path, [{"name": each, "template": each.upper()} for each in names])
    assert read_chat_templates(tmp_path) == {"tool_use": "TOOL_USE", "default": "DEFAULT"}


@pytest.mark.parametrize("value", [None, []])
def test_none(tmp_path: Path, value: object) -> None:
    assert read_chat_templates(tmp_path) == {}
    configure(tmp_path, value)
    assert read_chat_templates(tmp_path) == {}


@pytest.mark.parametrize(
    "value", [3, [3], [{"name": "default"}], [{"name": 1, "template": "x"}], {"default": "x"}]
)
def test_damaged(tmp_path: Path, value: object) -> None:
    configure(tmp_path, value)
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json"):
        read_chat_templates(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (MAX_TEMPLATE_BYTES + 1)])
def test_no_text_or_too_much(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"chat_template\.jinja"):
        read_chat_templates(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        [{"name": "rag", "template": "\ud800"}],
        [{"name": "\ud800", "template": "x"}],
    ],
    ids=["source", "named source", "name"],
)
def test_half_of_a_surrogate_pair_in_the_config(tmp_path: Path, value: object) -> None:
    configure(tmp_path, value)
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json.* surrogate"):
        read_chat_templates(tmp_path)


def test_a_file_name_that_is_no_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / os.fsdecode(b"rag\xff.jinja")).write_text("R")
    with pytest.raises(ModelFolderError, match=r"rag\\udcff\.jinja.* surrogate"):
        read_chat_templates(tmp_path)


def test_too_long_in_the_config(tmp_path: Path) -> None:
    configure(tmp_path, "x" * (MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(ModelFolderError, match="at most"):
        read_chat_templates(tmp_path)


@pytest.mark.parametrize("num_templates", [256, 257])
def test_too_many(tmp_path: Path, num_templates: int) -> None:
    configure(tmp_path, [{"name": f"{n}", "template": ""} for n in range(num_templates)])
    if num_templates == 256:
        assert len(read_chat_templates(tmp_path)) == 256
    else:
        with pytest.raises(ModelFolderError, match="257"):
            read_chat_templates(tmp_path)
