"""Between the links, which never wait, and one client, who may be slow.

What arrives while a write is in flight is merged, so that a slow client gets fewer and larger
messages, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import FinishAccounting

MAX_PENDING_TOKENS = 65_536
"""Tokens that wait for a client at most; beyond it the stream ends as SLOW_CONSUMER."""


class EndReason(Enum):
    """Why the output of a stream ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The regular end of a stream.

    Attributes:
        reason: Why.
        num_output_tokens: Ids delivered.
        stop_string: The stop string that was matched.
        stop_token_id: The stop id or end-of-sequence id that was matched.
        accounting: Where the time went; None where the engine was not asked to the end.
    """

    reason: EndReason
    num_output_tokens: int
    stop_string: str | None = None
    stop_token_id: int | None = None
    accounting: FinishAccounting | None = None


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one `take` hands over.

    Attributes:
        text: The text of `token_ids`.
        token_ids: Ids since the parcel before.
        end: Set in the last parcel: how the stream ended, or what went wrong.
    """

    text: str
    token_ids: list[int]
    end: Ending | MiniInferError | None


class Mailbox:
    """Output that waits for one client. One task takes; the loop's callbacks put."""

    def __init__(self, min_tokens: int = 1, max_tokens: int = MAX_PENDING_TOKENS) -> None:
        """Makes an empty mailbox.

        Args:
            min_tokens: Tokens that a parcel holds at least, except the last one.
            max_tokens: Tokens that may wait.
        """
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._end: Ending | MiniInferError | None = None
        self._is_ready = asyncio.Event()

    def put(self, text: str, token_ids: list[int]) -> None:
        """Adds output. Ignored after the end.

        Raises:
            MiniInferError: SLOW_CONSUMER where more would wait than may.
        """
        if self._end is not None:
            return
        if len(self._token_ids) + len(token_ids) > self._max_tokens:
            raise MiniInferError(
                ErrorReason.SLOW_CONSUMER,
                f"{len(self._token_ids)} tokens wait to be read, more than {self._max_tokens} "
                "may not: read the stream as it is made",
            )
        self._texts.append(text)
        self._token_ids += token_ids
        if len(self._token_ids) >= self._min_tokens:
            self._is_ready.set()

    def flush(self) -> None:
        """Lets what was put be taken, however little it is."""
        if self._token_ids:
            self._is_ready.set()

    def end(self, end: Ending | MiniInferError) -> None:
        """Ends the stream behind what was put. The first end counts, others are ignored."""
        if self._end is None:
            self._end = end
            self._is_ready.set()

    async def take(self) -> Parcel:
        """Waits for output or the end, and takes everything that is there."""
        await self._is_ready.wait()
        self._is_ready.clear()
        parcel = Parcel("".join(self._texts), self._token_ids, self._end)
        self._texts, self._token_ids = [], []
        return parcel
