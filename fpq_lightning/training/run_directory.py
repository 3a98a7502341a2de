"""Run directories, and the fingerprint that tells one run from another."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from fpq_lightning.calibration.disk import is_calibration_set
from fpq_lightning.calibration.store import STORE
from fpq_lightning.storage.complete import check_complete
from fpq_lightning.storage.pipeline import is_written
from fpq_lightning.training.unit_files import UnitFiles
from fpq_lightning.utils.digests import DIGEST, digest_of_tree
from fpq_lightning.utils.files import differences, shorten, write_json
from fpq_lightning.utils.places import check_ours, check_writable
from fpq_lightning.utils.provenance import fingerprint
from fpq_lightning.utils.reading import check_file, check_inside, read_json
from fpq_lightning.utils.temporary import in_use, remove_leftovers

_REHEARSAL = ".rehearsal-"  # begins the names of directories of it


class _UnreadableError(ValueError):
    """A checkpoint is damaged."""


class RunState(Enum):
    """What a run directory holds."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


class RunDirectory:
    """``runs/<name>/``: checkpoints, the quantized model, reports.

    Args:
        path: of the directory.
        parts: everything that decides the quantized model, plain types.
    """

    def __init__(self, path: str | Path, parts: dict[str, Any]) -> None:
        self.path = Path(path).expanduser()
        self.parts = json.loads(json.dumps(parts))
        self.fingerprint = fingerprint(self.parts)

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def checkpoint_files(self) -> tuple[Path, Path]:
        """The checkpoint, and the one before it."""
        return self.checkpoints / "last.ckpt", self.checkpoints / "previous.ckpt"

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that can be read, None if there is none at all.

        Raises:
            ValueError: if none can be read, or it is of another run.
        """
        files = [file for file in self.checkpoint_files if os.path.lexists(file)]
        for file in files:
            try:
                self.check_checkpoint(file)
            except _UnreadableError as error:
                warnings.warn(f"{error}: trying the one before it", stacklevel=2)
            else:
                return file
        if files:
            raise ValueError(f"no checkpoint in {self.checkpoints} can be read: delete it to start from the beginning")
        return None

    def check_checkpoint(self, file: Path) -> None:
        """Reads a checkpoint once, so that a damaged one is found before anything else is done.

        Raises:
            ValueError: if it cannot be read or is of another run.
        """
        try:
            check_file(file)
            if file in self.checkpoint_files:
                check_inside(file, self.checkpoints)
            with zipfile.ZipFile(file) as archive:  # torch.load compares no checksums
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} in it is damaged")
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            made_from = checkpoint["fpq"]["made_from"]
        except Exception as error:  # whatever a damaged file raises
            reason = " ".join(str(error).split())[:200]
            raise _UnreadableError(f"the checkpoint {file} cannot be read ({reason})") from error
        if changed := differences(made_from, self.parts):
            raise ValueError(f"the checkpoint {file} is of another run ({shorten(changed)}): choose another --run_dir")
        if not {"finished_units", DIGEST} <= checkpoint.keys():
            raise ValueError(f"the checkpoint {file} is of an older version: delete {self.path} to begin again")
        if checkpoint.pop(DIGEST) != digest_of_tree(checkpoint):
            raise _UnreadableError(f"the checkpoint {file} is not what was written: it is damaged")
        try:
            UnitFiles.beside(self.checkpoint_files[0]).or_beside(file).check(checkpoint["finished_units"])
        except ValueError as error:
            raise _UnreadableError(f"the checkpoint {file} cannot be gone on with ({error})") from error

    @property
    def quantized(self) -> Path:
        """Directory of the quantized pipeline."""
        return self.path / "quantized"

    @property
    def images(self) -> Path:
        """Directory of sampled images, one below it for each variant."""
        return self.path / "images"

    @property
    def activations(self) -> Path:
        """Directory of captured activations that fit nowhere else."""
        return self.path / "activations"

    @property
    def report(self) -> Path:
        """The machine-readable report, the last file that a run writes."""
        return self.path / "report.json"

    @property
    def _fingerprint_file(self) -> Path:
        return self.path / "fingerprint.json"

    @property
    def is_begun(self) -> bool:
        """Whether the directory is there and that of a run."""
        return self._parts_there() is not None

    def _parts_there(self) -> dict[str, Any] | None:
        """What the run was made from that is there."""
        try:
            return json.loads(self._fingerprint_file.read_text())["parts"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def state(self) -> RunState:
        """What is there already.

        Raises:
            ValueError: if it belongs to another run, or is not ours.
        """
        if not os.path.lexists(self._fingerprint_file):
            # What is hidden may be another process's temporary file.
            if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and no run of ours: choose another --run_dir")
            check_writable(self.path, "--run_dir")
            return RunState.NEW
        found = self._written_parts()
        leftovers = [*self.checkpoint_files, self.path / "calibration", self.quantized, self.report]
        if changed := differences(found, self.parts):
            if not any(entry.exists() for entry in leftovers):
                return RunState.NEW  # of a run that never got anywhere
            raise ValueError(
                f"{self.path} holds another run ({shorten(changed)}): choose another --run_dir or delete it"
            )
        check_ours(self.quantized, is_written, option="--run_dir")
        check_ours(self.path / "calibration", is_calibration_set, option="--run_dir")
        if self.report.is_file() and self.quantized.is_dir():
            return RunState.FINISHED
        return RunState.UNFINISHED if any(map(os.path.lexists, self.checkpoint_files)) else RunState.NEW

    def _written_parts(self) -> dict[str, Any]:
        """What ``fingerprint.json`` says."""
        with suppress(ValueError, OSError):
            written = read_json(self._fingerprint_file)
            parts = written.get("parts") if isinstance(written, dict) else None
            if isinstance(parts, dict) and written.get("fingerprint") == fingerprint(parts):
                return parts
        raise ValueError(
            f"{self._fingerprint_file} is damaged, or that of something else and {self.path} no run of ours: choose "
            "another --run_dir or delete it"
        )

    def damage(self) -> str | None:
        """What of the result of a finished run is missing or was cut off; None if nothing is."""
        try:
            check_complete(self.quantized)
        except ValueError as error:
            return str(error)
        try:
            json.loads(self.report.read_text())["schema_version"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.report} cannot be read"
        return None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Makes the directory, writes whose it is, and keeps other commands out meanwhile.

        Raises:
            ValueError: if it cannot be written to, or another process works in it.
        """
        with self._locked():
            self._clean()
            self.state()
            try:
                write_json(self._fingerprint_file, {"fingerprint": self.fingerprint, "parts": self.parts})
            except OSError as error:
                raise self._unwritable(error) from error
            yield
            self._clean()

    @contextmanager
    def rehearsing(self) -> Iterator[RunDirectory]:
        """A directory within this one for the rehearsal of the run; of both nothing is left that was not there before.

        Raises:
            ValueError: if it cannot be written to, or another process works in it.
        """
        with self._locked():
            self._clean()
            made = Path(tempfile.mkdtemp(prefix=_REHEARSAL, dir=self.path))
            try:
                with in_use(made):
                    yield RunDirectory(made, self.parts)
            finally:
                shutil.rmtree(made, ignore_errors=True)
                with suppress(OSError):  # it holds something else
                    self.path.rmdir()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Makes the directory, and keeps other commands out meanwhile."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._take(lock)
            yield
        finally:
            os.close(lock)

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(f"cannot write to {self.path} ({error.strerror}): choose another --run_dir")

    def _clean(self) -> None:
        """Removes what processes that were killed have left half-written."""
        for place in (self.path, self.checkpoints / "units", *self.images.glob("*")):
            remove_leftovers(place)
        remove_leftovers(self.path, _REHEARSAL)
        remove_leftovers(self.activations, STORE)
        with suppress(OSError):  # there is none, or it holds something else
            self.activations.rmdir()

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process works in {self.path}: wait for it or choose another --run_dir"
            ) from error
        except OSError:
            pass  # a file system without locks
