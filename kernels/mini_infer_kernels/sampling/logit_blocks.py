"""How kernels read logits and order them."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_LOGIT = tl.constexpr(-3.4028234663852886e38)
"""The least finite float32."""
LOWEST_SCORE = tl.constexpr(-1e30)
"""Below every score whose probability is not 0."""


@triton.jit
def read_logits(row_ptr: tl.tensor, ids: tl.tensor, num_ids: tl.tensor) -> tl.tensor:
    """Logits: -inf behind the end, +inf for NaN."""
    logits = tl.load(row_ptr + ids, mask=ids < num_ids, other=float("-inf"))
    return tl.where(logits != logits, float("inf"), logits)


@triton.jit
def load_logits(
    row_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    has_mask: tl.tensor,
    ids: tl.tensor,
    num_ids: tl.tensor,
) -> tl.tensor:
    """Logits of a row without NaN: -inf behind the end and where the mask does not allow a token.

    Args:
        row_ptr: Of the row.
        mask_ptr: Of the row's mask, 32 tokens to a word.
        has_mask: Whether there is one; if not, it is not read.
        ids: int32.
        num_ids: Those from it on are behind the end.
    """
    logits = tl.load(row_ptr + ids, mask=ids < num_ids, other=float("-inf"))
    if has_mask:
        words = tl.load(mask_ptr + ids // 32, mask=ids < num_ids, other=0)
        logits = tl.where(((words >> (ids % 32)) & 1) != 0, logits, float("-inf"))
    return logits


@triton.jit
def order_keys(values: tl.tensor) -> tl.tensor:
    """int32 in the order of the float32 values; 0 and -0 are equal."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of_key(key: tl.tensor) -> tl.tensor:
    """The value whose key it is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lowest_score_of(min_p: tl.tensor) -> tl.tensor:
    """The score that a token needs for the share `min_p` of the likeliest one's probability."""
    return tl.where(min_p > 0, tl.log2(tl.maximum(min_p, 1e-37)), LOWEST_SCORE)
