"""`mini-infer chat`: a conversation in the terminal."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mini_infer.cli.failures import sentence
from mini_infer.cli.sampling_options import takes_sampling
from mini_infer.cli.streaming import DEFAULT_ADDRESS, Address, StreamPrinter, connected

if TYPE_CHECKING:
    from mini_infer.client import Client


@takes_sampling(omit={"n"})
def chat(
    sampling: dict[str, Any],
    address: Address = DEFAULT_ADDRESS,
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is told first.")] = "",
) -> None:
    """Talk to the model, which is sent the whole conversation each time.

    /clear forgets the conversation, /quit ends; Ctrl-C stops an answer.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401 - gives input() a history and line editing
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text then fail with the question that they are in.
        sys.stdin.reconfigure(errors="surrogateescape")
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    with connected(address) as client:
        while (said := _read_line(prompt)) != "/quit":
            if said == "/clear":
                messages = list(beginning)
            elif said:
                messages = _answer(client, [*messages, {"role": "user", "content": said}], sampling)


def _read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return "/quit"


def _answer(
    client: Client, messages: list[dict[str, str]], sampling: dict[str, Any]
) -> list[dict[str, str]]:
    """Prints the answer; returns the conversation with it, or without a question that failed."""
    printer = StreamPrinter()
    try:
        with client.generate(messages, **sampling) as stream:
            printer.print(stream)
    except KeyboardInterrupt:
        pass  # what was printed so far is the answer
    except Exception as error:
        explanation = sentence(error)
        if explanation is None:
            raise
        typer.echo(f"mini-infer: {explanation}", err=True)
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": printer.text}]
