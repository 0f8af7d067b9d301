"""What a step hands the model, and who makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from mini_infer_engine.batch import ScheduledBatch
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.attention import AttentionInputs

A_co = TypeVar("A_co", bound=AttentionInputs, covariant=True)


@dataclass(frozen=True, slots=True)
class ModelInputs(Generic[A_co]):
    """A batch on the device.

    Attributes:
        token_ids: [T] int64 or int32.
        cache: Keys and values of all layers; slots and block tables count from its beginning.
        attention: What the layers need.
        sampled_tokens: [R] int64 or int32, index among the T tokens of each row that gets a next
            token; None where all T do.
    """

    token_ids: torch.Tensor
    cache: torch.Tensor
    attention: A_co
    sampled_tokens: torch.Tensor | None


class BuildsInputs(Protocol):
    """Makes the inputs of each step."""

    def build(self, batch: ScheduledBatch, cache: KVCache) -> ModelInputs[AttentionInputs]:
        """The inputs of a batch that is not empty. They hold until the next ones are made."""
        ...
