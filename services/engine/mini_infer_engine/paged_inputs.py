"""A scheduled batch as what a GPU's kernels take: one copy to the device, the rest is made there.

The block tables of the running sequences stay on the device; a step brings what changed of them.
All tensors are allocated once, and those of steps that decode alone stand at the same place for
each size, so that a CUDA graph can hold the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mini_infer_kernels.decode_plan import DecodePlan
from mini_infer_kernels.step_inputs import StepRows, TokenInputs, triton_update_tables

from mini_infer_engine.batch import Ints, ScheduledBatch
from mini_infer_engine.graph_sizes import graph_sizes, size_for
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec
from mini_infer_engine.layers.paged_attention import PagedAttentionInputs
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.staged_ints import StagedInts

PagedInputs = ModelInputs[PagedAttentionInputs]


@dataclass(frozen=True, slots=True)
class PagedLimits:
    """The largest step.

    Attributes:
        max_num_seqs: Rows.
        max_num_tokens: Tokens, at least as many.
        max_num_blocks: Blocks of a row.
    """

    max_num_seqs: int
    max_num_tokens: int
    max_num_blocks: int


class PagedInputBuffers:
    """Owns the block tables on the device and the memory of every step's inputs.

    Attributes:
        results: [2, max_num_seqs] int32, ids and statuses of the last step's sampled rows, which
            whoever chooses writes. A step that was scheduled before they were known reads them.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        limits: PagedLimits,
        *,
        num_q_heads: int,
        windows: Sequence[int | None] = (None,),
        needs_rotation_lens: bool = False,
    ) -> None:
        """Allocates everything.

        Args:
            spec: Shape of the cache.
            limits: The largest step.
            num_q_heads: Query heads of a layer.
            windows: The model's (`ModelConfig.windows`).
            needs_rotation_lens: Whether a rotary embedding depends on the text's length.
        """
        device, num_rows, num_tokens = spec.device, limits.max_num_seqs, limits.max_num_tokens
        self._block_size = spec.block_size
        self._sizes = graph_sizes(num_rows)
        self._block_tables = torch.zeros(
            num_rows, limits.max_num_blocks, dtype=torch.int32, device=device
        )
        self.results = torch.zeros(2, num_rows, dtype=torch.int32, device=device)
        self._plan = DecodePlan(
            num_rows, num_q_heads, spec.num_kv_heads, spec.head_dim, device, windows
        )
        self._staged = StagedInts(
            StagedInts.capacity_for([num_tokens, *_row_lengths(num_rows), num_rows]), device
        )
        self._staged_changes = StagedInts(StagedInts.capacity_for([3 * num_tokens]), device)
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._outputs = TokenInputs(
            token_ids=torch.zeros(num_tokens, dtype=torch.int32, device=device),
            positions=positions,
            rotation_lens=torch.zeros_like(positions) if needs_rotation_lens else None,
            slot_mapping=torch.full_like(positions, -1),
            context_lens=torch.zeros(num_rows, dtype=torch.int32, device=device),
        )

    def build(self, batch: ScheduledBatch, cache: KVCache) -> PagedInputs:
        """As `BuildsInputs.build`; rows that decode alone are padded to one of `graph_sizes`."""
        if batch.table_changes.shape[1]:
            self._change_tables(batch.table_changes)
        num_rows = len(batch.slots)
        if batch.num_decodes < num_rows:
            return self._build_mixed(batch, cache)
        size = size_for(num_rows, self._sizes)
        padding = size - num_rows
        parts = [
            _padded(batch.token_ids, padding, 0),
            _padded(batch.slots, padding, 0),
            _padded(batch.num_computed_tokens, padding, -1),
            np.arange(size + 1),
            _padded(batch.num_turned_together, padding, 0),
        ]
        self._staged.stage(parts)
        return self.decode_inputs(size, cache)

    def decode_inputs(self, size: int, cache: KVCache) -> PagedInputs:
        """The inputs of a step that decodes so many rows; always at the same place.

        Args:
            size: One of `graph_sizes`.
            cache: The whole cache.
        """
        rows = StepRows(*self._staged.views([size, *_row_lengths(size)]))
        attention = self._attention_inputs(rows, size, 1)
        return ModelInputs(attention.tokens.token_ids, cache.layers, attention, None)

    def _build_mixed(self, batch: ScheduledBatch, cache: KVCache) -> PagedInputs:
        """Rows that decode, and others."""
        num_rows, num_tokens = len(batch.slots), batch.num_tokens
        ends = np.cumsum(batch.num_scheduled_tokens)
        starts = np.concatenate(([0], ends))
        sampled = ends[batch.sampling.rows] - 1
        self._staged.stage(
            [
                batch.token_ids,
                batch.slots,
                batch.num_computed_tokens,
                starts,
                batch.num_turned_together,
                sampled,
            ]
        )
        lengths = [num_tokens, *_row_lengths(num_rows), len(sampled)]
        *rows, sampled_tokens = self._staged.views(lengths)
        attention = self._attention_inputs(
            StepRows(*rows), batch.num_decodes, int(batch.num_scheduled_tokens.max())
        )
        token_ids = attention.tokens.token_ids
        return ModelInputs(token_ids, cache.layers, attention, sampled_tokens)

    def _attention_inputs(
        self, rows: StepRows, num_decodes: int, max_row_tokens: int
    ) -> PagedAttentionInputs:
        outputs, num_tokens = self._outputs, len(rows.token_ids)
        lens = outputs.rotation_lens
        return PagedAttentionInputs(
            tokens=TokenInputs(
                token_ids=outputs.token_ids[:num_tokens],
                positions=outputs.positions[:num_tokens],
                rotation_lens=None if lens is None else lens[:num_tokens],
                slot_mapping=outputs.slot_mapping[:num_tokens],
                context_lens=outputs.context_lens[: len(rows.slots)],
            ),
            rows=rows,
            num_decodes=num_decodes,
            max_row_tokens=max_row_tokens,
            last_ids=self.results[0],
            block_tables=self._block_tables,
            block_size=self._block_size,
            plan=self._plan,
        )

    def _change_tables(self, changes: Ints) -> None:
        flat = changes.ravel()
        if len(flat) > self._staged_changes.capacity:
            self._staged_changes = StagedInts(2 * len(flat), self._block_tables.device)
        self._staged_changes.stage([flat])
        (updates,) = self._staged_changes.views([len(flat)])
        triton_update_tables(self._block_tables, updates.view(3, -1))


def _row_lengths(num_rows: int) -> Sequence[int]:
    """Lengths of the fields of `StepRows`."""
    return num_rows, num_rows, num_rows + 1, num_rows


def _padded(values: Ints, padding: int, filler: int) -> Ints:
    return np.concatenate((values, np.full(padding, filler))) if padding else values
