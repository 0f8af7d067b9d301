"""What is drawn, 200,000 times a case, against the exact distribution by a chi-square test.

The seeds are fixed, so a case passes always or never.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mini_infer_kernels.sampling_kernels import (
    OK,
    REFERENCE_SAMPLING,
    SamplingKernels,
    TokenCounts,
    triton_sampling,
)
from sampling_cases import ExactRow, Flags, Floats, Restriction, controls_of, exact_row

NUM_DRAWS = 200_000
LEAST_P = 0.001
LEAST_EXPECTED = 5
"""Bins with fewer expected draws are pooled: the statistic is not chi-square there."""
SEEN = ((0, False), (1, True), (1, True), (2, False), (2, True), (5, True))
"""Tokens that were seen before the draw, and whether as output."""
BIASES = ((3, 2.0), (1, -1.5), (4, -np.inf), (4, 3.0))


@dataclass(frozen=True, slots=True)
class Case:
    """What the draws are restricted and moved by.

    Attributes:
        restriction: Parameters of the draw.
        penalties: Repetition, presence and frequency.
        is_biased: With `BIASES`.
        is_masked: Every third token may not be chosen.
    """

    restriction: Restriction
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)
    is_biased: bool = False
    is_masked: bool = False


PENALTIES = (1.3, 0.4, 0.2)
CASES = {
    "temperature": Case(Restriction(1.7)),
    "top-k": Case(Restriction(top_k=12)),
    "top-p": Case(Restriction(top_p=0.8)),
    "min-p": Case(Restriction(min_p=0.02)),
    "typical-p": Case(Restriction(typical_p=0.6)),
    "penalties": Case(Restriction(), PENALTIES),
    "bias": Case(Restriction(), is_biased=True),
    "mask": Case(Restriction(), is_masked=True),
    "top-k and top-p": Case(Restriction(0.8, top_k=30, top_p=0.9)),
    "temperature, min-p, mask": Case(Restriction(1.4, min_p=0.01), is_masked=True),
    "penalties, top-p, typical-p": Case(Restriction(top_p=0.9, typical_p=0.8), PENALTIES),
    "everything": Case(
        Restriction(1.2, top_k=40, top_p=0.95, min_p=0.005, typical_p=0.9), PENALTIES, True, True
    ),
}


def logits_of(size: int) -> torch.Tensor:
    """[1, size]; probabilities fall with rank as those of words do, the first tokens' most."""
    generator = np.random.default_rng(size)
    ranks = np.append(np.arange(1, 9), 9 + generator.permutation(size - 8))
    noise = generator.standard_normal(size) * 0.4
    return torch.from_numpy(2.0 + noise - 1.3 * np.log(ranks)).float()[None]


def mask_of(case: Case, size: int) -> Flags | None:
    return np.arange(size) % 3 != 1 if case.is_masked else None


def exact(case: Case, size: int) -> ExactRow:
    logits: Floats = logits_of(size)[0].double().numpy()
    repetition, presence, frequency = (float(np.float32(each)) for each in case.penalties)
    for token in {token for token, _ in SEEN}:
        num_outputs = SEEN.count((token, True))
        x = logits[token]
        x = x / repetition if x > 0 else x * repetition
        logits[token] = x - frequency * num_outputs - presence * (num_outputs > 0)
    if case.is_biased:
        for token, bias in BIASES:
            logits[token] += bias
    return exact_row(logits, case.restriction, mask_of(case, size))


