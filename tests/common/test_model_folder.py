from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mini_infer.config import EngineConfig, TokenizerConfig, bundled_model
from mini_infer.errors import ConfigError, ModelFolderError
from mini_infer.model_folder import (
    check_folder,
    has_entry,
    names_in,
    read_bytes,
    read_json_object,
    read_text,
    tokenizer_hash,
)
from mini_infer_engine.generation_config import read_generation_defaults
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.weight_files import read_headers, weight_files
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.special_tokens import read_special_tokens
from mini_infer_tokenizer.template_sources import read_chat_templates

NOBODY = 65534


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


@contextmanager
def as_other_user() -> Iterator[None]:
    """Root may read everything, so it is somebody else meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A copy of the demo model that everybody may read."""
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent) / "locked" / "model"
        shutil.copytree(bundled_model("demo"), folder)
        yield folder
        folder.parent.chmod(0o755)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    "read",
    [
        check_folder,
        lambda folder: has_entry(folder / "config.json"),
        names_in,
        tokenizer_hash,
        weight_files,
        read_headers,
        read_model_config,
        read_generation_defaults,
        TextTokenizer,
        read_special_tokens,
        read_chat_templates,
    ],
)
def test_a_folder_in_one_that_may_not_be_entered_cannot_be_read(
    folder: Path, read: Callable[[Path], object]
) -> None:
    with as_other_user():
        read(folder)
    folder.parent.chmod(0)
    with (
        as_other_user(),
        pytest.raises(ModelFolderError, match="cannot be read: Permission denied: let the user"),
    ):
        read(folder)


@pytest.mark.parametrize("read", [names_in, weight_files, read_headers])
def test_a_folder_that_may_not_be_listed_cannot_be_read(
    folder: Path, read: Callable[[Path], object]
) -> None:
    (folder / "model.safetensors").unlink()
    folder.chmod(0o311)
    with as_other_user(), pytest.raises(ModelFolderError, match="model cannot be read: Permission"):
        read(folder)


@pytest.mark.parametrize(
    "read",
    [check_folder, lambda folder: has_entry(folder / "a"), tokenizer_hash, weight_files],
)
@pytest.mark.parametrize("path", ["x" * 5000, "x/" * 2500])
def test_a_path_that_is_too_long_is_told_in_short(
    path: str, read: Callable[[Path], object]
) -> None:
    with pytest.raises(ModelFolderError, match="too long: pass a shorter path") as caught:
        read(Path(path))
    assert len(str(caught.value)) < 500


def test_what_is_no_path_does_not_exist() -> None:
    with pytest.raises(ModelFolderError, match="does not exist or is not a folder: pass the path"):
        check_folder(Path("a\0b"))


@pytest.mark.parametrize(
    ("target", "message"),
    [("nowhere", "leads to what does not exist: download"), (None, "cannot be read: Too many")],
    ids=["dangling", "loop"],
)
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("generation_config.json", read_generation_defaults),
        ("generation_config.json", read_model_config),
        ("config.json", read_model_config),
        ("tokenizer.json", tokenizer_hash),
        ("tokenizer_config.json", tokenizer_hash),
        ("special_tokens_map.json", tokenizer_hash),
        ("tokenizer_config.json", read_special_tokens),
        ("chat_template.jinja", read_chat_templates),
        ("chat_template.json", read_chat_templates),
        ("model.safetensors", read_headers),
    ],
)
def test_a_link_that_leads_nowhere_does_not_count_as_absent(
    folder: Path, name: str, read: Callable[[Path], object], target: str | None, message: str
) -> None:
    for each in {name, "chat_template.jinja"} if "template" in name else {name}:
        (folder / each).unlink(missing_ok=True)
    if name == "chat_template.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / name).symlink_to(target or name)
    with pytest.raises(ModelFolderError, match=f"{name} {message}"):
        read(folder)


@pytest.mark.parametrize("config_class", [EngineConfig, TokenizerConfig])
@pytest.mark.parametrize(
    ("url", "hub_id"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name"),
        ("http://user:secret@127.0.0.1:80/org/", "org/name"),
        ("hf://org", "org/name"),
    ],
)
def test_a_url_is_no_model(
    config_class: type[EngineConfig | TokenizerConfig], url: str, hub_id: str
) -> None:
    with pytest.raises(ConfigError, match=f"got a URL: pass {hub_id}$") as caught:
        config_class(model=url)
    assert "secret" not in str(caught.value)
