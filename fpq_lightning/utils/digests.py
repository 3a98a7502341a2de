"""Digests of contents: of files, of all files of a directory, of JSON, of tensors, and at the end of a file itself.

What was written without digests is read without them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fpq_lightning.utils.files import write_json
from fpq_lightning.utils.reading import check_file, read_json

DIGESTS = "digests.json"
"""Of a directory: bytes and digests of its files, by their paths in it."""

DIGEST = "digest"
"""The name of a digest among the values that it is of."""

HEAD = 2**20
"""Bytes of a file that are looked at whenever it is opened: all of a configuration, the header of weights."""

_README = "README.md"  # which is for people, who may change it
_BLOCK = 2**24
_SEAL = b"\nblake2b:"
_SEALED = len(_SEAL) + 32  # bytes of a seal


def digest_of(contents: bytes) -> str:
    """Tells contents apart."""
    return hashlib.blake2b(contents, digest_size=16).hexdigest()


def digest_of_file(file: Path, first: int | None = None) -> str:
    """`digest_of` what a file holds, of any size; a core reads about 1 GB a second.

    Args:
        file: the file.
        first: bytes to read; all by default.
    """
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as handle:
        if first is not None:
            found.update(handle.read(first))
        else:
            while block := handle.read(_BLOCK):
                found.update(block)
    return found.hexdigest()


# --- directories ---------------------------------------------------------------------------------------------------


def write_digests(directory: Path) -> None:
    """Writes the digests of all files of a directory, once they are there."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in (DIGESTS, _README))
    entries = {
        file.relative_to(directory).as_posix(): {
            "bytes": file.stat().st_size,
            "head": digest_of_file(file, HEAD),
            "blake2b": digest_of_file(file),
        }
        for file in files
    }
    write_json(directory / DIGESTS, entries)


def changed_files(directory: Path, whole: bool) -> dict[Path, str]:
    """The files of a directory that are not what was written, and what to say of each.

    Args:
        directory: that `write_digests` was called for; nothing is known of others.
        whole: whether all of each file is read, and not only its size and its first `HEAD` bytes.

    Raises:
        ValueError: if the digests cannot be read.
    """
    written = directory / DIGESTS
    if not os.path.lexists(written):
        return {}
    entries = read_json(written)
    try:
        known = {Path(name): (entry["bytes"], entry["head"], entry["blake2b"]) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{written} is damaged: it does not say the bytes and digests of files") from error
    if outside := next((name for name in known if name.is_absolute() or ".." in name.parts), None):
        raise ValueError(f"{written} is damaged: it names {outside}, which is no file of the directory")
    advice = f"write it again, or delete {written} if the change is meant"
    found = {}
    for name, (size, head, digest) in known.items():
        file = directory / name
        if not file.exists():
            found[file] = f"{file} is missing: {advice}"
            continue
        check_file(file)
        if file.stat().st_size != size:
            found[file] = f"{file} is damaged: it has {file.stat().st_size} bytes of {size}; {advice}"
        elif digest_of_file(file, HEAD) != head or (whole and digest_of_file(file) != digest):
            found[file] = f"{file} is damaged: it is not what was written; {advice}"
    return found


# --- JSON ----------------------------------------------------------------------------------------------------------


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a JSON file, and a digest of them among them."""
    return {**values, DIGEST: _digest_of_values(values)}


def read_json_with_digest(file: Path) -> dict[str, Any]:
    """Reads what `with_digest` gave from a file, without the digest.

    Raises:
        ValueError: if it cannot be read, or is not what was written.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} cannot be read (it holds a {type(found).__name__}): delete it")
    digest = found.pop(DIGEST, None)
    if digest is not None and digest != _digest_of_values(found):
        raise ValueError(f"{file} is not what was written: delete it, or its {DIGEST} if the change is meant")
    return found


def _digest_of_values(values: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(values))  # keys become text
    return digest_of(json.dumps(plain, sort_keys=True).encode())


# --- trees of tensors ----------------------------------------------------------------------------------------------


def digest_of_tree(tree: Any) -> str:
    """Tells trees of tensors and plain values apart."""
    found = hashlib.blake2b(digest_size=16)
    leaves, spec = tree_flatten(tree)
    found.update(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


# --- seals ---------------------------------------------------------------------------------------------------------


def seal(file: Path) -> None:
    """Appends a digest of a file's name and contents, which readers of images and sounds overlook at the end."""
    digest = _digest_for_seal(file, file.read_bytes())
    with file.open("ab") as handle:
        handle.write(_SEAL + digest.encode())


def check_seal(file: Path) -> bool:
    """Compares a file with its seal.

    Returns:
        Whether it has one.

    Raises:
        ValueError: if it is not what was sealed, or that of another name.
    """
    contents = file.read_bytes()
    written, end = contents[:-_SEALED], contents[-_SEALED:]
    if not end.startswith(_SEAL):
        return False
    if end != _SEAL + _digest_for_seal(file, written).encode():
        raise ValueError("it is not what was written")
    return True


def _digest_for_seal(file: Path, contents: bytes) -> str:
    return digest_of(file.name.encode() + b"\0" + contents)
