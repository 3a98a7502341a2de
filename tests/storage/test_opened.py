"""What diffusers and peft do to an opened model: it is right, or one line says what to do and nothing is changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import MakeNetwork
from diffusers import ControlNetModel, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, UNetMotionModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.nn.packed_layer import PackedLayer, packed_layers

TARGETS = ("to_q", "to_out.0", "conv1", "proj_in", "net.2", "x_embedder")


def network(name: str, make_network: MakeNetwork) -> tuple[Any, dict[str, Any]]:
    """A network, and its inputs."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4}
    text = {"timestep": torch.tensor([5]), "encoder_hidden_states": torch.randn(1, 5, 12)}
    if name == "sd3":
        sizes |= {"attention_head_dim": 8, "sample_size": 8, "patch_size": 1, "caption_projection_dim": 16}
        model: Any = diffusers.SD3Transformer2DModel(joint_attention_dim=12, pooled_projection_dim=12, **sizes)
        return model.eval(), {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "pooled_projections": torch.randn(1, 12),
            **text,
        }
    if name == "wan":
        sizes |= {"attention_head_dim": 12, "text_dim": 12, "freq_dim": 32, "ffn_dim": 32, "rope_max_seq_len": 32}
        model = diffusers.WanTransformer3DModel(**sizes)
        return model.eval(), {"hidden_states": torch.randn(1, 4, 1, 8, 8), **text}
    return make_network("flux" if name == "flux" else "conditional_unet")


def pipeline(name: str, model: Any) -> Any:
    """A pipeline that has nothing but its denoiser."""
    flow = FlowMatchEulerDiscreteScheduler()
    if name == "sd3":
        return diffusers.StableDiffusion3Pipeline(model, flow, *[None] * 8)
    if name == "wan":
        return diffusers.WanPipeline(None, None, None, flow, model)
    if name == "flux":
        return diffusers.FluxPipeline(flow, *[None] * 5, model)
    if name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(*[None] * 5, model, flow)
    return diffusers.StableDiffusionPipeline(*[None] * 3, model, flow, None, None, requires_safety_checker=False)


def opened(model: Any, directory: Path) -> Any:
    """A model, quantized, written to a directory and opened."""
    model.save_pretrained(directory / "plain")
    quantized = type(model).from_pretrained(directory / "plain", quantization_config=fpq.FPQConfig("fp4"))
    quantized.save_pretrained(directory / "packed")
    return type(model).from_pretrained(directory / "packed").eval()


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).sample


def lora(model: nn.Module, component: str, rank: int = 2) -> dict[str, Tensor]:
    """An adapter of some layers, as files hold it."""
    draw, found = torch.Generator().manual_seed(1), {}
    for name, layer in model.named_modules():
        if name.endswith(TARGETS) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            out, n, *kernel = layer.weight.shape
            ones = [1] * len(kernel)
            found[f"{component}.{name}.lora_A.weight"] = torch.randn(rank, n, *kernel, generator=draw) / 4
            found[f"{component}.{name}.lora_B.weight"] = torch.randn(out, rank, *ones, generator=draw) / 4
    return found


@pytest.fixture
def unet(make_network: MakeNetwork, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    model, inputs = make_network("conditional_unet")
    return opened(model, tmp_path), inputs


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message) as error:
        action()
    assert "\n" not in str(error.value)


