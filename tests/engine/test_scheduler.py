"""What the scheduler decides, case by case, with no tensors anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from engine.scheduling import EOS, drive, expected_output, make, run, scheduler_of
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer_engine.batch import RowStatus, StepTokens
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_updates import SequenceUpdate


def test_blocks_for_four_still_finish_sixteen() -> None:
    # Each of them comes to 4 blocks of 4 tokens: 8 prompt and 8 output tokens.
    scheduler = scheduler_of(16, max_num_seqs=16, budget=64)
    sequences = [make(stream, 8, 8) for stream in range(16)]
    for sequence in sequences:
        scheduler.add(sequence, now=0.0)
    outputs = drive(scheduler)
    assert outputs == {each.key.stream: expected_output(each) for each in sequences}
    assert scheduler.num_preemptions > 0


def test_the_latest_arrival_is_preempted_and_resumes_first() -> None:
    scheduler = scheduler_of(4, max_num_seqs=4, budget=64)
    first, second, third = (make(stream, 4, 11, ignore_eos=True) for stream in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence, now=0.0)
    ended: list[int] = []

    def after_step(updates: list[SequenceUpdate]) -> None:
        ended.extend(update.key.stream for update in updates if update.accounting)

    drive(scheduler, after_step)
    assert first.num_preemptions == 0
    assert second.num_preemptions > 0
    assert ended == [0, 1, 2]


def test_a_sequence_joins_while_another_runs() -> None:
    scheduler = scheduler_of(64)
    long, short = make(0, 4, 40, ignore_eos=True), make(1, 4, 3, ignore_eos=True)
    scheduler.add(long, now=0.0)
    steps: list[set[int]] = []

    def after_step(updates: list[SequenceUpdate]) -> None:
        steps.append({update.key.stream for update in updates})
        if len(steps) == 10:
            scheduler.add(short, now=0.0)

    drive(scheduler, after_step)
    assert steps[9:14] == [{0}, {0, 1}, {0, 1}, {0, 1}, {0}]
    assert len(steps) == 40


def test_a_prompt_above_the_budget_takes_several_steps_and_does_not_stop_others() -> None:
    scheduler = scheduler_of(64, budget=10)
    scheduler.add(make(0, 2, 20, ignore_eos=True), now=0.0)
    batch = scheduler.schedule(0.0)
    scheduler.finish_step(batch, run(batch), 0.0)
    scheduler.add(make(1, 25, 1), now=0.0)
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
        scheduler.add(make(0, 8, 10), now=0.0)
    assert refused.value.reason is ErrorReason.KV_EXHAUSTED
    scheduler.add(make(1, 8, 8), now=0.0)
    with pytest.raises(MiniInferError) as refused:
        scheduler.add(make(1, 1, 1), now=0.0)
    assert refused.value.reason is ErrorReason.DUPLICATE_REQUEST_ID
    for stream in range(2, 73):  # 8 of them find a place
        scheduler.add(make(stream, 1, 1), now=0.0)
    with pytest.raises(MiniInferError) as refused:
        scheduler.add(make(99, 1, 1), now=0.0)
    assert refused.value.reason is ErrorReason.QUEUE_FULL
    scheduler.check_integrity()


def test_a_sequence_may_fill_every_slot() -> None:
    # 8 prompt and 9 output tokens, of which the last is never computed.
    scheduler = scheduler_of(4)
    sequence = make(0, 8, 9, ignore_eos=True)
    scheduler.add(sequence, now=0.0)
    assert drive(scheduler) == {0: expected_output(sequence)}


def test_rows_with_non_finite_logits_fail_alone_and_their_blocks_are_cleared() -> None:
    scheduler = scheduler_of(16)
    good, bad = make(0, 4, 6, ignore_eos=True), make(1, 4, 6, ignore_eos=True)
    scheduler.add(good, now=0.0)
    scheduler.add(bad, now=0.0)
    batch = scheduler.schedule(0.0)
    blocks = list(bad.block_table)
    statuses = np.array([key.stream * RowStatus.NON_FINITE for key in batch.keys])
    tokens = StepTokens(run(batch).token_ids, statuses)
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
    scheduler.add(make(0, 1, 8, min_tokens=2, stop_token_ids=[9]), now=0.0)
    banned = []
    for _ in range(4):
        batch = scheduler.schedule(0.0)
        banned.append(sorted(batch.sampling.bias_ids.tolist()))
        scheduler.finish_step(batch, StepTokens(np.array([[1]]), np.array([RowStatus.OK])), 0.0)
    assert banned == [[EOS, 9], [EOS, 9], [], []]


def test_a_resumed_sequence_continues_at_its_output_position() -> None:
    scheduler = scheduler_of(16)
    sequence = make(3, 4, 12, ignore_eos=True)
    whole = expected_output(sequence)
    resumed = Sequence(
        sequence.key, [103] * 4, sequence.sampling, eos_token_ids=(), output_ids=whole[:5]
    )
    scheduler.add(resumed, now=0.0)
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
    scheduler.add(turned, now=0.0)
    scheduler.add(other, now=0.0)
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
    # Its fourth output token makes 7: everything again, beside the other one's token.
    assert [each[:2] for each in computed[1]][-3:] == [(0, 4), (4, 7), (7, 8)]
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
