"""Exports for other libraries, decoded by theirs: diffusers, compressed-tensors, ml_dtypes; bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.quantizers.bfl.bfl_quantizer import BFLQuantizer
from diffusers.quantizers.bfl.utils import _dequantize_weight
from diffusers.quantizers.quantization_config import BFLQuantizationConfig
from models import fit_arguments, run_fpq, save_tiny, tiny_pipeline
from packed_reader import read_denoiser, read_safetensors
from safetensors.torch import load_file
from torch import Tensor, nn

from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.formats.scales import parse_scale_format
from fpq_lightning.nn.convert import make_packed
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.storage.exports.nvfp4 import share_tensor_scales
from fpq_lightning.storage.exports.registry import EXPORTS

WEIGHTS = "diffusion_pytorch_model.safetensors"
E4M3_SCALES = parse_scale_format("float8_e4m3fn")
RECIPES = {
    "nvfp4": ["--config", "nvfp4"],
    "mxfp4": ["--config", "mxfp4"],
    "fp8_tensor": ["--config", "fp8_fp8_hardware", "--recipe.weights.granularity=tensor"],
    "fp8_channel": ["--config", "fp8_fp8_hardware"],
    "fp4": ["--config", "fp4_fp8"],
}
FORMS = {"nvfp4": "nvfp4", "mxfp4": "mxfp4", "fp8_tensor": "modelopt", "fp8_channel": "modelopt"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``quantized/`` of a run of each recipe."""
    from fpq_lightning.cli import main

    root = tmp_path_factory.mktemp("layouts")
    command, *options = fit_arguments(save_tiny(root / "model"), root / "run", iterations=5)
    for name, config in RECIPES.items():
        main([command, *config, *options, f"--run_dir={root / name}"])
    return {name: root / name / "quantized" for name in RECIPES}


