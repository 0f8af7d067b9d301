"""What stands between the qkv product and attention, in one launch, against torch and the limit."""

from __future__ import annotations

from typing import Any

import torch
from against_torch import NUM_ROWS, add_case, print_table, random
from harness import SHAPES, Report, parse_options
from mini_infer_kernels.qk_norm_rope_store import triton_qk_norm_rope_store
from model_heads import BLOCK_SIZE, Heads
from rmsnorm import torch_rmsnorm
from rope import torch_rope, turns

EPS = 1e-6


def torch_qk_norm_rope_store(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The same step after step; gives the queries."""
    num_kv_heads = cache.shape[2] // 2
    sizes = (heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads)
    query, key, value = heads.split_with_sizes(sizes, 1)
    if q_weight is not None and k_weight is not None:
        query, key = torch_rmsnorm(query, q_weight, eps), torch_rmsnorm(key, k_weight, eps)
    query, key = torch_rope(query, cos, sin), torch_rope(key, cos, sin)
    cache.flatten(0, 1).index_copy_(0, slot_mapping, torch.cat((key, value), 1))
    return query


def inputs(
    num_tokens: int, heads: Heads, weights: tuple[torch.Tensor | None, ...]
) -> tuple[Any, ...]:
    """Arguments of a call; the slots in random order.

    Args:
        num_tokens: How many.
        heads: Of the model.
        weights: Of the norms.
    """
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    cache = torch.empty(
        num_blocks, BLOCK_SIZE, 2 * heads.kv, heads.dim, dtype=torch.bfloat16, device="cuda"
    )
    slots = torch.randperm(num_tokens, device="cuda")
    product = random(num_tokens, heads.total, heads.dim)
    return product, *turns(num_tokens, heads.dim), cache, slots, *weights, EPS


def main() -> None:
    """Measures all sizes."""
    options = parse_options(__doc__ or "")
    report = Report("qk_norm_rope_store")
    for name in options.shape:
        heads = Heads.of(name)
        is_normed = SHAPES[name]["model_type"] == "qwen3"
        weights = (random(heads.dim), random(heads.dim)) if is_normed else (None, None)
        for rows in NUM_ROWS:
            add_case(
                report,
                triton_qk_norm_rope_store,
                torch_qk_norm_rope_store,
                lambda rows=rows, heads=heads, weights=weights: inputs(rows, heads, weights),
                2 * rows * heads.dim * (2 * heads.total + 1),
                op="qk_norm_rope_store",
                shape=name,
                rows=rows,
                normed=is_normed,
            )
    print_table(report)
    report.write()


if __name__ == "__main__":
    main()
