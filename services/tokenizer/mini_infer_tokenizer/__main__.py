"""`python -m mini_infer_tokenizer`: the tokenizer process by itself."""

from __future__ import annotations

from typing import Annotated

import typer
from mini_infer import logs
from mini_infer.config import TokenizerConfig
from mini_infer.errors import ConfigError

from mini_infer_tokenizer.server import run


def main(
    address: Annotated[
        str, typer.Option(help="Where gateways connect: ipc:// and a path in a 0700 folder.")
    ],
    model: Annotated[str, typer.Option(help="Model folder; the demo model by default.")] = "",
    num_encode_threads: Annotated[int, typer.Option(help="Threads that encode prompts.")] = 2,
) -> None:
    """Turns text into token ids and back for gateways."""
    logs.configure("tokenizer", "info")
    try:
        config = TokenizerConfig(model=model, num_encode_threads=num_encode_threads)
        run(config, address)
    except ConfigError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
