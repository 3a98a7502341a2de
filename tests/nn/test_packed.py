"""The packed form: what its files hold, read by a reader of docs/format.md, and how diffusers loads it."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import MakeNetwork
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel
from models import CHECKOUT, save_tiny, tiny_pipeline
from packed_reader import read_denoiser, read_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.nn.calibrated import quantized_layers
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.quantization.search import search_tensor_error

SMALL = CHECKOUT / "data" / "cifar10-ddpm-small" / "unet"
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECIPES: dict[str, dict[str, Any]] = {
    "fp4 with split parts": {},
    "fp6 by group": {
        "weights": fpq.WeightRecipe("fp6", "group", group_size=4),
        "exclude": ["conv_in"],
    },
    "fp4 with scales in e4m3": {"weights": fpq.WeightRecipe("fp4", "group", 8, "float8_e4m3fn")},
    "fp4 with scales in e8m0": {"weights": fpq.WeightRecipe("float4_e2m1fn", "group", 24, "float8_e8m0fnu")},
    "with offsets": {
        "weights": fpq.WeightRecipe("uint5", "tensor"),
        "activations": fpq.ActivationRecipe("e4m3", unsigned=True),
    },
    "hardware fp8 by token": {
        "hardware_types": True,
        "weights": fpq.WeightRecipe(["float8_e5m2", "float8_e4m3fn"]),
        "activations": fpq.ActivationRecipe("fp8", granularity="token"),
    },
    "activations only": {"weights": fpq.WeightRecipe(None)},
}


def calibrate(run: Path, **recipe: Any) -> DiffusionPipeline:
    return fpq.quantize(
        tiny_pipeline(),
        fpq.Recipe(rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=6, batch_size=4), **recipe),
        run,
        fpq.CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8),
        fpq.SamplerConfig(steps=4, batch_size=4),
        base_model="tiny",
        accelerator="cpu",
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionPipeline, Path]:
    run = tmp_path_factory.mktemp("run") / "run"
    return calibrate(run), run / "quantized"


@pytest.fixture
def copy(calibrated: tuple[DiffusionPipeline, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated[1], tmp_path / "copy"))


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    dtype = next(unet.parameters()).dtype
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return unet(x, torch.tensor([0, 400, 999])).sample


def quantization_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


# --- what a run writes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_files_hold_the_calibrated_layers_to_the_bit(name: str, tmp_path: Path) -> None:
    pipeline = calibrate(tmp_path / "run", **RECIPES[name])
    directory = tmp_path / "run" / "quantized" / "unet"
    stored, described = read_denoiser(directory), quantization_config(directory)["layers"]
    layers = quantized_layers(pipeline.unet)
    assert described.keys() == layers.keys()
    for layer_name, layer in layers.items():
        quantization, entry = layer.variants["quantized"], described[layer_name]
        weight = layer.quantized_weight(quantization).numpy()
        assert stored[f"{layer_name}.weight"].tobytes() == weight.tobytes()
        bias = layer.bias if quantization.bias is None else quantization.bias
        if bias is not None:
            assert stored[f"{layer_name}.bias"].tobytes() == bias.detach().numpy().tobytes()
        assert entry["splits"] == list(layer.splits)
        assert len(entry["inputs"]) == len(quantization.inputs) == len(layer.splits)
        for i, q in enumerate(quantization.inputs):
            assert entry["inputs"][i]["format"] == q.format.name
            for what, value in {"scale": q.scale, "offset": q.offset}.items():
                found = stored.get(f"{layer_name}.inputs.{i}.{what}")
                assert (found is None) == (value is None)
                assert value is None or (found is not None and found == value.numpy())
    opened = DiffusionPipeline.from_pretrained(tmp_path / "run" / "quantized")
    assert torch.equal(output(opened.unet), output(pipeline.unet))
    assert not torch.equal(output(opened.unet), output(tiny_pipeline().unet))
    parts = [len(entry["splits"]) for entry in described.values()]
    assert max(parts) == 2
    offsets = [q["offset"] for entry in described.values() for q in [*entry["weights"], *entry["inputs"]]]
    assert any(offsets) == (name == "with offsets")
    scales = {q.get("scale_format") for entry in described.values() for q in entry["weights"]}
    expected = {"fp4 with scales in e4m3": "float8_e4m3fn", "fp4 with scales in e8m0": "float8_e8m0fnu"}
    assert scales - {None} == ({expected[name]} if name in expected else set())
    assert (None in scales) == (name != "activations only")  # conv_in has 27 weights an output channel


def test_files_say_where_they_come_from(calibrated: tuple[DiffusionPipeline, Path]) -> None:
    config = quantization_config(calibrated[1] / "unet")
    assert config["quant_method"] == "fpq"
    assert config["format_version"] == 3
    assert config["base_model"] == "tiny"
    assert config["recipe"]["weights"]["formats"] == "fp4"
    assert len(config["fingerprint"]) == 16
    assert config["weight_bits"] > 4
    assert not (calibrated[1] / "quantization.json").exists()


def test_a_model_a_pipeline_and_load_quantized_open_to_the_outputs_of_the_calibrated_one(
    calibrated: tuple[DiffusionPipeline, Path],
) -> None:
    pipeline, directory = calibrated
    expected = output(pipeline.unet)
    assert torch.equal(output(UNet2DModel.from_pretrained(directory / "unet")), expected)
    assert torch.equal(output(UNet2DModel.from_pretrained(directory, subfolder="unet")), expected)
    assert torch.equal(output(DiffusionPipeline.from_pretrained(directory).unet), expected)
    assert torch.equal(output(fpq.load_quantized(directory).unet), expected)


def test_saving_leaves_the_calibrated_pipeline_as_it_was(
    calibrated: tuple[DiffusionPipeline, Path], tmp_path: Path
) -> None:
    from fpq_lightning.storage.pipeline import save_quantized

    pipeline = calibrated[0]
    before, layers = output(pipeline.unet), list(quantized_layers(pipeline.unet))
    state = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    for form in ("fpq", "dequantized"):
        save_quantized(pipeline, tmp_path / form, {"base_model": "tiny", "version": "0"}, form)
        assert list(quantized_layers(pipeline.unet)) == layers
        assert torch.equal(output(pipeline.unet), before)
        assert "quantization_config" not in pipeline.unet.config
        found = pipeline.unet.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in found.items())


# --- loading ---------------------------------------------------------------------------------------------------


def test_save_pretrained_writes_the_same_bytes_again(
    calibrated: tuple[DiffusionPipeline, Path], tmp_path: Path
) -> None:
    directory = calibrated[1]
    DiffusionPipeline.from_pretrained(directory).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "unet" / WEIGHTS).read_bytes() == (directory / "unet" / WEIGHTS).read_bytes()
    found, expected = (json.loads((d / "unet" / "config.json").read_text()) for d in (tmp_path / "again", directory))
    found.pop("_name_or_path"), expected.pop("_name_or_path", None)  # diffusers writes where it was loaded from
    assert found == expected


def test_sharded_files_open_to_the_same_model(calibrated: tuple[DiffusionPipeline, Path], tmp_path: Path) -> None:
    unet = UNet2DModel.from_pretrained(calibrated[1] / "unet")
    unet.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = UNet2DModel.from_pretrained(tmp_path / "shards")
    assert torch.equal(output(again), output(unet))
    found, expected = read_denoiser(tmp_path / "shards"), read_denoiser(calibrated[1] / "unet")
    assert found.keys() == expected.keys()
    assert all(found[k].tobytes() == expected[k].tobytes() for k in found)


def exact(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Codes and scales."""
    kept = {k: v for k, v in module.state_dict().items() if ".weights." in k or ".inputs." in k}
    return {k: (v.dtype, v.flatten().view(torch.uint8).numpy().tobytes()) for k, v in kept.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_and_scales_stay_as_they_are_whatever_type_the_model_has(
    calibrated: tuple[DiffusionPipeline, Path], dtype: torch.dtype
) -> None:
    directory = calibrated[1]
    expected = exact(UNet2DModel.from_pretrained(directory / "unet"))
    assert {kind for kind, _ in expected.values()} == {torch.uint8, torch.float32}
    loaded = DiffusionPipeline.from_pretrained(directory, torch_dtype=dtype)
    cast = DiffusionPipeline.from_pretrained(directory).to(dtype)
    for unet in (loaded.unet, cast.unet, cast.unet.float().to(dtype)):
        assert exact(unet) == expected
        assert unet.conv_in.bias.dtype == unet.conv_in.weight.dtype == unet.dtype == dtype
    assert output(loaded.unet).dtype == dtype
    assert torch.equal(output(loaded.unet), output(cast.unet))
    back = DiffusionPipeline.from_pretrained(directory).unet.to("cpu").double()
    assert exact(back) == expected


def test_in_half_precision_a_layer_computes_with_its_weight_rounded_once(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    config = fpq.FPQConfig("fp4", modules_to_not_convert="conv_in")
    unet = UNet2DModel.from_pretrained(f"{model}/unet", quantization_config=config, torch_dtype=torch.bfloat16)
    unet.save_pretrained(tmp_path / "packed")
    plain = tiny_pipeline().unet
    plain.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in _read_bfloat16(tmp_path / "packed").items()})
    assert torch.equal(output(unet), output(plain.bfloat16()))


