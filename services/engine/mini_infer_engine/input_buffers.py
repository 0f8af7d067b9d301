"""A scheduled batch, integers in numpy, as the tensors that the model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from mini_infer_kernels.reference.rope import rope_table

from mini_infer_engine.batch import Ints, ScheduledBatch
from mini_infer_engine.layers.attention import AttentionInputs
from mini_infer_engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """A batch on the device.

    Attributes:
        token_ids: [T] int64.
        attention: What the layers need.
        sampled_tokens: [R] int64, index among the T tokens of each row that gets a next token.
    """

    token_ids: torch.Tensor
    attention: AttentionInputs
    sampled_tokens: torch.Tensor


class InputBuffers:
    """Builds the inputs of each step; holds what all steps share, the table of rotations."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_model_len: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Computes the rotations of all positions."""
        self._block_size = block_size
        self._device = device
        self._dtype = dtype
        cos, sin = rope_table(config.head_dim, max_model_len, config.rope_theta, device)
        self._cos = cos.to(dtype).unsqueeze(1)
        self._sin = sin.to(dtype).unsqueeze(1)

    def build(self, batch: ScheduledBatch) -> ModelInputs:
        """The inputs of a batch that is not empty."""
        starts, lengths = batch.num_computed_tokens, batch.num_scheduled_tokens
        ends = np.cumsum(lengths)
        # [T] each token's row and position
        rows, positions = np.arange(len(lengths)), starts
        if batch.num_decodes < len(lengths):
            rows = np.repeat(rows, lengths)
            positions = np.arange(len(rows)) - np.repeat(ends - lengths, lengths) + starts[rows]
        blocks = batch.block_tables[rows, positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        device_positions = self._to_device(positions)
        contexts = starts + lengths
        split = batch.num_decodes
        num_decode_blocks = -(-int(contexts[:split].max(initial=0)) // self._block_size)
        attention = AttentionInputs(
            cos=self._cos.index_select(0, device_positions),
            sin=self._sin.index_select(0, device_positions),
            slot_mapping=self._to_device(slots),
            num_decodes=split,
            decode_block_tables=self._to_device(batch.block_tables[:split, :num_decode_blocks]),
            decode_mask=self._decode_mask(contexts[:split], num_decode_blocks),
            prefill_block_tables=self._to_device(batch.block_tables[split:]),
            prefill_lens=lengths[split:].tolist(),
            prefill_context_lens=contexts[split:].tolist(),
        )
        return ModelInputs(
            token_ids=self._to_device(batch.token_ids),
            attention=attention,
            sampled_tokens=self._to_device(ends[batch.sampling.rows] - 1),
        )

    def _decode_mask(self, contexts: Ints, num_blocks: int) -> torch.Tensor:
        """0 where a slot of a decoding row holds one of its tokens, -inf elsewhere."""
        slots = np.arange(num_blocks * self._block_size)
        mask = np.where(slots < contexts[:, None], np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(mask).to(self._device, self._dtype)[:, None, None]

    def _to_device(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
