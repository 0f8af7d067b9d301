"""Integers on their way to the device: one copy, from memory that the device reads by itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from mini_infer_engine.batch import Ints

_ALIGNMENT = 4
"""Parts begin at multiples of 16 bytes: kernels read so many at once."""
_NUM_SOURCES = 2
"""A copy of the step under way may not have ended when the next one is written down."""


class StagedInts:
    """Parts of a buffer of int32 on the device, written together."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        """Allocates the buffer on both sides.

        Args:
            capacity: Integers at most, what is lost between the parts included.
            device: Where to.
        """
        self._on_device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._sources = deque(
            torch.zeros(capacity, dtype=torch.int32, pin_memory=device.type == "cuda")
            for _ in range(_NUM_SOURCES)
        )

    @property
    def capacity(self) -> int:
        """Integers at most."""
        return len(self._on_device)

    def stage(self, parts: Sequence[Ints | Sequence[int]]) -> None:
        """Queues the copy of some parts, all of it from the beginning; earlier ones are gone.

        Only the copy before this one may still be under way.
        """
        self._sources.rotate()
        source = self._sources[0]
        values = source.numpy()
        end = 0
        for part in parts:
            start, end = end, end + len(part)
            values[start:end] = part
            end = _aligned(end)
        self._on_device[:end].copy_(source[:end], non_blocking=True)

    def views(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        """The parts on the device, for parts of these lengths; the same lengths, the same place."""
        views, end = [], 0
        for length in lengths:
            views.append(self._on_device[end : end + length])
            end = _aligned(end + length)
        return views

    @staticmethod
    def capacity_for(lengths: Sequence[int]) -> int:
        """What parts of these lengths take."""
        return sum(map(_aligned, lengths))


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
