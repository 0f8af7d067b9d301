"""Decoding rows in groups of similar context.

The rows of a group gather as many blocks as its longest row needs. In a single group, one row of
500 tokens would make 31 others of 80 gather and attend to six times as much as they have.
"""

from __future__ import annotations

import bisect
import itertools

import numpy as np

from mini_infer_engine.batch import Ints

MAX_DECODE_GROUPS = 3
"""With 32 rows of exponential lengths one group gathers three times as much as there is, and three
groups 1.3 times; a fourth would save no more than it costs."""

BLOCKS_PER_GROUP = 24
"""What one more group costs, in blocks that a row gathers: a few operations in each layer."""


def group_rows(num_blocks: Ints, max_groups: int) -> list[Ints]:
    """Cuts rows, ordered by their blocks, where the padding that this saves is worth a group.

    Args:
        num_blocks: [R] blocks of each row.
        max_groups: Groups at most, at least 1.

    Returns:
        The rows of each group: none where there are no rows, all in their order where one group
        is best.
    """
    num_rows = len(num_blocks)
    if not num_rows:
        return []
    together = [np.arange(num_rows)]
    if num_rows * int(num_blocks.max()) - int(num_blocks.sum()) < BLOCKS_PER_GROUP:
        return together
    order = np.argsort(num_blocks, kind="stable")
    ordered = num_blocks[order]
    cuts = [0, num_rows]
    while len(cuts) <= max_groups:
        saved, cut = max(_best_cut(ordered, *ends) for ends in itertools.pairwise(cuts))
        if saved < BLOCKS_PER_GROUP:
            break
        bisect.insort(cuts, cut)
    if len(cuts) == 2:
        return together
    return [order[start:end] for start, end in itertools.pairwise(cuts)]


def _best_cut(ordered: Ints, start: int, end: int) -> tuple[int, int]:
    """The blocks of padding that the best cut of a group saves, and where it is."""
    saved = (ordered[end - 1] - ordered[start:end]) * np.arange(1, end - start + 1)
    best = int(saved.argmax())
    return int(saved[best]), start + best + 1
