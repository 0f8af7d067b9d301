"""Activations of gated feed-forward layers: `f(gate) * up`.

SwiGLU's f is silu(x) = x * sigmoid(x); GEGLU's is gelu(x) = x * Phi(x), with the normal
distribution function Phi as it is or by its approximation with tanh.

Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "GELUs", 2016.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def reference_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Applies SwiGLU's gate.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], the gate's half first, any float type.

    Returns:
        [num_tokens, intermediate_size], of the same type.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def reference_gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Applies GEGLU's gate; as `reference_silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate).mul_(up)


def reference_gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Applies GEGLU's gate by the approximation with tanh; as `reference_silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh").mul_(up)
