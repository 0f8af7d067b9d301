"""Decides whether a step can be scheduled while the one before it is under way, and for whom.

A GPU that waits between two steps for the host to look at a token does nothing meanwhile. Most
steps need no look: everybody who decodes goes on by one token, whatever it is. So the next step is
written down with the tokens of the one under way as unknowns, and launched behind it. Rows whose
token turns out to be their last one are computed in vain.

Where anything else is to be decided, such as who joins, who gives blocks up or what a grammar
allows next, the scheduler waits for the tokens as ever.
"""

from __future__ import annotations

from typing import NamedTuple

from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence, SequenceStatus
from mini_infer_engine.step_plan import LaunchedStep
from mini_infer_engine.waiting_queue import WaitingQueue


class GoingOn(NamedTuple):
    """Who takes part in a step that is scheduled ahead.

    Attributes:
        sequences: Those that decode.
        sources: Their places among the sampled rows of the step under way.
    """

    sequences: list[Sequence]
    sources: list[int]


class RunAhead:
    """Looks at the queues as a step under way will leave them."""

    def __init__(
        self,
        blocks: BlockManager,
        waiting: WaitingQueue[Sequence],
        running: RunningBatch,
        num_spare_blocks: int,
    ) -> None:
        """Takes the scheduler's own parts.

        Args:
            blocks: Of the cache.
            waiting: Who may join.
            running: Who takes part.
            num_spare_blocks: Blocks that stay free when a sequence joins.
        """
        self._num_spare_blocks = num_spare_blocks
        self._blocks = blocks
        self._waiting = waiting
        self._running = running

    def plan(self, step: LaunchedStep, batch: ScheduledBatch) -> GoingOn | None:
        """Who goes on behind a step; each of them gets the block that its next token needs.

        Args:
            step: The only one under way.
            batch: What it computes.

        Returns:
            None where that cannot be said before its tokens are known, or where nobody goes on.
        """
        if self._somebody_may_join():
            return None
        sampled = batch.sampling.rows.tolist()
        live = [
            (source, step.sequences[row])
            for source, row in enumerate(sampled)
            if step.sequences[row].status is SequenceStatus.RUNNING
        ]
        if len(live) < len(self._running):
            return None  # the others have more of their prompts to compute
        going = [
            (source, sequence)
            for source, sequence in live
            if sequence.num_tokens + 1 < sequence.max_num_tokens
        ]
        if not going:
            return None
        sequences = [sequence for _, sequence in going]
        if self._running.need_tokens(sequences) or not all(map(self._make_room, sequences)):
            return None
        return GoingOn(sequences, [source for source, _ in going])

    def _somebody_may_join(self) -> bool:
        """Whether a sequence that waits could get a place, or take one from a lower class."""
        first = next((each for each in self._waiting if each.is_ready), None)
        if first is None:
            return False
        if self._running and self._running.last.priority > first.priority:
            return True
        needed = self._blocks.num_blocks_to_join(first) + self._num_spare_blocks
        return self._running.num_free_slots > 0 and self._blocks.pool.num_free >= needed

    def _make_room(self, sequence: Sequence) -> bool:
        """Gives a sequence a block for the token under way, where one is free."""
        block_size = self._blocks.pool.block_size
        if sequence.num_tokens < len(sequence.block_table) * block_size:
            return True
        if not self._blocks.grow(sequence):
            return False
        self._running.note_growth(sequence)
        return True
