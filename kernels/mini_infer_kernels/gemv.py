"""One or few rows times a weight at the speed of memory: the products of a decode step at batch 1.

`act(norm(x) W^T + bias) + residual` (contract: `reference/gemv.py`), each part but the product
optional. A program multiplies a block of the weight's rows by all rows of x: a weight is read
once, 16 bytes a thread and load, and accumulated in float32 without tensor cores; threads add
their sums at the end. RMSNorm takes no pass of its own: its weight multiplies x on the way, and
the root mean square, known when all columns are through, divides the sums.

With programmatic dependent launch (CUDA C++ Programming Guide) a program starts while the kernel
before it still runs, and loads its first weights before it waits for that kernel's results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mini_infer_kernels.activation import activate
from mini_infer_kernels.launch import has_dependent_launch

MAX_GEMV_ROWS = 4
"""Rows of x at most. Three rows run as four do, so that few forms are compiled."""

_VECTOR = tl.constexpr(8)
"""Neighbouring columns of a thread: 16 bytes of bf16."""
_GATES = (None, "silu", "gelu", "gelu_tanh")


@dataclass(frozen=True, slots=True)
class _Launch:
    """How a weight is cut.

    Attributes:
        block_rows: Rows of the weight a program, a power of two, 2 at least.
        block_columns: Columns that a program loads together, a power of two.
        num_warps: Warps a program.
    """

    block_rows: int
    block_columns: int
    num_warps: int


# Most columns of a weight; the launch for one row of x; the launch for several. Each was varied
# within all products of a step of llama3-8b, llama2-7b and qwen3-0.6b, in one CUDA graph with
# dependent launches on an H200: what a launch leaves free is where the next one begins, so the
# best for a product by itself is often another one.
_LAUNCHES = (
    (1024, _Launch(4, 512, 2), _Launch(4, 1024, 2)),
    (2048, _Launch(4, 2048, 4), _Launch(2, 1024, 4)),
    (4095, _Launch(2, 4096, 4), _Launch(2, 1024, 4)),
    (4096, _Launch(4, 2048, 8), _Launch(4, 1024, 4)),
    (math.inf, _Launch(4, 2048, 8), _Launch(4, 512, 2)),
)


def max_gemv_rows(num_columns: int) -> int:
    """Up to how many rows all products of a step are together faster than cuBLAS's, on an H200.

    Single products of several rows may be slower: they are bound by arithmetic, and cuBLAS has
    tensor cores.

    Args:
        num_columns: Of the narrowest weights of a model: its hidden size.

    Returns:
        MAX_GEMV_ROWS or less.
    """
    return MAX_GEMV_ROWS if num_columns < 4096 else 2


def _launch_of(num_x_rows: int, num_columns: int) -> _Launch:
    _, one_row, several_rows = next(entry for entry in _LAUNCHES if num_columns <= entry[0])
    return one_row if num_x_rows == 1 else several_rows


@triton.jit
def _folded(products: tl.tensor) -> tl.tensor:
    """Adds neighbouring columns, which are a thread's own: fewer registers for the sums."""
    shape: tl.constexpr = products.shape
    return tl.sum(tl.reshape(products, (shape[0], shape[1], shape[2] // _VECTOR, _VECTOR)), axis=3)


@triton.jit
def _load_once(ptrs: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Loads what no other program reads: the L2 cache keeps what others share."""
    return tl.load(ptrs, mask, 0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_x_rows"])
def _gemv_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride_x: tl.tensor,
    stride_weight: tl.tensor,
    stride_out: tl.tensor,
    out_size: tl.tensor,
    num_x_rows: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GEMMA: tl.constexpr,
    GATE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Multiplies BLOCK_N rows of the weight; with a gate every other one is a row of `up`."""
    if PDL:
        gdc_launch_dependents()
    FACTORS: tl.constexpr = 1 if GATE is None else 2
    block = tl.program_id(0) * (BLOCK_N // FACTORS)
    tile_rows = tl.arange(0, BLOCK_N)
    # Rows behind the last one are the last one, and only what is stored is masked.
    rows = tl.minimum(block + tile_rows // FACTORS, out_size - 1) + tile_rows % FACTORS * out_size
    x_rows = tl.arange(0, BLOCK_M)
    if BLOCK_M > 2:  # one row and two fill their blocks
        x_rows = tl.minimum(x_rows, num_x_rows - 1)
    columns = tl.arange(0, BLOCK_K)[None, None, :]
    weight_ptrs = weight_ptr + rows.to(tl.int64)[None, :, None] * stride_weight + columns
    x_ptrs = x_ptr + x_rows[:, None, None] * stride_x + columns
    out_rows = tl.arange(0, BLOCK_M)[:, None]
    out_columns = (block + tl.arange(0, BLOCK_N // FACTORS))[None, :]
    out_ptrs = out_ptr + out_rows * stride_out + out_columns
    is_stored = out_columns < out_size
    if BLOCK_M > 2:
        is_stored &= out_rows < num_x_rows

    inside = columns < K
    next_weight = _load_once(weight_ptrs, inside)
    if norm_weight_ptr is not None:
        next_norm_weight = tl.load(norm_weight_ptr + columns, inside, 0.0)
    if PDL:
        gdc_wait()
    if HAS_RESIDUAL:  # before the products: it arrives while they are summed
        residual = tl.load(out_ptrs, is_stored, 0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // _VECTOR), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K // _VECTOR), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        weight = next_weight.to(tl.float32)  # [1, BLOCK_N, BLOCK_K]
        if norm_weight_ptr is not None:
            norm_weight = next_norm_weight.to(tl.float32)
        if start + BLOCK_K < K:
            inside = columns < K - start - BLOCK_K
            next_weight = _load_once(weight_ptrs + start + BLOCK_K, inside)
            if norm_weight_ptr is not None:
                next_norm_weight = tl.load(norm_weight_ptr + start + BLOCK_K + columns, inside, 0.0)
        x = tl.load(x_ptrs + start, columns < K - start, 0.0).to(tl.float32)
        if norm_weight_ptr is not None:
            squares += _folded(x * x)
            x *= norm_weight + 1.0 if GEMMA else norm_weight
        sums += _folded(x * weight)
    result = tl.sum(sums, axis=2)  # [BLOCK_M, BLOCK_N]
    if norm_weight_ptr is not None:
        result *= tl.rsqrt(tl.sum(squares, axis=2) / K + eps)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + rows)[None, :].to(tl.float32)
    if GATE is not None:
        gate, up = tl.split(tl.reshape(result, (BLOCK_M, BLOCK_N // 2, 2)))
        result = activate(gate, GATE) * up
    if HAS_RESIDUAL:
        result += residual
    tl.store(out_ptrs, result, is_stored)


def triton_gemv(
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
    pdl: bool = False,
) -> torch.Tensor:
    """As `reference_gemv`, for at most MAX_GEMV_ROWS rows.

    The elements of a row stand side by side, in every tensor; rows may stand at any distance.

    Args:
        x: [M, K] bf16, fp16 or fp32, on a GPU.
        weight: [N, K], of x's type.
        bias: [N], of x's type, or None.
        residual: [M, N or I], of x's type, written in place while x is read: no part of x. Or None.
        norm_weight: [K], of x's type, or None.
        eps: Added to the mean square.
        gemma: The norm multiplies by 1 + norm_weight.
        gate: "silu", "gelu", "gelu_tanh" or None.
        out_dtype: Type of the result, without a residual; x's by default.
        pdl: Programmatic dependent launch: starts before kernels before it have ended, none of
            which may write the weights. Without effect where the device has no such launch.

    Returns:
        [M, N], with a gate [M, I]; `residual` itself if it is given.

    Raises:
        ValueError: Too many rows, shapes, types or layouts that do not fit, or an unknown gate.
    """
    _check(x, weight, gate)
    _check_vectors(weight, bias, norm_weight)
    num_x_rows, num_columns = x.shape
    num_rows = weight.shape[0]
    out_size = num_rows if gate is None else num_rows // 2
    if residual is None:
        out = torch.empty((num_x_rows, out_size), dtype=out_dtype or x.dtype, device=x.device)
    else:
        _check_residual(residual, (num_x_rows, out_size), out_dtype)
        out = residual
    if num_x_rows == 0:
        return out
    launch = _launch_of(num_x_rows, num_columns)
    # Python's own arithmetic: Triton's takes microseconds a call.
    num_blocks = -(-num_rows // launch.block_rows)
    use_pdl = pdl and has_dependent_launch(x.device)
    _gemv_kernel[(num_blocks,)](
        x,
        weight,
        bias,
        norm_weight,
        out,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        out_size,
        num_x_rows,
        eps,
        K=num_columns,
        BLOCK_M=1 << (num_x_rows - 1).bit_length(),
        BLOCK_N=launch.block_rows,
        BLOCK_K=launch.block_columns,
        HAS_RESIDUAL=residual is not None,
        GEMMA=gemma,
        GATE=gate,
        PDL=use_pdl,
        num_warps=launch.num_warps,
        launch_pdl=use_pdl,
    )
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, gate: str | None) -> None:
    num_x_rows, num_columns = x.shape
    if num_x_rows > MAX_GEMV_ROWS:
        raise ValueError(f"x must have at most {MAX_GEMV_ROWS} rows, got {num_x_rows}")
    if weight.shape[1] != num_columns or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be [N, {num_columns}] {x.dtype} as x is, "
            f"got {list(weight.shape)} {weight.dtype}"
        )
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("the elements of a row must stand side by side: call contiguous()")
    if gate not in _GATES:
        raise ValueError(f"gate must be one of {_GATES}, got {gate!r}")
    if gate is not None and weight.shape[0] % 2:
        raise ValueError(f"a weight with a gate has an even number of rows, got {weight.shape[0]}")


def _check_vectors(
    weight: torch.Tensor, bias: torch.Tensor | None, norm_weight: torch.Tensor | None
) -> None:
    for name, vector, size in (("bias", bias, 0), ("norm_weight", norm_weight, 1)):
        if vector is None:
            continue
        shape = weight.shape[size : size + 1]
        if vector.shape != shape or vector.stride(0) != 1 or vector.dtype != weight.dtype:
            raise ValueError(
                f"{name} must be contiguous {list(shape)} {weight.dtype}, "
                f"got {list(vector.shape)} {vector.dtype}"
            )


def _check_residual(
    residual: torch.Tensor, shape: tuple[int, int], out_dtype: torch.dtype | None
) -> None:
    if residual.shape != shape or residual.stride(1) != 1:
        raise ValueError(
            f"residual must be {list(shape)}, the elements of a row side by side, "
            f"got {list(residual.shape)} with strides {residual.stride()}"
        )
    if out_dtype is not None:
        raise ValueError("the result has the residual's type: leave out_dtype out")
