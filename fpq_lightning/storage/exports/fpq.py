"""Packed codes (docs/format.md), which diffusers opens once this package is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline

from fpq_lightning.diffusion.denoisers import quantized_denoisers
from fpq_lightning.nn.attention import packed_attention
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.storage.config import FPQConfig
from fpq_lightning.storage.exports.registry import EXPORTS, Export, details_of


def _convert(pipeline: DiffusionPipeline, details: Mapping[str, Any], directory: Path) -> None:
    for component, denoiser in quantized_denoisers(pipeline).items():
        own = details_of(details, component)
        layers = {name: layer.describe() for name, layer in packed_layers(denoiser).items()}
        if attention := packed_attention(denoiser):
            own["attention"] = {name: module.describe() for name, module in attention.items()}
        cast(Any, denoiser).register_to_config(quantization_config=FPQConfig.of(layers, own))


EXPORTS.register(
    Export(
        name="fpq",
        help="packed codes",
        usage="""The denoiser holds packed low-bit codes. With fpq_lightning installed:

```python
import fpq_lightning
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(DIR)
```

or `fpq test --model DIR`, `fpq predict --model DIR --output OUT`. `fpq export DIR --format dequantized --output OUT`
writes float32 weights that need no package.
""",
        convert=_convert,
    )
)
