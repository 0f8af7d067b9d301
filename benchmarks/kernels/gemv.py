"""Few rows times a weight: each product of a decode step, and all of a step in one CUDA graph.

Ours is the product with what stands around it: RMSNorm before those of the attention, the feed
forward and the logits, the gate of the feed forward, the residual stream. cuBLAS's is the product
alone. The floor is that of a copy, which reads and writes; a kernel that only reads may be faster.

    python benchmarks/kernels/gemv.py [--shape llama3-8b]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness import SHAPES, Report, cold, graph_timing, host_us, parse_options
from mini_infer_kernels.gemv import triton_gemv

# isort: split
from gpu_ceilings import product_shapes  # harness has put its folder on the path

NUM_ROWS = (1, 2, 4)
NAMES = ("qkv", "o", "gate_up", "down", "lm_head")
EPS = 1e-5


def normal(*shape: int) -> torch.Tensor:
    """Random numbers, drawn on the device."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of a decode step.

    Attributes:
        name: One of NAMES.
        weight: [N, K] bf16.
        norm_weight: [K] bf16.
    """

    name: str
    weight: torch.Tensor
    norm_weight: torch.Tensor

    @classmethod
    def drawn(cls, name: str, num_rows: int, num_columns: int) -> Product:
        """With random weights, whose products have about the size of x."""
        weight = normal(num_rows, num_columns).mul_(num_columns**-0.5)
        return cls(name, weight, normal(num_columns))

    def ours(self, x: torch.Tensor, stream: torch.Tensor | None, pdl: bool = True) -> torch.Tensor:
        """The product of x; `o` and `down` add it to the residual stream."""
        if stream is not None:
            return triton_gemv(x, self.weight, residual=stream, pdl=pdl)
        return triton_gemv(
            x,
            self.weight,
            norm_weight=self.norm_weight,
            eps=EPS,
            gate="silu" if self.name == "gate_up" else None,
            out_dtype=torch.float32 if self.name == "lm_head" else None,
            pdl=pdl,
        )

    @property
    def adds_to_stream(self) -> bool:
        """Whether the product is added to the residual stream."""
        return self.name in ("o", "down")


def report_product(report: Report, shape: str, name: str, weight_shape: tuple[int, int]) -> None:
    """Adds the cases of one weight, cold, alternately through ours and through cuBLAS."""
    num_bytes = 2 * weight_shape[0] * weight_shape[1]
    for num_rows in NUM_ROWS:

        def call(ours: bool, num_rows: int = num_rows) -> Callable[[], object]:
            product = Product.drawn(name, *weight_shape)
            x = normal(num_rows, weight_shape[1])
            stream = normal(num_rows, weight_shape[0]) if product.adds_to_stream else None
            if ours:
                return lambda: product.ours(x, stream)
            return lambda: x @ product.weight.t()

        ours = cold(lambda: call(True), num_bytes).median_us
        cublas = cold(lambda: call(False), num_bytes).median_us
        floor = report.floor_us(num_bytes)
        report.add(
            case=f"{shape} {name}",
            rows=num_rows,
            weight=list(weight_shape),
            ours_us=ours,
            cublas_us=cublas,
            floor_us=floor,
            share_of_floor=floor / ours,
        )


def step_of(config: Mapping[str, Any], products: list[Product], num_rows: int) -> Callable[[], Any]:
    """All products of a decode step, one after the other as in the model, without attention."""
    stream = normal(num_rows, config["hidden_size"])

    def step() -> torch.Tensor:
        x = stream
        for product in products:
            columns = product.weight.shape[1]
            if product.adds_to_stream:
                x = product.ours(x[:, :columns], stream)
            else:
                x = product.ours(stream, None)
        return x

    return step


def report_step(report: Report, shape: str, config: Mapping[str, Any]) -> None:
    """Adds the cases of a whole step; every layer has weights of its own."""
    *of_layer, of_logits = zip(NAMES, product_shapes(config), strict=True)
    num_layers = config["num_hidden_layers"]
    order = [*of_layer * num_layers, of_logits]
    products = [Product.drawn(name, rows, columns) for name, (rows, columns, _) in order]
    floor = report.floor_us(sum(2 * product.weight.numel() for product in products))
    for num_rows in NUM_ROWS:
        rows_of_x = {columns: normal(num_rows, columns) for _, (_, columns, _) in order}

        def cublas(rows_of_x: dict[int, torch.Tensor] = rows_of_x) -> None:
            for product in products:
                rows_of_x[product.weight.shape[1]] @ product.weight.t()

        ours_us = graph_timing([step_of(config, products, num_rows)]).median_us
        report.add(
            case=f"{shape} step",
            rows=num_rows,
            ours_us=ours_us,
            cublas_us=graph_timing([cublas]).median_us,
            floor_us=floor,
            share_of_floor=floor / ours_us,
        )


def main() -> None:
    """Measures, prints and writes the results."""
    options = parse_options(__doc__ or "")
    report = Report("gemv")
    for shape in options.shape:
        for name, (rows, columns, _) in zip(NAMES, product_shapes(SHAPES[shape]), strict=True):
            report_product(report, shape, name, (rows, columns))
        report_step(report, shape, SHAPES[shape])
    x, product = normal(1, 1024), Product.drawn("qkv", 4096, 1024)
    report.add(
        case="host",
        rows=1,
        ours_us=host_us(lambda: product.ours(x, None, pdl=False)),
        cublas_us=host_us(lambda: x @ product.weight.t()),
    )
    report.write()
    print(f"{'case':24}{'rows':>5}{'ours us':>10}{'cuBLAS us':>11}{'floor us':>10}{'share':>7}")
    for case in report.cases[:-1]:
        print(
            f"{case['case']:24}{case['rows']:5}{case['ours_us']:10.2f}{case['cublas_us']:11.2f}"
            f"{case['floor_us']:10.2f}{case['share_of_floor']:7.2f}"
        )


if __name__ == "__main__":
    main()
