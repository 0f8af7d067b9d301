from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini_infer_tokenizer.stop_strings import Match, StopMatcher

texts = st.text(alphabet="abcé", max_size=40)
stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text: str, strings: list[str]) -> Match | None:
    """The rule, written down as slowly as it reads."""
    for end in range(len(text) + 1):
        complete = [
            (-len(string), index, string)
            for index, string in enumerate(strings)
            if text[:end].endswith(string)
        ]
        if complete:
            _, index, string = min(complete)
            return Match(index, len(string), end)
    return None


def num_open(text: str, strings: list[str]) -> int:
    """Length of the longest end of the text that begins a string and is not all of it."""
    ends = range(len(text) + 1)
    return max((n for n in ends for s in strings if n < len(s) and text.endswith(s[:n])), default=0)


@given(texts, stops)
def test_finds_the_match_that_completes_first(text: str, strings: list[str]) -> None:
    assert StopMatcher(strings).scan(text) == first_match(text, strings)


@given(texts, stops, st.lists(st.integers(0, 40)))
def test_finds_the_same_wherever_the_text_is_cut(
    text: str, strings: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(strings)
    begins = [0, *sorted(cuts)]
    found = None
    for begin, end in zip(begins, [*begins[1:], len(text)], strict=True):
        match = matcher.scan(text[begin:end])
        if match is not None and found is None:
            found = match._replace(end=begin + match.end)
    assert found == first_match(text, strings)


@given(texts, stops)
def test_num_open_is_what_may_become_a_match(text: str, strings: list[str]) -> None:
    matcher = StopMatcher(strings)
    matcher.scan(text)
    assert matcher.num_open == num_open(text, strings)


def test_longest_of_those_completed_together_wins() -> None:
    assert StopMatcher(["op", "stop", "stop"]).scan("non-stop") == Match(1, 4, 8)


def test_empty_stop_string_never_matches() -> None:
    matcher = StopMatcher([""])
    assert matcher.scan("text") is None
    assert matcher.num_open == 0


@pytest.mark.parametrize("num_strings", [1, 16])
def test_hostile_strings_take_linear_time(num_strings: int) -> None:
    def seconds(num_characters: int) -> float:
        matcher = StopMatcher(["a" * 1023 + chr(98 + index) for index in range(num_strings)])
        begin = time.process_time()
        matcher.scan("a" * num_characters)
        return time.process_time() - begin

    seconds(10_000)
    assert seconds(100_000) < 40 * max(seconds(10_000), 0.001)
