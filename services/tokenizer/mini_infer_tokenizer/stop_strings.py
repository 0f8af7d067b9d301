"""Finding stop strings in a text that arrives in pieces, in time linear in the text.

Each stop string is matched by the algorithm of Knuth, Morris and Pratt, whose state is one number:
how much of the string the text ends with. `detokenize.py` decides what a match means.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Match(NamedTuple):
    """A stop string that the text just completed.

    Attributes:
        string_index: Which one.
        length: Of the stop string, in characters.
        end: Where it ends in the text that was scanned last, in characters.
    """

    string_index: int
    length: int
    end: int


class StopMatcher:
    """Looks for some stop strings in one text; remembers how far each of them has come.

    Attributes:
        num_open: Length of the longest end of the text, in characters, that may become a match.
    """

    __slots__ = ("_borders", "_firsts", "_num_matched", "_strings", "num_open")

    def __init__(self, strings: Sequence[str]) -> None:
        """Prepares the strings.

        Args:
            strings: What to look for; an empty one never matches.
        """
        self._strings = tuple(strings)
        self._borders = [_borders(string) for string in strings]
        self._firsts = {string[0] for string in strings if string}
        self._num_matched = [0] * len(strings)
        self.num_open = 0

    def scan(self, text: str) -> Match | None:
        """Reads more of the text.

        Returns:
            The match that is completed first; of several completed by the same character the
            one that begins first, and of equal stop strings the first in the list. The whole
            text is read in any case.
        """
        if not self.num_open and self._firsts.isdisjoint(text):
            return None
        found = None
        for index, (string, num_matched) in enumerate(
            zip(self._strings, self._num_matched, strict=True)
        ):
            if not string or (not num_matched and string[0] not in text):
                continue
            end = self._scan_for(index, text)
            if end:
                match = Match(index, len(string), end)
                if found is None or (end, -match.length) < (found.end, -found.length):
                    found = match
        self.num_open = max(self._num_matched, default=0)
        return found

    def _scan_for(self, index: int, text: str) -> int:
        """Reads the text for one string, which goes on or begins in it.

        Returns:
            Where the first match ends, or 0.
        """
        string, borders = self._strings[index], self._borders[index]
        num_matched = self._num_matched[index]
        if num_matched + len(text) < len(string):  # Too short to complete it: mostly one look.
            if not num_matched:
                self._num_matched[index] = _overlap(text, string)
                return 0
            if string.startswith(text, num_matched):
                self._num_matched[index] += len(text)
                return 0
        first_end = 0
        for end, character in enumerate(text, start=1):
            while num_matched and string[num_matched] != character:
                num_matched = borders[num_matched]
            if string[num_matched] == character:
                num_matched += 1
                if num_matched == len(string):
                    first_end = first_end or end
                    num_matched = borders[num_matched]
        self._num_matched[index] = num_matched
        return first_end


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of a shorter text that begins the string."""
    begin = text.find(string[0])
    while begin >= 0 and not string.startswith(text[begin:]):
        begin = text.find(string[0], begin + 1)
    return len(text) - begin if begin >= 0 else 0


@lru_cache(maxsize=256)
def _borders(string: str) -> array[int]:
    """For each prefix, by its length: the longest shorter prefix that it also ends with.

    Kept for the next streams, which mostly ask for the same strings.
    """
    borders = array("H", bytes(2 * (len(string) + 1)))
    border = 0
    for length in range(2, len(string) + 1):
        character = string[length - 1]
        while border and string[border] != character:
            border = borders[border]
        if string[border] == character:
            border += 1
        borders[length] = border
    return borders
