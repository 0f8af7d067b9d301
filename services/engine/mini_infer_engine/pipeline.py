"""Steps from schedule to tokens: on a GPU one is launched behind the one that is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from mini_infer_engine.batch import FillMasks, LaunchedTokens, ScheduledBatch, TokenMasks
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import Sequence as EngineSequence
from mini_infer_engine.step_updates import StepUpdates


class Runner(Protocol):
    """Whatever makes tokens."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the one before has been waited for."""
        ...

    def launch(self, batch: ScheduledBatch, fill_masks: FillMasks) -> LaunchedTokens:
        """Computes a batch, which may be empty, and chooses the next tokens.

        Args:
            batch: The step.
            fill_masks: Gives the masks of its rows; called at most once, and as late as can be.
        """
        ...


class LaunchedBatch(NamedTuple):
    """A step under way, and since when."""

    batch: ScheduledBatch
    tokens: LaunchedTokens
    started: float


class FinishedBatch(NamedTuple):
    """A step that is done, what became of its sequences, and the seconds that it took."""

    batch: ScheduledBatch
    updates: StepUpdates
    seconds: float


class StepPipeline:
    """Owns the steps under way: at most two, the second one scheduled ahead."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        fill_masks: Callable[[Sequence[EngineSequence]], TokenMasks],
    ) -> None:
        """Takes over an idle scheduler and its runner.

        Args:
            scheduler: The queues.
            runner: Makes tokens.
            fill_masks: Gives the masks of sequences (`ServedModel.fill_masks`).
        """
        self._scheduler = scheduler
        self._runner = runner
        self._fill_masks = fill_masks
        self._ahead: LaunchedBatch | None = None
        self._last_finished = 0.0

    @property
    def is_under_way(self) -> bool:
        """Whether the device is at a step while none is waited for."""
        return self._ahead is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way or to be done."""
        return self._ahead is None and self._scheduler.is_idle

    def launch(self, before: Callable[[int], None] | None = None) -> LaunchedBatch:
        """Launches the next step, and the one behind it where that does not need its tokens.

        Args:
            before: Called before each launch with the number of tokens that will be under way.

        Returns:
            The step to `finish` next; empty where there is nothing to do.
        """
        step = self._ahead
        if step is None:
            step = self._launch(self._scheduler.schedule(time.monotonic()), 0, before)
        self._ahead = None
        if self._runner.runs_ahead:
            batch = self._scheduler.schedule_ahead(step.batch, time.monotonic())
            if batch is not None:
                self._ahead = self._launch(batch, step.batch.num_tokens, before)
        return step

    def finish(self, step: LaunchedBatch) -> FinishedBatch:
        """Waits for a step and lets the scheduler take its tokens in."""
        tokens = step.tokens()
        now = time.monotonic()
        seconds = now - max(step.started, self._last_finished)
        self._last_finished = now
        updates = self._scheduler.finish_step(step.batch, tokens, now)
        return FinishedBatch(step.batch, updates, seconds)

    def _launch(
        self, batch: ScheduledBatch, num_under_way: int, before: Callable[[int], None] | None
    ) -> LaunchedBatch:
        if before is not None:
            before(num_under_way + batch.num_tokens)
        started = time.monotonic()
        masked = self._scheduler.masked_sequences(batch)
        tokens = self._runner.launch(batch, partial(self._fill_masks, masked))
        return LaunchedBatch(batch, tokens, started)
