"""Step costs against machines whose costs are known, and the rate of completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, replace
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer_engine.step_costs import (
    NO_WORK,
    CompletionRate,
    StepCoefficients,
    StepCosts,
    StepWork,
)

PRIOR = StepCoefficients(
    step_s=5e-3, row_s=1e-4, context_s=1e-7, token_s=2e-5, pair_s=2e-8, block_s=1e-4
)
DECODING = StepWork(num_decodes=32, num_context_tokens=32 * 300)
PROMPT = NO_WORK.with_chunk(512, 1024)
SWAPS = StepWork(num_swapped_blocks=128)
factors = st.floats(0.2, 5.0)


def machine(factors: Iterable[float]) -> StepCoefficients:
    """One whose costs are the prior's times these factors."""
    values = [factor * value for factor, value in zip(factors, astuple(PRIOR), strict=True)]
    return StepCoefficients(**dict(zip(asdict(PRIOR), values, strict=True)))


def mixed_steps(random: np.random.Generator, count: int) -> Iterator[StepWork]:
    """Half of them prefill beside up to 64 decodes, and a tenth swap."""
    for _ in range(count):
        num_decodes = int(random.integers(0, 65))
        work = StepWork(
            num_decodes=num_decodes,
            num_context_tokens=num_decodes * int(random.integers(1, 2048)),
            num_swapped_blocks=int(random.integers(1, 65) * (random.random() < 0.1)),
        )
        if random.random() < 0.5:
            work = work.with_chunk(int(random.integers(2, 513)), int(random.integers(0, 4096)))
        yield work


def run(
    costs: StepCosts,
    truth: StepCoefficients,
    count: int,
    *,
    noise: float = 0.03,
    disturb: Callable[[np.random.Generator, float], float] = lambda random, seconds: seconds,
) -> None:
    """Notes mixed steps as the machine `truth` runs them."""
    random = np.random.default_rng(7)
    exact = StepCosts(truth)
    for work in mixed_steps(random, count):
        seconds = exact.seconds(work) * (1 + noise * float(random.standard_normal()))
        costs.note(work=work, seconds=disturb(random, seconds))


def errors(costs: StepCosts, truth: StepCoefficients) -> list[float]:
    """Of the predictions for mixed steps, relative to their true seconds; the largest is last."""
    exact = StepCosts(truth)
    steps = mixed_steps(np.random.default_rng(11), 200)
    return sorted(abs(costs.seconds(work) / exact.seconds(work) - 1) for work in steps)


def test_before_any_step_the_prior_is_what_counts() -> None:
    costs = StepCosts(PRIOR)
    assert costs.coefficients == PRIOR
    work = StepWork(
        num_decodes=10,
        num_context_tokens=4000,
        num_prefill_tokens=100,
        num_pairs=30_000,
        num_swapped_blocks=5,
    )
    added_s = 1e-3 + 4e-4 + 2e-3 + 6e-4 + 5e-4
    assert costs.added_seconds(work) == pytest.approx(added_s)
    assert costs.seconds(work) == pytest.approx(5e-3 + added_s)


def test_work_adds_up() -> None:
    work = NO_WORK.with_row(7).with_row(100).with_chunk(4, 0).with_chunk(10, 50)
    assert work == StepWork(2, 107, 14, 4 * 2 + 10 * 55, 0)


def test_a_prompt_comes_to_the_same_pairs_however_it_is_cut() -> None:
    whole = NO_WORK.with_chunk(1000, 24)
    parts = NO_WORK.with_chunk(300, 24).with_chunk(1, 324).with_chunk(699, 325)
    assert parts == whole


@pytest.mark.parametrize("value", [0.0, -1e-3, math.inf, math.nan])
def test_a_prior_that_is_not_positive_and_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="expected positive finite seconds"):
        replace(PRIOR, context_s=value)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[factors] * 6))
def test_known_costs_are_learnt_from_noisy_steps(true_factors: tuple[float, ...]) -> None:
    truth = machine(true_factors)
    costs = StepCosts(PRIOR)
    run(costs, truth, 1000)
    assert errors(costs, truth)[-1] < 0.1


