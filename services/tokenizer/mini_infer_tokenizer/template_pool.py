"""The processes that run chat templates, from the side of who needs the texts.

A rendering that takes too long, or that makes its process end, costs that process: it is killed,
another one starts, and only that request fails. Whoever asks next gets a process that is ready, or
waits for one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Condition

import msgspec
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import EncodeChat

from mini_infer_tokenizer.template_protocol import (
    HEADER,
    MAX_ANSWER_BYTES,
    Answer,
    Setup,
    framed,
)

_MODULE = "mini_infer_tokenizer.template_child"
_START_S = 20.0
"""Until a new process has compiled its templates: far more than it takes on a busy machine."""
_GRACE_S = 0.1
"""Until a process that has closed its socket has ended."""
_RECEIVE_BYTES = 2**20
_MAX_MESSAGE_CHARACTERS = 2000
_MAX_KILLS = 2
"""Of processes under one chat from outside, after which it is still rendered."""
_OWN_ENDS = frozenset(
    -number
    for number in (
        signal.SIGPROF,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGABRT,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSYS,
        signal.SIGTRAP,
    )
)
"""Exit statuses of signals that a process brings on itself, if only through a bug of Python's; not
SIGXCPU, since every process comes to the end of its lifetime."""
_TOO_SLOW = "it did not come to its end in the time that it may take"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """What a template may use.

    Attributes:
        render_cpu_s: Processor time of a rendering, in seconds: the same on a busy machine.
        render_s: Time of a rendering by the clock, in seconds.
        compile_cpu_s: Processor time for compiling all templates, in seconds.
        memory_bytes: Address space of the process.
    """

    render_cpu_s: float = 0.4
    render_s: float = 0.8
    compile_cpu_s: float = 2.0
    memory_bytes: int = 512 * 2**20


class _ProcessLost(Exception):
    """A template process ended, or was ended for its silence, before it answered.

    Attributes:
        was_killed: By somebody else, through no fault of a template.
    """

    def __init__(self, cause: str, *, was_killed: bool = False) -> None:
        super().__init__(cause)
        self.was_killed = was_killed


class _TemplateProcess:
    """A template process. Not safe to use from several threads at a time.

    Attributes:
        has_compiled: Whether it waits for chats, as far as is known.
    """

    def __init__(self, setup: bytes) -> None:
        """Starts it without waiting for it.

        Raises:
            OSError: Where no process can be started.
        """
        self.has_compiled = False
        self._setup = setup
        self._socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-X", "utf8", "-m", _MODULE],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a terminal is for its parent.
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Waits until it has compiled its templates.

        Raises:
            MiniInferError: As it refused the templates.
            _ProcessLost: Where it ended or took too long.
        """
        if not self.has_compiled:
            answer = self.ask(self._setup, _START_S)
            if answer.reason is not None:
                self.end()
                raise _refused(answer)
            self.has_compiled = True

    def ask(self, frame: bytes, patience_s: float) -> Answer:
        """Sends a frame and waits for the answer.

        Raises:
            _ProcessLost: Where none comes in time; the process has ended then.
        """
        deadline = time.monotonic() + patience_s
        try:
            self._socket.settimeout(patience_s)
            self._socket.sendall(frame)
            (num_bytes,) = HEADER.unpack(self._receive(HEADER.size, deadline))
            content = self._receive(min(num_bytes, MAX_ANSWER_BYTES), deadline)
            answer = msgspec.msgpack.decode(content, type=Answer)
        except TimeoutError:
            self.end()
            raise _ProcessLost(_TOO_SLOW) from None
        except (OSError, EOFError, msgspec.DecodeError):
            raise self._loss() from None
        if answer.is_last:
            self.end()
        return answer

    def _receive(self, num_bytes: int, deadline: float) -> bytearray:
        content = bytearray()
        while len(content) < num_bytes:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._socket.recv(min(num_bytes - len(content), _RECEIVE_BYTES))
            if not part:
                raise EOFError
            content += part
        return content

    def _loss(self) -> _ProcessLost:
        """Ends it, and says of what it ended by itself, if it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        code = self._process.returncode
        self.end()
        if code == -signal.SIGPROF:
            return _ProcessLost(_TOO_SLOW)
        was_killed = code is not None and code < 0 and code not in _OWN_ENDS
        return _ProcessLost(f"its process broke (exit status {code})", was_killed=was_killed)

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


class TemplatePool:
    """Template processes that serve several threads."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        num_processes: int,
        limits: TemplateLimits | None = None,
    ) -> None:
        """Starts nothing before it is needed.

        Args:
            sources: Jinja sources by name.
            special_tokens: Variables such as "bos_token" that every rendering sees.
            num_processes: Renderings at a time.
            limits: What each may use.
        """
        limits = limits or TemplateLimits()
        self._patience_s = limits.render_s
        self._num_processes = num_processes
        setup = Setup(
            sources=dict(sources),
            special_tokens=dict(special_tokens),
            memory_bytes=limits.memory_bytes,
            compile_cpu_s=limits.compile_cpu_s,
            render_cpu_s=limits.render_cpu_s,
        )
        self._setup = framed(setup)
        # Those that nobody uses, the next one to use on the right; None has yet to be started.
        self._idle: deque[_TemplateProcess | None] = deque([None] * num_processes)
        self._idle_changed = Condition()
        self._is_closed = False
        # No process outlives a pool that nobody closed.
        self._end_idle = weakref.finalize(self, _end_all, self._idle)

    def start(self) -> None:
        """Starts every process, and waits until one has compiled the templates.

        Raises:
            MiniInferError: CHAT_TEMPLATE_FAILED with what is wrong with the templates,
                INTERNAL_ERROR where no process can be started.
        """
        processes: list[_TemplateProcess] = []
        try:
            for _ in range(self._num_processes):
                processes.append(self._take())
            processes[0].wait_until_ready()
        except _ProcessLost as error:
            raise _failed(f"it cannot be compiled: {error}") from None
        finally:
            for process in reversed(processes):
                self._give_back(process)

    def render(self, chat: EncodeChat) -> str:
        """The text of a conversation; takes less than a second once a process is free.

        Raises:
            MiniInferError: CHAT_TEMPLATE_FAILED where the template fails or uses more than it
                may, INVALID_FIELD where it cannot take the chat, INTERNAL_ERROR where no process
                can be started or each is killed by somebody.
        """
        try:
            frame = framed(chat)
        except UnicodeEncodeError:
            message = "expected Unicode text, got half of a surrogate pair"
            raise MiniInferError(ErrorReason.INVALID_FIELD, message) from None
        answer = self._ask_while_killed(frame)
        if answer.reason is not None:
            raise _refused(answer)
        return answer.text

    def close(self) -> None:
        """Ends the processes, one that renders as soon as it has. Once is enough."""
        with self._idle_changed:
            self._is_closed = True
            self._idle_changed.notify_all()
            self._end_idle()

    def _ask(self, frame: bytes) -> Answer:
        process = self._take()
        try:
            process.wait_until_ready()
            return process.ask(frame, self._patience_s)
        finally:
            self._give_back(process)

    def _ask_while_killed(self, frame: bytes) -> Answer:
        for _ in range(_MAX_KILLS + 1):
            try:
                return self._ask(frame)
            except _ProcessLost as loss:
                if not loss.was_killed:
                    raise _failed(str(loss)) from None
                cause = str(loss)
        message = f"the process for chat templates was killed {_MAX_KILLS + 1} times: {cause}"
        raise MiniInferError(ErrorReason.INTERNAL_ERROR, message)

    def _take(self) -> _TemplateProcess:
        """A process that has not ended, once there is one."""
        with self._idle_changed:
            self._idle_changed.wait_for(lambda: self._idle or self._is_closed)
            if self._is_closed:
                raise RuntimeError("the chat templates are closed")
            process = self._idle.pop()
            for idle in self._idle:
                if idle is not None:
                    _ = idle.is_alive  # Asking takes in what is left of one that was killed.
        if process is not None and process.is_alive:
            return process
        if process is not None:
            process.end()
        try:
            return _TemplateProcess(self._setup)
        except OSError as error:
            self._put(None)
            message = f"the process for chat templates cannot be started: {error.strerror}"
            raise MiniInferError(ErrorReason.INTERNAL_ERROR, message) from error

    def _give_back(self, process: _TemplateProcess) -> None:
        """Lets others use the process, or a new one where it has ended."""
        if process.is_alive:
            self._put(process)
            return
        process.end()
        try:
            self._put(_TemplateProcess(self._setup))
        except OSError:
            self._put(None)  # Whoever takes it tries again.

    def _put(self, process: _TemplateProcess | None) -> None:
        with self._idle_changed:
            if process is None or not process.has_compiled:
                self._idle.appendleft(process)
            else:
                self._idle.append(process)
            if self._is_closed:
                _end_all(self._idle)
            self._idle_changed.notify()


def _end_all(processes: deque[_TemplateProcess | None]) -> None:
    while processes:
        process = processes.pop()
        if process is not None:
            process.end()


def _environment() -> dict[str, str]:
    """What a template process needs to find its modules and the time, and nothing else."""
    from mini_infer.settings import time_zone  # takes a while, and not everybody chats

    environment = {"PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))}
    zone = time_zone()
    return environment if zone is None else {**environment, "TZ": zone}


def _refused(answer: Answer) -> MiniInferError:
    reason = answer.reason or ErrorReason.CHAT_TEMPLATE_FAILED
    return MiniInferError(reason, answer.message[:_MAX_MESSAGE_CHARACTERS])


def _failed(message: str) -> MiniInferError:
    return MiniInferError(ErrorReason.CHAT_TEMPLATE_FAILED, f"chat template: {message}")
