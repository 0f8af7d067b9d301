"""One choice of a prompt under way in this process, and what it comes to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mini_infer.errors import MiniInferError
from mini_infer.logprobs import TokenLogprobs
from mini_infer.messages import FinishCode
from mini_infer_tokenizer.detokenize import NO_STOP, TextStream

from mini_infer_engine.sequence import Sequence as EngineSequence
from mini_infer_engine.step_updates import SequenceUpdate

FinishReason = Literal["stop", "length", "repetition", "error"]
_FINISH_REASONS: Mapping[FinishCode, FinishReason] = {
    FinishCode.STOP_TOKEN: "stop",
    FinishCode.LENGTH: "length",
    FinishCode.GRAMMAR: "stop",
    FinishCode.REPETITION: "repetition",
}


@dataclass(slots=True, kw_only=True)
class GenerationOutput:
    """What became of one choice of a prompt.

    Attributes:
        prompt_token_ids: The encoded prompt.
        choice_index: 0 to n - 1 among the choices of the prompt.
        token_ids: The output's ids, an end-of-sequence id included.
        text: Their text, cut at a stop string.
        finish_reason: "stop" (end of sequence, stop id, stop string, or a structured output that is
            complete), "length", "repetition" or "error".
        stop_string: The stop string that ended it, if one did.
        stop_token_id: The id that ended it, if one did.
        seed: What the random numbers were keyed with.
        num_cached_tokens: Prompt tokens that were not computed, since their K and V were known; of
            later choices also those that the first one had just computed.
        error: Why this prompt alone failed; the text so far is kept.
        logprobs: Of each of `token_ids`; empty where they were not asked for.
        prompt_logprobs: Of each token of the prompt but the first; of the first choice alone, and
            empty where they were not asked for.
    """

    prompt_token_ids: list[int]
    choice_index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None
    seed: int = 0
    num_cached_tokens: int = 0
    error: MiniInferError | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class Generation:
    """A choice under way: its sequence in the scheduler, its text, and what came so far."""

    sequence: EngineSequence
    text: TextStream
    stop: Sequence[str]
    output: GenerationOutput
    pending_ids: deque[int] = field(default_factory=deque)
    pending_logprobs: deque[TokenLogprobs] = field(default_factory=deque)

    def receive(self, update: SequenceUpdate) -> None:
        """Takes in what a step did; `output.finish_reason` is set at the end."""
        output = self.output
        output.num_cached_tokens = self.sequence.num_cached_tokens
        self.pending_ids.extend(update.token_ids)
        if update.logprobs is not None:
            self.pending_logprobs.extend(update.logprobs.tokens())
        if update.prompt_logprobs is not None:
            output.prompt_logprobs += update.prompt_logprobs.tokens()
        last = update.finish_code is not FinishCode.RUNNING or update.error is not None
        delta = self.text.read(update.token_ids, last)
        output.text += delta.text
        output.token_ids += [self.pending_ids.popleft() for _ in range(delta.num_ids)]
        if self.pending_logprobs:
            output.logprobs += [self.pending_logprobs.popleft() for _ in range(delta.num_ids)]
        if delta.stop_index != NO_STOP:
            output.stop_string = self.stop[delta.stop_index]
            output.finish_reason = "stop"
        elif update.error:
            output.error = update.error
            output.finish_reason = "error"
        elif last:
            output.finish_reason = _FINISH_REASONS[update.finish_code]
            if update.finish_code is FinishCode.STOP_TOKEN:
                output.stop_token_id = update.stop_token_id
