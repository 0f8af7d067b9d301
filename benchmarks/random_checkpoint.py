"""Checkpoints of known models' shapes with weights drawn from a seed: real sizes, no download.

Names and shapes of the tensors come from the engine's own model classes, so that any architecture
can be written. There is no tokenizer: what is measured with them takes token ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mini_infer.model_folder import INDEX_FILE, SINGLE_FILE
from mini_infer_engine.layers.backend import Backend
from mini_infer_engine.model_config import read_model_config
from mini_infer_engine.models import MODELS
from mini_infer_kernels.kernel_set import REFERENCE
from safetensors.torch import save_file

MAX_SHARD_BYTES = 5 * 10**9

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama2-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "qwen3-0.6b": {
        **_LLAMA,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "demo-size": {
        **_LLAMA,
        "tie_word_embeddings": True,
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
}
"""Contents of config.json by the name of the shape."""


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> int:
    """Writes config.json and safetensors, in shards of at most 5 GB with their index.

    Args:
        folder: Where to; made if it is missing.
        config: Content of config.json; `torch_dtype` is added.
        seed: Of the weights; another kind of device draws others.
        dtype: Of the weights.
        device: Where they are drawn.

    Returns:
        Bytes of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    shards = _shards(_shapes(folder), dtype.itemsize)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {
            name: _draw(name, shape, generator).to(dtype).cpu() for name, shape in shapes.items()
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    num_bytes = sum(
        math.prod(shape) * dtype.itemsize for shapes in shards for shape in shapes.values()
    )
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return num_bytes


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that config.json asks for, by name."""
    config = read_model_config(folder)
    nowhere = Backend(REFERENCE, torch.bfloat16, torch.device("meta"))
    model = MODELS[config.architecture](config, nowhere, num_positions=1)
    return {name: tuple(each.shape) for name, each in model.destinations().items()}


def _shards(
    shapes: Mapping[str, tuple[int, ...]], element_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Deals the tensors to files, in their order."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = MAX_SHARD_BYTES
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * element_bytes
        if num_bytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = shape
        room -= num_bytes
    return shards


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Sizes as after training, so that activations neither vanish nor overflow."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) > 1:
        return values / math.sqrt(shape[-1])
    return 0.02 * values if name.endswith(".bias") else 1 + 0.1 * values
