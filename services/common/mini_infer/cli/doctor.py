"""`mini-infer doctor`: what this machine lacks to serve, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import typer

from mini_infer.cli.flags import Flags, takes_settings
from mini_infer.cli.run_folder import run_folder
from mini_infer.cli.serve import free_port
from mini_infer.config import EngineConfig, GatewayConfig
from mini_infer.errors import ConfigError
from mini_infer.model_folder import check_folder, names_in

SPARE_FILE_DESCRIPTORS = 256
"""Beside one per client connection: libraries, sockets between processes, logs."""

_COMPONENTS = ("gateway", "tokenizer", "engine")
_MODEL_FILES = ("config.json", "tokenizer.json")


class State(Enum):
    """How a check came out."""

    OK = "[green]ok[/]"
    OPTIONAL = "[yellow]optional[/]"
    MISSING = "[red]missing[/]"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table."""

    subject: str
    state: State
    detail: str
    remedy: str = ""


@takes_settings(EngineConfig, GatewayConfig, omit=("engine_addresses", "tokenizer_addresses"))
def doctor(flags: Flags) -> None:
    """Tell what this machine lacks for `mini-infer serve` with the same options.

    Exits with 1 where something is missing that is needed.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for heading in ("", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    findings = list(_findings(flags.load(EngineConfig), flags.load(GatewayConfig)))
    for each in findings:
        table.add_row(each.subject, each.state.value, escape(each.detail), escape(each.remedy))
    Console().print(table)
    if any(each.state is State.MISSING for each in findings):
        raise typer.Exit(1)


def _findings(engine: EngineConfig, gateway: GatewayConfig) -> Iterator[Finding]:
    yield Finding("Python", State.OK, platform.python_version())
    for component in _COMPONENTS:
        yield _packages(component)
    if importlib.util.find_spec("torch"):
        yield _device(engine.device)
    yield _triton()
    yield _model(engine)
    yield _port(gateway)
    yield _file_descriptors(gateway)
    yield _run_folder()


def _packages(component: str) -> Finding:
    """The packages that the extra of a component asks for."""
    requirements = importlib.metadata.requires("mini-infer") or []
    pattern = re.compile(rf"([\w.-]+).*extra == ['\"]{component}['\"]")
    names = [match[1] for text in requirements if (match := pattern.match(text))]
    found, lacking = [], []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    subject = f"{component} packages"
    if lacking:
        remedy = f"pip install 'mini-infer[{component}]'"
        return Finding(subject, State.MISSING, f"no {', '.join(lacking)}", remedy)
    return Finding(subject, State.OK, ", ".join(found))


def _device(wanted: str) -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return Finding("device", State.OK, ", ".join(sorted(names)))
    cpu = f"CPU, {torch.get_num_threads()} threads"
    if wanted.startswith("cuda"):
        return Finding("device", State.MISSING, cpu, "install a CUDA build of torch and a driver")
    return Finding("device", State.OK, cpu)


def _triton() -> Finding:
    try:
        return Finding("triton", State.OK, importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "triton", State.OPTIONAL, "not installed", "comes with a CUDA build of torch"
        )


def _model(config: EngineConfig) -> Finding:
    from mini_infer.hub import cached_model, is_hub_id

    if config.revision and not is_hub_id(config.model):
        detail = f"revision {config.revision} of a folder"
        return Finding("model", State.MISSING, detail, "pass a Hub id as --model, or no --revision")
    try:
        folder: Path | None = config.model_folder
        if is_hub_id(config.model):
            folder = cached_model(config.model, config.revision)
        if folder is None:
            remedy = "it is downloaded when the server starts"
            return Finding("model", State.OPTIONAL, f"{config.model} is not here yet", remedy)
        return _model_folder(folder)
    except ConfigError as error:
        detail, _, remedy = str(error).rpartition(": ")
        return Finding("model", State.MISSING, detail, remedy)


def _model_folder(folder: Path) -> Finding:
    check_folder(folder)
    lacking = [name for name in _MODEL_FILES if not os.access(folder / name, os.R_OK)]
    weights = (folder / name for name in names_in(folder) if name.endswith(".safetensors"))
    if not any(os.access(path, os.R_OK) for path in weights):
        lacking.append("*.safetensors")
    if lacking:
        detail = f"{folder}: no readable {', '.join(lacking)}"
        return Finding("model", State.MISSING, detail, "pass --model with a model folder")
    return Finding("model", State.OK, str(folder))


def _port(gateway: GatewayConfig) -> Finding:
    try:
        port = free_port(gateway.host, gateway.port)
    except ConfigError as error:
        detail, _, remedy = str(error).partition(": ")
        return Finding("port", State.MISSING, detail, remedy)
    return Finding("port", State.OK, f"{gateway.host}:{port} is free")


def _file_descriptors(gateway: GatewayConfig) -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = gateway.max_concurrent_requests + SPARE_FILE_DESCRIPTORS
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return Finding("file descriptors", State.OK, str(limit))
    remedy = f"ulimit -n {needed}, should {gateway.max_concurrent_requests} clients connect"
    return Finding("file descriptors", State.OPTIONAL, str(limit), remedy)


def _run_folder() -> Finding:
    from mini_infer.settings import socket_folders

    try:
        with run_folder(socket_folders()) as folder:
            return Finding("folder for sockets", State.OK, str(folder.parent))
    except ConfigError as error:
        detail, _, remedy = str(error).rpartition(": ")
        return Finding("folder for sockets", State.MISSING, detail, remedy)
