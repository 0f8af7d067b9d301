"""Model folders with random weights, in today's and in older forms of config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

logging.set_verbosity_error()  # type: ignore[no-untyped-call]
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def random_model(
    config: PretrainedConfig,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """Makes a model of `transformers` whose weights leave nothing flat.

    Matrices keep the size of what they multiply, so that no part vanishes and scores are neither
    all alike nor one alone: where a few outweigh all, each layer multiplies the errors of the one
    before. Norms are spread around their neutral value, biases around 0.

    Args:
        config: Which model.
        seed: Equal ones give equal weights, on one device.
        dtype: Of the weights.
        device: Where they lie.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager"
        ).eval()
    generator = torch.Generator(device).manual_seed(seed)
    norms_start_at = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("norm.weight"):
                parameter.normal_(norms_start_at, 0.3, generator=generator)
            else:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def write_folder(model: Any, folder: Path) -> None:
    """Saves a model as a folder that an engine takes."""
    model.save_pretrained(folder, max_shard_size="4GB")
    (folder / "tokenizer.json").write_text("{}")


def write_older_form(folder: Path, type_key: str) -> None:
    """Rewrites a folder's config.json as the Hub had it before `transformers` 5.

    Args:
        folder: The folder.
        type_key: What the kind of rotary embedding stands under: "rope_type", or "type" before.
    """
    path = folder / "config.json"
    path.write_text(json.dumps(older_form(json.loads(path.read_text()), type_key)))


def older_form(config: dict[str, Any], type_key: str) -> dict[str, Any]:
    """The same settings under the keys of older files."""
    older = {key: value for key, value in config.items() if not key.startswith("_")}
    older["torch_dtype"] = older.pop("dtype")
    rope = older.pop("rope_parameters")
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        # Gemma 3 is younger than the newer of the two keys, and takes no other.
        rope, type_key = rope["full_attention"], "rope_type"
    rope = dict(rope)
    older["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope.pop("original_max_position_embeddings", None)
    kind = rope.pop("rope_type")
    older["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    return older | _older_layers(older)


def _older_layers(older: dict[str, Any]) -> dict[str, Any]:
    """What older files say of windows in place of `layer_types`, where they can."""
    layer_types = older.get("layer_types")
    if "use_sliding_window" in older:
        del older["layer_types"]
        # Those files name a window whether or not it is used.
        return {} if older["use_sliding_window"] else {"sliding_window": 3}
    if older["model_type"] == "gemma2" and layer_types == _every(2, len(layer_types)):
        del older["layer_types"]
    if older["model_type"] == "gemma3_text":
        for period in (6, 3, 2):
            if layer_types == _every(period, len(layer_types)):
                del older["layer_types"]
                return {"sliding_window_pattern": period}
        older.pop("sliding_window_pattern", None)
    return {}


def _every(period: int, num_layers: int) -> list[str]:
    return [
        "sliding_attention" if (index + 1) % period else "full_attention"
        for index in range(num_layers)
    ]
