"""Post-training floating-point quantization of diffusion models."""

from fpq_lightning.api import quantize
from fpq_lightning.calibration.datamodule import CalibrationDataModule
from fpq_lightning.evaluation import EvaluationConfig
from fpq_lightning.formats import FloatFormat, Format, IntFormat, parse_format
from fpq_lightning.pipelines import SamplerConfig
from fpq_lightning.recipes import ActivationRecipe, AttentionRecipe, Recipe, RoundingRecipe, WeightRecipe
from fpq_lightning.storage.config import FPQConfig
from fpq_lightning.storage.packed import set_arithmetic
from fpq_lightning.storage.quantized import load_quantized

__all__ = [
    "ActivationRecipe",
    "AttentionRecipe",
    "CalibrationDataModule",
    "EvaluationConfig",
    "FPQConfig",
    "FloatFormat",
    "Format",
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
