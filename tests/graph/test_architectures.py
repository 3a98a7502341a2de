"""Today's architectures, found and quantized by their structure: block plans at full size, whole runs on small ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fpq_lightning as fpq
from fpq_lightning.calibration.disk import load_calibration_set
from fpq_lightning.diffusion.sampling import sample, set_sampler
from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.units import discover_units
from fpq_lightning.nn.calibrated import is_quantizable, running
from fpq_lightning.storage.export import export
from fpq_lightning.storage.pipeline import read_description

SAMPLER = fpq.SamplerConfig(steps=4, batch_size=4)


class UnusualBlock(nn.Module):
    """Takes a pair, gives a mapping, and keeps its layers in a ModuleDict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"mix": nn.Conv1d(width, width, 3, padding=1), "gate": nn.Linear(width, width)})

    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        tokens, condition = pair
        gate = self.parts["gate"](condition).sigmoid()[:, None]
        return {"tokens": tokens + gate * self.parts["mix"](tokens.transpose(1, 2)).transpose(1, 2), "gate": gate}


class MadeUpDenoiser(ModelMixin, ConfigMixin):
    """One that no library knows."""

    @register_to_config
    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(4, width)
        self.clock = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.tower = nn.ModuleList([UnusualBlock(width) for _ in range(depth)])
        self.leave = nn.Linear(width, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        condition = self.clock(timestep[:, None].float() / 1000)
        tokens = self.enter(hidden_states)
        for block in self.tower:
            tokens = block((tokens, condition))["tokens"]
        return (self.leave(tokens),)


# --- block plans at full size ----------------------------------------------------------------------------------

_SD = {"block_out_channels": (320, 640, 1280, 1280)}
FULL_SIZE: dict[str, tuple[str, dict[str, Any], float, dict[str, int]]] = {
    # class, configuration, millions of parameters, units that must be there
    "SD 1.5": (
        "UNet2DConditionModel",
        {**_SD, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        860,
        {"Transformer2DModel": 16, "ResnetBlock2D": 22},
    ),
    "SD 2.1": (
        "UNet2DConditionModel",
        {**_SD, "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
         "use_linear_projection": True},
        866,
        {"Transformer2DModel": 16, "ResnetBlock2D": 22},
    ),
    "SDXL": (
        "UNet2DConditionModel",
        {"sample_size": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
         "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
         "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
        2567,
        {"BasicTransformerBlock": 70, "ResnetBlock2D": 17},
    ),
    "LDM": (
        "UNet2DModel",
        {"sample_size": 64, "block_out_channels": (224, 448, 672, 896), "attention_head_dim": 32,
         "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
         "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D")},
        274,
        {"ResnetBlock2D": 22, "Attention": 16},
    ),
    "DiT-XL/2": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
         "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000},
        750,
        {"BasicTransformerBlock": 28},
    ),
    "PixArt-Sigma": (
        "PixArtTransformer2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 72, "out_channels": 8, "num_layers": 28,
         "caption_channels": 4096, "cross_attention_dim": 1152, "sample_size": 128,
         "use_additional_conditions": False},
        611,
        {"BasicTransformerBlock": 28},
    ),
    "SD 3.5 medium": (
        "SD3Transformer2DModel",
        {"sample_size": 128, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
         "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384,
         "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        2243,
        {"JointTransformerBlock": 24},
    ),
    "FLUX.1": (
        "FluxTransformer2DModel",
        {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
         "guidance_embeds": True},
        11901,
        {"FluxTransformerBlock": 19, "FluxSingleTransformerBlock": 38},
    ),
    "Sana": (
        "SanaTransformer2DModel",
        {"num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20, "num_cross_attention_heads": 20,
         "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "caption_channels": 2304, "mlp_ratio": 2.5},
        1604,
        {"SanaTransformerBlock": 20},
    ),
    "HunyuanDiT": (
        "HunyuanDiT2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4, "patch_size": 2, "sample_size": 128,
         "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637, "cross_attention_dim": 1024,
         "cross_attention_dim_t5": 2048, "activation_fn": "gelu-approximate"},
        1517,
        {"HunyuanDiTBlock": 40},
    ),
    "Wan": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960,
         "num_layers": 30},
        1419,
        {"WanTransformerBlock": 30},
    ),
}  # fmt: skip


