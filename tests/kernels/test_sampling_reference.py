"""The plain-torch references of sampling against float64 formulas written another way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mini_infer_kernels.reference.philox import gumbel_noise, philox
from mini_infer_kernels.reference.sampling import restricted_scores
from mini_infer_kernels.sampling_kernels import (
    NON_FINITE,
    NOTHING_ALLOWED,
    OK,
    REFERENCE_SAMPLING,
    TokenCounts,
)
from sampling_cases import (
    Restriction,
    controls_of,
    exact_row,
    noise_of,
)
from sampling_cases import philox as philox_in_integers

LOW_32 = 2**32 - 1
KNOWN_ANSWERS = {
    (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (LOW_32,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
}
"""Key and counter to words, from the authors' Random123 library."""

sizes = st.sampled_from([1, 2, 3, 31, 32, 33, 50, 200])
restrictions = st.builds(
    Restriction,
    temperature=st.sampled_from([0.0, 1e-7, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 1e-6, 0.1, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 0.05, 0.5, 0.95]),
)


@pytest.mark.parametrize(("inputs", "words"), KNOWN_ANSWERS.items(), ids=["zeros", "ones"])
def test_philox_known_answers(inputs: tuple[int, ...], words: tuple[int, ...]) -> None:
    k0, k1, *counter = (torch.tensor(each) for each in inputs)
    c0, c1, c2, c3 = counter
    assert tuple(map(int, philox((k0, k1), (c0, c1, c2, c3)))) == words
    first, second, *rest = inputs
    a, b, c, d = rest
    assert philox_in_integers((first, second), (a, b, c, d)) == words


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**32 - 1), size=sizes)
def test_noise_is_a_function_of_seed_position_and_token(
    seed: int, position: int, size: int
) -> None:
    signed = (
        torch.tensor([seed]).view(torch.int64) if seed < 2**63 else torch.tensor([seed - 2**64])
    )
    noise = gumbel_noise(signed, torch.tensor([position]), size)
    np.testing.assert_allclose(noise[0].numpy(), noise_of(seed, position, size), rtol=1e-12)


