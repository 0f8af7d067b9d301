"""How much of the KV cache's memory holds K and V, beside contiguous allocation.

    python benchmarks/kv_utilisation.py

Replays requests with lognormal lengths that come twice as fast as they can be served, through the
real scheduler, in simulated time, and looks at the memory after each step at which requests wait:

- *of blocks handed out*: tokens with K and V / slots of the blocks that sequences hold;
- *of the pool*: tokens with K and V / all slots of the pool.

No two prompts are alike, so no block is ever in two block tables, which is asserted. (A shared
block would count once, in its tokens as well as in its slots.) Blocks that are only cached for
later requests count as free.

Beside it stands the same replay where each sequence reserves a contiguous region when it joins, in
the manner of systems before PagedAttention: of the longest text allowed, of its prompt plus
`max_tokens`, or of just what it comes to need, which nobody knows beforehand. Regions are taken
from the first gap that is large enough.

Writes `benchmarks/results/kv_utilisation.json` and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import sys
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mini_infer.config import EngineConfig
from mini_infer_engine.build_scheduler import build_scheduler
from mini_infer_engine.step_costs import StepWork
from workloads import (
    MAX_MODEL_LEN,
    ROUGH_GUESS,
    SIGMA,
    Replay,
    Request,
    draw_requests,
    print_cases,
    step_seconds,
    write_results,
)

RESULTS = Path(__file__).parent / "results" / "kv_utilisation.json"
HANDED_OUT_BOUND = 0.96
POOL_BOUND = 0.92
SEED = 20
ARRIVALS_PER_S = 80.0
"""About twice what the simulated machine serves."""
CONFIG = EngineConfig(max_num_seqs=256, max_num_batched_tokens=2048)
NUM_HOST_BLOCKS = 1024

MEASURES = (
    *("handed_out", "pool", "handed_out_by_time", "pool_by_time"),
    *("not_computed_yet", "tail", "free", "num_running", "num_steps_with_queue"),
    *("num_recomputes", "num_swaps", "num_recomputed_tokens", "num_evicted_blocks", "is_met"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """The memory after a step; all but the seconds in slots, one for each token.

    Attributes:
        seconds: Simulated, how long the step took.
        num_running: Sequences that hold memory.
        tokens: Slots with K and V.
        pending: Slots of tokens that are known but not computed yet.
        tail: Slots handed out for tokens that do not exist yet.
        free: Slots that nobody holds.
    """

    seconds: float
    num_running: int
    tokens: int
    pending: int
    tail: int
    free: int


def summary(case: str, samples: Sequence[Sample], num_steps: int) -> dict[str, Any]:
    """Mean shares, each step weighing the same, and weighted by the steps' seconds."""
    seconds, num_running, tokens, pending, tail, free = (
        np.array([getattr(each, name) for each in samples], float) for name in Sample.__slots__
    )
    held = tokens + pending + tail
    handed_out = np.divide(tokens, held, out=np.ones(len(samples)), where=held > 0)
    num_slots = held + free
    return {
        "case": case,
        "handed_out": float(np.mean(handed_out)),
        "pool": float(np.mean(tokens / num_slots)),
        "handed_out_by_time": float(np.average(handed_out, weights=seconds)),
        "pool_by_time": float(np.average(tokens / num_slots, weights=seconds)),
        "not_computed_yet": float(np.mean(pending / num_slots)),
        "tail": float(np.mean(tail / num_slots)),
        "free": float(np.mean(free / num_slots)),
        "num_running": float(np.mean(num_running)),
        "num_steps": num_steps,
        "num_steps_with_queue": len(samples),
        "seconds_with_queue": float(seconds.sum()),
    }


def measure_blocks(
    case: str, requests: Sequence[Request], num_blocks: int, num_host_blocks: int
) -> dict[str, Any]:
    """Replays the requests with the real scheduler."""
    scheduler = build_scheduler(
        CONFIG, num_blocks=num_blocks, num_host_blocks=num_host_blocks, costs=ROUGH_GUESS
    )
    pool = scheduler.blocks.pool
    replay = Replay(scheduler, requests, deadlines={})
    samples = []
    num_computed = 0
    while not replay.is_done:
        began = replay.now
        num_computed += replay.step().num_tokens
        if not scheduler.num_waiting:
            continue
        holders = [each for each in replay.sequences.values() if each.block_table]
        num_held = sum(len(each.block_table) for each in holders)
        assert num_held == pool.num_used, "a block is shared"
        computed = sum(each.num_computed_tokens for each in holders)
        known = sum(each.num_tokens for each in holders)
        tail = num_held * pool.block_size - known
        free = pool.num_free * pool.block_size
        samples.append(
            Sample(replay.now - began, len(holders), computed, known - computed, tail, free)
        )
    result = summary(case, samples, scheduler.num_steps)
    counters = scheduler.counters()
    # Each token but the last is computed once, where nothing is lost.
    num_needed = sum(len(each.prompt_ids) + each.num_output_tokens - 1 for each in requests)
    weights = (("handed_out", HANDED_OUT_BOUND), ("pool", POOL_BOUND))
    return {
        **result,
        "num_recomputes": counters.num_recomputes,
        "num_swaps": counters.num_swaps,
        "num_recomputed_tokens": num_computed - num_needed,
        "num_evicted_blocks": counters.num_evicted_blocks,
        "num_swapped_out_blocks": counters.num_swapped_out_blocks,
        "is_met": all(
            result[name] >= bound and result[f"{name}_by_time"] >= bound for name, bound in weights
        ),
    }


