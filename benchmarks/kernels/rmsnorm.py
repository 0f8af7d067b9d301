"""RMSNorm, alone and behind an addition, against torch and the memory limit."""

from __future__ import annotations

import torch
from against_torch import NUM_ROWS, add_case, print_table, random
from harness import SHAPES, Report, parse_options
from mini_infer_kernels.add_rmsnorm import triton_add_rmsnorm
from mini_infer_kernels.rmsnorm import triton_rmsnorm

EPS = 1e-5
WIDEST = 8192
"""Elements of a row that are measured beside those of the shapes."""


def torch_rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm as models write it."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def torch_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """An addition in place, then the norm."""
    return torch_rmsnorm(residual.add_(x), weight, eps)


def main() -> None:
    """Measures all sizes."""
    options = parse_options(__doc__ or "")
    report = Report("rmsnorm")
    for hidden in sorted({SHAPES[name]["hidden_size"] for name in options.shape} | {WIDEST}):
        weight = random(hidden)
        for rows in NUM_ROWS:
            row_bytes = 2 * hidden * rows
            add_case(
                report,
                triton_rmsnorm,
                torch_rmsnorm,
                lambda size=(rows, hidden), weight=weight: (random(*size), weight, EPS),
                2 * row_bytes,
                op="rmsnorm",
                rows=rows,
                hidden=hidden,
            )
            add_case(
                report,
                triton_add_rmsnorm,
                torch_add_rmsnorm,
                lambda size=(rows, hidden), weight=weight: (
                    random(*size),
                    random(*size),
                    weight,
                    EPS,
                ),
                4 * row_bytes,
                op="add_rmsnorm",
                rows=rows,
                hidden=hidden,
            )
    print_table(report)
    report.write()


if __name__ == "__main__":
    main()
