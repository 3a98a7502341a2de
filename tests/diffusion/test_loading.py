"""Pipelines are found whatever their files are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PipelineQuantizationConfig,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from models import tiny_pipeline, tiny_text_to_image

from fpq_lightning import FPQConfig, load_quantized
from fpq_lightning.diffusion.pipelines import load_pipeline, pipeline_class, take_settings


def _weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    modules = {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
    return {f"{k}.{name}": p for k, module in modules.items() for name, p in module.named_parameters()}


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_a_pipeline_with_one_variant_of_its_weights_is_loaded(
    variant: str, shards: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_text_to_image(tmp_path / "model")).to(torch.float16)
    pipeline.save_pretrained(tmp_path / "variant", variant=variant, **shards)
    found, expected = _weights(load_pipeline(tmp_path / "variant")), _weights(pipeline)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in found)


def test_plain_weights_are_preferred_to_a_variant_and_components_may_differ(tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_text_to_image(tmp_path / "model"))
    pipeline.to(torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
    plain = tiny_text_to_image(tmp_path / "plain")
    expected = _weights(load_pipeline(plain))
    both = _weights(load_pipeline(tmp_path / "model"))
    assert all(torch.equal(both[name], expected[name]) for name in expected)
    for file in (tmp_path / "model" / "unet").glob("*model.safetensors"):
        file.unlink()
    mixed = _weights(load_pipeline(tmp_path / "model"))
    assert all(
        torch.equal(mixed[n], v.half().float() if n.startswith("unet") else mixed[n]) for n, v in expected.items()
    )


def test_a_repository_of_half_precision_only_is_loaded_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def from_pretrained(cls: Any, name: str, variant: str | None = None, **options: Any) -> DiffusionPipeline:
        asked.append(variant)
        if name != "owner/half" or variant is None:
            raise OSError("Error no file named diffusion_pytorch_model.bin found")
        return tiny_pipeline()

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    assert load_pipeline("owner/half").unet
    assert asked == [None, "fp16"]
    with pytest.raises(ValueError, match="no pipeline of that name on the hub"):
        load_pipeline("owner/none")


def test_a_model_is_opened_as_another_class_of_the_same_components(tmp_path: Path) -> None:
    model = tiny_text_to_image(tmp_path / "model")
    found = load_pipeline(model, kind=pipeline_class("StableDiffusionImg2ImgPipeline"))
    assert type(found) is StableDiffusionImg2ImgPipeline
    own = load_pipeline(model, kind=pipeline_class(None))
    assert type(own) is StableDiffusionPipeline
    assert all(torch.equal(weight, _weights(own)[name]) for name, weight in _weights(found).items())


@pytest.mark.parametrize("name", ["StableDiffusionPipline", "UNet2DModel", "DDIMScheduler"])
def test_what_is_no_pipeline_class_of_diffusers_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"diffusers has no pipeline '{name}'"):
        pipeline_class(name)


def test_a_class_that_needs_other_components_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = tiny_text_to_image(tmp_path / "model"), pipeline_class("StableDiffusionControlNetPipeline")
    with pytest.raises(ValueError, match=r"cannot load the pipeline .*controlnet"):
        load_pipeline(model, kind=kind)
    original = kind.from_pretrained
    monkeypatch.setattr(kind, "from_pretrained", lambda name, **options: original(model, **options))
    with pytest.raises(ValueError, match=r"cannot load the pipeline owner/model.*controlnet"):
        load_pipeline("owner/model", kind=kind)


def test_packed_files_that_have_a_variant_in_their_names_are_opened(tmp_path: Path) -> None:
    model = tiny_text_to_image(tmp_path / "model")
    chosen = PipelineQuantizationConfig(quant_mapping={"unet": FPQConfig("fp8")})
    packed = DiffusionPipeline.from_pretrained(model, quantization_config=chosen)
    packed.save_pretrained(tmp_path / "packed", variant="fp16")
    found, expected = _weights(load_quantized(tmp_path / "packed")), _weights(packed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pipeline_saved_without_its_text_encoders_is_opened_without_them(tmp_path: Path) -> None:
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, in_channels=4, out_channels=4,
    )  # fmt: skip
    left_out = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    made = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderTiny(),
        **dict.fromkeys(left_out),
    )
    made.save_pretrained(tmp_path)
    found = load_pipeline(tmp_path)
    assert all(getattr(found, name) is None for name in left_out)
    assert torch.equal(found.transformer.proj_out.weight, transformer.proj_out.weight)


def test_components_are_set_as_those_of_another_pipeline(tmp_path: Path) -> None:
    model = tiny_text_to_image(tmp_path / "model")
    pipeline = load_pipeline(model)
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_latent_min_size = 4
    pipeline.unet.set_attn_processor(AttnProcessor())
    opened = load_pipeline(model)
    take_settings(opened, pipeline)
    assert opened.vae.use_tiling
    assert opened.vae.tile_latent_min_size == 4
    assert not opened.vae.use_slicing
    assert {type(processor) for processor in opened.unet.attn_processors.values()} == {AttnProcessor}
