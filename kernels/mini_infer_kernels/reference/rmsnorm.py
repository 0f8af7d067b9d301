"""RMSNorm: `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. As in Llama, the mean is
taken in float32 and the product with the weight in the input's data type.
"""

from __future__ import annotations

import math
from functools import cache

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
    normed: torch.Tensor = (x / _root_mean_square(x, eps)).to(x.dtype)
    return normed.mul_(weight)


def reference_gemma_rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalizes each row in Gemma's form: times 1 + weight, all of it in float32.

    Args:
        x: [..., hidden_size], any float type.
        weight: [hidden_size], of x's type.
        eps: Added to the mean square.

    Returns:
        [..., hidden_size], of x's type.
    """
    normed = x / _root_mean_square(x, eps)
    return normed.mul_(weight.float() + 1.0).to(x.dtype)


def _root_mean_square(x: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., 1] float32."""
    # As few operations as there are: on a CPU each costs a small model more than its arithmetic.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rms: torch.Tensor = norm.mul_(math.sqrt(1 / x.shape[-1])).hypot_(_scalar(math.sqrt(eps)))
    return rms


@cache
def _scalar(value: float) -> torch.Tensor:
    """A number as a tensor, which operations take beside tensors of any device."""
    return torch.tensor(value, device="cpu")
