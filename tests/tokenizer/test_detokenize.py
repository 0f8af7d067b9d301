"""The promise: released texts, one after the other, are `decode` of the released ids."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mini_infer_tokenizer.detokenize import NO_STOP, Detokenizer, TextStream
from mini_infer_tokenizer.encode import TextTokenizer

REAL_TEXTS = [
    "狐狸住在河边。キツネは川のそばに住む。여우는 강가에 산다.",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽 and 🇩🇪!",
    "يعيش الثعلب بالقرب من النهر. השועל גר ליד הנהר.",
    "e\u0301 o\u0308 Z\u0351\u036b\u0343\u0329" + "\u0300" * 50,
    "nul \0 and \x07 and \r\n\ttabs  and   spaces \u200b\ufeff",
    "\ufffd\ufffd genuine \ufffd",
    " leading and trailing ",
    "Don't. Won't , can't ! </s> <s>",
]

property_test = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_all(stream: TextStream, ids: Sequence[int], sizes: Sequence[int] = (1,)) -> str:
    """Reads ids in rows of the given sizes, over and over, and checks the bookkeeping."""
    text, num_released, begin = "", 0, 0
    for size in itertools.cycle(sizes):
        last = begin + size >= len(ids)
        delta = stream.read(ids[begin : begin + size], last)
        begin += size
        text += delta.text
        num_released += delta.num_ids
        assert delta.stop_index == NO_STOP
        assert num_released <= stream.num_read == min(begin, len(ids))
        if last:
            assert num_released == len(ids)
            return text
    raise AssertionError("unreachable")


def ids_of(tokenizer: TextTokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of the whole vocabulary and beside it, with special and byte tokens made frequent."""
    known = dict(tokenizer.tokens())
    single = [each for each, token in known.items() if len(token) == 1 or token.startswith("<0x")]
    return st.lists(
        st.one_of(
            st.integers(0, tokenizer.vocab_size + 3),
            st.sampled_from(sorted(single)),
            st.sampled_from(sorted(tokenizer.special_ids)),
        ),
        max_size=30,
    )


@property_test
@given(data=st.data(), skip=st.booleans(), sizes=st.lists(st.integers(1, 5), min_size=1))
def test_any_ids_give_the_text_of_decode(
    tokenizer: TextTokenizer,
    detokenizer: Detokenizer,
    data: st.DataObject,
    skip: bool,
    sizes: list[int],
) -> None:
    ids = data.draw(ids_of(tokenizer))
    stream = detokenizer.open(skip_special_tokens=skip)
    assert read_all(stream, ids, sizes) == tokenizer.decode(ids, skip)


