"""Adds to the residual stream and normalizes the sum: `residual += x; y = rmsnorm(residual)`.

Source: pre-norm decoder layers (Xiong et al., "On Layer Normalization in the Transformer
Architecture", 2020) with RMSNorm (Zhang and Sennrich, 2019).
"""

from __future__ import annotations

import torch

from mini_infer_kernels.reference.rmsnorm import reference_gemma_rmsnorm, reference_rmsnorm


def reference_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds x to the residual stream, in place, and normalizes the sum, in Llama's form.

    Args:
        x: [T, hidden_size], any float type.
        residual: [T, hidden_size] of x's type. Becomes the sum, rounded to its type.
        weight: [hidden_size] of x's type.
        eps: Added to the mean square.

    Returns:
        [T, hidden_size], of x's type.
    """
    return reference_rmsnorm(residual.add_(x), weight, eps)


def reference_gemma_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Normalizes in Gemma's form; otherwise as `reference_add_rmsnorm`."""
    return reference_gemma_rmsnorm(residual.add_(x), weight, eps)
