"""Post-training floating-point quantization of diffusion models."""

from fpq_lightning.api import quantize
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.formats.numbers import FloatFormat, Format, IntFormat, parse_format
from fpq_lightning.nn.packed_layer import set_arithmetic
from fpq_lightning.quantization.recipe import ActivationRecipe, AttentionRecipe, Recipe, RoundingRecipe, WeightRecipe
from fpq_lightning.storage.config import FPQConfig
from fpq_lightning.storage.pipeline import load_quantized
from fpq_lightning.training.datamodule import CalibrationDataModule

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