def _read_bfloat16(directory: Path) -> dict[str, np.ndarray]:
    """`read_denoiser` of a model that was saved in bfloat16, which numpy lacks."""
    tensors = load_file(directory / WEIGHTS)
    save_file({k: v.float() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}, directory / WEIGHTS)
    return read_denoiser(directory)


def test_a_compiled_an_offloaded_and_a_placed_model_compute_the_same(
    calibrated: tuple[DiffusionPipeline, Path],
) -> None:
    directory = calibrated[1] / "unet"
    expected = output(UNet2DModel.from_pretrained(directory))
    compiled = UNet2DModel.from_pretrained(directory)
    compiled.compile(backend="eager", fullgraph=True)
    placed = UNet2DModel.from_pretrained(directory, device_map={"": "cpu"})
    offloaded = UNet2DModel.from_pretrained(directory)
    cpu_offload(offloaded, torch.device("cpu"), offload_buffers=True)
    assert offloaded.conv_in.weights[0].codes.is_meta  # until it is called
    for unet in (compiled, placed, offloaded):
        assert torch.equal(output(unet), expected)
    with pytest.raises(ValueError, match="without disk"):
        UNet2DModel.from_pretrained(directory, device_map={"": "disk"}, offload_folder=directory.parent / "x")


def test_parts_and_tensors_of_a_model_are_placed_as_the_device_map_says(
    calibrated: tuple[DiffusionPipeline, Path],
) -> None:
    directory = calibrated[1] / "unet"
    whole = UNet2DModel.from_pretrained(directory)
    places = {name: "cpu" for name, _ in whole.named_children()}
    del places["conv_in"]
    places |= {name: "cpu" for name in whole.state_dict() if name.startswith("conv_in.")}
    assert torch.equal(output(UNet2DModel.from_pretrained(directory, device_map=places)), output(whole))
    del places["mid_block"]
    with pytest.raises(ValueError, match=r"no device for mid_block\."):
        UNet2DModel.from_pretrained(directory, device_map=places)


