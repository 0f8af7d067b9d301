"""One or few rows times a weight, with what stands around it in a layer.

`act(norm(x) W^T + bias) + residual`, each part but the product optional; float32 inside, rounded
once.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from mini_infer_kernels.reference.activation import (
    reference_gelu_and_mul,
    reference_gelu_tanh_and_mul,
    reference_silu_and_mul,
)
from mini_infer_kernels.reference.rmsnorm import reference_gemma_rmsnorm, reference_rmsnorm

_GATES = {
    "silu": reference_silu_and_mul,
    "gelu": reference_gelu_and_mul,
    "gelu_tanh": reference_gelu_tanh_and_mul,
}


def reference_gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gemma: bool = False,
    gate: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiplies rows by a weight.

    Args:
        x: [M, K], any float type.
        weight: [N, K], of x's type; with a gate N = 2 * I, the gate's rows first.
        bias: [N], of x's type, or None.
        residual: [M, N or I], of x's type, added to the result and overwritten by it; or None.
        norm_weight: [K], of x's type: x goes through RMSNorm first; or None.
        eps: Added to the mean square.
        gemma: The norm multiplies by 1 + norm_weight.
        gate: "silu", "gelu" or "gelu_tanh" for `act(gate) * up` of the product's halves, or None.
        out_dtype: Type of the result, without a residual; x's by default.

    Returns:
        [M, N], with a gate [M, I]; `residual` itself if it is given.
    """
    rows = x.float()
    if norm_weight is not None:
        norm = reference_gemma_rmsnorm if gemma else reference_rmsnorm
        rows = norm(rows, norm_weight.float(), eps)
    product = functional.linear(rows, weight.float(), None if bias is None else bias.float())
    if gate is not None:
        product = _GATES[gate](product)
    if residual is not None:
        return residual.copy_(product.add_(residual))
    return product.to(out_dtype or x.dtype)
