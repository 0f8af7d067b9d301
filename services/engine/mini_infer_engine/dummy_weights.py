"""Weights drawn on the device, for measurements of a shape of which there is only config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

_SEED = 0


def draw_weights(destinations: Mapping[str, torch.Tensor]) -> None:
    """Fills a model with weights of a size that keeps activations near 1, from a fixed seed.

    Matrices are normal with variance 1 / columns, norms are 1, biases 0.

    Args:
        destinations: The model's tensors by their names in a checkpoint; all on one device.
    """
    generator: torch.Generator | None = None
    for name in sorted(destinations):
        tensor = destinations[name]
        if generator is None:
            generator = torch.Generator(tensor.device).manual_seed(_SEED)
        if tensor.dim() > 1:
            tensor.normal_(std=1 / math.sqrt(tensor.shape[-1]), generator=generator)
        else:
            tensor.fill_(0.0 if name.endswith(".bias") else 1.0)
