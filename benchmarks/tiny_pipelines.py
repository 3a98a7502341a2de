"""Pipelines of diffusers, tiny and with random weights, and how each is sampled.

Denoisers are those of `tiny_denoisers.py`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from PIL import Image
from tiny_denoisers import PARTICULAR, WIDTH, configuration, denoisers
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

PROMPTS = ["a cat", "two dogs", "a big red bus"]
LETTERS = ["<pad>", "<s>", "</s>", " ", *"abcdefghijklmnopqrstuvwxyz"]
LETTERS += sorted(set(string.printable) - set(LETTERS))


def tokenizer(
    length: int = 16,
    more: Sequence[str] = (),
    marks: Mapping[str, str] | None = None,
    kind: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
) -> PreTrainedTokenizerFast:
    """One that knows letters.

    Args:
        length: of the longest text.
        more: tokens besides letters.
        marks: those of them that stand for something else than text, by name.
        kind: its class.
    """
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate([*LETTERS, *more])}, unk_token="<pad>"))
    made.pre_tokenizer, made.decoder = Split(Regex(r"[\s\S]"), "isolated"), Fuse()
    made.post_processor = TemplateProcessing(single="<s> $0 </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    said = "m.content if m.content is string else m.content[0].text"
    return kind(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=length,
        extra_special_tokens=marks or {},
        chat_template=f"{{% for m in messages %}}{{{{ {said} }}}}{{% endfor %}}",
    )  # fmt: skip


def clip(projected: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(LETTERS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=WIDTH, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vision() -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        patch_size=56, projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def t5() -> nn.Module:
    return T5EncoderModel(
        T5Config(vocab_size=len(LETTERS), d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2)
    ).eval()


_DECODER: dict[str, Any] = {
    "vocab_size": len(LETTERS), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def llama() -> nn.Module:
    return LlamaModel(LlamaConfig(**_DECODER, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def qwen3() -> nn.Module:
    return Qwen3Model(Qwen3Config(**_DECODER, head_dim=16)).eval()


def qwen() -> nn.Module:
    rope = {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"}
    seen = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config={**_DECODER, "rope_scaling": rope}, vision_config=seen)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def vae(**options: Any) -> AutoencoderKL:
    chosen = {
        "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return AutoencoderKL(**{**chosen, **options}).eval()


def denoiser(name: str, **changes: Any) -> nn.Module:
    """A tiny denoiser of the table of models."""
    kind = denoisers()[name]
    particular = PARTICULAR[name].config if name in PARTICULAR else {}
    model = kind(**{**configuration(kind, particular), **changes}).float().eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, set_alpha_to_one=False)


Made = tuple[dict[str, Any], dict[str, Any]]  # components; options of the sampler, whose inputs are a dataset
PIPELINES: dict[str, Callable[[], Made]] = {}


def pipeline_of(*names: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Says which classes a function makes the components and the sampler of."""

    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        PIPELINES.update(dict.fromkeys(names, make))
        return make

    return add


def rows(**columns: Callable[[int], Any]) -> datasets.Dataset:
    """A dataset with such columns."""
    return datasets.Dataset.from_dict({name: [make(i) for i in range(3)] for name, make in columns.items()})


def picture(i: int) -> Image.Image:
    return Image.effect_noise((16, 16), 40 + i).convert("RGB")


