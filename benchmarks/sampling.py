"""What sampling costs: Triton's kernels beside greedy decoding and a sampler made of torch's sort.

A case is a batch of logits and the parameters of its rows. On a GPU one CUDA graph holds a step
on each of many batches, so that no logits are left in the cache from the step before; a step's
time is the median replay over the number of steps. Eager time is the wall time of one step with
its launches. The mark is the same work with dense penalties, a full sort, cumulative sums and
`multinomial`. Prints a line of JSON a case and a table, writes `benchmarks/results/sampling-h200
.json` (or the name of another GPU), and exits with 1 where everything turned on costs more than
250 us beyond greedy at batch 256 and vocabulary 128,256, or over a tenth of the mark.

    python benchmarks/sampling.py --device cuda

On a CPU the references run, with small sizes, and only ratios are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import environment
from mini_infer_kernels.sampling_kernels import (
    REFERENCE_SAMPLING,
    DrawControls,
    SamplingKernels,
    TokenCounts,
    triton_sampling,
)
from sort_sampler import SortSampler

RESULTS = Path(__file__).parent / "results"
BOUND_US = 250
BOUND_RATIO = 0.1
BOUND_SHAPE = (256, 128_256)
NUM_SEEN = 1000
"""Distinct tokens of a row's history."""
ROTATED_BYTES = 2**29
"""Logits of all batches of a graph: several times the cache of an H200 (60 MB)."""
MAX_STEPS = 128
NUM_REPLAYS = 15
NUM_EAGER_STEPS = 30
PENALTIES = (1.0001, 1e-4, 1e-4)
"""Almost nothing, since each replay penalises the same logits again; the work is the same."""


@dataclass(frozen=True, slots=True)
class RowParams:
    """Parameters of a row, each off by default."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    is_penalised: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        name: In the results.
        rows: Parameters, used in turn by the rows of a batch.
        kinds: Of logits: "gaussian" is flat, "peaked" falls with rank as words do.
        has_mark: Whether the sort-based sampler is measured too.
        num_top: Likeliest tokens whose log-probabilities are computed; with 0, tokens are chosen.
    """

    name: str
    rows: tuple[RowParams, ...]
    kinds: tuple[str, ...] = ("gaussian", "peaked")
    has_mark: bool = False
    num_top: int = 0


ALL_ON = RowParams(0.8, top_k=50, top_p=0.95, min_p=0.01, is_penalised=True)
MIXED = (
    RowParams(0.0),
    RowParams(0.7),
    RowParams(0.7, top_k=40),
    RowParams(0.7, top_p=0.9),
    RowParams(1.0, min_p=0.05, is_penalised=True),
    ALL_ON,
    RowParams(0.0, is_penalised=True),
    RowParams(0.8, top_k=50, typical_p=0.9),
)
GREEDY = Case("greedy", (RowParams(0.0),))
EVERYTHING = Case("all on", (ALL_ON,), has_mark=True)
CASES = (
    GREEDY,
    Case("temperature", (RowParams(0.8),)),
    Case("top-k", (RowParams(0.8, top_k=50),)),
    Case("top-p", (RowParams(0.8, top_p=0.95),)),
    Case("min-p", (RowParams(0.8, min_p=0.05),)),
    Case("typical-p", (RowParams(0.8, typical_p=0.95),)),
    Case("top-k, top-p, penalties", (replace(ALL_ON, min_p=0.0),), has_mark=True),
    EVERYTHING,
    Case("mixed rows", MIXED, kinds=("peaked",)),
    Case("logprobs 20", (RowParams(0.0),), num_top=20),
)
WIDE_CASES = (GREEDY, EVERYTHING)


class Workload:
    """A case's batches, and one step on one of them."""

    def __init__(
        self, case: Case, kind: str, shape: tuple[int, int], device: torch.device, num_steps: int
    ) -> None:
        """Draws logits and histories from a seed."""
        self._case = case
        num_rows, vocab_size = shape
        generator = torch.Generator(device).manual_seed(0)
        self.batches = [make_logits(kind, shape, generator) for _ in range(num_steps)]
        rows = [case.rows[row % len(case.rows)] for row in range(num_rows)]
        self._controls = make_controls(rows, vocab_size, device)
        self._slots = torch.arange(num_rows, device=device)
        penalised = torch.tensor([row.is_penalised for row in rows], device=device)
        self._is_penalised = bool(penalised.any())
        off = torch.tensor([[1.0], [0.0], [0.0]], device=device)
        on = torch.tensor(PENALTIES, device=device)[:, None]
        self._amounts = torch.where(penalised, on, off).contiguous()
        self._counts = TokenCounts(num_rows, vocab_size, 2 * NUM_SEEN, device)
        if self._is_penalised:
            self._make_history(vocab_size, generator)

    def _make_history(self, vocab_size: int, generator: torch.Generator) -> None:
        ids = torch.randint(
            vocab_size, (len(self._slots), NUM_SEEN), generator=generator, device=generator.device
        )
        is_output = torch.arange(NUM_SEEN, device=generator.device) % 2 == 0
        REFERENCE_SAMPLING.count_tokens(
            self._counts,
            self._slots[:, None].expand_as(ids).reshape(-1),
            ids.reshape(-1),
            is_output.expand_as(ids).reshape(-1),
        )

    def run(self, kernels: SamplingKernels, logits: torch.Tensor) -> Any:
        """One step by our kernels."""
        if self._case.num_top:
            return kernels.token_logprobs(logits, self._slots, self._case.num_top)
        if self._is_penalised:
            kernels.apply_penalties(logits, self._counts, self._slots, *self._amounts)
        return kernels.choose_tokens(logits, self._controls)

    def sort_sampler(self) -> SortSampler:
        """The mark, with the same parameters."""
        return SortSampler(self._controls, self._counts.counts, self._amounts)


