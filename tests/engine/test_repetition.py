"""Outputs that repeat themselves: the detector against its definition, and in the engine."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import pytest
from engine.sampling_columns import resolved
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer import EngineConfig, LLMEngine
from mini_infer.messages import FinishCode
from mini_infer.resolved_sampling import RepetitionLimit
from mini_infer.sampling_params import RepetitionDetection
from mini_infer_engine.repetition import RepetitionDetector
from mini_infer_engine.sequence import Sequence, StreamKey

STORY = "Once upon a time"


def repeats(output: Seq[int], limit: RepetitionLimit) -> bool:
    """The definition: some pattern of an admitted length ends the output, several times over."""
    count = limit.num_repeats
    return any(
        list(output[-period * count :]) == list(output[-period:]) * count
        for period in range(limit.min_period, limit.max_period + 1)
        if period * count <= len(output)
    )


@st.composite
def limits(draw: st.DrawFn) -> RepetitionLimit:
    min_period = draw(st.integers(1, 5))
    max_period = draw(st.integers(min_period, 7))
    return RepetitionLimit(min_period, max_period, draw(st.integers(2, 4)))


@st.composite
def outputs(draw: st.DrawFn) -> list[int]:
    """Texts of few letters, and such texts that end in a pattern or almost in one."""
    ids = st.integers(0, 2)
    text = draw(st.lists(ids, max_size=20))
    text += draw(st.lists(ids, max_size=7)) * draw(st.integers(0, 4))
    return text + draw(st.lists(ids, max_size=3))


@settings(max_examples=400, database=None, deadline=None)
@given(outputs(), limits())
def test_the_detector_says_what_the_definition_says_at_each_token(
    output: list[int], limit: RepetitionLimit
) -> None:
    detector = RepetitionDetector(limit)
    said = [detector.note(token_id) for token_id in output]
    assert said == [repeats(output[: end + 1], limit) for end in range(len(output))]


@settings(max_examples=100, database=None, deadline=None)
@given(outputs(), limits(), st.data())
def test_a_detector_that_begins_behind_an_output_goes_on_as_one_that_saw_it(
    output: list[int], limit: RepetitionLimit, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(output)))
    detector = RepetitionDetector(limit, output[:cut])
    said = [detector.note(token_id) for token_id in output[cut:]]
    assert said == [repeats(output[: end + 1], limit) for end in range(cut, len(output))]


@pytest.mark.parametrize("period", [1, 2, 3, 500, 1024])
@pytest.mark.parametrize("num_repeats", [2, 5])
def test_each_period_is_found_at_its_last_token(period: int, num_repeats: int) -> None:
    pattern = list(range(period))
    output = [5000, *pattern * num_repeats]
    detector = RepetitionDetector(RepetitionLimit(1, 1024, num_repeats))
    said = [detector.note(token_id) for token_id in output]
    assert said == [False] * (len(output) - 1) + [True]


def sequence_of(
    limit: RepetitionLimit, output: Seq[int] = (), prompt: Seq[int] = (4, 4, 4), **options: object
) -> Sequence:
    sampling = resolved(repetition=limit, **options)
    return Sequence(StreamKey(b"", 0), prompt, sampling, eos_token_ids=(0,), output_ids=output)


def until_it_ends(sequence: Sequence, token_ids: Seq[int]) -> tuple[FinishCode, int]:
    """Feeds tokens one at a time: how the sequence ended, and how much output it had then."""
    for token_id in token_ids:
        code = sequence.advance(1, [token_id])
        if code is not FinishCode.RUNNING:
            return code, sequence.num_output_tokens
    return FinishCode.RUNNING, sequence.num_output_tokens


def test_the_prompt_does_not_count() -> None:
    limit = RepetitionLimit(1, 4, 3)
    end = until_it_ends(sequence_of(limit), [4, 4, 4, 4])
    assert end == (FinishCode.REPETITION, 3)


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, 3), (3, 3), (4, 4), (6, 6)])
def test_no_output_ends_for_it_before_min_tokens(min_tokens: int, expected: int) -> None:
    sequence = sequence_of(RepetitionLimit(1, 1, 3), min_tokens=min_tokens)
    assert until_it_ends(sequence, [8] * 10) == (FinishCode.REPETITION, expected)


def test_a_repetition_that_is_over_by_min_tokens_ends_nothing() -> None:
    sequence = sequence_of(RepetitionLimit(1, 1, 3), min_tokens=5)
    assert until_it_ends(sequence, [8, 8, 8, 9, 8, 7])[0] is FinishCode.RUNNING


def test_tokens_of_one_step_end_at_the_first_repetition() -> None:
    sequence = sequence_of(RepetitionLimit(1, 2, 2))
    assert sequence.advance(3, [1, 2, 1, 2, 1, 2]) is FinishCode.REPETITION
    assert sequence.token_ids[3:] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("last", "options", "code"),
    [
        (0, {}, FinishCode.STOP_TOKEN),
        (0, {"ignore_eos": True}, FinishCode.REPETITION),
        (8, {"max_tokens": 4}, FinishCode.REPETITION),
    ],
)
def test_an_end_id_comes_before_it_and_the_length_after_it(
    last: int, options: dict[str, object], code: FinishCode
) -> None:
    output = [last, last] if last == 0 else [8, 8, 8]
    sequence = sequence_of(RepetitionLimit(1, 1, len(output) + 1), output, **options)
    assert sequence.advance(1, [last]) is code


def test_a_resumed_sequence_counts_what_it_had() -> None:
    output = [7, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    for cut in range(len(output)):
        sequence = sequence_of(RepetitionLimit(1, 8, 3), output[:cut])
        assert until_it_ends(sequence, output[cut:]) == (FinishCode.REPETITION, len(output))


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    config = EngineConfig(max_num_seqs=8, kv_cache_tokens=2048, max_model_len=256)
    with LLMEngine(config) as made:
        yield made


def test_an_engine_stops_a_loop_and_leaves_other_outputs_alone(engine: LLMEngine) -> None:
    """A model that may only choose between two tokens is soon in a loop."""
    (free,) = engine.generate(STORY, max_tokens=2, temperature=0, ignore_eos=True)
    allowed = list(dict.fromkeys(free.token_ids))
    options = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    (whole,) = engine.generate(STORY, allowed_token_ids=allowed, **options)
    limit = RepetitionLimit(1, 4, 4)
    ends = [size for size in range(1, 61) if repeats(whole.token_ids[:size], limit)]
    assert ends, "two tokens do not loop: choose others"
    detection = RepetitionDetection(max_period=4, num_repeats=4)
    (cut, *others) = engine.generate(
        STORY, allowed_token_ids=allowed, repetition_detection=detection, n=3, **options
    )
    assert cut.finish_reason == "repetition"
    assert cut.token_ids == whole.token_ids[: ends[0]]
    assert [each.token_ids for each in others] == [cut.token_ids] * 2
    (later,) = engine.generate(
        STORY,
        allowed_token_ids=allowed,
        repetition_detection=detection,
        min_tokens=ends[0] + 3,
        **options,
    )
    expected = next(size for size in ends if size >= ends[0] + 3)
    assert (len(later.token_ids), later.finish_reason) == (expected, "repetition")
    (never,) = engine.generate(
        STORY,
        allowed_token_ids=allowed,
        repetition_detection=RepetitionDetection(max_period=4, num_repeats=61),
        **options,
    )
    assert never.token_ids == whole.token_ids
