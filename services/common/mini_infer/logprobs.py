"""Log-probabilities of tokens: in columns where they travel, token by token where they are read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    import numpy as np

MAX_LOGPROBS = 20
"""Likeliest tokens that are told with each token."""
NO_LOGPROBS = -1
"""In place of their number, where none are wanted."""

_FLOAT = "<f4"
_INT = "<u4"
_ITEM_BYTES = 4


class TopLogprob(NamedTuple):
    """One of the likeliest tokens of a position, and its log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of a token.

    Log-probabilities are those of the model's own distribution: before penalties, bias, masks and
    temperature.

    Attributes:
        logprob: Of the token.
        rank: 1 + the number of tokens that were likelier.
        top: The likeliest tokens of the position, likeliest first.
    """

    logprob: float
    rank: int
    top: list[TopLogprob]


class LogprobColumns(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The log-probabilities of T tokens in a row, K likeliest ones with each. Little-endian.

    Attributes:
        num_top: K, 0 to 20.
        logprobs: [T] float32, of the tokens.
        ranks: [T] uint32, of the tokens.
        top_ids: [T, K] uint32, likeliest first.
        top_logprobs: [T, K] float32.
    """

    num_top: int
    logprobs: bytes
    ranks: bytes
    top_ids: bytes
    top_logprobs: bytes

    @classmethod
    def from_arrays(
        cls,
        logprobs: np.typing.NDArray[np.generic],
        ranks: np.typing.NDArray[np.generic],
        top_ids: np.typing.NDArray[np.generic],
        top_logprobs: np.typing.NDArray[np.generic],
    ) -> LogprobColumns:
        """Packs arrays of the shapes that the attributes have."""
        return cls(
            num_top=top_ids.shape[1],
            logprobs=logprobs.astype(_FLOAT).tobytes(),
            ranks=ranks.astype(_INT).tobytes(),
            top_ids=top_ids.astype(_INT).tobytes(),
            top_logprobs=top_logprobs.astype(_FLOAT).tobytes(),
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.logprobs) // _ITEM_BYTES

    @property
    def num_bytes(self) -> int:
        """What the columns take."""
        return 8 * self.num_tokens * (1 + self.num_top)

    @property
    def is_consistent(self) -> bool:
        """Whether the columns are of one length."""
        num_tokens, num_top = self.num_tokens, self.num_top
        return (
            0 <= num_top <= MAX_LOGPROBS
            and len(self.logprobs) == len(self.ranks) == 4 * num_tokens
            and len(self.top_ids) == len(self.top_logprobs) == 4 * num_tokens * num_top
        )

    def part(self, start: int, stop: int) -> LogprobColumns:
        """Those of the tokens from `start` to before `stop`."""
        own = slice(4 * start, 4 * stop)
        top = slice(4 * start * self.num_top, 4 * stop * self.num_top)
        return LogprobColumns(
            num_top=self.num_top,
            logprobs=self.logprobs[own],
            ranks=self.ranks[own],
            top_ids=self.top_ids[top],
            top_logprobs=self.top_logprobs[top],
        )

    def tokens(self) -> list[TokenLogprobs]:
        """The same token by token."""
        num_tokens, num_top = self.num_tokens, self.num_top
        logprobs = struct.unpack(f"<{num_tokens}f", self.logprobs)
        ranks = struct.unpack(f"<{num_tokens}I", self.ranks)
        ids = struct.unpack(f"<{num_tokens * num_top}I", self.top_ids)
        tops = struct.unpack(f"<{num_tokens * num_top}f", self.top_logprobs)
        likeliest = list(map(TopLogprob, ids, tops))
        return [
            TokenLogprobs(logprob, rank, likeliest[index * num_top : (index + 1) * num_top])
            for index, (logprob, rank) in enumerate(zip(logprobs, ranks, strict=True))
        ]


def joined(parts: Sequence[LogprobColumns]) -> LogprobColumns:
    """Columns of tokens that follow each other, as one; at least one, all of the same K."""
    if len(parts) == 1:
        return parts[0]
    return LogprobColumns(
        num_top=parts[0].num_top,
        logprobs=b"".join(part.logprobs for part in parts),
        ranks=b"".join(part.ranks for part in parts),
        top_ids=b"".join(part.top_ids for part in parts),
        top_logprobs=b"".join(part.top_logprobs for part in parts),
    )