def _unet_inputs(model: nn.Module) -> dict[str, Any]:
    """Of one sample, for UNets, whose resamplers only a forward pass joins to what they follow."""
    config = model.config
    inputs = {"sample": torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)}
    inputs["timestep"] = torch.zeros(1, dtype=torch.long)
    if "cross_attention_dim" in config:
        inputs["encoder_hidden_states"] = torch.zeros(1, 77, config.cross_attention_dim)
    if config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    return inputs


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_block_plan_of_a_full_size_model(name: str) -> None:
    kind, configuration, millions, expected = FULL_SIZE[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**configuration)
        inputs = _unet_inputs(model) if "UNet" in kind else None
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    units = discover_units(model)
    if inputs is not None:
        units, _ = trace_units(model, units, inputs)
    layers = [layer for unit in units for layer in unit.layers]
    assert sorted(layers) == sorted(n for n, module in model.named_modules() if is_quantizable(module))
    assert len(layers) == len(set(layers))
    found = Counter(type(part).__name__ for unit in units for part in parts_of(unit.module))
    assert {kind: found[kind] for kind in expected} == expected
    alone = sum(unit.parameters for unit in units if len(unit.layers) == 1)
    assert alone / sum(unit.parameters for unit in units) < 0.05


def test_the_block_plan_of_a_model_that_no_library_knows() -> None:
    units = discover_units(MadeUpDenoiser(width=64, depth=12))
    names = [unit.name for unit in units]
    assert names == ["enter", "clock", *(f"tower.{i}" for i in range(12)), "leave"]
    alone = sum(unit.parameters for unit in units if len(unit.layers) == 1)
    assert alone / sum(unit.parameters for unit in units) < 0.05


# --- whole runs ------------------------------------------------------------------------------------------------

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_CONDITIONAL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
                "cross_attention_dim": 12}  # fmt: skip
Inputs = Callable[[int], dict[str, Any]]


def _text(n: int, width: int = 12) -> Tensor:
    return torch.randn(n, 5, width)


SMALL: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...], Inputs]] = {
    # class, configuration, shape of the state, further inputs of n samples
    "SD 2.1": (
        diffusers.UNet2DConditionModel,
        {**_CONDITIONAL, "attention_head_dim": (2, 4), "use_linear_projection": True,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        (4, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n)},
    ),
    "SDXL": (
        diffusers.UNet2DConditionModel,
        {**_CONDITIONAL, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2),
         "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
         "projection_class_embeddings_input_dim": 36, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        (4, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n),
                   "added_cond_kwargs": {"text_embeds": torch.randn(n, 12), "time_ids": torch.ones(n, 6)}},
    ),
    "DiT": (
        diffusers.DiTTransformer2DModel,
        {**_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "patch_size": 2,
         "norm_num_groups": 4, "num_embeds_ada_norm": 10},
        (4, 8, 8),
        lambda n: {"class_labels": torch.arange(n) % 10},
    ),
    "PixArt": (
        diffusers.PixArtTransformer2DModel,
        {**_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "caption_channels": 12,
         "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "norm_num_groups": 4,
         "use_additional_conditions": False},
        (4, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3": (
        diffusers.SD3Transformer2DModel,
        {**_HEADS, "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 12,
         "caption_projection_dim": 16, "pooled_projection_dim": 12, "out_channels": 4, "pos_embed_max_size": 8,
         "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        (4, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n), "pooled_projections": torch.randn(n, 12)},
    ),
    "FLUX": (
        diffusers.FluxTransformer2DModel,
        {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8),
         "guidance_embeds": True},
        (16, 4),
        lambda n: {"encoder_hidden_states": _text(n), "pooled_projections": torch.randn(n, 12),
                   "guidance": 3.5 * torch.ones(n), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)},
    ),
    "Sana": (
        diffusers.SanaTransformer2DModel,
        {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8,
         "patch_size": 1},
        (4, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n)},
    ),
    "HunyuanDiT": (
        diffusers.HunyuanDiT2DModel,
        {**_HEADS, "in_channels": 4, "patch_size": 2, "activation_fn": "gelu-approximate", "sample_size": 8,
         "hidden_size": 16, "num_layers": 4, "mlp_ratio": 2.0, "cross_attention_dim": 12, "cross_attention_dim_t5": 16,
         "pooled_projection_dim": 12, "text_len": 5, "text_len_t5": 5},
        (4, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n), "text_embedding_mask": torch.ones(n, 5),
                   "encoder_hidden_states_t5": _text(n, 16), "text_embedding_mask_t5": torch.ones(n, 5),
                   "image_meta_size": torch.ones(n, 6), "style": torch.zeros(n).long(),
                   "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8))},
    ),
    "Wan": (
        diffusers.WanTransformer3DModel,
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
         "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24, "num_layers": 2, "rope_max_seq_len": 32},
        (4, 2, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n)},
    ),
    "UNet3D": (
        diffusers.UNet3DConditionModel,
        {**_CONDITIONAL, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        (4, 2, 8, 8),
        lambda n: {"encoder_hidden_states": _text(n)},
    ),
    "made up": (MadeUpDenoiser, {}, (16, 4), lambda n: {}),
}  # fmt: skip


