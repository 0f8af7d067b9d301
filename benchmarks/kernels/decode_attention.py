"""Decode attention over the paged cache against FlashAttention-3 and the memory limit.

Caches of shuffled 16-token blocks, bfloat16, cold L2 cache; the plan of the step is made before.
FlashAttention-3's times were measured on an H200 over equal caches. The limit is a device copy,
which writes as much as it reads: reading alone is up to 4 % faster. Gathering the blocks and
PyTorch's attention stand for eager PyTorch. No form for torch.compile: it does not fuse a gather
with the attention after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from harness import Report, cold, eager_timing, host_us, parse_options
from mini_infer_kernels.decode_attention import triton_decode_attention
from mini_infer_kernels.decode_plan import DecodePlan
from mini_infer_kernels.reference.paged_attention import reference_decode_attention
from model_heads import BLOCK_SIZE, Heads

EAGER_BYTES = 2**30
"""Caches up to this size are measured with eager PyTorch too, which copies them."""
MIXED = (32768, *[500] * 255)

FA3_US = {
    "llama3-8b": {
        (1, 512): 14.8,
        (1, 2048): 17.5,
        (1, 8192): 25.3,
        (1, 32768): 54.7,
        (8, 512): 16.5,
        (8, 2048): 35.0,
        (8, 8192): 81.8,
        (64, 512): 53.2,
        (64, 2048): 145.0,
        (64, 8192): 503.0,
        (256, 512): 157.0,
        (256, 2048): 521.0,
    },
    "llama2-7b": {(64, 512): 150.0, (64, 2048): 513.0},
}
"""Microseconds of FlashAttention-3 by batch and context."""
CASES = {
    "llama3-8b": ((1, 128), *FA3_US["llama3-8b"], (100, 512)),
    "llama2-7b": ((1, 512), (1, 2048), (64, 512), (64, 2048)),
    "qwen3-0.6b": ((1, 128), (1, 2048), (64, 256), (256, 256), (64, 2048)),
}


def inputs_of(heads: Heads, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Query, cache, block tables, their rows and lengths."""
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    query = torch.randn(len(lengths), heads.query, heads.dim, device="cuda")
    shape = (sum(counts), BLOCK_SIZE, 2 * heads.kv, heads.dim)
    cache = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    blocks = torch.randperm(sum(counts), device="cuda").int().split(counts)
    tables = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    rows = torch.arange(len(lengths), dtype=torch.int32, device="cuda")
    context_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return query.bfloat16(), cache, tables, rows, context_lens


def measure(
    report: Report, name: str, heads: Heads, lengths: Sequence[int], fa3_us: float | None
) -> None:
    """Adds a case."""
    plan = DecodePlan(len(lengths), heads.query, heads.kv, heads.dim, torch.device("cuda"))
    plan.update(torch.tensor(lengths, dtype=torch.int32, device="cuda"))
    scale = heads.dim**-0.5

    def make_call(pdl: bool = False) -> Callable[[], torch.Tensor]:
        inputs = inputs_of(heads, lengths)
        out = torch.empty_like(inputs[0])
        return lambda: triton_decode_attention(*inputs, plan, scale, out=out, pdl=pdl)

    num_bytes = sum(lengths) * 4 * heads.kv * heads.dim
    timing = cold(make_call, num_bytes)
    pdl_us = cold(lambda: make_call(pdl=True), num_bytes).median_us
    floor_us = report.floor_us(num_bytes)
    report.add(
        case=name,
        batch=len(lengths),
        context=max(lengths),
        ours_us=timing.median_us,
        least_us=timing.least_us,
        most_us=timing.most_us,
        pdl_us=pdl_us,
        fa3_us=fa3_us,
        speed_of_fa3=fa3_us and fa3_us / timing.median_us,
        eager_us=_eager_us(heads, lengths) if num_bytes <= EAGER_BYTES else None,
        tb_s=num_bytes / timing.median_us / 1e6,
        floor_us=floor_us,
        share_of_limit=floor_us / timing.median_us,
    )


def _eager_us(heads: Heads, lengths: Sequence[int]) -> float | None:
    """PyTorch's time; its attention takes equal lengths without a mask."""
    if len(set(lengths)) > 1:
        return None
    query, cache, tables, _, _ = inputs_of(heads, lengths)
    tables = tables.long()
    scale = heads.dim**-0.5
    return eager_timing(
        lambda: reference_decode_attention(query, cache, tables, None, scale)
    ).median_us


def measure_host(report: Report, heads: Heads) -> None:
    """Adds what a step and a layer cost the host, and a step's plan the device."""
    plan = DecodePlan(256, heads.query, heads.kv, heads.dim, torch.device("cuda"))
    inputs = inputs_of(heads, [16] * 256)
    context_lens = inputs[-1]
    out = torch.empty_like(inputs[0])
    plan.update(context_lens)
    report.add(
        case="host",
        batch=256,
        host_us=host_us(lambda: triton_decode_attention(*inputs, plan, 1.0, out=out)),
        update_host_us=host_us(lambda: plan.update(context_lens)),
        update_us=cold(lambda: lambda: plan.update(context_lens), 2**21).median_us,
    )


def main() -> None:
    """Measures all cases of the shapes."""
    options = parse_options("Decode attention over the paged cache.")
    report = Report("decode_attention")
    for shape in options.shape:
        heads = Heads.of(shape)
        for batch, context in CASES[shape]:
            fa3_us = FA3_US.get(shape, {}).get((batch, context))
            measure(report, shape, heads, [context] * batch, fa3_us)
        measure(report, f"{shape}, one of 32768 among 500", heads, MIXED, None)
    measure_host(report, Heads.of(options.shape[0]))
    report.write()
    for case in report.cases:
        if "ours_us" in case:
            speed = case["speed_of_fa3"]
            print(
                f"{case['case']:34} B={case['batch']:<4} ctx={case['context']:<6}"
                f"{case['ours_us']:8.1f} us {case['tb_s']:5.2f} TB/s"
                f"{case['share_of_limit']:6.0%} of the limit"
                f"{'' if speed is None else f'  {speed:.2f} x FA3'}"
            )


if __name__ == "__main__":
    main()
