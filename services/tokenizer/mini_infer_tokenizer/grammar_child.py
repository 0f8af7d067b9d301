"""`python -m mini_infer_tokenizer.grammar_child`: tries languages until its socket closes.

A language is compiled and walked for a few steps as the engine will walk it. One that takes too
much time or memory ends this process (`child_main.py`), and no engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer.structured_output import Grammar, GrammarKind
from numpy.typing import NDArray

from mini_infer_tokenizer.child_main import ChildWork, run
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar import GrammarVocabulary
from mini_infer_tokenizer.grammar_protocol import GRAMMARS, GrammarSetup

_NUM_STEPS = 64
"""That follow the first mask: enough to meet what a mask costs within a repetition."""


def main() -> None:
    """Takes the socket as standard input."""
    run(
        ChildWork(
            kind=GRAMMARS,
            setup_type=GrammarSetup,
            job_type=Grammar,
            prepare=_prepare,
            start=_start,
        )
    )


def try_out(vocabulary: GrammarVocabulary, grammar: Grammar) -> None:
    """Compiles a language, and takes a few steps at random.

    Raises:
        MiniInferError: GRAMMAR_INVALID where the language cannot be used.
    """
    matcher = vocabulary.compile(grammar)
    choices = random.Random(0)
    row = np.zeros(vocabulary.num_mask_words, np.int32)
    for step in range(1 + _NUM_STEPS):
        matcher.advance(matcher.forced())
        if matcher.is_complete:
            return
        matcher.fill(row)
        allowed = _allowed(row, vocabulary.vocab_size)
        if matcher.error is not None and (step == 0 or vocabulary.can_spell_all):
            raise GRAMMARS.failed(matcher.error)
        if not allowed.size:
            if step == 0:
                raise GRAMMARS.failed("no text belongs to it but the empty one")
            return
        matcher.advance([int(choices.choice(allowed))])


def _allowed(row: NDArray[np.int32], vocab_size: int) -> NDArray[np.intp]:
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:vocab_size])


def _prepare(setup: GrammarSetup) -> GrammarVocabulary:
    try:
        tokenizer = TextTokenizer(Path(setup.model_folder))
    except ModelFolderError as error:
        message = f"the tokenizer cannot be loaded to check structured output: {error}"
        raise MiniInferError(ErrorReason.INTERNAL_ERROR, message) from error
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocab_size, ())
    try_out(vocabulary, Grammar(GrammarKind.CHOICE, '["a"]'))  # Loads what is loaded late.
    return vocabulary


def _start(vocabulary: GrammarVocabulary) -> Callable[[Grammar], str]:
    def check(grammar: Grammar) -> str:
        try_out(vocabulary, grammar)
        return ""

    return check


if __name__ == "__main__":
    main()