@property_test
@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from(REAL_TEXTS), max_size=3).map("".join)
    | st.binary(max_size=40).map(lambda data: data.decode("utf-8", "replace"))
)
def test_any_text_gives_the_text_of_decode(
    tokenizer: TextTokenizer, detokenizer: Detokenizer, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert read_all(detokenizer.open(), ids) == tokenizer.decode(ids, True)


@pytest.mark.parametrize("text", REAL_TEXTS, ids=range(len(REAL_TEXTS)))
def test_byte_level_text_comes_back_whole(byte_level: TextTokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    stream = Detokenizer(byte_level).open(skip_special_tokens=False)
    assert read_all(stream, ids) == text


@property_test
@given(data=st.data(), stop=st.sampled_from([(), ("a e",), ("\ufffd",), (" \0",)]))
def test_a_stream_resumed_behind_released_ids_goes_on_as_before(
    tokenizer: TextTokenizer, detokenizer: Detokenizer, data: st.DataObject, stop: tuple[str, ...]
) -> None:
    ids = data.draw(ids_of(tokenizer))
    cut = data.draw(st.integers(0, len(ids)))
    stream = detokenizer.open(stop=stop)
    before = stream.read(ids[:cut])
    if before.stop_index != NO_STOP:
        return
    rest = stream.read(ids[cut:], last=True)
    again = detokenizer.open(stop=stop, output_ids=ids[: before.num_ids])
    assert again.read(ids[before.num_ids : cut]) == (0, "", NO_STOP)
    assert again.read(ids[cut:], last=True) == rest


def test_every_short_list_of_bytes_and_words(byte_fallback: TextTokenizer) -> None:
    """Exhaustive over what byte fallback makes hard: broken runs, a stripped space, silence."""
    id_of = {token: each for each, token in byte_fallback.tokens()}
    names = ["<0x20>", "<0x41>", "<0xC3>", "<0xA4>", "<0xE2>", "<0xFF>", "▁", "</s>", "e", ""]
    detokenizer = Detokenizer(byte_fallback)
    for length in range(5):
        for ids in itertools.product([id_of[name] for name in names], repeat=length):
            stream = detokenizer.open()
            head, tail = stream.read(ids[:2]), stream.read(ids[2:], last=True)
            assert head.text + tail.text == byte_fallback.decode(ids, True), ids
            assert head.num_ids + tail.num_ids == length


def test_random_bytes_are_replaced_as_often_as_by_decode(byte_level: TextTokenizer) -> None:
    single = [each for each, token in byte_level.tokens() if len(token) == 1]
    detokenizer = Detokenizer(byte_level)
    generator = random.Random(0)
    for _ in range(2_000):
        ids = generator.choices(single, k=generator.randrange(12))
        assert read_all(detokenizer.open(), ids) == byte_level.decode(ids, True)


def test_an_incomplete_character_is_held_and_released_whole(byte_level: TextTokenizer) -> None:
    ids = byte_level.encode("😀", add_special_tokens=False)
    assert len(ids) == 4
    stream = Detokenizer(byte_level).open()
    deltas = [stream.read([each]) for each in ids]
    assert deltas == [(0, "", NO_STOP)] * 3 + [(4, "😀", NO_STOP)]


def test_dangling_bytes_come_out_at_the_end(byte_level: TextTokenizer) -> None:
    ids = byte_level.encode("a😀", add_special_tokens=False)[:-1]
    stream = Detokenizer(byte_level).open()
    assert stream.read(ids) == (1, "a", NO_STOP)
    assert stream.read([], last=True) == (3, "\ufffd", NO_STOP)


@pytest.mark.parametrize("token", ["<0x80>", "<0xE2>", "<0x41>", "\ufffd", "▁", "", "</s>"])
def test_byte_fallback_runs_are_released_in_time(byte_fallback: TextTokenizer, token: str) -> None:
    check_long_run(byte_fallback, token, max_held=64)


@pytest.mark.parametrize("token", ["\u0122", "\u00e2", "A", "</s>"])
def test_byte_level_runs_are_released_in_time(byte_level: TextTokenizer, token: str) -> None:
    check_long_run(byte_level, token, max_held=3)


@pytest.mark.parametrize(("kind", "token"), [("end_of_word", "</w>"), ("word_piece", "##e")])
def test_other_runs_are_released_at_once(
    model_folders: dict[str, Path], kind: str, token: str
) -> None:
    check_long_run(TextTokenizer(model_folders[kind]), token, max_held=1)


def check_long_run(tokenizer: TextTokenizer, token: str, max_held: int) -> None:
    (token_id,) = [each for each, name in tokenizer.tokens() if name == token]
    detokenizer = Detokenizer(tokenizer)

    def seconds(length: int) -> float:
        stream = detokenizer.open(stop=["\ufffd\ufffdx", "AAb"])
        text, num_released = "", 0
        begin = time.process_time()
        for num_read in range(1, length + 1):
            delta = stream.read([token_id])
            text += delta.text
            num_released += delta.num_ids
            assert num_read - num_released <= max_held + 2  # Two characters begin a stop string.
        text += stream.read([], last=True).text
        elapsed = time.process_time() - begin
        assert text == tokenizer.decode([token_id] * length, True)
        return elapsed

    assert seconds(50_000) < 40 * max(seconds(5_000), 0.001)


def test_a_run_of_ids_that_each_end_inside_a_character_is_released(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """No text ends between any two of these tokens, so some must be let go in the middle."""
    from tokenizers import Tokenizer, decoders, models

    folder = tmp_path_factory.mktemp("straddling")
    lead, rest = "\u00e2", "\u0124\u00ac"  # E2 and 82 AC, as the byte-level alphabet writes them.
    straddling = Tokenizer(models.BPE({lead: 0, rest + lead: 1, "A": 2}, []))
    straddling.decoder = decoders.ByteLevel()
    straddling.save(str(folder / "tokenizer.json"))
    tokenizer = TextTokenizer(folder)
    stream = Detokenizer(tokenizer).open()
    ids = [0, *[1] * 100]
    deltas = [stream.read([each]) for each in ids]
    assert sum(delta.num_ids for delta in deltas) >= len(ids) - 4
    deltas.append(stream.read([2], last=True))
    assert "".join(delta.text for delta in deltas) == tokenizer.decode([*ids, 2], True)
    assert sum(delta.num_ids for delta in deltas) == len(ids) + 1


class TestStopStrings:
    @property_test
    @given(data=st.data(), include=st.booleans(), sizes=st.lists(st.integers(1, 4), min_size=1))
    def test_cut_where_the_stop_string_begins_or_ends(
        self,
        tokenizer: TextTokenizer,
        detokenizer: Detokenizer,
        data: st.DataObject,
        include: bool,
        sizes: list[int],
    ) -> None:
        words = ["fox", "river", "the", "rain", "by", "lived"]
        text = " ".join(data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=12)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.decode(ids, True)
        begin = data.draw(st.integers(0, len(whole) - 1))
        stop = whole[begin : data.draw(st.integers(begin + 1, len(whole)))]
        stream = detokenizer.open(stop=[stop], include_stop_str_in_output=include)
        released, num_ids, position = "", 0, 0
        for size in itertools.cycle(sizes):
            delta = stream.read(ids[position : position + size], position + size >= len(ids))
            position += size
            released += delta.text
            num_ids += delta.num_ids
            if delta.stop_index != NO_STOP:
                break
        end = whole.find(stop)
        assert released == whole[: end + len(stop) if include else end]
        # The ids kept hold the match, and no fewer do.
        assert stop in tokenizer.decode(ids[:num_ids], True)
        assert stop not in tokenizer.decode(ids[: num_ids - 1], True)

    def test_text_that_may_begin_a_stop_string_is_held_a_token_at_a_time(
        self, byte_level: TextTokenizer
    ) -> None:
        ids = [byte_level.encode(each, False)[0] for each in "xABy"]
        stream = Detokenizer(byte_level).open(stop=["ABC"])
        assert [tuple(stream.read([each])) for each in ids] == [
            (1, "x", NO_STOP),
            (0, "", NO_STOP),
            (0, "", NO_STOP),
            (3, "ABy", NO_STOP),
        ]

    def test_held_text_comes_out_at_the_end(self, byte_level: TextTokenizer) -> None:
        ids = [byte_level.encode(each, False)[0] for each in "xAB"]
        stream = Detokenizer(byte_level).open(stop=["ABC"])
        assert stream.read(ids) == (1, "x", NO_STOP)
        assert stream.read([], last=True) == (2, "AB", NO_STOP)

    @pytest.mark.parametrize(
        ("min_tokens", "expected"), [(2, (2, "x", 0)), (3, (5, "xAxx", 0)), (6, (6, "xAxxAy", -1))]
    )
    def test_a_match_counts_from_min_tokens_on(
        self, byte_level: TextTokenizer, min_tokens: int, expected: tuple[int, str, int]
    ) -> None:
        ids = [byte_level.encode(each, False)[0] for each in "xAxxAy"]
        for num_resumed in (0, 1):
            stream = Detokenizer(byte_level).open(
                stop=["A"], min_tokens=min_tokens, output_ids=ids[:num_resumed]
            )
            num_ids, text, stop_index = expected
            assert stream.read(ids[num_resumed:], last=True) == (
                num_ids - num_resumed,
                text[num_resumed:],
                stop_index,
            )
        stream = Detokenizer(byte_level).open(stop=["A"], min_tokens=min_tokens)
        deltas = [stream.read([each]) for each in ids[: expected[0]]]
        assert "".join(delta.text for delta in deltas) == expected[1]
        assert [delta.stop_index for delta in deltas] == [NO_STOP] * (len(deltas) - 1) + [
            expected[2]
        ]

    def test_ids_behind_the_match_in_the_same_row_do_not_count(
        self, byte_level: TextTokenizer
    ) -> None:
        ids = [byte_level.encode(each, False)[0] for each in "xAByz"]
        stream = Detokenizer(byte_level).open(stop=["z", "AB"])
        assert stream.read(ids) == (3, "x", 1)

    def test_ids_only_holds_no_id_for_a_partial_match(self, byte_level: TextTokenizer) -> None:
        ids = [byte_level.encode(each, False)[0] for each in "xABC"]
        stream = Detokenizer(byte_level).open(stop=["ABC"], ids_only=True)
        assert [tuple(stream.read([each])) for each in ids] == [
            (1, "", NO_STOP),
            (1, "", NO_STOP),
            (1, "", NO_STOP),
            (1, "", 0),
        ]

    def test_ids_only_is_resumed_inside_a_partial_match(self, byte_level: TextTokenizer) -> None:
        ids = [byte_level.encode(each, False)[0] for each in "xABC"]
        stream = Detokenizer(byte_level).open(stop=["ABC"], ids_only=True, output_ids=ids[:3])
        assert stream.read(ids[3:]) == (1, "", 0)

    def test_a_match_in_byte_tokens_ends_at_its_own_id(self, byte_fallback: TextTokenizer) -> None:
        id_of = {token: each for each, token in byte_fallback.tokens()}
        ids = [id_of["<0x41>"], id_of["<0x0A>"], id_of["<0x42>"]]
        stream = Detokenizer(byte_fallback).open(stop=["\n"])
        assert stream.read(ids) == (0, "", NO_STOP)
        assert stream.read([], last=True) == (2, "A", 0)

    def test_special_tokens_match_only_where_they_are_text(self, byte_level: TextTokenizer) -> None:
        ids = byte_level.encode("a</s>b", add_special_tokens=False)
        kept = Detokenizer(byte_level).open(stop=["</s>"], skip_special_tokens=False)
        assert kept.read(ids, last=True) == (2, "a", 0)
        skipped = Detokenizer(byte_level).open(stop=["</s>"], skip_special_tokens=True)
        assert skipped.read(ids, last=True) == (3, "ab", NO_STOP)
