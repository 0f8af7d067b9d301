"""Swapped blocks: keys and values that left the device for the host's memory.

Nobody but the copies queued here touches that memory. They run in the order of their stream, so a
host block may be given to another sequence as soon as the copy out of it is queued.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from mini_infer.errors import ConfigError

from mini_infer_engine.batch import Ints
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec, lazy_zeros, pieces

_cuda_runtime: Callable[[], Any] = torch.cuda.cudart


class HostCache:
    """Room for swapped blocks, each of them in one piece with all its layers.

    Beside a CUDA device the memory is pinned: only then do copies not wait for each other.

    Attributes:
        num_blocks: How many there is room for, perhaps none.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int) -> None:
        """Allocates the memory.

        Args:
            spec: Shape of the device's cache.
            num_blocks: Room for so many blocks.

        Raises:
            ConfigError: Where the system does not let it be pinned.
        """
        self.num_blocks = num_blocks
        # [num_blocks, num_layers, block_size, 2 * num_kv_heads, head_dim]
        shape = (num_blocks, spec.num_layers, *spec.layer_block_shape)
        self._blocks = lazy_zeros(shape, spec.dtype)
        if spec.device.type == "cuda" and num_blocks:
            _pin(self._blocks, spec.device)
            weakref.finalize(self, _unpin, self._blocks, spec.device).atexit = False

    def swap_out(self, cache: KVCache, pairs: Ints) -> None:
        """Queues copies from the device to the host.

        Args:
            cache: The device's cache.
            pairs: [n, 2] device block and host block; the latter are distinct.
        """
        for piece in pieces(_by_host_block(pairs, 1), cache.spec):
            staged = cache.read(piece[:, 0])
            for positions, blocks in _runs(piece[:, 1]):
                self._blocks[blocks].copy_(staged[positions], non_blocking=True)

    def swap_in(self, cache: KVCache, pairs: Ints) -> None:
        """Queues copies from the host to the device.

        Args:
            cache: The device's cache.
            pairs: [n, 2] host block and device block; the latter are distinct.
        """
        for piece in pieces(_by_host_block(pairs, 0), cache.spec):
            shape = (len(piece), *self._blocks.shape[1:])
            staged = torch.empty(shape, dtype=cache.spec.dtype, device=cache.spec.device)
            for positions, blocks in _runs(piece[:, 0]):
                staged[positions].copy_(self._blocks[blocks], non_blocking=True)
            cache.write(piece[:, 1], staged)


def _by_host_block(pairs: Ints, column: int) -> Ints:
    """The pairs in the order of one column, so that neighbours in memory are copied together."""
    return pairs[np.argsort(pairs[:, column], kind="stable")]


def _runs(blocks: Ints) -> Iterator[tuple[slice, slice]]:
    """Runs of consecutive numbers: where they stand, and the numbers themselves."""
    ends = [*(np.flatnonzero(np.diff(blocks) != 1) + 1).tolist(), len(blocks)]
    start = 0
    for end in ends:
        first = int(blocks[start])
        yield slice(start, end), slice(first, first + end - start)
        start = end


def _pin(memory: torch.Tensor, device: torch.device) -> None:
    # torch's own allocator of pinned memory would round up to the next power of two.
    with torch.cuda.device(device):
        runtime = _cuda_runtime()
        status = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if status != runtime.cudaError.success:
        raise ConfigError(
            f"the system does not let {memory.nbytes} bytes be pinned for swapped blocks "
            f"({status}): lower swap_space_gib"
        )


def _unpin(memory: torch.Tensor, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        _cuda_runtime().cudaHostUnregister(memory.data_ptr())
