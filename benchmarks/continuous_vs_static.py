"""Continuous batching beside static batching: output tokens/s of the same requests.

    python benchmarks/continuous_vs_static.py
    python benchmarks/continuous_vs_static.py --device cuda --shape llama3-8b

Output lengths are exponential, so that most requests are short and a few are long. The same engine
serves them in three ways, in turns. *Continuous*: all queue at once, and whoever ends makes room
for the next. *Static*: 32 at a time, where those that have ended drop out of the arithmetic and
the next 32 wait for the longest. *Static, padded*: likewise, but all rows are computed until the
longest has ended, as a batch of fixed shape is.

How much continuous batching wins depends on what a step costs with few rows and with many, so that
is printed too, and so is the ratio of the numbers of steps: what would be won if all steps took the
same time, as they nearly do on a GPU. Writes `benchmarks/results/continuous_vs_static.json` and
exits with 1 where the bound is missed.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engine_runs import (
    Check,
    LocalEngine,
    Request,
    Run,
    Step,
    argument_parser,
    median_range,
    model_folder,
    report,
)
from mini_infer.config import EngineConfig

BOUND = 2.5
"""Output tokens/s of continuous over those of static batching."""
SEED = 8
BATCH_SIZE = 32
MEAN_OUTPUT_TOKENS = 64
MAX_OUTPUT_TOKENS = 512
PROMPT_TOKENS = (8, 40)
"""Least and most of a prompt."""
SHOWN_ROWS = (1, 2, 4, 8, 16, 24, 32)
KV_CACHE_TOKENS = BATCH_SIZE * 640
"""Room for every row at its longest: nothing is preempted."""

Way = Callable[[LocalEngine, Sequence[Request]], Run]


def make_requests(engine: LocalEngine, count: int) -> list[Request]:
    """Requests in random order."""
    generator = random.Random(SEED)
    requests = []
    for _ in range(count):
        length = 1 + int(generator.expovariate(1 / MEAN_OUTPUT_TOKENS))
        prompt = engine.prompt(generator, generator.randint(*PROMPT_TOKENS))
        requests.append(Request(prompt, min(length, MAX_OUTPUT_TOKENS)))
    return requests


def continuous(engine: LocalEngine, requests: Sequence[Request]) -> Run:
    """All at once."""
    return engine.run(engine.scheduler(), requests)


def static(engine: LocalEngine, requests: Sequence[Request]) -> Run:
    """A batch at a time."""
    scheduler = engine.scheduler()
    return merged([engine.run(scheduler, batch) for batch in batches(requests)])


def static_padded(engine: LocalEngine, requests: Sequence[Request]) -> Run:
    """A batch at a time, in which every row is as long as the longest."""
    padded = []
    for batch in batches(requests):
        longest = max(each.max_tokens for each in batch)
        padded += [replace(each, max_tokens=longest) for each in batch]
    run = static(engine, padded)
    for stream, request in zip(run.streams, requests, strict=True):
        del stream.token_ids[request.max_tokens :]
    return run


WAYS: dict[str, Way] = {
    "continuous": continuous,
    "static": static,
    "static, padded": static_padded,
}


def batches(requests: Sequence[Request]) -> list[Sequence[Request]]:
    """The requests, 32 at a time."""
    return [requests[start : start + BATCH_SIZE] for start in range(0, len(requests), BATCH_SIZE)]


def merged(runs: Sequence[Run]) -> Run:
    """Runs that came one after the other, as one."""
    return Run(
        list(itertools.chain.from_iterable(run.streams for run in runs)),
        list(itertools.chain.from_iterable(run.steps for run in runs)),
        sum(run.seconds for run in runs),
    )


def measure(
    engine: LocalEngine, requests: Sequence[Request], num_turns: int
) -> dict[str, list[Run]]:
    """Runs every way in turns, after a short warm-up.

    Raises:
        RuntimeError: Two ways made different numbers of tokens.
    """
    for way in WAYS.values():
        way(engine, requests[:BATCH_SIZE])
    runs: dict[str, list[Run]] = {name: [] for name in WAYS}
    for _ in range(num_turns):
        for name, way in WAYS.items():
            runs[name].append(way(engine, requests))
    counts = {run.num_output_tokens for each in runs.values() for run in each}
    if counts != {sum(each.max_tokens for each in requests)}:
        raise RuntimeError(f"expected equal numbers of tokens on all sides, got {sorted(counts)}")
    return runs


def summary(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """A way's line of the result."""
    return {
        "case": name,
        "tokens_per_s": median_range([run.num_output_tokens / run.seconds for run in runs], 1),
        "num_output_tokens": runs[0].num_output_tokens,
        "num_steps": len(runs[0].steps),
        "num_decode_rows": sum(step.num_decodes for step in runs[0].steps),
    }


def step_costs(steps: Sequence[Step]) -> dict[str, Any]:
    """What steps took: those of decoding rows alone by their number, and those with prompts."""
    by_rows: dict[int, list[float]] = defaultdict(list)
    with_prompt = []
    for step in steps:
        if not step.num_prefill_tokens:
            by_rows[step.num_decodes].append(step.seconds)
        elif step.num_decodes == BATCH_SIZE - 1:
            with_prompt.append(step.seconds)
    shown = {rows: median_ms(by_rows[rows]) for rows in SHOWN_ROWS if rows in by_rows}
    return {
        "case": "step costs",
        "decode_ms_by_rows": shown,
        "full_over_one_row": round(shown[BATCH_SIZE] / shown[1], 2),
        "with_one_prompt_ms": median_ms(with_prompt) if with_prompt else None,
    }


def median_ms(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return round(1e3 * statistics.median(seconds), 3)


def num_equal_outputs(one: Run, other: Run) -> int:
    """Requests that got the same ids in two runs."""
    pairs = zip(one.streams, other.streams, strict=True)
    return sum(first.token_ids == second.token_ids for first, second in pairs)


def main() -> int:
    """Measures, prints, writes the result; 1 where the bound is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    num_requests = 2 * BATCH_SIZE if arguments.quick else arguments.requests
    with model_folder(arguments) as folder:
        engine = LocalEngine(
            EngineConfig(
                model=folder,
                device=arguments.device,
                max_num_seqs=BATCH_SIZE,
                kv_cache_tokens=KV_CACHE_TOKENS,
            )
        )
    requests = make_requests(engine, num_requests)
    runs = measure(engine, requests, 1 if arguments.quick else arguments.turns)
    seconds = {name: [run.seconds for run in each] for name, each in runs.items()}
    ratios = {
        name: statistics.median(each) / statistics.median(seconds["continuous"])
        for name, each in seconds.items()
    }
    equal = num_equal_outputs(runs["continuous"][0], runs["static"][0])
    cases = [
        *(summary(name, each) for name, each in runs.items()),
        step_costs([step for name in WAYS for run in runs[name] for step in run.steps]),
        {
            "case": "requests",
            "num_requests": num_requests,
            "mean_output_tokens": sum(each.max_tokens for each in requests) / num_requests,
            "equal_outputs": equal,
            "continuous_over_padded": round(ratios["static, padded"], 3),
            "static_steps_over_continuous": round(
                len(runs["static"][0].steps) / len(runs["continuous"][0].steps), 3
            ),
        },
    ]
    name = "tokens/s of continuous over static batching"
    checks = [Check(name=name, value=ratios["static"], least=BOUND)]
    return report("continuous_vs_static", arguments, engine.device, cases, checks)


if __name__ == "__main__":
    sys.exit(main())
