"""A scheduled batch, integers in numpy, as the tensors that torch's own operations take.

`paged_inputs.py` does this for the kernels of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mini_infer_engine.batch import Ints, ScheduledBatch
from mini_infer_engine.decode_groups import MAX_DECODE_GROUPS, group_rows
from mini_infer_engine.kv_cache import KVCache
from mini_infer_engine.layers.grouped_attention import DecodeGroup, GroupedAttentionInputs
from mini_infer_engine.lone_row import are_neighbours, lone_blocks
from mini_infer_engine.model_inputs import ModelInputs

GroupedInputs = ModelInputs[GroupedAttentionInputs]

_FIRST_ROW: Ints = np.zeros(1, np.int64)


class InputBuffers:
    """Builds the inputs of each step."""

    def __init__(
        self,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None] = (None,),
        needs_rotation_lens: bool = False,
    ) -> None:
        """Takes what the inputs depend on.

        Args:
            block_size: Of the cache.
            dtype: The model's.
            device: The model's.
            windows: The model's (`ModelConfig.windows`).
            needs_rotation_lens: Whether one of its rotary embeddings depends on the text's length.
        """
        self._block_size = block_size
        self._device = device
        self._dtype = dtype
        self._windows = windows
        self._needs_rotation_lens = needs_rotation_lens
        # What one more group saves and costs was measured on a CPU.
        self._max_groups = MAX_DECODE_GROUPS if device.type == "cpu" else 1

    def build(self, batch: ScheduledBatch, cache: KVCache) -> GroupedInputs:
        """The inputs of a batch that is not empty."""
        return self.build_window(batch, cache) or self._build_paged(batch, cache)

    def build_window(
        self, batch: ScheduledBatch, cache: KVCache, num_rounds: int = 1
    ) -> GroupedInputs | None:
        """The inputs of one row of one token whose blocks are neighbours: nothing is gathered.

        Args:
            batch: Not empty.
            cache: Holds the row's blocks.
            num_rounds: Tokens, the row's next one included, that the window has slots for.

        Returns:
            None where the batch is not such a row or its last block has no such room.
        """
        blocks = lone_blocks(batch)
        if not blocks or not are_neighbours(blocks):
            return None
        end = int(batch.num_computed_tokens[0]) + num_rounds
        if end > len(blocks) * self._block_size:
            return None
        position = self._to_device(batch.num_computed_tokens)
        attention = GroupedAttentionInputs(
            positions=position,
            rotation_lens=self._rotation_lens(batch, batch.num_computed_tokens, _FIRST_ROW),
            slot_mapping=position,
            num_decodes=1,
            decode_groups=(),
            decode_order=None,
            prefill_block_tables=None,
            prefill_lens=[],
            prefill_context_lens=[],
        )
        return ModelInputs(
            token_ids=self._to_device(batch.token_ids),
            cache=cache.window(blocks[0], end),
            attention=attention,
            sampled_tokens=None,
        )

    def _build_paged(self, batch: ScheduledBatch, cache: KVCache) -> GroupedInputs:
        starts, lengths = batch.num_computed_tokens, batch.num_scheduled_tokens
        ends = np.cumsum(lengths)
        # [T] each token's row and position
        rows, positions = np.arange(len(lengths)), starts
        if batch.num_decodes < len(lengths):
            rows = np.repeat(rows, lengths)
            positions = np.arange(len(rows)) - np.repeat(ends - lengths, lengths) + starts[rows]
        blocks = batch.block_tables[rows, positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        contexts = starts + lengths
        split = batch.num_decodes
        groups = group_rows(-(-contexts[:split] // self._block_size), self._max_groups)
        attention = GroupedAttentionInputs(
            positions=self._to_device(positions),
            rotation_lens=self._rotation_lens(batch, positions, rows),
            slot_mapping=self._to_device(slots),
            num_decodes=split,
            decode_groups=tuple(
                self._decode_group(batch.block_tables[group], contexts[group]) for group in groups
            ),
            decode_order=self._to_device(np.concatenate(groups)) if len(groups) > 1 else None,
            prefill_block_tables=self._to_device(batch.block_tables[split:]),
            prefill_lens=lengths[split:].tolist(),
            prefill_context_lens=contexts[split:].tolist(),
        )
        return ModelInputs(
            token_ids=self._to_device(batch.token_ids),
            cache=cache.layers,
            attention=attention,
            sampled_tokens=self._sampled_tokens(batch, ends),
        )

    def _decode_group(self, block_tables: Ints, contexts: Ints) -> DecodeGroup:
        """What rows with these blocks gather, and what each of them sees of it."""
        num_blocks = -(-int(contexts.max()) // self._block_size)
        return DecodeGroup(
            block_tables=self._to_device(block_tables[:, :num_blocks]),
            masks=tuple(
                self._decode_mask(contexts, num_blocks, window) for window in self._windows
            ),
        )

    def _sampled_tokens(self, batch: ScheduledBatch, ends: Ints) -> torch.Tensor | None:
        rows = batch.sampling.rows
        return None if len(rows) == batch.num_tokens else self._to_device(ends[rows] - 1)

    def _rotation_lens(
        self, batch: ScheduledBatch, positions: Ints, rows: Ints
    ) -> torch.Tensor | None:
        """The length of text that each token is turned for."""
        if not self._needs_rotation_lens:
            return None
        return self._to_device(np.maximum(positions + 1, batch.num_turned_together[rows]))

    def _decode_mask(self, contexts: Ints, num_blocks: int, window: int | None) -> torch.Tensor:
        """0 where a slot of a decoding row holds a token that it sees, -inf elsewhere."""
        slots = np.arange(num_blocks * self._block_size)
        is_visible = slots < contexts[:, None]
        if window is not None:
            is_visible &= slots >= contexts[:, None] - window
        mask = np.where(is_visible, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(mask).to(self._device, self._dtype)[:, None, None]

    def _to_device(self, values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
