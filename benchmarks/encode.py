"""Do long prompts delay short ones? Encoding through a real tokenizer process and its socket.

    python benchmarks/encode.py [--model FOLDER] [--seconds 10] [--save]

A gateway's end of the link asks for prompts of 20 bytes at a steady pace, first alone, then while
two prompts of a megabyte are always waiting. Prints the latencies of both as one JSON line each,
and the milliseconds that a long prompt takes; `--save` writes them to results/encode.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import zmq
from mini_infer.channel import connect_dealer
from mini_infer.config import bundled_model
from mini_infer.messages import (
    PROTOCOL_VERSION,
    Encoded,
    EncodeText,
    GatewayBeat,
    Hello,
    Message,
    TokenizerWelcome,
    encode,
    from_tokenizer_decoder,
)

RESULTS = Path(__file__).parent / "results" / "encode.json"
SHORT_TEXT = "A fox by the river. "
LONG_TEXT = (SHORT_TEXT * (2**20 // len(SHORT_TEXT) + 1))[: 2**20]
PACE_S = 0.004
NUM_LONG_IN_FLIGHT = 2
START_S = 30


class Link:
    """A gateway's end of the link to a tokenizer process."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        """Connects and says Hello."""
        self._socket = connect_dealer(context, address, "benchmark")
        self.send(Hello(PROTOCOL_VERSION, "benchmark"))
        welcome = self.receive(START_S)
        if not welcome or not isinstance(from_tokenizer_decoder.decode(welcome), TokenizerWelcome):
            raise SystemExit("the tokenizer did not start")

    def send(self, message: Message) -> None:
        """Sends a message."""
        self._socket.send(encode(message))

    def receive(self, timeout_s: float) -> bytes | None:
        """The next frame, or None."""
        return self._socket.recv() if self._socket.poll(int(timeout_s * 1000)) else None


@contextmanager
def tokenizer_process(model: Path) -> Iterator[Link]:
    """A tokenizer process over a model folder, and a link to it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        address = f"ipc://{folder}/tokenizer"
        command = [sys.executable, "-m", "mini_infer_tokenizer", "--address", address]
        process = subprocess.Popen([*command, "--model", str(model)], stderr=subprocess.DEVNULL)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            yield Link(context, address)
        finally:
            context.destroy(linger=0)
            process.terminate()
            process.wait()


def measure(link: Link, seconds: float, num_long: int) -> dict[str, Any]:
    """Latencies of short prompts while so many long ones are waiting.

    Returns:
        Percentiles in milliseconds; of the long prompts the median from one answer to the next.
    """
    short_ms, long_at = [], [time.perf_counter()]
    begun: dict[int, float] = {}
    numbers = itertools.count()
    for _ in range(num_long):
        link.send(EncodeText(next(numbers), LONG_TEXT, False))
    next_at = time.perf_counter()
    end = next_at + seconds
    while (now := time.perf_counter()) < end or begun:
        if next_at <= now < end:
            next_at += PACE_S
            number = next(numbers)
            begun[number] = now
            link.send(EncodeText(number, SHORT_TEXT, False))
            if number % 500 == 0:
                link.send(GatewayBeat([]))
        frame = link.receive(timeout_s=0.001)
        if frame is None:
            continue
        if len(frame) > len(LONG_TEXT) / 10:  # Not decoded: that would delay short ones here.
            long_at.append(time.perf_counter())
            link.send(EncodeText(next(numbers), LONG_TEXT, False))
            continue
        answer = from_tokenizer_decoder.decode(frame)
        if isinstance(answer, Encoded):
            short_ms.append((time.perf_counter() - begun.pop(answer.job)) * 1000)
    percentiles = statistics.quantiles(short_ms, n=100)
    gaps = [(after - before) * 1000 for before, after in itertools.pairwise(long_at)]
    return {
        "long_prompts_waiting": num_long,
        "num_short": len(short_ms),
        "short_p50_ms": round(percentiles[49], 2),
        "short_p99_ms": round(percentiles[98], 2),
        "short_max_ms": round(max(short_ms), 2),
        "long_ms": round(statistics.median(gaps), 1) if gaps else None,
    }


def main() -> None:
    """Measures, prints, and saves if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=bundled_model("demo"), help="model folder")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    arguments = parser.parse_args()
    cases = []
    with tokenizer_process(arguments.model) as link:
        for num_long in (0, NUM_LONG_IN_FLIGHT):
            cases.append(measure(link, arguments.seconds, num_long))
            print(json.dumps(cases[-1]), flush=True)
    if arguments.save:
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "model": arguments.model.name,
            "cases": cases,
        }
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
