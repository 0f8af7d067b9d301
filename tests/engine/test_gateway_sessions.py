"""The engine's socket thread towards a gateway that does not read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from mini_infer import channel
from mini_infer.channel import connect_dealer
from mini_infer.config import EngineConfig
from mini_infer.messages import (
    NO_STOP_TOKEN,
    PROTOCOL_VERSION,
    EngineWelcome,
    FinishAccounting,
    FinishCode,
    GatewayBeat,
    Hello,
    HelloNeeded,
    Message,
    StepOutput,
    encode,
    from_engine_decoder,
)
from mini_infer_engine import gateway_sessions
from mini_infer_engine.gateway_sessions import GatewaySessions
from mini_infer_engine.inbox import Inbox, KeepOnly, SocketFailed
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.outbox import Outbox
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.served_model import read_served_model
from mini_infer_engine.step_updates import SequenceEnd, StepUpdates

OWNER = b"gateway-test"
IDS_PER_STEP = 5000


class Line:
    """An engine's sessions and one gateway's socket, with next to no room between them."""

    def __init__(self, folder: Path) -> None:
        address = f"ipc://{folder}/engine.sock"
        config = EngineConfig()
        model_config = read_model_config(config.model_folder)
        served = read_served_model(config, model_config, "float32")
        welcome = served.welcome(engine_id="engine-test", epoch=1, num_blocks=1, block_size=16)
        self.inbox, self.outbox = Inbox(), Outbox(epoch=7)
        self.sessions = GatewaySessions(address, welcome, self.inbox, self.outbox)
        self.sessions.start()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.gateway = connect_dealer(self.context, address, OWNER.decode())
        self.gateway.setsockopt(zmq.RCVTIMEO, 10_000)
        self.num_steps = 0

    def hello(self) -> None:
        self.ask(Hello(PROTOCOL_VERSION, OWNER.decode()), EngineWelcome)

    def ask(self, message: Message, answer: type[Message]) -> None:
        """Asks again until the answer comes, as gateways do: a full pipe may lose answers."""
        for _ in range(100):
            self.gateway.send(encode(message))
            while self.gateway.poll(200):
                if isinstance(self.receive(), answer):
                    return
        raise AssertionError(f"no {answer.__name__} came")

    def receive(self) -> object:
        return from_engine_decoder.decode(self.gateway.recv())

    def publish(self, code: FinishCode = FinishCode.RUNNING) -> None:
        start = self.num_steps * IDS_PER_STEP
        self.num_steps += 1
        ids = list(range(start, start + IDS_PER_STEP))
        accounting = FinishAccounting(0, 0, 0, 0, 0, 1)
        end = None
        if code is not FinishCode.RUNNING:
            end = SequenceEnd(code, NO_STOP_TOKEN, accounting)
        updates = StepUpdates()
        updates.add(StreamKey(OWNER, 1), start, ids, end)
        self.outbox.publish(self.num_steps, updates)

    def close(self) -> None:
        self.sessions.stop()
        self.outbox.close()
        self.context.destroy(linger=0)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(channel, "HIGH_WATER_MARK", 1)
    made = Line(tmp_path)
    yield made
    made.close()


def wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_outputs_merge_while_the_pipe_is_full_and_none_is_lost(line: Line) -> None:
    line.hello()
    for _ in range(150):
        line.publish()
        time.sleep(0.001)
    line.publish(FinishCode.LENGTH)
    ids: list[int] = []
    num_messages = 0
    while True:
        output = line.receive()
        assert isinstance(output, StepOutput)
        assert output.seq == num_messages
        assert output.starts == [len(ids)]
        num_messages += 1
        ids += output.token_ids
        if output.finish_codes == [FinishCode.LENGTH]:
            break
    assert ids == list(range(151 * IDS_PER_STEP))
    assert output.step == 151
    assert num_messages < 140, "nothing was merged: the pipe was never full"


def test_a_gateway_above_the_bound_is_dead_and_may_come_back(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_sessions, "MAX_PENDING_BYTES", 200_000)
    line.hello()
    commands: list[object] = []

    def freed() -> bool:
        line.publish()
        commands.extend(line.inbox.drain(0))
        return KeepOnly(OWNER, frozenset()) in commands

    wait(freed)
    line.ask(GatewayBeat([1]), HelloNeeded)
    line.hello()
    line.num_steps = 0
    line.publish()
    output = line.receive()
    assert isinstance(output, StepOutput)
    assert output.seq == 0


def test_a_broken_socket_thread_is_told_to_the_loop(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.hello()
    error = OSError("broken")

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(line.sessions, "_send", broken)
    line.publish()
    wait(lambda: SocketFailed(error) in line.inbox.drain(0))
