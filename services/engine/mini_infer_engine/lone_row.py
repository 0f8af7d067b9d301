"""The K and V of a row that decodes alone, side by side even where its blocks are not.

A lone row whose blocks are neighbours is computed in place: its tokens are one window of the
cache, and nothing is gathered. With shared prefixes blocks are seldom neighbours. Such a row's
tokens are copied once into neighbouring blocks of a small cache, its steps run there, and each
step's new tokens are written back, so that the paged cache always holds everything.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec

LONE_ROW_BYTES = 2**29
"""What the copy takes at most, beside the cache; a longer row gathers its blocks at each step."""


def num_lone_row_blocks(spec: KVCacheSpec, max_model_len: int) -> int:
    """Blocks for the copy of the longest row, as far as they may be had.

    Args:
        spec: The blocks' shape.
        max_model_len: Tokens of the longest sequence.
    """
    return min(-(-max_model_len // spec.block_size), LONE_ROW_BYTES // spec.bytes_per_block)


def lone_blocks(batch: ScheduledBatch) -> list[int]:
    """The blocks of the only row of a batch, where that decodes; else none."""
    if len(batch.keys) != 1 or batch.num_decodes != 1:
        return []
    blocks: list[int] = batch.block_tables[0].tolist()
    return blocks


def are_neighbours(blocks: list[int]) -> bool:
    """Whether blocks, at least one, lie side by side in the order of their tokens."""
    return blocks == list(range(blocks[0], blocks[0] + len(blocks)))


class LoneRow:
    """A copy of the first tokens of some blocks of the paged cache.

    It equals them as long as no other step runs and no block is moved, whoever they belong to. So
    `enter` must see every batch, and only `leave` keeps the copy for the next one.

    Attributes:
        cache: The copy, in its first blocks.
    """

    def __init__(self, paged: KVCache, num_blocks: int) -> None:
        """Allocates the copy.

        Args:
            paged: The cache that rows are copied from; all steps read and write it here alone.
            num_blocks: The longest row that is copied; 0 copies none.
        """
        self.cache = KVCache(paged.spec, num_blocks)
        self._paged = paged
        self._blocks: list[int] = []
        self._num_tokens = 0

    def enter(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """Makes the copy hold a lone row's tokens.

        Args:
            batch: The next step, whose blocks have been moved.

        Returns:
            The same step over `cache`, to be followed by `leave`; None where it is to run over
            the paged cache: it is no lone row, its blocks are neighbours, or it is too long.
        """
        held, num_held = self._blocks, self._num_tokens
        self._blocks, self._num_tokens = [], 0
        blocks = lone_blocks(batch)
        if not blocks or are_neighbours(blocks) or len(blocks) > self.cache.num_blocks:
            return None
        num_computed = int(batch.num_computed_tokens[0])
        filled = blocks[: -(-num_computed // self.cache.spec.block_size)]
        if num_computed > num_held or filled != held[: len(filled)] or _moves_blocks(batch):
            pairs = [(block, place) for place, block in enumerate(filled)]
            self.cache.copy_blocks(np.array(pairs, np.int64).reshape(-1, 2), self._paged)
        return replace(batch, block_tables=np.arange(len(blocks))[None])

    def leave(self, batch: ScheduledBatch, num_rounds: int) -> None:
        """Writes the new tokens back to the paged cache.

        Args:
            batch: As `enter` got it; it has run.
            num_rounds: How many tokens it computed, all within the row's blocks.
        """
        start = int(batch.num_computed_tokens[0])
        end = start + num_rounds
        block_size = self.cache.spec.block_size
        positions = np.arange(start, end)
        blocks = batch.block_tables[0]
        slots = blocks[positions // block_size] * block_size + positions % block_size
        self._paged.write_slots(slots, self.cache.window(0, end)[:, :, start:])
        self._blocks, self._num_tokens = blocks.tolist(), end


def _moves_blocks(batch: ScheduledBatch) -> bool:
    """Whether something is written to the device's blocks before the step."""
    return any(map(len, (batch.zero_blocks, batch.swap_ins, batch.block_copies)))