def _stable_diffusion(channels: int = 4, **unet: Any) -> dict[str, Any]:
    model = denoiser("UNet2DConditionModel", in_channels=channels, sample_size=8, **unet)
    return {"vae": vae(), "text_encoder": clip(), "tokenizer": tokenizer(), "unet": model, "scheduler": ddim(),
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # fmt: skip


def _chosen(components: dict[str, Any]) -> dict[str, Any]:
    return {k: components[k] for k in ("unet", "vae", "scheduler", "text_encoder", "tokenizer")}


@pipeline_of("DDPMPipeline")
def _unconditional() -> Made:
    return {"unet": denoiser("UNet2DModel", in_channels=3, out_channels=3, sample_size=8), "scheduler": ddim()}, {
        "prompts": None
    }


@pipeline_of("DiTPipeline")
def _dit() -> Made:
    components = {"transformer": denoiser("DiTTransformer2DModel", num_embeds_ada_norm=1000), "vae": vae()}
    return components | {"scheduler": ddim()}, {"inputs": rows(class_labels=lambda i: i), "prompts": None}


@pipeline_of("StableDiffusionPipeline")
def _text_to_image() -> Made:
    return _stable_diffusion(), {}


@pipeline_of("StableDiffusionImg2ImgPipeline")
def _image_to_image() -> Made:
    return _stable_diffusion(), {"inputs": rows(image=picture), "steps": 4}


@pipeline_of("StableDiffusionInstructPix2PixPipeline")
def _pix2pix() -> Made:
    return _stable_diffusion(8), {"inputs": rows(image=picture)}


@pipeline_of("StableDiffusionInpaintPipeline")
def _inpaint() -> Made:
    return _stable_diffusion(9), {
        "inputs": rows(image=picture, mask_image=picture), "height": 16, "width": 16,
    }  # fmt: skip


@pipeline_of("StableDiffusionControlNetPipeline")
def _control() -> Made:
    components = _stable_diffusion()
    control = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 8))
    return components | {"controlnet": control.eval()}, {"inputs": rows(image=picture), "height": 16, "width": 16}


@pipeline_of("StableDiffusionXLPipeline")
def _sdxl() -> Made:
    model = denoiser(
        "UNet2DConditionModel", sample_size=8, cross_attention_dim=2 * WIDTH, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + WIDTH,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return {"vae": vae(), "text_encoder": clip(), "text_encoder_2": clip(True), "tokenizer": tokenizer(),
            "tokenizer_2": tokenizer(), "unet": model, "scheduler": ddim()}, {}  # fmt: skip


@pipeline_of("StableDiffusion3Pipeline")
def _sd3() -> Made:
    model = denoiser("SD3Transformer2DModel", joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH)
    components = {f"tokenizer{k}": tokenizer() for k in ("", "_2", "_3")} | {
        "transformer": model,
        "vae": vae(shift_factor=0.1),
    }
    components |= {"text_encoder": clip(True), "text_encoder_2": clip(True), "text_encoder_3": None}
    return components | {"scheduler": FlowMatchEulerDiscreteScheduler()}, {"height": 16, "width": 16}


def _flux(name: str, **changes: Any) -> dict[str, Any]:
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae(shift_factor=0.1),
            "transformer": denoiser(name, in_channels=16, **changes)}  # fmt: skip


@pipeline_of("FluxPipeline")
def _flux1() -> Made:
    texts = {"text_encoder": clip(), "tokenizer": tokenizer(), "text_encoder_2": t5(), "tokenizer_2": tokenizer()}
    return _flux("FluxTransformer2DModel") | texts, {
        "height": 16, "width": 16, "arguments": {"max_sequence_length": 16},
    }  # fmt: skip


@pipeline_of("FluxImg2ImgPipeline")
def _flux_image_to_image() -> Made:
    components, options = _flux1()
    return components, options | {"inputs": rows(image=picture), "steps": 4}


@pipeline_of("FluxKontextPipeline")
def _flux_kontext() -> Made:
    components, options = _flux1()
    arguments = {**options["arguments"], "max_area": 256, "_auto_resize": False}
    return components, options | {"inputs": rows(image=picture), "arguments": arguments}


@pipeline_of("Flux2Pipeline")
def _flux2() -> Made:
    images = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = denoiser("Flux2Transformer2DModel", in_channels=16, joint_attention_dim=2 * WIDTH)
    arguments = {"max_sequence_length": 16, "text_encoder_out_layers": [1, 2]}
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": images.eval(), "text_encoder": qwen3(),
            "tokenizer": tokenizer(), "transformer": model}, {
                "height": 16, "width": 16, "arguments": arguments}  # fmt: skip


@pipeline_of("ZImagePipeline")
def _z_image() -> Made:
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae(shift_factor=0.1), "text_encoder": qwen3(),
            "tokenizer": tokenizer(), "transformer": denoiser("ZImageTransformer2DModel")}, {
                "height": 32, "width": 32, "arguments": {"max_sequence_length": 16}}  # fmt: skip


@pipeline_of("ChromaPipeline")
def _chroma() -> Made:
    return _flux("ChromaTransformer2DModel", out_channels=16) | {"text_encoder": t5(), "tokenizer": tokenizer()}, {
        "height": 16, "width": 16, "arguments": {"max_sequence_length": 16},
    }  # fmt: skip


