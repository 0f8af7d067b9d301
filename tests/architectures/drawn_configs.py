"""Hypothesis strategies for small models of every architecture, as `transformers` configures them.

The sizes are odd on purpose, the windows, soft caps and original contexts so small that a text of
a hundred tokens goes beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
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

Draw = Callable[[st.SearchStrategy[Any]], Any]

MAX_TEXT = 128
"""Tokens of prompt and output that every drawn model has positions for."""
MIN_HIDDEN_SIZE, MAX_HIDDEN_SIZE = 20, 96
"""Below, the elements of a row can almost all be small, and then rounding shows in their norm."""
HEADS = ((1, 1), (1, 2), (1, 4), (1, 7), (2, 2), (2, 4), (2, 6), (3, 3), (3, 9), (5, 5))
"""Key and value heads, query heads."""
HEAD_DIMS = (4, 6, 8, 10, 16, 20, 24)
THETAS = (100.0, 10_000.0, 500_000.0, 1_000_000.0)
WINDOWS = (1, 2, 3, 5, 8, 16, 33, 4096)
SCALED = ("default", "llama3", "linear", "dynamic", "yarn")


@st.composite
def llama_configs(draw: Draw, rope_kinds: Sequence[str] = SCALED) -> PretrainedConfig:
    """Llama: biases here and there, head_dim apart, every rotary embedding."""
    heads = _heads(draw, divides_hidden_size=True)
    return LlamaConfig(
        **heads,
        **_common(draw),
        **_rope(draw, rope_kinds),
        hidden_act=draw(st.sampled_from(["silu", "silu", "gelu_pytorch_tanh"])),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def mistral_configs(draw: Draw) -> PretrainedConfig:
    """Mistral: a window on all layers, or none."""
    heads = _heads(draw)
    return MistralConfig(
        **heads,
        **_common(draw),
        **_rope(draw, SCALED),
        sliding_window=draw(st.sampled_from([None, *WINDOWS])),
    )


@st.composite
def qwen2_configs(draw: Draw) -> PretrainedConfig:
    """Qwen 2: biases of query, key and value, a window on the later layers, no head_dim."""
    heads = _heads(draw, fill_hidden_size=True)
    del heads["head_dim"]
    common = _common(draw)
    return Qwen2Config(
        **heads,
        **common,
        **_rope(draw, SCALED),
        **_later_window(draw, common["num_hidden_layers"]),
    )


@st.composite
def qwen3_configs(draw: Draw) -> PretrainedConfig:
    """Qwen 3: norms of query and key, head_dim apart from hidden_size."""
    heads = _heads(draw)
    common = _common(draw)
    return Qwen3Config(
        **heads,
        **common,
        **_rope(draw, SCALED),
        **_later_window(draw, common["num_hidden_layers"]),
        attention_bias=draw(st.booleans()),
    )


@st.composite
def phi3_configs(draw: Draw) -> PretrainedConfig:
    """Phi 3: rotates a part of each head, with two lists of factors by the text's length."""
    heads = _heads(draw, fill_hidden_size=True)
    head_dim = heads.pop("head_dim")
    # Of an odd part, one element more turns.
    parts = [part for part in range(1, head_dim + 1) if int(head_dim * (part / head_dim)) == part]
    rotary_dim = draw(st.sampled_from([part for part in parts if 4 * part >= head_dim]))
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": draw(st.sampled_from(THETAS)),
        "partial_rotary_factor": rotary_dim / head_dim,
    }
    max_positions, original = draw(st.sampled_from([(MAX_TEXT, MAX_TEXT), (131, 40), (512, 24)]))
    if rotary_dim % 2 == 0 and draw(st.booleans()):
        max_positions, original = draw(st.sampled_from([(512, 24), (128, 32), (300, 48)]))
        factors = st.lists(
            st.sampled_from([1.0, 1.05, 1.5, 4.0, 30.5]),
            min_size=rotary_dim // 2,
            max_size=rotary_dim // 2,
        )
        rope |= {
            "rope_type": "longrope",
            "short_factor": draw(factors),
            "long_factor": draw(factors),
            **_sometimes(draw, "attention_factor", [1.25]),
            **_sometimes(draw, "factor", [1.0, 3.0]),
        }
    return Phi3Config(
        **heads,
        **_common(draw),
        rope_parameters=rope,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=original,
        sliding_window=draw(st.sampled_from([None, *WINDOWS])),
    )


@st.composite
def gemma2_configs(draw: Draw) -> PretrainedConfig:
    """Gemma 2: soft caps, windows on every other layer or where a list says so."""
    heads = _heads(draw, divides_hidden_size=True)
    common = _common(draw)
    return Gemma2Config(
        **heads,
        **common,
        **_rope(draw, ("default", "default", "linear")),
        **_gemma(draw, heads["head_dim"]),
        sliding_window=draw(st.sampled_from(WINDOWS)),
        layer_types=_layer_types(draw, common["num_hidden_layers"]),
        attn_logit_softcapping=draw(st.sampled_from([None, 2.0, 50.0])),
    )


@st.composite
def gemma3_configs(draw: Draw) -> PretrainedConfig:
    """Gemma 3: norms of query and key, five layers with a window to one without, two bases."""
    heads = _heads(draw, divides_hidden_size=True)
    common = _common(draw, max_layers=7)
    full: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": draw(st.sampled_from(THETAS)),
    }
    if draw(st.booleans()):
        full |= {"rope_type": "linear", "factor": draw(st.sampled_from([8.0, 2.5]))}
    local = {"rope_type": "default", "rope_theta": draw(st.sampled_from(THETAS))}
    return Gemma3TextConfig(
        **heads,
        **common,
        **_gemma(draw, heads["head_dim"]),
        **_layer_pattern(draw, common["num_hidden_layers"]),
        rope_parameters={"full_attention": full, "sliding_attention": local},
        max_position_embeddings=256,
        sliding_window=draw(st.sampled_from(WINDOWS)),
    )


