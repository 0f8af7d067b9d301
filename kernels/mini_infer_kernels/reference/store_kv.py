"""Writes the keys and values of new tokens into their slots of the paged cache."""

from __future__ import annotations

import torch


def reference_store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Copies row i of keys and values into slot `slot_mapping[i]`.

    Args:
        key: [num_tokens, num_kv_heads, head_dim], of the cache's type.
        value: Likewise.
        key_cache: [num_blocks, block_size, num_kv_heads, head_dim], written in place. Slot s is
            token s % block_size of block s // block_size.
        value_cache: Likewise.
        slot_mapping: [num_tokens] int64, no slot twice.
    """
    key_cache.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value)
