"""What a model folder says about its model: an own reader of config.json, known keys only.

Folders come from anywhere, so each value is checked for type and range before anything is
allocated by it, and what this engine does not compute (other architectures, quantization) is
refused here rather than computed wrongly. Code in a folder (`auto_map`) is never run. Nothing here
needs torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import MAX_JSON_BYTES, read_bytes

from mini_infer_engine.architectures import ARCHITECTURES, FULL, SLIDING, Architecture
from mini_infer_engine.config_fields import ConfigFields
from mini_infer_engine.generation_config import read_eos_token_ids
from mini_infer_engine.rope_config import (
    MAX_POSITIONS,
    DynamicRope,
    LongRope,
    RopeConfig,
    read_ropes,
)
from mini_infer_engine.weight_files import read_header_bytes, weight_files

CONFIG_FILE = "config.json"
SUPPORTED_ARCHITECTURES = tuple(ARCHITECTURES)
CHECKPOINT_DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
_ACTIVATION_SYNONYMS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}

# Above what any published model has, and low enough that no product of two overflows 64 bits.
MAX_VOCAB_SIZE = 2**24
MAX_HIDDEN_SIZE = 2**17
MAX_INTERMEDIATE_SIZE = 2**20
MAX_LAYERS = 2**10
MAX_HEADS = 2**10
MAX_HEAD_DIM = 2**10
MAX_RMS_NORM_EPS = 0.1
MAX_SCALAR = 1e6
MAX_PARAMETERS = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a model, checked.

    Attributes:
        architecture: Class name in config.json, such as "LlamaForCausalLM".
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
        activation: Of the feed-forward layers; one of `ACTIVATIONS`.
        num_q_heads: Query heads; a multiple of `num_kv_heads`.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head; even.
        rms_norm_eps: Added to the mean square in RMSNorm.
        max_position_embeddings: Tokens of context that the model was made for.
        tie_word_embeddings: Whether the output projection is the embedding.
        qkv_bias: Whether the query, key and value projections have biases.
        output_bias: Whether the attention's output projection has a bias.
        mlp_bias: Whether the feed-forward projections have biases.
        layer_windows: For each layer how many tokens back a token sees, itself included; None
            where it sees all.
        layer_ropes: For each layer its rotary embedding.
        attention_scale: Factor of the attention scores.
        attention_softcap: Bound that they approach (`c * tanh(x / c)`), or None.
        logit_softcap: Likewise for the logits.
        checkpoint_dtype: Type that the weights were saved in; one of `CHECKPOINT_DTYPES`.
        eos_token_ids: Ids that end a sequence.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    activation: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[RopeConfig, ...]
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    checkpoint_dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layer_windows)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different ones among `layer_windows`."""
        return tuple(dict.fromkeys(self.layer_windows))

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different ones among `layer_ropes`."""
        return tuple(dict.fromkeys(self.layer_ropes))

    @property
    def max_context(self) -> int:
        """Tokens of context that the rotary embeddings reach."""
        return min(rope.max_context(self.max_position_embeddings) for rope in self.ropes)

    @property
    def turning_point(self) -> int | None:
        """Length of text behind which all of its keys are turned otherwise, or None."""
        longs = (rope for rope in self.ropes if isinstance(rope, LongRope))
        return next((rope.original_max_positions for rope in longs), None)

    @property
    def max_plain_prompt(self) -> float:
        """Length up to which a prompt's keys do not depend on its length; infinite for most."""
        dynamic = [rope.max_positions for rope in self.ropes if isinstance(rope, DynamicRope)]
        turning_point = math.inf if self.turning_point is None else self.turning_point
        return min([turning_point, *dynamic])

    @property
    def num_parameters(self) -> int:
        """Weights of the matrices; norms and biases left out."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        attention = 2 * self.hidden_size * (self.num_q_heads + self.num_kv_heads) * self.head_dim
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        return embeddings + self.num_layers * (attention + feed_forward)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads config.json, and the end-of-sequence ids of generation_config.json.

    Absent keys take the defaults of `transformers`, null ones as well unless null means none.

    Args:
        folder: A model folder in the layout of Hugging Face.

    Raises:
        ModelFolderError: The folder or file is missing or damaged, a value is out of range, or
            the model needs something that is not supported; the message names the key.
    """
    fields = ConfigFields.read(folder / CONFIG_FILE)
    name = _check_supported(fields)
    rules = ARCHITECTURES[name]
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    hidden_size = fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_q_heads, num_kv_heads, head_dim = _heads(fields, rules, hidden_size)
    max_positions = fields.integer(
        "max_position_embeddings", 2, MAX_POSITIONS, default=rules.max_position_embeddings
    )
    kinds = _layer_kinds(fields, rules)
    ropes = read_ropes(fields, rules, head_dim, max_positions)
    window = _sliding_window(fields, rules)
    qkv_bias, output_bias = _attention_biases(fields, rules)
    config = ModelConfig(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE_SIZE),
        activation=_activation(fields, rules),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 0, MAX_RMS_NORM_EPS, default=rules.rms_norm_eps),
        max_position_embeddings=max_positions,
        tie_word_embeddings=fields.flag("tie_word_embeddings", rules.tie_word_embeddings),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=rules.has_mlp_bias and fields.flag("mlp_bias"),
        layer_windows=tuple(window if kind == SLIDING else None for kind in kinds),
        layer_ropes=tuple(ropes[kind] for kind in kinds),
        attention_scale=_attention_scale(fields, rules, head_dim),
        attention_softcap=_softcap(
            fields, "attn_logit_softcapping", rules.has_attention_softcap, rules.attention_softcap
        ),
        logit_softcap=_softcap(
            fields, "final_logit_softcapping", rules.has_logit_softcap, rules.logit_softcap
        ),
        checkpoint_dtype=_checkpoint_dtype(fields),
        eos_token_ids=read_eos_token_ids(folder, fields, vocab_size),
    )
    if config.num_parameters > MAX_PARAMETERS:
        raise ModelFolderError(
            f"{fields.path}: its sizes make {config.num_parameters} parameters, expected at most "
            f"{MAX_PARAMETERS}: correct vocab_size, hidden_size and the others"
        )
    return config


