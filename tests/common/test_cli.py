"""The `mini-infer` command without a server: help, errors, settings, and the doctor."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
import torch
from mini_infer import EngineConfig, SamplingParams
from mini_infer.cli import main as command_line
from mini_infer.cli.options import attribute_docs
from mini_infer.config import GatewayConfig, TokenizerConfig

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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("doctor", "--port=0", *flags)
    assert code == 1
    assert remedy in out


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
