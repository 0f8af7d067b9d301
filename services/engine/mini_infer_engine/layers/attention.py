"""Attention over the paged cache, and what a batch tells it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mini_infer_kernels.kernel_set import KernelSet


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the layers need to know of a batch of S sequences and T tokens, on the device.

    The first `num_decodes` rows have one token each, the others any number.

    Attributes:
        positions: [T] int64, of the tokens in their sequences.
        slot_mapping: [T] int64, the slot of each token.
        num_decodes: Rows at the front with one token.
        decode_block_tables: [num_decodes, B] int64; B are the blocks that the longest row uses.
            None where the cache that the layers get is one row's tokens in order.
        decode_mask: [num_decodes, 1, 1, B * block_size] 0 or -inf, in the model's data type, or
            None as well.
        prefill_block_tables: [S - num_decodes, B'] int64, or None where there are none.
        prefill_lens: Tokens of each other row.
        prefill_context_lens: Tokens of each other row in the cache, its new ones included.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    decode_block_tables: torch.Tensor | None
    decode_mask: torch.Tensor | None
    prefill_block_tables: torch.Tensor | None
    prefill_lens: list[int]
    prefill_context_lens: list[int]


def paged_attention(
    query: torch.Tensor,
    key_value: torch.Tensor,
    cache: torch.Tensor,
    inputs: AttentionInputs,
    kernels: KernelSet,
) -> torch.Tensor:
    """Stores the new keys and values, then attends.

    Args:
        query: [T, num_q_heads, head_dim].
        key_value: [T, 2 * num_kv_heads, head_dim], the keys first.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], the layer's.
        inputs: The batch.
        kernels: Operations to use.

    Returns:
        [T, num_q_heads, head_dim].
    """
    scale = query.shape[-1] ** -0.5
    kernels.store_kv(key_value, cache, inputs.slot_mapping)
    split, tables, mask = inputs.num_decodes, inputs.decode_block_tables, inputs.decode_mask
    if not inputs.prefill_lens:
        return kernels.decode_attention(query, cache, tables, mask, scale)
    prefilled = kernels.prefill_attention(
        query[split:],
        cache,
        inputs.prefill_block_tables,
        inputs.prefill_lens,
        inputs.prefill_context_lens,
        scale,
    )
    if not split:
        return prefilled
    decoded = kernels.decode_attention(query[:split], cache, tables, mask, scale)
    return torch.cat((decoded, prefilled))
