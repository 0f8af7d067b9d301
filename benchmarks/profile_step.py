"""Where the time of a decoding step goes on a GPU: its kernels, and the memory's limit for each.

Sequences of random tokens are brought to a context, then some steps are recorded with torch's
profiler, while the engine's own pipeline launches them ahead as ever. Kernels are put together by
what they do; the limit is the time in which the bytes that they must read and write pass at the
rate of a device copy.

With programmatic dependent launch a kernel begins before the one in front of it ends, and waits:
its time counts twice then, so that the times of all kernels together may exceed that of the step.
"gaps" is therefore not the rest, but the time of a step in which no kernel was there at all.
Prints a table a case and writes `benchmarks/results/profile_step.json`.

    python benchmarks/profile_step.py --shape llama3-8b --case 1/1024 64/512
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from gpu_ceilings import copy_bandwidth, product_shapes
from gpu_runs import MAX_MODEL_LEN, MAX_NUM_SEQS, engine_of, make_parser, write_results
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.build import Engine
from mini_infer_engine.pipeline import StepPipeline
from mini_infer_engine.sequence import StreamKey
from model_shapes import random_prompts
from random_checkpoint import SHAPES
from torch.autograd import DeviceType

NUM_STEPS = 20
LEAST_ROOM = 128
"""Tokens that sequences can still get at least: for the steps until all decode, and the measured
ones."""
BF16 = 2
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("_decode_kernel", "_prefill_kernel", "_schedule_kernel"),
    "norm, turn and store": ("_qk_norm_rope_store_kernel", "_rope_kernel", "_store_kv_kernel"),
    "norms": ("rmsnorm_kernel",),
    "gates": ("_gate_kernel",),
    "embedding and inputs": (
        "_embedding_kernel",
        "_step_inputs_kernel",
        "_update_tables_kernel",
        "index",
        "gather",
    ),
    "products": ("gemv", "gemm", "nvjet", "cutlass", "cublas", "splitk", "sm90_xmma"),
    "sampling": (
        "scan_kernel",
        "select_kernel",
        "whole_row_kernel",
        "rank_kernel",
        "logits_kernel",
        "counts_kernel",
        "count_tokens_kernel",
        "penalties_kernel",
        "reduce_kernel",
        "argmax",
        "elementwise",
    ),
    "copies": ("memcpy", "memset"),
}
"""Parts of kernels' names in small letters by what they do; the first that fits counts, then
"others". What torch does element by element in a step of these shapes belongs to the choice of
tokens."""


class Case(NamedTuple):
    """Rows that decode, and the tokens that each has."""

    num_rows: int
    context: int


class Kernel(NamedTuple):
    """A kernel or copy on the device, from when to when in microseconds."""

    name: str
    start_us: float
    end_us: float


class Group(NamedTuple):
    """Kernels of a kind in a step: how many, and their times together."""

    launches: float
    us: float


class Profile(NamedTuple):
    """What a step takes.

    Attributes:
        groups: Its kernels.
        busy_us: Time in which at least one of them is there.
        step_us: From step to step, without the profiler.
        num_visible: Tokens that its rows attend to.
    """

    groups: Mapping[str, Group]
    busy_us: float
    step_us: float
    num_visible: int


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
                limits = limits_us(SHAPES[shape], case, measured.num_visible, copy_bytes_s)
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
    most = MAX_MODEL_LEN - LEAST_ROOM
    if case.num_rows > MAX_NUM_SEQS or case.context > most:
        raise argparse.ArgumentTypeError(
            f"expected at most {MAX_NUM_SEQS} rows of {most} tokens, got {text}"
        )
    return case


def profile(engine: Engine, shape: str, case: Case) -> Profile:
    """Brings sequences to their context, times some steps, and records as many."""
    prompts = random_prompts(case.num_rows, case.context, SHAPES[shape]["vocab_size"], seed=0)
    sampling = ResolvedSampling(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        max_tokens=MAX_MODEL_LEN - case.context,
        ignore_eos=True,
    )
    pipeline = StepPipeline(engine.scheduler, engine.runner, engine.served.fill_masks)
    keys = [StreamKey(b"", stream) for stream in range(case.num_rows)]
    for key, prompt in zip(keys, prompts, strict=True):
        (sequence,) = engine.served.sequences([key], prompt, sampling)
        engine.scheduler.add(sequence, now=time.monotonic())
    while run_step(pipeline).num_decodes < case.num_rows:
        if pipeline.is_idle:
            raise RuntimeError(f"the first of {case} ended before the last one decoded: take fewer")
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        run_step(pipeline)
    step_us = (time.perf_counter() - started) / NUM_STEPS * 1e6
    kernels, batch = record(pipeline)
    for key in keys:
        engine.scheduler.abort(key, time.monotonic())
    while not pipeline.is_idle:
        run_step(pipeline)
    intervals = [(kernel.start_us, kernel.end_us) for kernel in kernels]
    return Profile(
        groups=grouped(kernels, NUM_STEPS),
        busy_us=covered_us(intervals) / NUM_STEPS,
        step_us=step_us,
        num_visible=int(batch.num_computed_tokens.sum()) + case.num_rows,
    )


def run_step(pipeline: StepPipeline) -> ScheduledBatch:
    """A step as the engine runs it, without what comes of it."""
    return pipeline.finish(pipeline.launch()).batch


def record(pipeline: StepPipeline) -> tuple[list[Kernel], ScheduledBatch]:
    """The kernels of as many steps as are counted, and the last batch that was waited for."""
    torch.cuda.synchronize()  # the step that was launched ahead is over, and not recorded
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_STEPS):
            batch = run_step(pipeline)
        torch.cuda.synchronize()
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return kernels, batch


def grouped(kernels: Iterable[Kernel], num_steps: int) -> dict[str, Group]:
    """Launches and microseconds a step of each group of `GROUPS`, and of the others."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        found[group_of(kernel.name)].append(kernel.end_us - kernel.start_us)
    return {
        name: Group(len(times) / num_steps, sum(times) / num_steps) for name, times in found.items()
    }


