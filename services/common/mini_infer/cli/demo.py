"""`mini-infer demo`: starts a server with the demo model and streams a story from it."""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Annotated

import typer

from mini_infer.cli.serve import process_command
from mini_infer.cli.streaming import StreamPrinter, connected
from mini_infer.errors import ConfigError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
DEFAULT_PROMPT = "Tell me a story about a little fox and a lantern."


def demo(
    prompt: Annotated[
        str, typer.Argument(help="What to say to the model.", show_default=True)
    ] = DEFAULT_PROMPT,
    seed: Annotated[int, typer.Option(help="Another seed, another story.")] = 7,
    max_tokens: Annotated[
        int, typer.Option(metavar="TOKENS", help="Length of the answer at most.")
    ] = 400,
) -> None:
    """Start gateway, tokenizer and engine with the demo model, and stream an answer."""
    with _server() as address, connected(address) as client:
        typer.echo(f"> {prompt}")
        printer = StreamPrinter()
        messages = [{"role": "user", "content": prompt}]
        with client.generate(messages, seed=seed, max_tokens=max_tokens) as stream:
            printer.print(stream)
        typer.echo(printer.describe(stream))


@contextmanager
def _server() -> Iterator[str]:
    """A server on a free port, with its address; its log is shown only where it fails."""
    arguments = ["--port=0", "--model=", "--revision=", "--log-level=warning"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(
            process_command("serve", arguments),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as server,
    ):
        try:
            yield _read_address(server, log)
        finally:
            server.terminate()
            server.wait(STOP_TIMEOUT_S)


def _read_address(server: subprocess.Popen[str], log: IO[str]) -> str:
    """Waits for the server's ready line, whose last word is the address."""
    assert server.stdout is not None
    is_readable, _, _ = select.select([server.stdout], [], [], START_TIMEOUT_S)
    line = server.stdout.readline() if is_readable else ""
    if not line:
        log.seek(0)
        sys.stderr.write(log.read())
        raise ConfigError("the server did not start: `mini-infer doctor` tells what is missing")
    return line.split()[-1]
