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
        rows = np.repeat(np.arange(len(lengths)), lengths)  # [T] each token's row
        positions = np.arange(len(rows)) - np.repeat(ends - lengths, lengths) + starts[rows]
        blocks = batch.block_tables[rows, positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        device_positions = self._to_device(positions)
        contexts = starts + lengths
        split = batch.num_decodes
        attention = AttentionInputs(
            cos=self._cos.index_select(0, device_positions),
            sin=self._sin.index_select(0, device_positions),
            slot_mapping=self._to_device(slots),
            block_tables=self._to_device(batch.block_tables),
            num_decodes=split,
            decode_mask=self._decode_mask(contexts[:split]),
            prefill_lens=lengths[split:].tolist(),
            prefill_context_lens=contexts[split:].tolist(),
        )
        return ModelInputs(
            token_ids=self._to_device(batch.token_ids),
            attention=attention,
            sampled_tokens=self._to_device(ends[batch.sampling.rows] - 1),
        )

    def _decode_mask(self, contexts: Ints) -> torch.Tensor:
        """0 where a slot of a decoding row holds one of its tokens, -inf elsewhere."""
        longest = int(contexts.max(initial=0))
        num_slots = -(-longest // self._block_size) * self._block_size
        slots = torch.arange(num_slots, device=self._device)
        mask = torch.zeros((len(contexts), num_slots), dtype=self._dtype, device=self._device)
        mask.masked_fill_(slots >= self._to_device(contexts)[:, None], -torch.inf)
        return mask[:, None, None]

    def _to_device(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
