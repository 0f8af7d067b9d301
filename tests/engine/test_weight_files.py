import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import MAX_INDEX_BYTES, read_json_object
from mini_infer_engine.weight_files import MAX_HEADER_BYTES, StoredTensor, read_headers
from safetensors.torch import save_file

MAX_BYTES = 2**21
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_single(folder: Path) -> Path:
    """Writes `model.safetensors` with two tensors; gives its path."""
    path = folder / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path)
    return path


def write_sharded(folder: Path, **index: object) -> Path:
    """Writes a tensor each into two shards; `index` adds to or replaces entries of the map."""
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({name: torch.zeros(2)}, folder / shard)
    weight_map = {"a": SHARDS[0], "b": SHARDS[1], **index}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_header(folder: Path, header: object, data: bytes = b"") -> Path:
    """Writes `model.safetensors` with any header."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return folder


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ENTRY = json.dumps(entry("F32", [1], 0, 4)).encode()


def refusal(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        read_headers(folder)
    return str(caught.value)


def test_reads_headers_in_the_order_of_bytes(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "later": entry("F32", [2], 6, 14),
        "empty": entry("F32", [0, 4], 6, 6),
        "first": entry("BF16", [3, 1], 0, 6),
    }
    write_header(tmp_path, header, b"\0" * 14)
    (file,) = read_headers(tmp_path)
    assert file.path == tmp_path / "model.safetensors"
    assert file.data_start == file.path.stat().st_size - 14
    assert list(file.tensors) == ["first", "empty", "later"]
    assert file.tensors["first"] == StoredTensor("BF16", (3, 1), (0, 6))
    assert file.tensors["later"].num_bytes == 8


def test_reads_each_shard(tmp_path: Path) -> None:
    found = read_headers(write_sharded(tmp_path))
    assert {file.path.name: list(file.tensors) for file in found} == {
        SHARDS[0]: ["a"],
        SHARDS[1]: ["b"],
    }


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_single(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "model.safetensors is truncated or damaged" in refusal(tmp_path)
    path.write_bytes(content + b"\0")
    assert "truncated or damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "header is not valid"),
        (b"[]", "header is not valid"),
        (b'{"a": 1}', "header is not valid"),
        (b'{"\xff": 1}', "header is not valid"),
        (b"[" * 100_000, "header is not valid"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "header is not valid"),
        ({"a": entry("F32", [-1], 0, 4)}, "header is not valid"),
        ({"a": entry("F32", [True], 0, 4)}, "header is not valid"),
        ({"a": entry("F32", [1.0], 0, 4)}, "header is not valid"),
        (b'{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}', "got -0"),
        ({"a": entry("F32", [1] * 9, 0, 4)}, "header is not valid"),
        ({"a": entry("F32", [1], -4, 0)}, "header is not valid"),
        ({"a": entry("F32", "1", 0, 4)}, "header is not valid"),
        ({"a": entry(None, [1], 0, 4)}, "header is not valid"),
        ({"a": entry("F4_X", [1], 0, 4)}, "unknown type 'F4_X'"),
        ({"a": entry("F32", [2], 0, 4)}, "needs 8 bytes, its range has 4"),
        ({"a": entry("F32", [2**62, 4], 0, 0)}, "its range has 0"),
        ({"a": entry("F32", [2**63 - 1] * 8, 0, 4)}, "its range has 4"),
        ({"a": entry("F32", [2**63], 0, 4)}, "header is not valid"),
        ({"a": entry("F32", [10**4000], 0, 4)}, "expected integers from 0 to"),
        (b'{"a": ' + b"9" * 10_000_000 + b"}", "expected integers from 0 to"),
        ({"a": entry("F32", [float("nan")], 0, 4)}, "NaN is not JSON"),
        ({"a": entry("F32", [1], 0, float("inf"))}, "Infinity is not JSON"),
        ({"a": entry("F32", [1], 0, 4), "__metadata__": {"format": 3}}, "header is not valid"),
        ({"a": entry("F32", [1], 0, 4), "__metadata__": None}, "header is not valid"),
        (b'{"a": ' + ENTRY + b', "a": ' + ENTRY + b"}", "a name stands there twice"),
        (b'{"a": ' + ENTRY[:-1] + b', "dtype": "F16"}}', "a name stands there twice"),
        (b"\xef\xbb\xbf" + b'{"a": ' + ENTRY + b"}", "header is not valid"),
        (('{"a": ' + ENTRY.decode() + "}").encode("utf-16"), "header is not valid"),
        ({"a": entry("F32", [1], 4, 0)}, "its range has -4"),
        ({"a": entry("F32", [1], 4, 8)}, "overlap or leave a hole"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, "overlap"),
        ({"a": entry("F32", [2**40], 0, 2**42)}, "the file holds 4"),
        ({}, "need 0 bytes, the file holds 4"),
    ],
)
def test_damaged_header_is_refused(tmp_path: Path, header: object, message: str) -> None:
    assert message in refusal(write_header(tmp_path, header, b"\0" * 4))


def test_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 4096)
    assert "says that its header takes" in refusal(tmp_path)
    path.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}")
    assert "says that its header takes" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model-00001-of-00002.safetensors", "points outside the model folder"),
        ("/etc/model.safetensors", "points outside the model folder"),
        ("shards/model.safetensors", "points outside the model folder"),
        ("..\\model.safetensors", "points outside the model folder"),
        ("model-00003-of-00003.safetensors", "which is missing"),
        ("nul\0.safetensors", "which is missing"),
        ("\ud800.safetensors", "not valid JSON"),
        ("x" * 5000 + ".safetensors", "which is missing"),
        ("pytorch_model.bin", "expected names of .safetensors files"),
        (3, "weight_map must be"),
        (None, "weight_map must be"),
        ("model-00001-of-00002.safetensors", "which lacks it"),
    ],
)
def test_bad_index_entry_is_refused(tmp_path: Path, name: object, message: str) -> None:
    assert message in refusal(write_sharded(tmp_path, b=name))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "weight_map must be"),
        ("{}", "weight_map must be"),
        ('{"weight_map": []}', "weight_map must be"),
        ('{"weight_map": {}}', "weight_map must name"),
        ('{"weight_map": ' + "[" * 1_000_000, "index.json"),
        ('{"metadata": ' + "[" * 1_000_000, "index.json"),
        ('{"weight_map": {"a": "' + "x" * 1_000_000 + '"}}', "expected names of"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert message in refusal(tmp_path)
    assert len(refusal(tmp_path)) < 1000


PEAK = r"""
import re, sys
from pathlib import Path
from mini_infer_engine.weight_files import read_headers

