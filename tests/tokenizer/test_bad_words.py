"""The ids that write a word, wherever it stands."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer_tokenizer.bad_words import bad_word_sequences
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.token_bytes import read_token_bytes


def holds(token_ids: list[int], sequences: list[list[int]]) -> bool:
    return any(
        token_ids[begin : begin + len(each)] == each
        for each in sequences
        for begin in range(len(token_ids))
    )


def test_a_word_is_written_with_and_without_a_space(demo: TextTokenizer) -> None:
    for word in ("fox", "xylophone"):
        expected = [demo.encode(text, add_special_tokens=False) for text in (word, f" {word}")]
        assert bad_word_sequences(demo, [word]) == expected
        assert bad_word_sequences(demo, [word, f" {word}", word]) == expected
    assert len(expected[0]) > 1  # A word of several tokens is among them.


def test_spaces_that_begin_a_word_are_one_where_it_begins_another(demo: TextTokenizer) -> None:
    as_it_is, behind_space = bad_word_sequences(demo, ["   river"])
    assert as_it_is == demo.encode("   river", add_special_tokens=False)
    assert behind_space == demo.encode(" river", add_special_tokens=False)


def test_words_keep_their_order_and_special_tokens_are_no_part_of_them(
    demo: TextTokenizer,
) -> None:
    words = ["river", "rain", "the river"]
    sequences = bad_word_sequences(demo, words)
    alone = [bad_word_sequences(demo, [word]) for word in words]
    assert sequences == [each for forms in alone for each in forms]
    assert not demo.special_ids & {each for sequence in sequences for each in sequence}


def test_no_words_are_no_lists(demo: TextTokenizer) -> None:
    assert bad_word_sequences(demo, []) == []


def test_spaces_alone_are_a_word(demo: TextTokenizer) -> None:
    assert bad_word_sequences(demo, ["  "]) == [demo.encode("  ", add_special_tokens=False)]


@pytest.mark.parametrize("word", ["", "\ud800"])
def test_what_has_no_ids_is_refused(demo: TextTokenizer, word: str) -> None:
    with pytest.raises(MiniInferError) as caught:
        bad_word_sequences(demo, ["fox", word])
    assert caught.value.reason is ErrorReason.INVALID_FIELD


def test_a_word_that_the_normalizer_takes_away_is_refused(model_folders: dict[str, Path]) -> None:
    tokenizer = TextTokenizer(model_folders["word_piece"])  # It drops control characters.
    with pytest.raises(MiniInferError, match="bad words that have tokens"):
        bad_word_sequences(tokenizer, ["\x07"])


@pytest.mark.parametrize("kind", ["demo", "byte_level", "llama_3", "qwen_2", "unigram"])
def test_it_is_found_where_texts_hold_it(model_folders: dict[str, Path], kind: str) -> None:
    """At the beginning, as a word of its own, and behind a sign without a space."""
    tokenizer = TextTokenizer(model_folders[kind])
    generator = random.Random(0)
    for word in ("fox", "river", "lived by"):
        sequences = bad_word_sequences(tokenizer, [word])
        for text in (f"{word} and", f"the {word} and", f"the -{word} and", f"(\t{word}."):
            for padding in range(3):
                padded = " ".join(generator.choices(["the", "rain", "by"], k=padding))
                token_ids = tokenizer.encode(f"{padded} {text}".strip(), False)
                assert holds(token_ids, sequences), (text, sequences)
        assert not holds(tokenizer.encode("the rain and the dog", False), sequences)


@pytest.mark.parametrize("kind", ["demo", "byte_fallback", "phi_3", "mistral", "gemma", "unigram"])
def test_it_is_written_inside_a_word_and_behind_a_space(
    model_folders: dict[str, Path], kind: str
) -> None:
    """Also by tokenizers that put a space before every text."""
    tokenizer = TextTokenizer(model_folders[kind])
    tokens = read_token_bytes(tokenizer).tokens
    sequences = bad_word_sequences(tokenizer, ["fox"])
    written = {b"".join(tokens[each] for each in sequence) for sequence in sequences}
    assert {b"fox", b" fox"} <= written
