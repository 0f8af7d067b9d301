"""What the benchmarks of single kernels share: cold inputs, the report, the GPU's limits.

Run a script of this folder by itself, such as `python benchmarks/kernels/rmsnorm.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts of the folder above

from gpu_ceilings import (
    Timing,
    copy_bandwidth,
    eager_timing,
    graph_timing,
    matmul_rate,
)
from machine import environment
from random_checkpoint import SHAPES

__all__ = ["SHAPES", "Report", "Timing", "cold", "eager_timing", "graph_timing", "host_us"]

RESULTS = Path(__file__).parents[1] / "results" / "kernels"
COLD_BYTES = 2**28
"""Inputs of all calls of a graph together: several times the L2 cache of an H200 (60 MB)."""
_MOST_CALLS = 256


def cold(make_call: Callable[[], Callable[[], object]], call_bytes: int) -> Timing:
    """Device time of a call that finds its inputs in device memory, not in the L2 cache.

    Args:
        make_call: Makes a call with inputs and outputs of its own.
        call_bytes: What one call reads and writes.
    """
    num_calls = min(_MOST_CALLS, max(2, math.ceil(COLD_BYTES / call_bytes)))
    return graph_timing([make_call() for _ in range(num_calls)])


def host_us(call: Callable[[], object], num_calls: int = 200) -> float:
    """Microseconds of the host for a call, while the device keeps up or not."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(num_calls):
        call()
    elapsed = time.perf_counter() - started
    torch.cuda.synchronize()
    return elapsed / num_calls * 1e6


@dataclass
class Report:
    """Prints a line of JSON a case and keeps them for the results.

    Attributes:
        op: What is measured; names the file of results.
        copy_bytes_s: Bytes a second of a device copy: the memory limit.
        flop_s: Operations a second of a large matrix product.
        cases: What was added.
    """

    op: str
    copy_bytes_s: float = field(default_factory=copy_bandwidth)
    flop_s: float = field(default_factory=matmul_rate)
    cases: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Says what the figures are read against."""
        print(f"copy {self.copy_bytes_s / 1e12:.2f} TB/s, matmul {self.flop_s / 1e12:.0f} TFLOP/s")

    def floor_us(self, num_bytes: float, num_flops: float = 0.0) -> float:
        """The least time of moving bytes, each once, and of arithmetic; the larger of the two."""
        return max(num_bytes / self.copy_bytes_s, num_flops / self.flop_s) * 1e6

    def add(self, **case: Any) -> None:
        """Adds a case; times in microseconds, names ending in `_us`."""
        rounded = {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in case.items()
        }
        self.cases.append(rounded)
        print(json.dumps(rounded), flush=True)

    def write(self) -> None:
        """Writes `benchmarks/results/kernels/<op>.json`."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        content = {
            **environment("torch", "triton"),
            "gpu": torch.cuda.get_device_name(),
            "copy_tb_s": round(self.copy_bytes_s / 1e12, 3),
            "matmul_tflop_s": round(self.flop_s / 1e12, 1),
            "cases": self.cases,
        }
        file = RESULTS / f"{self.op}.json"
        file.write_text(json.dumps(content, indent=2) + "\n")


def parse_options(description: str) -> argparse.Namespace:
    """The options of every script: `--shape`, several or none for all."""
    parser = argparse.ArgumentParser(description=description)
    names = ["llama2-7b", "llama3-8b", "qwen3-0.6b"]
    parser.add_argument("--shape", choices=names, nargs="+", default=names)
    return parser.parse_args()
