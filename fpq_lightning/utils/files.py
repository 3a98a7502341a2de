"""Files that are written whole or not at all, and small tools for what they hold."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from fpq_lightning.utils.places import check_ours
from fpq_lightning.utils.temporary import PREFIX, in_use, remove_leftovers


@contextmanager
def atomic_directory(target: Path, is_ours: Callable[[Path], bool] = Path.is_dir) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place once the block ends without an error.

    Args:
        target: the directory; what a link points to, if it is one.
        is_ours: recognises one that may be replaced; an empty one may always be.

    Raises:
        ValueError: if there is something else.
    """
    target = Path(os.path.realpath(target))
    check_ours(target, is_ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{target.name}-", dir=target.parent))
    try:
        with in_use(temporary):
            yield temporary
            for entry in [temporary, *temporary.rglob("*")]:  # temporary names come with private modes
                entry.chmod(0o755 if entry.is_dir() else 0o644)
            old = temporary.with_name(f"{temporary.name}-old")
            if target.exists():
                os.replace(target, old)
            try:
                os.replace(temporary, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def paths_to_text(options: Any) -> None:
    """Makes paths among the fields of a dataclass text, as they are written to files and compared."""
    for field in fields(options):
        if isinstance(value := getattr(options, field.name), os.PathLike):
            setattr(options, field.name, os.fspath(value))


def sync_file(file: Path) -> None:
    """Waits until a file is on the disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A temporary file beside `target`, with its suffix, that takes its place once the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{PREFIX}{target.stem}-{os.getpid()}-{threading.get_ident()}{target.suffix}")
    try:
        temporary.touch()
        with in_use(temporary):
            yield temporary
            sync_file(temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: Path, value: Any) -> None:
    """Writes strict JSON (no NaN or Infinity)."""
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested values differ, as ``path: a -> b``."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b})
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [f"{path}: {a} -> {b}"]


def shorten(differences: list[str]) -> str:
    """The first three differences in one line."""
    more = len(differences) - 3
    return "; ".join(differences[:3]) + (f"; and {more} more" if more > 0 else "")


def weights_size(directory: Path) -> int:
    """Bytes of the weight files in a directory of a model."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
