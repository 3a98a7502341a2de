"""Models that were changed after they were loaded are refused before a run begins, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from models import tiny_pipeline, tiny_text_to_image
from peft import LoraConfig
from torch import nn

from fpq_lightning import Recipe, SamplerConfig, quantize
from fpq_lightning.diffusion.pipelines import check_as_configured
from fpq_lightning.nn.calibrated import quantized_layers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_text_to_image(tmp_path_factory.mktemp("model") / "model")


def _compile_unet(pipeline: DiffusionPipeline) -> None:
    pipeline.unet = torch.compile(pipeline.unet)


def _enable_cache(pipeline: DiffusionPipeline) -> None:
    pipeline.unet.is_cache_enabled = True  # as `CacheMixin.enable_cache` leaves it


def _offload(pipeline: DiffusionPipeline) -> None:
    cpu_offload(pipeline.unet, torch.device("cpu"))


def _cast_layers(pipeline: DiffusionPipeline) -> None:
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _compile_forward(pipeline: DiffusionPipeline) -> None:
    pipeline.unet.forward = torch.compile(pipeline.unet.forward)


def _compile_text_encoder(pipeline: DiffusionPipeline) -> None:
    pipeline.text_encoder.compile()


def _fuse(pipeline: DiffusionPipeline) -> None:
    with torch.no_grad():
        pipeline.unet.fuse_qkv_projections()


def _widen(pipeline: DiffusionPipeline) -> None:
    pipeline.unet.conv_in = nn.Conv2d(5, 8, 3, padding=1)


CHANGES: dict[str, tuple[Callable[[DiffusionPipeline], object], str]] = {
    "a compiled denoiser": (_compile_unet, "unet is compiled: load the model again, quantize it, then compile it"),
    "compiled in place": (lambda p: p.unet.compile(), "unet is compiled"),
    "a compiled part": (lambda p: p.unet.mid_block.compile(), "unet is compiled"),
    "a compiled component": (_compile_text_encoder, "text_encoder is compiled"),
    "a compiled forward": (_compile_forward, "unet is compiled"),
    "a cache": (_enable_cache, r"unet has a cache: call its disable_cache\(\)"),
    "offloaded weights": (_offload, "unet is offloaded"),
    "weights of eight bits": (_cast_layers, "unet keeps weights in float8_e4m3fn: .* layerwise casting"),
    "fused projections": (_fuse, r"to_qkv\.weight of the denoiser is not as its configuration says"),
    "an adapter": (
        lambda p: p.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"])),
        r"to_q is a LoRA layer",
    ),
    "a wider layer": (_widen, r"conv_in\.weight of the denoiser"),
    "a layer less": (lambda p: setattr(p.unet, "conv_norm_out", None), "conv_norm_out"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_before_the_run_begins(change: str, model: str, tmp_path: Path) -> None:
    apply, message = CHANGES[change]
    pipeline = DiffusionPipeline.from_pretrained(model)
    apply(pipeline)
    sampler = SamplerConfig(steps=2, prompts=["a cat"])
    with pytest.raises(ValueError, match=message) as error:
        quantize(pipeline, Recipe(components={"text_encoder": "fp8"}), tmp_path / "run", sampler=sampler)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert not quantized_layers(pipeline.unet)


def test_a_call_in_inference_mode_is_refused(model: str, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(model)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode\(\) forbids: call it outside"):
        quantize(pipeline, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_looking_at_a_model_changes_no_random_numbers() -> None:
    unet = tiny_pipeline().unet
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check_as_configured(unet)
    assert torch.equal(torch.rand(3), expected)
    check_as_configured(nn.Linear(2, 3))  # of no configuration


def test_a_model_made_with_arguments_by_position_is_as_configured() -> None:
    class Sized(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

    check_as_configured(Sized(6))
    changed = Sized(6)
    changed.layer = nn.Linear(6, 7)
    with pytest.raises(ValueError, match=r"layer\.weight of the denoiser is not as its configuration says"):
        check_as_configured(changed)