def draw(
    kernels: SamplingKernels, case: Case, size: int, device: torch.device, num_rows: int
) -> np.typing.NDArray[np.int64]:
    """How often each token was drawn, in batches of the same row under other seeds."""
    logits = logits_of(size).to(device)
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    counts = TokenCounts(max_slots=1, vocab_size=size, max_distinct=8, device=device)
    ids, is_output = (torch.tensor(column, device=device) for column in zip(*SEEN, strict=True))
    kernels.count_tokens(counts, torch.zeros_like(ids), ids, is_output)
    amounts = torch.tensor(case.penalties, device=device)[:, None].contiguous()
    kernels.apply_penalties(logits, counts, slot, *amounts)
    if case.is_biased:
        tokens, values = zip(*BIASES, strict=True)
        ids = torch.tensor(tokens, device=device)
        biases = torch.tensor(values, dtype=torch.float32, device=device)
        kernels.add_to_logits(logits, torch.zeros_like(ids), ids, biases)
    drawn = torch.zeros(size, dtype=torch.int64, device=device)
    numbers = np.arange(NUM_DRAWS)
    # The mask is one row that every row of the batch points at.
    one = controls_of([case.restriction], size, masks=[mask_of(case, size)], device=device)
    rows = {
        name: getattr(one, name).expand(num_rows).contiguous()
        for name in ("temperatures", "top_ks", "top_ps", "min_ps", "typical_ps", "mask_indices")
    }
    for first in range(0, NUM_DRAWS, num_rows):
        batch = torch.from_numpy(numbers[first : first + num_rows]).to(device)
        controls = type(one)(
            **rows, masks=one.masks, seeds=batch // 1000 * 2**33 + 7, positions=batch % 1000
        )
        chosen, status = kernels.choose_tokens(logits.expand(num_rows, size), controls)
        assert bool((status == OK).all())
        drawn += torch.bincount(chosen, minlength=size)
    return drawn.cpu().numpy()


def p_value(drawn: np.typing.NDArray[np.int64], probabilities: Floats) -> float:
    """The chance of draws at least as unlike the probabilities as these."""
    expected = probabilities * drawn.sum()
    # Tokens from the rarest on share a bin until it is full enough; the last takes the rest.
    order = np.argsort(expected, kind="stable")
    reached = np.cumsum(expected[order])
    bins = np.minimum(reached // LEAST_EXPECTED, reached[-1] // LEAST_EXPECTED - 1)
    bins = np.where(expected[order] >= LEAST_EXPECTED, bins.max() + 1 + np.arange(len(bins)), bins)
    _, bins = np.unique(bins, return_inverse=True)
    pooled = np.bincount(bins, expected[order])
    found = np.bincount(bins, drawn[order])
    filled = pooled > 0
    statistic = ((found - pooled)[filled] ** 2 / pooled[filled]).sum()
    freedom = filled.sum() - 1
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))


def assert_drawn_as_expected(
    kernels: SamplingKernels, case: Case, size: int, device: torch.device, num_rows: int
) -> None:
    expected = exact(case, size)
    assert not expected.is_near
    drawn = draw(kernels, case, size, device, num_rows)
    assert drawn.sum() == NUM_DRAWS
    assert drawn[~expected.kept].sum() == 0
    assert p_value(drawn, expected.probabilities) > LEAST_P


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    assert_drawn_as_expected(
        REFERENCE_SAMPLING, CASES[name], 50, torch.device("cpu"), num_rows=10_000
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [50, 1000, 32_000, 128_256, 262_144])
@pytest.mark.parametrize("name", CASES)
def test_triton(name: str, size: int) -> None:
    assert_drawn_as_expected(
        triton_sampling(), CASES[name], size, torch.device("cuda"), num_rows=10_000
    )


def test_the_test_tells_a_wrong_distribution() -> None:
    """Half a percent of the draws gone from one token to another is seen."""
    probabilities = exact(CASES["top-k"], 50).probabilities
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(NUM_DRAWS, probabilities)
    assert p_value(drawn, probabilities) > LEAST_P
    likeliest, rarest = (
        probabilities.argmax(),
        np.where(probabilities > 0, probabilities, 1).argmin(),
    )
    drawn[likeliest] -= NUM_DRAWS // 200
    drawn[rarest] += NUM_DRAWS // 200
    assert p_value(drawn, probabilities) < LEAST_P
