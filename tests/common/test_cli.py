"""The `mini-infer` command without a server: help, errors, settings, and the doctor."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
import structlog
import torch
from mini_infer import Client, EngineConfig, SamplingParams, StructuredOutput
from mini_infer.cli import main as command_line
from mini_infer.cli.options import attribute_docs
from mini_infer.cli.progress import byte_progress
from mini_infer.cli.run_folder import MAX_PARENT_BYTES, PREFIX, run_folder
from mini_infer.config import GatewayConfig, TokenizerConfig, bundled_model
from mini_infer.errors import ConfigError

COMMANDS = ["demo", "serve", "gateway", "tokenizer", "engine", "generate", "chat", "doctor"]
MINI_INFER = [sys.executable, "-m", "mini_infer.cli.main"]
WAIT_S = 60.0

RunMain = Callable[..., tuple[int, str, str]]
"""Takes arguments; gives exit code, stdout and stderr."""


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
    ("command", "dataclass_type", "omitted"),
    [
        ("engine", EngineConfig, set()),
        ("tokenizer", TokenizerConfig, set()),
        ("gateway", GatewayConfig, set()),
        ("serve", EngineConfig, set()),
        ("generate", SamplingParams, {"structured_output"}),
        ("generate", StructuredOutput, set()),
        ("chat", SamplingParams, {"n", "structured_output"}),
        ("chat", StructuredOutput, set()),
    ],
)
def test_every_field_is_an_option(
    run: RunMain,
    command: str,
    dataclass_type: type[EngineConfig],
    omitted: set[str],
) -> None:
    _, out, _ = run(command, "--help")
    for each in fields(dataclass_type):
        is_option = f"--{each.name.replace('_', '-')} " in out
        assert is_option is (each.name not in omitted), each.name


@pytest.mark.parametrize(
    "dataclass_type",
    [EngineConfig, TokenizerConfig, GatewayConfig, SamplingParams, StructuredOutput],
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
        (["engine", "--address=ipc:///x", f"--model={'x' * 5000}"], "too long: pass a shorter"),
        (
            ["tokenizer", "--address=ipc:///x", f"--model=/{'x/' * 2500}"],
            "too long: pass a shorter",
        ),
        (["serve", "--model=https://huggingface.co/org/name/tree/main"], "a URL: pass org/name"),
        (["engine", "--address=ipc:///x", "--revision=v1"], "revision v1 is of a Hub id"),
        (["serve", "--port=0", "--revision=v1"], "revision v1 is of a Hub id"),
        (["gateway"], "needs the address of an engine and of a tokenizer"),
        (["generate", "--address=127.0.0.1:1", "Hi"], "start one with `mini-infer serve`"),
        (["chat", "--address=127.0.0.1:1"], "start one with `mini-infer serve`"),
        (["generate", "--logit-bias=5", "Hi"], "'--logit-bias': expected ID=NUMBER such as"),
        (["chat", "--repetition-detection=4", "Hi"], "expected [MIN:]MAX:REPEATS such as 64:4"),
        (["generate", "--repetition-detection=1:2:3:4", "Hi"], "expected [MIN:]MAX:REPEATS"),
        (["generate", "--json-schema=@/no/such", "Hi"], "cannot read the file /no/such"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
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


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`generate` and `chat` begin without asking whether a server answers."""
    with Client("127.0.0.1:1") as client:
        for command in ("generate", "chat"):
            monkeypatch.setattr(
                f"mini_infer.cli.{command}.connected", lambda _: contextlib.nullcontext(client)
            )
        yield


