"""Runs the model on a batch: device inputs, layers, logits, chosen tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from mini_infer.logprobs import LogprobColumns

from mini_infer_engine.batch import NO_TOKENS, FillMasks, ScheduledBatch, StepTokens, fill_no_masks
from mini_infer_engine.host_cache import HostCache
from mini_infer_engine.input_buffers import InputBuffers, ModelInputs
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.lone_row import LoneRow
from mini_infer_engine.sampling import Sampler

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
        self._model = model

    def __call__(self, inputs: ModelInputs) -> torch.Tensor:
        """Computes any batch."""
        hidden = self._model(inputs.token_ids, inputs.cache, inputs.attention)
        return self._model.logits(_sampled(hidden, inputs))


class ModelRunner:
    """Owns the model and the tensors of its KV cache; knows no requests and no queues.

    Attributes:
        cache: The blocks on the device.
        host_cache: The swapped ones.
    """

    def __init__(
        self,
        model: CausalLM,
        forward: Forward,
        cache: KVCache,
        buffers: InputBuffers,
        sampler: Sampler,
        merged: MergedDecode | None = None,
        host_cache: HostCache | None = None,
        lone_row: LoneRow | None = None,
    ) -> None:
        """Takes over an allocated cache and the model over it, eager or captured.

        Args:
            model: Loaded.
            forward: Runs it.
            cache: Its cache.
            buffers: Makes its inputs.
            sampler: Chooses tokens.
            merged: Makes several tokens a step where it can.
            host_cache: Where swapped blocks go; without it there is room for none.
            lone_row: Where a row that decodes alone is computed; without it no row is copied.
        """
        self._model = model
        self._sampler = sampler
        self._merged = merged
        self._forward = forward
        self._buffers = buffers
        self.cache = cache
        self.host_cache = host_cache or HostCache(cache.spec, 0)
        self._lone_row = lone_row or LoneRow(cache, 0)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, fill_masks: FillMasks = fill_no_masks) -> StepTokens:
        """Computes a batch and chooses the next token of each row that is complete.

        Args:
            batch: May have no rows; its blocks are moved all the same.
            fill_masks: Gives the masks of its masked rows, once the model is under way.
        """
        self._move_blocks(batch)
        copied = self._lone_row.enter(batch)
        if copied is None:
            return self._compute(batch, self.cache, fill_masks)
        tokens = self._compute(copied, self._lone_row.cache, fill_masks)
        self._lone_row.leave(batch, num_rounds=tokens.token_ids.shape[1])
        return tokens

    def _compute(self, batch: ScheduledBatch, cache: KVCache, fill_masks: FillMasks) -> StepTokens:
        """Runs the rows over the cache that their block tables refer to."""
        if batch.is_empty:
            return NO_TOKENS
        if self._merged is not None and (tokens := self._merged.run(batch, cache)) is not None:
            return tokens
        inputs = self._buffers.build(batch, cache)
        if len(batch.scored.rows):
            logits, prompt_logprobs = self._compute_scored(inputs, batch)
        else:
            logits, prompt_logprobs = self._forward(inputs), {}
        if not len(batch.sampling.rows):
            if logits.is_cuda:
                # Nothing is read back that would wait for it, but how long it took is learnt.
                torch.cuda.current_stream(logits.device).synchronize()
            return replace(NO_TOKENS, prompt_logprobs=prompt_logprobs)
        tokens = self._sampler.sample(logits, batch.sampling, fill_masks)
        return replace(tokens, prompt_logprobs=prompt_logprobs) if prompt_logprobs else tokens

    def _compute_scored(
        self, inputs: ModelInputs, batch: ScheduledBatch
    ) -> tuple[torch.Tensor, dict[int, LogprobColumns]]:
        """Logits of the sampled tokens, and log-probabilities of the prompts' tokens."""
        hidden = self._model(inputs.token_ids, inputs.cache, inputs.attention)
        scores = self._sampler.score_prompts(hidden, self._model.logits, batch.scored)
        return self._model.logits(_sampled(hidden, inputs)), scores

    def _move_blocks(self, batch: ScheduledBatch) -> None:
        """Makes the blocks hold what the step expects, in the order that the batch defines."""
        if len(batch.swap_outs):
            self.host_cache.swap_out(self.cache, batch.swap_outs)
        if len(batch.zero_blocks):
            self.cache.fill(batch.zero_blocks, 0.0)
        if len(batch.swap_ins):
            self.host_cache.swap_in(self.cache, batch.swap_ins)
        if len(batch.block_copies):
            self.cache.copy_blocks(batch.block_copies)


def _sampled(hidden: torch.Tensor, inputs: ModelInputs) -> torch.Tensor:
    """The rows whose logits are sampled from."""
    if inputs.sampled_tokens is None:
        return hidden
    return hidden.index_select(0, inputs.sampled_tokens)
