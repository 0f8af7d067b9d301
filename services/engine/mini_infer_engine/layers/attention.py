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
        cos: [T, 1, head_dim] of the tokens' positions, in the model's data type.
        sin: Likewise.
        slot_mapping: [T] int64, the slot of each token.
        num_decodes: Rows at the front with one token.
        decode_block_tables: [num_decodes, B] int64; B are the blocks that the longest row uses.
        decode_mask: [num_decodes, 1, 1, B * block_size] 0 or -inf, in the model's data type.
        prefill_block_tables: [S - num_decodes, B'] int64.
        prefill_lens: Tokens of each other row.
        prefill_context_lens: Tokens of each other row in the cache, its new ones included.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    decode_block_tables: torch.Tensor
    decode_mask: torch.Tensor
    prefill_block_tables: torch.Tensor
    prefill_lens: list[int]
    prefill_context_lens: list[int]


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    inputs: AttentionInputs,
    kernels: KernelSet,
) -> torch.Tensor:
    """Stores the new keys and values, then attends.

    Args:
        query: [T, num_q_heads, head_dim].
        key: [T, num_kv_heads, head_dim].
        value: [T, num_kv_heads, head_dim].
        cache: Keys and values of the layer.
        inputs: The batch.
        kernels: Operations to use.

    Returns:
        [T, num_q_heads, head_dim].
    """
    keys, values = cache
    scale = query.shape[-1] ** -0.5
    kernels.store_kv(key, value, keys, values, inputs.slot_mapping)
    split, tables, mask = inputs.num_decodes, inputs.decode_block_tables, inputs.decode_mask
    if not inputs.prefill_lens:
        return kernels.decode_attention(query, keys, values, tables, mask, scale)
    prefilled = kernels.prefill_attention(
        query[split:],
        keys,
        values,
        inputs.prefill_block_tables,
        inputs.prefill_lens,
        inputs.prefill_context_lens,
        scale,
    )
    if not split:
        return prefilled
    decoded = kernels.decode_attention(query[:split], keys, values, tables, mask, scale)
    return torch.cat((decoded, prefilled))