@pytest.fixture(scope="module")
def exported(finished: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The denoiser of each run in the layout of its recipe."""
    from fpq_lightning.cli import main

    root = tmp_path_factory.mktemp("exported")
    for name, form in FORMS.items():
        main(["export", str(finished[name]), f"--format={form}", f"--output={root / name}"])
    return {name: root / name / "unet" for name in FORMS}


def config_of(unet: Path) -> dict[str, Any]:
    return json.loads((unet / "config.json").read_text())["quantization_config"]


def quantized_names(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]


def expected_weights(finished: Path) -> dict[str, Tensor]:
    """Of the packed files, by the reader of docs/format.md."""
    return {k: torch.from_numpy(np.array(v)) for k, v in read_denoiser(finished / "unet").items()}


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


# --- calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size", "bits"), [("nvfp4", 16, 4.5), ("mxfp4", 32, 4.25)])
def test_a_calibrated_model_has_the_bits_of_its_format(
    name: str, size: int, bits: float, finished: dict[str, Path]
) -> None:
    stored = read_safetensors(finished[name] / "unet" / WEIGHTS)
    layers = json.loads((finished[name] / "unet" / "config.json").read_text())["quantization_config"]["layers"]
    grouped = [n for n, entry in layers.items() if any("scale_format" in part for part in entry["weights"])]
    assert {n for n in grouped if "time" not in n} == set()  # of the tiny model only these have enough inputs
    assert len(grouped) == 9
    for layer in grouped:
        ours = [array.nbytes for n, (_, array) in stored.items() if n.startswith(f"{layer}.weights.")]
        out, n = layers[layer]["shape"]
        assert layers[layer]["weights"][0]["scales"] == [out, n // size]
        assert sum(ours) * 8 == pytest.approx(bits * out * n + (32 if name == "nvfp4" else 0))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_packed_block_scales_open_and_are_written_again_to_the_same_bytes(
    name: str, finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = UNet2DModel.from_pretrained(finished[name] / "unet", torch_dtype=torch.bfloat16)
    unet.save_pretrained(tmp_path / "again")
    half, full = load_file(tmp_path / "again" / WEIGHTS), load_file(finished[name] / "unet" / WEIGHTS)
    assert half.keys() == full.keys()
    codes_and_scales = [n for n in half if ".weights." in n]
    assert all(half[n].dtype == full[n].dtype for n in codes_and_scales)
    assert all(torch.equal(half[n].float(), full[n].float()) for n in codes_and_scales)
    unet = UNet2DModel.from_pretrained(finished[name] / "unet")
    unet.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (finished[name] / "unet" / WEIGHTS).read_bytes()
    weights = expected_weights(finished[name])
    for layer, module in unet.named_modules():
        if isinstance(module, nn.Linear):
            assert_same_bits(module.weight, weights[f"{layer}.weight"])
    # The dequantized form holds the same values, and the block scales are found in them again.
    for source, form in ((finished[name], "dequantized"), (tmp_path / "dequantized", "fpq")):
        outcome = run_fpq(capsys, ["export", str(source), f"--format={form}", f"--output={tmp_path / form}"])
        assert outcome.code == 0, outcome.err
    again = expected_weights(tmp_path / "fpq")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], weights[k]) for k in weights)
    described = [json.loads((d / "unet" / "config.json").read_text()) for d in (tmp_path / "fpq", finished[name])]
    assert described[0]["quantization_config"] == described[1]["quantization_config"]


# --- exports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_all_layers_are_either_in_the_layout_or_plain_and_ignored(
    name: str, exported: dict[str, Path], finished: dict[str, Path]
) -> None:
    tensors, config = load_file(exported[name] / WEIGHTS), config_of(exported[name])
    inside, expected = quantized_names(tensors), expected_weights(finished[name])
    model = UNet2DModel.from_config(json.loads((exported[name] / "config.json").read_text()))
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert layers == {*inside, *config["ignore"]}
    assert not {*inside} & {*config["ignore"]}
    assert len(inside) == (9 if name in ("nvfp4", "mxfp4") else 14)  # of 14 Linear layers
    known = {"weight", "bias", "weight_packed", "weight_scale", "weight_scale_2", "input_scale"}
    assert {n.rpartition(".")[2] for n in tensors} <= known
    for layer in config["ignore"]:
        assert_same_bits(tensors[f"{layer}.weight"], expected[f"{layer}.weight"])
    plain = {n: t for n, t in tensors.items() if n.endswith(".bias") or "norm" in n}
    assert all(torch.equal(t, expected[n]) for n, t in plain.items())


@pytest.mark.parametrize("name", ["nvfp4", "fp8_channel"])
def test_diffusers_decodes_the_codes_to_the_same_bits(
    name: str, exported: dict[str, Path], finished: dict[str, Path]
) -> None:
    # Its reader of checkpoints of Black Forest Labs, whose NVFP4 keys are those of ModelOpt.
    state = BFLQuantizer(BFLQuantizationConfig()).maybe_update_state_dict(load_file(exported[name] / WEIGHTS))
    expected = expected_weights(finished[name])
    read = [n for n, t in state.items() if hasattr(t, "quant_type")]
    assert len(read) == (9 if name == "nvfp4" else 14)
    for n in read:
        assert state[n].quant_type == ("nvfp4" if name == "nvfp4" else "fp8r")
        assert_same_bits(_dequantize_weight(state[n]), expected[n])


def test_compressed_tensors_decodes_the_codes_to_the_same_bits(
    exported: dict[str, Path], finished: dict[str, Path]
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(config_of(exported["mxfp4"]))
    (scheme,) = config.config_groups.values()
    assert MXFP4PackedCompressor.can_compress(nn.Linear, scheme)
    tensors, expected = load_file(exported["mxfp4"] / WEIGHTS), expected_weights(finished["mxfp4"])
    for layer in quantized_names(tensors):
        names = MXFP4PackedCompressor.compression_param_names(scheme)
        own = {n: tensors[f"{layer}.{n}"] for n in names}
        assert {n.rpartition(".")[2] for n in tensors if n.startswith(f"{layer}.")} == {*names, "bias"}
        decoded = MXFP4PackedCompressor.decompress(own, scheme)["weight"]  # bfloat16, which is exact here
        assert_same_bits(decoded.float(), expected[f"{layer}.weight"])
    # The codes of NVFP4 by its unpacking, and scales by torch: the tensor's scale times that of the block.
    tensors, expected = load_file(exported["nvfp4"] / WEIGHTS), expected_weights(finished["nvfp4"])
    for layer in quantized_names(tensors):
        codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"].float()
        values = unpack_fp4_from_uint8(codes, len(codes), 2 * codes.shape[1], torch.float32)
        scale = scale * tensors[f"{layer}.weight_scale_2"]
        assert_same_bits(values * scale.repeat_interleave(16, 1), expected[f"{layer}.weight"])


@pytest.mark.parametrize("name", FORMS)
def test_ml_dtypes_decode_the_codes_to_the_same_bits(
    name: str, exported: dict[str, Path], finished: dict[str, Path]
) -> None:
    stored, expected = read_safetensors(exported[name] / WEIGHTS), expected_weights(finished[name])
    for layer in quantized_names(dict.fromkeys(stored, torch.empty(0))):
        scale_kind, scale = stored[f"{layer}.weight_scale"]
        if name.startswith("fp8"):
            kind, codes = stored[f"{layer}.weight"]
            assert (kind, scale_kind) == ("F8_E4M3", "F32")
            assert scale.shape == (() if name == "fp8_tensor" else (len(codes),))
            values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            found = values * (scale if name == "fp8_tensor" else scale[:, None])
        else:
            kind, codes = stored[f"{layer}.weight" if name == "nvfp4" else f"{layer}.weight_packed"]
            halves = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)
            values = halves.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
            native = ml_dtypes.float8_e4m3fn if name == "nvfp4" else ml_dtypes.float8_e8m0fnu
            scales = scale.view(native).astype(np.float32)
            if name == "nvfp4":
                assert stored[f"{layer}.weight_scale_2"][0] == "F32"
                assert stored[f"{layer}.weight_scale_2"][1].shape == ()
                scales = scales * stored[f"{layer}.weight_scale_2"][1]
            assert (kind, scale_kind) == ("U8", "F8_E4M3" if name == "nvfp4" else "U8")
            found = values * np.repeat(scales, 16 if name == "nvfp4" else 32, axis=1)
        assert found.tobytes() == expected[f"{layer}.weight"].numpy().tobytes()


@pytest.mark.parametrize(("name", "top"), [("fp8_tensor", 1.0), ("nvfp4", 6.0)])
def test_input_scales_are_those_of_the_calibration(
    name: str, top: float, exported: dict[str, Path], finished: dict[str, Path]
) -> None:
    # FP8: the scale itself. NVFP4: the same largest magnitude, 448 * scale, is 6 * 448 * input_scale.
    stored, packed = (read_safetensors(d / WEIGHTS) for d in (exported[name], finished[name] / "unet"))
    found = {n.removesuffix(".input_scale"): v for n, (_, v) in stored.items() if n.endswith(".input_scale")}
    assert len(found) == (9 if name == "nvfp4" else 14)
    for layer, scale in found.items():
        assert scale.dtype == np.float32
        assert scale.shape == ()
        assert scale == pytest.approx(packed[f"{layer}.inputs.0.scale"][1] / top, rel=1e-6)


def test_configurations_say_what_readers_look_for(exported: dict[str, Path]) -> None:
    found = {name: config_of(directory) for name, directory in exported.items()}
    methods = {name: (c["quant_method"], c.get("quant_algo", c.get("format"))) for name, c in found.items()}
    assert methods == {
        "nvfp4": ("modelopt", "NVFP4"),
        "mxfp4": ("compressed-tensors", "mxfp4-pack-quantized"),
        "fp8_tensor": ("modelopt", "FP8"),
        "fp8_channel": ("modelopt", "FP8_PER_CHANNEL_PER_TOKEN"),
    }
    assert found["nvfp4"]["group_size"] == found["nvfp4"]["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert "input_scale" not in " ".join(load_file(exported["fp8_channel"] / WEIGHTS))  # a scale for each token


def test_the_dequantized_form_exports_to_the_same_layout(
    exported: dict[str, Path], finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = finished["mxfp4"]
    outcome = run_fpq(capsys, ["export", str(source), "--format=dequantized", f"--output={tmp_path / 'plain'}"])
    assert outcome.code == 0, outcome.err
    with pytest.warns(UserWarning, match="29 of 38 quantized layers do not fit this format") as warned:
        outcome = run_fpq(
            capsys, ["export", str(tmp_path / "plain"), "--format=mxfp4", f"--output={tmp_path / 'mxfp4'}"]
        )
    assert outcome.code == 0, outcome.err
    assert "\n" not in str(next(w.message for w in warned if "29 of 38" in str(w.message)))
    found, expected = load_file(tmp_path / "mxfp4" / "unet" / WEIGHTS), load_file(exported["mxfp4"] / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(found[n].shape == t.shape and found[n].dtype == t.dtype for n, t in expected.items())


@pytest.mark.parametrize("command", [["inspect"], ["predict", "--output=OUT", "--model"]])
@pytest.mark.parametrize("name", FORMS)
def test_what_diffusers_cannot_read_is_said_in_one_line(
    name: str, command: list[str], exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.replace("OUT", str(tmp_path / "out")) for word in command]
    outcome = run_fpq(capsys, [*arguments, str(exported[name].parent)])
    assert outcome.code
    assert len(outcome.errors) == 1
    method = "compressed-tensors" if name == "mxfp4" else "modelopt"
    assert f"its denoiser is stored for readers of {method}" in outcome.errors[0]


def test_exports_are_pipelines_that_say_what_they_are(exported: dict[str, Path]) -> None:
    for name, unet in exported.items():
        assert (unet.parent / "model_index.json").is_file()
        assert (unet.parent / "scheduler" / "scheduler_config.json").is_file()
        assert ("compressed-tensors" if name == "mxfp4" else "ModelOpt") in (unet.parent / "README.md").read_text()


def test_layers_that_readers_fuse_share_the_scale_of_the_tensor_where_that_is_exact() -> None:
    def layer(block: list[float], tensor: float) -> dict[str, Tensor]:
        return {"weight_scale": torch.tensor(block).to(torch.float8_e4m3fn), "weight_scale_2": torch.tensor(tensor)}

    def scales(tensors: dict[str, Tensor]) -> Tensor:
        return tensors["weight_scale"].float() * tensors["weight_scale_2"]

    layers = {"a.to_q": layer([3.5, 448.0], 2.0**-8), "a.to_k": layer([60.0, 1.25], 2.0**-6), "ff": layer([9.0], 2.0)}
    layers |= {"b.to_q": layer([2.0**-9], 1.0), "b.to_k": layer([1.0], 2.0)}  # 2^-10 is no E4M3 number
    before = {name: scales(tensors) for name, tensors in layers.items()}
    share_tensor_scales(layers)
    assert all(torch.equal(scales(tensors), before[name]) for name, tensors in layers.items())
    assert {name: tensors["weight_scale_2"].item() for name, tensors in layers.items()} == {
        "a.to_q": 2.0**-6, "a.to_k": 2.0**-6, "ff": 2.0, "b.to_q": 1.0, "b.to_k": 2.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "form", "advice"),
    [
        ("fp4", "modelopt", "--config fp8_fp8_hardware"),
        ("fp4", "nvfp4", "--config nvfp4"),
        ("mxfp4", "nvfp4", "scales for groups of 16; such layers come from fpq fit --config nvfp4"),
        ("nvfp4", "mxfp4", "scales for groups of 32; such layers come from fpq fit --config mxfp4"),
    ],
)
def test_a_model_of_which_no_layer_fits_is_one_line(
    name: str, form: str, advice: str, finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_fpq(capsys, ["export", str(finished[name]), f"--format={form}", f"--output={tmp_path / 'out'}"])
    assert outcome.code != 0
    assert len(outcome.errors) == 1
    assert "no layer fits" in outcome.errors[0]
    assert advice in outcome.errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("offset", "largest"), [(-7.0, 7.0), (-1.0, 2.0), (None, 3.0)])
def test_the_input_scale_of_nvfp4_reaches_the_larger_end_of_an_input_with_an_offset(
    offset: float | None, largest: float, tmp_path: Path
) -> None:
    """The input reaches from its offset to its offset plus 3."""
    pipeline, name = tiny_pipeline(), "time_embedding.linear_2"
    layer = pipeline.unet.get_submodule(name).requires_grad_(False)
    rows = layer.weight.reshape(-1, 16)
    weights = Quantizer(parse_format("float4_e2m1fn"), torch.ones(len(rows), 1), None, (-1,), E4M3_SCALES)
    ue4m4 = parse_format("ue4m4")
    inputs = Quantizer(ue4m4, torch.tensor(3 / ue4m4.max), None if offset is None else torch.tensor(offset))
    packed = PackedWeight.of(weights, weights.encode(rows), layer.weight.shape)
    make_packed(layer, (layer.weight.shape[1],), [packed], [inputs])
    EXPORTS["nvfp4"].convert(pipeline, {}, tmp_path)
    found = pipeline.unet.state_dict()[f"{name}.input_scale"]
    assert found.item() == pytest.approx(largest / (6 * 448))
