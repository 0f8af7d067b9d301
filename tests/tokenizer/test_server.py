"""A real tokenizer process over a real socket."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from mini_infer.channel import connect_dealer
from mini_infer.config import bundled_model
from mini_infer.errors import ErrorReason
from mini_infer.messages import (
    GATEWAY_LEASE_S,
    PROTOCOL_VERSION,
    CancelJobs,
    CheckGrammar,
    CloseText,
    Decode,
    Decoded,
    EncodeChat,
    Encoded,
    EncodedWords,
    EncodeText,
    EncodeWords,
    FromTokenizer,
    GatewayBeat,
    GrammarAccepted,
    Hello,
    HelloNeeded,
    HelloRefused,
    JobRefused,
    Message,
    OpenText,
    TextDeltas,
    TextStep,
    TokenizerWelcome,
    UnknownStreams,
    WireChatMessage,
    encode,
    from_tokenizer_decoder,
)
from mini_infer.model_folder import tokenizer_hash
from mini_infer.structured_output import Grammar, GrammarKind
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer

DEMO = bundled_model("demo")
PROMPT = "Once upon a time there was a fox who lived by the river."


class ServerProcess:
    """A tokenizer process and what it logs."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o700)
        self.address = f"ipc://{folder}/tokenizer"
        self.log_file = folder / "log"
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mini_infer_tokenizer", "--address", self.address],
                stderr=log,
            )

    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=10)


