"""What the engine loop tells the gateways: step outputs in columns, one message per gateway.

The loop only appends to a queue; `gateway_sessions.py` numbers, encodes and sends in its thread.
"""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mini_infer.errors import MiniInferError
from mini_infer.logprobs import LogprobColumns, joined
from mini_infer.messages import (
    NO_STOP_TOKEN,
    Accepted,
    EngineBeat,
    FinishCode,
    Message,
    PromptLogprobs,
    Refused,
    StepOutput,
)

from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.step_updates import SequenceEnd, StepUpdates


@dataclass(slots=True)
class StepRows:
    """The output of steps for one gateway, before it is numbered.

    Attributes:
        step: The last step.
        parts: What each of them did.
    """

    step: int
    parts: list[StepUpdates]

    def merge(self, later: StepRows) -> None:
        """Takes in the output of later steps, so that all leave as one message."""
        self.step = later.step
        self.parts += later.parts

    @property
    def num_bytes(self) -> int:
        """About what it takes as a frame."""
        return sum(
            40 * len(part.keys)
            + 5 * sum(map(len, part.token_ids))
            + sum(each.num_bytes for each in part.logprobs.values())
            for part in self.parts
        )

    def numbered(self, epoch: int, seq: int) -> StepOutput:
        """The message, in which each stream has one row."""
        rows = self.parts[0] if len(self.parts) == 1 else _merged(self.parts)
        finish_codes = [int(FinishCode.RUNNING)] * len(rows.keys)
        stop_token_ids = [NO_STOP_TOKEN] * len(rows.keys)
        for index, end in rows.ends.items():
            finish_codes[index] = int(end.code)
            stop_token_ids[index] = end.stop_token_id
        return StepOutput(
            epoch=epoch,
            seq=seq,
            step=self.step,
            streams=[key.stream for key in rows.keys],
            starts=rows.starts,
            counts=list(map(len, rows.token_ids)),
            token_ids=list(chain.from_iterable(rows.token_ids)),
            finish_codes=finish_codes,
            stop_token_ids=stop_token_ids,
            finished=[end.accounting for _, end in sorted(rows.ends.items())],
            **_logprobs(rows),
        )


def _logprobs(rows: StepUpdates) -> dict[str, list[Any]]:
    """The columns of log-probabilities; most steps have none."""
    if not rows.logprobs:
        return {}
    with_logprobs = [row for row, key in enumerate(rows.keys) if key in rows.logprobs]
    return {
        "logprob_rows": with_logprobs,
        "logprobs": [rows.logprobs[rows.keys[row]] for row in with_logprobs],
    }


def _merged(parts: Iterable[StepUpdates]) -> StepUpdates:
    """One row for each sequence: the tokens of all of its rows, and the end of the last."""
    starts: dict[StreamKey, int] = {}
    token_ids: dict[StreamKey, list[int]] = {}
    ends: dict[StreamKey, SequenceEnd] = {}
    logprobs: dict[StreamKey, list[LogprobColumns]] = {}
    for part in parts:
        for key, columns in part.logprobs.items():
            logprobs.setdefault(key, []).append(columns)
        for key, start, ids, end in part.rows():
            starts.setdefault(key, start)
            token_ids.setdefault(key, []).extend(ids)
            if end is not None:
                ends[key] = end
    merged = StepUpdates()
    for key, start in starts.items():
        merged.add(key, start, token_ids[key], ends.get(key))
    merged.logprobs = {key: joined(columns) for key, columns in logprobs.items()}
    return merged


def _by_owner(updates: StepUpdates) -> dict[bytes, StepUpdates]:
    """The rows of each gateway."""
    owners = {key.owner for key in updates.keys}
    if len(owners) == 1:
        return {owners.pop(): updates}
    divided = {owner: StepUpdates() for owner in owners}
    for key, start, token_ids, end in updates.rows():
        divided[key.owner].add(key, start, token_ids, end)
    for owner, rows in divided.items():
        rows.logprobs = {key: each for key, each in updates.logprobs.items() if key.owner == owner}
    return divided


Outgoing = tuple[bytes | None, Message | StepRows]
"""A gateway, or None for all of them, and what to tell it."""


class Outbox:
    """A queue from the engine loop to the socket thread, which it wakes."""

    def __init__(self, epoch: int) -> None:
        """Makes an empty outbox of an engine of this epoch."""
        self._epoch = epoch
        self._queue: queue.SimpleQueue[Outgoing] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)

    def accept(self, key: StreamKey) -> None:
        """Tells a gateway that its stream waits or runs."""
        self._queue.put((key.owner, Accepted(key.stream)))

    def refuse(self, key: StreamKey, error: MiniInferError) -> None:
        """Tells a gateway that its stream ends with an error."""
        refused = Refused(
            key.stream, error.reason, error.message, error.metadata, error.retry_after_s
        )
        self._queue.put((key.owner, refused))

    def announce(self, beat: EngineBeat) -> None:
        """Tells all gateways that the loop turns."""
        self._queue.put((None, beat))
        self._wake()

    def publish(self, step: int, updates: StepUpdates) -> None:
        """Tells each gateway what a step did for its streams, and sends all that is queued."""
        for key, error in updates.failures:
            self.refuse(key, error)
        for key, start, columns in updates.prompt_logprobs:
            scores = PromptLogprobs(self._epoch, key.stream, start, columns)
            self._queue.put((key.owner, scores))
        for owner, rows in _by_owner(updates).items():
            self._queue.put((owner, StepRows(step, [rows])))
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
