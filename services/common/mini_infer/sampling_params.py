"""Sampling and stopping parameters as users set them, and their checks.

`SamplingParams` is what people write (None = the model's default). `resolve` fills in the
defaults and gives the `ResolvedSampling` that crosses the wire, in which nothing is open.
`docs/sampling.md` has the formula of each field and the order in which they apply.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mini_infer.errors import ErrorReason, FieldViolation, MiniInferError
from mini_infer.logprobs import MAX_LOGPROBS, NO_LOGPROBS
from mini_infer.resolved_sampling import (
    MAX_SEED,
    GenerationDefaults,
    RepetitionLimit,
    ResolvedSampling,
)
from mini_infer.structured_output import StructuredOutput

_T = TypeVar("_T")

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
"""Of a bad word as well."""
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 2**31 - 1
MAX_CHOICES = 16
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY = 0.0099999
"""0.01, also where it comes as float32. Logits divided by less could overflow."""
MAX_REPETITION_PENALTY = 100.0
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_ALLOWED_TOKEN_IDS = 65_536
MAX_BAD_WORDS = 256
MAX_REPETITION_PERIOD = 1024
MAX_REPEATS = 1024
MAX_LISTED_IDS = 8
"""Bad ids of a list that are named; there may be thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetection:
    """Ends an output whose last tokens are one pattern, several times over.

    Attributes:
        max_period: Tokens of the longest pattern that is looked for, 1 to 1,024.
        min_period: Tokens of the shortest one, 1 to `max_period`.
        num_repeats: How often the pattern must stand at the end of the output, 2 to 1,024.
    """

    max_period: int
    min_period: int = 1
    num_repeats: int

    def violations(self) -> list[FieldViolation]:
        """Lists everything that is out of range."""
        path = "stopping.repetition_detection."
        found = []
        if not 1 <= self.max_period <= MAX_REPETITION_PERIOD:
            expected = f"1 to {MAX_REPETITION_PERIOD}"
            found.append(_expected(path + "max_period", expected, self.max_period))
        elif not 1 <= self.min_period <= self.max_period:
            found.append(_expected(path + "min_period", "1 to max_period", self.min_period))
        if not 2 <= self.num_repeats <= MAX_REPEATS:
            found.append(_expected(path + "num_repeats", f"2 to {MAX_REPEATS}", self.num_repeats))
        return found

    def as_limit(self) -> RepetitionLimit:
        """What the engine receives."""
        return RepetitionLimit(self.min_period, self.max_period, self.num_repeats)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample and when to stop; None takes the model's default.

    Attributes:
        temperature: Divides the logits, in [0, 100]; 0 is greedy.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose probability reaches it, (0, 1].
        min_p: Keep tokens at least so likely as this share of the likeliest one's probability,
            [0, 1]; 0 keeps all.
        typical_p: Keep the tokens whose surprise is nearest to the expected one, until their
            probability reaches it, (0, 1]; 1 keeps all.
        repetition_penalty: Logits of tokens of the prompt or the output are divided by it where
            they are positive and multiplied where they are negative, [0.01, 100]; 1 is none.
        presence_penalty: Taken off the logits of tokens of the output, [-2, 2].
        frequency_penalty: Taken off once for each time that the token is in the output, [-2, 2].
        logit_bias: What is added to the logits of ids, [-100, 100]; at most 1,024 ids.
        allowed_token_ids: The only ids that may be chosen; at most 65,536. Unset: all.
        bad_words: Texts whose last token is not chosen behind the others, also where a word
            begins there; at most 256.
        n: Completions of the prompt, 1 to 16. Completion i draws with seed + i.
        seed: Same seed and request, same tokens. Unset draws one.
        max_tokens: Output tokens at most, at least 1. Unset: the model's default, or what the
            context holds.
        min_tokens: No end of sequence, stop id, stop string or repetition before this many tokens.
        stop: Text, or texts, that end the output where one first appears; at most 16.
        stop_token_ids: Ids that end the output; at most 64.
        ignore_eos: Treat the model's end-of-sequence ids as ordinary tokens.
        repetition_detection: Ends an output that repeats itself.
        structured_output: A language that the output must belong to.
        logprobs: Tell the log-probability and rank of each output token, and so many likeliest
            tokens with theirs, 0 to 20. Unset: nothing is told.
        prompt_logprobs: The same for each prompt token but the first.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the matched stop string in the text.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    repetition_detection: RepetitionDetection | None = None
    structured_output: StructuredOutput | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
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
        found = [
            _expected(path, expected, value)
            for path, value, low, high, expected in self._numbers(vocab_size)
            if value is not None and not low <= value <= high
        ]
        found += self._bias_violations(vocab_size)
        found += _text_violations("sampling.bad_words", self.bad_words, MAX_BAD_WORDS)
        found += self._stopping_violations(vocab_size)
        if self.repetition_detection is not None:
            found += self.repetition_detection.violations()
        if self.structured_output is not None:
            found += self.structured_output.violations()
        return found

    def _numbers(self, vocab_size: int) -> Iterator[tuple[str, float | None, float, float, str]]:
        """Each single number: its path, value, least and greatest value, and the two in words."""
        least = math.ulp(0.0)
        share = (least, 1, "above 0 and at most 1")
        penalty = (-MAX_PENALTY, MAX_PENALTY, f"-{MAX_PENALTY:g} to {MAX_PENALTY:g}")
        repetition = (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, "0.01 to 100")
        most = min(MAX_LOGPROBS, vocab_size)
        count = (0, most, f"0 to {most}")
        yield "sampling.temperature", self.temperature, 0, MAX_TEMPERATURE, "0 to 100"
        yield "sampling.top_k", self.top_k, 0, MAX_TOP_K, f"0 to {MAX_TOP_K}"
        yield "sampling.top_p", self.top_p, *share
        yield "sampling.min_p", self.min_p, 0, 1, "0 to 1"
        yield "sampling.typical_p", self.typical_p, *share
        yield "sampling.repetition_penalty", self.repetition_penalty, *repetition
        yield "sampling.presence_penalty", self.presence_penalty, *penalty
        yield "sampling.frequency_penalty", self.frequency_penalty, *penalty
        yield "sampling.n", self.n, 1, MAX_CHOICES, f"1 to {MAX_CHOICES}"
        yield "sampling.seed", self.seed, 0, MAX_SEED, "0 to 2**64 - 1"
        yield "stopping.max_tokens", self.max_tokens, 1, math.inf, "at least 1"
        yield "output.logprobs", self.logprobs, *count
        yield "output.prompt_logprobs", self.prompt_logprobs, *count

    def _bias_violations(self, vocab_size: int) -> list[FieldViolation]:
        path = "sampling.logit_bias"
        found = []
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            expected = f"at most {MAX_LOGIT_BIASES} ids"
            found.append(_expected(path, expected, f"{len(self.logit_bias)} ids"))
        else:
            for token_id, bias in self.logit_bias.items():
                if not 0 <= token_id < vocab_size:
                    found.append(_expected(path, f"ids from 0 to {vocab_size - 1}", token_id))
                if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                    found.append(_expected(f"{path}[{token_id}]", "-100 to 100", bias))
            del found[MAX_LISTED_IDS:]
        allowed = self.allowed_token_ids
        found += _id_violations(
            "sampling.allowed_token_ids", allowed, MAX_ALLOWED_TOKEN_IDS, vocab_size
        )
        return found

    def _stopping_violations(self, vocab_size: int) -> list[FieldViolation]:
        found = []
        if self.min_tokens < 0 or self.min_tokens > (self.max_tokens or math.inf):
            found.append(_expected("stopping.min_tokens", "0 to max_tokens", self.min_tokens))
        found += _text_violations("stopping.stop", self.stop_strings, MAX_STOP_STRINGS)
        found += _id_violations(
            "stopping.stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size
        )
        return found

    def resolve(
        self,
        defaults: GenerationDefaults,
        *,
        num_prompt_tokens: int,
        max_model_len: int,
        seed: int,
        bad_words: Sequence[Sequence[int]] = (),
    ) -> ResolvedSampling:
        """Applies the model's defaults and the context length.

        Args:
            defaults: What the model folder says for absent fields.
            num_prompt_tokens: Length of the encoded prompt.
            max_model_len: Tokens of prompt and output that the model can hold.
            seed: Used where no seed was set.
            bad_words: `bad_words` in ids, as the tokenizer encodes them.

        Raises:
            MiniInferError: CONTEXT_LENGTH_EXCEEDED where prompt and max_tokens do not fit.
        """
        room = max_model_len - num_prompt_tokens
        max_tokens = self.max_tokens
        if max_tokens is None:
            max_tokens = min(defaults.max_tokens or room, room)
        if room < 1 or max_tokens > room:
            raise _context_length_exceeded(num_prompt_tokens, self.max_tokens, max_model_len)
        detection, structured = self.repetition_detection, self.structured_output
        return ResolvedSampling(
            temperature=_first_set(self.temperature, defaults.temperature),
            top_k=_first_set(self.top_k, defaults.top_k),
            top_p=_first_set(self.top_p, defaults.top_p),
            seed=_first_set(self.seed, seed),
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            ignore_eos=self.ignore_eos,
            stop_token_ids=list(self.stop_token_ids),
            min_p=_first_set(self.min_p, defaults.min_p),
            typical_p=_first_set(self.typical_p, defaults.typical_p),
            repetition_penalty=_first_set(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            bias_ids=list(self.logit_bias),
            bias_values=list(self.logit_bias.values()),
            allowed_token_ids=list(self.allowed_token_ids),
            bad_words=[list(word) for word in bad_words],
            num_logprobs=_first_set(self.logprobs, NO_LOGPROBS),
            num_prompt_logprobs=_first_set(self.prompt_logprobs, NO_LOGPROBS),
            repetition=detection.as_limit() if detection else None,
            grammar=structured.as_grammar() if structured else None,
        )


def within_vocabulary(words: Sequence[list[int]], vocab_size: int) -> list[list[int]]:
    """The bad words that the model could write: a tokenizer may have ids that it does not know.

    Args:
        words: Lists of ids, none of them empty.
        vocab_size: Number of token ids of the model.
    """
    return [word for word in words if max(word) < vocab_size]


def as_params(sampling: ResolvedSampling) -> SamplingParams:
    """The numbers and lists of ids of resolved parameters, to be checked once more."""
    limit = sampling.repetition
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        typical_p=sampling.typical_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(zip(sampling.bias_ids, sampling.bias_values, strict=True)),
        allowed_token_ids=sampling.allowed_token_ids,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        repetition_detection=RepetitionDetection(
            min_period=limit.min_period,
            max_period=limit.max_period,
            num_repeats=limit.num_repeats,
        )
        if limit
        else None,
        logprobs=None if sampling.num_logprobs == NO_LOGPROBS else sampling.num_logprobs,
        prompt_logprobs=None
        if sampling.num_prompt_logprobs == NO_LOGPROBS
        else sampling.num_prompt_logprobs,
    )


