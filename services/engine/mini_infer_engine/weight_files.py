"""The weight files of a model folder: which they are, and their safetensors headers, checked.

A folder comes from anywhere, so every size is bounded before anything is read, parsed or allocated,
and whatever is wrong ends as `ModelFolderError` with the file's name. Nothing here needs torch;
`loader.py` reads the weights themselves.

Source of the format: the README of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    check_folder,
    has_entry,
    names_in,
    opened,
    read_weight_map,
)

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

MAX_HEADER_BYTES = 16 * 2**20
"""Of 150,000 tensors, about. The format allows 100 MB, whose parsing would take gigabytes."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of an element by its name in safetensors."""

_LENGTH = struct.Struct("<Q")
_MAX_SIZE = 2**63 - 1
_Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE)]
_Shape = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=8)]
"""Few dimensions, so that the product of hostile ones stays small."""


class StoredTensor(msgspec.Struct, frozen=True):
    """One tensor of a safetensors header.

    Attributes:
        dtype: Name of the element type in safetensors, such as "BF16".
        shape: Sizes of its dimensions.
        data_offsets: First byte and byte after the last, counted from the end of the header.
    """

    dtype: str
    shape: _Shape
    data_offsets: tuple[_Size, _Size]

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in its file."""
        return self.data_offsets[1] - self.data_offsets[0]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file whose header was checked.

    Attributes:
        path: The file.
        data_start: Bytes before the first tensor's.
        tensors: What it holds by name, in the order of their bytes.
    """

    path: Path
    data_start: int
    tensors: Mapping[str, StoredTensor]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Finds the safetensors files that hold a model's weights.

    Args:
        folder: A model folder with `model.safetensors`, or with shards and their index.

    Raises:
        ModelFolderError: There are none, only pickled ones, or the index names files that are
            missing or outside the folder.
    """
    check_folder(folder)
    if has_entry(folder / SINGLE_FILE):
        return (folder / SINGLE_FILE,)
    if has_entry(folder / INDEX_FILE):
        return tuple(folder / name for name in sorted(set(read_index(folder).values())))
    pickled = [name for name in names_in(folder) if name.endswith(PICKLED_SUFFIXES)]
    if pickled:
        raise ModelFolderError(
            f"model folder {folder} has only pickled weights ({', '.join(pickled)}), which can run "
            "code when they are loaded: convert them to safetensors"
        )
    raise ModelFolderError(
        f"model folder {folder} has no weights: expected {SINGLE_FILE}, or {INDEX_FILE} with the "
        "files that it names"
    )


def read_index(folder: Path) -> dict[str, str]:
    """Reads which shard holds which tensor.

    Args:
        folder: A model folder with `model.safetensors.index.json`.

    Returns:
        Name of the shard's file by name of the tensor.

    Raises:
        ModelFolderError: The index is damaged, or names files that are missing or outside.
    """
    path = folder / INDEX_FILE
    weight_map = read_weight_map(folder)
    if not weight_map:
        raise ModelFolderError(f"{path}: weight_map must name the file of each tensor, got none")
    present = set(names_in(folder))
    for name in weight_map.values():
        _check_shard_name(path, name, present)
    return weight_map


def read_headers(folder: Path) -> tuple[WeightFile, ...]:
    """Reads the headers of a folder's weight files and checks them against the index.

    Args:
        folder: A model folder.

    Raises:
        ModelFolderError: A file is missing or damaged, or lacks a tensor that the index puts
            there.
    """
    files = {path: read_header(path) for path in weight_files(folder)}
    if folder / SINGLE_FILE not in files:
        for name, shard in read_index(folder).items():
            if name not in files[folder / shard].tensors:
                raise ModelFolderError(
                    f"{folder / INDEX_FILE} puts {name!r} into {shard}, which lacks it: use the "
                    "index that belongs to the shards"
                )
    return tuple(files.values())


def read_header(path: Path) -> WeightFile:
    """Reads a safetensors header and checks it against the file, before anything else is read.

    The format's own rules hold afterwards: no name stands there twice, each tensor's shape and
    type fill its range of bytes, and the ranges follow each other from the header's end to the
    file's end.

    Args:
        path: A `.safetensors` file.

    Raises:
        ModelFolderError: The file is missing, unreadable, truncated or damaged.
    """
    header, size = read_header_bytes(path)
    data_start = _LENGTH.size + len(header)
    try:
        tensors = _parse(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid: {error}") from error
    _check_ranges(path, tensors, size - data_start)
    return WeightFile(path, data_start, tensors)


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """Reads the header of a safetensors file as it stands there.

    Args:
        path: A `.safetensors` file.

    Returns:
        The header's JSON, and the size of the file in bytes.

    Raises:
        ModelFolderError: The file is missing, unreadable, or too short for its header.
    """
    with opened(path) as (file, size):
        prefix = file.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise _damaged(path, f"it has only {size} bytes")
        (length,) = _LENGTH.unpack(prefix)
        if length > min(MAX_HEADER_BYTES, size - _LENGTH.size):
            raise _damaged(path, f"it has {size} bytes and says that its header takes {length}")
        header = file.read(length)
    if len(header) < length:
        raise _damaged(path, "it became shorter while it was read")
    return header, size


def _parse(header: bytes) -> dict[str, StoredTensor]:
    """The tensors of a header's JSON, in the order of their bytes; ValueError for any other."""
    entries = json.loads(
        header.decode(),
        object_pairs_hook=_without_repeated_names,
        parse_int=_parse_int,
        parse_constant=_refuse_constant,
    )
    if isinstance(entries, dict):
        msgspec.convert(entries.pop("__metadata__", {}), dict[str, str])
    tensors = msgspec.convert(entries, dict[str, StoredTensor])
    return dict(sorted(tensors.items(), key=lambda item: item[1].data_offsets))


