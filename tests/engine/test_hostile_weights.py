"""Weight files that are damaged on purpose: a typed error, or the numbers that are in them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from mini_infer_engine.weight_files import MAX_HEADER_BYTES

SCRIPT = Path(__file__).with_name("hostile_weights.py")
MAX_GROWTH_BYTES = 32 * 2**20
"""Of the resident set. The files have less than 100 KB, what they claim to hold has exabytes."""


@pytest.mark.parametrize(
    "count",
    [
        4000,
        pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_mutated_files_are_refused_or_loaded(count: int) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, str(count), str(count)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads(done.stdout)
    taken, refused = result["taken"], result["refused"]
    assert sum(taken.values()) + sum(refused.values()) == count
    assert result["peak_growth_bytes"] < MAX_GROWTH_BYTES
    # Whoever refuses everything would pass as well.
    assert refused["none"] == 0
    for harmless in ("none", "add", "pad", "swap_offsets", "set_metadata", "change_dtype"):
        assert taken[harmless] > 0, harmless
    for kind in refused.keys() - {"none"}:
        assert refused[kind] > 0, kind
    for harmful in ("repeat", "length", "file", "remove_field"):
        assert taken[harmful] == 0, harmful


READ_HEADER = """
import resource, sys
from pathlib import Path
from mini_infer.errors import ModelFolderError
from mini_infer_engine.weight_files import read_header

resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    read_header(Path(sys.argv[1]))
except ModelFolderError as error:
    print(str(error)[-300:])
"""


@pytest.mark.parametrize(
    "filling",
    ['"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', '{"a":', "9"],
)
def test_the_largest_header_fits_into_a_gigabyte(tmp_path: Path, filling: str) -> None:
    if "%" in filling:
        count = MAX_HEADER_BYTES // len(filling % 0) - 1
        header = "{" + "".join(filling % number for number in range(count))
    else:
        header = '{"a":' + filling * (MAX_HEADER_BYTES // len(filling) - 5)
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    done = subprocess.run(
        [sys.executable, "-c", READ_HEADER, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is not valid" in done.stdout
