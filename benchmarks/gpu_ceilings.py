"""What this GPU can do at most, measured before anything is compared with it.

Device copy bandwidth, one large matrix product, and the matrix products of a decode step through
cuBLAS: the figures that other measurements are read against.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COPY_BYTES = 2**32
MATMUL_SIZE = 8192
STEP_BATCHES = (1, 16, 32, 64, 128, 256, 512)
_NUM_RUNS = 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of equal runs.

    Attributes:
        median_us: Microseconds a run.
        least_us: The fastest.
        most_us: The slowest.
    """

    median_us: float
    least_us: float
    most_us: float

    @classmethod
    def of(cls, times_us: Sequence[float]) -> Timing:
        """The summary of some times."""
        return cls(statistics.median(times_us), min(times_us), max(times_us))


def graph_timing(calls: Sequence[Callable[[], object]], num_replays: int = _NUM_RUNS) -> Timing:
    """Device time of a call, in one CUDA graph that holds all of them.

    Args:
        calls: Each on inputs of its own; together larger than the L2 cache, each finds it cold.
        num_replays: Replays that are timed.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return Timing.of([each / len(calls) for each in _event_times(graph.replay, num_replays)])


def eager_timing(call: Callable[[], object], num_runs: int = _NUM_RUNS) -> Timing:
    """Time of a call with the launches of its operations, one call after another."""
    for _ in range(5):
        call()
    return Timing.of(_event_times(call, num_runs))


def _event_times(call: Callable[[], object], num_runs: int) -> list[float]:
    """Microseconds of each run, by device events."""
    torch.cuda.synchronize()
    times = []
    for _ in range(num_runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def copy_bandwidth() -> float:
    """Bytes a second that a device copy reads and writes, by a kernel.

    In a CUDA graph `copy_` would be the driver's, which reaches two thirds of it.
    """
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    timing = eager_timing(lambda: torch.neg(source, out=target))
    return 2 * COPY_BYTES / (timing.median_us * 1e-6)


def matmul_rate() -> float:
    """Operations a second of a large bf16 product of random numbers."""
    left, right = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    timing = graph_timing([lambda: left @ right] * 4)
    return 2 * MATMUL_SIZE**3 / (timing.median_us * 1e-6)


def product_shapes(config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The matrix products of a decode step: rows and columns of each weight, and how many.

    Args:
        config: Content of config.json, in the form of Llama.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // q_heads)
    intermediate = config["intermediate_size"]
    return [
        ((q_heads + 2 * kv_heads) * head_dim, hidden, layers),
        (hidden, q_heads * head_dim, layers),
        (2 * intermediate, hidden, layers),
        (hidden, intermediate, layers),
        (config["vocab_size"], hidden, 1),
    ]


def cublas_step_us(config: Mapping[str, Any], num_rows: int) -> float:
    """Microseconds of all matrix products of a decode step through cuBLAS in one CUDA graph."""
    products: list[tuple[torch.Tensor, torch.Tensor]] = []
    for rows, columns, count in product_shapes(config):
        x = torch.randn(num_rows, columns, dtype=torch.bfloat16, device="cuda")
        for _ in range(count):
            weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
            products.append((x, weight.normal_()))

    def step() -> None:
        for x, weight in products:
            x @ weight.t()

    return graph_timing([step], num_replays=10).median_us


def measure_ceilings(shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All of them, as JSON.

    Args:
        shapes: config.json by the name of the model, for the table of steps.
    """
    ceilings = {
        "copy_tb_s": round(copy_bandwidth() / 1e12, 3),
        "matmul_tflop_s": round(matmul_rate() / 1e12, 1),
        "cublas_step_ms": {
            name: {str(rows): round(cublas_step_us(config, rows) / 1e3, 3) for rows in STEP_BATCHES}
            for name, config in shapes.items()
        },
    }
    torch.cuda.empty_cache()  # an engine is to have all of it
    return ceilings
