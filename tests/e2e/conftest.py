"""A server as users start it: `mini-infer serve`, three processes, real sockets."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

READY_S = 60.0
STOP_S = 30.0


@dataclass(frozen=True)
class Server:
    """A running `serve`: where it listens, and its process."""

    address: str
    process: psutil.Process


@contextmanager
def serving(log_path: Path, *flags: str) -> Iterator[Server]:
    """Runs `mini-infer serve` on a free port.

    Args:
        log_path: Where its stderr goes.
        flags: More of its flags.

    Raises:
        AssertionError: It is not ready in time, or does not end well on SIGTERM.
    """
    command = [sys.executable, "-m", "mini_infer.cli.main", "serve", "--port=0", *flags]
    with (
        log_path.open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        watchdog = threading.Timer(READY_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().strip()
            watchdog.cancel()
            assert " on " in ready, log_path.read_text()
            yield Server(ready.rpartition(" on ")[2], psutil.Process(process.pid))
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0, log_path.read_text()
        finally:
            watchdog.cancel()
            process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of the demo model, with its defaults; one for all tests."""
    with serving(tmp_path_factory.mktemp("server") / "stderr") as running:
        yield running.address
