"""Runs the model on a batch: device inputs, layers, logits, chosen tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from mini_infer_engine.batch import NO_TOKENS, ScheduledBatch, StepTokens
from mini_infer_engine.input_buffers import InputBuffers, ModelInputs
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.sampling import sample

if TYPE_CHECKING:
    from mini_infer_engine.merged_decode import MergedDecode


class Forward(Protocol):
    """The model as the runner calls it."""

    def __call__(self, inputs: ModelInputs) -> torch.Tensor:
        """Computes the batch; gives [R, vocab_size] float32 logits of the sampled tokens."""
        ...


class EagerForward:
    """Runs the model operation by operation."""

    def __init__(self, model: CausalLM) -> None:
        """Takes a loaded model."""
        self.model = model

    def __call__(self, inputs: ModelInputs) -> torch.Tensor:
        """Computes any batch."""
        hidden = self.model(inputs.token_ids, inputs.cache, inputs.attention)
        if inputs.sampled_tokens is not None:
            hidden = hidden.index_select(0, inputs.sampled_tokens)
        return self.model.logits(hidden)


class ModelRunner:
    """Owns the model and the tensors of its KV cache; knows no requests and no queues."""

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        buffers: InputBuffers,
        merged: MergedDecode | None = None,
    ) -> None:
        """Takes over an allocated cache and the model over it, eager or captured.

        Args:
            forward: The model.
            cache: Its cache.
            buffers: Makes its inputs.
            merged: Makes several tokens a step where it can.
        """
        self._merged = merged
        self._forward = forward
        self._buffers = buffers
        self.cache = cache

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepTokens:
        """Computes a batch and chooses the next token of each row that is complete.

        Args:
            batch: May be empty.
        """
        if batch.is_empty:
            return NO_TOKENS
        if len(batch.zero_blocks):
            self.cache.fill(batch.zero_blocks.tolist(), 0.0)
        if self._merged is not None and (tokens := self._merged.run(batch)) is not None:
            return tokens
        logits = self._forward(self._buffers.build(batch, self.cache))
        if not len(batch.sampling.rows):
            return NO_TOKENS
        token_ids, finite = sample(logits, batch.sampling)
        return StepTokens([[token_id] for token_id in token_ids], finite)
