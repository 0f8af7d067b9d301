"""`mini-infer generate`: continues a prompt, streaming to the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mini_infer.cli.streaming import (
    DEFAULT_ADDRESS,
    Address,
    StreamPrinter,
    connected,
    takes_sampling,
)


@takes_sampling
def generate(
    sampling: dict[str, Any],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    address: Address = DEFAULT_ADDRESS,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Print time to first token, tokens/s and steps to stderr."),
    ] = False,
) -> None:
    """Continue a prompt: the text appears as the server makes it."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with connected(address) as client:
        printer = StreamPrinter()
        with client.generate(text, **sampling) as stream:
            printer.print(stream)
    if stats:
        typer.echo(printer.describe(stream), err=True)
