"""A killable child process, from the side of who waits for its answers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import msgspec
from mini_infer.errors import MiniInferError

from mini_infer_tokenizer.child_protocol import HEADER, MAX_ANSWER_BYTES, Answer, ChildKind

_START_S = 20.0
"""Until a new process is ready: far more than it takes on a busy machine."""
_GRACE_S = 0.1
"""Until a process that has closed its socket has ended."""
_RECEIVE_BYTES = 2**20
_MAX_MESSAGE_CHARACTERS = 2000
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
_TOO_LARGE = "it broke its process, or needs more memory than it may have"


class ChildLost(Exception):
    """A child process ended, or was ended for its silence, before it answered.

    Attributes:
        was_killed: By somebody else, through no fault of what it did.
        used_too_much: A limit ended it.
    """

    def __init__(
        self, cause: str, *, was_killed: bool = False, used_too_much: bool = False
    ) -> None:
        """Takes what happened."""
        super().__init__(cause)
        self.was_killed = was_killed
        self.used_too_much = used_too_much


class SetupRefusedError(MiniInferError):
    """A child process cannot do its kind's work with the setup that it got."""


class ChildProcess:
    """A child process. Not safe to use from several threads at a time.

    Attributes:
        is_ready: Whether it waits for jobs, as far as is known.
    """

    def __init__(self, kind: ChildKind, setup: bytes) -> None:
        """Starts it without waiting for it.

        Args:
            kind: What it does.
            setup: The frames that come before the first job.

        Raises:
            OSError: Where no process can be started.
        """
        self.is_ready = False
        self._setup = setup
        self._socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-X", "utf8", "-m", kind.module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a terminal is for its parent.
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        if kind.niceness:
            own = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, self._process.pid, own + kind.niceness)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Waits until it has taken its setup.

        Raises:
            SetupRefusedError: As it refused the setup.
            ChildLost: Where it ended or took too long.
        """
        if not self.is_ready:
            answer = self.ask(self._setup, _START_S)
            if answer.reason is not None:
                self.end()
                raise SetupRefusedError(answer.reason, answer.message)
            self.is_ready = True

    def ask(self, frame: bytes, patience_s: float) -> Answer:
        """Sends a frame and waits for the answer, whose message is of bounded length.

        Raises:
            ChildLost: Where none comes in time; the process has ended then.
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
            raise ChildLost(_TOO_SLOW, used_too_much=True) from None
        except (OSError, EOFError, msgspec.DecodeError):
            raise self._loss() from None
        if answer.is_last:
            self.end()
        return msgspec.structs.replace(answer, message=answer.message[:_MAX_MESSAGE_CHARACTERS])

    def _receive(self, num_bytes: int, deadline: float) -> bytearray:
        content = bytearray()
        while len(content) < num_bytes:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._socket.recv(min(num_bytes - len(content), _RECEIVE_BYTES))
            if not part:
                raise EOFError
            content += part
        return content

    def _loss(self) -> ChildLost:
        """Ends it, and says of what it ended by itself, if it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        code = self._process.returncode
        self.end()
        if code == -signal.SIGPROF:
            return ChildLost(_TOO_SLOW, used_too_much=True)
        if code == -signal.SIGABRT:  # Libraries in Rust end this way where memory runs out.
            return ChildLost(_TOO_LARGE, used_too_much=True)
        was_killed = code is not None and code < 0 and code not in _OWN_ENDS
        return ChildLost(f"its process broke (exit status {code})", was_killed=was_killed)

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    """What a child needs to find its modules and the time, and nothing else."""
    from mini_infer.settings import time_zone  # takes a while, and not everybody needs children

    environment = {
        "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",  # A child may start no threads.
    }
    zone = time_zone()
    return environment if zone is None else {**environment, "TZ": zone}
