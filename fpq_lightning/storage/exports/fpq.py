"""Packed codes (docs/format.md), which diffusers opens once this package is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fpq_lightning.diffusion.pipelines import denoiser_name
from fpq_lightning.nn.attention import packed_attention
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.storage.config import FPQConfig
from fpq_lightning.storage.exports.registry import EXPORTS, Export


def _convert(pipeline: DiffusionPipeline, details: Mapping[str, Any], directory: Path) -> None:
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    layers = {name: layer.describe() for name, layer in packed_layers(denoiser).items()}
    if attention := packed_attention(denoiser):
        details = {**details, "attention": {name: module.describe() for name, module in attention.items()}}
    denoiser.register_to_config(quantization_config=FPQConfig.of(layers, details))


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
