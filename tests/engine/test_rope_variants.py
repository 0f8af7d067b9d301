"""Rotations of every kind of rotary embedding against `transformers`, from config.json on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.drawn_configs import CONFIGS
from hypothesis import given, seed, settings
from mini_infer_engine.layers import rotary
from mini_infer_engine.layers.rotary import make_rotary
from mini_infer_engine.model_config import read_model_config
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

SHAPE: dict[str, Any] = dict(
    hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128
)
LONG_FACTORS = dict(
    short_factor=[1.0 + index / 30 for index in range(48)],
    long_factor=[1.0 + index**1.2 for index in range(48)],
)
PUBLISHED: dict[str, PretrainedConfig] = {
    "llama-2": LlamaConfig(**SHAPE, max_position_embeddings=4096),
    "llama-3.1": LlamaConfig(
        **SHAPE,
        max_position_embeddings=131_072,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500_000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "qwen-2.5-with-yarn": LlamaConfig(
        **SHAPE,
        max_position_embeddings=32_768,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1_000_000.0,
            factor=4.0,
            original_max_position_embeddings=32_768,
        ),
    ),
    "yarn-with-two-temperatures": LlamaConfig(
        **SHAPE,
        max_position_embeddings=163_840,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=10_000.0,
            factor=40.0,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=0.7,
            original_max_position_embeddings=4096,
        ),
    ),
    "yarn-untruncated": LlamaConfig(
        **SHAPE,
        max_position_embeddings=131_072,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=150_000.0,
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=4096,
        ),
    ),
    "linear": LlamaConfig(
        **SHAPE,
        max_position_embeddings=16_384,
        rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=4.0),
    ),
    "dynamic": LlamaConfig(
        **SHAPE,
        max_position_embeddings=4096,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10_000.0, factor=4.0),
    ),
    "phi-3-mini-4k": Phi3Config(hidden_size=192, num_attention_heads=2),
    "phi-3-mini-128k": Phi3Config(
        hidden_size=192,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        rope_parameters=dict(rope_type="longrope", rope_theta=10_000.0, **LONG_FACTORS),
    ),
    "phi-4-mini": Phi3Config(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=10_000.0, partial_rotary_factor=0.75, **LONG_FACTORS
        ),
    ),
    "gemma-3": Gemma3TextConfig(
        **SHAPE,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1_000_000.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=10_000.0),
        ),
    ),
}
"""Settings of models on the Hub, at the width of their heads."""
ARCHITECTURES = {
    LlamaConfig: "LlamaForCausalLM",
    Phi3Config: "Phi3ForCausalLM",
    Gemma3TextConfig: "Gemma3ForCausalLM",
}
POSITIONS = [0, 1, 2, 7, 15, 16, 100]
"""Small ones: at large ones an error of a frequency's last bit turns by more than is tolerated."""


def assert_same_rotations(config: PretrainedConfig, architecture: str) -> None:
    """Compares the rotations of each layer, for a text of each length that may matter."""
    config.architectures = [architecture]
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        ours = read_model_config(Path(name))
    limits = {config.max_position_embeddings, 1}
    limits.add(getattr(config, "original_max_position_embeddings", 1))
    lengths = sorted({length for limit in limits for length in (limit, limit + 1, 3 * limit)})
    layer_types = getattr(config, "layer_types", None) or [None] * ours.num_layers
    compared = set()
    for rope, layer_type in zip(ours.layer_ropes, layer_types, strict=True):
        if (rope, layer_type) in compared:
            continue
        compared.add((rope, layer_type))
        made = make_rotary(rope, lengths[-1], torch.float32, torch.device("cpu"))
        for length in lengths:
            positions = torch.tensor([each for each in POSITIONS if each < length] + [length - 1])
            expected = reference_rotations(config, layer_type, positions)
            lens = torch.full_like(positions, length)
            # The last position made the reference see the text's length; it may be a large one.
            for got, wanted in zip(made.at(positions, lens), expected, strict=True):
                assert torch.allclose(got[:-1, 0], wanted[:-1], atol=1e-5), (rope, length)


def reference_rotations(
    config: PretrainedConfig, layer_type: str | None, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `transformers` turns tokens by, with our sign of the first half's sine."""
    if isinstance(config, Gemma3TextConfig):
        cos, sin = Gemma3RotaryEmbedding(config)(torch.zeros(1), positions[None], layer_type)
    else:
        kind = Phi3RotaryEmbedding if isinstance(config, Phi3Config) else LlamaRotaryEmbedding
        cos, sin = kind(config)(torch.zeros(1), positions[None])
    first, second = sin[0].chunk(2, -1)
    return cos[0], torch.cat((-first, second), -1)


@pytest.mark.parametrize("max_table_bytes", [rotary.MAX_TABLE_BYTES, 0], ids=["tabled", "computed"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(
    monkeypatch: pytest.MonkeyPatch, name: str, max_table_bytes: int
) -> None:
    monkeypatch.setattr(rotary, "MAX_TABLE_BYTES", max_table_bytes)
    config = PUBLISHED[name]
    assert_same_rotations(config, ARCHITECTURES[type(config)])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_drawn_settings(architecture: str) -> None:
    @seed(0)
    @settings(max_examples=60, database=None, deadline=None)
    @given(config=CONFIGS[architecture])
    def check(config: PretrainedConfig) -> None:
        assert_same_rotations(config, architecture)

    check()
