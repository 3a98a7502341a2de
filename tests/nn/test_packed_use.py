"""What users do with a packed model: adapters, copies, calls by keyword, configurations used again, plain models."""

from __future__ import annotations

import copy
import gc
import io
import json
from pathlib import Path

import pytest
import torch
from conftest import MakeNetwork
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from models import tiny_text_to_image
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_backends import packed_linear
from test_packed import calibrate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fpq_lightning as fpq
from fpq_lightning.nn.attention import quantized_attention
from fpq_lightning.nn.backends.hardware import Hardware
from fpq_lightning.nn.calibrated import Granularity, LayerQuantization
from fpq_lightning.nn.convert import make_attention_quantized, make_quantized
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.storage.export import export
from fpq_lightning.storage.inspect import inspect_pipeline


@pytest.fixture
def directory(make_network: MakeNetwork, tmp_path: Path) -> Path:
    make_network("conditional_unet")[0].save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def load(directory: Path, **options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(directory, quantization_config=fpq.FPQConfig("fp4"), **options)


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return unet(x.to(unet.dtype), torch.tensor(300), text.to(unet.dtype)).sample


def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpq_lightning.nn.backends.paths.hardware_of", lambda device: Hardware((9, 0)))


# --- adapters --------------------------------------------------------------------------------------------------


def test_an_adapter_is_not_fused_into_a_packed_weight_but_into_that_of_a_dequantized_model(directory: Path) -> None:
    unet = load(directory)
    plain = output(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapted = output(unet)
    assert not torch.allclose(adapted, plain)
    with pytest.raises(RuntimeError, match="dequantize"):
        unet.fuse_lora()
    assert torch.equal(output(unet), adapted)
    unet.dequantize()
    unet.fuse_lora()
    torch.testing.assert_close(output(unet), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_begin_by_changing_the_weight_are_refused(start: str, directory: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be written"):
        load(directory).add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=start))


def test_a_read_weight_can_be_computed_with_and_not_written() -> None:
    layer = packed_linear("e2m1")
    weight = layer.weight
    assert torch.equal(weight + 0, layer.decode_weight().bfloat16())
    assert type(weight + 0) is type(weight.float()) is Tensor
    for write in (
        lambda: weight.mul_(2),
        lambda: weight.data.copy_(weight + 1),
        lambda: weight.data.__iadd__(1),
        lambda: setattr(layer.weight, "data", weight + 1),
        lambda: weight.__setitem__(0, 1),
    ):
        with pytest.raises(RuntimeError, match="cannot be written"):
            write()
    with pytest.raises(RuntimeError, match="cannot be written"):
        torch.add(weight, 1, out=weight)


def test_a_read_weight_goes_wherever_a_tensor_does() -> None:
    layer, x = packed_linear("e2m1"), torch.randn(3, 48).bfloat16()
    weight, expected = layer.weight, layer.decode_weight().bfloat16()
    room, plain = torch.zeros(40, 50).bfloat16(), nn.Linear(48, 32).bfloat16()
    room[:32, :48] = weight.data
    assert torch.equal(room[:32, :48], expected)
    assert torch.equal(torch.zeros_like(weight).add_(weight), expected)
    plain.load_state_dict({"weight": weight, "bias": layer.bias})
    assert torch.equal(plain.weight, expected)
    weight.requires_grad = False
    weight.requires_grad_(False)
    file = io.BytesIO()
    torch.save({"weight": weight.data}, file)
    file.seek(0)
    copies = (copy.deepcopy(weight), torch.load(file)["weight"], torch.compile(torch.clone, backend="eager")(weight))
    for other in copies:
        assert torch.equal(other.mul_(2), expected * 2)
    parameter = nn.Parameter(weight)
    with torch.no_grad():
        assert torch.equal(parameter.mul_(2), expected * 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert nn.functional.linear(x, layer.weight).shape == (3, 32)


def test_adapters_of_convolutions_are_plain_convolutions(directory: Path) -> None:
    unet = load(directory)
    plain = output(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))  # zeros at first
    assert torch.equal(output(unet), plain)
    adapters = [m for name, m in unet.named_modules() if ".lora_" in name and isinstance(m, nn.Conv2d)]
    assert adapters
    assert not any(isinstance(m, PackedLayer) for m in adapters)


# --- calls and copies ------------------------------------------------------------------------------------------


def test_layers_take_their_input_by_keyword_as_those_of_torch_do(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = packed_linear(), torch.randn(4, 48).bfloat16()
    assert torch.equal(layer(input=x), layer(x))
    calibrated = make_quantized(nn.Conv2d(3, 4, 3), Granularity("channel"))
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(calibrated(input=x), calibrated(x))


def test_convolutions_take_an_image_without_a_batch_in_parts_too() -> None:
    torch.manual_seed(0)
    layer = packed_linear("e2m1", outputs=8, splits=(3, 3), layer=nn.Conv2d(6, 8, 3, padding=1)).float()
    x = torch.randn(6, 6, 6)  # as many rows as channels
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_copies_do_not_keep_what_was_made_of_other_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    layer, first, second, x = packed_linear(), packed_linear(), packed_linear(), torch.randn(100, 48).bfloat16()
    first.weights[0].scale.mul_(3)
    second.weights[0].scale.mul_(5)
    layer.load_state_dict(first.state_dict())
    layer(x)
    layer.load_state_dict(second.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), second(x))


def test_the_bias_of_a_packed_layer_learns_where_that_is_wished_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    layer, x = packed_linear(), torch.randn(100, 48).bfloat16()
    assert not layer(x).requires_grad
    layer.bias.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 100))


