"""tokenizer.json from anywhere: a typed error or a correct load, whatever stands in it.

Files run in processes of their own (`tests/hostile_tokenizers.py`) with bounded memory and time, so
that one that ends a process, or does not end, is a failure with its seed.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from json_mutations import mutate
from mini_infer.errors import ErrorReason, MiniInferError, ModelFolderError
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer

PROGRAM = Path(__file__).parents[1] / "hostile_tokenizers.py"
NUM_A_PROCESS = 500
TIMEOUT_S = 100


def run_seeds(folder: Path, first_seed: int, num_seeds: int) -> Counter[str]:
    # One thread, and no backtraces of what the library is expected to do.
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), str(first_seed), str(num_seeds)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"seed {lines[-1:]}: {result.stderr[-2000:]}"
    assert len(lines) == num_seeds
    return Counter(line.split(" ", 1)[1] for line in lines)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_files", [500, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_files(model_folders: dict[str, Path], tmp_path: Path, num_files: int) -> None:
    for kind, folder in model_folders.items():
        if kind != "demo":  # Small files, so that more of a mutation hits what matters.
            shutil.copy(folder / "tokenizer.json", tmp_path / f"{kind}.json")
    outcomes: Counter[str] = Counter()
    for first_seed in range(0, num_files, NUM_A_PROCESS):
        outcomes += run_seeds(tmp_path, first_seed, NUM_A_PROCESS)
    assert outcomes.total() == num_files
    assert outcomes["loaded"] > num_files / 5
    assert outcomes["refused"] > num_files / 5
    print(dict(outcomes))


CONFIG_VALUES: list[Any] = [
    *["\ud800", {"content": "\ud800"}, {"\udfff": "a"}, {"\udfff": {"content": "a"}}],
    *[{"9" * 5000: {"content": "a"}}, {"٣": {"content": "three"}}, {"007": {"content": "agent"}}],
    *[{"content": "a" * 5000}, {"content": "\0"}, {"content": ["<s>"]}, {"content": "<s>"}],
    *["<s>", ["<s>", 3, None], {"x_token": {"content": "<x>"}}, {"bos_token": 3}, [[["a"]]]],
]
ADDED_TOKEN = {"content": "<t>", "lstrip": True, "rstrip": False, "normalized": True}
CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "added_tokens_decoder": {
        str(number): ADDED_TOKEN | {"content": f"<t{number}>", "special": number % 2 == 0}
        for number in (0, 5, 900)
    },
    "additional_special_tokens": ["<|left|>", ADDED_TOKEN],
    "bos_token": {"__type": "AddedToken"} | ADDED_TOKEN,
    "eos_token": "</s>",
    "extra_special_tokens": {"image_token": "<image>"},
    "model_max_length": 10**30,
    "split_special_tokens": False,
    "unk_token": None,
}
TOKENS_MAP = {
    "additional_special_tokens": ["<|right|>"], "bos_token": ADDED_TOKEN, "pad_token": "<pad>"
}  # fmt: skip


def use_configured(folder: Path) -> str:
    """Loads a folder and uses it; returns why it was refused."""
    try:
        tokenizer = TextTokenizer(folder)
    except ModelFolderError as error:
        return str(error)
    written = " ".join(tokenizer.special_tokens.values())
    ids = tokenizer.encode(f"The fox {written}", add_special_tokens=True)
    assert max(ids) < tokenizer.vocab_size
    tokenizer.decode(ids, skip_special_tokens=True).encode()
    json.dumps(tokenizer.special_tokens, ensure_ascii=False).encode()
    return ""


@pytest.mark.parametrize("num_files", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_configurations(
    model_folders: dict[str, Path], tmp_path: Path, num_files: int
) -> None:
    shutil.copy(model_folders["word_piece"] / "tokenizer.json", tmp_path)
    outcomes: Counter[str] = Counter()
    for seed in range(num_files):
        generator = random.Random(seed)
        config = CONFIG.copy()
        if seed % 2:  # Without this list the map is read.
            del config["added_tokens_decoder"]
        for name, value in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", TOKENS_MAP),
        ):
            content = mutate(json.dumps(value).encode(), generator, CONFIG_VALUES)
            (tmp_path / name).write_bytes(content)
        refusal = use_configured(tmp_path)
        outcomes["refused" if refusal else "loaded"] += 1
        if refusal:
            assert tmp_path.name in refusal, seed
            assert len(refusal.encode()) < 1000, seed
    assert min(outcomes["loaded"], outcomes["refused"]) > num_files / 5, outcomes


WORDS = {"a": 0, "b": 1, "ab": 2, " ": 3, "<s>": 4}
BPE = {"type": "BPE", "vocab": WORDS, "merges": ["a b"]}


def write(folder: Path, **parts: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({"model": BPE} | parts))
    return folder


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(name: str, step: dict[str, Any], times: int) -> dict[str, Any]:
    return {"type": "Sequence", name: [step] * times}


def nested(name: str, step: dict[str, Any], times: int) -> dict[str, Any]:
    for _ in range(times):
        step = sequence(name, step, 1)
    return step


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(pieces: list[Any], ids: list[int]) -> dict[str, Any]:
    token = {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}
    single = {"single": pieces, "pair": pieces, "special_tokens": {"<s>": token}}
    return {"type": "TemplateProcessing"} | single


TEXT_PIECE = {"Sequence": {"id": "A", "type_id": 0}}
BOS_PIECE = {"SpecialToken": {"id": "<s>", "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
ADDED = {"id": 9, "single_word": False, "lstrip": False, "rstrip": False}
ADDED |= {"normalized": False, "special": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
WORD_PIECE = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##"}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "huge id": ({"model": BPE | {"vocab": {"a": 2**32 - 1}, "merges": []}}, "ids below 4194304"),
    "negative id": ({"model": BPE | {"vocab": {"a": -1}}}, "valid tokenizer"),
    "long token": ({"model": BPE | {"vocab": {"a" * 5000: 0}, "merges": []}}, "one of 5000"),
    "merge of no token": ({"model": BPE | {"merges": ["a x"]}}, "valid tokenizer"),
    "merge without its prefix": (
        {"model": BPE | {"continuing_subword_prefix": "#", "vocab": WORDS | {"é": 9, "aé": 10},
                         "merges": [["a", "é"]]}},
        "expected merges with '#'",
    ),
    "cubic words": (
        {"model": WORD_PIECE | {"vocab": WORDS, "max_input_chars_per_word": 10**6}}, "at most 512"
    ),
    "growing text": (
        {"normalizer": sequence("normalizers", replace("a" * 9, String="a"), 2)}, "got 81 times"
    ),
    "matches of nothing": (
        {"normalizer": sequence("normalizers", replace("b", Regex="(?=a)*"), 7)}, "got 128 times"
    ),
    "bytes of bytes": (
        {"pre_tokenizer": sequence("pretokenizers", BYTE_LEVEL, 4)}, "got 256 times"
    ),
    "long prefix": ({"normalizer": {"type": "Prepend", "prepend": "a" * 99}}, "at most 64"),
    "growing output": ({"decoder": replace("a" * 65, String="a")}, "got 65 times"),
    "too many steps": ({"normalizer": sequence("normalizers", {"type": "NFC"}, 65)}, "64 steps"),
    "too many levels": ({"normalizer": nested("normalizers", {"type": "NFC"}, 17)}, "16 levels"),
    "hopelessly deep": ({"normalizer": nested("normalizers", {"type": "NFC"}, 400)}, ""),
    "step without a type": ({"normalizer": {"normalizers": []}}, "object with a type"),
    "map with a huge table": ({"normalizer": charsmap(b"\xff" * 64)}, "cannot hold a table"),
    "map without a table": ({"normalizer": charsmap(b"\0" * 8)}, "cannot hold a table"),
    "map to a long text": (
        {"normalizer": charsmap((1024).to_bytes(4, "little") + bytes(1024) + b"a" * 9999)},
        "got 303 times",
    ),
    "map that leads astray": (
        {"normalizer": charsmap((4).to_bytes(4, "little") + b"\x00\xff\xff\x7f")}, ""
    ),
    "map of no base64": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "é"}}, "not base64"
    ),
    "large part": ({"normalizer": {"type": "Prepend", "prepend": "a" * 2**23}}, "normalizer of"),
    "much text for a trie": (
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a" * 2**22, -1.0]] * 3}}, "together"
    ),
    "long added tokens": ({"added_tokens": [ADDED | {"content": "a" * 2**22}] * 2}, "together"),
    "long regular expressions": (
        {"pre_tokenizer": sequence("pretokenizers", SPLIT | {"pattern": {"Regex": "a" * 9999}}, 4)},
        "got 39996",
    ),
    "many entries": ({"model": BPE | {"merges": ["," * 2**23]}}, "commas"),
    "repeated text": ({"post_processor": template([TEXT_PIECE] * 2, [4])}, "repeats no text"),
    "many ids": ({"post_processor": template([BOS_PIECE] * 600, [4, 4])}, "got 1200"),
    "template of a missing token": (
        {"post_processor": template([{"SpecialToken": {"id": "x", "type_id": 0}}], [4])}, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_asks_for_too_much_is_refused(tmp_path: Path, name: str) -> None:
    parts, message = REFUSED[name]
    with pytest.raises(ModelFolderError, match=rf"tokenizer\.json.*{message}"):
        TextTokenizer(write(tmp_path, **parts))


CTC = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
DECODERS: dict[str, Any] = {
    "regex": replace("b", Regex="(a+)+$"),
    "stripped end": {"type": "Strip", "content": " ", "start": 0, "stop": 1},
    "repeated tokens, twice": sequence("decoders", CTC, 2),
    "replaces what is joined": {
        "type": "Sequence", "decoders": [{"type": "Fuse"}, replace("c", String="ab")]
    },
    "bytes are replaced": {
        "type": "Sequence", "decoders": [{"type": "ByteFallback"}, replace("c", String="a")]
    },
    "replaces what bytes were": {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, replace(" ", String="▁")],
    },
    "changes any character": {
        "type": "Metaspace", "replacement": "\ue000", "prepend_scheme": "always", "split": True
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_that_cannot_be_streamed_are_refused(tmp_path: Path, name: str) -> None:
    tokenizer = TextTokenizer(write(tmp_path, decoder=DECODERS[name]))
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json"):
        Detokenizer(tokenizer)


def test_an_explosive_regular_expression_ends_with_an_error(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}} | {"behavior": "Isolated"}
    tokenizer = TextTokenizer(write(tmp_path, pre_tokenizer=split | {"invert": False}))
    assert tokenizer.encode("ab", False) == [2]
    with pytest.raises(MiniInferError, match="failed to encode") as caught:
        tokenizer.encode("a" * 60 + "!", add_special_tokens=False)
    assert caught.value.reason is ErrorReason.INTERNAL_ERROR
    assert "aaa" not in caught.value.message
    assert tokenizer.encode("ab", False) == [2]


def test_a_text_without_tokens_is_an_invalid_field(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}
    tokenizer = TextTokenizer(write(tmp_path, model=model))
    assert tokenizer.encode("a", False) == [0]
    with pytest.raises(MiniInferError, match="cannot encode this text") as caught:
        tokenizer.encode("b", False)
    assert caught.value.reason is ErrorReason.INVALID_FIELD


def test_a_second_part_of_the_same_name_is_no_way_round(tmp_path: Path) -> None:
    honest, huge = json.dumps({"type": "NFC"}), json.dumps(charsmap(b"\xff" * 64))
    model = json.dumps(BPE)
    for first, second in ((honest, huge), (huge, honest)):
        content = f'{{"model": {model}, "normalizer": {first}, "normalizer": {second}}}'
        (tmp_path / "tokenizer.json").write_text(content)
        if second == huge:
            with pytest.raises(ModelFolderError, match="cannot hold a table"):
                TextTokenizer(tmp_path)
        else:
            assert TextTokenizer(tmp_path).encode("ab", False) == [2]


def test_what_is_not_read_must_be_text_as_well(tmp_path: Path) -> None:
    content = b'{"comment": "\xff", "model": ' + json.dumps(BPE).encode() + b"}"
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match="utf-8"):
        TextTokenizer(tmp_path)


def test_a_sparse_vocabulary_costs_no_table(tmp_path: Path) -> None:
    model = BPE | {"vocab": WORDS | {"z": 4 * 2**20 - 1}}
    tokenizer = TextTokenizer(write(tmp_path, model=model))
    assert tokenizer.vocab_size == 4 * 2**20
    assert Detokenizer(tokenizer).open().read([0, 4 * 2**20 - 1, 77, 2**60]).text == "a z"
