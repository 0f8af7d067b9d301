"""The blocks of the KV cache: which are free, and how many sequences hold each of the others.

Knows block numbers only, no tensors and no tokens, so it is tested on any machine. The K and V
that belong to a number live in `kv_cache.py`; what tokens they stand for is known to
`prefix_cache.py`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Hands out blocks and takes them back; each block moved costs O(1).

    A block is *used* while block tables hold it. Without holders it is free: *cached* if its
    content was worth keeping, else *empty*. Empty blocks are handed out first, then cached ones,
    the least recently used before all others. `empty + cached + used == total` always holds.

    Attributes:
        num_blocks: All blocks, numbered from 0.
        block_size: Tokens in a block.
        num_evicted: Cached blocks that were handed out for new content.
        on_evict: Called with a cached block that is handed out: what it held is forgotten.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        on_free: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """Makes a pool in which every block is empty.

        Args:
            num_blocks: At least 1.
            block_size: Tokens in a block, at least 1.
            on_free: Called with the blocks that have just become empty; tests poison them there.
        """
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"expected positive sizes, got {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evicted = 0
        self.on_evict: Callable[[int], None] | None = None
        self._on_free = on_free
        # Taken from the end: the block freed last is handed out first, while caches hold it.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._is_kept = bytearray(num_blocks)
        self._reference_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content is kept until they are handed out."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that at least one block table holds."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def is_used(self, block: int) -> bool:
        """Whether a block table holds it."""
        return self._reference_counts[block] > 0

    def is_held_once(self, block: int) -> bool:
        """Whether just one block table holds it."""
        return self._reference_counts[block] == 1

    def is_kept(self, block: int) -> bool:
        """Whether it is cached, or will be when its last holder has released it."""
        return bool(self._is_kept[block])

    def allocate(self, count: int) -> list[int]:
        """Takes free blocks, each with one reference.

        Raises:
            ValueError: Where fewer are free; ask `num_free` first.
        """
        if count > self.num_free:
            raise ValueError(f"expected at most {self.num_free} blocks, got {count}")
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in taken:
            self._reference_counts[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of some used or cached blocks, for one more block table.

        Raises:
            ValueError: For an empty block.
        """
        for block in blocks:
            if not self._reference_counts[block]:
                if block not in self._cached:
                    raise ValueError(f"expected a used or cached block, got empty block {block}")
                del self._cached[block]
            self._reference_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a reference of each block; those without any are free again.

        The last block is released first, so it is evicted before those that it continues.

        Raises:
            ValueError: For a block that nobody holds.
        """
        emptied = []
        for block in reversed(blocks):
            if not self._reference_counts[block]:
                raise ValueError(f"expected a used block, got free block {block}")
            self._reference_counts[block] -= 1
            if self._reference_counts[block]:
                continue
            if self._is_kept[block]:
                self._cached[block] = None
            else:
                emptied.append(block)
        self._add_empty(emptied)

    def keep(self, block: int) -> None:
        """Marks a used block: without holders it is cached, not empty."""
        self._is_kept[block] = True

    def drop(self, block: int) -> None:
        """Takes the mark away; a cached block becomes empty."""
        self._is_kept[block] = False
        if block in self._cached:
            del self._cached[block]
            self._add_empty([block])

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Checks every invariant against the block tables that exist.

        Args:
            block_tables: The tables of all sequences that hold blocks.

        Raises:
            AssertionError: Where counts, free blocks and tables disagree.
        """
        held = Counter(block for table in block_tables for block in table)
        free = set(self._empty) | self._cached.keys()
        assert len(free) == self.num_free, "a block is free twice"
        assert not held.keys() & free, "a free block is held by a block table"
        assert all(count == held[block] for block, count in enumerate(self._reference_counts)), (
            "reference counts differ from the block tables"
        )
        assert self.num_free + len(held) == self.num_blocks, "a block is neither free nor held"
        assert all(self._is_kept[block] for block in self._cached), "a cached block is not kept"
        assert not any(self._is_kept[block] for block in self._empty), "an empty block is kept"

    def _add_empty(self, blocks: list[int]) -> None:
        self._empty.extend(blocks)
        if blocks and self._on_free:
            self._on_free(blocks)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._is_kept[block] = False
        self.num_evicted += 1
        if self.on_evict:
            self.on_evict(block)
        return block
