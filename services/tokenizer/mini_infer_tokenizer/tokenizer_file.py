"""tokenizer.json as hostile input: vetted, and then read by the tokenizers library.

The library trusts its file. Some files make it ask for gigabytes, which ends the process, or make
every text a thousand times longer; others make it panic, which `encode.py` turns into errors. So
the parts that can do the former are checked here by rules of our own, and the library is given
what was checked, written anew: a second part of the same name in the file cannot slip by.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from math import ceil, prod
from typing import Any, NamedTuple

import msgspec
import tokenizers
from mini_infer.errors import ModelFolderError

MAX_IDS = 4 * 2**20
"""Ids run below it: the largest vocabularies known have a sixteenth of that."""
MAX_TOKEN_CHARACTERS = 4096
"""Of a token; the longest known ones are some hundred spaces."""
MAX_GROWTH = 32
"""How many times longer a text may become before it is split into tokens, or by its decoding."""
MAX_STEPS = 64
"""Steps of a normalizer, pre-tokenizer, post-processor or decoder, nested ones included."""
MAX_PART_BYTES = 4 * 2**20
"""Of any part but the model and the added tokens; a map of characters has a megabyte."""
MAX_MODEL_COMMAS = 2 * MAX_IDS
"""Of a model: there are one or two for each token, and for each merge."""
MAX_UNIGRAM_BYTES = 8 * 2**20
"""Of all tokens of a Unigram model: the library makes 340 bytes of each."""
MAX_ADDED_CHARACTERS = 4 * 2**20
"""Of all added tokens; models of speech have some 65,000 of 20 characters."""
MAX_PATTERN_CHARACTERS = 32 * 2**10
"""Of all regular expressions: the library makes a kilobyte of each character of some."""
MAX_TEMPLATE_IDS = 1024
"""Ids that a post-processor puts around a text."""
MAX_WORD_CHARACTERS = 512
"""Of a word that WordPiece splits, which takes cubic time; everybody uses 100."""

_MAX_DEPTH = 16
_MAX_PREPENDED_CHARACTERS = 64
_LONGEST_COMPOSITION_BYTES = 33
"""Of what Unicode itself makes of one character: U+FDFA becomes 18."""
_SAMPLE = "A sample: naïve 狐 👩‍👧 \n"
_NOTHING = msgspec.Raw(b"null")


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _TokenizerFile(msgspec.Struct):
    """The parts of tokenizer.json that serving needs, mostly unread.

    Truncation and padding are left out: they may stand in files that were saved in training.
    """

    model: dict[str, msgspec.Raw]
    version: msgspec.Raw = msgspec.Raw(b'"1.0"')
    added_tokens: list[_AddedToken] = []
    normalizer: msgspec.Raw = _NOTHING
    pre_tokenizer: msgspec.Raw = _NOTHING
    post_processor: msgspec.Raw = _NOTHING
    decoder: msgspec.Raw = _NOTHING

    def read_steps(self) -> dict[str, Any]:
        """The parts that are made of steps, by their name."""
        parts = {}
        for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            part = getattr(self, name)
            if memoryview(part).nbytes > MAX_PART_BYTES:
                raise UnsafeTokenizerError(f"expected {name} of at most {MAX_PART_BYTES} bytes")
            parts[name] = msgspec.json.decode(part)
        return parts


class UnsafeTokenizerError(ValueError):
    """What is wrong with a tokenizer.json; without the file's name."""


