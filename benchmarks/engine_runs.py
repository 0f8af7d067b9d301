"""What benchmarks of the whole engine share: a model in this process, timed runs, and reports.

Every run has a scheduler of its own over the same model and KV cache, so that sides which differ
in the scheduler's settings can be measured in turns without loading anything twice.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from machine import environment
from mini_infer.config import EngineConfig, bundled_model
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.build import build_engine
from mini_infer_engine.build_scheduler import build_scheduler
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.step_updates import StepUpdates
from random_checkpoint import SHAPES, write_checkpoint
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
DEMO = "demo"
_FIRST_PLAIN_ID = 16
"""The ids below it are special ones in many vocabularies."""


@dataclass(frozen=True, slots=True)
class Request:
    """A greedy request of a fixed number of output tokens.

    Attributes:
        prompt_ids: The prompt.
        max_tokens: Output tokens; end ids are ordinary tokens.
        arrival_s: Seconds after the beginning of the run at which it comes.
    """

    prompt_ids: list[int]
    max_tokens: int
    arrival_s: float = 0.0


@dataclass(slots=True)
class Stream:
    """What became of a request; times in monotonic seconds.

    Attributes:
        request: What was asked for.
        arrival: When it should have come; it may have waited for a step under way.
        token_ids: The output.
        token_times: When each of them was there.
        num_cached_tokens: Prompt tokens that were not computed, as `Usage` tells clients.
    """

    request: Request
    arrival: float
    token_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_times[0] - self.arrival


@dataclass(frozen=True, slots=True)
class Step:
    """A step: its rows that decode, its prompt tokens, and the seconds from decision to tokens."""

    num_decodes: int
    num_prefill_tokens: int
    seconds: float


@dataclass(slots=True)
class Run:
    """Requests served to their ends.

    Attributes:
        streams: In the order of the requests.
        steps: In their order.
        seconds: From the first arrival to the last token.
    """

    streams: list[Stream]
    steps: list[Step]
    seconds: float

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all outputs."""
        return sum(len(each.token_ids) for each in self.streams)

    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return sum(each.num_prefill_tokens for each in self.steps)


class LocalEngine:
    """A loaded model and its KV cache in this process. One run at a time."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads the model; decode steps are never merged, so that every side does the same.

        Args:
            config: The settings from which each run's may differ.
        """
        self._config = config
        self._engine = build_engine(config)

    @property
    def device(self) -> torch.device:
        """What the model runs on."""
        return self._engine.cache_size.spec.device

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self._engine.served.max_model_len

    def scheduler(self, **settings: Any) -> Scheduler:
        """An idle scheduler over a cache in which nothing is known.

        Args:
            **settings: Of `EngineConfig`, in place of the engine's own: those of scheduling only.
        """
        size = self._engine.cache_size
        return build_scheduler(
            replace(self._config, **settings),
            num_blocks=size.num_blocks,
            num_host_blocks=size.num_host_blocks,
            costs=self._engine.scheduler.costs.coefficients,
        )

    def prompt(self, generator: random.Random, num_tokens: int) -> list[int]:
        """A prompt of random ids."""
        vocab_size = self._engine.served.config.vocab_size
        return generator.choices(range(_FIRST_PLAIN_ID, vocab_size), k=num_tokens)

    def run(self, scheduler: Scheduler, requests: Sequence[Request]) -> Run:
        """Serves requests that come at their times, all of them to their ends.

        Args:
            scheduler: Of this engine, idle; what its prefix cache knows is used.
            requests: Any number.

        Raises:
            MiniInferError: The scheduler refused a request.
            RuntimeError: A request failed or got another number of tokens than asked for.
        """
        started = time.monotonic()
        streams = [Stream(each, started + each.arrival_s) for each in requests]
        steps: list[Step] = []
        coming = deque(sorted(enumerate(streams), key=lambda pair: pair[1].arrival))
        while coming or not scheduler.is_idle:
            now = time.monotonic()
            if scheduler.is_idle and coming[0][1].arrival > now:
                time.sleep(coming[0][1].arrival - now)
            while coming and coming[0][1].arrival <= time.monotonic():
                self._add(scheduler, *coming.popleft())
            steps.append(self._step(scheduler, streams))
        for stream in streams:
            if len(stream.token_ids) != stream.request.max_tokens:
                asked, got = stream.request.max_tokens, len(stream.token_ids)
                raise RuntimeError(f"expected {asked} tokens for a request, got {got}")
        return Run(streams, steps, time.monotonic() - started)

    def _add(self, scheduler: Scheduler, number: int, stream: Stream) -> None:
        sampling = ResolvedSampling(
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            seed=0,
            max_tokens=stream.request.max_tokens,
            ignore_eos=True,
        )
        [sequence] = self._engine.served.sequences(
            [StreamKey(b"", number)], stream.request.prompt_ids, sampling, cache_scope=("",)
        )
        scheduler.add(sequence, now=time.monotonic())

    def _step(self, scheduler: Scheduler, streams: Sequence[Stream]) -> Step:
        started = time.monotonic()
        batch = scheduler.schedule(started)
        tokens = self._engine.runner.run(batch)
        now = time.monotonic()
        _note_updates(scheduler.finish_step(batch, tokens, now), streams, now)
        seconds = time.monotonic() - started
        return Step(batch.num_decodes, batch.num_tokens - batch.num_decodes, seconds)


