"""Gives sequences their blocks: shared where the tokens are known already, and taken back.

A sequence that joins the running batch gets blocks for all of its tokens at once. Those of a
prefix that the cache knows, or of a prompt that a running sequence has computed, are shared; the
block in which its own writing begins is never shared but copied (copy on write, Kwon et al.,
"PagedAttention", SOSP 2023, section 4.4). What has to be copied is noted down here and happens
before the next step's tokens are computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.prefix_cache import PrefixCache
from mini_infer_engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class BlockTransfers:
    """What happens to blocks before a step; `ScheduledBatch` says in which order."""

    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    zero_blocks: list[int] = field(default_factory=list)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_swapped(self) -> int:
        """Blocks that go to the host or come from there."""
        return len(self.swap_outs) + len(self.swap_ins)


class BlockManager:
    """Owns the block tables of all sequences.

    Attributes:
        pool: Blocks of the device, which nobody else changes.
        cache: Finds known prefixes; None shares nothing but prompts of parents.
        num_swapped: Sequences whose K and V are in the host's memory.
        num_queried_tokens: Tokens that were looked up in the cache, and
        num_hit_tokens: those among them that were there.
        num_swapped_out_blocks: Blocks copied to the host.
        num_swapped_in_blocks: Blocks copied back.
        num_copied_blocks: Blocks copied on the device.
    """

    def __init__(
        self, pool: BlockPool, cache: PrefixCache | None = None, host_pool: BlockPool | None = None
    ) -> None:
        """Takes over pools in which nothing is used.

        Args:
            pool: Blocks of the device.
            cache: Over the same pool, or None.
            host_pool: Blocks of the host, for sequences that are swapped out; or None.
        """
        self.pool = pool
        self.cache = cache
        self._host_pool = host_pool
        self._host_to_release: list[int] = []  # their content leaves with the next step
        self._transfers = BlockTransfers()
        self.num_swapped = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_swapped_out_blocks = 0
        self.num_swapped_in_blocks = 0
        self.num_copied_blocks = 0

    # --- joining and growing --------------------------------------------------------------------

    def num_pending_tokens(self, sequence: Sequence) -> int:
        """Tokens that a waiting sequence would have to compute if it joined now.

        Of one with a parent: if it joined when the parent has computed the prompt.
        """
        if sequence.parent is not None:
            return 1
        if sequence.host_blocks:
            return sequence.num_tokens - sequence.num_computed_tokens
        return sequence.num_tokens - len(self._known_prefix(sequence)) * self.pool.block_size

    def num_blocks_to_join(self, sequence: Sequence) -> int:
        """Free blocks that a waiting sequence would take if it joined now."""
        return self._num_taken(sequence, self._shareable(sequence, _donor(sequence)))

    def join(self, sequence: Sequence, num_spare: int) -> bool:
        """Gives a waiting sequence blocks for all of its tokens.

        Args:
            sequence: Holds no blocks, or blocks of the host.
            num_spare: Blocks that must still be free then.

        Returns:
            Whether there were enough; if not, nothing has changed.
        """
        parent = _donor(sequence)
        shared = self._shareable(sequence, parent)
        if self._num_taken(sequence, shared) + num_spare > self.pool.num_free:
            return False
        self.pool.share(shared)
        num_new = self.pool.blocks_for(sequence.num_tokens) - len(shared)
        sequence.block_table = shared + self.pool.allocate(num_new)
        sequence.num_committed_blocks = len(shared)
        if parent is not None:
            self._fork(sequence, parent)
        elif sequence.host_blocks:
            self._swap_in(sequence)
        else:
            sequence.num_computed_tokens = len(shared) * self.pool.block_size
            if self.cache is not None and sequence.cache_scope is not None:
                self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_computed_tokens
        sequence.parent = None
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Adds a block to a running sequence; gives whether one was free."""
        if not self.pool.num_free:
            return False
        sequence.block_table += self.pool.allocate(1)
        return True

    def commit(self, sequence: Sequence) -> None:
        """Offers the blocks that have become full and computed to the cache."""
        scope, names = sequence.cache_scope, sequence.block_names
        num_full = sequence.num_computed_tokens // self.pool.block_size
        if self.cache is not None and scope is not None:
            self.cache.extend_names(scope, names, sequence.token_ids, num_full)
            for index in range(sequence.num_committed_blocks, num_full):
                self.cache.add(names[index], sequence.block_table[index])
        sequence.num_committed_blocks = num_full

    # --- leaving --------------------------------------------------------------------------------

    def release(self, sequence: Sequence) -> None:
        """Takes all blocks of a sequence back, the host's too."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_committed_blocks = 0
        if sequence.host_blocks and self._host_pool:
            self.num_swapped -= 1
            self._host_pool.release(sequence.host_blocks)
            given_up = set(sequence.host_blocks)
            self._transfers.swap_outs = [
                pair for pair in self._transfers.swap_outs if pair[1] not in given_up
            ]
            sequence.host_blocks = []

    def can_swap_out(self, sequence: Sequence) -> bool:
        """Whether the host has room for what a running sequence has computed."""
        needed = self.pool.blocks_for(sequence.num_computed_tokens)
        return self._host_pool is not None and 0 < needed <= self._host_pool.num_free

    def swap_out(self, sequence: Sequence) -> None:
        """Moves the blocks of a running sequence to the host (`can_swap_out`)."""
        if self._host_pool is None:
            raise ValueError("expected a pool of host blocks to swap to")
        num_blocks = self.pool.blocks_for(sequence.num_computed_tokens)
        host_blocks = self._host_pool.allocate(num_blocks)
        self._transfers.swap_outs += zip(sequence.block_table, host_blocks, strict=False)
        self.num_swapped_out_blocks += num_blocks
        self.release(sequence)
        sequence.host_blocks = host_blocks
        self.num_swapped += 1

    def condemn(self, sequence: Sequence) -> None:
        """Has blocks that may hold non-finite values cleared, and found by nobody."""
        if self.cache is not None:
            self.cache.remove(sequence.block_table)
        self._transfers.zero_blocks += [
            block for block in sequence.block_table if self.pool.is_held_once(block)
        ]

    def take_transfers(self) -> BlockTransfers:
        """What has to happen before the step that is about to be launched."""
        transfers, self._transfers = self._transfers, BlockTransfers()
        if self._host_pool and self._host_to_release:
            self._host_pool.release(self._host_to_release)
            self._host_to_release = []
        return transfers

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Checks pools and cache against all sequences that hold blocks.

        Raises:
            AssertionError: Where they disagree.
        """
        everyone = list(sequences)
        self.pool.check_integrity(each.block_table for each in everyone)
        if self.cache is not None:
            self.cache.check_integrity()
        assert self.num_swapped == sum(bool(each.host_blocks) for each in everyone)
        if self._host_pool is not None:
            tables = [each.host_blocks for each in everyone]
            self._host_pool.check_integrity([*tables, self._host_to_release])
        for column in ("swap_outs", "swap_ins", "block_copies"):
            targets = [target for _, target in getattr(self._transfers, column)]
            assert len(targets) == len(set(targets)), f"{column}: a block is written twice"

    # --- helpers --------------------------------------------------------------------------------

    def _shareable(self, sequence: Sequence, parent: Sequence | None) -> list[int]:
        """Blocks that a waiting sequence need not compute: of its parent, or known ones."""
        if parent is None:
            return self._known_prefix(sequence)
        first_own = (sequence.num_prompt_tokens - 1) // self.pool.block_size
        return parent.block_table[:first_own]

    def _num_taken(self, sequence: Sequence, shared: list[int]) -> int:
        """Blocks that are free now and would not be: all but those that others hold as well."""
        return self.pool.blocks_for(sequence.num_tokens) - sum(map(self.pool.is_used, shared))

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the cache that hold the sequence's first tokens, the last one excepted.

        The last token is always computed: the next one comes from it.
        """
        if self.cache is None or sequence.cache_scope is None:
            return []
        names = sequence.block_names
        num_blocks = (sequence.num_tokens - 1) // self.pool.block_size
        self.cache.extend_names(sequence.cache_scope, names, sequence.token_ids, num_blocks)
        return self.cache.find(names[:num_blocks])

    def _fork(self, sequence: Sequence, parent: Sequence) -> None:
        """Makes all but the last token of the parent's prompt the sequence's own."""
        num_shared = sequence.num_committed_blocks
        sequence.num_computed_tokens = sequence.num_prompt_tokens - 1
        if sequence.num_computed_tokens > num_shared * self.pool.block_size:
            pair = (parent.block_table[num_shared], sequence.block_table[num_shared])
            self._transfers.block_copies.append(pair)
            self.num_copied_blocks += 1

    def _swap_in(self, sequence: Sequence) -> None:
        """Fetches the blocks that the cache does not know from the host."""
        num_shared = sequence.num_committed_blocks
        pairs = list(zip(sequence.host_blocks, sequence.block_table, strict=False))[num_shared:]
        self._transfers.swap_ins += pairs
        self.num_swapped_in_blocks += len(pairs)
        known = num_shared * self.pool.block_size
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, known)
        self._host_to_release += sequence.host_blocks
        sequence.host_blocks = []
        self.num_swapped -= 1


def _donor(sequence: Sequence) -> Sequence | None:
    """The sequence's parent, where that runs and has computed the prompt that they share."""
    parent = sequence.parent
    can_fork = (
        parent is not None
        and parent.status is SequenceStatus.RUNNING
        and parent.num_computed_tokens >= sequence.num_prompt_tokens
        and parent.num_turned_together == sequence.num_turned_together
    )
    return parent if can_fork else None
