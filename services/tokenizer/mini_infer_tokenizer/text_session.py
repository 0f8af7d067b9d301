"""The open text streams of one gateway, fed by columnar steps."""

from __future__ import annotations

from collections.abc import Iterable

from mini_infer.messages import OpenText, TextDeltas, TextStep

from mini_infer_tokenizer.detokenize import NO_STOP, Detokenizer, TextStream


class TextSession:
    """Owns the text streams of one gateway; knows no sockets."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        """Begins without streams."""
        self._detokenizer = detokenizer
        self._streams: dict[int, TextStream] = {}

    def __len__(self) -> int:
        """Number of open streams."""
        return len(self._streams)

    def open(self, message: OpenText) -> None:
        """Opens a stream; one of the same number is replaced."""
        self._streams[message.stream] = self._detokenizer.open(
            stop=message.stop,
            skip_special_tokens=message.skip_special_tokens,
            include_stop_str_in_output=message.include_stop_str_in_output,
            min_tokens=message.min_tokens,
            output_ids=message.output_ids,
            ids_only=message.ids_only,
        )

    def step(self, step: TextStep) -> tuple[TextDeltas, list[int]]:
        """Reads the ids of a step.

        Returns:
            A row for every row whose stream is open, and the streams that are not. A stream whose
            ids do not follow on those it has read is closed and counts as not open; ids that it
            has read already are left out.

        Raises:
            ValueError: Where the columns do not fit each other.
        """
        _check_columns(step)
        deltas = TextDeltas([], [], [], [], [])
        unknown = []
        begin = 0
        for number, start, count, last in zip(
            step.streams, step.starts, step.counts, step.last, strict=True
        ):
            end = begin + count
            stream = self._streams.get(number)
            if stream is None or start > stream.num_read:
                self.close([number])
                unknown.append(number)
            else:
                num_repeated = stream.num_read - start
                delta = stream.read(step.token_ids[begin + num_repeated : end], last)
                deltas.streams.append(number)
                deltas.ids_consumed.append(stream.num_read)
                deltas.ids_released.append(delta.num_ids)
                deltas.texts.append(delta.text)
                deltas.stop_indices.append(delta.stop_index)
                if last or delta.stop_index != NO_STOP:
                    self.close([number])
            begin = end
        return deltas, unknown

    def close(self, streams: Iterable[int]) -> None:
        """Forgets streams; those that are not open are ignored."""
        for number in streams:
            self._streams.pop(number, None)

    def keep_only(self, streams: Iterable[int]) -> None:
        """Forgets every stream that the gateway does not hold any more."""
        self.close(self._streams.keys() - set(streams))


def _check_columns(step: TextStep) -> None:
    num_rows = len(step.streams)
    if not num_rows == len(step.starts) == len(step.counts) == len(step.last):
        raise ValueError("the columns of a TextStep differ in length")
    if min(step.counts, default=0) < 0 or sum(step.counts) != len(step.token_ids):
        raise ValueError("the counts of a TextStep do not add up to its ids")
    if min(step.starts, default=0) < 0 or min(step.token_ids, default=0) < 0:
        raise ValueError("a TextStep has negative numbers")