def _note_updates(updates: StepUpdates, streams: Sequence[Stream], now: float) -> None:
    for update in updates:
        if update.error is not None:
            raise RuntimeError("a request failed") from update.error
        stream = streams[update.key.stream]
        stream.token_ids += update.token_ids
        stream.token_times += [now] * len(update.token_ids)
        if update.accounting is not None:
            stream.num_cached_tokens = update.accounting.num_cached_tokens


# --- command lines --------------------------------------------------------------------------------


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark of the engine takes.

    Args:
        doc: Of the script; its first line tells what it measures.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shape",
        choices=(DEMO, *SHAPES),
        default=DEMO,
        help="the demo model, or random weights of a known model's shape",
    )
    parser.add_argument(
        "--folder", type=Path, help="keeps the random weights, for the next run of this shape"
    )
    parser.add_argument("--quick", action="store_true", help="less work; the result is not saved")
    return parser


@contextmanager
def model_folder(arguments: argparse.Namespace) -> Iterator[str]:
    """The folder of the model that the command line asks for, written where need be."""
    if arguments.shape == DEMO:
        yield str(bundled_model(DEMO))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.folder or Path(temporary)
        # The engine tells others which tokenizer it goes with; this one is as good as any.
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.exists():
            write_checkpoint(folder, SHAPES[arguments.shape], device=arguments.device)
            shutil.copy(bundled_model(DEMO) / tokenizer.name, tokenizer)
        yield str(folder)


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A figure that must keep within bounds.

    Attributes:
        name: What the figure is.
        value: The figure.
        least: Its lower bound.
        most: Its upper bound.
    """

    name: str
    value: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def is_met(self) -> bool:
        """Whether it keeps within them."""
        return self.least <= self.value <= self.most

    @property
    def bound(self) -> str:
        """The bounds in words."""
        parts = [] if self.least == -math.inf else [f"at least {self.least:g}"]
        parts += [] if self.most == math.inf else [f"at most {self.most:g}"]
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Its line of the result."""
        value = float(f"{self.value:.4g}")
        return {"check": self.name, "value": value, "bound": self.bound, "is_met": self.is_met}


def percentile(values: Sequence[float], percent: float) -> float:
    """The least of the values that so many percent do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def median_range(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most of a figure's turns."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def report(
    name: str,
    arguments: argparse.Namespace,
    device: torch.device,
    cases: Sequence[Mapping[str, Any]],
    checks: Sequence[Check],
) -> int:
    """Prints checks as a table and cases as lines of JSON, and saves both.

    Args:
        name: Of the result's file, which ends in `_cuda` for a GPU.
        arguments: The command line.
        device: What the model ran on.
        cases: What was measured.
        checks: What must hold.

    Returns:
        The exit status: 1 where a bound is missed.
    """
    table = Table(title=f"{name} ({arguments.shape}, {device.type})")
    for heading in ("figure", "value", "bound", ""):
        table.add_column(heading)
    for check in checks:
        verdict = "met" if check.is_met else "MISSED"
        table.add_row(check.name, f"{check.value:.3g}", check.bound, verdict)
    Console().print(table)
    for line in (*cases, *(check.as_json() for check in checks)):
        print(json.dumps(line))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        result = {
            **environment("torch", "numpy"),
            "shape": arguments.shape,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "num_threads": torch.get_num_threads(),
            "checks": [check.as_json() for check in checks],
            "cases": list(cases),
        }
        path = RESULTS / (f"{name}_cuda.json" if device.type == "cuda" else f"{name}.json")
        path.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(check.is_met for check in checks) else 1
