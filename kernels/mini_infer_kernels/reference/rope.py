"""Rotary position embedding: pairs of a head's elements turn by an angle that grows with position.

For element i of the first half of a head and its partner in the second half:
`(a, b) -> (a cos t - b sin t, b cos t + a sin t)` with `t = position * theta^(-2i / head_dim)`.

Source: Su et al., "RoFormer", 2021, with the halves laid out as Hugging Face checkpoints have them.
"""

from __future__ import annotations

import torch


def reference_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turns every head of every token, in place.

    Args:
        x: [num_tokens, num_heads, head_dim], any float type, perhaps some heads of a larger
            tensor, or the first elements of wider heads.
        cos: [num_tokens, 1, head_dim] cosines of the tokens' angles, of x's type; the halves equal.
        sin: Sines likewise, but for their sign: minus in the first half. So a turn is
            `x * cos + swap_halves(x) * sin`.
    """
    swapped = x.roll(int(x.shape[-1]) // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)
