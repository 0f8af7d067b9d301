"""Matrix products with weights that several checkpoint tensors may share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional


class FusedLinear(nn.Module):
    """`y = x W^T + b` whose output rows belong to several checkpoint tensors, one after another.

    One product instead of several reads x once and fills the device better.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the weight, uninitialised.

        Args:
            in_features: Length of a row of x.
            parts: Name in the checkpoint and number of output rows of each part, in order.
            bias: Whether there is a bias.
            dtype: Of weight and bias.
            device: Where they lie.
        """
        super().__init__()
        self._parts = dict(parts)
        rows = sum(parts.values())
        self.register_buffer("weight", torch.empty(rows, in_features, dtype=dtype, device=device))
        self.register_buffer(
            "bias", torch.empty(rows, dtype=dtype, device=device) if bias else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies: [..., in_features] to [..., rows]."""
        return functional.linear(x, self.weight, self.bias)

    def destinations(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes, as views of weight and bias."""
        found: dict[str, torch.Tensor] = {}
        start = 0
        for name, rows in self._parts.items():
            found[f"{prefix}{name}.weight"] = self.weight[start : start + rows]
            if self.bias is not None:
                found[f"{prefix}{name}.bias"] = self.bias[start : start + rows]
            start += rows
        return found
