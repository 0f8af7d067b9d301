"""Text to token ids and back, whole: tokenizer.json, and the special tokens named beside it.

Streams of ids become text in `detokenize.py`; conversations become text in `chat.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer.model_folder import TOKENIZER_FILE, hash_tokenizer, read_tokenizer

from mini_infer_tokenizer import special_tokens
from mini_infer_tokenizer.tokenizer_file import is_library_error, load_tokenizer, vet_tokens

_MAX_ID = 2**32 - 1
"""Ids of the tokenizers library are unsigned 32-bit numbers."""
MAX_GROWTH_CHARACTERS = 4 * 2**20
"""So much longer may a normalizer make a text: the library takes 100 to 300 bytes of each one."""
_SLICE_CHARACTERS = 16 * 2**10
"""Normalizing so many takes a millisecond, and the largest growth of so few does no harm."""


class TextTokenizer:
    """A model's tokenizer; safe to use from several threads.

    Attributes:
        tokenizer_hash: SHA-256 of the tokenizer's files in hex.
        vocab_size: Ids run from 0 to `vocab_size` - 1 (some of them may mean nothing).
        special_ids: Ids that `skip_special_tokens` leaves out of a text.
        special_tokens: Texts by their name in tokenizer_config.json, such as "bos_token".
        decoder_steps: The decoder of tokenizer.json, step by step; None where it has none.
    """

    def __init__(self, folder: Path) -> None:
        """Loads the tokenizer of a model folder.

        Args:
            folder: Holds tokenizer.json; tokenizer_config.json may be absent.

        Raises:
            ModelFolderError: Where a file is missing, damaged or not supported.
        """
        content = read_tokenizer(folder)
        loaded = load_tokenizer(content, str(folder / TOKENIZER_FILE))
        self._tokenizer = loaded.library
        self._normalizer = loaded.library.normalizer
        self.decoder_steps = loaded.decoder_steps
        self.tokenizer_hash = hash_tokenizer(folder, content)
        named = special_tokens.read_special_tokens(folder)
        try:
            special_tokens.apply(named, self._tokenizer)
            added = self._tokenizer.get_added_tokens_decoder()
            largest_added_id = vet_tokens({token.content: each for each, token in added.items()})
        except BaseException as error:
            if not is_library_error(error):
                raise
            message = f"{folder / special_tokens.CONFIG_FILE}: its tokens cannot be added: {error}"
            raise ModelFolderError(message) from error
        self.special_tokens = dict(named.names)
        self.vocab_size = max(loaded.largest_id, largest_added_id) + 1
        self._special_texts = loaded.special_texts.union(
            token.content for token in added.values() if token.special
        )
        ids = map(self._tokenizer.token_to_id, self._special_texts)
        self.special_ids = frozenset(each for each in ids if each is not None)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text.

        Args:
            text: Any text; special tokens written out in it become their ids.
            add_special_tokens: Add what tokenizer.json puts around a text, such as BOS.

        Raises:
            MiniInferError: INVALID_FIELD where the text holds half of a surrogate pair, or what
                the vocabulary has no token for; PROMPT_TOO_LARGE where the normalizer makes it
                longer by `MAX_GROWTH_CHARACTERS`; INTERNAL_ERROR where the library fails.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MiniInferError(
                ErrorReason.INVALID_FIELD,
                f"expected Unicode text, got a lone surrogate at character {error.start}",
            ) from error
        self._check_growth(text)
        with _library_errors("encode this text", ErrorReason.INVALID_FIELD):
            # Encoding a single text would hold the interpreter lock, a batch does not.
            batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = batch[0].ids
        return ids

    def _check_growth(self, text: str) -> None:
        """Refuses a text whose normalization would take gigabytes: U+FDFA becomes 18 characters.

        It is normalized in slices, which gives its length but for what happens at their ends.
        """
        if self._normalizer is None or len(text) <= _SLICE_CHARACTERS:
            return
        growth = 0
        for begin in range(0, len(text), _SLICE_CHARACTERS):
            part = text[begin : begin + _SLICE_CHARACTERS]
            with _library_errors("normalize this text", ErrorReason.INVALID_FIELD):
                growth += len(self._normalizer.normalize_str(part)) - len(part)
            if growth > MAX_GROWTH_CHARACTERS:
                raise MiniInferError(
                    ErrorReason.PROMPT_TOO_LARGE,
                    "expected a text that the tokenizer's normalizer makes longer by at most "
                    f"{MAX_GROWTH_CHARACTERS} characters: send less of it at once",
                )
            time.sleep(0)  # Lets go of the interpreter lock, which `normalize_str` holds.

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of all the ids; ids that mean nothing have no text.

        Raises:
            MiniInferError: INVALID_FIELD for an id that is no unsigned 32-bit number;
                INTERNAL_ERROR where the library fails.
        """
        try:
            with _library_errors("decode these ids", ErrorReason.INTERNAL_ERROR):
                text: str = self._tokenizer.decode(
                    token_ids, skip_special_tokens=skip_special_tokens
                )
        except OverflowError as error:
            wrong = next(each for each in token_ids if not 0 <= each <= _MAX_ID)
            message = f"expected token ids from 0 to {self.vocab_size - 1}, got {wrong}"
            raise MiniInferError(ErrorReason.INVALID_FIELD, message) from error
        return text

    def token(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """A token as written in tokenizer.json, or None where `decode` leaves the id out."""
        if not 0 <= token_id < self.vocab_size:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        if skip_special_tokens and token in self._special_texts:
            return None
        return token

    def tokens(self) -> Iterator[tuple[int, str]]:
        """Every id that means something, with its token as written in tokenizer.json."""
        for token_id in range(self.vocab_size):
            token = self.token(token_id, skip_special_tokens=False)
            if token is not None:
                yield token_id, token


@contextmanager
def _library_errors(task: str, reason: ErrorReason) -> Iterator[None]:
    """Turns what the library raises into errors of ours.

    Args:
        task: What it should do.
        reason: Of an error that it reports; a panic is always an INTERNAL_ERROR.
    """
    try:
        yield
    except OverflowError:
        raise
    except BaseException as error:
        if not is_library_error(error):
            raise
        if not isinstance(error, Exception):  # A panic's message may quote the text.
            message = f"the tokenizers library failed to {task}; its tokenizer.json may be damaged"
            raise MiniInferError(ErrorReason.INTERNAL_ERROR, message) from error
        raise MiniInferError(reason, f"the tokenizer cannot {task}: {error}") from error
