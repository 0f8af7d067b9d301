"""Incremental detokenization: a stream's ids to its text, with stop strings.

Text is released a whole token at a time: the texts released so far are what
`TextTokenizer.decode` gives for the ids released so far. Held back are ids whose text is not
final (`pieces.py`) and, in front of them, text that may be the beginning of a stop string. Each
id costs O(1) amortised. Used by the tokenizer process and by the in-process engine alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.pieces import Piece, PieceReader, piece_readers
from mini_infer_tokenizer.stop_strings import Match, StopMatcher

NO_STOP = -1


class TextDelta(NamedTuple):
    """What a stream releases.

    Attributes:
        num_ids: Number of ids, behind those released before.
        text: Their text; cut where a stop string begins (or ends, if it is to be included).
        stop_index: Index of the stop string that ended the stream at the last of these ids, or
            `NO_STOP`. Ids behind it do not count.
    """

    num_ids: int
    text: str
    stop_index: int


class Detokenizer:
    """Opens text streams over one tokenizer; what they share is computed once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Prepares the tables.

        Raises:
            ModelFolderError: Where the tokenizer's decoder is not supported.
        """
        self._open_reader = {skip: piece_readers(tokenizer, skip) for skip in (False, True)}

    def open(
        self,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        output_ids: Sequence[int] = (),
        ids_only: bool = False,
    ) -> TextStream:
        """Begins a stream.

        Args:
            stop: Strings that end it; an empty one never does.
            skip_special_tokens: Leave special tokens out of the text.
            include_stop_str_in_output: Keep a matched stop string in the text.
            min_tokens: A match counts only if the id that completes it is the stream's
                `min_tokens`-th or a later one, those of `output_ids` included. One that is
                complete before stays text for good.
            output_ids: Ids that were released before; the stream goes on behind them.
            ids_only: Look for stop strings, but return no text.
        """
        holder = None
        if stop:
            holder = _StopHolder(stop, include_stop_str_in_output, min_tokens, ids_only)
        reader = self._open_reader[skip_special_tokens]()
        return TextStream(reader, holder, output_ids, ids_only)


class TextStream:
    """The text of one stream of ids. Made by `Detokenizer.open`.

    Attributes:
        num_read: Number of ids read, those released before the stream was opened included.
    """

    __slots__ = ("_feed", "_holder", "_ids_only", "_num_to_skip", "_reader", "num_read")

    def __init__(
        self,
        reader: PieceReader,
        holder: _StopHolder | None,
        output_ids: Sequence[int],
        ids_only: bool,
    ) -> None:
        """Begins behind `output_ids`, whose text was released before."""
        self._reader = reader
        self._feed = reader.feed
        self._holder = holder
        self._ids_only = ids_only
        self._num_to_skip = len(output_ids)
        self.num_read = len(output_ids)
        for token_id in output_ids:
            for piece in reader.feed(token_id):
                self._skip(piece)

    def read(self, token_ids: Sequence[int], last: bool = False) -> TextDelta:
        """Reads the next ids.

        Args:
            token_ids: The ids; any number of them.
            last: No more will come: nothing is held back.

        Returns:
            What is released now. After a stop string or the last ids the stream is over.
        """
        self.num_read += len(token_ids)
        pieces: Sequence[Piece]
        if len(token_ids) == 1 and not last:
            pieces = self._feed(token_ids[0])
        else:
            pieces = [piece for token_id in token_ids for piece in self._feed(token_id)]
            if last:
                pieces += self._reader.flush()
        if self._num_to_skip:
            pieces = [rest for piece in pieces for rest in self._skip(piece)]
        if self._holder is not None:
            return self._holder.take(pieces, last)
        if len(pieces) == 1:
            ((num_ids, text),) = pieces
        else:
            num_ids = sum(num_ids for num_ids, _ in pieces)
            text = "".join([text for _, text in pieces])
        return TextDelta(num_ids, "" if self._ids_only else text, NO_STOP)

    def _skip(self, piece: Piece) -> Sequence[Piece]:
        """Leaves out what was released before; returns what is left of the piece."""
        num_ids, text = piece
        if not self._num_to_skip:
            return (piece,)
        if num_ids > self._num_to_skip:
            num_ids, self._num_to_skip = num_ids - self._num_to_skip, 0
            return ((num_ids, text),)
        self._num_to_skip -= num_ids
        if self._holder is not None:
            self._holder.skip(piece)
        return ()


class _StopHolder:
    """Holds text back while a stop string may be completing."""

    __slots__ = (
        "_held",
        "_ids_only",
        "_include",
        "_matcher",
        "_min_tokens",
        "_num_held",
        "_num_ids",
    )

    def __init__(self, stop: Sequence[str], include: bool, min_tokens: int, ids_only: bool) -> None:
        self._matcher = StopMatcher(stop)
        self._include = include
        self._min_tokens = min_tokens
        self._ids_only = ids_only
        self._held: deque[Piece] = deque()
        self._num_held = 0  # Characters in the held pieces.
        self._num_ids = 0  # Of all pieces so far.

    def skip(self, piece: Piece) -> None:
        """Takes a piece that was released before; a match in it was judged before."""
        num_ids, text = piece
        self._num_ids += num_ids
        self._matcher.scan(text)

    def take(self, pieces: Sequence[Piece], last: bool) -> TextDelta:
        """Takes pieces and returns what no stop string can reach any more."""
        is_alone = len(pieces) == 1 and not self._held
        for piece in pieces:
            num_ids, text = piece
            self._num_ids += num_ids
            match = self._matcher.scan(text)
            if is_alone and match is None and not self._matcher.num_open:
                return TextDelta(num_ids, "" if self._ids_only else text, NO_STOP)
            self._num_held += len(text)
            self._held.append(piece)
            if match is not None and self._num_ids >= self._min_tokens:
                return self._cut(match, self._num_held - len(text) + match.end)
        return self._release(0 if last or self._ids_only else self._matcher.num_open)

    def _release(self, num_open: int) -> TextDelta:
        """Releases pieces from the front as long as `num_open` characters stay."""
        num_ids = 0
        texts = []
        while self._held and self._num_held - len(self._held[0][1]) >= num_open:
            size, text = self._held.popleft()
            self._num_held -= len(text)
            num_ids += size
            texts.append(text)
        return TextDelta(num_ids, "" if self._ids_only else "".join(texts), NO_STOP)

    def _cut(self, match: Match, end: int) -> TextDelta:
        """Ends the stream at a match that ends behind so many held characters."""
        num_ids = sum(num_ids for num_ids, _ in self._held)
        text = "".join(text for _, text in self._held)
        end -= 0 if self._include else match.length
        # A match that began in text released before cannot be taken back.
        return TextDelta(num_ids, "" if self._ids_only else text[: max(end, 0)], match.string_index)