def peak_bytes():
    # Of this process alone, unlike ru_maxrss, which begins with that of its parent.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak_bytes()
try:
    read_headers(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, peak_bytes() - before)
"""


@pytest.mark.parametrize(
    ("before", "entry", "after"),
    [
        ('{"weight_map": {', '"%x":"",', '"a": ""}}'),
        ('{"other": [', "{},", '{}], "weight_map": {"a": ""}}'),
        ('{"weight_map": [', "{},", "{}]}"),
    ],
    ids=["names", "other keys", "no names"],
)
def test_a_hostile_index_takes_little_memory(
    tmp_path: Path, before: str, entry: str, after: str
) -> None:
    num_entries = (MAX_INDEX_BYTES - 100) // (len(entry) + 4 * entry.count("%"))
    entries = (entry % index if "%" in entry else entry for index in range(num_entries))
    content = "".join([before, *entries, after])
    assert MAX_INDEX_BYTES // 2 < len(content) <= MAX_INDEX_BYTES
    (tmp_path / INDEX).write_text(content)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True
    )
    error, num_bytes = done.stdout.split()
    assert error == "ModelFolderError"
    assert int(num_bytes) < 2**29


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 1_000_000, "not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 1_000_000 + b"}", "config.json"),
        (b"[]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object"),
        (b'{"hidden_act": "\xff"}', "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b" " * (MAX_BYTES + 1), "expected at most"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=message) as caught:
        read_json_object(tmp_path / "config.json", max_bytes=MAX_BYTES)
    assert "config.json" in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ModelFolderError, match=r"config\.json does not exist"):
        read_json_object(path)
    path.mkdir()
    with pytest.raises(ModelFolderError, match=r"config\.json cannot be read"):
        read_json_object(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(ModelFolderError, match=r"config\.json must be a file"):
        read_json_object(path)
