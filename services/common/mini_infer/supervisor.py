"""Keeps child processes running: what `mini-infer serve` does beside starting them.

A child that ends is started again, sooner or later according to how often it ended lately; one
that keeps ending before all of them served once is given up. On SIGTERM, SIGINT or SIGHUP the
children are stopped one after the other, the last one started first, so that nobody loses a peer
that it still needs; a second signal kills them all at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from mini_infer.errors import ConfigError

EXIT_CONFIG_ERROR = 2
"""Exit code of a child that cannot start with its settings; starting it again cannot help."""
MAX_STARTS_BEFORE_READY = 3
"""A child that ends so often before all of them served once will not serve at all."""

MIN_BACK_OFF_S = 0.2
MAX_BACK_OFF_S = 10.0
HEALTHY_S = 30.0
"""A child that ran for so long is started again after the shortest back-off."""
POLL_INTERVAL_S = 0.05

_PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>

_log = structlog.get_logger()


class ChildRefused(Exception):
    """A child found at its first start that it cannot run with its settings, and said why."""


class ChildProcess:
    """One child: its process, and when it is started again."""

    def __init__(self, name: str, command: Sequence[str], stop_grace_s: float) -> None:
        """Describes a child; `keep_running` starts it.

        Args:
            name: For the log.
            command: Program and arguments. Its stdout goes to this process's stderr.
            stop_grace_s: How long it may take to end after SIGTERM before it is killed.
        """
        self.name = name
        self._command = list(command)
        self._stop_grace_s = stop_grace_s
        self._process: subprocess.Popen[bytes] | None = None

    async def keep_running(self, have_served: asyncio.Event) -> None:
        """Runs the child, again and again, until cancelled.

        Args:
            have_served: Set once all children served.

        Raises:
            ChildRefused: Where its first run ends with `EXIT_CONFIG_ERROR`.
            ConfigError: Where it ends `MAX_STARTS_BEFORE_READY` times before `have_served`.
        """
        back_off_s = MIN_BACK_OFF_S
        num_starts = 0
        while True:
            started_at = time.monotonic()
            # A session of its own: Ctrl-C in a terminal reaches the supervisor only, which then
            # stops the children in order.
            self._process = subprocess.Popen(
                self._command, stdout=sys.stderr, start_new_session=True
            )
            num_starts += 1
            code = await self._ended(self._process)
            if num_starts == 1 and code == EXIT_CONFIG_ERROR:
                raise ChildRefused(self.name)
            if num_starts >= MAX_STARTS_BEFORE_READY and not have_served.is_set():
                raise ConfigError(
                    f"the {self.name} ended {num_starts} times before it was ready, at last with "
                    f"exit code {code}: what it printed says why"
                )
            if time.monotonic() - started_at >= HEALTHY_S:
                back_off_s = MIN_BACK_OFF_S
            _log.warning("child_ended", child=self.name, exit_code=code, restart_in_s=back_off_s)
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, MAX_BACK_OFF_S)

    async def stop(self) -> None:
        """Ends the child's process: SIGTERM, then SIGKILL after the grace."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._ended(self._process), self._stop_grace_s)
        except asyncio.TimeoutError:
            _log.warning("child_killed", child=self.name, after_s=self._stop_grace_s)
            self._process.kill()
            await self._ended(self._process)

    def kill(self) -> None:
        """Ends the child's process at once."""
        if self._process is not None:
            self._process.kill()

    @staticmethod
    async def _ended(process: subprocess.Popen[bytes]) -> int:
        # Polled: asyncio's own child watchers differ between Python versions, and cancelling
        # one between fork and return loses the process.
        while (code := process.poll()) is None:
            await asyncio.sleep(POLL_INTERVAL_S)
        return code


class Supervisor:
    """Owns the order in which its children are started and stopped."""

    def __init__(self, children: Sequence[ChildProcess]) -> None:
        """Takes the children in the order of their start."""
        self._children = tuple(children)
        self._stop_requested = asyncio.Event()
        self._have_served = asyncio.Event()

    async def run(self, announce: Callable[[], Awaitable[None]]) -> None:
        """Runs the children until SIGTERM, SIGINT or SIGHUP.

        Args:
            announce: Awaited beside the children; waits until they serve, and says so.

        Raises:
            ChildRefused: Where a child cannot run with its settings; the others are stopped.
            ConfigError: Where a child keeps ending before all served; the others are stopped.
        """
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(signal_number, self._on_signal)
        keepers = [
            asyncio.create_task(child.keep_running(self._have_served)) for child in self._children
        ]
        announcement = asyncio.create_task(self._announce_once(announce))
        stop = asyncio.create_task(self._stop_requested.wait())
        tasks = [stop, announcement, *keepers]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        announcement.cancel()
        for child, keeper in reversed(list(zip(self._children, keepers, strict=True))):
            keeper.cancel()
            await child.stop()
        stop.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _announce_once(self, announce: Callable[[], Awaitable[None]]) -> None:
        await announce()
        self._have_served.set()
        await self._stop_requested.wait()

    def _on_signal(self) -> None:
        if self._stop_requested.is_set():
            for child in self._children:
                child.kill()
        self._stop_requested.set()


def end_with_parent(parent_pid: int, death_signal: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends, however that happens.

    Args:
        parent_pid: Process id of the parent as the parent knows it: where it has ended already,
            this process ends at once.
        death_signal: What this process gets.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent_pid:
        sys.exit(f"the process {parent_pid} that started this one has ended")
