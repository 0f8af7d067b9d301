"""Causal attention of new tokens over the paged cache, in Triton.

Formula and cache as in `reference/paged_attention.py`: `softmax(q k^T * scale) v` per head, where
a token sees itself and what stands before it in its sequence. One pass over the keys with a
running maximum and sum (Dao, "FlashAttention-2", 2023), with exponentials to base 2.

A program has one tile of queries of one sequence and one key head. The query heads of a group are
rows of the same tile, token after token, so that they share every key that is read, and the tile
spans few tokens. Tiles of keys that all rows see whole take no mask; only those at the diagonal
and at the start of a window do. Hopper GPUs have a kernel of their own, `hopper_prefill`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mini_infer_kernels.prefill_tile import LOG2_E, PrefillTile

# Gluon is experimental: it may change with each release of Triton. Hopper's kernel has run on this
# one; on others Hopper GPUs do with the kernel of this file.
_HAS_GLUON = triton.__version__.startswith("3.6.")
if _HAS_GLUON:
    from mini_infer_kernels.hopper_prefill.launch import launch_on_hopper, runs_on_hopper

_LEAST_COLUMNS = 16
_LAUNCHES = {
    (2, 128): (64, 64, 4, 2),
    (2, 256): (64, 32, 4, 2),
    (4, 128): (32, 32, 8, 1),
    (4, 256): (32, 16, 8, 1),
}
"""Rows, keys, warps and stages by the size of an element and the columns of a tile.

Measured on an H200 in bf16 with heads of 128: 128 rows with 32 keys take 7 to 13 % less where they
fill the GPU, and 1.6 times as long where they do not; 128 keys or 8 warps are slower. Heads of 256
have half the keys, as many bytes. The tiles of float32, whose products take no tensor cores, are
the largest that stay in the registers.
"""


def triton_prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference_prefill_attention`, with lengths that are on the device.

    Args:
        query: [num_tokens, num_q_heads, head_dim], sequence after sequence, of any stride between
            tokens; a token's elements stand side by side.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim] of query's type. The elements
            of a block stand side by side.
        block_tables: [rows, max_blocks] int32, of any stride between rows.
        table_rows: [num_seqs] int32, the row of block_tables that belongs to each sequence.
        query_starts: [num_seqs + 1] int32, the first row of query of each sequence, and the end.
        context_lens: [num_seqs] int32, tokens of each sequence in the cache, the new ones
            included, which are its last; 0 for a sequence to leave alone.
        max_query_len: New tokens of a sequence at most.
        scale: Factor of the scores.
        window: Tokens that a token sees, itself included, or None for all.
        softcap: Bound of the scores, or None.
        out: As query, of any stride between tokens; None allocates it. Rows of no sequence are
            left as they are.

    Returns:
        out.

    Raises:
        ValueError: A type, shape or layout is not as above.
    """
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _check(query, cache, block_tables, out)
    if not len(table_rows) == len(query_starts) - 1 == len(context_lens):
        raise ValueError(
            f"{len(context_lens)} context_lens take as many table_rows and one more query_starts, "
            f"got {len(table_rows)} and {len(query_starts)}"
        )
    if max_query_len == 0 or len(context_lens) == 0:
        return out
    is_hopper = _is_hopper(query.device) and runs_on_hopper(query, cache)
    launch = launch_on_hopper if is_hopper else _launch
    launch(
        query,
        cache,
        block_tables,
        table_rows,
        query_starts,
        context_lens,
        max_query_len,
        scale,
        window,
        softcap,
        out,
    )
    return out


