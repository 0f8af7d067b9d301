"""The `mini-infer` command: help, errors, and each sub-command against a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import psutil
import pytest
from mini_infer import Client, EngineConfig, SamplingParams
from mini_infer.cli import main as command_line
from mini_infer.cli.options import attribute_docs
from mini_infer.config import GatewayConfig, TokenizerConfig, bundled_model

COMMANDS = ["demo", "serve", "gateway", "tokenizer", "engine", "generate", "chat", "doctor"]
MINI_INFER = [sys.executable, "-m", "mini_infer.cli.main"]
WAIT_S = 60.0

RunMain = Callable[..., tuple[int, str, str]]
"""Takes arguments; gives exit code, stdout and stderr."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunMain:
    """Runs the command line in this process; gives exit code, stdout and stderr."""

    def run_main(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mini-infer", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            command_line.main()
        code = exit_info.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run_main


class Server:
    """A `mini-infer serve` of the smaller model."""

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
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
        self.process.kill()
        self.process.communicate()
        self._log_file.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may damage."""
    server = Server(tmp_path / "log")
    yield server
    server.close()


# --- help and errors ----------------------------------------------------------------------------


def test_help_lists_every_command_with_what_it_does(
    run: RunMain,
) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert re.findall(r"^  (\w+) +[A-Z].*", out.partition("Commands:")[2], re.M) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(run: RunMain, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "None" not in out
    options = out.partition("Options:")[2]
    entries = re.split(r"^  (?=-)", options, flags=re.M)[1:]
    assert entries
    for entry in entries:
        assert re.search(r"(?:  |\n) *[A-Z\"][\w ]+", entry), entry


@pytest.mark.parametrize(
    ("command", "dataclass_type"),
    [
        ("engine", EngineConfig),
        ("tokenizer", TokenizerConfig),
        ("gateway", GatewayConfig),
        ("serve", EngineConfig),
        ("generate", SamplingParams),
        ("chat", SamplingParams),
    ],
)
def test_every_field_is_an_option(
    run: RunMain,
    command: str,
    dataclass_type: type[EngineConfig],
) -> None:
    _, out, _ = run(command, "--help")
    for each in fields(dataclass_type):
        assert f"--{each.name.replace('_', '-')} " in out


@pytest.mark.parametrize(
    "dataclass_type", [EngineConfig, TokenizerConfig, GatewayConfig, SamplingParams]
)
def test_every_field_is_documented(dataclass_type: type[EngineConfig]) -> None:
    assert set(attribute_docs(dataclass_type)) == {each.name for each in fields(dataclass_type)}


def test_units_and_defaults_are_shown(run: RunMain) -> None:
    _, out, _ = run("serve", "--help")
    text = " ".join(out.split())
    assert "--drain-grace-s SECONDS How long running streams may go on after SIGTERM. " in text
    assert "[default: 30.0]" in text
    assert "--max-prompt-bytes BYTES" in text


def test_version(run: RunMain) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"mini-infer \d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "No such command 'serv'"),
        (["serve", "--prt=1"], "No such option: --prt"),
        (["serve", "--port=many"], "--port"),
        (["serve", "--log-level=loud"], "--log-level"),
        (["serve", "--max-num-seqs=0"], "max_num_seqs must be at least 1, got 0"),
        (["serve", "--host=0.0.0.0"], "pass --insecure"),
        (["serve", "--config=/no/such/file"], "cannot read the config file /no/such/file"),
        (["tokenizer"], "Missing option '--address'"),
        (["tokenizer", "--address=tcp://*:5555"], "processes talk over ipc:// only"),
        (["engine", "--address=ipc:///x", "--model=/no/model"], "/no/model"),
        (["gateway"], "needs the address of an engine and of a tokenizer"),
        (["generate", "--address=127.0.0.1:1", "Hi"], "start one with `mini-infer serve`"),
        (["chat", "--address=127.0.0.1:1"], "start one with `mini-infer serve`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_sentence(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [*MINI_INFER, *arguments], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("mini-infer: ")
    assert message in line


def test_a_package_that_is_missing_is_named(run: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mini_infer.client", None)
    code, _, err = run("generate", "Hi")
    assert code == 2
    assert "mini_infer.client is not installed here: `mini-infer doctor`" in err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(ZeroDivisionError):
        command_line.main()


def test_print_config_names_every_origin(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "mini-infer.yaml"
    file.write_text("max_num_seqs: 8\n")
    monkeypatch.setenv("MINI_INFER_BLOCK_SIZE", "32")
    code, out, _ = run("serve", "--print-config", f"--config={file}", "--port=7000", "--insecure")
    assert code == 0
    lines = dict(line.split("  # ") for line in re.sub(r" +  #", "  #", out).splitlines())
    assert lines["max_num_seqs: 8"] == f"file {file}"
    assert lines["block_size: 32"] == "environment MINI_INFER_BLOCK_SIZE"
    assert lines["port: 7000"] == "flag --port"
    assert lines["insecure: true"] == "flag --insecure"
    assert lines['dtype: "auto"'] == "default"
    assert "engine_addresses" not in out


def test_the_command_line_starts_light() -> None:
    """What is heavy is loaded by the command that needs it."""
    code = (
        "import sys, mini_infer.cli.main; "
        "heavy = {'torch', 'grpc', 'zmq', 'pydantic', 'numpy'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


# --- serve --------------------------------------------------------------------------------------


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
    own_server.process.kill()
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert alive == []


def test_serve_drains_before_it_ends(own_server: Server) -> None:
    with Client(own_server.address) as client:
        stream = client.generate("Once", max_tokens=300, ignore_eos=True, timeout=WAIT_S)
        chunks = iter(stream)
        num_tokens = len(next(chunks).token_ids)
        own_server.process.terminate()
        num_tokens += sum(len(chunk.token_ids) for chunk in chunks)
    assert num_tokens == 300
    assert own_server.process.wait(WAIT_S) == 0


def test_serve_gives_its_flags_to_its_children(tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--served-model-name=tiny", "--max-model-len=64")
    try:
        with Client(server.address) as client:
            info = client.model_info(timeout=WAIT_S)
        assert (info.model, info.max_context_tokens) == ("tiny", 64)
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


# --- generate and chat --------------------------------------------------------------------------


def test_generate_prints_the_text_alone(run: RunMain, server: Server) -> None:
    options = ["--max-tokens=12", "--seed=3", "--ignore-eos"]
    code, out, err = run("generate", f"--address={server.address}", *options, "Once")
    assert (code, err) == (0, "")
    with Client(server.address) as client:
        expected = client.generate("Once", max_tokens=12, seed=3, ignore_eos=True).text()
    assert out == expected + "\n"


def test_generate_tells_its_speed(run: RunMain, server: Server) -> None:
    options = ["--max-tokens=12", "--ignore-eos", "--temperature=0"]
    _, _, err = run("generate", f"--address={server.address}", "--stats", *options, "Once")
    pattern = r"TTFT \d+ ms, [\d.]+ tokens/s, 12 tokens in \d+ messages, 12 steps\n"
    assert re.fullmatch(pattern, err)


def test_generate_reads_stdin(server: Server) -> None:
    done = subprocess.run(
        [*MINI_INFER, "generate", f"--address={server.address}", "--max-tokens=2", "-"],
        input="Once upon a time",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    assert done.stdout


def test_generate_tells_all_bad_fields(run: RunMain, server: Server) -> None:
    bad = ["--temperature=-1", "--top-p=2"]
    code, out, err = run("generate", f"--address={server.address}", *bad, "Once")
    assert (code, out.strip()) == (2, "")
    assert "sampling.temperature" in err
    assert "sampling.top_p" in err
    assert err.count("\n") == 1


def test_ctrl_c_cancels_generate(server: Server) -> None:
    options = ["--max-tokens=3000", "--ignore-eos"]
    with subprocess.Popen(
        [*MINI_INFER, "generate", f"--address={server.address}", *options, "Once"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert process.stderr.read() == b""
    with Client(server.address) as client:
        deadline = time.monotonic() + WAIT_S
        while client.server_info().num_active_requests:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_chat_sends_the_conversation(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Hello!\n\nAnd then?\n/clear\nHello!\n/quit\nnever read\n"
    options = ["--max-tokens=5", "--temperature=0", "--ignore-eos", "--system=Be brief."]
    done = subprocess.run(
        [*MINI_INFER, "chat", f"--address={server.address}", *options],
        input=said,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    system = {"role": "system", "content": "Be brief."}
    messages = [system]
    answers = []
    with Client(server.address) as client:
        for text in ("Hello!", "And then?"):
            messages.append({"role": "user", "content": text})
            stream = client.generate(messages, max_tokens=5, temperature=0, ignore_eos=True)
            messages.append({"role": "assistant", "content": stream.text()})
            answers.append(messages[-1]["content"])
    assert done.stdout == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n"
    assert done.stderr == ""


def test_chat_goes_on_after_a_refused_question(server: Server) -> None:
    done = subprocess.run(
        [*MINI_INFER, "chat", f"--address={server.address}", "--max-tokens=4000"],
        input=f"{'word ' * 5000}\n",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    assert "CONTEXT_LENGTH_EXCEEDED" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_an_answer_and_not_the_chat(server: Server) -> None:
    options = ["--max-tokens=3000", "--ignore-eos"]
    with subprocess.Popen(
        [*MINI_INFER, "chat", f"--address={server.address}", *options],
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


# --- demo and doctor ----------------------------------------------------------------------------


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


def test_doctor_finds_nothing_missing_here(run: RunMain) -> None:
    code, out, err = run("doctor", "--port=0")
    assert (code, err) == (0, "")
    for subject in ("Python", "engine packages", "device", "model", "port", "folder for sockets"):
        assert subject in out
    assert "missing" not in out


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--model=/no/such/model"], "pass --model with a model folder"),
        (["--device=cuda"], "install a CUDA build of torch"),
    ],
)
def test_doctor_says_what_to_do(
    run: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    remedy: str,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("doctor", "--port=0", *flags)
    assert code == 1
    assert remedy in out


def test_doctor_names_packages_that_are_missing(
    run: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    real_version = metadata.version

    def version(name: str) -> str:
        if name == "tokenizers":
            raise metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("doctor", "--port=0")
    assert code == 1
    assert "no tokenizers" in out
    assert "pip install 'mini-infer[tokenizer]'" in out


def test_doctor_sees_a_taken_port(run: RunMain, server: Server) -> None:
    port = server.address.rpartition(":")[2]
    code, out, _ = run("doctor", f"--port={port}")
    assert code == 1
    assert "stop what" in out


def test_logs_are_json_lines_with_the_process_name(server: Server) -> None:
    lines = server._log.read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert {each["process"] for each in logged} == {"gateway", "tokenizer", "engine"}
