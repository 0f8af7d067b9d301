"""The loop of a child process: jobs within limits, until its socket closes.

What a child runs came from a model folder or a client, and should keep to itself; the process keeps
it from using up what everybody needs, and has nothing to steal should it break out: no environment,
no file but the socket, no right to open files or start processes. Its kernel timer counts its own
processor time, and ends it even in the middle of one long operation.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import msgspec
from mini_infer.errors import MiniInferError

from mini_infer_tokenizer.child_protocol import HEADER, Answer, ChildKind, Limits, framed

_SOCKET = 0
_NUM_FILES = 3
"""The socket and /dev/null twice."""
_LIFETIME_CPU_S = 600
"""Then the process is replaced, which also ends one that has escaped and lost its parent."""

_M = TypeVar("_M", bound=msgspec.Struct)
_Setup = TypeVar("_Setup", bound=msgspec.Struct)
_Job = TypeVar("_Job", bound=msgspec.Struct)
_Prepared = TypeVar("_Prepared")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildWork(Generic[_Setup, _Prepared, _Job]):
    """What a child process does, step by step.

    Attributes:
        kind: For its messages.
        setup_type: The frame that `prepare` takes.
        job_type: The frames of its jobs.
        prepare: Is called with all rights, and loads what is loaded late otherwise.
        start: Is called within limits; returns what does a job, or raises MiniInferError as that.
    """

    kind: ChildKind
    setup_type: type[_Setup]
    job_type: type[_Job]
    prepare: Callable[[_Setup], _Prepared]
    start: Callable[[_Prepared], Callable[[_Job], str]]


def run(work: ChildWork[_Setup, _Prepared, _Job]) -> None:
    """Takes the socket as standard input."""
    with open(_SOCKET, "rb") as reader, open(_SOCKET, "wb", closefd=False) as writer:
        _serve(reader, writer, work)


def _serve(reader: BinaryIO, writer: BinaryIO, work: ChildWork[_Setup, _Prepared, _Job]) -> None:
    """Answers frames until there is none or memory has run out."""
    limits = _read(reader, Limits)
    setup = _read(reader, work.setup_type)
    if limits is None or setup is None:
        return
    try:
        prepared = work.prepare(setup)
        _give_up_rights(limits)
        signal.setitimer(signal.ITIMER_PROF, limits.start_cpu_s)
        do = work.start(prepared)
    except (MiniInferError, MemoryError) as error:
        _write(writer, framed(_refusal(work.kind, error)))
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    _write(writer, framed(Answer()))
    has_memory = True
    while has_memory and (job := _read(reader, work.job_type)) is not None:
        signal.setitimer(signal.ITIMER_PROF, limits.job_cpu_s)
        try:
            frame = framed(Answer(do(job)))
        except (MiniInferError, MemoryError, UnicodeEncodeError) as error:
            frame = framed(_refusal(work.kind, error))
            has_memory = not isinstance(error, MemoryError)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(writer, frame)


def _give_up_rights(limits: Limits) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for limit, value in (
        (resource.RLIMIT_AS, _address_space_bytes() + limits.memory_bytes),
        (resource.RLIMIT_STACK, limits.stack_bytes),
        (resource.RLIMIT_CPU, _LIFETIME_CPU_S),
        (resource.RLIMIT_NOFILE, _NUM_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _address_space_bytes() -> int:
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    return num_pages * resource.getpagesize()


def _refusal(kind: ChildKind, error: MiniInferError | MemoryError | UnicodeEncodeError) -> Answer:
    if isinstance(error, MemoryError):
        error = kind.used_too_much("it needs more memory than it may have")
        return Answer(reason=error.reason, message=error.message, is_last=True)
    if isinstance(error, UnicodeEncodeError):
        error = kind.failed("it wrote half of a surrogate pair")
    # Its words may hold halves of surrogate pairs, which frames cannot.
    message = error.message.encode(errors="replace").decode()
    return Answer(reason=error.reason, message=message)


def _read(reader: BinaryIO, kind: type[_M]) -> _M | None:
    header = reader.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (num_bytes,) = HEADER.unpack(header)
    return msgspec.msgpack.decode(reader.read(num_bytes), type=kind)


def _write(writer: BinaryIO, frame: bytes) -> None:
    writer.write(frame)
    writer.flush()
