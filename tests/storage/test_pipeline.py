"""The dequantized form is a plain diffusers pipeline, and either form is written whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, DiffusionPipeline, StableCascadeDecoderPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from models import CHECKOUT, save_tiny, tiny_pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from fpq_lightning import (
    AttentionRecipe,
    CalibrationDataModule,
    Recipe,
    RoundingRecipe,
    SamplerConfig,
    load_quantized,
    quantize,
)
from fpq_lightning.diffusion.pipelines import complete_index
from fpq_lightning.nn.calibrated import quantized_layers
from fpq_lightning.nn.hashing import hash_weights
from fpq_lightning.storage.pipeline import is_quantized, read_description, save_quantized
from fpq_lightning.training.run_directory import RunDirectory, RunState
from fpq_lightning.utils.files import atomic_directory, atomic_write, write_json
from fpq_lightning.utils.provenance import fingerprint

DETAILS = {"base_model": "tiny", "recipe": {}, "version": "0", "fingerprint": "abc"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> DiffusionPipeline:
    """A calibrated pipeline, in mode learned."""
    return quantize(
        tiny_pipeline(),
        Recipe(
            attention=AttentionRecipe("fp8"),
            rounding=RoundingRecipe(start="nearest", learned=True, iterations=10, batch_size=4),
            exclude=["mid_block.attentions.0.to_q"],
        ),
        tmp_path_factory.mktemp("run") / "run",
        CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8),
        SamplerConfig(steps=4, batch_size=4),
        base_model="tiny",
        accelerator="cpu",
    )


@pytest.fixture(scope="module")
def saved(pipeline: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "quantized"
    save_quantized(pipeline, directory, DETAILS, "dequantized")
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _output(unet: nn.Module) -> Tensor:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, torch.tensor([0, 400, 999])).sample


def test_plain_diffusers_opens_it_with_the_quantized_weights_and_full_precision_activations(
    pipeline: DiffusionPipeline, saved: Path
) -> None:
    plain = DiffusionPipeline.from_pretrained(str(saved)).unet.eval()
    expected = tiny_pipeline().unet
    state = expected.state_dict()
    for name, layer in quantized_layers(pipeline.unet).items():
        quantization = layer.variants["quantized"]
        state[f"{name}.weight"] = layer.quantized_weight(quantization)
        if quantization.bias is not None:
            state[f"{name}.bias"] = quantization.bias
    expected.load_state_dict(state)
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} <= {"torch", "diffusers"}
    assert torch.equal(_output(plain), _output(expected))
    assert not torch.equal(_output(plain), _output(pipeline.unet))  # whose activations are quantized
    assert not torch.equal(_output(plain), _output(tiny_pipeline().unet))


def test_load_quantized_gives_the_output_of_the_calibrated_pipeline_bit_for_bit(
    pipeline: DiffusionPipeline, saved: Path
) -> None:
    assert torch.equal(_output(load_quantized(saved).unet), _output(pipeline.unet))


def test_weights_are_stored_as_float32_and_activation_formats_beside_them(
    pipeline: DiffusionPipeline, saved: Path
) -> None:
    tensors = load_file(saved / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors.keys() == tiny_pipeline().unet.state_dict().keys()
    description = json.loads((saved / "quantization.json").read_text())
    assert description["format_version"] == 1
    assert description["base_model"] == "tiny"
    layers = quantized_layers(pipeline.unet)
    assert description["layers"].keys() == layers.keys()
    for name, entry in description["layers"].items():
        for found, q in zip(entry["inputs"], layers[name].variants["quantized"].inputs, strict=True):
            assert found["format"] == q.format.name
            assert torch.tensor(found["scale"]) == q.scale
    assert "fpq test" in (saved / "README.md").read_text()


def test_an_opened_pipeline_that_is_saved_again_stays_quantized(saved: Path, tmp_path: Path) -> None:
    opened = load_quantized(saved)
    before = _output(opened.unet)
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(_output(opened.unet), before)
    assert is_quantized(tmp_path / "again")
    assert read_description(tmp_path / "again") == read_description(saved)
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (saved / weights).read_bytes()
    again = load_quantized(tmp_path / "again")
    assert torch.equal(_output(again.unet), before)
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(_output(load_quantized(tmp_path / "third").unet), before)


def test_saving_leaves_the_pipeline_as_it_was(pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    before, layers = _output(pipeline.unet), list(quantized_layers(pipeline.unet))
    state = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    save_quantized(pipeline, tmp_path / "q", DETAILS)
    assert list(quantized_layers(pipeline.unet)) == layers
    assert torch.equal(_output(pipeline.unet), before)
    assert all(torch.equal(v, state[k]) for k, v in pipeline.unet.state_dict().items())


@pytest.mark.parametrize("form", ["fpq", "dequantized"])
def test_saving_leaves_the_configuration_of_the_denoiser_as_it_was(
    form: str, pipeline: DiffusionPipeline, tmp_path: Path
) -> None:
    before = dict(pipeline.unet.config)
    save_quantized(pipeline, tmp_path / "q", DETAILS, form)  # type: ignore[arg-type]
    assert dict(pipeline.unet.config) == before
    assert "quantization_config" not in pipeline.unet.config


def test_is_quantized_tells_a_quantized_pipeline_from_a_plain_one(saved: Path, tmp_path: Path) -> None:
    assert is_quantized(saved)
    assert not is_quantized(save_tiny(tmp_path / "plain"))
    assert not is_quantized(tmp_path / "none")


# --- damage ----------------------------------------------------------------------------------------------------


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        description = json.loads(file.read_text())
        change(description)
        file.write_text(json.dumps(description))

    return edit


def _first(description: dict[str, Any]) -> dict[str, Any]:
    return description["layers"]["conv_in"]


def _operands(description: dict[str, Any]) -> list[dict[str, Any]]:
    return description["attention"]["mid_block.attentions.0"]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: f.write_text(f.read_text()[:500]), "cannot be read"),
    "empty": (lambda f: f.write_text(""), "cannot be read"),
    "a list": (lambda f: f.write_text("[1, 2]"), "cannot be read"),
    "binary": (lambda f: f.write_bytes(bytes(range(256))), "cannot be read"),
    "without layers": (_edit(lambda d: d.pop("layers")), "cannot be read"),
    "a newer version": (_edit(lambda d: d.update(format_version=2)), "version 2"),
    "an unknown layer": (_edit(lambda d: d["layers"].update({"decoder.7": _first(d)})), r"decoder\.7"),
    "a layer that is none": (_edit(lambda d: d["layers"].update({"mid_block": _first(d)})), "mid_block"),
    "an unknown format": (_edit(lambda d: _first(d)["inputs"][0].update(format="e99")), "e99"),
    "splits that do not fit": (_edit(lambda d: _first(d).update(splits=[2])), "splits|conv_in"),
    "a layer without inputs": (_edit(lambda d: _first(d).pop("inputs")), "quantization.json|conv_in"),
    "an input without a scale": (_edit(lambda d: _first(d)["inputs"][0].pop("scale")), "quantization.json|conv_in"),
    "a scale that is text": (_edit(lambda d: _first(d)["inputs"][0].update(scale="x")), "quantization.json|conv_in"),
    "attention as a list": (_edit(lambda d: d.update(attention=[1])), "quantization.json"),
    "attention of a layer": (_edit(lambda d: d["attention"].update(conv_in=_operands(d))), "conv_in, which is no"),
    "attention of nothing": (_edit(lambda d: d["attention"].update({"mid.7": _operands(d)})), r"mid\.7, which is no"),
    "an operand too few": (_edit(lambda d: _operands(d).pop()), "3 quantizers for the attention of mid_block"),
    "no operands": (_edit(lambda d: _operands(d).clear()), "0 quantizers for the attention of mid_block"),
    "layers as a list": (_edit(lambda d: d.update(layers=[1])), "quantization.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_one_line_that_says_what_is_wrong(copy: Path, damage: str) -> None:
    apply, message = DAMAGES[damage]
    apply(copy / "quantization.json")
    with pytest.raises(ValueError, match=message) as error:
        load_quantized(copy)
    assert "\n" not in str(error.value)


def test_a_missing_quantized_directory_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model"):
        load_quantized(tmp_path / "none")


# --- whole or not at all ---------------------------------------------------------------------------------------


def _full_disk(pipeline: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, directory: Path, *args: Any, **kwargs: Any) -> None:
        (Path(directory) / "unet").mkdir()
        (Path(directory) / "unet" / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipeline), "save_pretrained", fail)


def test_a_full_disk_leaves_neither_a_directory_nor_temporary_files(
    pipeline: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full_disk(pipeline, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(pipeline, tmp_path / "run" / "quantized", DETAILS)
    assert list((tmp_path / "run").iterdir()) == []
    assert len(quantized_layers(pipeline.unet)) > 10  # and the pipeline can still be saved elsewhere


def test_a_good_directory_survives_a_failed_overwrite(
    pipeline: DiffusionPipeline, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {str(f.relative_to(copy)): f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    _full_disk(pipeline, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(pipeline, copy, DETAILS)
    assert {str(f.relative_to(copy)): f.read_bytes() for f in copy.rglob("*") if f.is_file()} == before
    assert [f.name for f in copy.parent.iterdir()] == [copy.name]


def test_a_non_finite_quantized_weight_is_refused_and_nothing_is_written(
    pipeline: DiffusionPipeline, tmp_path: Path
) -> None:
    quantizer = pipeline.unet.conv_in.variants["quantized"].weights[0]
    scale = quantizer.scale.clone()
    try:
        quantizer.scale[0] = torch.nan
        with pytest.raises(ValueError, match="conv_in"):
            save_quantized(pipeline, tmp_path / "q", DETAILS)
    finally:
        quantizer.scale.copy_(scale)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_directory_replaces_the_old_one_entirely(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    for name in ("old", "new"):
        with atomic_directory(target) as temporary:
            (temporary / name).write_text(name)
    assert [f.name for f in target.iterdir()] == ["new"]
    assert [f.name for f in target.parent.iterdir()] == ["b"]


def test_the_old_directory_survives_until_the_new_one_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "quantized"
    with atomic_directory(target) as temporary:
        (temporary / "old").write_text("old")

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.replace", fail)
    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="Input/output"), atomic_directory(target) as temporary:
        (temporary / "new").write_text("new")
    assert [f.name for f in target.iterdir()] == ["old"]


def test_a_whole_file_appears_only_once_written(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"a": 1})

    def half() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert json.loads(target.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


# --- run directories -------------------------------------------------------------------------------------------


def test_a_run_directory_is_new_then_unfinished_then_finished(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {"a": {"b": 1}})
    assert run.state() is RunState.NEW
    with run.working():
        pass
    assert run.state() is RunState.NEW
    run.checkpoints.mkdir()
    (run.checkpoints / "last.ckpt").write_bytes(b"")
    assert run.state() is RunState.UNFINISHED
    run.quantized.mkdir()
    assert run.state() is RunState.UNFINISHED
    run.report.write_text("{}")
    assert run.state() is RunState.FINISHED
    with pytest.raises(ValueError, match=r"a\.b: 1 -> 2"):
        RunDirectory(tmp_path / "run", {"a": {"b": 2}}).state()


def test_fingerprints_follow_every_weight_bit_and_every_part() -> None:
    unet = tiny_pipeline().unet
    before = hash_weights(unet)
    assert hash_weights(tiny_pipeline().unet) == before
    with torch.no_grad():
        unet.conv_out.bias[0] = torch.nextafter(unet.conv_out.bias[0], torch.tensor(9.0))
    assert hash_weights(unet) != before
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


def test_the_embedded_model_opens() -> None:
    pipeline = DiffusionPipeline.from_pretrained(str(CHECKOUT / "data" / "cifar10-ddpm-small"))
    assert 5e6 < sum(p.numel() for p in pipeline.unet.parameters()) < 6e6


def test_a_component_of_a_class_that_diffusers_does_not_offer_is_opened_by_plain_diffusers(tmp_path: Path) -> None:
    pixels = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=8, levels=1, embed_dim=16, latent_channels=4)
    others = dict.fromkeys(("decoder", "tokenizer", "text_encoder"))
    written = StableCascadeDecoderPipeline(vqgan=pixels, scheduler=DDPMWuerstchenScheduler(), **others)
    written.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "model_index.json").read_text())
    with pytest.raises(ValueError, match="no class `PaellaVQModel`"):  # or there is nothing to mend any more
        DiffusionPipeline.from_pretrained(tmp_path, **others)
    complete_index(written, tmp_path)
    after = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: entry for name, entry in before.items() if after[name] != entry} == {"vqgan": before["vqgan"]}
    code = "import sys; from diffusers import *; DiffusionPipeline.from_pretrained(sys.argv[1], **eval(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, tmp_path, str(others)], check=True)
    opened = DiffusionPipeline.from_pretrained(tmp_path, **others)
    assert all(map(torch.equal, opened.vqgan.state_dict().values(), pixels.state_dict().values()))


def test_an_index_in_which_all_classes_are_found_stays_as_diffusers_wrote_it(tmp_path: Path) -> None:
    written = tiny_pipeline()
    written.save_pretrained(tmp_path)
    before = (tmp_path / "model_index.json").read_bytes()
    complete_index(written, tmp_path)
    assert (tmp_path / "model_index.json").read_bytes() == before
