from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason
from mini_infer.messages import (
    CheckGrammar,
    Decode,
    Decoded,
    EncodeChat,
    Encoded,
    EncodedWords,
    EncodeText,
    EncodeWords,
    GrammarAccepted,
    JobRefused,
    WireChatMessage,
    WireToolCall,
)
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_tokenizer import jobs
from mini_infer_tokenizer.chat import ChatTemplates
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar_checks import GrammarChecks
from mini_infer_tokenizer.jobs import (
    LARGE_JOB_CHARACTERS,
    MAX_LARGE_CHARACTERS,
    MAX_WAITING_LANGUAGES,
    Answer,
    Job,
    JobPool,
    JobWorker,
    Result,
)
from tokenizers import Tokenizer, normalizers

DEMO = bundled_model("demo")
CHAT = EncodeChat(3, [WireChatMessage("user", "Hello.")], True)
LARGE = EncodeText(1, "x" * (LARGE_JOB_CHARACTERS + 1), False)


@pytest.fixture(scope="module")
def templates(demo: TextTokenizer) -> Iterator[ChatTemplates]:
    templates = ChatTemplates(DEMO, demo.special_tokens)
    yield templates
    templates.close()


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarChecks]:
    grammars = GrammarChecks(DEMO, num_processes=1)
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def worker(demo: TextTokenizer, templates: ChatTemplates, grammars: GrammarChecks) -> JobWorker:
    return JobWorker(demo, templates, grammars)


def check_regex(job: int, source: str) -> CheckGrammar:
    return CheckGrammar(job, Grammar(GrammarKind.REGEX, source))


class TestWorker:
    def test_encodes_text(self, worker: JobWorker, demo: TextTokenizer) -> None:
        ids = demo.encode("Once upon a time", add_special_tokens=True)
        assert worker.do(EncodeText(1, "Once upon a time", True)) == Encoded(1, ids)

    def test_a_chat_becomes_a_text_without_a_second_bos(self, worker: JobWorker) -> None:
        text = "<|bos|><|user|>Hello.<|end|><|assistant|>"
        assert worker.do(CHAT) == EncodeText(3, text, add_special_tokens=False)

    def test_decodes(self, worker: JobWorker, demo: TextTokenizer) -> None:
        ids = demo.encode("a fox", add_special_tokens=True)
        assert worker.do(Decode(2, ids, True)) == Decoded(2, "a fox")

    def test_refuses_a_chat_the_template_refuses(self, worker: JobWorker) -> None:
        answer = worker.do(EncodeChat(4, [WireChatMessage("wizard", "Hi")], True))
        assert isinstance(answer, JobRefused)
        assert (answer.job, answer.reason) == (4, ErrorReason.CHAT_TEMPLATE_FAILED)
        assert "got wizard" in answer.message

    def test_encodes_words(self, worker: JobWorker, demo: TextTokenizer) -> None:
        forms = [demo.encode(text, add_special_tokens=False) for text in ("fox", " fox")]
        assert worker.do(EncodeWords(6, ["fox"])) == EncodedWords(6, forms)

    def test_checks_languages(self, worker: JobWorker) -> None:
        assert worker.do(check_regex(7, "[a-z]+")) == GrammarAccepted(7)
        answer = worker.do(check_regex(8, "[a-z"))
        assert isinstance(answer, JobRefused)
        assert (answer.job, answer.reason) == (8, ErrorReason.GRAMMAR_INVALID)
        assert "unclosed character class" in answer.message

    def test_refuses_chats_without_a_template(
        self, demo: TextTokenizer, grammars: GrammarChecks, tmp_path: Path
    ) -> None:
        answer = JobWorker(demo, ChatTemplates(tmp_path, {}), grammars).do(CHAT)
        assert isinstance(answer, JobRefused)
        assert answer.reason is ErrorReason.CHAT_TEMPLATE_FAILED
        assert "no chat template" in answer.message

    def test_refuses_impossible_ids(self, worker: JobWorker) -> None:
        answer = worker.do(Decode(5, [-1], True))
        assert isinstance(answer, JobRefused)
        assert answer.reason is ErrorReason.INVALID_FIELD

    def test_refuses_a_text_that_its_normalizer_makes_huge(
        self, templates: ChatTemplates, grammars: GrammarChecks, tmp_path: Path
    ) -> None:
        library = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
        library.normalizer = normalizers.NFKC()
        library.save(str(tmp_path / "tokenizer.json"))
        worker = JobWorker(TextTokenizer(tmp_path), templates, grammars)
        answer = worker.do(EncodeText(7, "\ufdfa" * 300_000, False))
        assert isinstance(answer, JobRefused)
        assert (answer.job, answer.reason) == (7, ErrorReason.PROMPT_TOO_LARGE)

    def test_a_surprise_fails_the_job_alone(
        self, demo: TextTokenizer, grammars: GrammarChecks
    ) -> None:
        templates = ChatTemplates(DEMO, {})
        templates.close()
        answer = JobWorker(demo, templates, grammars).do(CHAT)
        assert answer == JobRefused(3, ErrorReason.INTERNAL_ERROR, "the tokenizer failed")

    def test_refuses_an_answer_that_would_not_fit_the_link(
        self, worker: JobWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jobs, "MAX_ANSWER_BYTES", 100)
        for job in (
            Decode(6, [2445] * 100, True),
            EncodeText(6, "a fox and " * 50, False),
            EncodeWords(6, [f"fox {number}" for number in range(50)]),
        ):
            answer = worker.do(job)
            assert isinstance(answer, JobRefused)
            assert (answer.job, answer.reason) == (6, ErrorReason.INVALID_FIELD)
        assert isinstance(worker.do(EncodeText(6, "a fox", False)), Encoded)