@pytest.mark.parametrize("prompt", ["-", "\udcff\udcfe"])
def test_a_prompt_that_is_no_text_is_one_sentence(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, unconnected: None, prompt: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    code, out, err = run("generate", prompt)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "utf-8" in line.lower()


def test_chat_goes_on_after_what_is_no_text(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, unconnected: None
) -> None:
    said = io.BytesIO(b"\xff\xfe\nHello\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(said, "utf-8"))
    code, _, err = run("chat")
    assert code == 0
    no_text, no_server = err.splitlines()
    assert "utf-8" in no_text.lower()
    assert "UNAVAILABLE" in no_server


def test_a_proxy_stands_in_no_way_of_serving() -> None:
    with subprocess.Popen(
        [*MINI_INFER, "serve", "--port=0", f"--model={bundled_model('demo-draft')}"],
        env={**os.environ, "http_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("Mini-Infer serves demo-draft on ")
        server.terminate()
        assert server.wait(WAIT_S) == 0


def test_a_package_that_is_missing_is_named(run: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mini_infer.client", None)
    code, _, err = run("generate", "Hi")
    assert code == 2
    assert "mini_infer.client is not installed here: `mini-infer doctor`" in err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
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


def test_doctor_finds_nothing_missing_here(run: RunMain) -> None:
    code, out, err = run("doctor", "--port=0")
    assert (code, err) == (0, "")
    for subject in ("Python", "engine packages", "device", "model", "port", "folder for sockets"):
        assert subject in out
    assert "missing" not in out


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--model=/no/such/model"], "pass the path of a model folder, or a Hub id"),
        ([f"--model={tempfile.gettempdir()}"], "pass --model with a model folder"),
        ([f"--model={'x' * 5000}"], "pass a shorter path"),
        (["--model=/no/such/model", "--revision=v1"], "no --revision"),
        (["--device=cuda"], "install a CUDA build of torch"),
    ],
)
def test_doctor_says_what_to_do(
    run: RunMain,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    remedy: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("doctor", "--port=0", *flags)
    assert code == 1
    assert remedy in out


def test_doctor_downloads_no_model(run: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("doctor", "--port=0", "--model=nobody/has-this-model", "--revision=v1")
    assert code == 0
    assert "nobody/has-this-model is not here yet" in out
    assert "downloaded when the server starts" in out


def test_progress_is_lines_of_a_log_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 101.0, 106.0, 107.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with structlog.testing.capture_logs() as lines, byte_progress("Loading weights") as report:
        for done in (1000, 2000, 7000, 8000, 9000):
            report(done, 9000)
    assert [line["done_bytes"] for line in lines] == [7000, 9000]
    assert [line["bytes_per_s"] for line in lines] == [1000, 800]
    assert {line["event"] for line in lines} == {"Loading weights"}


def test_progress_is_a_bar_in_a_terminal() -> None:
    """On stderr, from the first byte to the last; the cursor comes back after a failure."""
    code = """
import sys
from mini_infer.cli.progress import byte_progress
with byte_progress("Loading [weights]") as report:
    report(500_000, 1_000_000)
    raise SystemExit(int(sys.argv[1]))
"""
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    for exit_code in (0, 3):
        master, slave = pty.openpty()
        done = subprocess.run(
            [sys.executable, "-c", code, str(exit_code)],
            stdout=subprocess.PIPE,
            stderr=slave,
            env=environment,
            timeout=WAIT_S,
            check=False,
        )
        os.close(slave)
        shown = os.read(master, 100_000).decode()
        os.close(master)
        assert (done.returncode, done.stdout) == (exit_code, b"")
        assert "Loading [weights]" in shown
        assert "0.5/1.0 MB" in shown
        hides_cursor, shows_cursor = "\x1b[?25l", "\x1b[?25h"
        assert shown.rindex(shows_cursor) > shown.rindex(hides_cursor)


def test_doctor_names_packages_that_are_missing(
    run: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_doctor_sees_a_taken_port(run: RunMain) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, _ = run("doctor", f"--port={taken.getsockname()[1]}")
    assert code == 1
    assert "stop what" in out


@pytest.fixture
def parent() -> Iterator[Path]:
    """A folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="mi-", dir="/tmp") as path:
        yield Path(path)


def test_run_folders_of_killed_servers_are_removed(parent: Path) -> None:
    killed, foreign = parent / f"{PREFIX}killed", parent / f"{PREFIX}foreign"
    for folder in (killed, foreign):
        folder.mkdir()
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(folder / "engine"))
    (foreign / "thesis.txt").touch()
    linked = parent / f"{PREFIX}linked"
    linked.symlink_to(parent)
    with run_folder([parent]) as living, run_folder([parent]) as other:
        assert sorted(parent.iterdir()) == sorted([living, other, foreign, linked])
        assert living.stat().st_mode & 0o777 == 0o700
    assert sorted(parent.iterdir()) == sorted([foreign, linked])
    assert (foreign / "thesis.txt").exists()


def test_a_run_folder_is_held_no_longer_than_its_process(parent: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mini_infer.cli.run_folder import *\n"
        "with run_folder([Path(sys.argv[1])]): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, parent], check=False, timeout=WAIT_S)
    (leftover,) = parent.iterdir()
    with run_folder([parent]):
        assert not leftover.exists()


def test_the_run_folder_is_where_sockets_can_be(parent: Path) -> None:
    room = MAX_PARENT_BYTES - len(str(parent)) - 1
    longest, too_long, missing = parent / ("x" * room), parent / ("x" * (room + 1)), parent / "no"
    longest.mkdir()
    too_long.mkdir()
    with (
        run_folder([missing, too_long, longest]) as folder,
        socket.socket(socket.AF_UNIX) as bound,
    ):
        assert folder.parent == longest
        bound.bind(str(folder / "tokenizer"))
    with pytest.raises(ConfigError, match=r"has more than .*: set TMPDIR to .* a short path"):
        run_folder([too_long]).__enter__()
    with pytest.raises(ConfigError, match="No such file or directory"):
        run_folder([missing]).__enter__()
    (parent / "plain").touch()
    with pytest.raises(ConfigError, match="Not a directory"):
        run_folder([parent / "plain"]).__enter__()