def random_logits(seed: int, size: int, spread: float, holes: float, coarse: bool) -> torch.Tensor:
    """A row with some -inf; coarse ones have many equal values."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.standard_normal(size) * spread).float()
    if coarse:
        logits = logits.bfloat16().float().mul(4).round().div(4)
    closed = torch.from_numpy(generator.random(size) < holes)
    closed[generator.integers(size)] = False
    return logits.masked_fill(closed, -torch.inf)


rows = st.builds(
    random_logits,
    seed=st.integers(0, 2**32),
    size=sizes,
    spread=st.sampled_from([0.01, 1.0, 10.0]),
    holes=st.sampled_from([0.0, 0.3, 0.95]),
    coarse=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(logits=rows, restriction=restrictions, seed=st.integers(0, 2**63 - 1), data=st.data())
def test_sets_and_draws_equal_the_formulas(
    logits: torch.Tensor, restriction: Restriction, seed: int, data: st.DataObject
) -> None:
    size = len(logits)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    allowed[int(logits.argmax())] = True
    controls = controls_of([restriction], size, seeds=[seed], positions=[7], masks=[allowed])
    ids, status = REFERENCE_SAMPLING.choose_tokens(logits[None], controls)
    assert status.tolist() == [OK]
    exact_logits = logits.double().numpy()
    if restriction.temperature == 0:
        masked = np.where(allowed, exact_logits, -np.inf)
        assert ids.tolist() == [int(masked.argmax())]
        return
    expected = exact_row(exact_logits, restriction, allowed)
    if expected.is_near:
        return
    masked_logits = logits.masked_fill(~torch.from_numpy(allowed), -torch.inf)[None]
    scores = restricted_scores(masked_logits, controls, torch.tensor([0]))[0]
    kept = scores.exp().numpy() > 0
    assert np.array_equal(kept, expected.kept)
    with np.errstate(divide="ignore"):
        sums = np.log(expected.probabilities) + noise_of(seed, 7, size)
    assert ids.tolist() == [int(sums.argmax())]


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(generator.standard_normal((24, 301))).float()
    given = [
        Restriction(temperature=0.5 * (row % 3), top_k=5 * (row % 2), top_p=0.5 + row / 48)
        for row in range(24)
    ]
    together, _ = REFERENCE_SAMPLING.choose_tokens(logits, controls_of(given, 301))
    for row in range(24):
        alone = controls_of([given[row]], 301, seeds=[row], positions=[row])
        ids, _ = REFERENCE_SAMPLING.choose_tokens(logits[row : row + 1], alone)
        assert ids.tolist() == [together[row]]


def test_one_rows_numbers_do_not_reach_another() -> None:
    logits = torch.zeros(6, 40)
    logits[:, 5] = 3
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    masks = [None, None, None, np.arange(40) == 5, np.zeros(40, bool), np.arange(40) < 3]
    logits[5, 39] = torch.nan  # masked, and a sign of a broken model all the same
    for temperature in (0.0, 1.0):
        controls = controls_of([Restriction(temperature, top_k=1)] * 6, 40, masks=masks)
        ids, status = REFERENCE_SAMPLING.choose_tokens(logits, controls)
        broken, empty = NON_FINITE, NOTHING_ALLOWED
        assert status.tolist() == [broken, broken, empty, OK, empty, broken]
        assert ids.tolist() == [0, 0, 0, 5, 0, 0]


def test_greedy_ignores_what_restricts_a_draw() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    restriction = Restriction(0.0, top_k=1, top_p=0.1, min_p=1.0, typical_p=0.1)
    ids, _ = REFERENCE_SAMPLING.choose_tokens(logits, controls_of([restriction], 4))
    assert ids.tolist() == [1]
    masks = [np.array([True, False, True, False])]
    ids, _ = REFERENCE_SAMPLING.choose_tokens(logits, controls_of([restriction], 4, masks=masks))
    assert ids.tolist() == [2]


def test_equal_logits_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    for restriction in (Restriction(top_k=2), Restriction(top_p=0.75), Restriction(min_p=0.13)):
        controls = controls_of([restriction], 5)
        scores = restricted_scores(logits, controls, torch.tensor([0]))
        assert scores[0].isfinite().tolist() == [True, True, True, True, False]


events = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans()), min_size=1, max_size=40
)


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(events, st.sets(st.integers(0, 2)))), seed=st.integers(0, 99))
def test_penalties_equal_a_loop_over_the_tokens(
    steps: list[tuple[list[tuple[int, int, bool]], set[int]]], seed: int
) -> None:
    counts = TokenCounts(max_slots=3, vocab_size=10, max_distinct=10, device="cpu")
    prompts: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    outputs: dict[int, Counter[int]] = {0: Counter(), 1: Counter(), 2: Counter()}
    for tokens, forgotten in steps:
        slots, ids, is_output = (torch.tensor(column) for column in zip(*tokens, strict=True))
        REFERENCE_SAMPLING.count_tokens(counts, slots, ids, is_output)
        for slot, token, output in tokens:
            outputs[slot].update([token] if output else [])
            prompts[slot].update([] if output else [token])
        REFERENCE_SAMPLING.reset_counts(counts, torch.tensor(sorted(forgotten), dtype=torch.int64))
        for slot in forgotten:
            prompts[slot], outputs[slot] = set(), Counter()
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.standard_normal((4, 10))).float()
    slots = torch.tensor([2, 0, 1, 0])
    repetition = torch.tensor([1.3, 0.7, 1.0, 1.0])
    presence = torch.tensor([0.5, -0.25, 0.0, 0.0])
    frequency = torch.tensor([0.1, 0.0, 0.0, 0.2])
    expected = logits.double().clone()
    for row, slot in enumerate(slots.tolist()):
        for token in prompts[slot] | set(outputs[slot]):
            factor = float(repetition[row])
            x = float(expected[row, token])
            x = x / factor if x > 0 else x * factor
            x -= float(frequency[row]) * outputs[slot][token]
            x -= float(presence[row]) * (outputs[slot][token] > 0)
            expected[row, token] = x
    REFERENCE_SAMPLING.apply_penalties(logits, counts, slots, repetition, presence, frequency)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)


def test_values_of_one_pair_are_all_added() -> None:
    logits = torch.zeros(2, 4)
    logits[1, 3] = torch.nan
    REFERENCE_SAMPLING.add_to_logits(
        logits,
        torch.tensor([0, 0, 0, 1, 1]),
        torch.tensor([1, 2, 1, 0, 3]),
        torch.tensor([5.0, -2.0, -torch.inf, 1.5, -torch.inf]),
    )
    expected = [[0.0, -torch.inf, -2.0, 0.0], [1.5, 0.0, 0.0, torch.nan]]
    torch.testing.assert_close(logits, torch.tensor(expected), equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(logits=rows, data=st.data())
def test_logprobs_equal_log_softmax(logits: torch.Tensor, data: st.DataObject) -> None:
    size = len(logits)
    token = data.draw(st.integers(0, size - 1))
    num_top = data.draw(st.integers(0, min(20, size)))
    logprobs, ranks, top_ids, top_logprobs = REFERENCE_SAMPLING.token_logprobs(
        logits[None], torch.tensor([token]), num_top
    )
    values = logits.double().numpy()
    exact = values - values.max() - np.log(np.exp(values - values.max()).sum())
    np.testing.assert_allclose(logprobs.numpy(), exact[[token]], rtol=1e-6, atol=1e-6)
    assert ranks.tolist() == [1 + int((values > values[token]).sum())]
    order = sorted(range(size), key=lambda each: (-values[each], each))[:num_top]
    assert top_ids.tolist() == [order]
    np.testing.assert_allclose(top_logprobs[0].numpy(), exact[order], rtol=1e-6, atol=1e-6)


def test_min_p_of_one_keeps_the_likeliest_ones() -> None:
    base = Restriction(min_p=1.0)
    for restriction in (base, replace(base, top_p=0.5), replace(base, typical_p=0.5)):
        row = exact_row(np.array([1.0, 2.0, 2.0]), restriction)
        assert row.kept.tolist() == [False, True, True]
