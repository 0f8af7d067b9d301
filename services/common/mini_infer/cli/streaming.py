"""What `generate`, `chat` and `demo` share: a client, and a stream that is printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mini_infer.config import DEFAULT_PORT
from mini_infer.errors import ConfigError

if TYPE_CHECKING:
    from mini_infer.client import Choice, Client, GenerationStream
    from mini_infer.logprobs import TokenLogprobs

DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"
CONNECT_TIMEOUT_S = 5.0

Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")]


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
        Log-probabilities, where they were asked for, are tables behind the text.

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
            if stream.prompt_logprobs:
                positions = range(1, 1 + len(stream.prompt_logprobs))
                _print_table("prompt", positions, stream.prompt_logprobs)
            _print_logprobs(stream.choices[0])
            for index, choice in enumerate(stream.choices[1:], start=1):
                print(f"[{index}]\n{choice.text}")
                _print_logprobs(choice)

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


def _print_logprobs(choice: Choice) -> None:
    if choice.logprobs:
        _print_table("token id", choice.token_ids, choice.logprobs)


def _print_table(title: str, rows: Iterable[int], logprobs: Sequence[TokenLogprobs]) -> None:
    """Prints a line for each token: what it is, its log-probability and rank, the likeliest."""
    print(f"{title:>8} {'logprob':>9} {'rank':>6}  likeliest")
    for row, each in zip(rows, logprobs, strict=True):
        likeliest = ", ".join(f"{top.token_id} ({top.logprob:.3f})" for top in each.top)
        print(f"{row:>8} {each.logprob:>9.3f} {each.rank:>6}  {likeliest}".rstrip())
