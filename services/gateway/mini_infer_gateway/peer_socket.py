"""The gateway's end of one ZeroMQ link: typed messages out and in, on the asyncio loop.

`EngineLink` and `TokenizerLink` give the messages their meaning; here they are only sent,
received and decoded, and the time of the last one is kept. The raw socket is watched by the loop
itself: zmq.asyncio would cost two futures a message.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec
import structlog
import zmq
from mini_infer.channel import connect_dealer
from mini_infer.messages import PROTOCOL_VERSION, Hello, Message, encode

_log = structlog.get_logger()
_M = TypeVar("_M")

MAX_FRAMES_PER_TURN = 64
"""Frames handled before other tasks of the loop get their turn."""
RECONNECT_AFTER_S = 3.0
"""A connection over which Hellos stay unanswered for so long is replaced: ZeroMQ gives up some
connections for good, such as one that carried a frame beyond the limit."""


class PeerSocket(Generic[_M]):
    """A DEALER to one peer. It never blocks, and reconnects as long as Hellos are said.

    Attributes:
        address: Where the peer listens.
        dropped: What was received and not used, by cause.
        heard_at: Time of the last message, on the loop's clock.
        hello_at: Time of the last Hello that was sent, on the loop's clock.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        gateway_id: str,
        decoder: msgspec.msgpack.Decoder[_M],
    ) -> None:
        """Connects in the background.

        Args:
            context: The process's context.
            address: Where the peer listens.
            gateway_id: Name and incarnation of this gateway, the socket's identity.
            decoder: Of the peer's messages.
        """
        self.address = address
        self.dropped: Counter[str] = Counter()
        self.heard_at = float("-inf")
        self.hello_at = float("-inf")
        self._context = context
        self._gateway_id = gateway_id
        self._complaint = ""
        self._decoder = decoder
        self._socket = connect_dealer(context, address, gateway_id)
        # Since when Hellos are unanswered; not after `heard_at` when they are answered.
        self._asked_at = float("-inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[_M], None] | None = None
        self._looks_again = False

    def start(self, on_message: Callable[[_M], None]) -> None:
        """Begins to receive on the running loop."""
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._watch(self._loop)

    def send(self, message: Message) -> bool:
        """Sends without waiting.

        Returns:
            Whether the peer's pipe took it: not while the peer is away or far behind.
        """
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self._look_again()
        return True

    def say_hello(self) -> None:
        """Introduces this gateway, if the peer is there."""
        now = asyncio.get_running_loop().time()
        if self._asked_at <= self.heard_at:
            self._asked_at = now
        elif now - self._asked_at > RECONNECT_AFTER_S:
            self._reconnect()
            self._asked_at = now
        if self.send(Hello(PROTOCOL_VERSION, self._gateway_id)):
            self.hello_at = now

    def complain(self, cause: str) -> None:
        """Logs what keeps the peer from being used, once for each cause."""
        if cause != self._complaint:
            self._complaint = cause
            _log.error("peer not usable", address=self.address, cause=cause)

    def receive_waiting(self) -> None:
        """Handles the messages that have arrived."""
        self._looks_again = False
        for _ in range(MAX_FRAMES_PER_TURN):
            if self._on_message is None:
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(frame, self._on_message)
        self._look_again()

    def close(self) -> None:
        """Disconnects."""
        self._on_message = None
        self._disconnect()
        _log.info("disconnected", address=self.address, dropped=dict(self.dropped))

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_reader(int(self._socket.getsockopt(zmq.FD)), self.receive_waiting)

    def _disconnect(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(int(self._socket.getsockopt(zmq.FD)))
        self._socket.close()

    def _reconnect(self) -> None:
        """Begins anew with a fresh socket, which takes the old one's identity over."""
        self._disconnect()
        self._socket = connect_dealer(self._context, self.address, self._gateway_id)
        if self._loop is not None:
            self._watch(self._loop)

    def _handle(self, frame: bytes, on_message: Callable[[_M], None]) -> None:
        """Passes a frame on; one that cannot be handled takes no other with it."""
        try:
            message = self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.dropped["undecodable_frame"] += 1
            return
        self.heard_at = asyncio.get_running_loop().time()
        try:
            on_message(message)
        except Exception:
            self.dropped["failed_message"] += 1
            _log.exception("message failed", address=self.address)

    def _look_again(self) -> None:
        """Arranges a look at the socket where its descriptor will not wake the loop.

        The descriptor of a ZeroMQ socket is edge-triggered: sending can consume the edge of a
        message that has arrived.
        """
        if self._looks_again or self._loop is None:
            return
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._looks_again = True
            self._loop.call_soon(self.receive_waiting)
