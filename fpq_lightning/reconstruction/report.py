"""What became of a unit."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class UnitReport:
    """What became of one unit; errors are relative to the energy of its full-precision output, on held-out samples.

    Attributes:
        name: of the unit.
        parameters: of its quantized layers.
        weight_formats: chosen formats by layer (one for each part of the input channels).
        activation_formats: likewise; of a module that computes attention those of query, key, value and softmax.
        error_nearest: with nearest rounding.
        error_closed_form: with rounding in closed form; None without it.
        error_quantized: with what was kept.
        kept: ``learned``, ``closed_form`` or ``nearest`` rounding.
        iterations: optimisation steps.
        seconds: spent on the unit in all, over resumed runs.
    """

    name: str
    parameters: int
    weight_formats: dict[str, list[str]] = field(default_factory=dict)
    activation_formats: dict[str, list[str]] = field(default_factory=dict)
    error_nearest: float | None = None
    error_closed_form: float | None = None
    error_quantized: float | None = None
    kept: str = "nearest"
    iterations: int = 0
    seconds: float = 0.0