def _without_repeated_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which one of two equal names counts, so that neither may stand there."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name stands there twice")
    return entries


def _parse_int(digits: str) -> int:
    """As `int`, which takes quadratic time for what has millions of digits; nothing is negative."""
    if digits.startswith("-") or len(digits) > len(str(_MAX_SIZE)):
        raise ValueError(f"expected integers from 0 to {_MAX_SIZE}, got {digits:.24}")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_shard_name(index: Path, name: str, present: set[str]) -> None:
    """A shard is a file beside its index; a link there may point elsewhere, as hub caches do."""
    if not name.endswith(".safetensors"):
        raise ModelFolderError(f"{index}: expected names of .safetensors files, got {name!r:.200}")
    if "/" in name or "\\" in name:
        raise ModelFolderError(f"{index}: {name!r:.200} points outside the model folder")
    if name not in present:
        raise ModelFolderError(f"{index} names {name!r:.200}, which is missing: download it again")


def _check_ranges(path: Path, tensors: Mapping[str, StoredTensor], num_data_bytes: int) -> None:
    """Checks that the tensors, in the order of their bytes, fill the file."""
    end_of_last = 0
    for name, tensor in tensors.items():
        begin, end = tensor.data_offsets
        if tensor.dtype not in DTYPE_BYTES:
            raise _damaged(path, f"tensor {name!r} has the unknown type {tensor.dtype!r}")
        expected = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        if end - begin != expected:
            shape = list(tensor.shape)
            raise _damaged(
                path,
                f"tensor {name!r} of shape {shape} and type {tensor.dtype} needs {expected} "
                f"bytes, its range has {end - begin}",
            )
        if begin != end_of_last:
            raise _damaged(path, f"the bytes of tensor {name!r} overlap or leave a hole")
        end_of_last = end
    if end_of_last != num_data_bytes:
        raise _damaged(
            path, f"its tensors need {end_of_last} bytes, the file holds {num_data_bytes}"
        )


def _damaged(path: Path, why: str) -> ModelFolderError:
    return ModelFolderError(f"{path} is truncated or damaged, {why}: download or write it again")
