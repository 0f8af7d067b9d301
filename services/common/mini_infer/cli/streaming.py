"""What `generate`, `chat` and `demo` share: sampling options, a client, a stream that prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mini_infer.cli.options import field_options, take_given, with_options
from mini_infer.config import DEFAULT_PORT
from mini_infer.errors import ConfigError
from mini_infer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mini_infer.client import Client, GenerationStream

DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"
CONNECT_TIMEOUT_S = 5.0

Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")]


def takes_sampling(
    *, omit: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the fields of `SamplingParams` as options.

    Args:
        omit: Fields that are no options of the command.

    Returns:
        A decorator that makes a function for typer; the command gets the options that were given
        as its first argument.
    """
    options = field_options(SamplingParams, omit)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(ctx: typer.Context, **arguments: Any) -> None:
            sampling = take_given(ctx, arguments, options)
            command(sampling, **arguments)

        return with_options(run, command, options)

    return decorate


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of a server that answers.

    Raises:
        ConfigError: Where none does.
    """
    from mini_infer.client import Client, RequestFailed

    with Client(address) as client:
        try:
            client.server_info(timeout=CONNECT_TIMEOUT_S)
        except RequestFailed as error:
            raise ConfigError(
                f"no server answers on {address}: start one with `mini-infer serve`, or pass "
                "another --address"
            ) from error
        yield client


class StreamPrinter:
    """Prints one answer as it comes; make it when the request is sent.

    Attributes:
        text: What was printed so far of the first completion.
        arrivals_s: When each chunk came, in seconds since the request.
    """

    def __init__(self) -> None:
        """Starts the clock."""
        self.text = ""
        self.arrivals_s: list[float] = []
        self._sent_at = time.monotonic()

    def print(self, stream: GenerationStream) -> None:
        """Prints the chunks, and a line's end behind the last one.

        Of several completions, each under its number, only the first one is printed as it comes.

        Raises:
            RequestFailed: As the server says.
        """
        if len(stream.choices) > 1:
            print("[0]")
        try:
            for chunk in stream:
                self.arrivals_s.append(time.monotonic() - self._sent_at)
                if chunk.choice_index == 0:
                    self.text += chunk.text
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
        finally:
            print()
            for index, choice in enumerate(stream.choices[1:], start=1):
                print(f"[{index}]\n{choice.text}")

    def describe(self, stream: GenerationStream) -> str:
        """One line about the speed of a stream that was printed."""
        if not self.arrivals_s:
            return "no output"
        num_tokens = sum(len(choice.token_ids) for choice in stream.choices)
        parts = [
            f"TTFT {1000 * self.arrivals_s[0]:.0f} ms",
            f"{num_tokens / self.arrivals_s[-1]:.1f} tokens/s",
            f"{num_tokens} tokens in {len(self.arrivals_s)} messages",
        ]
        if stream.accounting is not None:
            parts.append(f"{stream.accounting.num_steps} steps")
        return ", ".join(parts)
