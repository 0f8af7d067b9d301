"""What measurements of the scheduler share: requests, a machine of simulated time, and reports.

The scheduler is the real one. Only the model is missing: tokens are made up, and a clock that
nobody waits for says how long steps take, so results are the same on every machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import environment
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import FinishCode
from mini_infer.resolved_sampling import ResolvedSampling
from mini_infer_engine.batch import ScheduledBatch, StepTokens
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import Sequence, StreamKey
from mini_infer_engine.step_costs import StepCoefficients, StepCosts, StepWork
from mini_infer_engine.step_updates import SequenceUpdate
from rich.console import Console
from rich.table import Table

OWNER = b"gateway"
END_ID = 2
OTHER_ID = 3
VOCAB_SIZE = 32_000
MEAN_PROMPT_TOKENS = 220
MEAN_OUTPUT_TOKENS = 200
SIGMA = 0.8
"""Of the logarithm of both lengths: the longest hundredth is above 4.7 times the mean."""
MAX_HALF = 1024
"""Tokens of a prompt at most, and of an output; longer ones are cut."""
MAX_MODEL_LEN = 2 * MAX_HALF

MACHINE = StepCoefficients(
    step_s=8e-3, row_s=20e-6, context_s=20e-9, token_s=20e-6, pair_s=20e-9, block_s=80e-6
)
"""The simulated machine. To compute 16 tokens costs 320 us, to copy a block there and back 160."""
_MACHINE_COSTS = StepCosts(MACHINE)
NOISE = 0.03
"""Standard deviation of a step's time, relative."""
ROUGH_GUESS = StepCoefficients(
    step_s=5e-3, row_s=30e-6, context_s=30e-9, token_s=30e-6, pair_s=30e-9, block_s=100e-6
)
"""What the scheduler is told about the machine before its first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asks for, and how long the answer comes to be.

    Attributes:
        stream: Its number.
        arrival: Simulated seconds.
        prompt_ids: Random, so that no two requests share a block.
        num_output_tokens: The last of them is the end id.
        max_tokens: What the client allows, up to four times as many.
    """

    stream: int
    arrival: float
    prompt_ids: list[int]
    num_output_tokens: int
    max_tokens: int

    def sequence(self, deadline: float | None = None) -> Sequence:
        """The request as the engine sees it.

        Args:
            deadline: Simulated seconds, or None.
        """
        sequence = Sequence(
            StreamKey(OWNER, self.stream),
            self.prompt_ids,
            ResolvedSampling(
                temperature=1.0, top_k=0, top_p=1.0, seed=self.stream, max_tokens=self.max_tokens
            ),
            eos_token_ids=(END_ID,),
            deadline=deadline,
            cache_scope=("", ""),
        )
        sequence.times.arrival = self.arrival
        return sequence


def draw_requests(count: int, per_second: float, seed: int) -> list[Request]:
    """Requests with lognormal lengths, in the order of their Poisson arrivals.

    Args:
        count: How many.
        per_second: Arrivals a simulated second; `math.inf`: all at once.
        seed: Of everything that is drawn.
    """
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / per_second, count))
    prompts = _lognormal(random, MEAN_PROMPT_TOKENS, count)
    outputs = _lognormal(random, MEAN_OUTPUT_TOKENS, count)
    allowed = np.minimum(outputs * random.uniform(1, 4, count), MAX_HALF).astype(int)
    return [
        Request(
            stream=stream,
            arrival=float(arrivals[stream]),
            prompt_ids=random.integers(OTHER_ID, VOCAB_SIZE, prompts[stream]).tolist(),
            num_output_tokens=int(outputs[stream]),
            max_tokens=int(allowed[stream]),
        )
        for stream in range(count)
    ]


def _lognormal(random: np.random.Generator, mean: float, count: int) -> Any:
    lengths = random.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, count)
    return np.clip(np.rint(lengths), 1, MAX_HALF).astype(int)


class SimulatedMachine:
    """Makes up the tokens of steps, and how long they take."""

    def __init__(self, requests: Seq[Request], seed: int) -> None:
        """Takes the requests whose output it makes.

        Args:
            requests: Their lengths are kept to.
            seed: Of the noise of the steps' times.
        """
        self._num_output_tokens = {each.stream: each.num_output_tokens for each in requests}
        self._random = np.random.default_rng(seed)

    def run(self, batch: ScheduledBatch) -> tuple[StepTokens, float]:
        """A step's tokens, and its simulated seconds."""
        columns = batch.sampling
        rows = zip(columns.rows.tolist(), columns.positions.tolist(), strict=True)
        token_ids = [
            END_ID if position + 1 >= self._num_output_tokens[batch.keys[row].stream] else OTHER_ID
            for row, position in rows
        ]
        tokens = StepTokens(
            np.array(token_ids, np.int64).reshape(-1, 1), np.zeros(len(token_ids), np.int32)
        )
        if batch.is_empty:
            return tokens, 0.0
        return tokens, step_seconds(work_of(batch)) * max(0.5, self._random.normal(1.0, NOISE))


