"""Prompts: a list, one text, or a column of a file or dataset."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpq_lightning.diffusion.dataset_files import open_dataset, state_of

_COLUMNS = ("prompt", "caption", "text")

_MARKS = {  # at the beginning of a file; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def load_prompts(source: str | os.PathLike[str] | Sequence[str], column: str | None = None) -> list[str]:
    """Reads prompts.

    Args:
        source: the prompts themselves; or a file (.txt with one prompt a line, .csv, .tsv, .jsonl, .parquet), or the
            name or directory of a `datasets` dataset. Any other text with spaces is itself one prompt.
        column: column of the prompts; None takes ``prompt``, ``caption`` or ``text``, in upper or lower case.

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ValueError: if a file cannot be read, or there is no such column, no prompt, or an empty prompt.
    """
    named = str(source) if isinstance(source, (str, os.PathLike)) else "sampler.prompts"
    prompts = _read(os.fspath(source), column) if isinstance(source, (str, os.PathLike)) else source
    if not len(prompts):
        raise ValueError(f"{named} holds no prompts")
    for number, prompt in enumerate(prompts, start=1):
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(
                f"prompt {number} of {named} is no text but {type(prompt).__name__}: choose a column of text"
            )
        if prompt is None or not prompt.strip():
            raise ValueError(f"prompt {number} of {named} is empty: remove it")
    return list(prompts)


def _read(source: str, column: str | None) -> Sequence[Any]:
    if not source.strip():
        raise ValueError("sampler.prompts is an empty text: give prompts")
    path = Path(os.path.expanduser(source))
    kind = path.suffix.lower()
    if os.path.isfile(path):  # of `os`, which takes texts that are too long to be names
        if kind not in _FILES:
            raise ValueError(f"{source} is no file of prompts: give {', '.join(_FILES)}")
        return _read_file(source, kind, path.read_bytes(), column)
    if os.path.isdir(path):
        return _read_dataset(str(path), column, state_of(str(path)))
    if kind in _FILES:
        raise FileNotFoundError(f"there is no file of prompts {source}")
    if source.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"there are no prompts at {source}")
    return [source] if len(source.split()) > 1 else _read_dataset(source, column)


# --- files ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)  # by the contents, since the prompts of every batch are asked for, and files are edited
def _read_file(source: str, kind: str, contents: bytes, column: str | None) -> Sequence[Any]:
    try:
        return _FILES[kind](source, contents, column)
    except (csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error


def _decode(source: str, contents: bytes) -> str:
    """The text of a file: UTF-8 or UTF-16, or otherwise cp1252, which is said."""
    marked = next((encoding for mark, encoding in _MARKS.items() if contents.startswith(mark)), None)
    if marked is None and b"\0" in contents:
        high, low = contents[1::2].count(0), contents[::2].count(0)  # most letters have an upper half of zero
        marked = "utf-16-le" if high > low else "utf-16-be"
        if 4 * (high + low) < len(contents):
            raise ValueError(f"{source} holds zero bytes and is no UTF-16: save it as UTF-8")
    for encoding in [marked] if marked else ["utf-8", "cp1252"]:
        try:
            text = contents.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding == "cp1252":
            warnings.warn(f"{source} is not UTF-8: read as cp1252 (Western European)", stacklevel=2)
        return text.removeprefix("\ufeff")  # programs that write a mark before one
    raise ValueError(f"{source} is no text in UTF-8, UTF-16 or cp1252: save it as UTF-8")


def _lines(source: str, contents: bytes) -> list[str]:
    """The lines that are not empty; nothing but newlines ends one."""
    return [line.strip() for line in io.StringIO(_decode(source, contents), newline=None) if line.strip()]


def _from_text(source: str, contents: bytes, column: str | None) -> list[str]:
    return _lines(source, contents)


def _from_table(delimiter: str) -> Callable[[str, bytes, str | None], list[Any]]:
    def read(source: str, contents: bytes, column: str | None) -> list[Any]:
        reader = csv.DictReader(io.StringIO(_decode(source, contents), newline=""), delimiter=delimiter)
        chosen = _choose(source, reader.fieldnames or [], column)
        return [row[chosen] for row in reader]

    return read


def _from_json_lines(source: str, contents: bytes, column: str | None) -> list[Any]:
    rows = [json.loads(line) for line in _lines(source, contents)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {source} is no JSON object, such as {{'prompt': 'a cat'}}")
    chosen = _choose(source, list(dict.fromkeys(name for row in rows for name in row)), column) if rows else ""
    return [row.get(chosen) for row in rows]


def _from_parquet(source: str, contents: bytes, column: str | None) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(io.BytesIO(contents))
        chosen = _choose(source, table.schema_arrow.names, column)
        return list(table.read([chosen]).column(chosen).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error


_FILES: Mapping[str, Callable[[str, bytes, str | None], list[Any]]] = {
    ".txt": _from_text,
    ".csv": _from_table(","),
    ".tsv": _from_table("\t"),
    ".jsonl": _from_json_lines,
    ".parquet": _from_parquet,
}


# --- datasets ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _read_dataset(source: str, column: str | None, state: tuple[Any, ...] = ()) -> list[Any]:
    """Reads a dataset of the hub, or of a directory, whose files are in `state`."""
    dataset = open_dataset(source, f"there are no prompts at {source} (a prompt of one word is given as a list)")
    return list(dataset[_choose(source, dataset.column_names, column)])


def _choose(source: str, columns: Sequence[str], column: str | None) -> str:
    if column is not None:
        if column not in columns:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(columns)}")
        return column
    found = next((name for wanted in _COLUMNS for name in columns if name.lower() == wanted), None)
    if found is None:
        raise ValueError(
            f"{source} has none of the columns {', '.join(_COLUMNS)}, but {', '.join(columns)}: name one with "
            "sampler.prompt_column"
        )
    return found
