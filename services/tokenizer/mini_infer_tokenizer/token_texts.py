"""What the decoder of tokenizer.json makes of a token, by the token's place in the text.

A decoder is a list of steps over the tokens of a whole text. This module finds out which of them
look at one token alone (asked of the library itself, token by token, and remembered by the
readers of `pieces.py`), and which look beyond it: byte fallback, joining, removing repetitions,
stripping the beginning. Steps in an order in which that cannot be told apart are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

import tokenizers
from mini_infer.errors import ModelFolderError

Step = dict[str, Any]

_BY_PLACE = frozenset({"WordPiece", "Metaspace", "BPEDecoder", "Replace", "Strip"})
"""Steps that make each token's text of the token, and of whether it is the first or the last."""
_PROBES = ("\ue000", "\ue001", "\ue002")
"""Tokens to put around another one: no decoder has a use for characters of private use.

There are three, so that two remain where the token is one of them: CTC drops what is repeated.
"""


class TokenText(NamedTuple):
    """The text of a token behind others (or at the beginning).

    Attributes:
        last: If no token follows.
        inner: If one does.
    """

    last: str
    inner: str


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """A decoder, taken apart.

    Attributes:
        is_byte_level: Tokens are bytes, written in GPT-2's alphabet; nothing else applies then.
        has_byte_fallback: Tokens such as `<0xE2>` are bytes.
        drops_repeated: A token that equals the one before it has no text.
        depends_on_next: A token's text depends on whether it is the last.
        num_to_strip: So many characters `strip`, at most, are left out where the text begins.
        strip: See `num_to_strip`.
        by_place: The other steps, which make the text of each token; None means a space between
            two tokens.
    """

    is_byte_level: bool = False
    has_byte_fallback: bool = False
    drops_repeated: bool = False
    depends_on_next: bool = False
    num_to_strip: int = 0
    strip: str = ""
    by_place: tuple[Step, ...] | None = ()


def plan_decoder(steps: Sequence[Step] | None) -> DecoderPlan:
    """Takes a decoder apart.

    Args:
        steps: As in tokenizer.json; None means that tokens are joined by spaces.

    Raises:
        ModelFolderError: Where the steps, or their order, are not supported.
    """
    if steps is None:
        return DecoderPlan(by_place=None)
    kinds = [str(step["type"]) for step in steps]
    if kinds == ["ByteLevel"]:
        return DecoderPlan(is_byte_level=True)
    if kinds[:1] == ["CTC"] and set(kinds[1:]) <= {"Fuse"}:
        return DecoderPlan(drops_repeated=True, by_place=(steps[0],))
    num_split = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    single, joined = list(steps[:num_split]), [s for s in steps[num_split:] if s["type"] != "Fuse"]
    strip = joined.pop() if joined and joined[-1]["type"] == "Strip" else None
    has_byte_fallback = bool(single) and single[-1]["type"] == "ByteFallback"
    if has_byte_fallback:
        single.pop()
    _check(single, joined, has_byte_fallback, kinds)
    for step in steps:
        _check_step(step)
    return DecoderPlan(
        has_byte_fallback=has_byte_fallback,
        depends_on_next="BPEDecoder" in kinds,
        num_to_strip=int(strip["start"]) if strip else 0,
        strip=str(strip["content"]) if strip else "",
        by_place=(*single, *joined),
    )


def _check(
    single: Sequence[Step], joined: Sequence[Step], has_byte_fallback: bool, kinds: Sequence[str]
) -> None:
    """Checks the steps before and behind Fuse, ByteFallback and the last Strip taken away."""
    allowed = {"Replace", "Strip"} if has_byte_fallback else _BY_PLACE
    # Behind Fuse a step sees the text, which is as good as its tokens for single characters.
    characters_only = all(
        step["type"] == "Replace"
        and isinstance(step.get("pattern"), dict)
        and len(str(step["pattern"].get("String", ""))) == 1
        for step in joined
    )
    is_supported = {step["type"] for step in single} <= allowed and characters_only
    if not is_supported or (has_byte_fallback and joined):
        raise ModelFolderError(
            f"tokenizer.json: expected its decoder to be ByteLevel, CTC, or any of "
            f"{', '.join(sorted(_BY_PLACE))}, then ByteFallback, Fuse and Strip; "
            f"got {', '.join(kinds)}"
        )


def _check_step(step: Step) -> None:
    if step["type"] == "Replace" and "String" not in (step.get("pattern") or ()):
        raise ModelFolderError("tokenizer.json: expected decoders to replace a String, no Regex")
    if step["type"] == "Strip" and step.get("stop") != 0:
        raise ModelFolderError(
            f"tokenizer.json: expected decoders that strip no end, got stop {step.get('stop')}"
        )


class TokenTexts:
    """The text of tokens, asked of the library's decoder."""

    def __init__(self, plan: DecoderPlan) -> None:
        """Makes a decoder of the steps that look at one token alone.

        Raises:
            ModelFolderError: Where the library refuses them, or they take anything for a part of
                their own notation.
        """
        self._decode = _library_decoder(plan.by_place)
        self._ends: dict[str, str] = {}
        """The text of each probe behind another one, with what separates them."""
        for before, after in permutations(_PROBES, 2):
            joined = self._decode([before, after])
            if self._decode([before]) != before or not joined.startswith(before):
                raise ModelFolderError(
                    "tokenizer.json: its decoder changes characters of private use"
                )
            self._ends[after] = joined[len(before) :]

    def first(self, token: str) -> TokenText:
        """The text of a token that begins a text."""
        after, _ = _probes_beside(token)
        inner = self._decode([token, after])
        return TokenText(self._decode([token]), inner.removesuffix(self._ends[after]))

    def behind(self, token: str) -> TokenText:
        """The text of a token behind another."""
        before, after = _probes_beside(token)
        last = self._decode([before, token]).removeprefix(before)
        inner = self._decode([before, token, after]).removeprefix(before)
        return TokenText(last, inner.removesuffix(self._ends[after]))


def _probes_beside(token: str) -> tuple[str, str]:
    first, second, *_ = (probe for probe in _PROBES if probe != token)
    return first, second


def _library_decoder(steps: Sequence[Step] | None) -> Callable[[list[str]], str]:
    if steps is None:
        return " ".join
    file = {
        "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
        "decoder": {"type": "Sequence", "decoders": steps},
    }
    decode: Callable[[list[str]], str] = tokenizers.Tokenizer.from_str(
        json.dumps(file)
    ).decoder.decode
    return decode


def bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; one that is not written in GPT-2's table is plain text."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _printable_bytes() -> dict[str, int]:
    """The character by which byte-level tokenizers write each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    written = {chr(byte): byte for byte in printable}
    return written | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _printable_bytes()
