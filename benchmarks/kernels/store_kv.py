"""The store of keys and values in the paged cache against torch and the memory limit."""

from __future__ import annotations

import torch
from against_torch import NUM_ROWS, add_case, print_table, random
from harness import Report, parse_options
from mini_infer_kernels.store_kv import triton_store_kv
from model_heads import BLOCK_SIZE, Heads


def torch_store_kv(
    key_value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """The store as models write it."""
    cache.flatten(0, 1).index_copy_(0, slot_mapping, key_value)


def inputs(num_tokens: int, heads: Heads) -> tuple[torch.Tensor, ...]:
    """Arguments of a call; the slots in random order."""
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    cache = random(num_blocks, BLOCK_SIZE, 2 * heads.kv, heads.dim)
    slots = torch.randperm(num_tokens, device="cuda")
    return random(num_tokens, 2 * heads.kv, heads.dim), cache, slots


def main() -> None:
    """Measures all sizes."""
    options = parse_options(__doc__ or "")
    report = Report("store_kv")
    for name in options.shape:
        heads = Heads.of(name)
        for rows in NUM_ROWS:
            add_case(
                report,
                triton_store_kv,
                torch_store_kv,
                lambda rows=rows, heads=heads: inputs(rows, heads),
                8 * rows * heads.kv * heads.dim,
                op="store_kv",
                shape=name,
                rows=rows,
                heads=2 * heads.kv,
            )
    print_table(report)
    report.write()


if __name__ == "__main__":
    main()