@pipeline_of("PixArtSigmaPipeline")
def _pixart() -> Made:
    model = denoiser("PixArtTransformer2DModel", out_channels=8, use_additional_conditions=False)
    return {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": vae(), "transformer": model, "scheduler": ddim()}, {
        "height": 16, "width": 16,
        "arguments": {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    }  # fmt: skip


_VIDEO = {"height": 16, "width": 16, "arguments": {"num_frames": 5, "max_sequence_length": 16}}


@pipeline_of("WanPipeline")
def _wan() -> Made:
    video = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": video.eval(),
            "transformer": denoiser("WanTransformer3DModel"), "scheduler": FlowMatchEulerDiscreteScheduler()}, {
                **_VIDEO}  # fmt: skip


@pipeline_of("WanPipeline 2.2")
def _wan_2_2() -> Made:
    components, options = _wan()
    components |= {"transformer_2": denoiser("WanTransformer3DModel"), "boundary_ratio": 0.875}
    return components, options | {"arguments": {**options["arguments"], "guidance_scale_2": 3.0}}


@pipeline_of("LTXPipeline")
def _ltx() -> Made:
    video = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), encoder_causal=True,
    )  # fmt: skip
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": video.eval(), "text_encoder": t5(),
            "tokenizer": tokenizer(), "transformer": denoiser("LTXVideoTransformer3DModel")}, {
                "arguments": {**_VIDEO["arguments"], "num_frames": 9}, "height": 32, "width": 32}  # fmt: skip


@pipeline_of("HunyuanVideoPipeline")
def _hunyuan_video() -> Made:
    video = AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    return {"text_encoder": llama(), "tokenizer": tokenizer(), "vae": video.eval(), "text_encoder_2": clip(),
            "tokenizer_2": tokenizer(), "transformer": denoiser("HunyuanVideoTransformer3DModel"),
            "scheduler": FlowMatchEulerDiscreteScheduler()}, _VIDEO  # fmt: skip


@pipeline_of("CogVideoXPipeline")
def _cogvideox() -> Made:
    video = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        temporal_compression_ratio=4,
    )  # fmt: skip
    model = denoiser(
        "CogVideoXTransformer3DModel", sample_height=2, sample_width=2, sample_frames=5, temporal_compression_ratio=4,
        max_text_seq_length=16,
    )  # fmt: skip
    return {"tokenizer": tokenizer(), "text_encoder": t5(), "vae": video.eval(), "transformer": model,
            "scheduler": diffusers.CogVideoXDDIMScheduler()}, _VIDEO  # fmt: skip


@pipeline_of("AnimateDiffPipeline")
def _animate() -> Made:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    return _chosen(_stable_diffusion()) | {"feature_extractor": None} | {"motion_adapter": adapter.eval()}, {
        "height": 16, "width": 16, "arguments": {"num_frames": 2},
    }  # fmt: skip


@pipeline_of("MarigoldDepthPipeline")
def _marigold() -> Made:
    components = _chosen(_stable_diffusion(8))
    options = {"prediction_type": "depth", "scale_invariant": True, "shift_invariant": True}
    return components | options, {
        "inputs": rows(image=picture), "prompts": None, "arguments": {"processing_resolution": 0},
    }  # fmt: skip


@pipeline_of("KandinskyV22Pipeline")
def _kandinsky() -> Made:
    unet = denoiser(
        "UNet2DConditionModel", out_channels=8, encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj",
        addition_embed_type="image", class_embed_type=None, mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
        block_out_channels=(32, 32), norm_num_groups=8,
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(32, 32), norm_num_groups=4, latent_channels=4, num_vq_embeddings=12, vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("AttnUpDecoderBlock2D",) * 2, norm_type="spatial",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def embedding(i: int) -> list[float]:
        return torch.randn(WIDTH, generator=generator).tolist()

    return {"unet": unet, "scheduler": ddim(), "movq": movq.eval()}, {
        "inputs": rows(image_embeds=embedding, negative_image_embeds=embedding), "height": 64, "width": 64,
        "prompts": None,
    }  # fmt: skip


@pipeline_of("KandinskyV22PriorPipeline")
def _prior() -> Made:
    return {"prior": denoiser("PriorTransformer", num_embeddings=16), "image_encoder": vision(),
            "text_encoder": clip(True), "tokenizer": tokenizer(), "image_processor": CLIPImageProcessor(),
            "scheduler": diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)}, {}  # fmt: skip


