"""Half of thousands of streams are aborted, wherever they are: nothing is lost or left behind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from engine.scheduling import expected_output, make, run, scheduler_of
from engine.test_service import WireGateway, connect, scripted, start
from mini_infer.errors import MiniInferError
from mini_infer.messages import Abort, FinishCode, GatewayBeat
from mini_infer_engine.sequence import Sequence, SequenceStatus, StreamKey
from mini_infer_engine.step_updates import SequenceUpdate

__all__ = ["connect", "start"]  # fixtures

NUM_REQUESTS = 10_000
NUM_BLOCKS = 80
NUM_HOST_BLOCKS = 24
STEP_S = 0.01
POINTS = ("queued", "swapped", "prefilling", "launched", "last step")
INTEGRITY_EVERY = 20


class AbortStorm:
    """Requests of all kinds, half of them bound to be aborted at a point drawn for each."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.scheduler = scheduler_of(
            NUM_BLOCKS,
            max_num_seqs=16,
            budget=24,
            max_queued=40,
            num_host_blocks=NUM_HOST_BLOCKS,
            caches=True,
            priority_ageing_s=0.5,
            kv_watermark=0.02,
        )
        self.now = 0.0
        self.num_submitted = 0
        self.sequences: dict[StreamKey, Sequence] = {}
        self.points: dict[StreamKey, str] = {}
        self.outputs: dict[StreamKey, list[int]] = {}
        self.reports_due: set[StreamKey] = set()
        self.num_accepted = 0
        self.num_refused = 0
        self.aborted: Counter[str] = Counter()
        self.ended: Counter[FinishCode] = Counter()

    def submit(self) -> None:
        """A request for one to three choices of a prompt, whose first half others share."""
        random = self.random
        num_common, num_own = random.randint(0, 24), random.randint(1, 24)
        prompt = [random.randint(1, 3)] * num_common
        prompt += [random.randint(100, 10_000) for _ in range(num_own)]
        priority = random.choice([0, 0, 0, 1, -1])
        deadline = self.now + random.uniform(0.1, 4.0) if random.random() < 0.4 else None
        max_tokens, ignore_eos = random.randint(1, 40), random.random() < 0.5
        group: list[Sequence] = []
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            sequence = make(
                self.num_submitted,
                len(prompt),
                max_tokens,
                prompt=prompt,
                scope=("", ""),
                priority=priority,
                deadline=deadline,
                arrival=self.now,
                parent=group[0] if group else None,
                ignore_eos=ignore_eos,
            )
            self.num_submitted += 1
            group.append(sequence)
        try:
            self.scheduler.add(*group, now=self.now)
        except MiniInferError:
            self.num_refused += 1
            return
        self.num_accepted += len(group)
        for sequence in group:
            self.sequences[sequence.key] = sequence
            self.outputs[sequence.key] = []
            if random.random() < 0.5:
                self.points[sequence.key] = random.choice(POINTS)

    def abort_those_at(self, is_there: Callable[[Sequence, str], bool]) -> None:
        for key, point in list(self.points.items()):
            if is_there(self.sequences[key], point):
                self.abort(key, point)

    def abort(self, key: StreamKey, point: str) -> None:
        del self.points[key], self.sequences[key]
        reports = self.random.random() < 0.5
        if reports:
            self.reports_due.add(key)
        num_used = self.scheduler.blocks.pool.num_used
        assert self.scheduler.abort(key, self.now, report=reports)
        if point in ("launched", "last step"):
            assert self.scheduler.blocks.pool.num_used == num_used, "a step names these blocks"
        assert not self.scheduler.abort(key, self.now)
        self.aborted[point] += 1

    def step(self) -> None:
        self.abort_those_at(is_between_steps_at)
        self.now += STEP_S
        batch = self.scheduler.schedule(self.now)
        for key in batch.keys:
            sequence = self.sequences.get(key)
            if sequence is None or key not in self.points:
                continue
            if self.is_in_last_step(sequence):
                self.abort(key, "last step")  # at the latest, whatever was drawn for it
            elif self.points[key] == "launched":
                self.abort(key, "launched")
        self.now += STEP_S
        for update in self.scheduler.finish_step(batch, run(batch), self.now):
            self.receive(update)

    def is_in_last_step(self, sequence: Sequence) -> bool:
        return sequence.num_output_tokens + 1 == len(expected_output(sequence))

    def receive(self, update: SequenceUpdate) -> None:
        assert update.error is None
        if update.finish_code is FinishCode.ABORTED:
            self.reports_due.remove(update.key)
            return
        output = self.outputs[update.key]
        assert update.start == len(output)
        output += update.token_ids
        if update.finish_code is FinishCode.RUNNING:
            return
        self.ended[update.finish_code] += 1
        self.points.pop(update.key, None)
        sequence = self.sequences.pop(update.key)
        expected = expected_output(sequence)
        if update.finish_code is FinishCode.DEADLINE:
            assert output == expected[: len(output)]
        else:
            assert output == expected