def model_fingerprint(folder: Path, *, has_weights: bool = True) -> str:
    """Tells models apart without reading their weights.

    Args:
        folder: A model folder.
        has_weights: Whether its weights are used.

    Returns:
        Hexadecimal SHA-256 of config.json and of each weight file's name, size and header.

    Raises:
        ModelFolderError: A file is missing or damaged.
    """
    digest = hashlib.sha256()
    parts = [read_bytes(folder / CONFIG_FILE, MAX_JSON_BYTES)]
    for path in weight_files(folder) if has_weights else []:
        header, size = read_header_bytes(path)
        parts += [path.name.encode(), str(size).encode(), header]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _check_supported(fields: ConfigFields) -> str:
    """Refuses what this engine would compute wrongly; gives the architecture."""
    if fields.get("quantization_config") is not None:
        expected = "absent, since quantized weights are not supported"
        raise fields.error("quantization_config", expected)
    if fields.flag("use_bidirectional_attention"):
        expected = "false, since tokens are computed before those behind them are known"
        raise fields.error("use_bidirectional_attention", expected)
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
        raise fields.error("architectures", f"a list of one of {list(SUPPORTED_ARCHITECTURES)}")
    _check_code(fields, ARCHITECTURES[names[0]].published_code)
    return str(names[0])


def _check_code(fields: ConfigFields, published: frozenset[str]) -> None:
    """Refuses a folder whose model is what code in it says, unless that is known to be ours."""
    names = fields.get("auto_map")
    if names is None:
        return
    if isinstance(names, dict):
        models = [name for key, name in names.items() if key != "AutoTokenizer"]
        # A copy of a folder names the repository that its code came from: org/name--file.Class.
        if all(isinstance(name, str) and name.rpartition("--")[2] in published for name in models):
            return
    raise fields.error("auto_map", "absent, since code from a model folder is never run")


def _heads(fields: ConfigFields, rules: Architecture, hidden_size: int) -> tuple[int, int, int]:
    """Reads the numbers of query heads, of key and value heads, and a head's width."""
    num_q_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = num_q_heads
    if rules.num_kv_heads is not None and not fields.has("num_key_value_heads"):
        num_kv_heads = rules.num_kv_heads
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_q_heads, default=num_kv_heads)
    if num_q_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of the {num_q_heads} query heads")
    given, default = fields.get("head_dim"), rules.head_dim
    if given is None and default is None and hidden_size % num_q_heads:
        raise fields.error("head_dim", f"given, since {num_q_heads} heads do not divide the width")
    head_dim = fields.integer(
        "head_dim", 2, MAX_HEAD_DIM, default=default or hidden_size // num_q_heads
    )
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise fields.error("head_dim", f"even and at most {MAX_HEAD_DIM} (it is {head_dim})")
    return num_q_heads, num_kv_heads, head_dim


def _layer_kinds(fields: ConfigFields, rules: Architecture) -> list[str]:
    """Whether each layer sees all tokens or slides; without a window this is for its rope alone."""
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    listed = fields.choices("layer_types", num_layers, (FULL, SLIDING))
    if rules.has_layer_types and listed is not None:
        return list(listed)
    return rules.layer_kinds(fields, num_layers)


def _sliding_window(fields: ConfigFields, rules: Architecture) -> int | None:
    """How many tokens a sliding layer sees; null means that it sees all."""
    if not fields.has("sliding_window"):
        return rules.sliding_window
    return fields.optional_integer("sliding_window", 1, MAX_POSITIONS)


def _attention_biases(fields: ConfigFields, rules: Architecture) -> tuple[bool, bool]:
    """Whether query, key and value projections have biases, and whether the output's has one."""
    if rules.qkv_bias is not None:
        return rules.qkv_bias, False
    bias = fields.flag("attention_bias")
    return bias, bias


def _attention_scale(fields: ConfigFields, rules: Architecture, head_dim: int) -> float:
    if rules.query_pre_attn_scalar is None:
        return float(head_dim**-0.5)
    scalar = fields.number(
        "query_pre_attn_scalar", 0, MAX_SCALAR, default=rules.query_pre_attn_scalar
    )
    return float(scalar**-0.5)


def _activation(fields: ConfigFields, rules: Architecture) -> str:
    known = (*ACTIVATIONS, *_ACTIVATION_SYNONYMS)
    name = fields.choice(rules.activation_key, known, default=rules.activation)
    return _ACTIVATION_SYNONYMS.get(name, name)


def _softcap(fields: ConfigFields, key: str, counts: bool, default: float | None) -> float | None:
    """Reads a soft cap where the architecture has one; null means none."""
    if not counts:
        return None
    return fields.optional_number(key, 0, MAX_SCALAR) if fields.has(key) else default


def _checkpoint_dtype(fields: ConfigFields) -> str:
    known = (*CHECKPOINT_DTYPES, *(f"torch.{name}" for name in CHECKPOINT_DTYPES))
    older = fields.choice("torch_dtype", known, default="float32")
    return fields.choice("dtype", known, default=older).removeprefix("torch.")
