"""Tiny pipelines of diffusers with random weights: calibrated, saved, reopened, sampled.

    python benchmarks/pipelines.py
    python benchmarks/pipelines.py --only FluxPipeline WanPipeline
    python benchmarks/pipelines.py --write docs/pipelines.md

A pipeline is ok if the one that was opened from its files gives the images, video or sound of the one in memory, bit
for bit. The pipelines are those of `tiny_pipelines.py`. Needs no GPU and no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path
from typing import Any

import torch
<<<<<<< HEAD
from models import Outcome, page, quiet
from tiny_pipelines import PIPELINES, tiny_pipeline
=======
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
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
from models import PARTICULAR, TEXT, WIDTH, Outcome, configuration, denoisers, page, quiet
from PIL import Image
from tokenizers import Regex, Tokenizer
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
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
>>>>>>> denoisers

import fpq_lightning as fpq
from fpq_lightning.diffusion.sampling import generate


<<<<<<< HEAD
def examine(name: str, directory: Path, trace: bool) -> Outcome:
=======

def tokenizer() -> PreTrainedTokenizerFast:
    """One that knows letters."""
    made = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<pad>"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    made.post_processor = TemplateProcessing(single="<s> $0 </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=16
    )


def clip(projected: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(LETTERS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=WIDTH, bos_token_id=1, eos_token_id=2, pad_token_id=0,
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


Made = tuple[dict[str, Any], dict[str, Any]]  # components; options of the sampler
PIPELINES: dict[str, Callable[[], Made]] = {}


def pipeline_of(*names: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Says which classes a function makes the components and the sampler of."""

    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        PIPELINES.update(dict.fromkeys(names, make))
        return make

    return add


def pictures(**columns: Callable[[int], Any]) -> str:
    """A dataset on disk with such columns."""
    directory = tempfile.mkdtemp(dir=DIRECTORY[-1])
    rows = {name: [make(i) for i in range(3)] for name, make in columns.items()}
    datasets.Dataset.from_dict(rows).save_to_disk(directory)
    return directory


DIRECTORY: list[str] = []  # for files of the pipeline that is made


def picture(i: int) -> Image.Image:
    return Image.effect_noise((16, 16), 40 + i).convert("RGB")


def _stable_diffusion(channels: int = 4, **unet: Any) -> dict[str, Any]:
    model = denoiser("UNet2DConditionModel", in_channels=channels, sample_size=8, **unet)
    return {"vae": vae(), "text_encoder": clip(), "tokenizer": tokenizer(), "unet": model, "scheduler": ddim(),
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # fmt: skip


def _chosen(components: dict[str, Any]) -> dict[str, Any]:
    return {k: components[k] for k in ("unet", "vae", "scheduler", "text_encoder", "tokenizer")}


@pipeline_of("DiTPipeline")
def _dit() -> Made:
    components = {"transformer": denoiser("DiTTransformer2DModel", num_embeds_ada_norm=1000), "vae": vae()}
    return components | {"scheduler": ddim()}, {"inputs": pictures(class_labels=lambda i: i), "prompts": None}


@pipeline_of("StableDiffusionPipeline")
def _text_to_image() -> Made:
    return _stable_diffusion(), {}


@pipeline_of("StableDiffusionImg2ImgPipeline")
def _image_to_image() -> Made:
    return _stable_diffusion(), {"inputs": pictures(image=picture), "steps": 4}


@pipeline_of("StableDiffusionInstructPix2PixPipeline")
def _pix2pix() -> Made:
    return _stable_diffusion(8), {"inputs": pictures(image=picture)}


@pipeline_of("StableDiffusionInpaintPipeline")
def _inpaint() -> Made:
    return _stable_diffusion(9), {
        "inputs": pictures(image=picture, mask_image=picture), "height": 16, "width": 16,
    }  # fmt: skip


@pipeline_of("StableDiffusionControlNetPipeline")
def _control() -> Made:
    components = _stable_diffusion()
    control = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 8))
    return components | {"controlnet": control.eval()}, {"inputs": pictures(image=picture), "height": 16, "width": 16}


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
    return components, options | {"inputs": pictures(image=picture), "steps": 4}


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


@pipeline_of("LTXPipeline")
def _ltx() -> Made:
    video = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), encoder_causal=True,
    )  # fmt: skip
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": video.eval(), "text_encoder": t5(),
            "tokenizer": tokenizer(), "transformer": denoiser("LTXVideoTransformer3DModel")}, {
                **_VIDEO, "height": 32, "width": 32}  # fmt: skip


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
        "inputs": pictures(image=picture), "prompts": None, "arguments": {"processing_resolution": 0},
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
        "inputs": pictures(image_embeds=embedding, negative_image_embeds=embedding), "height": 64, "width": 64,
        "prompts": None,
    }  # fmt: skip


@pipeline_of("KandinskyV22PriorPipeline")
def _prior() -> Made:
    return {"prior": denoiser("PriorTransformer", num_embeddings=16), "image_encoder": vision(),
            "text_encoder": clip(True), "tokenizer": tokenizer(), "image_processor": CLIPImageProcessor(),
            "scheduler": diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)}, {}  # fmt: skip


