"""Special tokens that a model folder names beside tokenizer.json.

Files of a folder disagree at times: tokenizer_config.json may call a token special, or add one,
where tokenizer.json does not. `transformers` (5.x) lets the configuration add to the tokenizer,
and so does this module, so that ids and texts are the same. What it does not do: obey
`add_bos_token` and `add_eos_token`, which `transformers` ignores beside a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import tokenizers
from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import has_entry, read_json_object

from mini_infer_tokenizer.tokenizer_file import MAX_IDS

CONFIG_FILE = "tokenizer_config.json"
LEGACY_MAP_FILE = "special_tokens_map.json"

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""In the order in which those that are new get their ids."""
_MAX_ID_DIGITS = len(str(MAX_IDS))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What the configuration says about tokens.

    Attributes:
        names: Texts by their name, such as "bos_token".
        extra: Special tokens without a name.
        added: Added tokens by their id; None where the configuration has no such list.
        split_in_text: Whether special tokens written out in a text are ordinary text.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    added: Mapping[int, tokenizers.AddedToken] | None = None
    split_in_text: bool = False


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Reads tokenizer_config.json and, where that lists no added tokens, special_tokens_map.json.

    Raises:
        ModelFolderError: Where a file is damaged.
    """
    config = _read(folder / CONFIG_FILE)
    listed = config.get("added_tokens_decoder")
    if listed is None:
        config |= _read(folder / LEGACY_MAP_FILE)
    elif not isinstance(listed, dict):
        raise _unexpected(folder, "added_tokens_decoder", "an object", listed)
    named = {name: _text(value) for name, value in config.items() if name.endswith("_token")}
    names = {name: named.pop(name, "") for name in _NAMES} | named
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    if isinstance(extra, dict):
        names |= {name: _text(value) for name, value in extra.items()}
        extra = ()
    if not isinstance(extra, list | tuple):
        raise _unexpected(folder, "extra_special_tokens", "a list", extra)
    return SpecialTokens(
        names={name: text for name, text in names.items() if text},
        extra=tuple(text for text in map(_text, extra) if text),
        added=None if listed is None else _read_added(folder, listed),
        split_in_text=config.get("split_special_tokens") is True,
    )


def apply(special: SpecialTokens, tokenizer: tokenizers.Tokenizer) -> None:
    """Adds to the tokenizer what the configuration has and tokenizer.json lacks.

    A token of the vocabulary keeps its id; one that is new gets the next free one.
    """
    in_file = tokenizer.get_added_tokens_decoder()
    added = in_file if special.added is None else special.added
    known = {repr(token) for token in in_file.values()}
    tokenizer.add_tokens([token for _, token in sorted(added.items()) if repr(token) not in known])
    flags = {token.content: token for token in added.values()}
    tokenizer.add_special_tokens(
        list(_as_special((*special.names.values(), *special.extra), flags))
    )
    tokenizer.encode_special_tokens = special.split_in_text


def _as_special(
    texts: Iterable[str], flags: Mapping[str, tokenizers.AddedToken]
) -> Iterable[tokenizers.AddedToken]:
    """Each text as a special token, with the flags that the configuration lists for it."""
    for text in dict.fromkeys(texts):
        yield flags.get(text) or tokenizers.AddedToken(text, special=True, normalized=False)


def _read(path: Path) -> dict[str, Any]:
    if not has_entry(path):
        return {}
    content = read_json_object(path)
    try:
        # JSON may write half of a surrogate pair, which is in no text that can be sent.
        json.dumps(content, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not Unicode text: {error}") from error
    return content


def _text(value: Any) -> str:
    """Of an entry such as `"<s>"` or `{"content": "<s>", ...}`; empty for anything else."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _read_added(folder: Path, listed: Mapping[str, Any]) -> dict[int, tokenizers.AddedToken]:
    added = {}
    for number, entry in listed.items():
        text = _text(entry)
        is_id = number.isdecimal() and len(number) <= _MAX_ID_DIGITS
        if not is_id or not text or not isinstance(entry, dict):
            raise _unexpected(folder, "added_tokens_decoder", "tokens by their id", {number: entry})
        flags = {name: entry[name] for name in _FLAGS if isinstance(entry.get(name), bool)}
        added[int(number)] = tokenizers.AddedToken(text, **flags)
    return added


def _unexpected(folder: Path, name: str, expected: str, got: Any) -> ModelFolderError:
    path = folder / CONFIG_FILE
    # Shortened before it is written: the value may be of any size and depth.
    return ModelFolderError(f"{path}: expected {name} to be {expected}, got {short_repr(got)}")
