"""The K and V tensors of the paged cache.

`block_pool.py` says which block belongs to whom; here is what the blocks hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mini_infer_engine.batch import Ints

STAGING_BYTES = 2**26
"""What blocks on their way take at most, beside the cache."""

_PAGE_BYTES = 4096


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
    def layer_block_shape(self) -> tuple[int, int, int]:
        """A block of one layer: [block_size, 2 * num_kv_heads, head_dim]."""
        return self.block_size, 2 * self.num_kv_heads, self.head_dim

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block's keys and values over all layers."""
        return self.num_layers * math.prod(self.layer_block_shape) * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers.

    Slots that no sequence has written are finite, because masked slots are still multiplied by
    zero. All operations are queued on the current stream; none waits for the device.

    Attributes:
        spec: Shape of the cache.
        num_blocks: Blocks of each layer.
        layers: [num_layers, num_blocks, block_size, 2 * num_kv_heads, head_dim]; the keys' heads
            stand before the values'.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int) -> None:
        """Allocates the cache, cleared."""
        shape = (spec.num_layers, num_blocks, *spec.layer_block_shape)
        self.spec = spec
        self.num_blocks = num_blocks
        if spec.device.type == "cpu":
            self.layers = lazy_zeros(shape, spec.dtype)
        else:
            self.layers = torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        self._slots = self.layers.flatten(1, 2).unsqueeze(1)
        self._blocks = self.layers.transpose(0, 1)

    def window(self, first_block: int, num_tokens: int) -> torch.Tensor:
        """The first tokens of consecutive blocks, as `layers` with one block of that size."""
        return self._slots.narrow(2, first_block * self.spec.block_size, num_tokens)

    def fill(self, blocks: Sequence[int] | Ints, value: float) -> None:
        """Overwrites blocks, to clear what is not finite or to poison what nobody may read."""
        self.layers.index_fill_(1, self._index(blocks), value)

    def read(self, blocks: Ints) -> torch.Tensor:
        """Copies of blocks, [n, num_layers, block_size, 2 * num_kv_heads, head_dim]."""
        return self._blocks.index_select(0, self._index(blocks))

    def write(self, blocks: Ints, values: torch.Tensor) -> None:
        """Overwrites distinct blocks with values shaped as `read` gives them."""
        self._blocks.index_copy_(0, self._index(blocks), values)

    def write_slots(self, slots: Ints, values: torch.Tensor) -> None:
        """Overwrites distinct slots with tokens shaped as `window` gives them."""
        self._slots.index_copy_(2, self._index(slots), values)

    def copy_blocks(self, pairs: Ints, source: KVCache | None = None) -> None:
        """Copies blocks.

        Args:
            pairs: [n, 2] from and to; the latter are distinct, and none of them is a source.
            source: Where the first of each pair lie, with the same spec; None is this cache.
        """
        for piece in pieces(pairs, self.spec):
            self.write(piece[:, 1], (source or self).read(piece[:, 0]))

    def _index(self, blocks: Sequence[int] | Ints) -> torch.Tensor:
        index = torch.from_numpy(np.ascontiguousarray(blocks, np.int64))
        return index.to(self.spec.device, non_blocking=True)


def pieces(pairs: Ints, spec: KVCacheSpec) -> Iterator[Ints]:
    """Parts of a list of blocks, of at most `STAGING_BYTES` each, but at least a block.

    Args:
        pairs: [n, 2].
        spec: The blocks' shape.
    """
    length = max(1, STAGING_BYTES // spec.bytes_per_block)
    for start in range(0, len(pairs), length):
        yield pairs[start : start + length]


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the host's memory, on pages of their own that take none before they are written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    num_pages = -(-num_bytes // _PAGE_BYTES)
    memory = np.zeros((num_pages + 1) * _PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % _PAGE_BYTES
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(*shape)
