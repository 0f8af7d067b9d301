"""Activations of gated feed-forward layers: `f(gate) * up`, rounded once.

gate_up: [T, 2 * intermediate_size], the gate's half first. SwiGLU's f is silu(x) = x * sigmoid(x);
GEGLU's is gelu(x) = x * Phi(x), with the normal distribution function Phi as it is or by its
approximation with tanh.

Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "GELUs", 2016.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.launch import Launcher

# Elements of a program, 8 a thread. Measured on an H200 (1 to 8192 rows of 3072 and 14,336
# bfloat16, cold L2): half or twice as many with as many a thread are equally fast; 16 a thread are
# 20 % slower up to 64 rows.
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def activate(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The function f of float32 elements: ACTIVATION is "silu", "gelu" or "gelu_tanh"."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    if ACTIVATION == "gelu":
        return gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))  # 1 / sqrt(2)
    # 0.5 + 0.5 * tanh(z) is sigmoid(2 * z); the factor is 2 * sqrt(2 / pi).
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))


@triton.jit
def _gate_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    num_blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    columns = program % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    gates = gate_up_ptr + row * row_stride + columns
    gate = tl.load(gates, mask=inside).to(tl.float32)
    up = tl.load(gates + COLUMNS, mask=inside).to(tl.float32)
    gated = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * COLUMNS + columns, gated.to(out_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(_gate_kernel)


def triton_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Applies SwiGLU's gate.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size] on a GPU, float32, float16 or bfloat16, the
            gate's half first. Rows may be apart.

    Returns:
        [num_tokens, intermediate_size], contiguous, of the same type.

    Raises:
        ValueError: The elements of a row are not adjacent, or their number is odd.
    """
    return _gate(gate_up, "silu")


def triton_gelu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Applies GEGLU's gate; as `triton_silu_and_mul`."""
    return _gate(gate_up, "gelu")


def triton_gelu_tanh_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Applies GEGLU's gate by the approximation with tanh; as `triton_silu_and_mul`."""
    return _gate(gate_up, "gelu_tanh")


def _gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    num_tokens, width = gate_up.shape
    if gate_up.stride(1) != 1:
        raise ValueError("the elements of a row of gate_up must be adjacent: call contiguous()")
    if width % 2:
        raise ValueError(f"rows of {width} elements have no two halves: pass gate and up")
    columns = width // 2
    out = gate_up.new_empty((num_tokens, columns))
    if num_tokens == 0:
        return out
    block = min(_BLOCK, 1 << (columns - 1).bit_length())
    _launch(
        num_tokens * -(-columns // block),
        (gate_up, out),
        (),
        (gate_up.stride(0), columns, activation, block),
        _NUM_WARPS,
    )
    return out
