"""What the prefix cache saves where prompts begin alike, and what it costs where they do not.

    python benchmarks/prefix_cache.py
    python benchmarks/prefix_cache.py --device cuda --shape llama3-8b --prompt-tokens 4096

*Shared*: requests of a few families, whose prompts are equal in their first 90 %, come one after
another, so that the time to the first token is that of computing the prompt and not of queueing.
The cache is on and off in turns. *Distinct*: requests whose prompts have nothing in common come
all at once, with the cache on; the time in its methods is set beside that of all steps.

Writes `benchmarks/results/prefix_cache.json` and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine_runs import (
    Check,
    LocalEngine,
    Request,
    Run,
    argument_parser,
    median_range,
    model_folder,
    report,
)
from mini_infer.config import EngineConfig
from mini_infer_engine.block_pool import BlockPool
from mini_infer_engine.prefix_cache import PrefixCache

PREFILL_DROP_BOUND = 0.85
"""Share of the prompt tokens that the cache saves."""
TTFT_BOUND = 0.35
"""Median time to first token with the cache over that without."""
OVERHEAD_BOUND = 0.01
"""Time in the cache's methods over that of all steps, where it finds nothing."""
SEED = 3
NUM_FAMILIES = 4
SHARED_SHARE = 0.9
OUTPUT_TOKENS = 8
DISTINCT_OUTPUT_TOKENS = 32
BLOCK_SIZE = 16
MAX_NUM_SEQS = 64


class TimedPrefixCache(PrefixCache):
    """Notes how long its work takes.

    Attributes:
        seconds: Spent in hashing, looking up and adding.
    """

    def __init__(self, pool: BlockPool) -> None:
        """Makes an empty cache over a pool."""
        super().__init__(pool)
        self.seconds = 0.0

    def extend_names(
        self, scope: Sequence[str], names: list[bytes], token_ids: Sequence[int], num_blocks: int
    ) -> None:
        """Hashes blocks."""
        with self._timed():
            super().extend_names(scope, names, token_ids, num_blocks)

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Looks a prompt up."""
        with self._timed():
            return super().find(names)

    def add(self, name: bytes, block: int) -> None:
        """Takes a block in."""
        with self._timed():
            super().add(name, block)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def shared_requests(
    engine: LocalEngine, num_requests: int, num_prompt_tokens: int
) -> list[Request]:
    """Requests of several families in random order; a family shares all but the last tenth."""
    generator = random.Random(SEED)
    num_shared = round(SHARED_SHARE * num_prompt_tokens)
    prefixes = [engine.prompt(generator, num_shared) for _ in range(NUM_FAMILIES)]
    requests = [
        Request(
            prefixes[number % NUM_FAMILIES]
            + engine.prompt(generator, num_prompt_tokens - num_shared),
            OUTPUT_TOKENS,
        )
        for number in range(num_requests)
    ]
    generator.shuffle(requests)
    return requests


def one_after_another(engine: LocalEngine, requests: Sequence[Request], cache: bool) -> list[Run]:
    """Serves each request when the one before has ended."""
    scheduler = engine.scheduler(enable_prefix_caching=cache)
    return [engine.run(scheduler, [request]) for request in requests]


def summary(turns: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """What the turns of one side come to."""
    streams = [run.streams[0] for run in turns[0]]
    return {
        "ttft_ms_p50": median_range([1e3 * ttft_p50(turn) for turn in turns]),
        "num_prefill_tokens": sum(run.num_prefill_tokens for run in turns[0]),
        "cached_tokens": sum(each.num_cached_tokens for each in streams),
        "requests_with_cached_tokens": sum(each.num_cached_tokens > 0 for each in streams),
    }


def ttft_p50(runs: Sequence[Run]) -> float:
    """Median time to first token of requests that ran alone, in seconds."""
    return statistics.median(run.streams[0].ttft_s for run in runs)


def measure_shared(
    engine: LocalEngine, arguments: Namespace, num_requests: int, num_turns: int
) -> tuple[dict[str, Any], list[Check]]:
    """The shared case: the cache on and off in turns, after a warm-up of each."""
    requests = shared_requests(engine, num_requests, arguments.prompt_tokens)
    turns: dict[bool, list[list[Run]]] = {True: [], False: []}
    for cache in turns:
        one_after_another(engine, requests[:NUM_FAMILIES], cache)
    for _ in range(num_turns):
        for cache, done in turns.items():
            done.append(one_after_another(engine, requests, cache))
    on, off = summary(turns[True]), summary(turns[False])
    equal = sum(
        one.streams[0].token_ids == other.streams[0].token_ids
        for one, other in zip(turns[True][0], turns[False][0], strict=True)
    )
    case = {
        "case": "90 % shared prompts, one after another",
        "num_requests": num_requests,
        "num_prompt_tokens": arguments.prompt_tokens,
        "num_families": NUM_FAMILIES,
        "with_cache": on,
        "without_cache": off,
        "equal_outputs": equal,
    }
    drop = 1 - on["num_prefill_tokens"] / off["num_prefill_tokens"]
    ratio = on["ttft_ms_p50"]["median"] / off["ttft_ms_p50"]["median"]
    return case, [
        Check(name="share of prompt tokens saved", value=drop, least=PREFILL_DROP_BOUND),
        Check(name="TTFT p50 with cache / without", value=ratio, most=TTFT_BOUND),
    ]


def measure_distinct(
    engine: LocalEngine, arguments: Namespace, num_requests: int, num_turns: int
) -> tuple[dict[str, Any], list[Check]]:
    """The distinct case: what the cache costs where it finds nothing."""
    generator = random.Random(SEED)
    requests = [
        Request(engine.prompt(generator, arguments.prompt_tokens), DISTINCT_OUTPUT_TOKENS)
        for _ in range(num_requests)
    ]
    shares, cached = [], 0
    for _ in range(num_turns):
        scheduler = engine.scheduler(enable_prefix_caching=True)
        cache = scheduler.blocks.cache = TimedPrefixCache(scheduler.blocks.pool)
        run = engine.run(scheduler, requests)
        shares.append(cache.seconds / sum(step.seconds for step in run.steps))
        cached += sum(each.num_cached_tokens for each in run.streams)
    case = {
        "case": "distinct prompts, all at once",
        "num_requests": num_requests,
        "num_prompt_tokens": arguments.prompt_tokens,
        "num_output_tokens": DISTINCT_OUTPUT_TOKENS,
        "cached_tokens": cached,
        "share_of_step_time": median_range(shares, 5),
    }
    name = "time in the cache's methods / step time"
    return case, [Check(name=name, value=statistics.median(shares), most=OVERHEAD_BOUND)]


def main() -> int:
    """Measures, prints, writes the result; 1 where a bound is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=640)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    num_requests = 96 if arguments.quick else arguments.requests
    num_turns = 1 if arguments.quick else arguments.turns
    with model_folder(arguments) as folder:
        engine = LocalEngine(
            EngineConfig(
                model=folder,
                device=arguments.device,
                block_size=BLOCK_SIZE,
                max_num_seqs=MAX_NUM_SEQS,
                # Room for every row, so that nothing is preempted.
                kv_cache_tokens=MAX_NUM_SEQS * (arguments.prompt_tokens + 4 * BLOCK_SIZE),
            )
        )
    shared, shared_checks = measure_shared(engine, arguments, num_requests, num_turns)
    distinct, distinct_checks = measure_distinct(engine, arguments, num_requests, num_turns)
    checks = [*shared_checks, *distinct_checks]
    return report("prefix_cache", arguments, engine.device, [shared, distinct], checks)


if __name__ == "__main__":
    sys.exit(main())
