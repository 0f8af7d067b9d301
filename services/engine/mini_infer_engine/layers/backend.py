"""Where a model's weights lie and what computes on them: what every layer is built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from mini_infer_kernels.kernel_set import KernelSet

from mini_infer_engine.layers.linear import FusedLinear


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
        return FusedLinear(in_features, parts, bias=bias, dtype=self.dtype, device=self.device)