# --- adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "sd", "sdxl"])
def test_adapters_go_on_and_off_through_the_pipeline(name: str, make_network: MakeNetwork, tmp_path: Path) -> None:
    plain, inputs = network(name, make_network)
    model = opened(plain, tmp_path)
    component = "unet" if name.startswith("sd") and name != "sd3" else "transformer"
    before, adapter = output(model, inputs), lora(plain, component)
    assert len(adapter) > 4
    ours = pipeline(name, model)
    ours.load_lora_weights(dict(adapter), adapter_name="style")
    adapted = output(model, inputs)

    other = type(plain).from_pretrained(tmp_path / "packed").eval()
    other.dequantize()
    pipeline(name, other).load_lora_weights(dict(adapter), adapter_name="style")
    torch.testing.assert_close(adapted, output(other, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, before, rtol=1e-2)

    refused(lambda: model.save_pretrained(tmp_path / "adapted"), "belongs to an adapter.*save_lora_adapter")
    assert not (tmp_path / "adapted").exists()
    model.save_lora_adapter(tmp_path / "lora", "style")
    ours.delete_adapters("style")
    assert torch.equal(output(model, inputs), before)
    model.save_pretrained(tmp_path / "deleted")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "deleted").eval(), inputs), before)
    model.load_lora_adapter(
        tmp_path / "lora", prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
    )
    assert torch.equal(output(model, inputs), adapted)
    ours.unload_lora_weights()
    assert torch.equal(output(model, inputs), before)
    assert len(packed_layers(model)) == len(packed_layers(type(model).from_pretrained(tmp_path / "packed")))
    model.save_pretrained(tmp_path / "unloaded")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "unloaded").eval(), inputs), before)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_an_adapter_that_does_not_fit_leaves_the_pipeline_as_it_was(
    name: str, make_network: MakeNetwork, tmp_path: Path
) -> None:
    plain, inputs = network(name, make_network)
    model = opened(plain, tmp_path)
    before, adapter = output(model, inputs), lora(plain, "transformer")
    wrong = next(key for key in adapter if "lora_B" in key)
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipeline(name, model).load_lora_weights(adapter | {wrong: torch.randn(3, 2)}, adapter_name="style")
    assert torch.equal(output(model, inputs), before)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "again").eval(), inputs), before)


def test_a_control_adapter_that_widens_a_layer_works_on_its_decoded_weight(
    make_network: MakeNetwork, tmp_path: Path
) -> None:
    plain, inputs = network("flux", make_network)
    model = opened(plain, tmp_path)
    before, adapter = output(model, inputs), lora(plain, "transformer")
    adapter["transformer.x_embedder.lora_A.weight"] = torch.randn(2, 8)
    wide = inputs | {"hidden_states": torch.randn(1, 4, 8)}
    control = diffusers.FluxControlPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, model)
    control.load_lora_weights(dict(adapter))
    other = type(plain).from_pretrained(tmp_path / "packed").eval()
    other.dequantize()
    diffusers.FluxControlPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, other).load_lora_weights(adapter)
    torch.testing.assert_close(output(model, wide), output(other, wide), rtol=1e-4, atol=1e-5)
    control.unload_lora_weights(reset_to_overwritten_params=True)
    assert torch.equal(output(model, inputs), before)
    refused(lambda: model.save_pretrained(tmp_path / "x"), "x_embedder.weight was not in the model when it was opened")


def test_what_is_saved_of_a_copy_opens_or_is_refused(unet: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    model, inputs = unet
    again = copy.deepcopy(model)
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "copy").eval(), inputs), output(model, inputs))
    again.add_adapter(LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]))
    refused(lambda: again.save_pretrained(tmp_path / "adapted"), "belongs to an adapter")
    model.conv_out = nn.Conv2d(8, 4, 3, padding=1)
    refused(lambda: model.save_pretrained(tmp_path / "changed"), "conv_out.weight was not in the model")
    model.conv_out = nn.Identity()
    refused(lambda: model.save_pretrained(tmp_path / "changed"), "conv_out.* was taken out of the model")
    assert not (tmp_path / "changed").exists()


