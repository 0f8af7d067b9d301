"""Progress in bytes: a bar in a terminal, lines in a log elsewhere. Nothing goes to stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mini_infer.hub import Progress

LOG_INTERVAL_S = 5.0
"""Between lines of a log."""


@contextmanager
def byte_progress(what: str) -> Iterator[Progress]:
    """Shows how far something is, and how fast; nothing where it never begins.

    Args:
        what: What goes on, such as "Loading weights".
    """
    if sys.stderr.isatty():
        with _bar(what) as report:
            yield report
    else:
        yield _LogLines(what)


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn(escape(what)),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bars(*columns, console=Console(stderr=True))
    task = bar.add_task(what)

    def report(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done < total:
            bar.start()  # Once is enough; the bar is not there before anything was done.
        else:
            bar.stop()

    try:
        yield report
    finally:
        bar.stop()


class _LogLines:
    """A line now and then, and one when it is done."""

    def __init__(self, what: str) -> None:
        """Takes what goes on; the clock starts with the first bytes."""
        import structlog

        self._what = what
        self._log = structlog.get_logger()
        self._started_at = self._logged_at = 0.0
        self._num_bytes_before = 0

    def __call__(self, done: int, total: int) -> None:
        """Takes the bytes done and the bytes in all."""
        now = time.monotonic()
        if not self._started_at:
            self._started_at = self._logged_at = now
            self._num_bytes_before = done
        if done < total and now < self._logged_at + LOG_INTERVAL_S:
            return
        self._logged_at = now
        seconds = now - self._started_at
        rate = round((done - self._num_bytes_before) / seconds) if seconds else None
        self._log.info(self._what, done_bytes=done, total_bytes=total, bytes_per_s=rate)
