"""The waiting queue against a list that is sorted anew each time, and its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mini_infer_engine.waiting_queue import SchedulingKey, WaitingQueue, scheduling_key

AGEING_S = 4.0


@dataclass
class Times:
    waiting_since: float


@dataclass(eq=False)
class Waiting:
    arrival_number: int
    priority: int = 0
    deadline: float | None = None
    times: Times = field(default_factory=lambda: Times(0.0))
    num_pending_tokens: int = 1
    was_running: bool = False
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank = self.priority

    def lose_blocks(self, now: float) -> None:
        """As a preemption does: time that it ran does not make it older."""
        self.priority = self.rank
        self.times = Times(now)
        self.was_running = True


def numbers(queue: WaitingQueue[Waiting]) -> list[int]:
    return [sequence.arrival_number for sequence in queue]


class QueueMachine(RuleBasedStateMachine):
    """Times are quarters of a second, so that every sum of them is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
        self.waiting: list[Waiting] = []
        self.running: list[Waiting] = []
        self.ranks: dict[int, int] = {}
        self.now = 100.0
        self.num_arrived = 0

    def rank(self, sequence: Waiting) -> int:
        return sequence.priority - int((self.now - sequence.times.waiting_since) // AGEING_S)

    def in_order(self) -> list[Waiting]:
        def key(sequence: Waiting) -> tuple[float, ...]:
            deadline = math.inf if sequence.deadline is None else sequence.deadline
            rank = self.ranks[sequence.arrival_number]
            return rank, not sequence.was_running, deadline, sequence.arrival_number

        return sorted(self.waiting, key=key)

    @rule(
        priority=st.integers(-2, 2),
        patience=st.none() | st.integers(0, 60),
        delay=st.integers(0, 30),
        num_pending_tokens=st.integers(1, 50),
    )
    def arrive(
        self, priority: int, patience: int | None, delay: int, num_pending_tokens: int
    ) -> None:
        deadline = None if patience is None else self.now + patience / 4
        times = Times(self.now - delay / 4)
        sequence = Waiting(self.num_arrived, priority, deadline, times, num_pending_tokens)
        self.num_arrived += 1
        self.ranks[sequence.arrival_number] = sequence.rank = self.rank(sequence)
        ahead = [each for each in self.waiting if scheduling_key(each) < scheduling_key(sequence)]
        expected = len(ahead), sum(each.num_pending_tokens for each in ahead)
        assert self.queue.num_tokens_before(sequence) == expected
        sequence.rank = priority
        self.queue.add(sequence, self.now)
        self.waiting.append(sequence)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.waiting))
        self.queue.remove(sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    @precondition(lambda self: self.running)
    @rule(num_generated=st.integers(0, 5), grace=st.integers(0, 8), data=st.data())
    def come_back(self, num_generated: int, grace: int, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self.running.remove(sequence)
        sequence.lose_blocks(self.now)
        sequence.num_pending_tokens += num_generated
        if sequence.deadline is not None:
            sequence.deadline += grace
        self.queue.add(sequence, self.now)
        self.ranks[sequence.arrival_number] = self.rank(sequence)
        self.waiting.append(sequence)

    @rule(quarters=st.integers(1, 40), promotes=st.booleans())
    def wait(self, quarters: int, promotes: bool) -> None:
        self.now += quarters / 4
        if promotes:
            self.queue.promote(self.now)
            self.ranks.update((each.arrival_number, self.rank(each)) for each in self.waiting)

    @invariant()
    def same_as_the_sorted_list(self) -> None:
        expected = self.in_order()
        assert list(self.queue) == expected
        assert self.queue.first() is (expected[0] if expected else None)
        assert len(self.queue) == len(expected)
        assert self.queue.num_pending_tokens == sum(each.num_pending_tokens for each in expected)
        tokens = 0
        for position, sequence in enumerate(expected):
            assert sequence in self.queue
            assert sequence.rank == self.ranks[sequence.arrival_number]
            assert self.queue.num_tokens_before(sequence) == (position, tokens)
            tokens += sequence.num_pending_tokens
        assert not any(sequence in self.queue for sequence in self.running)

    @invariant()
    def whole(self) -> None:
        self.queue.check_integrity()


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase


@settings(max_examples=300, deadline=None)
@given(
    ageing_s=st.floats(0.01, 100),
    priorities=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
    periods_between=st.floats(0, 8),
    periods_after=st.floats(0, 8),
    deadline=st.none() | st.just(0.0),
    was_running=st.booleans(),
)
def test_only_those_that_come_soon_after_a_sequence_overtake_it(
    ageing_s: float,
    priorities: tuple[int, int],
    periods_between: float,
    periods_after: float,
    deadline: float | None,
    was_running: bool,
) -> None:
    arrival = periods_between * ageing_s
    old = Waiting(0, priorities[0])
    new = Waiting(1, priorities[1], deadline, Times(arrival), was_running=was_running)
    queue: WaitingQueue[Waiting] = WaitingQueue(ageing_s)
    queue.add(old, 0.0)
    queue.promote(arrival)
    queue.add(new, arrival)
    queue.promote(arrival + periods_after * ageing_s)
    if arrival >= (old.priority - new.priority + 1) * ageing_s * (1 + 1e-9):
        assert queue.first() is old


def test_a_stream_of_better_requests_does_not_starve_one() -> None:
    queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
    patient = Waiting(0, priority=3)
    queue.add(patient, 0.0)
    num_before = 0
    for second in range(1, 100):
        queue.promote(float(second))
        queue.add(Waiting(second, deadline=second + 1.0, times=Times(second)), float(second))
        first = queue.first()
        queue.remove(first)
        if first is patient:
            break
        num_before += 1
    # Those that arrive less than (3 - 0 + 1) * 4 seconds after it, and no other.
    assert num_before == 15
    assert patient.rank == -1


def test_a_rank_stays_with_a_sequence_that_leaves() -> None:
    queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
    promoted, newer = Waiting(0, priority=1), Waiting(1, times=Times(8.0))
    queue.add(promoted, 0.0)
    queue.promote(8.0)
    queue.add(newer, 8.0)
    queue.remove(promoted)
    queue.promote(50.0)
    assert promoted.rank == -1
    assert scheduling_key(promoted) == SchedulingKey(-1, True, math.inf, 0)
    promoted.lose_blocks(50.0)
    queue.add(promoted, 50.0)
    assert promoted.rank == -1, "time that it ran does not count"
    queue.promote(54.0)
    assert promoted.rank == -2


def test_an_arrival_after_now_counts_as_now() -> None:
    queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
    sequence = Waiting(0, times=Times(10.5))
    queue.add(sequence, 10.0)
    assert sequence.rank == 0
    queue.promote(14.5)
    assert sequence.rank == -1


def test_without_ageing_classes_never_change() -> None:
    queue: WaitingQueue[Waiting] = WaitingQueue(math.inf)
    queue.add(Waiting(0, priority=1), 0.0)
    queue.promote(1e12)
    queue.add(Waiting(1, times=Times(1e12)), 1e12)
    assert numbers(queue) == [1, 0]
    queue.check_integrity()


def test_what_waits_is_not_added_and_what_does_not_is_not_removed() -> None:
    queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
    sequence = Waiting(0, num_pending_tokens=5)
    with pytest.raises(ValueError, match="expected a waiting sequence"):
        queue.remove(sequence)
    queue.add(sequence, 0.0)
    with pytest.raises(ValueError, match="does not wait yet"):
        queue.add(sequence, 0.0)
    assert (len(queue), queue.num_pending_tokens) == (1, 5)
    queue.check_integrity()


@pytest.mark.parametrize("ageing_s", [0.0, -1.0, math.nan])
def test_a_period_that_is_not_positive_is_refused(ageing_s: float) -> None:
    with pytest.raises(ValueError, match="expected positive seconds"):
        WaitingQueue(ageing_s)


@pytest.mark.parametrize(
    "change",
    [
        lambda sequence: setattr(sequence, "deadline", 3.0),
        lambda sequence: setattr(sequence, "was_running", True),
        lambda sequence: setattr(sequence, "rank", 7),
        lambda sequence: setattr(sequence, "num_pending_tokens", 9),
    ],
    ids=["deadline", "was_running", "rank", "num_pending_tokens"],
)
def test_integrity_check_notices_a_waiting_sequence_that_changed(
    change: Callable[[Waiting], None],
) -> None:
    queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
    sequence = Waiting(0, num_pending_tokens=5)
    queue.add(sequence, 0.0)
    change(sequence)
    with pytest.raises(AssertionError):
        queue.check_integrity()
    # It still can be removed, and what was counted is what goes.
    queue.remove(sequence)
    assert (len(queue), queue.num_pending_tokens) == (0, 0)
    queue.check_integrity()


class CountingInt(int):
    """Counts how often the queue compares it."""

    num_comparisons = 0

    def __lt__(self, other: int) -> bool:
        CountingInt.num_comparisons += 1
        return int(self) < int(other)

    __hash__ = int.__hash__


class CountingFloat(float):
    """Counts how often the queue compares a time with it."""

    num_comparisons = 0

    def __ge__(self, other: float) -> bool:
        CountingFloat.num_comparisons += 1
        return float(self) >= other


def test_each_call_looks_at_few_of_many_sequences() -> None:
    num_sequences = 4096
    queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
    sequences = [Waiting(CountingInt(number), deadline=50.0) for number in range(num_sequences)]
    for sequence in sequences:
        queue.add(sequence, 0.0)

    def num_comparisons(call: Callable[[], object]) -> int:
        before = CountingInt.num_comparisons
        call()
        return CountingInt.num_comparisons - before

    now = CountingFloat(3.9)
    assert num_comparisons(lambda: queue.promote(now)) == 0
    assert CountingFloat.num_comparisons == 1
    for sequence in sequences[:: num_sequences // 64]:
        assert num_comparisons(lambda which=sequence: queue.remove(which)) <= 13
        assert num_comparisons(lambda which=sequence: queue.add(which, 0.0)) <= 50
    assert num_comparisons(lambda: queue.promote(4.0)) <= 100 * num_sequences
    assert numbers(queue) == list(range(num_sequences))
    queue.check_integrity()


def test_what_left_is_forgotten_long_before_its_promotion() -> None:
    queue: WaitingQueue[Waiting] = WaitingQueue(AGEING_S)
    for number in range(10_000):
        sequence = Waiting(number, deadline=1e6)
        queue.add(sequence, 0.0)
        queue.remove(sequence)
    assert len(queue._promotions._heap) < 100
