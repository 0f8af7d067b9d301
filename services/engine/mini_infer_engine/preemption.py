"""Who loses its blocks when they run out, and whether they are swapped or computed again."""

from __future__ import annotations

from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence, SequenceStatus
from mini_infer_engine.step_costs import NO_WORK, StepCosts, StepWork
from mini_infer_engine.waiting_queue import WaitingQueue, scheduling_key


class Preemption:
    """Moves running sequences back into the queue, the last in scheduling order first.

    Attributes:
        num_recomputes: Preemptions whose tokens are computed again.
        num_swaps: Preemptions whose K and V went to the host's memory.
    """

    def __init__(
        self,
        blocks: BlockManager,
        costs: StepCosts,
        running: RunningBatch,
        waiting: WaitingQueue[Sequence],
    ) -> None:
        """Takes what it moves sequences between."""
        self._blocks = blocks
        self._costs = costs
        self._running = running
        self._waiting = waiting
        self.num_recomputes = 0
        self.num_swaps = 0

    def preempt(self, sequence: Sequence, now: float) -> None:
        """Takes a running sequence's blocks and lets it wait, before new ones of its class."""
        num_tokens = sequence.num_computed_tokens
        there_and_back = StepWork(num_swapped_blocks=2 * self._blocks.pool.blocks_for(num_tokens))
        swap_s = self._costs.added_seconds(there_and_back)
        recompute_s = self._costs.added_seconds(NO_WORK.with_chunk(num_tokens, 0))
        if self._blocks.can_swap_out(sequence) and swap_s < recompute_s:
            self._blocks.swap_out(sequence)
            self.num_swaps += 1
        else:
            self._blocks.release(sequence)
            sequence.num_computed_tokens = 0
            self.num_recomputes += 1
        sequence.num_pending_tokens = self._blocks.num_pending_tokens(sequence)
        self._running.remove(sequence)
        sequence.num_preemptions += 1
        sequence.times.last_preemption = now
        sequence.was_running = True
        sequence.status = SequenceStatus.WAITING
        self._waiting.add(sequence, now)

    def make_room(self, sequence: Sequence, now: float) -> bool:
        """Gives a running sequence blocks for all its tokens, at the cost of the last in order.

        Returns:
            False where the sequence itself was the last one, or has lost its blocks before.
        """
        if sequence.status is not SequenceStatus.RUNNING:
            return False
        block_size = self._blocks.pool.block_size
        while sequence.num_tokens > len(sequence.block_table) * block_size:
            if self._blocks.grow(sequence):
                self._running.note_growth(sequence)
                continue
            victim = self._running.last
            self.preempt(victim, now)
            if victim is sequence:
                return False
        return True

    def make_way(self, num_spare: int, now: float) -> None:
        """Preempts sequences of lower classes where the first that waits needs it.

        Classes as they were asked for: sequences of one class would take turns otherwise. And
        only sequences that come later in scheduling order: one that has come before the first by
        waiting would take its blocks back.

        Args:
            num_spare: Blocks that must be free beside those that the first one takes.
            now: Monotonic time.
        """
        first = self._waiting.first()
        if first is None or not self._running or self._running.last.priority <= first.priority:
            return
        if not first.is_ready:
            return
        needed = self._blocks.num_blocks_to_join(first) + num_spare
        num_free = self._blocks.pool.num_free
        victims: list[Sequence] = []
        for victim in reversed(self._running):
            has_place = self._running.num_free_slots + len(victims) > 0
            if has_place and num_free >= needed:
                break
            is_lower = victim.priority > first.priority
            if not is_lower or scheduling_key(victim) < scheduling_key(first):
                return  # there would still be no room
            victims.append(victim)
            num_free += sum(map(self._blocks.pool.is_held_once, victim.block_table))
        for victim in victims:
            self.preempt(victim, now)
