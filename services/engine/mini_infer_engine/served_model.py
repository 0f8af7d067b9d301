"""What an engine tells the world about its model, and the checks that follow from it. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from mini_infer.config import DUMMY, EngineConfig
from mini_infer.errors import ConfigError, ErrorReason, MiniInferError
from mini_infer.messages import PROTOCOL_VERSION, EngineWelcome
from mini_infer.model_folder import tokenizer_hash
from mini_infer.resolved_sampling import GenerationDefaults, ResolvedSampling
from mini_infer.sampling_params import MAX_BAD_WORDS, MAX_CHOICES, as_params
from mini_infer.scheduling_params import MAX_PRIORITY

from mini_infer_engine.batch import TokenMasks
from mini_infer_engine.generation_config import read_generation_defaults
from mini_infer_engine.grammars import Grammars
from mini_infer_engine.model_config import ModelConfig, model_fingerprint
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.token_masks import fill_masks, mask_of, num_mask_words

MAX_BAD_WORD_LISTS = 3 * MAX_BAD_WORDS
"""A word is at most so many lists of ids (`mini_infer_tokenizer.bad_words`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model as clients know it.

    Attributes:
        name: What clients may give.
        config: What config.json says.
        defaults: What absent sampling fields mean.
        max_model_len: Tokens of prompt and output together.
        dtype: Of the weights as they run, such as "float32".
        fingerprint: Engines with equal ones serve the same model.
        tokenizer_hash: SHA-256 of the tokenizer's files.
        grammars: Languages of structured outputs.
    """

    name: str
    config: ModelConfig
    defaults: GenerationDefaults
    max_model_len: int
    dtype: str
    fingerprint: str
    tokenizer_hash: str
    grammars: Grammars

    def sequences(
        self,
        keys: Seq[StreamKey],
        prompt_ids: Seq[int],
        sampling: ResolvedSampling,
        *,
        output_ids: Seq[int] = (),
        deadline: float | None = None,
        priority: int = 0,
        cache_scope: tuple[str, ...] = (),
    ) -> list[Sequence]:
        """Makes the sequences of a request, checked once more: the sender may be wrong.

        Args:
            keys: One a sequence; the first is the parent of the others.
            prompt_ids: Of all of them.
            sampling: Of the first; the seed of each later one is greater by one.
            output_ids: Output that exists already; of a single sequence.
            deadline: Monotonic time at which they end, or None.
            priority: Their class.
            cache_scope: What must be equal, beside the text, where prefixes are shared.

        Raises:
            MiniInferError: INVALID_FIELD or CONTEXT_LENGTH_EXCEEDED.
        """
        problem = self._problem(prompt_ids, output_ids, sampling)
        if len(keys) > MAX_CHOICES or (len(keys) > 1 and output_ids):
            problem = f"expected at most {MAX_CHOICES} sequences, or one that is resumed"
        if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            problem = f"expected a priority from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        if problem:
            raise MiniInferError(ErrorReason.INVALID_FIELD, problem)
        if len(prompt_ids) + sampling.max_tokens > self.max_model_len:
            raise MiniInferError(
                ErrorReason.CONTEXT_LENGTH_EXCEEDED,
                f"the context holds {self.max_model_len} tokens, got {len(prompt_ids)} prompt "
                f"tokens and {sampling.max_tokens} max_tokens",
            )
        if len(prompt_ids) > self.config.max_plain_prompt:
            cache_scope = (*cache_scope, str(len(prompt_ids)))
        allowed_mask = None
        if sampling.allowed_token_ids:
            allowed_mask = mask_of(
                sampling.allowed_token_ids, num_mask_words(self.config.vocab_size)
            )
        made: list[Sequence] = []
        for index, key in enumerate(keys):
            sequence = Sequence(
                key,
                prompt_ids,
                sampling.of_choice(index),
                eos_token_ids=self.config.eos_token_ids,
                output_ids=output_ids,
                deadline=deadline,
                priority=priority,
                turning_point=self.config.turning_point,
                cache_scope=cache_scope,
                parent=made[0] if made else None,
                grammar=self.grammars.output_grammar(sampling),
                allowed_mask=allowed_mask,
            )
            made.append(sequence)
        return made

    def fill_masks(self, sequences: Seq[Sequence]) -> TokenMasks:
        """The masks of sequences that choose from a set of ids, in their order."""
        return fill_masks(sequences, num_mask_words(self.config.vocab_size))

    def _problem(
        self, prompt_ids: Seq[int], output_ids: Seq[int], sampling: ResolvedSampling
    ) -> str | None:
        if not prompt_ids:
            return "expected at least one prompt token, got none"
        vocab_size = self.config.vocab_size
        for ids in (prompt_ids, output_ids, *sampling.bad_words):
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                return f"expected token ids from 0 to {vocab_size - 1}"
        if len(sampling.bias_ids) != len(sampling.bias_values) or _has_repeats(sampling.bias_ids):
            return "expected one bias for each biased id, and each id once"
        if not all(sampling.bad_words) or len(sampling.bad_words) > MAX_BAD_WORD_LISTS:
            return f"expected at most {MAX_BAD_WORD_LISTS} lists of bad words, none empty"
        if len(output_ids) >= sampling.max_tokens:
            return f"expected fewer resumed tokens than max_tokens, got {len(output_ids)}"
        violations = as_params(sampling).violations(vocab_size)
        return f"{violations[0].field}: {violations[0].description}" if violations else None

    def welcome(
        self, *, engine_id: str, epoch: int, num_blocks: int, block_size: int
    ) -> EngineWelcome:
        """The answer to a gateway's Hello."""
        return EngineWelcome(
            protocol_version=PROTOCOL_VERSION,
            engine_id=engine_id,
            epoch=epoch,
            model=self.name,
            architecture=self.config.architecture,
            dtype=self.dtype,
            fingerprint=self.fingerprint,
            tokenizer_hash=self.tokenizer_hash,
            vocab_size=self.config.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=list(self.config.eos_token_ids),
            defaults=self.defaults,
            num_blocks=num_blocks,
            block_size=block_size,
        )


def _has_repeats(values: Seq[int]) -> bool:
    return len(set(values)) < len(values)


def read_served_model(config: EngineConfig, model_config: ModelConfig, dtype: str) -> ServedModel:
    """Reads everything but the weights.

    Args:
        config: Names the model folder and the limits.
        model_config: What the folder's config.json says.
        dtype: What the weights will run as.

    Raises:
        ConfigError: Where the folder is not usable or `max_model_len` is beyond the model.
    """
    folder = config.model_folder
    longest = model_config.max_context
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len must be at most {longest}, for which {config.model_name} was made, "
            f"got {config.max_model_len}"
        )
    return ServedModel(
        name=config.model_name,
        config=model_config,
        defaults=read_generation_defaults(folder),
        max_model_len=config.max_model_len or longest,
        dtype=dtype,
        fingerprint=model_fingerprint(folder, has_weights=config.load_format != DUMMY),
        tokenizer_hash=tokenizer_hash(folder),
        grammars=Grammars(folder, model_config.vocab_size, model_config.eos_token_ids),
    )
