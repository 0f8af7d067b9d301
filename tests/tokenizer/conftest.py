"""Small tokenizers of every kind, made with the tokenizers library, as model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mini_infer.config import bundled_model
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "Once upon a time there was a fox who lived by the river, and she didn't like the rain.",
    "The quick brown fox jumps over the lazy dog. Wo wohnt der Fuchs? Im Wald! Où est le renard ?",
    "狐は川のそばに住んでいました。 狐狸住在河边。 Лиса жила близ реки. الثعلب يعيش قرب النهر",
    "def fox(x):\n    return x + 1  # 42\n\n\tprint('a  b')",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]

KINDS = [
    "demo",
    "byte_level",
    "byte_fallback",
    "byte_fallback_unstripped",
    "unigram",
    "word_piece",
    "end_of_word",
    "no_decoder",
]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Added tokens that cannot be written with the byte alphabet, and one that can.
    tokenizer.add_tokens(["a fox", "狐", "fox\u0120"])
    return tokenizer


def _byte_fallback(strip: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        if strip
        else [normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, limit_alphabet=40)
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    state = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = state["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    vocab[""] = len(vocab)  # Some vocabularies have a token without text.
    state["model"]["byte_fallback"] = True
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _end_of_word(decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def _make(kind: str) -> Tokenizer:
    match kind:
        case "byte_level":
            return _byte_level()
        case "byte_fallback":
            return _byte_fallback(strip=True)
        case "byte_fallback_unstripped":
            return _byte_fallback(strip=False)
        case "unigram":
            return _unigram()
        case "word_piece":
            return _word_piece()
        case "end_of_word":
            return _end_of_word(decoders.BPEDecoder(suffix="</w>"))
        case "no_decoder":
            return _end_of_word(None)
    raise ValueError(kind)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each kind."""
    folders = {"demo": bundled_model("demo")}
    for kind in KINDS[1:]:
        folders[kind] = tmp_path_factory.mktemp(kind)
        _make(kind).save(str(folders[kind] / "tokenizer.json"))
    return folders


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> TextTokenizer:
    """A tokenizer of each kind, one after the other."""
    return TextTokenizer(model_folders[request.param])


@pytest.fixture(scope="session")
def detokenizer(tokenizer: TextTokenizer) -> Detokenizer:
    return Detokenizer(tokenizer)


@pytest.fixture(scope="session")
def byte_level(model_folders: dict[str, Path]) -> TextTokenizer:
    return TextTokenizer(model_folders["byte_level"])


@pytest.fixture(scope="session")
def byte_fallback(model_folders: dict[str, Path]) -> TextTokenizer:
    return TextTokenizer(model_folders["byte_fallback"])
