from __future__ import annotations

from typing import Any

import pytest
from mini_infer.messages import OpenText, TextDeltas, TextStep
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.text_session import TextSession


@pytest.fixture
def session(byte_level: TextTokenizer) -> TextSession:
    return TextSession(Detokenizer(byte_level))


@pytest.fixture
def ids(byte_level: TextTokenizer) -> list[int]:
    """Ids of the letters A, B, C, one each."""
    return [byte_level.encode(each, False)[0] for each in "ABC"]


def opened(stream: int, **options: Any) -> OpenText:
    return OpenText(stream, options.pop("stop", []), True, False, **options)


def test_rows_come_back_in_their_order(session: TextSession, ids: list[int]) -> None:
    for stream in (7, 5, 6):
        session.open(opened(stream))
    step = TextStep([6, 5, 7], [0, 0, 0], [1, 0, 2], ids, [False, False, True])
    assert session.step(step) == (
        TextDeltas([6, 5, 7], [1, 0, 2], [1, 0, 2], ["A", "", "BC"], [-1, -1, -1]),
        [],
    )
    assert len(session) == 2  # Stream 7 had its last row.


def test_a_stop_string_closes_the_stream(session: TextSession, ids: list[int]) -> None:
    session.open(opened(1, stop=["x", "B"]))
    deltas, _ = session.step(TextStep([1], [0], [3], ids, [False]))
    assert deltas == TextDeltas([1], [3], [2], ["A"], [1])
    assert session.step(TextStep([1], [3], [0], [], [True]))[1] == [1]


def test_streams_go_on_behind_output_ids(session: TextSession, ids: list[int]) -> None:
    session.open(opened(1, output_ids=ids[:2]))
    deltas, _ = session.step(TextStep([1], [2], [1], ids[2:], [True]))
    assert deltas == TextDeltas([1], [3], [1], ["C"], [-1])


def test_repeated_ids_are_left_out(session: TextSession, ids: list[int]) -> None:
    session.open(opened(1))
    session.step(TextStep([1], [0], [2], ids[:2], [False]))
    assert session.step(TextStep([1], [0], [3], ids, [False])) == (
        TextDeltas([1], [3], [1], ["C"], [-1]),
        [],
    )
    assert session.step(TextStep([1], [1], [1], ids[1:2], [False]))[0].ids_consumed == [3]


def test_a_gap_makes_a_stream_unknown(session: TextSession, ids: list[int]) -> None:
    session.open(opened(1))
    session.open(opened(2))
    step = TextStep([1, 2, 3], [1, 0, 0], [1, 1, 1], ids, [False] * 3)
    assert session.step(step) == (TextDeltas([2], [1], [1], ["B"], [-1]), [1, 3])
    assert len(session) == 1


def test_closes_and_sweeps(session: TextSession) -> None:
    for stream in range(5):
        session.open(opened(stream))
    session.close([0, 99])
    assert len(session) == 4
    session.keep_only([1, 2, 77])
    assert len(session) == 2


def test_opening_again_begins_again(session: TextSession, ids: list[int]) -> None:
    session.open(opened(1))
    session.step(TextStep([1], [0], [2], ids[:2], [False]))
    session.open(opened(1))
    assert session.step(TextStep([1], [0], [1], ids[:1], [False]))[0].texts == ["A"]


@pytest.mark.parametrize(
    "step",
    [
        TextStep([1, 2], [0], [1], [5], [False]),
        TextStep([1], [0], [2], [5], [False]),
        TextStep([1], [0], [1], [5], []),
        TextStep([1, 1], [0, 0], [2, -1], [5], [False, False]),
        TextStep([1], [-1], [1], [5], [False]),
        TextStep([1], [0], [1], [-5], [False]),
    ],
    ids=["rows", "counts", "last", "negative count", "negative start", "negative id"],
)
def test_columns_must_fit(session: TextSession, step: TextStep) -> None:
    session.open(opened(1))
    with pytest.raises(ValueError, match="TextStep"):
        session.step(step)


def test_huge_ids_have_no_text(session: TextSession) -> None:
    session.open(opened(1))
    deltas, _ = session.step(TextStep([1], [0], [2], [2**31, 2**63], [True]))
    assert deltas == TextDeltas([1], [2], [2], [""], [-1])
