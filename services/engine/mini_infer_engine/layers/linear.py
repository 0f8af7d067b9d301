"""Matrix products with weights that several checkpoint tensors may share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from mini_infer_kernels.kernel_set import GemvKernel

if TYPE_CHECKING:
    from mini_infer_engine.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class Gate:
    """The activation of a gated feed-forward layer.

    Attributes:
        name: "silu", "gelu" or "gelu_tanh".
        apply: [T, 2 * size], the gate's half first, to [T, size].
    """

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]


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
        self._weight = self._allocate(rows, in_features, dtype, device)
        self._transposed = self._weight.t()
        self._bias = torch.empty(rows, dtype=dtype, device=device) if bias else None

    @staticmethod
    def _allocate(
        rows: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """[rows, in_features], uninitialised."""
        if device.type == "cpu":
            # Few rows of x times a weight whose columns lie together is up to twice as fast.
            return torch.empty(in_features, rows, dtype=dtype, device=device).t()
        return torch.empty(rows, in_features, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor, norm: RMSNorm | None = None) -> torch.Tensor:
        """Multiplies: [T, in_features], normalized first where a norm is given, to [T, rows]."""
        if norm is not None:
            x = norm(x)
        if self._bias is None:
            return x.mm(self._transposed)
        return torch.addmm(self._bias, x, self._transposed)

    def add_to_(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the product, [T, in_features] to [T, rows], to a residual stream in place."""
        if self._bias is None:
            return residual.addmm_(x, self._transposed)
        # The bias first: what is rounded on the way is smaller without the residual.
        return residual.add_(self(x))

    def gated(self, x: torch.Tensor, norm: RMSNorm, gate: Gate) -> torch.Tensor:
        """Multiplies as `__call__`, and applies a gate: [T, in_features] to [T, rows / 2]."""
        return gate.apply(self(x, norm))

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


class GemvLinear(FusedLinear):
    """The same product, of few rows by a kernel that takes norm, gate and residual in its stride.

    A batch of a row or two is as fast as the weight can be read, and each launch between two
    products is time in which nothing is read.
    """

    __slots__ = ("_gemv",)

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        gemv: GemvKernel,
    ) -> None:
        """As `FusedLinear`.

        Args:
            in_features: Length of a row of x.
            parts: Name in the checkpoint and number of output rows of each part, in order.
            bias: Whether there is a bias.
            dtype: Of weight and bias.
            device: Where they lie.
            gemv: The kernel for few rows.
        """
        super().__init__(in_features, parts, bias=bias, dtype=dtype, device=device)
        self._gemv = gemv

    @staticmethod
    def _allocate(
        rows: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """[rows, in_features], uninitialised; the kernel reads row by row."""
        return torch.empty(rows, in_features, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor, norm: RMSNorm | None = None) -> torch.Tensor:
        """As `FusedLinear.__call__`."""
        if not self._gemv.takes(x):
            return super().__call__(x, norm)
        return self._gemv.run(x, self._weight, bias=self._bias, **_norm_options(norm))

    def add_to_(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As `FusedLinear.add_to_`."""
        if not self._gemv.takes(x):
            return super().add_to_(residual, x)
        return self._gemv.run(x, self._weight, bias=self._bias, residual=residual)

    def gated(self, x: torch.Tensor, norm: RMSNorm, gate: Gate) -> torch.Tensor:
        """As `FusedLinear.gated`."""
        if not self._gemv.takes(x):
            return super().gated(x, norm, gate)
        return self._gemv.run(
            x, self._weight, bias=self._bias, gate=gate.name, **_norm_options(norm)
        )


def _norm_options(norm: RMSNorm | None) -> dict[str, Any]:
    if norm is None:
        return {}
    return {"norm_weight": norm.weight, "eps": norm.eps, "gemma": norm.is_gemma}
