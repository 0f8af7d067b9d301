"""Child processes that do jobs which may take too much, for several threads.

A job that takes too long, or that makes its process end, costs that process: it is killed, another
one starts, and only that job fails. Whoever asks next gets a process that is ready, or waits for
one.
"""

from __future__ import annotations

import weakref
from collections import deque
from threading import Condition

import msgspec
from mini_infer.errors import ErrorReason, MiniInferError

from mini_infer_tokenizer.child_process import ChildLost, ChildProcess, SetupRefusedError
from mini_infer_tokenizer.child_protocol import Answer, ChildKind, Limits, framed

_MAX_KILLS = 2
"""Of processes under one job from outside, after which it is still done."""


class ChildPool:
    """Child processes of a kind that serve several threads."""

    def __init__(
        self, kind: ChildKind, setup: msgspec.Struct, num_processes: int, limits: Limits
    ) -> None:
        """Starts nothing before it is needed.

        Args:
            kind: What the processes do.
            setup: What each of them needs for that.
            num_processes: Jobs at a time.
            limits: What each may use.
        """
        self._kind = kind
        self._patience_s = limits.job_s
        self._num_processes = num_processes
        self._setup = framed(limits) + framed(setup)
        self._refusal: SetupRefusedError | None = None
        # Those that nobody uses, the next one to use on the right; None has yet to be started.
        self._idle: deque[ChildProcess | None] = deque([None] * num_processes)
        self._idle_changed = Condition()
        self._is_closed = False
        # No process outlives a pool that nobody closed.
        self._end_idle = weakref.finalize(self, _end_all, self._idle)

    def start(self) -> None:
        """Starts every process, and waits until one is ready.

        Raises:
            MiniInferError: With the kind's reason and what is wrong with the setup,
                INTERNAL_ERROR where no process can be started.
        """
        processes: list[ChildProcess] = []
        try:
            for _ in range(self._num_processes):
                processes.append(self._take())
            self._make_ready(processes[0])
        except ChildLost as error:
            raise self._kind.failed(f"it cannot be compiled: {error}") from None
        finally:
            for process in reversed(processes):
                self._give_back(process)

    def do(self, job: msgspec.Struct) -> str:
        """What a job makes; takes little more than its limits once a process is free.

        Raises:
            MiniInferError: As the process refused the job or its setup; with the kind's reason
                where the job uses more than it may; INVALID_FIELD where it is no Unicode;
                INTERNAL_ERROR where no process can be started or each is killed by somebody.
        """
        try:
            frame = framed(job)
        except UnicodeEncodeError:
            message = "expected Unicode text, got half of a surrogate pair"
            raise MiniInferError(ErrorReason.INVALID_FIELD, message) from None
        answer = self._ask_while_killed(frame)
        if answer.reason is not None:
            raise MiniInferError(answer.reason, answer.message)
        return answer.text

    def close(self) -> None:
        """Ends the processes, one that has a job as soon as that is done. Once is enough."""
        with self._idle_changed:
            self._is_closed = True
            self._idle_changed.notify_all()
            self._end_idle()

    def _make_ready(self, process: ChildProcess) -> None:
        try:
            process.wait_until_ready()
        except SetupRefusedError as refusal:
            if refusal.reason is not ErrorReason.INTERNAL_ERROR:
                self._refusal = refusal  # Another process would say the same.
            raise

    def _ask(self, frame: bytes) -> Answer:
        process = self._take()
        try:
            self._make_ready(process)
            return process.ask(frame, self._patience_s)
        finally:
            self._give_back(process)

    def _ask_while_killed(self, frame: bytes) -> Answer:
        for _ in range(_MAX_KILLS + 1):
            try:
                return self._ask(frame)
            except ChildLost as loss:
                cause = str(loss)
                if loss.used_too_much:
                    raise self._kind.used_too_much(cause) from None
                if not loss.was_killed:
                    raise self._kind.failed(cause) from None
        times = f"{_MAX_KILLS + 1} times: {cause}"
        message = f"the process for {self._kind.subject}s was killed {times}"
        raise MiniInferError(ErrorReason.INTERNAL_ERROR, message)

    def _take(self) -> ChildProcess:
        """A process that has not ended, once there is one."""
        with self._idle_changed:
            self._idle_changed.wait_for(lambda: self._idle or self._is_closed)
            if self._is_closed:
                raise RuntimeError(f"the {self._kind.subject}s are closed")
            if self._refusal is not None:
                raise MiniInferError(self._refusal.reason, self._refusal.message)
            process = self._idle.pop()
            for idle in self._idle:
                if idle is not None:
                    _ = idle.is_alive  # Asking takes in what is left of one that was killed.
        if process is not None and process.is_alive:
            return process
        if process is not None:
            process.end()
        try:
            return ChildProcess(self._kind, self._setup)
        except BaseException as error:
            self._put(None)  # Whoever takes it tries again.
            if not isinstance(error, OSError):
                raise
            message = f"the process for {self._kind.subject}s cannot be started: {error.strerror}"
            raise MiniInferError(ErrorReason.INTERNAL_ERROR, message) from error

    def _give_back(self, process: ChildProcess) -> None:
        """Lets others use the process, or a new one where it has ended."""
        if process.is_alive:
            self._put(process)
            return
        process.end()
        if self._refusal is not None:
            self._put(None)
            return
        successor = None
        try:
            successor = ChildProcess(self._kind, self._setup)
        except OSError:
            pass  # Whoever takes its place tries again.
        finally:
            self._put(successor)

    def _put(self, process: ChildProcess | None) -> None:
        with self._idle_changed:
            if process is None or not process.is_ready:
                self._idle.appendleft(process)
            else:
                self._idle.append(process)
            if self._is_closed:
                _end_all(self._idle)
            self._idle_changed.notify()


def _end_all(processes: deque[ChildProcess | None]) -> None:
    while processes:
        process = processes.pop()
        if process is not None:
            process.end()
