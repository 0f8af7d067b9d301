"""Between the links, which never wait, and one client, who may be slow.

What arrives for a choice while a write is in flight is merged, so that a slow client gets fewer
and larger messages, and nobody else waits for it. Messages are no larger than that: making a huge
one would keep the loop from all other requests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.logprobs import LogprobColumns, joined
from mini_infer.messages import FinishAccounting

MAX_PENDING_TOKENS = 65_536
"""Tokens that wait for a client at most, of all choices; beyond it the call is SLOW_CONSUMER."""
MAX_PARCEL_TOKENS = 1024
"""A parcel with so many tokens takes in no more; no request wants more together."""
MAX_PROMPT_PART_TOKENS = 512
"""Tokens of the prompt in a parcel at most."""


class EndReason(Enum):
    """Why the output of a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    REPETITION = "repetition"


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
class PromptPart:
    """What the model thought of some tokens of the prompt.

    Attributes:
        start: Index of the first one in the prompt.
        logprobs: Of that one and of those behind it.
    """

    start: int
    logprobs: LogprobColumns


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one `take` hands over: a part of the prompt, output of one choice, its end.

    Attributes:
        choice_index: The choice.
        text: The text of `token_ids`.
        token_ids: Its ids since the parcel before.
        end: Set in its last parcel: how the choice ended, or what went wrong.
        logprobs: Of `token_ids`; None where they are not told.
        prompt: A part of the prompt, in a parcel without output.
    """

    choice_index: int
    text: str
    token_ids: list[int]
    end: Ending | MiniInferError | None
    logprobs: LogprobColumns | None = None
    prompt: PromptPart | None = None


@dataclass(slots=True)
class _Piece:
    """Output of one choice that leaves in one parcel."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobColumns] = field(default_factory=list)


@dataclass(slots=True)
class _Waiting:
    """What waits of one choice: parts of the prompt, pieces of output behind them, its end.

    The last piece takes in more as long as it holds fewer than `MAX_PARCEL_TOKENS`.
    """

    prompt: deque[PromptPart] = field(default_factory=deque)
    pieces: deque[_Piece] = field(default_factory=deque)
    is_complete: bool = False
    end: Ending | MiniInferError | None = None

    @property
    def is_empty(self) -> bool:
        """Whether neither prompt nor output waits."""
        return not self.prompt and not self.pieces

    def open_piece(self) -> _Piece:
        """The piece that takes in what comes next."""
        if not self.pieces or len(self.pieces[-1].token_ids) >= MAX_PARCEL_TOKENS:
            self.pieces.append(_Piece())
        return self.pieces[-1]

    def has_parcel(self, min_tokens: int) -> bool:
        """Whether there is enough to take."""
        if self.prompt or (self.is_complete and self.pieces):
            return True
        return bool(self.pieces) and len(self.pieces[0].token_ids) >= min_tokens


