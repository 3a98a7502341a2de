"""Whether a pipeline on disk is there as a whole, which is found out without reading weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fpq_lightning.storage.headers import read_header


def check_complete(directory: Path) -> None:
    """Finds out that files of a pipeline are missing or were cut off.

    Raises:
        ValueError: if so; it names the first one.
    """
    index = _read(directory / "model_index.json")
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry and isinstance(entry[0], str)]
    for part in (directory / name for name in parts if not name.startswith("_")):
        if not part.is_dir() or not any(part.iterdir()):
            raise ValueError(f"{part} is missing or empty")
        weights = list(part.glob("*.safetensors"))
        for file in part.glob("*.json"):
            found = _read(file)
            if file.name.endswith(".safetensors.index.json"):
                weights += [part / name for name in set(found["weight_map"].values())]
        if (part / "config.json").is_file() and not weights:
            raise ValueError(f"{part} has no weights")
        for file in weights:
            if not file.is_file():
                raise ValueError(f"{file} is missing")
            read_header(file)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())[:80]})") from error
