"""Errors that nobody foresaw: their tracebacks are kept in files."""

from __future__ import annotations

import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile


class RunError(Exception):
    """Carries an error, its cause, out of a run.

    Args:
        directory: of the run, if it has begun.
    """

    def __init__(self, directory: Path | None) -> None:
        super().__init__(directory)
        self.directory = directory


class RehearsalError(ValueError):
    """The rehearsal of a run has failed for a reason that nobody foresaw: its cause."""


def save_traceback(error: BaseException, directory: Path | None = None) -> Path | None:
    """Writes the whole traceback of an error into a new file.

    Args:
        error: what was raised.
        directory: where to; None, and one that cannot be written to, mean the system's temporary directory.

    Returns:
        The file, None if none can be written.
    """
    places = [tempfile.gettempdir()] if directory is None else [str(directory), tempfile.gettempdir()]
    for place in places:
        with (
            suppress(OSError),
            NamedTemporaryFile("w", prefix="fpq-error-", suffix=".txt", dir=place, delete=False) as file,
        ):
            traceback.print_exception(error, file=file)
            return Path(file.name)
    return None
