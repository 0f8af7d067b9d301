"""The commands that run one process: what the containers of a deployment start.

Each blocks until SIGTERM or SIGINT has been obeyed, and prints one line when it is ready.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mini_infer.cli.flags import Flags, takes_settings
from mini_infer.cli.progress import byte_progress
from mini_infer.config import EngineConfig, GatewayConfig, TokenizerConfig

Address = Annotated[
    str,
    typer.Option(
        metavar="ipc://PATH",
        help="Where gateways connect: a socket in a folder of mode 0700 of this user.",
    ),
]


@takes_settings(GatewayConfig)
def gateway(flags: Flags) -> None:
    """Run a gateway: it speaks gRPC with clients."""
    config = flags.load(GatewayConfig)
    from mini_infer_gateway.server import run

    run(config, lambda address: typer.echo(f"The gateway listens on {address}"))


@takes_settings(TokenizerConfig)
def tokenizer(flags: Flags, address: Address) -> None:
    """Run a tokenizer process: it turns text into token ids and back."""
    config = flags.load_local(TokenizerConfig)
    from mini_infer_tokenizer.server import run

    run(config, address, lambda: typer.echo("The tokenizer is ready"))


@takes_settings(EngineConfig)
def engine(flags: Flags, address: Address) -> None:
    """Run an engine: it runs the model."""
    config = flags.load_local(EngineConfig)
    from mini_infer_engine.server import run

    loading = byte_progress("Loading weights")
    run(config, address, lambda: typer.echo("The engine is ready"), loading)
