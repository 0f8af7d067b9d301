"""Small tokenizers of every kind that model folders hold, in the manner of well-known families.

Trained in a blink with the tokenizers library on a few sentences; for benchmarks and for tests.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Once upon a time there was a fox who lived by the river, and she didn't like the rain.",
    "The quick brown fox jumps over the lazy dog. Wo wohnt der Fuchs? Im Wald! Où est le renard ?",
    "狐は川のそばに住んでいました。 狐狸住在河边。 Лиса жила близ реки. الثعلب يعيش قرب النهر",
    "def fox(x):\n    return x + 1  # 42\n\n\tprint('a  b')",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]

_LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2_WORDS = _LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(**options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Added tokens that cannot be written with the byte alphabet, and one that can.
    tokenizer.add_tokens(["a fox", "狐", "fox\u0120"])
    return tokenizer


def _split_byte_level(words: str) -> Tokenizer:
    tokenizer = _byte_level(ignore_merges=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _llama_3() -> Tokenizer:
    tokenizer = _split_byte_level(_LLAMA_3_WORDS)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _template("<s> $A")]
    )
    tokenizer.add_special_tokens(["<|eot_id|>"])
    return tokenizer


def _qwen_2() -> Tokenizer:
    tokenizer = _split_byte_level(_QWEN_2_WORDS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def _template(single: str) -> processors.TemplateProcessing:
    special_tokens = [(token, SPECIAL.index(token)) for token in SPECIAL]
    return processors.TemplateProcessing(single, special_tokens=special_tokens)


def _byte_fallback(normalizer: Any, pre_tokenizer: Any, strip: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=120, special_tokens=SPECIAL, limit_alphabet=40
    )
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    state = json.loads(tokenizer.to_str())
    vocab: dict[str, int] = state["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    vocab[""] = len(vocab)  # Some vocabularies have a token without text.
    vocab["\ufffd"] = len(vocab)
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = _template("<s> $A")
    return tokenizer


def _llama_2() -> Tokenizer:
    marked = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _byte_fallback(normalizers.Sequence(marked), None, strip=True)


def _phi_3() -> Tokenizer:
    tokenizer = _llama_2()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<|left|>", lstrip=True), AddedToken("fox", single_word=True)])
    return tokenizer


def _mistral() -> Tokenizer:
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _byte_fallback(None, metaspace, strip=True)


def _gemma() -> Tokenizer:
    spaces = pre_tokenizers.Split(" ", "merged_with_previous")
    return _byte_fallback(normalizers.Replace(" ", "▁"), spaces, strip=False)


def _unigram(scheme: str, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        show_progress=False, vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = _template("$A </s>")
    return tokenizer


def _unigram_fallback() -> Tokenizer:
    tokenizer = _unigram("first", normalizers.NFKC())
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def charsmap(replacements: dict[str, str]) -> bytes:
    """A SentencePiece character map of single ASCII characters: a double-array trie, and texts."""
    units = [0] * 1024
    units[0] = 256 << 10  # Where the root's children begin, each at that XOR its byte.
    texts = b""
    for character, text in replacements.items():
        node = 256 ^ ord(character)
        units[node] = ord(character) | 1 << 8 | 512 << 10
        units[node ^ 512] = len(texts) | 1 << 31
        texts += text.encode() + b"\0"
    table = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(table).to_bytes(4, "little") + table + texts


def _precompiled() -> Tokenizer:
    state = json.loads(_unigram("always").to_str())
    replaced = base64.b64encode(charsmap({"~": " ", "@": "at", "\x07": ""})).decode()
    state["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": replaced}
    return Tokenizer.from_str(json.dumps(state))


def _word_piece(cleanup: bool, prefix: str = "##") -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", continuing_subword_prefix=prefix))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=cleanup)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=prefix, cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(
        show_progress=False,
        vocab_size=250,
        special_tokens=SPECIAL,
        continuing_subword_prefix=prefix,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = _template("<s> $A </s>")
    return tokenizer


def _end_of_word(decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=250, special_tokens=SPECIAL, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens(["in</w>side", "</w>"])  # A suffix where none is expected.
    return tokenizer


def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(show_progress=False, special_tokens=SPECIAL)
    )
    return tokenizer


def _ctc() -> Tokenizer:
    letters = [*SPECIAL, "<pad>", "|", *"abcdefghijklmnopqrstuvwxyz'.,"]
    vocab = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", "|")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.CTC()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "llama_3": _llama_3,
    "qwen_2": _qwen_2,
    "byte_fallback": _llama_2,
    "phi_3": _phi_3,
    "mistral": _mistral,
    "gemma": _gemma,
    "unigram": lambda: _unigram("always"),
    "unigram_never": lambda: _unigram("never", normalizers.NFKC()),
    "unigram_fallback": _unigram_fallback,
    "precompiled": _precompiled,
    "word_piece": lambda: _word_piece(cleanup=True),
    "word_piece_plain": lambda: _word_piece(cleanup=False, prefix="@@"),
    "end_of_word": lambda: _end_of_word(decoders.BPEDecoder(suffix="</w>")),
    "no_decoder": lambda: _end_of_word(None),
    "word_level": _word_level,
    "ctc": _ctc,
}
"""What makes a tokenizer of each kind."""


def write_folder(kind: str, folder: Path) -> Path:
    """Writes the tokenizer.json of a kind into a folder, and returns the folder."""
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    return folder
