"""The last pass of choosing tokens, for the few rows whose sets may be large.

Flat distributions, huge k, many equal logits: the sets are searched over the row itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mini_infer_kernels.sampling.logit_blocks import LOWEST_LOGIT, lowest_score_of
from mini_infer_kernels.sampling.scan import scale_of
from mini_infer_kernels.sampling.threshold import race, restrict


@triton.jit
def whole_row_kernel(
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
    chunk_maxima_ptr: tl.tensor,
    num_chunks: tl.tensor,
    chosen_ptr: tl.tensor,
    num_kept_ptr: tl.tensor,
    pending_ptr: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Ends the pending rows."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(pending_ptr + row) != 0:
        chunks = tl.arange(0, CHUNKS)
        places = row * num_chunks + chunks
        chunk_maxima = tl.load(
            chunk_maxima_ptr + places, mask=chunks < num_chunks, other=float("-inf")
        )
        greatest = tl.max(chunk_maxima)
        row_ptr = logits_ptr + row * row_stride
        mask_index = tl.load(mask_indices_ptr + row)
        mask_ptr = masks_ptr + tl.maximum(mask_index, 0).to(tl.int64) * mask_width
        has_mask = mask_index >= 0
        scale = scale_of(tl.load(temperatures_ptr + row))
        lowest_score = lowest_score_of(tl.load(min_ps_ptr + row))
        top_k = tl.load(top_ks_ptr + row)
        lowest_logit, mean, lowest_nearness, _ = restrict(
            row_ptr, mask_ptr, has_mask, vocab_size, greatest, scale, lowest_score,
            tl.where(top_k <= 0, vocab_size, top_k), tl.load(top_ps_ptr + row),
            tl.load(typical_ps_ptr + row), 0.0, 0.0, LOWEST_LOGIT, BLOCK,
        )  # fmt: skip
        chosen, num_kept = race(
            row_ptr, chosen_ptr, mask_ptr, has_mask, vocab_size, greatest, scale, lowest_score,
            lowest_logit, mean, lowest_nearness, tl.load(seeds_ptr + row),
            tl.load(positions_ptr + row), WHOLE_ROW=True, BLOCK=BLOCK,
        )  # fmt: skip
        tl.store(chosen_ptr + row, chosen)
        tl.store(num_kept_ptr + row, num_kept)
