"""Sockets between processes: private, bounded, and never silent about a loss."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from mini_infer.channel import MAX_FRAME_BYTES, bind_router, connect_dealer
from mini_infer.errors import ConfigError

WAIT_MS = 5000


class Sockets:
    """Opens sockets as the processes do, and closes them."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._opened: list[zmq.Socket[bytes]] = []

    def bind(self, address: str) -> zmq.Socket[bytes]:
        self._opened.append(bind_router(self._context, address))
        return self._opened[-1]

    def connect(self, address: str) -> zmq.Socket[bytes]:
        self._opened.append(connect_dealer(self._context, address, "gateway-1"))
        return self._opened[-1]

    def close(self) -> None:
        for socket in self._opened:
            socket.close()
        self._context.term()


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder


def test_messages_go_both_ways(sockets: Sockets, folder: Path) -> None:
    address = f"ipc://{folder}/engine"
    router = sockets.bind(address)
    dealer = sockets.connect(address)
    assert dealer.poll(WAIT_MS, zmq.POLLOUT)
    dealer.send(b"question")
    assert router.poll(WAIT_MS)
    assert router.recv_multipart() == [b"gateway-1", b"question"]
    router.send_multipart([b"gateway-1", b"answer"])
    assert dealer.poll(WAIT_MS)
    assert dealer.recv() == b"answer"


def test_the_socket_belongs_to_this_user_alone(sockets: Sockets, folder: Path) -> None:
    sockets.bind(f"ipc://{folder}/engine")
    assert stat.S_IMODE((folder / "engine").stat().st_mode) == 0o700


def test_a_stale_socket_of_a_killed_process_is_replaced(sockets: Sockets, folder: Path) -> None:
    address = f"ipc://{folder}/engine"
    (folder / "engine").touch()
    sockets.bind(address)
    dealer = sockets.connect(address)
    assert dealer.poll(WAIT_MS, zmq.POLLOUT)


def test_sending_to_a_peer_that_is_gone_fails(sockets: Sockets, folder: Path) -> None:
    router = sockets.bind(f"ipc://{folder}/engine")
    with pytest.raises(zmq.ZMQError) as caught:
        router.send_multipart([b"nobody", b"lost"], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_sending_before_a_connection_fails_instead_of_hoarding(
    sockets: Sockets, folder: Path
) -> None:
    dealer = sockets.connect(f"ipc://{folder}/engine")
    with pytest.raises(zmq.Again):
        dealer.send(b"lost", zmq.NOBLOCK)


def test_a_frame_beyond_the_limit_cuts_the_sender_off(sockets: Sockets, folder: Path) -> None:
    address = f"ipc://{folder}/engine"
    router = sockets.bind(address)
    dealer = sockets.connect(address)
    assert dealer.poll(WAIT_MS, zmq.POLLOUT)
    dealer.send(bytes(MAX_FRAME_BYTES + 1))
    assert not router.poll(500)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5555", "tcp://*:5555", "inproc://engine"])
@pytest.mark.parametrize("open_socket", [Sockets.bind, Sockets.connect])
def test_only_ipc_is_spoken(
    sockets: Sockets, address: str, open_socket: Callable[[Sockets, str], object]
) -> None:
    with pytest.raises(ConfigError, match="ipc:// only"):
        open_socket(sockets, address)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_folder_that_others_can_enter_is_refused(
    sockets: Sockets, folder: Path, mode: int
) -> None:
    folder.chmod(mode)
    with pytest.raises(ConfigError, match="mode 0700"):
        sockets.bind(f"ipc://{folder}/engine")


def test_a_missing_folder_is_named(sockets: Sockets, folder: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        sockets.bind(f"ipc://{folder}/missing/engine")


def test_a_path_that_is_too_long_is_a_config_error(sockets: Sockets, folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        sockets.bind(f"ipc://{folder}/{'x' * 120}")
