"""Any interleaving of what can happen to the scheduler, against a plain model of each stream.

The model: a stream gets just its own tokens, once and in order, and each step reads only what was
computed for the text that it continues (`block_contents.py`). `make soak` runs it for hours.
"""

from __future__ import annotations

import os

import numpy as np
from engine.block_contents import BlockContents
from engine.scheduling import (
    BLOCK_SIZE,
    EOS,
    SWAP_IS_CHEAP,
    SWAP_IS_DEAR,
    expected_output,
    make,
    run,
    scheduler_of,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import FinishCode
from mini_infer_engine.batch import ScheduledBatch, StepTokens
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_costs import StepCosts
from mini_infer_engine.step_updates import SequenceUpdate

NUM_BLOCKS = 10
BUDGET = 12
EXAMPLES = int(os.environ.get("SOAK_EXAMPLES", "500"))
STEPS = int(os.environ.get("SOAK_STEPS", "50"))

scopes = st.sampled_from([None, ("", ""), ("", "salt"), ("tenant", "")])


class SchedulerMachine(RuleBasedStateMachine):
    """Streams come, share, lose and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = BlockContents(NUM_BLOCKS, 6, BLOCK_SIZE)
        self.scheduler = scheduler_of(
            NUM_BLOCKS,
            max_num_seqs=4,
            budget=BUDGET,
            num_host_blocks=6,
            caches=True,
            max_queued=12,
            on_free=self.contents.poison,
            priority_ageing_s=3.0,
            kv_watermark=0.1,
        )
        self.pool = self.scheduler.blocks.pool
        self.sequences: dict[StreamKey, Sequence] = {}
        self.outputs: dict[StreamKey, list[int]] = {}
        self.aborted: set[StreamKey] = set()  # their last update is still to come
        self.next_stream = 0
        self.now = 0.0

    @property
    def live(self) -> list[StreamKey]:
        return [key for key in self.sequences if key not in self.aborted]

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=20),
        max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 5),
        num_siblings=st.sampled_from([0, 0, 0, 1, 2]),
        priority=st.integers(-1, 1),
        life=st.none() | st.integers(-1, 8),
        scope=scopes,
        turning_point=st.none() | st.integers(1, 30),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        min_tokens: int,
        num_siblings: int,
        priority: int,
        life: int | None,
        scope: tuple[str, ...] | None,
        turning_point: int | None,
    ) -> None:
        """A request, or one for several choices of the same prompt (which forks)."""
        group: list[Sequence] = []
        for _ in range(1 + num_siblings):
            sequence = make(
                self.next_stream,
                len(prompt),
                max_tokens,
                turning_point,
                prompt=prompt,
                scope=scope,
                priority=priority,
                deadline=None if life is None else self.now + life,
                arrival=self.now,
                parent=group[0] if group else None,
                min_tokens=min_tokens,
            )
            self.next_stream += 1
            group.append(sequence)
        num_waiting = self.scheduler.num_waiting
        try:
            self.scheduler.add(*group, now=self.now)
        except MiniInferError as error:
            is_full = error.reason is ErrorReason.QUEUE_FULL and num_waiting + len(group) > 12
            if not is_full and error.reason is not ErrorReason.DEADLINE_UNREACHABLE:
                raise
            return
        for sequence in group:
            self.sequences[sequence.key] = sequence
            self.outputs[sequence.key] = []

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 99), report=st.booleans())
    def abort(self, choice: int, report: bool) -> None:
        key = self.live[choice % len(self.live)]
        if report:
            self.aborted.add(key)
        else:
            del self.sequences[key]
        assert self.scheduler.abort(key, self.now, report=report)
        assert not self.scheduler.abort(key, self.now)

    @rule(tokens_per_row=st.integers(1, 3), aborts=st.booleans(), fails=st.booleans())
    def step(self, tokens_per_row: int = 1, aborts: bool = False, fails: bool = False) -> None:
        """A step, perhaps with an abort while it is under way and a row that comes to nothing."""
        self.now += 0.25
        batch = self.scheduler.schedule(self.now)
        assert batch.num_tokens == batch.num_scheduled_tokens.sum() <= BUDGET
        self.contents.run(batch, self.sequences)
        room = self.contents.room(batch, self.sequences)
        tokens = run(batch, min(tokens_per_row, 1 + room))
        self.contents.run_on(batch, tokens, self.sequences)
        if aborts and batch.keys:
            num_used = self.pool.num_used
            del self.sequences[batch.keys[0]]
            assert self.scheduler.abort(batch.keys[0], self.now)
            assert self.pool.num_used == num_used, "a launched step names these blocks"
        if fails and len(tokens.statuses):
            tokens = StepTokens(tokens.token_ids, np.arange(len(tokens.statuses)) == 0)
        for update in self.scheduler.finish_step(batch, tokens, self.now):
            self.receive(update)

    @precondition(lambda self: self.sequences)
    @rule(
        num_steps=st.integers(2, 20),
        lag=st.sampled_from([0, 0, 0.25, 5]),
        aborts=st.booleans(),
        fails=st.booleans(),
    )
    def steps_ahead(self, num_steps: int, lag: float, aborts: bool, fails: bool) -> None:
        """Steps that are scheduled, where they can be, before those before them are finished.

        Deadlines may pass in between, a sequence may be aborted that both steps name, and a row
        may come to nothing whose next token is being computed.
        """
        self.now += 0.25
        batch = self.scheduler.schedule(self.now)
        for _ in range(num_steps):
            self.now += lag
            ahead = self.scheduler.schedule_ahead(batch, self.now)
            if aborts and ahead is not None:
                aborts = False
                num_used = self.pool.num_used
                if self.scheduler.abort(ahead.keys[0], self.now):
                    del self.sequences[ahead.keys[0]]
                    assert self.pool.num_used == num_used, "launched steps name these blocks"
            self.finish_one(batch, ahead, fails and ahead is not None)
            fails = fails and ahead is None
            batch = ahead or self.scheduler.schedule(self.now)
        self.finish_one(batch, None, fails=False)

    def finish_one(self, batch: ScheduledBatch, ahead: ScheduledBatch | None, fails: bool) -> None:
        """Computes a step and takes its tokens in, one a row; `ahead` is launched already."""
        if batch.keys:
            launched = self.scheduler._launched[batch.step].sequences
            self.contents.run(batch, {each.key: each for each in launched})
        tokens = run(batch, 1)
        if fails and len(tokens.statuses):
            tokens = StepTokens(tokens.token_ids, np.arange(len(tokens.statuses)) == 0)
        if ahead is not None:
            sources = (-1 - ahead.token_ids).tolist()
            keys = [batch.keys[batch.sampling.rows[source]] for source in sources]
            assert keys == ahead.keys, "an unknown token is another sequence's"
        for update in self.scheduler.finish_step(batch, tokens, self.now):
            self.receive(update)

    @precondition(lambda self: self.scheduler.num_running)
    @rule(choice=st.integers(0, 99), swaps=st.booleans())
    def preempt(self, choice: int, swaps: bool) -> None:
        """Any running sequence loses its blocks, to the host or altogether."""
        running = list(self.scheduler._running)
        preemption = self.scheduler._preemption
        preemption._costs = StepCosts(SWAP_IS_CHEAP if swaps else SWAP_IS_DEAR)
        preemption.preempt(running[choice % len(running)], self.now)

    @rule()
    def evict(self) -> None:
        """All that is only cached is forgotten."""
        self.pool.release(self.pool.allocate(self.pool.num_free))
        assert self.pool.num_cached == 0

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        """Classes improve, deadlines pass."""
        self.now += seconds

    @precondition(lambda self: self.sequences)
    @rule()
    def finish(self) -> None:
        """Steps until a stream ends."""
        num_streams = len(self.sequences)
        for _ in range(200):
            self.step()
            if len(self.sequences) < num_streams:
                return
        raise AssertionError("no stream ends")

    def receive(self, update: SequenceUpdate) -> None:
        sequence = self.sequences[update.key]
        output = self.outputs[update.key]
        if update.error is not None:
            assert update.error.reason is ErrorReason.NUMERICAL_ERROR
            del self.sequences[update.key]
            return
        assert update.start == len(output)
        output += update.token_ids
        expected = expected_output(sequence)
        if update.finish_code is FinishCode.RUNNING:
            assert output == expected[: len(output)]
            return
        del self.sequences[update.key]
        if update.finish_code is FinishCode.DEADLINE:
            assert sequence.deadline is not None
            assert sequence.deadline <= self.now
        elif update.finish_code is FinishCode.ABORTED:
            assert update.key in self.aborted
        else:
            assert output == expected
            assert (update.stop_token_id == EOS) == (update.finish_code is FinishCode.STOP_TOKEN)

    @invariant()
    def whole(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        for _ in range(3000):
            if self.scheduler.is_idle:
                break
            self.step()
        assert not self.sequences, "a sequence was never finished"
        assert self.pool.num_used == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
