"""The first pass of choosing tokens: everything that needs to see all of a row, in parallel.

A row is cut into chunks, one program each, and a chunk into tiles. The cut depends on the size of
the vocabulary alone, and with it every rounding.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mini_infer_kernels.draw_controls import MIN_TEMPERATURE
from mini_infer_kernels.sampling.logit_blocks import read_logits
from mini_infer_kernels.sampling.noise import clocks_of_block, race_times

_LOG2_E = tl.constexpr(math.log2(math.e))
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)


@triton.jit
def scale_of(temperature: tl.tensor) -> tl.tensor:
    """What a logit is multiplied by: a score's probability is a power of 2, the fastest one."""
    return _LOG2_E / tl.maximum(temperature, _MIN_TEMPERATURE)


@triton.jit
def scan_kernel(
    logits_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    temperatures_ptr: tl.tensor,
    top_ks_ptr: tl.tensor,
    top_ps_ptr: tl.tensor,
    min_ps_ptr: tl.tensor,
    typical_ps_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    mask_indices_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    mask_width: tl.tensor,
    tile_maxima_ptr: tl.tensor,
    chunk_maxima_ptr: tl.tensor,
    chunk_masses_ptr: tl.tensor,
    chunk_moments_ptr: tl.tensor,
    chunk_times_ptr: tl.tensor,
    chunk_ids_ptr: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Writes the maxima of tiles and chunks, and what the row's parameters need beside them.

    Rows that neither top-k nor min-p narrows get the winner of each chunk if they have a
    temperature alone, otherwise the mass of each chunk, and with typical-p its moment (see
    `threshold.py`); all relative to the chunk's maximum.
    """
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    mask_index = tl.load(mask_indices_ptr + row)
    mask_ptr = masks_ptr + tl.maximum(mask_index, 0).to(tl.int64) * mask_width
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = read_logits(logits_ptr + row * row_stride, ids, vocab_size)  # [CHUNK]
    if mask_index >= 0:
        words = tl.load(mask_ptr + ids // 32, mask=ids < vocab_size, other=0)
        allowed = ((words >> (ids % 32)) & 1) != 0
        # NaN and infinity are reported where they are masked, too.
        logits = tl.where(allowed | (logits == float("inf")), logits, float("-inf"))
    tile_maxima = tl.max(tl.reshape(logits, (CHUNK // TILE, TILE)), axis=1)
    tiles = chunk * (CHUNK // TILE) + tl.arange(0, CHUNK // TILE)
    tl.store(tile_maxima_ptr + row * num_chunks * (CHUNK // TILE) + tiles, tile_maxima)
    greatest = tl.max(tile_maxima)
    place = row * num_chunks + chunk
    tl.store(chunk_maxima_ptr + place, greatest)
    temperature = tl.load(temperatures_ptr + row)
    if (temperature > 0) & (tl.abs(greatest) < float("inf")):
        scores = (logits - greatest) * scale_of(temperature)
        top_k = tl.load(top_ks_ptr + row)
        top_p = tl.load(top_ps_ptr + row)
        is_wide = ((top_k <= 0) | (top_k >= vocab_size)) & (tl.load(min_ps_ptr + row) <= 0)
        typical_p = tl.load(typical_ps_ptr + row)
        if is_wide & (top_p >= 1) & (typical_p >= 1):
            seed = tl.load(seeds_ptr + row)
            position = tl.load(positions_ptr + row)
            clocks = clocks_of_block(seed, position, chunk * CHUNK, CHUNK)
            times = tl.where(scores > float("-inf"), race_times(clocks, scores), float("inf"))
            best = tl.min(times)
            tl.store(chunk_times_ptr + place, best)
            tl.store(chunk_ids_ptr + place, tl.min(tl.where(times == best, ids, 0x7FFFFFFF)))
        elif is_wide:
            masses = tl.exp2(scores)
            tl.store(chunk_masses_ptr + place, tl.sum(masses))
            moment = tl.cast(0.0, tl.float32)
            if typical_p < 1:
                moment = tl.sum(masses * tl.where(scores > float("-inf"), scores, 0.0))
            tl.store(chunk_moments_ptr + place, moment)
