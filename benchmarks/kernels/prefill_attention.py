"""Causal prefill attention over 16-token blocks in shuffled order, cold caches.

`python benchmarks/kernels/prefill_attention.py` writes
`benchmarks/results/kernels/prefill_attention.json`. FlashAttention-3 is not run here: the figures
of its columns were measured on an H200, paged, for 32 and 8 heads of 128 in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Report, cold, eager_timing, host_us, parse_options
from mini_infer_kernels.prefill_attention import triton_prefill_attention
from mini_infer_kernels.reference.paged_attention import reference_prefill_attention
from model_heads import BLOCK_SIZE, Heads

CELLS = {
    "1 x 512": ((512,), 512),
    "1 x 2048": ((2048,), 2048),
    "1 x 8192": ((8192,), 8192),
    "8 x 512": ((512,) * 8, 512),
    "512 after 7680": ((512,), 8192),
    "2048 after 6144": ((2048,), 8192),
}
"""New tokens of each sequence, and the tokens of each in the cache, the new ones included."""
FA3_US = {
    "1 x 512": 20.5,
    "1 x 2048": 77.9,
    "1 x 8192": 904.0,
    "8 x 512": 73.7,
    "512 after 7680": 119.0,
    "2048 after 6144": 416.0,
}
FA3_HEADS = Heads(query=32, kv=8, dim=128)


@dataclass
class Batch:
    """Inputs of a call with a cache of their own."""

    query: torch.Tensor
    cache: torch.Tensor
    block_tables: torch.Tensor
    table_rows: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    new_tokens: tuple[int, ...]
    context: int
    scale: float

    @classmethod
    def draw(cls, heads: Heads, new_tokens: tuple[int, ...], context: int) -> Batch:
        """Random ones in bf16; the query is a part of a wider product."""
        num_seqs, num_blocks = len(new_tokens), context // BLOCK_SIZE
        cache_shape = (num_seqs * num_blocks, BLOCK_SIZE, 2 * heads.kv, heads.dim)
        product_shape = (sum(new_tokens), heads.total, heads.dim)
        product = torch.randn(product_shape, dtype=torch.bfloat16, device="cuda")
        starts = torch.tensor((0, *new_tokens)).cumsum(0)
        blocks = torch.randperm(cache_shape[0], device="cuda").view(num_seqs, num_blocks)
        return cls(
            query=product[:, : heads.query],
            cache=torch.randn(cache_shape, dtype=torch.bfloat16, device="cuda"),
            block_tables=blocks.int(),
            table_rows=torch.arange(num_seqs, dtype=torch.int32, device="cuda"),
            query_starts=starts.int().cuda(),
            context_lens=torch.full((num_seqs,), context, dtype=torch.int32, device="cuda"),
            new_tokens=new_tokens,
            context=context,
            scale=heads.dim**-0.5,
        )

    def call(self) -> Callable[[], torch.Tensor]:
        """A call of the kernel with an output of its own."""
        out = torch.empty_like(self.query, memory_format=torch.contiguous_format)
        return lambda: triton_prefill_attention(
            self.query,
            self.cache,
            self.block_tables,
            self.table_rows,
            self.query_starts,
            self.context_lens,
            max(self.new_tokens),
            self.scale,
            out=out,
        )

    def reference(self) -> torch.Tensor:
        """The same through torch."""
        return reference_prefill_attention(
            self.query.contiguous(),
            self.cache,
            self.block_tables.long(),
            self.new_tokens,
            [self.context] * len(self.new_tokens),
            self.scale,
        )


def measure(report: Report, shape: str, heads: Heads, cell: str) -> None:
    """Adds a cell of the table for a model's heads."""
    new_tokens, context = CELLS[cell]
    batch = Batch.draw(heads, new_tokens, context)
    call = batch.call()
    error = (call() - batch.reference()).norm() / batch.reference().norm()
    num_visible = sum(new * context - new * (new - 1) // 2 for new in new_tokens)
    num_flops = 4 * heads.query * heads.dim * num_visible
    num_bytes = 2 * (2 * sum(new_tokens) * heads.query * heads.dim + batch.cache.numel())
    timing = cold(lambda: Batch.draw(heads, new_tokens, context).call(), num_bytes)
    floor_us = report.floor_us(num_bytes, num_flops)
    fa3_us = FA3_US[cell] if heads == FA3_HEADS else None
    report.add(
        shape=shape,
        heads=f"{heads.query}/{heads.kv} x {heads.dim}",
        cell=cell,
        us=timing.median_us,
        least_us=timing.least_us,
        most_us=timing.most_us,
        tflop_s=num_flops / timing.median_us / 1e6,
        floor_us=floor_us,
        share_of_floor=floor_us / timing.median_us,
        fa3_us=fa3_us,
        share_of_fa3=fa3_us and fa3_us / timing.median_us,
        eager_us=eager_timing(batch.reference, num_runs=3).median_us,
        host_us=host_us(call, num_calls=50),
        error=float(error),
    )


def main() -> None:
    """Measures all cells of the shapes that were asked for."""
    options = parse_options(__doc__ or "")
    report = Report("prefill_attention")
    for shape in options.shape:
        for cell in CELLS:
            measure(report, shape, Heads.of(shape), cell)
    report.write()
    print("shape, cell: us, TFLOP/s, times FlashAttention-3")
    for case in report.cases:
        ratio = case["share_of_fa3"] or "-"
        print(f"{case['shape']}, {case['cell']}: {case['us']}, {case['tflop_s']}, {ratio}")


if __name__ == "__main__":
    main()
