"""What a kernel of prefill attention is compiled for.

All its constants are here, and none is global: each global would be compared at every launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTile:
    """The model's shape and the kernel's tiles, as one constant of a kernel.

    Attributes:
        group: Query heads that share a key head.
        head_dim: Elements of a head.
        block_size: Tokens of a block of the cache.
        window: Tokens that a token sees, itself included, or None for all.
        softcap: Bound of the scores, or None.
        rows: Rows of a tile of queries: the heads of a group side by side, token after token.
        keys: Keys of a tile.
        columns: head_dim, rounded up to what a tile can have.
        num_stages: Tiles of keys, and as many of values, that are in shared memory at once.
    """

    group: int
    head_dim: int
    block_size: int
    window: int | None
    softcap: float | None
    rows: int
    keys: int
    columns: int
    num_stages: int

    @property
    def log2_softcap(self) -> float:
        """The bound of scores that are logarithms to base 2; 0 for none."""
        return 0.0 if self.softcap is None else self.softcap * LOG2_E

    @property
    def tokens(self) -> int:
        """Tokens of a tile of queries."""
        return self.rows // self.group
