"""The scheduler against a model of what sequences must get, with no tensors anywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import FinishCode
from mini_infer.sampling_params import ResolvedSampling
from mini_infer_engine.batch import ScheduledBatch, StepTokens
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.scheduler import Scheduler, SchedulerLimits, SequenceUpdate
from mini_infer_engine.sequence import Sequence, StreamKey

EOS = 7
BLOCK_SIZE = 4


def next_token(stream: int, position: int) -> int:
    """What the stand-in for a model makes; sometimes EOS."""
    return (stream * 31 + position * 17) % 29


def make(
    stream: int,
    num_prompt: int,
    max_tokens: int,
    turning_point: int | None = None,
    **options: object,
) -> Sequence:
    sampling = ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=stream, max_tokens=max_tokens, **options
    )
    prompt = [100 + stream] * num_prompt
    return Sequence(
        StreamKey(b"g", stream),
        prompt,
        sampling,
        eos_token_ids=(EOS,),
        turning_point=turning_point,
    )


def expected_output(sequence: Sequence) -> list[int]:
    output: list[int] = []
    sampling = sequence.sampling
    while len(output) < sampling.max_tokens:
        token = next_token(sequence.key.stream, len(output))
        output.append(token)
        if token in sequence.end_ids and len(output) > sampling.min_tokens:
            break
    return output


def run(batch: ScheduledBatch, tokens_per_row: int = 1) -> StepTokens:
    rows = [
        [next_token(batch.keys[row].stream, position + offset) for offset in range(tokens_per_row)]
        for row, position in zip(
            batch.sampling.rows, batch.sampling.positions.tolist(), strict=True
        )
    ]
    return StepTokens(rows, [True] * len(rows))


def scheduler_of(num_blocks: int, *, max_num_seqs: int = 8, budget: int = 32) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_queued_requests=64
    )
    return Scheduler(BlockPool(num_blocks, BLOCK_SIZE), limits)


def drive(
    scheduler: Scheduler, after_step: Callable[[list[SequenceUpdate]], None] = lambda _: None
) -> dict[int, list[int]]:
    outputs: dict[int, list[int]] = {}
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        updates = scheduler.finish_step(batch, run(batch), 0.0)
        scheduler.check_integrity()
        for update in updates:
            output = outputs.setdefault(update.key.stream, [])
            assert update.start == len(output)
            output += update.token_ids
        after_step(updates)
    return outputs


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving gives each stream just its own tokens, once and in order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler_of(10, max_num_seqs=4, budget=12)
        self.sequences: dict[int, Sequence] = {}
        self.outputs: dict[int, list[int]] = {}
        self.next_stream = 0
        self.now = 0.0

    @rule(
        num_prompt=st.integers(1, 20),
        max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 5),
        life=st.none() | st.integers(1, 5),
        turning_point=st.none() | st.integers(1, 30),
    )
    def add(
        self,
        num_prompt: int,
        max_tokens: int,
        min_tokens: int,
        life: int | None,
        turning_point: int | None,
    ) -> None:
        sequence = make(
            self.next_stream, num_prompt, max_tokens, turning_point, min_tokens=min_tokens
        )
        sequence.deadline = None if life is None else self.now + life
        self.next_stream += 1
        self.scheduler.add(sequence)
        self.sequences[sequence.key.stream] = sequence
        self.outputs[sequence.key.stream] = []

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 99))
    def abort(self, choice: int) -> None:
        stream = list(self.sequences)[choice % len(self.sequences)]
        del self.sequences[stream]
        assert self.scheduler.abort(StreamKey(b"g", stream))
        assert not self.scheduler.abort(StreamKey(b"g", stream))

    @rule(tokens_per_row=st.integers(1, 3), abort_in_flight=st.booleans())
    def step(self, tokens_per_row: int, abort_in_flight: bool) -> None:
        self.now += 1
        batch = self.scheduler.schedule(self.now)
        assert batch.num_tokens == batch.num_scheduled_tokens.sum() <= 12
        if abort_in_flight and batch.keys:
            key = batch.keys[0]
            used = self.scheduler._pool.num_used
            del self.sequences[key.stream]
            assert self.scheduler.abort(key)
            assert self.scheduler._pool.num_used == used, "a launched step names these blocks"
        for update in self.scheduler.finish_step(batch, run(batch, tokens_per_row), self.now):
            self.receive(update)

    def receive(self, update: SequenceUpdate) -> None:
        stream = update.key.stream
        sequence = self.sequences[stream]
        output = self.outputs[stream]
        assert update.start == len(output)
        output += update.token_ids
        if update.finish_code is FinishCode.DEADLINE:
            assert sequence.deadline is not None
            assert sequence.deadline <= self.now
            del self.sequences[stream]
        elif update.finish_code is not FinishCode.RUNNING:
            assert output == expected_output(sequence)
            assert (update.stop_token_id == EOS) == (update.finish_code is FinishCode.STOP_TOKEN)
            del self.sequences[stream]
        else:
            assert output == expected_output(sequence)[: len(output)]

    @invariant()
    def whole(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        for _ in range(3000):
            if self.scheduler.is_idle:
                break
            self.step(1, False)
        assert not self.sequences, "a sequence was never finished"
        assert self.scheduler._pool.num_used == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase


def test_blocks_for_four_still_finish_sixteen() -> None:
    # Each of them comes to 4 blocks of 4 tokens: 8 prompt and 8 output tokens.
    scheduler = scheduler_of(16, max_num_seqs=16, budget=64)
    sequences = [make(stream, 8, 8) for stream in range(16)]
    for sequence in sequences:
        scheduler.add(sequence)
    outputs = drive(scheduler)
    assert outputs == {each.key.stream: expected_output(each) for each in sequences}
    assert scheduler.num_preemptions > 0


def test_the_latest_arrival_is_preempted_and_resumes_first() -> None:
    scheduler = scheduler_of(4, max_num_seqs=4, budget=64)
    first, second, third = (make(stream, 4, 11, ignore_eos=True) for stream in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    drive(scheduler)
    assert first.num_preemptions == 0
    assert second.num_preemptions > 0
    ends = [sequence.times.last_step_number for sequence in (first, second, third)]
    assert ends == sorted(ends)


def test_a_sequence_joins_while_another_runs() -> None:
    scheduler = scheduler_of(64)
    long, short = make(0, 4, 40, ignore_eos=True), make(1, 4, 3, ignore_eos=True)
    scheduler.add(long)
    steps: list[set[int]] = []

    def after_step(updates: list[SequenceUpdate]) -> None:
        steps.append({update.key.stream for update in updates})
        if len(steps) == 10:
            scheduler.add(short)

    drive(scheduler, after_step)
    assert steps[9:14] == [{0}, {0, 1}, {0, 1}, {0, 1}, {0}]
    assert len(steps) == 40


def test_a_prompt_above_the_budget_takes_several_steps_and_does_not_stop_others() -> None:
    scheduler = scheduler_of(64, budget=10)
    scheduler.add(make(0, 2, 20, ignore_eos=True))
    batch = scheduler.schedule(0.0)
    scheduler.finish_step(batch, run(batch), 0.0)
    scheduler.add(make(1, 25, 1))
    sizes = []
    for _ in range(3):
        batch = scheduler.schedule(0.0)
        assert batch.keys[0].stream == 0
        assert batch.num_decodes >= 1
        sizes.append(batch.num_scheduled_tokens.tolist())
        scheduler.finish_step(batch, run(batch), 0.0)
    assert sizes == [[1, 9], [1, 9], [1, 7]]


def test_refusals() -> None:
    scheduler = scheduler_of(4)
    with pytest.raises(MiniInferError, match="need 5 blocks") as refused:
        scheduler.add(make(0, 8, 9))
    assert refused.value.reason is ErrorReason.KV_EXHAUSTED
    scheduler.add(make(1, 8, 8))
    with pytest.raises(MiniInferError) as refused:
        scheduler.add(make(1, 1, 1))
    assert refused.value.reason is ErrorReason.DUPLICATE_REQUEST_ID
    for stream in range(2, 65):
        scheduler.add(make(stream, 1, 1))
    with pytest.raises(MiniInferError) as refused:
        scheduler.add(make(99, 1, 1))
    assert refused.value.reason is ErrorReason.QUEUE_FULL
    scheduler.check_integrity()


def test_rows_with_non_finite_logits_fail_alone_and_their_blocks_are_cleared() -> None:
    scheduler = scheduler_of(16)
    good, bad = make(0, 4, 6, ignore_eos=True), make(1, 4, 6, ignore_eos=True)
    scheduler.add(good)
    scheduler.add(bad)
    batch = scheduler.schedule(0.0)
    blocks = list(bad.block_table)
    tokens = StepTokens(run(batch).token_ids, [key.stream == 0 for key in batch.keys])
    updates = {each.key.stream: each for each in scheduler.finish_step(batch, tokens, 0.0)}
    assert updates[1].error is not None
    assert updates[1].error.reason is ErrorReason.NUMERICAL_ERROR
    assert updates[1].token_ids == []
    batch = scheduler.schedule(0.0)
    assert sorted(batch.zero_blocks) == sorted(blocks)
    scheduler.finish_step(batch, run(batch), 0.0)
    assert len(scheduler.schedule(0.0).zero_blocks) == 0


def test_min_tokens_bans_the_ends_and_then_lets_them_in() -> None:
    scheduler = scheduler_of(16)
    scheduler.add(make(0, 1, 8, min_tokens=2, stop_token_ids=[9]))
    banned = []
    for _ in range(4):
        batch = scheduler.schedule(0.0)
        banned.append(sorted(batch.sampling.banned_ids.tolist()))
        scheduler.finish_step(batch, StepTokens([[1]], [True]), 0.0)
    assert banned == [[EOS, 9], [EOS, 9], [], []]


def test_a_resumed_sequence_continues_at_its_output_position() -> None:
    scheduler = scheduler_of(16)
    sequence = make(3, 4, 12, ignore_eos=True)
    whole = expected_output(sequence)
    resumed = Sequence(
        sequence.key, [103] * 4, sequence.sampling, eos_token_ids=(), output_ids=whole[:5]
    )
    scheduler.add(resumed)
    batch = scheduler.schedule(0.0)
    (update,) = scheduler.finish_step(batch, run(batch), 0.0)
    assert (update.start, update.token_ids) == (5, whole[5:6])
    rest = []
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        for update in scheduler.finish_step(batch, run(batch), 0.0):
            rest += update.token_ids
    assert rest == whole[6:]


def test_behind_its_turning_point_a_sequence_is_computed_anew() -> None:
    scheduler = scheduler_of(16, budget=5)
    turned, other = make(1, 3, 6, 6, ignore_eos=True), make(2, 3, 6, 2, ignore_eos=True)
    scheduler.add(turned)
    scheduler.add(other)
    computed: dict[int, list[tuple[int, int, int]]] = {1: [], 2: []}
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        for row, key in enumerate(batch.keys):
            start = int(batch.num_computed_tokens[row])
            together = int(batch.num_turned_together[row])
            computed[key.stream].append(
                (start, start + int(batch.num_scheduled_tokens[row]), together)
            )
        scheduler.finish_step(batch, run(batch), 0.0)
        scheduler.check_integrity()
    # Its fourth output token makes 7: everything again, in steps of at most 5 tokens.
    assert [each[:2] for each in computed[1]][-3:] == [(0, 5), (5, 7), (7, 8)]
    assert [each[2] for each in computed[1]] == [3] * (len(computed[1]) - 3) + [7] * 3
    # A prompt that lies behind it already is computed once, as one text.
    assert [each[2] for each in computed[2]] == [3] * len(computed[2])
    assert sorted(each[0] for each in computed[2]) == [each[0] for each in computed[2]]


@pytest.mark.parametrize(
    ("num_prompt", "num_output", "together"),
    [(3, 0, 3), (3, 3, 3), (3, 4, 7), (3, 9, 7), (6, 1, 7), (7, 2, 7), (8, 2, 8)],
)
def test_a_resumed_sequence_is_turned_as_it_was(
    num_prompt: int, num_output: int, together: int
) -> None:
    sampling = make(1, 1, 20).sampling
    resumed = Sequence(
        StreamKey(b"g", 1),
        [5] * num_prompt,
        sampling,
        eos_token_ids=(),
        output_ids=[6] * num_output,
        turning_point=6,
    )
    assert resumed.num_turned_together == together
