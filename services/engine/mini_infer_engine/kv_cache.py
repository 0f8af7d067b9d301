"""The K and V tensors of the paged cache, and how many blocks fit.

`block_pool.py` says which block belongs to whom; here is what the blocks hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CPU_CACHE_BYTES = 2**30
"""What the KV cache may take on a CPU where `kv_cache_tokens` is not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """Shape of the cache.

    Attributes:
        num_layers: Layers with attention.
        num_kv_heads: Key and value heads of a layer.
        head_dim: Elements of a head.
        block_size: Tokens in a block.
        dtype: Of keys and values.
        device: Where they lie.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block's keys and values over all layers."""
        elements = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers.

    Slots that no sequence has written are finite, because masked slots are still multiplied by
    zero.

    Attributes:
        spec: Shape of the cache.
        num_blocks: Blocks of each layer.
        layers: [num_layers, num_blocks, block_size, 2 * num_kv_heads, head_dim]; the keys' heads
            stand before the values'.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int) -> None:
        """Allocates the cache, cleared."""
        shape = (num_blocks, spec.block_size, 2 * spec.num_kv_heads, spec.head_dim)
        self.spec = spec
        self.num_blocks = num_blocks
        self.layers = torch.zeros((spec.num_layers, *shape), dtype=spec.dtype, device=spec.device)
        self._slots = self.layers.flatten(1, 2).unsqueeze(1)

    def window(self, first_block: int, num_tokens: int) -> torch.Tensor:
        """The first tokens of consecutive blocks, as `layers` with one block of that size."""
        return self._slots.narrow(2, first_block * self.spec.block_size, num_tokens)

    def fill(self, blocks: Sequence[int], value: float) -> None:
        """Overwrites blocks, to clear what is not finite or to poison what nobody may read."""
        index = torch.as_tensor(blocks, dtype=torch.int64, device=self.spec.device)
        self.layers.index_fill_(1, index, value)


def blocks_that_fit(
    spec: KVCacheSpec,
    *,
    max_useful_tokens: int,
    free_bytes: int,
    kv_cache_tokens: int | None,
) -> int:
    """Number of blocks to allocate.

    Args:
        spec: Shape of the cache.
        max_useful_tokens: What the largest possible batch needs; more is never allocated.
        free_bytes: Memory that the cache may take.
        kv_cache_tokens: The user's choice, which beats both.

    Returns:
        Blocks; 0 where not even one fits.
    """
    if kv_cache_tokens is not None:
        return kv_cache_tokens // spec.block_size
    useful = -(-max_useful_tokens // spec.block_size)
    return min(useful, free_bytes // spec.bytes_per_block)
