"""Calibration sets on disk, as `datasets` datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.utils.files import atomic_directory, write_json

_WEIGHT = "sample_weight"  # the column of the weights
_CONSTANTS = "constants.safetensors"
_BFLOAT16 = "_bfloat16"  # the entry of the constants that names the bfloat16 columns
MADE_FROM = "made_from.json"  # what decides a set, beside it


def save_calibration_set(
    calibration: CalibrationSet, directory: str | Path, made_from: Mapping[str, Any] | None = None
) -> None:
    """Writes a calibration set as a `datasets` dataset (Arrow) with a column for each input.

    Constants go into its description as JSON, tensors among them into a safetensors file beside it.

    Args:
        calibration: the set.
        directory: where to.
        made_from: what decides the set (`CalibrationKey.to_dict`), written to ``made_from.json``.
    """
    import datasets  # takes a second, and opening a packed model does not need it

    tensors = {k: v.contiguous() for k, v in calibration.constants.items() if isinstance(v, Tensor)}
    constants = {k: v for k, v in calibration.constants.items() if k not in tensors}
    columns = {**calibration.inputs, _WEIGHT: calibration.weights}
    constants[_BFLOAT16] = [name for name, value in columns.items() if value.dtype == torch.bfloat16]
    columns |= {name: columns[name].view(torch.int16) for name in constants[_BFLOAT16]}  # which numpy lacks
    features = datasets.Features({name: _feature(value) for name, value in columns.items()})
    info = datasets.DatasetInfo(description=json.dumps(constants), features=features)
    dataset = datasets.Dataset.from_dict({k: v.numpy() for k, v in columns.items()}, features=features, info=info)
    with atomic_directory(Path(directory)) as temporary:
        dataset.save_to_disk(str(temporary))
        save_file(tensors, temporary / _CONSTANTS)
        if made_from is not None:
            write_json(temporary / MADE_FROM, made_from)


def _feature(value: Tensor) -> Any:
    """The `datasets` type of a column."""
    import datasets

    dtype = str(value.dtype).removeprefix("torch.")
    shape: Sequence[int] = value.shape[1:]
    if not shape:
        return datasets.Value(dtype)
    if len(shape) == 1:
        return datasets.Sequence(datasets.Value(dtype), length=shape[0])
    return getattr(datasets, f"Array{len(shape)}D")(shape=tuple(shape), dtype=dtype)


def load_calibration_set(directory: str | Path) -> CalibrationSet:
    """Reads a set that `save_calibration_set` wrote.

    Raises:
        FileNotFoundError: if there is no dataset.
        ValueError: if it is empty or damaged.
    """
    import datasets

    if not Path(directory).is_dir():
        raise FileNotFoundError(f"there is no calibration set at {directory}")
    try:
        dataset = datasets.load_from_disk(str(directory))
        table = dataset.with_format("numpy")
        columns = {name: torch.from_numpy(np.array(table[name][:])) for name in dataset.column_names}
        constants = json.loads(dataset.info.description or "{}")
        columns |= {name: columns[name].short().view(torch.bfloat16) for name in constants.pop(_BFLOAT16, ())}
        constants |= load_file(Path(directory) / _CONSTANTS)
        weights = columns.pop(_WEIGHT)
    except Exception as error:  # a damaged Arrow file may raise anything
        raise ValueError(f"the calibration set at {directory} cannot be read ({error}): delete it") from error
    if not len(weights):
        raise ValueError(f"the calibration set at {directory} is empty: delete it to sample a new one")
    return CalibrationSet(columns, weights, constants)