def _check(
    query: torch.Tensor, cache: torch.Tensor, block_tables: torch.Tensor, out: torch.Tensor
) -> None:
    _, num_q_heads, head_dim = query.shape
    _, _, num_heads, cache_head_dim = cache.shape
    if not query.dtype == cache.dtype == out.dtype:
        raise ValueError(
            f"query, cache and out must be of one type, but are {query.dtype}, {cache.dtype} "
            f"and {out.dtype}"
        )
    if cache_head_dim != head_dim or num_heads % 2 or num_q_heads * 2 % num_heads:
        raise ValueError(
            f"expected a cache of [.., .., 2 * num_kv_heads, {head_dim}] where num_kv_heads "
            f"divides {num_q_heads}, got {tuple(cache.shape)}"
        )
    if out.shape != query.shape:
        raise ValueError(f"expected out of shape {tuple(query.shape)}, got {tuple(out.shape)}")
    token = (head_dim, 1)
    if query.stride()[1:] != token or out.stride()[1:] != token:
        raise ValueError(
            f"a token's elements of query and out must stand side by side, but their strides are "
            f"{query.stride()} and {out.stride()}"
        )
    if cache.stride()[1:] != (num_heads * head_dim, *token) or block_tables.stride(1) != 1:
        raise ValueError(
            "the elements of a block of the cache and of a row of block_tables must stand side by "
            f"side, but the strides are {cache.stride()} and {block_tables.stride()}"
        )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return (
        _HAS_GLUON
        and device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def _launch(
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
    """Writes `out` on any GPU."""
    _, block_size, num_heads, head_dim = cache.shape
    num_kv_heads = num_heads // 2
    group = query.shape[1] // num_kv_heads
    size = query.element_size()
    tile, num_warps = _tile(size, group, head_dim, block_size, window, softcap)
    num_seqs = len(context_lens)
    num_programs = num_kv_heads * num_seqs * triton.cdiv(max_query_len, tile.tokens)
    _prefill_kernel[(num_programs,)](
        query,
        query.stride(0),
        cache,
        cache.stride(0),
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
        num_warps=num_warps,
    )


@functools.cache
def _tile(
    element_size: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
) -> tuple[PrefillTile, int]:
    """And the number of warps."""
    columns = max(_LEAST_COLUMNS, triton.next_power_of_2(head_dim))
    launch = _LAUNCHES.get((element_size, max(128, columns)))
    if launch is None:
        raise ValueError(f"head_dim {head_dim} at {8 * element_size} bits: at most 256 at 16 or 32")
    rows, keys, num_warps, num_stages = launch
    tile = PrefillTile(
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        softcap=softcap,
        rows=max(rows, triton.next_power_of_2(group)),
        keys=keys,
        columns=columns,
        num_stages=num_stages,
    )
    return tile, num_warps


@triton.jit
def _load_rows(
    pointers: tl.tensor, row_mask: tl.tensor, MASKED: tl.constexpr, T: tl.constexpr
) -> tl.tensor:
    """[rows, columns] from pointers to them, with 0 where there is nothing."""
    column_mask = (tl.arange(0, T.columns) < T.head_dim)[None, :]
    if MASKED:
        return tl.load(pointers, mask=row_mask[:, None] & column_mask, other=0.0)
    if T.columns != T.head_dim:
        return tl.load(pointers, mask=column_mask, other=0.0)
    return tl.load(pointers)


@triton.jit
def _weigh(
    scores: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    T: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Turns scores into weights; a row's maximum and sum are those of the tiles so far.

    Returns:
        [rows, keys] float32 weights, the new maxima (logarithms to base 2) and sums of the rows,
        and what earlier weights are to be multiplied by.
    """
    factor = scale
    if T.softcap is not None:
        scores = 1 - 2 / (1 + tl.exp2(scores * (scale * (2 / T.softcap))))  # the tanh
        factor = T.log2_softcap
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    return weights, new_max, row_sum * decay + tl.sum(weights, 1), decay


@triton.jit
def _attend(
    acc: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    query: tl.tensor,
    positions: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    cache_ptr: tl.tensor,
    stride_block: tl.tensor,
    table_ptr: tl.tensor,
    num_kv_heads: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    T: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds keys start to end to acc ([rows, columns]: values by weights), row_max and row_sum.

    `cache_ptr` is at the key head in the first slot, `table_ptr` at the row of the sequence. Where
    not MASKED, all rows see these keys, and end is a multiple of a tile's as start always is.
    """
    for first in tl.range(start, end, T.keys, num_stages=T.num_stages):
        keys_at = first + tl.arange(0, T.keys)
        inside = keys_at < end
        if MASKED:
            blocks = tl.load(table_ptr + keys_at // T.block_size, mask=inside, other=0)
        else:
            blocks = tl.load(table_ptr + keys_at // T.block_size)
        slots = keys_at % T.block_size * (2 * num_kv_heads * T.head_dim)
        pointers = cache_ptr + (blocks.to(tl.int64) * stride_block + slots)[:, None]
        pointers += tl.arange(0, T.columns)[None, :]
        keys = _load_rows(pointers, inside, MASKED, T)
        scores = tl.dot(query, keys.T, input_precision="ieee")
        seen = keys_at[None, :] <= positions[:, None]
        if T.window is not None:
            seen &= keys_at[None, :] > positions[:, None] - T.window
        weights, row_max, row_sum, decay = _weigh(scores, row_max, row_sum, seen, scale, MASKED, T)
        values = _load_rows(pointers + num_kv_heads * T.head_dim, inside, MASKED, T)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def _attend_all(
    query: tl.tensor,
    first_position: tl.tensor,
    last_position: tl.tensor,
    cache_ptr: tl.tensor,
    stride_block: tl.tensor,
    table_ptr: tl.tensor,
    num_kv_heads: tl.tensor,
    scale: tl.tensor,
    T: tl.constexpr,
) -> tl.tensor:
    """[rows, columns] float32: the attention of a tile of queries."""
    # Rows without a token see what the last one sees: none has a sum of 0.
    positions = tl.minimum(first_position + tl.arange(0, T.rows) // T.group, last_position)
    acc = tl.full([T.rows, T.columns], 0.0, tl.float32)
    # Below all scores, and finite: -inf less -inf would not be a number.
    row_max = tl.full([T.rows], -1e30, tl.float32)
    row_sum = tl.full([T.rows], 0.0, tl.float32)
    end = last_position + 1
    full_start = 0
    full_end = (first_position + 1) // T.keys * T.keys
    if T.window is not None:
        start = tl.maximum(first_position + 1 - T.window, 0) // T.keys * T.keys
        full_start = tl.cdiv(tl.maximum(end - T.window, 0), T.keys) * T.keys
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, query, positions, start, tl.minimum(full_start, end),
            cache_ptr, stride_block, table_ptr, num_kv_heads, scale, True, T,
        )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, query, positions, full_start, full_end,
        cache_ptr, stride_block, table_ptr, num_kv_heads, scale, False, T,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, query, positions, tl.maximum(full_start, full_end), end,
        cache_ptr, stride_block, table_ptr, num_kv_heads, scale, True, T,
    )  # fmt: skip
    return acc / row_sum[:, None]


@triton.jit(
    do_not_specialize=["num_seqs"],
    do_not_specialize_on_alignment=["table_rows_ptr", "query_starts_ptr", "context_lens_ptr"],
)
def _prefill_kernel(
    query_ptr: tl.tensor,
    stride_query: tl.tensor,
    cache_ptr: tl.tensor,
    stride_block: tl.tensor,
    block_tables_ptr: tl.tensor,
    stride_table: tl.tensor,
    table_rows_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stride_out: tl.tensor,
    num_kv_heads: tl.tensor,
    num_seqs: tl.tensor,
    scale: tl.tensor,
    T: tl.constexpr,
) -> None:
    """One tile of queries; as `triton_prefill_attention`, but that scale is times log2(e)."""
    kv_head = tl.program_id(0) % num_kv_heads
    seq = tl.program_id(0) // num_kv_heads % num_seqs
    # Tiles with the most keys start first: a late one would run alone.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // (num_kv_heads * num_seqs)
    first_token = tile * T.tokens
    query_start = tl.load(query_starts_ptr + seq)
    num_tokens = tl.load(query_starts_ptr + seq + 1) - query_start
    context_len = tl.load(context_lens_ptr + seq)
    if (first_token < num_tokens) & (context_len > 0):
        rows = tl.arange(0, T.rows)
        tokens = first_token + rows // T.group
        is_row = (rows < T.tokens * T.group) & (tokens < num_tokens)
        token_rows = (query_start + tokens).to(tl.int64)
        heads = (kv_head * T.group + rows % T.group) * T.head_dim
        columns = tl.arange(0, T.columns)[None, :]
        query_ptrs = query_ptr + (token_rows * stride_query + heads)[:, None] + columns
        first_position = context_len - num_tokens + first_token
        table_row = tl.load(table_rows_ptr + seq).to(tl.int64)
        out = _attend_all(
            _load_rows(query_ptrs, is_row, True, T),
            first_position,
            tl.minimum(first_position + T.tokens, context_len) - 1,
            cache_ptr + kv_head * T.head_dim,
            stride_block,
            block_tables_ptr + table_row * stride_table,
            num_kv_heads,
            scale,
            T,
        )
        out_ptrs = out_ptr + (token_rows * stride_out + heads)[:, None] + columns
        inside = is_row[:, None] & (columns < T.head_dim)
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)
