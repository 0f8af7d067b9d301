"""Token ids to *pieces*: runs of ids together with their text, as soon as that text is final.

A piece is closed where no later id can change its text, so the texts of the pieces, one after
the other, are what `TextTokenizer.decode` gives for all the ids. Which ids share a piece depends
on the ids alone, never on how they arrive, and each id costs O(1) amortised.

Two kinds of decoders are told apart:

* Byte-level: a token is bytes, and the text is their lossy UTF-8. A piece ends where no character
  is incomplete.
* All others: a token's text depends on whether it is the text's first and on its neighbour, which
  a window of two tokens shows. With byte fallback a run of byte tokens (`<0xE2>`) is a text of its
  own: where it is valid UTF-8 as a whole it is that text, else each byte is one U+FFFD. So a run
  is final when it ends, or as soon as it cannot become valid any more.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Protocol

from mini_infer.errors import ModelFolderError

from mini_infer_tokenizer.encode import TextTokenizer

Piece = tuple[int, str]
"""Number of ids, and their text."""

MAX_HELD_IDS = 4
"""Ids of a byte-level decoder that wait for a character's rest: it has at most 4 bytes."""
MAX_BYTE_RUN = 64
"""Byte tokens that wait for the end of their run. A longer run is split: should it become invalid
behind this point, its beginning was released as the valid text it was until then, where `decode`
would give U+FFFD for all of it."""

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_DECODERS = frozenset(
    {"WordPiece", "Metaspace", "BPEDecoder", "Replace", "ByteFallback", "Fuse", "Strip"}
)


class PieceReader(Protocol):
    """Reads one stream of ids."""

    def feed(self, token_id: int) -> Sequence[Piece]:
        """Takes the next id; returns the pieces that are final now."""

    def flush(self) -> Sequence[Piece]:
        """Ends the stream; returns the pieces of the ids that were held."""


def piece_readers(tokenizer: TextTokenizer, skip_special_tokens: bool) -> Callable[[], PieceReader]:
    """What opens readers over a tokenizer; the tables they share are made here, once.

    Raises:
        ModelFolderError: Where tokenizer.json has a decoder that is not supported.
    """
    kinds = _decoder_kinds(tokenizer.decoder)
    silent = tokenizer.special_ids if skip_special_tokens else frozenset()
    tokens = {each: token for each, token in tokenizer.tokens() if each not in silent}
    if kinds == ["ByteLevel"]:
        return partial(ByteLevelReader, {each: _bytes_of(token) for each, token in tokens.items()})
    unknown = sorted(set(kinds) - _DECODERS)
    if unknown:
        supported = ", ".join(["ByteLevel alone", *sorted(_DECODERS)])
        raise ModelFolderError(
            f"tokenizer.json: expected decoders among {supported}, got {', '.join(unknown)}"
        )
    byte_tokens = {}
    if "ByteFallback" in kinds:
        matches = ((each, _BYTE_TOKEN.fullmatch(token)) for each, token in tokens.items())
        byte_tokens = {each: bytes.fromhex(match[1]) for each, match in matches if match}
    decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    decode_alone = cache(lambda token_id: decode((token_id,)))
    return partial(WindowReader, decode, decode_alone, frozenset(tokens), byte_tokens)


class ByteLevelReader:
    """Pieces of a byte-level tokenizer, by a table from id to bytes."""

    __slots__ = ("_bytes_of", "_num_held", "_pending", "_text")

    def __init__(self, bytes_of: Mapping[int, bytes]) -> None:
        """Begins a stream.

        Args:
            bytes_of: Bytes of each id; an id that is not in it has none.
        """
        self._bytes_of = bytes_of
        self._num_held = 0
        self._text = ""
        self._pending = b""

    def feed(self, token_id: int) -> Sequence[Piece]:
        """Takes the next id; a piece is closed where no character is incomplete."""
        token = self._bytes_of.get(token_id, b"")
        data = self._pending + token
        text, num_read = utf_8_decode(data, "replace", False)
        self._pending = data[num_read:]
        if not self._num_held and not self._pending:
            return ((1, text),)
        self._num_held += 1
        self._text += text
        if not self._pending:
            return self._close(num_kept=0)
        # The ids before this one are final where their last character turned out to be broken,
        # and this id begins another; and no character needs so many ids: where each ends inside
        # another character, they are let go, but for one that the pending bytes come out with.
        begins_here = text and len(self._pending) == len(token)
        if begins_here or self._num_held == MAX_HELD_IDS:
            return self._close(num_kept=1)
        return ()

    def flush(self) -> Sequence[Piece]:
        """Ends the stream; an incomplete character comes out as U+FFFD."""
        if not self._num_held:
            return ()
        self._text += utf_8_decode(self._pending, "replace", True)[0]
        self._pending = b""
        return self._close(num_kept=0)

    def _close(self, num_kept: int) -> Sequence[Piece]:
        piece = (self._num_held - num_kept, self._text)
        self._num_held, self._text = num_kept, ""
        return (piece,)


