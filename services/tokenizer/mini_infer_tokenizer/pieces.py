"""Token ids to *pieces*: runs of ids together with their text, as soon as that text is final.

A piece is closed where no later id can change its text, so the texts of the pieces, one after
the other, are what `TextTokenizer.decode` gives for all the ids. Which ids share a piece depends
on the ids alone, never on how they arrive. Each id costs O(1): its text is looked up in a table,
which is filled as ids are met (`token_texts.py` asks the library).

There is a reader for each thing that a token's text can depend on:

* `ByteLevelReader`: a token is bytes, and the text is their lossy UTF-8.
* `PlaceReader`: whether the token is the text's first.
* `NextReader`: also, whether another token follows.
* `RepeatReader`: also, whether the token before it was the same.
* `FallbackReader`: runs of byte tokens are a text of their own (`byte_runs.py`).
* `StripReader`, around one of these: spaces that begin the text are left out.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from mini_infer_tokenizer.byte_runs import ByteRun, byte_of
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.token_texts import (
    DecoderPlan,
    TokenText,
    TokenTexts,
    bytes_of,
    plan_decoder,
)

Piece = tuple[int, str]
"""Number of ids, and their text."""
Pieces = Sequence[Piece]
TokenOf = Callable[[int], str | None]
"""A token by its id; None for an id that is left out of the text."""

_Entry = TypeVar("_Entry")

MAX_HELD_IDS = 4
"""Ids of a byte-level decoder that wait for a character's rest: it has at most 4 bytes."""

_SILENT: Pieces = ((1, ""),)
"""An id that is left out; readers tell it by identity from a token whose text is empty."""


class PieceReader(Protocol):
    """Reads one stream of ids."""

    def feed(self, token_id: int) -> Pieces:
        """Takes the next id; returns the pieces that are final now."""

    def flush(self) -> Pieces:
        """Ends the stream; returns the pieces of the ids that were held."""


def piece_readers(tokenizer: TextTokenizer, skip_special_tokens: bool) -> Callable[[], PieceReader]:
    """What opens readers over a tokenizer; they share its tables.

    Raises:
        ModelFolderError: Where tokenizer.json has a decoder that is not supported.
    """
    plan = plan_decoder(tokenizer.decoder_steps)
    token_of = partial(tokenizer.token, skip_special_tokens=skip_special_tokens)
    if plan.is_byte_level:
        return partial(ByteLevelReader, Table(token_of, _whole_text_or_bytes, _SILENT))
    open_reader = _reader_of_texts(plan, token_of)
    if plan.num_to_strip:
        return lambda: StripReader(open_reader(), plan.strip, plan.num_to_strip)
    return open_reader


def _reader_of_texts(plan: DecoderPlan, token_of: TokenOf) -> Callable[[], PieceReader]:
    texts = TokenTexts(plan)
    first, behind = texts.first, texts.behind
    if plan.has_byte_fallback:
        return partial(FallbackReader, Table(token_of, partial(_byte_or_text, behind), _SILENT))
    if plan.drops_repeated:
        repeats = Table(token_of, lambda token: (token, _piece(behind(token).last)), None)
        return partial(RepeatReader, repeats)
    if plan.depends_on_next:
        return partial(NextReader, Table(token_of, first, None), Table(token_of, behind, None))
    return partial(
        PlaceReader,
        Table(token_of, lambda token: _piece(first(token).last), _SILENT),
        Table(token_of, lambda token: _piece(behind(token).last), _SILENT),
    )


class Table(dict[int, _Entry]):
    """What readers know of an id, made when it is first met."""

    def __init__(self, token_of: TokenOf, make: Callable[[str], _Entry], left_out: _Entry) -> None:
        """Begins empty.

        Args:
            token_of: The token of an id.
            make: The entry of a token.
            left_out: The entry of all ids without a token. It is not kept: there are many.
        """
        super().__init__()
        self._token_of = token_of
        self._make = make
        self._left_out = left_out

    def __missing__(self, token_id: int) -> _Entry:
        """Makes an entry."""
        token = self._token_of(token_id)
        if token is None:
            return self._left_out
        entry = self[token_id] = self._make(token)
        return entry


class ByteLevelReader:
    """Pieces of a byte-level tokenizer."""

    __slots__ = ("_num_held", "_pending", "_table", "_text")

    def __init__(self, table: Table[Pieces | bytes]) -> None:
        """Begins a stream.

        Args:
            table: The piece of a token that is whole characters, the bytes of any other.
        """
        self._table = table
        self._num_held = 0
        self._text = ""
        self._pending = b""

    def feed(self, token_id: int) -> Pieces:
        """Takes the next id; a piece is closed where no character is incomplete."""
        token = self._table[token_id]
        if not isinstance(token, bytes):
            if not self._num_held:
                return token
            token = token[0][1].encode()
        data = self._pending + token
        text, num_read = utf_8_decode(data, "replace", False)
        self._pending = data[num_read:]
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

    def flush(self) -> Pieces:
        """Ends the stream; an incomplete character comes out as U+FFFD."""
        if not self._num_held:
            return ()
        self._text += utf_8_decode(self._pending, "replace", True)[0]
        self._pending = b""
        return self._close(num_kept=0)

    def _close(self, num_kept: int) -> Pieces:
        piece = (self._num_held - num_kept, self._text)
        self._num_held, self._text = num_kept, ""
        return (piece,)


