"""Streams that decode while long prompts arrive: what chunked prefill does for their tokens' pace.

    python benchmarks/long_prompts.py
    python benchmarks/long_prompts.py --device cuda --shape llama3-8b --prompt-tokens 4096

64 streams decode, and every second a long prompt arrives. Three sides do the same work in turns.
*Unchunked*: a step may hold a whole prompt beside the 64 rows. *By number*: a small
`max_num_batched_tokens` bounds every step. *By target*: `target_itl_ms` is a few times a step that
only decodes, and the scheduler works out how many prompt tokens fit. Compared are the 99th
percentile of the times between tokens (ITL) of the 64 streams, and all tokens, of prompts and
outputs, per second.

A long prompt gets one output token: attention of decoding rows pads all of them to the longest
here, so that its own decode steps would measure that padding.

Writes `benchmarks/results/long_prompts.json` and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

from engine_runs import (
    Check,
    LocalEngine,
    Request,
    Run,
    Step,
    Stream,
    argument_parser,
    median_range,
    model_folder,
    percentile,
    report,
)
from mini_infer.config import EngineConfig

ITL_BOUND = 0.3
"""p99 of the streams' ITL with chunks over that without."""
THROUGHPUT_BOUNDS = {"cpu": 0.9, "cuda": 0.97}
"""Tokens/s with chunks over those without, by the kind of device."""
SEED = 5
NUM_STREAMS = 64
STREAM_PROMPT_TOKENS = 32
MAX_NUM_SEQS = NUM_STREAMS + 16
"""The streams, and more long prompts than are ever under way."""
INTERVAL_S = 1.0
TARGET_STEPS = 2.0
"""`target_itl_ms` over the time of a step that only decodes."""
WARM_UP_TOKENS = 50
MARGIN = 1.75
"""By how much the streams outlast the last long prompt in the trial: machines drift."""
KV_CACHE_TOKENS = 128 * 1024
MAX_CACHE_SHARE = 0.8
"""Of the streams: nothing is preempted while the rest is room for long prompts."""
ROOM = int(MAX_CACHE_SHARE * KV_CACHE_TOKENS) // NUM_STREAMS - STREAM_PROMPT_TOKENS
"""Output tokens of a stream at most."""
UNCHUNKED = "unchunked"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the work of all sides depends on, found in a trial.

    Attributes:
        stream_tokens: Output tokens with which the streams outlast the last long prompt.
        decode_ms: A step in which all streams decode, in the midst of their texts.
    """

    stream_tokens: int
    decode_ms: float


def workload(engine: LocalEngine, prompt_tokens: int, arrivals: int, length: int) -> list[Request]:
    """The streams, then the long prompts, one a second.

    Args:
        engine: Whose vocabulary they are of.
        prompt_tokens: Of a long prompt.
        arrivals: Long prompts.
        length: Output tokens of each stream.
    """
    generator = random.Random(SEED)
    streams = [
        Request(engine.prompt(generator, STREAM_PROMPT_TOKENS), length) for _ in range(NUM_STREAMS)
    ]
    prompts = [
        Request(engine.prompt(generator, prompt_tokens), 1, INTERVAL_S * number)
        for number in range(1, arrivals + 1)
    ]
    return streams + prompts


def calibrate(engine: LocalEngine, prompt_tokens: int, arrivals: int, budget: int) -> Calibration:
    """Runs the work once with streams that are longer than need be, to see how long they must be.

    Args:
        engine: Warm or not.
        prompt_tokens: Of a long prompt.
        arrivals: Long prompts.
        budget: Tokens of a step; a chunked side is the one whose streams go on fastest.
    """
    length = most_stream_tokens(engine, prompt_tokens, arrivals)
    requests = workload(engine, prompt_tokens, arrivals, length)
    run = engine.run(engine.scheduler(max_num_batched_tokens=budget), requests)
    streams, prompts = split(run)
    end = max(each.token_times[-1] for each in prompts)
    needed = max(bisect.bisect(each.token_times, end) for each in streams)
    return Calibration(min(ROOM, math.ceil(MARGIN * needed)), figures(run).itl_p50)


def most_stream_tokens(engine: LocalEngine, prompt_tokens: int, arrivals: int) -> int:
    """Output tokens that the streams make while long prompts arrive, if those took no time.

    Raises:
        SystemExit: A long prompt takes longer than the next one takes to come, or decoding is so
            fast that the streams would not fit into the cache.
    """
    requests = workload(engine, prompt_tokens, 1, WARM_UP_TOKENS)
    streams, prompt = requests[:NUM_STREAMS], replace(requests[-1], arrival_s=0.0)
    for _ in range(2):  # the first steps of a kind pay for what is done once
        steps = engine.run(engine.scheduler(), streams).steps
        prompt_s = engine.run(engine.scheduler(), [prompt]).seconds
    if prompt_s >= INTERVAL_S:
        raise SystemExit(
            f"a long prompt takes {prompt_s:.2f} s here, and one comes every {INTERVAL_S:g} s: "
            "pass a smaller --prompt-tokens"
        )
    decode_s = median(each.seconds for each in steps if not each.num_prefill_tokens)
    length = math.ceil((arrivals + 1) * INTERVAL_S / decode_s)
    if length > ROOM:
        raise SystemExit(
            f"streams of {length} tokens would fill the KV cache: pass fewer --arrivals"
        )
    return length


def sides(calibration: Calibration, arguments: Namespace) -> dict[str, dict[str, Any]]:
    """Settings of each side, by its name."""
    whole_prompt = MAX_NUM_SEQS + arguments.prompt_tokens
    target_ms = round(TARGET_STEPS * calibration.decode_ms, 1)
    return {
        UNCHUNKED: {"max_num_batched_tokens": whole_prompt},
        "by number": {"max_num_batched_tokens": arguments.budget},
        "by target": {"max_num_batched_tokens": whole_prompt, "target_itl_ms": target_ms},
    }


def split(run: Run) -> tuple[list[Stream], list[Stream]]:
    """The streams that decode, and the long prompts.

    Raises:
        RuntimeError: A long prompt was still under way when the streams had ended.
    """
    streams, prompts = run.streams[:NUM_STREAMS], run.streams[NUM_STREAMS:]
    if max(each.token_times[-1] for each in prompts) > min(
        each.token_times[-1] for each in streams
    ):
        raise RuntimeError("the streams ended before the last long prompt was computed")
    return streams, prompts


def mixed_steps(run: Run) -> list[Step]:
    """Steps that computed a part of a long prompt beside all streams."""
    return [
        each for each in run.steps if each.num_prefill_tokens and each.num_decodes == NUM_STREAMS
    ]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of a side came to; times in milliseconds."""

    itl_p50: float
    itl_p99: float
    itl_max: float
    ttft_p50: float
    tokens_per_s: float


