"""Loads mutated safetensors files; a process of its own, since a failure may be its end.

    python hostile_weights.py COUNT SEED

Each file ends as `ModelFolderError`, or loads as the numbers that the `safetensors` library finds
in it; anything else is an error here. Prints what became of them as JSON.
"""

from __future__ import annotations

import collections
import copy
import json
import re
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from mini_infer.errors import ModelFolderError
from mini_infer_engine.loader import load_weights
from mini_infer_engine.weight_files import read_header
from safetensors import SafetensorError
from safetensors.torch import load

SHAPES = {"embed": (8, 4), "q": (4, 4), "k": (2, 4), "v": (2, 4), "norm": (4,), "empty": (0, 4)}
HANG_S = 10.0
REFUSED_AND_LOADED_EVERY = 50
"""A refusal by the header alone is the rule; the whole load of so many a time refuses as well."""

Entries = list[tuple[str, Any]]
"""A header's keys and values; a key may be there twice."""

HOSTILE_INTS = (
    -1, 0, 1, 2, 3, 7, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**30, 10**400,
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 1.0, 0.5, -0.0, float("nan"), float("inf"), "4", "", [], {}, [[]], "\0",
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "I32", "U64", "BOOL", "F8_E4M3", "f32", "F4", "", "?")


class Model:
    """Destinations as a real model has them: q, k and v are rows of one fused weight."""

    def __init__(self) -> None:
        self.qkv = torch.full((4, 8), torch.nan).t()
        self.rest = {
            name: torch.full(SHAPES[name], torch.nan) for name in ("embed", "norm", "empty")
        }

    def destinations(self) -> dict[str, torch.Tensor]:
        return {"q": self.qkv[:4], "k": self.qkv[4:6], "v": self.qkv[6:], **self.rest}

    def ignorable(self) -> frozenset[str]:
        return frozenset({"extra*"})


def original(random: Random) -> tuple[Entries, bytes]:
    """A valid file's header and data; the tensors in any order, in any loadable type."""
    names = random.sample(sorted(SHAPES), len(SHAPES))
    entries: Entries = []
    if random.random() < 0.3:
        entries.append(("__metadata__", {"format": "pt"}))
    end = 0
    for name in names:
        dtype = random.choice(("F32", "F16", "BF16"))
        num_bytes = torch.Size(SHAPES[name]).numel() * (4 if dtype == "F32" else 2)
        offsets = [end, end + num_bytes]
        entries.append(
            (name, {"dtype": dtype, "shape": list(SHAPES[name]), "data_offsets": offsets})
        )
        end += num_bytes
    return entries, random.randbytes(end)


def any_value(random: Random) -> Any:
    if random.random() < 0.5:
        return random.choice(HOSTILE_INTS)
    return copy.copy(random.choice(HOSTILE_VALUES))  # Another change may go into a list.


def tensor(random: Random, entries: Entries) -> dict[str, Any]:
    """The entry of some tensor; one that is none already becomes one."""
    found = [value for _, value in entries if isinstance(value, dict) and "shape" in value]
    return random.choice(found) if found else {"shape": [], "data_offsets": [0, 0]}


def change_offset(random: Random, entries: Entries) -> None:
    offsets = tensor(random, entries).get("data_offsets")
    if isinstance(offsets, list) and offsets:
        index = random.randrange(len(offsets))
        value = offsets[index]
        near = isinstance(value, int) and random.random() < 0.5
        offsets[index] = value + random.choice((-4, -1, 1, 4)) if near else any_value(random)


def resize_offsets(random: Random, entries: Entries) -> None:
    tensor(random, entries)["data_offsets"] = [
        any_value(random) for _ in range(random.randrange(4))
    ]


def swap_offsets(random: Random, entries: Entries) -> None:
    """Valid where both tensors take as many bytes."""
    one, other = tensor(random, entries), tensor(random, entries)
    one["data_offsets"], other["data_offsets"] = (
        other.get("data_offsets"),
        one.get("data_offsets"),
    )


def change_shape(random: Random, entries: Entries) -> None:
    shape = tensor(random, entries).get("shape")
    if isinstance(shape, list):
        change = random.randrange(4)
        if change == 0 and shape:
            shape[random.randrange(len(shape))] = any_value(random)
        elif change == 1:
            shape.append(random.choice((0, 1, 2, 2**62)))
        elif change == 2:
            shape.reverse()
        else:
            shape[:] = [random.choice((0, 1, 2**16, 2**62))] * random.randrange(12)


def change_dtype(random: Random, entries: Entries) -> None:
    tensor(random, entries)["dtype"] = (
        random.choice(DTYPES) if random.random() < 0.8 else any_value(random)
    )


def replace_field(random: Random, entries: Entries) -> None:
    name = random.choice(("dtype", "shape", "data_offsets", "extra"))
    tensor(random, entries)[name] = any_value(random)


def remove_field(random: Random, entries: Entries) -> None:
    tensor(random, entries).pop(random.choice(("dtype", "data_offsets")), None)


