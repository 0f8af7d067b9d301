"""SwiGLU's activation: `silu(gate) * up`, with silu(x) = x * sigmoid(x).

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def reference_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Applies the gate.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], the gate's half first, any float type.

    Returns:
        [num_tokens, intermediate_size], of the same type.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
