"""Calibration sets on disk, as `datasets` datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from fpq_lightning.calibration.axes import Axis
from fpq_lightning.calibration.calibration_set import CalibrationSet, non_finite
from fpq_lightning.utils.digests import changed_files, write_digests
from fpq_lightning.utils.files import atomic_directory, write_json
from fpq_lightning.utils.reading import check_tree

_WEIGHT = "sample_weight"  # the column of the weights
_TENSORS = "tensors.safetensors"
_DATASET = "dataset_info.json"  # of `datasets`
_TENSOR = "tensor"  # the key of what stands for a tensor in JSON
_MOST_DIMENSIONS = 6  # of a column
MADE_FROM = "made_from.json"  # what decides a set, beside it


def save_calibration_sets(
    sets: Mapping[str, CalibrationSet], directory: str | Path, made_from: Mapping[str, Any] | None = None
) -> None:
    """Writes the set of each denoiser into a directory of its name, all or none.

    Args:
        sets: by name; that of an only denoiser, whose name is empty, is `directory` itself.
        directory: where to.
        made_from: what decides the sets (`CalibrationKey.to_dict`), written to ``made_from.json``.
    """
    with atomic_directory(Path(directory), is_calibration_set) as temporary:
        for name, calibration in sets.items():
            _save(calibration, temporary / name)
        if made_from is not None:
            write_json(temporary / MADE_FROM, made_from)


def is_calibration_set(directory: Path) -> bool:
    """Whether a directory holds a set that was written here, or such sets in directories of their names."""
    tensors = [file for place in ("", "*/") for file in directory.glob(place + _TENSORS)]
    return (directory / MADE_FROM).is_file() or any(file.with_name(_DATASET).is_file() for file in tensors)


def save_calibration_set(calibration: CalibrationSet, directory: str | Path) -> None:
    """Writes a set that `load_calibration_set` reads."""
    save_calibration_sets({"": calibration}, directory)


def _save(calibration: CalibrationSet, directory: Path) -> None:
    """Writes a set as a `datasets` dataset (Arrow) with a column for each input of one shape.

    The rest goes into its description as JSON, tensors among it into a safetensors file beside it.
    """
    import datasets  # takes a second, and opening a packed model does not need it

    columns = {k: v for k, v in calibration.inputs.items() if _fits_column(k, v)} | {_WEIGHT: calibration.weights}
    halves = [name for name, value in columns.items() if value.dtype == torch.bfloat16]
    columns |= {name: columns[name].view(torch.int16) for name in halves}  # bfloat16 is not known to numpy
    paths, spec = tree_flatten(calibration.structure)
    tensors: dict[str, Tensor] = {}
    description = {
        "bfloat16": halves,
        "constants": _without_tensors(calibration.constants, tensors),
        "others": _without_tensors({k: v for k, v in calibration.inputs.items() if not _fits_column(k, v)}, tensors),
        "axes": {path: asdict(axis) for path, axis in calibration.axes.items()},
        "structure": [paths, treespec_dumps(spec)],
    }
    features = datasets.Features({name: _feature(value) for name, value in columns.items()})
    info = datasets.DatasetInfo(description=json.dumps(description), features=features)
    dataset = datasets.Dataset.from_dict({k: v.numpy() for k, v in columns.items()}, features=features, info=info)
    dataset.save_to_disk(str(directory))
    save_file(tensors, directory / _TENSORS)
    write_digests(directory)


def _fits_column(path: str, value: Any) -> bool:
    """Whether an input is kept in a column of its own: Arrow knows neither complex nor eight-bit floating types."""
    if not isinstance(value, Tensor) or path == _WEIGHT:
        return False
    known = not value.is_complex() and not (value.is_floating_point() and value.itemsize == 1)
    return known and value.ndim <= _MOST_DIMENSIONS


def _without_tensors(values: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Values with a name for each tensor, which goes into `tensors`; containers by their structure."""
    found = {}
    for path, value in values.items():
        leaves, spec = tree_flatten(value)
        named = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                name = str(len(tensors))
                tensors[name] = leaf.clone(memory_format=torch.contiguous_format)  # samples may share one
                leaf = {_TENSOR: name}
            named.append(leaf)
        found[path] = [named, treespec_dumps(spec)]
    return found


def _with_tensors(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_without_tensors`."""
    found = {}
    for path, (named, spec) in values.items():
        leaves = [tensors[leaf[_TENSOR]] if isinstance(leaf, dict) else leaf for leaf in named]
        found[path] = tree_unflatten(leaves, treespec_loads(spec))
    return found


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


def load_calibration_sets(directory: str | Path, names: Sequence[str]) -> dict[str, CalibrationSet]:
    """Reads those of the sets that `save_calibration_sets` wrote.

    Raises:
        FileNotFoundError: if there is none of them.
        ValueError: if one is empty or damaged.
    """
    there = [name for name in names if (Path(directory) / name).is_dir()]
    if not there:
        raise FileNotFoundError(
            f"there is no calibration set of {', '.join(names)} at {directory}: delete it to sample a new one"
        )
    return {name: load_calibration_set(Path(directory) / name) for name in there}


def load_calibration_set(directory: str | Path) -> CalibrationSet:
    """Reads the set of one denoiser.

    Raises:
        FileNotFoundError: if there is no dataset.
        ValueError: if it is empty or damaged.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"there is no calibration set at {directory}")
    try:
        check_tree(Path(directory))
        if changed := changed_files(Path(directory), whole=True):
            raise ValueError(next(iter(changed.values())))
        found = _load(Path(directory))
        _check(found)
    except Exception as error:  # a damaged Arrow file may raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the calibration set at {directory} cannot be read ({reason}): delete it") from error
    return found


def _load(directory: Path) -> CalibrationSet:
    import datasets

    dataset = datasets.load_from_disk(str(directory))
    dataset.data.validate(full=True)  # reading lengths that are not there would end the process
    table = dataset.with_format("numpy")
    columns = {name: torch.from_numpy(np.array(table[name][:])) for name in dataset.column_names}
    weights = columns.pop(_WEIGHT)
    if not len(weights):
        raise ValueError("it is empty")
    description = json.loads(dataset.info.description)
    columns |= {name: columns[name].short().view(torch.bfloat16) for name in description["bfloat16"]}
    tensors = load_file(directory / _TENSORS)
    others, constants = (_with_tensors(description[name], tensors) for name in ("others", "constants"))
    axes = {path: Axis(**axis) for path, axis in description["axes"].items()}
    paths, spec = description["structure"]
    return CalibrationSet({**columns, **others}, weights, constants, axes, tree_unflatten(paths, treespec_loads(spec)))


def _check(calibration: CalibrationSet) -> None:
    """Finds what cannot be, or cannot be calibrated on.

    Raises:
        ValueError: if there is any.
    """
    weights = calibration.weights
    if weights.dtype != torch.float32 or not bool(((weights > 0) & weights.isfinite()).all()):
        raise ValueError("a sample's weight is no positive number")
    if broken := non_finite({**calibration.inputs, **calibration.constants}):
        raise ValueError(f"{broken} holds NaN or Inf")
    if uneven := next((path for path, value in calibration.inputs.items() if len(value) != len(weights)), None):
        raise ValueError(f"{uneven} holds {len(calibration.inputs[uneven])} samples of {len(weights)}")
    named = {*calibration.inputs, *calibration.constants}
    if lost := named.symmetric_difference(tree_flatten(calibration.structure)[0]):
        raise ValueError(f"{min(lost)} is not both among the arguments and in their structure")
