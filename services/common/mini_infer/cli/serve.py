"""`mini-infer serve`: the three processes of one machine, started and supervised."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from mini_infer.cli.flags import Flags, takes_settings
from mini_infer.cli.run_folder import run_folder
from mini_infer.config import EngineConfig, GatewayConfig, TokenizerConfig
from mini_infer.errors import ConfigError
from mini_infer.supervisor import EXIT_CONFIG_ERROR, ChildProcess, ChildRefused, Supervisor

STOP_GRACE_S = 10.0
"""How long tokenizer and engine may take to end; the gateway gets its drain time on top."""
READY_TIMEOUT_S = 7 * 24 * 3600.0
"""Not a limit: how long a model loads is for whoever waits for the ready line to judge."""

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@takes_settings(
    EngineConfig, TokenizerConfig, GatewayConfig, omit=("engine_addresses", "tokenizer_addresses")
)
def serve(flags: Flags) -> None:
    """Serve a model: start gateway, tokenizer and engine on this machine, and keep them running.

    Prints one line with the address once requests are served; everything else goes to stderr.
    """
    flags.load(TokenizerConfig)
    gateway = flags.load(GatewayConfig)
    port = free_port(gateway.host, gateway.port)
    engine = flags.load_local(EngineConfig)
    model_name = engine.model_name

    async def announce() -> None:
        from mini_infer.async_client import AsyncClient

        async with AsyncClient(_join(_ANY_HOST.get(gateway.host, gateway.host), port)) as client:
            await client.wait_until_ready(READY_TIMEOUT_S)
        typer.echo(f"Mini-Infer serves {model_name} on {_join(gateway.host, port)}")

    from mini_infer.settings import socket_folders

    with run_folder(socket_folders()) as folder:
        children = _children(flags, engine, folder, port, gateway.drain_grace_s)
        try:
            asyncio.run(Supervisor(children).run(announce))
        except ChildRefused:
            raise typer.Exit(EXIT_CONFIG_ERROR) from None  # the child has said why


def process_command(name: str, arguments: Sequence[str]) -> list[str]:
    """The command line of another process of Mini-Infer that ends with this one.

    Args:
        name: A sub-command.
        arguments: Its arguments.
    """
    # -P: modules in the working directory do not replace installed ones.
    isolation = ["-P"] if sys.version_info >= (3, 11) else []
    python = [sys.executable, *isolation, "-m", "mini_infer.cli.main"]
    return [*python, name, f"--parent={os.getpid()}", *arguments]


def _children(
    flags: Flags, config: EngineConfig, folder: Path, port: int, drain_grace_s: float
) -> list[ChildProcess]:
    """The processes in the order of their start: the gateway is the first to be stopped."""
    engine, tokenizer = f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer"
    links = {"engine_addresses": [engine], "tokenizer_addresses": [tokenizer]}
    # A Hub id was looked up once, so that all of them read the same files, now and after a restart.
    model = {"model": config.model, "revision": config.revision}
    name = {"served_model_name": config.served_model_name}
    arguments = {
        "engine": flags.arguments(EngineConfig, {"address": engine, **model, **name}),
        "tokenizer": flags.arguments(TokenizerConfig, {"address": tokenizer, **model}),
        "gateway": flags.arguments(GatewayConfig, {"port": port, **links}),
    }
    grace_s = {"gateway": drain_grace_s + STOP_GRACE_S}
    return [
        ChildProcess(name, process_command(name, given), grace_s.get(name, STOP_GRACE_S))
        for name, given in arguments.items()
    ]


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0: a gateway that is started again needs the same one.

    Raises:
        ConfigError: Where somebody listens there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {_join(host, port)} ({error.strerror}): stop what listens "
                "there, or pass another --port"
            ) from None
        bound: int = probe.getsockname()[1]
        return bound


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
