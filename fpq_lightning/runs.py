"""Run directories, and the fingerprint that tells one run from another."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpq_lightning.storage.files import differences, write_json

PACKAGES = ("fpq-lightning", "torch", "lightning", "diffusers", "torchmetrics", "datasets")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: version(name) for name in PACKAGES}


def hash_weights(model: nn.Module) -> str:
    """A hash of the names, shapes and values of a model's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(parts: dict[str, Any]) -> str:
    """A short hash of everything that decides the quantized model."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


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
        self.path = Path(path)
        self.parts = json.loads(json.dumps(parts))
        self.fingerprint = fingerprint(self.parts)

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def quantized(self) -> Path:
        """Directory of the quantized pipeline."""
        return self.path / "quantized"

    @property
    def report(self) -> Path:
        """The machine-readable report, the last file that a run writes."""
        return self.path / "report.json"

    @property
    def _fingerprint_file(self) -> Path:
        return self.path / "fingerprint.json"

    def state(self) -> RunState:
        """What is there already.

        Raises:
            ValueError: if it belongs to another run.
        """
        if not self._fingerprint_file.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and no run of ours: choose another --run_dir")
            return RunState.NEW
        found = json.loads(self._fingerprint_file.read_text())["parts"]
        if changed := differences(found, self.parts):
            shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise ValueError(f"{self.path} holds another run ({shown}): choose another --run_dir or delete it")
        if self.report.is_file() and self.quantized.is_dir():
            return RunState.FINISHED
        return RunState.UNFINISHED if (self.checkpoints / "last.ckpt").is_file() else RunState.NEW

    def begin(self) -> None:
        """Makes the directory and writes whose it is."""
        try:
            write_json(self._fingerprint_file, {"fingerprint": self.fingerprint, "parts": self.parts})
        except OSError as error:
            raise ValueError(f"cannot write to {self.path} ({error.strerror}): choose another --run_dir") from error
