"""What the engine loop tells the gateways: step outputs in columns, one message per gateway.

The loop only appends to a queue; `gateway_sessions.py` numbers, encodes and sends in its thread.
"""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

from mini_infer.errors import MiniInferError
from mini_infer.messages import (
    Accepted,
    EngineBeat,
    FinishAccounting,
    Message,
    Refused,
    StepOutput,
)

from mini_infer_engine.scheduler import SequenceUpdate
from mini_infer_engine.sequence import StreamKey


@dataclass(slots=True)
class StreamRow:
    """A stream's part of a step output; the fields are those of `StepOutput`'s columns."""

    start: int
    token_ids: list[int]
    finish_code: int
    stop_token_id: int
    accounting: FinishAccounting | None


@dataclass(slots=True)
class StepRows:
    """The output of a step for one gateway, before it is numbered; later steps can join it."""

    step: int
    rows: dict[int, StreamRow] = field(default_factory=dict)

    def add(self, update: SequenceUpdate) -> None:
        """Adds what a step did for a stream."""
        self._add(
            update.key.stream,
            StreamRow(
                update.start,
                list(update.token_ids),
                update.finish_code,
                update.stop_token_id,
                update.accounting,
            ),
        )

    def merge(self, later: StepRows) -> None:
        """Takes in the output of a later step, so that both leave as one message."""
        self.step = later.step
        for stream, row in later.rows.items():
            self._add(stream, row)

    @property
    def num_bytes(self) -> int:
        """About what it takes as a frame."""
        return sum(40 + 5 * len(row.token_ids) for row in self.rows.values())

    def numbered(self, epoch: int, seq: int) -> StepOutput:
        """The message."""
        rows = list(self.rows.values())
        return StepOutput(
            epoch=epoch,
            seq=seq,
            step=self.step,
            streams=list(self.rows),
            starts=[row.start for row in rows],
            counts=[len(row.token_ids) for row in rows],
            token_ids=[token_id for row in rows for token_id in row.token_ids],
            finish_codes=[int(row.finish_code) for row in rows],
            stop_token_ids=[row.stop_token_id for row in rows],
            finished=[row.accounting for row in rows if row.accounting is not None],
        )

    def _add(self, stream: int, row: StreamRow) -> None:
        earlier = self.rows.setdefault(stream, row)
        if earlier is not row:
            earlier.token_ids += row.token_ids
            earlier.finish_code = row.finish_code
            earlier.stop_token_id = row.stop_token_id
            earlier.accounting = row.accounting


Outgoing = tuple[bytes | None, Message | StepRows]
"""A gateway, or None for all of them, and what to tell it."""


class Outbox:
    """A queue from the engine loop to the socket thread, which it wakes."""

    def __init__(self) -> None:
        """Makes an empty outbox."""
        self._queue: queue.SimpleQueue[Outgoing] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)

    def accept(self, key: StreamKey) -> None:
        """Tells a gateway that its stream waits or runs."""
        self._queue.put((key.owner, Accepted(key.stream)))

    def refuse(self, key: StreamKey, error: MiniInferError) -> None:
        """Tells a gateway that its stream ends with an error."""
        refused = Refused(key.stream, error.reason, error.message, error.metadata)
        self._queue.put((key.owner, refused))

    def announce(self, beat: EngineBeat) -> None:
        """Tells all gateways that the loop turns."""
        self._queue.put((None, beat))
        self._wake()

    def publish(self, step: int, updates: Iterable[SequenceUpdate]) -> None:
        """Tells each gateway what a step did for its streams, and sends all that is queued."""
        outputs: dict[bytes, StepRows] = {}
        for update in updates:
            if update.error:
                self.refuse(update.key, update.error)
            else:
                outputs.setdefault(update.key.owner, StepRows(step)).add(update)
        for owner, rows in outputs.items():
            self._queue.put((owner, rows))
        if not self._queue.empty():
            self._wake()

    # --- the socket thread's side ---------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there is something to send: for the thread's poll."""
        return self._wake_reader.fileno()

    def take(self) -> list[Outgoing]:
        """Takes out all that is queued and resets `fileno`."""
        try:
            self._wake_reader.recv(4096)
        except BlockingIOError:
            pass
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            pass  # so many wake-ups are waiting already that one more changes nothing

    def close(self) -> None:
        """Closes the wake-up pair; nothing is sent after."""
        self._wake_reader.close()
        self._wake_writer.close()
