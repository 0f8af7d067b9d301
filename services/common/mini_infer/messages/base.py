"""What every message is made of."""

from __future__ import annotations

import msgspec


class Message(
    msgspec.Struct, frozen=True, array_like=True, gc=False, kw_only=False, tag_field="type"
):
    """Base of every message between processes."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The frame of a message."""
    return _encoder.encode(message)
