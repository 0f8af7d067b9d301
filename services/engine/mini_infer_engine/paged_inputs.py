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
from mini_infer_engine.graph_sizes import row_sizes, size_for
from mini_infer_engine.kv_cache import KVCache, KVCacheSpec
from mini_infer_engine.layers.paged_attention import PagedAttentionInputs
from mini_infer_engine.model_inputs import ModelInputs
from mini_infer_engine.staged_ints import StagedInts

PagedInputs = ModelInputs[PagedAttentionInputs]

NO_ROW = -1
"""Computed tokens of a row of padding."""


@dataclass(frozen=True, slots=True)
class PagedLimits:
    """The largest step, and the sizes of the others.

    Attributes:
        max_num_seqs: Rows.
        max_num_tokens: Tokens, at least as many.
        max_num_blocks: Blocks of a row.
        token_sizes: Numbers of tokens to which steps with prompts are padded; those with more than
            the last one are not.
    """

    max_num_seqs: int
    max_num_tokens: int
    max_num_blocks: int
    token_sizes: Sequence[int] = ()


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
        self._row_sizes = row_sizes(num_rows)
        self._token_sizes = limits.token_sizes
        self._block_tables = torch.zeros(
            num_rows, limits.max_num_blocks, dtype=torch.int32, device=device
        )
        self.results = torch.zeros(2, num_rows, dtype=torch.int32, device=device)
        self._plan = DecodePlan(
            num_rows, num_q_heads, spec.num_kv_heads, spec.head_dim, device, windows
        )
        # Not empty: what is left of padding is computed with.
        self._attended = torch.zeros(
            num_tokens, num_q_heads, spec.head_dim, dtype=spec.dtype, device=device
        )
        self._staged = StagedInts(
            StagedInts.capacity_for([num_tokens, *_row_lengths(num_rows + 1), num_rows]), device
        )
        most_changes = max(num_tokens, limits.max_num_blocks)  # more of them are rare
        self._staged_changes = StagedInts(StagedInts.capacity_for([3 * most_changes]), device)
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._outputs = TokenInputs(
            token_ids=torch.zeros(num_tokens, dtype=torch.int32, device=device),
            positions=positions,
            rotation_lens=torch.zeros_like(positions) if needs_rotation_lens else None,
            slot_mapping=torch.full_like(positions, -1),
            context_lens=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
        )

    def build(self, batch: ScheduledBatch, cache: KVCache) -> PagedInputs:
        """As `BuildsInputs.build`; padded to one of the sizes that are captured."""
        if batch.table_changes.shape[1]:
            self._change_tables(batch.table_changes)
        num_rows = len(batch.slots)
        if batch.num_decodes < num_rows:
            return self._build_mixed(batch, cache)
        size = size_for(num_rows, self._row_sizes)
        assert size is not None, f"{num_rows} rows: {self._row_sizes[-1]} at most"
        columns = (
            batch.token_ids,
            batch.slots,
            batch.num_computed_tokens,
            batch.num_turned_together,
        )
        return self._build_decode(columns, size, cache)

    def padding_rows(self, size: int, cache: KVCache) -> PagedInputs:
        """The inputs of a step that decodes nothing but padding: what steps of the size look like.

        Args:
            size: Number of rows, one of `row_sizes`.
            cache: The whole cache.
        """
        nothing = np.zeros(0, np.int64)
        return self._build_decode((nothing, nothing, nothing, nothing), size, cache)

    def _build_decode(self, columns: Sequence[Ints], size: int, cache: KVCache) -> PagedInputs:
        """Rows that decode, padded; always at the same place for a size."""
        token_ids, slots, num_computed, num_turned = columns
        padding = size - len(slots)
        self._staged.stage(
            [
                _padded(token_ids, padding, 0),
                _padded(slots, padding, 0),
                _padded(num_computed, padding, NO_ROW),
                np.arange(size + 1),
                _padded(num_turned, padding, 0),
            ]
        )
        rows = StepRows(*self._staged.views([size, *_row_lengths(size)]))
        return self._inputs(rows, cache, num_seqs=size, num_decodes=size, max_row_tokens=1)

    def padding_tokens(self, size: int, cache: KVCache) -> PagedInputs:
        """The inputs of a step with prompts that is nothing but padding.

        Args:
            size: Number of tokens.
            cache: The whole cache.
        """
        self._staged.stage([np.zeros(size, np.int64), [0], [NO_ROW], [0, size], [0]])
        rows = StepRows(*self._staged.views([size, *_row_lengths(1)]))
        return self._inputs(rows, cache, num_seqs=0, num_decodes=0, max_padding=size)

    def _build_mixed(self, batch: ScheduledBatch, cache: KVCache) -> PagedInputs:
        """Rows that decode, and others; a row of padding behind them where a size is captured."""
        num_seqs, num_tokens = len(batch.slots), batch.num_tokens
        ends = np.cumsum(batch.num_scheduled_tokens)
        sampled = ends[batch.sampling.rows] - 1
        padding = (size_for(num_tokens, self._token_sizes) or num_tokens) - num_tokens
        extra = int(padding > 0)
        num_rows = num_seqs + extra
        starts = np.concatenate(([0], ends, [num_tokens + padding] * extra))
        self._staged.stage(
            [
                _padded(batch.token_ids, padding, 0),
                _padded(batch.slots, extra, 0),
                _padded(batch.num_computed_tokens, extra, NO_ROW),
                starts,
                _padded(batch.num_turned_together, extra, 0),
                sampled,
            ]
        )
        lengths = [num_tokens + padding, *_row_lengths(num_rows), len(sampled)]
        *rows, sampled_tokens = self._staged.views(lengths)
        return self._inputs(
            StepRows(*rows),
            cache,
            num_seqs=num_seqs,
            num_decodes=batch.num_decodes,
            max_row_tokens=int(batch.num_scheduled_tokens.max()),
            max_padding=padding,
            sampled_tokens=sampled_tokens,
        )

    def _inputs(
        self,
        rows: StepRows,
        cache: KVCache,
        *,
        num_seqs: int,
        num_decodes: int,
        max_row_tokens: int = 0,
        max_padding: int = 0,
        sampled_tokens: torch.Tensor | None = None,
    ) -> PagedInputs:
        outputs, num_tokens = self._outputs, len(rows.token_ids)
        lens = outputs.rotation_lens
        attention = PagedAttentionInputs(
            tokens=TokenInputs(
                token_ids=outputs.token_ids[:num_tokens],
                positions=outputs.positions[:num_tokens],
                rotation_lens=None if lens is None else lens[:num_tokens],
                slot_mapping=outputs.slot_mapping[:num_tokens],
                context_lens=outputs.context_lens[: len(rows.slots)],
            ),
            rows=rows,
            num_seqs=num_seqs,
            num_decodes=num_decodes,
            max_row_tokens=max_row_tokens,
            max_padding=max_padding,
            last_ids=self.results[0],
            block_tables=self._block_tables,
            block_size=self._block_size,
            plan=self._plan,
            attended=self._attended[:num_tokens],
        )
        token_ids = attention.tokens.token_ids
        return ModelInputs(token_ids, cache.layers, attention, sampled_tokens)

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
