"""What a silent config.json means: the defaults of the classes of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from config_files import ABSENT, read_changed
from mini_infer.errors import ModelFolderError
from mini_infer_engine.architectures import ARCHITECTURES, FULL, SLIDING
from mini_infer_engine.models import MODELS

CONFIG_CLASSES: dict[str, Any] = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "Gemma2ForCausalLM": transformers.Gemma2Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
}
OPTIONAL = [
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta"),
    *("max_position_embeddings", "tie_word_embeddings", "torch_dtype"),
    *("bos_token_id", "eos_token_id"),
]
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def read(folder: Path, architecture: str, **changes: object) -> Any:
    return read_changed(folder, **{"architectures": [architecture], **changes})


def test_each_architecture_has_code_and_a_reference() -> None:
    assert list(ARCHITECTURES) == list(MODELS) == list(CONFIG_CLASSES)


@architectures
def test_absent_keys_take_the_defaults_of_transformers(tmp_path: Path, architecture: str) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 32, "num_hidden_layers": 30}
    config = read(tmp_path, architecture, **sizes, **dict.fromkeys(OPTIONAL, ABSENT))
    reference = CONFIG_CLASSES[architecture](**sizes)

    head_dim = getattr(reference, "head_dim", None) or 256 // 32
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == head_dim
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    activation_key = "hidden_act" if hasattr(reference, "hidden_act") else "hidden_activation"
    assert config.activation == getattr(reference, activation_key)
    scalar = getattr(reference, "query_pre_attn_scalar", head_dim)
    assert config.attention_scale == scalar**-0.5
    assert config.logit_softcap == getattr(reference, "final_logit_softcapping", None)
    assert config.checkpoint_dtype == "float32"
    assert config.eos_token_ids == ()

    kinds = getattr(reference, "layer_types", None)
    window = getattr(reference, "sliding_window", None)
    kinds = kinds or [SLIDING if window else FULL] * 30
    assert config.layer_windows == tuple(window if kind == SLIDING else None for kind in kinds)
    ropes = reference.rope_parameters
    for kind, rope in zip(kinds, config.layer_ropes, strict=True):
        assert rope.theta == ropes.get(kind, ropes)["rope_theta"]


@architectures
def test_null_keys_count_as_absent(tmp_path: Path, architecture: str) -> None:
    # Null has a meaning of its own for the number of key and value heads: as many as queries.
    optional = [key for key in OPTIONAL if key != "num_key_value_heads"]
    absent = read(tmp_path, architecture, **dict.fromkeys(optional, ABSENT))
    assert read(tmp_path, architecture, **dict.fromkeys(optional)) == absent
    assert read(tmp_path, architecture, num_key_value_heads=None).num_kv_heads == 4


@architectures
def test_biases(tmp_path: Path, architecture: str) -> None:
    with_bias = read(tmp_path, architecture, attention_bias=True, mlp_bias=True)
    without = read(tmp_path, architecture, attention_bias=False, mlp_bias=False)
    has_attention_bias = hasattr(CONFIG_CLASSES[architecture](), "attention_bias")
    assert with_bias.output_bias == has_attention_bias
    assert with_bias.qkv_bias == (has_attention_bias or architecture == "Qwen2ForCausalLM")
    assert with_bias.mlp_bias == (architecture == "LlamaForCausalLM")
    assert not without.output_bias
    assert not without.mlp_bias
    assert without.qkv_bias == (architecture == "Qwen2ForCausalLM")


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 5}, [None] * 4),
        ("MistralForCausalLM", {"sliding_window": 5}, [5] * 4),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        (
            "MistralForCausalLM",  # which transformers calls Ministral then
            {"sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
            [5, None, 5, None],
        ),
        ("Phi3ForCausalLM", {"sliding_window": 5}, [5] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 5}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 5, "use_sliding_window": True}, [None] * 4),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
            [None, 5, 5, 5],
        ),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 5, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
            [5, None, None, 5],
        ),
        ("Gemma2ForCausalLM", {"sliding_window": 5}, [5, None, 5, None]),
        ("Gemma3ForCausalLM", {"sliding_window": 5}, [5] * 4),
        (
            "Gemma3ForCausalLM",
            {"sliding_window": 5, "sliding_window_pattern": 3},
            [5, 5, None, 5],
        ),
        (
            "Gemma3ForCausalLM",
            {"sliding_window": 5, "layer_types": [FULL, SLIDING, FULL, FULL]},
            [None, 5, None, None],
        ),
    ],
)
def test_windows(
    tmp_path: Path, architecture: str, changes: dict[str, object], windows: list[int | None]
) -> None:
    config = read(tmp_path, architecture, num_hidden_layers=4, **changes)
    assert list(config.layer_windows) == windows


@pytest.mark.parametrize(
    ("given", "attention", "logit"),
    [
        ({}, 50.0, 30.0),
        ({"attn_logit_softcapping": None, "final_logit_softcapping": None}, None, None),
        ({"attn_logit_softcapping": 3, "final_logit_softcapping": 4.5}, 3.0, 4.5),
    ],
)
def test_soft_caps(
    tmp_path: Path, given: dict[str, object], attention: float | None, logit: float | None
) -> None:
    config = read(tmp_path, "Gemma2ForCausalLM", **given)
    assert (config.attention_softcap, config.logit_softcap) == (attention, logit)
    # Gemma 3 has no soft cap on scores, whatever its file says.
    config = read(tmp_path, "Gemma3ForCausalLM", **given)
    assert config.attention_softcap is None
    assert config.logit_softcap == (logit if given else None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 0),
        ("sliding_window", "5"),
        ("sliding_window_pattern", 0),
        ("layer_types", [FULL]),
        ("layer_types", [FULL, "linear_attention"]),
        ("layer_types", "full_attention"),
        ("query_pre_attn_scalar", 0),
        ("final_logit_softcapping", -1),
        ("hidden_activation", "relu"),
        ("rope_local_base_freq", 0.1),
        ("use_bidirectional_attention", True),
    ],
)
def test_bad_value_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ModelFolderError, match=rf"config\.json: {key} must be"):
        read(tmp_path, "Gemma3ForCausalLM", **{key: value})
