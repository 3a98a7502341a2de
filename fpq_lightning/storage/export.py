"""``fpq export``: a quantized pipeline in another form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.formats.numbers import Format, parse_format
from fpq_lightning.formats.scales import FLOAT32, ScaleFormat, parse_scale_format
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.storage.dequantized import FILE
from fpq_lightning.storage.pipeline import Form, is_quantized, load_quantized, read_description, save_quantized


def export(directory: str | Path, output: str | Path, form: str) -> None:
    """Writes a quantized pipeline in another form.

    Args:
        directory: of the pipeline, packed or dequantized.
        output: a new directory.
        form: ``fpq``, ``dequantized``, ``modelopt``, ``nvfp4`` or ``mxfp4``.

    Raises:
        FileNotFoundError: if there is no quantized pipeline.
        ValueError: if its files are damaged, no layer fits the form, or `output` holds something.
    """
    if form not in get_args(Form):
        raise ValueError(f"there is no form {form!r}: use {' or '.join(get_args(Form))}")
    target = Path(os.path.realpath(Path(output).expanduser()))
    if not is_quantized(directory):
        raise FileNotFoundError(f"there is no quantized pipeline at {directory}: give the quantized/ of a run")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already: choose another --output")
    description = read_description(directory)
    pipeline = load_quantized(directory)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if form != "dequantized" and "quant_method" not in description:
        find_codes(denoiser, description)
    details = {
        k: v for k, v in description.items() if k not in ("quant_method", "format_version", "layers", "attention")
    }
    save_quantized(pipeline, target, details, cast(Form, form))


@torch.no_grad()
def find_codes(denoiser: nn.Module, description: Mapping[str, Any]) -> None:
    """Gives layers whose weights are on the grid already the codes and scales that they were decoded from.

    Args:
        denoiser: of a pipeline in the dequantized form.
        description: what that says of itself.

    Raises:
        ValueError: if it does not say the granularity, or a weight is on no such grid.
    """
    try:
        recipe = description["recipe"]["weights"]
        scale_name = recipe.get("scale_format", FLOAT32)
        granularity = Granularity(recipe["granularity"], recipe["group_size"], scale_name)
        formats = {
            name: [parse_format(fmt) for fmt in entry["weights"]] for name, entry in description["layers"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{FILE} does not say the granularity and formats of the weights ({type(error).__name__}: {error}): export "
            "them from packed files"
        ) from error
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


def find_scale(rows: Tensor, fmt: Format, scale_format: ScaleFormat | None = None) -> Tensor | None:
    """Scales that rows of values were decoded with.

    The largest magnitude of a row is a value of the format times the scale, rounded to float32. So the scale is that
    magnitude over one of the values, or a float32 number beside it.

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
    for value in fmt.grid.abs().unique().flip(0)[:-1]:
        for steps in (0, 1, -1, 2, -2):
            index = left.nonzero()[:, 0]
            some = rows[index]
            trial = some.abs().amax(1, keepdim=True) / value
            trial = (trial.view(torch.int32) + steps).view(torch.float32)
            quantizer = Quantizer(fmt, trial)
            fits = (quantizer.decode(quantizer.encode(some)).view(torch.int32) == some.view(torch.int32)).all(1)
            if scale_format is not None:
                fits &= scale_format.has_mantissa(trial)[:, 0]
            scale[index[fits]] = trial[fits]
            left[index[fits]] = False
            if not left.any():
                if scale_format is not None and holds.any():
                    scale[~holds] = scale[holds].amin()
                return scale
    return None
