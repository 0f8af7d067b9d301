"""The tokenizer process: one loop owns the socket, threads encode, streams detokenize in the loop.

A step's ids are answered within the loop, since a columnar batch of 256 takes less than a
millisecond; prompts go to the threads of `jobs.py` and come back through its wake-up.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog
import zmq
from mini_infer.channel import bind_router
from mini_infer.config import TokenizerConfig
from mini_infer.messages import (
    GATEWAY_LEASE_S,
    PROTOCOL_VERSION,
    CancelJobs,
    CheckGrammar,
    CloseText,
    Decode,
    EncodeChat,
    EncodeText,
    EncodeWords,
    GatewayBeat,
    Hello,
    HelloNeeded,
    HelloRefused,
    Message,
    OpenText,
    TextStep,
    TokenizerWelcome,
    ToTokenizer,
    UnknownStreams,
    encode,
    to_tokenizer_decoder,
)

from mini_infer_tokenizer.chat import ChatTemplates
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.grammar_checks import NUM_GRAMMAR_PROCESSES, GrammarChecks
from mini_infer_tokenizer.jobs import JobPool, JobWorker
from mini_infer_tokenizer.text_session import TextSession

_POLL_MS = 250
_MAX_FRAMES_PER_TURN = 256

_log = structlog.get_logger()


def run(config: TokenizerConfig, address: str, on_ready: Callable[[], None] | None = None) -> None:
    """Serves gateways until SIGTERM or SIGINT; call it from the main thread.

    Args:
        config: The tokenizer to serve.
        address: Where to listen for gateways, `ipc://`.
        on_ready: Called once gateways are answered.

    Raises:
        ConfigError: Where the model folder or the address cannot be used.
    """
    tokenizer = TextTokenizer(config.model_folder)
    chat_templates = ChatTemplates(
        config.model_folder, tokenizer.special_tokens, config.num_template_processes
    )
    detokenizer = Detokenizer(tokenizer)
    welcome = TokenizerWelcome(
        protocol_version=PROTOCOL_VERSION,
        tokenizer_id=f"tokenizer-{os.getpid()}-{time.time_ns()}",
        tokenizer_hash=tokenizer.tokenizer_hash,
        vocab_size=tokenizer.vocab_size,
        has_chat_template=bool(chat_templates.names),
    )
    grammars = GrammarChecks(config.model_folder)
    worker = JobWorker(tokenizer, chat_templates, grammars)
    jobs = JobPool(
        worker.do,
        worker.recall,
        config.num_encode_threads,
        num_chat_threads=config.num_template_processes,
        num_grammar_threads=NUM_GRAMMAR_PROCESSES,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        chat_templates.start()
        server = TokenizerServer(bind_router(context, address), welcome, detokenizer, jobs)
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, lambda *_: server.stop())
        _log.info("ready", address=address, vocab_size=tokenizer.vocab_size)
        if on_ready is not None:
            on_ready()
        server.serve()
        _log.info("stopped", dropped_frames=server.num_dropped_frames)
    finally:
        context.destroy(linger=0)
        jobs.close()
        chat_templates.close()
        grammars.close()


@dataclass(slots=True)
class _Gateway:
    """A gateway that said Hello."""

    texts: TextSession
    heard_at: float  # Monotonic, seconds.


class TokenizerServer:
    """Owns the socket and the gateways that are connected to it.

    Attributes:
        num_dropped_frames: Frames that were no message, or one that could not be handled.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        welcome: TokenizerWelcome,
        detokenizer: Detokenizer,
        jobs: JobPool,
    ) -> None:
        """Takes its collaborators; whoever made them closes them.

        Args:
            socket: A ROUTER that is bound.
            welcome: The answer to a Hello.
            detokenizer: Opens text streams.
            jobs: Where prompts are encoded.
        """
        self._socket = socket
        self._welcome = welcome
        self._detokenizer = detokenizer
        self._jobs = jobs
        self._gateways: dict[bytes, _Gateway] = {}
        self._is_stopping = False
        self.num_dropped_frames = 0

    def serve(self) -> None:
        """Answers gateways until `stop`."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._jobs, zmq.POLLIN)
        while not self._is_stopping:
            poller.poll(_POLL_MS)
            self._receive()
            for identity, answer in self._jobs.take():
                self._send(identity, answer)
            self._expire()

    def stop(self) -> None:
        """Ends `serve`; safe to call from a thread or a signal handler."""
        self._is_stopping = True
        self._jobs.wake()

    def _receive(self) -> None:
        for _ in range(_MAX_FRAMES_PER_TURN):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                (frame,) = frames
                self._handle(identity, to_tokenizer_decoder.decode(frame))
            except (ValueError, msgspec.DecodeError) as error:
                self._count_dropped(identity, error)
            except Exception as error:
                _log.error("message failed", error=type(error).__name__)
                self._count_dropped(identity, error)

    def _handle(self, identity: bytes, message: ToTokenizer) -> None:
        gateway = self._gateways.get(identity)
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif gateway is None:
            self._send(identity, HelloNeeded())
        else:
            gateway.heard_at = time.monotonic()
            self._obey(identity, gateway.texts, message)

    def _obey(self, identity: bytes, texts: TextSession, message: ToTokenizer) -> None:
        match message:
            case TextStep():
                deltas, unknown = texts.step(message)
                self._send(identity, deltas)
                if unknown:
                    self._send(identity, UnknownStreams(unknown))
            case OpenText():
                texts.open(message)
            case CloseText(streams=streams):
                texts.close(streams)
            case EncodeText() | EncodeChat() | Decode() | EncodeWords() | CheckGrammar():
                self._jobs.submit(identity, message)
            case CancelJobs(jobs=numbers):
                self._jobs.cancel(identity, numbers)
            case GatewayBeat(live_streams=streams):
                texts.keep_only(streams)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        self._forget(identity, "said Hello again")
        if hello.protocol_version != PROTOCOL_VERSION:
            cause = (
                f"the tokenizer speaks version {PROTOCOL_VERSION} of the protocol, the gateway "
                f"{hello.protocol_version}: run the same release of both"
            )
            self._send(identity, HelloRefused(cause))
            return
        self._gateways[identity] = _Gateway(TextSession(self._detokenizer), time.monotonic())
        _log.info("gateway connected", gateway=repr(identity))
        self._send(identity, self._welcome)

    def _expire(self) -> None:
        oldest = time.monotonic() - GATEWAY_LEASE_S
        for identity, gateway in list(self._gateways.items()):
            if gateway.heard_at < oldest:
                self._forget(identity, "its beats stopped")

    def _forget(self, identity: bytes, cause: str) -> None:
        gateway = self._gateways.pop(identity, None)
        if gateway is not None:
            self._jobs.forget(identity)
            _log.info("gateway gone", gateway=repr(identity), cause=cause, texts=len(gateway.texts))

    def _send(self, identity: bytes, message: Message) -> None:
        """Sends without waiting; a gateway that is gone or does not read must say Hello again."""
        try:
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._forget(identity, error.strerror)

    def _count_dropped(self, identity: bytes, error: Exception) -> None:
        self.num_dropped_frames += 1
        # A line at 1, 2, 4, 8, ... frames, so that a flood of them does not flood the log.
        if self.num_dropped_frames & (self.num_dropped_frames - 1) == 0:
            _log.warning(
                "frame dropped",
                gateway=repr(identity),
                error=type(error).__name__,
                dropped_frames=self.num_dropped_frames,
            )
