"""What scheduling costs a step: `schedule` and `finish_step` on one core, without a model.

    python benchmarks/scheduling_cost.py

Steady decode: sequences of 400 to 800 prompt tokens and 200 output tokens in the mean (drawn
geometrically, so that the load is steady from the start), sampling parameters mixed, prefix cache
on, prompts all different. For each sequence that ends another one comes, so prompts are computed
beside the decodes, and the pool is full of cached blocks: each new block evicts an old one.

Bounds: microseconds of a step with 256 sequences; the growth from there to 1,024, a row; and how
much the number of cached blocks may matter.

Times are CPU time of one thread, pinned to a core, so that a busy machine matters less. Garbage is
collected as in the engine, with Python's defaults. All cases run in turns, because a machine's
speed drifts; after a warm-up, every other turn takes the time of the parts instead, whose own
measurement costs time.

Writes `benchmarks/results/scheduling_cost.json` and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import gc
import os
import secrets
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import thread_time
from typing import Any
from unittest.mock import patch

import numpy as np
from mini_infer.config import EngineConfig
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import ScheduledBatch, StepTokens
from mini_infer_engine.block_manager import BlockManager
from mini_infer_engine.build_scheduler import build_scheduler
from mini_infer_engine.prefix_cache import PrefixCache
from mini_infer_engine.running_batch import RunningBatch
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_costs import StepCosts
from workloads import END_ID, OTHER_ID, OWNER, ROUGH_GUESS, VOCAB_SIZE, print_cases, write_results

RESULTS = Path(__file__).parent / "results" / "scheduling_cost.json"
SIZES = (64, 128, 256, 512, 1024)
CACHE_SIZES = (1_000, 10_000, 100_000)
"""Cached blocks beside those in use."""
FULL_CACHE = 10_000
BOUND_AT = 256
BOUND_US = 600.0
GROWTH_BOUND = 1.5
"""Microseconds a row at 1,024 sequences over those at 256."""
CACHE_BOUND = 1.25
"""The largest median over the smallest, among the sizes of the cache."""
PROMPT_TOKENS = (400, 800)
MEAN_OUTPUT_TOKENS = 200
STEPS_PER_TURN = 50
BLOCKS_OF_EACH = 56
"""Of a running sequence: a little more than the mean, so that nobody is preempted."""
PARTS: dict[str, tuple[type, str]] = {
    "build_us": (RunningBatch, "build"),
    "hashing_us": (PrefixCache, "extend_names"),
    "join_us": (BlockManager, "join"),
    "costs_us": (StepCosts, "note"),
}
PART_NAMES = (*PARTS, "gc_us")
MEASURES = (
    *("median_us", "p99_us", "us_per_row", "schedule_us", "finish_us", *PART_NAMES, "add_us"),
    *("num_joins", "num_prefill_tokens", "num_context_tokens", "num_cached_blocks", "is_met"),
)


class SteadyLoad:
    """A scheduler with so many running sequences, always.

    Attributes:
        case: What it is called.
        num_running: How many run.
        seconds: CPU seconds of each measured step, by what was done.
        part_seconds: CPU seconds of the parts, all profiled steps together.
        num_profiled: How many those were.
    """

    def __init__(self, case: str, num_running: int, num_cached: int) -> None:
        """Fills the pool with cached blocks and starts the sequences.

        Args:
            case: What it is called.
            num_running: Sequences.
            num_cached: Cached blocks beside those that the sequences use.
        """
        self.case = case
        self.num_running = num_running
        config = EngineConfig(
            max_num_seqs=num_running, max_num_batched_tokens=16_384, kv_watermark=0.0
        )
        num_blocks = num_running * BLOCKS_OF_EACH + num_cached
        self._scheduler = build_scheduler(
            config, num_blocks=num_blocks, num_host_blocks=0, costs=ROUGH_GUESS
        )
        fill_with_cached_blocks(self._scheduler)
        self._random = np.random.default_rng(num_running)
        self._num_streams = 0
        self.seconds: dict[str, list[float]] = {"schedule": [], "finish": [], "add": []}
        self.part_seconds: defaultdict[str, float] = defaultdict(float)
        self.num_profiled = 0
        self._loads: list[tuple[int, int, float, int]] = []

    def turn(self, num_steps: int, *, keeps: bool) -> None:
        """Runs some steps.

        Args:
            num_steps: How many.
            keeps: Whether their times count.
        """
        for _ in range(num_steps):
            times = self._step()
            if keeps:
                assert not self._scheduler.num_waiting, "the load is not steady"
                assert not self._scheduler.num_preemptions, "the pool is too small"
                for name, seconds in zip(self.seconds, times, strict=True):
                    self.seconds[name].append(seconds)

    def profile(self, num_steps: int) -> None:
        """Runs some steps that count for the parts alone."""
        with timed_parts(self.part_seconds):
            self.turn(num_steps, keeps=False)
        self.num_profiled += num_steps

    def result(self) -> dict[str, Any]:
        """Microseconds of a step, and what there was to do in it."""
        us = {name: np.array(seconds) * 1e6 for name, seconds in self.seconds.items()}
        total = us["schedule"] + us["finish"]
        loads = self._loads[-len(total) :]
        num_joins, num_prefill_tokens, num_context_tokens, num_cached = np.mean(loads, axis=0)
        return {
            "case": self.case,
            "num_running": self.num_running,
            "num_steps": len(total),
            "median_us": float(np.median(total)),
            "p99_us": float(np.percentile(total, 99)),
            "us_per_row": float(np.median(total)) / self.num_running,
            "schedule_us": float(np.median(us["schedule"])),
            "finish_us": float(np.median(us["finish"])),
            **{name: self.part_seconds[name] / self.num_profiled * 1e6 for name in PART_NAMES},
            "add_us": float(np.mean(us["add"])),
            "num_joins": float(num_joins),
            "num_prefill_tokens": float(num_prefill_tokens),
            "num_context_tokens": float(num_context_tokens),
            "num_cached_blocks": float(num_cached),
        }

    def _step(self) -> tuple[float, float, float]:
        """Runs a step; gives the seconds of its `schedule`, `finish_step` and of all `add`s."""
        scheduler = self._scheduler
        num_there = scheduler.num_running + scheduler.num_waiting
        new = [self._sequence() for _ in range(self.num_running - num_there)]
        began = thread_time()
        for sequence in new:
            scheduler.add(sequence, now=began)
        added = thread_time()
        batch = scheduler.schedule(added)
        scheduled = thread_time()
        tokens = make_tokens(batch)
        resumed = thread_time()
        scheduler.finish_step(batch, tokens, resumed)
        finished = thread_time()
        num_context_tokens = float(batch.num_computed_tokens.mean())
        num_prefill_tokens = batch.num_tokens - batch.num_decodes
        num_cached = scheduler.blocks.pool.num_cached
        self._loads.append((len(new), num_prefill_tokens, num_context_tokens, num_cached))
        return scheduled - added, finished - resumed, added - began

    def _sequence(self) -> Sequence:
        """A new one, with the sampling parameters of one of eight kinds of clients."""
        self._num_streams += 1
        kind = self._num_streams % 8
        random = self._random
        num_prompt_tokens = int(random.integers(*PROMPT_TOKENS))
        sampling = ResolvedSampling(
            temperature=0.0 if kind < 3 else 0.8,
            top_k=50 if kind == 4 else 0,
            top_p=0.95 if kind > 4 else 1.0,
            seed=self._num_streams,
            max_tokens=int(random.geometric(1 / MEAN_OUTPUT_TOKENS)),
            min_tokens=16 if kind == 5 else 0,
            stop_token_ids=[7, 8] if kind == 6 else [],
        )
        return Sequence(
            StreamKey(OWNER, self._num_streams),
            random.integers(OTHER_ID, VOCAB_SIZE, num_prompt_tokens).tolist(),
            sampling,
            eos_token_ids=(END_ID,),
            deadline=1e9 if kind % 2 else None,
            cache_scope=("", ""),
        )


def fill_with_cached_blocks(scheduler: Scheduler) -> None:
    """Lets every block of an idle scheduler hold something that might be asked for again."""
    pool, cache = scheduler.blocks.pool, scheduler.blocks.cache
    assert cache is not None
    blocks = pool.allocate(pool.num_blocks)
    for block in blocks:
        cache.add(secrets.token_bytes(32), block)
    pool.release(blocks)


def make_tokens(batch: ScheduledBatch) -> StepTokens:
    """A token for each row that wants one, never an end."""
    shape = (len(batch.sampling.rows), 1)
    return StepTokens(np.full(shape, OTHER_ID, np.int64), np.zeros(shape[0], np.int32))


@contextmanager
def timed_parts(seconds: defaultdict[str, float]) -> Iterator[None]:
    """Meanwhile the parts add their CPU seconds up."""

    def timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = thread_time()
            try:
                return method(*arguments)
            finally:
                seconds[part] += thread_time() - began

        return call

    def timed_by_name(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, **arguments: Any) -> Any:
            return timed(part, lambda: method(self, **arguments))()

        return call

    def note_collection(phase: str, _: dict[str, int]) -> None:
        seconds["gc_us"] += -thread_time() if phase == "start" else thread_time()

    with ExitStack() as stack:
        gc.callbacks.append(note_collection)
        stack.callback(gc.callbacks.remove, note_collection)
        for part, (owner, name) in PARTS.items():
            wrap = timed_by_name if owner is StepCosts else timed
            stack.enter_context(patch.object(owner, name, wrap(part, getattr(owner, name))))
        yield


def judge(by_size: Seq[dict[str, Any]], by_cache: Seq[dict[str, Any]]) -> bool:
    """Notes at the cases whether their bounds are met; gives whether all are."""
    at = {case["num_running"]: case for case in by_size}
    at[BOUND_AT]["is_met"] = at[BOUND_AT]["median_us"] <= BOUND_US
    last = at[SIZES[-1]]
    last["growth"] = last["us_per_row"] / at[BOUND_AT]["us_per_row"]
    last["is_met"] = last["growth"] <= GROWTH_BOUND
    least = min(case["median_us"] for case in by_cache)
    for case in by_cache:
        case["over_least"] = case["median_us"] / least
        case["is_met"] = case["over_least"] <= CACHE_BOUND
    return all(case.get("is_met", True) for case in (*by_size, *by_cache))


def main() -> int:
    """Measures, prints, writes the result; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=30, help=f"of {STEPS_PER_TURN} steps each")
    parser.add_argument("--quick", action="store_true", help="5 turns, no result file")
    arguments = parser.parse_args()
    num_turns = 5 if arguments.quick else arguments.turns
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    by_size = [SteadyLoad(f"{size} running", size, FULL_CACHE) for size in SIZES]
    by_cache = [SteadyLoad(f"{size} cached", BOUND_AT, size) for size in CACHE_SIZES]
    loads = [*by_size, *by_cache]
    for load in loads:
        load.turn(2 * MEAN_OUTPUT_TOKENS, keeps=False)  # contexts grow to their length
    for turn in range(num_turns):
        for load in loads:
            if turn % 2:
                load.profile(STEPS_PER_TURN)
            else:
                load.turn(STEPS_PER_TURN, keeps=True)
    size_cases = [load.result() for load in by_size]
    cache_cases = [load.result() for load in by_cache]
    are_met = judge(size_cases, cache_cases)
    print_cases("CPU microseconds of a step's scheduling", size_cases, MEASURES)
    print_cases(f"The same, {BOUND_AT} running, by cached blocks", cache_cases, MEASURES)
    settings = {
        "steps_per_turn": STEPS_PER_TURN,
        "num_turns": num_turns,
        "mean_output_tokens": MEAN_OUTPUT_TOKENS,
        "prompt_tokens": PROMPT_TOKENS,
        "bounds": {"median_us": BOUND_US, "growth": GROWTH_BOUND, "over_least": CACHE_BOUND},
    }
    if not arguments.quick:
        write_results(RESULTS, settings, [*size_cases, *cache_cases])
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())
