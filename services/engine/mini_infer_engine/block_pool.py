"""The blocks of the KV cache: which are free, and how many sequences hold each of the others.

Knows block numbers only, no tensors and no tokens, so it is tested on any machine. The K and V
that belong to a number live in `kv_cache.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Hands out blocks and takes them back; both cost O(blocks moved).

    A block is free or held by one or more block tables; it is free again when the last of them
    releases it. `free + used == total` always holds.

    Attributes:
        num_blocks: All blocks, numbered from 0.
        block_size: Tokens in a block.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        on_free: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """Makes a pool in which every block is free.

        Args:
            num_blocks: At least 1.
            block_size: Tokens in a block, at least 1.
            on_free: Called with the blocks that have just become free; tests poison them there.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"expected positive sizes, got {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._on_free = on_free
        # Taken from the end: the block freed last is handed out first, while caches hold it.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._reference_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one block table holds."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes free blocks, each with one reference.

        Raises:
            ValueError: Where fewer are free; ask `num_free` first.
        """
        if count > len(self._free):
            raise ValueError(f"expected at most {len(self._free)} blocks, got {count}")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._reference_counts[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of some used blocks, for one more block table."""
        for block in blocks:
            if not self._reference_counts[block]:
                raise ValueError(f"expected a used block, got free block {block}")
            self._reference_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a reference of each block; those without any are free again."""
        freed = []
        for block in reversed(blocks):
            if not self._reference_counts[block]:
                raise ValueError(f"expected a used block, got free block {block}")
            self._reference_counts[block] -= 1
            if not self._reference_counts[block]:
                freed.append(block)
        self._free.extend(freed)
        if freed and self._on_free:
            self._on_free(freed)

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Checks every invariant against the block tables that exist.

        Args:
            block_tables: The tables of all sequences that hold blocks.

        Raises:
            AssertionError: Where a count, the free list and the tables disagree.
        """
        held = Counter(block for table in block_tables for block in table)
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert not held.keys() & set(self._free), "a free block is held by a block table"
        assert all(count == held[block] for block, count in enumerate(self._reference_counts)), (
            "reference counts differ from the block tables"
        )
        assert len(self._free) + len(held) == self.num_blocks, "a block is neither free nor held"
