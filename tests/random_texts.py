"""Texts that tokenizers find hard, many a second and from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

FRAGMENTS = [
    *["狐狸住在河边。", "キツネは川", "여우는 강가에", "𠮷野家", "龘"],
    *["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "😀😀😀", "☃\ufe0f"],
    *["يعيش الثعلب", "השועל גר", "\u202eabc\u202c", "ﷺ"],
    *["e\u0301", "Z\u0351\u036b\u0343\u0329", "\u0300" * 5, "né"],
    *["\0", "\x07", "\r\n", "\t", "  ", "   ", " ", "\n\n", "\u00a0", "\u200b", "\ufeff", "\u2581"],
    *["\ufffd", "\ufffd\ufffd\ufffd", "<0xE2>", "<0x0A>", "##c", "</w>", "@@x", "<unk>", "|"],
    *[
        "fox",
        "The river",
        "didn't",
        " .",
        " ,",
        "Wald!",
        "x + 1",
        "1234567",
        "aaa",
        "ABC",
        "ß",
        "\u0131",
    ],
]


class TextMaker:
    """Makes texts of such fragments, of others given to it, and of single characters."""

    def __init__(self, generator: random.Random, fragments: Sequence[str] = ()) -> None:
        self._generator = generator
        self._fragments = [*FRAGMENTS, *fragments]

    def make(self) -> str:
        """Any text of up to a dozen fragments, without half a surrogate pair."""
        generator = self._generator
        parts = generator.choices(self._fragments, k=generator.randrange(8))
        for _ in range(generator.randrange(3)):
            code = generator.randrange(generator.choice((0x80, 0x800, 0xD800, 0x20000)))
            parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
        generator.shuffle(parts)
        return generator.choice(("", " ")).join(parts)