class TestPool:
    @pytest.fixture
    def gate(self) -> threading.Event:
        return threading.Event()

    @pytest.fixture
    def pool(self, gate: threading.Event) -> Iterator[JobPool]:
        """Its large jobs, long decodes, languages and chats of a sloth wait for the gate."""

        def do(job: Job) -> Result:
            if isinstance(job, EncodeChat):
                if job.messages[0].role == "sloth":
                    gate.wait()
                return EncodeText(job.job, job.messages[0].content or "", False)
            if isinstance(job, Decode | CheckGrammar):
                gate.wait()
            elif isinstance(job, EncodeWords):
                return EncodedWords(job.job, [])
            elif len(job.text) > 100:
                gate.wait()
            return Encoded(job.job, [])

        def recall(job: CheckGrammar) -> Answer | None:
            return GrammarAccepted(job.job) if job.grammar.source == "known" else None

        pool = JobPool(do, recall, num_threads=2, num_chat_threads=2, num_grammar_threads=2)
        yield pool
        gate.set()
        pool.close()

    @staticmethod
    def take(pool: JobPool, count: int) -> list[tuple[bytes, Answer]]:
        answers: list[tuple[bytes, Answer]] = []
        deadline = time.monotonic() + 10
        while len(answers) < count and time.monotonic() < deadline:
            select.select([pool], [], [], 0.5)
            answers += pool.take()
        return answers

    def test_small_jobs_pass_large_ones(self, pool: JobPool, gate: threading.Event) -> None:
        pool.submit(b"a", LARGE)
        pool.submit(b"a", Decode(2, [1] * LARGE_JOB_CHARACTERS, True))
        pool.submit(b"b", EncodeText(3, "hello", False))
        pool.submit(b"c", EncodeChat(4, [WireChatMessage("user", "hello")], True))
        assert self.take(pool, 2) == [(b"b", Encoded(3, [])), (b"c", Encoded(4, []))]
        gate.set()
        assert self.take(pool, 2) == [(b"a", Encoded(1, [])), (b"a", Encoded(2, []))]
        assert pool.take() == []

    def test_slow_templates_delay_only_chats(self, pool: JobPool, gate: threading.Event) -> None:
        slow = [WireChatMessage("sloth", "hello")]
        for number in (1, 2):
            pool.submit(b"a", EncodeChat(number, slow, True))
        pool.submit(b"b", EncodeChat(3, [WireChatMessage("user", "hello")], True))
        pool.submit(b"b", EncodeText(4, "hello", False))
        assert self.take(pool, 1) == [(b"b", Encoded(4, []))]
        gate.set()
        assert {answer.job for _, answer in self.take(pool, 3)} == {1, 2, 3}

    def test_slow_languages_delay_only_languages(
        self, pool: JobPool, gate: threading.Event
    ) -> None:
        for number, source in enumerate(["a", "b" * (LARGE_JOB_CHARACTERS + 1), "c"]):
            pool.submit(b"a", check_regex(number, source))
        pool.submit(b"b", EncodeChat(3, [WireChatMessage("user", "hello")], True))
        pool.submit(b"b", EncodeText(4, "hello", False))
        pool.submit(b"b", EncodeWords(5, ["hello"]))
        pool.submit(b"b", EncodeWords(6, ["hello" * LARGE_JOB_CHARACTERS]))
        assert {answer.job for _, answer in self.take(pool, 4)} == {3, 4, 5, 6}
        gate.set()
        assert {answer.job for _, answer in self.take(pool, 3)} == {0, 1, 2}

    def test_a_language_that_is_known_waits_for_none(
        self, pool: JobPool, gate: threading.Event
    ) -> None:
        for number in range(MAX_WAITING_LANGUAGES + 1):
            pool.submit(b"a", check_regex(number, f"{number}"))
        ((_, refused),) = self.take(pool, 1)
        assert isinstance(refused, JobRefused)
        assert (refused.job, refused.reason) == (MAX_WAITING_LANGUAGES, ErrorReason.QUEUE_FULL)
        pool.submit(b"b", check_regex(100, "known"))
        assert self.take(pool, 1) == [(b"b", GrammarAccepted(100))]
        pool.cancel(b"a", [MAX_WAITING_LANGUAGES - 1])
        pool.submit(b"b", check_regex(101, "new"))
        gate.set()
        answers = self.take(pool, MAX_WAITING_LANGUAGES)
        assert not any(isinstance(answer, JobRefused) for _, answer in answers)

    @pytest.mark.parametrize(
        "job",
        [
            EncodeWords(1, ["x" * (MAX_LARGE_CHARACTERS // 2)] * 2),
            check_regex(1, "x" * MAX_LARGE_CHARACTERS),
        ],
        ids=["words", "language"],
    )
    def test_words_and_languages_count_among_large_jobs(
        self, pool: JobPool, gate: threading.Event, job: Job
    ) -> None:
        pool.submit(b"a", LARGE)
        pool.submit(b"b", job)
        ((gateway, refused),) = self.take(pool, 1)
        assert isinstance(refused, JobRefused)
        assert (gateway, refused.reason) == (b"b", ErrorReason.QUEUE_FULL)
        gate.set()
        self.take(pool, 1)
        pool.submit(b"b", job)
        ((gateway, answer),) = self.take(pool, 1)
        assert not isinstance(answer, JobRefused)

    def test_a_chat_is_encoded_in_the_size_class_of_its_text(
        self, pool: JobPool, gate: threading.Event
    ) -> None:
        short, long = WireChatMessage("user", "hello"), WireChatMessage("user", LARGE.text)
        pool.submit(b"a", EncodeChat(1, [long], True))
        # The chat is large by its tools, its text is not.
        pool.submit(b"a", EncodeChat(2, [short], True, tools=["x" * LARGE_JOB_CHARACTERS]))
        pool.submit(b"a", EncodeChat(3, [short], True))
        answers = {answer.job for _, answer in self.take(pool, 2)}
        gate.set()
        assert answers == {2, 3}
        assert self.take(pool, 1) == [(b"a", Encoded(1, []))]

    def test_a_chat_that_is_cancelled_is_not_encoded(
        self, pool: JobPool, gate: threading.Event
    ) -> None:
        for number in (1, 2):
            pool.submit(b"a", EncodeChat(number, [WireChatMessage("sloth", "hello")], True))
        pool.cancel(b"a", [1])
        gate.set()
        assert self.take(pool, 1) == [(b"a", Encoded(2, []))]
        assert pool.take() == []

    @pytest.mark.parametrize(
        "chat",
        [
            EncodeChat(1, [WireChatMessage("sloth", "x" * MAX_LARGE_CHARACTERS)], True),
            EncodeChat(1, [WireChatMessage("sloth", "")], True, ["x" * MAX_LARGE_CHARACTERS]),
            EncodeChat(1, [WireChatMessage("sloth", "")], True, [], ["x" * MAX_LARGE_CHARACTERS]),
            EncodeChat(
                1,
                [
                    WireChatMessage(
                        "sloth",
                        None,
                        tool_calls=[WireToolCall("f", "x" * (MAX_LARGE_CHARACTERS - 1), True)],
                    )
                ],
                True,
            ),
        ],
        ids=["content", "tools", "documents", "arguments"],
    )
    def test_all_that_a_chat_holds_counts(
        self, pool: JobPool, gate: threading.Event, chat: EncodeChat
    ) -> None:
        pool.submit(b"a", chat)
        pool.submit(b"b", LARGE)
        ((gateway, refused),) = self.take(pool, 1)
        assert isinstance(refused, JobRefused)
        assert (gateway, refused.reason) == (b"b", ErrorReason.QUEUE_FULL)
        gate.set()
        self.take(pool, 1)
        pool.submit(b"b", LARGE)
        assert self.take(pool, 1) == [(b"b", Encoded(1, []))]

    def test_a_short_decode_does_not_wait_for_a_thread(
        self, pool: JobPool, gate: threading.Event
    ) -> None:
        gate.set()
        pool.submit(b"a", Decode(1, [5], True))
        assert pool.take() == [(b"a", Encoded(1, []))]

    def test_jobs_that_nobody_waits_for_are_not_done(
        self, pool: JobPool, gate: threading.Event
    ) -> None:
        for number in (1, 2, 3):
            pool.submit(b"a", EncodeText(number, LARGE.text, False))
        pool.submit(b"b", EncodeText(1, LARGE.text, False))
        pool.submit(b"c", EncodeText(1, LARGE.text, False))
        pool.cancel(b"a", [1, 2, 99])  # The first one runs: its answer is dropped.
        pool.forget(b"b")
        gate.set()
        assert self.take(pool, 2) == [(b"a", Encoded(3, [])), (b"c", Encoded(1, []))]

    def test_large_jobs_that_wait_are_bounded(self, pool: JobPool, gate: threading.Event) -> None:
        half = EncodeText(1, "x" * (MAX_LARGE_CHARACTERS // 2), False)
        pool.submit(b"a", half)
        pool.submit(b"b", half)
        pool.submit(b"c", LARGE)
        ((gateway, refused),) = self.take(pool, 1)
        assert isinstance(refused, JobRefused)
        assert (gateway, refused.reason) == (b"c", ErrorReason.QUEUE_FULL)
        pool.cancel(b"b", [1])
        pool.submit(b"c", LARGE)
        gate.set()
        assert self.take(pool, 2) == [(b"a", Encoded(1, [])), (b"c", Encoded(1, []))]
        pool.submit(b"b", half)
        pool.submit(b"c", half)
        assert len(self.take(pool, 2)) == 2

    def test_waking_makes_it_readable(self, pool: JobPool) -> None:
        assert select.select([pool], [], [], 0)[0] == []
        for _ in range(100_000):
            pool.wake()
        assert select.select([pool], [], [], 0)[0] == [pool]
