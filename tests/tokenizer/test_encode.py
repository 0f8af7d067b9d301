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
from mini_infer_tokenizer import encode
from mini_infer_tokenizer.encode import TextTokenizer
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

DEMO = bundled_model("demo")


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


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.model", "\0"), ("spiece.model", "\0"), ("vocab.txt", "a"), ("vocab.json", "{}")],
)
def test_an_older_kind_of_tokenizer_is_named_with_what_to_do(
    tmp_path: Path, file: str, content: str
) -> None:
    (tmp_path / file).write_text(content)
    expected = rf"tokenizer\.json does not exist, and {file} is not read: .*AutoTokenizer"
    with pytest.raises(ModelFolderError, match=expected):
        TextTokenizer(tmp_path)
    with pytest.raises(ModelFolderError, match=expected):
        tokenizer_hash(tmp_path)
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    TextTokenizer(tmp_path)


def test_what_to_do_about_an_older_kind_of_tokenizer_helps(tmp_path: Path) -> None:
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    library = AutoTokenizer.from_pretrained(str(tmp_path))
    library.save_pretrained(str(tmp_path))
    ids = library.encode("Tell me a story about a fox.", add_special_tokens=False)
    assert TextTokenizer(tmp_path).encode("Tell me a story about a fox.", False) == ids


LIGATURE = "\ufdfa"
"""A character of which NFKC makes 18, more than of any other."""


def normalized_demo(folder: Path, normalizer: normalizers.Normalizer) -> TextTokenizer:
    library = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    library.normalizer = normalizer
    library.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


def test_a_text_that_its_normalizer_makes_huge_is_refused(tmp_path: Path) -> None:
    tokenizer = normalized_demo(tmp_path, normalizers.NFKC())
    with pytest.raises(MiniInferError, match="longer by at most 4194304 characters") as caught:
        tokenizer.encode("a fox " * 10_000 + LIGATURE * 300_000, add_special_tokens=False)
    assert caught.value.reason is ErrorReason.PROMPT_TOO_LARGE


@pytest.mark.parametrize(
    ("normalizer", "text", "growth_of_each"),
    [
        (normalizers.NFKC(), LIGATURE + " ", 17),
        (normalizers.Replace("a", "k" * 6), "aaa", 15),
        (normalizers.Sequence([normalizers.NFC(), normalizers.NFKD()]), LIGATURE + "b", 17),
    ],
)
def test_growth_counts_to_the_character(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    normalizer: normalizers.Normalizer,
    text: str,
    growth_of_each: int,
) -> None:
    tokenizer = normalized_demo(tmp_path, normalizer)
    text *= 20_000  # Of more than two slices.
    growth = growth_of_each * 20_000
    monkeypatch.setattr(encode, "MAX_GROWTH_CHARACTERS", growth)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(text, False) == library.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(encode, "MAX_GROWTH_CHARACTERS", growth - 1)
    with pytest.raises(MiniInferError, match=f"at most {growth - 1}"):
        tokenizer.encode(text, False)
    # Of a short text not even the largest growth does harm.
    monkeypatch.setattr(encode, "MAX_GROWTH_CHARACTERS", 0)
    tokenizer.encode(text[:1000], False)


def test_a_long_text_that_does_not_grow_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "MAX_GROWTH_CHARACTERS", 0)
    text = "a fox, naïve 狐 " * 5000
    for normalizer in (normalizers.NFC(), normalizers.Replace(" ", "_"), normalizers.NFKC()):
        tokenizer = normalized_demo(tmp_path, normalizer)
        library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert tokenizer.encode(text, False) == library.encode(text, add_special_tokens=False).ids
    assert TextTokenizer(DEMO).encode(LIGATURE * 20_000, False)


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
