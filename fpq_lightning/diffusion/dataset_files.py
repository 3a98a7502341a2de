"""`datasets` datasets wherever they lie: files, directories, the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

_BUILDERS = {".parquet": "parquet", ".jsonl": "json"}


def open_dataset(source: str, missing: str) -> datasets.Dataset:
    """Opens a dataset.

    Args:
        source: a .parquet or .jsonl file, the directory of a dataset or of its files, or a name on the hub.
        missing: what to say if it is not there.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is a file of another kind.
    """
    import datasets  # takes a second, and most runs read no dataset

    path = Path(source).expanduser()
    if source.startswith(("/", "./", "../", "~")) and not path.exists():  # no name on the hub
        raise FileNotFoundError(missing)
    if path.is_file() and path.suffix.lower() not in _BUILDERS:
        raise ValueError(f"{source} is no dataset: give {' or '.join(_BUILDERS)}, or a directory")
    try:
        if (builder := _BUILDERS.get(path.suffix.lower())) is not None:
            return datasets.load_dataset(builder, data_files=str(path), split="train")
        if (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path) if path.exists() else source, split="train")
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"{missing}: {str(error).splitlines()[0]}") from error


def state_of(source: str) -> tuple[Any, ...]:
    """What changes when the files of a dataset do; nothing for one of the hub."""
    path = Path(source).expanduser()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.exists())
