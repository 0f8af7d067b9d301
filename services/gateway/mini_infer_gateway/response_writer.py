"""What the gateway answers to Generate calls, as protobuf."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from mini_infer.logprobs import LogprobColumns
from mini_infer.messages import FinishAccounting
from mini_infer.v1 import generate_pb2

from mini_infer_gateway.mailbox import Ending, EndReason, PromptPart

_FINISH_REASONS = {
    EndReason.STOP: generate_pb2.FINISH_REASON_STOP,
    EndReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    EndReason.ABORTED: generate_pb2.FINISH_REASON_ABORTED,
    EndReason.REPETITION: generate_pb2.FINISH_REASON_REPETITION,
}


class ResponseWriter:
    """Makes the messages of one Generate stream, numbered from 0."""

    def __init__(self, request_id: str, num_prompt_tokens: int, seed: int) -> None:
        """Begins a stream.

        Args:
            request_id: Told in the first message.
            num_prompt_tokens: Told in the first message and in the usage.
            seed: Told in the last message.
        """
        self._request_id = request_id
        self._num_prompt_tokens = num_prompt_tokens
        self._seed = seed
        self._seq = 0

    def prompt_logprobs(self, part: PromptPart) -> generate_pb2.GenerateResponse:
        """What the model thought of some tokens of the prompt."""
        told = generate_pb2.PromptLogprobs(start=part.start)
        _write_logprobs(told.tokens, part.logprobs)
        return self._number(generate_pb2.GenerateResponse(prompt_logprobs=told))

    def delta(
        self,
        choice_index: int,
        text: str,
        token_ids: list[int],
        logprobs: LogprobColumns | None = None,
    ) -> generate_pb2.GenerateResponse:
        """More output of a choice."""
        delta = generate_pb2.Delta(text=text, token_ids=token_ids)
        if logprobs is not None:
            _write_logprobs(delta.logprobs, logprobs)
        return self._number(generate_pb2.GenerateResponse(choice_index=choice_index, delta=delta))

    def choice_finished(self, choice_index: int, ending: Ending) -> generate_pb2.GenerateResponse:
        """The end of a choice."""
        finished = generate_pb2.ChoiceFinished(
            finish_reason=_FINISH_REASONS[ending.reason],
            num_output_tokens=ending.num_output_tokens,
            stop_string=ending.stop_string,
            stop_token_id=ending.stop_token_id,
        )
        return self._number(
            generate_pb2.GenerateResponse(choice_index=choice_index, choice_finished=finished)
        )

    def finished(self, endings: Sequence[Ending]) -> generate_pb2.GenerateResponse:
        """The end of the call.

        Args:
            endings: By choice index.
        """
        accounting = endings[0].accounting
        usage = generate_pb2.Usage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=sum(each.num_output_tokens for each in endings),
            num_cached_tokens=accounting.num_cached_tokens if accounting else 0,
        )
        finished = generate_pb2.Finished(usage=usage, seed=self._seed)
        return self._number(generate_pb2.GenerateResponse(finished=finished))

    def _number(self, response: generate_pb2.GenerateResponse) -> generate_pb2.GenerateResponse:
        if self._seq == 0:
            response.request_id = self._request_id
            response.num_prompt_tokens = self._num_prompt_tokens
        response.seq = self._seq
        self._seq += 1
        return response


def accounting_metadata(accounting: FinishAccounting) -> tuple[tuple[str, str], ...]:
    """Where a call's time went, as trailing metadata."""
    return (
        ("mini-infer-queue-ms", f"{accounting.queue_ms:.3f}"),
        ("mini-infer-prefill-ms", f"{accounting.prefill_ms:.3f}"),
        ("mini-infer-decode-ms", f"{accounting.decode_ms:.3f}"),
        ("mini-infer-cached-tokens", str(accounting.num_cached_tokens)),
        ("mini-infer-preemptions", str(accounting.num_preemptions)),
        ("mini-infer-steps", str(accounting.num_steps)),
    )


def _write_logprobs(
    written: RepeatedCompositeFieldContainer[generate_pb2.TokenLogprobs], columns: LogprobColumns
) -> None:
    for token in columns.tokens():
        # `add` in place: half the time of messages that are made first and copied in.
        add_top = written.add(logprob=token.logprob, rank=token.rank).top.add
        for token_id, logprob in token.top:
            add_top(token_id=token_id, logprob=logprob)
