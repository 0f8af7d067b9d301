"""`python -m mini_infer_gateway`: the gateway process by itself."""

from __future__ import annotations

from typing import Annotated

import typer
from mini_infer import logs
from mini_infer.config import DEFAULT_PORT, GatewayConfig
from mini_infer.errors import ConfigError

from mini_infer_gateway.server import run


def main(
    engine: Annotated[list[str], typer.Option(help="ZeroMQ address of an engine, ipc://.")],
    tokenizer: Annotated[list[str], typer.Option(help="ZeroMQ address of a tokenizer, ipc://.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.")] = DEFAULT_PORT,
) -> None:
    """Speaks gRPC with clients; prints the address when it listens."""
    logs.configure("gateway", "info")
    try:
        config = GatewayConfig(
            host=host,
            port=port,
            engine_addresses=tuple(engine),
            tokenizer_addresses=tuple(tokenizer),
        )
        run(config, typer.echo)
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
