"""RMSNorm: `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. As in Llama, the mean is
taken in float32 and the product with the weight in the input's data type.
"""

from __future__ import annotations

import torch


def reference_rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalizes each row.

    Args:
        x: [..., hidden_size], any float type.
        weight: [hidden_size], of x's type.
        eps: Added to the mean square.

    Returns:
        [..., hidden_size], of x's type.
    """
    wide = x.float()
    inverse = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype).mul_(weight)


def reference_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds to the residual stream, then normalizes the sum.

    Args:
        x: [..., hidden_size], what a layer gave.
        residual: [..., hidden_size], of x's type.
        weight: [hidden_size], of x's type.
        eps: Added to the mean square.

    Returns:
        The normalized sum and the sum, both [..., hidden_size] of x's type.
    """
    total = x + residual
    return reference_rmsnorm(total, weight, eps), total