def test_a_pickle_of_a_packed_model_is_refused(unet: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    refused(lambda: unet[0].save_pretrained(tmp_path / "x", safe_serialization=False), "safetensors only")
    assert not list((tmp_path / "x").glob("*.bin"))


# --- state dicts -----------------------------------------------------------------------------------------------


def test_a_state_dict_knows_the_weights_of_packed_layers_and_lists_none(
    unet: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    model = unet[0]
    state = model.state_dict()
    assert torch.equal(state["conv_in.weight"], model.conv_in.weight)
    assert "conv_in.weight" not in state
    with pytest.raises(KeyError, match="conv_norm_out"):
        state["conv_norm_out.scale"]
    with pytest.raises(KeyError, match="conv_in"):
        model.conv_in.state_dict()["conv_in.weight"]
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for other in (loaded, copy.deepcopy(state)):
        assert type(other) is type(other._metadata["conv_in"]) is OrderedDict
        assert list(other) == list(state)
        model.load_state_dict(other)


@pytest.mark.parametrize("strict", [True, False])
def test_plain_and_packed_layers_refuse_the_states_of_each_other(
    strict: bool, unet: tuple[Any, dict[str, Any]], make_network: MakeNetwork
) -> None:
    (model, inputs), plain = unet, make_network("conditional_unet")[0]
    before = output(model, inputs)
    refused(lambda: plain.load_state_dict(model.state_dict(), strict=strict), "not packed .* call dequantize")
    refused(lambda: plain.mid_block.load_state_dict(model.mid_block.state_dict(), strict=strict), "call dequantize")
    refused(lambda: model.load_state_dict(plain.state_dict(), strict=strict), "conv_in.weight: a packed layer cannot")
    assert torch.equal(output(model, inputs), before)
    model.mid_block.load_state_dict(model.mid_block.state_dict(), strict=strict)
    assert torch.equal(output(model, inputs), before)


# --- models made of others -------------------------------------------------------------------------------------


def test_no_other_model_is_made_of_a_quantized_one(
    unet: tuple[Any, dict[str, Any]], make_network: MakeNetwork, tmp_path: Path
) -> None:
    model, inputs = unet
    before = output(model, inputs)
    refused(lambda: ControlNetModel.from_unet(model), "call dequantize")
    refused(lambda: UNetMotionModel.from_unet2d(model), "call dequantize")
    refused(lambda: type(model).from_config(model.config), "configuration is that of a quantized model")
    refused(lambda: type(model).from_config(dict(copy.deepcopy(model.config))), "that of a quantized model")
    flux = opened(make_network("flux")[0], tmp_path / "flux")
    refused(lambda: FluxControlNetModel.from_transformer(flux, num_layers=1, num_single_layers=1), "quantized model")
    assert torch.equal(output(model, inputs), before)
    assert "quantization_config" in repr(model.config)
    model.dequantize()
    again = type(model).from_config(model.config)
    assert "quantization_config" not in again.config
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again.eval(), inputs), output(model, inputs))
    control = ControlNetModel.from_unet(model)
    assert torch.equal(control.conv_in.weight, model.conv_in.weight)


def test_moving_averages_follow_the_parameters_that_are_left(unet: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    model, inputs = unet
    before = output(model, inputs)
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    average.step(model.parameters())
    average.copy_to(model.parameters())
    assert torch.equal(output(model, inputs), before)
    refused(lambda: average.save_pretrained(tmp_path / "average"), "that of a quantized model")
    assert not (tmp_path / "average").exists()
    opened_again = EMAModel.from_pretrained(tmp_path / "packed", type(model))
    assert all(map(torch.equal, opened_again.shadow_params, model.parameters()))


@pytest.mark.parametrize("name", ["flux", "sd"])
def test_packed_projections_are_not_fused(name: str, make_network: MakeNetwork, tmp_path: Path) -> None:
    plain, inputs = network(name, make_network)
    model = opened(plain, tmp_path)
    before = output(model, inputs)
    refused(model.fuse_qkv_projections, "packed projections cannot be fused.*dequantize")
    assert torch.equal(output(model, inputs), before)
    model.save_pretrained(tmp_path / "again")
    model.dequantize()
    unfused = output(model, inputs)
    with torch.no_grad():
        model.fuse_qkv_projections()
    torch.testing.assert_close(output(model, inputs), unfused, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(layer, PackedLayer) for layer in model.modules())