class Gateway:
    """The gateway's end of the link."""

    def __init__(self, address: str, identity: str) -> None:
        self.identity = identity
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = connect_dealer(self._context, address, identity)
        self._socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self._socket.setsockopt(zmq.SNDTIMEO, 10_000)

    def send_frame(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.send_frame(encode(message))

    def receive(self) -> FromTokenizer:
        return from_tokenizer_decoder.decode(self._socket.recv())

    def ask(self, *messages: Message) -> FromTokenizer:
        self.send(*messages)
        return self.receive()

    def greet(self) -> TokenizerWelcome:
        welcome = self.ask(Hello(PROTOCOL_VERSION, self.identity))
        assert isinstance(welcome, TokenizerWelcome)
        return welcome

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess(tmp_path_factory.mktemp("tokenizer"))
    yield server
    server.stop()


@pytest.fixture
def gateway(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    gateway = Gateway(server.address, f"gateway-{request.node.name}")
    gateway.greet()
    yield gateway
    gateway.close()


def open_text(stream: int, stop: list[str] | None = None) -> OpenText:
    return OpenText(stream, stop or [], True, False)


def test_welcome_says_what_is_served(gateway: Gateway, demo: TextTokenizer) -> None:
    welcome = gateway.greet()
    assert welcome.protocol_version == PROTOCOL_VERSION
    assert welcome.tokenizer_hash == tokenizer_hash(DEMO)
    assert welcome.vocab_size == demo.vocab_size
    assert welcome.has_chat_template


def test_another_protocol_version_is_refused(gateway: Gateway) -> None:
    answer = gateway.ask(Hello(PROTOCOL_VERSION + 1, gateway.identity))
    assert isinstance(answer, HelloRefused)
    assert isinstance(gateway.ask(EncodeText(1, "a", False)), HelloNeeded)


def test_encodes_and_decodes(gateway: Gateway, demo: TextTokenizer) -> None:
    ids = demo.encode(PROMPT, add_special_tokens=True)
    assert gateway.ask(EncodeText(1, PROMPT, True)) == Encoded(1, ids)
    assert gateway.ask(Decode(2, ids, True)) == Decoded(2, PROMPT)
    assert gateway.ask(Decode(3, ids * 100, True)) == Decoded(3, PROMPT * 100)


def test_encodes_chats_and_refuses_bad_ones(gateway: Gateway, demo: TextTokenizer) -> None:
    text = f"<|bos|><|user|>{PROMPT}<|end|><|assistant|>"
    chat = EncodeChat(1, [WireChatMessage("user", PROMPT)], True)
    assert gateway.ask(chat) == Encoded(1, demo.encode(text, add_special_tokens=False))
    refused = gateway.ask(EncodeChat(2, [WireChatMessage("wizard", "x")], True))
    assert isinstance(refused, JobRefused)
    assert refused.reason is ErrorReason.CHAT_TEMPLATE_FAILED


def test_encodes_words_and_refuses_what_has_no_tokens(
    gateway: Gateway, demo: TextTokenizer
) -> None:
    forms = [demo.encode(text, add_special_tokens=False) for text in ("river", " river")]
    assert gateway.ask(EncodeWords(1, ["river", " river"])) == EncodedWords(1, forms)
    refused = gateway.ask(EncodeWords(2, ["river", ""]))
    assert isinstance(refused, JobRefused)
    assert (refused.job, refused.reason) == (2, ErrorReason.INVALID_FIELD)


def test_accepts_languages_and_refuses_bad_ones(gateway: Gateway) -> None:
    bomb = Grammar(GrammarKind.REGEX, "a?" * 5_000 + "a" * 5_000)
    object_schema = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
    assert gateway.ask(CheckGrammar(1, object_schema)) == GrammarAccepted(1)
    for job in (2, 3):
        refused = gateway.ask(CheckGrammar(job, bomb))
        assert isinstance(refused, JobRefused)
        assert (refused.job, refused.reason) == (job, ErrorReason.GRAMMAR_INVALID)
        assert "describe a smaller language" in refused.message
    assert gateway.ask(CheckGrammar(4, Grammar(GrammarKind.REGEX, "a+"))) == GrammarAccepted(4)


def test_hostile_languages_do_not_delay_prompts(gateway: Gateway) -> None:
    bomb = "a?" * 5_000 + "a" * 5_000
    jobs = [CheckGrammar(n, Grammar(GrammarKind.REGEX, f"{bomb}{n}")) for n in range(10)]
    gateway.send(*jobs, EncodeText(99, "small", False))
    answers = [gateway.receive() for _ in range(11)]
    assert isinstance(answers[0], Encoded)
    assert all(isinstance(each, JobRefused) for each in answers[1:])


def test_a_large_prompt_does_not_delay_a_small_one(gateway: Gateway) -> None:
    gateway.send(EncodeText(1, "word" * 500_000, False), EncodeText(2, "small", False))
    jobs = []
    for _ in range(2):
        answer = gateway.receive()
        assert isinstance(answer, Encoded)
        jobs.append(answer.job)
    assert jobs == [2, 1]


def test_cancelled_jobs_are_not_done(gateway: Gateway) -> None:
    gateway.send(*(EncodeText(number, "word" * 100_000, False) for number in range(1, 11)))
    gateway.send(CancelJobs(list(range(1, 10))))
    answer = gateway.receive()
    while isinstance(answer, Encoded) and answer.job == 1:  # May have been answered before.
        answer = gateway.receive()
    assert isinstance(answer, Encoded)
    assert answer.job == 10


def test_hello_again_forgets_the_jobs(gateway: Gateway) -> None:
    gateway.send(*(EncodeText(number, "word" * 100_000, False) for number in range(1, 11)))
    gateway.send(Hello(PROTOCOL_VERSION, gateway.identity))
    while not isinstance(gateway.receive(), TokenizerWelcome):
        pass
    answer = gateway.ask(EncodeText(11, "word" * 100_000, False))
    assert isinstance(answer, Encoded)
    assert answer.job == 11


def test_columns_of_many_streams(gateway: Gateway, demo: TextTokenizer) -> None:
    """Rows of several streams and of any length give each stream's own text."""
    generator = random.Random(0)
    ids = {
        stream: generator.choices(range(demo.vocab_size), k=generator.randrange(1, 40))
        for stream in range(40)
    }
    gateway.send(*(open_text(stream) for stream in ids))
    positions = dict.fromkeys(ids, 0)
    texts = dict.fromkeys(ids, "")
    while positions:
        step = TextStep([], [], [], [], [])
        for stream, start in list(positions.items()):
            row = ids[stream][start : start + generator.randrange(4)]
            step.streams.append(stream)
            step.starts.append(start)
            step.counts.append(len(row))
            step.token_ids.extend(row)
            positions[stream] += len(row)
            step.last.append(positions[stream] == len(ids[stream]))
            if step.last[-1]:
                del positions[stream]
        deltas = gateway.ask(step)
        assert isinstance(deltas, TextDeltas)
        assert deltas.streams == step.streams
        for stream, text in zip(deltas.streams, deltas.texts, strict=True):
            texts[stream] += text
    assert texts == {stream: demo.decode(row, True) for stream, row in ids.items()}


def test_stop_strings_end_a_stream(gateway: Gateway, demo: TextTokenizer) -> None:
    ids = demo.encode(PROMPT, add_special_tokens=False)
    gateway.send(open_text(1, stop=["river", "fox who"]))
    deltas = gateway.ask(TextStep([1], [0], [len(ids)], ids, [False]))
    expected = Detokenizer(demo).open(stop=["river", "fox who"]).read(ids)
    assert isinstance(deltas, TextDeltas)
    assert deltas.texts == ["Once upon a time there was a "]
    assert deltas.stop_indices == [1]
    assert deltas.ids_released == [expected.num_ids]


def test_streams_that_are_not_open_are_named(gateway: Gateway) -> None:
    gateway.send(open_text(1), open_text(2), open_text(3), open_text(4))
    gateway.send(CloseText([2]), GatewayBeat([1, 3]))
    step = TextStep([1, 2, 4], [0, 0, 0], [1, 1, 1], [70, 70, 70], [False] * 3)
    deltas = gateway.ask(step)
    assert isinstance(deltas, TextDeltas)
    assert deltas.streams == [1]
    assert gateway.receive() == UnknownStreams([2, 4])


def test_hello_again_forgets_the_streams(gateway: Gateway) -> None:
    gateway.send(open_text(1))
    gateway.greet()
    assert gateway.ask(TextStep([1], [0], [1], [70], [False])) == TextDeltas([], [], [], [], [])
    assert gateway.receive() == UnknownStreams([1])


def test_an_unknown_gateway_must_say_hello(server: ServerProcess) -> None:
    gateway = Gateway(server.address, "gateway-stranger")
    try:
        assert gateway.ask(EncodeText(1, "a", False)) == HelloNeeded()
        assert gateway.ask(GatewayBeat([])) == HelloNeeded()
        gateway.greet()
        assert isinstance(gateway.ask(EncodeText(1, "a", False)), Encoded)
    finally:
        gateway.close()


def test_a_silent_gateway_is_forgotten(server: ServerProcess) -> None:
    silent, beating = Gateway(server.address, "silent"), Gateway(server.address, "beating")
    try:
        for gateway in (silent, beating):
            gateway.greet()
            gateway.send(open_text(1))
        end = time.monotonic() + GATEWAY_LEASE_S + 1
        while time.monotonic() < end:
            time.sleep(0.5)
            beating.send(GatewayBeat([1]))
        step = TextStep([1], [0], [1], [70], [False])
        assert silent.ask(step) == HelloNeeded()
        assert isinstance(beating.ask(step), TextDeltas)
    finally:
        silent.close()
        beating.close()


def test_frames_that_are_no_message_are_counted_and_dropped(
    server: ServerProcess, gateway: Gateway
) -> None:
    generator = random.Random(0)
    honest = encode(TextStep([1], [0], [1], [70], [False]))
    gateway.send_frame(encode(EncodeText(1, "a", False)), b"second part")
    gateway.send_frame(b"")
    gateway.send(TextStep([1], [0, 0], [1], [70], [False]))
    for _ in range(2_000):
        mutated = bytearray(honest)
        mutated[generator.randrange(1, len(mutated))] = generator.randrange(256)
        gateway.send_frame(bytes(mutated)[: generator.randrange(len(mutated))])
    assert server.process.poll() is None
    deadline = time.monotonic() + 10
    answer: FromTokenizer | None = None
    gateway.send(EncodeText(7, "still there", False))
    while not isinstance(answer, Encoded) and time.monotonic() < deadline:
        answer = gateway.receive()
    assert isinstance(answer, Encoded)
    assert answer.job == 7
    dropped = [line for line in server.log() if line["event"] == "frame dropped"]
    assert len(dropped) >= 8
    assert len(dropped) < 20  # A flood does not flood the log.


def test_logs_are_json_and_hold_no_prompt(server: ServerProcess, gateway: Gateway) -> None:
    gateway.ask(EncodeText(1, "a secret prompt", False))
    gateway.ask(EncodeChat(1, [WireChatMessage("wizard", "a secret prompt")], True))
    gateway.ask(EncodeWords(1, ["a secret word"]))
    gateway.ask(CheckGrammar(1, Grammar(GrammarKind.REGEX, "a secret language(")))
    assert server.log()[0]["event"] == "ready"
    assert "secret" not in server.log_file.read_text()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path: Path, signal_number: signal.Signals) -> None:
    server = ServerProcess(tmp_path)
    gateway = Gateway(server.address, "gateway")
    gateway.greet()
    begin = time.monotonic()
    server.process.send_signal(signal_number)
    assert server.process.wait(timeout=10) == 0
    assert time.monotonic() - begin < 2
    gateway.close()
    assert server.log()[-1]["event"] == "stopped"


def test_no_child_process_outlives_it(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path)
    gateway = Gateway(server.address, "gateway")
    gateway.greet()
    assert len(psutil.Process(server.process.pid).children()) == 2  # For chat templates.
    gateway.ask(CheckGrammar(1, Grammar(GrammarKind.REGEX, "a+")))
    children = psutil.Process(server.process.pid).children()
    assert len(children) == 3
    server.process.kill()
    server.process.wait()
    gateway.close()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_what_it_cannot_start_with_is_one_sentence(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o700)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (broken / "chat_template.jinja").write_text("{% if %}")
    command = [sys.executable, "-m", "mini_infer_tokenizer"]
    address = ["--address", f"ipc://{tmp_path}/tokenizer"]
    for arguments in (
        [*address, "--model", str(tmp_path / "nowhere")],
        ["--address", "tcp://127.0.0.1:7000"],
        [*address, "--num-encode-threads", "0"],
        [*address, "--num-template-processes", "0"],
        [*address, "--model", str(broken)],
    ):
        result = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=30, check=False
        )
        assert result.returncode == 2
        assert result.stderr.startswith("mini-infer: ")
        assert "Traceback" not in result.stderr
