"""SwiGLU's gate against torch and the memory limit."""

from __future__ import annotations

import torch
from against_torch import NUM_ROWS, add_case, print_table, random
from harness import SHAPES, Report, parse_options
from mini_infer_kernels.activation import triton_silu_and_mul
from torch.nn import functional


def torch_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The gate as models write it."""
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def main() -> None:
    """Measures all sizes."""
    options = parse_options(__doc__ or "")
    report = Report("activation")
    for columns in sorted({SHAPES[name]["intermediate_size"] for name in options.shape}):
        for rows in NUM_ROWS:
            add_case(
                report,
                triton_silu_and_mul,
                torch_silu_and_mul,
                lambda size=(rows, 2 * columns): (random(*size),),
                6 * rows * columns,
                op="silu_and_mul",
                rows=rows,
                columns=columns,
            )
    print_table(report)
    report.write()


if __name__ == "__main__":
    main()