def work_of(batch: ScheduledBatch) -> StepWork:
    """What a step does."""
    split = batch.num_decodes
    work = StepWork(
        num_decodes=split,
        num_context_tokens=int(batch.num_computed_tokens[:split].sum()),
        num_swapped_blocks=len(batch.swap_outs) + len(batch.swap_ins),
    )
    chunks = zip(
        batch.num_scheduled_tokens[split:].tolist(),
        batch.num_computed_tokens[split:].tolist(),
        strict=True,
    )
    for num_tokens, num_context_tokens in chunks:
        work = work.with_chunk(num_tokens, num_context_tokens)
    return work


def step_seconds(work: StepWork) -> float:
    """How long a step takes on the simulated machine, without noise."""
    return _MACHINE_COSTS.seconds(work)


@dataclass(slots=True)
class Outcome:
    """What became of a request; times in simulated seconds.

    Attributes:
        refusal: Why it was refused, if it was.
        first_token: When it came, or None.
        ended: When the last update came, or None.
        finish_code: How it ended; RUNNING: it has not, or was refused or cancelled.
    """

    refusal: ErrorReason | None = None
    first_token: float | None = None
    ended: float | None = None
    finish_code: FinishCode = FinishCode.RUNNING


class Replay:
    """Requests that come to a scheduler in simulated time.

    Attributes:
        scheduler: The real one.
        now: Simulated seconds.
        step_began: When the last step did.
        sequences: Those that have been accepted and have not ended, by stream.
        outcomes: Those of all requests that have come, by stream.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Seq[Request], deadlines: Mapping[int, float]
    ) -> None:
        """Starts at time 0.

        Args:
            scheduler: Idle.
            requests: In order of arrival.
            deadlines: What the scheduler is told, by stream.
        """
        self.scheduler = scheduler
        self.now = self.step_began = 0.0
        self.sequences: dict[int, Sequence] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._machine = SimulatedMachine(requests, seed=1)
        self._requests = requests
        self._deadlines = deadlines

    @property
    def is_done(self) -> bool:
        """Whether all requests have come and ended."""
        return len(self.outcomes) == len(self._requests) and self.scheduler.is_idle

    def step(self) -> ScheduledBatch:
        """Lets those that have come by now queue, and runs a step; gives its batch."""
        if self.scheduler.is_idle and self._next is not None:
            self.now = max(self.now, self._next.arrival)
        while self._next is not None and self._next.arrival <= self.now:
            self.submit(self._next)
        self.step_began = self.now
        batch = self.scheduler.schedule(self.now)
        tokens, seconds = self._machine.run(batch)
        self.now += seconds
        for update in self.scheduler.finish_step(batch, tokens, self.now):
            self._note(update)
        return batch

    def submit(self, request: Request) -> None:
        """A request comes; the scheduler takes or refuses it."""
        outcome = self.outcomes[request.stream] = Outcome()
        sequence = request.sequence(self._deadlines.get(request.stream))
        try:
            self.scheduler.add(sequence, now=self.now)
        except MiniInferError as error:
            outcome.refusal = error.reason
        else:
            self.sequences[request.stream] = sequence

    def cancel(self, stream: int) -> None:
        """A client gives its request up, if it has not ended."""
        if self.sequences.pop(stream, None) is not None:
            self.scheduler.abort(StreamKey(OWNER, stream), self.now)

    @property
    def _next(self) -> Request | None:
        num_come = len(self.outcomes)
        return self._requests[num_come] if num_come < len(self._requests) else None

    def _note(self, update: SequenceUpdate) -> None:
        outcome = self.outcomes[update.key.stream]
        if update.token_ids and outcome.first_token is None:
            outcome.first_token = self.now
        if update.finish_code is not FinishCode.RUNNING:
            outcome.ended, outcome.finish_code = self.now, update.finish_code
            del self.sequences[update.key.stream]


def print_cases(title: str, cases: Seq[Mapping[str, Any]], measures: Seq[str]) -> None:
    """Prints a table, a column a case, then one line of JSON a case.

    Args:
        title: Of the table.
        cases: What was measured, by name; their `case` heads the column.
        measures: Those that the table shows, in rows.
    """
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for case in cases:
        table.add_column(case["case"], justify="right")
    for measure in measures:
        table.add_row(measure, *(_shown(case.get(measure)) for case in cases))
    Console().print(table)
    for case in cases:
        print(json.dumps(case))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def write_results(path: Path, settings: Mapping[str, Any], cases: Seq[Any]) -> None:
    """Writes a result file: where and with what it was measured, and the cases."""
    result = {**environment("numpy"), **settings, "cases": list(cases)}
    path.write_text(json.dumps(result, indent=2) + "\n")
