"""Encode and decode jobs on threads, in two size classes, chats, and languages to check.

The tokenizers library releases the interpreter lock while it encodes, so a prompt of a megabyte
(about half a second) neither stops the loop that detokenizes nor, having a thread of its own,
delays a short prompt. A chat becomes a text first, and its template may take as long, so chats
that wait for theirs have threads of their own as well, and so have languages. How much work waits
is bounded, and what nobody waits for is not done.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import structlog
from mini_infer.errors import ErrorReason, MiniInferError
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
    encode,
)

from mini_infer_tokenizer.bad_words import bad_word_sequences
from mini_infer_tokenizer.chat import ChatTemplates
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar_checks import GrammarChecks

Job = EncodeText | EncodeChat | Decode | EncodeWords | CheckGrammar
Answer = Encoded | Decoded | EncodedWords | GrammarAccepted | JobRefused
Result = Answer | EncodeText
"""What a thread makes of a job: for a chat, the job of encoding its text."""

LARGE_JOB_CHARACTERS = 16 * 1024
"""A job above it takes milliseconds, and waits only for others of its kind."""
MAX_LARGE_CHARACTERS = 16 * 2**20
"""Of the large jobs that wait or run, together: about ten seconds of work."""
MAX_WAITING_LANGUAGES = 64
"""That wait to be checked: a few seconds of work."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Of an answer's frame, far below what the sockets take: a larger one would end the link."""
MAX_IDS_AT_ONCE = 256
"""Decoding so few takes microseconds; gateways ask for it to see that the loop turns."""
_CHARACTERS_PER_ID = 4

_log = structlog.get_logger()


class JobWorker:
    """Does one job at a time; safe to use from several threads."""

    def __init__(
        self, tokenizer: TextTokenizer, chat_templates: ChatTemplates, grammars: GrammarChecks
    ) -> None:
        """Takes what jobs need."""
        self._tokenizer = tokenizer
        self._chat_templates = chat_templates
        self._grammars = grammars

    def do(self, job: Job) -> Result:
        """Does a job; whatever goes wrong is the answer, and ends this job alone."""
        try:
            if isinstance(job, EncodeChat):
                return EncodeText(job.job, self._chat_templates.render(job), False)
            answer = self._answer(job)
            num_bytes = len(encode(answer))
            if num_bytes > MAX_ANSWER_BYTES:
                raise MiniInferError(
                    ErrorReason.INVALID_FIELD,
                    f"expected an input whose answer has at most {MAX_ANSWER_BYTES} bytes, got "
                    f"{num_bytes}: send less of it at once",
                )
            return answer
        except MiniInferError as error:
            return JobRefused(job.job, error.reason, error.message)
        except Exception as error:
            # The traceback's last line may quote the prompt, so only the type is logged.
            _log.error("job failed", job=type(job).__name__, error=type(error).__name__)
            return JobRefused(job.job, ErrorReason.INTERNAL_ERROR, "the tokenizer failed")

    def recall(self, job: CheckGrammar) -> GrammarAccepted | JobRefused | None:
        """What was found of a language lately; None where it has to be checked."""
        try:
            return GrammarAccepted(job.job) if self._grammars.recall(job.grammar) else None
        except MiniInferError as error:
            return JobRefused(job.job, error.reason, error.message)

    def _answer(self, job: EncodeText | Decode | EncodeWords | CheckGrammar) -> Answer:
        match job:
            case EncodeText():
                ids = self._tokenizer.encode(job.text, job.add_special_tokens)
                return Encoded(job.job, ids)
            case Decode():
                text = self._tokenizer.decode(job.token_ids, job.skip_special_tokens)
                return Decoded(job.job, text)
            case EncodeWords():
                return EncodedWords(job.job, bad_word_sequences(self._tokenizer, job.words))
            case CheckGrammar():
                self._grammars.check(job.grammar)
                return GrammarAccepted(job.job)


@dataclass(slots=True, eq=False)
class _Ticket:
    """A job until it is answered or cancelled; from then on `job` is None."""

    gateway: bytes
    number: int
    job: Job | None
    num_large_characters: int = 0
    is_language: bool = False


