"""The commands against real servers: serve, generate, chat and demo."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mini_infer import Client
from mini_infer.config import bundled_model

MINI_INFER = [sys.executable, "-m", "mini_infer.cli.main"]
WAIT_S = 60.0

RunMain = Callable[..., tuple[int, str, str]]
"""Takes arguments; gives exit code, stdout and stderr."""


class Server:
    """A `mini-infer serve` of the smaller model."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.log = log
        self._log_file = log.open("w")
        self.process = subprocess.Popen(
            [*MINI_INFER, "serve", "--port=0", f"--model={bundled_model('demo-draft')}", *flags],
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        assert self.ready_line, log.read_text()
        self.address = self.ready_line.split()[-1]

    def child(self, name: str) -> psutil.Process:
        """The gateway, tokenizer or engine that runs now."""
        return next(
            child
            for child in psutil.Process(self.process.pid).children()
            if name in child.cmdline()
        )

    def folder(self) -> Path:
        """Where the sockets between the processes are."""
        address = next(each for each in self.child("engine").cmdline() if "ipc://" in each)
        return Path(address.partition("ipc://")[2]).parent

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        self.stop()
        self.process.communicate()
        self._log_file.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may damage."""
    server = Server(tmp_path / "log")
    yield server
    server.close()


def test_serve_prints_one_line_when_it_serves(own_server: Server) -> None:
    assert re.fullmatch(
        r"Mini-Infer serves demo-draft on 127\.0\.0\.1:\d+\n", own_server.ready_line
    )
    with Client(own_server.address) as client:
        assert client.model_info(timeout=WAIT_S).model == "demo-draft"
    folder = own_server.folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert own_server.stop() == 0
    assert own_server.process.stdout is not None
    assert own_server.process.stdout.read() == ""
    assert not folder.exists()


@pytest.mark.parametrize("name", ["engine", "tokenizer", "gateway"])
def test_serve_restarts_what_is_killed(own_server: Server, name: str) -> None:
    killed = own_server.child(name)
    killed.kill()
    killed.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    with Client(own_server.address) as client:
        while True:
            client.wait_until_ready(WAIT_S)
            try:
                text = client.generate("Once", max_tokens=4, ignore_eos=True, timeout=WAIT_S).text()
                break
            except Exception:
                assert time.monotonic() < deadline
    assert text
    assert own_server.child(name).pid != killed.pid


def test_serve_takes_its_children_along_when_it_is_killed(own_server: Server) -> None:
    children = psutil.Process(own_server.process.pid).children()
    assert len(children) == 3
    folder = own_server.folder()
    own_server.process.kill()
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert alive == []
    shutil.rmtree(folder, ignore_errors=True)  # unless another `serve` has tidied up already


def test_serve_drains_before_it_ends(own_server: Server) -> None:
    with Client(own_server.address) as client:
        stream = client.generate("Once", max_tokens=300, ignore_eos=True, timeout=WAIT_S)
        chunks = iter(stream)
        num_tokens = len(next(chunks).token_ids)
        own_server.process.terminate()
        num_tokens += sum(len(chunk.token_ids) for chunk in chunks)
    assert num_tokens == 300
    assert own_server.process.wait(WAIT_S) == 0


def test_serve_gives_its_settings_to_its_children(tmp_path: Path) -> None:
    file = tmp_path / "mini-infer.yaml"
    file.write_text("max_model_len: 64\ninsecure: true\nserved_model_name: beaten\n")
    server = Server(
        tmp_path / "log", f"--config={file}", "--served-model-name=tiny", "--no-insecure"
    )
    try:
        with Client(server.address) as client:
            info = client.model_info(timeout=WAIT_S)
        assert (info.model, info.max_context_tokens) == ("tiny", 64)
        assert "--no-insecure" in server.child("gateway").cmdline()
    finally:
        server.close()


@pytest.mark.parametrize("flag", ["--model=/no/such/model", "--device=cuda:99"])
def test_serve_ends_with_the_reason_of_a_child_that_cannot_start(flag: str) -> None:
    done = subprocess.run(
        [*MINI_INFER, "serve", "--port=0", "--log-level=error", flag],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "mini-infer: " in done.stderr
    assert "Traceback" not in done.stderr


def test_logs_are_json_lines_with_the_process_name(own_server: Server) -> None:
    lines = own_server.log.read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert {each["process"] for each in logged} == {"gateway", "tokenizer", "engine"}


def test_serve_refuses_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*MINI_INFER, "serve", f"--port={port}"],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in done.stderr


def test_generate_prints_the_text_alone(run: RunMain, server: str) -> None:
    options = ["--max-tokens=12", "--seed=3", "--ignore-eos"]
    code, out, err = run("generate", f"--address={server}", *options, "Once")
    assert (code, err) == (0, "")
    with Client(server) as client:
        expected = client.generate("Once", max_tokens=12, seed=3, ignore_eos=True).text()
    assert out == expected + "\n"


def test_generate_tells_its_speed(run: RunMain, server: str) -> None:
    options = ["--max-tokens=12", "--ignore-eos", "--temperature=0"]
    _, _, err = run("generate", f"--address={server}", "--stats", *options, "Once")
    pattern = r"TTFT \d+ ms, [\d.]+ tokens/s, 12 tokens in \d+ messages, 12 steps\n"
    assert re.fullmatch(pattern, err)


def test_generate_reads_stdin(server: str) -> None:
    done = subprocess.run(
        [*MINI_INFER, "generate", f"--address={server}", "--max-tokens=2", "-"],
        input="Once upon a time",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    assert done.stdout


def test_generate_tells_all_bad_fields(run: RunMain, server: str) -> None:
    bad = ["--temperature=-1", "--top-p=2"]
    code, out, err = run("generate", f"--address={server}", *bad, "Once")
    assert (code, out.strip()) == (2, "")
    assert "sampling.temperature" in err
    assert "sampling.top_p" in err
    assert err.count("\n") == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Processes started here obey SIGINT, also where the tests run in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_cancels_generate(server: str) -> None:
    options = ["--max-tokens=3000", "--ignore-eos"]
    with subprocess.Popen(
        [*MINI_INFER, "generate", f"--address={server}", *options, "Once"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert process.stderr.read() == b""
    with Client(server) as client:
        deadline = time.monotonic() + WAIT_S
        while client.server_info().num_active_requests:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_chat_sends_the_conversation(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Hello!\n\nAnd then?\n/clear\nHello!\n/quit\nnever read\n"
    options = ["--max-tokens=5", "--temperature=0", "--ignore-eos", "--system=Be brief."]
    done = subprocess.run(
        [*MINI_INFER, "chat", f"--address={server}", *options],
        input=said,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    system = {"role": "system", "content": "Be brief."}
    messages = [system]
    answers = []
    with Client(server) as client:
        for text in ("Hello!", "And then?"):
            messages.append({"role": "user", "content": text})
            stream = client.generate(messages, max_tokens=5, temperature=0, ignore_eos=True)
            messages.append({"role": "assistant", "content": stream.text()})
            answers.append(messages[-1]["content"])
    assert done.stdout == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n"
    assert done.stderr == ""


def test_chat_goes_on_after_a_refused_question(server: str) -> None:
    done = subprocess.run(
        [*MINI_INFER, "chat", f"--address={server}", "--max-tokens=4000"],
        input=f"{'word ' * 5000}\n",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    assert "CONTEXT_LENGTH_EXCEEDED" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_an_answer_and_not_the_chat(server: str) -> None:
    options = ["--max-tokens=3000", "--ignore-eos"]
    with subprocess.Popen(
        [*MINI_INFER, "chat", f"--address={server}", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("Hello!\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        assert process.wait(WAIT_S) == 0


def test_demo_streams(tmp_path: Path) -> None:
    """Pieces of the answer arrive one after the other, and the line about them comes last."""
    arrivals = []
    pieces = []
    with subprocess.Popen(
        [*MINI_INFER, "demo", "--max-tokens=60", "Tell me a story about a fox."],
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 65536):
            pieces.append(piece)
            arrivals.append(time.monotonic())
    assert process.returncode == 0
    first, *_, last = b"".join(pieces).decode().splitlines()
    assert first == "> Tell me a story about a fox."
    assert re.fullmatch(
        r"TTFT \d+ ms, [\d.]+ tokens/s, \d+ tokens in \d+ messages, \d+ steps", last
    )
    assert len(set(arrivals)) > 5


def test_demo_fails_with_the_servers_reason(run: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_INFER_DEVICE", "cuda:99")
    code, _, err = run("demo")
    assert code == 2
    assert "cuda" in err
    assert "the server did not start: `mini-infer doctor` tells what is missing" in err
