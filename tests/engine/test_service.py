"""The engine process over a real socket: the scripted engine, which differs in the model alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zmq
from mini_infer.channel import connect_dealer
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason
from mini_infer.messages import (
    GATEWAY_LEASE_S,
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    EngineBeat,
    EngineWelcome,
    FinishAccounting,
    FinishCode,
    GatewayBeat,
    Hello,
    HelloNeeded,
    HelloRefused,
    Message,
    Refused,
    StepOutput,
    Submit,
    encode,
    from_engine_decoder,
)
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.scripted import ordinary_token_ids, scripted_token

ORDINARY_IDS = ordinary_token_ids(bundled_model("demo"))


@dataclass
class Received:
    """What came for one stream."""

    num_resumed: int = 0
    token_ids: list[int] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    finish_code: FinishCode = FinishCode.RUNNING
    accounting: FinishAccounting | None = None
    refused: Refused | None = None


class WireGateway:
    """A gateway without gRPC: says Hello, submits, and records what comes."""

    def __init__(self, address: str, name: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = connect_dealer(self.context, address, name)
        self.socket.setsockopt(zmq.SNDTIMEO, 10_000)
        self.name = name
        self.streams: dict[int, Received] = {}
        self.accepted: set[int] = set()
        self.other: list[Message] = []
        self.beat: EngineBeat | None = None
        self.next_seq = 0

    def hello(self) -> EngineWelcome:
        self.send(Hello(PROTOCOL_VERSION, self.name))
        self.until(lambda: any(isinstance(each, EngineWelcome) for each in self.other))
        self.next_seq = 0
        return next(each for each in self.other if isinstance(each, EngineWelcome))

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    def submit(self, stream: int, prompt_ids: list[int], **sampling: object) -> None:
        names = ("budget_ms", "priority", "principal", "cache_salt", "siblings")
        fields = {name: sampling.pop(name) for name in names if name in sampling}
        output_ids = sampling.pop("output_ids", [])
        options = dict(temperature=1.0, top_k=0, top_p=1.0, seed=stream, max_tokens=8) | sampling
        for each in (stream, *fields.get("siblings", [])):
            self.streams[each] = Received(num_resumed=len(output_ids))
        resolved = ResolvedSampling(**options)
        self.send(Submit(stream, prompt_ids, output_ids, resolved, **fields))

    def until(self, done: Callable[[], bool], timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < end, "nothing of the kind came"
            if self.socket.poll(100):
                self.receive(from_engine_decoder.decode(self.socket.recv()))

    def until_finished(self, *streams: int) -> None:
        self.until(lambda: all(self.streams[each].finish_code for each in streams))

    def receive(self, message: Message) -> None:
        match message:
            case StepOutput():
                self.receive_step(message)
            case Accepted(stream=stream):
                self.accepted.add(stream)
            case Refused(stream=stream):
                self.streams[stream].refused = message
            case EngineBeat():
                self.beat = message
            case _:
                self.other.append(message)

    def receive_step(self, output: StepOutput) -> None:
        assert output.seq == self.next_seq
        self.next_seq += 1
        ids = iter(output.token_ids)
        finished = iter(output.finished)
        for row, stream in enumerate(output.streams):
            received = self.streams[stream]
            new = [next(ids) for _ in range(output.counts[row])]
            assert output.starts[row] == received.num_resumed + len(received.token_ids)
            received.token_ids += new
            received.messages.append(len(new))
            received.steps.append(output.step)
            received.finish_code = FinishCode(output.finish_codes[row])
            if received.finish_code:
                received.accounting = next(finished)
                assert received.accounting.queue_ms >= 0
        assert next(ids, None) is None
        assert next(finished, None) is None

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts scripted engines and stops them, which must end with 0."""
    processes: list[subprocess.Popen[bytes]] = []
    tmp_path.chmod(0o700)

    def start_one(**options: object) -> str:
        address = f"ipc://{tmp_path}/engine.sock"
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "mini_infer_engine.scripted", "--address", address]
        processes.append(subprocess.Popen([*command, *flags], stderr=subprocess.DEVNULL))
        return address

    yield start_one
    for process in processes:
        process.terminate()
    assert [process.wait(10) for process in processes] == [0] * len(processes)


