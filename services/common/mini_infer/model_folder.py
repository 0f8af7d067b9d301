"""Small files of a model folder, read as untrusted input, with errors that say what to do.

A folder comes from anywhere, so every size is bounded before anything is read or parsed, and
whatever is wrong ends as `ModelFolderError` with the file's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mini_infer.errors import ModelFolderError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
MAX_JSON_BYTES = 4 * 2**20
MAX_TOKENIZER_BYTES = 256 * 2**20
"""Vocabularies of 262,144 tokens with their merges take about 35 MB."""


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


def read_tokenizer(folder: Path) -> bytes:
    """The content of a model folder's tokenizer.json.

    Raises:
        ModelFolderError: As `read_bytes`.
    """
    return read_bytes(folder / TOKENIZER_FILE, MAX_TOKENIZER_BYTES)


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
        if (folder / name).exists():
            content = read_bytes(folder / name, MAX_JSON_BYTES)
            digest.update(b"%s %d " % (name.encode(), len(content)) + content)
    return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file of a model folder; gives it with its size in bytes.

    Raises:
        ModelFolderError: The folder or the file is missing, unreadable, or no regular file.
    """
    if not path.parent.is_dir():
        raise ModelFolderError(f"model folder {path.parent} does not exist or is not a folder")
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelFolderError(f"{path} must be a file")
            yield file, status.st_size
    except FileNotFoundError as error:
        raise ModelFolderError(f"{path} does not exist") from error
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe in the place of a file would otherwise block here for ever.
    return os.open(path, flags | os.O_NONBLOCK)
