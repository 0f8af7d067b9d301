"""Which tokens a language allows, forces and ends with, for tokenizers of every kind."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from grammar_walks import (
    DEMO,
    LANGUAGES,
    PERSON,
    SPELL_ALL,
    allowed,
    choice,
    regex,
    schema,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar import MAX_FORCED_TOKENS, GrammarVocabulary, fill_all


class TestEnds:
    def test_ends_are_allowed_where_the_output_belongs(
        self, vocabulary: GrammarVocabulary, demo: TextTokenizer
    ) -> None:
        matcher = vocabulary.compile(regex("a+b?"))
        (a,), (b,) = demo.encode("a", False), demo.encode("b", False)
        assert not matcher.may_end
        assert not {0, 2} & set(allowed(matcher, vocabulary))
        assert matcher.advance([a]) == 1
        assert matcher.may_end
        assert not matcher.is_complete
        assert {0, 2, a, b} <= set(allowed(matcher, vocabulary))
        assert matcher.advance([b]) == 1
        assert matcher.may_end
        assert matcher.is_complete
        assert allowed(matcher, vocabulary) == [0, 2]
        assert matcher.advance([a]) == 0
        assert matcher.error is None

    @pytest.mark.parametrize("vocab_size", [4064, 4095, 4096, 4097, 4128])
    def test_without_ends_an_output_ends_where_nothing_follows(
        self, demo: TextTokenizer, vocab_size: int
    ) -> None:
        vocabulary = GrammarVocabulary(demo, vocab_size, ())
        assert vocabulary.num_mask_words == -(-vocab_size // 32)
        (a,) = demo.encode("a", False)
        matcher = vocabulary.compile(regex("a{3}"))
        assert matcher.advance([a, a, a, a]) == 3
        assert matcher.is_complete
        assert allowed(matcher, vocabulary) == []
        matcher = vocabulary.compile(regex("[^é]*"))
        options = allowed(matcher, vocabulary)
        assert len(options) > 2000
        assert max(options) < min(vocab_size, demo.vocab_size)
        assert not demo.special_ids & set(options)

    def test_a_vocabulary_without_a_silent_token_gives_up_its_last(self) -> None:
        demo = TextTokenizer(DEMO)
        demo.special_ids = frozenset()
        vocabulary = GrammarVocabulary(demo, demo.vocab_size, ())
        assert vocabulary.stand_in_id == demo.vocab_size - 1
        options = allowed(vocabulary.compile(regex("(?s:.)*")), vocabulary)
        assert vocabulary.stand_in_id not in options

    @pytest.mark.parametrize("vocab_size", [4000, 4500, 6000])
    def test_ids_that_only_the_model_or_the_tokenizer_has_are_never_allowed(
        self, demo: TextTokenizer, vocab_size: int
    ) -> None:
        vocabulary = GrammarVocabulary(demo, vocab_size, [0, 5999, 99_999, -1])
        matcher = vocabulary.compile(regex("(?s:.)*"))
        options = set(allowed(matcher, vocabulary))
        ends = {0, 5999} & set(range(vocab_size))
        assert ends <= options
        assert options - ends < set(range(min(vocab_size, demo.vocab_size)))
        assert not (options - ends) & demo.special_ids


class TestForced:
    @pytest.mark.parametrize("kind", SPELL_ALL)
    @given(data=st.data())
    @settings(max_examples=25, deadline=None)
    def test_the_rest_is_the_same_behind_each_of_them(
        self, vocabularies: dict[str, GrammarVocabulary], kind: str, data: st.DataObject
    ) -> None:
        """However the state was reached, whatever was asked before, and in whatever portions."""
        vocabulary = vocabularies[kind]
        grammar = LANGUAGES[data.draw(st.sampled_from(sorted(LANGUAGES)))]
        generator = random.Random(data.draw(st.integers(0, 2**32)))
        matcher = vocabulary.compile(grammar)
        output: list[int] = []
        for _ in range(data.draw(st.integers(0, 12))):
            forced = matcher.forced()
            num_taken = generator.randint(0, len(forced))
            resumed = vocabulary.compile(grammar)
            if generator.random() < 0.5:
                resumed.forced()
            assert resumed.advance(output) == len(output)
            if generator.random() < 0.5:
                allowed(resumed, vocabulary)
            assert resumed.advance(forced[:num_taken]) == num_taken
            if len(forced) < MAX_FORCED_TOKENS:
                assert resumed.forced() == forced[num_taken:]
            else:
                assert resumed.forced()[: len(forced) - num_taken] == forced[num_taken:]
            assert matcher.forced() == forced
            for token_id in forced:
                assert token_id in allowed(matcher, vocabulary)
                assert matcher.advance([token_id]) == 1
            output += forced
            if matcher.is_complete:
                return
            token_id = generator.choice(allowed(matcher, vocabulary))
            assert matcher.advance([token_id]) == 1
            output.append(token_id)

    def test_they_are_what_the_language_leaves_no_choice_of(
        self, vocabulary: GrammarVocabulary, demo: TextTokenizer
    ) -> None:
        matcher = vocabulary.compile(schema(PERSON))
        assert demo.decode(matcher.forced(), False) == '{"first_name":"'
        assert matcher.advance(demo.encode('{"first_name":"Ann', False)) > 0
        assert matcher.forced() == []
        assert matcher.advance(demo.encode('"', False)) == 1
        assert demo.decode(matcher.forced(), False) == ',"age":'

    def test_a_token_that_may_be_part_of_a_longer_one_is_not_forced(
        self, vocabulary: GrammarVocabulary, demo: TextTokenizer
    ) -> None:
        (longer,) = demo.encode("ab", add_special_tokens=False)
        matcher = vocabulary.compile(choice("aab", "aac"))
        assert demo.decode(matcher.forced(), False) == "a"
        assert matcher.advance(matcher.forced()) == 1
        assert longer in allowed(matcher, vocabulary)

    @pytest.mark.parametrize("kind", ["demo", "byte_level", "gemma", "unigram_fallback"])
    def test_they_are_tokens_as_the_tokenizer_chooses_them(
        self, model_folders: dict[str, Path], vocabularies: dict[str, GrammarVocabulary], kind: str
    ) -> None:
        text = "there was a fox who lived by the river, and she didn't like the rain " * 5
        tokenizer = TextTokenizer(model_folders[kind])
        forced = vocabularies[kind].compile(choice(text)).forced()
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(forced, False) == text
        # From the end, since some put a space before the text that encoding begins with.
        pairs = zip(reversed(forced), reversed(expected), strict=False)
        num_same = sum(one == other for one, other in pairs)
        assert num_same >= 0.9 * len(expected)

    def test_more_than_can_be_found_at_once_come_with_the_next_calls(
        self, vocabulary: GrammarVocabulary, demo: TextTokenizer
    ) -> None:
        text = "the fox lived by the river 狐 " * 200
        matcher = vocabulary.compile(choice(text))
        token_ids: list[int] = []
        while forced := matcher.forced():
            assert len(forced) <= MAX_FORCED_TOKENS
            assert matcher.advance(forced) == len(forced)
            token_ids += forced
        assert matcher.is_complete
        assert demo.decode(token_ids, False) == text


class TestState:
    @pytest.mark.parametrize(
        "kind", ["demo", "byte_level", "byte_fallback", "unigram", "word_piece"]
    )
    def test_it_is_that_of_the_ids_alone(
        self, vocabularies: dict[str, GrammarVocabulary], kind: str
    ) -> None:
        vocabulary = vocabularies[kind]
        generator = random.Random(0)
        for grammar in (regex("[a-z ]{3,30}"), choice("the fox", "then", "there was")):
            for _ in range(5):
                matcher = vocabulary.compile(grammar)
                output: list[int] = []
                while not matcher.is_complete and (options := allowed(matcher, vocabulary)):
                    at_once = vocabulary.compile(grammar)
                    assert at_once.advance(output) == len(output)
                    assert allowed(at_once, vocabulary) == options
                    assert at_once.may_end == matcher.may_end
                    output.append(generator.choice(options))
                    assert matcher.advance(output[-1:]) == 1

    def test_a_token_that_is_not_allowed_is_not_taken(
        self, vocabulary: GrammarVocabulary, demo: TextTokenizer
    ) -> None:
        matcher = vocabulary.compile(choice("abc"))
        (a,), (x,) = demo.encode("a", False), demo.encode("x", False)
        before = allowed(matcher, vocabulary)
        assert matcher.advance([x, a]) == 0
        assert allowed(matcher, vocabulary) == before
        assert matcher.advance([a, x]) == 1
        assert matcher.advance([4_000_000]) == 0
        assert matcher.error is None
        assert matcher.advance(demo.encode("b", False) + demo.encode("c", False)) == 2
        assert matcher.is_complete


class TestMasks:
    def test_many_at_once_are_as_one_by_one(self, vocabulary: GrammarVocabulary) -> None:
        rows = {2 * row: each for row, each in enumerate(LANGUAGES.values())}
        bitmask = np.full((2 * len(rows), vocabulary.num_mask_words), 7, np.int32)
        fill_all({row: vocabulary.compile(each) for row, each in rows.items()}, bitmask)
        for row, grammar in rows.items():
            alone = np.empty(vocabulary.num_mask_words, np.int32)
            vocabulary.compile(grammar).fill(alone)
            assert (bitmask[row] == alone).all()
            assert (bitmask[row + 1] == 7).all()

    def test_none_at_all_changes_nothing(self, vocabulary: GrammarVocabulary) -> None:
        bitmask = np.full((2, vocabulary.num_mask_words), 7, np.int32)
        fill_all({}, bitmask)
        assert (bitmask == 7).all()

    def test_one_that_fails_leaves_the_others_alone(
        self, vocabularies: dict[str, GrammarVocabulary]
    ) -> None:
        vocabulary = vocabularies["word_level"]
        good = [vocabulary.compile(choice("the fox")) for _ in range(3)]
        bad = vocabulary.compile(choice("unknown"))
        bitmask = np.full((4, vocabulary.num_mask_words), 7, np.int32)
        fill_all({0: good[0], 1: bad, 2: good[1], 3: good[2]}, bitmask)
        assert bad.error is not None
        assert not bitmask[1].any()
        assert all(each.error is None for each in good)
        assert bitmask[[0, 2, 3]].any(axis=1).all()

    def test_threads_fill_at_the_same_time(self, vocabulary: GrammarVocabulary) -> None:
        """With a vocabulary that all matchers share, whose tokenizer they ask for forced tokens."""
        expected = {
            name: (allowed(matcher, vocabulary), matcher.forced())
            for name, each in LANGUAGES.items()
            if (matcher := vocabulary.compile(each))
        }

        def ask(name: str) -> tuple[list[int], list[int]]:
            matcher = vocabulary.compile(LANGUAGES[name])
            return allowed(matcher, vocabulary), matcher.forced()

        names = list(LANGUAGES) * 10
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, names)) == [expected[name] for name in names]


def test_it_needs_neither_sockets_nor_torch() -> None:
    program = (
        "import sys, mini_infer_tokenizer.grammar, mini_infer_tokenizer.bad_words\n"
        "assert not {'torch', 'transformers', 'zmq', 'structlog'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
