from __future__ import annotations

from pathlib import Path

import pytest
from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import (
    read_bytes,
    read_json_object,
    read_text,
    tokenizer_hash,
)


def test_tokenizer_hash_follows_every_file_that_decides_on_ids(tmp_path: Path) -> None:
    hashes = []
    for name, content in [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": 1}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {}}'),
        ("special_tokens_map.json", '{"eos_token": "<e>"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {"content": "<e>"}}}'),
    ]:
        (tmp_path / name).write_text(content)
        hashes.append(tokenizer_hash(tmp_path))
    assert len(set(hashes)) == 5
    (tmp_path / "chat_template.jinja").write_text("hello")
    assert tokenizer_hash(tmp_path) == hashes[-1]
    assert len(bytes.fromhex(hashes[-1])) == 32


def test_reads_a_json_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "é"]}')
    assert read_json_object(tmp_path / "a.json") == {"a": [1, "é"]}


def test_missing_folder_and_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"model folder .*nowhere does not exist"):
        read_bytes(tmp_path / "nowhere" / "a.json", 9)
    with pytest.raises(ModelFolderError, match=r"a\.json does not exist"):
        read_bytes(tmp_path / "a.json", 9)


def test_what_is_not_a_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ModelFolderError, match="cannot be read"):
        read_bytes(tmp_path / "a.json", 9)


def test_text_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ModelFolderError, match="not UTF-8"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
    ],
    ids=["truncated", "deep", "list"],
)
def test_json_must_be_an_object(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ModelFolderError, match=message):
        read_json_object(tmp_path / "a.json")
