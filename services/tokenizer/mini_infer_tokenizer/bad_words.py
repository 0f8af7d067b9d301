"""Words that an output must not contain, as lists of ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mini_infer.errors import ErrorReason, MiniInferError

from mini_infer_tokenizer.encode import TextTokenizer

_MARKER = "\x02"
"""Behind it, a tokenizer that puts a space before every text puts none before the word."""


def bad_word_sequences(tokenizer: TextTokenizer, words: Sequence[str]) -> list[list[int]]:
    """The lists of ids that write a word: as it is, behind a space, and inside another word.

    Returns:
        At least one list for each word, none of them empty, each one once.

    Raises:
        MiniInferError: INVALID_FIELD where a word has no ids or is no Unicode.
    """
    marker = tokenizer.encode(_MARKER, add_special_tokens=False)
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        forms = [form for form in _forms(tokenizer, word, marker) if form]
        if not forms:
            message = f"expected bad words that have tokens, got {word!r:.40}"
            raise MiniInferError(ErrorReason.INVALID_FIELD, message)
        sequences.update(dict.fromkeys(forms))
    return [list(each) for each in sequences]


def _forms(tokenizer: TextTokenizer, word: str, marker: list[int]) -> Iterable[tuple[int, ...]]:
    yield tuple(tokenizer.encode(word, add_special_tokens=False))
    behind_space = word.lstrip(" ")
    if behind_space:
        yield tuple(tokenizer.encode(f" {behind_space}", add_special_tokens=False))
    inside = tokenizer.encode(_MARKER + word, add_special_tokens=False)
    if inside[: len(marker)] == marker:
        yield tuple(inside[len(marker) :])
