"""``fpq export``: a quantized pipeline in another form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.formats.scales import FLOAT32, ScaleFormat, parse_scale_format
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.storage.dequantized import FILE
from fpq_lightning.storage.exports.registry import EXPORTS
from fpq_lightning.storage.pipeline import (
    described_denoisers,
    is_quantized,
    load_quantized,
    read_descriptions,
    save_quantized,
)
from fpq_lightning.utils.places import check_writable

_OF_FILES = ("quant_method", "format_version", "layers", "attention")
"""Entries of a description that say how the files are written."""


def export(directory: str | Path, output: str | Path, form: str) -> None:
    """Writes a quantized pipeline in another form.

    Args:
        directory: of the pipeline, packed or dequantized.
        output: a new directory.
        form: the name of an export.

    Raises:
        FileNotFoundError: if there is no quantized pipeline.
        ValueError: if there is no such export, the files are damaged, no layer fits, or `output` is not empty.
    """
    needs_codes = EXPORTS[form].needs_codes
    target = Path(os.path.realpath(Path(output).expanduser()))
    if not is_quantized(directory):
        raise FileNotFoundError(f"there is no quantized pipeline at {directory}: give the quantized/ of a run")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already: choose another --output")
    check_writable(target, "--output")
    for description in read_descriptions(directory).values():
        if needs_codes and "quant_method" not in description:
            _grids(description)  # its errors say what is wrong, and a digest only that something is
    pipeline = load_quantized(directory, verify=True)
    of_each: dict[str, dict[str, Any]] = {}
    for name, denoiser, description in described_denoisers(pipeline, directory):
        if needs_codes and "quant_method" not in description:
            find_codes(denoiser, description)
        of_each[name] = {k: v for k, v in description.items() if k not in _OF_FILES}
    first = next(iter(of_each.values()))
    shared = {k: v for k, v in first.items() if all(k in own and own[k] == v for own in of_each.values())}
    rest = {name: {k: v for k, v in own.items() if k not in shared} for name, own in of_each.items()}
    save_quantized(pipeline, target, shared, form, rest)


@torch.no_grad()
def find_codes(denoiser: nn.Module, description: Mapping[str, Any]) -> None:
    """Finds the codes and scales from which the weights of a dequantized model were decoded.

    Args:
        denoiser: of a pipeline in the dequantized form; its layers get codes and scales.
        description: the contents of its ``quantization.json``.

    Raises:
        ValueError: if the description lacks the granularity, or a weight does not lie on its grid.
    """
    granularity, formats = _grids(description)
    for name, chosen in formats.items():
        if not chosen:
            continue
        layer = cast(QuantizedLayer, denoiser.get_submodule(name))
        layer.granularity = granularity.fitting(layer.weight_parts())
        scale_format = parse_scale_format(layer.granularity.scale_format)
        quantization = cast(LayerQuantization, layer.variants["quantized"])
        quantizers, codes = [], []
        for rows, fmt in zip(layer.weight_rows(), chosen, strict=True):
            scale = find_scale(rows, fmt, scale_format)
            if scale is None:
                raise ValueError(f"{name}: its weight is not one of {fmt} without offset; export it from packed files")
            quantizers.append(Quantizer(fmt, scale, scale_format=scale_format))
            codes.append(quantizers[-1].encode(rows))
        found = LayerQuantization(quantizers, quantization.inputs)
        found.codes = codes
        layer.variants["quantized"] = found


def _grids(description: Mapping[str, Any]) -> tuple[Granularity, dict[str, list[Format]]]:
    """The granularity of the weights, and the formats of each layer, as a description says."""
    try:
        recipe = description["recipe"]["weights"]
        scale_name = recipe.get("scale_format", FLOAT32)
        granularity = Granularity(recipe["granularity"], recipe["group_size"], scale_name)
        return granularity, {
            name: [parse_format(fmt) for fmt in entry["weights"]] for name, entry in description["layers"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{FILE} does not say the granularity and formats of the weights ({type(error).__name__}: {error}): export "
            "them from packed files"
        ) from error


def find_scale(rows: Tensor, fmt: Format, scale_format: ScaleFormat | None = None) -> Tensor | None:
    """Finds the scales with which rows of values were decoded.

    The largest magnitude of a row is a value of the format times the scale, rounded to float32. So the scale is that
    magnitude over one of the values, or a float32 number next to it.

    Args:
        rows: float32 `[n_rows, n]`, each row values of the format times one scale.
        fmt: the format.
        scale_format: of the scales, None for float32.

    Returns:
        `[n_rows, 1]` with which every value decodes to its bits; None if there is none.
    """
    scale = torch.ones(len(rows), 1, device=rows.device)
    holds = (rows != 0).any(1)
    left = holds.clone()  # a row of zeros has any scale
    # Up to a power of two, the factor that all scales of a tensor may share.
    fractions = None if scale_format is None else torch.frexp(scale_format.values.to(rows.device))[0].unique()
    for value in fmt.grid.abs().unique().flip(0)[:-1]:
        for steps in (0, 1, -1, 2, -2):
            index = left.nonzero()[:, 0]
            some = rows[index]
            trial = some.abs().amax(1, keepdim=True) / value
            trial = (trial.view(torch.int32) + steps).view(torch.float32)
            quantizer = Quantizer(fmt, trial)
            fits = (quantizer.decode(quantizer.encode(some)).view(torch.int32) == some.view(torch.int32)).all(1)
            if fractions is not None:
                fits &= torch.isin(torch.frexp(trial[:, 0])[0], fractions)
            scale[index[fits]] = trial[fits]
            left[index[fits]] = False
            if not left.any():
                if fractions is not None and holds.any():
                    scale[~holds] = scale[holds].amin()
                return scale
    return None
