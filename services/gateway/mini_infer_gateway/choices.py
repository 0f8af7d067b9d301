"""All choices of one call: they begin, are aborted and are freed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mini_infer.errors import MiniInferError
from mini_infer.logprobs import NO_LOGPROBS
from mini_infer.messages import FinishAccounting

from mini_infer_gateway.engine_link import EngineLink
from mini_infer_gateway.mailbox import MAX_PENDING_TOKENS, Ending, Mailbox
from mini_infer_gateway.request import EncodedRequest
from mini_infer_gateway.stream import Stream, TextSide


class Choices:
    """The streams of a call, one for each choice.

    Attributes:
        request: What they share.
        mailbox: What waits for the client.
    """

    def __init__(
        self,
        request: EncodedRequest,
        *,
        engine: EngineLink,
        text: TextSide,
        next_number: Callable[[], int],
    ) -> None:
        """Makes streams that are not known to anyone yet.

        Args:
            request: What they share.
            engine: The link of the engine that runs them.
            text: The link of the tokenizer process that makes their text.
            next_number: Gives numbers of streams.
        """
        self.request = request
        self.mailbox = Mailbox(
            request.num_choices, request.stream_interval, max_pending_tokens(request)
        )
        self._engine = engine
        self._streams = [
            Stream(
                number=next_number(),
                choice_index=choice_index,
                request=request,
                mailbox=self.mailbox,
                engine=engine,
                text=text,
            )
            for choice_index in range(request.num_choices)
        ]

    @property
    def num_released(self) -> int:
        """Ids that went into the mailbox."""
        return sum(stream.num_released for stream in self._streams)

    def open(self) -> None:
        """Introduces the streams to tokenizer and engine.

        Raises:
            MiniInferError: UNAVAILABLE kinds, where the engine cannot take them.
        """
        for stream in self._streams:
            stream.open_text()
        self._engine.submit(self._streams)

    def abort(self) -> None:
        """Asks for an early end of each choice that runs."""
        for stream in self._streams:
            stream.abort()

    def fail(self, error: MiniInferError) -> None:
        """Ends each choice that runs with an error."""
        for stream in self._streams:
            stream.fail(error)

    def close(self) -> None:
        """Frees all streams at engine and tokenizer, at any time and any number of times."""
        for stream in self._streams:
            stream.close()


def max_pending_tokens(request: EncodedRequest) -> int:
    """Tokens that may wait for the client.

    All of a prompt's log-probabilities may: they come as fast as the prompt is computed, and no
    client can ask for less of them at a time.
    """
    if request.sampling.num_prompt_logprobs == NO_LOGPROBS:
        return MAX_PENDING_TOKENS
    return MAX_PENDING_TOKENS + len(request.prompt_ids)


def call_accounting(endings: Sequence[Ending]) -> FinishAccounting | None:
    """Where the time of a call went; None where the engine did not tell it of each choice.

    Queue, prefill and cached tokens are those of choice 0, which computes the prompt that all
    share. Decode and steps are those of the choice with the most, since choices run side by side.
    Preemptions are added up.

    Args:
        endings: By choice index.
    """
    accountings = [each.accounting for each in endings if each.accounting is not None]
    if len(accountings) < len(endings):
        return None
    first = accountings[0]
    return FinishAccounting(
        queue_ms=first.queue_ms,
        prefill_ms=first.prefill_ms,
        decode_ms=max(each.decode_ms for each in accountings),
        num_cached_tokens=first.num_cached_tokens,
        num_preemptions=sum(each.num_preemptions for each in accountings),
        num_steps=max(each.num_steps for each in accountings),
    )
