"""One stream: what the gateway knows of a running choice, and the rules by which it ends.

The gateway owns the request: prompt ids, emitted ids, parameters, deadline, seed. Engine and
tokenizer can be given all they need from here again. Ids come in from the engine (`extend`), are
released when their text is known (`release`), and leave through the mailbox.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Protocol

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import (
    NO_BUDGET,
    NO_STOP_TOKEN,
    FinishAccounting,
    FinishCode,
)
from mini_infer.sampling_params import ResolvedSampling

from mini_infer_gateway.mailbox import Ending, EndReason, Mailbox

_END_REASONS = {
    FinishCode.STOP_TOKEN: EndReason.STOP,
    FinishCode.LENGTH: EndReason.LENGTH,
    FinishCode.ABORTED: EndReason.ABORTED,
}


ACCOUNTING_PATIENCE_S = 1.0
"""How long the end of a stream that a stop string ended waits for the engine's accounting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How a stream's ids become text. `ids_only` asks for stop strings without text."""

    stop: tuple[str, ...]
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    min_tokens: int
    ids_only: bool


@dataclass(frozen=True, slots=True)
class EngineFinish:
    """The engine's last word on a stream."""

    code: FinishCode
    stop_token_id: int
    accounting: FinishAccounting


class EngineSide(Protocol):
    """What a stream asks of its engine's link."""

    def submit(self, stream: Stream) -> None:
        """Gives the stream to the engine."""

    def abort(self, stream: Stream) -> None:
        """Asks the engine to end the stream and to say so."""

    def forget(self, stream: Stream) -> None:
        """Frees what the engine holds of the stream; no more output is wanted."""


class TextSide(Protocol):
    """What a stream asks of its tokenizer's link."""

    def open(self, stream: Stream, options: TextOptions) -> None:
        """Begins to turn the stream's ids into text."""

    def feed(self, stream: Stream, start: int) -> None:
        """Tells of new ids from this output position on, or of the end."""

    def forget(self, stream: Stream) -> None:
        """Frees what the tokenizer holds of the stream."""


class Stream:
    """One choice of one request, from `open` until `close`.

    Attributes:
        number: Unique per gateway, 32 bits.
        prompt_ids: The encoded prompt.
        sampling: Parameters with every default applied, the seed among them.
        output_ids: Ids received from the engine, delivered or not.
        num_released: How many of them went into the mailbox.
        finish: The engine's last word, once it came.
        mailbox: What waits for the client.
    """

    def __init__(
        self,
        *,
        number: int,
        prompt_ids: list[int],
        sampling: ResolvedSampling,
        deadline: float | None,
        text_options: TextOptions | None,
        mailbox: Mailbox,
        engine: EngineSide,
        text: TextSide,
    ) -> None:
        """Makes a stream that is not known to anyone yet.

        Args:
            number: Unique per gateway, 32 bits.
            prompt_ids: The encoded prompt.
            sampling: Parameters with every default applied.
            deadline: On the loop's clock, in seconds, or None.
            text_options: None where neither text nor stop strings are wanted.
            mailbox: Where the output goes.
            engine: The link of the engine that runs it.
            text: The link of the tokenizer process that makes its text.
        """
        self.number = number
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.mailbox = mailbox
        self.output_ids: list[int] = []
        self.num_released = 0
        self.finish: EngineFinish | None = None
        self._deadline = deadline
        self._text_options = text_options
        self._stop_string: str | None = None  # The one that was matched.
        self._patience: asyncio.TimerHandle | None = None
        self._engine = engine
        self._text = text

    def open(self) -> None:
        """Introduces the stream to tokenizer and engine.

        Raises:
            MiniInferError: UNAVAILABLE kinds, where the engine cannot take it.
        """
        if self._text_options is not None:
            self._text.open(self, self._text_options)
        self._engine.submit(self)

    def budget_ms(self) -> int:
        """Milliseconds until the deadline, at least 0, or `NO_BUDGET`."""
        if self._deadline is None:
            return NO_BUDGET
        return max(0, math.floor((self._deadline - asyncio.get_running_loop().time()) * 1000))

    def extend(self, token_ids: list[int], finish: EngineFinish | None) -> None:
        """Takes ids that follow `output_ids`, and the engine's last word where it came."""
        start = len(self.output_ids)
        self.output_ids += token_ids
        self.finish = finish
        if self._stop_string is not None:
            if finish is not None:
                self._end(EndReason.STOP)
        elif finish is not None and finish.code is FinishCode.DEADLINE:
            self.fail(MiniInferError(ErrorReason.DEADLINE, "the request's deadline has passed"))
        elif self._text_options is None:
            self.release(len(token_ids), "", -1)
        else:
            self._text.feed(self, start)

    def release(self, num_ids: int, text: str, stop_index: int) -> None:
        """Delivers the next ids and their text, and ends the stream where they end it.

        A stop string wins over the engine's own end: it stands at an earlier or equal position.

        Args:
            num_ids: How many of the ids not released yet.
            text: Their text.
            stop_index: Index of the stop string that is complete with them, or -1.
        """
        start, end = self.num_released, self.num_released + num_ids
        self.num_released = end
        try:
            self.mailbox.put(text, self.output_ids[start:end])
        except MiniInferError as error:
            self.fail(error)
            return
        if stop_index >= 0 and self._text_options is not None:
            self._stop_at(self._text_options.stop[stop_index])
        elif self.finish is not None and end == len(self.output_ids):
            matched = self.finish.stop_token_id
            self._end(
                _END_REASONS[self.finish.code],
                stop_token_id=None if matched == NO_STOP_TOKEN else matched,
            )

    def abort(self) -> None:
        """Asks for an early end, which the engine confirms with its last row."""
        self._engine.abort(self)

    def fail(self, error: MiniInferError) -> None:
        """Ends the stream with an error, behind what was released.

        Where a stop string was matched, nothing is missing but the accounting: it ends regularly.
        """
        if self._stop_string is not None:
            self._end(EndReason.STOP)
            return
        self.mailbox.end(error)
        self.close()

    def close(self) -> None:
        """Frees the stream at engine and tokenizer; output that arrives later is dropped.

        May be called at any time, any number of times.
        """
        if self._patience is not None:
            self._patience.cancel()
        self._engine.forget(self)
        self._text.forget(self)

    def _stop_at(self, stop_string: str) -> None:
        """Ends the output here, and the stream as soon as the engine has said its last word."""
        self._stop_string = stop_string
        if self.finish is not None:
            self._end(EndReason.STOP)
            return
        self.mailbox.flush()
        self._text.forget(self)
        self._engine.abort(self)
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(ACCOUNTING_PATIENCE_S, self._end, EndReason.STOP)

    def _end(self, reason: EndReason, stop_token_id: int | None = None) -> None:
        ending = Ending(
            reason=reason,
            num_output_tokens=self.num_released,
            stop_string=self._stop_string,
            stop_token_id=stop_token_id,
            accounting=self.finish.accounting if self.finish else None,
        )
        self.mailbox.end(ending)
        self.close()
