"""Sets of tokens that a threshold defines, found without a sort, and the race among those left.

A set is searched over `n` logits at a pointer: a whole row, or the few candidates that another
kernel gathered. Each pass counts, or adds the masses, at four thresholds, which cuts the range
of the answer to a fifth. Sums are in float32, in an order that depends on `n` alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mini_infer_kernels.sampling.logit_blocks import (
    load_logits,
    order_keys,
    value_of_key,
)
from mini_infer_kernels.sampling.noise import clocks_of_block, clocks_of_ids, race_times


@triton.jit
def find_threshold(
    values_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    has_mask: tl.tensor,
    n: tl.tensor,
    greatest: tl.tensor,
    scale: tl.tensor,
    lowest_score: tl.tensor,
    lowest_logit: tl.tensor,
    mean: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    target: tl.tensor,
    BY_COUNT: tl.constexpr,
    BY_DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The greatest value at or above which there are `target` tokens, or that mass.

    It may also be a lower value that the same tokens reach. The values are the logits or, with
    BY_DISTANCE, minus the distances of the scores to the mean.

    Args:
        values_ptr: Of `n` float32 logits.
        mask_ptr: Of their mask, if they have one.
        has_mask: Whether they do.
        n: How many.
        greatest: The logit whose score is 0.
        scale: A score is (logit - greatest) * scale.
        lowest_score: Tokens below it do not count.
        lowest_logit: Tokens below it do not count.
        mean: With BY_DISTANCE, the score that distances are from.
        low: A value at which enough is reached; it is the answer if no other is.
        high: The greatest value.
        target: An int32 with BY_COUNT; otherwise a float32, in masses 2**score.
        BY_COUNT: Counts tokens; otherwise adds masses.
        BY_DISTANCE: See above.
        BLOCK: Tokens looked at together.
    """
    low_key = order_keys(tl.cast(low, tl.float32)).to(tl.int64)
    high_key = order_keys(tl.cast(high, tl.float32)).to(tl.int64) + 1
    while high_key - low_key > 1:
        step = (high_key - low_key + 4) // 5
        pivot_1 = value_of_key((low_key + step).to(tl.int32))
        pivot_2 = value_of_key((low_key + 2 * step).to(tl.int32))
        pivot_3 = value_of_key((low_key + 3 * step).to(tl.int32))
        pivot_4 = value_of_key((low_key + 4 * step).to(tl.int32))
        at_1 = tl.zeros([BLOCK], tl.int32 if BY_COUNT else tl.float32)
        at_2 = tl.zeros_like(at_1)
        at_3 = tl.zeros_like(at_1)
        at_4 = tl.zeros_like(at_1)
        start = 0
        while start < n:
            places = start + tl.arange(0, BLOCK)
            logits = load_logits(values_ptr, mask_ptr, has_mask, places, n)
            scores = (logits - greatest) * scale
            weights = tl.full([BLOCK], 1, tl.int32) if BY_COUNT else tl.exp2(scores)
            weights = tl.where((scores >= lowest_score) & (logits >= lowest_logit), weights, 0)
            values = -tl.abs(scores - mean) if BY_DISTANCE else logits
            at_1 += tl.where(values >= pivot_1, weights, 0)
            at_2 += tl.where(values >= pivot_2, weights, 0)
            at_3 += tl.where(values >= pivot_3, weights, 0)
            at_4 += tl.where(values >= pivot_4, weights, 0)
            start += BLOCK
        # One reduction of all four takes a fourth of the barriers.
        sums = tl.sum(tl.join(tl.join(at_1, at_2), tl.join(at_3, at_4)), axis=0)  # [2, 2]
        low_key += step * tl.sum((sums >= target).to(tl.int32))
        # Where a sum is the target itself, every value up to that pivot defines the same set.
        is_found = tl.max((sums == target).to(tl.int32)) > 0
        high_key = tl.where(is_found, low_key + 1, tl.minimum(high_key, low_key + step))
    return value_of_key(low_key.to(tl.int32))


