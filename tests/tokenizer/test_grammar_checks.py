"""The processes that try languages: when they start, what they may, and what is left of them."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_tokenizer import child_process, grammar_checks
from mini_infer_tokenizer.grammar_checks import GRAMMAR_LIMITS, GrammarChecks

DEMO = bundled_model("demo")
BOMB = "a?" * 5_000 + "a" * 5_000


def children() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        try:
            if any("grammar_child" in each for each in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


def refusal(checks: GrammarChecks, grammar: Grammar) -> MiniInferError:
    with pytest.raises(MiniInferError) as caught:
        checks.check(grammar)
    return caught.value


@pytest.fixture
def checks() -> Iterator[GrammarChecks]:
    assert children() == []
    checks = GrammarChecks(DEMO)
    yield checks
    checks.close()
    assert children() == []


def test_a_start_that_breaks_off_costs_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cause: the next one is told as well, and does not wait for a process."""

    def broken() -> dict[str, str]:
        raise ModuleNotFoundError("pydantic")

    checks = GrammarChecks(DEMO, num_processes=1)
    with monkeypatch.context() as patch:
        patch.setattr(child_process, "_environment", broken)
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError):
                checks.check(regex("a"))
    checks.check(regex("a"))
    checks.close()


def test_no_process_starts_before_the_first_language(checks: GrammarChecks) -> None:
    assert children() == []
    checks.check(regex("a+"))
    assert len(children()) == 1


def test_one_process_tries_one_language_after_the_other(checks: GrammarChecks) -> None:
    checks.check(regex("a"))
    before = children()
    for number in range(20):
        checks.check(regex(f"a{{{number + 1}}}"))
        assert refusal(checks, regex("(" * (number + 1))).reason is ErrorReason.GRAMMAR_INVALID
    assert children() == before


def test_what_was_accepted_is_remembered(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.check(regex("a"))
    (process,) = children()
    process.suspend()  # Whoever asks it now has to wait, and to take another one then.
    checks.check(regex("a"))
    process.resume()
    assert refusal(checks, Grammar(GrammarKind.GRAMMAR, "a")).reason is ErrorReason.GRAMMAR_INVALID
    monkeypatch.setattr(grammar_checks, "_MAX_VERDICTS", 2)
    for source in ("b", "c", "d"):
        checks.check(regex(source))
    process.kill()
    process.wait()
    checks.check(regex("c"))
    checks.check(regex("d"))
    assert children() == []
    checks.check(regex("a"))  # Forgotten, so it needs a process.
    assert len(children()) == 1


def test_what_takes_too_much_costs_its_process_and_says_what_to_do(checks: GrammarChecks) -> None:
    checks.check(regex("a"))
    (before,) = children()
    error = refusal(checks, regex(BOMB))
    assert error.reason is ErrorReason.GRAMMAR_INVALID
    assert "time that it may take: describe a smaller language" in error.message
    assert not before.is_running()
    checks.check(regex("b"))


def test_honest_languages_pass_beside_bombs(checks: GrammarChecks) -> None:
    with ThreadPoolExecutor(4) as threads:
        bombs = [threads.submit(refusal, checks, regex(f"{BOMB}{n}")) for n in range(6)]
        honest = [threads.submit(checks.check, regex(f"a{n}")) for n in range(30)]
        assert [each.result() for each in honest] == [None] * 30
        assert {each.result().reason for each in bombs} == {ErrorReason.GRAMMAR_INVALID}
    assert len(children()) <= 2


def test_a_language_survives_that_its_process_is_killed(checks: GrammarChecks) -> None:
    checks.check(regex("a"))
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        for process in children():
            process.send_signal(signal_number)
        checks.check(regex(f"a{signal_number}"))


def test_what_a_process_may_not(checks: GrammarChecks) -> None:
    checks.check(regex("a"))
    (process,) = children()
    variables = {"PYTHONPATH", "TOKENIZERS_PARALLELISM", "TZ", "LC_CTYPE"}
    assert process.environ().keys() <= variables
    assert process.cwd() == "/"
    assert process.num_fds() == 3
    for limit, value in (
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        assert process.rlimit(limit) == (value, value)
    soft, hard = process.rlimit(resource.RLIMIT_AS)
    assert soft == hard <= process.memory_info().vms + GRAMMAR_LIMITS.memory_bytes


@pytest.mark.parametrize("kind", ["ctc", "end_of_word"])
def test_a_tokenizer_that_cannot_be_matched_is_found_out_once(
    model_folders: dict[str, Path], kind: str
) -> None:
    checks = GrammarChecks(model_folders[kind])
    for _ in range(2):
        error = refusal(checks, regex("a"))
        assert error.reason is ErrorReason.FIELD_NOT_SUPPORTED
        assert "not supported with the decoder" in error.message
        assert children() == []
    checks.close()


def test_a_folder_that_cannot_be_read_is_an_error_until_it_can(tmp_path: Path) -> None:
    checks = GrammarChecks(tmp_path / "model")
    error = refusal(checks, regex("a"))
    assert error.reason is ErrorReason.INTERNAL_ERROR
    assert "tokenizer cannot be loaded" in error.message
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    checks.check(regex("a"))
    checks.close()


def test_a_relative_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parent)
    checks = GrammarChecks(Path(DEMO.name))
    checks.check(regex("a"))
    checks.close()


def test_every_kind_of_language_is_tried_with_every_kind_of_tokenizer(
    model_folders: dict[str, Path],
) -> None:
    """The process may load nothing late, whatever the tokenizer."""
    grammars = [
        regex("[a-z]{3} fox"),
        Grammar(GrammarKind.CHOICE, '["the fox", "the river"]'),
        Grammar(GrammarKind.GRAMMAR, 'start: "the" (" " /fox|river/)+'),
    ]
    schemas = [
        Grammar(GrammarKind.JSON_OBJECT, ""),
        Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object", "properties": {"a": {"const": 1}}}'),
    ]
    for kind in ("llama_3", "qwen_2", "phi_3", "gemma", "unigram_fallback", "precompiled"):
        checks = GrammarChecks(model_folders[kind], num_processes=1)
        for grammar in grammars + (schemas if kind != "precompiled" else []):
            checks.check(grammar)
        assert len(children()) == 1
        checks.close()


def test_a_vocabulary_that_cannot_write_the_language_refuses_it(
    model_folders: dict[str, Path],
) -> None:
    checks = GrammarChecks(model_folders["word_level"], num_processes=1)
    error = refusal(checks, Grammar(GrammarKind.JSON_OBJECT, ""))
    assert error.reason is ErrorReason.GRAMMAR_INVALID
    assert "no token of the model continues" in error.message
    checks.close()


def test_limits_are_what_they_are_set_to() -> None:
    tight = msgspec.structs.replace(GRAMMAR_LIMITS, memory_bytes=2**20)
    checks = GrammarChecks(DEMO, 1, tight)
    words = "|".join(f"{random.Random(n).getrandbits(64):x}" for n in range(2_000))
    assert "memory" in refusal(checks, regex(words)).message
    checks.close()
    checks = GrammarChecks(DEMO, 1)
    checks.check(regex(words))
    checks.close()
