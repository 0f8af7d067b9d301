"""Matrix products with weights that several checkpoint tensors may share."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class FusedLinear:
    """`y = x W^T + b` whose output rows belong to several checkpoint tensors, one after another.

    One product instead of several reads x once and fills the device better.
    """

    __slots__ = ("_bias", "_parts", "_transposed", "_weight")

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
        self._parts = dict(parts)
        rows = sum(parts.values())
        if device.type == "cpu":
            # Few rows of x times a weight whose columns lie together is up to twice as fast.
            self._weight = torch.empty(in_features, rows, dtype=dtype, device=device).t()
        else:
            self._weight = torch.empty(rows, in_features, dtype=dtype, device=device)
        self._transposed = self._weight.t()
        self._bias = torch.empty(rows, dtype=dtype, device=device) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies: [T, in_features] to [T, rows]."""
        if self._bias is None:
            return x.mm(self._transposed)
        return torch.addmm(self._bias, x, self._transposed)

    def add_to_(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the product, [T, in_features] to [T, rows], to a residual stream in place."""
        if self._bias is None:
            return residual.addmm_(x, self._transposed)
        # The bias first: what is rounded on the way is smaller without the residual.
        return residual.add_(self(x))

    def destinations(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes, as views of weight and bias."""
        found: dict[str, torch.Tensor] = {}
        start = 0
        for name, rows in self._parts.items():
            found[f"{prefix}{name}.weight"] = self._weight[start : start + rows]
            if self._bias is not None:
                found[f"{prefix}{name}.bias"] = self._bias[start : start + rows]
            start += rows
        return found
