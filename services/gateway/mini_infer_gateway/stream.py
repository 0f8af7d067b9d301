"""One stream: what the gateway knows of a running choice, and the rules by which it ends.

The gateway owns the request: prompt ids, emitted ids, parameters, deadline, seed. Engine and
tokenizer can be given all they need from here again. Ids come in from the engine (`extend`), are
released when their text is known (`release`), and leave through the mailbox, with their
log-probabilities where these were asked for.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.logprobs import NO_LOGPROBS, LogprobColumns
from mini_infer.messages import NO_STOP_TOKEN, FinishAccounting, FinishCode

from mini_infer_gateway.logprob_queue import LogprobQueue
from mini_infer_gateway.mailbox import Ending, EndReason, Mailbox
from mini_infer_gateway.request import EncodedRequest, TextOptions

_END_REASONS = {
    FinishCode.STOP_TOKEN: EndReason.STOP,
    FinishCode.LENGTH: EndReason.LENGTH,
    FinishCode.ABORTED: EndReason.ABORTED,
    FinishCode.REPETITION: EndReason.REPETITION,
    FinishCode.GRAMMAR: EndReason.STOP,
}


ACCOUNTING_PATIENCE_S = 1.0
"""How long the end of a stream that a stop string ended waits for the engine's accounting."""


@dataclass(frozen=True, slots=True)
class EngineFinish:
    """The engine's last word on a stream."""

    code: FinishCode
    stop_token_id: int
    accounting: FinishAccounting


class EngineSide(Protocol):
    """What a stream asks of its engine's link."""

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
    """One choice of one request, from `open_text` until `close`.

    Attributes:
        number: Unique per gateway, 32 bits.
        request: What it has in common with the other choices.
        output_ids: Ids received from the engine, delivered or not.
        num_released: How many of them went into the mailbox.
        num_missing_prompt_logprobs: Tokens of the prompt, the last ones, whose log-probabilities
            were asked for and have not come; 0 before any output is taken.
        finish: The engine's last word, once it came.
    """

    def __init__(
        self,
        *,
        number: int,
        choice_index: int,
        request: EncodedRequest,
        mailbox: Mailbox,
        engine: EngineSide,
        text: TextSide,
    ) -> None:
        """Makes a stream that is not known to anyone yet.

        Args:
            number: Unique per gateway, 32 bits.
            choice_index: Which choice of the request it is.
            request: What it has in common with the other choices.
            mailbox: Where the output goes.
            engine: The link of the engine that runs it.
            text: The link of the tokenizer process that makes its text.
        """
        self.number = number
        self.request = request
        self.output_ids: list[int] = []
        self.num_released = 0
        sampling = request.sampling.of_choice(choice_index)
        wants_prompt = sampling.num_prompt_logprobs != NO_LOGPROBS
        self.num_missing_prompt_logprobs = len(request.prompt_ids) - 1 if wants_prompt else 0
        self.finish: EngineFinish | None = None
        self._choice_index = choice_index
        self._mailbox = mailbox
        self._logprobs = LogprobQueue() if sampling.num_logprobs != NO_LOGPROBS else None
        self._stop_string: str | None = None  # The one that was matched.
        self._patience: asyncio.TimerHandle | None = None
        self._engine = engine
        self._text = text

    def open_text(self) -> None:
        """Introduces the stream to the tokenizer, where it is needed."""
        if self.request.text_options is not None:
            self._text.open(self, self.request.text_options)

    def extend_prompt(self, logprobs: LogprobColumns) -> None:
        """Delivers log-probabilities of the first of the prompt's tokens that lack them."""
        start = len(self.request.prompt_ids) - self.num_missing_prompt_logprobs
        self.num_missing_prompt_logprobs -= logprobs.num_tokens
        try:
            self._mailbox.put_prompt(self._choice_index, start, logprobs)
        except MiniInferError as error:
            self.fail(error)

    def extend(
        self,
        token_ids: list[int],
        finish: EngineFinish | None,
        logprobs: LogprobColumns | None = None,
    ) -> None:
        """Takes ids that follow `output_ids`, and the engine's last word where it came.

        Args:
            token_ids: The ids.
            finish: The last word, or None.
            logprobs: Of the ids, where they were asked for.
        """
        start = len(self.output_ids)
        self.output_ids += token_ids
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.put(logprobs)
        self.finish = finish
        if self._stop_string is not None:
            if finish is not None:
                self._end(EndReason.STOP)
        elif self.request.text_options is None:
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
        logprobs = None if self._logprobs is None else self._logprobs.take(num_ids)
        try:
            self._mailbox.put(self._choice_index, text, self.output_ids[start:end], logprobs)
        except MiniInferError as error:
            self.fail(error)
            return
        options = self.request.text_options
        if stop_index >= 0 and options is not None:
            self._stop_at(options.stop[stop_index])
        elif self.finish is not None and end == len(self.output_ids):
            self._end_as(self.finish)

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
        self._mailbox.end(self._choice_index, error)
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
        self._mailbox.complete(self._choice_index)
        self._text.forget(self)
        self._engine.abort(self)
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(ACCOUNTING_PATIENCE_S, self._end, EndReason.STOP)

    def _end_as(self, finish: EngineFinish) -> None:
        """Ends the stream for the engine's reason, behind the last id and its text."""
        if finish.code is FinishCode.DEADLINE:
            self.fail(MiniInferError(ErrorReason.DEADLINE, "the request's deadline has passed"))
            return
        matched = finish.stop_token_id
        self._end(_END_REASONS[finish.code], None if matched == NO_STOP_TOKEN else matched)

    def _end(self, reason: EndReason, stop_token_id: int | None = None) -> None:
        ending = Ending(
            reason=reason,
            num_output_tokens=self.num_released,
            stop_string=self._stop_string,
            stop_token_id=stop_token_id,
            accounting=self.finish.accounting if self.finish else None,
        )
        self._mailbox.end(self._choice_index, ending)
        self.close()
