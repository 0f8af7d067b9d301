"""Runs the model on a batch: device inputs, layers, logits, chosen tokens."""

from __future__ import annotations

import torch

from mini_infer_engine.batch import NO_TOKENS, ScheduledBatch, StepTokens
from mini_infer_engine.input_buffers import InputBuffers
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.models.llama import LlamaForCausalLM
from mini_infer_engine.sampling import sample


class ModelRunner:
    """Owns the model and the tensors of its KV cache; knows no requests and no queues."""

    def __init__(self, model: LlamaForCausalLM, cache: KVCache, buffers: InputBuffers) -> None:
        """Takes over a loaded model and an allocated cache."""
        self._model = model
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
        inputs = self._buffers.build(batch)
        hidden = self._model(inputs.token_ids, self.cache, inputs.attention)
        if not len(batch.sampling.rows):
            return NO_TOKENS
        logits = self._model.logits(hidden.index_select(0, inputs.sampled_tokens))
        token_ids, finite = sample(logits, batch.sampling)
        return StepTokens(token_ids.unsqueeze(-1).tolist(), finite.tolist())
