"""What hostile languages cost: the process that tries them at most, and no more than its limits."""

from __future__ import annotations

import gc
import random
import resource
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from hostile_grammars import HOSTILE_GRAMMARS
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_tokenizer.grammar import GrammarVocabulary
from mini_infer_tokenizer.grammar_checks import GRAMMAR_LIMITS, GrammarChecks

DEMO = bundled_model("demo")
VOCAB_SIZE = 4096
EOS_ID = 0
MAX_CPU_S = 0.1
MAX_WALK_CPU_S = 4.0
"""Of 200 tokens of an engine: 20 ms each."""
MAX_BYTES = 64 * 2**20
TICK_S = 0.02
"""Processor times are counted in hundredths of a second, at both ends."""


def child() -> psutil.Process | None:
    """The process that tries languages."""
    for process in psutil.Process().children():
        try:
            if any("grammar_child" in each for each in process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            pass
    return None


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def cpu_s_of_ended_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def checks() -> Iterator[GrammarChecks]:
    checks = GrammarChecks(DEMO, num_processes=1)
    yield checks
    checks.close()


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(DEMO, VOCAB_SIZE, [EOS_ID])


def check_good_one(checks: GrammarChecks, seen: random.Random) -> None:
    """One that nothing remembers, so that a process is ready behind it."""
    checks.check(Grammar(GrammarKind.REGEX, f"[a-z]+{seen.getrandbits(64)}"))


def is_accepted(checks: GrammarChecks, grammar: Grammar) -> bool:
    try:
        checks.check(grammar)
    except MiniInferError as error:
        refusal = error
    else:
        return True
    assert refusal.reason in (ErrorReason.GRAMMAR_INVALID, ErrorReason.INVALID_FIELD)
    assert len(refusal.message) < 500
    return False


def walk_at_random(vocabulary: GrammarVocabulary, grammar: Grammar) -> None:
    """Takes 200 steps; a matcher that fails by its limits ends them."""
    matcher = vocabulary.compile(grammar)
    choices = random.Random(0)
    row = np.zeros(vocabulary.num_mask_words, np.int32)
    for _ in range(200):
        forced = matcher.forced()
        assert matcher.advance(forced) == len(forced)
        if matcher.is_complete:
            return
        matcher.fill(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        if not allowed.size:
            assert matcher.error is not None
            return
        token_id = int(choices.choice(allowed))
        if token_id == EOS_ID:
            return
        if matcher.advance([token_id]) != 1:
            assert matcher.error is not None
            return


@pytest.mark.parametrize(
    "grammar",
    [
        # Each takes a process of its own, so `make test` tries some of them.
        pytest.param(grammar, id=name, marks=() if index % 6 == 0 else pytest.mark.slow)
        for index, (name, grammar) in enumerate(HOSTILE_GRAMMARS)
    ],
)
def test_a_hostile_language_costs_its_process_at_most(
    checks: GrammarChecks, vocabulary: GrammarVocabulary, grammar: Grammar
) -> None:
    generator = random.Random(repr(grammar.source[:1000]))
    check_good_one(checks, generator)
    process = child()
    assert process is not None
    soft, hard = process.rlimit(resource.RLIMIT_AS)
    assert soft == hard <= process.memory_info().vms + MAX_BYTES
    begins_at, ended_before = cpu_s(process), cpu_s_of_ended_children()
    accepted = is_accepted(checks, grammar)
    if process.is_running():
        assert cpu_s(process) - begins_at <= MAX_CPU_S + TICK_S
    else:
        assert not accepted
        whole_life = cpu_s_of_ended_children() - ended_before
        assert whole_life - begins_at <= MAX_CPU_S + TICK_S
    check_good_one(checks, generator)
    if accepted:
        gc.collect()
        before, began = psutil.Process().memory_info().rss, time.process_time()
        walk_at_random(vocabulary, grammar)
        assert time.process_time() - began < MAX_WALK_CPU_S
        assert psutil.Process().memory_info().rss - before < MAX_BYTES


def test_the_limits_are_those_that_are_promised() -> None:
    assert GRAMMAR_LIMITS.job_cpu_s < MAX_CPU_S
    assert GRAMMAR_LIMITS.memory_bytes <= MAX_BYTES


def test_the_corpus_has_both_kinds(checks: GrammarChecks) -> None:
    """Else the tests above could hold for nothing."""
    outcomes = [is_accepted(checks, grammar) for _, grammar in HOSTILE_GRAMMARS[::4]]
    assert {True, False} == set(outcomes)


def test_an_output_that_fills_the_tables_of_its_matcher_fails_alone(
    vocabulary: GrammarVocabulary,
) -> None:
    grammar = Grammar(GrammarKind.REGEX, "(a|b)*a(a|b){18}c")
    bystander, failing = vocabulary.compile(grammar), vocabulary.compile(grammar)
    generator = random.Random(0)
    letters = [70, 71]
    row = np.ones(vocabulary.num_mask_words, np.int32)
    while failing.error is None:
        failing.advance(generator.choices(letters, k=100))
        failing.fill(row)
    assert not row.any()
    assert not failing.is_complete
    assert not failing.may_end
    assert bystander.advance(letters * 100) == 200
    bystander.fill(row)
    assert bystander.error is None
    assert row.any()
