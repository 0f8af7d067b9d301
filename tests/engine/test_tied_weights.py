"""Which output projection a checkpoint has, beside what its config.json says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures.checkpoints import write_folder
from mini_infer.config import EngineConfig
from mini_infer.errors import ConfigError
from mini_infer_engine import build
from mini_infer_engine.build import build_engine
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

NAMES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model whose config.json ties its embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    write_folder(LlamaForCausalLM(config), tmp_path)
    return tmp_path


def add_output(folder: Path, *, is_equal: bool) -> None:
    """Stores an output projection as well."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    output = weights[NAMES[0]].clone()
    output[-1, -1] += 0 if is_equal else 1
    save_file(weights | {NAMES[1]: output}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("stored", ["embedding alone", "equal", "another"])
def test_the_output_projection_is_that_of_transformers(folder: Path, stored: str) -> None:
    if stored != "embedding alone":
        add_output(folder, is_equal=stored == "equal")
    reference = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    engine = build_engine(EngineConfig(model=str(folder), kv_cache_tokens=64))
    ours = engine.model.destinations()
    is_tied = NAMES[1] not in ours
    assert is_tied == (stored != "another")
    assert torch.equal(ours[NAMES[0]], reference[NAMES[0]])
    assert torch.equal(ours[NAMES[0] if is_tied else NAMES[1]], reference[NAMES[1]])


def test_a_model_beyond_the_memory_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(EngineConfig(model=str(folder), kv_cache_tokens=64))
    needed = engine.model.num_bytes
    assert needed > 4 * 50 * 32
    monkeypatch.setattr(build, "available_bytes", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=f"take {needed} bytes as float32, and {needed - 1} are"):
        build_engine(EngineConfig(model=str(folder), kv_cache_tokens=64))