def test_what_is_to_stay_in_float32_does(
    calibrated: tuple[DiffusionPipeline, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    half = UNet2DModel.from_pretrained(calibrated[1] / "unet", torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    monkeypatch.setattr(UNet2DModel, "_keep_in_fp32_modules", ["conv_in"])
    kept = UNet2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert kept.conv_in.bias.dtype == torch.float32
    assert kept.conv_out.bias.dtype == torch.bfloat16
    assert torch.equal(kept.conv_in.bias, half.conv_in.bias.float())


def test_a_model_goes_with_its_last_name_and_garbage_is_collected_again(
    calibrated: tuple[DiffusionPipeline, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(calibrated[1] / "unet", tmp_path / "unet")
    unet = UNet2DModel.from_pretrained(directory)
    assert gc.isenabled()
    gone = weakref.ref(unet)
    gc.disable()
    try:
        del unet
        assert gone() is None
        UNet2DModel.from_pretrained(directory)
        assert not gc.isenabled()
    finally:
        gc.enable()
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-1])
    with pytest.raises((ValueError, OSError)):
        UNet2DModel.from_pretrained(directory)
    assert gc.isenabled()


def test_weights_stay_packed_in_memory_also_after_a_call(tmp_path: Path) -> None:
    unet = UNet2DModel.from_pretrained(SMALL, quantization_config=fpq.FPQConfig("fp4"))

    def held() -> int:
        tensors = [*unet.parameters(), *unet.buffers()]
        tensors += [t for m in unet.modules() for t in vars(m).values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    before = held()
    assert before < 0.27 * 2 * 5_623_011
    with torch.no_grad():
        unet(torch.randn(1, 3, 32, 32), 5)
    assert held() == before


def test_a_four_bit_denoiser_takes_at_most_27_percent_of_the_half_precision_file(tmp_path: Path) -> None:
    UNet2DModel.from_pretrained(SMALL, torch_dtype=torch.float16).save_pretrained(tmp_path / "half")
    UNet2DModel.from_pretrained(SMALL, quantization_config=fpq.FPQConfig("fp4")).save_pretrained(tmp_path / "fp4")
    half, fp4 = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("half", "fp4"))
    assert half > 2 * 5_623_011
    assert fp4 <= 0.27 * half


# --- quantizing at load ----------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Any, ...]] = {
    "fp4": ("fp4",),
    "fp6 per tensor": ("fp6", "tensor"),
    "e2m2, 5 bits": ("e2m2",),
    "float8_e4m3fn": ("hardware_fp8",),
    "asymmetric int3": ("uint3",),
    "float4 by group": (["float4_e2m1fn"], "group", 4, ["conv_in"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_full_precision_model_is_quantized_to_nearest_while_it_is_loaded(name: str, tmp_path: Path) -> None:
    directory, config = save_tiny(tmp_path / "tiny") + "/unet", fpq.FPQConfig(*CONFIGS[name])
    unet = UNet2DModel.from_pretrained(directory, quantization_config=config)
    unet.save_pretrained(tmp_path / "packed")
    again = UNet2DModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(output(again), output(unet))
    stored, full = read_denoiser(tmp_path / "packed"), tiny_pipeline().unet
    for layer_name, layer in full.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        expected = layer.weight.detach()
        if layer_name not in config.modules_to_not_convert:
            rows = config.recipe.granularity().rows(expected)
            expected = search_tensor_error(rows, config.recipe.weight_formats())(rows).reshape(expected.shape)
            assert isinstance(unet.get_submodule(layer_name), PackedLayer)
        assert stored[f"{layer_name}.weight"].tobytes() == expected.numpy().tobytes()
        assert stored[f"{layer_name}.bias"].tobytes() == layer.bias.detach().numpy().tobytes()


@pytest.mark.parametrize("name", ["unet", "conditional_unet", "dit", "flux"])
def test_every_kind_of_denoiser_is_quantized_saved_and_opened(
    name: str, tmp_path: Path, make_network: MakeNetwork
) -> None:
    network, inputs = make_network(name, 2)
    network.save_pretrained(tmp_path / "full")
    kind = getattr(diffusers, type(network).__name__)
    quantized = kind.from_pretrained(tmp_path / "full", quantization_config=fpq.FPQConfig("fp4"))
    quantized.save_pretrained(tmp_path / "packed")
    opened = kind.from_pretrained(tmp_path / "packed")
    layers = [n for n, m in network.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert [*packed_layers(opened)] == layers
    with torch.no_grad():
        found, expected, full = (model(**inputs)[0] for model in (opened, quantized, network))
    assert torch.equal(found, expected)
    assert not torch.equal(found, full)


def test_modules_to_not_convert_are_names_of_layers_and_modules_and_patterns(tmp_path: Path) -> None:
    patterns = ["conv_in", "time_embedding", "to_?", "up_blocks.*.conv1"]
    config = fpq.FPQConfig("fp8", modules_to_not_convert=patterns)
    unet = UNet2DModel.from_pretrained(save_tiny(tmp_path / "tiny") + "/unet", quantization_config=config)
    layers = {n for n, m in tiny_pipeline().unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    left = layers - packed_layers(unet).keys()
    ends = (".to_q", ".to_k", ".to_v")
    expected = {n for n in layers if n == "conv_in" or n.startswith("time_embedding.") or n.endswith(ends)}
    expected |= {n for n in layers if n.startswith("up_blocks.") and n.endswith(".conv1")}
    assert len(expected) == 1 + 2 + 3 + 4
    assert left == expected
    assert unet.config.quantization_config.to_dict()["recipe"]["exclude"] == sorted(expected)


def test_a_pipeline_takes_the_configuration_of_its_denoiser(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    chosen = PipelineQuantizationConfig(quant_mapping={"unet": fpq.FPQConfig("fp8")})
    pipeline = DiffusionPipeline.from_pretrained(model, quantization_config=chosen)
    assert packed_layers(pipeline.unet)
    pipeline.save_pretrained(tmp_path / "packed")
    assert torch.equal(output(fpq.load_quantized(tmp_path / "packed").unet), output(pipeline.unet))


def test_dequantize_gives_a_plain_model_with_the_quantized_weights(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "tiny") + "/unet"
    unet = UNet2DModel.from_pretrained(directory, quantization_config=fpq.FPQConfig("fp4"))
    expected = output(unet)
    unet.dequantize()
    assert {type(m).__module__.split(".")[0] for m in unet.modules()} <= {"torch", "diffusers"}
    assert torch.equal(output(unet), expected)
    unet.save_pretrained(tmp_path / "plain")
    again = UNet2DModel.from_pretrained(tmp_path / "plain").state_dict()
    assert again.keys() == tiny_pipeline().unet.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in unet.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


SCALES = {"float8_e4m3fn": 8, "float8_e8m0fnu": 24}  # and sizes of groups; 27 weights of conv_in fit neither


def blocks(directory: str, scale_format: str) -> UNet2DModel:
    config = fpq.FPQConfig("float4_e2m1fn", "group", SCALES[scale_format], scale_format=scale_format)
    with pytest.warns(UserWarning, match=r"does not divide .* of conv_in|does not divide .*, conv_in"):
        return UNet2DModel.from_pretrained(directory, quantization_config=config)


@pytest.mark.parametrize("scale_format", SCALES)
def test_blocks_are_quantized_while_a_model_is_loaded(scale_format: str, tmp_path: Path) -> None:
    unet = blocks(save_tiny(tmp_path / "tiny") + "/unet", scale_format)
    unet.save_pretrained(tmp_path / "packed")
    described = quantization_config(tmp_path / "packed")["layers"]
    formats = {name: entry["weights"][0].get("scale_format") for name, entry in described.items()}
    assert formats["conv_in"] is None
    assert formats["mid_block.resnets.0.conv1"] == scale_format
    stored = read_denoiser(tmp_path / "packed")
    for name, layer in packed_layers(unet).items():
        assert stored[f"{name}.weight"].tobytes() == layer.decode_weight().numpy().tobytes()
    again = UNet2DModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(output(again), output(unet))


def _nothing(of: Any) -> None:
    pass


def _byte(value: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda t: t["block_scale"].view(torch.uint8)[0].fill_(value)


E4M3, E8M0 = SCALES
BLOCK_DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "a block scale of zero": (E4M3, _nothing, _byte(0), "block_scale holds a scale"),
    "a block scale that is NaN": (E4M3, _nothing, _byte(0x7F), "block_scale holds a scale"),
    "a negative block scale": (E4M3, _nothing, _byte(0x81), "block_scale holds a scale"),
    "a power of two that is NaN": (E8M0, _nothing, _byte(255), "block_scale holds a scale"),
    "a tensor scale of zero": (E4M3, _nothing, lambda t: t["tensor_scale"].zero_(), "tensor_scale holds a scale"),
    "an unknown scale format": (E4M3, lambda e: e.update(scale_format="e4m3"), _nothing, "scales .* of e4m3"),
    "another scale format": (E4M3, lambda e: e.update(scale_format=E8M0), _nothing, "tensor_scale, which"),
    "an offset": (E8M0, lambda e: e.update(offset=True), _nothing, "scales .* of float8_e8m0fnu"),
}


@pytest.mark.filterwarnings("ignore:group_size")
@pytest.mark.parametrize("name", BLOCK_DAMAGES)
def test_damaged_block_scales_are_one_line(name: str, tmp_path: Path) -> None:
    scale_format, change, spoil, message = BLOCK_DAMAGES[name]
    unet = blocks(save_tiny(tmp_path / "tiny") + "/unet", scale_format)
    unet.save_pretrained(tmp_path / "packed")
    layer = "mid_block.resnets.0.conv1"
    _config(lambda c: change(c["layers"][layer]["weights"][0]))(tmp_path / "packed")

    part = f"{layer}.weights.0."
    _tensors(lambda t: spoil({n.removeprefix(part): v for n, v in t.items() if n.startswith(part)}))(
        tmp_path / "packed"
    )
    with pytest.raises(ValueError, match=message) as error:
        UNet2DModel.from_pretrained(tmp_path / "packed")
    assert "\n" not in str(error.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown format": ({"weights": "fp5"}, "unknown format 'fp5'"),
    "a group size without groups": ({"group_size": 16}, "group_size goes with granularity group"),
    "a group size that does not divide": ({"granularity": "group", "group_size": 5}, "conv_in: group_size 5"),
    "a pattern that matches nothing": ({"modules_to_not_convert": "decoder"}, "'decoder' matches none"),
    "nothing left": ({"modules_to_not_convert": "*"}, "no Linear or Conv layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_one_line(name: str, tmp_path: Path) -> None:
    options, message = WRONG[name]
    directory = save_tiny(tmp_path / "tiny") + "/unet"
    with pytest.raises(ValueError, match=message) as error:
        UNet2DModel.from_pretrained(directory, quantization_config=fpq.FPQConfig(**options))
    assert "\n" not in str(error.value)


def test_a_weight_that_is_not_finite_is_refused_by_its_name(tmp_path: Path) -> None:
    def damage(unet: nn.Module) -> None:
        unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = math.nan

    directory = save_tiny(tmp_path / "tiny", damage=damage) + "/unet"
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1\.weight holds NaN"):
        UNet2DModel.from_pretrained(directory, quantization_config=fpq.FPQConfig("fp4"))


# --- damage ----------------------------------------------------------------------------------------------------


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(unet: Path) -> None:
        config = json.loads((unet / "config.json").read_text())
        change(config["quantization_config"])
        (unet / "config.json").write_text(json.dumps(config))

    return edit


def _layer(**entries: Any) -> Callable[[Path], None]:
    return _config(lambda c: c["layers"]["conv_in"].update(entries))


def _part(**entries: Any) -> Callable[[Path], None]:
    return _config(lambda c: c["layers"]["conv_in"]["weights"][0].update(entries))


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(unet: Path) -> None:
        tensors = load_file(unet / WEIGHTS)
        change(tensors)
        save_file(tensors, unet / WEIGHTS, {"format": "pt"})

    return edit


def _cut(unet: Path) -> None:
    data = (unet / WEIGHTS).read_bytes()
    (unet / WEIGHTS).write_bytes(data[:-1000])


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(unet: Path) -> None:
        data = (unet / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (unet / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return edit


def _pickled(unet: Path) -> None:
    torch.save(load_file(unet / WEIGHTS), unet / "diffusion_pytorch_model.bin")
    (unet / WEIGHTS).unlink()


CODES, SCALE, INPUT = "conv_in.weights.0.codes", "conv_in.weights.0.scale", "conv_in.inputs.0.scale"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a newer version": (_config(lambda c: c.update(format_version=4)), "version 4; .* reads versions 2 and 3$"),
    "an older version": (_config(lambda c: c.update(format_version=1)), "version 1; .* reads versions 2 and 3$"),
    "no version": (_config(lambda c: c.pop("format_version")), "version None"),
    "no layers": (_config(lambda c: c.pop("layers")), "does not say what the layers hold"),
    "layers as a list": (_config(lambda c: c.update(layers=[1])), "does not say what the layers hold"),
    "an unknown layer": (_config(lambda c: c["layers"].update({"decoder.7": {}})), r"decoder\.7"),
    "a layer that is none": (_config(lambda c: c["layers"].update(mid_block={})), "mid_block"),
    "a layer without parts": (_config(lambda c: c["layers"]["conv_in"].pop("splits")), "conv_in: it lacks 'splits'"),
    "another shape": (_layer(shape=[2**40, 3, 3, 3]), "conv_in: its weight is"),
    "other splits": (_layer(splits=[2]), "conv_in: splits"),
    "negative splits": (_layer(splits=[5, -2]), "conv_in: splits"),
    "too many parts": (_config(lambda c: c["layers"]["conv_in"]["weights"].append({})), "conv_in: 2 weights"),
    "an unknown format": (_part(format="e99"), "conv_in: unknown format 'e99'"),
    "a format of another width": (_part(format="e4m3"), CODES.replace(".", r"\.")),
    "scales that do not divide": (_part(scales=[8, 5]), "conv_in: scales"),
    "scales as text": (_part(scales="xy"), "conv_in"),
    "other scales": (_part(scales=[1, 1]), SCALE.replace(".", r"\.")),
    "an offset that is not there": (_part(offset=True), r"conv_in\.weights\.0\.offset"),
    "no weights although there are": (_layer(weights=[]), "conv_in.weight"),
    "missing codes": (_tensors(lambda t: t.pop(CODES)), f"lack {CODES}"),
    "a missing norm": (_tensors(lambda t: t.pop("conv_norm_out.weight")), "lack conv_norm_out.weight"),
    "codes of another layer": (_tensors(lambda t: t.update({CODES: t[CODES][:, 1:].clone()})), CODES),
    "codes of another type": (_tensors(lambda t: t.update({CODES: t[CODES].float()})), f"{CODES} is F32"),
    "half scales": (_tensors(lambda t: t.update({SCALE: t[SCALE].half()})), f"{SCALE} is F16"),
    "a scale that is no number": (_tensors(lambda t: t[SCALE].fill_(math.nan)), f"{SCALE} holds a scale"),
    "an input scale without an inverse": (_tensors(lambda t: t[INPUT].fill_(1e-40)), f"{INPUT} holds a scale"),
    "a foreign tensor": (_tensors(lambda t: t.update({"conv_in.extra": t[SCALE].clone()})), r"conv_in\.extra"),
    "cut off": (_cut, r"is truncated: \S+ ends at byte"),
    "a header longer than the file": (lambda u: (u / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x00" * 99), "its header"),
    "an empty file": (lambda u: (u / WEIGHTS).write_bytes(b""), "its header"),
    "a header that is no JSON": (lambda u: (u / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"x" * 99), "header"),
    "sizes beyond memory": (_header(lambda h: h[CODES].update(shape=[2**30, 2**30])), f"damaged: {CODES}"),
    "a pickle": (_pickled, "no safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_tensor(copy: Path, damage: str) -> None:
    apply, message = DAMAGES[damage]
    apply(copy / "unet")
    with pytest.raises(ValueError, match=message) as error:
        fpq.load_quantized(copy)
    assert "\n" not in str(error.value)


def test_types_of_hardware_numbers_are_those_of_safetensors(tmp_path: Path) -> None:
    unet = UNet2DModel.from_pretrained(save_tiny(tmp_path / "t") + "/unet", quantization_config=fpq.FPQConfig("fp8"))
    unet.save_pretrained(tmp_path / "free")
    assert {kind for kind, _ in read_safetensors(tmp_path / "free" / WEIGHTS).values()} == {"U8", "F32"}
    hardware = fpq.FPQConfig(["float8_e4m3fn", "float8_e5m2"])
    unet = UNet2DModel.from_pretrained(str(tmp_path / "t" / "unet"), quantization_config=hardware)
    unet.save_pretrained(tmp_path / "hardware")
    tensors = load_file(tmp_path / "hardware" / WEIGHTS)
    kinds = {v.dtype for k, v in tensors.items() if k.endswith(".codes")}
    assert torch.float8_e4m3fn in kinds
    assert kinds <= {torch.float8_e4m3fn, torch.float8_e5m2}
    codes, scale = tensors[CODES], tensors[SCALE]  # torch reads the weight without knowing the package
    assert torch.equal(codes.float() * scale, unet.conv_in.weight.flatten(1))