def test_each_coefficient_is_found_where_there_is_no_noise() -> None:
    truth = machine((0.5, 2.0, 1.5, 0.7, 0.4, 3.0))
    costs = StepCosts(PRIOR)
    run(costs, truth, 3000, noise=0.0)
    assert astuple(costs.coefficients) == pytest.approx(astuple(truth), rel=1e-2)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_steps_that_are_all_alike_leave_the_other_terms_alone(noise: float) -> None:
    random = np.random.default_rng(3)
    costs = StepCosts(PRIOR)
    for _ in range(10_000):
        seconds = 14e-3 * (1 + noise * float(random.standard_normal()))
        costs.note(work=DECODING, seconds=seconds)
    assert costs.seconds(DECODING) == pytest.approx(14e-3, rel=0.01 + noise)
    learnt = costs.coefficients
    assert learnt.token_s == PRIOR.token_s
    assert learnt.pair_s == PRIOR.pair_s
    assert learnt.block_s == PRIOR.block_s
    # 14 ms for 9.2: base, rows and contexts share the excess, and none takes what another loses.
    assert 1.0 < learnt.step_s / PRIOR.step_s < 2.2
    assert 1.0 < learnt.row_s / PRIOR.row_s < 2.2
    assert 1.0 < learnt.context_s / PRIOR.context_s < 2.2
    # The first prefill after that is one step, not a leap.
    mixed = DECODING.with_chunk(256, 0)
    costs.note(work=mixed, seconds=14e-3 + 256 * PRIOR.token_s * 1.5)
    assert 0.9 < costs.coefficients.token_s / PRIOR.token_s < 2.5
    assert costs.seconds(DECODING) == pytest.approx(14e-3, rel=0.05 + noise)


def test_what_was_learnt_of_rare_steps_outlasts_many_others() -> None:
    truth = machine((1.0, 1.0, 1.0, 3.0, 2.0, 4.0))
    costs = StepCosts(PRIOR)
    run(costs, truth, 500)
    exact = StepCosts(truth)
    for _ in range(10_000):
        costs.note(work=DECODING, seconds=exact.seconds(DECODING))
    assert costs.added_seconds(PROMPT) == pytest.approx(exact.added_seconds(PROMPT), rel=0.1)
    assert costs.added_seconds(SWAPS) == pytest.approx(exact.added_seconds(SWAPS), rel=0.2)


def test_growing_contexts_are_told_from_rows() -> None:
    """What the prior takes for a hundredth of a step comes to be most of it."""
    truth = machine((1.0, 1.0, 10.0, 1.0, 10.0, 1.0))
    costs, exact = StepCosts(PRIOR), StepCosts(truth)
    for length in range(30, 530):
        work = StepWork(64, 64 * length)
        costs.note(work=work, seconds=exact.seconds(work))
    beyond = StepWork(64, 64 * 600)
    assert costs.seconds(beyond) == pytest.approx(exact.seconds(beyond), rel=0.05)
    for context in range(0, 64 * 30, 64):
        work = beyond.with_chunk(64, context)
        costs.note(work=work, seconds=exact.seconds(work))
    beyond = beyond.with_chunk(64, 2000)
    assert costs.seconds(beyond) == pytest.approx(exact.seconds(beyond), rel=0.1)


def test_cutting_a_term_off_leaves_the_prediction_within_what_was_seen() -> None:
    """Longer contexts seem to make steps shorter, which no cost that is positive can explain."""
    costs = StepCosts(replace(PRIOR, step_s=PRIOR.step_s / 10))
    short, long = StepWork(64, 64 * 300), StepWork(64, 64 * 1200)
    for _ in range(100):
        costs.note(work=long, seconds=9e-3)
        for _ in range(3):
            costs.note(work=short, seconds=10e-3)
    assert 9e-3 < costs.seconds(short) < 10e-3
    assert 9e-3 < costs.seconds(long) < 10e-3


any_work = st.builds(
    StepWork,
    st.integers(0, 256),
    st.integers(0, 10**6),
    st.integers(0, 8192),
    st.floats(0, 1e9),
    st.integers(0, 4096),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(any_work, st.floats(1e-7, 1e3), st.integers(1, 60)), max_size=12))
def test_no_steps_make_a_cost_negative_or_infinite(runs: list[tuple[StepWork, float, int]]) -> None:
    costs = StepCosts(PRIOR)
    for work, seconds, count in runs:
        for _ in range(count):
            costs.note(work=work, seconds=seconds)
            assert all(0 < value < math.inf for value in astuple(costs.coefficients))
            # What is uncertain never grows beyond what it was at first.
            variances = np.linalg.eigvalsh(costs._covariance)
            assert -1e-12 < variances[0]
            assert variances[-1] < 16 * (1 + 1e-9)


@pytest.mark.parametrize("slowdown", [3.0, 10.0, 0.2])
def test_a_machine_that_has_changed_is_noticed_within_some_tens_of_steps(slowdown: float) -> None:
    costs = StepCosts(PRIOR)
    run(costs, PRIOR, 2000)
    truth = machine([slowdown] * 6)
    run(costs, truth, 60)
    assert mean(errors(costs, truth)) < 0.2
    run(costs, truth, 400)
    assert mean(errors(costs, truth)) < 0.05