def test_biases_of_an_opened_model_do_not_learn(directory: Path, tmp_path: Path) -> None:
    load(directory).save_pretrained(tmp_path / "packed")
    for unet in (load(directory), UNet2DConditionModel.from_pretrained(tmp_path / "packed")):
        assert not any(layer.bias is not None and layer.bias.requires_grad for layer in packed_layers(unet).values())


def test_scales_made_in_inference_mode_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    layer, x = packed_linear(), torch.randn(100, 48).bfloat16()
    expected = layer(x)
    with torch.inference_mode():
        layer.inputs[0].scale = layer.inputs[0].scale.clone()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_a_network_that_calls_its_layers_by_keyword_is_calibrated_and_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: nn.Module, sample: Tensor, condition: None = None) -> Tensor:
        return self.linear_2(input=self.act(self.linear_1(input=sample)))

    monkeypatch.setattr(TimestepEmbedding, "forward", forward)
    calibrate(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"time_embedding.linear_1", "time_embedding.linear_2"} <= {e["name"] for e in report["layers"]}
    layers = inspect_pipeline(tmp_path / "run" / "quantized", Hardware((9, 0), kernels=True), torch.bfloat16)
    assert all(layer.operations > 0 for layer in layers)


def test_modules_with_quantized_attention_are_pickled_and_compiled(directory: Path) -> None:
    unet = load(directory)
    name = next(name for name, module in unet.named_modules() if name.endswith("attn1"))
    module = make_attention_quantized(unet.get_submodule(name), name, 1)
    e4m3 = fpq.parse_format("e4m3")
    module.variants["quantized"] = LayerQuantization(inputs=[Quantizer(e4m3, torch.tensor(0.01)) for _ in range(4)])
    module.set_mode("quantized")
    file = io.BytesIO()
    torch.save(unet, file)
    file.seek(0)
    for again in (copy.deepcopy(unet), torch.load(file, weights_only=False)):
        assert type(again.get_submodule(name)) is type(module)
        assert torch.equal(output(again), output(unet))
    x = torch.randn(1, 16, module.to_q.in_features)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
        module.compile(backend="eager")
        module(x)
        other = copy.deepcopy(module)
        for parameter in other.parameters():
            parameter.zero_()
        assert not torch.equal(other(x), module(x))  # which runs its own


