"""Where the time of a decoding step goes on a GPU: its kernels, and the memory's limit for each.

Sequences of random tokens are brought to a context, then some steps are recorded with torch's
profiler. Kernels are put together by what they do; the limit is the time in which the bytes that
they must read and write pass at the rate of a device copy. "host" is what a step takes beyond its
kernels. Prints a table a case and writes `benchmarks/results/profile_step.json`.

    python benchmarks/profile_step.py --shape llama3-8b --case 1/1024 64/512
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from gpu_ceilings import copy_bandwidth, product_shapes
from gpu_runs import MAX_NUM_SEQS, engine_of, make_parser, write_results
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.build import Engine
from mini_infer_engine.sequence import StreamKey
from model_shapes import random_prompts
from random_checkpoint import SHAPES

NUM_STEPS = 20
BF16 = 2
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("decode_attention", "_attention_kernel", "schedule_kernel"),
    "norm, turn and store": ("qk_norm", "rope", "store"),
    "norms": ("rmsnorm",),
    "gates": ("silu", "gelu"),
    "products": ("gemv", "gemm", "cutlass", "nvjet", "cublas", "splitk", "sm90", "gemvx"),
}
"""Parts of kernels' names by what they do; the first that fits counts, then "others"."""


class Case(NamedTuple):
    """Rows that decode, and the tokens that each has."""

    num_rows: int
    context: int


def main() -> int:
    """Profiles what the command line names."""
    parser = make_parser(__doc__.splitlines()[0])
    cases = [Case(1, 1024), Case(64, 512), Case(256, 256)]
    parser.add_argument("--case", nargs="+", type=read_case, default=cases, help="rows/context")
    options = parser.parse_args()
    copy_bytes_s = copy_bandwidth()
    results = []
    for shape in options.shape:
        with engine_of(shape) as engine:
            for case in options.case:
                measured = profile(engine._engine, shape, case)
                limits = limits_us(SHAPES[shape], case, copy_bytes_s)
                rows = table(measured, limits)
                results.append({"shape": shape, **case._asdict(), "rows": rows})
                print_table(shape, case, rows)
    write_results("profile_step", options.results, {"copy_tb_s": copy_bytes_s / 1e12}, results)
    return 0


def read_case(text: str) -> Case:
    """Reads 64/512."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected rows/context, got {text}")
    case = Case(*map(int, parts))
    if case.num_rows > MAX_NUM_SEQS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_NUM_SEQS} rows, got {text}")
    return case


def profile(engine: Engine, shape: str, case: Case) -> dict[str, tuple[float, float]]:
    """Launches and microseconds a step of each group of kernels; "step" is the wall time."""
    prompts = random_prompts(case.num_rows, case.context, SHAPES[shape]["vocab_size"], seed=0)
    sampling = ResolvedSampling(
        temperature=0.0, top_k=0, top_p=1.0, seed=0, max_tokens=3 * NUM_STEPS, ignore_eos=True
    )
    scheduler = engine.scheduler
    for stream, prompt in enumerate(prompts):
        sequences = engine.served.sequences([StreamKey(b"", stream)], prompt, sampling)
        scheduler.add(*sequences, now=time.monotonic())
    while run_step(engine).num_decodes < case.num_rows:
        pass
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        run_step(engine)
    wall_us = (time.perf_counter() - started) / NUM_STEPS * 1e6
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(NUM_STEPS):
            run_step(engine)
        torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in profiler.key_averages():
        name = group_of(event.key)
        launches, microseconds = found[name]
        found[name] = (
            launches + event.count / NUM_STEPS,
            microseconds + event.self_device_time_total / NUM_STEPS,
        )
    for stream in range(case.num_rows):
        scheduler.abort(StreamKey(b"", stream), time.monotonic())
    return {**found, "step": (1.0, wall_us)}


def run_step(engine: Engine) -> ScheduledBatch:
    """A step as the engine runs it, without what comes of it."""
    batch = engine.scheduler.schedule(time.monotonic())
    tokens = engine.runner.run(batch)
    engine.scheduler.finish_step(batch, tokens, time.monotonic())
    return batch


def group_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    for group, parts in GROUPS.items():
        if any(part in name for part in parts):
            return group
    return "others"


def limits_us(config: Mapping[str, Any], case: Case, copy_bytes_s: float) -> dict[str, float]:
    """The least time of each group in a step."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // q_heads)
    rows = case.num_rows
    context = case.context + 2 * NUM_STEPS
    weights = sum(n * k * count for n, k, count in product_shapes(config)) * BF16
    heads = q_heads + 2 * kv_heads
    num_bytes = {
        "products": weights,
        "attention": rows * context * 2 * kv_heads * head_dim * layers * BF16,
        "norms": 2 * rows * hidden * (2 * layers + 1) * BF16,
        "norm, turn and store": 2 * rows * heads * head_dim * layers * BF16,
        "gates": 3 * rows * config["intermediate_size"] * layers * BF16,
    }
    return {name: each / copy_bytes_s * 1e6 for name, each in num_bytes.items()}


def table(
    measured: Mapping[str, tuple[float, float]], limits: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each group, the longest first, then what the host adds, then the step."""
    wall_us = measured["step"][1]
    groups = {name: each for name, each in measured.items() if name != "step"}
    kernels_us = sum(microseconds for _, microseconds in groups.values())
    rows = []
    for name, (launches, microseconds) in sorted(groups.items(), key=lambda item: -item[1][1]):
        limit = limits.get(name)
        rows.append(
            {
                "what": name,
                "launches": round(launches),
                "us": round(microseconds, 1),
                "share_of_step": round(microseconds / wall_us, 3),
                "limit_us": None if limit is None else round(limit, 1),
                "share_of_limit": None if limit is None else round(limit / microseconds, 3),
            }
        )
    host_us = wall_us - kernels_us
    rows.append({"what": "host", "us": round(host_us, 1), "share_of_step": host_us / wall_us})
    rows.append({"what": "step", "us": round(wall_us, 1), "limit_us": round(sum(limits.values()))})
    return rows


def print_table(shape: str, case: Case, rows: list[dict[str, Any]]) -> None:
    """Prints a case for people."""
    print(f"\n{shape}, {case.num_rows} rows of {case.context} tokens, us a step")
    keys = ("what", "launches", "us", "share_of_step", "limit_us", "share_of_limit")
    print(" ".join(f"{key:>20}" for key in keys))
    for row in rows:
        cells = ("" if row.get(key) is None else row[key] for key in keys)
        texts = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
        print(" ".join(f"{text:>20}" for text in texts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
