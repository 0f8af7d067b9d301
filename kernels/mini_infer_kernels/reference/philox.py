"""Random numbers that are a function of their key and counter alone: Philox4x32-10.

A number needs no state, so a row draws the same in any batch and in any order.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_LOW_32 = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(key: tuple[torch.Tensor, torch.Tensor], counter: Words) -> Words:
    """Turns counters into random words.

    Args:
        key: Two words, int64 tensors of values below 2**32.
        counter: Four such words; the tensors of both broadcast.

    Returns:
        Four such words.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(_NUM_ROUNDS):
        # int64 products wrap, and the mask takes the sign off their upper halves: all bits stand.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _LOW_32) ^ c1 ^ k0, second & _LOW_32
        c2, c3 = ((first >> 32) & _LOW_32) ^ c3 ^ k1, first & _LOW_32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_32, (k1 + _KEY_STEPS[1]) & _LOW_32
    return c0, c1, c2, c3


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel numbers, which make the greatest of logit + number a draw from softmax.

    The number of token i is -log(E) of E = -log(1 - u), u = (word + 1/2) / 2**32, where word is
    word i % 4 of Philox with the key (lower, upper half of the seed) and the counter (i // 4,
    position, 0, 0). The token with the greatest sum is the one with the least E / probability:
    the winner of a race of exponential clocks.

    Args:
        seeds: [R] int64, the bits of unsigned numbers.
        positions: [R] int64, below 2**32.
        vocab_size: Numbers a row.

    Returns:
        [R, vocab_size] float64.
    """
    key = (seeds[:, None] & _LOW_32, (seeds[:, None] >> 32) & _LOW_32)
    groups = torch.arange(-(-vocab_size // 4), device=seeds.device)[None, :]
    zero = torch.zeros_like(groups)
    words = torch.stack(philox(key, (groups, positions[:, None], zero, zero)), dim=-1)
    uniform = (words.flatten(1)[:, :vocab_size].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))
