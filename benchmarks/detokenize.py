"""Speed of incremental detokenization: columnar steps of 256 streams, one id a row.

    python benchmarks/detokenize.py [--model FOLDER] [--stop]

Measures what the tokenizer process does for a `TextStep`, sockets left out: tokens a second of one
core (CPU time, so that a busy machine matters less). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from mini_infer.config import bundled_model
from mini_infer.messages import OpenText, TextStep
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.text_session import TextSession

NUM_STREAMS = 256
NUM_STEPS = 1_000
TEXT = "Once upon a time there was a fox who lived by the river. 狐は川のそばに住む。 👩‍👩‍👧 "


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


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=bundled_model("demo"), help="model folder")
    parser.add_argument("--stop", action="store_true", help="each stream has 4 stop strings")
    arguments = parser.parse_args()
    stop = ["\n\n", "</answer>", "Human:", "fox who sang"] if arguments.stop else []
    tokens_per_s = max(measure(TextTokenizer(arguments.model), stop) for _ in range(3))
    result = {
        "benchmark": "detokenize",
        "model": arguments.model.name,
        "num_streams": NUM_STREAMS,
        "num_stop_strings": len(stop),
        "tokens_per_s": round(tokens_per_s),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
