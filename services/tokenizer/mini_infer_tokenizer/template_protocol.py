"""What the tokenizer process and its template processes say to each other over a socket pair.

A frame is its length, then a msgpack array. The parent says `Setup`, then one `EncodeChat` at a
time; each is answered with one `Answer`. An answer may come from a template that broke out of its
sandbox, so the parent believes nothing in it but its type and bounded size.
"""

from __future__ import annotations

import struct

import msgspec
from mini_infer.errors import ErrorReason

HEADER = struct.Struct("<I")
MAX_ANSWER_BYTES = 40 * 2**20
"""The longest text, at four bytes a character, and some more."""


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """The first frame to a template process.

    Attributes:
        sources: The templates by their names.
        special_tokens: Variables that every rendering sees.
        memory_bytes: Address space that the process may have.
        compile_cpu_s: Processor time for compiling the templates.
        render_cpu_s: Processor time for each rendering.
    """

    sources: dict[str, str]
    special_tokens: dict[str, str]
    memory_bytes: int
    compile_cpu_s: float
    render_cpu_s: float


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What became of a frame.

    Attributes:
        text: The rendered text; empty after `Setup`.
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
