"""Causal attention of new tokens over the paged KV cache, which already holds them.

`softmax(q k^T * scale) v` per head, where a token sees itself and what stands before it in its
sequence, and a group of query heads shares a key and value head (Ainslie et al., "GQA", 2023). K
and V are gathered through block tables (Kwon et al., "PagedAttention", SOSP 2023); a slot holds
the heads of a token's keys, then those of its values.

With a window of w a token sees the last w tokens only, itself included (Beltagy et al.,
"Longformer", 2020). With a soft cap of c a score x becomes `c * tanh(x / c)` (Gemma 2, 2024).

Slots behind a sequence's length may hold anything finite: they are masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def reference_decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of one token per sequence, the last of its sequence.

    Args:
        query: [num_seqs, num_q_heads, head_dim].
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], of query's type.
        block_tables: [num_seqs, blocks] int64, padded with any valid block; None where sequence
            i has block i alone.
        mask: [num_seqs, 1, 1, blocks * block_size], 0 where a slot counts and -inf where not
            (behind the sequence, before its window), of query's type; None where all count.
        scale: Factor of the scores.
        softcap: Bound of the scores, or None.

    Returns:
        [num_seqs, num_q_heads, head_dim].
    """
    slots = cache if block_tables is None else _gather(cache, block_tables)
    keys, values = slots.transpose(1, 2).chunk(2, 1)  # [num_seqs, num_kv_heads, slots, head_dim]
    # The query heads of a group stand where query tokens would: no key is repeated for them.
    grouped = torch.unflatten(query, 1, (int(cache.shape[2]) // 2, -1))
    return _attend(grouped, keys, values, mask, scale, softcap).flatten(1, 2)


def reference_prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    num_new_tokens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of any number of new tokens per sequence, the last ones of their sequences.

    Args:
        query: [num_tokens, num_q_heads, head_dim], sequence after sequence.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], of query's type.
        block_tables: [num_seqs, blocks] int64.
        num_new_tokens: How many of the rows of `query` belong to each sequence.
        context_lens: Tokens of each sequence in the cache, the new ones included.
        scale: Factor of the scores.
        window: Tokens that a token sees, itself included, or None for all.
        softcap: Bound of the scores, or None.

    Returns:
        [num_tokens, num_q_heads, head_dim].
    """
    num_kv_heads = cache.shape[2] // 2
    group = query.shape[1] // num_kv_heads
    block_size = cache.shape[1]
    outputs = []
    start = 0
    for table, length, context in zip(block_tables, num_new_tokens, context_lens, strict=True):
        blocks = table[None, : -(-context // block_size)]
        slots = _gather(cache, blocks)[0, :context].transpose(0, 1).unsqueeze(1)
        keys, values = slots.chunk(2)  # [num_kv_heads, 1, context, head_dim]
        rows = query[start : start + length]
        rows = rows.view(length, num_kv_heads, group, -1).permute(1, 2, 0, 3)
        out = _attend(
            rows,
            keys.expand(-1, group, -1, -1),
            values.expand(-1, group, -1, -1),
            _visible(length, context, window, query.device),
            scale,
            softcap,
        )  # [kv_heads, group, length, head_dim]
        outputs.append(out.permute(2, 0, 1, 3).reshape(length, num_kv_heads * group, -1))
        start += length
    return torch.cat(outputs)


def _visible(length: int, context: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of a sequence's tokens each of its last ones sees: [length, context] bool."""
    positions = torch.arange(context, device=device)
    own = positions[context - length :, None]
    visible = positions <= own
    return visible if window is None else visible & (positions > own - window)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[..., rows, head_dim] of queries over [..., slots, head_dim]; the mask as torch takes it."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale
        )
    scores = (query @ keys.transpose(-2, -1)).float() * (scale / softcap)
    scores = scores.tanh_().mul_(softcap)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        )
    return scores.softmax(-1).to(query.dtype) @ values


def _gather(cache: torch.Tensor, block_tables: torch.Tensor) -> torch.Tensor:
    """The slots of each row's blocks: [rows, blocks * block_size, 2 * num_kv_heads, head_dim]."""
    blocks = cache.index_select(0, block_tables.flatten())
    return torch.unflatten(blocks, 0, block_tables.shape).flatten(1, 2)
