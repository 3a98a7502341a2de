"""``quantized/``: a diffusers pipeline whose denoiser is stored in one of several forms.

``fpq`` holds packed codes (docs/format.md); once this package is imported, plain `DiffusionPipeline.from_pretrained`
opens it. ``dequantized`` holds float32 weights and needs no package (`fpq_lightning.storage.dequantized`). The others
are for readers of other libraries and are not read here (`fpq_lightning.storage.exports.layout`).
"""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from fpq_lightning.diffusion.pipelines import denoiser_name, load_pipeline, quantization_of
from fpq_lightning.nn.attention import make_attention_plain, quantized_attention
from fpq_lightning.nn.calibrated import LayerQuantization, QuantizedLayer, QuantizedModule, quantized_layers
from fpq_lightning.nn.packed import (
    PackedLayer,
    describe_attention,
    keep_learned_attention,
    make_plain,
    pack_layer,
    packed_layers,
    quantized_weight,
)
from fpq_lightning.storage import dequantized
from fpq_lightning.storage.config import FPQConfig, QuantizationMethod
from fpq_lightning.storage.diffusers_quantizer import forget_config
from fpq_lightning.storage.exports.compressed_tensors import MXFP4
from fpq_lightning.storage.exports.layout import Layout, apply_layout
from fpq_lightning.storage.exports.modelopt import FP8, FP8_PER_CHANNEL, NVFP4
from fpq_lightning.storage.headers import read_header
from fpq_lightning.utils.files import atomic_directory, write_json

Form = Literal["fpq", "dequantized", "modelopt", "nvfp4", "mxfp4"]

LAYOUTS: dict[Form, tuple[Layout, ...]] = {
    "modelopt": (FP8, FP8_PER_CHANNEL),
    "nvfp4": (NVFP4,),
    "mxfp4": (MXFP4,),
}
"""The forms that are those of other libraries."""

