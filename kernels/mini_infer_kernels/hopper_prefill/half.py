"""What four warps compute: the attention of 64 rows, which are half of a program's.

They stand in the layouts of the tensor cores' operands, where four threads share a row.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mini_infer_kernels.hopper_prefill.ring import Ring, await_tile, release_tile
from mini_infer_kernels.hopper_prefill.work import Work


class Rows(NamedTuple):
    """Where rows are read and written.

    Attributes:
        query_ptr: [num_tokens, heads, head_dim].
        stride_query: Between tokens.
        out_ptr: [num_tokens, heads, head_dim].
        stride_out: Between tokens.
    """

    query_ptr: gl.tensor
    stride_query: gl.tensor
    out_ptr: gl.tensor
    stride_out: gl.tensor


class _Softmax(NamedTuple):
    """Where the rows' softmax is, over the tiles so far.

    Attributes:
        maximum: [64] float32, the greatest scores, as logarithms to base 2.
        total: [64] float32, sums of the weights, relative to those.
    """

    maximum: gl.tensor
    total: gl.tensor


@gluon.jit
def _weigh(
    scores: gl.tensor,
    softmax: _Softmax,
    positions: gl.tensor,
    first_key: gl.tensor,
    scale: gl.tensor,
    MASKED: gl.constexpr,
    T: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, _Softmax]:
    """Turns scores into weights.

    Returns:
        [64, keys] float32 weights, [64] what earlier ones are to be multiplied by, and the
        softmax with this tile.
    """
    factor = scale
    if T.softcap is not None:
        scores = 1 - 2 / (1 + gl.exp2(scores * (scale * (2 / T.softcap))))  # the tanh
        factor = T.log2_softcap
    if MASKED:
        COLUMNS: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        key_positions = first_key + gl.arange(0, T.keys, layout=COLUMNS)[None, :]
        seen = key_positions <= positions[:, None]
        if T.window is not None:
            seen &= key_positions > positions[:, None] - T.window
        scores = gl.where(seen, scores, float("-inf"))
    maximum = gl.maximum(softmax.maximum, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - maximum[:, None])
    decay = gl.exp2(softmax.maximum - maximum)
    return weights, decay, _Softmax(maximum, softmax.total * decay + gl.sum(weights, 1))


@gluon.jit
def _attend(
    acc: gl.tensor,
    weights: gl.tensor,
    softmax: _Softmax,
    i: gl.tensor,
    end: gl.tensor,
    query: gl.shared_memory_descriptor,
    keys: Ring,
    values: Ring,
    positions: gl.tensor,
    scale: gl.tensor,
    work: Work,
    MASKED: gl.constexpr,
    T: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, _Softmax, gl.tensor]:
    """Weighs tiles i to end, and adds the values of those from i - 1 to end - 1 to acc.

    `weights`, [64, keys], are those of tile i - 1 as the left operand of a product, `softmax` has
    them, and `acc`, [64, columns] float32, lacks its values. The two products of a turn are under
    way together. Where not MASKED, all rows see these tiles whole.

    Returns:
        acc, weights, softmax and i at the end.
    """
    OPERAND: gl.constexpr = weights.type.layout
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T.keys, 16])
    ACC_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    while i < end:
        key_tile = await_tile(keys, i, T).permute((1, 0))
        no_scores = gl.full([T.rows // 2, T.keys], 0.0, gl.float32, SCORES)
        scores = warpgroup_mma(query, key_tile, no_scores, use_acc=False, is_async=True)
        value_tile = await_tile(values, i - 1, T)
        acc = warpgroup_mma(weights, value_tile, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        release_tile(keys, i, T)
        first_key = (work.last_tile - i) * T.keys
        new, decay, softmax = _weigh(scores, softmax, positions, first_key, scale, MASKED, T)
        new = gl.convert_layout(new.to(query.dtype), OPERAND)
        # The assembler moves this wait up to the maxima: it is the other half, above all, whose
        # products hide the exponentials.
        acc, weights, new = warpgroup_mma_wait(0, deps=(acc, weights, new))
        release_tile(values, i - 1, T)
        acc = acc * gl.convert_layout(decay, ACC_ROWS)[:, None]
        weights = new
        i += 1
    return acc, weights, softmax, i


@gluon.jit
def _attend_all(
    half: gl.constexpr,
    query: gl.shared_memory_descriptor,
    keys: Ring,
    values: Ring,
    scale: gl.tensor,
    work: Work,
    T: gl.constexpr,
) -> gl.tensor:
    """[64, columns] float32: the attention of the rows."""
    NUM_ROWS: gl.constexpr = T.rows // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T.keys, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T.columns, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    places = half * NUM_ROWS + gl.arange(0, NUM_ROWS, layout=ROWS)
    # Rows without a token see what the last one sees: none has a sum of 0.
    positions = gl.minimum(work.first_position + places // T.group, work.last_position)
    # Below all scores, and finite: -inf less -inf would not be a number.
    lowest = gl.full([NUM_ROWS], -1e30, gl.float32, ROWS)
    softmax = _Softmax(lowest, gl.full([NUM_ROWS], 0.0, gl.float32, ROWS))
    acc = gl.full([NUM_ROWS, T.columns], 0.0, gl.float32, ACC)
    i = 0
    key_tile = await_tile(keys, i, T).permute((1, 0))
    no_scores = gl.full([NUM_ROWS, T.keys], 0.0, gl.float32, SCORES)
    scores = warpgroup_mma(query, key_tile, no_scores, use_acc=False)
    release_tile(keys, i, T)
    first_key = work.last_tile * T.keys
    weights, _, softmax = _weigh(scores, softmax, positions, first_key, scale, True, T)
    weights = gl.convert_layout(weights.to(query.dtype), OPERAND)
    i += 1
    acc, weights, softmax, i = _attend(
        acc, weights, softmax, i, work.full_start, query, keys, values, positions, scale, work,
        True, T,
    )  # fmt: skip
    acc, weights, softmax, i = _attend(
        acc, weights, softmax, i, work.full_end, query, keys, values, positions, scale, work,
        False, T,
    )  # fmt: skip
    if T.window is not None:
        acc, weights, softmax, i = _attend(
            acc, weights, softmax, i, work.num_tiles, query, keys, values, positions, scale, work,
            True, T,
        )  # fmt: skip
    acc = warpgroup_mma(weights, await_tile(values, i - 1, T), acc)
    return acc / gl.convert_layout(softmax.total, gl.SliceLayout(1, ACC))[:, None]


@gluon.jit
def compute_half(
    half: gl.constexpr,
    rows: Rows,
    queries: gl.shared_memory_descriptor,
    keys: Ring,
    values: Ring,
    scale: gl.tensor,
    work: Work,
    T: gl.constexpr,
) -> None:
    """Computes 64 of the rows, from the load of their queries to the store.

    Args:
        half: 0 or 1.
        rows: Of the model.
        queries: [2, 64, columns] in shared memory, to use one of.
        keys: The keys' tiles.
        values: The values' tiles.
        scale: Of the scores, times log2(e).
        work: The program's.
        T: What the kernel is compiled for.
    """
    NUM_ROWS: gl.constexpr = T.rows // 2
    LANES: gl.constexpr = min(T.columns // 8, 32)  # threads of a row: 16 bytes each
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    places = half * NUM_ROWS + gl.arange(0, NUM_ROWS, layout=gl.SliceLayout(1, MEMORY))
    dims = gl.arange(0, T.columns, layout=gl.SliceLayout(0, MEMORY))[None, :]
    tokens = work.first_token + places // T.group
    is_row = (places < T.tokens * T.group) & (tokens < work.num_tokens)
    inside = is_row[:, None] & (dims < T.head_dim)
    token_rows = (work.query_start + tokens).to(gl.int64)
    heads = (work.kv_head * T.group + places % T.group) * T.head_dim
    query_ptrs = rows.query_ptr + (token_rows * rows.stride_query + heads)[:, None] + dims
    query = queries.index(half)
    query.store(gl.load(query_ptrs, mask=inside, other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    out = _attend_all(half, query, keys, values, scale, work, T)
    query.store(out.to(query.dtype))  # into the order of memory
    out_ptrs = rows.out_ptr + (token_rows * rows.stride_out + heads)[:, None] + dims
    gl.store(out_ptrs, query.load(MEMORY), mask=inside)
