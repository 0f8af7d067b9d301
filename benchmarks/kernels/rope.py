"""The rotary embedding of queries and keys against torch and the memory limit."""

from __future__ import annotations

import torch
from against_torch import NUM_ROWS, add_case, print_table, random
from harness import Report, parse_options
from mini_infer_kernels.rope import triton_rope
from model_heads import Heads


def torch_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The turn as models write it; the sine's first half is negated beforehand."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def turns(num_tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of random angles, [num_tokens, 1, head_dim] each."""
    angles = torch.rand(num_tokens, 1, head_dim // 2, device="cuda") * 7
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).bfloat16(), torch.cat((-sin, sin), -1).bfloat16()


def main() -> None:
    """Measures all sizes."""
    options = parse_options(__doc__ or "")
    report = Report("rope")
    for name in options.shape:
        heads = Heads.of(name)
        num_heads = heads.query + heads.kv
        for rows in NUM_ROWS:
            add_case(
                report,
                triton_rope,
                torch_rope,
                lambda size=(rows, num_heads, heads.dim): (random(*size), *turns(size[0], size[2])),
                2 * rows * heads.dim * (2 * num_heads + 1),
                op="rope",
                shape=name,
                rows=rows,
                heads=num_heads,
            )
    print_table(report)
    report.write()


if __name__ == "__main__":
    main()