def make_logits(kind: str, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """[rows, vocab_size] float32."""
    device = generator.device
    noise = torch.randn(shape, generator=generator, device=device)
    if kind == "gaussian":
        return noise
    shuffled = torch.rand(shape, generator=generator, device=device).argsort(-1)
    return noise.mul_(0.5).sub_(torch.log1p(shuffled), alpha=1.5)


def make_controls(rows: Sequence[RowParams], vocab_size: int, device: torch.device) -> DrawControls:
    """The rows' parameters as tensors; no row has a mask."""

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype, device=device)

    numbers = torch.arange(len(rows), device=device)
    return DrawControls(
        temperatures=column("temperature", torch.float32),
        top_ks=column("top_k", torch.int32),
        top_ps=column("top_p", torch.float32),
        min_ps=column("min_p", torch.float32),
        typical_ps=column("typical_p", torch.float32),
        seeds=numbers,
        positions=numbers,
        mask_indices=torch.full_like(numbers, -1, dtype=torch.int32),
        masks=torch.empty(0, -(-vocab_size // 32), dtype=torch.int32, device=device),
    )


def graph_us(step: Callable[[torch.Tensor], Any], batches: Sequence[torch.Tensor]) -> float:
    """Median microseconds of a step in a graph of one step a batch."""
    step(batches[0])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for logits in batches:
            step(logits)
    times = []
    for _ in range(NUM_REPLAYS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) * 1000 / len(batches))
    graph.reset()
    return statistics.median(times)


def eager_us(step: Callable[[torch.Tensor], Any], batches: Sequence[torch.Tensor]) -> float:
    """Median wall microseconds of a step, its launches and the wait for it."""
    times = []
    for index in range(NUM_EAGER_STEPS):
        started = time.perf_counter()
        step(batches[index % len(batches)])
        if batches[0].is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


def measure(
    case: Case, kind: str, shape: tuple[int, int], device: torch.device, kernels: SamplingKernels
) -> dict[str, Any]:
    """One line of the results; times in microseconds."""
    on_gpu = device.type == "cuda"
    num_bytes = shape[0] * shape[1] * 4
    num_steps = min(max(ROTATED_BYTES // num_bytes, 4), MAX_STEPS) if on_gpu else 2
    workload = Workload(case, kind, shape, device, num_steps)
    step = partial(workload.run, kernels)
    line: dict[str, Any] = {"case": case.name, "logits": kind, "batch": shape[0], "vocab": shape[1]}
    if on_gpu:
        line["graph_us"] = round(graph_us(step, workload.batches), 1)
    line["eager_us"] = round(eager_us(step, workload.batches), 1)
    if case.has_mark:
        sampler = workload.sort_sampler()
        # Its sorts and sums leave nothing of the logits in the cache anyway.
        batches = workload.batches[:4]
        time_of = graph_us if on_gpu else eager_us
        line["sort_us"] = round(time_of(sampler.choose, batches), 1)
        line["ratio"] = round(line["graph_us" if on_gpu else "eager_us"] / line["sort_us"], 4)
    return line


def with_greedy(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds what each case costs beyond greedy on the same logits."""
    name = "graph_us" if "graph_us" in lines[0] else "eager_us"
    greedy = {
        (line["logits"], line["batch"], line["vocab"]): line[name]
        for line in lines
        if line["case"] == GREEDY.name
    }
    for line in lines:
        base = greedy[line["logits"], line["batch"], line["vocab"]]
        line["beyond_greedy_us"] = round(line[name] - base, 1)
        line["times_greedy"] = round(line[name] / base, 2)
    return lines


def is_missed(line: dict[str, Any]) -> bool:
    """Whether a line misses a bound that the issue sets for it."""
    if line["case"] != EVERYTHING.name or (line["batch"], line["vocab"]) != BOUND_SHAPE:
        return False
    return bool(line["beyond_greedy_us"] > BOUND_US or line["ratio"] > BOUND_RATIO)


def print_table(lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Prints the lines below each other."""
    widths = [max(len(name), *(len(str(line.get(name, ""))) for line in lines)) for name in columns]
    for row in (dict(zip(columns, columns, strict=True)), *lines):
        cells = zip(columns, widths, strict=True)
        print("  ".join(str(row.get(name, "")).rjust(width) for name, width in cells))


def main() -> int:
    """Measures, prints, writes the result; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    on_gpu = device.type == "cuda"
    kernels = triton_sampling() if on_gpu else REFERENCE_SAMPLING
    sizes = [(batch, 128_256) for batch in (1, 8, 64, 256)] if on_gpu else [(4, 8192)]
    plan = [(case, kind, shape) for shape in sizes for case in CASES for kind in case.kinds]
    if on_gpu:
        plan += [(case, kind, (256, 151_936)) for case in WIDE_CASES for kind in case.kinds]
    machine = environment("torch", "triton") if on_gpu else {}
    lines = with_greedy([measure(*each, device, kernels) for each in plan])
    for line in lines:
        print(json.dumps(line))
    names = ["case", "logits", "batch", "vocab"]
    if not on_gpu:
        print_table(lines, [*names, "times_greedy", "ratio"])
        return 0
    columns = ["graph_us", "beyond_greedy_us", "sort_us", "ratio", "eager_us"]
    print_table(lines, [*names, *columns])
    gpu = torch.cuda.get_device_name(device)
    result = {
        **machine,
        "gpu": gpu,
        "bounds": {"beyond_greedy_us": BOUND_US, "ratio": BOUND_RATIO},
        "cases": lines,
    }
    path = RESULTS / f"sampling-{gpu.split()[-1].lower()}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if any(map(is_missed, lines)) else 0


if __name__ == "__main__":
    sys.exit(main())
