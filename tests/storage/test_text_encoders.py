"""Models of transformers are quantized while they are loaded, saved and opened, alone and in a pipeline."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from models import tiny_text_to_image
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
)

import fpq_lightning as fpq
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.quantization.quantizer import Quantizer
from fpq_lightning.quantization.search import search_tensor_error
from fpq_lightning.storage.export import export

_CLIP = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP |= {"max_position_embeddings": 16, "projection_dim": 16}
_LLM = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLM |= {"num_key_value_heads": 1, "head_dim": 8}

MODELS: dict[str, tuple[type[Any], Any, int]] = {  # class, configuration, layers that are quantized
    "CLIP": (CLIPTextModel, CLIPTextConfig(**_CLIP), 12),
    "CLIP with projection": (CLIPTextModelWithProjection, CLIPTextConfig(**_CLIP), 13),
    "T5": (T5EncoderModel, T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2), 10),
    "Gemma": (Gemma2Model, Gemma2Config(**_LLM), 14),
    "Qwen with a tied head": (Qwen2ForCausalLM, Qwen2Config(**_LLM, tie_word_embeddings=True), 14),
}


def _saved(name: str, directory: Path) -> Any:
    torch.manual_seed(0)
    kind, config, _ = MODELS[name]
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def _output(model: nn.Module) -> Tensor:
    return model(torch.arange(10)[None])[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_text_encoder_is_quantized_saved_and_opened(name: str, tmp_path: Path) -> None:
    plain, (kind, _, n_layers) = _saved(name, tmp_path / "plain"), MODELS[name]
    model = kind.from_pretrained(tmp_path / "plain", quantization_config=fpq.FPQConfig("e3m2"))
    layers = packed_layers(model)
    assert len(layers) == n_layers
    for key, layer in layers.items():
        rows = plain.get_submodule(key).weight.detach()
        quantizer: Quantizer = search_tensor_error(rows, [fpq.parse_format("e3m2")])
        assert torch.equal(layer.decode_weight(), quantizer.decode(quantizer.encode(rows)))
    error = (_output(model) - _output(plain)).norm() / _output(plain).norm()
    assert 0 < error < 0.5
    model.save_pretrained(tmp_path / "packed")
    opened = kind.from_pretrained(tmp_path / "packed")
    assert torch.equal(_output(opened), _output(model))
    again = copy.deepcopy(opened)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(_output(kind.from_pretrained(tmp_path / "again")), _output(model))
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("packed", "plain")]
    assert sizes[0] < 0.75 * sizes[1]
    opened.dequantize()
    assert not packed_layers(opened)
    assert not hasattr(opened.config, "quantization_config")
    torch.testing.assert_close(_output(opened), _output(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", ["e3m2", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["CLIP", "T5"])
def test_codes_and_scales_keep_their_types_in_a_model_of_half_precision(name: str, fmt: str, tmp_path: Path) -> None:
    _saved(name, tmp_path / "plain")
    kind = MODELS[name][0]
    kind.from_pretrained(tmp_path / "plain", quantization_config=fpq.FPQConfig(fmt)).save_pretrained(tmp_path / "q")
    exact = kind.from_pretrained(tmp_path / "q")
    for model in (kind.from_pretrained(tmp_path / "q", dtype=torch.bfloat16), exact.to(torch.bfloat16)):
        assert _output(model).dtype == torch.bfloat16
        for key, layer in packed_layers(model).items():
            held = packed_layers(exact)[key]
            assert layer.weights[0].codes.dtype == held.weights[0].codes.dtype
            assert torch.equal(layer.decode_weight(), held.decode_weight())


def test_layers_are_left_out_by_name_and_mistakes_are_one_line(tmp_path: Path) -> None:
    _saved("CLIP", tmp_path / "plain")

    def load(**options: Any) -> Any:
        return CLIPTextModel.from_pretrained(tmp_path / "plain", quantization_config=fpq.FPQConfig(**options))

    model = load(modules_to_not_convert=["q_proj"])
    assert len(packed_layers(model)) == 10
    with pytest.raises(ValueError, match="'none' matches none of the 12 layers"):
        load(modules_to_not_convert=["none"])
    with pytest.raises(ValueError, match="that of a quantized model: give a new FPQConfig"):
        CLIPTextModel.from_pretrained(tmp_path / "plain", quantization_config=model.config.quantization_config)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], str], Any], str]] = {
    "a tensor less": (lambda tensors, key: tensors.pop(key), "lack .*codes"),
    "another type": (lambda t, key: t.update({key: t[key].float()}), "codes is F32 in the files, but should be U8"),
    "another shape": (lambda t, key: t.update({key: t[key][:3].contiguous()}), "mismatched"),
    "a negative scale": (
        lambda t, key: t[key.replace("codes", "scale")].neg_(),
        "scale holds a scale that is no positive",
    ),
    "an integer bias": (
        lambda t, key: t.update({(bias := key.replace("weights.0.codes", "bias")): t[bias].long()}),
        "bias is I64 in the files, but should be one of",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_a_text_encoder_are_refused(damage: str, tmp_path: Path) -> None:
    _saved("CLIP", tmp_path / "plain")
    config = fpq.FPQConfig("fp4")
    CLIPTextModel.from_pretrained(tmp_path / "plain", quantization_config=config).save_pretrained(tmp_path / "packed")
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    tensors = load_file(file)
    change, message = DAMAGES[damage]
    change(tensors, next(key for key in tensors if key.endswith("codes")))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        CLIPTextModel.from_pretrained(tmp_path / "packed")


def test_an_adapter_is_saved_alone_and_leaves_no_traces(tmp_path: Path) -> None:
    _saved("CLIP", tmp_path / "plain")
    model = CLIPTextModel.from_pretrained(tmp_path / "plain", quantization_config=fpq.FPQConfig("fp4"))
    before = _output(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.allclose(_output(model), before)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(_output(CLIPTextModel.from_pretrained(tmp_path / "packed")), before)


# --- pipelines -------------------------------------------------------------------------------------------------


def _image(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np").images)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_text_to_image(tmp_path_factory.mktemp("model") / "model")


def test_a_pipeline_is_quantized_by_the_name_of_the_method(model: str, tmp_path: Path) -> None:
    chosen = ["unet", "text_encoder"]
    config = PipelineQuantizationConfig("fpq", {"weights": "fp4"}, components_to_quantize=chosen)
    pipeline = DiffusionPipeline.from_pretrained(model, quantization_config=config)
    assert packed_layers(pipeline.unet)
    assert packed_layers(pipeline.text_encoder)
    assert not packed_layers(pipeline.vae)
    image = _image(pipeline)
    pipeline.save_pretrained(tmp_path / "packed")
    assert torch.equal(_image(fpq.load_quantized(tmp_path / "packed")), image)
    export(tmp_path / "packed", tmp_path / "again", "fpq")
    assert torch.equal(_image(DiffusionPipeline.from_pretrained(tmp_path / "again")), image)
    export(tmp_path / "packed", tmp_path / "plain", "dequantized")
    for part in chosen:
        assert "quantization_config" not in json.loads((tmp_path / "plain" / part / "config.json").read_text())
    torch.testing.assert_close(
        _image(DiffusionPipeline.from_pretrained(tmp_path / "plain")), image, rtol=1e-3, atol=1e-4
    )


def test_all_components_are_quantized_where_none_is_named(model: str) -> None:
    config = PipelineQuantizationConfig("fpq", {"weights": "fp8"})
    pipeline = DiffusionPipeline.from_pretrained(model, quantization_config=config)
    assert all(packed_layers(part) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
