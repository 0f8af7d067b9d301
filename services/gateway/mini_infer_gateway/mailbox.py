"""Between the links, which never wait, and one client, who may be slow.

What arrives for a choice while a write is in flight is merged, so that a slow client gets fewer
and larger messages, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import FinishAccounting

MAX_PENDING_TOKENS = 65_536
"""Tokens that wait for a client at most, of all choices; beyond it the call is SLOW_CONSUMER."""


class EndReason(Enum):
    """Why the output of a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The regular end of a choice.

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
    """What one `take` hands over: output of one choice.

    Attributes:
        choice_index: The choice.
        text: The text of `token_ids`.
        token_ids: Its ids since the parcel before.
        end: Set in its last parcel: how the choice ended, or what went wrong.
    """

    choice_index: int
    text: str
    token_ids: list[int]
    end: Ending | MiniInferError | None


@dataclass(slots=True)
class _Waiting:
    """Output of one choice that waits."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    end: Ending | MiniInferError | None = None


class Mailbox:
    """Output of a call's choices that waits for its client. One task takes; callbacks put.

    A choice with enough to take joins a queue, once, and is taken with all that it has got by
    then: each choice has its turn, however much the others make.
    """

    def __init__(
        self, num_choices: int = 1, min_tokens: int = 1, max_tokens: int = MAX_PENDING_TOKENS
    ) -> None:
        """Makes an empty mailbox.

        Args:
            num_choices: Choices of the call.
            min_tokens: Tokens that a parcel holds at least, except the last one of a choice.
            max_tokens: Tokens that may wait, of all choices together.
        """
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._choices = [_Waiting() for _ in range(num_choices)]
        self._num_tokens = 0
        self._queue: deque[int] = deque()
        self._is_ready = asyncio.Event()

    def put(self, choice_index: int, text: str, token_ids: list[int]) -> None:
        """Adds output of a choice. Ignored after its end.

        Raises:
            MiniInferError: SLOW_CONSUMER where more would wait than may.
        """
        waiting = self._choices[choice_index]
        if waiting.end is not None:
            return
        if self._num_tokens + len(token_ids) > self._max_tokens:
            raise MiniInferError(
                ErrorReason.SLOW_CONSUMER,
                f"{self._num_tokens} tokens wait to be read, more than {self._max_tokens} "
                "may not: read the stream as it is made",
            )
        waiting.texts.append(text)
        waiting.token_ids += token_ids
        self._num_tokens += len(token_ids)
        if len(waiting.token_ids) >= self._min_tokens:
            self._enqueue(choice_index)

    def flush(self, choice_index: int) -> None:
        """Lets what was put for a choice be taken, however little it is."""
        if self._choices[choice_index].token_ids:
            self._enqueue(choice_index)

    def end(self, choice_index: int, end: Ending | MiniInferError) -> None:
        """Ends a choice behind what was put. Its first end counts, others are ignored."""
        waiting = self._choices[choice_index]
        if waiting.end is None:
            waiting.end = end
            self._enqueue(choice_index)

    async def take(self) -> Parcel:
        """Waits for output or the end of any choice, and takes all that this choice has."""
        await self._is_ready.wait()
        choice_index = self._queue.popleft()
        if not self._queue:
            self._is_ready.clear()
        return self._take(choice_index)

    def take_rest(self) -> list[Parcel]:
        """Takes what there is of every choice, however little it is, and waits for nothing."""
        choices = [index for index, waiting in enumerate(self._choices) if waiting.token_ids]
        choices += [index for index in self._queue if index not in choices]
        self._queue.clear()
        self._is_ready.clear()
        return [self._take(index) for index in choices]

    def _take(self, choice_index: int) -> Parcel:
        waiting = self._choices[choice_index]
        parcel = Parcel(choice_index, "".join(waiting.texts), waiting.token_ids, waiting.end)
        waiting.texts, waiting.token_ids = [], []
        self._num_tokens -= len(parcel.token_ids)
        return parcel

    def _enqueue(self, choice_index: int) -> None:
        if choice_index not in self._queue:
            self._queue.append(choice_index)
            self._is_ready.set()
