"""What the tokenizer process and its child processes say to each other over a socket pair.

A frame is its length, then a msgpack array. The parent says `Limits`, then the setup of the child's
kind, then one job at a time; setup and jobs are each answered with one `Answer`. An answer may come
from a program that took over its process, so the parent believes nothing in it but its type and
bounded size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec
from mini_infer.errors import ErrorReason, MiniInferError

HEADER = struct.Struct("<I")
MAX_ANSWER_BYTES = 40 * 2**20
"""The longest text of a chat template, at four bytes a character, and some more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildKind:
    """What child processes are for.

    Attributes:
        module: To run, with `python -m`.
        subject: What they try, which begins every message about one that failed.
        reason: Of the errors of those.
        hint: What to do about one that used more than it may.
        niceness: Added to that of the process that starts them: what they do is worth less than
            what others wait for.
    """

    module: str
    subject: str
    reason: ErrorReason
    hint: str = ""
    niceness: int = 0

    def failed(self, cause: str) -> MiniInferError:
        """The error of what was tried."""
        return MiniInferError(self.reason, f"{self.subject}: {cause}")

    def used_too_much(self, cause: str) -> MiniInferError:
        """The same where a limit of its process was the cause."""
        return self.failed(f"{cause}: {self.hint}" if self.hint else cause)


class Limits(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a child process may use.

    Attributes:
        start_cpu_s: Processor time to begin with what came with the model, in seconds.
        job_cpu_s: Processor time of a job, in seconds: the same on a busy machine.
        job_s: Time of a job by the clock, in seconds; the parent's patience.
        memory_bytes: Address space beyond what the process has before its limits are set.
        stack_bytes: Stack of its only thread.
    """

    start_cpu_s: float
    job_cpu_s: float
    job_s: float
    memory_bytes: int
    stack_bytes: int = 8 * 2**20


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What became of a frame.

    Attributes:
        text: What a job made; empty after the setup.
        reason: Why there is none, or None.
        message: The same for a person.
        is_last: The process used up its memory and ends.
    """

    text: str = ""
    reason: ErrorReason | None = None
    message: str = ""
    is_last: bool = False


def framed(value: msgspec.Struct) -> bytes:
    """The frame of a message.

    Raises:
        UnicodeEncodeError: Where a text holds half of a surrogate pair.
    """
    content = msgspec.msgpack.encode(value)
    return HEADER.pack(len(content)) + content