def _first_set(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _expected(field: str, expected: str, given: object) -> FieldViolation:
    return FieldViolation(field, f"expected {expected}, got {given}")


def _text_violations(path: str, texts: Sequence[str], max_texts: int) -> list[FieldViolation]:
    """What is wrong with a list of short texts."""
    if isinstance(texts, str):
        return [_expected(path, "a list of strings", "a single one")]
    found = []
    if len(texts) > max_texts:
        expected = f"at most {max_texts} strings"
        found.append(_expected(path, expected, f"{len(texts)} strings"))
    for index, text in enumerate(texts[:max_texts]):
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        if not 0 < num_bytes <= MAX_STOP_STRING_BYTES:
            expected = f"1 to {MAX_STOP_STRING_BYTES} bytes of UTF-8"
            found.append(_expected(f"{path}[{index}]", expected, f"{num_bytes} bytes"))
    return found


def _id_violations(
    path: str, token_ids: Sequence[int], max_ids: int, vocab_size: int
) -> list[FieldViolation]:
    """What is wrong with a list of token ids."""
    found = []
    if len(token_ids) > max_ids:
        found.append(_expected(path, f"at most {max_ids} ids", f"{len(token_ids)} ids"))
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return found  # which is found out fast, also of thousands
    bad = [
        _expected(f"{path}[{index}]", f"0 to {vocab_size - 1}", token_id)
        for index, token_id in enumerate(token_ids[:max_ids])
        if not 0 <= token_id < vocab_size
    ]
    return [*found, *bad[:MAX_LISTED_IDS]]


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
