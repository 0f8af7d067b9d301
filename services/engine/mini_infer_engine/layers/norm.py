"""RMSNorm with its weight, in the two forms that models have."""

from __future__ import annotations

import torch

from mini_infer_engine.layers.backend import Backend


class RMSNorm:
    """Normalizes rows: Llama's form, which multiplies by the weight in the model's data type."""

    __slots__ = ("_apply", "_eps", "_weight")

    def __init__(self, size: int, eps: float, backend: Backend) -> None:
        """Allocates the weight, uninitialised.

        Args:
            size: Length of a row.
            eps: Added to the mean square.
            backend: Where it lies and what computes it.
        """
        self._apply = backend.kernels.rmsnorm
        self._eps = eps
        self._weight = backend.empty(size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes [..., size]."""
        return self._apply(x, self._weight, self._eps)

    def destinations(self, name: str) -> dict[str, torch.Tensor]:
        """Where the checkpoint tensor of this norm goes."""
        return {f"{name}.weight": self._weight}


class GemmaRMSNorm(RMSNorm):
    """Gemma's form: multiplies by 1 + the weight, in float32."""

    __slots__ = ()

    def __init__(self, size: int, eps: float, backend: Backend) -> None:
        """As `RMSNorm`."""
        super().__init__(size, eps, backend)
        self._apply = backend.kernels.gemma_rmsnorm
