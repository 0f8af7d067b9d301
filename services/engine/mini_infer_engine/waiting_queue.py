"""The order in which waiting sequences are admitted: by class, and classes improve with age.

Owns the order and nothing else: the scheduler decides how many of the first ones run, and the
sequences' blocks are elsewhere. It reads no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from mini_infer_engine.alarms import Alarms


class Waiting(Protocol):
    """What the queue reads of a sequence's times."""

    @property
    def waiting_since(self) -> float:
        """Monotonic seconds: when it came, or lost its blocks."""


class Schedulable(Protocol):
    """What the queue needs of a sequence. Nothing but `rank` changes while it waits.

    Attributes:
        rank: Class at which it stands: lower goes first. At first the one that it came with; only
            the queue changes it.
    """

    rank: int

    @property
    def deadline(self) -> float | None:
        """Monotonic seconds at which it ends, or None."""

    @property
    def times(self) -> Waiting:
        """Since when it waits."""

    @property
    def arrival_number(self) -> int:
        """Larger than those of all that came before it; it names the sequence."""

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that it is expected to compute when it joins."""

    @property
    def was_running(self) -> bool:
        """Whether it ran before and lost its blocks."""


SequenceT = TypeVar("SequenceT", bound=Schedulable)


class SchedulingKey(NamedTuple):
    """Sorts sequences: the smallest is admitted first and preempted last."""

    rank: int
    is_new: bool
    deadline: float
    arrival_number: int


def scheduling_key(sequence: Schedulable) -> SchedulingKey:
    """The place of a sequence in the order: class, resumed ones, earliest deadline, arrival."""
    deadline = math.inf if sequence.deadline is None else sequence.deadline
    return SchedulingKey(sequence.rank, not sequence.was_running, deadline, sequence.arrival_number)


class _Entry(Generic[SequenceT]):
    """A waiting sequence, and what it was when the queue counted and placed it."""

    __slots__ = ("first_rank", "key", "num_pending_tokens", "sequence")

    def __init__(self, sequence: SequenceT) -> None:
        self.sequence = sequence
        self.first_rank = sequence.rank
        self.key = scheduling_key(sequence)
        self.num_pending_tokens = sequence.num_pending_tokens


class WaitingQueue(Generic[SequenceT]):
    """Sequences that wait, in the order of `scheduling_key`.

    A sequence's class is

        rank = rank at its addition - floor((now - waiting since) / ageing_s)

    as of its addition or its last promotion, and it keeps that rank when it leaves: time that it
    runs does not count. So none starves (derived here): one of class c that waits is overtaken, by
    a new sequence of class c', only if that came less than (c - c' + 1) * ageing_s seconds after it
    began to wait. For the rank of the later one is the smaller or equal only while the two numbers
    of periods differ by at most c - c', and they differ by more than (seconds between the two) /
    ageing_s - 1.

    Adding, removing and each promotion cost O(log n) comparisons and the move of the keys behind.

    Attributes:
        num_pending_tokens: Tokens that all sequences in it are expected to compute.
    """

    def __init__(self, ageing_s: float) -> None:
        """Makes an empty queue.

        Args:
            ageing_s: Seconds of age for which the class improves by one; `math.inf`: never.

        Raises:
            ValueError: Where it is not positive.
        """
        if not ageing_s > 0:
            raise ValueError(f"expected positive seconds for a class, got {ageing_s}")
        self.num_pending_tokens = 0
        self._ageing_s = ageing_s
        self._order: list[SchedulingKey] = []
        self._entries: dict[int, _Entry[SequenceT]] = {}
        self._promotions: Alarms[int] = Alarms()

    def __len__(self) -> int:
        """Number of sequences in it."""
        return len(self._order)

    def __contains__(self, sequence: SequenceT) -> bool:
        """Whether the sequence waits here."""
        return sequence.arrival_number in self._entries

    def __iter__(self) -> Iterator[SequenceT]:
        """The sequences in order. The queue must not change meanwhile."""
        return (self._entries[key.arrival_number].sequence for key in self._order)

    def first(self) -> SequenceT | None:
        """The sequence to admit next, or None where none waits."""
        return next(iter(self), None)

    def add(self, sequence: SequenceT, now: float) -> None:
        """Adds a sequence at the class that it has by now.

        Raises:
            ValueError: Where it waits already.
        """
        number = sequence.arrival_number
        if number in self._entries:
            raise ValueError(f"expected a sequence that does not wait yet, got {sequence!r}")
        entry = self._entries[number] = _Entry(sequence)
        self._place(entry, now)
        self.num_pending_tokens += entry.num_pending_tokens

    def remove(self, sequence: SequenceT) -> None:
        """Removes a sequence, wherever it stands.

        Raises:
            ValueError: Where it does not wait.
        """
        number = sequence.arrival_number
        if number not in self._entries:
            raise ValueError(f"expected a waiting sequence, got {sequence!r}")
        entry = self._entries.pop(number)
        del self._order[bisect_left(self._order, entry.key)]
        self.num_pending_tokens -= entry.num_pending_tokens
        self._promotions.drop(number)

    def promote(self, now: float) -> None:
        """Moves the sequences whose class has improved; call it before the order is read."""
        for number in self._promotions.take_due(now):
            entry = self._entries[number]
            del self._order[bisect_left(self._order, entry.key)]
            self._place(entry, now)

    def num_tokens_before(self, sequence: Schedulable) -> tuple[int, int]:
        """What is admitted before a sequence, which may wait or not.

        O(log n) at either end of the order, O(n) in its middle.

        Returns:
            Number of sequences, and their tokens.
        """
        position = bisect_left(self._order, scheduling_key(sequence))
        if position <= len(self) // 2:
            return position, self._count_tokens(0, position)
        return position, self.num_pending_tokens - self._count_tokens(position, len(self))

    def check_integrity(self) -> None:
        """Raises AssertionError where its parts disagree or a waiting sequence has changed."""
        waiting = [entry.sequence for entry in self._entries.values()]
        keys = sorted(map(scheduling_key, waiting))
        assert self._order == keys, "the order is not that of the sequences"
        assert self.num_pending_tokens == sum(each.num_pending_tokens for each in waiting), (
            "tokens are miscounted"
        )
        for key in keys:
            assert self._entries[key.arrival_number].key == key, "an entry has another key"
        self._promotions.check_integrity()
        promotions = {
            number: self._next_promotion(entry) for number, entry in self._entries.items()
        }
        assert self._promotions.times == promotions, "an alarm is missing, wrong or left over"

    def _next_promotion(self, entry: _Entry[SequenceT]) -> float:
        """When the class of a sequence improves."""
        num_periods = entry.first_rank - entry.sequence.rank
        return entry.sequence.times.waiting_since + (num_periods + 1) * self._ageing_s

    def _place(self, entry: _Entry[SequenceT], now: float) -> None:
        """Puts an entry where it belongs by its age."""
        sequence = entry.sequence
        num_periods = max(0, math.floor((now - sequence.times.waiting_since) / self._ageing_s))
        sequence.rank = entry.first_rank - num_periods
        entry.key = scheduling_key(sequence)
        insort(self._order, entry.key)
        self._promotions.set(sequence.arrival_number, self._next_promotion(entry))

    def _count_tokens(self, start: int, stop: int) -> int:
        """Tokens of the sequences at these positions of the order."""
        keys = self._order[start:stop]
        return sum(self._entries[key.arrival_number].num_pending_tokens for key in keys)
