"""The gated feed-forward layer: SwiGLU and its siblings."""

from __future__ import annotations

import torch

from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.layers.linear import Gate
from mini_infer_engine.layers.norm import RMSNorm
from mini_infer_engine.model_config import ModelConfig

_GATE_UP = ("gate_proj", "up_proj")


class FeedForward:
    """`down(activation(gate(x)) * up(x))`; gate and up are one product.

    Attributes:
        down: The last product, which the decoder layer applies: most add it to the residual
            stream right away.
    """

    __slots__ = ("_gate", "_gate_up", "down")

    def __init__(
        self, config: ModelConfig, backend: Backend, names: tuple[str, ...] = _GATE_UP
    ) -> None:
        """Allocates the weights, uninitialised.

        Args:
            config: Of the model.
            backend: Where they lie and what computes on them.
            names: The checkpoint's names of gate and up, or of a tensor that holds both.
        """
        kernels, size = backend.kernels, config.intermediate_size
        gates = {
            "silu": Gate("silu", kernels.silu_and_mul),
            "gelu_pytorch_tanh": Gate("gelu_tanh", kernels.gelu_tanh_and_mul),
            "gelu": Gate("gelu", kernels.gelu_and_mul),
        }
        self._gate = gates[config.activation]
        parts = dict.fromkeys(names, 2 * size // len(names))
        self._gate_up = backend.linear(config.hidden_size, parts, bias=config.mlp_bias)
        self.down = backend.linear(size, {"down_proj": config.hidden_size}, bias=config.mlp_bias)

    def __call__(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Norm and all but the last product: [T, hidden_size] to [T, intermediate_size]."""
        return self._gate_up.gated(x, norm, self._gate)

    def destinations(self, prefix: str) -> dict[str, torch.Tensor]:
        """Where each checkpoint tensor goes."""
        return {**self._gate_up.destinations(prefix), **self.down.destinations(prefix)}
