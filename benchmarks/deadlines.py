"""Requests that complete in time at one and a half times the capacity, beside servers that queue.

    python benchmarks/deadlines.py

Replays requests with lognormal lengths and Poisson arrivals through the real scheduler, in
simulated time. A deadline is the arrival plus 2 to 10 times (drawn evenly) what the request takes
on an idle machine. Capacity is what a saturated run of the same requests completes per second.
Three servers get the same trace:

- *deadline aware*: the scheduler knows the deadlines: it refuses, orders and stops by them;
- *FCFS*: it does not, and serves those whose clients have gone; its queue grows without end, so
  the longer the trace, the less of it is in time;
- *FCFS, cancelled*: it does not, but each client cancels at its deadline.

To judge the estimate by which requests are refused, some of those refused are played through: a
copy of the scheduler takes the request in, and the trace goes on until it has ended.

Writes `benchmarks/results/deadlines.json` and exits with 1 where the bound is missed.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from mini_infer.config import EngineConfig
from mini_infer.errors import ErrorReason
from mini_infer.messages import FinishCode
from mini_infer_engine.admission import Admission
from mini_infer_engine.alarms import Alarms
from mini_infer_engine.build_scheduler import build_scheduler
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.step_costs import NO_WORK
from workloads import (
    ROUGH_GUESS,
    Outcome,
    Replay,
    Request,
    draw_requests,
    print_cases,
    step_seconds,
    write_results,
)

RESULTS = Path(__file__).parent / "results" / "deadlines.json"
BOUND = 1.5
"""Requests completed in time over those of FCFS."""
LOAD = 1.5
SEED = 21
TIMES_UNLOADED = (2.0, 10.0)
CONFIG = EngineConfig(
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    max_queued_requests=100_000,
    enable_prefix_caching=False,
)
NUM_BLOCKS = 16_384
"""Enough for all that run: places are what is scarce."""
MEASURES = (
    *("in_time", "aware_over_this", "num_in_time", "num_late", "num_cancelled", "num_refused"),
    *("num_expired_waiting", "num_expired_running", "useful_tokens"),
    *("accepted_first_token_in_time", "num_tried", "tried_first_token_in_time", "tried_in_time"),
    "is_met",
)


def unloaded_s(request: Request) -> float:
    """What a request takes on an idle machine."""
    num_prompt_tokens, num_decodes = len(request.prompt_ids), request.num_output_tokens - 1
    prefill_s = step_seconds(NO_WORK.with_chunk(num_prompt_tokens, 0))
    mean_context = num_prompt_tokens + num_decodes // 2
    return prefill_s + num_decodes * step_seconds(NO_WORK.with_row(mean_context))


def new_scheduler() -> Scheduler:
    """An idle one."""
    return build_scheduler(CONFIG, num_blocks=NUM_BLOCKS, num_host_blocks=0, costs=ROUGH_GUESS)


def measure_capacity(requests: Sequence[Request]) -> float:
    """Requests that complete per second while others wait, its first and last ones left out."""
    replay = Replay(new_scheduler(), requests, deadlines={})
    while not replay.is_done:
        replay.step()
    ends = sorted(each.ended for each in replay.outcomes.values() if each.ended is not None)
    first, last = len(ends) // 10, len(ends) * 9 // 10
    return (last - first) / (ends[last] - ends[first])


def draw_deadlines(requests: Sequence[Request]) -> dict[int, float]:
    """When each client stops waiting, by stream."""
    times = np.random.default_rng(SEED).uniform(*TIMES_UNLOADED, len(requests))
    return {
        request.stream: request.arrival + float(factor) * unloaded_s(request)
        for request, factor in zip(requests, times, strict=True)
    }


class TryingReplay(Replay):
    """A replay that also finds out what would have become of requests that were refused.

    Attributes:
        trials: Outcomes of those that were tried, by stream.
    """

    def __init__(
        self, requests: Sequence[Request], deadlines: Mapping[int, float], num_trials: int
    ) -> None:
        """Starts at time 0, with a scheduler that knows the deadlines.

        Args:
            requests: In order of arrival.
            deadlines: By stream.
            num_trials: How many are tried, the first ones.
        """
        super().__init__(new_scheduler(), requests, deadlines)
        self.trials: dict[int, Outcome] = {}
        self._shared = (requests, deadlines)  # no step changes them, so copies need none of them
        self._num_trials = num_trials

    def submit(self, request: Request) -> None:
        """Also tries it, if it was refused for its deadline."""
        super().submit(request)
        refusal = self.outcomes[request.stream].refusal
        is_late = refusal is ErrorReason.DEADLINE_UNREACHABLE
        if is_late and len(self.trials) < self._num_trials:
            self.trials[request.stream] = self._try(request)

    def _try(self, request: Request) -> Outcome:
        """Takes a refused request in after all, and goes on until it has ended."""
        trial = copy.deepcopy(self, {id(each): each for each in self._shared})
        trial._num_trials = 0
        with patch.object(Admission, "check"):
            trial.submit(request)
        while trial.outcomes[request.stream].ended is None:
            trial.step()
        return trial.outcomes[request.stream]


def is_complete(outcome: Outcome) -> bool:
    """Whether a request has got all of its output."""
    return outcome.finish_code in (FinishCode.STOP_TOKEN, FinishCode.LENGTH)


def is_in_time(time: float | None, deadline: float) -> bool:
    """Whether something has happened, by the deadline."""
    return time is not None and time <= deadline


def run_trace(
    replay: Replay, deadlines: Mapping[int, float], *, cancels: bool, stops: bool
) -> Counter[int]:
    """Plays a trace to its end.

    Args:
        replay: At its start.
        deadlines: Of all requests, by stream.
        cancels: Whether clients cancel at their deadlines.
        stops: Whether a step must not compute what has expired before it; this is checked.

    Returns:
        Tokens computed, by stream.
    """
    cancellations: Alarms[int] = Alarms()
    for stream, deadline in deadlines.items():
        cancellations.set(stream, deadline)
    num_computed: Counter[int] = Counter()
    while not replay.is_done:
        if cancels:
            for stream in cancellations.take_due(replay.now):
                replay.cancel(stream)
        batch = replay.step()
        for key, count in zip(batch.keys, batch.num_scheduled_tokens.tolist(), strict=True):
            assert not stops or deadlines[key.stream] > replay.step_began, f"{key} has expired"
            num_computed[key.stream] += count
    return num_computed


def result(
    case: str, replay: Replay, deadlines: Mapping[int, float], num_computed: Counter[int]
) -> dict[str, Any]:
    """What became of the requests of a trace that has been played."""
    outcomes = replay.outcomes
    complete = {stream for stream, each in outcomes.items() if is_complete(each)}
    in_time = {each for each in complete if is_in_time(outcomes[each].ended, deadlines[each])}
    accepted = {stream for stream, each in outcomes.items() if each.refusal is None}
    first_tokens = [is_in_time(outcomes[each].first_token, deadlines[each]) for each in accepted]
    refusals = Counter(each.refusal.value for each in outcomes.values() if each.refusal)
    counters = replay.scheduler.counters()
    num_expired = counters.num_expired_waiting + counters.num_expired_running
    return {
        "case": case,
        "in_time": len(in_time) / len(outcomes),
        "num_in_time": len(in_time),
        "num_late": len(complete - in_time),
        "num_cancelled": len(accepted) - len(complete) - num_expired,
        "num_refused": refusals.total(),
        "refusals": dict(refusals),
        "num_expired_waiting": counters.num_expired_waiting,
        "num_expired_running": counters.num_expired_running,
        "useful_tokens": sum(num_computed[each] for each in in_time) / num_computed.total(),
        "accepted_first_token_in_time": sum(first_tokens) / len(accepted),
        "simulated_s": replay.now,
    }


def trial_results(trials: Mapping[int, Outcome], deadlines: Mapping[int, float]) -> dict[str, Any]:
    """What would have become of those that were refused."""
    first_tokens = [
        is_in_time(each.first_token, deadlines[stream]) for stream, each in trials.items()
    ]
    return {
        "num_tried": len(trials),
        "tried_first_token_in_time": sum(first_tokens) / max(1, len(trials)),
        "tried_in_time": sum(map(is_complete, trials.values())) / max(1, len(trials)),
    }


def measure(requests: Sequence[Request], num_trials: int) -> list[dict[str, Any]]:
    """A case for each server, all with the same trace."""
    deadlines = draw_deadlines(requests)
    aware = TryingReplay(requests, deadlines, num_trials)
    num_computed = run_trace(aware, deadlines, cancels=False, stops=True)
    ours = result("deadline aware", aware, deadlines, num_computed)
    ours.update(trial_results(aware.trials, deadlines))
    cases = [ours]
    for case, cancels in (("FCFS", False), ("FCFS, cancelled", True)):
        replay = Replay(new_scheduler(), requests, deadlines={})
        num_computed = run_trace(replay, deadlines, cancels=cancels, stops=cancels)
        cases.append(result(case, replay, deadlines, num_computed))
    for other in cases[1:]:
        other["aware_over_this"] = ours["num_in_time"] / max(1, other["num_in_time"])
    ours["is_met"] = cases[1]["aware_over_this"] >= BOUND
    return cases


def main() -> int:
    """Replays, prints, writes the result; 1 where the bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=3000, help="how many are replayed")
    parser.add_argument("--load", type=float, default=LOAD, help="arrivals over the capacity")
    parser.add_argument("--trials", type=int, default=100, help="refused ones that are tried")
    parser.add_argument("--quick", action="store_true", help="1,000 requests, no result file")
    arguments = parser.parse_args()
    count = 1000 if arguments.quick else arguments.requests
    capacity = measure_capacity(draw_requests(count, math.inf, SEED))
    requests = draw_requests(count, arguments.load * capacity, SEED)
    cases = measure(requests, arguments.trials)
    title = f"{count} requests at {arguments.load:g} times the capacity, {capacity:.1f} a second"
    print_cases(title, cases, MEASURES)
    settings = {
        "num_requests": count,
        "load": arguments.load,
        "capacity_per_s": capacity,
        "times_unloaded": TIMES_UNLOADED,
        "max_num_seqs": CONFIG.max_num_seqs,
        "bound": BOUND,
    }
    if not arguments.quick:
        write_results(RESULTS, settings, cases)
    return 0 if cases[0]["is_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
