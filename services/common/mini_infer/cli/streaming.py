"""What `generate`, `chat` and `demo` share: sampling options, a client, a stream that prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
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


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the fields of `SamplingParams` as options.

    Returns:
        A function for typer; the command gets the options that were given as its first argument.
    """
    options = field_options(SamplingParams)

    def run(ctx: typer.Context, **arguments: Any) -> None:
        sampling = take_given(ctx, arguments, options)
        command(sampling, **arguments)

    return with_options(run, command, options)


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
        text: What was printed so far.
        arrivals_s: When each chunk came, in seconds since the request.
    """

    def __init__(self) -> None:
        """Starts the clock."""
        self.text = ""
        self.arrivals_s: list[float] = []
        self._sent_at = time.monotonic()

    def print(self, stream: GenerationStream) -> None:
        """Prints the chunks, and a line's end behind the last one.

        Raises:
            RequestFailed: As the server says.
        """
        try:
            for chunk in stream:
                self.arrivals_s.append(time.monotonic() - self._sent_at)
                self.text += chunk.text
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        finally:
            print()

    def describe(self, stream: GenerationStream) -> str:
        """One line about the speed of a stream that was printed."""
        if not self.arrivals_s:
            return "no output"
        num_tokens = len(stream.token_ids)
        parts = [
            f"TTFT {1000 * self.arrivals_s[0]:.0f} ms",
            f"{num_tokens / self.arrivals_s[-1]:.1f} tokens/s",
            f"{num_tokens} tokens in {len(self.arrivals_s)} messages",
        ]
        if stream.accounting is not None:
            parts.append(f"{stream.accounting.num_steps} steps")
        return ", ".join(parts)
