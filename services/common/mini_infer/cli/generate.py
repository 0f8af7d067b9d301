"""`mini-infer generate`: continues a prompt, streaming to the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mini_infer.cli.sampling_options import takes_sampling
from mini_infer.cli.streaming import DEFAULT_ADDRESS, Address, StreamPrinter, connected


@takes_sampling()
def generate(
    sampling: dict[str, Any],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    address: Address = DEFAULT_ADDRESS,
    priority: Annotated[
        int | None,
        typer.Option(metavar="N", help="Scheduling class, -100 to 100; lower ones run first."),
    ] = None,
    cache_salt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Share cached prompts only with requests of the same salt."
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Print time to first token, tokens/s and steps to stderr."),
    ] = False,
) -> None:
    """Continue a prompt: the text appears as the server makes it.

    With --n, all completions are printed one after another, each under its number.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    options = {"priority": priority, "cache_salt": cache_salt, **sampling}
    with connected(address) as client:
        printer = StreamPrinter()
        with client.generate(text, **options) as stream:
            printer.print(stream)
    if stats:
        typer.echo(printer.describe(stream), err=True)
