"""Small files of a model folder, read as untrusted input, with errors that say what to do.

A folder comes from anywhere, so every size is bounded before anything is read or parsed, and
whatever is wrong ends as `ModelFolderError` with the file's name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from mini_infer.errors import ModelFolderError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OLDER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Of SentencePiece, GPT-2 and BERT: what folders had before tokenizer.json."""

MAX_JSON_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 32 * 2**20
"""Indexes name every tensor; those of the largest public models take about 10 MB."""
MAX_TOKENIZER_BYTES = 256 * 2**20
"""Vocabularies of 262,144 tokens with their merges take about 35 MB."""

MAX_SHOWN_PATH = 300
"""Characters of a path in an error."""

_REMEDIES = {
    errno.EACCES: "let the user that runs this process read it",
    errno.EPERM: "let the user that runs this process read it",
    errno.ENAMETOOLONG: "pass a shorter path",
}


class _Index(msgspec.Struct, frozen=True):
    """What counts of an index; the rest is skipped, and takes no memory."""

    weight_map: dict[str, str]


def check_folder(folder: Path) -> None:
    """Checks that a model folder is there.

    Raises:
        ModelFolderError: It is not, it is no folder, or it may not be looked at.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        is_folder = False
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not is_folder:
        raise ModelFolderError(
            f"model folder {_shown(folder)} does not exist or is not a folder: pass the path of a "
            "model folder, or a Hub id such as org/name"
        )


def has_entry(path: Path) -> bool:
    """Whether a name is taken in a model folder, be it by a link that leads nowhere.

    Whoever reads such a file is then told what is wrong with it: it does not count as absent.

    Raises:
        ModelFolderError: The folder may not be looked at.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from error
    return True


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted.

    Raises:
        ModelFolderError: It may not be listed, or is no folder.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(folder, error) from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Reads a whole small file.

    Args:
        path: The file.
        max_bytes: A larger file is refused unread.

    Raises:
        ModelFolderError: The file is missing, unreadable, too large, or not a regular file.
    """
    with opened(path) as (file, size):
        if size > max_bytes:
            raise ModelFolderError(f"{path} has {size} bytes, expected at most {max_bytes}")
        return file.read(max_bytes)


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Reads a small text file.

    Args:
        path: The file.
        max_bytes: A larger file is refused unread.

    Raises:
        ModelFolderError: As `read_bytes`, and where the file is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"{path} is not UTF-8: {error}") from error


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON file that must hold one object.

    Args:
        path: The file.
        max_bytes: A larger file is refused unread.

    Raises:
        ModelFolderError: As `read_text`, and where the file holds no JSON object.
    """
    text = read_text(path, max_bytes)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_weight_map(folder: Path) -> dict[str, str]:
    """Reads from a model folder's index which file holds which tensor; names are not checked.

    Args:
        folder: A model folder with `model.safetensors.index.json`.

    Returns:
        Name of the file by name of the tensor.

    Raises:
        ModelFolderError: As `read_bytes`, and where the file is no such index.
    """
    path = folder / INDEX_FILE
    content = read_bytes(path, MAX_INDEX_BYTES)
    try:
        return msgspec.json.decode(content, type=_Index).weight_map
    except msgspec.ValidationError as error:
        raise ModelFolderError(
            f"{path}: weight_map must be an object of tensor and file names: {error}"
        ) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON: {error}") from error


def read_tokenizer(folder: Path) -> bytes:
    """The content of a model folder's tokenizer.json.

    Raises:
        ModelFolderError: As `read_bytes`; it says what to do where a folder has an older kind of
            tokenizer instead.
    """
    path = folder / TOKENIZER_FILE
    if not has_entry(path):
        older = [name for name in _OLDER_TOKENIZER_FILES if has_entry(folder / name)]
        if older:
            raise ModelFolderError(
                f"{path} does not exist, and {older[0]} is not read: make one of it with "
                "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    return read_bytes(path, MAX_TOKENIZER_BYTES)


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 in hex over the tokenizer's files: equal where two processes mean the same ids.

    Beside tokenizer.json, those that may add tokens to it count.

    Raises:
        ModelFolderError: As `read_bytes`.
    """
    return hash_tokenizer(folder, read_tokenizer(folder))


def hash_tokenizer(folder: Path, tokenizer: bytes) -> str:
    """As `tokenizer_hash`, for who has read tokenizer.json already."""
    digest = hashlib.sha256(tokenizer)
    for name in TOKENIZER_CONFIG_FILES:
        if has_entry(folder / name):
            content = read_bytes(folder / name, MAX_JSON_BYTES)
            digest.update(b"%s %d " % (name.encode(), len(content)) + content)
    return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file of a model folder; gives it with its size in bytes.

    Raises:
        ModelFolderError: The folder or the file is missing, unreadable, or no regular file.
    """
    check_folder(path.parent)
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFolderError(f"{path} must be a file")
            yield file, status.st_size
    except FileNotFoundError as error:
        what = "leads to what does not exist" if path.is_symlink() else "does not exist"
        raise ModelFolderError(
            f"{path} {what}: download it again, or pass a model folder that has it"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe in the place of a file would otherwise block here for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _unreadable(path: Path, error: OSError) -> ModelFolderError:
    remedy = _REMEDIES.get(error.errno or 0, "replace it, or download it again")
    return ModelFolderError(f"{_shown(path)} cannot be read: {error.strerror}: {remedy}")


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= MAX_SHOWN_PATH else f"{text[:MAX_SHOWN_PATH]}..."