class ContiguousStore:
    """Slots that are handed out in regions which never move, first fit."""

    def __init__(self, num_slots: int) -> None:
        """All slots are one gap."""
        self._gaps = [(0, num_slots)]  # start and end, in order

    @property
    def num_free(self) -> int:
        """Slots in gaps."""
        return sum(end - start for start, end in self._gaps)

    def take(self, size: int) -> tuple[int, int] | None:
        """A region (start, end) of so many slots, or None where no gap is large enough."""
        for index, (start, end) in enumerate(self._gaps):
            if end - start >= size:
                self._gaps[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start, start + size
        return None

    def give_back(self, region: tuple[int, int]) -> None:
        """Takes a region back; neighbouring gaps become one."""
        insort(self._gaps, region)
        merged = [self._gaps[0]]
        for start, end in self._gaps[1:]:
            if start == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._gaps = merged


@dataclass(slots=True)
class Resident:
    """A sequence of the contiguous replay, its region, and its tokens with K and V."""

    request: Request
    region: tuple[int, int]
    num_computed: int = 0

    @property
    def num_left(self) -> int:
        """Prompt tokens that are not computed yet."""
        return max(0, len(self.request.prompt_ids) - self.num_computed)

    @property
    def is_done(self) -> bool:
        """Whether its last token has been made; that one is never computed."""
        num_tokens = len(self.request.prompt_ids) + self.request.num_output_tokens
        return self.num_computed >= num_tokens - 1


def contiguous_step(running: Sequence[Resident], budget: int) -> float:
    """Computes a step of those that are there, prompts in chunks; gives its seconds."""
    decodes = [each for each in running if not each.num_left]
    prefills = [each for each in running if each.num_left]
    work = StepWork(len(decodes), sum(each.num_computed for each in decodes))
    for resident in decodes:
        resident.num_computed += 1
    left = budget - len(decodes)
    for resident in prefills:
        count = min(resident.num_left, left - work.num_prefill_tokens)
        work = work.with_chunk(count, resident.num_computed)
        resident.num_computed += count
    return step_seconds(work)


def measure_contiguous(
    case: str, requests: Sequence[Request], num_slots: int, reserved: Callable[[Request], int]
) -> dict[str, Any]:
    """Replays the requests, first come first served, each in a region of its own."""
    store = ContiguousStore(num_slots)
    coming, waiting, running = deque(requests), deque[Request](), list[Resident]()
    now, num_steps = 0.0, 0
    samples = []
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            waiting.append(coming.popleft())
        while waiting and len(running) < CONFIG.max_num_seqs:
            region = store.take(reserved(waiting[0]))
            if region is None:
                break
            running.append(Resident(waiting.popleft(), region))
        seconds = contiguous_step(running, CONFIG.max_num_batched_tokens)
        now += seconds
        num_steps += 1
        for resident in [each for each in running if each.is_done]:
            store.give_back(resident.region)
            running.remove(resident)
        if waiting:
            tokens = sum(each.num_computed for each in running)
            pending = sum(each.num_left for each in running)
            tail = num_slots - store.num_free - tokens - pending
            samples.append(Sample(seconds, len(running), tokens, pending, tail, store.num_free))
    return summary(case, samples, num_steps)


def main() -> int:
    """Replays, prints, writes the result; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="how many are replayed")
    parser.add_argument("--blocks", type=int, default=2048, help="blocks of the pool")
    parser.add_argument("--quick", action="store_true", help="400 requests, no result file")
    arguments = parser.parse_args()
    count = 400 if arguments.quick else arguments.requests
    requests = draw_requests(count, ARRIVALS_PER_S, SEED)
    num_slots = arguments.blocks * CONFIG.block_size
    cases = [
        measure_blocks("blocks", requests, arguments.blocks, 0),
        measure_blocks("blocks, swap", requests, arguments.blocks, NUM_HOST_BLOCKS),
    ]
    contiguous: dict[str, Callable[[Request], int]] = {
        "longest": lambda _: MAX_MODEL_LEN,
        "max_tokens": lambda each: len(each.prompt_ids) + each.max_tokens,
        "exact": lambda each: len(each.prompt_ids) + each.num_output_tokens,
    }
    for case, reserved in contiguous.items():
        cases.append(measure_contiguous(case, requests, num_slots, reserved))
    print_cases("Share of memory that holds K and V, while requests wait", cases, MEASURES)
    settings = {
        "num_requests": count,
        "num_blocks": arguments.blocks,
        "block_size": CONFIG.block_size,
        "arrivals_per_s": ARRIVALS_PER_S,
        "mean_prompt_tokens": float(np.mean([len(each.prompt_ids) for each in requests])),
        "mean_output_tokens": float(np.mean([each.num_output_tokens for each in requests])),
        "sigma": SIGMA,
        "bounds": {"handed_out": HANDED_OUT_BOUND, "pool": POOL_BOUND},
    }
    if not arguments.quick:
        write_results(RESULTS, settings, cases)
    return 0 if all(case.get("is_met", True) for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
