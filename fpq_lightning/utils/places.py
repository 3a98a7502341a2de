"""Places that files are written to: looked at before a run, and never taken from somebody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def check_writable(directory: str | Path, option: str) -> None:
    """Finds out that no files can be written to a directory, which need not be there yet.

    Args:
        directory: where files are to go.
        option: that gave it.

    Raises:
        ValueError: if so.
    """
    place = Path(os.path.realpath(directory))
    nearest = next(parent for parent in (place, *place.parents) if os.path.exists(parent))
    if not nearest.is_dir():
        raise ValueError(f"{option} {directory}: {nearest} is a file: choose another directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {directory}: {nearest} cannot be written to: choose another directory")


def check_ours(
    directory: Path, is_ours: Callable[[Path], bool], replaced: Iterable[str] = ("*",), option: str = "place"
) -> None:
    """Finds out that writing a directory would replace what this package has not written.

    Args:
        directory: that is to be written.
        is_ours: recognises one that this package has written.
        replaced: glob patterns of what is going to be replaced in it.
        option: that gave it.

    Raises:
        ValueError: if it would.
    """
    if not os.path.lexists(directory):
        return
    found = directory
    if directory.is_dir():
        if is_ours(directory):
            return
        kept = next((entry for pattern in replaced for entry in sorted(directory.glob(pattern))), None)
        if kept is None:
            return
        found = kept
    raise ValueError(
        f"{found} was not written by fpq_lightning and would be replaced: move it, or choose another {option}"
    )
