"""How fast weights load, beside what `safetensors` alone reads from the same page-cached files.

Writes a checkpoint of a known shape from a seed, reads it once so that it is in the page cache,
then loads it in turns: with `safetensors.torch.load_file`, with `safe_open` and `get_tensor`, and
with the engine's loader into the real model. Prints one line of JSON a way, writes
`benchmarks/results/load_speed.json`, and exits with 1 where a GPU is filled at less than 70 % of
the speed of the faster of the two.

    python benchmarks/load_speed.py --shape llama3-8b --device cuda
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.loader import load_weights
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.models import MODELS
from mini_infer_engine.weight_files import weight_files
from mini_infer_kernels.kernel_set import REFERENCE
from random_checkpoint import SHAPES, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

RESULTS = Path(__file__).parent / "results" / "load_speed.json"
BOUND = 0.7
"""Speed of the loader over that of `safetensors`, on a GPU."""
NUM_TURNS = 3
READ_BYTES = 2**24


@dataclass(slots=True)
class Way:
    """A way to load, and what its runs took.

    Attributes:
        name: What loads.
        run: Loads once; returns seconds.
        seconds: One a run.
        peak_host_bytes: Growth of the resident set while it ran, one a run, as far as this
            system tells; with files that are mapped, and on a CPU with the weights themselves.
    """

    name: str
    run: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    peak_host_bytes: list[int | None] = field(default_factory=list)

    def as_json(self, num_bytes: int) -> dict[str, Any]:
        """Its line of the result."""
        peaks = [each for each in self.peak_host_bytes if each is not None]
        return {
            "way": self.name,
            "gb_per_s": round(num_bytes / statistics.median(self.seconds) / 1e9, 3),
            "seconds": [round(each, 4) for each in self.seconds],
            "peak_host_bytes": max(peaks, default=None),
        }


def ways_to_load(folder: Path, device: torch.device) -> list[Way]:
    """The engine's loader comes last."""
    paths = weight_files(folder)
    config = read_model_config(folder)
    dtype = getattr(torch, config.checkpoint_dtype)

    def read(tensor: torch.Tensor) -> torch.Tensor:
        # On a CPU safetensors only maps: a copy has the bytes read.
        return tensor.clone() if device.type == "cpu" else tensor

    def with_load_file() -> float:
        with timed(device) as seconds:
            loaded = [
                {name: read(each) for name, each in load_file(path, device=str(device)).items()}
                for path in paths
            ]
        del loaded
        return seconds[0]

    def with_safe_open() -> float:
        loaded = []
        with timed(device) as seconds:
            for path in paths:
                with safe_open(path, framework="pt", device=str(device)) as file:
                    loaded += [read(file.get_tensor(name)) for name in file.keys()]
        del loaded
        return seconds[0]

    def with_loader() -> float:
        backend = Backend(REFERENCE, dtype, device)
        model = MODELS[config.architecture](config, backend, num_positions=1)
        with timed(device) as seconds:
            load_weights(model, folder)
        return seconds[0]

    return [
        Way("safetensors load_file", with_load_file),
        Way("safetensors safe_open", with_safe_open),
        Way("mini-infer load_weights", with_loader),
    ]


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Gives a list that holds the seconds in the end."""
    seconds: list[float] = []
    synchronize(device)
    started = time.perf_counter()
    yield seconds
    synchronize(device)
    seconds.append(time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    """Waits for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_page_cache(folder: Path) -> None:
    """Reads every weight file once."""
    buffer = bytearray(READ_BYTES)
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def reset_peak() -> None:
    """The peak of the resident set is from now on; not every sandbox can do it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(name: str) -> int | None:
    """A line of /proc/self/status: "VmRSS" now, "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def measure(ways: list[Way], num_turns: int) -> None:
    """Runs the ways in turns, after a turn that does not count."""
    for turn in range(num_turns + 1):
        for way in ways:
            reset_peak()
            before = resident_bytes("VmRSS")
            seconds = way.run()
            peak = resident_bytes("VmHWM")
            if turn:
                way.seconds.append(seconds)
                known = before is not None and peak is not None
                way.peak_host_bytes.append(peak - before if known else None)


def main() -> int:
    """Measures, prints, writes the result; 1 where the bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo-size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="for the checkpoint; a temporary one if unset")
    parser.add_argument("--turns", type=int, default=NUM_TURNS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        num_bytes = write_checkpoint(folder, SHAPES[arguments.shape], device=device)
        warm_page_cache(folder)
        ways = ways_to_load(folder, device)
        measure(ways, arguments.turns)
    *others, own = [way.as_json(num_bytes) for way in ways]
    ratio = own["gb_per_s"] / max(each["gb_per_s"] for each in others)
    on_gpu = device.type == "cuda"
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": arguments.shape,
        "num_bytes": num_bytes,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "versions": {name: version(name) for name in ("torch", "safetensors")},
        "ratio": round(ratio, 3),
        "bound": BOUND if on_gpu else None,
        "ways": [*others, own],
    }
    for way in result["ways"]:
        print(json.dumps(way))
    print(json.dumps({key: value for key, value in result.items() if key != "ways"}))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if on_gpu and ratio < BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
