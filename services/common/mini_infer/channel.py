"""ZeroMQ sockets between processes, with every option that keeps them from losing or hoarding.

One DEALER per peer at the gateway, one ROUTER at each tokenizer and engine. Frames are one
msgpack message each (`messages.py`); a ROUTER sees the gateway's identity before it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import zmq

from mini_infer.errors import ConfigError

MAX_FRAME_BYTES = 64 * 2**20
"""A peer that sends more is cut off. The largest honest frame is a 4 MiB prompt."""
HIGH_WATER_MARK = 4096
"""Messages that wait in a pipe before sending fails."""


def bind_router(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """Opens the socket of a tokenizer or engine process.

    Sending to a gateway that is gone raises `zmq.ZMQError` (EHOSTUNREACH), and to one whose pipe
    is full `zmq.Again`: nothing is dropped silently.

    Args:
        context: The process's context.
        address: `ipc://` and a path in a folder that only this user can enter.

    Raises:
        ConfigError: Where the address is not private, or cannot be bound.
    """
    _check_private(address)
    socket = _with_limits(context.socket(zmq.ROUTER))
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    previous_mask = os.umask(0o077)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error
    finally:
        os.umask(previous_mask)
    return socket


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]], address: str, identity: str
) -> zmq.Socket[bytes]:
    """Opens a gateway's socket to one peer; it reconnects by itself.

    While there is no connection, sending without blocking raises `zmq.Again`.

    Args:
        context: The process's context; a `zmq.asyncio.Context` gives an asyncio socket.
        address: Where the peer listens.
        identity: The gateway's name and incarnation, at most 255 bytes.

    Raises:
        ConfigError: Where the address is not private.
    """
    _check_private(address)
    socket = _with_limits(context.socket(zmq.DEALER))
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    socket.connect(address)
    return socket


def _with_limits(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    return socket


def _check_private(address: str) -> None:
    """Refuses whatever another user or machine could reach."""
    if not address.startswith("ipc://"):
        raise ConfigError(
            f"{address}: processes talk over ipc:// only; tcp:// needs CURVE keys, which this "
            "version does not have"
        )
    folder = Path(address.removeprefix("ipc://")).parent
    if not folder.is_dir():
        raise ConfigError(f"{address}: the folder {folder} does not exist; make it with mode 0700")
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"{address}: the folder {folder} must belong to this user with mode 0700 "
            f"(it has {stat.S_IMODE(status.st_mode):04o})"
        )
