"""Step costs against machines whose costs are known, and the rate of completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer_engine.step_costs import CompletionRate, StepCoefficients, StepCosts

PRIOR = StepCoefficients(step_s=5e-3, row_s=1e-4, token_s=2e-5, block_s=1e-4)
Step = tuple[int, int, int]
factors = st.floats(0.2, 5.0)


def machine(step: float, row: float, token: float, block: float) -> StepCoefficients:
    """One whose costs are the prior's times these factors."""
    return StepCoefficients(
        step_s=PRIOR.step_s * step,
        row_s=PRIOR.row_s * row,
        token_s=PRIOR.token_s * token,
        block_s=PRIOR.block_s * block,
    )


def mixed_steps(random: np.random.Generator, count: int) -> Iterator[Step]:
    """Half of them prefill beside up to 64 decodes, and a tenth swap."""
    for _ in range(count):
        num_prefill_tokens = int(random.integers(1, 513) * random.integers(0, 2))
        num_swapped_blocks = int(random.integers(1, 65) * (random.random() < 0.1))
        yield int(random.integers(0, 65)), num_prefill_tokens, num_swapped_blocks


def note(costs: StepCosts, step: Step, seconds: float) -> None:
    costs.note(
        num_decodes=step[0],
        num_prefill_tokens=step[1],
        num_swapped_blocks=step[2],
        seconds=seconds,
    )


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
    for step in mixed_steps(random, count):
        seconds = exact.seconds(*step) * (1 + noise * float(random.standard_normal()))
        note(costs, step, disturb(random, seconds))


def errors(costs: StepCosts, truth: StepCoefficients) -> list[float]:
    """Of the predictions for mixed steps, relative to their true seconds; the largest is last."""
    exact = StepCosts(truth)
    steps = mixed_steps(np.random.default_rng(11), 200)
    return sorted(abs(costs.seconds(*step) / exact.seconds(*step) - 1) for step in steps)


def values(coefficients: StepCoefficients) -> list[float]:
    return [
        coefficients.step_s,
        coefficients.row_s,
        coefficients.token_s,
        coefficients.block_s,
    ]


def test_before_any_step_the_prior_is_what_counts() -> None:
    costs = StepCosts(PRIOR)
    assert costs.coefficients == PRIOR
    assert costs.seconds(10, 100, 5) == pytest.approx(5e-3 + 1e-3 + 2e-3 + 5e-4)
    assert costs.recompute_seconds(100) == pytest.approx(2e-3)
    assert costs.swap_seconds(5) == pytest.approx(1e-3)


@pytest.mark.parametrize("value", [0.0, -1e-3, math.inf, math.nan])
def test_a_prior_that_is_not_positive_and_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="expected positive finite seconds"):
        StepCoefficients(step_s=1e-3, row_s=value, token_s=1e-5, block_s=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.tuples(factors, factors, factors, factors))
def test_known_costs_are_learnt_from_noisy_steps(true_factors: tuple[float, ...]) -> None:
    truth = machine(*true_factors)
    costs = StepCosts(PRIOR)
    run(costs, truth, 1000)
    assert errors(costs, truth)[-1] < 0.1


def test_each_coefficient_is_found_where_there_is_no_noise() -> None:
    truth = machine(0.5, 2.0, 0.7, 3.0)
    costs = StepCosts(PRIOR)
    run(costs, truth, 3000, noise=0.0)
    assert values(costs.coefficients) == pytest.approx(values(truth), rel=1e-2)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_steps_that_are_all_alike_leave_the_other_terms_alone(noise: float) -> None:
    random = np.random.default_rng(3)
    costs = StepCosts(PRIOR)
    for _ in range(10_000):
        note(costs, (32, 0, 0), 12e-3 * (1 + noise * float(random.standard_normal())))
    assert costs.seconds(32, 0) == pytest.approx(12e-3, rel=0.01 + noise)
    assert costs.coefficients.token_s == PRIOR.token_s
    assert costs.coefficients.block_s == PRIOR.block_s
    # 12 ms for 8.2: base and rows share the excess, and neither takes what the other loses.
    assert 1.0 < costs.coefficients.step_s / PRIOR.step_s < 2.0
    assert 1.0 < costs.coefficients.row_s / PRIOR.row_s < 2.0
    # The first prefill after that is one step, not a leap.
    note(costs, (32, 256, 0), 12e-3 + 256 * PRIOR.token_s * 1.5)
    assert 0.9 < costs.coefficients.token_s / PRIOR.token_s < 2.5
    assert costs.seconds(32, 0) == pytest.approx(12e-3, rel=0.05 + noise)


def test_what_was_learnt_of_rare_steps_outlasts_many_others() -> None:
    truth = machine(1.0, 1.0, 3.0, 4.0)
    costs = StepCosts(PRIOR)
    run(costs, truth, 500)
    exact = StepCosts(truth)
    for _ in range(10_000):
        note(costs, (20, 0, 0), exact.seconds(20, 0))
    assert costs.recompute_seconds(512) == pytest.approx(exact.recompute_seconds(512), rel=0.1)
    assert costs.swap_seconds(64) == pytest.approx(exact.swap_seconds(64), rel=0.2)


