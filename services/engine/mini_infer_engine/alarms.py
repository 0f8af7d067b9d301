"""Times at which something is due, found without looking at those that are not."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

_MIN_ENTRIES = 64

KeyT = TypeVar("KeyT", bound=Hashable)


class Alarms(Generic[KeyT]):
    """At most one time for each of some keys (ints or tuples), found in the order of the times.

    A heap whose entries stay behind when their key is dropped. An entry is live if `times` has it;
    the others go when they come up, or all at once when they are the majority. So each operation
    costs O(log n) in the mean.

    Attributes:
        times: The time of each key.
    """

    def __init__(self) -> None:
        """Has no times."""
        self.times: dict[KeyT, float] = {}
        self._heap: list[tuple[float, KeyT]] = []

    def set(self, key: KeyT, time: float) -> None:
        """Gives a time to a key that has none."""
        self.times[key] = time
        heapq.heappush(self._heap, (time, key))

    def drop(self, key: KeyT) -> None:
        """Takes the time from a key, if it has one."""
        self.times.pop(key, None)
        if len(self._heap) > 2 * len(self.times) + _MIN_ENTRIES:
            self._heap = [(time, key) for key, time in self.times.items()]
            heapq.heapify(self._heap)

    def take_due(self, now: float) -> list[KeyT]:
        """Takes the times up to `now` from their keys; the earliest comes first."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            time, key = heapq.heappop(self._heap)
            if self.times.get(key) == time:
                del self.times[key]
                due.append(key)
        return due

    def check_integrity(self) -> None:
        """Checks that every time is in the heap, and that the heap is one.

        Raises:
            AssertionError: Where that does not hold.
        """
        assert {(time, key) for key, time in self.times.items()} <= set(self._heap)
        assert all(
            self._heap[(child - 1) // 2] <= self._heap[child] for child in range(1, len(self._heap))
        ), "a heap is out of order"