CONFIGS: dict[str, st.SearchStrategy[PretrainedConfig]] = {
    "LlamaForCausalLM": llama_configs(),
    "MistralForCausalLM": mistral_configs(),
    "Qwen2ForCausalLM": qwen2_configs(),
    "Qwen3ForCausalLM": qwen3_configs(),
    "Phi3ForCausalLM": phi3_configs(),
    "Gemma2ForCausalLM": gemma2_configs(),
    "Gemma3ForCausalLM": gemma3_configs(),
}
"""By the architecture's name in config.json."""


def _heads(
    draw: Draw, *, divides_hidden_size: bool = False, fill_hidden_size: bool = False
) -> dict[str, Any]:
    """Draws heads (as many keys as queries, groups, or one key for all) and the width.

    Args:
        draw: Hypothesis'.
        divides_hidden_size: Whether the number of heads must divide the width.
        fill_hidden_size: Whether the width must be that of all heads.
    """
    num_kv_heads, num_heads = draw(st.sampled_from(HEADS))
    least, most = -(-MIN_HIDDEN_SIZE // num_heads), MAX_HIDDEN_SIZE // num_heads
    head_dims = [each for each in HEAD_DIMS if each <= most]
    if fill_hidden_size:
        head_dims = [each for each in head_dims if each >= least]
    head_dim = draw(st.sampled_from(head_dims))
    if fill_hidden_size or (head_dim >= least and draw(st.booleans())):
        width = num_heads * head_dim
    elif divides_hidden_size:
        width = num_heads * draw(st.integers(least, most))
    else:
        width = draw(st.integers(MIN_HIDDEN_SIZE, MAX_HIDDEN_SIZE))
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_size": width,
    }


def _common(draw: Draw, max_layers: int = 4) -> dict[str, Any]:
    return {
        "vocab_size": draw(st.integers(97, 300)),
        "intermediate_size": 2 * draw(st.integers(8, 60)) + 1,
        "num_hidden_layers": draw(st.integers(1, max_layers)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _rope(draw: Draw, kinds: Sequence[str]) -> dict[str, Any]:
    """Draws `rope_parameters` and the context that goes with them."""
    kind = draw(st.sampled_from(kinds))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from(THETAS))}
    max_positions = draw(st.sampled_from([256, 301]))
    if kind == "linear":
        rope["factor"] = draw(st.sampled_from([1.0, 2.5, 8.0]))
    elif kind == "dynamic":
        max_positions, factor = draw(st.sampled_from([(16, 8.0), (24, 6.5), (37, 3.5)]))
        rope["factor"] = factor
    elif kind == "llama3":
        rope |= {
            "factor": draw(st.sampled_from([8.0, 2.5])),
            "low_freq_factor": 1.0,
            "high_freq_factor": draw(st.sampled_from([4.0, 2.0])),
            "original_max_position_embeddings": draw(st.sampled_from([16, 64, 8192])),
        }
    elif kind == "yarn":
        rope |= {
            "factor": draw(st.sampled_from([4.0, 8.0, 1.0])),
            "original_max_position_embeddings": draw(st.sampled_from([32, 1024, 4096])),
            **_sometimes(draw, "attention_factor", [0.8, 1.3]),
            **draw(st.sampled_from([{}, {"mscale": 1.0, "mscale_all_dim": 0.8}, {"mscale": 0.7}])),
            **_sometimes(draw, "truncate", [True, False]),
            **_sometimes(draw, "beta_fast", [48.0, 4]),
            **_sometimes(draw, "beta_slow", [2, 0.5]),
        }
    return {"rope_parameters": rope, "max_position_embeddings": max_positions}


def _sometimes(draw: Draw, key: str, values: Sequence[object]) -> dict[str, object]:
    return {key: draw(st.sampled_from(values))} if draw(st.booleans()) else {}


def _later_window(draw: Draw, num_layers: int) -> dict[str, Any]:
    return {
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from(WINDOWS)),
        "max_window_layers": draw(st.integers(0, num_layers)),
    }


def _gemma(draw: Draw, head_dim: int) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": draw(st.sampled_from([head_dim, 7, 144])),
        "final_logit_softcapping": draw(st.sampled_from([None, 5.0, 30.0])),
        "attention_bias": draw(st.booleans()),
        "hidden_activation": draw(
            st.sampled_from(["gelu_pytorch_tanh", "gelu_pytorch_tanh", "silu"])
        ),
    }


def _layer_types(draw: Draw, num_layers: int) -> list[str] | None:
    kinds = st.sampled_from(["sliding_attention", "full_attention"])
    lists = st.lists(kinds, min_size=num_layers, max_size=num_layers)
    drawn: list[str] | None = draw(st.one_of(st.none(), lists))
    return drawn


def _layer_pattern(draw: Draw, num_layers: int) -> dict[str, Any]:
    """Every n-th layer without a window, or a list."""
    layer_types = _layer_types(draw, num_layers)
    if layer_types is not None:
        return {"layer_types": layer_types}
    return {"sliding_window_pattern": draw(st.sampled_from([6, 6, 2, 3]))}
