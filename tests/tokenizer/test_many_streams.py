"""The promise of `test_detokenize.py` in numbers: random ids and texts, and every short list.

A failure names the seed of its list; `check_list(tokenizer, detokenizer, ids, seed)` replays it.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mini_infer_tokenizer.detokenize import NO_STOP, Detokenizer, TextStream
from mini_infer_tokenizer.encode import TextTokenizer
from random_texts import TextMaker
from tokenizers import Tokenizer

NUM_LISTS = 20_000
NUM_SAMPLED = 200
MAX_LENGTH = 24


@pytest.fixture
def without_coverage() -> Iterator[None]:
    """Stops counting lines for a while: in the millions it takes longer than running them."""
    trace = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(trace)


def read_rest(stream: TextStream, ids: Sequence[int], begin: int, cuts: Iterable[int]) -> str:
    """Reads the ids from `begin` on in rows that end at the cuts; checks what is counted."""
    texts, num_released = [], begin
    for cut in cuts:
        delta = stream.read(ids[begin:cut], cut == len(ids))
        assert delta.stop_index == NO_STOP
        begin = cut
        texts.append(delta.text)
        num_released += delta.num_ids
        assert num_released <= cut == stream.num_read
    assert num_released == len(ids)
    return "".join(texts)


def check_list(
    tokenizer: TextTokenizer, detokenizer: Detokenizer, ids: Sequence[int], seed: int
) -> None:
    """Streams ids in random rows, and again behind a random number of released ids."""
    generator = random.Random(seed)
    skip = generator.random() < 0.5
    whole = tokenizer.decode(ids, skip)
    rows = generator.choice((1, 1, 3, 8))
    cuts = sorted({*generator.choices(range(len(ids) + 1), k=len(ids) // rows), len(ids)})
    stream = detokenizer.open(skip_special_tokens=skip)
    assert read_rest(stream, ids, 0, cuts) == whole, (seed, ids)

    released = detokenizer.open(skip_special_tokens=skip).read(ids[: generator.choice(cuts)])
    resumed = detokenizer.open(skip_special_tokens=skip, output_ids=ids[: released.num_ids])
    cuts = [cut for cut in cuts if cut >= released.num_ids]
    rest = read_rest(resumed, ids, released.num_ids, cuts)
    assert released.text + rest == whole, (seed, ids)


def id_lists(tokenizer: TextTokenizer, generator: random.Random) -> Iterator[list[int]]:
    """Lists in which bytes, single characters and special tokens are frequent."""
    known = dict(tokenizer.tokens())
    single = [each for each, token in known.items() if len(token) <= 1 or token.startswith("<0x")]
    anything = range(tokenizer.vocab_size + 3)
    mixture = [*anything, *single * 2, *sorted(tokenizer.special_ids) * 8]
    some = [generator.choices(mixture, k=6) for _ in range(50)]
    while True:
        pool = generator.choice((mixture, mixture, single, generator.choice(some)))
        yield generator.choices(pool, k=generator.randrange(MAX_LENGTH + 1))


def encoded_texts(tokenizer: TextTokenizer, generator: random.Random) -> Iterator[list[int]]:
    texts = TextMaker(generator)
    while True:
        yield tokenizer.encode(texts.make(), add_special_tokens=generator.random() < 0.5)


SOURCES = {"ids": id_lists, "texts": encoded_texts}


@pytest.mark.usefixtures("without_coverage")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "num_lists", [NUM_SAMPLED, pytest.param(NUM_LISTS, marks=pytest.mark.slow)]
)
def test_streams_give_the_text_of_decode(
    tokenizer: TextTokenizer, detokenizer: Detokenizer, source: str, num_lists: int
) -> None:
    lists = SOURCES[source](tokenizer, random.Random(num_lists))
    for seed, ids in enumerate(itertools.islice(lists, num_lists)):
        check_list(tokenizer, detokenizer, ids, seed)


def test_stop_strings_cut_at_every_boundary(
    tokenizer: TextTokenizer, detokenizer: Detokenizer
) -> None:
    """Every part of a text as the stop string, with a row ending behind each of the tokens."""
    ids = tokenizer.encode("the fox <s> didn't 狐", add_special_tokens=False)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(whole) > 8
    for begin, end in itertools.combinations(range(len(whole) + 1), 2):
        stop = whole[begin:end]
        for cut, include in itertools.product(range(len(ids) + 1), (False, True)):
            stream = detokenizer.open(stop=[stop], include_stop_str_in_output=include)
            first = stream.read(ids[:cut])
            text, stop_index = first.text, first.stop_index
            if stop_index == NO_STOP:
                assert stop not in tokenizer.decode(ids[: first.num_ids], True)
                rest = stream.read(ids[cut:], last=True)
                text, stop_index = text + rest.text, rest.stop_index
            assert stop_index == 0
            found = whole.find(stop)
            assert text == whole[: found + len(stop) if include else found]


BYTES_OF_CHARACTERS = "E2 82 AC F0 9F 98 80 C3 A9 ED A0 C0 FF EF BF BD 20 41 00 0A".split()
SHORT_WORDS = ["", "\ufffd", "</s>", "a", "狐", "é"]


def byte_level_words() -> list[str]:
    """Forty tokens: bytes, parts of characters that straddle two, whole ones, and plain text."""
    printed = {**{byte: chr(byte) for byte in range(256)}, 0: "Ā", 10: "Ċ", 32: "Ġ"}
    printed |= {0x7F + index: chr(0x121 + index) for index in range(0x22)} | {0xAD: "Ń"}

    def written(data: str) -> str:
        return "".join(printed[byte] for byte in bytes.fromhex(data))

    parts = "E282 82AC ACE2 9F98 80F0 F09F EFBF BFBD C3A9 E282AC 2041 BDEF A080 20E2".split()
    return [written(each) for each in [*BYTES_OF_CHARACTERS, *parts]] + SHORT_WORDS


def byte_fallback_words() -> list[str]:
    """Forty tokens: bytes, what only looks like bytes, and the marks of spaces."""
    marks = ["▁", "▁▁", "▁a", "a▁", " ", " a", "b"]
    alike = ["<0x+F>", "<0xG1>", "<0xe2>", "<0x041>", "<0x4>", "<0X41>", "</s>a"]
    return [f"<0x{byte}>" for byte in BYTES_OF_CHARACTERS] + SHORT_WORDS + marks + alike


def forty_ids(words: Sequence[str], decoder: dict[str, Any], folder: Path) -> TextTokenizer:
    assert len(set(words)) == 40
    end = {"id": words.index("</s>"), "content": "</s>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    vocab = {word: index for index, word in enumerate(words)}
    file = {
        "added_tokens": [end | flags],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        "decoder": decoder,
    }
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return TextTokenizer(folder)


FALLBACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]
BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False
}  # fmt: skip
VOCABULARIES: dict[str, tuple[Callable[[], list[str]], dict[str, Any]]] = {
    "byte level": (byte_level_words, BYTE_LEVEL),
    "byte fallback": (byte_fallback_words, {"type": "Sequence", "decoders": FALLBACK}),
}


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("without_coverage")
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("max_length", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_short_list_gives_the_text_of_decode(
    tmp_path: Path, vocabulary: str, max_length: int
) -> None:
    """All 2,625,641 lists of at most four of forty ids, one id a row."""
    make_words, decoder = VOCABULARIES[vocabulary]
    tokenizer = forty_ids(make_words(), decoder, tmp_path)
    detokenizer = Detokenizer(tokenizer)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    num_lists = 0
    for length in range(max_length + 1):
        lists = itertools.product(range(40), repeat=length)
        while batch := list(itertools.islice(lists, 40**2)):
            expected = library.decode_batch(batch, skip_special_tokens=True)
            for ids, text in zip(batch, expected, strict=True):
                read = detokenizer.open().read
                deltas = [read((each,)) for each in ids[:-1]]
                deltas.append(read(ids[-1:], True))
                assert "".join([delta[1] for delta in deltas]) == text, ids
                assert sum([delta[0] for delta in deltas]) == length, ids
            num_lists += len(batch)
    assert num_lists == sum(40**length for length in range(max_length + 1))
