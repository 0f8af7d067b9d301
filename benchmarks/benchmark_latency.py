"""One request at a time on a GPU: milliseconds to the first token, and for each one after it.

Weights are random numbers, drawn on the device; 128 tokens in, 257 out, greedy. The time of the
first token is that of a request for a single one; the others share what a longer request takes
beyond it. First come the GPU's own limits (`gpu_ceilings.py`). Prints a line of JSON a shape,
writes `benchmarks/results/latency.json`, and exits with 1 where one on an H200 misses its mark
(`engine_marks.py`).

    python benchmarks/benchmark_latency.py --shape qwen3-0.6b
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch
from engine_marks import GPU, LATENCY, Load
from gpu_runs import engine_of, make_parser, print_ceilings, timed_generate, write_results
from mini_infer import LLMEngine

PROMPT_LEN = 128
OUTPUT_LEN = 257
RUNS_PER_RUN = 5
"""First tokens are timed so many times as often: they take milliseconds."""


def main() -> int:
    """Measures what the command line names."""
    parser = make_parser(__doc__.splitlines()[0])
    options = parser.parse_args()
    ceilings = print_ceilings(options.shape)
    cases = []
    for shape in options.shape:
        with engine_of(shape) as engine:
            cases.append(measure(engine, shape, options.runs))
            print(json.dumps(cases[-1]), flush=True)
    write_results("latency", options.results, ceilings, cases)
    return 0 if all(case.get("is_met", True) for case in cases) else 1


def measure(engine: LLMEngine, shape: str, num_runs: int) -> dict[str, Any]:
    """One shape."""
    first = _seconds(engine, shape, 1, num_runs * RUNS_PER_RUN)
    whole = _seconds(engine, shape, OUTPUT_LEN, num_runs)
    ttft = statistics.median(first)
    per_token = [(each - ttft) / (OUTPUT_LEN - 1) * 1e3 for each in whole]
    case: dict[str, Any] = {
        "shape": shape,
        "prompt_len": PROMPT_LEN,
        "ms_per_token": round(statistics.median(per_token), 3),
        "least": round(min(per_token), 3),
        "most": round(max(per_token), 3),
        "ttft_ms": round(ttft * 1e3, 2),
        "ttft_least": round(min(first) * 1e3, 2),
        "ttft_most": round(max(first) * 1e3, 2),
    }
    mark = LATENCY.get(shape)
    if mark is not None and GPU in torch.cuda.get_device_name():
        is_fast = case["ms_per_token"] <= mark.most_ms_per_token
        starts_fast = mark.most_ttft_ms is None or case["ttft_ms"] <= mark.most_ttft_ms
        case |= {**mark._asdict(), "is_met": is_fast and starts_fast}
    return case


def _seconds(engine: LLMEngine, shape: str, output_len: int, num_runs: int) -> list[float]:
    load = Load(1, PROMPT_LEN, output_len)
    runs = [timed_generate(engine, shape, load, seed) for seed in range(num_runs + 1)]
    return runs[1:]


if __name__ == "__main__":
    sys.exit(main())
