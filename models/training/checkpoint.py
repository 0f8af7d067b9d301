"""Checkpoint folders: writes and reads models in the Hugging Face layout.

Weights are safetensors in bfloat16, everything else is JSON; no pickle is read or written.
Training ends here, evaluation starts here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from llama import MAX_POSITIONS, RMS_NORM_EPS, ROPE_THETA, Llama, LlamaShape
from safetensors.torch import load_file, save
from special_tokens import BOS_ID, END_OF_TEXT_ID, EOS_IDS

MODELS_DIR = Path(__file__).resolve().parent.parent
WEIGHTS_NAME = "model.safetensors"


def config_of(shape: LlamaShape) -> dict[str, Any]:
    """Returns the content of `config.json` for a model of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "rms_norm_eps": RMS_NORM_EPS,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS_ID,
        "eos_token_id": list(EOS_IDS),
        "pad_token_id": END_OF_TEXT_ID,
    }


def generation_config() -> dict[str, Any]:
    """Returns the content of `generation_config.json`: the model's own sampling defaults."""
    return {
        "bos_token_id": BOS_ID,
        "eos_token_id": list(EOS_IDS),
        "pad_token_id": END_OF_TEXT_ID,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` as indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_checkpoint(model: Llama, folder: Path) -> None:
    """Writes weights (bfloat16), `config.json` and `generation_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    # Written as bytes because `save_file` makes a file that only its owner may read.
    (folder / WEIGHTS_NAME).write_bytes(save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", config_of(model.shape))
    write_json(folder / "generation_config.json", generation_config())


def load_checkpoint(folder: Path, device: str = "cpu") -> Llama:
    """Reads a checkpoint folder into an fp32 model in evaluation mode.

    Args:
        folder: Folder with `config.json` and `model.safetensors`.
        device: Torch device for the weights.

    Returns:
        The model; its weights hold the bfloat16 values, widened.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = LlamaShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_q_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
    model = Llama(shape)
    weights = load_file(folder / WEIGHTS_NAME)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.to(device).eval()