def is_between_steps_at(sequence: Sequence, point: str) -> bool:
    match point:
        case "queued":
            return sequence.status is SequenceStatus.WAITING
        case "swapped":
            return bool(sequence.host_blocks)
        case "prefilling":
            is_running = sequence.status is SequenceStatus.RUNNING
            return is_running and sequence.num_computed_tokens < sequence.num_prompt_tokens
        case _:
            return False


def test_ten_thousand_streams_half_of_them_aborted_leave_nothing_behind() -> None:
    storm = AbortStorm(seed=1)
    scheduler = storm.scheduler
    while storm.num_submitted < NUM_REQUESTS or not scheduler.is_idle:
        while storm.num_submitted < NUM_REQUESTS and scheduler.num_waiting < 30:
            storm.submit()
        storm.step()
        if scheduler.num_steps % INTEGRITY_EVERY == 0:
            scheduler.check_integrity()
    scheduler.check_integrity()
    counters = scheduler.counters()
    # Everyone ended once, as was counted.
    assert not storm.sequences
    assert not storm.reports_due
    num_aborted, num_expired = storm.aborted.total(), storm.ended[FinishCode.DEADLINE]
    assert storm.num_accepted == num_aborted + storm.ended.total()
    assert num_expired == counters.num_expired_waiting + counters.num_expired_running
    assert storm.num_refused == sum(counters.refusals.values())
    # What was to be tested did happen.
    assert num_aborted > 0.4 * storm.num_accepted > 0.3 * NUM_REQUESTS
    assert min(storm.aborted[point] for point in POINTS) > 50
    assert counters.num_expired_waiting > 0
    assert counters.num_expired_running > 0
    assert counters.num_swaps > 100
    assert counters.num_recomputes > 100
    assert counters.num_copied_blocks > 100
    assert_nothing_is_left(storm)


def assert_nothing_is_left(storm: AbortStorm) -> None:
    """Runs one more request first: blocks of the host become free with a step."""
    scheduler = storm.scheduler
    scheduler.add(make(storm.num_submitted, 4, 1), now=storm.now)
    batch = scheduler.schedule(storm.now)
    scheduler.finish_step(batch, run(batch), storm.now)
    assert scheduler.is_idle
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.blocks.num_swapped) == (0, 0, 0)
    assert scheduler.blocks.pool.num_free == NUM_BLOCKS
    host_pool = scheduler.blocks._host_pool
    assert host_pool is not None
    assert host_pool.num_free == NUM_HOST_BLOCKS
    assert not scheduler._launched
    for alarms in (scheduler._deadlines, scheduler._waiting._promotions):
        assert not alarms.times
        assert len(alarms._heap) <= 64, "entries of dropped times pile up"


def test_aborts_over_a_socket_free_everything(
    start: Callable[..., str], connect: Callable[..., WireGateway]
) -> None:
    choose = random.Random(2)
    gateway = connect(start(step_ms=1, num_blocks=64, max_num_seqs=16, max_num_batched_tokens=64))
    gateway.hello()
    doomed: set[int] = set()
    for stream in range(600):
        gateway.submit(stream, [5] * choose.randint(1, 100), max_tokens=choose.randint(1, 100))
        if stream % 4 == 3:
            victims = choose.sample(sorted(gateway.streams.keys() - doomed), 2)
            doomed |= set(victims)
            gateway.send(Abort(victims, answer=True))
    kept = sorted(gateway.streams.keys() - doomed)
    gateway.send(GatewayBeat(kept))
    gateway.until(lambda: all(each.finish_code for each in gateway.streams.values()))
    gateway.until(lambda: gateway.beat is not None and gateway.beat.num_used_blocks == 0)
    assert gateway.beat is not None
    assert (gateway.beat.num_running, gateway.beat.num_waiting) == (0, 0)
    assert gateway.accepted == gateway.streams.keys()
    for stream, received in gateway.streams.items():
        assert received.token_ids == scripted(stream, len(received.token_ids))
        if stream in kept:
            assert received.finish_code is FinishCode.LENGTH
    codes = Counter(gateway.streams[stream].finish_code for stream in doomed)
    assert codes[FinishCode.ABORTED] > 100
    assert codes.keys() <= {FinishCode.ABORTED, FinishCode.LENGTH}