_README = """# A quantized diffusion model

Made by fpq_lightning {version} from `{base_model}`.

"""
_LAYOUT_USE = """The denoiser's Linear layers hold codes and scales in the key layout of {library};
`quantization_config` in its `config.json` names the layers that have plain weights. docs/format.md of fpq_lightning
says which programs read it. diffusers does not; `fpq export` of the packed files writes forms that it reads.
"""
_USE: dict[Form, str] = {
    "fpq": """The denoiser holds packed low-bit codes. With fpq_lightning installed:

```python
import fpq_lightning
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(DIR)
```

or `fpq test --model DIR`, `fpq predict --model DIR --output OUT`. `fpq export DIR --format dequantized --output OUT`
writes float32 weights that need no package.
""",
    "dequantized": f"""The weights lie on a low-bit grid and are stored as float32, since half precision would move
them off it; `DiffusionPipeline.from_pretrained` opens this directory as it is, then with full-precision activations.
Activation formats and scales are in `{dequantized.FILE}`; `fpq test --model DIR`, `fpq predict --model DIR --output
OUT` and `fpq_lightning.load_quantized(DIR)` apply them.
""",
    "modelopt": _LAYOUT_USE.format(library="NVIDIA ModelOpt (FP8)"),
    "nvfp4": _LAYOUT_USE.format(library="NVIDIA ModelOpt (NVFP4)"),
    "mxfp4": _LAYOUT_USE.format(library="compressed-tensors (mxfp4-pack-quantized)"),
}


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Puts what is quantized of a model, and its configuration, back after a block that changes them."""

    def state(module: nn.Module) -> dict[str, Any]:
        return {k: copy.copy(v) if k in ("_parameters", "_buffers", "_modules") else v for k, v in vars(module).items()}

    changed = [module for module in model.modules() if isinstance(module, (QuantizedModule, PackedLayer))]
    before = [(module, type(module), state(module)) for module in changed]
    configuration = getattr(model, "_internal_dict", None)
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            module.__dict__ = attributes
        if configuration is not None:
            model._internal_dict = configuration


def _learned(model: nn.Module) -> dict[str, QuantizedLayer | PackedLayer]:
    """The layers whose quantization is to be stored."""
    calibrated = {name: layer for name, layer in quantized_layers(model).items() if "quantized" in layer.variants}
    return {**calibrated, **packed_layers(model)}


def _convert(denoiser: nn.Module, form: Form, details: Mapping[str, Any]) -> None:
    """Gives the layers of a denoiser the form in which they are stored, and its configuration what belongs to it."""
    if form != "dequantized":
        for layer in _learned(denoiser).values():
            if isinstance(layer, QuantizedLayer):
                pack_layer(layer, cast(LayerQuantization, layer.variants["quantized"]))
    if form == "fpq":
        descriptions = {name: layer.describe() for name, layer in packed_layers(denoiser).items()}
        attention = {name: describe_attention(module) for name, module in keep_learned_attention(denoiser).items()}
        packed = FPQConfig.of(descriptions, {**details, **({"attention": attention} if attention else {})})
        cast(Any, denoiser).register_to_config(quantization_config=packed)
    else:
        forget_config(denoiser)
        if form in LAYOUTS:
            config = apply_layout(denoiser, LAYOUTS[form], details.get("version", "?"))
            cast(Any, denoiser).register_to_config(quantization_config=config)
        for layer in packed_layers(denoiser).values():
            make_plain(layer)
        for module in quantized_attention(denoiser).values():
            make_attention_plain(module)
    for layer in quantized_layers(denoiser).values():
        make_plain(layer)


def save_quantized(
    pipeline: DiffusionPipeline, directory: Path, details: Mapping[str, Any], form: Form = "fpq"
) -> None:
    """Writes a quantized pipeline, whole or not at all.

    Args:
        pipeline: its denoiser's layers have the variant ``learned`` or are packed.
        directory: replaced if it exists.
        details: where it comes from: ``base_model``, ``recipe``, ``version``, ``fingerprint``.
        form: ``fpq`` for packed codes, ``dequantized`` for float32 weights, or one of `LAYOUTS`.

    Raises:
        ValueError: if a quantized weight holds NaN or Inf, or no layer fits the layout.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    learned = _learned(denoiser)
    for name, layer in learned.items():
        if not quantized_weight(layer).isfinite().all():
            raise ValueError(f"{name}: its quantized weight holds NaN or Inf; nothing was written")
    layers = {name: dequantized.describe_layer(layer) for name, layer in learned.items()}
    with atomic_directory(directory) as temporary:
        with ExitStack() as stack:
            for component in pipeline.components.values():
                if isinstance(component, nn.Module):
                    stack.enter_context(_restored(component))
                    if component is denoiser:
                        continue
                    for layer in quantized_layers(component).values():
                        make_plain(layer)
                    if form != "fpq" and (packed := packed_layers(component)):
                        for part in packed.values():
                            make_plain(part)
                        forget_config(component)
            _convert(denoiser, form, details)
            try:
                pipeline.save_pretrained(temporary)
            except SafetensorError as error:
                raise OSError(errno.EIO, f"{error}", str(directory)) from error
        if form == "dequantized":
            attention = dequantized.describe_attention(denoiser)
            described = {"format_version": dequantized.FORMAT_VERSION, **details, "layers": layers}
            described |= {"attention": attention} if attention else {}
            write_json(temporary / dequantized.FILE, described)
        names = {"version": details.get("version", "?"), "base_model": details.get("base_model", "?")}
        (temporary / "README.md").write_text(_README.format(**names) + _USE[form])


def load_quantized(directory: str | Path) -> DiffusionPipeline:
    """Opens what `save_quantized` wrote as ``fpq`` or ``dequantized``, with all activation formats in force.

    Raises:
        FileNotFoundError: if there is no such pipeline.
        ValueError: if a file is damaged, of another version, or does not fit the model.
    """
    packed = _packed_config(Path(directory).expanduser())
    if packed is not None:
        for file in sorted(packed.parent.glob("*.safetensors")):
            read_header(file)  # names the tensor where it is cut off, which diffusers does not
    pipeline = load_pipeline(directory)
    denoiser = getattr(pipeline, denoiser_name(pipeline)).eval().requires_grad_(False)
    if packed is None:
        dequantized.apply_inputs(denoiser, read_description(directory))
    return pipeline


def _packed_config(directory: Path) -> Path | None:
    """The configuration of the packed denoiser of a pipeline, None if it has none."""
    found = quantization_of(directory)
    return found[0] if found is not None and found[1] == QuantizationMethod.FPQ.value else None


def is_quantized(directory: str | Path) -> bool:
    """Whether a directory holds a quantized pipeline that `load_quantized` opens."""
    path = Path(directory).expanduser()
    return (path / dequantized.FILE).is_file() or _packed_config(path) is not None


def read_description(directory: str | Path) -> dict[str, Any]:
    """What a quantized pipeline says of itself: formats of its ``layers``, ``base_model``, ``recipe``, ``version``.

    Raises:
        ValueError: if that is damaged or of another version.
    """
    path = Path(directory).expanduser()
    config = _packed_config(path)
    if config is None:
        return dequantized.read_description(path)
    return FPQConfig.from_dict(json.loads(config.read_text())["quantization_config"]).to_dict()
