"""Reads and loads damaged config files, one a seed: what `test_hostile_configs.py` runs.

    python tests/hostile_configs.py FOLDER FIRST_SEED NUM_SEEDS

FOLDER holds model folders. Prints a line a seed, then the growth of the resident set in bytes; ends
at the first seed whose folder is neither refused with the typed error nor computed.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import torch
from json_mutations import mutate
from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError
from mini_infer.sampling_params import SamplingParams
from mini_infer_engine.build import build_engine
from mini_infer_engine.sequence import StreamKey

VALUES: Sequence[Any] = (
    *("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"),
    *("linear", "dynamic", "yarn", "llama3", "longrope", "default"),
    *("silu", "gelu", "float16", "bfloat16", "sliding_attention", "full_attention"),
    *(2, 4, 8, 32, 1e-6, 1e6, 128.0, 2**20, 2**24),
    *({"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 1e6}),
)
FILES = ("config.json", "generation_config.json")


def outcome(folder: Path) -> str:
    """Loads a folder and computes a token, or says that it was refused."""
    try:
        engine = build_engine(
            EngineConfig(model=str(folder), device="cpu", kv_cache_tokens=64, max_num_seqs=2)
        )
    except ConfigError:
        return "refused"
    served = engine.served
    prompt = [0] * min(5, served.max_model_len - 1)
    max_tokens = min(3, served.max_model_len - len(prompt))
    sampling = SamplingParams(max_tokens=max_tokens).resolve(
        served.defaults,
        num_prompt_tokens=len(prompt),
        max_model_len=served.max_model_len,
        seed=0,
    )
    sequences = served.sequences([StreamKey(b"", 0)], prompt, sampling)
    engine.scheduler.add(*sequences, now=0.0)
    while not engine.scheduler.is_idle:
        batch = engine.scheduler.schedule(0.0)
        for update in engine.scheduler.finish_step(batch, engine.runner.run(batch), 0.0):
            assert all(0 <= each < served.config.vocab_size for each in update.token_ids)
    return "computed"


def damage(source: Path, folder: Path, generator: random.Random) -> None:
    """Copies a folder with one of its configs mutated."""
    shutil.copytree(source, folder)
    path = folder / generator.choice(FILES)
    path.write_bytes(mutate(path.read_bytes(), generator, VALUES))


def main(folder: Path, first_seed: int, num_seeds: int) -> None:
    """Runs the seeds."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    torch.set_num_threads(1)
    sources = sorted(folder.iterdir())
    for source in sources:
        assert outcome(source) == "computed", source
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first_seed, first_seed + num_seeds):
        generator = random.Random(seed)
        with tempfile.TemporaryDirectory() as temporary:
            damaged = Path(temporary) / "model"
            damage(generator.choice(sources), damaged, generator)
            print(seed, end=" ", flush=True)
            print(outcome(damaged), flush=True)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
