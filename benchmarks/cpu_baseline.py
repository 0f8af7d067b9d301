"""Speed of the demo model on this CPU: beside `transformers`, and one stream beside sixteen.

Part A decodes the same prompts one at a time in this process, with `LLMEngine` and with
`transformers.generate` in turns. Part B starts `mini-infer serve` and sends the same requests
through gRPC, one after the other and all at once in turns. Turns, because a machine's speed drifts;
medians, because it hiccups. Both must do the same work: greedy, end ids ignored, equal counts.

Writes `benchmarks/results/cpu_baseline.json` and exits with 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import environment
from mini_infer import AsyncClient, EngineConfig, LLMEngine
from mini_infer.config import bundled_model
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "cpu_baseline.json"
DECODE_BOUND = 3.0
"""Tokens/s of `LLMEngine`, batch 1, over those of `transformers.generate`."""
CONCURRENCY_BOUND = 4.0
"""Tokens/s of all the prompts' streams at once over those of one at a time, through gRPC."""
READY_S = 60.0
"""A server that is not ready after so long will not be."""

SUBJECTS = ("fox", "rabbit", "king", "dragon", "baker", "owl", "witch", "sailor")
OPENINGS = ("Once upon a time there was a {}", "Tell me a story about a {}")
PROMPTS = [opening.format(subject) for opening in OPENINGS for subject in SUBJECTS]
NUM_DECODE_PROMPTS = 4
"""Prompts of part A: enough to outlast a scheduling hiccup."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Two ways of doing the same work, measured in turns; all speeds in output tokens/s.

    Attributes:
        name: What is compared.
        first: Label of the way that should be fast.
        second: Label of the way that it is compared with.
        first_speeds: One a repeat.
        second_speeds: One a repeat.
        bound: The least acceptable ratio of the medians.
        details: Whatever else belongs to the result.
    """

    name: str
    first: str
    second: str
    first_speeds: list[float]
    second_speeds: list[float]
    bound: float
    details: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Median speed of the first over that of the second."""
        return statistics.median(self.first_speeds) / statistics.median(self.second_speeds)

    @property
    def is_met(self) -> bool:
        """Whether the ratio reaches the bound."""
        return self.ratio >= self.bound

    def as_json(self) -> dict[str, Any]:
        """Everything, as numbers that can be printed."""
        pairs = zip(self.first_speeds, self.second_speeds, strict=True)
        ratios = [one / other for one, other in pairs]
        return {
            **asdict(self),
            "first_median": statistics.median(self.first_speeds),
            "second_median": statistics.median(self.second_speeds),
            "ratio": self.ratio,
            "ratio_range": [min(ratios), max(ratios)],
            "is_met": self.is_met,
        }


class TransformersModel:
    """`transformers.generate` in float32 with its default cache and attention."""

    def __init__(self, folder: Path) -> None:
        """Loads the model.

        Args:
            folder: The model folder.
        """
        from transformers import GenerationConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # Without end ids: the folder's own would stop the text, or be forbidden until they may.
        self._model.generation_config = GenerationConfig(do_sample=False)  # type: ignore[no-untyped-call]
        self.num_threads = torch.get_num_threads()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """Continues prompts one at a time, greedily."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        outputs = []
        for prompt in prompts:
            input_ids = torch.tensor([prompt])
            output = self._model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=num_tokens
            )
            outputs.append(output[0, len(prompt) :].tolist())
        torch.set_num_threads(before)
        return outputs

    def choose_threads(self, prompts: Sequence[list[int]], num_tokens: int) -> None:
        """Takes the number of threads that is fastest for it: a small model may want one."""
        seconds = {}
        for count in sorted({1, torch.get_num_threads(), os.cpu_count() or 1}):
            self.num_threads = count
            tries = [timed(lambda: self.generate(prompts, num_tokens))[0] for _ in range(4)]
            seconds[count] = min(tries)
        self.num_threads = min(seconds, key=lambda count: seconds[count])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Runs something; gives the seconds that it took, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def encoded_prompts(folder: Path) -> list[list[int]]:
    """Encodes the prompts once, so that both sides get the same ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def measure_decode(folder: Path, prompts: list[list[int]], tokens: int, repeats: int) -> Case:
    """Part A: batch-1 decode in this process.

    Args:
        folder: The model folder.
        prompts: Ids of each prompt.
        tokens: Output tokens of each.
        repeats: Measured turns.

    Raises:
        ValueError: The two sides made different numbers of tokens.
    """
    reference = TransformersModel(folder)
    reference.choose_threads(prompts[:1], tokens)
    num_tokens = tokens * len(prompts)
    ours_speeds, reference_speeds = [], []
    with LLMEngine(EngineConfig(model=str(folder))) as engine:

        def ours() -> list[list[int]]:
            return [
                engine.generate([prompt], max_tokens=tokens, temperature=0.0, ignore_eos=True)[
                    0
                ].token_ids
                for prompt in prompts
            ]

        for turn in range(repeats + 1):
            our_seconds, our_ids = timed(ours)
            seconds, ids = timed(lambda: reference.generate(prompts, tokens))
            check_counts([*our_ids, *ids], tokens)
            if turn:  # The first one warms up.
                ours_speeds.append(num_tokens / our_seconds)
                reference_speeds.append(num_tokens / seconds)
    num_equal = sum(list(one) == list(other) for one, other in zip(our_ids, ids, strict=True))
    return Case(
        name="batch-1 decode",
        first="LLMEngine",
        second="transformers.generate",
        first_speeds=ours_speeds,
        second_speeds=reference_speeds,
        bound=DECODE_BOUND,
        details={
            "num_prompts": len(prompts),
            "tokens_each": tokens,
            "equal_outputs": num_equal,
            "transformers_threads": reference.num_threads,
        },
    )


def check_counts(outputs: Sequence[Sequence[int]], tokens: int) -> None:
    """Checks that every output has the length that was asked for."""
    counts = {len(each) for each in outputs}
    if counts != {tokens}:
        raise ValueError(f"expected {tokens} tokens from every request, got {sorted(counts)}")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Runs `mini-infer serve` on a free port; gives its address.

    Args:
        folder: The model folder.

    Raises:
        RuntimeError: It ended, or said nothing, before it was ready.
    """
    command = [sys.executable, "-m", "mini_infer.cli.main", "serve", "--port=0"]
    command.append(f"--model={folder}")
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        watchdog = threading.Timer(READY_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            watchdog.cancel()
            address = re.search(r"[\w.\[\]:]+:\d+", ready)
            if address is None:
                log.seek(0)
                raise RuntimeError(
                    f"the server was not ready within {READY_S:g} s; its log: "
                    + log.read().decode(errors="replace")
                )
            yield address.group()
        finally:
            watchdog.cancel()
            process.terminate()


async def measure_concurrency(folder: Path, tokens: int, repeats: int) -> Case:
    """Part B: the same requests through gRPC, one at a time and all at once.

    Args:
        folder: The model folder.
        tokens: Output tokens of each request.
        repeats: Measured turns.

    Raises:
        ValueError: A request got another number of tokens.
    """
    at_once, one_by_one = [], []
    with served(folder) as address:
        async with AsyncClient(address) as client:

            async def request(prompt: str) -> list[int]:
                stream = client.generate(
                    prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True
                )
                await stream.text()
                return stream.token_ids

            for turn in range(repeats + 1):
                started = time.perf_counter()
                together = await asyncio.gather(*map(request, PROMPTS))
                middle = time.perf_counter()
                alone = [await request(prompt) for prompt in PROMPTS]
                ended = time.perf_counter()
                check_counts([*together, *alone], tokens)
                if turn:  # The first one warms up.
                    at_once.append(tokens * len(PROMPTS) / (middle - started))
                    one_by_one.append(tokens * len(PROMPTS) / (ended - middle))
    num_equal = sum(one == other for one, other in zip(together, alone, strict=True))
    return Case(
        name="streams through gRPC",
        first=f"{len(PROMPTS)} at once",
        second="one at a time",
        first_speeds=at_once,
        second_speeds=one_by_one,
        bound=CONCURRENCY_BOUND,
        details={"tokens_each": tokens, "equal_outputs": num_equal},
    )


def print_cases(cases: Sequence[Case]) -> None:
    """Prints a table, then one line of JSON a case."""
    table = Table(title="Output tokens/s, median (least to most)")
    for heading in ("case", "this", "beside", "ratio", "bound", ""):
        table.add_column(heading)
    for case in cases:
        sides = []
        for label, speeds in ((case.first, case.first_speeds), (case.second, case.second_speeds)):
            spread = f"({min(speeds):.0f} to {max(speeds):.0f})"
            sides.append(f"{label}: {statistics.median(speeds):.0f} {spread}")
        verdict = "met" if case.is_met else "MISSED"
        table.add_row(case.name, *sides, f"{case.ratio:.2f}", f"{case.bound:g}", verdict)
    Console().print(table)
    for case in cases:
        print(json.dumps(case.as_json()))


def main() -> int:
    """Measures, prints, writes the result; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="measured turns, after a warm-up")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each request")
    arguments = parser.parse_args()
    folder = bundled_model("demo")
    prompts = encoded_prompts(folder)[:NUM_DECODE_PROMPTS]
    cases = [
        measure_decode(folder, prompts, arguments.tokens, arguments.repeats),
        asyncio.run(measure_concurrency(folder, arguments.tokens, arguments.repeats)),
    ]
    print_cases(cases)
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        **environment("torch", "transformers", "grpcio", "numpy"),
        "cases": [case.as_json() for case in cases],
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(case.is_met for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
