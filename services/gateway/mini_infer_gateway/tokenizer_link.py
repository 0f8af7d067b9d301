"""The link to one tokenizer process: jobs that have one answer, and ids into text.

The tokenizer holds nothing that the gateway could not give it again: jobs are kept until they are
answered, ids until their text is released. So when the tokenizer is lost (it died, it forgot this
gateway, or it fell silent) and comes back within `PATIENCE_S`, jobs and streams go on as if
nothing had happened; otherwise they end with TOKENIZER_LOST.

A Hello is a fence: whatever arrives between Hello and Welcome was sent before the tokenizer
learnt of it, and is dropped; on the Welcome everything is given again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import structlog
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import (
    GATEWAY_BEAT_INTERVAL_S,
    PROTOCOL_VERSION,
    CancelJobs,
    CheckGrammar,
    CloseText,
    Decode,
    Decoded,
    EncodeChat,
    Encoded,
    EncodedWords,
    EncodeText,
    EncodeWords,
    FromTokenizer,
    GatewayBeat,
    GrammarAccepted,
    HelloNeeded,
    HelloRefused,
    JobRefused,
    OpenText,
    TextDeltas,
    TextStep,
    TokenizerWelcome,
    UnknownStreams,
)
from mini_infer.structured_output import Grammar

from mini_infer_gateway.peer_socket import PeerSocket
from mini_infer_gateway.request import ChatPrompt, TextOptions, TextPrompt
from mini_infer_gateway.stream import Stream

_log = structlog.get_logger()

Job = EncodeText | EncodeChat | Decode | EncodeWords | CheckGrammar
JobAnswer = Encoded | Decoded | EncodedWords | GrammarAccepted
_Answer = TypeVar("_Answer", Encoded, Decoded, EncodedWords, GrammarAccepted)

TOKENIZER_LEASE_S = 5.0
"""A tokenizer that has said nothing, not even to the ping, for so long is lost."""
PATIENCE_S = 10.0
"""How long jobs and streams wait for a lost tokenizer."""
PING = Decode(job=0, token_ids=[], skip_special_tokens=True)
"""A job whose answer is only a sign of life."""


class TokenizerLink:
    """One tokenizer process as the gateway sees it. Owns its unanswered jobs and text streams.

    Attributes:
        welcome: What the tokenizer serves; None while it is not ready.
        readiness_changed: Set at each change of `welcome`; whoever waits for it clears it.
    """

    def __init__(self, socket: PeerSocket[FromTokenizer], readiness_changed: asyncio.Event) -> None:
        """Takes a socket that is not started.

        Args:
            socket: To the tokenizer process.
            readiness_changed: Set when the tokenizer becomes ready or is lost.
        """
        self.welcome: TokenizerWelcome | None = None
        self.readiness_changed = readiness_changed
        self._socket = socket
        self._jobs: dict[int, tuple[Job, asyncio.Future[JobAnswer]]] = {}
        self._job_numbers = itertools.count(PING.job + 1)
        self._texts: dict[int, tuple[Stream, TextOptions]] = {}
        # Stream number -> output position of the first id that waits for `_flush`.
        self._unsent: dict[int, int] = {}
        self._beat_at = 0.0
        self._lost_at = float("-inf")

    def start(self) -> None:
        """Begins to receive on the running loop."""
        self._socket.start(self._receive)

    def close(self) -> None:
        """Disconnects."""
        self._socket.close()

    @property
    def num_streams(self) -> int:
        """Streams whose ids become text here."""
        return len(self._texts)

    @property
    def dropped(self) -> Counter[str]:
        """What the tokenizer sent and was not used, by cause."""
        return self._socket.dropped

    async def encode(self, prompt: TextPrompt | ChatPrompt) -> list[int]:
        """The ids of a prompt.

        Raises:
            MiniInferError: As the tokenizer refused it, or TOKENIZER_LOST.
        """
        return (await self._run(prompt.as_job, Encoded)).token_ids

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of all of some ids.

        Raises:
            MiniInferError: As the tokenizer refused it, or TOKENIZER_LOST.
        """
        return (
            await self._run(lambda job: Decode(job, token_ids, skip_special_tokens), Decoded)
        ).text

    async def encode_words(self, words: list[str]) -> list[list[int]]:
        """The lists of ids that stand for some words, each of at least one id.

        Raises:
            MiniInferError: As the tokenizer refused it, or TOKENIZER_LOST.
        """
        return (await self._run(lambda job: EncodeWords(job, words), EncodedWords)).sequences

    async def check_grammar(self, grammar: Grammar) -> None:
        """Returns where a language can be used.

        Raises:
            MiniInferError: GRAMMAR_INVALID and others, as the tokenizer refused it, or
                TOKENIZER_LOST.
        """
        await self._run(lambda job: CheckGrammar(job, grammar), GrammarAccepted)

    async def _run(self, as_job: Callable[[int], Job], kind: type[_Answer]) -> _Answer:
        """The answer to a job, which is of one kind."""
        number = next(self._job_numbers)
        job = as_job(number)
        answer: asyncio.Future[JobAnswer] = asyncio.get_running_loop().create_future()
        self._jobs[number] = (job, answer)
        try:
            self._send(job)
            answered = await answer
        finally:
            if self._jobs.pop(number, None) is not None and self.welcome is not None:
                # Nobody waits any more. Where the pipe does not take it, the job is done in vain.
                self._socket.send(CancelJobs([number]))
        if not isinstance(answered, kind):
            raise TypeError(f"expected {kind.__name__}, got {type(answered).__name__}")
        return answered

    def open(self, stream: Stream, options: TextOptions) -> None:
        """Begins to turn the stream's ids into text."""
        self._texts[stream.number] = (stream, options)
        self._open(stream, options)

    def feed(self, stream: Stream, start: int) -> None:
        """Tells of new ids from this output position on, or of the end.

        What comes in one turn of the loop leaves as one message.
        """
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.setdefault(stream.number, start)

    def forget(self, stream: Stream) -> None:
        """Frees what the tokenizer holds of the stream.

        A message that the pipe does not take is made good by the next beat, which does not name
        the stream any more.
        """
        if self._texts.pop(stream.number, None) is not None and self.welcome is not None:
            self._socket.send(CloseText([stream.number]))

    def tick(self, now: float) -> None:
        """Says Hello or gives the beat when it is time, and watches over lease and patience.

        Args:
            now: The loop's time, in seconds.
        """
        self._socket.receive_waiting()
        if self.welcome is None:
            if now - self._socket.hello_at > GATEWAY_BEAT_INTERVAL_S:
                self._socket.say_hello()
            if now - self._lost_at > PATIENCE_S:
                self._give_up()
        elif now - self._socket.heard_at > TOKENIZER_LEASE_S:
            self._lose(f"no sign of life for {now - self._socket.heard_at:.1f} s")
        elif now - self._beat_at >= GATEWAY_BEAT_INTERVAL_S:
            self._beat_at = now
            self._send(GatewayBeat(list(self._texts)))
            self._send(PING)

    def _send(self, message: Job | OpenText | TextStep | GatewayBeat) -> None:
        """Sends what the tokenizer must not miss; it is given again if it could not be sent."""
        if self.welcome is not None and not self._socket.send(message):
            self._lose("it is not connected, or far behind")

    def _open(self, stream: Stream, options: TextOptions) -> None:
        """Opens the stream behind the ids whose text is released, and feeds it the others."""
        num_released = stream.num_released
        self._send(
            OpenText(
                stream=stream.number,
                stop=list(options.stop),
                skip_special_tokens=options.skip_special_tokens,
                include_stop_str_in_output=options.include_stop_str_in_output,
                min_tokens=options.min_tokens,
                output_ids=stream.output_ids[:num_released],
                ids_only=options.ids_only,
            )
        )
        if num_released < len(stream.output_ids) or stream.finish is not None:
            self.feed(stream, num_released)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, {}
        step = TextStep([], [], [], [], [])
        for number, start in unsent.items():
            if number not in self._texts:
                continue
            stream, _ = self._texts[number]
            step.streams.append(number)
            step.starts.append(start)
            step.counts.append(len(stream.output_ids) - start)
            step.token_ids.extend(stream.output_ids[start:])
            step.last.append(stream.finish is not None)
        if step.streams:
            self._send(step)

    def _receive(self, message: FromTokenizer) -> None:
        match message:
            case TokenizerWelcome():
                self._on_welcome(message)
            case HelloRefused(cause):
                self._socket.complain(cause)
            case _ if self.welcome is None:
                self.dropped["before_welcome"] += 1
            case HelloNeeded():
                self._lose("it does not know this gateway")
            case Encoded() | Decoded() | EncodedWords() | GrammarAccepted() | JobRefused():
                self._on_answer(message)
            case TextDeltas():
                self._on_deltas(message)
            case UnknownStreams(numbers):
                self._on_unknown_streams(numbers)

    def _on_welcome(self, welcome: TokenizerWelcome) -> None:
        if welcome.protocol_version != PROTOCOL_VERSION:
            self._socket.complain(
                f"it speaks protocol version {welcome.protocol_version}, this gateway speaks "
                f"{PROTOCOL_VERSION}: run the same version of both"
            )
            return
        if self.welcome == welcome:
            return
        self.welcome = welcome
        self._beat_at = 0.0
        self.readiness_changed.set()
        _log.info("tokenizer connected", tokenizer=welcome.tokenizer_id)
        for job, _ in list(self._jobs.values()):
            self._send(job)
        self._unsent.clear()
        for stream, options in list(self._texts.values()):
            self._open(stream, options)

    def _on_answer(self, message: JobAnswer | JobRefused) -> None:
        if message.job == PING.job:
            return
        _, answer = self._jobs.pop(message.job, (None, None))
        if answer is None or answer.done():
            self.dropped["unknown_job"] += 1
        elif isinstance(message, JobRefused):
            answer.set_exception(MiniInferError(message.reason, message.message))
        else:
            answer.set_result(message)

    def _on_deltas(self, deltas: TextDeltas) -> None:
        if not _is_consistent(deltas):
            self.dropped["inconsistent_deltas"] += 1
            self._lose("its columns do not agree")
            return
        for number, consumed, released, text, stop_index in zip(
            deltas.streams,
            deltas.ids_consumed,
            deltas.ids_released,
            deltas.texts,
            deltas.stop_indices,
            strict=True,
        ):
            stream, options = self._texts.get(number, (None, None))
            if stream is None or options is None:
                self.dropped["unknown_stream"] += 1
            elif not (
                stream.num_released + released <= consumed <= len(stream.output_ids)
                and stop_index < len(options.stop)
            ):
                self.dropped["inconsistent_row"] += 1
                stream.fail(_tokenizer_lost("the tokenizer lost track of the stream"))
            else:
                stream.release(released, text, stop_index)

    def _on_unknown_streams(self, numbers: list[int]) -> None:
        if self._texts.keys().isdisjoint(numbers):
            self.dropped["unknown_stream"] += len(numbers)
        else:
            self._lose("it does not know the streams of this gateway")

    def _lose(self, cause: str) -> None:
        """Ends the acquaintance with the tokenizer and begins the next one."""
        _log.warning("tokenizer lost", address=self._socket.address, cause=cause)
        self.welcome = None
        self._lost_at = asyncio.get_running_loop().time()
        self.readiness_changed.set()
        self._socket.say_hello()

    def _give_up(self) -> None:
        """Fails everything that waits for the tokenizer to come back."""
        for _, answer in self._jobs.values():
            if not answer.done():
                answer.set_exception(_tokenizer_lost("the tokenizer is not connected"))
        for stream, _ in list(self._texts.values()):
            stream.fail(_tokenizer_lost("the tokenizer was lost"))


def _tokenizer_lost(cause: str) -> MiniInferError:
    return MiniInferError(ErrorReason.TOKENIZER_LOST, f"{cause}; send the request again")


def _is_consistent(deltas: TextDeltas) -> bool:
    """Whether the columns agree with each other."""
    columns = (deltas.ids_consumed, deltas.ids_released, deltas.texts, deltas.stop_indices)
    return (
        all(len(column) == len(deltas.streams) for column in columns)
        and min(deltas.ids_released, default=0) >= 0
    )
