"""Attention of one new token per sequence over the paged cache (`reference/paged_decode.py`).

`softmax(q k^T * scale) v`, read once: a program holds the query heads that share a key-value head
as the rows of one tile and walks over the tokens with the online softmax (Dao et al.,
"FlashAttention", 2022). Tokens are shared out by `DecodePlan`. Where several programs had a
sequence, the last to be done with it combines their results (Dao et al., "Flash-Decoding", 2023),
so there is no second launch.

Scores and what is made of them are float32, to base 2.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mini_infer_kernels.decode_plan import ALL_TOKENS, TILE, DecodePlan
from mini_infer_kernels.launch import Launcher, has_dependent_launch

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-1e30)
"""Below all logarithms, and finite: less than it, -inf is not undefined."""
_MIN_ROWS = 16
"""Rows of the smallest tile of a matrix product."""
_COMBINED_ELEMENTS = 4096
"""Elements of partial results that are read together; more do not fit the registers."""


class _Launch(NamedTuple):
    """Launch parameters: tokens of a step, warps, depth of the software pipeline."""

    tokens: int
    num_warps: int
    num_stages: int


# By bytes of an element and padded head_dim. (2, 128) is the best of 30 combinations with 1 to 12
# programs a multiprocessor, over contexts of 128 to 32768 in batches of 1 to 256 on an H200; the
# other rows keep its bytes a step, and float32 its registers.
_LAUNCHES = {
    (2, 64): _Launch(64, 2, 3),
    (2, 128): _Launch(32, 2, 3),
    (2, 256): _Launch(16, 2, 3),
    (4, 64): _Launch(32, 4, 2),
    (4, 128): _Launch(32, 4, 2),
    (4, 256): _Launch(16, 4, 2),
}


def triton_decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    context_lens: torch.Tensor,
    plan: DecodePlan,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """As `reference_paged_decode`, after `plan.update(context_lens)`.

    Args:
        query: [num_seqs, num_q_heads, head_dim]; a row's elements stand side by side.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim] of query's type, contiguous.
        block_tables: [rows, max_blocks] int32; a row's elements stand side by side.
        table_rows: [num_seqs] int32, the row of block_tables that belongs to each sequence.
        context_lens: [num_seqs] int32, tokens of each sequence in the cache, the new one
            included; 0 for a padding row, whose output is left as it is.
        plan: Made for these heads and this window, and updated with these lengths.
        scale: Factor of the scores.
        window: Tokens that a token sees, itself included, or None for all.
        softcap: Bound of the scores, or None.
        out: [num_seqs, num_q_heads, head_dim] of query's type, contiguous; None allocates it.
        pdl: Programmatic dependent launch: the programs start while the kernel before them still
            runs, and wait for it on the device. Without effect where the device has no such launch.

    Returns:
        out.

    Raises:
        ValueError: The plan is another step's or another model's, or a shape, type or layout is
            not as above.
    """
    if out is None:
        out = query.new_empty(query.shape)
    _check(query, cache, block_tables, plan, out)
    _check_numbers(len(query), len(table_rows), len(context_lens), plan.num_seqs)
    use_pdl = pdl and has_dependent_launch(query.device)
    num_programs = plan.num_kv_heads * plan.num_programs
    tensors = (
        query,
        cache,
        block_tables,
        table_rows,
        context_lens,
        out,
        plan.schedule(window),
        plan.partials,
        plan.partial_lses,
        plan.arrivals,
    )
    counts = (plan.num_seqs, ALL_TOKENS if window is None else window)
    num_warps, shapes = _shapes_of(
        plan.num_q_heads // plan.num_kv_heads, plan.head_dim, query.element_size()
    )
    fixed = (
        query.stride(0),
        block_tables.stride(0),
        scale,
        0.0 if softcap is None else softcap,
        softcap is not None,
        use_pdl,
        cache.shape[1],
        plan.num_kv_heads,
        *shapes,
    )
    if use_pdl:
        arguments = *tensors, *counts, *fixed
        _decode_kernel[(num_programs,)](*arguments, num_warps=num_warps, launch_pdl=True)
    else:
        _launch(num_programs, tensors, counts, fixed, num_warps)
    return out


@functools.cache
def _shapes_of(group: int, head_dim: int, element_size: int) -> tuple[int, tuple[int, ...]]:
    """Warps of a program, and the kernel's last parameters, from GROUP on."""
    group_block = triton.next_power_of_2(group)
    head_block = max(_MIN_ROWS, triton.next_power_of_2(head_dim))
    launch = _LAUNCHES.get((element_size, max(64, head_block)))
    if launch is None:
        raise ValueError(f"head_dim {head_dim} at {8 * element_size} bits: at most 256 at 16 or 32")
    return launch.num_warps, (
        group,
        head_dim,
        TILE,
        launch.tokens,
        max(_MIN_ROWS, group_block),
        head_block,
        group_block,
        max(1, _COMBINED_ELEMENTS // (group_block * head_block)),
        launch.num_stages,
    )


def _check(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor,
) -> None:
    _, num_q_heads, head_dim = query.shape
    heads = (num_q_heads, plan.num_kv_heads, head_dim)
    if heads != (plan.num_q_heads, cache.shape[2] // 2, plan.head_dim):
        raise ValueError(
            f"query {tuple(query.shape)} and cache {tuple(cache.shape)} do not fit a plan of "
            f"{plan.num_q_heads} and {plan.num_kv_heads} heads of {plan.head_dim}"
        )
    if not (query.dtype == cache.dtype == out.dtype):
        raise ValueError(f"types {query.dtype}, {cache.dtype}, {out.dtype} must be equal")
    if query.stride()[1:] != (head_dim, 1) or block_tables.stride(1) != 1:
        raise ValueError("the rows of query and block_tables must be contiguous")
    if not (cache.is_contiguous() and out.is_contiguous() and out.shape == query.shape):
        raise ValueError("cache and out must be contiguous, and out of query's shape")


def _check_numbers(num_seqs: int, num_table_rows: int, num_lens: int, num_planned: int) -> None:
    if num_seqs != num_planned:
        raise ValueError(f"{num_seqs} sequences: call plan.update with their context_lens first")
    if not num_table_rows == num_lens == num_seqs:
        raise ValueError(
            f"{num_table_rows} table_rows and {num_lens} context_lens for {num_seqs} sequences: "
            "pass one of each a sequence"
        )


@triton.jit(do_not_specialize=["num_seqs", "window"])
def _decode_kernel(
    query_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    table_rows_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    schedule_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    partial_lses_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    num_seqs: tl.tensor,
    window: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Each program walks over a piece of the tokens for the query heads of a key-value head."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Neighbours differ in the head alone: together they read whole blocks of the cache.
    head = tl.program_id(0) % NUM_KV_HEADS
    program = tl.program_id(0) // NUM_KV_HEADS
    share = tl.load(schedule_ptr)
    seq = tl.load(schedule_ptr + 1 + program)
    tile_starts_ptr = schedule_ptr + 1 + tl.num_programs(0) // NUM_KV_HEADS
    tile = program * share
    end_tile = tl.minimum(tile + share, tl.load(tile_starts_ptr + num_seqs))
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_BLOCK)
    elements = rows[:, None] * HEAD_DIM + dims[None, :]
    is_element = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    first_tile = tl.load(tile_starts_ptr + seq)
    next_tile = tl.load(tile_starts_ptr + seq + 1)
    context_len = tl.load(context_lens_ptr + seq)
    table_row = tl.load(table_rows_ptr + seq)
    while tile < end_tile:
        # Read ahead: the next sequence begins without waiting for its place and length.
        has_next = seq + 1 < num_seqs
        upcoming_tile = tl.load(tile_starts_ptr + seq + 2, mask=has_next)
        upcoming_len = tl.load(context_lens_ptr + seq + 1, mask=has_next)
        upcoming_row = tl.load(table_rows_ptr + seq + 1, mask=has_next)
        stop_tile = tl.minimum(end_tile, next_tile)
        if tile < stop_tile:
            group_row = seq.to(tl.int64) * NUM_KV_HEADS + head
            table_ptr = block_tables_ptr + table_row.to(tl.int64) * table_stride
            query_row_ptr = query_ptr + seq.to(tl.int64) * query_stride + head * GROUP * HEAD_DIM
            out_row_ptr = out_ptr + group_row * (GROUP * HEAD_DIM)
            start = tl.maximum(context_len - window, 0) - first_tile * TILE
            result, lses = _attend(
                tl.load(query_row_ptr + elements, mask=is_element, other=0.0),
                cache_ptr + head * HEAD_DIM, table_ptr, start + tile * TILE,
                tl.minimum(start + stop_tile * TILE, context_len),
                scale, softcap, HAS_SOFTCAP, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE,
                TOKENS, ROWS, HEAD_BLOCK, STAGES,
            )  # fmt: skip
            if (tile == first_tile) & (stop_tile == next_tile):
                value = result.to(out_ptr.dtype.element_ty)
                tl.store(out_row_ptr + elements, value, mask=is_element)
            else:
                slot = (2 * program + (tile == first_tile)) * NUM_KV_HEADS + head
                tl.store(partial_lses_ptr + slot * GROUP + rows, lses, mask=rows < GROUP)
                partial_ptr = partials_ptr + slot.to(tl.int64) * (GROUP * HEAD_DIM)
                tl.store(partial_ptr + elements, result, mask=is_element)
                first = first_tile // share
                last = (next_tile - 1) // share
                if _is_last(arrivals_ptr + group_row, last - first):
                    _combine(
                        partials_ptr, partial_lses_ptr, out_row_ptr, head, first, last,
                        NUM_KV_HEADS, GROUP, HEAD_DIM, GROUP_BLOCK, HEAD_BLOCK, PARTS,
                    )  # fmt: skip
        tile = stop_tile
        seq += 1
        first_tile, next_tile = next_tile, upcoming_tile
        context_len, table_row = upcoming_len, upcoming_row


_launch = Launcher(_decode_kernel)


@triton.jit
def _is_last(arrivals_ptr: tl.tensor, num_others: tl.tensor) -> tl.tensor:
    """Counts this program in. Once all are, the count is zero again."""
    # The results of all threads are written before the count tells of them.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals_ptr, 1) == num_others
    if is_last:
        tl.store(arrivals_ptr, 0)
    return is_last


@triton.jit
def _attend(
    query: tl.tensor,
    keys_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    HAS_SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Attention of a group over the tokens from start to end, at least one, of its sequence.

    Returns:
        result: [ROWS, HEAD_BLOCK], divided by the sums of the weights.
        lses: [ROWS], the logarithms to base 2 of the sums.
    """
    tokens = tl.arange(0, TOKENS)
    dims = tl.arange(0, HEAD_BLOCK)
    maxima = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)  # added up at the end: threads need not meet
    result = tl.zeros([ROWS, HEAD_BLOCK], tl.float32)
    positions = start + tokens
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=positions < end, other=0)
    for position in tl.range(start, end, TOKENS, num_stages=STAGES):
        positions = position + tokens
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        offsets = slots[:, None] * (2 * NUM_KV_HEADS * HEAD_DIM) + dims[None, :]
        is_read = (positions < end)[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(keys_ptr + offsets, mask=is_read, other=0.0)
        values = tl.load(keys_ptr + NUM_KV_HEADS * HEAD_DIM + offsets, mask=is_read, other=0.0)
        # A step ahead, so that the loads of the next keys need not wait for their addresses.
        upcoming = positions + TOKENS
        blocks = tl.load(table_ptr + upcoming // BLOCK_SIZE, mask=upcoming < end, other=0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(|x|) = (1 - exp(-2 |x|)) / (1 + exp(-2 |x|))
            small = tl.exp2(tl.abs(scores) * (-2 * _LOG2_E / softcap))
            scores = tl.where(scores < 0, -softcap, softcap) * (1 - small) / (1 + small)
        scores = tl.where((positions < end)[None, :], scores * _LOG2_E, float("-inf"))
        new_maxima = tl.maximum(maxima, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maxima[:, None])
        decay = tl.exp2(maxima - new_maxima)
        sums = sums * decay[:, None] + weights
        result = result * decay[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
        maxima = new_maxima
    totals = tl.sum(sums, 1)
    return result / totals[:, None], maxima + tl.log2(totals)


@triton.jit
def _combine(
    partials_ptr: tl.tensor,
    partial_lses_ptr: tl.tensor,
    out_row_ptr: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Writes the output of a sequence from the partial results of programs first to last."""
    rows = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, HEAD_BLOCK)
    # PARTS running results side by side: nothing in the loop waits for other threads.
    maxima = tl.full([PARTS, GROUP_BLOCK], _LOWEST, tl.float32)
    sums = tl.zeros([PARTS, GROUP_BLOCK], tl.float32)
    result = tl.zeros([PARTS, GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    start = first
    while start <= last:
        programs = start + tl.arange(0, PARTS)
        # The first program begins the sequence, the others go on with it.
        slots = (2 * programs + (programs == first).to(tl.int32)) * NUM_KV_HEADS + head
        cells = slots.to(tl.int64)[:, None] * GROUP + rows[None, :]
        is_cell = (programs <= last)[:, None] & (rows < GROUP)[None, :]
        is_read = is_cell[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        parts_ptr = partials_ptr + cells[:, :, None] * HEAD_DIM + dims[None, None, :]
        # Other programs wrote them: not to be read from this one's cache.
        lses = tl.load(partial_lses_ptr + cells, is_cell, float("-inf"), cache_modifier=".cg")
        parts = tl.load(parts_ptr, is_read, 0.0, cache_modifier=".cg")
        new_maxima = tl.maximum(maxima, lses)
        decay = tl.exp2(maxima - new_maxima)
        weights = tl.exp2(lses - new_maxima)
        sums = sums * decay + weights
        result = result * decay[:, :, None] + parts * weights[:, :, None]
        maxima = new_maxima
        start += PARTS
    weights = tl.exp2(maxima - tl.max(maxima, 0)[None, :])
    total = tl.sum(sums * weights, 0) + (rows >= GROUP)  # no division by zero in unused rows
    value = tl.sum(result * weights[:, :, None], 0) / total[:, None]
    elements = rows[:, None] * HEAD_DIM + dims[None, :]
    is_element = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out_row_ptr + elements, value.to(out_row_ptr.dtype.element_ty), mask=is_element)
