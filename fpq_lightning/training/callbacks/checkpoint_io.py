"""Writing checkpoints where they belong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fpq_lightning.utils.digests import DIGEST, digest_of_tree


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes a file at its path and nowhere else; Lightning's own goes by way of the system's temporary directory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the file."""
        contents = io.BytesIO()  # a full disk is an OSError of ours, and not one of torch's writer
        torch.save({**checkpoint, DIGEST: digest_of_tree(checkpoint)}, contents)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(contents.getbuffer())
