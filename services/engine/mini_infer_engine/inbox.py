"""What gateways want of the engine loop, in the order in which it came."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass

from mini_infer.messages import Submit


@dataclass(frozen=True, slots=True)
class AddStream:
    """A gateway submits a stream. `received` is the monotonic time at which it came."""

    owner: bytes
    submit: Submit
    received: float


@dataclass(frozen=True, slots=True)
class AbortStreams:
    """A gateway ends some of its streams; `answer` asks for a last row that says so."""

    owner: bytes
    streams: list[int]
    answer: bool


@dataclass(frozen=True, slots=True)
class KeepOnly:
    """A gateway holds just these streams; the others are freed."""

    owner: bytes
    streams: frozenset[int]


@dataclass(frozen=True, slots=True)
class SocketFailed:
    """The socket thread broke: without it the engine serves nobody."""

    error: Exception


Command = AddStream | AbortStreams | KeepOnly | SocketFailed


class Inbox:
    """A queue from the socket thread to the engine loop."""

    def __init__(self) -> None:
        """Makes an empty inbox."""
        self._queue: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        """Adds a command; any thread."""
        self._queue.put(command)

    def wake(self) -> None:
        """Ends a `drain` that waits; any thread, also from a signal handler."""
        self._queue.put(None)

    def drain(self, wait_s: float) -> Iterator[Command]:
        """Takes out what is there.

        Args:
            wait_s: How long to wait for a first command where there is none; 0 does not wait.
        """
        try:
            command = self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
            while True:
                if command is not None:
                    yield command
                command = self._queue.get_nowait()
        except queue.Empty:
            return
