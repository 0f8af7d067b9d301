"""RMSNorm: `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in one pass.

x: [..., hidden_size]; weight: [hidden_size]. A row stays in the registers of one program, so it
is read once. Llama's form rounds before it multiplies by the weight; Gemma's multiplies by
1 + weight in float32.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.launch import Launcher

MAX_HIDDEN_SIZE = 65_536
"""A longer row does not fit into the registers of one program."""
_MANY_ROWS = 8192
"""From here on a program reads its row a second time, from the L1 cache, after the sum: registers
that hold no row leave room for more programs."""


@triton.jit
def times_weight(
    x: tl.tensor, inverse: tl.tensor, weight: tl.tensor, GEMMA: tl.constexpr
) -> tl.tensor:
    """Multiplies x by inverse and weight with the rounding of the form; all broadcast.

    Args:
        x: Float32 elements.
        inverse: 1 / root mean square of each row, float32.
        weight: In the model's data type.
        GEMMA: Gemma's form, otherwise Llama's.

    Returns:
        Float32 elements.
    """
    normed = x * inverse
    if GEMMA:
        return normed * (weight.to(tl.float32) + 1.0)
    return normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def inverse_rms(x: tl.tensor, eps: tl.tensor, COLUMNS: tl.constexpr) -> tl.tensor:
    """1 / root mean square of each row: [rows] of [rows, block] float32, 0 beyond COLUMNS."""
    return tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / COLUMNS) + eps)


@triton.jit(do_not_specialize=["num_rows"])
def _rmsnorm_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    COLUMNS: tl.constexpr,
    GEMMA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REREAD: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK)
    in_row = columns < COLUMNS
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & in_row[None, :]
    places = x_ptr + rows[:, None] * x_stride + columns[None, :]
    if REREAD:
        x = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_last")
        inverse = inverse_rms(x.to(tl.float32), eps, COLUMNS)
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0, eviction_policy="evict_last")
        x = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0)
        x = tl.load(places, mask=inside, other=0.0)
        inverse = inverse_rms(x.to(tl.float32), eps, COLUMNS)
    normed = times_weight(x.to(tl.float32), inverse[:, None], weight[None, :], GEMMA)
    out = out_ptr + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(out, normed.to(out_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(_rmsnorm_kernel)


def norm_launch(num_rows: int, hidden_size: int) -> tuple[int, int, bool, int]:
    """Launch parameters of a norm: rows and columns of a tile, whether to reread, and warps.

    Measured on an H200 (1 to 65,536 rows of 1024 to 8192 bfloat16, cold L2): with other numbers of
    warps up to 15 % slower; rereading is 3 to 4 % faster at 65,536 rows and up to 8 % slower up to
    2048; a persistent grid with the next row in flight is 8 % slower at 65,536.
    """
    block = 1 << (hidden_size - 1).bit_length()
    reread = num_rows >= _MANY_ROWS
    num_warps = block // 512 if reread else block // 1024
    return max(1, 1024 // block), block, reread, min(max(num_warps, 4), 32)


def triton_rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalizes each row, in Llama's form.

    Args:
        x: [..., hidden_size] on a GPU, float32, float16 or bfloat16. The elements of a row are
            adjacent; a row may be part of a longer one. Rows that are not equally far from
            each other, as in some heads of a wider tensor, are copied first.
        weight: [hidden_size], contiguous, of x's type.
        eps: Added to the mean square.
        out: [..., hidden_size] contiguous, of x's type, where the result goes; x itself if it is
            contiguous. Allocated if None.

    Returns:
        `out`.

    Raises:
        ValueError: A layout or size that is not taken.
    """
    return _norm(x, weight, eps, out, False)


def triton_gemma_rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalizes each row in Gemma's form; otherwise as `triton_rmsnorm`."""
    return _norm(x, weight, eps, out, True)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, gemma: bool
) -> torch.Tensor:
    hidden_size = x.shape[-1]
    check_norm(x, weight, hidden_size)
    if out is None:
        # The first costs the host half, but may take over the order of dimensions.
        out = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    elif out.shape != x.shape or out.dtype is not x.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {list(x.shape)} of type {x.dtype}")
    rows = x if x.dim() == 2 else x.reshape(-1, hidden_size)
    num_rows = rows.shape[0]
    if num_rows == 0:
        return out
    *tile, num_warps = norm_launch(num_rows, hidden_size)
    _launch(
        -(-num_rows // tile[0]),
        (rows, weight, out),
        (num_rows,),
        (rows.stride(0), float(eps), hidden_size, gemma, *tile),
        num_warps,
    )
    return out


def check_norm(x: torch.Tensor, weight: torch.Tensor, hidden_size: int) -> None:
    """Raises ValueError where the kernels of norms would read something else than a row.

    Args:
        x: As for `triton_rmsnorm`.
        weight: As for `triton_rmsnorm`.
        hidden_size: Elements of a row.
    """
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"rows of {hidden_size} elements; at most {MAX_HIDDEN_SIZE} are normed")
    if x.stride(-1) != 1:
        raise ValueError("the elements of a row of x must be adjacent: call x.contiguous() first")
    check_weight(weight, hidden_size, x.dtype)


def check_weight(weight: torch.Tensor, size: int, dtype: torch.dtype) -> None:
    """Raises ValueError where the weights of a norm are not so many, side by side, of a type."""
    if weight.shape != (size,) or weight.stride(0) != 1 or weight.dtype is not dtype:
        raise ValueError(f"weight must be contiguous [{size}] of type {dtype}")