def rename(random: Random, entries: Entries) -> None:
    if entries:
        index = random.randrange(len(entries))
        name = random.choice(("embed", "q", "extra", "__metadata__", "", "\0", "é", "\ud800", "q "))
        entries[index] = (name, entries[index][1])


def remove(random: Random, entries: Entries) -> None:
    if entries:
        del entries[random.randrange(len(entries))]


def repeat(random: Random, entries: Entries) -> None:
    if entries:
        entries.insert(random.randrange(len(entries)), random.choice(entries))


def add(random: Random, entries: Entries) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    value = random.choice((empty, any_value(random)))
    name = random.choice(("extra", "extra.2", "other", "__metadata__"))
    entries.insert(random.randrange(len(entries) + 1), (name, value))


def set_metadata(random: Random, entries: Entries) -> None:
    value = random.choice(({}, {"a": "b"}, {"a": 1}, {"a": None}, {"a": {}}, any_value(random)))
    entries.append(("__metadata__", value))


CHANGES: tuple[Callable[[Random, Entries], None], ...] = (
    change_offset, resize_offsets, swap_offsets, change_shape, change_dtype, replace_field,
    remove_field, rename, remove, repeat, add, set_metadata,
)  # fmt: skip


def flip(random: Random, content: bytearray) -> None:
    if content:
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def insert(random: Random, content: bytearray) -> None:
    patch = random.choice((b"\xff", b"\0", b" ", b"\n", b"0", b"-", b"[", b"{", b'"', b"9" * 5000))
    start = random.randrange(len(content) + 1)
    content[start:start] = patch


def delete(random: Random, content: bytearray) -> None:
    start = random.randrange(len(content) + 1)
    del content[start : start + random.randrange(1, 9)]


def truncate(random: Random, content: bytearray) -> None:
    del content[random.randrange(len(content) + 1) :]


def pad(random: Random, content: bytearray) -> None:
    content += random.choice((b" ", b"\0", b"}", b"\n", b" " * 63))


def nest(random: Random, content: bytearray) -> None:
    bracket = random.choice((b"[", b'{"a":'))
    start = random.randrange(len(content) + 1)
    content[start:start] = bracket * random.choice((2, 100, 5000))


BYTE_CHANGES: tuple[Callable[[Random, bytearray], None], ...] = (
    flip, insert, delete, truncate, pad, nest,
)  # fmt: skip


def encode(entries: Entries) -> bytes:
    """As JSON, where a key may be there twice."""
    pairs = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries)
    return ("{" + ", ".join(pairs) + "}").encode()


def mutated(random: Random) -> tuple[str, bytes]:
    """A file that is damaged in up to three ways, and the last one's name."""
    entries, data = original(random)
    kind = "none"
    (num_changes,) = random.choices((0, 1, 2, 3), weights=(1, 30, 12, 6))
    in_bytes = random.random() < 0.4
    if not in_bytes:
        for _ in range(num_changes):
            change = random.choice(CHANGES)
            change(random, entries)
            kind = change.__name__
    header = bytearray(encode(entries))
    if random.random() < 0.3:
        header += b" " * (-len(header) % 8)
    if in_bytes:
        for _ in range(num_changes):
            byte_change = random.choice(BYTE_CHANGES)
            byte_change(random, header)
            kind = byte_change.__name__
    length = len(header)
    where = random.random()
    if where < 0.05:
        kind, length = "length", random.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64))
    elif where < 0.1:
        kind, data = "data", random.choice((b"", data[:-1], data + b"\0", data[: len(data) // 2]))
    content = struct.pack("<Q", min(max(length, 0), 2**64 - 1)) + bytes(header) + data
    if where > 0.98:
        kind, content = "file", content[: random.randrange(len(content))]
    return kind, content


def check(path: Path, content: bytes, load_anyway: bool) -> bool:
    """Loads a file; gives whether it was taken."""
    path.write_bytes(content)
    try:
        read_header(path)
    except ModelFolderError:
        if not load_anyway:
            return False
    model = Model()
    try:
        load_weights(model, path.parent)
    except ModelFolderError:
        return False
    expected = load(content)
    for name, filled in model.destinations().items():
        wanted = expected[name].float()
        assert torch.equal(filled.nan_to_num(), wanted.nan_to_num()), (name, content)
        assert torch.equal(filled.isnan(), wanted.isnan()), (name, content)
    return True


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main(count: int, seed: int) -> None:
    random = Random(seed)
    outcomes: dict[str, collections.Counter[bool]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        check(path, mutated(Random(0))[1], True)  # Libraries take memory once.
        before = peak_bytes()
        for number in range(count):
            kind, content = mutated(random)
            signal.setitimer(signal.ITIMER_REAL, HANG_S)  # Its default action ends the process.
            try:
                taken = check(path, content, number % REFUSED_AND_LOADED_EVERY == 0)
            except SafetensorError as error:
                raise AssertionError(f"taken against safetensors: {error}: {content!r}") from error
            outcomes[kind][taken] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    result = {
        "peak_growth_bytes": peak_bytes() - before,
        "taken": {kind: each[True] for kind, each in outcomes.items()},
        "refused": {kind: each[False] for kind, each in outcomes.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]))