class PlaceReader:
    """Pieces where a token's text depends on whether it is the first: WordPiece, Metaspace."""

    __slots__ = ("_behind", "_first", "_pieces")

    def __init__(self, first: Table[Pieces], behind: Table[Pieces]) -> None:
        """Begins a stream; takes the piece of each token as the first one, and behind others."""
        self._pieces = self._first = first
        self._behind = behind

    def feed(self, token_id: int) -> Pieces:
        """Takes the next id; nothing is held."""
        pieces = self._pieces[token_id]
        if pieces is not _SILENT:
            self._pieces = self._behind
        return pieces

    def flush(self) -> Pieces:
        """Ends the stream."""
        return ()


class NextReader:
    """Pieces where a token's text depends on its place and on whether a token follows.

    With an end-of-word suffix, the space behind a word comes with the next token. A token whose
    text would change otherwise (a suffix inside it) is held until the next one.
    """

    __slots__ = ("_behind", "_held", "_num_held", "_owed", "_texts")

    def __init__(self, first: Table[TokenText | None], behind: Table[TokenText | None]) -> None:
        """Begins a stream; takes the text of each token as the first one, and behind others."""
        self._texts = first
        self._behind = behind
        self._owed = ""  # What the last token's text becomes longer by, if a token follows.
        self._held: TokenText | None = None
        self._num_held = 0

    def feed(self, token_id: int) -> Pieces:
        """Takes the next id."""
        token = self._texts[token_id]
        if self._held is None:
            return _SILENT if token is None else self._take(token)
        if token is None:
            self._num_held += 1
            return ()
        before = (self._num_held, self._held.inner)
        self._held = None
        return (before, *self._take(token))

    def flush(self) -> Pieces:
        """Ends the stream; what is held is the last token."""
        if self._held is None:
            return ()
        piece = (self._num_held, self._held.last)
        self._held = None
        return (piece,)

    def _take(self, token: TokenText) -> Pieces:
        self._texts = self._behind
        last, inner = token
        owed, self._owed = self._owed, ""
        if not inner.startswith(last):
            self._held = TokenText(owed + last, owed + inner)
            self._num_held = 1
            return ()
        self._owed = inner[len(last) :]
        return ((1, owed + last),)


class RepeatReader:
    """Pieces of a CTC tokenizer: a token that is repeated has no text."""

    __slots__ = ("_last", "_table")

    def __init__(self, table: Table[tuple[str, Pieces] | None]) -> None:
        """Begins a stream; takes each token with its piece."""
        self._table = table
        self._last: str | None = None

    def feed(self, token_id: int) -> Pieces:
        """Takes the next id; nothing is held."""
        entry = self._table[token_id]
        if entry is None:
            return _SILENT
        token, pieces = entry
        if token == self._last:
            return _SILENT
        self._last = token
        return pieces

    def flush(self) -> Pieces:
        """Ends the stream."""
        return ()


class FallbackReader:
    """Pieces where runs of byte tokens are a text of their own; what is silent does not end one."""

    __slots__ = ("_run", "_table")

    def __init__(self, table: Table[Pieces | bytes]) -> None:
        """Begins a stream; takes the byte of each byte token, the piece of any other."""
        self._table = table
        self._run: ByteRun | None = None

    def feed(self, token_id: int) -> Pieces:
        """Takes the next id; only byte tokens, and what is silent among them, are held."""
        token = self._table[token_id]
        if isinstance(token, bytes):
            if self._run is None:
                self._run = ByteRun()
            return self._run.extend(token)
        if self._run is None:
            return token
        if token is _SILENT:
            return () if self._run.extend_silently() else _SILENT
        return (*self.flush(), *token)

    def flush(self) -> Pieces:
        """Ends the run of byte tokens, if there is one."""
        if self._run is None:
            return ()
        pieces = self._run.end()
        self._run = None
        return pieces


class StripReader:
    """Pieces of another reader without the spaces that begin the text."""

    __slots__ = ("_feed", "_num_left", "_reader", "_strip")

    def __init__(self, reader: PieceReader, strip: str, num_to_strip: int) -> None:
        """Begins a stream.

        Args:
            reader: Where nothing was read yet.
            strip: The character that is left out.
            num_to_strip: How often, at most.
        """
        self._reader = reader
        self._feed = reader.feed
        self._strip = strip
        self._num_left = num_to_strip

    def feed(self, token_id: int) -> Pieces:
        """Takes the next id."""
        pieces = self._feed(token_id)
        return [self._without(piece) for piece in pieces] if self._num_left else pieces

    def flush(self) -> Pieces:
        """Ends the stream."""
        return [self._without(piece) for piece in self._reader.flush()]

    def _without(self, piece: Piece) -> Piece:
        num_ids, text = piece
        begin = 0
        while begin < min(len(text), self._num_left) and text[begin] == self._strip:
            begin += 1
        self._num_left = self._num_left - begin if begin == len(text) else 0
        return num_ids, text[begin:]


def _piece(text: str) -> Pieces:
    return ((1, text),)


def _byte_or_text(text_of: Callable[[str], TokenText], token: str) -> Pieces | bytes:
    text = text_of(token).last
    return byte_of(text) or _piece(text)


def _whole_text_or_bytes(token: str) -> Pieces | bytes:
    data = bytes_of(token)
    try:
        return _piece(data.decode())
    except UnicodeDecodeError:
        return data
