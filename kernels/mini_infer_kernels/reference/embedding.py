"""Embedding: row `token_ids[i]` of the weight, perhaps times a scale.

Source: the scale is that of Vaswani et al., "Attention Is All You Need", 2017, section 3.4, as
Gemma has it.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def reference_embedding(
    token_ids: torch.Tensor, weight: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Gathers rows of the weight.

    Args:
        token_ids: [T] int32 or int64, each a row of the weight.
        weight: [vocab_size, hidden_size], any float type.
        scale: Factor of the rows, rounded to the weight's type, or None.

    Returns:
        [T, hidden_size], of the weight's type.
    """
    embedded = functional.embedding(token_ids, weight)
    return embedded if scale is None else embedded.mul_(torch.tensor(scale, dtype=weight.dtype))
