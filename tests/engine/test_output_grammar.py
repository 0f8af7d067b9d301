"""How a sequence follows the language of its output, without a model."""

from __future__ import annotations

import random
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from engine.sampling_columns import resolved
from engine.scheduling import make, run, scheduler_of
from mini_infer.config import EngineConfig, bundled_model
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import FinishCode
from mini_infer.structured_output import Grammar, StructuredOutput
from mini_infer_engine.grammars import Grammars
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.output_grammar import Forced, OutputGrammar
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.served_model import read_served_model
from mini_infer_engine.token_masks import fill_masks, num_mask_words
from mini_infer_tokenizer.grammar import GrammarVocabulary, Matcher

DEMO = bundled_model("demo")
VOCAB = 4096
LONG = " ".join(f"and then {number} foxes" for number in range(120))
LANGUAGES = {
    "long forced run": StructuredOutput(choice=[f"red {LONG}", f"blue {LONG}!", f"blue {LONG}?"]),
    "runs between choices": StructuredOutput(
        regex=f"(yes|no), {LONG[:900]}: [0-9]{{3}}, {LONG[:1500]}\\."
    ),
}


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(DEMO, VOCAB, (2,))


def compiled(vocabulary: GrammarVocabulary, grammar: Grammar) -> Future[Matcher]:
    future: Future[Matcher] = Future()
    future.set_result(vocabulary.compile(grammar))
    return future


def follow(
    vocabulary: GrammarVocabulary,
    language: StructuredOutput,
    forced: Forced,
    *,
    prefix: list[int] | None = None,
    turning_point: int | None = None,
) -> Sequence:
    """Lets chance, which depends on the position alone, choose from what is allowed."""
    grammar = OutputGrammar(lambda: compiled(vocabulary, language.as_grammar()), forced)
    sequence = Sequence(
        StreamKey(b"", 0),
        [5] * 8,
        resolved(max_tokens=10_000),
        eos_token_ids=(2,),
        output_ids=prefix or [],
        grammar=grammar,
        turning_point=turning_point,
    )
    grammar.compile()
    code = sequence.begin()
    while code is FinishCode.RUNNING:
        (mask,) = fill_masks([sequence], num_mask_words(VOCAB))
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        chance = random.Random(sequence.num_output_tokens)
        code = sequence.advance(0, [int(chance.choice(allowed))])
    assert code in (FinishCode.GRAMMAR, FinishCode.STOP_TOKEN)
    return sequence


def output_of(sequence: Sequence) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :]


@pytest.mark.parametrize("name", LANGUAGES)
def test_forced_tokens_are_the_same_however_they_are_taken(
    vocabulary: GrammarVocabulary, name: str
) -> None:
    language = LANGUAGES[name]
    output = output_of(follow(vocabulary, language, Forced.TAKEN))
    assert len(output) > 512
    assert output_of(follow(vocabulary, language, Forced.ONLY_CHOICE)) == output
    for length in (1, 2, 100, 255, 256, 257, 300, 511, 512, 513, len(output) - 1):
        resumed = follow(vocabulary, language, Forced.TAKEN, prefix=output[:length])
        assert output_of(resumed) == output


def test_forced_tokens_may_turn_a_text_before_its_first_step(
    vocabulary: GrammarVocabulary,
) -> None:
    language = StructuredOutput(choice=[LONG[:60]])
    sequence = follow(vocabulary, language, Forced.TAKEN, turning_point=12)
    assert sequence.num_tokens > 13
    assert sequence.num_turned_together == 13


def test_only_admitted_languages_are_compiled_and_ended_ones_are_not() -> None:
    config = EngineConfig()
    served = read_served_model(config, read_model_config(config.model_folder), "float32")
    submitted: list[Future[Matcher]] = []

    class Counting(Grammars):
        def output_grammar(self, sampling: object) -> OutputGrammar:
            def begin() -> Future[Matcher]:
                submitted.append(Future())
                return submitted[-1]

            return OutputGrammar(begin)

    object.__setattr__(served, "grammars", Counting(DEMO, VOCAB, (2,)))
    sampling = resolved(grammar=StructuredOutput(regex="a+").as_grammar())
    scheduler = scheduler_of(64, max_num_seqs=1, max_queued=1)
    for stream in range(5):
        key = StreamKey(b"gateway", stream)
        with suppress(MiniInferError):
            scheduler.add(*served.sequences([key], [1], sampling), now=0.0)
    admitted = scheduler.keys_of(b"gateway")
    assert 0 < len(admitted) == len(submitted) < 5
    for key in admitted:
        assert scheduler.abort(key, 0.0)
    assert all(each.cancelled() for each in submitted)
    assert scheduler.is_idle


def test_whatever_breaks_compiling_fails_that_sequence_alone(tmp_path: Path) -> None:
    """Such as a model folder that has gone."""
    grammar = Grammars(tmp_path / "gone", VOCAB, (2,)).output_grammar(
        resolved(grammar=StructuredOutput(regex="a+").as_grammar())
    )
    assert grammar is not None
    scheduler = scheduler_of(16)
    good, bad = make(0, 4, 3, ignore_eos=True), make(1, 4, 3, ignore_eos=True)
    bad.grammar = grammar
    scheduler.add(good, now=0.0)
    scheduler.add(bad, now=0.0)
    failures = []
    while not scheduler.is_idle:
        batch = scheduler.schedule(0.0)
        failures += scheduler.finish_step(batch, run(batch), 0.0).failures
    ((key, error),) = failures
    assert key == bad.key
    assert error.reason is ErrorReason.INTERNAL_ERROR
    assert good.num_output_tokens == 3