class ConditionedPipeline(DiffusionPipeline):
    """Samples with any of the small denoisers, whose conditions are drawn from a seed of their own."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def _entry(self) -> tuple[tuple[int, ...], Inputs]:
        config = dict(self.transformer.config)
        for kind, wanted, shape, inputs in SMALL.values():
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in wanted.items()}
            saved = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
            if type(self.transformer) is kind and all(saved.get(k) == v for k, v in plain.items()):
                return shape, inputs
        raise AssertionError(config)

    @torch.no_grad()
    def __call__(
        self, batch_size: int, generator: list[torch.Generator], num_inference_steps: int, output_type: str
    ) -> ImagePipelineOutput:
        shape, conditions = self._entry()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            inputs = conditions(batch_size)
        dtype = self.transformer.dtype
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        x = torch.stack([torch.randn(shape, generator=g) for g in generator]).to(dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        scale = 1000 if "guidance" in inputs else 1
        for t in self.scheduler.timesteps:
            timestep = t.expand(len(x)) / scale
            out = self.transformer(x, timestep=timestep.to(dtype), **inputs, return_dict=False)[0]
            out = out if out.shape == x.shape else out[:, : x.shape[1]]  # the rest predicts a variance
            x = self.scheduler.step(out, t, x).prev_sample
        image = x.float().reshape(batch_size, -1).repeat(1, 3)[:, :192].reshape(batch_size, 8, 8, 3)
        return ImagePipelineOutput(images=image.sigmoid().numpy())


@pytest.fixture(autouse=True)
def known_to_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `from_pretrained` find the classes of this file by name."""
    for made_up in (ConditionedPipeline, MadeUpDenoiser):
        monkeypatch.setattr(diffusers, made_up.__name__, made_up, raising=False)


def _called_layers(pipeline: ConditionedPipeline) -> set[str]:
    """Layers that run as modules; HunyuanDiT hands the weights of some to a function instead."""
    found: set[str] = set()
    layers = {name: m for name, m in pipeline.transformer.named_modules() if is_quantizable(m)}
    handles = [m.register_forward_pre_hook(lambda *_, name=name: found.add(name)) for name, m in layers.items()]
    sample(pipeline, SAMPLER, range(2))
    for handle in handles:
        handle.remove()
    assert len(found) >= 0.9 * len(layers)
    return found


def _pipeline(name: str) -> ConditionedPipeline:
    kind, configuration, *_ = SMALL[name]
    torch.manual_seed(0)
    model = kind(**configuration).eval()
    for parameter in model.parameters():  # gates that start at zero would hide what lies behind them
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return ConditionedPipeline(model, DDIMScheduler(clip_sample=False))


def _quantize(pipeline: ConditionedPipeline, run_dir: Path, **recipe: Any) -> ConditionedPipeline:
    return fpq.quantize(
        pipeline,
        fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=4, batch_size=4), **recipe),
        run_dir,
        fpq.CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8),
        SAMPLER,
        fpq.EvaluationConfig(n_images=4, features=None),
        base_model="small",
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
    )


def _samples(pipeline: ConditionedPipeline) -> Tensor:
    set_sampler(pipeline, SAMPLER)
    return sample(pipeline, SAMPLER, range(4))


