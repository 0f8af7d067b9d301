"""Loads mutated tokenizer.json files and uses them: what `test_hostile_tokenizers.py` starts.

    python tests/hostile_tokenizers.py FOLDER FIRST_SEED NUM_SEEDS

FOLDER holds valid files, `*.json`. Prints a seed before it begins and what came of it behind it,
one of: refused, encode refused, loaded. Anything else ends the process. Its memory is bounded, and
a file that takes too long ends it as well.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
from pathlib import Path

import tokenizers
from json_mutations import mutate
from mini_infer.errors import MiniInferError, ModelFolderError
from mini_infer_tokenizer.detokenize import Detokenizer
from mini_infer_tokenizer.encode import TextTokenizer

MEMORY_BYTES = 2**30
"""Of address space, most of which is the interpreter's and its libraries'."""
SECONDS_A_FILE = 10
TEXTS = ["The fox, didn't\n\n狐 é 😀 ~@\x07 ﷺ </s>", "a" * 3000, " " * 600 + "b", "aab" * 300, ""]
READ = "version added_tokens normalizer pre_tokenizer post_processor decoder model".split()
"""Parts of the file; truncation and padding, for training, are not read, nor is anything else."""
STEPS = [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
    {"type": "Precompiled", "precompiled_charsmap": "////////////////////"},
    {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"},
    {"type": "Strip", "content": " ", "start": 2**60, "stop": 0},
    {"type": "Strip", "content": "a", "start": 0, "stop": 3},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "FixedLength", "length": 0},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": True},
    {"type": "Prepend", "prepend": "▁" * 64},
    *[{"type": kind} for kind in ("ByteFallback", "Fuse", "NFKD", "StripAccents", "Digits")],
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "a", "cleanup": True},
]


def use(folder: Path, content: bytes, generator: random.Random) -> str:
    """Loads a file, encodes, decodes and streams; returns what came of it."""
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = TextTokenizer(folder)
        detokenizer = Detokenizer(tokenizer)
    except ModelFolderError:
        return "refused"
    served = {name: part for name, part in json.loads(content).items() if name in READ}
    library = tokenizers.Tokenizer.from_str(json.dumps(served))
    outcome = "loaded"
    id_lists = [[0, 2**32 - 1], generator.choices(range(min(tokenizer.vocab_size, 9**5) + 3), k=60)]
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text, add_special_tokens=True)
        except MiniInferError:
            outcome = "encode refused"
            continue
        # Dropout, for training, makes ids random.
        if not getattr(library.model, "dropout", None):
            assert ids == library.encode(text, add_special_tokens=True).ids
        id_lists.append(ids)
    for ids in id_lists:
        skip = generator.random() < 0.5
        stream = detokenizer.open(skip_special_tokens=skip)
        read = "".join([stream.read([each]).text for each in ids]) + stream.read([], True).text
        assert read == tokenizer.decode(ids, skip), ids
    return outcome


def main() -> None:
    """Works through the seeds."""
    folder, first_seed, num_seeds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    files = [path.read_bytes() for path in sorted(folder.glob("*.json"))]
    scratch = folder / f"seed-{first_seed}"
    scratch.mkdir()
    for seed in range(first_seed, first_seed + num_seeds):
        generator = random.Random(seed)
        content = mutate(generator.choice(files), generator, STEPS)
        print(seed, end=" ", flush=True)
        signal.alarm(SECONDS_A_FILE)  # Its default action ends the process.
        print(use(scratch, content, generator), flush=True)


if __name__ == "__main__":
    main()
