"""Attention of one new token per sequence over the paged cache, by lengths instead of masks.

`softmax(q k^T * scale) v` per head, where a group of query heads shares a key-value head (Ainslie
et al., "GQA", 2023) and K and V are gathered through block tables (Kwon et al., "PagedAttention",
SOSP 2023). With a window of w a token sees the last w tokens only, itself included; with a soft
cap of c a score x becomes `c * tanh(x / c)` (Gemma 2, 2024).
"""

from __future__ import annotations

import torch


def reference_paged_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of the last token of each sequence, in float32, or in float64 for such a query.

    Args:
        query: [num_seqs, num_q_heads, head_dim].
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], of query's type. A slot holds
            the heads of a token's keys, then those of its values; what is behind a sequence's
            length does not matter.
        block_tables: [rows, max_blocks] of integers; what is behind a sequence does not matter.
        table_rows: [num_seqs] of integers, the row of block_tables that belongs to each sequence.
        context_lens: [num_seqs] of integers, tokens of each sequence in the cache, the new one
            included; 0 for a padding row.
        scale: Factor of the scores.
        window: Tokens that a token sees, itself included, or None for all.
        softcap: Bound of the scores, or None.

    Returns:
        [num_seqs, num_q_heads, head_dim], zero for padding rows.
    """
    block_size, num_kv_heads = cache.shape[1], cache.shape[2] // 2
    exact = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query)
    rows = zip(table_rows.tolist(), context_lens.tolist(), strict=True)
    for seq, (table_row, context_len) in enumerate(rows):
        first = 0 if window is None else max(context_len - window, 0)
        positions = torch.arange(first, context_len, device=query.device)
        blocks = block_tables[table_row, positions // block_size].long()
        slots = cache[blocks, positions % block_size].to(exact).transpose(0, 1)
        keys, values = slots.chunk(2)  # [num_kv_heads, visible tokens, head_dim]
        grouped = torch.unflatten(query[seq].to(exact), 0, (num_kv_heads, -1))
        scores = grouped @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[seq] = (scores.softmax(-1) @ values).flatten(0, 1)
    return out
