"""The weight is decoded for the call: what every layer can run on, and what calibration computed."""

from __future__ import annotations

from torch import Tensor

from fpq_lightning.nn.backends.paths import PATHS, ArithmeticPath
from fpq_lightning.nn.operands import Operands, operate


def run(x: Tensor, operands: Operands) -> Tensor:
    """A layer on an input that is quantized and dequantized, with its decoded weight."""
    weight = operands.decode_weight(x.dtype)
    return operate(operands.quantize_input(x), weight, operands.bias, operands.convolution)


PATHS.register(
    ArithmeticPath(
        name="decode",
        help="the weight is decoded for the call",
        rank=100,
        fits=lambda operands: True,
        available=lambda hardware, dtype: True,
        run=run,
        low_bit=False,
    )
)
