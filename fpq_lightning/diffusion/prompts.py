"""Prompts: a list, or a column of a file or dataset."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

_COLUMNS = ("prompt", "caption", "text")


def load_prompts(source: str | Sequence[str], column: str | None = None) -> list[str]:
    """Reads prompts.

    Args:
        source: the prompts themselves; or a file (.txt with one prompt a line, .csv, .tsv, .parquet), or the name or
            directory of a `datasets` dataset.
        column: column of the prompts; None takes ``prompt``, ``caption`` or ``text``, in upper or lower case.

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ValueError: if there is no such column, no prompt, or an empty prompt.
    """
    named = source if isinstance(source, str) else "sampler.prompts"
    prompts = _read(source, column) if isinstance(source, str) else list(source)
    if not prompts:
        raise ValueError(f"{named} holds no prompts")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt {number} of {named} is empty: remove it")
    return prompts


@lru_cache
def _read(source: str, column: str | None) -> list[str]:
    path = Path(source)
    if path.suffix in (".txt", ".csv", ".tsv") and not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts {source}")
    if path.suffix == ".txt":
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if path.suffix in (".csv", ".tsv"):
        with path.open(newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",")
            chosen = _choose(source, reader.fieldnames or [], column)
            return [row[chosen] for row in reader]
    import datasets  # takes a second, and most runs read no dataset

    try:
        if path.suffix == ".parquet":
            dataset = datasets.load_dataset("parquet", data_files=source, split="train")
        elif (path / "dataset_info.json").is_file():
            dataset = datasets.load_from_disk(source)
        else:
            dataset = datasets.load_dataset(source, split="train")
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"there are no prompts at {source}: {str(error).splitlines()[0]}") from error
    return list(dataset[_choose(source, dataset.column_names, column)])


def _choose(source: str, columns: Sequence[str], column: str | None) -> str:
    if column is not None:
        if column not in columns:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(columns)}")
        return column
    found = next((name for wanted in _COLUMNS for name in columns if name.lower() == wanted), None)
    if found is None:
        raise ValueError(f"{source} has none of the columns {', '.join(_COLUMNS)}: name one with sampler.prompt_column")
    return found
