"""Languages of outputs, compiled on a thread beside the loop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

import structlog
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.logprobs import NO_LOGPROBS
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer.structured_output import Grammar
from mini_infer_tokenizer.grammar import GrammarVocabulary, Matcher

from mini_infer_engine.output_grammar import Forced, OutputGrammar

log = structlog.get_logger("engine")


class Grammars:
    """Compiles languages that were checked before (`mini_infer_tokenizer.grammar_checks`).

    Each sequence has a matcher of its own: compiling takes about a millisecond, and what a language
    makes of one output is then no other's concern.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """Reads nothing before the first language is asked for.

        Args:
            folder: Has the tokenizer's files.
            vocab_size: Number of ids of the model.
            eos_token_ids: Ids that end an output.
        """
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._thread = ThreadPoolExecutor(1, "grammars")

    def output_grammar(self, sampling: ResolvedSampling) -> OutputGrammar | None:
        """A sequence's place at the beginning of its language; None where it has none.

        Where the request has conditions of its own on ids, its text is forced, but not its tokens.
        Where it wants to know what the model thought of them, they are chosen one by one.
        """
        if sampling.grammar is None:
            return None
        has_conditions = (
            sampling.allowed_token_ids
            or sampling.bad_words
            or sampling.bias_ids
            or (sampling.min_tokens and sampling.stop_token_ids)
        )
        forced = Forced.TAKEN
        if has_conditions:
            forced = Forced.CHOSEN_FREELY
        elif sampling.num_logprobs != NO_LOGPROBS:
            forced = Forced.ONLY_CHOICE
        compile_it = partial(self._thread.submit, self._compile, sampling.grammar)
        return OutputGrammar(compile_it, forced)

    def close(self) -> None:
        """Compiles nothing any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Matcher:
        try:
            return self._vocabulary.compile(grammar)
        except MiniInferError:
            raise
        except BaseException as error:  # A panic of the library is no Exception.
            log.error("a language cannot be compiled", error=repr(error))
            message = "structured output: the language cannot be compiled"
            raise MiniInferError(ErrorReason.INTERNAL_ERROR, message) from error

    @cached_property
    def _vocabulary(self) -> GrammarVocabulary:
        return GrammarVocabulary(self._folder, self._vocab_size, self._eos_token_ids)
