"""Float32 weights on the low-bit grid, which need no package, and the activation formats beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fpq_lightning.diffusion.denoisers import find_denoisers, quantized_denoisers
from fpq_lightning.storage.dequantized import FILE, ONLY, describe
from fpq_lightning.storage.exports.registry import EXPORTS, Export, make_pipeline_plain
from fpq_lightning.utils.files import write_json


def _convert(pipeline: DiffusionPipeline, details: Mapping[str, Any], directory: Path) -> None:
    denoisers = quantized_denoisers(pipeline)
    if len(denoisers) == 1 and [*denoisers] == [*find_denoisers(pipeline)]:
        denoisers = dict(zip((ONLY,), denoisers.values(), strict=True))
    write_json(directory / FILE, describe(denoisers, details))
    make_pipeline_plain(pipeline)


EXPORTS.register(
    Export(
        name="dequantized",
        help="float32 weights, which need no package",
        usage=f"""The weights lie on a low-bit grid and are stored as float32, since half precision would move them off
it. `DiffusionPipeline.from_pretrained` opens this directory as it is, with full-precision activations. Activation
formats and scales are in `{FILE}`; `fpq test --model DIR`, `fpq predict --model DIR --output OUT` and
`fpq_lightning.load_quantized(DIR)` apply them.
""",
        convert=_convert,
        needs_codes=False,
    )
)
