"""config.json and generation_config.json from anywhere: a typed error, or a model that computes.

They run in processes of their own (`tests/hostile_configs.py`), so that one that ends a process, or
does not end, is a failure with its seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from architectures.checkpoints import random_model, write_folder, write_older_form
from architectures.fixed_configs import SMALL

PROGRAM = Path(__file__).parents[1] / "hostile_configs.py"
NUM_A_PROCESS = 250
TIMEOUT_S = 280
MAX_GROWTH_BYTES = 2**30
"""Of the resident set: of the 1.5 MB that torch keeps of every recorded model, most of all."""
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "layer_types": None,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of every architecture, in today's form of config.json and in the older one."""
    root = tmp_path_factory.mktemp("models")
    for architecture, make in SMALL.items():
        settings = make().to_dict()
        settings |= {key: value for key, value in TINY.items() if key in settings}
        if "factor" in str(settings["rope_parameters"]):
            settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        config = type(make()).from_dict(settings)
        for form in ("today", "older"):
            folder = root / f"{architecture}-{form}"
            folder.mkdir()
            model = random_model(config, 0)
            model.generation_config.eos_token_id = [1, 5]
            write_folder(model, folder)
            generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
            path = folder / "generation_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | generation))
            if form == "older":
                write_older_form(folder, "type")
    return root


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_files", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_files(folders: Path, num_files: int) -> None:
    outcomes: Counter[str] = Counter()
    num_seeds = min(num_files, NUM_A_PROCESS)
    for first_seed in range(0, num_files, num_seeds):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), str(folders), str(first_seed), str(num_seeds)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        *lines, last = done.stdout.splitlines()
        assert done.returncode == 0, f"seed {last}: {done.stderr[-2000:]}"
        assert len(lines) == num_seeds
        assert int(last) < MAX_GROWTH_BYTES
        outcomes += Counter(line.split(" ", 1)[1] for line in lines)
    assert outcomes["computed"] > num_files / 5
    assert outcomes["refused"] > num_files / 5
    print(dict(outcomes))
