"""Sizes of steps that are captured as CUDA graphs; a step is padded to the next one."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

_FIRST_ROWS = (1, 2, 4)
_ROW_STEPS = ((256, 8), (512, 16))
_LAST_ROW_STEP = 32
_TOKEN_STEPS = ((128, 16), (256, 32), (512, 64), (1024, 128))
_LAST_TOKEN_STEP = 256


def row_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows of steps that decode alone, ascending; the last one holds every step.

    Padding costs little where sizes are close, and each takes a fraction of a second to capture.
    """
    sizes = [size for size in _FIRST_ROWS if size < max_num_seqs]
    return [*sizes, *_ascending(max_num_seqs, _ROW_STEPS, _LAST_ROW_STEP), max_num_seqs]


def token_sizes(max_num_tokens: int) -> list[int]:
    """Numbers of tokens of steps with prompts, ascending, up to a number of them."""
    return [*_ascending(max_num_tokens, _TOKEN_STEPS, _LAST_TOKEN_STEP), max_num_tokens]


def size_for(number: int, sizes: Sequence[int]) -> int | None:
    """The smallest size that holds a number of rows or tokens; None where there is none."""
    index = bisect.bisect_left(sizes, number)
    return sizes[index] if index < len(sizes) else None


def _ascending(limit: int, steps: Sequence[tuple[int, int]], last_step: int) -> list[int]:
    """Numbers below a limit, so far apart as (up to, step) says."""
    sizes = []
    size = steps[0][1]
    while size < limit:
        sizes.append(size)
        size += next((step for most, step in steps if size < most), last_step)
    return sizes
