"""Error of bf16 logits against float32 from the same bf16 weights: ours beside `transformers`'.

Weights come from a seed, in the shapes of published models; each is written to a temporary folder
(16 GB for the largest) and loaded by the engine. Both libraries prefill the same prompts and decode
the same tokens (`tests/architectures/logit_error.py`). The bound is the ratio of our error to that
of the better of transformers' two ways of computing attention, over all positions.

Prints a JSON line a shape, writes `benchmarks/results/logit_error.json`, and exits with 1 where
the bound is missed:

    PYTHONPATH=tests python benchmarks/logit_error.py    # everything; 80 GB of GPU memory
    PYTHONPATH=tests python benchmarks/logit_error.py --shapes small --device cpu
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from architectures.fixed_configs import FULL_SIZE, SMALL
from architectures.logit_error import LogitErrors, measure, random_texts
from transformers import PretrainedConfig

RESULTS = Path(__file__).parent / "results" / "logit_error.json"
RATIO_BOUND = 1.1
"""Our error over that of transformers."""
NUM_TEXTS, PROMPT_LEN, NUM_DECODES = 4, 256, 16
NUM_SMALL_SEEDS = 4


def main() -> int:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["small", *FULL_SIZE],
        choices=["small", *FULL_SIZE, *SMALL],
        help='"small" is a small model of each architecture',
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: pass --device cpu with --shapes small")
    cases = []
    for name, make_config in chosen(options.shapes):
        num_seeds = 1 if name in FULL_SIZE else NUM_SMALL_SEEDS
        cases.append(measure_shape(name, make_config, num_seeds, options.device))
        print(json.dumps(cases[-1]), flush=True)
    options.results.write_text(
        json.dumps({**surroundings(options.device), "cases": cases}, indent=2)
    )
    return 0 if all(case["is_met"] for case in cases) else 1


def chosen(names: list[str]) -> list[tuple[str, Callable[[], PretrainedConfig]]]:
    """The shapes by these names."""
    every = {**SMALL, **FULL_SIZE}
    expanded = [each for name in names for each in (SMALL if name == "small" else [name])]
    return [(name, every[name]) for name in expanded]


def measure_shape(
    name: str, make_config: Callable[[], PretrainedConfig], num_seeds: int, device: str
) -> dict[str, Any]:
    """Measures one shape over some seeds; gives numbers that can be printed."""
    started = time.perf_counter()
    config = make_config()
    texts = random_texts(config.vocab_size, [PROMPT_LEN] * NUM_TEXTS, NUM_DECODES)
    prefilled, decoded = LogitErrors(), LogitErrors()
    for seed in range(num_seeds):
        parts = measure(config, seed, texts, device=device)
        prefilled, decoded = prefilled + parts[0], decoded + parts[1]
    every = prefilled + decoded
    return {
        "shape": name,
        "num_seeds": num_seeds,
        "prefill": as_json(prefilled),
        "decode": as_json(decoded),
        **as_json(every),
        "bound": RATIO_BOUND,
        "is_met": every.ratio <= RATIO_BOUND,
        "seconds": round(time.perf_counter() - started, 1),
    }


def as_json(errors: LogitErrors) -> dict[str, Any]:
    """Relative errors by who computed, and the ratio."""
    relative = {name: errors.relative(name) for name in sorted(errors.squares)}
    return {"num_rows": errors.num_rows, "relative_error": relative, "ratio": errors.ratio}


def surroundings(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    on_cuda = device.startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": version("transformers"),
        "dtype": "bfloat16",
    }


if __name__ == "__main__":
    sys.exit(main())
