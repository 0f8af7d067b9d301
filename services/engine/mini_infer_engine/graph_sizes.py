"""Numbers of rows for which a decoding step is captured as a CUDA graph."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

_FIRST = (1, 2, 4)
_STEPS = ((256, 8), (512, 16))
"""Up to so many rows, sizes are so far apart; above, 32."""
_LAST_STEP = 32


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The sizes in ascending order; the last one holds every step.

    Padding costs little where sizes are close, and each takes a fraction of a second to capture.
    """
    sizes = [size for size in _FIRST if size < max_num_seqs]
    size = _STEPS[0][1]
    while size < max_num_seqs:
        sizes.append(size)
        size += next((step for most, step in _STEPS if size < most), _LAST_STEP)
    return [*sizes, max_num_seqs]


def size_for(num_rows: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds so many rows."""
    return sizes[bisect.bisect_left(sizes, num_rows)]
