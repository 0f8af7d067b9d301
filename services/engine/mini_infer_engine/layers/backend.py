"""Where a model's weights lie and what computes on them: what every layer is built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mini_infer_kernels.kernel_set import KernelSet
from torch.nn import functional

from mini_infer_engine.layers.linear import FusedLinear, GemvLinear


@dataclass(frozen=True, slots=True)
class Backend:
    """A device, a data type and a set of operations.

    Attributes:
        kernels: The operations.
        dtype: Of weights and activations.
        device: Where they lie.
    """

    kernels: KernelSet
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> torch.Tensor:
        """A weight, uninitialised."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def linear(self, in_features: int, parts: Mapping[str, int], *, bias: bool) -> FusedLinear:
        """A product with a weight of several parts (see `FusedLinear`)."""
        options: dict[str, Any] = {"bias": bias, "dtype": self.dtype, "device": self.device}
        if self.kernels.gemv is None:
            return FusedLinear(in_features, parts, **options)
        return GemvLinear(in_features, parts, **options, gemv=self.kernels.gemv)

    def float32_product(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiplies [R, in_features] by the transpose of [rows, in_features].

        Args:
            x: A row of x for each row of the product.
            weight: Of x's type.
            out: [R, rows] float32 for the product; None makes a tensor.
        """
        if self.kernels.gemv is not None and self.kernels.gemv.takes(x):
            product = self.kernels.gemv.run(x, weight, out_dtype=torch.float32)
        elif x.is_cuda and x.dtype is not torch.float32:
            return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
        else:
            product = functional.linear(x, weight).float()
        return product if out is None else out.copy_(product)