class Mailbox:
    """Output of a call's choices that waits for its client. One task takes; callbacks put.

    A choice with enough to take joins a queue, once, and gives one parcel when its turn comes:
    each choice has its turn, however much the others make.
    """

    def __init__(
        self, num_choices: int = 1, min_tokens: int = 1, max_tokens: int = MAX_PENDING_TOKENS
    ) -> None:
        """Makes an empty mailbox.

        Args:
            num_choices: Choices of the call.
            min_tokens: Tokens that a parcel holds at least, except the last one of a choice; at
                most `MAX_PARCEL_TOKENS`.
            max_tokens: Tokens that may wait, of all choices and the prompt together.
        """
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._choices = [_Waiting() for _ in range(num_choices)]
        self._num_tokens = 0
        self._queue: deque[int] = deque()
        self._is_ready = asyncio.Event()

    def put_prompt(self, choice_index: int, start: int, logprobs: LogprobColumns) -> None:
        """Adds what the model thought of tokens of the prompt. Ignored after the choice's end.

        Args:
            choice_index: The choice whose output, none of which was put yet, they precede.
            start: Index of the first token in the prompt.
            logprobs: Of the tokens.

        Raises:
            MiniInferError: SLOW_CONSUMER where more would wait than may.
        """
        waiting = self._choices[choice_index]
        num_tokens = logprobs.num_tokens
        if waiting.end is not None or not num_tokens:
            return
        self._count(num_tokens)
        for begin in range(0, num_tokens, MAX_PROMPT_PART_TOKENS):
            part = logprobs.part(begin, min(begin + MAX_PROMPT_PART_TOKENS, num_tokens))
            waiting.prompt.append(PromptPart(start + begin, part))
        self._enqueue(choice_index)

    def put(
        self,
        choice_index: int,
        text: str,
        token_ids: list[int],
        logprobs: LogprobColumns | None = None,
    ) -> None:
        """Adds output of a choice. Ignored after its end.

        Args:
            choice_index: The choice.
            text: The text of `token_ids`.
            token_ids: Its next ids.
            logprobs: Of `token_ids`; None where they are not told.

        Raises:
            MiniInferError: SLOW_CONSUMER where more would wait than may.
        """
        waiting = self._choices[choice_index]
        if waiting.end is not None or not token_ids:
            return
        self._count(len(token_ids))
        piece = waiting.open_piece()
        piece.texts.append(text)
        piece.token_ids += token_ids
        if logprobs is not None:
            piece.logprobs.append(logprobs)
        if waiting.has_parcel(self._min_tokens):
            self._enqueue(choice_index)

    def complete(self, choice_index: int) -> None:
        """Lets all that was put for a choice be taken, however little it is: no more follows."""
        waiting = self._choices[choice_index]
        waiting.is_complete = True
        if not waiting.is_empty:
            self._enqueue(choice_index)

    def end(self, choice_index: int, end: Ending | MiniInferError) -> None:
        """Ends a choice behind what was put. Its first end counts, others are ignored."""
        waiting = self._choices[choice_index]
        if waiting.end is None:
            waiting.is_complete = True
            waiting.end = end
            self._enqueue(choice_index)

    async def take(self) -> Parcel:
        """Waits for output or the end of any choice, and takes one parcel of this choice."""
        await self._is_ready.wait()
        choice_index = self._queue.popleft()
        if not self._queue:
            self._is_ready.clear()
        parcel = self._take(choice_index)
        if self._choices[choice_index].has_parcel(self._min_tokens):
            self._enqueue(choice_index)
        return parcel

    def take_rest(self) -> list[Parcel]:
        """Takes what there is of every choice, however little it is, and waits for nothing."""
        choices = [index for index, waiting in enumerate(self._choices) if not waiting.is_empty]
        choices += [index for index in self._queue if index not in choices]
        self._queue.clear()
        self._is_ready.clear()
        parcels = []
        for index in choices:
            parcels.append(self._take(index))
            while not self._choices[index].is_empty:
                parcels.append(self._take(index))
        return parcels

    def _take(self, choice_index: int) -> Parcel:
        waiting = self._choices[choice_index]
        prompt = waiting.prompt.popleft() if waiting.prompt else None
        piece = _Piece() if prompt or not waiting.pieces else waiting.pieces.popleft()
        self._num_tokens -= prompt.logprobs.num_tokens if prompt else len(piece.token_ids)
        return Parcel(
            choice_index,
            "".join(piece.texts),
            piece.token_ids,
            waiting.end if waiting.is_empty else None,
            joined(piece.logprobs) if piece.logprobs else None,
            prompt,
        )

    def _count(self, num_tokens: int) -> None:
        """Counts tokens that are about to wait."""
        if self._num_tokens + num_tokens > self._max_tokens:
            raise MiniInferError(
                ErrorReason.SLOW_CONSUMER,
                f"{self._num_tokens} tokens wait to be read, more than {self._max_tokens} "
                "may not: read the stream as it is made",
            )
        self._num_tokens += num_tokens

    def _enqueue(self, choice_index: int) -> None:
        if choice_index not in self._queue:
            self._queue.append(choice_index)
            self._is_ready.set()
