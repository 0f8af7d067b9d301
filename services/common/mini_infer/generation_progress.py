"""What users of the clients see of a response, as it comes in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mini_infer.logprobs import TokenLogprobs, TopLogprob
from mini_infer.messages import FinishAccounting
from mini_infer.sampling_params import MAX_CHOICES
from mini_infer.v1 import generate_pb2

_FINISH_REASONS = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_ABORTED: "aborted",
    generate_pb2.FINISH_REASON_REPETITION: "repetition",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of output.

    Attributes:
        text: The text of `token_ids`.
        token_ids: Output ids of the choice since its chunk before.
        choice_index: The choice that goes on with it.
        logprobs: What the model thought of each of `token_ids`; empty where it was not asked for.
    """

    text: str
    token_ids: list[int]
    choice_index: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request.

    Attributes:
        num_prompt_tokens: Tokens of the prompt, counted once for all choices.
        num_output_tokens: Output tokens of all choices.
        num_cached_tokens: Those of the prompt that were taken from the prefix cache.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


class Choice:
    """What a stream has told so far of one completion of the prompt.

    Attributes:
        token_ids: All its output ids so far.
        logprobs: What the model thought of each of `token_ids`; empty where it was not asked for.
        finish_reason: "stop", "length", "repetition" or "aborted"; None before its end.
        matched_stop: The stop string, or the stop or end-of-sequence id, that ended it.
    """

    def __init__(self) -> None:
        """Has no output yet."""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.matched_stop: str | int | None = None
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All its text so far."""
        return "".join(self._texts)

    def _extend(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs

    def _finish(self, finished: generate_pb2.ChoiceFinished) -> None:
        self.finish_reason = _FINISH_REASONS.get(finished.finish_reason, "unknown")
        matched = finished.WhichOneof("matched_stop")
        self.matched_stop = getattr(finished, matched) if matched else None


class GenerationProgress:
    """What a stream has told so far.

    Attributes:
        request_id: The server's or the client's; None before the first chunk.
        num_prompt_tokens: None before the first chunk.
        prompt_logprobs: What the model thought of the prompt's tokens, from the second on; whole
            at the first chunk of choice 0, empty where it was not asked for.
        choices: The completions of the prompt, `n` of them.
        usage: None before the end.
        seed: The seed of choice 0; None before the end.
        accounting: Where the time went; None before the end, or where the server did not say.
    """

    def __init__(self, request: generate_pb2.GenerateRequest) -> None:
        """Knows nothing yet.

        Args:
            request: What was asked for.
        """
        # A number beyond the range is refused by the server, which then has nothing to tell.
        num_choices = min(max(request.sampling.n, 1), MAX_CHOICES)
        self.request_id: str | None = None
        self.num_prompt_tokens: int | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.choices = [Choice() for _ in range(num_choices)]
        self.usage: Usage | None = None
        self.seed: int | None = None
        self.accounting: FinishAccounting | None = None

    @property
    def token_ids(self) -> list[int]:
        """All output ids of choice 0 so far."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended, as `Choice.finish_reason` says it; None before its end."""
        return self.choices[0].finish_reason

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string, or the stop or end-of-sequence id, that ended choice 0."""
        return self.choices[0].matched_stop

    def _read(self, response: generate_pb2.GenerateResponse) -> Chunk | None:
        """Takes a message in; gives a chunk where it holds output."""
        if response.HasField("request_id"):
            self.request_id = response.request_id
            self.num_prompt_tokens = response.num_prompt_tokens
        index = response.choice_index
        match response.WhichOneof("event"):
            case "delta":
                delta = response.delta
                logprobs = _read_logprobs(delta.logprobs)
                chunk = Chunk(delta.text, list(delta.token_ids), index, logprobs)
                self.choices[index]._extend(chunk)
                return chunk
            case "prompt_logprobs":
                self.prompt_logprobs += _read_logprobs(response.prompt_logprobs.tokens)
            case "choice_finished":
                self.choices[index]._finish(response.choice_finished)
            case "finished":
                usage = response.finished.usage
                self.usage = Usage(
                    usage.num_prompt_tokens, usage.num_output_tokens, usage.num_cached_tokens
                )
                self.seed = response.finished.seed
        return None

    def _read_trailers(self, metadata: Any) -> None:
        """Takes in the trailing metadata of a call that ended well."""
        values = {key: value for key, value in metadata or () if key.startswith("mini-infer-")}
        if "mini-infer-steps" in values:
            self.accounting = FinishAccounting(
                queue_ms=float(values["mini-infer-queue-ms"]),
                prefill_ms=float(values["mini-infer-prefill-ms"]),
                decode_ms=float(values["mini-infer-decode-ms"]),
                num_cached_tokens=int(values["mini-infer-cached-tokens"]),
                num_preemptions=int(values["mini-infer-preemptions"]),
                num_steps=int(values["mini-infer-steps"]),
            )


def _read_logprobs(told: Iterable[generate_pb2.TokenLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(
            each.logprob, each.rank, [TopLogprob(top.token_id, top.logprob) for top in each.top]
        )
        for each in told
    ]
