"""Rotary position embedding: pairs of a head's elements turn by an angle that grows with position.

For element i of the first half of a head and its partner in the second half:
`(a, b) -> (a cos t - b sin t, b cos t + a sin t)` with `t = position * theta^(-2i / head_dim)`.

Source: Su et al., "RoFormer", 2021, with the halves laid out as Hugging Face checkpoints have them.
"""

from __future__ import annotations

import torch


def rope_table(
    head_dim: int, num_positions: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all positions.

    Args:
        head_dim: Even.
        num_positions: Positions from 0.
        theta: Base of the frequencies.
        device: Where they will be used.

    Returns:
        cos and sin, each [num_positions, head_dim], float32, the halves equal but for the sign
        of the sine (minus in the first), so that a turn is `x * cos + swap_halves(x) * sin`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    angles = torch.outer(torch.arange(num_positions).float(), 1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)


def reference_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turns every head of every token, in place.

    Args:
        x: [num_tokens, num_heads, head_dim], any float type, perhaps some heads of a larger
            tensor.
        cos: [num_tokens, 1, head_dim], rows of `rope_table` at the tokens' positions, of x's type.
        sin: Likewise.
    """
    swapped = x.roll(int(x.shape[-1]) // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)
