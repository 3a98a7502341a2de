"""Finished units on disk: each is written once, to a file of its own, and checkpoints name them by their digests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from fpq_lightning.utils.digests import digest_of
from fpq_lightning.utils.files import atomic_write
from fpq_lightning.utils.reading import check_file, check_inside


class UnitFiles:
    """``units/0001.pt`` and so on: the quantization of finished units, in their order.

    Args:
        directory: of the files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    def beside(cls, checkpoint: Path) -> UnitFiles:
        """The files that a checkpoint in this place names."""
        return cls(checkpoint.parent / "units")

    def or_beside(self, checkpoint: Path) -> UnitFiles:
        """The files beside a checkpoint that was copied from elsewhere with them, or else these."""
        other = self.beside(checkpoint)
        return other if other.directory.is_dir() and other.directory != self.directory else self

    def file(self, number: int) -> Path:
        """The file of a unit; they are counted from 0, files from 1."""
        return self.directory / f"{number + 1:04d}.pt"

    def write(self, number: int, contents: bytes) -> None:
        """Writes the file of a unit, whole or not at all.

        Args:
            number: of the unit.
            contents: of `contents_of`.
        """
        try:
            with atomic_write(self.file(number)) as temporary:
                temporary.write_bytes(contents)
        except OSError as error:
            error.filename = error.filename or str(self.file(number))
            raise

    def check(self, digests: list[str]) -> None:
        """Compares the files of the first units with their digests.

        Raises:
            ValueError: if one is missing or was changed.
        """
        for number in range(len(digests)):
            self._contents(number, digests)

    def read(self, number: int, digests: list[str]) -> Any:
        """What was written of a unit.

        Raises:
            ValueError: if its file is missing or was changed.
        """
        return torch.load(io.BytesIO(self._contents(number, digests)), map_location="cpu", weights_only=True)

    def _contents(self, number: int, digests: list[str]) -> bytes:
        file = self.file(number)
        try:
            check_file(file)
            check_inside(file, self.directory)
            contents = file.read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"the finished unit {file} cannot be read ({error})") from error
        if digest_of(contents) != digests[number]:
            raise ValueError(f"the finished unit {file} is not what was written: it is damaged")
        return contents


def contents_of(state: Any) -> bytes:
    """A tree of tensors as the bytes of a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
