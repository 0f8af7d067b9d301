"""Trains the tokenizer that both models share and writes its files into both model folders.

A byte-level BPE: every UTF-8 text has an encoding and comes back unchanged. It learns its pieces
from generated documents (see `corpus`) and from common English words (see `common_words`).

    python models/training/train_tokenizer.py
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

from checkpoint import MODELS_DIR, write_json
from common_words import coverage_lines
from corpus import document_texts
from llama import MAX_POSITIONS, SHAPES
from special_tokens import BOS, BOS_ID, END_OF_TEXT, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE of `VOCAB_SIZE` entries on `texts`.

    Raises:
        ValueError: If the texts hold too few different words for a full vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"expected {VOCAB_SIZE} entries, got {tokenizer.get_vocab_size()}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the chat template into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "added_tokens_decoder": {
            str(index): {"content": token, "special": True, **flags}
            for index, token in enumerate(SPECIAL_TOKENS)
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    write_json(folder / "tokenizer_config.json", config)
    shutil.copyfile(CHAT_TEMPLATE, folder / CHAT_TEMPLATE.name)


def main() -> None:
    """Trains on a sample of the corpus and saves into the folder of every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000, help="generated documents to read")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample")
    args = parser.parse_args()
    texts = [*document_texts(0, args.documents), *coverage_lines(args.seed, num_lines=2_000)]
    tokenizer = train_tokenizer(texts)
    for name in SHAPES:
        save_tokenizer(tokenizer, MODELS_DIR / name)
        print(f"wrote {MODELS_DIR / name / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
