"""Which requests may queue: those that can be served, in time, behind those that wait already."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from mini_infer.errors import ErrorReason, MiniInferError

from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.limits import SchedulerLimits, StepBudget
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.sequence import Sequence
from mini_infer_engine.step_costs import NO_WORK, CompletionRate, StepCosts, StepWork
from mini_infer_engine.waiting_queue import WaitingQueue


class Admission:
    """Checks requests against the queues, the blocks and the clock; changes none of these.

    Attributes:
        completions: How often sequences end, as the scheduler tells.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        costs: StepCosts,
        budget: StepBudget,
        blocks: BlockManager,
        waiting: WaitingQueue[Sequence],
        running: RunningBatch,
    ) -> None:
        """Takes what it looks at."""
        self.completions = CompletionRate()
        self._limits = limits
        self._costs = costs
        self._untaught = costs.untaught()
        self._budget = budget
        self._blocks = blocks
        self._waiting = waiting
        self._running = running

    def check(self, group: Seq[Sequence], now: float) -> None:
        """Checks sequences that share a prompt; all of them may queue, or none.

        What they will have to compute is looked up (`num_pending_tokens`) when the checks that cost
        nothing are passed: it takes the names of all blocks of the prompt.

        Args:
            group: At least one; equal but for their streams and seeds.
            now: Monotonic time.

        Raises:
            MiniInferError: KV_EXHAUSTED, QUEUE_FULL or DEADLINE_UNREACHABLE.
        """
        self._check_size(group[0])
        self._check_queue(self._too_many_requests(group), group, now)
        for each in group:
            each.num_pending_tokens = self._blocks.num_pending_tokens(each)
        self._check_queue(self._too_many_tokens(group), group, now)
        self._check_deadline(group[0], now)

    def queue_problem(self, group: Seq[Sequence]) -> str | None:
        """What keeps sequences that share a prompt from queueing now; None where nothing does.

        An empty queue takes any request: one above the bounds could never get in otherwise. And
        those for which there is a place do not count, they wait for the next step only.
        """
        return self._too_many_requests(group) or self._too_many_tokens(group)

    def first_token_s(self, sequence: Sequence, now: float) -> float:
        """Seconds until a sequence that comes now is expected to have its first token.

        Prompts before its own are computed while it waits for running sequences to end, whose
        places or blocks it needs. Its own prompt follows, less what the cache knows of it.
        """
        running, pool = self._running, self._blocks.pool
        num_before, num_tokens_before = self._waiting.num_tokens_before(sequence)
        num_pending = sequence.num_pending_tokens
        num_blocks = pool.blocks_for(num_tokens_before + num_pending)
        blocks_of_each = max(1.0, pool.num_used / max(1, len(running)))
        num_ends = max(
            num_before + 1 - running.num_free_slots,
            math.ceil((num_blocks - pool.num_free) / blocks_of_each),
            0,
        )
        decoding = StepWork(len(running), sum(each.num_computed_tokens for each in running))
        return max(
            self._prefill_s(self._prompts_before(num_before, num_tokens_before), decoding),
            self.completions.seconds_until(num_ends, now),
        ) + self._prefill_s(_prompt(sequence), decoding)

    def _prompts_before(self, num_waiting: int, num_tokens: int) -> StepWork:
        """The prompts before a new one: those that wait, as if all were alike, then the others."""
        work = StepWork(
            num_prefill_tokens=num_tokens, num_pairs=num_tokens**2 / 2 / max(1, num_waiting)
        )
        for each in self._running:
            num_left = each.num_tokens - each.num_computed_tokens
            if num_left > 1:
                work = work.with_chunk(num_left, each.num_computed_tokens)
        return work

    def _prefill_s(
        self, prompts: StepWork, decoding: StepWork, costs: StepCosts | None = None
    ) -> float:
        mean_context = prompts.num_pairs / max(1, prompts.num_prefill_tokens)
        per_step = max(1, self._budget.prefill_tokens(decoding, mean_context))
        return (costs or self._costs).prefill_seconds(prompts, per_step, decoding)

    def _check_size(self, sequence: Sequence) -> None:
        pool = self._blocks.pool
        needed = pool.blocks_for(sequence.max_num_tokens - 1)  # the last token is never computed
        if needed > pool.num_blocks:
            raise MiniInferError(
                ErrorReason.KV_EXHAUSTED,
                f"prompt and max_tokens need {needed} blocks of the KV cache, which has "
                f"{pool.num_blocks}: lower max_tokens or give the engine more memory",
                {"limit": str(pool.num_blocks), "needed": str(needed)},
            )

    def _num_beyond_places(self, group: Seq[Sequence]) -> int:
        """Sequences that would wait longer than for the next step."""
        return len(self._waiting) + len(group) - self._running.num_free_slots

    def _too_many_requests(self, group: Seq[Sequence]) -> str | None:
        num_waiting, bound = len(self._waiting), self._limits.max_queued_requests
        if not num_waiting or self._num_beyond_places(group) <= bound:
            return None
        return f"{num_waiting} of {bound} requests wait already, this one adds {len(group)}"

    def _too_many_tokens(self, group: Seq[Sequence]) -> str | None:
        num_waiting, bound = self._waiting.num_pending_tokens, self._limits.max_queued_tokens
        if bound is None or not self._waiting or self._num_beyond_places(group) <= 0:
            return None
        num_new = sum(each.num_pending_tokens for each in group)
        if num_waiting + num_new <= bound:
            return None
        return f"{num_waiting} of {bound} prompt tokens wait already, this one adds {num_new}"

    def _check_queue(self, problem: str | None, group: Seq[Sequence], now: float) -> None:
        if problem:
            wait_s = self.completions.seconds_until(len(group), now)
            raise MiniInferError(
                ErrorReason.QUEUE_FULL,
                f"{problem}: try again later",
                retry_after_s=max(1.0, wait_s),
            )

    def _check_deadline(self, sequence: Sequence, now: float) -> None:
        if sequence.deadline is None or sequence.deadline <= now:
            return  # one that has passed already ends as such in the next step
        estimate_s, left_s = self.first_token_s(sequence, now), sequence.deadline - now
        if not self._running and not self._waiting:
            # What steps took at first counts as well: what was learnt from slow ones is forgotten
            # by quick ones alone, and refusals would keep those from coming.
            estimate_s = min(
                estimate_s, self._prefill_s(_prompt(sequence), NO_WORK, self._untaught)
            )
        if estimate_s > left_s:
            raise MiniInferError(
                ErrorReason.DEADLINE_UNREACHABLE,
                f"the first token is expected in {estimate_s:.3f} s, the deadline is in "
                f"{left_s:.3f} s: try again later, or allow more time",
                {"estimate_ms": f"{estimate_s * 1e3:.0f}", "budget_ms": f"{left_s * 1e3:.0f}"},
                retry_after_s=estimate_s,
            )


def _prompt(sequence: Sequence) -> StepWork:
    """What a waiting sequence is expected to compute when it joins."""
    num_pending = sequence.num_pending_tokens
    return NO_WORK.with_chunk(num_pending, sequence.num_tokens - num_pending)
