"""What a sequence's own rules add to the logits of its next token."""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np
from mini_infer.resolved_sampling import ResolvedSampling
from numpy.typing import NDArray

_BANNED = -math.inf


class LogitBias:
    """The biases of a sequence: its `logit_bias`, bad words, and ends that come too early.

    A bad word is a list of ids; its last one is banned where the others stand at the end of the
    text, prompt included, as `NoBadWordsLogitsProcessor` of `transformers` does.

    Attributes:
        end: Output position from which on they change nothing.
    """

    __slots__ = ("_continued", "_end_ids", "_ids", "_min_tokens", "_values", "end")

    def __init__(
        self,
        sampling: ResolvedSampling,
        end_ids: Collection[int],
        banned_ids: Collection[int] = (),
    ) -> None:
        """Sorts the rules.

        Args:
            sampling: Has them.
            end_ids: Ids that end the sequence, which `min_tokens` holds back.
            banned_ids: Ids that are never chosen.
        """
        always = [*banned_ids, *(word[0] for word in sampling.bad_words if len(word) == 1)]
        self._ids = np.array([*sampling.bias_ids, *always], np.int64)
        values = [*sampling.bias_values, *[_BANNED] * len(always)]
        self._values = np.array(values, np.float32)
        self._min_tokens = sampling.min_tokens
        self._end_ids = sorted(end_ids)
        # The last ids of bad words, by the number of the others and these.
        self._continued: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for *others, last in sampling.bad_words:
            if others:
                words = self._continued.setdefault(len(others), {})
                words.setdefault(tuple(others), []).append(last)
        is_lasting = len(self._ids) > 0 or len(self._continued) > 0
        self.end = sampling.max_tokens if is_lasting else sampling.min_tokens

    @classmethod
    def of(
        cls, sampling: ResolvedSampling, end_ids: Collection[int], banned_ids: Collection[int] = ()
    ) -> LogitBias | None:
        """The biases, or None where there are none at any position."""
        has_early_ends = bool(sampling.min_tokens and end_ids)
        if sampling.bias_ids or sampling.bad_words or has_early_ends or banned_ids:
            return cls(sampling, end_ids, banned_ids)
        return None

    def at(
        self, token_ids: Seq[int], num_output_tokens: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ids, perhaps repeated, whose logits change for the next token, and by how much.

        Args:
            token_ids: Prompt and output.
            num_output_tokens: How many of them are output.
        """
        banned = [
            last
            for num_others, words in self._continued.items()
            for last in words.get(tuple(token_ids[-num_others:]), ())
        ]
        if num_output_tokens < self._min_tokens:
            banned += self._end_ids
        if not banned:
            return self._ids, self._values
        bans = np.full(len(banned), _BANNED, np.float32)
        return np.append(self._ids, banned), np.append(self._values, bans)