def test_a_small_change_is_followed_too() -> None:
    costs = StepCosts(PRIOR)
    run(costs, PRIOR, 5000)
    truth = machine([1.5] * 6)
    run(costs, truth, 600)
    assert mean(errors(costs, truth)) < 0.1


def test_stalled_steps_hardly_count() -> None:
    def stall(random: np.random.Generator, seconds: float) -> float:
        return seconds + 2.0 * (random.random() < 0.03)

    costs = StepCosts(PRIOR)
    run(costs, PRIOR, 1500, disturb=stall)
    assert errors(costs, PRIOR)[-1] < 0.25


def test_five_stalled_steps_in_a_row_hardly_count() -> None:
    costs = StepCosts(PRIOR)
    run(costs, PRIOR, 1000)
    for _ in range(5):
        costs.note(work=DECODING, seconds=3.0)
    assert costs.seconds(DECODING) < 1.3 * StepCosts(PRIOR).seconds(DECODING)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_duration_that_cannot_be_is_ignored(seconds: float) -> None:
    costs = StepCosts(PRIOR)
    for _ in range(50):
        costs.note(work=DECODING.with_chunk(100, 0), seconds=seconds)
    assert costs.coefficients == PRIOR


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[factors] * 6), any_work, st.integers(0, 10**5), st.floats(0, 5))
def test_the_prefill_part_that_fits_is_the_largest(
    true_factors: tuple[float, ...], work: StepWork, num_context_tokens: int, seconds: float
) -> None:
    costs = StepCosts(machine(true_factors))
    num_tokens = costs.prefill_tokens_within(seconds, work, num_context_tokens)
    if num_tokens:
        fitting = work.with_chunk(num_tokens, num_context_tokens)
        assert costs.seconds(fitting) <= seconds * (1 + 1e-9)
    too_much = work.with_chunk(num_tokens + 1, num_context_tokens)
    assert costs.seconds(too_much) > seconds * (1 - 1e-9)
    if seconds < costs.seconds(work):
        assert num_tokens == 0


@pytest.mark.parametrize(
    ("num_tokens", "full_steps", "rest"), [(0, 0, 0), (1, 0, 1), (512, 1, 0), (1300, 2, 276)]
)
def test_a_long_prompt_takes_as_long_as_its_steps(
    num_tokens: int, full_steps: int, rest: int
) -> None:
    costs = StepCosts(PRIOR)
    chunks = [512] * full_steps + [rest] * (rest > 0)
    expected = sum(
        costs.seconds(DECODING.with_chunk(chunk, 512 * index)) for index, chunk in enumerate(chunks)
    )
    prompt = NO_WORK.with_chunk(num_tokens, 0)
    assert costs.prefill_seconds(prompt, 512, DECODING) == pytest.approx(expected)


def test_completions_tell_when_running_sequences_end() -> None:
    rate = CompletionRate()
    assert rate.seconds_until(3, 10.0) == 0.0
    rate.note_completion(10.0, saturated=True)
    assert rate.seconds_until(3, 10.0) == 0.0
    for completion in range(1, 20):
        rate.note_completion(10.0 + completion * 0.5, saturated=True)
    assert rate.seconds_until(3, 20.0) == pytest.approx(1.5)
    assert rate.seconds_until(0, 20.0) == 0.0
    assert rate.seconds_until(3, 40.0) == 0.0, "nobody has waited for long: who knows"


def test_idle_time_is_not_counted() -> None:
    rate = CompletionRate()
    ends = [(0.0, True), (1.0, True), (2.0, False), (500.0, True), (501.0, True), (900.0, False)]
    for now, saturated in ends:
        rate.note_completion(now, saturated)
    assert rate.seconds_until(1, 505.0) == pytest.approx(1.0)


def test_sequences_that_end_in_one_step_share_its_time() -> None:
    rate = CompletionRate()
    for completion in range(4000):
        rate.note_completion(float(completion // 4), saturated=True)
    assert rate.seconds_until(4, 1000.0) == pytest.approx(1.0, rel=0.05)


def test_the_rate_follows_the_recent_completions() -> None:
    rate = CompletionRate()
    now = 0.0
    for interval in [1.0] * 1000 + [0.1] * 400:
        now += interval
        rate.note_completion(now, saturated=True)
    assert rate.seconds_until(1, now) == pytest.approx(0.1, rel=0.05)
