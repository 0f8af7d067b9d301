"""Output tokens a second of the engine on a GPU, all requests at once, beside what vLLM reached.

Weights are random numbers, drawn on the device; decoding is greedy to the full length and the
prefix cache is off. A case is a warm-up run and some timed ones, of which the median counts. First
come the GPU's own limits (`gpu_ceilings.py`). Prints a line of JSON a case, writes
`benchmarks/results/throughput.json`, and exits with 1 where a case on an H200 misses its mark
(`engine_marks.py`).

    python benchmarks/benchmark_throughput.py --shape llama3-8b
    python benchmarks/benchmark_throughput.py --shape qwen3-0.6b --case 32/100/50
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from engine_marks import GPU, THROUGHPUT, Load
from gpu_runs import engine_of, make_parser, print_ceilings, timed_generate, write_results
from mini_infer import LLMEngine


def main() -> int:
    """Measures what the command line names."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--case",
        nargs="+",
        type=read_load,
        help="requests/tokens in/tokens out, in place of those with marks",
    )
    options = parser.parse_args()
    ceilings = print_ceilings(options.shape)
    cases: list[dict[str, Any]] = []
    for shape in options.shape:
        with engine_of(shape) as engine:
            for load in options.case or THROUGHPUT[shape]:
                cases.append(measure(engine, shape, load, options.runs))
                print(json.dumps(cases[-1]), flush=True)
    write_results("throughput", options.results, ceilings, cases)
    return 0 if all(case.get("is_met", True) for case in cases) else 1


def read_load(text: str) -> Load:
    """Reads 64/512/128."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected requests/tokens in/tokens out, got {text}")
    return Load(*map(int, parts))


def measure(engine: LLMEngine, shape: str, load: Load, num_runs: int) -> dict[str, Any]:
    """One case: a warm-up run, then the timed ones."""
    timed_generate(engine, shape, load, seed=0)
    num_steps = engine.num_steps
    seconds = [timed_generate(engine, shape, load, seed) for seed in range(1, num_runs + 1)]
    num_steps = (engine.num_steps - num_steps) // num_runs
    rates = [load.num_requests * load.output_len / each for each in seconds]
    case: dict[str, Any] = {
        "shape": shape,
        **load._asdict(),
        "tokens_per_s": round(statistics.median(rates)),
        "least": round(min(rates)),
        "most": round(max(rates)),
        "num_steps": num_steps,
        "ms_per_step": round(statistics.median(seconds) / num_steps * 1e3, 3),
    }
    mark = THROUGHPUT.get(shape, {}).get(load)
    if mark is not None and GPU in torch.cuda.get_device_name():
        share = statistics.median(rates) / mark.tokens_per_s
        case |= {
            "vllm_tokens_per_s": mark.tokens_per_s,
            "share_of_vllm": round(share, 3),
            "least_share": mark.least_share,
            "is_met": share >= mark.least_share,
        }
    return case


if __name__ == "__main__":
    sys.exit(main())
