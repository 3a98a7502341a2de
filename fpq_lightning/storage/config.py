"""``quantization_config`` of a model's ``config.json``: what its files hold, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from typing import Any, Literal

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from fpq_lightning.formats.scales import FLOAT32
from fpq_lightning.quantization.recipe import ActivationRecipe, Recipe, RoundingRecipe, WeightRecipe
from fpq_lightning.storage.registration import register

FORMAT_VERSION = 3
"""Of packed files that are written; version 1 is the dequantized form."""

READ_VERSIONS = (2, FORMAT_VERSION)
"""Of packed files that are read."""


class QuantizationMethod(str, Enum):  # noqa: UP042  diffusers looks it up among strings
    """The name that diffusers and transformers know these files by."""

    FPQ = "fpq"


class FPQConfig(QuantizationConfigMixin, TransformersConfigMixin):
    """Quantizes the weights of a model of diffusers or transformers while it is loaded: nearest rounding, no data.

    Format and clip of every weight are those of least squared error. ``Model.from_pretrained(path,
    quantization_config=FPQConfig("fp4"))`` takes it. Of a pipeline, a `PipelineQuantizationConfig` does, whose
    ``quant_mapping`` names components, or whose ``quant_backend`` is ``fpq``. Files in packed form bring their own.

    Args:
        weights: a format, a family (``fp4``, ``fp6``, ``fp8``, ``hardware_fp8``) or a list, one chosen for each weight.
        granularity: one scale for each ``tensor``, output ``channel`` or ``group``.
        group_size: weights in a group.
        modules_to_not_convert: names of layers or of modules around them, or glob patterns, that stay as they are.
        scale_format: of the scales of groups: ``float32``, ``float8_e4m3fn`` (NVFP4) or ``float8_e8m0fnu`` (MXFP4).

    Attributes:
        layers: what the files hold for each layer (docs/format.md); None before a model was quantized.
        details: the recipe, and where the model comes from.
        format_version: of the files that it was read from.

    Raises:
        ValueError: if there is no such format, or group size or scale format do not go with the granularity.
    """

    def __init__(
        self,
        weights: str | list[str] = "fp4",
        granularity: Literal["tensor", "channel", "group"] = "channel",
        group_size: int | None = None,
        modules_to_not_convert: str | Sequence[str] = (),
        scale_format: str = FLOAT32,
    ) -> None:
        self.quant_method: Any = QuantizationMethod.FPQ
        self.recipe = Recipe(
            weights=WeightRecipe(weights, granularity, group_size, scale_format, objective="tensor"),
            activations=ActivationRecipe(formats=None),
            rounding=RoundingRecipe(learned=False),
            split_skips=False,
            correct_biases=False,
        )
        excluded = modules_to_not_convert
        self.modules_to_not_convert = [excluded] if isinstance(excluded, str) else list(excluded or ())
        self.layers: dict[str, Any] | None = None
        self.format_version = FORMAT_VERSION
        self.details: dict[str, Any] = {"recipe": self.recipe.to_dict(), "version": version("fpq-lightning")}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> FPQConfig:  # type: ignore[override]
        """Reads what `to_dict` gave.

        Raises:
            ValueError: if it is damaged or of another version.
        """
        entries = {name: value for name, value in config_dict.items() if name != "quant_method"}
        found, layers = entries.pop("format_version", None), entries.pop("layers", None)
        if layers is None and (found is None or (found in READ_VERSIONS and "layers" in config_dict)):  # of no file
            raise ValueError("quantization_config names no layers: to quantize while loading, give an FPQConfig itself")
        if found not in READ_VERSIONS:
            known = " and ".join(map(str, READ_VERSIONS))
            raise ValueError(
                f"quantization_config has format version {found}; this fpq_lightning reads versions {known}"
            )
        if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
            raise ValueError("quantization_config does not say what the layers hold: it is damaged")
        config = cls.of(layers, entries)
        config.format_version = found
        return config

    @classmethod
    def of(cls, layers: Mapping[str, Any], details: Mapping[str, Any]) -> FPQConfig:
        """Describes a quantized model.

        Args:
            layers: of `PackedLayer.describe`, by name.
            details: further entries: ``base_model``, ``recipe``, ``version``, ``fingerprint``.
        """
        config = cls()
        config.layers, config.details = dict(layers), dict(details)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain types, which `from_dict` reads."""
        return {
            "quant_method": self.quant_method.value,
            "format_version": FORMAT_VERSION,
            **self.details,
            "layers": self.layers,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers or ())} layers, {self.details})"


register()