class WindowReader:
    """Pieces of a tokenizer whose tokens are text, by decoding each with the one before it."""

    __slots__ = (
        "_byte_tokens",
        "_context",
        "_decode",
        "_decode_alone",
        "_num_before",
        "_run",
        "_spoken",
    )

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        decode_alone: Callable[[int], str],
        spoken: frozenset[int],
        byte_tokens: Mapping[int, bytes],
    ) -> None:
        """Begins a stream.

        Args:
            decode: The text of ids.
            decode_alone: The text of an id that is the only one.
            spoken: The ids that `decode` does not leave out.
            byte_tokens: The byte that an id stands for, where the decoder has byte fallback.
        """
        self._decode = decode
        self._decode_alone = decode_alone
        self._spoken = spoken
        self._byte_tokens = byte_tokens
        self._context: tuple[int, ...] = ()  # Decoded in front of each token: mostly one id.
        self._num_before = 0  # Length of the context's text.
        self._run: _ByteRun | None = None

    def feed(self, token_id: int) -> Sequence[Piece]:
        """Takes the next id; only byte tokens, and what is silent among them, are held."""
        if token_id not in self._spoken:
            if self._run and self._run.extend_silently():
                return ()
            return ((1, ""),)
        byte = self._byte_tokens.get(token_id)
        if byte is None:
            return (*self.flush(), (1, self._text_of(token_id)))
        if self._run is None:
            self._run = self._begin_run(token_id)
        return self._run.extend(byte)

    def flush(self) -> Sequence[Piece]:
        """Ends the run of byte tokens, if there is one."""
        if self._run is None:
            return ()
        pieces = self._run.end()
        self._run = None
        return pieces

    def _text_of(self, token_id: int) -> str:
        """The text that a token adds behind what came before it."""
        text = self._decode((*self._context, token_id))[self._num_before :]
        if text:
            self._set_context(token_id)
        elif token_id not in self._context:  # Alone it would not show that a text has begun.
            self._context += (token_id,)
        return text

    def _begin_run(self, token_id: int) -> _ByteRun:
        if self._num_before:
            return _ByteRun(strip_first=False)
        strip_first = not self._decode((*self._context, token_id))
        self._set_context(token_id)
        return _ByteRun(strip_first)

    def _set_context(self, token_id: int) -> None:
        self._context = (token_id,)
        self._num_before = len(self._decode_alone(token_id))


class _ByteRun:
    """Byte tokens, one after the other, whose text is not final yet."""

    __slots__ = ("_is_broken", "_sizes", "_strip_first", "_tail", "_text")

    def __init__(self, strip_first: bool) -> None:
        """Begins a run.

        Args:
            strip_first: Whether the decoder takes away the first character, a space that begins
                the text, if the run is valid.
        """
        self._strip_first = strip_first
        self._is_broken = False
        self._text = ""
        self._tail = b""  # Bytes of the character that is incomplete.
        self._sizes: list[int] = []  # Of each byte: the ids that are released with it.

    def extend(self, byte: bytes) -> Sequence[Piece]:
        """Takes the next byte."""
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

    def end(self) -> Sequence[Piece]:
        """Ends the run; only now it is known whether all of it is valid."""
        return self._take_replaced() if self._tail else self._take_characters()

    def _take_replaced(self) -> Sequence[Piece]:
        pieces = [(size, _REPLACEMENT) for size in self._sizes]
        self._sizes, self._text, self._tail = [], "", b""
        return pieces

    def _take_characters(self) -> Sequence[Piece]:
        """A piece for each complete character."""
        pieces = []
        begin = 0
        for character in self._text:
            end = begin + len(character.encode())
            pieces.append((sum(self._sizes[begin:end]), character))
            begin = end
        if self._strip_first and pieces:
            pieces[0] = (pieces[0][0], "")
            self._strip_first = False
        self._sizes, self._text = self._sizes[begin:], ""
        return pieces


def _decoder_kinds(decoder: dict[str, Any] | None) -> list[str]:
    """The decoder's types in order, those of a Sequence one by one."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [kind for each in decoder["decoders"] for kind in _decoder_kinds(each)]
    return [str(decoder.get("type"))]


def _printable_bytes() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    written = {chr(byte): byte for byte in printable}
    return written | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _printable_bytes()


def _bytes_of(token: str) -> bytes:
    """The bytes of a token; an added token that is not written in that table is plain text."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()
