"""Finding stop strings in a text that arrives in pieces, in time linear in the text.

Each stop string is matched by the algorithm of Knuth, Morris and Pratt, whose state is one number:
how much of the string the text ends with. `detokenize.py` decides what a match means.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
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
    """Looks for some stop strings in one text; remembers how far each of them has come."""

    __slots__ = ("_borders", "_num_matched", "_strings")

    def __init__(self, strings: Sequence[str]) -> None:
        """Prepares the strings.

        Args:
            strings: What to look for; an empty one never matches.
        """
        self._strings = tuple(strings)
        self._borders = [_borders(string) for string in strings]
        self._num_matched = [0] * len(strings)

    @property
    def num_open(self) -> int:
        """Length of the longest end of the text, in characters, that may become a match."""
        return max(self._num_matched, default=0)

    def scan(self, text: str) -> Match | None:
        """Reads more of the text.

        Returns:
            The match that is completed first; of several completed by the same character the
            one that begins first, and of equal stop strings the first in the list. The whole
            text is read in any case.
        """
        found = None
        for index in range(len(self._strings)):
            end = self._scan_for(index, text)
            if end:
                match = Match(index, len(self._strings[index]), end)
                if found is None or (end, -match.length) < (found.end, -found.length):
                    found = match
        return found

    def _scan_for(self, index: int, text: str) -> int:
        """Reads the text for one string; returns where the first match ends, or 0."""
        string, borders = self._strings[index], self._borders[index]
        num_matched = self._num_matched[index]
        first_end = 0
        if not string or (num_matched == 0 and string[0] not in text):
            return first_end
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


def _borders(string: str) -> array[int]:
    """For each prefix, by its length: the longest shorter prefix that it also ends with."""
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
