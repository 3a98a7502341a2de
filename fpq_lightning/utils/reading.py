"""Reading files that something else may have changed: what is no file is refused, and never waited for."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}


def check_file(file: Path) -> None:
    """Refuses what is no regular file.

    Raises:
        ValueError: if it is not there or something else.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}: put the file in its place")


def check_inside(entry: Path, directory: Path) -> None:
    """Refuses what leads out of a directory by a symbolic link.

    Snapshots of the cache of the Hugging Face hub are links to the files beside them, in ``blobs/``.

    Raises:
        ValueError: if it does.
    """
    root, place = Path(os.path.realpath(directory)), Path(os.path.realpath(entry))
    blobs = [above.parent / "blobs" for above in root.parents if above.name == "snapshots"]
    if not any(place.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise ValueError(f"{entry} leads out of {directory}, to {place}: put the file in its place")


def check_tree(directory: Path) -> None:
    """Refuses a directory that holds, at any depth, what is no file, or what leads out of it.

    Raises:
        ValueError: if it does.
    """
    for entry in _entries(directory):
        check_inside(entry, directory)
        if not entry.is_dir():
            check_file(entry)


def refuse_special(directory: Path) -> None:
    """Refuses a directory that holds, at any depth, what a read would wait for; links may lead anywhere.

    Raises:
        ValueError: if it does.
    """
    for entry in _entries(directory):
        if entry.exists() and not entry.is_dir():
            check_file(entry)


def _entries(directory: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(directory):
        yield from (Path(root) / name for name in sorted([*folders, *files]))


def read_json(file: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: if it cannot be read.
    """
    check_file(file)
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} cannot be read ({reason})") from error
