"""RMSNorm with its weight, in the two forms that models have."""

from __future__ import annotations

from typing import ClassVar

import torch

from mini_infer_engine.layers.backend import Backend


class RMSNorm:
    """Normalizes rows: Llama's form, which multiplies by the weight in the model's data type.

    Attributes:
        weight: [size].
        eps: Added to the mean square.
        is_gemma: Whether it is Gemma's form.
    """

    __slots__ = ("_apply", "eps", "weight")

    is_gemma: ClassVar[bool] = False

    def __init__(self, size: int, eps: float, backend: Backend) -> None:
        """Allocates the weight, uninitialised.

        Args:
            size: Length of a row.
            eps: Added to the mean square.
            backend: Where it lies and what computes it.
        """
        kernels = backend.kernels
        self._apply = kernels.gemma_rmsnorm if self.is_gemma else kernels.rmsnorm
        self.eps = eps
        self.weight = backend.empty(size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes [..., size]."""
        return self._apply(x, self.weight, self.eps)

    def destinations(self, name: str) -> dict[str, torch.Tensor]:
        """Where the checkpoint tensor of this norm goes."""
        return {f"{name}.weight": self.weight}


class GemmaRMSNorm(RMSNorm):
    """Gemma's form: multiplies by 1 + the weight, in float32."""

    __slots__ = ()

    is_gemma = True
