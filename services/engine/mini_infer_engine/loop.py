"""The engine's loop: drain the inbox, schedule, run, publish. One thread, no sockets."""

from __future__ import annotations

import time

from mini_infer.errors import MiniInferError
from mini_infer.messages import ENGINE_BEAT_INTERVAL_S, NO_BUDGET, EngineBeat

from mini_infer_engine.inbox import AbortStreams, AddStream, Command, Inbox, KeepOnly, SocketFailed
from mini_infer_engine.outbox import Outbox
from mini_infer_engine.pipeline import FinishedBatch, Runner, StepPipeline
from mini_infer_engine.scheduler import Scheduler
from mini_infer_engine.sequence import StreamKey
from mini_infer_engine.served_model import ServedModel

_STALLED_WAIT_S = 0.002
"""Between looks at sequences that wait for their languages to be compiled, with nothing to run."""
MAX_ANNOUNCED_MS = 60_000.0
"""A process that was stopped for a while must not announce that each token takes as long."""


class StepTimer:
    """Expects a step to take per token what steps have taken lately."""

    def __init__(self, seconds_per_token: float) -> None:
        """Starts with what a trial took."""
        self._seconds_per_token = seconds_per_token

    def expected_ms(self, num_tokens: int) -> float:
        """Milliseconds that a step of so many tokens is expected to take."""
        return min(self._seconds_per_token * num_tokens * 1e3, MAX_ANNOUNCED_MS)

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step took so long; the slowest of late counts most."""
        if num_tokens:
            latest = seconds / num_tokens
            self._seconds_per_token = max(latest, 0.9 * self._seconds_per_token)


class EngineLoop:
    """Turns until it is stopped; every accepted stream gets exactly one end."""

    def __init__(
        self,
        served: ServedModel,
        scheduler: Scheduler,
        runner: Runner,
        inbox: Inbox,
        outbox: Outbox,
        *,
        epoch: int,
        seconds_per_token: float,
    ) -> None:
        """Takes over an idle scheduler and its runner.

        Args:
            served: The model as gateways know it.
            scheduler: The queues, idle.
            runner: Whatever makes tokens.
            inbox: Where commands come from.
            outbox: Where messages go.
            epoch: Of this engine.
            seconds_per_token: How long a token of a step takes, about.
        """
        self._served = served
        self._scheduler = scheduler
        self._pipeline = StepPipeline(scheduler, runner, served.fill_masks)
        self._inbox = inbox
        self._outbox = outbox
        self._epoch = epoch
        self._timer = StepTimer(seconds_per_token)
        self._last_beat = 0.0
        self._stopping = False
        self._unpublished: FinishedBatch | None = None
        self.num_unknown_streams = 0

    def run(self) -> None:
        """Turns until `stop`.

        Raises:
            RuntimeError: The socket thread broke; only a new process can serve again.
        """
        wait_s = 0.0
        while not self._stopping:
            for command in self._inbox.drain(wait_s):
                self._apply(command)
            step = self._pipeline.launch(self._beat)
            self._publish()  # what the step before chose, if the device was at this one already
            self._unpublished = finished = self._pipeline.finish(step)
            self._timer.note(finished.batch.num_tokens, finished.seconds)
            if not self._pipeline.is_under_way:
                self._publish()
            wait_s = _STALLED_WAIT_S if finished.batch.is_empty else 0.0
            if self._pipeline.is_idle:
                wait_s = ENGINE_BEAT_INTERVAL_S
                if not finished.batch.is_empty:
                    self._announce(time.monotonic(), 0.0)  # that all is free again
        self._publish()

    def stop(self) -> None:
        """Ends `run` after the step under way; also from a signal handler."""
        self._stopping = True
        self._inbox.wake()

    def _publish(self) -> None:
        if self._unpublished is not None:
            self._outbox.publish(self._unpublished.batch.step, self._unpublished.updates)
            self._unpublished = None

    def _apply(self, command: Command) -> None:
        match command:
            case AddStream():
                self._add(command)
            case AbortStreams(owner=owner, streams=streams, answer=answer):
                for stream in streams:
                    key = StreamKey(owner, stream)
                    known = self._scheduler.abort(key, time.monotonic(), report=answer)
                    self.num_unknown_streams += not known
            case KeepOnly(owner=owner, streams=streams):
                for key in self._scheduler.keys_of(owner):
                    if key.stream not in streams:
                        self._scheduler.abort(key, time.monotonic())
            case SocketFailed(error=error):
                raise RuntimeError("the socket thread failed") from error

    def _add(self, command: AddStream) -> None:
        submit = command.submit
        keys = [StreamKey(command.owner, stream) for stream in (submit.stream, *submit.siblings)]
        budget_ms = submit.budget_ms
        deadline = None if budget_ms == NO_BUDGET else command.received + budget_ms / 1e3
        try:
            with self._scheduler.tally.counting_refusals():
                sequences = self._served.sequences(
                    keys,
                    submit.prompt_ids,
                    submit.sampling,
                    output_ids=submit.output_ids,
                    deadline=deadline,
                    priority=submit.priority,
                    cache_scope=(submit.principal, submit.cache_salt),
                )
            self._scheduler.add(*sequences, now=time.monotonic())
        except MiniInferError as error:
            for key in keys:
                self._outbox.refuse(key, error)
        else:
            for key in keys:
                self._outbox.accept(key)

    def _beat(self, num_tokens: int) -> None:
        """Tells the gateways that the loop turns, and how long they must wait for the next sign.

        A step's output is a sign of life as well, so beats are rare unless the step is long.

        Args:
            num_tokens: Of the steps that will be under way.
        """
        now = time.monotonic()
        expected_ms = self._timer.expected_ms(num_tokens)
        due = now - self._last_beat >= ENGINE_BEAT_INTERVAL_S
        if not due and expected_ms < ENGINE_BEAT_INTERVAL_S * 1e3:
            return
        self._announce(now, expected_ms)

    def _announce(self, now: float, expected_ms: float) -> None:
        self._last_beat = now
        pool = self._scheduler.blocks.pool
        self._outbox.announce(
            EngineBeat(
                epoch=self._epoch,
                num_steps=self._scheduler.num_steps,
                expected_step_ms=expected_ms,
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                num_used_blocks=pool.num_used,
                num_preemptions=self._scheduler.num_preemptions,
                num_swapped=self._scheduler.blocks.num_swapped,
                num_cached_blocks=pool.num_cached,
                counters=self._scheduler.counters(),
            )
        )
