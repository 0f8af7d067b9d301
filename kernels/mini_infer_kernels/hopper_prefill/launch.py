"""The launch of Hopper's prefill attention, in Gluon.

A program has 128 rows, in two halves of 64 that two groups of four warps compute, each at its own
pace: while one is at its exponentials, the other has the tensor cores. A further warp has the copy
engine bring keys and values, block after block of the cache, into rings of tiles in shared memory
that both halves read (Shah et al., "FlashAttention-3", 2024). Tiles go from the diagonal down.
"""

from __future__ import annotations

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mini_infer_kernels.hopper_prefill.half import Rows, compute_half
from mini_infer_kernels.hopper_prefill.ring import LEAST_BLOCK, load_all, make_ring
from mini_infer_kernels.hopper_prefill.work import find_work
from mini_infer_kernels.prefill_tile import LOG2_E, PrefillTile

_ROWS = 128
_KEYS_AND_STAGES = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
"""By the columns of a tile. Measured on an H200 in bf16 for 128, from 512 to 8192 tokens: 3 stages
are as fast, 64 keys and 3 or 4 stages up to 11 % slower. 256 columns have half the keys, as many
bytes; 64 were not varied."""
_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
"""Of tiles in shared memory: as the tensor cores read them fastest."""


def runs_on_hopper(query: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether `launch_on_hopper` takes these types and shapes.

    Args:
        query: As for `triton_prefill_attention`, on a GPU of compute capability 9.
        cache: Likewise.
    """
    _, block_size, num_heads, head_dim = cache.shape
    return (
        query.element_size() == 2
        and head_dim <= max(_KEYS_AND_STAGES)
        and head_dim % 8 == 0
        and block_size & (block_size - 1) == 0
        and block_size >= LEAST_BLOCK
        and cache.stride(0) == block_size * num_heads * head_dim
        and cache.data_ptr() % 16 == 0  # for the copy engine
        and query.shape[1] * 2 <= _ROWS * num_heads
    )


def launch_on_hopper(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """Writes `out`; the arguments of `triton_prefill_attention`, checked."""
    num_blocks, block_size, num_heads, head_dim = cache.shape
    num_kv_heads = num_heads // 2
    tile = _tile(query.shape[1] // num_kv_heads, head_dim, block_size, window, softcap)
    slots = TensorDescriptor(
        cache,
        [num_blocks * block_size, num_heads * head_dim],
        [num_heads * head_dim, 1],
        [min(block_size, tile.keys), tile.columns],
        _LAYOUT,
    )
    num_seqs = len(context_lens)
    num_programs = num_kv_heads * num_seqs * triton.cdiv(max_query_len, tile.tokens)
    _prefill_kernel[(num_programs,)](
        query,
        query.stride(0),
        slots,
        block_tables,
        block_tables.stride(0),
        table_rows,
        query_starts,
        context_lens,
        out,
        out.stride(0),
        num_kv_heads,
        num_seqs,
        scale * LOG2_E,
        tile,
        num_warps=4,
    )


@functools.cache
def _tile(
    group: int, head_dim: int, block_size: int, window: int | None, softcap: float | None
) -> PrefillTile:
    columns = max(64, triton.next_power_of_2(head_dim))
    keys, num_stages = _KEYS_AND_STAGES[columns]
    return PrefillTile(
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        softcap=softcap,
        rows=_ROWS,
        keys=keys,
        columns=columns,
        num_stages=num_stages,
    )


@gluon.jit(
    do_not_specialize=["num_seqs"],
    do_not_specialize_on_alignment=["table_rows_ptr", "query_starts_ptr", "context_lens_ptr"],
)
def _prefill_kernel(
    query_ptr: gl.tensor,
    stride_query: gl.tensor,
    slots: tma.tensor_descriptor,
    block_tables_ptr: gl.tensor,
    stride_table: gl.tensor,
    table_rows_ptr: gl.tensor,
    query_starts_ptr: gl.tensor,
    context_lens_ptr: gl.tensor,
    out_ptr: gl.tensor,
    stride_out: gl.tensor,
    num_kv_heads: gl.tensor,
    num_seqs: gl.tensor,
    scale: gl.tensor,
    T: gl.constexpr,
) -> None:
    """One tile of queries.

    The arguments are those of `launch_on_hopper`, but that scale is times log2(e).
    """
    seq, work = find_work(query_starts_ptr, context_lens_ptr, num_kv_heads, num_seqs, T)
    if work.num_tiles > 0:
        table_row = gl.load(table_rows_ptr + seq).to(gl.int64)
        table_ptr = block_tables_ptr + table_row * stride_table
        queries = gl.allocate_shared_memory(slots.dtype, [2, T.rows // 2, T.columns], slots.layout)
        keys = make_ring(slots, T)
        values = make_ring(slots, T)
        fence_async_shared()
        rows = Rows(query_ptr, stride_query, out_ptr, stride_out)
        gl.warp_specialize(
            [
                (compute_half, (0, rows, queries, keys, values, scale, work, T)),
                (compute_half, (1, rows, queries, keys, values, scale, work, T)),
                (load_all, (keys, values, slots, table_ptr, num_kv_heads, work, T)),
            ],
            [4, 1],
            [240, 24],  # registers of a thread: as many as there are, and the least
        )
