"""Decides what each step computes: who joins, who goes on, who loses its blocks, who is done.

Continuous batching in the manner of Orca (Yu et al., OSDI 2022): the batch is made anew at each
step, so sequences join and leave at any step. There are no prefill or decode phases, only
sequences with tokens that are not computed yet: running ones are served first, in order of
arrival, and what is left of the step's token budget goes to those that wait. When blocks run out
the latest arrival loses its blocks and is computed again later (preemption by recompute, as in
Kwon et al., SOSP 2023).

No tensors, no sockets; one thread.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import NO_STOP_TOKEN, FinishAccounting, FinishCode

from mini_infer_engine.batch import ScheduledBatch, ScheduledRow, StepTokens, build_batch
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.sequence import Sequence, SequenceStatus, StreamKey


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a step did for one sequence.

    Attributes:
        key: The sequence.
        start: Output position of the first of
        token_ids: its new ids, perhaps none.
        finish_code: How it ended, or RUNNING.
        stop_token_id: The id that ended it, or `NO_STOP_TOKEN`.
        accounting: Where its time went, once it has ended.
        error: Why it failed. A failed sequence has no finish code.
    """

    key: StreamKey
    start: int
    token_ids: list[int] = field(default_factory=list)
    finish_code: FinishCode = FinishCode.RUNNING
    stop_token_id: int = NO_STOP_TOKEN
    accounting: FinishAccounting | None = None
    error: MiniInferError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of the scheduler, as `EngineConfig` names them; all at least 1."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int


