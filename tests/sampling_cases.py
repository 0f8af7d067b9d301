"""Rows of sampling parameters for tests, and the exact distributions that they define.

The distributions are computed in float64, one distinct value at a time, apart from the code that
they judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mini_infer_kernels.sampling_kernels import DrawControls

Floats = np.typing.NDArray[np.float64]
Flags = np.typing.NDArray[np.bool_]

NEAR = 1e-6
"""Relative distance of a mass to its bound within which rounding may decide."""
NEAR_SURPRISE = 4e-6
"""Distance of two surprises that float32 may not tell apart."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """The parameters of one row; every one is off by default."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0


def controls_of(
    restrictions: Sequence[Restriction],
    vocab_size: int,
    *,
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    masks: Sequence[Flags | None] | None = None,
    device: torch.device | str = "cpu",
) -> DrawControls:
    """Rows of parameters as tensors; seeds and positions count up unless they are given."""
    num_rows = len(restrictions)
    given = masks or [None] * num_rows
    words = [as_words(flags) for flags in given if flags is not None]
    indices = np.cumsum([flags is not None for flags in given]) - 1

    def floats(name: str) -> torch.Tensor:
        values = [getattr(each, name) for each in restrictions]
        return torch.tensor(values, dtype=torch.float32, device=device)

    def ints(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(np.asarray(values, np.int64), device=device).to(dtype)

    width = -(-vocab_size // 32)
    return DrawControls(
        temperatures=floats("temperature"),
        top_ks=ints([each.top_k for each in restrictions], torch.int32),
        top_ps=floats("top_p"),
        min_ps=floats("min_p"),
        typical_ps=floats("typical_p"),
        seeds=ints(range(num_rows) if seeds is None else seeds, torch.int64),
        positions=ints(range(num_rows) if positions is None else positions, torch.int64),
        mask_indices=ints(
            [-1 if flags is None else index for flags, index in zip(given, indices, strict=True)],
            torch.int32,
        ),
        masks=torch.tensor(np.array(words, np.int32).reshape(-1, width), device=device),
    )


def as_words(flags: Flags) -> np.typing.NDArray[np.int32]:
    """One bit a token, 32 to a word, the lowest first."""
    padded = np.pad(flags, (0, -len(flags) % 32))
    return np.packbits(padded, bitorder="little").view(np.int32)


@dataclass(slots=True)
class ExactRow:
    """What one row may draw, and how likely.

    Attributes:
        probabilities: [vocab_size], 0 where a token was dropped.
        near: [vocab_size], whether float32 may not tell if typical-p keeps the token.
        is_near: Whether a mass is so near its bound that rounding may decide.
    """

    probabilities: Floats
    near: Flags
    is_near: bool = False

    @property
    def kept(self) -> Flags:
        """The tokens that may be drawn."""
        return self.probabilities > 0


def exact_row(logits: Floats, restriction: Restriction, allowed: Flags | None = None) -> ExactRow:
    """Applies the parameters in the order that `mini_infer_kernels.reference.sampling` states."""
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    # The parameters as the kernels get them.
    temperature, top_p, min_p, typical_p = (
        float(np.float32(value))
        for value in (
            restriction.temperature,
            restriction.top_p,
            restriction.min_p,
            restriction.typical_p,
        )
    )
    scores = (logits - logits.max()) / max(temperature, 1e-5)
    masses = np.exp(scores)
    row = ExactRow(masses, near=np.zeros(len(masses), bool))
    if min_p > 0:
        row.is_near |= bool((np.abs(masses / min_p - 1) < NEAR).any())
        masses[masses < min_p] = 0
    if 0 < restriction.top_k < (masses > 0).sum():
        kth = np.sort(logits[masses > 0])[-restriction.top_k]
        masses[logits < kth] = 0
    if top_p < 1:
        _keep_share(row, -logits, top_p)
    if typical_p < 1:
        kept = masses > 0
        surprise = np.full(len(masses), np.inf)
        surprise[kept] = math.log(masses.sum()) - scores[kept]
        entropy = (masses[kept] * surprise[kept]).sum() / masses.sum()
        distances = np.abs(surprise - entropy)
        _keep_share(row, distances, typical_p)
        bound = distances[masses > 0].max()
        row.near = np.abs(distances - bound) < NEAR_SURPRISE
    masses /= masses.sum()
    return row


def _keep_share(row: ExactRow, cost: Floats, share: float) -> None:
    """Keeps the cheapest levels of a cost until they have a share of the mass."""
    masses = row.probabilities
    kept = np.flatnonzero(masses > 0)
    order = kept[np.argsort(cost[kept], kind="stable")]
    reached = np.cumsum(masses[order].astype(np.longdouble))
    target = share * reached[-1]
    last_of_level = np.append(np.diff(cost[order]) > 0, True)
    enough = np.flatnonzero(last_of_level & (reached >= target))
    masses[order[enough[0] + 1 :]] = 0
    bounds = reached[last_of_level] / target
    row.is_near |= bool((np.abs(bounds - 1) < NEAR).any())


def noise_of(seed: int, position: int, num_tokens: int) -> Floats:
    """The Gumbel noise of a row, of Philox4x32-10 written out in Python's integers."""
    words = [
        word
        for group in range(-(-num_tokens // 4))
        for word in philox((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), (group, position, 0, 0))
    ]
    uniforms = (np.array(words[:num_tokens]) + 0.5) / 2**32
    return -np.log(-np.log1p(-uniforms))


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Ten rounds as in Salmon et al., SC 2011, section 3.3."""
    low_32 = 2**32 - 1
    (left, right), words = key, counter
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = (
            second >> 32 ^ words[1] ^ left,
            second & low_32,
            first >> 32 ^ words[3] ^ right,
            first & low_32,
        )
        left, right = left + 0x9E3779B9 & low_32, right + 0xBB67AE85 & low_32
    return words
