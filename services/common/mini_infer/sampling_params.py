"""Sampling and stopping parameters: what users set, its checks, and what the engine receives.

`SamplingParams` is what people write (None = the model's default). `resolve` fills in the
defaults and gives the `ResolvedSampling` that crosses the wire, in which nothing is open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from mini_infer.errors import ErrorReason, FieldViolation, MiniInferError

_T = TypeVar("_T")

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_CHOICES = 16


class ResolvedSampling(
    msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=False
):
    """Sampling and stopping of one sequence with every default applied.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 means the whole vocabulary.
        top_p: In (0, 1]; 1 means the whole vocabulary.
        seed: Keys the random numbers together with the output position. 64 bits.
        max_tokens: Output tokens at most, those already emitted included.
        min_tokens: Output positions below this one never hold an end or stop id.
        ignore_eos: Whether the model's end-of-sequence ids are ordinary tokens.
        stop_token_ids: Ids that end the sequence, beside the model's own.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []

    def of_choice(self, index: int) -> ResolvedSampling:
        """Those of another choice of the same prompt, where these are the ones of choice 0."""
        return msgspec.structs.replace(self, seed=(self.seed + index) % (MAX_SEED + 1))


class GenerationDefaults(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What generation_config.json says for absent fields (see `read_generation_defaults`).

    Attributes:
        temperature: 0 where the file does not say `do_sample: true`.
        top_k: 0 where absent.
        top_p: 1 where absent.
        max_tokens: The file's `max_new_tokens`, or None.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample and when to stop; None takes the model's default.

    Attributes:
        temperature: Divides the logits, in [0, 100]; 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose probability reaches it, (0, 1].
        n: Completions of the prompt, 1 to 16. Completion i draws with seed + i.
        seed: Same seed and request, same tokens. Unset draws one.
        max_tokens: Output tokens at most, at least 1. Unset: what the context holds.
        min_tokens: No end of sequence, stop id or stop string before this many tokens.
        stop: Text, or texts, that end the output where one first appears; at most 16.
        stop_token_ids: Ids that end the output; at most 64.
        ignore_eos: Treat the model's end-of-sequence ids as ordinary tokens.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the matched stop string in the text.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, also where it is a single text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def violations(self, vocab_size: int) -> list[FieldViolation]:
        """Lists everything that is out of range; empty when all is well.

        Args:
            vocab_size: Number of token ids of the model.
        """
        return [*self._sampling_violations(), *self._stopping_violations(vocab_size)]

    def _sampling_violations(self) -> list[FieldViolation]:
        found = []
        temperature, top_p = self.temperature, self.top_p
        if temperature is not None and not 0 <= temperature <= MAX_TEMPERATURE:
            found.append(_expected("sampling.temperature", "0 to 100", temperature))
        if self.top_k is not None and not 0 <= self.top_k <= MAX_TOP_K:
            found.append(_expected("sampling.top_k", f"0 to {MAX_TOP_K}", self.top_k))
        if top_p is not None and not 0 < top_p <= 1:
            found.append(_expected("sampling.top_p", "above 0 and at most 1", top_p))
        if not 1 <= self.n <= MAX_CHOICES:
            found.append(_expected("sampling.n", f"1 to {MAX_CHOICES}", self.n))
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            found.append(_expected("sampling.seed", "0 to 2**64 - 1", self.seed))
        return found

    def _stopping_violations(self, vocab_size: int) -> list[FieldViolation]:
        found = []
        if self.max_tokens is not None and self.max_tokens < 1:
            found.append(_expected("stopping.max_tokens", "at least 1", self.max_tokens))
        if self.min_tokens < 0 or self.min_tokens > (self.max_tokens or math.inf):
            found.append(_expected("stopping.min_tokens", "0 to max_tokens", self.min_tokens))
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            count = f"{len(self.stop_strings)} strings"
            found.append(_expected("stopping.stop", f"at most {MAX_STOP_STRINGS} strings", count))
        for index, text in enumerate(self.stop_strings[:MAX_STOP_STRINGS]):
            if not 0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_STOP_STRING_BYTES:
                expected = f"1 to {MAX_STOP_STRING_BYTES} bytes of UTF-8"
                given = f"{len(text.encode('utf-8', 'surrogatepass'))} bytes"
                found.append(_expected(f"stopping.stop[{index}]", expected, given))
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            count = f"{len(self.stop_token_ids)} ids"
            expected = f"at most {MAX_STOP_TOKEN_IDS} ids"
            found.append(_expected("stopping.stop_token_ids", expected, count))
        for index, token_id in enumerate(self.stop_token_ids[:MAX_STOP_TOKEN_IDS]):
            if not 0 <= token_id < vocab_size:
                field = f"stopping.stop_token_ids[{index}]"
                found.append(_expected(field, f"0 to {vocab_size - 1}", token_id))
        return found

    def resolve(
        self, defaults: GenerationDefaults, *, num_prompt_tokens: int, max_model_len: int, seed: int
    ) -> ResolvedSampling:
        """Applies the model's defaults and the context length.

        Args:
            defaults: What the model folder says for absent fields.
            num_prompt_tokens: Length of the encoded prompt.
            max_model_len: Tokens of prompt and output that the model can hold.
            seed: Used where no seed was set.

        Raises:
            MiniInferError: CONTEXT_LENGTH_EXCEEDED where prompt and max_tokens do not fit.
        """
        room = max_model_len - num_prompt_tokens
        max_tokens = self.max_tokens
        if max_tokens is None:
            max_tokens = min(defaults.max_tokens or room, room)
        if room < 1 or max_tokens > room:
            raise _context_length_exceeded(num_prompt_tokens, self.max_tokens, max_model_len)
        return ResolvedSampling(
            temperature=_first_set(self.temperature, defaults.temperature),
            top_k=_first_set(self.top_k, defaults.top_k),
            top_p=_first_set(self.top_p, defaults.top_p),
            seed=_first_set(self.seed, seed),
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            ignore_eos=self.ignore_eos,
            stop_token_ids=list(self.stop_token_ids),
        )


def _first_set(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _expected(field: str, expected: str, given: object) -> FieldViolation:
    return FieldViolation(field, f"expected {expected}, got {given}")


def _context_length_exceeded(
    num_prompt_tokens: int, max_tokens: int | None, max_model_len: int
) -> MiniInferError:
    wanted = f"{num_prompt_tokens} prompt tokens"
    wanted += (
        " and at least 1 output token" if max_tokens is None else f" + {max_tokens} max_tokens"
    )
    return MiniInferError(
        ErrorReason.CONTEXT_LENGTH_EXCEEDED,
        f"the context holds {max_model_len} tokens, got {wanted}: shorten one of them",
        {
            "limit": str(max_model_len),
            "num_prompt_tokens": str(num_prompt_tokens),
            "max_tokens": str(max_tokens if max_tokens is not None else 1),
        },
    )