class Scheduler:
    """The waiting queue and the running batch.

    A sequence is in exactly one of them from `add` until its last update; its blocks go back to
    the pool when it has ended and no launched step names it any more.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        """Makes an idle scheduler over a pool that it alone uses."""
        self._pool = pool
        self._limits = limits
        self._sequences: dict[StreamKey, Sequence] = {}
        self._waiting: OrderedDict[StreamKey, Sequence] = OrderedDict()
        self._running: list[Sequence] = []  # in order of arrival
        self._launched: dict[int, list[ScheduledRow]] = {}  # rows of the steps under way
        self._updates: list[SequenceUpdate] = []  # of sequences that ended outside of a step
        self._zero_blocks: list[int] = []
        self.num_steps = 0
        self.num_preemptions = 0

    # --- queues ---------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to schedule and nothing to report."""
        return not self._sequences and not self._updates

    @property
    def num_running(self) -> int:
        """Sequences that take part in steps."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks and wait for a step."""
        return len(self._waiting)

    @property
    def limits(self) -> SchedulerLimits:
        """The bounds that it was made with."""
        return self._limits

    def keys_of(self, owner: bytes) -> list[StreamKey]:
        """The sequences of one gateway that have not ended."""
        return [key for key in self._sequences if key.owner == owner]

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            MiniInferError: DUPLICATE_REQUEST_ID; QUEUE_FULL; or KV_EXHAUSTED where the sequence
                could not run to its end even with all blocks for itself.
        """
        if sequence.key in self._sequences:
            message = f"stream {sequence.key.stream} exists already"
            raise MiniInferError(ErrorReason.DUPLICATE_REQUEST_ID, message)
        if len(self._waiting) >= self._limits.max_queued_requests:
            message = f"{len(self._waiting)} requests wait already: try again later"
            raise MiniInferError(ErrorReason.QUEUE_FULL, message)
        needed = self._pool.blocks_for(sequence.max_num_tokens)
        if needed > self._pool.num_blocks:
            raise MiniInferError(
                ErrorReason.KV_EXHAUSTED,
                f"prompt and max_tokens need {needed} blocks of the KV cache, which has "
                f"{self._pool.num_blocks}: lower max_tokens or give the engine more memory",
                {"limit": str(self._pool.num_blocks), "needed": str(needed)},
            )
        self._sequences[sequence.key] = sequence
        self._waiting[sequence.key] = sequence

    def abort(self, key: StreamKey, *, report: bool = False) -> bool:
        """Ends a sequence at once.

        Args:
            key: The sequence.
            report: Whether an update that says ABORTED is wanted.

        Returns:
            Whether there was such a sequence.
        """
        sequence = self._sequences.get(key)
        if sequence is None:
            return False
        if report:
            self._end_outside_step(sequence, FinishCode.ABORTED)
        else:
            self._end(sequence)
        return True

    # --- a step ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledBatch:
        """Chooses the next step's work; the batch is empty where there is none.

        Args:
            now: Monotonic time; sequences whose deadline has passed end first.
        """
        self._expire(now)
        rows = self._continue_running()
        budget = self._limits.max_num_batched_tokens - sum(row.num_tokens for row in rows)
        rows += self._admit_waiting(budget)
        if not rows:
            return build_batch(self.num_steps, [], [])
        # Stable: order of arrival within rows of one token and within the others.
        rows.sort(key=lambda row: row.num_tokens > 1)
        self.num_steps += 1
        for row in rows:
            row.sequence.num_in_flight += 1
            row.sequence.times.note_step(self.num_steps)
        self._launched[self.num_steps] = rows
        batch = build_batch(self.num_steps, rows, self._zero_blocks)
        self._zero_blocks = []
        return batch

    def finish_step(
        self, batch: ScheduledBatch, tokens: StepTokens, now: float
    ) -> list[SequenceUpdate]:
        """Takes a step's tokens in and says what became of its sequences.

        Args:
            batch: A batch that `schedule` gave.
            tokens: What the runner chose for it.
            now: Monotonic time.

        Returns:
            An update for each sequence that got tokens or has ended since the step before.
        """
        updates, self._updates = self._updates, []
        chosen = iter(zip(tokens.token_ids, tokens.finite, strict=True))
        for row in self._launched.pop(batch.step, []) if not batch.is_empty else []:
            sequence = row.sequence
            sequence.num_in_flight -= 1
            token_ids, finite = next(chosen) if row.samples else ([], True)
            if sequence.status is SequenceStatus.ENDED:
                self._release_if_done(sequence)
                continue
            sequence.num_computed_tokens += row.num_tokens
            if not finite:
                updates.append(self._fail(sequence))
            elif token_ids:
                updates.append(self._append(sequence, token_ids, now))
        return updates

    def check_integrity(self) -> None:
        """Checks every invariant of the queues and of the pool.

        Raises:
            AssertionError: Where one does not hold.
        """
        launched = [row.sequence for rows in self._launched.values() for row in rows]
        everyone = {id(each): each for each in [*self._sequences.values(), *launched]}
        self._pool.check_integrity(each.block_table for each in everyone.values())
        running = {each.key for each in self._running}
        assert len(running) == len(self._running) <= self._limits.max_num_seqs
        assert not running & self._waiting.keys(), "a sequence is in both queues"
        assert running | self._waiting.keys() == self._sequences.keys(), "a sequence is lost"
        arrivals = [each.times.arrival for each in self._running]
        assert arrivals == sorted(arrivals), "the running batch is out of order"
        for sequence in self._waiting.values():
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.block_table, f"{sequence} waits with blocks"
        for sequence in self._running:
            assert sequence.status is SequenceStatus.RUNNING
            assert sequence.num_computed_tokens < sequence.num_tokens
        if not self._sequences and not launched:
            assert self._pool.num_used == 0, "an idle scheduler holds blocks"

    # --- how schedule chooses -------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        late = [
            each
            for each in self._sequences.values()
            if each.deadline is not None and each.deadline <= now
        ]
        for sequence in late:
            self._end_outside_step(sequence, FinishCode.DEADLINE)

    def _continue_running(self) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        budget = self._limits.max_num_batched_tokens
        index = 0
        # Preemption shortens the list from its end, never before `index`.
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if not self._make_room(sequence, num_tokens):
                break
            rows.append(ScheduledRow.of(sequence, num_tokens))
            budget -= num_tokens
            index += 1
        return rows

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives a running sequence blocks for more tokens, taking them from later arrivals."""
        needed = self._missing_blocks(sequence, sequence.num_computed_tokens + num_tokens)
        while needed > self._pool.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._pool.allocate(needed)
        return True

    def _admit_waiting(self, budget: int) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        while self._waiting and budget > 0 and len(self._running) < self._limits.max_num_seqs:
            sequence = next(iter(self._waiting.values()))
            # Room for all of it, not just for this step's part: a sequence that joined without
            # would soon have to leave again.
            needed = self._pool.blocks_for(sequence.num_tokens)
            if needed > self._pool.num_free:
                break
            del self._waiting[sequence.key]
            sequence.block_table = self._pool.allocate(needed)
            sequence.status = SequenceStatus.RUNNING
            bisect.insort(self._running, sequence, key=lambda each: each.times.arrival)
            num_tokens = min(sequence.num_tokens, budget)
            rows.append(ScheduledRow.of(sequence, num_tokens))
            budget -= num_tokens
        return rows

    def _missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, self._pool.blocks_for(num_tokens) - len(sequence.block_table))

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks and queues it before all that wait."""
        self._running.remove(sequence)
        self._pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self._waiting[sequence.key] = sequence
        self._waiting.move_to_end(sequence.key, last=False)

    # --- how sequences end ----------------------------------------------------------------------

    def _append(self, sequence: Sequence, token_ids: Iterable[int], now: float) -> SequenceUpdate:
        start, num_turned_together = sequence.num_output_tokens, sequence.num_turned_together
        code = FinishCode.RUNNING
        kept: list[int] = []
        for token_id in token_ids:
            code = sequence.append(token_id)
            kept.append(token_id)
            if code is not FinishCode.RUNNING:
                break
        sequence.num_computed_tokens += len(kept) - 1
        if sequence.num_turned_together != num_turned_together:
            sequence.num_computed_tokens = 0
        sequence.times.note_tokens(now)
        if code is FinishCode.RUNNING:
            return SequenceUpdate(sequence.key, start, kept)
        self._end(sequence)
        stop_token_id = kept[-1] if code is FinishCode.STOP_TOKEN else NO_STOP_TOKEN
        accounting = sequence.times.accounting(sequence.num_preemptions)
        return SequenceUpdate(sequence.key, start, kept, code, stop_token_id, accounting)

    def _fail(self, sequence: Sequence) -> SequenceUpdate:
        self._zero_blocks += sequence.block_table
        self._end(sequence)
        message = (
            "the model's logits are not finite numbers: the weights or the prompt are at fault"
        )
        error = MiniInferError(ErrorReason.NUMERICAL_ERROR, message)
        return SequenceUpdate(sequence.key, sequence.num_output_tokens, error=error)

    def _end_outside_step(self, sequence: Sequence, code: FinishCode) -> None:
        self._end(sequence)
        accounting = sequence.times.accounting(sequence.num_preemptions)
        start = sequence.num_output_tokens
        update = SequenceUpdate(sequence.key, start, finish_code=code, accounting=accounting)
        self._updates.append(update)

    def _end(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            del self._waiting[sequence.key]
        del self._sequences[sequence.key]
        sequence.status = SequenceStatus.ENDED
        self._release_if_done(sequence)

    def _release_if_done(self, sequence: Sequence) -> None:
        """Frees an ended sequence's blocks unless a launched step still reads or writes them."""
        if sequence.num_in_flight == 0:
            self._pool.release(sequence.block_table)
            sequence.block_table = []
