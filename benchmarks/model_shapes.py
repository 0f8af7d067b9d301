"""Model folders of known shapes without weights, for engines that draw them on the device.

The tokenizer has as many tokens as the model, short made-up words, so that turning ids into text
costs what it costs with a real one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from random_checkpoint import SHAPES

SHAPE_NAMES = ("llama3-8b", "llama2-7b", "qwen3-0.6b")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SPACE = "\u0120"  # how a byte-level tokenizer writes a space


def write_model_folder(folder: Path, shape: str) -> dict[str, Any]:
    """Writes config.json and tokenizer.json; gives the config.

    Args:
        folder: Where to; made if it is missing.
        shape: One of `SHAPES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[shape], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(config["vocab_size"])))
    return config


def random_prompts(num_prompts: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of equal length as token ids."""
    generator = random.Random(seed)
    return [
        [generator.randrange(10, vocab_size) for _ in range(length)] for _ in range(num_prompts)
    ]


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer without merges: it decodes any id, and encodes letters."""
    vocab = {letter: index for index, letter in enumerate(_LETTERS)}
    while len(vocab) < vocab_size:
        vocab[_word(len(vocab))] = len(vocab)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [],
        },
    }


def _word(number: int) -> str:
    letters = []
    while number:
        number, rest = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[rest])
    return _SPACE + "".join(letters)
