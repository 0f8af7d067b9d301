"""Weights go to their places piece by piece: whole, in little memory, and until told to stop."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from mini_infer.errors import ModelFolderError
from mini_infer_engine import loader
from mini_infer_engine.loader import load_weights
from safetensors.torch import save_file


class _Destinations:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def destinations(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def ignorable(self) -> frozenset[str]:
        return frozenset()


@pytest.mark.parametrize("piece_bytes", [1, 16, 17, 40, 64, 1000])
def test_tensors_are_copied_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(loader, "CPU_PIECE_BYTES", piece_bytes)
    weights = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "no_columns": torch.empty(4, 0),
        "wide": torch.randn(5, 4),
        "cube": torch.randn(3, 2, 2),
        "long": torch.randn(33),
    }
    save_file(weights, tmp_path / "model.safetensors")
    filled = {name: torch.full_like(each, torch.nan) for name, each in weights.items()}
    filled["wide"] = torch.full((4, 5), torch.nan).t()  # As weights of products lie on a CPU.
    done: list[int] = []
    report = load_weights(_Destinations(filled), tmp_path, lambda now, _: done.append(now))
    assert all(torch.equal(filled[name], each) for name, each in weights.items())
    assert filled["wide"].stride() == (1, 5)
    assert report.num_tensors == 6
    assert done[-1] == report.num_bytes == 4 * (1 + 20 + 12 + 33)
    largest_row = 16
    assert max(map(operator.sub, done, [0, *done])) <= max(piece_bytes, largest_row)


def test_a_file_that_shrinks_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping would end the process with SIGBUS."""
    monkeypatch.setattr(loader, "CPU_PIECE_BYTES", 1024)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2**12, 256)}, path)
    model = _Destinations({"a": torch.zeros(2**12, 256)})
    with pytest.raises(ModelFolderError, match=r"model\.safetensors became shorter while it was"):
        load_weights(model, tmp_path, lambda *_: os.truncate(path, 10_000))


def test_a_load_that_is_given_up_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "CPU_PIECE_BYTES", 4096)
    save_file({"a": torch.ones(2**14, 1024)}, tmp_path / "model.safetensors")
    filled = torch.zeros(2**14, 1024)
    num_threads = threading.active_count()

    def give_up(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_weights(_Destinations({"a": filled}), tmp_path, give_up)
    assert threading.active_count() == num_threads
    assert filled[-1].sum() == 0


MEASURE_PEAK = """
import re, sys
from pathlib import Path
import torch
from mini_infer_engine.loader import load_weights

class Model:
    qkv = torch.zeros(4096, 24576).t()

    def destinations(self):
        q, k, v = self.qkv.split(8192)
        return {"q": q, "k": k, "v": v}

    def ignorable(self):
        return frozenset()

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
model = Model()
Path("/proc/self/clear_refs").write_text("5")  # The peak starts again.
before = peak_bytes()
report = load_weights(model, Path(sys.argv[1]))
print(peak_bytes() - before)
assert report.num_bytes == 2 * model.qkv.numel(), report
assert (model.qkv == 0.5).all()
"""


def test_beyond_the_model_a_load_takes_little_memory(tmp_path: Path) -> None:
    """Fused weights in another type, from shards: neither a shard nor a tensor stands in memory."""
    part = torch.full((8192, 4096), 0.5, dtype=torch.bfloat16)
    for name in "qkv":
        save_file({name: part}, tmp_path / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in "qkv"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 2**20, "the checkpoint has 192 MiB, the model 384"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_fills_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(loader, "CUDA_PIECE_BYTES", 2**16)
    weights = {name: torch.randn(3000, 128).to(stored) for name in ("q", "k", "odd")}
    weights["norm"] = torch.randn(7).to(stored)
    save_file(weights, tmp_path / "model.safetensors")
    qkv = torch.zeros(6000, 128, dtype=wanted, device="cuda")
    strided = torch.zeros(128, 3000, dtype=wanted, device="cuda").t()
    norm = torch.zeros(7, dtype=wanted, device="cuda")
    filled = {"q": qkv[:3000], "k": qkv[3000:], "odd": strided, "norm": norm}
    load_weights(_Destinations(filled), tmp_path)
    for name, each in weights.items():
        assert torch.equal(filled[name].cpu(), each.to(wanted)), name