@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_is_quantized_saved_opened_and_sampled(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pipeline = _pipeline(name)
    called = _called_layers(pipeline)
    quantized = _quantize(pipeline, tmp_path / "run")
    left = [str(warning.message) for warning in recwarn if "left in full precision" in str(warning.message)]
    assert len(left) == (name == "HunyuanDiT")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {layer for block in report["blocks"] for layer in block["weight_formats"]} == called
    assert all(block["error_quantized"] <= block["error_nearest"] < 0.5 for block in report["blocks"])
    assert report["variants"]["quantized"]["psnr"] > 15
    expected = _samples(quantized)
    assert torch.equal(_samples(fpq.load_quantized(tmp_path / "run" / "quantized")), expected)
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", ["SD 2.1", "FLUX", "Wan"])
def test_a_model_in_bfloat16_is_quantized_and_keeps_its_types(name: str, tmp_path: Path) -> None:
    kind, configuration, *_ = SMALL[name]
    torch.manual_seed(0)
    kind(**configuration).save_pretrained(tmp_path / "model")
    model = kind.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16).eval()
    types = {parameter: value.dtype for parameter, value in model.named_parameters()}
    kept = [parameter for parameter, dtype in types.items() if dtype == torch.float32]
    assert bool(kept) == bool(kind._keep_in_fp32_modules)
    pipeline = ConditionedPipeline(model, DDIMScheduler(clip_sample=False))
    quantized = fpq.quantize(
        pipeline,
        fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=4, batch_size=4)),
        tmp_path / "run",
        fpq.CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8),
        SAMPLER,
        fpq.EvaluationConfig(n_images=4, features=None),
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
    )
    assert {parameter: value.dtype for parameter, value in model.named_parameters() if parameter in types} == types
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(0 < block["error_quantized"] <= block["error_nearest"] < 0.5 for block in report["blocks"])
    assert report["variants"]["quantized"]["psnr"] > 15
    calibration = load_calibration_set(tmp_path / "run" / "calibration")
    assert {value.dtype for value in calibration.inputs.values()} >= {torch.bfloat16}
    assert sample(quantized, SAMPLER, range(2)).isfinite().all()


def test_a_model_with_fused_adapters_is_quantized_once_they_are_unloaded(tmp_path: Path) -> None:
    kind, configuration, *_ = SMALL["SD 2.1"]
    torch.manual_seed(0)
    model = kind(**configuration).eval()
    plain = model.state_dict()["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"].clone()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline = ConditionedPipeline(model, DDIMScheduler(clip_sample=False))
    options: dict[str, Any] = {
        "recipe": fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=2, batch_size=4)),
        "data": fpq.CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8),
        "sampler": SAMPLER,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "logger": False,
    }
    set_sampler(pipeline, SAMPLER)
    adapted = sample(pipeline, SAMPLER, range(2))
    with pytest.raises(ValueError, match=r"attn1\.to_q is a LoRA layer: .*fuse_lora.*unload"):
        fpq.quantize(pipeline, run_dir=tmp_path / "refused", **options)
    model.fuse_lora()
    model.unload_lora()
    fused = model.state_dict()["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert not torch.equal(fused, plain)
    assert torch.allclose(sample(pipeline, SAMPLER, range(2)), adapted, atol=1e-4)
    quantized = fpq.quantize(pipeline, run_dir=tmp_path / "run", **options)
    again = fpq.load_quantized(tmp_path / "run" / "quantized")
    set_sampler(again, SAMPLER)
    assert torch.equal(sample(again, SAMPLER, range(2)), sample(quantized, SAMPLER, range(2)))


class _FusedCalls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.count += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["SDXL", "DiT", "PixArt", "SD3", "FLUX", "HunyuanDiT", "Wan"])
def test_attention_of_a_small_model_is_quantized_saved_opened_and_sampled(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pipeline = _pipeline(name)
    with _FusedCalls() as calls:
        _samples(pipeline)
    assert calls.count
    quantized = _quantize(pipeline, tmp_path / "run", attention=fpq.AttentionRecipe("fp8"))
    left = [str(warning.message) for warning in recwarn if "attention that is left" in str(warning.message)]
    assert len(left) == (name == "HunyuanDiT")  # whose pooling is multi-head attention of torch
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    description = read_description(tmp_path / "run" / "quantized")["attention"]
    listed = {n: formats for block in report["blocks"] for n, formats in block["activation_formats"].items()}
    modules = {n for n, m in pipeline.transformer.named_modules() if isinstance(m, (Attention, AttentionModuleMixin))}
    assert description.keys() == modules
    for n, operands in description.items():
        assert listed[n] == [operand["format"] for operand in operands]
        assert [f.startswith("u") for f in listed[n]] == [False, False, False, True]
    assert report["variants"]["quantized"]["psnr"] > 15
    with _FusedCalls() as calls:
        expected = _samples(quantized)
        assert torch.equal(_samples(fpq.load_quantized(tmp_path / "run" / "quantized")), expected)
    assert not calls.count
    with running(quantized.transformer, "full_precision"):
        assert torch.equal(_samples(quantized), _samples(_pipeline(name)))
    export(tmp_path / "run" / "quantized", tmp_path / "plain", "dequantized")
    plain = DiffusionPipeline.from_pretrained(str(tmp_path / "plain"))
    assert {type(m).__module__.split(".")[0] for m in plain.transformer.modules()} <= {"torch", "diffusers"}