def is_library_error(error: BaseException) -> bool:
    """Whether the tokenizers library raised this: a panic of its is not an `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class LoadedTokenizer(NamedTuple):
    """What serving needs of a tokenizer.json.

    Attributes:
        library: The library's tokenizer.
        decoder_steps: The steps of its decoder in order; None where the file has no decoder.
        special_texts: The added tokens that the file calls special.
        largest_id: Of all tokens; -1 if there is none.
    """

    library: tokenizers.Tokenizer
    decoder_steps: list[dict[str, Any]] | None
    special_texts: frozenset[str]
    largest_id: int


def load_tokenizer(content: bytes, source: str) -> LoadedTokenizer:
    """Makes the library's tokenizer of a vetted file.

    Args:
        content: The whole tokenizer.json.
        source: Its name, for errors.

    Raises:
        ModelFolderError: Where the file is damaged, or asks for more than the limits of this
            module.
    """
    try:
        # Of text, because what is passed over in bytes need not be UTF-8.
        file = msgspec.json.decode(content.decode(), type=_TokenizerFile)
        parts = file.read_steps()
        _check_model(file.model)
        _check_added(file.added_tokens)
        _check_steps(parts)
        vetted = {"version": file.version, "added_tokens": file.added_tokens, **parts}
        written = msgspec.json.encode(vetted | {"model": file.model})
        tokenizer = tokenizers.Tokenizer.from_buffer(written)
        _check_words(tokenizer.model)
        largest_id = vet_tokens(tokenizer.get_vocab())
        _try_out(tokenizer)
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise ModelFolderError(f"{source}: is not a valid tokenizer: {error}") from error
    # The library forgets no special token, even where a later entry calls the same text ordinary.
    special = (token.content for token in file.added_tokens if token.special)
    decoder_steps = None if parts["decoder"] is None else _steps(parts["decoder"])
    return LoadedTokenizer(tokenizer, decoder_steps, frozenset(special), largest_id)


def vet_tokens(tokens: Mapping[str, int]) -> int:
    """Checks what no table and no text may be made of.

    Args:
        tokens: Ids by their token.

    Returns:
        The largest id; -1 if there is none.

    Raises:
        UnsafeTokenizerError: Where an id or a token is larger than any known vocabulary needs.
    """
    largest_id = max(tokens.values(), default=-1)
    if largest_id >= MAX_IDS:
        raise UnsafeTokenizerError(f"expected token ids below {MAX_IDS}, got {largest_id}")
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise UnsafeTokenizerError(
            f"expected tokens of at most {MAX_TOKEN_CHARACTERS} characters, got one of {longest}"
        )
    return largest_id


def _check_added(tokens: Iterable[_AddedToken]) -> None:
    num_characters = sum(len(token.content) for token in tokens)
    if num_characters > MAX_ADDED_CHARACTERS:
        raise UnsafeTokenizerError(
            f"expected added tokens of at most {MAX_ADDED_CHARACTERS} characters together, "
            f"got {num_characters}"
        )


def _check_steps(parts: Mapping[str, Any]) -> None:
    """Checks the parts that are made of steps."""
    before = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
    decoder = _steps(parts["decoder"])
    _check_growth(before)
    _check_growth(decoder)
    patterns = [step.get("pattern") for step in (*before, *decoder)]
    num_characters = sum(
        len(str(each.get("Regex", ""))) for each in patterns if isinstance(each, dict)
    )
    if num_characters > MAX_PATTERN_CHARACTERS:
        raise UnsafeTokenizerError(
            f"expected regular expressions of at most {MAX_PATTERN_CHARACTERS} characters "
            f"together, got {num_characters}"
        )
    num_ids = sum(_num_template_ids(step) for step in _steps(parts["post_processor"]))
    if num_ids > MAX_TEMPLATE_IDS:
        raise UnsafeTokenizerError(
            f"expected a post-processor that adds at most {MAX_TEMPLATE_IDS} ids, got {num_ids}"
        )


def _check_model(model: Mapping[str, msgspec.Raw]) -> None:
    """Checks what the library makes tables of, and the prefix, which it cuts off merges unseen.

    Where the prefix is missing it would cut through a character, and end the process when it
    tells of the text.
    """
    num_commas = sum(bytes(value).count(b",") for value in model.values())
    if num_commas > MAX_MODEL_COMMAS:
        raise UnsafeTokenizerError(
            f"expected a model of at most {MAX_IDS} tokens and as many merges, got {num_commas} "
            "commas"
        )
    vocab = model.get("vocab", _NOTHING)
    if memoryview(vocab).tobytes()[:1] == b"[":
        _check_unigram(msgspec.json.decode(vocab, type=list[tuple[str, float]]))
    prefix = msgspec.json.decode(model.get("continuing_subword_prefix") or b"null")
    merges = msgspec.json.decode(model.get("merges") or b"null") if prefix else None
    for merge in merges or ():
        right = merge[-1] if isinstance(merge, list) else merge.split(" ", 1)[-1]
        if not right.startswith(prefix):
            raise UnsafeTokenizerError(f"expected merges with {prefix!r}, got {str(merge)[:80]}")


def _check_unigram(vocab: Iterable[tuple[str, float]]) -> None:
    num_bytes = sum(len(token.encode()) for token, _ in vocab)
    if num_bytes > MAX_UNIGRAM_BYTES:
        raise UnsafeTokenizerError(
            f"expected tokens of at most {MAX_UNIGRAM_BYTES} bytes together, got {num_bytes}"
        )


def _check_words(model: tokenizers.models.Model) -> None:
    word_characters = getattr(model, "max_input_chars_per_word", 0)
    if word_characters > MAX_WORD_CHARACTERS:
        raise UnsafeTokenizerError(
            f"expected max_input_chars_per_word of at most {MAX_WORD_CHARACTERS}, "
            f"got {word_characters}"
        )


def _steps(part: Any, depth: int = 0) -> list[dict[str, Any]]:
    """The steps of a part in order, those of a Sequence one by one."""
    if part is None:
        return []
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise UnsafeTokenizerError(f"expected an object with a type, got {str(part)[:80]}")
    if part["type"] != "Sequence":
        return [part]
    if depth == _MAX_DEPTH:
        raise UnsafeTokenizerError(f"expected at most {_MAX_DEPTH} levels of Sequence")
    lists = (value for value in part.values() if isinstance(value, list))
    steps = [step for each in lists for child in each for step in _steps(child, depth + 1)]
    if len(steps) > MAX_STEPS:
        raise UnsafeTokenizerError(f"expected at most {MAX_STEPS} steps in a Sequence")
    return steps


def _check_growth(steps: Iterable[dict[str, Any]]) -> None:
    growth = prod(_growth(step) for step in steps)
    if growth > MAX_GROWTH:
        raise UnsafeTokenizerError(
            f"expected steps that make a text at most {MAX_GROWTH} times longer, got {growth} times"
        )


def _growth(step: dict[str, Any]) -> int:
    """How many times longer a step makes a text; what Unicode's own forms do counts as 1."""
    match step["type"]:
        case "Replace":
            # A regular expression may match nothing between any two characters.
            return len(str(step.get("content"))) + ("Regex" in (step.get("pattern") or ())) or 1
        case "Prepend":
            if len(str(step.get("prepend"))) > _MAX_PREPENDED_CHARACTERS:
                raise UnsafeTokenizerError(
                    f"expected Prepend of at most {_MAX_PREPENDED_CHARACTERS} characters"
                )
            return 1
        case "Precompiled":
            longest = _longest_replacement(step.get("precompiled_charsmap"))
            return max(1, ceil(longest / _LONGEST_COMPOSITION_BYTES))
        case "ByteLevel":
            return 4
        case "BertNormalizer":
            return 3
        case _:
            return 1


