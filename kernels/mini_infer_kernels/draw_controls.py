"""How the next token of each row is chosen, and what came of it, for every set of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

OK = 0
"""A token was chosen."""
NON_FINITE = 1
"""The row has NaN or +inf, masked or not; its id means nothing."""
NOTHING_ALLOWED = 2
"""Every logit of the row is -inf, or masked; its id means nothing."""

MIN_TEMPERATURE = 1e-5
"""Temperatures above 0 and below this one count as it: scaled logits would overflow."""


@dataclass(frozen=True, slots=True)
class DrawControls:
    """How to choose the next tokens of R rows; tensors on the device of their logits.

    The values are not looked at on the host, so whoever makes them answers for their ranges.

    Attributes:
        temperatures: [R] float32, not negative; 0 takes the greatest logit, whatever the fields
            below say, the mask excepted.
        top_ks: [R] int32; 0 is off.
        top_ps: [R] float32, above 0; 1 is off.
        min_ps: [R] float32, 0 to 1; 0 is off.
        typical_ps: [R] float32, above 0; 1 is off.
        seeds: [R] int64, the bits of an unsigned number.
        positions: [R] int64, output positions of the tokens to choose, below 2**32.
        mask_indices: [R] int32, rows of `masks`; -1 allows every token.
        masks: [M, ceil(vocab_size / 32)] int32, M may be 0; bit b of word w allows 32 * w + b.
    """

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    typical_ps: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    mask_indices: torch.Tensor
    masks: torch.Tensor
