"""The file of a row of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpq_lightning.utils.digests import read_json_with_digest

VARIANTS = ("full_precision", "other_seeds", "nearest", "quantized")

_NUMBER = (int, float)
_NAMES = (str, list, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "variant": (str,),
    "group": (str,),
    "metrics": (dict,),
    "hardware": (str,),
    "versions": (dict,),
    "date": (str,),
    "settings": (dict,),
    "weights": _NAMES,
    "activations": _NAMES,
    "weight_bits": _NUMBER,
    "iterations": _NUMBER,
    "samples": _NUMBER,
    "sparsity": _NUMBER,
    "trajectory": (dict,),
}
_REQUIRED = ("name", "variant", "group", "metrics", "hardware", "versions", "date")
_ALONG_A_TRAJECTORY = ("timesteps", "output", "state")


def read_row(file: Path) -> dict[str, Any]:
    """Reads a row.

    Raises:
        ValueError: if it cannot be read, or is not what was written.
    """
    try:
        row = read_json_with_digest(file)
        _check(row)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"the row {file} cannot be read ({reason}): delete it") from error
    return row


def _check(row: dict[str, Any]) -> None:
    for name in _REQUIRED:
        row[name]
    for name, kinds in _KINDS.items():
        if name in row and not isinstance(row[name], kinds):
            raise ValueError(f"its {name} is {row[name]!r:.50}")
    if row["variant"] not in VARIANTS:
        raise ValueError(f"there is no variant {row['variant']}")
    row["metrics"]["n_images"], row["versions"]["torch"]
    for name, value in row["metrics"].items():
        if not isinstance(value, (*_NUMBER, type(None))):
            raise ValueError(f"its {name} is {value!r:.50}")
    if "trajectory" in row:
        lengths = {len([float(value) for value in row["trajectory"][name]]) for name in _ALONG_A_TRAJECTORY}
        if len(lengths) != 1:
            raise ValueError("its trajectory has errors for other timesteps")
