"""What each supported architecture takes for granted where config.json is silent. No torch.

The values are the defaults of the Hugging Face configuration classes, since a config.json says
only what differs from them. `models/` holds the code of each architecture under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mini_infer_engine.config_fields import ConfigFields

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as config.json calls them."""

SlidingLayers = Callable[[ConfigFields, int], list[str]]
"""Gives the kind of each of so many layers."""


def _all_full(fields: ConfigFields, num_layers: int) -> list[str]:
    return [FULL] * num_layers


def _all_sliding(fields: ConfigFields, num_layers: int) -> list[str]:
    return [SLIDING] * num_layers


def _later_sliding(fields: ConfigFields, num_layers: int) -> list[str]:
    """Qwen: with `use_sliding_window`, the layers from `max_window_layers` on."""
    first = fields.integer("max_window_layers", 0, 2**31 - 1, default=28)
    if not fields.flag("use_sliding_window"):
        first = num_layers
    return [SLIDING if index >= first else FULL for index in range(num_layers)]


def _every_second_full(fields: ConfigFields, num_layers: int) -> list[str]:
    """Gemma 2: layers slide and do not, in turn."""
    return _every_nth_full(2, num_layers)


def _last_of_pattern_full(fields: ConfigFields, num_layers: int) -> list[str]:
    """Gemma 3: of `sliding_window_pattern` layers the last does not slide."""
    nth = fields.integer("sliding_window_pattern", 1, 2**10, default=6)
    return _every_nth_full(nth, num_layers)


def _every_nth_full(nth: int, num_layers: int) -> list[str]:
    return [SLIDING if (index + 1) % nth else FULL for index in range(num_layers)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Defaults and rules of one architecture.

    Attributes:
        num_kv_heads: Where absent; None means as many as query heads.
        head_dim: Where absent; None means hidden_size / query heads.
        rms_norm_eps: Where absent.
        max_position_embeddings: Where absent.
        tie_word_embeddings: Where absent.
        activation_key: The key that names the feed-forward layers' activation.
        activation: Where that is absent.
        qkv_bias: Whether the query, key and value projections have biases; None means what
            `attention_bias` says, for the output projection as well.
        has_mlp_bias: Whether `mlp_bias` counts.
        sliding_window: Where absent; None means no window.
        layer_kinds: Which layers slide, where there is a window.
        has_layer_types: Whether the list `layer_types` says it instead, where it is there.
        rope_theta: Where absent.
        local_rope_theta: Base of the sliding layers where they have their own; None: one for all.
        rope_kinds: Kinds of rotary embedding that it may be scaled by.
        has_partial_rotation: Whether `partial_rotary_factor` counts.
        original_max_positions: Where the top level of config.json lacks
            `original_max_position_embeddings`; None means what the rotary embedding's object says.
        query_pre_attn_scalar: Where absent; None means that scores are scaled by head_dim.
        has_attention_softcap: Whether `attn_logit_softcapping` counts.
        attention_softcap: Where it is absent.
        has_logit_softcap: Whether `final_logit_softcapping` counts.
        logit_softcap: Where it is absent.
        published_code: What `auto_map` may name: classes that its publisher's folders bring along
            and that compute what ours do. They are not run; any other is refused.
    """

    num_kv_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    activation_key: str = "hidden_act"
    activation: str = "silu"
    qkv_bias: bool | None = None
    has_mlp_bias: bool = False
    sliding_window: int | None = None
    layer_kinds: SlidingLayers = _all_full
    has_layer_types: bool = False
    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    rope_kinds: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
    has_partial_rotation: bool = False
    original_max_positions: int | None = None
    query_pre_attn_scalar: float | None = None
    has_attention_softcap: bool = False
    attention_softcap: float | None = None
    has_logit_softcap: bool = False
    logit_softcap: float | None = None
    published_code: frozenset[str] = frozenset()


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(has_mlp_bias=True),
    "MistralForCausalLM": Architecture(
        num_kv_heads=8,
        max_position_embeddings=131_072,
        qkv_bias=False,
        sliding_window=4096,
        layer_kinds=_all_sliding,
        has_layer_types=True,
    ),
    "Qwen2ForCausalLM": Architecture(
        num_kv_heads=32,
        max_position_embeddings=32_768,
        qkv_bias=True,
        sliding_window=4096,
        layer_kinds=_later_sliding,
        has_layer_types=True,
    ),
    "Qwen3ForCausalLM": Architecture(
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=32_768,
        sliding_window=4096,
        layer_kinds=_later_sliding,
        has_layer_types=True,
    ),
    "Phi3ForCausalLM": Architecture(
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        qkv_bias=False,
        layer_kinds=_all_sliding,
        rope_kinds=("default", "longrope"),
        has_partial_rotation=True,
        original_max_positions=4096,
        published_code=frozenset(
            {"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"}
        ),
    ),
    "Gemma2ForCausalLM": Architecture(
        num_kv_heads=4,
        head_dim=256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        sliding_window=4096,
        layer_kinds=_every_second_full,
        has_layer_types=True,
        query_pre_attn_scalar=256.0,
        has_attention_softcap=True,
        attention_softcap=50.0,
        has_logit_softcap=True,
        logit_softcap=30.0,
    ),
    "Gemma3ForCausalLM": Architecture(
        num_kv_heads=4,
        head_dim=256,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        sliding_window=4096,
        layer_kinds=_last_of_pattern_full,
        has_layer_types=True,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        query_pre_attn_scalar=256.0,
        has_logit_softcap=True,
    ),
}
