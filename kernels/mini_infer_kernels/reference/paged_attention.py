"""Causal attention of new tokens over the paged KV cache, which already holds them.

`softmax(q k^T / sqrt(head_dim)) v` per head, where a token sees itself and what stands before it
in its sequence, and a group of query heads shares a key and value head (Ainslie et al., "GQA",
2023). K and V are gathered through block tables (Kwon et al., "PagedAttention", SOSP 2023); a
slot holds the heads of a token's keys, then those of its values.

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
) -> torch.Tensor:
    """Attention of one token per sequence, the last of its sequence.

    Args:
        query: [num_seqs, num_q_heads, head_dim].
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], of query's type.
        block_tables: [num_seqs, blocks] int64, padded with any valid block; None where sequence
            i has block i alone.
        mask: [num_seqs, 1, 1, blocks * block_size], 0 where a slot counts and -inf where not, of
            query's type; None where all count.
        scale: Factor of the scores.

    Returns:
        [num_seqs, num_q_heads, head_dim].
    """
    slots = cache if block_tables is None else _gather(cache, block_tables)
    keys, values = slots.transpose(1, 2).chunk(2, 1)  # [num_seqs, num_kv_heads, slots, head_dim]
    # The query heads of a group stand where query tokens would: no key is repeated for them.
    grouped = torch.unflatten(query, 1, (int(cache.shape[2]) // 2, -1))
    out = functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask, scale=scale
    )
    return out.flatten(1, 2)


def reference_prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    num_new_tokens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Attention of any number of new tokens per sequence, the last ones of their sequences.

    Args:
        query: [num_tokens, num_q_heads, head_dim], sequence after sequence.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], of query's type.
        block_tables: [num_seqs, blocks] int64.
        num_new_tokens: How many of the rows of `query` belong to each sequence.
        context_lens: Tokens of each sequence in the cache, the new ones included.
        scale: Factor of the scores.

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
    """The slots of each row's blocks: [rows, blocks * block_size, 2 * num_kv_heads, head_dim]."""
    blocks = cache.index_select(0, block_tables.flatten())
    return torch.unflatten(blocks, 0, block_tables.shape).flatten(1, 2)
