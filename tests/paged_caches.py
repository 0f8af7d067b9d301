"""Paged caches for the tests of attention: shuffled blocks, and garbage wherever nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NOWHERE = 2**30
"""A block behind those of a sequence, which no cache has."""
_SPARE = 2
"""Blocks, and rows and columns of the block tables, that belong to nobody."""


@dataclass(frozen=True)
class PagedCache:
    """The tokens of some sequences, normally distributed, on the CPU.

    Attributes:
        cache: [num_blocks, block_size, num_heads, head_dim].
        block_tables: [rows, max_blocks] int32.
        table_rows: [num_seqs] int32, the row of each sequence.
    """

    cache: torch.Tensor
    block_tables: torch.Tensor
    table_rows: torch.Tensor

    @classmethod
    def draw(
        cls,
        lengths: Sequence[int],
        slots: tuple[int, int, int],
        garbage: float,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> PagedCache:
        """Draws sequences.

        Args:
            lengths: Tokens of each.
            slots: block_size, num_heads and head_dim.
            garbage: What stands in every slot that belongs to no token.
            generator: On the CPU.
            dtype: Of the cache.
        """
        counts = [-(-length // slots[0]) for length in lengths]
        free = torch.randperm(sum(counts) + _SPARE, generator=generator)
        cache = torch.full((len(free), *slots), garbage, dtype=dtype)
        num_rows = len(lengths) + _SPARE
        table_rows = torch.randperm(num_rows, generator=generator)[: len(lengths)].int()
        block_tables = torch.full((num_rows, max(counts) + _SPARE), NOWHERE, dtype=torch.int32)
        owned = free.split([*counts, _SPARE])[:-1]
        for row, length, blocks in zip(table_rows, lengths, owned, strict=True):
            block_tables[row, : len(blocks)] = blocks.int()
            places = torch.arange(length)
            tokens = torch.randn(length, *slots[1:], generator=generator, dtype=dtype)
            cache[blocks[places // slots[0]], places % slots[0]] = tokens
        return cls(cache, block_tables, table_rows)
