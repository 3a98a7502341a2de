"""Names of temporary files and directories, which are locked while in use: those that killed processes left can go."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".fpq-"
"""Begins the names of temporary files and directories."""


def lock(entry: Path) -> int:
    """Locks a temporary file or directory for this process, until what is returned is closed by `os.close`.

    Raises:
        BlockingIOError: if it is in use.
    """
    handle = os.open(entry, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass  # a file system without locks
    return handle


@contextmanager
def in_use(entry: Path) -> Iterator[None]:
    """Keeps a temporary file or directory within the block."""
    handle = lock(entry)
    try:
        yield
    finally:
        os.close(handle)


def remove_leftovers(place: Path, prefix: str = PREFIX) -> None:
    """Removes what processes that were killed have left in a directory; what is in use stays.

    Args:
        place: the directory, which need not be there.
        prefix: of the names of what is temporary.
    """
    for entry in place.glob(f"{prefix}*"):
        with suppress(OSError):  # in use, or gone by now
            handle = os.open(entry, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
            finally:
                os.close(handle)
