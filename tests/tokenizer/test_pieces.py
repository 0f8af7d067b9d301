"""What `test_detokenize.py` does not see through text streams: the choice of a reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from mini_infer.errors import ModelFolderError
from mini_infer_tokenizer.byte_runs import MAX_BYTE_RUN
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.pieces import (
    ByteLevelReader,
    FallbackReader,
    NextReader,
    PlaceReader,
    RepeatReader,
    StripReader,
    Table,
    piece_readers,
)
from tokenizers import AddedToken, Tokenizer, decoders


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("demo", ByteLevelReader),
        ("gemma", FallbackReader),
        ("byte_fallback", StripReader),
        ("no_decoder", PlaceReader),
        ("word_piece", PlaceReader),
        ("unigram", PlaceReader),
        ("end_of_word", NextReader),
        ("ctc", RepeatReader),
    ],
)
def test_reader_by_decoder(model_folders: dict[str, Path], kind: str, expected: type) -> None:
    assert isinstance(piece_readers(TextTokenizer(model_folders[kind]), True)(), expected)


def test_unsupported_decoder_is_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    library = Tokenizer.from_file(str(model_folders["byte_level"] / "tokenizer.json"))
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.CTC()])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFolderError, match=r"Strip; got ByteLevel, CTC"):
        piece_readers(TextTokenizer(tmp_path), skip_special_tokens=True)


def test_a_piece_is_a_whole_character(byte_level: TextTokenizer) -> None:
    reader = piece_readers(byte_level, skip_special_tokens=True)()
    first, second, third = byte_level.encode("€", add_special_tokens=False)
    assert [*reader.feed(first), *reader.feed(second)] == []
    assert list(reader.feed(third)) == [(3, "€")]


def test_a_broken_character_is_final_where_the_next_begins(byte_level: TextTokenizer) -> None:
    reader = piece_readers(byte_level, skip_special_tokens=True)()
    lead = byte_level.encode("€", add_special_tokens=False)[0]
    assert list(reader.feed(lead)) == []
    assert list(reader.feed(lead)) == [(1, "\ufffd")]
    assert list(reader.flush()) == [(1, "\ufffd")]


def test_a_run_of_byte_tokens_is_split_into_characters(byte_fallback: TextTokenizer) -> None:
    id_of = {token: each for each, token in byte_fallback.tokens()}
    reader = piece_readers(byte_fallback, skip_special_tokens=True)()
    names = ["<0x20>", "<0xC3>", "</s>", "<0xA4>", "</s>", "<0x0A>"]
    assert all(not reader.feed(id_of[name]) for name in names)
    # The decoder strips the space that begins the text; silent ids go with the byte before them.
    assert list(reader.feed(id_of["e"])) == [(1, ""), (4, "ä"), (1, "\n"), (1, "e")]


def test_a_long_valid_run_is_released_before_it_ends(byte_fallback: TextTokenizer) -> None:
    id_of = {token: each for each, token in byte_fallback.tokens()}
    reader = piece_readers(byte_fallback, skip_special_tokens=True)()
    run = [id_of["<0x20>"], *[id_of["<0x41>"]] * (MAX_BYTE_RUN - 1)]
    pieces = [piece for token_id in run for piece in reader.feed(token_id)]
    assert pieces == [(1, ""), *[(1, "A")] * (MAX_BYTE_RUN - 1)]
    assert list(reader.feed(id_of["<0x41>"])) == []
    assert list(reader.feed(id_of["e"])) == [(1, "A"), (1, "e")]


def readings(folder: Path, tokens: list[str]) -> list[list[tuple[int, str]]]:
    """The pieces behind each token, and those at the end."""
    tokenizer = TextTokenizer(folder)
    id_of = {token: each for each, token in tokenizer.tokens()}
    reader = piece_readers(tokenizer, skip_special_tokens=True)()
    return [list(reader.feed(id_of[token])) for token in tokens] + [list(reader.flush())]


def test_the_space_behind_a_word_comes_with_the_next_token(model_folders: dict[str, Path]) -> None:
    tokens = ["fox</w>", "</s>", "</w>", "a"]
    expected = [[(1, "fox")], [(1, "")], [(1, " ")], [(1, " a")], []]
    assert readings(model_folders["end_of_word"], tokens) == expected


def test_a_suffix_inside_a_token_waits_for_the_next_one(model_folders: dict[str, Path]) -> None:
    folder = model_folders["end_of_word"]
    held = [[], [], [(2, "in side"), (1, "a")], []]
    assert readings(folder, ["in</w>side", "</s>", "a"]) == held
    assert readings(folder, ["fox</w>", "in</w>side"]) == [[(1, "fox")], [], [(1, " inside")]]


def test_repeated_tokens_have_no_text(model_folders: dict[str, Path]) -> None:
    tokens = ["l", "l", "</s>", "l", "<pad>", "l"]
    expected = [(1, "l"), (1, ""), (1, ""), (1, ""), (1, ""), (1, "l")]
    assert [
        piece for pieces in readings(model_folders["ctc"], tokens) for piece in pieces
    ] == expected


@pytest.mark.parametrize("token", ["\ue000", "\ue001", "\ue002"])
def test_a_token_of_private_use_has_a_text(
    model_folders: dict[str, Path], tmp_path: Path, token: str
) -> None:
    """Although texts of tokens are found out by putting such tokens around them."""
    for kind in ("ctc", "end_of_word", "word_piece", "gemma", "unigram"):
        library = Tokenizer.from_file(str(model_folders[kind] / "tokenizer.json"))
        library.add_tokens([AddedToken(token, normalized=False)])
        library.save(str(tmp_path / "tokenizer.json"))
        tokenizer = TextTokenizer(tmp_path)
        tokens = ["a", token, "l", token, token, "\ue001", "\ue000", "l"]
        known = {each for _, each in tokenizer.tokens()}
        tokens = [each for each in tokens if each in known]
        ids = [library.token_to_id(each) for each in tokens]
        read = "".join(text for pieces in readings(tmp_path, tokens) for _, text in pieces)
        assert read == tokenizer.decode(ids, skip_special_tokens=True), kind
        assert token in read


def test_only_spaces_that_begin_the_text_are_left_out(model_folders: dict[str, Path]) -> None:
    tokens = ["</s>", "", "<0x20>", "▁", "e"]
    expected = [[(1, "")], [(1, "")], [], [(1, ""), (1, " ")], [(1, "e")], []]
    assert readings(model_folders["byte_fallback"], tokens) == expected


@pytest.mark.parametrize(
    ("decoder", "expected"), [(None, "a </w> b"), (decoders.Sequence([]), "a</w>b")]
)
def test_no_decoder_is_not_one_without_steps(
    model_folders: dict[str, Path], tmp_path: Path, decoder: decoders.Decoder, expected: str
) -> None:
    library = Tokenizer.from_file(str(model_folders["end_of_word"] / "tokenizer.json"))
    library.decoder = decoder
    library.save(str(tmp_path / "tokenizer.json"))
    behind_each = readings(tmp_path, ["a", "</w>", "b"])
    assert "".join(text for pieces in behind_each for _, text in pieces) == expected


def test_a_table_keeps_no_entry_of_unknown_ids() -> None:
    table = Table({1: "a"}.get, str.upper, "none")
    assert [table[1], table[1], table[2], table[2**70]] == ["A", "A", "none", "none"]
    assert dict(table) == {1: "A"}
