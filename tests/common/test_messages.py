"""Messages between processes: round trip, frames of older versions, and garbage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_samples import DECODERS, FRAMES, SAMPLES, fields_of
from mini_infer import messages

ALL_SAMPLES = [(direction, sample) for direction, each in SAMPLES.items() for sample in each]
RECORDED = sorted(FRAMES.glob("*/*.bin"))
UNIONS = {
    "to_engine": messages.ToEngine,
    "from_engine": messages.FromEngine,
    "to_tokenizer": messages.ToTokenizer,
    "from_tokenizer": messages.FromTokenizer,
}


@pytest.mark.parametrize(
    ("direction", "sample"),
    ALL_SAMPLES,
    ids=[f"{direction}-{type(sample).__name__}" for direction, sample in ALL_SAMPLES],
)
def test_round_trip(direction: str, sample: messages.Message) -> None:
    assert DECODERS[direction].decode(messages.encode(sample)) == sample


def holds(actual: Any, expected: Any) -> bool:
    """Whether a message has all recorded fields; it may have newer ones beside them."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        return all(name in actual and holds(actual[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(holds, actual, expected))
    return bool(actual == expected)


@pytest.mark.parametrize("frame", RECORDED, ids=[f"{p.parent.name}-{p.stem}" for p in RECORDED])
def test_recorded_frames_are_understood(frame: Path) -> None:
    expected = json.loads(frame.with_suffix(".json").read_text(encoding="utf-8"))
    message = DECODERS[frame.parent.name].decode(frame.read_bytes())
    assert type(message).__name__ == expected["message"]
    assert holds(fields_of(message), expected["fields"])


@pytest.mark.parametrize("direction", UNIONS)
def test_every_message_has_a_recorded_frame(direction: str) -> None:
    names = {each.__name__ for each in get_args(UNIONS[direction])}
    frames = (FRAMES / direction).glob("*.bin")
    assert names == {frame.stem.partition("-")[0] for frame in frames}


def test_tags_are_never_shared() -> None:
    classes = {each for union in UNIONS.values() for each in get_args(union)}
    tags = [each.__struct_config__.tag for each in classes]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("direction", DECODERS)
@given(data=st.binary(max_size=200))
def test_garbage_gives_decode_errors_only(direction: str, data: bytes) -> None:
    try:
        DECODERS[direction].decode(data)
    except msgspec.DecodeError:
        pass


@pytest.mark.parametrize("frame", RECORDED, ids=[f"{p.parent.name}-{p.stem}" for p in RECORDED])
@given(data=st.data())
def test_damaged_frames_give_decode_errors_only(frame: Path, data: st.DataObject) -> None:
    content = bytearray(frame.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        DECODERS[frame.parent.name].decode(bytes(content))
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass


def test_step_output_is_columns() -> None:
    """A token costs its own bytes, not an object's: what a batch of 256 sends per step."""
    rows = 256
    output = messages.StepOutput(
        epoch=1,
        seq=1,
        step=1,
        streams=list(range(rows)),
        starts=[100] * rows,
        counts=[1] * rows,
        token_ids=[4000] * rows,
        finish_codes=[0] * rows,
        stop_token_ids=[messages.NO_STOP_TOKEN] * rows,
        finished=[],
    )
    assert len(messages.encode(output)) < 12 * rows