@pytest.fixture
def connect() -> Iterator[Callable[..., WireGateway]]:
    gateways: list[WireGateway] = []

    def connect_one(address: str, name: str = "gateway-test") -> WireGateway:
        gateways.append(WireGateway(address, name))
        return gateways[-1]

    yield connect_one
    for gateway in gateways:
        gateway.close()


Start = Callable[..., str]
Connect = Callable[..., WireGateway]


def scripted(seed: int, num_tokens: int, start: int = 0) -> list[int]:
    return [scripted_token(seed, start + each, ORDINARY_IDS) for each in range(num_tokens)]


def test_streams_get_their_tokens_and_join_at_any_step(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=2))
    welcome = gateway.hello()
    assert (welcome.model, welcome.vocab_size) == ("demo", 4096)
    gateway.submit(1, [5, 6, 7], max_tokens=60)
    gateway.until(lambda: len(gateway.streams[1].token_ids) >= 5)
    gateway.submit(2, [9], max_tokens=10)
    gateway.until_finished(1, 2)
    assert gateway.accepted == {1, 2}
    assert gateway.streams[1].token_ids == scripted(1, 60)
    assert gateway.streams[2].token_ids == scripted(2, 10)
    assert gateway.streams[2].steps[-1] < gateway.streams[1].steps[-1]
    assert gateway.streams[1].finish_code is FinishCode.LENGTH


def test_rows_of_several_tokens_arrive_whole_and_in_order(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=20, tokens_per_row=3))
    gateway.hello()
    gateway.submit(4, [1] * 20, max_tokens=10)
    gateway.until_finished(4)
    assert gateway.streams[4].token_ids == scripted(4, 10)
    assert gateway.streams[4].messages == [3, 3, 3, 1]


def test_a_stream_resumes_behind_the_output_that_exists(start: Start, connect: Connect) -> None:
    gateway = connect(start())
    gateway.hello()
    gateway.submit(1, [5, 6], max_tokens=20, output_ids=scripted(1, 7))
    gateway.until_finished(1)
    assert gateway.streams[1].token_ids == scripted(1, 13, start=7)


def test_aborts_free_blocks_and_are_answered_when_asked(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=2))
    gateway.hello()
    for stream in (1, 2):
        gateway.submit(stream, [5] * 40, max_tokens=3000)
    gateway.until(lambda: all(each.token_ids for each in gateway.streams.values()))
    gateway.send(Abort([1, 77], answer=True))
    gateway.until(lambda: gateway.streams[1].finish_code is FinishCode.ABORTED)
    gateway.send(Abort([2]))
    gateway.until(lambda: gateway.beat is not None and gateway.beat.num_used_blocks == 0)
    assert gateway.streams[2].finish_code is FinishCode.RUNNING


def test_bad_streams_are_refused_alone(start: Start, connect: Connect) -> None:
    gateway = connect(start(num_blocks=16, max_num_seqs=1, max_queued_requests=1, step_ms=5))
    gateway.hello()
    gateway.submit(1, [])
    gateway.submit(2, [4096])
    gateway.submit(3, [5], max_tokens=4096)
    gateway.submit(4, [5], max_tokens=1000)
    gateway.submit(5, [5], top_p=0.0)
    gateway.submit(6, [5], max_tokens=200)
    gateway.until(lambda: bool(gateway.streams[6].token_ids))
    gateway.submit(7, [5])
    gateway.submit(8, [5])
    gateway.until_finished(6, 7)
    refusals = {
        stream: received.refused.reason
        for stream, received in gateway.streams.items()
        if received.refused
    }
    assert refusals == {
        1: ErrorReason.INVALID_FIELD,
        2: ErrorReason.INVALID_FIELD,
        3: ErrorReason.CONTEXT_LENGTH_EXCEEDED,
        4: ErrorReason.KV_EXHAUSTED,
        5: ErrorReason.INVALID_FIELD,
        8: ErrorReason.QUEUE_FULL,
    }


