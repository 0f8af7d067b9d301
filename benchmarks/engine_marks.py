"""What vLLM 0.26.0 reached on an H200, and the share of it that is to be reached here.

bf16, random weights, greedy, ignore_eos, prefix cache off, all requests at once, offline; output
tokens a second, median of three (FlashAttention-3, full and piecewise CUDA graphs, torch.compile).
"""

from __future__ import annotations

from typing import NamedTuple

GPU = "H200"


class Load(NamedTuple):
    """Requests of equal lengths."""

    num_requests: int
    prompt_len: int
    output_len: int


class Mark(NamedTuple):
    """vLLM's figure, and the least share of it."""

    tokens_per_s: float
    least_share: float


class LatencyMark(NamedTuple):
    """One request at a time, 128 tokens in: vLLM's figures, and what is to be reached."""

    vllm_ms_per_token: float
    vllm_ttft_ms: float
    most_ms_per_token: float
    most_ttft_ms: float | None


THROUGHPUT: dict[str, dict[Load, Mark]] = {
    "llama3-8b": {
        Load(64, 512, 128): Mark(5_094, 0.9),
        Load(256, 512, 128): Mark(6_836, 0.9),
        Load(64, 128, 256): Mark(9_321, 0.9),
        Load(256, 128, 256): Mark(17_909, 0.9),
        Load(64, 1024, 1024): Mark(6_382, 0.9),
        Load(256, 1024, 1024): Mark(9_319, 0.9),
    },
    "llama2-7b": {
        Load(64, 512, 128): Mark(4_082, 0.9),
        Load(256, 512, 128): Mark(5_006, 0.9),
        Load(64, 128, 256): Mark(7_653, 0.9),
        Load(256, 128, 256): Mark(11_763, 0.9),
    },
    "qwen3-0.6b": {
        Load(256, 128, 256): Mark(31_941, 1.0),
        Load(64, 128, 256): Mark(22_333, 1.0),
        Load(64, 512, 128): Mark(16_156, 1.0),
        Load(256, 512, 128): Mark(22_773, 1.0),
    },
}
LATENCY: dict[str, LatencyMark] = {
    "llama3-8b": LatencyMark(4.97, 10.5, 4.8, 9.0),
    "llama2-7b": LatencyMark(4.60, 13.0, 4.6, None),
    "qwen3-0.6b": LatencyMark(2.01, 9.0, 1.2, None),
}
COPY_TB_S = 4.28
MATMUL_TFLOP_S = 698.0
CUBLAS_STEP_MS: dict[str, dict[str, float]] = {
    "llama2-7b": dict(
        zip(
            ("1", "16", "32", "64", "128", "256", "512"),
            (3.86, 3.95, 3.92, 3.89, 4.26, 6.04, 10.67),
            strict=True,
        )
    ),
    "llama3-8b": dict(
        zip(
            ("1", "16", "32", "64", "128", "256", "512"),
            (4.06, 4.10, 4.19, 4.37, 4.86, 7.16, 13.24),
            strict=True,
        )
    ),
}
"""The GPU's limits as they were measured beside vLLM's figures."""