class JobPool:
    """Threads that do jobs, and the answers that wait to be sent.

    `fileno` makes it pollable: it is readable while there may be answers to `take`. Only one
    thread may call the other methods; the pool's own threads read tickets and put answers.
    """

    def __init__(
        self,
        do: Callable[[Job], Result],
        recall: Callable[[CheckGrammar], Answer | None],
        num_threads: int,
        num_chat_threads: int,
        num_grammar_threads: int,
    ) -> None:
        """Starts no thread before the first job.

        Args:
            do: Does a job; called on the threads.
            recall: Knows the answer about a language, or None; called at once.
            num_threads: One of them is for large jobs; small ones have at least one as well.
            num_chat_threads: Of small chats, beside those; large ones are large jobs.
            num_grammar_threads: Of languages of any size, beside those.
        """
        self._do = do
        self._recall = recall
        self._small = ThreadPoolExecutor(max(1, num_threads - 1), "small-jobs")
        self._large = ThreadPoolExecutor(1, "large-jobs")
        self._chats = ThreadPoolExecutor(num_chat_threads, "chats")
        self._grammars = ThreadPoolExecutor(num_grammar_threads, "grammars")
        self._tickets: defaultdict[bytes, dict[int, _Ticket]] = defaultdict(dict)
        self._num_large_characters = 0
        self._num_languages = 0
        self._results: SimpleQueue[tuple[_Ticket, Result]] = SimpleQueue()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def submit(self, gateway: bytes, job: Job) -> None:
        """Queues a job of a gateway, or refuses it; what takes no time is done at once."""
        ticket = self._tickets[gateway][job.job] = _Ticket(gateway, job.job, job)
        if isinstance(job, CheckGrammar):
            if (answer := self._recall(job)) is not None:
                self._put(ticket, answer)
                return
            if self._num_languages == MAX_WAITING_LANGUAGES:
                self._put(ticket, _queue_full(job))
                return
            ticket.is_language = True
            self._num_languages += 1
        self._queue(ticket, job)

    def _queue(self, ticket: _Ticket, job: Job) -> None:
        num_characters = _num_characters(job)
        if isinstance(job, Decode) and len(job.token_ids) <= MAX_IDS_AT_ONCE:
            self._run(ticket)
        elif num_characters <= LARGE_JOB_CHARACTERS:
            self._threads(job, is_large=False).submit(self._run, ticket)
        elif self._num_large_characters + num_characters > MAX_LARGE_CHARACTERS:
            self._put(ticket, _queue_full(job))
        else:
            ticket.num_large_characters = num_characters
            self._num_large_characters += num_characters
            self._threads(job, is_large=True).submit(self._run, ticket)

    def _threads(self, job: Job, *, is_large: bool) -> ThreadPoolExecutor:
        if isinstance(job, CheckGrammar):
            return self._grammars
        if is_large:
            return self._large
        return self._chats if isinstance(job, EncodeChat) else self._small

    def cancel(self, gateway: bytes, numbers: Iterable[int]) -> None:
        """Drops jobs of a gateway; those that run go on, and their answers are dropped."""
        for number in numbers:
            ticket = self._tickets[gateway].get(number)
            if ticket is not None:
                self._close(ticket)

    def forget(self, gateway: bytes) -> None:
        """Drops all jobs of a gateway."""
        self.cancel(gateway, list(self._tickets[gateway]))
        del self._tickets[gateway]

    def take(self) -> list[tuple[bytes, Answer]]:
        """The answers since the last call, each with its gateway."""
        try:
            self._woken.recv(4096)
        except BlockingIOError:
            pass
        answers: list[tuple[bytes, Answer]] = []
        while True:
            try:
                ticket, result = self._results.get_nowait()
            except Empty:
                return answers
            if ticket.job is None:
                continue
            if isinstance(result, EncodeText):
                self._go_on(ticket, result)
            else:
                self._close(ticket)
                answers.append((ticket.gateway, result))

    def wake(self) -> None:
        """Makes the pool readable; safe to call from a thread or a signal handler."""
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # Either so full that whoever polls is awake already, or closed.

    def fileno(self) -> int:
        """The file descriptor to poll."""
        return self._woken.fileno()

    def close(self) -> None:
        """Drops the jobs that have not begun and waits for those that run."""
        for pool in (self._small, self._large, self._chats, self._grammars):
            pool.shutdown(cancel_futures=True)
        self._woken.close()
        self._waker.close()

    def _run(self, ticket: _Ticket) -> None:
        job = ticket.job
        if job is not None:
            self._put(ticket, self._do(job))

    def _put(self, ticket: _Ticket, result: Result) -> None:
        self._results.put((ticket, result))
        self.wake()

    def _go_on(self, ticket: _Ticket, job: Job) -> None:
        """Gives a ticket its next job, in the size class of that one."""
        self._num_large_characters -= ticket.num_large_characters
        ticket.num_large_characters = 0
        ticket.job = job
        self._queue(ticket, job)

    def _close(self, ticket: _Ticket) -> None:
        """Ends a ticket, and gives the memory of its job back."""
        ticket.job = None
        self._num_large_characters -= ticket.num_large_characters
        self._num_languages -= ticket.is_language
        self._tickets[ticket.gateway].pop(ticket.number, None)


def _queue_full(job: Job) -> JobRefused:
    return JobRefused(
        job.job,
        ErrorReason.QUEUE_FULL,
        "too many long inputs or languages wait for the tokenizer: try again later",
    )


def _num_characters(job: Job) -> int:
    match job:
        case EncodeText():
            return len(job.text)
        case EncodeChat():
            values = (*job.tools, *job.documents, job.template_kwargs)
            return sum(map(len, values)) + sum(map(_message_characters, job.messages))
        case Decode():
            return len(job.token_ids) * _CHARACTERS_PER_ID
        case EncodeWords():
            return sum(map(len, job.words))
        case CheckGrammar():
            return len(job.grammar.source)


def _message_characters(message: WireChatMessage) -> int:
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return calls + len(message.content or "") + len(message.reasoning_content or "")