@pipeline_of("StableCascadePriorPipeline")
def _stable_cascade_prior() -> Made:
    model = denoiser(
        "StableCascadeUNet", clip_image_in_channels=WIDTH, clip_text_in_channels=WIDTH, clip_seq=1, in_channels=4,
        out_channels=4, switch_level=(False,),
    )  # fmt: skip
    return {"tokenizer": tokenizer(), "text_encoder": clip(True), "prior": model,
            "scheduler": diffusers.DDPMWuerstchenScheduler()}, {
                "height": 128, "width": 128}  # fmt: skip


@pipeline_of("StableCascadeDecoderPipeline")
def _stable_cascade_decoder() -> Made:
    model = denoiser("StableCascadeUNet", effnet_in_channels=4, in_channels=4, out_channels=4, switch_level=(False,))
    pixels = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=8, levels=1, embed_dim=16, latent_channels=4)
    generator = torch.Generator().manual_seed(0)

    def embeddings(i: int) -> list[Any]:
        return torch.randn(4, 2, 2, generator=generator).tolist()

    return {"decoder": model, "tokenizer": tokenizer(), "text_encoder": clip(True), "vqgan": pixels.eval(),
            "scheduler": diffusers.DDPMWuerstchenScheduler()}, {
                "inputs": rows(image_embeddings=embeddings)}  # fmt: skip


@pipeline_of("KandinskyV22CombinedPipeline")
def _kandinsky_combined() -> Made:
    decoder, options = _kandinsky()
    prior, _ = _prior()
    components = decoder | {f"prior_{name}": component for name, component in prior.items()}
    sizes = {name: options[name] for name in ("height", "width")}
    return components, sizes | {"arguments": {"prior_num_inference_steps": 2}}


@pipeline_of("StableVideoDiffusionPipeline")
def _stable_video() -> Made:
    unet = denoiser("UNetSpatioTemporalConditionModel", sample_size=8, in_channels=8, num_frames=2)
    video = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
    )  # fmt: skip
    return {"vae": video.eval(), "image_encoder": vision(), "unet": unet,
            "scheduler": diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
            "feature_extractor": CLIPImageProcessor()}, {
                "inputs": rows(image=picture), "prompts": None, "height": 16, "width": 16,
                "arguments": {"num_frames": 2}}  # fmt: skip


@pipeline_of("StableAudioPipeline")
def _stable_audio() -> Made:
    model = denoiser(
        "StableAudioDiTModel", sample_size=16, global_states_input_dim=2 * WIDTH, num_attention_heads=2,
    )  # fmt: skip
    oobleck = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[1, 2], channel_multiples=[1, 2], decoder_channels=4,
        decoder_input_channels=4, audio_channels=2, sampling_rate=16,
    )  # fmt: skip
    projection = StableAudioProjectionModel(WIDTH, WIDTH, 0, 32)
    return {"vae": oobleck.eval(), "text_encoder": t5(), "projection_model": projection.eval(),
            "tokenizer": tokenizer(), "transformer": model, "scheduler": EDMDPMSolverMultistepScheduler()}, {
                "arguments": {"audio_end_in_s": 1.0}}  # fmt: skip


@pipeline_of("QwenImagePipeline")
def _qwen() -> Made:
    images = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    model = denoiser("QwenImageTransformer2DModel", in_channels=16, out_channels=4)
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": images.eval(), "text_encoder": qwen(),
            "tokenizer": tokenizer(), "transformer": model}, {"height": 16, "width": 16}  # fmt: skip


def tiny_pipeline(name: str, directory: Path) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A tiny pipeline, and the options of its sampler.

    Args:
        name: of its class, and what is particular to it.
        directory: for the dataset of its inputs.
    """
    torch.manual_seed(0)
    components, options = PIPELINES[name]()
    pipeline = getattr(diffusers, name.split()[0])(**components)
    pipeline.set_progress_bar_config(disable=True)
    if "inputs" in options:
        options["inputs"].save_to_disk(directory / "inputs")
        options = options | {"inputs": str(directory / "inputs")}
    return pipeline, {"steps": 2, "batch_size": 2, "prompts": PROMPTS, **options}
