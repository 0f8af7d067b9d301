"""Log-probabilities in Triton (contract: `reference/token_logprobs.py`).

1. `_scan_kernel` reads all logits once: the maxima of tiles, the mass of each chunk, and how many
   logits are above the chosen one.
2. `_rank_kernel`, a program a row, takes the greatest tile maximum as often as top tokens are
   asked for, and reads that one tile again for its next maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mini_infer_kernels.sampling.logit_blocks import order_keys, read_logits

_CHUNK = 4096
_TILE = 64
_NOTHING = tl.constexpr(-(2**63))


def triton_token_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference_token_logprobs`.

    Args:
        logits: [R, vocab_size] float32; the elements of a row stand side by side.
        ids: [R] int64.
        num_top: 0 to the size of the vocabulary.

    Returns:
        logprobs: [R] float32.
        ranks: [R] int32.
        top_ids: [R, num_top] int64.
        top_logprobs: [R, num_top] float32.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, _CHUNK)
    num_tiles = num_chunks * (_CHUNK // _TILE)
    logprobs = logits.new_empty(num_rows)
    ranks = logits.new_empty(num_rows, dtype=torch.int32)
    top_ids = logits.new_empty(num_rows, num_top, dtype=torch.int64)
    top_logprobs = logits.new_empty(num_rows, num_top)
    if num_rows == 0:
        return logprobs, ranks, top_ids, top_logprobs
    tile_maxima = logits.new_empty(num_rows, num_tiles)
    chunk_masses = logits.new_empty(num_rows, num_chunks)
    chunk_ranks = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    _scan_kernel[(num_chunks, num_rows)](
        logits,
        logits.stride(0),
        vocab_size,
        ids,
        tile_maxima,
        chunk_masses,
        chunk_ranks,
        CHUNK=_CHUNK,
        TILE=_TILE,
        num_warps=4,
    )
    _rank_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        vocab_size,
        ids,
        tile_maxima,
        chunk_masses,
        chunk_ranks,
        num_chunks,
        logprobs,
        ranks,
        top_ids,
        top_logprobs,
        num_top,
        TILES_PER_CHUNK=_CHUNK // _TILE,
        TILE=_TILE,
        CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=4,
    )
    return logprobs, ranks, top_ids, top_logprobs


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])
def _scan_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    ids_ptr: tl.tensor,
    tile_maxima_ptr: tl.tensor,
    chunk_masses_ptr: tl.tensor,
    chunk_ranks_ptr: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Masses are relative to the chunk's maximum."""
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = read_logits(row_ptr, ids, vocab_size)
    chosen = tl.load(row_ptr + tl.load(ids_ptr + row))
    tile_maxima = tl.max(tl.reshape(logits, (CHUNK // TILE, TILE)), axis=1)
    tiles = chunk * (CHUNK // TILE) + tl.arange(0, CHUNK // TILE)
    tl.store(tile_maxima_ptr + row * num_chunks * (CHUNK // TILE) + tiles, tile_maxima)
    greatest = tl.max(tile_maxima)
    masses = tl.where(logits > float("-inf"), tl.exp(logits - greatest), 0.0)
    place = row * num_chunks + chunk
    tl.store(chunk_masses_ptr + place, tl.sum(masses))
    tl.store(chunk_ranks_ptr + place, tl.sum((logits > chosen).to(tl.int32)))


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=["ids_ptr"])
def _rank_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    ids_ptr: tl.tensor,
    tile_maxima_ptr: tl.tensor,
    chunk_masses_ptr: tl.tensor,
    chunk_ranks_ptr: tl.tensor,
    num_chunks: tl.tensor,
    logprobs_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    top_ids_ptr: tl.tensor,
    top_logprobs_ptr: tl.tensor,
    num_top: tl.tensor,
    TILES_PER_CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    tiles = tl.arange(0, CHUNKS * TILES_PER_CHUNK)
    num_tiles = num_chunks * TILES_PER_CHUNK
    maxima = tl.load(
        tile_maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf")
    )
    chunk_maxima = tl.max(tl.reshape(maxima, (CHUNKS, TILES_PER_CHUNK)), axis=1)
    greatest = tl.max(chunk_maxima)
    places = row * num_chunks + chunks
    masses = tl.load(chunk_masses_ptr + places, mask=inside, other=0.0)
    shares = tl.where(chunk_maxima > float("-inf"), tl.exp(chunk_maxima - greatest), 0.0)
    log_mass = tl.log(tl.sum(masses * shares))
    chosen = tl.load(row_ptr + tl.load(ids_ptr + row))
    tl.store(logprobs_ptr + row, chosen - greatest - log_mass)
    above = tl.load(chunk_ranks_ptr + places, mask=inside, other=0)
    tl.store(ranks_ptr + row, 1 + tl.sum(above))
    # In falling order of value, and rising order of place for equal values.
    remaining = tl.where(tiles * TILE < vocab_size, _pack(maxima, tiles), _NOTHING)
    last = tl.cast(0x7FFFFFFFFFFFFFFF, tl.int64)
    rank = 0
    while rank < num_top:
        tile = _place_of(tl.max(remaining))
        ids = tile * TILE + tl.arange(0, TILE)
        logits = read_logits(row_ptr, ids, vocab_size)
        packed = tl.where(ids < vocab_size, _pack(logits, ids), _NOTHING)
        # All that was taken before, of any tile, comes before `last`.
        last = tl.max(tl.where(packed < last, packed, _NOTHING))
        top_id = _place_of(last)
        top = tl.max(tl.where(ids == top_id, logits, float("-inf")))
        tl.store(top_ids_ptr + row * num_top + rank, top_id)
        tl.store(top_logprobs_ptr + row * num_top + rank, top - greatest - log_mass)
        behind = packed < last
        next_maximum = tl.max(tl.where(behind, logits, float("-inf")))
        has_more = tl.max(tl.where(behind, packed, _NOTHING)) > _NOTHING
        following = tl.where(has_more, _pack(next_maximum, tile), _NOTHING)
        remaining = tl.where(tiles == tile, following, remaining)
        rank += 1


@triton.jit
def _pack(values: tl.tensor, places: tl.tensor) -> tl.tensor:
    """int64 that is the greater the greater the value, and of equal ones the lower the place."""
    return (order_keys(values).to(tl.int64) << 32) | (0x7FFFFFFF - places)


@triton.jit
def _place_of(packed: tl.tensor) -> tl.tensor:
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF).to(tl.int32)
