"""The bytes of tokens, and the texts of outputs that followed a language, for every tokenizer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from grammar_walks import (
    BEGINNINGS,
    LANGUAGES,
    PAIR,
    PERSON,
    SPACED,
    SPELL_ALL,
    UNSUPPORTED,
    WORDS,
    allowed,
    choice,
    schema,
    walk,
)
from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer.structured_output import Grammar
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar import GrammarVocabulary
from mini_infer_tokenizer.token_bytes import read_token_bytes


def is_person(text: str) -> bool:
    """Whether a text is what `PERSON` describes, without space."""
    person = json.loads(text)
    address = person["address"]
    return (
        list(person) == ["first_name", "age", "role", "address"]
        and len(person["first_name"]) <= 8
        and 0 <= person["age"] <= 150
        and address == {"house_number": address["house_number"], "country": "狐の国"}
    )


OUTPUTS: dict[str, tuple[Grammar, Callable[[str], object]]] = {
    "regex": (LANGUAGES["words"], lambda text: re.fullmatch(WORDS, text)),
    "choice": (choice(*BEGINNINGS), lambda text: text in BEGINNINGS),
    "characters": (choice(*"éèê狐狸"), lambda text: text in tuple("éèê狐狸")),
    "spaces": (choice(*SPACED), lambda text: text in SPACED),
    "schema": (schema(PERSON), is_person),
    "lark": (LANGUAGES["rules"], lambda text: re.fullmatch(f"{PAIR}(,{PAIR})*", text)),
}


class TestTokenBytes:
    def test_they_are_what_a_token_adds_to_a_text(
        self, model_folders: dict[str, Path], vocabularies: dict[str, GrammarVocabulary]
    ) -> None:
        """Where they are valid UTF-8 and begin as they must; else the text shows replacements."""
        generator = random.Random(0)
        for kind in vocabularies:
            tokenizer = TextTokenizer(model_folders[kind])
            read = read_token_bytes(tokenizer)
            ids_with_bytes = [each for each, data in enumerate(read.tokens) if data]
            num_compared = 0
            for _ in range(20_000):
                ids = generator.choices(ids_with_bytes, k=generator.randint(1, 5))
                data = b"".join(read.tokens[each] for each in ids)
                try:
                    text = data.decode()
                except UnicodeDecodeError:
                    continue
                if text.startswith(read.opening):
                    assert tokenizer.decode(ids, False) == text[len(read.opening) :], (kind, ids)
                    num_compared += 1
            assert num_compared > 100, kind

    @pytest.mark.parametrize("kind", UNSUPPORTED)
    def test_texts_that_depend_on_neighbours_are_not_supported(
        self, model_folders: dict[str, Path], kind: str
    ) -> None:
        with pytest.raises(MiniInferError, match="not supported with the decoder") as caught:
            GrammarVocabulary(model_folders[kind], 100, ())
        assert caught.value.reason is ErrorReason.FIELD_NOT_SUPPORTED

    def test_a_folder_without_a_tokenizer_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFolderError):
            GrammarVocabulary(tmp_path, 100, ())


class TestOutputs:
    @pytest.mark.parametrize("kind", SPELL_ALL)
    @pytest.mark.parametrize("name", OUTPUTS)
    def test_texts_belong_to_the_language(
        self,
        model_folders: dict[str, Path],
        vocabularies: dict[str, GrammarVocabulary],
        kind: str,
        name: str,
    ) -> None:
        grammar, belongs = OUTPUTS[name]
        tokenizer, vocabulary = TextTokenizer(model_folders[kind]), vocabularies[kind]
        generator = random.Random(0)
        num_whole = 0
        for _ in range(8):
            token_ids = walk(vocabulary.compile(grammar), vocabulary, generator)
            if token_ids is not None:
                assert belongs(tokenizer.decode(token_ids, skip_special_tokens=True))
                num_whole += 1
        assert num_whole >= 4

    def test_a_vocabulary_of_words_says_where_it_cannot_go_on(
        self, model_folders: dict[str, Path], vocabularies: dict[str, GrammarVocabulary]
    ) -> None:
        tokenizer, vocabulary = (
            TextTokenizer(model_folders["word_level"]),
            vocabularies["word_level"],
        )
        # Some begin with " t", which no token continues.
        texts = {
            tokenizer.decode(token_ids, skip_special_tokens=True)
            for seed in range(20)
            if (
                token_ids := walk(
                    vocabulary.compile(choice("the fox", "then")), vocabulary, random.Random(seed)
                )
            )
        }
        assert texts == {"the fox"}
        matcher = vocabulary.compile(choice("unknown"))
        assert matcher.forced() == []
        assert allowed(matcher, vocabulary) == []
        assert matcher.error == "no token of the model continues the output within the language"

    @pytest.mark.parametrize("kind", ["demo", "byte_level", "byte_fallback", "unigram", "gemma"])
    def test_masks_hold_just_the_tokens_that_continue_a_text(
        self, model_folders: dict[str, Path], vocabularies: dict[str, GrammarVocabulary], kind: str
    ) -> None:
        texts = ["the fox", "the river", "there", "then the fox lived"]
        vocabulary = vocabularies[kind]
        read = read_token_bytes(TextTokenizer(model_folders[kind]))
        outputs = [(read.opening + text).encode() for text in texts]
        generator = random.Random(0)
        for _ in range(10):
            matcher = vocabulary.compile(choice(*texts))
            output = b""
            while not matcher.is_complete:
                expected = [
                    token_id
                    for token_id, data in enumerate(read.tokens)
                    if data and any(each.startswith(output + data) for each in outputs)
                ]
                assert allowed(matcher, vocabulary) == expected
                assert matcher.may_end == (output in outputs)
                if not expected:
                    break
                token_id = generator.choice(expected)
                assert matcher.advance([token_id]) == 1
                output += read.tokens[token_id]
