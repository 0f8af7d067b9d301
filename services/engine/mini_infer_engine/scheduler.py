"""Decides what each step computes: who joins, who goes on, who loses its blocks, who is done.

Continuous batching in the manner of Orca (Yu et al., OSDI 2022): the batch is made anew at each
step, so sequences join and leave at any step. There are no prefill or decode phases, only
sequences with tokens that are not computed yet: those with one such token are served first, what
is left of the step's token budget goes to the others (chunked prefill, Agrawal et al.,
"Sarathi-Serve", OSDI 2024), and what is then left to those that wait.

*Scheduling order*: by class, those that ran before first, then by deadline, then by arrival
(`waiting_queue.py`). When blocks run out the last one in this order loses its blocks. They are
computed again later or, where that is cheaper, swapped to the host's memory (Kwon et al.,
"PagedAttention", SOSP 2023, section 4.5).

No tensors, no sockets; one thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import NO_STOP_TOKEN, EngineCounters, FinishCode

from mini_infer_engine.admission import Admission
from mini_infer_engine.alarms import Alarms
from mini_infer_engine.batch import EMPTY_BATCH, ScheduledBatch, StepTokens
from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.integrity import check_queues
from mini_infer_engine.limits import SchedulerLimits, StepBudget
from mini_infer_engine.preemption import Preemption
from mini_infer_engine.row_problem import row_problem
from mini_infer_engine.run_ahead import RunAhead
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.scores import tell_scores
from mini_infer_engine.sequence import Sequence, SequenceStatus, StreamKey
from mini_infer_engine.step_costs import StepCosts
from mini_infer_engine.step_plan import LaunchedStep, StepPlan
from mini_infer_engine.step_updates import SequenceEnd, StepUpdates
from mini_infer_engine.tally import Tally
from mini_infer_engine.waiting_queue import WaitingQueue

_NO_IDS: list[int] = []
_RUNNING = FinishCode.RUNNING  # looking up a member of an Enum takes as long as all the rest


class Scheduler:
    """The waiting queue and the running batch.

    A sequence is in exactly one of them from `add` until its last update; its blocks go back when
    it has ended and no launched step names it any more.
    """

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits, costs: StepCosts) -> None:
        """Makes an idle scheduler.

        Args:
            blocks: Of a cache that it alone uses.
            limits: Bounds.
            costs: What steps take; learns from each one.
        """
        self.blocks = blocks
        self.costs = costs
        self._block_size = blocks.pool.block_size
        self._budget = StepBudget(limits, costs, self._block_size)
        self._sequences: dict[StreamKey, Sequence] = {}
        self._waiting: WaitingQueue[Sequence] = WaitingQueue(limits.priority_ageing_s)
        self._running = RunningBatch(limits.max_num_seqs)
        self._admission = Admission(
            limits, costs, self._budget, blocks, self._waiting, self._running
        )
        self._preemption = Preemption(blocks, costs, self._running, self._waiting)
        self._deadlines: Alarms[StreamKey] = Alarms()
        self._launched: dict[int, LaunchedStep] = {}
        self._updates = StepUpdates()  # of sequences that ended outside of a step
        self._num_arrivals = 0
        self._num_spare = math.ceil(limits.kv_watermark * blocks.pool.num_blocks)
        self._run_ahead = RunAhead(blocks, self._waiting, self._running, self._num_spare)
        self._last_step = 0  # finished
        self._last_finished = -math.inf
        self.num_steps = 0
        self.tally = Tally()

    # --- queues ---------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to schedule and nothing to report."""
        return not self._sequences and self._updates.is_empty

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a step, swapped ones among them."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """Preemptions of both kinds so far."""
        return self._preemption.num_recomputes + self._preemption.num_swaps

    def counters(self) -> EngineCounters:
        """What was decided so far."""
        return self.tally.counters(self.blocks, self._preemption)

    def has_room(self, group: Seq[Sequence]) -> bool:
        """Whether sequences that share a prompt may queue, as far as the queue is concerned."""
        return self._admission.queue_problem(group) is None

    def keys_of(self, owner: bytes) -> list[StreamKey]:
        """The sequences of one gateway that have not ended."""
        return [key for key in self._sequences if key.owner == owner]

    def add(self, sequence: Sequence, *siblings: Sequence, now: float) -> None:
        """Queues a sequence, and others that share its prompt: all of them or none.

        Args:
            sequence: New.
            siblings: New; `sequence` is their parent.
            now: Monotonic time.

        Raises:
            MiniInferError: DUPLICATE_REQUEST_ID; KV_EXHAUSTED where the sequence could not run to
                its end even with all blocks for itself; QUEUE_FULL; DEADLINE_UNREACHABLE where it
                is not expected to get its first token in time.
        """
        group = [sequence, *siblings]
        with self.tally.counting_refusals():
            self._check(group, now)
        for each in group:
            self._sequences[each.key] = each
            self._waiting.add(each, now)
            if each.grammar is not None:
                each.grammar.compile()
            if each.deadline is not None:
                self._deadlines.set(each.key, each.deadline)

    def abort(self, key: StreamKey, now: float, *, report: bool = False) -> bool:
        """Ends a sequence at once.

        Args:
            key: The sequence.
            now: Monotonic time.
            report: Whether an update that says ABORTED is wanted.

        Returns:
            Whether there was such a sequence.
        """
        sequence = self._sequences.get(key)
        if sequence is None:
            return False
        if report:
            self._finish(sequence, FinishCode.ABORTED, self._updates, now)
        else:
            self._end(sequence, now)
        return True

    # --- a step ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledBatch:
        """Chooses the next step's work; the batch is empty where there is none.

        Args:
            now: Monotonic time; sequences whose deadline has passed end first.
        """
        self._expire(now)
        self._waiting.promote(now)
        self._preemption.make_way(self._num_spare, now)
        plan = self._continue_running(now)
        self._admit_waiting(plan, now)
        if plan.is_empty:
            return EMPTY_BATCH
        self.num_steps += 1
        transfers = self.blocks.take_transfers()
        self._launched[self.num_steps] = plan.launch(transfers.num_swapped, now)
        return self._running.build(self.num_steps, plan.decodes, plan.prefills, transfers)

    def schedule_ahead(self, under_way: ScheduledBatch, now: float) -> ScheduledBatch | None:
        """The step behind one whose tokens are not known yet (`run_ahead.py`).

        Until both are finished, `finish_step` in their order, only this may schedule another.

        Args:
            under_way: The only step that is launched and not finished.
            now: Monotonic time; sequences whose deadline has passed end first.

        Returns:
            None where it has to wait for the tokens: finish the step and `schedule`.
        """
        self._expire(now)
        self._waiting.promote(now)
        if under_way.is_empty:
            return None
        going_on = self._run_ahead.plan(self._launched[under_way.step], under_way)
        if going_on is None:
            return None
        self.num_steps += 1
        transfers = self.blocks.take_transfers()
        plan = StepPlan.ahead(going_on.sequences)
        self._launched[self.num_steps] = plan.launch(transfers.num_swapped, now)
        return self._running.build_ahead(self.num_steps, *going_on, transfers)

    def blocks_under_way(self) -> list[int]:
        """The blocks that launched steps name, perhaps some of them twice."""
        sequences = [each for step in self._launched.values() for each in step.sequences]
        return [block for each in sequences for block in each.block_table]

    def masked_sequences(self, batch: ScheduledBatch) -> list[Sequence]:
        """Those of a launched step that choose from a set of ids, as `sampling.masked` has them."""
        if batch.is_empty:
            return []
        sequences = self._launched[batch.step].sequences
        return [sequences[row] for row in batch.sampling.rows[batch.sampling.masked]]

    def finish_step(self, batch: ScheduledBatch, tokens: StepTokens, now: float) -> StepUpdates:
        """Takes a step's tokens in and says what became of its sequences.

        Args:
            batch: A batch that `schedule` gave.
            tokens: What the runner chose for it.
            now: Monotonic time.

        Returns:
            A row for each sequence that got tokens or has ended since the step before.
        """
        updates, self._updates = self._updates, StepUpdates()
        if batch.is_empty:
            return updates
        step = self._launched.pop(batch.step)
        self._last_step = batch.step
        self.tally.num_prefill_tokens += step.work.num_prefill_tokens
        # One that was scheduled ahead began when the one before it ended.
        self.costs.note(work=step.work, seconds=now - max(step.started, self._last_finished))
        self._last_finished = now
        tell_scores(step, batch, tokens, updates)
        sampled = batch.sampling.rows.tolist()
        chosen = dict(zip(sampled, tokens.token_ids.tolist(), strict=True))
        for index in np.flatnonzero(tokens.statuses).tolist():
            sequence = step.sequences[sampled[index]]
            if sequence.status is not SequenceStatus.ENDED:
                problem = row_problem(sequence, int(tokens.statuses[index]))
                self._fail(sequence, problem, updates, now)
        ended = SequenceStatus.ENDED
        rows = zip(step.sequences, step.num_scheduled_tokens, strict=True)
        for row, (sequence, num_tokens) in enumerate(rows):
            sequence.num_in_flight -= 1
            if sequence.status is ended:
                self._release_if_done(sequence)
            else:
                self._go_on(sequence, num_tokens, chosen.get(row, _NO_IDS), updates, now)
        self.tally.num_decode_tokens += updates.num_tokens
        return updates

    def check_integrity(self) -> None:
        """As `check_queues`."""
        launched = [each for step in self._launched.values() for each in step.sequences]
        everyone = self._sequences.values()
        check_queues(everyone, launched, self._running, self._waiting, self.blocks)

    def _check(self, group: Seq[Sequence], now: float) -> None:
        """Numbers new sequences, and raises where they cannot queue."""
        keys = {each.key for each in group}
        if len(keys) < len(group) or not keys.isdisjoint(self._sequences):
            streams = ", ".join(str(each.key.stream) for each in group)
            message = f"one of the streams {streams} exists already"
            raise MiniInferError(ErrorReason.DUPLICATE_REQUEST_ID, message)
        for each in group:
            self._num_arrivals += 1
            each.arrival_number = self._num_arrivals
        self._admission.check(group, now)

    # --- how schedule chooses -------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for key in self._deadlines.take_due(now):
            sequence = self._sequences[key]
            self.tally.note_expired(has_run=sequence.times.first_step is not None)
            self._finish(sequence, FinishCode.DEADLINE, self._updates, now)

    def _continue_running(self, now: float) -> StepPlan:
        """A step of those that run: first one token for each of which just that is left."""
        decodes: list[Sequence] = []
        unfinished: list[Sequence] = []
        block_size = self._block_size
        for sequence in list(self._running):
            num_tokens = len(sequence.token_ids)
            if num_tokens > len(sequence.block_table) * block_size:
                if not self._preemption.make_room(sequence, now):
                    break  # it was the last one
            if sequence.num_computed_tokens == num_tokens - 1:
                decodes.append(sequence)
            else:
                unfinished.append(sequence)
        plan = StepPlan.of(decodes)
        for sequence in unfinished:
            if sequence.status is SequenceStatus.RUNNING:
                most = self._budget.prefill_tokens(plan.work, sequence.num_computed_tokens)
                if most > 0:
                    plan.give(sequence, most)
        return plan

    def _admit_waiting(self, plan: StepPlan, now: float) -> None:
        """Lets those that wait join while tokens, places and blocks are left."""
        while self._running.num_free_slots and self._budget.prefill_tokens(plan.work) > 0:
            # Those whose parent is still at their prompt let others go before them.
            sequence = next((each for each in self._waiting if each.is_ready), None)
            if sequence is None:
                return
            if self._ends_unstarted(sequence, now):
                continue
            # Room for all of it, not just for this step's part: a sequence that joined without
            # would soon have to leave again.
            if not self.blocks.join(sequence, self._num_spare if self._running else 0):
                return
            self._waiting.remove(sequence)
            sequence.status = SequenceStatus.RUNNING
            self._running.add(sequence)
            if sequence.times.first_step is None:
                cached = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
                sequence.num_cached_tokens = cached
                sequence.times.note_first_step(now, self.num_steps + 1)
            # What of it is cached is known only now. It has joined, so it gets a token at least.
            most = self._budget.prefill_tokens(plan.work, sequence.num_computed_tokens)
            plan.give(sequence, max(1, most))

    # --- how sequences go on and end ------------------------------------------------------------

    def _go_on(
        self, sequence: Sequence, num_tokens: int, ids: list[int], updates: StepUpdates, now: float
    ) -> None:
        """Takes in what a step did for a sequence: so many tokens computed, these ids chosen."""
        try:
            code = sequence.advance(num_tokens, ids)
        except MiniInferError as error:
            self._fail(sequence, error, updates, now)
            return
        if sequence.num_computed_tokens // self._block_size > sequence.num_committed_blocks:
            self.blocks.commit(sequence)
        if ids:
            sequence.times.note_token(now)
            if code is not _RUNNING:
                self._finish(sequence, code, updates, now)
            elif sequence.grammar is None:
                updates.add(sequence.key, sequence.tell(len(ids)), ids)
            else:  # there may be forced tokens behind and before them
                updates.add(sequence.key, *sequence.take_untold())

    def _ends_unstarted(self, sequence: Sequence, now: float) -> bool:
        """Whether a sequence that waits ends without a step, for its language's sake."""
        try:
            code = sequence.begin()
        except MiniInferError as error:
            self._fail(sequence, error, self._updates, now)
            return True
        if code is _RUNNING:
            return False
        self._finish(sequence, code, self._updates, now)
        return True

    def _finish(
        self, sequence: Sequence, code: FinishCode, updates: StepUpdates, now: float
    ) -> None:
        """Ends a sequence with the output that was not told yet."""
        start, token_ids = sequence.take_untold()
        stop_token_id = token_ids[-1] if code is FinishCode.STOP_TOKEN else NO_STOP_TOKEN
        end = SequenceEnd(code, stop_token_id, sequence.accounting(now, self._last_step))
        updates.add(sequence.key, start, token_ids, end)
        self._end(sequence, now)

    def _fail(
        self, sequence: Sequence, error: MiniInferError, updates: StepUpdates, now: float
    ) -> None:
        """Ends a sequence alone with an error."""
        if error.reason is ErrorReason.NUMERICAL_ERROR:
            self.blocks.condemn(sequence)
        self._end(sequence, now)
        updates.failures.append((sequence.key, error))

    def _end(self, sequence: Sequence, now: float) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._admission.completions.note_completion(now, saturated=bool(self._waiting))
        else:
            self._waiting.remove(sequence)
        del self._sequences[sequence.key]
        self._deadlines.drop(sequence.key)
        sequence.status = SequenceStatus.ENDED
        if sequence.grammar is not None:
            sequence.grammar.cancel()
        self._release_if_done(sequence)

    def _release_if_done(self, sequence: Sequence) -> None:
        """Frees an ended sequence's blocks unless a launched step still reads or writes them."""
        if sequence.num_in_flight == 0:
            self.blocks.release(sequence)
