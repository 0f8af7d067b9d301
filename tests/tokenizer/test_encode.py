from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer.model_folder import tokenizer_hash
from mini_infer_tokenizer.encode import TextTokenizer
from tokenizers import Tokenizer

DEMO = bundled_model("demo")


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    return TextTokenizer(DEMO)


def test_ids_are_those_of_the_library(demo: TextTokenizer) -> None:
    library = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = "Tell me a story about a fox.<|end|> 狐"
    for add_special_tokens in (False, True):
        expected = library.encode(text, add_special_tokens=add_special_tokens).ids
        assert demo.encode(text, add_special_tokens) == expected
    assert demo.encode("", False) == []


def test_decode_is_that_of_the_library(demo: TextTokenizer) -> None:
    ids = demo.encode("a fox<|end|>", add_special_tokens=True)
    assert demo.decode(ids, skip_special_tokens=True) == "a fox"
    assert demo.decode(ids, skip_special_tokens=False) == "<|bos|>a fox<|end|>"
    assert demo.decode([demo.vocab_size, 2**32 - 1], False) == ""


def test_knows_its_model(demo: TextTokenizer) -> None:
    assert demo.vocab_size == json.loads((DEMO / "config.json").read_text())["vocab_size"]
    assert demo.tokenizer_hash == tokenizer_hash(DEMO)
    assert demo.special_tokens["bos_token"] == "<|bos|>"
    assert demo.special_ids == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b"])
def test_lone_surrogate_is_an_invalid_field(demo: TextTokenizer, text: str) -> None:
    with pytest.raises(MiniInferError, match="lone surrogate") as caught:
        demo.encode(text, add_special_tokens=False)
    assert caught.value.reason is ErrorReason.INVALID_FIELD


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**70])
def test_impossible_id_is_an_invalid_field(demo: TextTokenizer, token_id: int) -> None:
    with pytest.raises(MiniInferError, match=f"got {token_id}") as caught:
        demo.decode([1, token_id], skip_special_tokens=True)
    assert caught.value.reason is ErrorReason.INVALID_FIELD


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    library = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    ids = TextTokenizer(tmp_path).encode("Once upon a time there was a little fox", False)
    assert ids == TextTokenizer(DEMO).encode("Once upon a time there was a little fox", False)


def test_special_tokens_may_be_objects_or_absent(tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    assert TextTokenizer(tmp_path).special_tokens == {}
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None, "x": "y"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextTokenizer(tmp_path).special_tokens == {"bos_token": "<s>"}


def test_a_text_that_is_special_once_is_skipped(tmp_path: Path) -> None:
    """As in the library, which looks at texts, and at whether any entry made one special."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": 0, "content": "<s>", "special": each} | flags for each in (True, False)]
    model = {"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "a"}
    content = json.dumps({"added_tokens": added, "model": model})
    (tmp_path / "tokenizer.json").write_text(content)
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.special_ids == {0}
    assert tokenizer.token(0, skip_special_tokens=True) is None
    assert tokenizer.decode([0, 1], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "\0" * 100])
def test_damaged_tokenizer_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json: is not a valid tokenizer"):
        TextTokenizer(tmp_path)


def test_missing_tokenizer_file_and_damaged_config(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json does not exist"):
        TextTokenizer(tmp_path)
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json"):
        TextTokenizer(tmp_path)


def test_encoding_lets_other_threads_run(demo: TextTokenizer) -> None:
    """A single `encode` of the library would keep the interpreter lock all the while."""
    large = threading.Thread(target=demo.encode, args=("word" * 300_000, False))
    pauses = []
    large.start()
    while large.is_alive():
        begin = time.perf_counter()
        time.sleep(0.001)
        pauses.append(time.perf_counter() - begin)
    assert max(pauses) < sum(pauses) / 2
