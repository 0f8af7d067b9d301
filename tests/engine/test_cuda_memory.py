"""What an engine takes of a GPU's memory, and gives back. `make test-gpu`."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from mini_infer import EngineConfig, LLMEngine
from mini_infer.config import bundled_model
from mini_infer_engine.build import build_engine
from mini_infer_engine.trial_run import largest_batch, largest_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(300),  # Triton compiles at the first use
]

PROMPTS = [f"Once upon a time{' there was a' * (index % 5)}" for index in range(12)]


def write_folder(folder: Path) -> None:
    """A Llama of about 1 GB, without weights."""
    demo = bundled_model("demo")
    config = json.loads((demo / "config.json").read_text())
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 11,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
    }
    (folder / "config.json").write_text(json.dumps(config | sizes))
    shutil.copy(demo / "tokenizer.json", folder)


def free_bytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_weights_and_blocks_take_nearly_all_of_the_free_memory(tmp_path: Path) -> None:
    write_folder(tmp_path)
    free = free_bytes()
    engine = build_engine(EngineConfig(model=str(tmp_path), load_format="dummy", swap_space_gib=0))
    try:
        assert 0.9e9 < engine.model.num_bytes < 1.1e9
        taken = engine.model.num_bytes + engine.runner.cache.layers.nbytes
        assert taken >= 0.92 * free
        config = engine.config
        lengths = largest_prompts(
            config.max_num_seqs, config.max_num_batched_tokens, engine.served.max_model_len - 1
        )
        # What is left is enough for the largest step.
        engine.runner.run(largest_batch(lengths, config.block_size))
    finally:
        engine.served.grammars.close()
        engine.model.free()
        del engine
        free_bytes()  # for the tests behind this one


def test_a_closed_engine_leaves_its_memory_to_the_next_one(tmp_path: Path) -> None:
    """With the default sizes, whose graphs are captured twice: once to see what they take."""
    write_folder(tmp_path)
    config = EngineConfig(model=str(tmp_path), load_format="dummy", swap_space_gib=0)
    free_bytes()
    gc.disable()
    try:
        ids = []
        for _ in range(2):
            with LLMEngine(config) as engine:
                outputs = engine.generate(PROMPTS, max_tokens=20, temperature=0, ignore_eos=True)
                ids.append([output.token_ids for output in outputs])
                capacity = engine._engine.cache_size.num_tokens
            del engine
            ids.append(capacity)
    finally:
        gc.enable()
    assert ids[0] == ids[2]
    assert abs(ids[1] - ids[3]) < 0.01 * ids[1]
