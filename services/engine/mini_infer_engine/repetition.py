"""Notices where an output repeats itself."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from mini_infer.resolved_sampling import RepetitionLimit
from numpy.typing import NDArray


class RepetitionDetector:
    """Reads an output token by token.

    The last tokens are a pattern of `p` tokens, `n` times over, where each of the last `p * (n-1)`
    tokens equals the one `p` places before it. So for each period it is enough to count how many
    tokens in a row did: derived here.
    """

    __slots__ = ("_limit", "_needed", "_runs", "_window")

    def __init__(self, limit: RepetitionLimit, token_ids: Iterable[int] = ()) -> None:
        """Begins behind output that exists already."""
        self._limit = limit
        periods = np.arange(1, limit.max_period + 1)
        needed = periods * (limit.num_repeats - 1)
        self._needed = np.where(periods < limit.min_period, np.iinfo(np.int64).max, needed)
        self._runs: NDArray[np.int64] = np.zeros(limit.max_period, np.int64)
        # The last tokens, the latest first: the one at index p - 1 is p places back.
        self._window: NDArray[np.int64] = np.full(limit.max_period, -1, np.int64)
        for token_id in token_ids:
            self.note(token_id)

    def note(self, token_id: int) -> bool:
        """Takes in the next token, and says whether the output repeats itself now."""
        self._runs += 1
        self._runs[self._window != token_id] = 0
        self._window[1:] = self._window[:-1]
        self._window[0] = token_id
        return bool((self._runs >= self._needed).any())
