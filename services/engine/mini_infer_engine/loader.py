"""Copies a model folder's safetensors weights into a model's tensors.

Every tensor's name, shape and type is checked against what the model expects before the first
byte is copied. Then threads read the files piece by piece, each into a small buffer of its own,
and copy from there to the destinations, often rows of a fused weight on another device: there is
never a second copy of the model, and one thread reads while another one's piece is under way.

The files are read, not mapped: one that shrinks meanwhile is an error then, where a mapping would
end the process. What is read becomes numbers and nothing else.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import opened

from mini_infer_engine.weight_files import StoredTensor, WeightFile, read_headers

LOADABLE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, by their names in safetensors."""

CUDA_PIECE_BYTES = 16 * 2**20
"""Large beside the cost of starting a copy."""
CPU_PIECE_BYTES = 2**20
"""Stays in a core's cache while it is converted and transposed: up to ten times faster so."""
NUM_CUDA_READERS = 8
"""A core copies some 8 GB/s out of the page cache, a PCIe 5.0 link takes about 50."""
MAX_LISTED_PROBLEMS = 20

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

    Beyond the model itself, host memory holds a piece for each reading thread: at most 16 MiB, or
    a row of a tensor where that is more.

    Args:
        model: The model; its tensors may have any floating-point type, and one device.
        folder: The model folder.
        on_progress: Called after each piece, by the thread that called this.

    Raises:
        ModelFolderError: The folder has no safetensors, a file is damaged, or tensors are
            missing, unexpected, of another shape or of a type that is not loadable (one error
            for all, which lists the first of them). The model is left as it was, unless reading
            itself failed.
    """
    started = time.perf_counter()
    files = read_headers(folder)
    destinations = model.destinations()
    _check(folder, files, destinations, model.ignorable())
    wanted = [(file, name) for file in files for name in file.tensors if name in destinations]
    num_bytes = sum(file.tensors[name].num_bytes for file, name in wanted)
    num_bytes_done = 0
    with closing(_copy(wanted, destinations)) as copied:
        for num_piece_bytes in copied:
            num_bytes_done += num_piece_bytes
            if on_progress is not None:
                on_progress(num_bytes_done, num_bytes)
    seconds = time.perf_counter() - started
    return LoadReport(num_tensors=len(wanted), num_bytes=num_bytes, seconds=seconds)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a stored tensor, and the tensor that they fill."""

    path: Path
    source: BinaryIO
    offset: int
    num_bytes: int
    dtype: torch.dtype
    destination: torch.Tensor


def _copy(
    wanted: Sequence[tuple[WeightFile, str]], destinations: Mapping[str, torch.Tensor]
) -> Generator[int, None, None]:
    """Copies tensors, in the order of their bytes; gives the size of each piece when it is done."""
    device = destinations[wanted[0][1]].device if wanted else torch.device("cpu")
    max_piece_bytes = CUDA_PIECE_BYTES if device.type == "cuda" else CPU_PIECE_BYTES
    num_readers = NUM_CUDA_READERS if device.type == "cuda" else 1
    # The files are closed after the last thread has ended.
    with ExitStack() as open_files, ThreadPoolExecutor(num_readers) as readers:
        sources = {
            path: open_files.enter_context(opened(path))[0]
            for path in dict.fromkeys(file.path for file, _ in wanted)
        }
        pieces = [
            piece
            for file, name in wanted
            for piece in _pieces(
                file, name, sources[file.path], destinations[name], max_piece_bytes
            )
        ]
        staging = _Staging(max((each.num_bytes for each in pieces), default=0), device)
        try:
            yield from readers.map(staging.copy, pieces)
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise


def _pieces(
    file: WeightFile, name: str, source: BinaryIO, destination: torch.Tensor, max_bytes: int
) -> Iterator[_Piece]:
    """Cuts a tensor into pieces of whole rows."""
    stored = file.tensors[name]
    if not stored.num_bytes:
        return
    rows = destination.reshape(1) if destination.dim() == 0 else destination
    row_bytes = stored.num_bytes // len(rows)
    offset = file.data_start + stored.data_offsets[0]
    num_rows = max(1, max_bytes // row_bytes)
    for start in range(0, len(rows), num_rows):
        part = rows[start : start + num_rows]
        num_bytes = len(part) * row_bytes
        yield _Piece(file.path, source, offset, num_bytes, LOADABLE_DTYPES[stored.dtype], part)
        offset += num_bytes


class _Staging(threading.local):
    """A buffer for each thread: what is read stands there until it has reached its destination."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Allocates the calling thread's buffer, pinned where a device copies from it."""
        on_cuda = device.type == "cuda"
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_cuda)
        self._memory = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        self._stream = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]
        if on_cuda:
            torch.cuda.synchronize(device)  # Nothing queued earlier may write after the copies.

    def copy(self, piece: _Piece) -> int:
        """Copies a piece; returns its bytes.

        Raises:
            ModelFolderError: The file cannot be read, or became shorter.
        """
        _read_exactly(piece, self._memory[: piece.num_bytes])
        stored = self._buffer[: piece.num_bytes].view(piece.dtype)
        numbers = stored.view(piece.destination.shape)
        # Unlike `no_grad`, inference mode may write to inference and to normal tensors.
        with torch.inference_mode():
            if self._stream is None:
                piece.destination.copy_(numbers)
                return piece.num_bytes
            with torch.cuda.stream(self._stream):
                if numbers.dtype != piece.destination.dtype:
                    # Converted there, since a copy that converts does so on the host.
                    numbers = numbers.to(piece.destination.device, non_blocking=True)
                piece.destination.copy_(numbers, non_blocking=True)
            self._stream.synchronize()
        return piece.num_bytes


def _read_exactly(piece: _Piece, buffer: memoryview) -> None:
    num_read = 0
    while num_read < len(buffer):
        try:
            count = os.preadv(piece.source.fileno(), [buffer[num_read:]], piece.offset + num_read)
        except OSError as error:
            raise ModelFolderError(f"{piece.path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise ModelFolderError(
                f"{piece.path} became shorter while it was read: load it again when nothing "
                "writes to it"
            )
        num_read += count


def _check(
    folder: Path,
    files: Sequence[WeightFile],
    destinations: Mapping[str, torch.Tensor],
    ignorable: frozenset[str],
) -> None:
    """Compares what is stored with what the model expects; raises one error with everything."""
    problems: list[str] = []
    stored: dict[str, Path] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in stored:
                problems.append(f"{name!r} stands in {stored[name].name} and in {file.path.name}")
            stored[name] = file.path
            if name in destinations:
                problems += _mismatches(name, tensor, destinations[name])
            elif not any(fnmatchcase(name, pattern) for pattern in ignorable):
                problems.append(f"unexpected {name!r}")
    problems += [f"missing {name!r}" for name in destinations if name not in stored]
    if problems:
        listed = "; ".join(problems[:MAX_LISTED_PROBLEMS])
        if len(problems) > MAX_LISTED_PROBLEMS:
            listed += f"; and {len(problems) - MAX_LISTED_PROBLEMS} more"
        raise ModelFolderError(
            f"the weights in {folder} do not fit its config.json: {listed}: use the config.json "
            "that belongs to them"
        )


def _mismatches(name: str, stored: StoredTensor, destination: torch.Tensor) -> list[str]:
    found = []
    if stored.shape != tuple(destination.shape):
        expected, given = list(destination.shape), list(stored.shape)
        found.append(f"expected shape {expected} for {name!r}, got {given}")
    if stored.dtype not in LOADABLE_DTYPES:
        expected_types = ", ".join(LOADABLE_DTYPES)
        found.append(
            f"expected {name!r} in one of {expected_types}, got {stored.dtype} (quantized "
            "checkpoints are not supported: use the one in 16 bits)"
        )
    return found