def covered_us(intervals: Sequence[tuple[float, float]]) -> float:
    """The time that lies in at least one interval, each from a start to an end."""
    covered, behind = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, behind))
        behind = max(behind, end)
    return covered


def group_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    for group, parts in GROUPS.items():
        if any(part in name for part in parts):
            return group
    return "others"


def limits_us(
    config: Mapping[str, Any], case: Case, num_visible: int, copy_bytes_s: float
) -> dict[str, float]:
    """The least time of each group in a step.

    Args:
        config: Content of config.json.
        case: The rows.
        num_visible: Tokens that they attend to, together.
        copy_bytes_s: Bytes a second of a device copy.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // q_heads)
    rows = case.num_rows
    weights = sum(n * k * count for n, k, count in product_shapes(config)) * BF16
    heads = q_heads + 2 * kv_heads
    num_bytes = {
        "products": weights,
        "attention": num_visible * 2 * kv_heads * head_dim * layers * BF16,
        "norms": 2 * rows * hidden * (2 * layers + 1) * BF16,
        "norm, turn and store": 2 * rows * heads * head_dim * layers * BF16,
        "gates": 3 * rows * config["intermediate_size"] * layers * BF16,
    }
    return {name: each / copy_bytes_s * 1e6 for name, each in num_bytes.items()}


def table(measured: Profile, limits: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each group, the longest first, then the gaps between kernels, then the step."""
    step_us = measured.step_us
    rows: list[dict[str, Any]] = []
    for name, group in sorted(measured.groups.items(), key=lambda item: -item[1].us):
        limit = limits.get(name)
        rows.append(
            {
                "what": name,
                "launches": round(group.launches),
                "us": round(group.us, 1),
                "share_of_step": round(group.us / step_us, 3),
                "limit_us": None if limit is None else round(limit, 1),
                "share_of_limit": None if limit is None else round(limit / group.us, 3),
            }
        )
    gaps_us = step_us - measured.busy_us
    gaps = {"what": "gaps", "us": round(gaps_us, 1), "share_of_step": round(gaps_us / step_us, 3)}
    step = {"what": "step", "us": round(step_us, 1), "limit_us": round(sum(limits.values()), 1)}
    return [*rows, gaps, step]


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
