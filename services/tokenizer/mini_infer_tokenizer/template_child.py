"""`python -m mini_infer_tokenizer.template_child`: renders chat templates until its socket closes.

The sandbox of Jinja keeps a template from reaching what it should not; this process keeps it from
using up what everybody needs, and has nothing to steal should the sandbox fail: no environment,
no file but the socket, no right to open files or start processes. Its kernel timer counts its own
processor time, and ends it even in the middle of one long operation.
"""

from __future__ import annotations

import contextlib
import resource
import signal
from typing import BinaryIO, TypeVar

import msgspec
from mini_infer.errors import ErrorReason, MiniInferError
from mini_infer.messages import EncodeChat, WireChatMessage

from mini_infer_tokenizer.template_protocol import HEADER, Answer, Setup, framed
from mini_infer_tokenizer.template_rendering import TemplateSet

_SOCKET = 0
_NUM_FILES = 3
"""The socket and /dev/null twice."""
_LIFETIME_CPU_S = 600
"""Then the process is replaced, which also ends one that has escaped and lost its parent."""

_WARM_UP = (
    "{{ '\\n' ~ strftime_now('%c') ~ lipsum(1) ~ messages | tojson | striptags }}{{ ''.__class__ }}"
)
"""Has Python and Jinja load what they load late, while files can still be opened."""

_WARM_UP_CHAT = EncodeChat(0, [WireChatMessage("user", "")], True)

_M = TypeVar("_M", bound=msgspec.Struct)


def main() -> None:
    """Takes the socket as standard input."""
    with open(_SOCKET, "rb") as reader, open(_SOCKET, "wb", closefd=False) as writer:
        serve(reader, writer)


def serve(reader: BinaryIO, writer: BinaryIO) -> None:
    """Answers frames until there is none or memory has run out."""
    setup = _read(reader, Setup)
    if setup is None:
        return
    with contextlib.suppress(MiniInferError):
        TemplateSet({"default": _WARM_UP}, {}).render(_WARM_UP_CHAT)
    _give_up_rights(setup.memory_bytes)
    signal.setitimer(signal.ITIMER_PROF, setup.compile_cpu_s)
    try:
        templates = TemplateSet(setup.sources, setup.special_tokens)
    except (MiniInferError, MemoryError) as error:
        _write(writer, framed(_refusal(error)))
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    _write(writer, framed(Answer()))
    has_memory = True
    while has_memory and (chat := _read(reader, EncodeChat)) is not None:
        signal.setitimer(signal.ITIMER_PROF, setup.render_cpu_s)
        try:
            frame = framed(Answer(templates.render(chat)))
        except (MiniInferError, MemoryError, UnicodeEncodeError) as error:
            frame = framed(_refusal(error))
            has_memory = not isinstance(error, MemoryError)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(writer, frame)


def _give_up_rights(memory_bytes: int) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, _LIFETIME_CPU_S),
        (resource.RLIMIT_NOFILE, _NUM_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _refusal(error: MiniInferError | MemoryError | UnicodeEncodeError) -> Answer:
    reason = ErrorReason.CHAT_TEMPLATE_FAILED
    if isinstance(error, MiniInferError):
        # A template's words may hold halves of surrogate pairs, which frames cannot.
        message = error.message.encode(errors="replace").decode()
        return Answer(reason=error.reason, message=message)
    if isinstance(error, UnicodeEncodeError):
        return Answer(reason=reason, message="chat template: it wrote half of a surrogate pair")
    message = "chat template: it needs more memory than it may have"
    return Answer(reason=reason, message=message, is_last=True)


def _read(reader: BinaryIO, kind: type[_M]) -> _M | None:
    header = reader.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (num_bytes,) = HEADER.unpack(header)
    return msgspec.msgpack.decode(reader.read(num_bytes), type=kind)


def _write(writer: BinaryIO, frame: bytes) -> None:
    writer.write(frame)
    writer.flush()


if __name__ == "__main__":
    main()