def figures(run: Run) -> Figures:
    """The figures of a run; ITL from the first arrival to a second after the last one."""
    streams, prompts = split(run)
    first, last = prompts[0].arrival, prompts[-1].arrival + INTERVAL_S
    gaps = [
        1e3 * (later - earlier)
        for each in streams
        for earlier, later in itertools.pairwise(each.token_times)
        if first <= later <= last
    ]
    num_tokens = run.num_prefill_tokens + run.num_output_tokens
    return Figures(
        itl_p50=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        itl_max=max(gaps),
        ttft_p50=1e3 * median(each.ttft_s for each in prompts),
        tokens_per_s=num_tokens / run.seconds,
    )


def summary(name: str, settings: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """A side's line of the result."""
    turns = [figures(run) for run in runs]
    mixed = [step for run in runs for step in mixed_steps(run)]
    budgets = [step.num_prefill_tokens for step in mixed]
    took_ms = [1e3 * step.seconds for step in mixed]
    case: dict[str, Any] = {
        "case": name,
        **settings,
        **{
            each.name: median_range([getattr(turn, each.name) for turn in turns], 2)
            for each in fields(Figures)
        },
        "num_mixed_steps": len(mixed) // len(runs),
        "prompt_tokens_a_step": {
            "p10": percentile(budgets, 10),
            "p50": percentile(budgets, 50),
            "p90": percentile(budgets, 90),
        },
        "mixed_step_ms": {
            "p50": round(percentile(took_ms, 50), 2),
            "p90": round(percentile(took_ms, 90), 2),
            "max": round(max(took_ms), 2),
        },
    }
    if target_ms := settings.get("target_itl_ms"):
        within = sum(each <= target_ms for each in took_ms)
        case["share_of_mixed_steps_within_target"] = round(within / len(took_ms), 3)
    return case


def checks_of(runs: dict[str, list[Run]], device: str) -> list[Check]:
    """Each chunked side beside the one without chunks."""
    turns = {name: [figures(run) for run in each] for name, each in runs.items()}
    whole = turns.pop(UNCHUNKED)
    checks = []
    for name, chunked in turns.items():
        itl = median(each.itl_p99 for each in chunked) / median(each.itl_p99 for each in whole)
        throughput = median(each.tokens_per_s for each in chunked) / median(
            each.tokens_per_s for each in whole
        )
        checks += [
            Check(name=f"p99 ITL, {name} / {UNCHUNKED}", value=itl, most=ITL_BOUND),
            Check(
                name=f"tokens/s, {name} / {UNCHUNKED}",
                value=throughput,
                least=THROUGHPUT_BOUNDS[device],
            ),
        ]
    return checks


def measured(
    engine: LocalEngine,
    settings: dict[str, dict[str, Any]],
    stream_tokens: int,
    arguments: Namespace,
    arrivals: int,
) -> dict[str, list[Run]] | None:
    """Runs all sides in turns; None where the streams of one were too short, but might be longer.

    Raises:
        RuntimeError: They were too short, and the cache has no room for longer ones.
    """
    requests = workload(engine, arguments.prompt_tokens, arrivals, stream_tokens)
    runs: dict[str, list[Run]] = {name: [] for name in settings}
    for _ in range(1 if arguments.quick else arguments.turns):
        for name, each in settings.items():
            run = engine.run(engine.scheduler(**each), requests)
            try:
                split(run)
            except RuntimeError as error:
                if stream_tokens >= ROOM:
                    raise
                print(f"{name}, {stream_tokens} tokens a stream: {error}", file=sys.stderr)
                return None
            runs[name].append(run)
    return runs


def main() -> int:
    """Measures, prints, writes the result; 1 where a bound is missed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=1792)
    parser.add_argument("--arrivals", type=int, default=8, help="long prompts on each side")
    parser.add_argument("--budget", type=int, default=256, help="tokens of a step, by number")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    arrivals = 3 if arguments.quick else arguments.arrivals
    with model_folder(arguments) as folder:
        engine = LocalEngine(
            EngineConfig(
                model=folder,
                device=arguments.device,
                max_num_seqs=MAX_NUM_SEQS,
                max_num_batched_tokens=MAX_NUM_SEQS + arguments.prompt_tokens,
                kv_cache_tokens=KV_CACHE_TOKENS,
                enable_prefix_caching=False,  # every long prompt is computed, on each side
            )
        )
    calibration = calibrate(engine, arguments.prompt_tokens, arrivals, arguments.budget)
    settings = sides(calibration, arguments)
    stream_tokens = calibration.stream_tokens
    while (runs := measured(engine, settings, stream_tokens, arguments, arrivals)) is None:
        stream_tokens = min(ROOM, 3 * stream_tokens // 2)
    cases = [
        {
            "case": "workload",
            "num_streams": NUM_STREAMS,
            "output_tokens_each": stream_tokens,
            "arrivals": arrivals,
            "prompt_tokens": arguments.prompt_tokens,
            "decode_step_ms": round(calibration.decode_ms, 2),
        },
        *(summary(name, settings[name], runs[name]) for name in settings),
    ]
    checks = checks_of(runs, arguments.device)
    return report("long_prompts", arguments, engine.device, cases, checks)


if __name__ == "__main__":
    sys.exit(main())
