"""The recipe of a quantization: formats, granularity, search, rounding and excluded layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from fpq_lightning.formats.numbers import FAMILIES, FORMATS, Format, IntFormat, parse_formats
from fpq_lightning.formats.scales import FLOAT32, parse_scale_format
from fpq_lightning.quantization.quantizer import Granularity
from fpq_lightning.utils.values import Count, CountOrZero, Within, check_values


def _patterns(patterns: list[str] | str) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns


@dataclass
class WeightRecipe:
    """How weights are quantized.

    Attributes:
        formats: a format, a family (``fp4``, ``fp6``, ``fp8``) or a list, of which the best is chosen for each tensor.
            null leaves the weights in full precision.
        granularity: one scale for each tensor, output channel or group.
        group_size: weights in a group, with ``granularity: group``. Layers whose rows it does not divide have one
            scale for each output channel.
        scale_format: what the scale of a group may be: any ``float32`` number, ``float8_e4m3fn`` times a number of the
            tensor (as in NVFP4), or ``float8_e8m0fnu``, a power of two (as in MXFP4). The latter two are searched on
            their own grid and not learned.
        objective: what the search of format and clip minimises: the error of the layer's ``output`` or of the
            ``tensor``; ``max`` uses the largest magnitude as the clip.
    """

    formats: str | list[str] | None = "fp4"
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: Count | None = None
    scale_format: str = FLOAT32
    objective: Literal["output", "tensor", "max"] = "output"

    def __post_init__(self) -> None:
        check_values(self, "recipe.weights")


@dataclass
class ActivationRecipe:
    """How the inputs of layers are quantized.

    Attributes:
        formats: as for weights; null leaves activations in full precision.
        unsigned: also try the unsigned formats of the same width, whose range starts at the smallest value
            (MSFP, arXiv 2505.21591).
        granularity: one static scale for each ``tensor``, or one for each ``token`` at run time.
        token_layers: glob patterns of layers whose inputs always have a scale for each token.
        objective: as for weights; scales at run time are not searched.
    """

    formats: str | list[str] | None = "fp8"
    unsigned: bool = False
    granularity: Literal["tensor", "token"] = "tensor"
    token_layers: list[str] | str = field(default_factory=list)
    objective: Literal["output", "tensor", "max"] = "tensor"

    def __post_init__(self) -> None:
        check_values(self, "recipe.activations")
        self.token_layers = _patterns(self.token_layers)


@dataclass
class AttentionRecipe:
    """How the products of scaled dot-product attention are quantized: one static scale for each operand.

    Attributes:
        formats: formats of queries, keys and values, as for weights, but signed. The softmax output takes the unsigned
            formats of the same width, or with hardware types the same format. null leaves attention in full precision.
    """

    formats: str | list[str] | None = None

    def __post_init__(self) -> None:
        check_values(self, "recipe.attention")


@dataclass
class RoundingRecipe:
    """How the weights are rounded, one unit after the other.

    Attributes:
        start: rounding to ``nearest``, or in ``closed_form``: the grid values of least output error that GPTQ and
            coordinate descent find from second moments of the layers' inputs.
        learned: whether rounding is learned by gradient descent from there.
        iterations: optimisation steps for each unit.
        batch_size: samples in a step.
        learning_rate: learning rate of the rounding variables (Adam).
        scale_learning_rate: learning rate of weight and activation scales, relative to their size (Adam).
        regularisation: weight of the regulariser that drives the variables to 0 or 1, next to an error that is
            relative to the error of the start.
        warmup: share of the iterations without regulariser.
        straight_through: share of the iterations after which the forward pass rounds to 0 or 1, while the gradient
            stays that of the rectified sigmoid; 1 is AdaRound as published.
        scale_aware: learn the variables in units of each weight's step (FP4DiT).
        learn_weight_scales: also learn a factor for each weight scale of ``scale_format: float32``.
        learn_activation_scales: also learn static activation scales (LSQ).
    """

    start: Literal["nearest", "closed_form"] = "closed_form"
    learned: bool = False
    iterations: CountOrZero = 500
    batch_size: Count = 32
    learning_rate: Annotated[float, Within(0)] = 1e-2
    scale_learning_rate: Annotated[float, Within(0)] = 1e-3
    regularisation: Annotated[float, Within(0)] = 1.0
    warmup: Annotated[float, Within(0, 1)] = 0.2
    straight_through: Annotated[float, Within(0, 1)] = 0.0
    scale_aware: bool = False
    learn_weight_scales: bool = True
    learn_activation_scales: bool = True

    def __post_init__(self) -> None:
        check_values(self, "recipe.rounding")


@dataclass
class Recipe:
    """Everything that decides the quantized model, apart from the model and its calibration data.

    Attributes:
        weights: how the layers' weights are quantized.
        activations: how the layers' inputs are quantized.
        attention: how the products of attention are quantized.
        rounding: how the weights are rounded.
        denoisers: components of the pipeline that are called along the trajectory and quantized, such as
            ``[transformer, transformer_2]``; null takes all but ControlNets.
        include: glob patterns of the names of layers, and of modules that compute attention, to quantize. Where
            several denoisers are quantized, ``transformer_2.*`` are names of this one alone.
        exclude: glob patterns of names that stay in full precision.
        components: weight format or family of other components by name, such as ``text_encoder: fp8``. They are
            rounded to nearest with a scale for each output channel.
        hardware_types: read families (``fp4``, ``fp6``, ``fp8``) as the types of tensor cores.
        units: what is reconstructed at once: a ``block``, or each ``layer`` alone.
        split_skips: use a quantizer for each part of a concatenation that a layer reads.
        quantized_inputs: reconstruct a unit from the inputs that the quantized network gives it, instead of those of
            the full-precision network.
        correct_biases: take the mean error out of the biases: of every layer that is rounded in closed form, or of the
            last layer of another unit, where that helps.
    """

    weights: WeightRecipe = field(default_factory=WeightRecipe)
    activations: ActivationRecipe = field(default_factory=ActivationRecipe)
    attention: AttentionRecipe = field(default_factory=AttentionRecipe)
    rounding: RoundingRecipe = field(default_factory=RoundingRecipe)
    denoisers: list[str] | str | None = None
    include: list[str] | str = field(default_factory=lambda: ["*"])
    exclude: list[str] | str = field(default_factory=list)
    components: dict[str, str] = field(default_factory=dict)
    hardware_types: bool = False
    units: Literal["block", "layer"] = "block"
    split_skips: bool = True
    quantized_inputs: bool = True
    correct_biases: bool = True

    def __post_init__(self) -> None:
        check_values(self, "recipe")
        self.include, self.exclude = _patterns(self.include), _patterns(self.exclude)
        self.denoisers = None if self.denoisers is None else _patterns(self.denoisers)
        if self.denoisers == []:
            raise ValueError("recipe.denoisers is empty: name components of the pipeline, or leave it out")
        self.weight_formats()
        for name in self.components:
            self.component_formats(name)
        self.activation_formats()
        if parse_scale_format(self.granularity().scale_format) and any(f.min == 0 for f in self.weight_formats()):
            raise ValueError(f"weights.scale_format {self.weights.scale_format} needs signed weights.formats")
        if not (self.weight_formats() or self.activation_formats() or self.attention_formats()):
            raise ValueError("the recipe quantizes neither weights nor activations: set a format for one of them")
        self.softmax_formats()
        if self.attention.formats is not None and self.units == "layer":
            raise ValueError("recipe.attention is calibrated with its block: leave recipe.units at block")
        formats = self.activation_formats()
        if self.activations.granularity == "token" and any(f.min == 0 for f in formats):
            raise ValueError("activations.granularity token needs signed formats, without activations.unsigned")
        if self.activations.token_layers and not any(f.min < 0 for f in formats):
            raise ValueError("activations.token_layers needs a signed format among activations.formats")
        r = self.rounding
        if r.learned and (r.iterations < 1 or r.warmup == 1):
            raise ValueError(
                "learned rounding needs recipe.rounding.iterations of at least 1 and warmup below 1, "
                f"got {r.iterations} and {r.warmup}"
            )

    @property
    def solves(self) -> bool:
        """Whether weights are rounded in closed form."""
        return self.rounding.start == "closed_form" and bool(self.weight_formats())

    def granularity(self) -> Granularity:
        """The granularity of weight scales."""
        return Granularity(self.weights.granularity, self.weights.group_size, self.weights.scale_format)

    def weight_formats(self) -> tuple[Format, ...]:
        """Candidate formats of weights, empty for full precision."""
        return self._formats(self.weights.formats)

    def component_formats(self, name: str) -> tuple[Format, ...]:
        """Candidate formats of the weights of another component."""
        return self._formats(self.components[name])

    def activation_formats(self) -> tuple[Format, ...]:
        """Candidate formats of activations, empty for full precision."""
        formats = self._formats(self.activations.formats)
        if not (self.activations.unsigned and formats):
            return formats
        return formats + self._unsigned(formats[0].bits, "activations.unsigned")

    def attention_formats(self) -> tuple[Format, ...]:
        """Candidate formats of queries, keys and values, empty for full precision."""
        formats = self._formats(self.attention.formats)
        if unsigned := [f.name for f in formats if f.min == 0]:
            raise ValueError(f"recipe.attention.formats must be signed, got {', '.join(unsigned)}")
        return formats

    def softmax_formats(self) -> tuple[Format, ...]:
        """Candidate formats of the softmax output of attention, which is in [0, 1]; empty for full precision."""
        formats = self.attention_formats()
        if not formats or formats[0].name in FORMATS:
            return formats
        if isinstance(formats[0], IntFormat):
            return parse_formats(f"u{formats[0]}")
        return self._unsigned(formats[0].bits, "attention.formats")

    def _unsigned(self, bits: int, option: str) -> tuple[Format, ...]:
        family = f"ufp{bits}"
        if self.hardware_types or family not in FAMILIES:
            kind = "hardware formats" if self.hardware_types else "formats"
            raise ValueError(f"there are no unsigned {kind} of {bits} bits, which recipe.{option} needs")
        return parse_formats(family)

    def has_token_scales(self, layer: str) -> bool:
        """Whether the input of a layer has a scale for each token."""
        patterns = self.activations.token_layers
        return self.activations.granularity == "token" or any(fnmatchcase(layer, p) for p in patterns)

    def _formats(self, names: str | list[str] | None) -> tuple[Format, ...]:
        if names is None:
            return ()
        items = [names] if isinstance(names, str) else names
        if self.hardware_types:
            items = [f"hardware_{item}" if f"hardware_{item}" in FAMILIES else item for item in items]
        return parse_formats(items)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; what chooses denoisers only if it is given, for there mostly is one."""
        return {name: value for name, value in asdict(self).items() if name != "denoisers" or value is not None}
