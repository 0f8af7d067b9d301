"""Attention of a batch by torch's own operations: rows that decode in groups, prompts one by one.

For any device; `layers/paged_attention.py` has the kernels of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mini_infer_kernels.reference.paged_attention import (
    reference_decode_attention,
    reference_prefill_attention,
)

from mini_infer_engine.layers.attention import AttentionPattern


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """R rows of one token each that gather equally many blocks.

    Attributes:
        block_tables: [R, B] int64; B are the blocks that the longest of them uses.
        masks: For each of the model's windows [R, 1, 1, B * block_size], 0 or -inf, in the model's
            data type.
    """

    block_tables: torch.Tensor
    masks: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class GroupedAttentionInputs:
    """What the layers need to know of a batch of S sequences and T tokens, on the device.

    The first `num_decodes` rows have one token each, the others any number.

    Attributes:
        positions: As `AttentionInputs`.
        rotation_lens: As `AttentionInputs`.
        slot_mapping: As `AttentionInputs`.
        num_decodes: Rows at the front with one token.
        decode_groups: Groups of these rows. Empty where there are no such rows, or where the cache
            that the layers get is the only row's tokens in order.
        decode_order: [num_decodes] int64, the rows of the first group, then those of the next;
            None where all are in one group or none.
        prefill_block_tables: [S - num_decodes, B'] int64, or None where there are none.
        prefill_lens: Tokens of each other row.
        prefill_context_lens: Tokens of each other row in the cache, its new ones included.
    """

    positions: torch.Tensor
    rotation_lens: torch.Tensor | None
    slot_mapping: torch.Tensor
    num_decodes: int
    decode_groups: tuple[DecodeGroup, ...]
    decode_order: torch.Tensor | None
    prefill_block_tables: torch.Tensor | None
    prefill_lens: list[int]
    prefill_context_lens: list[int]

    def prepare(self) -> None:
        """As `AttentionInputs.prepare`: all is there."""

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, pattern: AttentionPattern
    ) -> torch.Tensor:
        """As `AttentionInputs.attend`."""
        split = self.num_decodes
        if self.prefill_block_tables is None or not self.prefill_lens:
            return self._decode(query, cache, pattern)
        prefilled = reference_prefill_attention(
            query[split:],
            cache,
            self.prefill_block_tables,
            self.prefill_lens,
            self.prefill_context_lens,
            pattern.scale,
            window=pattern.window,
            softcap=pattern.softcap,
        )
        if not split:
            return prefilled
        return torch.cat((self._decode(query[:split], cache, pattern), prefilled))

    def _decode(
        self, query: torch.Tensor, cache: torch.Tensor, pattern: AttentionPattern
    ) -> torch.Tensor:
        groups = self.decode_groups
        if not groups:
            window = cache if pattern.window is None else cache[:, -pattern.window :]
            return _decode_rows(query, window, None, None, pattern)
        if self.decode_order is None:
            return _decode_group(query, cache, groups[0], pattern)
        sizes = [group.block_tables.shape[0] for group in groups]
        queries = query.index_select(0, self.decode_order).split_with_sizes(sizes)
        attended = [
            _decode_group(rows, cache, group, pattern)
            for rows, group in zip(queries, groups, strict=True)
        ]
        return torch.empty_like(query).index_copy_(0, self.decode_order, torch.cat(attended))


def _decode_group(
    query: torch.Tensor, cache: torch.Tensor, group: DecodeGroup, pattern: AttentionPattern
) -> torch.Tensor:
    mask = group.masks[pattern.window_index]
    return _decode_rows(query, cache, group.block_tables, mask, pattern)


def _decode_rows(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor | None,
    mask: torch.Tensor | None,
    pattern: AttentionPattern,
) -> torch.Tensor:
    return reference_decode_attention(
        query, cache, block_tables, mask, pattern.scale, softcap=pattern.softcap
    )
