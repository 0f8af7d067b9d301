"""The rotary embedding of queries and keys against torch and the memory limit."""

from __future__ import annotations

import torch
from against_torch import NUM_ROWS, add_case, print_table, random
from harness import SHAPES, Report, parse_options
from mini_infer_kernels.rope import triton_rope


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
        config = SHAPES[name]
        q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim", config["hidden_size"] // q_heads)
        heads = q_heads + kv_heads
        for rows in NUM_ROWS:
            add_case(
                report,
                triton_rope,
                torch_rope,
                lambda size=(rows, heads, head_dim): (random(*size), *turns(size[0], size[2])),
                2 * rows * head_dim * (2 * heads + 1),
                op="rope",
                shape=name,
                rows=rows,
                heads=heads,
            )
    print_table(report)
    report.write()


if __name__ == "__main__":
    main()
