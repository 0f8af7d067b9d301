"""Causal attention of new tokens over the paged KV cache, which already holds them.

`softmax(q k^T / sqrt(head_dim)) v` per head, where a token sees itself and what stands before it
in its sequence, and a group of query heads shares a key and value head (Ainslie et al., "GQA",
2023). K and V are gathered through block tables (Kwon et al., "PagedAttention", SOSP 2023).

Slots behind a sequence's length may hold anything finite: they are masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def reference_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one token per sequence, the last of its sequence.

    Args:
        query: [num_seqs, num_q_heads, head_dim].
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], of query's type.
        value_cache: Likewise.
        block_tables: [num_seqs, blocks] int64, padded with any valid block.
        mask: [num_seqs, 1, 1, blocks * block_size], 0 where a slot counts and -inf where not, of
            query's type.
        scale: Factor of the scores.

    Returns:
        [num_seqs, num_q_heads, head_dim].
    """
    num_seqs, num_q_heads, head_dim = query.shape
    keys = _gather(key_cache, block_tables)  # [num_seqs, num_kv_heads, slots, head_dim]
    values = _gather(value_cache, block_tables)
    # The query heads of a group stand where query tokens would: no key is repeated for them.
    grouped = query.view(num_seqs, key_cache.shape[2], -1, head_dim)
    out = functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask, scale=scale
    )
    return out.reshape(num_seqs, num_q_heads, head_dim)


def reference_prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    num_new_tokens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Attention of any number of new tokens per sequence, the last ones of their sequences.

    Args:
        query: [num_tokens, num_q_heads, head_dim], sequence after sequence.
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], of query's type.
        value_cache: Likewise.
        block_tables: [num_seqs, blocks] int64.
        num_new_tokens: How many of the rows of `query` belong to each sequence.
        context_lens: Tokens of each sequence in the cache, the new ones included.
        scale: Factor of the scores.

    Returns:
        [num_tokens, num_q_heads, head_dim].
    """
    num_kv_heads = key_cache.shape[2]
    group = query.shape[1] // num_kv_heads
    block_size = key_cache.shape[1]
    outputs = []
    start = 0
    for table, length, context in zip(block_tables, num_new_tokens, context_lens, strict=True):
        blocks = table[None, : -(-context // block_size)]
        keys = _gather(key_cache, blocks)[0, :, None, :context]  # [kv_heads, 1, context, head_dim]
        values = _gather(value_cache, blocks)[0, :, None, :context]
        rows = query[start : start + length]
        rows = rows.view(length, num_kv_heads, group, -1).permute(1, 2, 0, 3)
        positions = torch.arange(context, device=query.device)
        visible = positions <= positions[context - length :, None]  # [length, context]
        out = functional.scaled_dot_product_attention(
            rows,
            keys.expand(-1, group, -1, -1),
            values.expand(-1, group, -1, -1),
            attn_mask=visible,
            scale=scale,
        )  # [kv_heads, group, length, head_dim]
        outputs.append(out.permute(2, 0, 1, 3).reshape(length, num_kv_heads * group, -1))
        start += length
    return torch.cat(outputs)


def _gather(cache: torch.Tensor, block_tables: torch.Tensor) -> torch.Tensor:
    """The slots of each row's blocks: [rows, num_kv_heads, blocks * block_size, head_dim]."""
    rows, blocks = block_tables.shape
    _, block_size, num_kv_heads, head_dim = cache.shape
    slots = cache.index_select(0, block_tables.reshape(-1))
    return slots.view(rows, blocks * block_size, num_kv_heads, head_dim).transpose(1, 2)
