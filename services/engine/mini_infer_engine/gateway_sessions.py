"""The engine's socket thread: who is connected, and every frame in and out.

The engine loop never waits for a socket. A gateway that does not read is given merged step
outputs up to a bound and is then treated as dead, and so is one whose beats stop: its streams are
freed, and it must say Hello again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import structlog
import zmq
from mini_infer.channel import bind_router
from mini_infer.messages import (
    GATEWAY_LEASE_S,
    PROTOCOL_VERSION,
    Abort,
    EngineBeat,
    EngineWelcome,
    GatewayBeat,
    Hello,
    HelloNeeded,
    HelloRefused,
    Message,
    PromptLogprobs,
    Submit,
    ToEngine,
    encode,
    to_engine_decoder,
)

from mini_infer_engine.inbox import AbortStreams, AddStream, Inbox, KeepOnly, SocketFailed
from mini_infer_engine.outbox import Outbox, StepRows

MAX_PENDING_BYTES = 4 * 2**20
"""What waits for one gateway at most."""
_POLL_MS = 250
_RETRY_POLL_MS = 5
_MAX_FRAMES_PER_TURN = 256

log = structlog.get_logger("engine.gateways")


@dataclass(slots=True)
class _Session:
    """A gateway that said Hello."""

    last_heard: float
    next_seq: int = 0
    beat: EngineBeat | None = None  # the latest; an older one says nothing any more
    pending: deque[Message | StepRows] = field(default_factory=deque)

    def add(self, message: Message | StepRows) -> None:
        last = self.pending[-1] if self.pending else None
        if isinstance(message, EngineBeat):
            self.beat = message
        elif isinstance(last, StepRows) and isinstance(message, StepRows):
            last.merge(message)
        else:
            self.pending.append(message)

    def next_message(self, epoch: int) -> Message | None:
        """What is to be sent next, a beat before all else; None where nothing waits."""
        if self.beat or not self.pending:
            return self.beat
        message = self.pending[0]
        return message.numbered(epoch, self.next_seq) if isinstance(message, StepRows) else message

    def drop_next_message(self) -> None:
        """The next message was sent."""
        if self.beat:
            self.beat = None
        elif isinstance(self.pending.popleft(), StepRows):
            self.next_seq += 1

    @property
    def num_pending_bytes(self) -> int:
        return sum(map(_num_bytes, self.pending))


def _num_bytes(message: Message | StepRows) -> int:
    """About what a message takes as a frame."""
    if isinstance(message, StepRows):
        return message.num_bytes
    return 100 + (message.logprobs.num_bytes if isinstance(message, PromptLogprobs) else 0)


class GatewaySessions:
    """Runs the ROUTER socket in a thread of its own, between `start` and `stop`."""

    def __init__(self, address: str, welcome: EngineWelcome, inbox: Inbox, outbox: Outbox) -> None:
        """Binds the socket.

        Args:
            address: Where to listen, `ipc://`.
            welcome: The answer to a Hello.
            inbox: Where commands go.
            outbox: Where messages come from.

        Raises:
            ConfigError: Where the address cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = bind_router(self._context, address)
        self._welcome = welcome
        self._inbox = inbox
        self._outbox = outbox
        self._sessions: dict[bytes, _Session] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway-sessions", daemon=True)
        self.num_dropped_frames = 0

    def start(self) -> None:
        """Begins to receive and send."""
        self._thread.start()

    def stop(self) -> None:
        """Sends what is queued, then closes the socket."""
        self._stopping.set()
        self._thread.join()
        self._context.destroy(linger=200)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            self._inbox.put(SocketFailed(error))

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        while not self._stopping.is_set():
            waiting = any(session.pending for session in self._sessions.values())
            poller.poll(_RETRY_POLL_MS if waiting else _POLL_MS)
            self._receive()
            self._send()
            self._expire()
        self._send()

    # --- in -------------------------------------------------------------------------------------

    def _receive(self) -> None:
        for _ in range(_MAX_FRAMES_PER_TURN):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                (frame,) = frames
                message = to_engine_decoder.decode(frame)
            except (ValueError, msgspec.DecodeError) as error:
                self.num_dropped_frames += 1
                log.warning("frame dropped", gateway=repr(identity), error=str(error))
                continue
            self._handle(identity, message)

    def _handle(self, identity: bytes, message: ToEngine) -> None:
        now = time.monotonic()
        session = self._sessions.get(identity)
        if isinstance(message, Hello):
            self._greet(identity, message, now)
        elif session is None:
            self._try_send(identity, HelloNeeded())
        else:
            session.last_heard = now
            self._pass_on(identity, message, now)

    def _pass_on(self, identity: bytes, message: ToEngine, now: float) -> None:
        match message:
            case Submit():
                self._inbox.put(AddStream(identity, message, now))
            case Abort(streams=streams, answer=answer):
                self._inbox.put(AbortStreams(identity, streams, answer))
            case GatewayBeat(live_streams=live_streams):
                self._inbox.put(KeepOnly(identity, frozenset(live_streams)))

    def _greet(self, identity: bytes, hello: Hello, now: float) -> None:
        self._forget(identity, "said Hello again")
        if hello.protocol_version != PROTOCOL_VERSION:
            message = (
                f"the engine speaks version {PROTOCOL_VERSION} of the protocol, the gateway "
                f"{hello.protocol_version}: run the same release of both"
            )
            self._try_send(identity, HelloRefused(message))
        elif self._try_send(identity, self._welcome):
            self._sessions[identity] = _Session(last_heard=now)
            log.info("gateway connected", gateway=hello.gateway_id)

    def _expire(self) -> None:
        now = time.monotonic()
        for identity, session in list(self._sessions.items()):
            if now - session.last_heard > GATEWAY_LEASE_S:
                self._forget(identity, "its beats stopped")
            elif session.num_pending_bytes > MAX_PENDING_BYTES:
                self._forget(identity, "it does not read")

    def _forget(self, identity: bytes, why: str) -> None:
        if self._sessions.pop(identity, None):
            log.info("gateway gone", gateway=repr(identity), why=why)
            self._inbox.put(KeepOnly(identity, frozenset()))

    # --- out ------------------------------------------------------------------------------------

    def _send(self) -> None:
        for owner, message in self._outbox.take():
            for identity in self._sessions if owner is None else [owner]:
                if identity in self._sessions:
                    self._sessions[identity].add(message)
        for identity, session in list(self._sessions.items()):
            self._flush(identity, session)

    def _flush(self, identity: bytes, session: _Session) -> None:
        while message := session.next_message(self._welcome.epoch):
            try:
                self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                self._forget(identity, error.strerror)
                return
            session.drop_next_message()

    def _try_send(self, identity: bytes, message: Message) -> bool:
        try:
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.info("answer not sent", gateway=repr(identity), error=error.strerror)
            return False
        return True