def _longest_replacement(charsmap: Any) -> int:
    """Longest text, in bytes, that a SentencePiece character map replaces something with.

    The map is the size of a table in bytes (4 bytes, little-endian), the table, and texts that
    end with a zero byte each. The library makes the table as large as the size says, unchecked.
    """
    try:
        data = base64.b64decode(charsmap, validate=True) if charsmap else b""
    except (TypeError, ValueError, binascii.Error) as error:
        raise UnsafeTokenizerError(f"precompiled_charsmap is not base64: {error}") from error
    if not data:
        return 0
    table_bytes = int.from_bytes(data[:4], "little")
    if len(data) < 4 or table_bytes % 4 or not 0 < table_bytes <= len(data) - 4:
        raise UnsafeTokenizerError(
            f"precompiled_charsmap of {len(data)} bytes cannot hold a table of {table_bytes}"
        )
    return max(map(len, data[4 + table_bytes :].split(b"\0")))


def _num_template_ids(step: dict[str, Any]) -> int:
    """Ids that a post-processor adds to a single text, at most."""
    if step["type"] != "TemplateProcessing":
        return 2
    pieces, special_tokens = step.get("single"), step.get("special_tokens")
    if not isinstance(pieces, list) or not isinstance(special_tokens, dict):
        raise UnsafeTokenizerError("TemplateProcessing expects a list single, and special_tokens")
    names = [piece.get("SpecialToken", {}).get("id") for piece in pieces if isinstance(piece, dict)]
    if names.count(None) > 1:
        raise UnsafeTokenizerError("expected a TemplateProcessing that repeats no text")
    num_ids = 0
    for name in names:
        token = special_tokens.get(name)
        ids = token.get("ids") if isinstance(token, dict) else None
        num_ids += len(ids) if isinstance(ids, list) else 0
    return num_ids


def _try_out(tokenizer: tokenizers.Tokenizer) -> None:
    """Lets the library panic now, rather than on the first request.

    A text that the vocabulary has no token for is an ordinary error, and is not looked for.
    """
    try:
        tokenizer.encode_batch_fast([_SAMPLE], add_special_tokens=True)
        tokenizer.decode(list(range(4)), skip_special_tokens=False)
    except Exception:
        return