@pipeline_of("KandinskyV22CombinedPipeline")
def _kandinsky_combined() -> Made:
    decoder, options = _kandinsky()
    prior, _ = _prior()
    components = decoder | {f"prior_{name}": component for name, component in prior.items()}
    sizes = {name: options[name] for name in ("height", "width")}
    return components, sizes | {"arguments": {"prior_num_inference_steps": 2}}


@pipeline_of("StableCascadePriorPipeline")
def _stable_cascade_prior() -> Made:
    model = denoiser(
        "StableCascadeUNet", clip_image_in_channels=WIDTH, clip_text_in_channels=WIDTH, clip_seq=1, in_channels=4,
        out_channels=4, switch_level=(False,),
    )  # fmt: skip
    return {"tokenizer": tokenizer(), "text_encoder": clip(True), "prior": model,
            "scheduler": diffusers.DDPMWuerstchenScheduler()}, {
                "height": 128, "width": 128}  # fmt: skip


@pipeline_of("StableCascadeCombinedPipeline")
def _stable_cascade() -> Made:
    prior, options = _stable_cascade_prior()
    model = denoiser(
        "StableCascadeUNet", clip_text_pooled_in_channels=WIDTH, clip_seq=1, in_channels=4, out_channels=4,
        effnet_in_channels=4, patch_size=1, switch_level=(False,),
    )  # fmt: skip
    pixels = PaellaVQModel(latent_channels=4, num_vq_embeddings=8, embed_dim=8, bottleneck_blocks=1)
    diffusers.PaellaVQModel = PaellaVQModel  # diffusers looks for it here when it opens what it saved
    components = {f"prior_{name}": component for name, component in prior.items()}
    components |= {"prior_feature_extractor": None, "prior_image_encoder": None, "vqgan": pixels.eval()}
    components |= {"decoder": model, "scheduler": diffusers.DDPMWuerstchenScheduler()}
    components |= {name: prior[name] for name in ("tokenizer", "text_encoder")}
    return components, options | {"arguments": {"prior_num_inference_steps": 2}}


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
                "inputs": pictures(image=picture), "prompts": None, "height": 16, "width": 16,
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


def _qwen_image(pipeline: DiffusionPipeline, seeds: list[int]) -> Any:
    """Samples with embeddings, whose encoder is too large a family to be made here."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    texts = torch.stack([torch.randn(TEXT, WIDTH, generator=draw) for draw in draws])
    return pipeline(
        prompt_embeds=texts, prompt_embeds_mask=torch.ones(len(seeds), TEXT, dtype=torch.long), generator=draws,
        true_cfg_scale=1.0, height=16, width=16, num_inference_steps=2, output_type="np",
    )  # fmt: skip


@pipeline_of("QwenImagePipeline")
def _qwen() -> Made:
    images = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    model = denoiser("QwenImageTransformer2DModel", in_channels=16, out_channels=4)
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": images.eval(), "text_encoder": None,
            "tokenizer": None, "transformer": model}, {"function": _qwen_image, "prompts": None}  # fmt: skip


def examine(name: str, make: Callable[[], Made], directory: Path, trace: bool) -> Outcome:
>>>>>>> denoisers
    """Takes a pipeline through recording, quantization, files and back."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        pipeline, options = tiny_pipeline(name, directory)
        sampler = fpq.SamplerConfig(**options)
        fpq.quantize(
            pipeline,
            run_dir=directory / "run",
            data=fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4),
            sampler=sampler,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
        )
        report = json.loads((directory / "run" / "report.json").read_text())
        outcome.units, outcome.share = len(report["blocks"]), report["quantized_share"]
        pair = [pipeline, fpq.load_quantized(directory / "run" / "quantized")]
        outcome.result = compared(*(values(generate(one, sampler, range(3, 5))) for one in pair))
    except Exception as error:
        if trace:
            traceback.print_exc(file=sys.stdout)
        outcome.result = textwrap.shorten(f"{type(error).__name__}: {error}".replace(f"{directory}", "DIR"), 240)
    outcome.seconds = time.perf_counter() - start
    return outcome


def values(output: Any) -> torch.Tensor:
    """The first array that a pipeline gives."""
    return torch.as_tensor(next(iter(output.values())))


def compared(expected: torch.Tensor, found: torch.Tensor) -> str:
    if not expected.isfinite().all():
        return "the quantized pipeline gives NaN or Inf"
    return "ok" if torch.equal(expected, found) else "the opened pipeline gives other bits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PIPELINES), metavar="CLASS", help="these pipelines alone")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--trace", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for name in args.only or PIPELINES:
        with tempfile.TemporaryDirectory() as directory, quiet():
            outcomes.append(examine(name, Path(directory), args.trace))
        print(outcomes[-1].row(), flush=True)
    print(f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)} are ok")
    if args.write:
        args.write.write_text(page("Pipelines", "pipeline", outcomes, "python " + " ".join(sys.argv)))


if __name__ == "__main__":
    main()
