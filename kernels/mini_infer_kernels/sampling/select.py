"""The second pass of choosing tokens, a program a row, which ends all rows but a few.

Rows that are greedy or have a temperature alone take the best of their chunks. For the others the
k-th greatest tile maximum is a lower bound of the k-th greatest logit, so the tiles below it need
not be looked at: the few logits above it, the candidates, are gathered, and all sets are searched
among them. Rows whose sets may be larger are marked as pending.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mini_infer_kernels.draw_controls import NON_FINITE, NOTHING_ALLOWED, OK
from mini_infer_kernels.sampling.logit_blocks import (
    LOWEST_LOGIT,
    LOWEST_SCORE,
    load_logits,
    lowest_score_of,
)
from mini_infer_kernels.sampling.noise import race_times
from mini_infer_kernels.sampling.scan import scale_of
from mini_infer_kernels.sampling.threshold import find_threshold, race, restrict

_OK = tl.constexpr(OK)
_NON_FINITE = tl.constexpr(NON_FINITE)
_NOTHING_ALLOWED = tl.constexpr(NOTHING_ALLOWED)
_NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def select_kernel(
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
    num_chunks: tl.tensor,
    tiles_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    candidate_ids_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    status_ptr: tl.tensor,
    num_kept_ptr: tl.tensor,
    pending_ptr: tl.tensor,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER_BLOCK: tl.constexpr,
) -> None:
    """Writes ids, status and numbers of kept tokens of all rows but the pending ones."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    places = row * num_chunks + chunks
    chunk_maxima = tl.load(chunk_maxima_ptr + places, mask=chunks < num_chunks, other=float("-inf"))
    greatest = tl.max(chunk_maxima)
    row_ptr = logits_ptr + row * row_stride
    mask_index = tl.load(mask_indices_ptr + row)
    mask_ptr = masks_ptr + tl.maximum(mask_index, 0).to(tl.int64) * mask_width
    has_mask = mask_index >= 0
    temperature = tl.load(temperatures_ptr + row)
    scale = scale_of(temperature)
    top_k = tl.load(top_ks_ptr + row)
    top_k = tl.where((top_k <= 0) | (top_k >= vocab_size), vocab_size, top_k)
    top_p = tl.load(top_ps_ptr + row)
    min_p = tl.load(min_ps_ptr + row)
    typical_p = tl.load(typical_ps_ptr + row)
    is_wide = (top_k == vocab_size) & (min_p <= 0)
    status = tl.cast(_OK, tl.int32)
    chosen = tl.cast(0, tl.int32)
    num_kept = tl.cast(0, tl.int32)
    is_pending = tl.cast(0, tl.int1)
    if greatest == float("inf"):
        status = _NON_FINITE
    elif greatest == float("-inf"):
        status = _NOTHING_ALLOWED
    elif temperature <= 0:
        first_chunk = tl.min(tl.where(chunk_maxima == greatest, chunks, CHUNKS))
        ids = first_chunk * CHUNK + tl.arange(0, CHUNK)
        logits = load_logits(row_ptr, mask_ptr, has_mask, ids, vocab_size)
        chosen = tl.min(tl.where(logits == greatest, ids, _NO_ID))
    elif is_wide & (top_p >= 1) & (typical_p >= 1):
        alive = chunk_maxima > float("-inf")
        times = tl.load(chunk_times_ptr + places, mask=alive, other=float("inf"))
        times = race_times(times, tl.where(alive, (chunk_maxima - greatest) * scale, 0.0))
        ids = tl.load(chunk_ids_ptr + places, mask=alive, other=_NO_ID)
        chosen = tl.min(tl.where(times == tl.min(times), ids, _NO_ID))
    elif num_chunks == 1:
        is_pending = tl.cast(1, tl.int1)
    else:
        num_tiles = num_chunks * (CHUNK // TILE)
        total_mass = tl.cast(0.0, tl.float32)
        total_moment = tl.cast(0.0, tl.float32)
        if is_wide:
            total_mass, total_moment = _add_chunks(
                chunk_masses_ptr + row * num_chunks, chunk_moments_ptr + row * num_chunks,
                (chunk_maxima - greatest) * scale, chunks,
            )  # fmt: skip
        lowest_score = lowest_score_of(min_p)
        bound = _candidate_bound(
            tile_maxima_ptr + row * num_tiles, num_tiles, greatest, scale, lowest_score, top_k,
            top_p, typical_p, total_mass, total_moment, MAX_MAXIMA, BLOCK,
        )  # fmt: skip
        values_ptr = candidates_ptr + row * CAPACITY
        ids_ptr = candidate_ids_ptr + row * CAPACITY
        n = _gather_candidates(
            row_ptr, mask_ptr, has_mask, vocab_size, tile_maxima_ptr + row * num_tiles, num_tiles,
            bound, tiles_ptr + row * num_tiles, values_ptr, ids_ptr, TILE, CAPACITY, GATHER_BLOCK,
        )  # fmt: skip
        is_pending = n > CAPACITY
        if not is_pending:
            lowest_logit, mean, lowest_nearness, enough = restrict(
                values_ptr, mask_ptr, False, n, greatest, scale, lowest_score, top_k, top_p,
                typical_p, total_mass, total_moment, bound, BLOCK,
            )  # fmt: skip
            chosen, num_kept = race(
                values_ptr, ids_ptr, mask_ptr, False, n, greatest, scale, lowest_score,
                lowest_logit, mean, lowest_nearness, tl.load(seeds_ptr + row),
                tl.load(positions_ptr + row), WHOLE_ROW=False, BLOCK=BLOCK,
            )  # fmt: skip
            is_pending = not enough
    tl.store(status_ptr + row, status)
    tl.store(chosen_ptr + row, chosen)
    tl.store(num_kept_ptr + row, num_kept)
    tl.store(pending_ptr + row, is_pending.to(tl.int32))


@triton.jit
def _logit_below(score: tl.tensor, greatest: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """A logit that no logit of at least that score is below, however it was rounded."""
    reach = score / scale
    return greatest + reach - 1e-6 * (tl.abs(greatest) + tl.abs(reach))


@triton.jit
def _candidate_bound(
    maxima_ptr: tl.tensor,
    num_tiles: tl.tensor,
    greatest: tl.tensor,
    scale: tl.tensor,
    lowest_score: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    typical_p: tl.tensor,
    total_mass: tl.tensor,
    total_moment: tl.tensor,
    MAX_MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """A finite logit that no token worth looking at is below, as far as tile maxima can tell.

    The maxima are candidates themselves: where k of them, or ones with the mass that is asked
    for, reach a bound, so do as many tokens, or as much mass.
    """
    bound = tl.maximum(_logit_below(lowest_score, greatest, scale), LOWEST_LOGIT)
    is_wide = total_mass > 0
    num_maxima = tl.where(is_wide, tl.minimum(MAX_MAXIMA, num_tiles * 3 // 4), top_k)
    if num_maxima <= num_tiles:
        bound = find_threshold(
            maxima_ptr, maxima_ptr, False, num_tiles, greatest, scale, LOWEST_SCORE, LOWEST_LOGIT,
            0.0, bound, greatest, num_maxima,
            BY_COUNT=True, BY_DISTANCE=False, BLOCK=BLOCK,
        )  # fmt: skip
    if is_wide:
        if top_p < 1:
            bound = find_threshold(
                maxima_ptr, maxima_ptr, False, num_tiles, greatest, scale, LOWEST_SCORE,
                LOWEST_LOGIT, 0.0, bound, greatest, top_p * total_mass,
                BY_COUNT=False, BY_DISTANCE=False, BLOCK=BLOCK,
            )  # fmt: skip
        else:
            mean = total_moment / total_mass
            nearness = find_threshold(
                maxima_ptr, maxima_ptr, False, num_tiles, greatest, scale, LOWEST_SCORE,
                LOWEST_LOGIT, mean, LOWEST_SCORE, 0.0, typical_p * total_mass,
                BY_COUNT=False, BY_DISTANCE=True, BLOCK=BLOCK,
            )  # fmt: skip
            bound = tl.maximum(bound, _logit_below(mean + nearness, greatest, scale))
    return bound


@triton.jit
def _gather_candidates(
    row_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    has_mask: tl.tensor,
    vocab_size: tl.tensor,
    maxima_ptr: tl.tensor,
    num_tiles: tl.tensor,
    bound: tl.tensor,
    tiles_ptr: tl.tensor,
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Writes the logits that reach the bound, which is finite, and their ids in rising order.

    Returns:
        Their number; if it is above CAPACITY, what was written means nothing.
    """
    num_hits = 0
    start = 0
    while start < num_tiles:
        tiles = start + tl.arange(0, BLOCK)
        maxima = tl.load(maxima_ptr + tiles, mask=tiles < num_tiles, other=float("-inf"))
        hit = (maxima >= bound).to(tl.int32)
        tl.store(tiles_ptr + num_hits + tl.cumsum(hit) - hit, tiles, mask=hit != 0)
        num_hits += tl.sum(hit)
        start += BLOCK
    tl.debug_barrier()  # the tiles written are read by other threads
    count = num_hits * (num_hits > CAPACITY)  # a tile has a candidate at least
    start = 0
    while (start < num_hits) & (count <= CAPACITY):
        hits = start + tl.arange(0, BLOCK // TILE)
        tiles = tl.load(tiles_ptr + hits, mask=hits < num_hits, other=num_tiles)
        ids = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]  # [BLOCK // TILE, TILE]
        logits = load_logits(row_ptr, mask_ptr, has_mask, ids, vocab_size)
        found = (logits >= bound).to(tl.int32)
        num_found = tl.sum(found, axis=1)
        places = count + (tl.cumsum(num_found) - num_found)[:, None]
        places += tl.cumsum(found, axis=1) - found
        fits = (found != 0) & (places < CAPACITY)
        tl.store(values_ptr + places, logits, mask=fits)
        tl.store(ids_ptr + places, ids, mask=fits)
        count += tl.sum(num_found)
        start += BLOCK // TILE
    tl.debug_barrier()
    return count


@triton.jit
def _add_chunks(
    chunk_masses_ptr: tl.tensor,
    chunk_moments_ptr: tl.tensor,
    chunk_scores: tl.tensor,
    chunks: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The row's mass and moment, from those relative to chunk maxima and the maxima's scores."""
    alive = chunk_scores > float("-inf")
    scores = tl.where(alive, chunk_scores, 0.0)
    shares = tl.exp2(scores)
    masses = tl.load(chunk_masses_ptr + chunks, mask=alive, other=0.0)
    moments = tl.load(chunk_moments_ptr + chunks, mask=alive, other=0.0) + scores * masses
    return tl.sum(shares * masses), tl.sum(shares * moments)
