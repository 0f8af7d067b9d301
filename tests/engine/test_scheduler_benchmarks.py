"""What the scheduler's benchmarks stand on: simulated time, and the contiguous baseline."""

from __future__ import annotations

import numpy as np
import pytest
from deadlines import NUM_BLOCKS, TryingReplay, draw_deadlines, new_scheduler, run_trace
from hypothesis import given
from hypothesis import strategies as st
from kv_utilisation import ContiguousStore, measure_contiguous
from mini_infer.errors import ErrorReason
from mini_infer.messages import FinishCode
from workloads import Replay, Request, draw_requests, step_seconds, work_of

NUM_SLOTS = 40


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
def test_regions_never_meet_and_gaps_grow_together(steps: list[tuple[bool, int]]) -> None:
    store = ContiguousStore(NUM_SLOTS)
    taken: list[tuple[int, int]] = []
    for takes, size in steps:
        if takes:
            slots = {slot for region in taken for slot in range(*region)}
            fits = [
                start
                for start in range(NUM_SLOTS - size + 1)
                if slots.isdisjoint(range(start, start + size))
            ]
            region = store.take(size)
            assert region == ((fits[0], fits[0] + size) if fits else None)
            taken += [region] if region else []
        elif taken:
            store.give_back(taken.pop(size % len(taken)))
        assert store.num_free == NUM_SLOTS - sum(end - start for start, end in taken)


def test_a_contiguous_region_fills_up_token_by_token() -> None:
    requests = [
        Request(stream=stream, arrival=0.0, prompt_ids=[5] * 3, num_output_tokens=5, max_tokens=7)
        for stream in range(2)
    ]
    result = measure_contiguous("one at a time", requests, 10, lambda _: 10)
    assert result["num_steps"] == 10
    # The second one waits for five steps. After the last of them the first one has left.
    assert result["num_steps_with_queue"] == 5
    assert result["pool"] == pytest.approx(np.mean([0.3, 0.4, 0.5, 0.6, 0.0]))
    assert result["handed_out"] == pytest.approx(np.mean([0.3, 0.4, 0.5, 0.6, 1.0]))


def test_a_replay_computes_each_token_once_and_gives_each_request_its_output() -> None:
    requests = draw_requests(40, 50.0, seed=4)
    replay = Replay(new_scheduler(), requests, deadlines={})
    seconds = 0.0
    num_tokens = 0
    while not replay.is_done:
        batch = replay.step()
        num_tokens += batch.num_tokens
        seconds += step_seconds(work_of(batch))
    assert {each.finish_code for each in replay.outcomes.values()} <= {
        FinishCode.STOP_TOKEN,
        FinishCode.LENGTH,  # where just as much was allowed
    }
    assert num_tokens == sum(len(each.prompt_ids) + each.num_output_tokens - 1 for each in requests)
    assert replay.now == pytest.approx(seconds + requests[0].arrival, rel=0.02)
    for request in requests:
        outcome = replay.outcomes[request.stream]
        assert outcome.first_token is not None
        assert outcome.ended is not None
        assert request.arrival < outcome.first_token <= outcome.ended


def test_steps_spent_on_the_expired_are_noticed() -> None:
    requests = draw_requests(400, 100.0, seed=5)
    deadlines = draw_deadlines(requests)
    replay = Replay(new_scheduler(), requests, deadlines={})
    with pytest.raises(AssertionError, match="has expired"):
        run_trace(replay, deadlines, cancels=False, stops=True)


def test_refused_requests_are_tried_beside_the_trace_and_do_not_change_it() -> None:
    requests = draw_requests(600, 80.0, seed=6)
    deadlines = {each.stream: each.arrival + 3.0 for each in requests}
    plain = Replay(new_scheduler(), requests, deadlines)
    trying = TryingReplay(requests, deadlines, num_trials=3)
    for replay in (plain, trying):
        run_trace(replay, deadlines, cancels=False, stops=True)
    assert trying.outcomes == plain.outcomes
    assert len(trying.trials) == 3
    for stream, trial in trying.trials.items():
        assert trying.outcomes[stream].refusal is ErrorReason.DEADLINE_UNREACHABLE
        assert trial.refusal is None
        assert trial.finish_code is not FinishCode.RUNNING
    assert trying.scheduler.blocks.pool.num_free == NUM_BLOCKS
