"""Model folders of config files alone, for the tests of their readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mini_infer_engine.model_config import ModelConfig, read_model_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ABSENT = object()


def write_config(folder: Path, **changes: object) -> Path:
    values = {key: value for key, value in {**BASE, **changes}.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read_changed(folder: Path, **changes: object) -> ModelConfig:
    return read_model_config(write_config(folder, **changes))


def write_generation_config(folder: Path, **values: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder
