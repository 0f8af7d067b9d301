"""What a model folder says about its model: an own reader of config.json, known keys only.

Folders come from anywhere, so each value is checked for type and range before anything is
allocated by it, and what this engine does not compute (other architectures, rope scaling,
quantization, remote code) is refused here rather than computed wrongly. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import MAX_JSON_BYTES, read_bytes, read_json_object
from mini_infer.sampling_params import MAX_TEMPERATURE, MAX_TOP_K, GenerationDefaults

from mini_infer_engine.weight_files import read_header_bytes, weight_files

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
CHECKPOINT_DTYPES = ("float32", "float16", "bfloat16")

# Above what any published model has, and low enough that no product of two overflows 64 bits.
MAX_VOCAB_SIZE = 2**24
MAX_HIDDEN_SIZE = 2**17
MAX_INTERMEDIATE_SIZE = 2**20
MAX_LAYERS = 2**10
MAX_HEADS = 2**10
MAX_HEAD_DIM = 2**10
MAX_POSITIONS = 2**24
MAX_ROPE_THETA = 1e12
MAX_RMS_NORM_EPS = 0.1
MAX_PARAMETERS = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a model, checked.

    Attributes:
        architecture: Class name in config.json, such as "LlamaForCausalLM".
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
        num_layers: Decoder layers.
        num_q_heads: Query heads; a multiple of `num_kv_heads`.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head; even.
        rms_norm_eps: Added to the mean square in RMSNorm.
        rope_theta: Base of the rotary embedding's frequencies.
        max_position_embeddings: Tokens of context that the model was made for.
        tie_word_embeddings: Whether the output projection is the embedding.
        attention_bias: Whether the attention's projections have biases.
        mlp_bias: Whether the feed-forward projections have biases.
        checkpoint_dtype: Type that the weights were saved in; one of `CHECKPOINT_DTYPES`.
        eos_token_ids: Ids that end a sequence.
        bos_token_id: Id that begins a sequence.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    checkpoint_dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def num_parameters(self) -> int:
        """Weights of the matrices; norms and biases left out."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        attention = 2 * self.hidden_size * (self.num_q_heads + self.num_kv_heads) * self.head_dim
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        return embeddings + self.num_layers * (attention + feed_forward)


def read_model_config(folder: Path) -> ModelConfig:
    """Reads config.json, and the end-of-sequence ids of generation_config.json.

    Absent and null keys take the defaults of `transformers`.

    Args:
        folder: A model folder in the layout of Hugging Face.

    Raises:
        ModelFolderError: The folder or file is missing or damaged, a value is out of range, or
            the model needs something that is not supported; the message names the key.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"model folder {folder} does not exist or is not a folder")
    fields = _read_fields(folder / CONFIG_FILE)
    architecture = _check_supported(fields)
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    hidden_size = fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_q_heads, num_kv_heads, head_dim = _heads(fields, hidden_size)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_INTERMEDIATE_SIZE),
        num_layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 0, MAX_RMS_NORM_EPS, default=1e-6),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.integer(
            "max_position_embeddings", 1, MAX_POSITIONS, default=2048
        ),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        checkpoint_dtype=_checkpoint_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, folder, vocab_size),
        bos_token_id=fields.optional_integer("bos_token_id", 0, vocab_size - 1),
    )
    if config.num_parameters > MAX_PARAMETERS:
        raise ModelFolderError(
            f"{fields.path}: its sizes make {config.num_parameters} parameters, expected at most "
            f"{MAX_PARAMETERS}: correct vocab_size, hidden_size and the others"
        )
    return config


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Reads what a request gets where it leaves sampling fields out.

    Args:
        folder: A model folder; without generation_config.json the defaults are greedy.

    Raises:
        ModelFolderError: The file is damaged or a value is out of range.
    """
    path = folder / GENERATION_CONFIG_FILE
    if not path.exists():
        return GenerationDefaults()
    fields = _read_fields(path)
    temperature = fields.number("temperature", 0, MAX_TEMPERATURE, default=1.0, low_allowed=True)
    return GenerationDefaults(
        temperature=temperature if fields.flag("do_sample") else 0.0,
        top_k=fields.integer("top_k", 0, MAX_TOP_K, default=0),
        top_p=fields.number("top_p", 0, 1, default=1.0),
        max_tokens=fields.optional_integer("max_new_tokens", 1, MAX_POSITIONS),
    )


def model_fingerprint(folder: Path) -> str:
    """Tells models apart without reading their weights.

    Args:
        folder: A model folder.

    Returns:
        Hexadecimal SHA-256 of config.json and of each weight file's name, size and header.

    Raises:
        ModelFolderError: A file is missing or damaged.
    """
    digest = hashlib.sha256()
    parts = [read_bytes(folder / CONFIG_FILE, MAX_JSON_BYTES)]
    for path in weight_files(folder):
        header, size = read_header_bytes(path)
        parts += [path.name.encode(), str(size).encode(), header]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


class _Fields:
    """Typed reading of the keys of one JSON object; null counts as absent."""

    def __init__(self, path: Path, values: dict[str, object], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> object:
        return self._values.get(key)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not _is_integer(value, low, high):
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        return None if self.get(key) is None else self.integer(key, low, high)

    def number(
        self, key: str, low: float, high: float, default: float, *, low_allowed: bool = False
    ) -> float:
        value = self.get(key)
        if value is None:
            return default
        # Comparing before converting refuses NaN, infinities and integers beyond a float.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (low < value <= high or (low_allowed and value == low))
        ):
            bounds = f"from {low} to {high}" if low_allowed else f"above {low} and at most {high}"
            raise self.error(key, f"a number {bounds}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return bool(value)

    def choice(self, key: str, allowed: Collection[str], default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return value

    def object(self, key: str) -> _Fields:
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return _Fields(self.path, value or {}, f"{self._prefix}{key}.")

    def allow_only(self, keys: Collection[str], why: str) -> None:
        for key, value in self._values.items():
            if key not in keys and value is not None:
                raise self.error(key, f"absent, since {why}")

    def error(self, key: str, expected: str) -> ModelFolderError:
        return ModelFolderError(
            f"{self.path}: {self._prefix}{key} must be {expected}, got "
            f"{reprlib.repr(self.get(key))}: correct the file or use another model"
        )


def _read_fields(path: Path) -> _Fields:
    return _Fields(path, read_json_object(path))


def _check_supported(fields: _Fields) -> str:
    """Refuses what this engine would compute wrongly; gives the architecture."""
    for key, why in (
        ("auto_map", "code from a model folder is never run"),
        ("quantization_config", "quantized weights are not supported"),
    ):
        if fields.get(key) is not None:
            raise fields.error(key, f"absent, since {why}")
    architectures = fields.get("architectures")
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or architectures[0] not in SUPPORTED_ARCHITECTURES
    ):
        raise fields.error("architectures", f"a list of one of {list(SUPPORTED_ARCHITECTURES)}")
    fields.choice("hidden_act", ("silu",), default="silu")
    return str(architectures[0])


def _heads(fields: _Fields, hidden_size: int) -> tuple[int, int, int]:
    """Reads the numbers of query heads, of key and value heads, and a head's width."""
    num_q_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_q_heads, default=num_q_heads)
    if num_q_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of the {num_q_heads} query heads")
    if fields.get("head_dim") is None and hidden_size % num_q_heads:
        raise fields.error("head_dim", f"given, since {num_q_heads} heads do not divide the width")
    head_dim = fields.integer("head_dim", 2, MAX_HEAD_DIM, default=hidden_size // num_q_heads)
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise fields.error("head_dim", f"even and at most {MAX_HEAD_DIM} (it is {head_dim})")
    return num_q_heads, num_kv_heads, head_dim


def _rope_theta(fields: _Fields) -> float:
    """Reads the base from `rope_theta`, or from the object that holds it in newer files."""
    theta = fields.number("rope_theta", 1, MAX_ROPE_THETA, default=10_000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.object(key)
        for name in ("type", "rope_type"):
            rope.choice(name, ("default",), default="default")
        rope.allow_only(("type", "rope_type", "rope_theta"), "rope scaling is not supported")
        theta = rope.number("rope_theta", 1, MAX_ROPE_THETA, default=theta)
    return theta


def _checkpoint_dtype(fields: _Fields) -> str:
    older = fields.choice("torch_dtype", CHECKPOINT_DTYPES, default="float32")
    return fields.choice("dtype", CHECKPOINT_DTYPES, default=older)


def _eos_token_ids(config: _Fields, folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Reads the ids from generation_config.json where it has them, else from config.json."""
    sources = [config]
    path = folder / GENERATION_CONFIG_FILE
    if path.exists():
        sources.insert(0, _read_fields(path))
    for fields in sources:
        value = fields.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(_is_integer(each, 0, vocab_size - 1) for each in ids):
            raise fields.error("eos_token_id", f"ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))
    return ()


def _is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    # JSON's true is a Python int.
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
