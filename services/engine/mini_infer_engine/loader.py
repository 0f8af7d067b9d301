"""Copies a model folder's safetensors weights into a model's tensors.

Every tensor's name, shape and type is checked against what the model expects before the first
byte is copied. Files are mapped, and one tensor at a time goes straight to its destination, often
rows of a fused weight on another device, so there is never a second copy of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch
from mini_infer.errors import ModelFolderError
from safetensors import SafetensorError, safe_open

from mini_infer_engine.weight_files import StoredTensor, read_headers

LOADABLE_DTYPES = ("F32", "F16", "BF16")
"""Types of weights, by their names in safetensors."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


class HasDestinations(Protocol):
    """A model that says where the tensors of a checkpoint belong."""

    def destinations(self) -> dict[str, torch.Tensor]:
        """Gives the tensor, or view of one, to fill, by the checkpoint's name for it."""

    def ignorable(self) -> frozenset[str]:
        """Gives names that a checkpoint may hold in vain; `*` stands for any characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did.

    Attributes:
        num_tensors: Tensors copied.
        num_bytes: Bytes of them in the checkpoint.
        seconds: Time that it took, checks included.
    """

    num_tensors: int
    num_bytes: int
    seconds: float


def check_weights(model: HasDestinations, folder: Path) -> None:
    """Checks that a folder's weights fit a model, reading their headers alone.

    A model on the meta device is enough: so nothing is allocated by a config.json that does not
    belong to the weights.

    Args:
        model: The model, on any device.
        folder: The model folder.

    Raises:
        ModelFolderError: As `load_weights`.
    """
    _check(folder, read_headers(folder), model.destinations(), model.ignorable())


def load_weights(
    model: HasDestinations, folder: Path, on_progress: Progress | None = None
) -> LoadReport:
    """Fills a model from `model.safetensors`, or from the shards that its index names.

    Args:
        model: The model; its tensors may have any device and floating-point type.
        folder: The model folder.
        on_progress: Called after each tensor.

    Raises:
        ModelFolderError: The folder has no safetensors, a file is damaged, or tensors are
            missing, unexpected, of another shape or of a type that is not floating-point (all
            of them in one error). The model is left as it was, unless reading itself failed.
    """
    started = time.perf_counter()
    headers = read_headers(folder)
    destinations = model.destinations()
    _check(folder, headers, destinations, model.ignorable())
    sizes = {
        name: tensor.num_bytes
        for header in headers.values()
        for name, tensor in header.items()
        if name in destinations
    }
    num_bytes, num_bytes_done = sum(sizes.values()), 0
    for path, header in headers.items():
        for name in _copy_file(path, [name for name in header if name in sizes], destinations):
            num_bytes_done += sizes[name]
            if on_progress is not None:
                on_progress(num_bytes_done, num_bytes)
    return LoadReport(
        num_tensors=len(sizes), num_bytes=num_bytes, seconds=time.perf_counter() - started
    )


def _copy_file(
    path: Path, names: list[str], destinations: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """Copies tensors of one file, in the order of their bytes; gives each name when it is done."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                # Unlike `no_grad`, inference mode may write to inference and to normal tensors.
                with torch.inference_mode():
                    destinations[name].copy_(file.get_tensor(name))
                yield name
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} cannot be read as safetensors: {error}") from error


def _check(
    folder: Path,
    headers: Mapping[Path, Mapping[str, StoredTensor]],
    destinations: Mapping[str, torch.Tensor],
    ignorable: frozenset[str],
) -> None:
    """Compares what is stored with what the model expects; raises one error with everything."""
    problems: list[str] = []
    stored: dict[str, Path] = {}
    for path, header in headers.items():
        for name, tensor in header.items():
            if name in stored:
                problems.append(f"{name!r} stands in {stored[name].name} and in {path.name}")
            stored[name] = path
            if name in destinations:
                problems += _mismatches(name, tensor, destinations[name])
            elif not any(fnmatchcase(name, pattern) for pattern in ignorable):
                problems.append(f"unexpected {name!r}")
    problems += [f"missing {name!r}" for name in destinations if name not in stored]
    if problems:
        raise ModelFolderError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}: use the "
            "config.json that belongs to them"
        )


def _mismatches(name: str, stored: StoredTensor, destination: torch.Tensor) -> list[str]:
    found = []
    if stored.shape != tuple(destination.shape):
        expected, given = list(destination.shape), list(stored.shape)
        found.append(f"expected shape {expected} for {name!r}, got {given}")
    if stored.dtype not in LOADABLE_DTYPES:
        expected_types = ", ".join(LOADABLE_DTYPES)
        found.append(f"expected {name!r} in one of {expected_types}, got {stored.dtype}")
    return found
