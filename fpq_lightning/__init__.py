"""Post-training floating-point quantization of diffusion models.

Importing the package makes diffusers open packed models. What it exports is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fpq_lightning.storage import registration

if TYPE_CHECKING:
    from fpq_lightning.api import quantize
    from fpq_lightning.diffusion.sampling import FunctionSampler, SamplerConfig
    from fpq_lightning.evaluation.config import EvaluationConfig
    from fpq_lightning.formats.numbers import FloatFormat, Format, IntFormat, parse_format
    from fpq_lightning.nn.packed_layer import set_arithmetic
    from fpq_lightning.quantization.recipe import (
        ActivationRecipe,
        AttentionRecipe,
        Recipe,
        RoundingRecipe,
        WeightRecipe,
    )
    from fpq_lightning.storage.config import FPQConfig
    from fpq_lightning.storage.pipeline import load_quantized
    from fpq_lightning.training.datamodule import CalibrationDataModule

__version__ = "0.2.0"

__all__ = [
    "ActivationRecipe",
    "AttentionRecipe",
    "CalibrationDataModule",
    "EvaluationConfig",
    "FPQConfig",
    "FloatFormat",
    "Format",
    "FunctionSampler",
    "IntFormat",
    "Recipe",
    "RoundingRecipe",
    "SamplerConfig",
    "WeightRecipe",
    "load_quantized",
    "parse_format",
    "quantize",
    "set_arithmetic",
]

_MODULES = {
    "api": ("quantize",),
    "diffusion.sampling": ("FunctionSampler", "SamplerConfig"),
    "evaluation.config": ("EvaluationConfig",),
    "formats.numbers": ("FloatFormat", "Format", "IntFormat", "parse_format"),
    "nn.packed_layer": ("set_arithmetic",),
    "quantization.recipe": ("ActivationRecipe", "AttentionRecipe", "Recipe", "RoundingRecipe", "WeightRecipe"),
    "storage.config": ("FPQConfig",),
    "storage.pipeline": ("load_quantized",),
    "training.datamodule": ("CalibrationDataModule",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.register_when_imported()
