"""Speed of incremental detokenization: columnar steps of 256 streams, one id a row.

    python benchmarks/detokenize.py [--model FOLDER] [--save]

Measures what the tokenizer process does for a `TextStep`, sockets left out: tokens a second of one
core (CPU time, so that a busy machine matters less), for every kind of tokenizer or for that of a
model folder, without and with four stop strings a stream, and with sixteen of 1,024 bytes. Prints
one JSON line for each; `--save` writes them to results/detokenize.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tokenizer_kinds
from mini_infer.config import bundled_model
from mini_infer.messages import OpenText, TextStep
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.text_session import TextSession

RESULTS = Path(__file__).parent / "results" / "detokenize.json"
NUM_STREAMS = 256
NUM_STEPS = 1_000
NUM_REPEATS = 3
TEXT = "Once upon a time there was a fox who lived by the river. 狐は川のそばに住む。 👩‍👩‍👧 "
STOP_STRINGS = {
    "none": [],
    "4 short": ["\n\n", "</answer>", "Human:", "fox who sang"],
    # As large as a request may make them; each goes on for some tokens wherever "fox who" stands.
    "16 of 1,024 bytes": [("fox who " * 128)[:1022] + f"{index:02}" for index in range(16)],
}


def measure(tokenizer: TextTokenizer, stop: list[str]) -> float:
    """Tokens a second."""
    session = TextSession(Detokenizer(tokenizer))
    streams = list(range(NUM_STREAMS))
    for stream in streams:
        session.open(OpenText(stream, stop, True, False))
    text_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    steps = [
        TextStep(
            streams=streams,
            starts=[position] * NUM_STREAMS,
            counts=[1] * NUM_STREAMS,
            token_ids=[text_ids[(position + stream) % len(text_ids)] for stream in streams],
            last=[False] * NUM_STREAMS,
        )
        for position in range(NUM_STEPS)
    ]
    begin = time.process_time()
    for step in steps:
        session.step(step)
    return NUM_STREAMS * NUM_STEPS / (time.process_time() - begin)


def measure_all(tokenizer: TextTokenizer, kind: str) -> Iterator[dict[str, Any]]:
    """A result for each set of stop strings."""
    for stop_strings, stop in STOP_STRINGS.items():
        tokens_per_s = max(measure(tokenizer, stop) for _ in range(NUM_REPEATS))
        yield {"kind": kind, "stop_strings": stop_strings, "tokens_per_s": round(tokens_per_s)}


def main() -> None:
    """Measures, prints, and saves if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model folder, in place of every kind")
    parser.add_argument("--save", action="store_true", help=f"write results/{RESULTS.name}")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"demo": bundled_model("demo")}
        for kind in tokenizer_kinds.KINDS:
            folder = Path(scratch) / kind
            folder.mkdir()
            folders[kind] = tokenizer_kinds.write_folder(kind, folder)
        if arguments.model:
            folders = {arguments.model.name: arguments.model}
        for kind, folder in folders.items():
            for result in measure_all(TextTokenizer(folder), kind):
                print(json.dumps(result), flush=True)
                results.append(result)
    if arguments.save:
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "num_streams": NUM_STREAMS,
            "cases": results,
        }
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
