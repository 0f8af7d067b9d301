"""The folder of the sockets between the processes of one `mini-infer serve`.

It is locked while its server lives. A server that is killed leaves its folder behind, and the
kernel drops the lock: the next server removes what nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mini_infer.errors import ConfigError

PREFIX = "mini-infer-run-"
MAX_PARENT_BYTES = 107 - len(f"/{PREFIX}12345678/tokenizer")
"""A unix socket's path has 107 bytes: `sun_path` of Linux's <sys/un.h> less its final zero."""


@contextmanager
def run_folder(parents: Sequence[Path]) -> Iterator[Path]:
    """Makes a folder that only this user can enter, and removes it in the end.

    Folders of killed servers are removed as well.

    Args:
        parents: Where it may be; the first one that is usable is taken.

    Raises:
        ConfigError: Where none is usable.
    """
    for parent in parents:
        with suppress(OSError):
            for leftover in parent.glob(f"{PREFIX}*"):
                _remove_unless_held(leftover)
    folder, lock = _make(parents)
    try:
        yield folder
    finally:
        os.close(lock)
        _remove_unless_held(folder)


def _make(parents: Sequence[Path]) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    problems = []
    for parent in parents:
        if len(os.fsencode(parent)) > MAX_PARENT_BYTES:
            problems.append(f"{parent} has more than {MAX_PARENT_BYTES} bytes")
            continue
        try:
            return _make_locked(parent)
        except OSError as error:
            problems.append(f"{parent}: {error.strerror}")
    raise ConfigError(
        f"no folder can hold the sockets between the processes ({'; '.join(problems)}): set TMPDIR "
        "to a folder with a short path that this user can write"
    )


def _make_locked(parent: Path) -> tuple[Path, int]:
    # Hidden until it is locked: nobody takes it for a leftover.
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))  # mode 0700
    lock = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return hidden.rename(parent / hidden.name[1:]), lock
    except OSError:
        os.close(lock)
        hidden.rmdir()
        raise


def _remove_unless_held(folder: Path) -> None:
    """Removes a folder of this user with nothing but sockets, unless its server lives."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # of another user, or gone
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.getuid():
                for name in os.listdir(descriptor):
                    status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    if stat.S_ISSOCK(status.st_mode):
                        os.unlink(name, dir_fd=descriptor)
                os.rmdir(folder)
    finally:
        os.close(descriptor)