def test_deadlines_end_waiting_and_running_streams(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=10, max_num_seqs=1, max_num_batched_tokens=64))
    gateway.hello()
    gateway.submit(1, [5], max_tokens=4000, budget_ms=300)
    gateway.until(lambda: bool(gateway.streams[1].token_ids))
    gateway.submit(2, [5], max_tokens=4000, budget_ms=100)
    gateway.until_finished(1, 2)
    assert gateway.streams[1].finish_code is FinishCode.DEADLINE
    assert gateway.streams[1].token_ids == scripted(1, len(gateway.streams[1].token_ids))
    assert gateway.streams[2].finish_code is FinishCode.DEADLINE
    assert gateway.streams[2].token_ids == []


def test_strangers_and_garbage_change_nothing(start: Start, connect: Connect) -> None:
    address = start(step_ms=2)
    gateway = connect(address)
    gateway.send(Hello(PROTOCOL_VERSION + 1, "gateway-test"))
    gateway.until(lambda: any(isinstance(each, HelloRefused) for each in gateway.other))
    gateway.send(GatewayBeat([]))
    gateway.until(lambda: any(isinstance(each, HelloNeeded) for each in gateway.other))
    gateway.hello()
    gateway.submit(1, [5], max_tokens=100)
    for garbage in (b"", b"\xc1", b"\x93\x0a\x01", os.urandom(200), encode(Accepted(1))):
        gateway.socket.send(garbage)
    gateway.socket.send_multipart([encode(Abort([1])), b"second part"])
    gateway.until_finished(1)
    assert gateway.streams[1].token_ids == scripted(1, 100)


def test_beats_count_every_step_and_free_block(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=2))
    gateway.hello()
    gateway.submit(1, [5] * 40, max_tokens=30)
    gateway.until_finished(1)
    gateway.until(lambda: gateway.beat is not None and gateway.beat.num_steps == 30)
    assert (gateway.beat.num_running, gateway.beat.num_used_blocks) == (0, 0)


def test_a_long_step_is_announced_before_it_begins(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=700))
    gateway.hello()
    gateway.submit(1, [5, 6], max_tokens=2)
    gateway.until(lambda: gateway.beat is not None and gateway.beat.expected_step_ms >= 1400)
    assert gateway.streams[1].token_ids == []
    gateway.until_finished(1)


def test_two_gateways_use_the_same_numbers_without_meeting(start: Start, connect: Connect) -> None:
    address = start(step_ms=2)
    first, second = connect(address, "gateway-1"), connect(address, "gateway-2")
    for gateway, seed in ((first, 11), (second, 22)):
        gateway.hello()
        gateway.submit(1, [5], seed=seed, max_tokens=30)
    first.until_finished(1)
    second.until_finished(1)
    assert first.streams[1].token_ids == scripted(11, 30)
    assert second.streams[1].token_ids == scripted(22, 30)


def test_a_beat_sweeps_streams_and_silence_frees_all(start: Start, connect: Connect) -> None:
    address = start(step_ms=2)
    silent, watcher = connect(address, "gateway-silent"), connect(address, "gateway-watcher")
    silent.hello()
    silent.submit(1, [5] * 30, max_tokens=4000)
    silent.submit(2, [5] * 30, max_tokens=4000)
    silent.until(lambda: all(each.token_ids for each in silent.streams.values()))
    silent.send(GatewayBeat([2]))
    silent.until(lambda: silent.beat is not None and silent.beat.num_running == 1)
    silent.close()
    watcher.hello()
    end = time.monotonic() + GATEWAY_LEASE_S + 10

    def freed() -> bool:
        watcher.send(GatewayBeat([]))
        assert time.monotonic() < end
        return watcher.beat is not None and watcher.beat.num_used_blocks == 0

    watcher.until(freed)


