"""Writes the keys and values of new tokens into their slots of the paged cache."""

from __future__ import annotations

import torch


def reference_store_kv(
    key_value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Copies row i of keys and values into slot `slot_mapping[i]`.

    Args:
        key_value: [num_tokens, 2 * num_kv_heads, head_dim], the heads of the keys first, of the
            cache's type.
        cache: [num_blocks, block_size, 2 * num_kv_heads, head_dim], written in place. Slot s is
            token s % block_size of block s // block_size.
        slot_mapping: [num_tokens] int64, no slot twice.
    """
    cache.flatten(0, 1).index_copy_(0, slot_mapping, key_value)
