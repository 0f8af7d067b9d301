"""Models of known shapes: the full-size ones that are measured, and a small one of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

_IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
_SMALL: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 256,
    "intermediate_size": 680,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    **_IDS,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + index / 20 for index in range(12)],
    "long_factor": [1.0 + index * 2 for index in range(12)],
}


def llama3_8b() -> PretrainedConfig:
    """Llama 3.1 8B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=_LLAMA_3_ROPE | {"original_max_position_embeddings": 8192},
        **_IDS,
    )


def llama2_7b() -> PretrainedConfig:
    """Llama 2 7B."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        **_IDS,
    )


def qwen3_0_6b() -> PretrainedConfig:
    """Qwen 3 0.6B."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        **_IDS,
    )


FULL_SIZE: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama3-8b": llama3_8b,
    "llama2-7b": llama2_7b,
    "qwen3-0.6b": qwen3_0_6b,
}

SMALL: Mapping[str, Callable[[], PretrainedConfig]] = {
    "LlamaForCausalLM": lambda: LlamaConfig(
        **_SMALL, rope_parameters=dict(_LLAMA_3_ROPE), attention_bias=True
    ),
    "MistralForCausalLM": lambda: MistralConfig(**_SMALL, sliding_window=48),
    "Qwen2ForCausalLM": lambda: Qwen2Config(
        **_SMALL, use_sliding_window=True, sliding_window=40, max_window_layers=2
    ),
    "Qwen3ForCausalLM": lambda: Qwen3Config(**_SMALL, head_dim=64, tie_word_embeddings=True),
    "Phi3ForCausalLM": lambda: Phi3Config(
        **_SMALL, rope_parameters=dict(_LONG_ROPE), original_max_position_embeddings=64
    ),
    "Gemma2ForCausalLM": lambda: Gemma2Config(
        **_SMALL, head_dim=48, sliding_window=40, query_pre_attn_scalar=32
    ),
    "Gemma3ForCausalLM": lambda: Gemma3TextConfig(
        **_SMALL | {"num_hidden_layers": 7}, head_dim=48, sliding_window=40
    ),
}
"""By architecture; the features that tell it from the others are all at work in 100 tokens."""
