"""Text to token ids and back, whole: the model folder's tokenizer.json and nothing else.

Streams of ids become text in `detokenize.py`; conversations become text in `chat.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer.model_folder import hash_tokenizer, read_json_object, read_tokenizer

_MAX_ID = 2**32 - 1
"""Ids of the tokenizers library are unsigned 32-bit numbers."""


class _DecoderOnly(msgspec.Struct):
    """The part of tokenizer.json that says how tokens become text."""

    decoder: dict[str, Any] | None = None


class TextTokenizer:
    """A model's tokenizer; safe to use from several threads.

    Attributes:
        tokenizer_hash: SHA-256 of tokenizer.json in hex.
        vocab_size: Ids run from 0 to `vocab_size` - 1 (some of them may mean nothing).
        special_ids: Ids that `skip_special_tokens` leaves out of a text.
        special_tokens: Texts by their name in tokenizer_config.json, such as "bos_token".
        decoder: The decoder part of tokenizer.json, or None where it has none.
    """

    def __init__(self, folder: Path) -> None:
        """Loads the tokenizer of a model folder.

        Args:
            folder: Holds tokenizer.json; tokenizer_config.json may be absent.

        Raises:
            ModelFolderError: Where a file is missing, damaged or not supported.
        """
        content = read_tokenizer(folder)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self.decoder = msgspec.json.decode(content, type=_DecoderOnly).decoder
        except Exception as error:  # The library raises bare Exception for whatever it finds.
            message = f"{folder / 'tokenizer.json'}: is not a valid tokenizer: {error}"
            raise ModelFolderError(message) from error
        # Files saved during training may carry either; neither belongs to serving.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.tokenizer_hash = hash_tokenizer(content)
        self.special_tokens = _read_special_tokens(folder)
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.special_ids = self._find_special_ids()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text.

        Args:
            text: Any text; special tokens written out in it become their ids.
            add_special_tokens: Add what tokenizer.json puts around a text, such as BOS.

        Raises:
            MiniInferError: INVALID_FIELD where the text holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MiniInferError(
                ErrorReason.INVALID_FIELD,
                f"expected Unicode text, got a lone surrogate at character {error.start}",
            ) from error
        # Encoding a single text would hold the interpreter lock, a batch does not.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of all the ids; ids that mean nothing have no text.

        Raises:
            MiniInferError: INVALID_FIELD for an id that is no unsigned 32-bit number.
        """
        try:
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            wrong = next(each for each in token_ids if not 0 <= each <= _MAX_ID)
            message = f"expected token ids from 0 to {self.vocab_size - 1}, got {wrong}"
            raise MiniInferError(ErrorReason.INVALID_FIELD, message) from error
        return text

    def tokens(self) -> Iterator[tuple[int, str]]:
        """Every id that means something, with its token as written in tokenizer.json."""
        for token_id in range(self.vocab_size):
            token = self._tokenizer.id_to_token(token_id)
            if token is not None:
                yield token_id, token

    def _find_special_ids(self) -> frozenset[int]:
        """Ids of special tokens; the library knows them by their text, and so it is done here."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        return frozenset(token_id for token_id, token in self.tokens() if token in special)


def _read_special_tokens(folder: Path) -> dict[str, str]:
    """Entries such as `"bos_token": "<s>"` or `"bos_token": {"content": "<s>", ...}`."""
    if not (folder / "tokenizer_config.json").exists():
        return {}
    found = {}
    for name, value in read_json_object(folder / "tokenizer_config.json").items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
