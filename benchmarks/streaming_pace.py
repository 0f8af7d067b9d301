"""Do tokens leave as they are made? The gaps between a client's messages, at a scripted pace.

    python benchmarks/streaming_pace.py

An engine whose steps take 50 ms, a tokenizer and a gateway run as processes of their own; one
client notes when each message arrives. A token that waited for another would show as a short gap.
Writes `benchmarks/results/streaming_pace.json` and exits with 1 where a gap is below the bound.
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
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

from mini_infer import Client

RESULTS = Path(__file__).parent / "results" / "streaming_pace.json"
STEP_MS = 50
GAP_BOUND_MS = 45.0
READY_S = 60.0


def arrivals(address: str, num_tokens: int) -> list[float]:
    """Times (seconds) at which the messages of one stream arrive."""
    with Client(address) as client:
        client.wait_until_ready(READY_S)
        stream = client.generate("Once upon a time", max_tokens=num_tokens, seed=1)
        return [time.perf_counter() for _ in stream]


def measure(num_tokens: int, tokens_per_row: int) -> list[float]:
    """The gaps between messages, in milliseconds."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mi-"))
        engine, tokenizer = f"ipc://{folder}/engine", f"ipc://{folder}/tokenizer"
        pace = [f"--step-ms={STEP_MS}", f"--tokens-per-row={tokens_per_row}"]
        commands = [
            ["mini_infer_engine.scripted", "--address", engine, *pace],
            ["mini_infer_tokenizer", "--address", tokenizer],
            [
                *("mini_infer_gateway", "--port=0"),
                *("--engine-addresses", engine, "--tokenizer-addresses", tokenizer),
            ],
        ]
        for command in commands:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-u", "-m", *command],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            stack.callback(process.terminate)
        assert process.stdout is not None
        times = arrivals(process.stdout.readline().split()[-1], num_tokens)
    return [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(times)]


def main() -> int:
    """Measures rows of one and of three tokens and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100, help="messages of a stream")
    num_messages = parser.parse_args().messages
    cases = []
    for tokens_per_row in (1, 3):
        gaps = measure(num_messages * tokens_per_row, tokens_per_row)
        case = {
            "tokens_per_row": tokens_per_row,
            "num_messages": len(gaps) + 1,
            "min_gap_ms": round(min(gaps), 2),
            "median_gap_ms": round(statistics.median(gaps), 2),
            "max_gap_ms": round(max(gaps), 2),
        }
        cases.append(case)
        print(json.dumps(case))
    kept = all(
        case["min_gap_ms"] >= GAP_BOUND_MS and case["num_messages"] >= 0.95 * num_messages
        for case in cases
    )
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "step_ms": STEP_MS,
        "gap_bound_ms": GAP_BOUND_MS,
        "kept": kept,
        "cases": cases,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
