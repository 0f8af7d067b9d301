"""Sampling: restricted distributions, and draws that depend on seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mini_infer_engine import sampling
from mini_infer_engine.batch import SamplingColumns
from mini_infer_engine.sampling import uniform

VOCAB = 50


def sample(logits: torch.Tensor, columns: SamplingColumns) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, finite = sampling.sample(logits, columns)
    return torch.from_numpy(chosen[:, 0]), torch.from_numpy(finite)


def columns(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
    banned: tuple[tuple[int, int], ...] = (),
) -> SamplingColumns:
    return SamplingColumns(
        rows=np.arange(num_rows),
        temperatures=np.full(num_rows, temperature, np.float32),
        top_ks=np.full(num_rows, top_k, np.int64),
        top_ps=np.full(num_rows, top_p, np.float32),
        seeds=np.array(seeds or [0] * num_rows, np.uint64),
        positions=np.array(positions or list(range(num_rows)), np.int64),
        banned_rows=np.array([row for row, _ in banned], np.int64),
        banned_ids=np.array([token for _, token in banned], np.int64),
    )


def expected_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """The exact distribution, token by token, in float64."""
    scores = logits.double().numpy() / temperature
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    kept = order[: top_k or None]
    weights = {index: np.exp(scores[index] - scores[order[0]]) for index in kept}
    total = sum(weights.values())
    result = np.zeros(len(scores))
    reached = 0.0
    for index in kept:
        if reached >= top_p * (1 + 1e-12):
            break
        result[index] = weights[index]
        reached += weights[index] / total
    return result / result.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.5, 5, 1.0), (0.8, 20, 0.5), (1.0, 1, 1.0), (2.0, 0, 0.01)],
)
def test_draws_follow_the_exact_distribution(temperature: float, top_k: int, top_p: float) -> None:
    num_draws = 20_000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    many = columns(num_draws, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn, _ = sample(logits.repeat(num_draws, 1), many)
    counts = np.bincount(drawn.numpy(), minlength=VOCAB)
    expected = expected_probabilities(logits, temperature, top_k, top_p) * num_draws
    assert counts[expected == 0].sum() == 0
    # Pearson's statistic has mean k - 1 and variance 2 (k - 1); six deviations never happen.
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = max(1, common.sum() - 1)
    assert statistic < freedom + 6 * np.sqrt(2 * freedom)


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(8, VOCAB, generator=generator)
    seeds, positions = [9, 9, 1, 2, 3, 4, 5, 6], [0, 1, 0, 0, 7, 7, 7, 7]
    together, _ = sample(logits.clone(), columns(8, seeds=seeds, positions=positions))
    for row in range(8):
        one = columns(1, seeds=[seeds[row]], positions=[positions[row]])
        alone, _ = sample(logits[row : row + 1].clone(), one)
        assert alone.item() == together[row].item()


def test_uniforms_are_uniform_and_differ_by_seed_and_position() -> None:
    values = np.array([uniform(seed, position) for seed in range(50) for position in range(100)])
    assert len(set(values.tolist())) == len(values)
    assert 0 <= values.min() <= values.max() < 1
    assert abs(values.mean() - 0.5) < 6 / np.sqrt(12 * len(values))
    assert uniform(2**64 - 1, 10**6) == uniform(2**64 - 1, 10**6)


def test_greedy_and_drawing_rows_mix() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    mixed = columns(4)
    mixed.temperatures[:] = [0.0, 1.0, 0.0, 1.0]
    chosen, _ = sample(logits.clone(), mixed)
    assert chosen[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    drawn, _ = sample(logits.clone(), columns(4))
    assert chosen[[1, 3]].tolist() == drawn[[1, 3]].tolist()


def test_banned_ids_are_not_chosen() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 7], logits[:, 9] = 50.0, 40.0
    for temperature in (0.0, 1.0):
        chosen, _ = sample(logits.clone(), columns(2, temperature=temperature, banned=((1, 7),)))
        assert chosen.tolist() == [7, 9]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2)) * 1e4
    chosen, finite = sample(logits.clone(), columns(3, temperature=1e-30))
    assert chosen.tolist() == logits.argmax(-1).tolist()
    assert finite.all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_are_told_apart(temperature: float) -> None:
    logits = torch.zeros(5, VOCAB)
    logits[1, 4] = float("nan")
    logits[2, 4] = float("inf")
    logits[3] = float("-inf")
    logits[4, 4] = float("-inf")  # a token that cannot be, which is no fault
    _, finite = sample(logits, columns(5, temperature=temperature))
    assert finite.tolist() == [True, False, False, False, True]
