"""What `test_detokenize.py` does not see through text streams: the choice of a reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from mini_infer.errors import ModelFolderError
from mini_infer_tokenizer.encode import TextTokenizer
from mini_infer_tokenizer.pieces import (
    MAX_BYTE_RUN,
    ByteLevelReader,
    WindowReader,
    piece_readers,
)
from tokenizers import Tokenizer, decoders


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("demo", ByteLevelReader), ("byte_fallback", WindowReader), ("no_decoder", WindowReader)],
)
def test_reader_by_decoder(model_folders: dict[str, Path], kind: str, expected: type) -> None:
    assert isinstance(piece_readers(TextTokenizer(model_folders[kind]), True)(), expected)


def test_unsupported_decoder_is_refused(model_folders: dict[str, Path], tmp_path: Path) -> None:
    library = Tokenizer.from_file(str(model_folders["byte_level"] / "tokenizer.json"))
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.CTC()])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFolderError, match="got ByteLevel, CTC"):
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