step_kinds = st.tuples(st.integers(0, 256), st.integers(0, 8192), st.integers(0, 4096))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(step_kinds, st.floats(1e-7, 1e3), st.integers(1, 60)), max_size=12))
def test_no_steps_make_a_cost_negative_or_infinite(runs: list[tuple[Step, float, int]]) -> None:
    costs = StepCosts(PRIOR)
    for step, seconds, count in runs:
        for _ in range(count):
            note(costs, step, seconds)
            assert all(0 < value < math.inf for value in values(costs.coefficients))
            # What is uncertain never grows beyond what it was at first.
            variances = np.linalg.eigvalsh(costs._covariance)
            assert -1e-12 < variances[0]
            assert variances[-1] < 4 * (1 + 1e-9)


@pytest.mark.parametrize("slowdown", [3.0, 10.0, 0.2])
def test_a_machine_that_has_changed_is_noticed_within_some_tens_of_steps(slowdown: float) -> None:
    costs = StepCosts(PRIOR)
    run(costs, PRIOR, 2000)
    truth = machine(*[slowdown] * 4)
    run(costs, truth, 60)
    assert mean(errors(costs, truth)) < 0.2
    run(costs, truth, 400)
    assert mean(errors(costs, truth)) < 0.05


def test_a_small_change_is_followed_too() -> None:
    costs = StepCosts(PRIOR)
    run(costs, PRIOR, 5000)
    truth = machine(1.5, 1.5, 1.5, 1.5)
    run(costs, truth, 400)
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
        note(costs, (32, 0, 0), 3.0)
    assert costs.seconds(32, 0) < 1.3 * StepCosts(PRIOR).seconds(32, 0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_duration_that_cannot_be_is_ignored(seconds: float) -> None:
    costs = StepCosts(PRIOR)
    for _ in range(50):
        note(costs, (10, 100, 3), seconds)
    assert costs.coefficients == PRIOR


@settings(max_examples=200, deadline=None)
@given(st.tuples(factors, factors, factors, factors), st.integers(0, 256), st.floats(0, 5))
def test_the_prefill_part_that_fits_is_the_largest(
    true_factors: tuple[float, ...], num_decodes: int, seconds: float
) -> None:
    costs = StepCosts(machine(*true_factors))
    num_tokens = costs.prefill_tokens_within(seconds, num_decodes)
    if num_tokens:
        assert costs.seconds(num_decodes, num_tokens) <= seconds * (1 + 1e-9)
    assert costs.seconds(num_decodes, num_tokens + 1) > seconds * (1 - 1e-9)
    if seconds < costs.seconds(num_decodes, 0):
        assert num_tokens == 0


@pytest.mark.parametrize(
    ("num_tokens", "full_steps", "rest"), [(0, 0, 0), (1, 0, 1), (512, 1, 0), (1300, 2, 276)]
)
def test_a_long_prompt_takes_as_long_as_its_steps(
    num_tokens: int, full_steps: int, rest: int
) -> None:
    costs = StepCosts(PRIOR)
    expected = full_steps * costs.seconds(8, 512) + (costs.seconds(8, rest) if rest else 0.0)
    assert costs.prefill_seconds(num_tokens, 512, 8) == pytest.approx(expected)


def test_completions_tell_when_running_sequences_end() -> None:
    rate = CompletionRate()
    assert rate.seconds_until(3) == 0.0
    rate.note_completion(10.0, saturated=True)
    assert rate.seconds_until(3) == 0.0
    for completion in range(1, 20):
        rate.note_completion(10.0 + completion * 0.5, saturated=True)
    assert rate.seconds_until(3) == pytest.approx(1.5)
    assert rate.seconds_until(0) == 0.0


def test_idle_time_is_not_counted() -> None:
    rate = CompletionRate()
    ends = [(0.0, True), (1.0, True), (2.0, False), (500.0, True), (501.0, True), (900.0, False)]
    for now, saturated in ends:
        rate.note_completion(now, saturated)
    assert rate.seconds_until(1) == pytest.approx(1.0)


def test_sequences_that_end_in_one_step_share_its_time() -> None:
    rate = CompletionRate()
    for completion in range(4000):
        rate.note_completion(float(completion // 4), saturated=True)
    assert rate.seconds_until(4) == pytest.approx(1.0, rel=0.05)


def test_the_rate_follows_the_recent_completions() -> None:
    rate = CompletionRate()
    now = 0.0
    for interval in [1.0] * 1000 + [0.1] * 400:
        now += interval
        rate.note_completion(now, saturated=True)
    assert rate.seconds_until(1) == pytest.approx(0.1, rel=0.05)
