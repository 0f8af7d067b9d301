"""Sampling and stopping with every default applied: what crosses the wire to the engine."""

from __future__ import annotations

import msgspec

from mini_infer.logprobs import NO_LOGPROBS
from mini_infer.structured_output import Grammar

MAX_SEED = 2**64 - 1


class RepetitionLimit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An output that repeats itself ends.

    Attributes:
        min_period: Tokens of the shortest pattern that is looked for, at least 1.
        max_period: Tokens of the longest one.
        num_repeats: How often the pattern stands at the end of the output, one behind the other,
            when the output ends; at least 2.
    """

    min_period: int
    max_period: int
    num_repeats: int


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
        min_p: In [0, 1]; 0 means the whole vocabulary.
        typical_p: In (0, 1]; 1 means the whole vocabulary.
        repetition_penalty: 1 is none.
        presence_penalty: 0 is none.
        frequency_penalty: 0 is none.
        bias_ids: Ids whose logits are changed, each once, and
        bias_values: by how much.
        allowed_token_ids: The only ids that may be chosen; none means all.
        bad_words: Lists of ids whose last one is not chosen behind the others.
        num_logprobs: Likeliest tokens to tell with each output token, or `NO_LOGPROBS`.
        num_prompt_logprobs: The same for the prompt's tokens from the second on.
        repetition: When an output that repeats itself ends, or None.
        grammar: The language that the output must belong to, or None.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias_ids: list[int] = []
    bias_values: list[float] = []
    allowed_token_ids: list[int] = []
    bad_words: list[list[int]] = []
    num_logprobs: int = NO_LOGPROBS
    num_prompt_logprobs: int = NO_LOGPROBS
    repetition: RepetitionLimit | None = None
    grammar: Grammar | None = None

    def of_choice(self, index: int) -> ResolvedSampling:
        """Those of another choice of the same prompt, where these are the ones of choice 0.

        The prompt's log-probabilities come with choice 0 alone.
        """
        if index == 0:
            return self
        return msgspec.structs.replace(
            self,
            seed=(self.seed + index) % (MAX_SEED + 1),
            num_prompt_logprobs=NO_LOGPROBS,
        )

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were there before count."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class GenerationDefaults(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What generation_config.json says for absent fields (see `read_generation_defaults`).

    Attributes:
        temperature: 0 where the file does not say `do_sample: true`.
        top_k: 0 where absent.
        top_p: 1 where absent.
        max_tokens: The file's `max_new_tokens`, or None.
        min_p: 0 where absent.
        typical_p: 1 where absent.
        repetition_penalty: 1 where absent.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = None
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
