"""Byte fallback: runs of byte tokens such as `<0xE2>`, and when their text is final.

A run is a text of its own: where it is valid UTF-8 as a whole it is that text, else each of its
bytes is one U+FFFD. So its text is final when it ends, or as soon as it cannot become valid any
more.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Sequence

MAX_BYTE_RUN = 64
"""Byte tokens that wait for the end of their run. A longer run is split: should it become invalid
behind this point, its beginning was released as the valid text it was until then, where `decode`
would give U+FFFD for all of it."""

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")
"""The library reads the digits as a number, which may have a sign."""


def byte_of(token: str) -> bytes | None:
    """The byte that a token stands for, or None."""
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else None


class ByteRun:
    """Byte tokens, one after the other, whose text is not final yet."""

    __slots__ = ("_is_broken", "_sizes", "_tail", "_text")

    def __init__(self) -> None:
        """Begins a run."""
        self._is_broken = False
        self._text = ""
        self._tail = b""  # Bytes of the character that is incomplete.
        self._sizes: list[int] = []  # Of each byte: the ids that are released with it.

    def extend(self, byte: bytes) -> Sequence[tuple[int, str]]:
        """Takes the next byte; returns the pieces that are final now."""
        if self._is_broken:
            return ((1, _REPLACEMENT),)
        self._sizes.append(1)
        self._tail += byte
        try:
            text, num_read = utf_8_decode(self._tail, "strict", False)
        except UnicodeDecodeError:
            self._is_broken = True
            return self._take_replaced()
        self._text += text
        self._tail = self._tail[num_read:]
        return self._take_characters() if len(self._sizes) >= MAX_BYTE_RUN else ()

    def extend_silently(self) -> bool:
        """Takes an id without text; returns False where no byte is held that it must wait for."""
        if not self._sizes:
            return False
        self._sizes[-1] += 1
        return True

    def end(self) -> Sequence[tuple[int, str]]:
        """Ends the run; only now it is known whether all of it is valid."""
        return self._take_replaced() if self._tail else self._take_characters()

    def _take_replaced(self) -> Sequence[tuple[int, str]]:
        pieces = [(size, _REPLACEMENT) for size in self._sizes]
        self._sizes, self._text, self._tail = [], "", b""
        return pieces

    def _take_characters(self) -> Sequence[tuple[int, str]]:
        """A piece for each complete character."""
        pieces = []
        begin = 0
        for character in self._text:
            end = begin + len(character.encode())
            pieces.append((sum(self._sizes[begin:end]), character))
            begin = end
        self._sizes, self._text = self._sizes[begin:], ""
        return pieces
