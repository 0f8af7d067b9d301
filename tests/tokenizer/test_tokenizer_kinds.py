"""Ids and texts are those of `transformers`, which is loaded from the same folder as the oracle."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from mini_infer.errors import ModelFolderError
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer
from random_texts import TextMaker
from transformers import PreTrainedTokenizerFast

NUM_TEXTS = 300


def oracle_of(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def check_against_transformers(folder: Path, num_texts: int = NUM_TEXTS) -> None:
    ours, oracle = TextTokenizer(folder), oracle_of(folder)
    generator = random.Random(0)
    written = ["<|user|>", "fox", "<|left|>", "@~", *oracle.all_special_tokens]
    texts = TextMaker(generator, written)
    for _ in range(num_texts):
        text = texts.make()
        for add_special_tokens in (False, True):
            ids = oracle.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens) == ids, text
        for skip in (False, True):
            shuffled = generator.choices(range(ours.vocab_size + 2), k=8)
            for each in (ids, shuffled):
                expected = oracle.decode(
                    each, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )
                assert ours.decode(each, skip) == expected, each
    assert ours.vocab_size == max(oracle.get_vocab().values()) + 1
    assert ours.special_ids == set(oracle.all_special_ids) | {
        each for each, token in oracle.added_tokens_decoder.items() if token.special
    }


def test_every_kind_gives_the_ids_and_texts_of_transformers(model_folder: Path) -> None:
    check_against_transformers(model_folder)


ADDED = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "names make tokens special": {
        "eos_token": "fox", "bos_token": {"__type": "AddedToken", "content": "river"} | ADDED
    },
    "names of new tokens": {"pad_token": "<pad>", "bos_token": "<new>", "image_token": "<image>"},
    "more special tokens": {"additional_special_tokens": ["<a>", "the"], "eos_token": "</s>"},
    "more special tokens by name": {"extra_special_tokens": {"video_token": "<video>"}},
    "bos and eos are asked for": {
        "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True
    },
    "added tokens of the configuration": {
        "added_tokens_decoder": {
            "900": {"content": "<late>", "special": True} | ADDED,
            "899": {"content": " river", "special": False} | ADDED | {"rstrip": True},
            "1": {"content": "<s>", "special": True} | ADDED,
        },
        "eos_token": "<late>",
        "bos_token": "<s>",
    },
    "special tokens are text": {"split_special_tokens": True, "eos_token": "</s>"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama_3", "phi_3", "unigram", "word_piece"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_adds_as_in_transformers(
    model_folders: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    shutil.copy(model_folders[kind] / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIGS[name]))
    check_against_transformers(tmp_path, num_texts=40)


def test_the_legacy_map_names_special_tokens(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(model_folders["llama_3"] / "tokenizer.json", tmp_path)
    named = {"eos_token": {"content": "fox"} | ADDED, "additional_special_tokens": ["<more>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    check_against_transformers(tmp_path, num_texts=40)
    assert TextTokenizer(tmp_path).special_tokens == {"eos_token": "fox"}
    # Where the configuration lists the added tokens, the map is not read.
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    check_against_transformers(tmp_path, num_texts=10)
    assert TextTokenizer(tmp_path).special_tokens == {}


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": {"content": 3}}},
        {"added_tokens_decoder": {"1": "a"}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
        {"added_tokens_decoder": {"²": {"content": "a"}}},
        {"added_tokens_decoder": {"1": {"content": "\ud800"}}},
        {"extra_special_tokens": 7},
        {"extra_special_tokens": {"\ud800": "a"}},
        {"\udfff_token": "a"},
        {"bos_token": "x" * 5000},
    ],
)
def test_a_damaged_configuration_is_refused(
    model_folders: dict[str, Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    shutil.copy(model_folders["llama_3"] / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("number", ["9" * 5000, "x" * 5000, "-1"])
def test_an_id_that_is_none_is_named(
    model_folders: dict[str, Path], tmp_path: Path, number: str
) -> None:
    shutil.copy(model_folders["llama_3"] / "tokenizer.json", tmp_path)
    config = {"added_tokens_decoder": {number: {"content": "a"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelFolderError, match=rf"added_tokens_decoder .* {{'{number[:9]}"
    ) as caught:
        TextTokenizer(tmp_path)
    assert len(str(caught.value)) < 500


def test_tokens_that_the_configuration_makes_special_are_skipped_while_streaming(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(model_folders["llama_3"] / "tokenizer.json", tmp_path)
    ids = TextTokenizer(tmp_path).encode("a fox river", False)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a fox"}')
    tokenizer = TextTokenizer(tmp_path)
    for skip, text in ((True, " river"), (False, "a fox river")):
        stream = Detokenizer(tokenizer).open(skip_special_tokens=skip)
        assert stream.read(ids, last=True).text == text == tokenizer.decode(ids, skip)