@triton.jit
def add_masses(
    values_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    has_mask: tl.tensor,
    n: tl.tensor,
    greatest: tl.tensor,
    scale: tl.tensor,
    lowest_score: tl.tensor,
    lowest_logit: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The mass of the kept tokens, and their moment: the sum of mass times score."""
    mass = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < n:
        places = start + tl.arange(0, BLOCK)
        logits = load_logits(values_ptr, mask_ptr, has_mask, places, n)
        scores = (logits - greatest) * scale
        kept = (scores >= lowest_score) & (logits >= lowest_logit)
        scores = tl.where(kept, scores, 0.0)
        masses = tl.exp2(scores)
        mass += tl.where(kept, masses, 0.0)
        moment += masses * scores
        start += BLOCK
    return tl.sum(mass), tl.sum(moment)


@triton.jit
def restrict(
    values_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    has_mask: tl.tensor,
    n: tl.tensor,
    greatest: tl.tensor,
    scale: tl.tensor,
    lowest_score: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    typical_p: tl.tensor,
    total_mass: tl.tensor,
    total_moment: tl.tensor,
    lowest_logit: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Finds the thresholds of top-k, top-p and typical-p, one after the other.

    Args:
        values_ptr: As for `find_threshold`, as all that is not said here.
        mask_ptr: See there.
        has_mask: See there.
        n: See there.
        greatest: See there.
        scale: See there.
        lowest_score: The binary logarithm of min-p.
        top_k: n or more is off.
        top_p: 1 or more is off.
        typical_p: 1 or more is off.
        total_mass: Of all tokens, where the `n` are only the greatest of those that top-p or
            typical-p choose from; otherwise 0.
        total_moment: Likewise.
        lowest_logit: A finite bound that the `n` reach, and no other token.
        BLOCK: See there.

    Returns:
        The lowest logit that is kept, the mean score and the lowest kept nearness to it (minus
        the distance), and whether the `n` were enough to tell.
    """
    total_mass = tl.cast(total_mass, tl.float32)
    lowest_logit = tl.cast(lowest_logit, tl.float32)
    enough = tl.cast(1, tl.int1)
    if top_k < n:
        lowest_logit = find_threshold(
            values_ptr, mask_ptr, has_mask, n, greatest, scale, lowest_score, lowest_logit, 0.0,
            lowest_logit, greatest, top_k, BY_COUNT=True, BY_DISTANCE=False, BLOCK=BLOCK,
        )  # fmt: skip
    if top_p < 1:
        mass, _ = add_masses(
            values_ptr, mask_ptr, has_mask, n, greatest, scale, lowest_score, lowest_logit, BLOCK
        )
        target = top_p * tl.where(total_mass > 0, total_mass, mass)
        total_mass = 0.0 * total_mass  # what is kept is among the `n`
        enough = mass >= target
        lowest_logit = find_threshold(
            values_ptr, mask_ptr, has_mask, n, greatest, scale, lowest_score, lowest_logit, 0.0,
            lowest_logit, greatest, target, BY_COUNT=False, BY_DISTANCE=False, BLOCK=BLOCK,
        )  # fmt: skip
    mean = tl.cast(0.0, tl.float32)
    lowest_nearness = tl.cast(float("-inf"), tl.float32)
    if typical_p < 1:
        mass, moment = add_masses(
            values_ptr, mask_ptr, has_mask, n, greatest, scale, lowest_score, lowest_logit, BLOCK
        )
        is_part = total_mass > 0
        mass = tl.where(is_part, total_mass, mass)
        mean = tl.where(is_part, total_moment, moment) / mass
        lowest_nearness = find_threshold(
            values_ptr, mask_ptr, has_mask, n, greatest, scale, lowest_score, lowest_logit, mean,
            float("-inf"), 0.0, typical_p * mass, BY_COUNT=False, BY_DISTANCE=True, BLOCK=BLOCK,
        )  # fmt: skip
        if is_part:
            # No token below the `n` may be as near to the mean as the farthest that is kept.
            enough &= (lowest_logit - greatest) * scale - mean <= lowest_nearness
    return lowest_logit, mean, lowest_nearness, enough


@triton.jit
def race(
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    has_mask: tl.tensor,
    n: tl.tensor,
    greatest: tl.tensor,
    scale: tl.tensor,
    lowest_score: tl.tensor,
    lowest_logit: tl.tensor,
    mean: tl.tensor,
    lowest_nearness: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    WHOLE_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Draws one of the tokens that `restrict` kept.

    Args:
        values_ptr: As for `restrict`, as all that is not said here.
        ids_ptr: Of the tokens' int32 ids in rising order; not read for a whole row.
        mask_ptr: See there.
        has_mask: See there.
        n: See there.
        greatest: See there.
        scale: See there.
        lowest_score: See there.
        lowest_logit: From there.
        mean: From there.
        lowest_nearness: From there.
        seed: int64.
        position: int64.
        WHOLE_ROW: The values are a whole row, so their places are their ids.
        BLOCK: See there.

    Returns:
        The id, and how many tokens were kept.
    """
    best = tl.full([BLOCK], float("inf"), tl.float32)
    best_ids = tl.zeros([BLOCK], tl.int32)
    num_kept = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < n:
        places = start + tl.arange(0, BLOCK)
        logits = load_logits(values_ptr, mask_ptr, has_mask, places, n)
        if WHOLE_ROW:
            ids = places
            clocks = clocks_of_block(seed, position, start, BLOCK)
        else:
            ids = tl.load(ids_ptr + places, mask=places < n, other=0)
            clocks = clocks_of_ids(seed, position, ids)
        scores = (logits - greatest) * scale
        kept = (scores >= lowest_score) & (logits >= lowest_logit)
        kept &= -tl.abs(scores - mean) >= lowest_nearness
        num_kept += kept.to(tl.int32)
        times = tl.where(kept, race_times(clocks, scores), float("inf"))
        # Ids rise from block to block, so the lowest of equal ones stays.
        better = times < best
        best = tl.where(better, times, best)
        best_ids = tl.where(better, ids, best_ids)
        start += BLOCK
    winners = tl.where(best == tl.min(best), best_ids, 0x7FFFFFFF)
    return tl.min(winners), tl.sum(num_kept)