# --- loading and leaving ---------------------------------------------------------------------------------------


def test_a_configuration_can_be_used_again_and_is_left_as_it_was(directory: Path, tmp_path: Path) -> None:
    config = fpq.FPQConfig("fp4", modules_to_not_convert="conv_in")
    before = copy.deepcopy(vars(config))
    models = [UNet2DConditionModel.from_pretrained(directory, quantization_config=config) for _ in range(2)]
    assert torch.equal(output(models[0]), output(models[1]))
    assert vars(config).keys() == before.keys()
    assert config.layers is None
    assert config.recipe == before["recipe"]
    models[0].save_pretrained(tmp_path / "packed")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "packed")
    for model in (models[0], loaded):
        with pytest.raises(ValueError, match="that of a quantized model: give a new FPQConfig"):
            UNet2DConditionModel.from_pretrained(directory, quantization_config=model.config.quantization_config)


def test_a_dictionary_without_layers_says_to_give_a_configuration(directory: Path) -> None:
    for given in ({"quant_method": "fpq", "weights": "fp4"}, fpq.FPQConfig("fp4").to_dict()):
        with pytest.raises(ValueError, match="give an FPQConfig"):
            UNet2DConditionModel.from_pretrained(directory, quantization_config=given)


def test_an_offset_that_is_no_number_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    config = fpq.FPQConfig("uint5", "tensor")
    UNet2DConditionModel.from_pretrained(directory, quantization_config=config).save_pretrained(tmp_path / "packed")
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    tensors = load_file(file)
    tensors["conv_in.weights.0.offset"].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.weights\.0\.offset holds an offset"):
        UNet2DConditionModel.from_pretrained(tmp_path / "packed")


def test_a_failed_load_leaves_garbage_collection_on(directory: Path, tmp_path: Path) -> None:
    load(directory).save_pretrained(tmp_path / "packed")
    next((tmp_path / "packed").glob("*.safetensors")).unlink()
    held = []
    try:
        UNet2DConditionModel.from_pretrained(tmp_path / "packed")
    except Exception as error:
        held.append(error)
    assert held
    assert gc.isenabled()


def test_a_dequantized_model_runs_in_its_type_and_has_plain_attention(directory: Path, tmp_path: Path) -> None:
    unet = load(directory, torch_dtype=torch.bfloat16)
    expected = output(unet)
    name = next(name for name, module in unet.named_modules() if name.endswith("attn1"))
    module = make_attention_quantized(unet.get_submodule(name), name, 1)
    module.variants["quantized"] = LayerQuantization()
    unet.dequantize()
    assert not quantized_attention(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert torch.equal(output(unet), expected)


def test_layers_that_stay_in_float32_stay_so_when_dequantized(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(directory, torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "packed")
    monkeypatch.setattr(UNet2DConditionModel, "_keep_in_fp32_modules", ["conv_in"])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    unet.dequantize()
    assert unet.conv_in.weight.dtype == unet.conv_in.bias.dtype == torch.float32
    assert unet.conv_out.weight.dtype == torch.bfloat16


def test_the_plain_form_has_no_packed_component(tmp_path: Path) -> None:
    tiny_text_to_image(tmp_path / "model")
    chosen = PipelineQuantizationConfig(quant_mapping={"unet": fpq.FPQConfig("fp8"), "vae": fpq.FPQConfig("fp8")})
    packed = DiffusionPipeline.from_pretrained(tmp_path / "model", quantization_config=chosen)
    assert packed_layers(packed.vae)
    packed.save_pretrained(tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "plain", "dequantized")
    for part in ("unet", "vae"):
        assert "quantization_config" not in json.loads((tmp_path / "plain" / part / "config.json").read_text())
    plain = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    name, layer = next(iter(packed_layers(packed.vae).items()))
    assert torch.equal(plain.vae.get_submodule(name).weight, layer.decode_weight())
