"""Runs the model on a batch: device inputs, layers, logits, chosen tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from mini_infer.logprobs import LogprobColumns

from mini_infer_engine.batch import (
    NO_TOKENS,
    FillMasks,
    LaunchedTokens,
    ScheduledBatch,
    StepTokens,
    fill_no_masks,
)
from mini_infer_engine.host_cache import HostCache
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.layers.decoder import CausalLM
from mini_infer_engine.lone_row import LoneRow
from mini_infer_engine.model_inputs import BuildsInputs, ModelInputs
from mini_infer_engine.sampling import Sampler

if TYPE_CHECKING:
    from mini_infer_engine.merged_decode import MergedDecode


class Forward(Protocol):
    """The model as the runner calls it."""

    def __call__(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        """Computes the batch; gives [R, vocab_size] float32 logits of the sampled tokens.

        There may be more rows behind them, which mean nothing: some batches are padded.
        """
        ...


class EagerForward:
    """Runs the model operation by operation."""

    def __init__(self, model: CausalLM) -> None:
        """Takes a loaded model."""
        self._model = model

    def __call__(self, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
        """Computes any batch."""
        hidden = self._model(inputs.token_ids, inputs.cache, inputs.attention)
        return self._model.logits(sampled_rows(hidden, inputs))


class ModelRunner:
    """Owns the model and the tensors of its KV cache; knows no requests and no queues.

    Attributes:
        runs_ahead: Whether a step may be launched before the one before has been waited for.
        cache: The blocks on the device.
        host_cache: The swapped ones.
    """

    def __init__(
        self,
        model: CausalLM,
        forward: Forward,
        cache: KVCache,
        buffers: BuildsInputs,
        sampler: Sampler,
        merged: MergedDecode | None = None,
        host_cache: HostCache | None = None,
        lone_row: LoneRow | None = None,
        *,
        runs_ahead: bool = False,
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
            runs_ahead: Whether a step may be launched before the one before has been waited for.
        """
        self._model = model
        self._sampler = sampler
        self._merged = merged
        self._forward = forward
        self._buffers = buffers
        self._device = cache.spec.device
        self.runs_ahead = runs_ahead
        self.cache = cache
        self.host_cache = host_cache or HostCache(cache.spec, 0)
        self._lone_row = lone_row or LoneRow(cache, 0)

    def run(self, batch: ScheduledBatch, fill_masks: FillMasks = fill_no_masks) -> StepTokens:
        """Launches a batch and waits for its tokens."""
        return self.launch(batch, fill_masks)()

    def launch(
        self, batch: ScheduledBatch, fill_masks: FillMasks = fill_no_masks
    ) -> LaunchedTokens:
        """Computes a batch and chooses the next token of each row that is complete.

        A GPU is at it when this returns. A CPU begins when the tokens are asked for, so that the
        caller's own work does not come behind the step's.

        Args:
            batch: May have no rows; its blocks are moved all the same.
            fill_masks: Gives the masks of its masked rows, once the model is under way.
        """
        if self._device.type == "cpu":
            return partial(self._run_on_cpu, batch, fill_masks)
        return partial(self._wait, self._launch(batch, fill_masks))

    @torch.inference_mode()
    def _run_on_cpu(self, batch: ScheduledBatch, fill_masks: FillMasks) -> StepTokens:
        self._move_blocks(batch)
        copied = self._lone_row.enter(batch)
        if copied is None:
            return self._compute(batch, self.cache, fill_masks)()
        tokens = self._compute(copied, self._lone_row.cache, fill_masks)()
        self._lone_row.leave(batch, num_rounds=tokens.token_ids.shape[1])
        return tokens

    @torch.inference_mode()
    def _launch(self, batch: ScheduledBatch, fill_masks: FillMasks) -> LaunchedTokens:
        with torch.cuda.device(self._device):  # kernels are launched on the current one
            self._move_blocks(batch)
            return self._compute(batch, self.cache, fill_masks)

    @torch.inference_mode()
    def _wait(self, launched: LaunchedTokens) -> StepTokens:
        with torch.cuda.device(self._device):
            return launched()

    def _compute(
        self, batch: ScheduledBatch, cache: KVCache, fill_masks: FillMasks
    ) -> LaunchedTokens:
        """Runs the rows over the cache that their block tables refer to."""
        if batch.is_empty:
            return lambda: NO_TOKENS
        if self._merged is not None and (tokens := self._merged.run(batch, cache)) is not None:
            return lambda: tokens
        inputs = self._buffers.build(batch, cache)
        if len(batch.scored.rows):
            logits, prompt_logprobs = self._compute_scored(inputs, batch)
        else:
            logits, prompt_logprobs = self._forward(inputs), {}
        logits = logits[: len(batch.sampling.rows)]
        if not len(logits):
            return partial(_without_tokens, logits.device, prompt_logprobs)
        chosen = self._sampler.launch(logits, batch.sampling, fill_masks)
        if not prompt_logprobs:
            return chosen
        return lambda: replace(chosen(), prompt_logprobs=prompt_logprobs)

    def _compute_scored(
        self, inputs: ModelInputs[AttentionInputs], batch: ScheduledBatch
    ) -> tuple[torch.Tensor, dict[int, LogprobColumns]]:
        """Logits of the sampled tokens, and log-probabilities of the prompts' tokens."""
        hidden = self._model(inputs.token_ids, inputs.cache, inputs.attention)
        scores = self._sampler.score_prompts(hidden, self._model.logits, batch.scored)
        return self._model.logits(sampled_rows(hidden, inputs)), scores

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


def sampled_rows(hidden: torch.Tensor, inputs: ModelInputs[AttentionInputs]) -> torch.Tensor:
    """The rows whose logits are sampled from."""
    if inputs.sampled_tokens is None:
        return hidden
    return hidden.index_select(0, inputs.sampled_tokens)


def _without_tokens(
    device: torch.device, prompt_logprobs: Mapping[int, LogprobColumns]
) -> StepTokens:
    """What a step gives whose rows are not complete yet."""
    if device.type == "cuda":
        # Nothing is read back that would wait for it, but how long it took is learnt.
        torch.cuda.current_stream(device).synchronize()
    return replace(NO_TOKENS, prompt_logprobs=prompt_logprobs)