def test_a_gateway_that_does_not_read_is_given_merged_output(
    start: Start, connect: Connect
) -> None:
    gateway = connect(start(step_ms=0))
    gateway.socket.setsockopt(zmq.RCVHWM, 1)
    gateway.hello()
    for stream in range(1, 33):
        gateway.submit(stream, [5], max_tokens=4000)
    time.sleep(2.5)  # thousands of steps, within the lease
    gateway.send(GatewayBeat(list(gateway.streams)))
    gateway.until_finished(*gateway.streams)
    for stream, received in gateway.streams.items():
        assert received.token_ids == scripted(stream, 4000)


def cached_tokens(gateway: WireGateway, stream: int) -> int:
    accounting = gateway.streams[stream].accounting
    assert accounting is not None
    return accounting.num_cached_tokens


def test_siblings_are_streams_of_their_own_that_share_the_prompt(
    start: Start, connect: Connect
) -> None:
    gateway = connect(start(step_ms=1))
    gateway.hello()
    gateway.submit(4, [9] * 40, siblings=[7, 8], seed=2**64 - 1, max_tokens=12)
    gateway.until_finished(4, 7, 8)
    for stream, seed in ((4, 2**64 - 1), (7, 0), (8, 1)):
        assert gateway.streams[stream].token_ids == scripted(seed, 12)
    assert gateway.accepted == {4, 7, 8}
    assert [cached_tokens(gateway, stream) for stream in (4, 7, 8)] == [0, 39, 39]


def test_siblings_are_refused_together(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=1, max_num_seqs=1, max_num_batched_tokens=1))
    gateway.hello()
    gateway.submit(1, [2], siblings=[2, 1])
    gateway.until(lambda: all(gateway.streams[each].refused for each in (1, 2)))
    refused = gateway.streams[2].refused
    assert refused is not None
    assert refused.reason is ErrorReason.DUPLICATE_REQUEST_ID
    gateway.submit(1, [2])
    gateway.until_finished(1)


def test_prefixes_are_shared_within_a_principal_and_a_salt(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=1))
    gateway.hello()
    scopes = [("", ""), ("", ""), ("ann", ""), ("bob", ""), ("", "salt"), ("ann", "")]
    cached = []
    for stream, (principal, salt) in enumerate(scopes, 1):
        gateway.submit(stream, [3] * 50, principal=principal, cache_salt=salt)
        gateway.until_finished(stream)
        cached.append(cached_tokens(gateway, stream))
    assert cached == [0, 48, 0, 0, 0, 48]
    gateway.until(lambda: gateway.beat is not None and gateway.beat.counters.num_hit_tokens == 96)
    assert gateway.beat is not None
    assert gateway.beat.num_cached_blocks > 0
    assert gateway.beat.counters.num_queried_tokens == 300


def test_lower_classes_run_first(start: Start, connect: Connect) -> None:
    gateway = connect(start(step_ms=5, max_num_seqs=1, max_num_batched_tokens=64))
    gateway.hello()
    gateway.submit(1, [5], max_tokens=20)
    gateway.until(lambda: bool(gateway.streams[1].token_ids))
    gateway.submit(2, [5], max_tokens=4, priority=1)
    gateway.submit(3, [5], max_tokens=4)
    gateway.submit(4, [5], max_tokens=4, priority=-1)
    gateway.until_finished(1, 2, 3, 4)
    first_steps = {stream: gateway.streams[stream].steps[0] for stream in (2, 3, 4)}
    assert first_steps[4] < first_steps[3] < first_steps[2]
    # The better class did not wait for the place of the one that ran.
    assert first_steps[4] < gateway.streams[1].steps[-1]


def test_an_unreachable_deadline_is_refused_with_the_estimate(
    start: Start, connect: Connect
) -> None:
    gateway = connect(start(step_ms=100, max_num_batched_tokens=64, max_num_seqs=4))
    gateway.hello()
    gateway.submit(1, [5] * 640, budget_ms=400)
    gateway.until(lambda: gateway.streams[1].refused is not None)
    refused = gateway.streams[1].refused
    assert refused is not None
    assert refused.reason is ErrorReason.DEADLINE_UNREACHABLE
    assert refused.retry_after_s is not None
    assert 0.9 <= refused.retry_after_s <= 1.5
    gateway.until(lambda: gateway.beat is not None and bool(gateway.beat.counters.refusals))
