"""Pipelines with several denoisers: each is recorded, quantized, saved and opened like the only one of others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import datasets
import diffusers
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from models import quantized_files, run_fpq, run_scenarios, scenario, tiny_text_to_image
from PIL import Image
from torch import Tensor
from two_denoisers import KANDINSKY, WAN, kandinsky, wan

import fpq_lightning as fpq
from fpq_lightning.calibration.disk import load_calibration_set
from fpq_lightning.calibration.trajectories import sample_calibration_sets
from fpq_lightning.diffusion.denoisers import as_one, find_denoisers, quantized_denoisers
from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.diffusion.sampling import FunctionSampler, SamplerConfig, generate, set_sampler, using_sampler
from fpq_lightning.nn.backends.hardware import Hardware
from fpq_lightning.nn.convert import make_plain
from fpq_lightning.nn.hashing import hash_quantization, hash_weights
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.storage.export import export
from fpq_lightning.storage.inspect import inspect_pipeline
from fpq_lightning.storage.pipeline import is_quantized, load_quantized, read_descriptions
from fpq_lightning.training.estimate import estimate_run

N = 9
NEAREST = fpq.RoundingRecipe(start="nearest", learned=False)
LEARNED = fpq.RoundingRecipe(start="nearest", learned=True, iterations=10, batch_size=4)


def quantized(
    pipeline: Any, directory: Path, options: dict[str, Any], rounding: fpq.RoundingRecipe = NEAREST, **more: Any
) -> dict[str, Any]:
    """Quantizes a pipeline in place, and gives the report."""
    offload = more.pop("offload", False)
    fpq.quantize(
        pipeline,
        fpq.Recipe(rounding=rounding, **more),
        directory,
        fpq.CalibrationDataModule(n_samples=N, n_search=4, micro_batch=4),
        options if isinstance(options, SamplerConfig) else SamplerConfig(**options),
        accelerator="cpu",
        offload=offload,
        enable_progress_bar=False,
        logger=False,
    )
    return json.loads((directory / "report.json").read_text())


def outputs(pipeline: Any, options: dict[str, Any]) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(next(iter(generate(pipeline, SamplerConfig(**options), range(3, 5)).values())))


@dataclass
class Made:
    pipeline: Any
    directory: Path
    report: dict[str, Any]
    options: dict[str, Any]
    names: list[str]

    @property
    def files(self) -> Path:
        return self.directory / "quantized"


@pytest.fixture(scope="module", params=["Wan", "Kandinsky"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    make, options, names = {
        "Wan": (wan, WAN, ["transformer", "transformer_2"]),
        "Kandinsky": (kandinsky, KANDINSKY, ["prior_prior", "unet"]),
    }[request.param]
    pipeline, directory = make(), tmp_path_factory.mktemp("made") / "run"
    report = quantized(pipeline, directory, options, LEARNED)
    return Made(pipeline, directory, report, options, names)


# --- a whole run ---------------------------------------------------------------------------------------------------


def test_plain_diffusers_opens_all_denoisers_and_samples_the_same_bits(made: Made) -> None:
    opened = DiffusionPipeline.from_pretrained(made.files)
    for name in made.names:
        assert packed_layers(getattr(opened, name))
        assert "quantization_config" in json.loads((made.files / name / "config.json").read_text())
    expected = outputs(made.pipeline, made.options)
    assert expected.isfinite().all()
    assert torch.equal(outputs(opened, made.options), expected)


def test_units_follow_denoiser_after_denoiser_under_their_names(made: Made) -> None:
    names = [block["name"].partition(".")[0] for block in made.report["blocks"]]
    order = list(dict.fromkeys(names))
    assert sorted(order) == made.names
    assert names == sorted(names, key=order.index)
    assert len({block["name"] for block in made.report["blocks"]}) == len(names)
    assert {layer["name"].partition(".")[0] for layer in made.report["layers"]} == set(made.names)


def test_the_report_counts_each_denoiser_and_all_of_them(made: Made) -> None:
    each = made.report["denoisers"]
    assert set(each) == set(made.names)
    for name in made.names:
        found = each[name]["coverage"]
        weights = [p for n, p in getattr(made.pipeline, name).named_parameters() if ".variants." not in n]
        # All but the biases of layers, which have one dimension like those of norms.
        assert sum(p.numel() for p in weights if p.ndim > 1) <= found["parameters"] <= sum(p.numel() for p in weights)
        assert found["quantized"] > 0.9 * found["parameters"]
        size = sum(file.stat().st_size for file in (made.files / name).glob("*.safetensors"))
        assert each[name]["disk_bytes"] == size
        assert each[name]["activation_ranges"]["layers"]
    for key in ("parameters", "quantized"):
        assert made.report["coverage"][key] == sum(one["coverage"][key] for one in each.values())
    assert made.report["disk_bytes"] == sum(one["disk_bytes"] for one in each.values())
    share = made.report["coverage"]["quantized"] / made.report["coverage"]["parameters"]
    assert made.report["quantized_share"] == pytest.approx(share)


def test_files_describe_each_denoiser_alone(made: Made) -> None:
    found = read_descriptions(made.files)
    assert set(found) == set(made.names)
    for name, description in found.items():
        assert set(description["layers"]) == set(packed_layers(getattr(load_quantized(made.files), name)))
        assert description["coverage"] == made.report["denoisers"][name]["coverage"]
        assert description["fingerprint"] == made.report["fingerprint"]
        assert "denoisers" not in description


def test_every_export_and_back_keeps_all_denoisers(made: Made, tmp_path: Path) -> None:
    export(made.files, tmp_path / "plain", "dequantized")
    expected = outputs(made.pipeline, made.options)
    assert is_quantized(tmp_path / "plain")
    assert torch.equal(outputs(load_quantized(tmp_path / "plain"), made.options), expected)
    before, after = read_descriptions(made.files), read_descriptions(tmp_path / "plain")
    for name in made.names:
        assert after[name]["coverage"] == before[name]["coverage"]
        assert set(after[name]["layers"]) == set(before[name]["layers"])
    export(tmp_path / "plain", tmp_path / "packed", "fpq")
    assert torch.equal(outputs(load_quantized(tmp_path / "packed"), made.options), expected)
    assert read_descriptions(tmp_path / "packed").keys() == before.keys()


def test_inspect_lists_the_layers_of_all_denoisers_with_their_operations(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {layer.name: layer for layer in inspect_pipeline(made.files, Hardware(), torch.float32)}
    opened = load_quantized(made.files)
    expected = {f"{name}.{layer}" for name in made.names for layer in packed_layers(getattr(opened, name))}
    assert set(layers) == expected
    assert all(layer.bytes for layer in layers.values())
    assert all(any(layers[n].operations for n in layers if n.startswith(f"{name}.")) for name in made.names)
    outcome = run_fpq(capsys, ["inspect", str(made.files)])
    assert outcome.code == 0, outcome.err
    for name in made.names:
        assert f"; {name}: quantized: 9" in outcome.out


def test_predict_samples_with_all_denoisers(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n_images=1", "--trainer.accelerator=cpu", "--sampler.batch_size=1"]
    outcome = run_fpq(capsys, ["predict", f"--model={made.files}", f"--output={tmp_path / 'images'}", *options])
    assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_a_change_in_any_denoiser_changes_the_hashes() -> None:
    one, other = wan(), wan()
    hashes = [hash_weights(as_one(find_denoisers(pipeline))) for pipeline in (one, other)]
    assert hashes[0] == hashes[1]
    with torch.no_grad():
        other.transformer_2.proj_out.weight[0, 0] += 1
    assert hash_weights(as_one(find_denoisers(other))) != hashes[0]
    swapped = wan()
    swapped.transformer, swapped.transformer_2 = swapped.transformer_2, swapped.transformer
    assert hash_weights(as_one(find_denoisers(swapped))) != hashes[0]


def test_the_quantization_of_any_denoiser_is_hashed(made: Made) -> None:
    def hashed(pipeline: Any) -> str:
        return hash_quantization(as_one(quantized_denoisers(pipeline)), "quantized")

    opened = load_quantized(made.files)
    before = hashed(opened)
    assert hashed(load_quantized(made.files)) == before
    for name in made.names:
        other = load_quantized(made.files)
        make_plain(next(iter(packed_layers(getattr(other, name)).values())))
        assert hashed(other) != before


# --- calibration sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "what"),
    [
        (wan, WAN, {"transformer": "hidden_states", "transformer_2": "hidden_states"}),
        (kandinsky, KANDINSKY, {"prior_prior": "hidden_states", "unet": "sample"}),
    ],
)
def test_each_set_is_what_its_denoiser_was_called_with(make: Any, options: Any, what: dict[str, str]) -> None:
    pipeline, sampler = make(), SamplerConfig(**options)
    found = sample_calibration_sets(pipeline, find_denoisers(pipeline), sampler, N, seed=3)
    assert {name: len(one) for name, one in found.items()} == dict.fromkeys(what, N)
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in what}
    for name in what:

        def keep(module: Any, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
            calls[name].append({"sample": args[0] if args else None, **kwargs})

        getattr(pipeline, name).register_forward_pre_hook(keep, with_kwargs=True)
    with using_sampler(pipeline, sampler):
        for first in (3, 5, 7, 9, 11):
            generate(pipeline, sampler, [first, first + 1])
    for name, argument in what.items():
        assert calls[name]
        rows = [
            (float(torch.as_tensor(call["timestep"]).flatten()[0]), row)
            for call in calls[name]
            for row in next(call[k] for k in (argument, "sample") if call.get(k) is not None)
        ]
        one = found[name]
        for i in range(N):
            time, value = float(one.inputs["timestep"][i]), one.inputs[argument][i]
            assert any(time == t and torch.allclose(value, row, rtol=1e-4, atol=1e-5) for t, row in rows)
        assert len(set(one.inputs["timestep"].tolist())) == len({time for time, _ in rows})


def test_a_denoiser_that_is_called_less_gets_more_trajectories_and_exactly_its_samples() -> None:
    pipeline, said = wan(boundary=0.3), []  # three steps in four are noisy
    progress: list[tuple[int, int]] = []
    found = sample_calibration_sets(
        pipeline, find_denoisers(pipeline), SamplerConfig(**WAN), 10, on_plan=said.append,
        on_batch=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    assert {name: len(one) for name, one in found.items()} == {"transformer": 10, "transformer_2": 10}
    assert progress[-1] == (5, 5)  # of two calls each
    assert len(said) == 2
    assert "transformer (WanTransformer3DModel) with 10 samples" in said[0]
    assert "6 calls a trajectory" in said[0]
    assert "2 calls a trajectory" in said[1]
    assert found["transformer"].inputs["timestep"].min() > 300 > found["transformer_2"].inputs["timestep"].max()


def test_a_denoiser_whose_calls_are_not_as_planned_is_said() -> None:
    class Twice(diffusers.WanPipeline):
        """Leaves a step of the second transformer to the first."""

        @wraps(diffusers.WanPipeline.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            second, count = self.transformer_2.forward, 0

            def forward(*more: Any, **given: Any) -> Any:
                nonlocal count
                count += 1
                return second(*more, **given) if count < 3 else self.transformer(*more, **given)

            self.transformer_2.forward = forward
            try:
                return super().__call__(*args, **kwargs)
            finally:
                del self.transformer_2.forward

    pipeline, said = wan(), []
    pipeline.__class__ = Twice
    found = sample_calibration_sets(pipeline, find_denoisers(pipeline), SamplerConfig(**WAN), 6, on_plan=said.append)
    assert {len(one) for one in found.values()} == {6}
    assert said[2:] == ["transformer (WanTransformer3DModel): 6 calls a trajectory, not 4"]


def test_each_stage_is_planned_by_its_own_scheduler() -> None:
    pipeline, said = kandinsky(), []
    sample_calibration_sets(pipeline, find_denoisers(pipeline), SamplerConfig(**KANDINSKY), 6, on_plan=said.append)
    prior, unet = sorted(said)
    assert prior.startswith("prior_prior (PriorTransformer) with 6 samples along UnCLIPScheduler: 5 calls a trajectory")
    assert unet.startswith("unet (UNet2DConditionModel) with 6 samples along DDIMScheduler: 3 calls a trajectory")


def test_the_weights_of_several_schedulers_samples_are_measured(made: Made) -> None:
    for name in made.names:
        weights = load_calibration_set(made.directory / "calibration" / name).weights
        assert len(weights) == N
        assert weights.mean().item() == pytest.approx(1.0)
        assert weights.min() < weights.max()


def test_real_images_are_refused_where_there_are_several_denoisers(tmp_path: Path) -> None:
    images = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * N})
    images.to_parquet(tmp_path / "images.parquet")
    data = fpq.CalibrationDataModule(n_samples=N, source=str(tmp_path / "images.parquet"))
    with pytest.raises(ValueError, match="several denoisers") as error:
        fpq.quantize(
            wan(), run_dir=tmp_path / "run", data=data,
            sampler=SamplerConfig(**WAN), accelerator="cpu", enable_progress_bar=False, logger=False,
        )  # fmt: skip
    assert "\n" not in str(error.value)


# --- choice --------------------------------------------------------------------------------------------------------


def test_the_chosen_denoiser_alone_is_quantized_and_named_as_an_only_one(tmp_path: Path) -> None:
    pipeline, before = wan(), wan().transformer.state_dict()
    report = quantized(pipeline, tmp_path / "run", WAN, denoisers=["transformer_2"])
    assert "denoisers" not in report
    assert report["blocks"][0]["name"] == "patch_embedding"
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    opened = DiffusionPipeline.from_pretrained(tmp_path / "run" / "quantized")
    assert not packed_layers(opened.transformer)
    assert packed_layers(opened.transformer_2)
    export(tmp_path / "run" / "quantized", tmp_path / "plain", "dequantized")
    plain = load_quantized(tmp_path / "plain")
    assert torch.equal(outputs(plain, WAN), outputs(pipeline, WAN))
    layers = inspect_pipeline(tmp_path / "run" / "quantized", Hardware(), torch.float32)
    assert {layer.name for layer in layers} == set(packed_layers(opened.transformer_2))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["unet"], "recipe.denoisers names unet, which is no denoiser of WanPipeline: .* transformer, transformer_2"),
        (["transformer", "vae"], "recipe.denoisers names vae"),
        ("text_encoder", "recipe.denoisers names text_encoder"),
    ],
)
def test_a_wrong_name_is_refused_with_those_that_are_there(names: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as error:
        quantized(wan(), tmp_path / "run", WAN, denoisers=names)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_no_name_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe.denoisers is empty"):
        fpq.Recipe(denoisers=[])


def test_a_single_recipe_says_nothing_of_denoisers() -> None:
    assert "denoisers" not in fpq.Recipe().to_dict()
    assert fpq.Recipe(**{"denoisers": "unet"}).to_dict()["denoisers"] == ["unet"]


def test_an_optional_denoiser_that_is_none_is_not_there(tmp_path: Path) -> None:
    for missing in ("transformer", "transformer_2"):
        pipeline = wan(boundary=None if missing == "transformer_2" else 1.5, **{missing: None})
        (name,) = {"transformer", "transformer_2"} - {missing}
        report = quantized(pipeline, tmp_path / missing, WAN)
        assert report["blocks"][0]["name"] == "patch_embedding"
        opened = load_quantized(tmp_path / missing / "quantized")
        assert getattr(opened, missing) is None
        assert packed_layers(getattr(opened, name))
        assert torch.equal(outputs(opened, WAN), outputs(pipeline, WAN))


def test_a_denoiser_that_is_never_called_stays_in_full_precision_unless_it_is_named(tmp_path: Path) -> None:
    pipeline = wan(boundary=None)
    with pytest.warns(UserWarning, match="never calls its transformer_2 .* it stays in full precision"):
        report = quantized(pipeline, tmp_path / "run", WAN)
    assert "denoisers" not in report
    assert report["blocks"][0]["name"] == "patch_embedding"
    opened = load_quantized(tmp_path / "run" / "quantized")
    assert not packed_layers(opened.transformer_2)
    assert torch.equal(outputs(opened, WAN), outputs(pipeline, WAN))
    with pytest.raises(
        ValueError, match=r"never calls its transformer_2 .*: leave it out of recipe.denoisers"
    ) as error:
        quantized(wan(boundary=None), tmp_path / "other", WAN, denoisers=["transformer", "transformer_2"])
    assert "\n" not in str(error.value)


def test_patterns_choose_layers_of_all_denoisers_or_of_one(tmp_path: Path) -> None:
    pipeline = wan()
    report = quantized(pipeline, tmp_path / "run", WAN, exclude=["proj_out", "transformer_2.blocks.0.*"])
    left = {layer["name"] for layer in report["layers"]}
    assert "transformer.blocks.0.attn1.to_q" in left
    assert not any(name.startswith("transformer_2.blocks.0.") or name.endswith(".proj_out") for name in left)
    assert any(name.startswith("transformer_2.blocks.1.") for name in left)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (
            {"exclude": ["transformer_3.*"]},
            r"pattern 'transformer_3\.\*' matches no layer of transformer, transformer_2",
        ),
        ({"include": ["transformer.*"]}, r"leaves no layer of transformer_2: leave it out of recipe.denoisers"),
    ],
)
def test_patterns_that_match_no_layer_are_refused(patterns: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said) as error:
        quantized(wan(), tmp_path / "run", WAN, **patterns)
    assert "\n" not in str(error.value)


def test_an_adapter_or_nan_in_any_denoiser_is_refused_by_its_name(tmp_path: Path) -> None:
    pipeline = wan()
    with torch.no_grad():
        pipeline.transformer_2.proj_out.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer_2.proj_out: its weight holds NaN"):
        quantized(pipeline, tmp_path / "run", WAN)


def test_a_compiled_second_denoiser_is_refused(tmp_path: Path) -> None:
    pipeline = wan()
    pipeline.transformer_2 = torch.compile(pipeline.transformer_2)
    with pytest.raises(ValueError, match="transformer_2 is compiled"):
        quantized(pipeline, tmp_path / "run", WAN)


# --- ControlNets ---------------------------------------------------------------------------------------------------


def _controlled(pipeline: Any, seeds: list[int]) -> Any:
    picture = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    return pipeline(
        ["a cat"] * len(seeds), image=[picture] * len(seeds), height=16, width=16, num_inference_steps=3,
        output_type="np", generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )  # fmt: skip


@pytest.fixture
def control(tmp_path: Path) -> Any:
    plain = load_pipeline(tiny_text_to_image(tmp_path / "sd"))
    torch.manual_seed(0)
    steering = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(4, 8))
    for parameter in steering.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    pipeline = StableDiffusionControlNetPipeline(**plain.components, controlnet=steering, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_controlnet_is_quantized_only_if_it_is_named(control: Any, tmp_path: Path) -> None:
    assert list(find_denoisers(control)) == ["unet"]
    assert set(find_denoisers(control, ["unet", "controlnet"])) == {"unet", "controlnet"}
    with pytest.raises(ValueError, match=r"names control, .* choose among [a-z]+, [a-z]+"):
        find_denoisers(control, ["control"])
    sampler = FunctionSampler(function=_controlled, batch_size=2)
    report = quantized(control, tmp_path / "run", sampler, denoisers=["unet", "controlnet"])
    assert {block["name"].partition(".")[0] for block in report["blocks"]} == {"unet", "controlnet"}
    opened = DiffusionPipeline.from_pretrained(tmp_path / "run" / "quantized")
    opened.set_progress_bar_config(disable=True)
    for name in ("unet", "controlnet"):
        assert packed_layers(getattr(opened, name))
        assert load_calibration_set(tmp_path / "run" / "calibration" / name).weights.isfinite().all()
    expected, found = (torch.as_tensor(_controlled(pipeline, [3, 4]).images) for pipeline in (control, opened))
    assert torch.equal(expected, found)
    # What steers weighs like what it steers: samples of the same call, if measured.
    weights = load_calibration_set(tmp_path / "run" / "calibration" / "controlnet").weights
    assert weights.min() < weights.max()


def test_several_controlnets_in_one_component_cannot_be_packed_and_are_refused(control: Any) -> None:
    several = diffusers.MultiControlNetModel([control.controlnet, control.controlnet])
    pipeline = StableDiffusionControlNetPipeline(
        **{**control.components, "controlnet": several}, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="controlnet, a MultiControlNetModel, which has no configuration"):
        find_denoisers(pipeline, ["controlnet"])


# --- which components ----------------------------------------------------------------------------------------------


def test_one_network_under_two_names_is_one_denoiser() -> None:
    pipeline = wan()
    pipeline.transformer_2 = pipeline.transformer
    assert list(find_denoisers(pipeline)) == ["transformer"]


def test_a_unet_that_a_controlnet_is_part_of_is_a_denoiser() -> None:
    class UNetControlNetXS(torch.nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample

    class Pipeline(DiffusionPipeline):
        def __init__(self, unet: Any, control: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, control=control)

    assert list(find_denoisers(Pipeline(UNetControlNetXS(), UNetControlNetXS()))) == ["unet"]


def test_a_pipeline_without_denoiser_is_refused_in_a_line() -> None:
    class Pipeline(DiffusionPipeline):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(ValueError, match="Pipeline has no denoiser"):
        find_denoisers(Pipeline(diffusers.AutoencoderTiny()))


# --- schedulers of pipelines in one --------------------------------------------------------------------------------


def test_a_scheduler_reaches_the_pipeline_inside_that_runs_it() -> None:
    pipeline = kandinsky()
    own, prior = pipeline.scheduler, pipeline.prior_scheduler
    with using_sampler(pipeline, SamplerConfig(scheduler="DPMSolverMultistepScheduler")):
        assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
        assert pipeline.decoder_pipe.scheduler is pipeline.scheduler
        assert pipeline.prior_pipe.scheduler is prior
    assert pipeline.scheduler is own
    assert pipeline.decoder_pipe.scheduler is own
    set_sampler(pipeline, SamplerConfig(scheduler="DDIMScheduler"))
    assert pipeline.decoder_pipe.scheduler is own


# --- placement, estimate, resume -----------------------------------------------------------------------------------


def test_offload_of_two_denoisers_gives_the_same_bits(tmp_path: Path) -> None:
    for offload in (False, True):
        quantized(wan(), tmp_path / str(offload), WAN, LEARNED, offload=offload)
    plain, offloaded = (quantized_files(tmp_path / str(offload)) for offload in (False, True))
    assert plain == offloaded


def test_an_estimate_counts_all_denoisers() -> None:
    def estimate(**recipe: Any) -> Any:
        data = fpq.CalibrationDataModule(n_samples=64, micro_batch=4)
        return estimate_run(
            wan(boundary=0.3), fpq.Recipe(rounding=NEAREST, **recipe), data, SamplerConfig(**WAN),
            fpq.EvaluationConfig(0), torch.device("cpu"),
        )  # fmt: skip

    both, one = estimate(), estimate(denoisers="transformer")
    assert both.store_bytes == one.store_bytes  # one at a time
    assert both.model_bytes == one.model_bytes
    assert both.disk_bytes > one.disk_bytes + 64 * 4 * 2 * 2 * 2  # the latents of the second one's samples, and more


def _fit(model: str, run_dir: Path, *more: str) -> list[str]:
    options = {
        "model": model, "run_dir": run_dir, "trainer.accelerator": "cpu", "data.n_samples": N, "data.n_search": 4,
        "data.micro_batch": 4, "recipe.rounding.start": "nearest", "recipe.rounding.learned": "true",
        "recipe.rounding.iterations": 20, "recipe.rounding.batch_size": 4, "evaluation.n_images": 0,
        "checkpoint_steps": 10, **{f"sampler.{k}": json.dumps(v) for k, v in WAN.items()},
    }  # fmt: skip
    return ["fit", *(f"--{key}={value}" for key, value in options.items()), *more]


def test_a_run_that_ends_in_the_second_denoiser_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pipeline = wan()
    pipeline.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    # Each transformer has five units of 20 steps.
    kills = {"between-units": ("unit", "end", 7), "in-a-unit": ("steps", "gradients", 7 * 20 + 13)}
    scenarios = [scenario(tmp_path / "reference-log", _fit(model, tmp_path / "reference"))]
    for name, kill in kills.items():
        scenarios.append(scenario(tmp_path / f"{name}-killed", _fit(model, tmp_path / name), kill))
        scenarios.append(scenario(tmp_path / f"{name}-log", _fit(model, tmp_path / name, "--ckpt_path=last")))
    reference, *others = run_scenarios(scenarios)
    assert reference.code == 0, reference.err
    assert "[ 6/10] transformer_2.patch_embedding" in reference.out
    for name, (killed, resumed) in zip(kills, zip(others[::2], others[1::2], strict=True), strict=True):
        assert killed.code < 0, killed.err
        assert resumed.code == 0, resumed.err
        assert "transformer_2.patch_embedding" not in resumed.out
        assert quantized_files(tmp_path / name) == quantized_files(tmp_path / "reference")


def test_calibration_sets_are_found_again_and_a_missing_one_is_said(made: Made, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    shutil.copytree(made.directory / "calibration", sets)
    data = fpq.CalibrationDataModule(n_samples=N, n_search=4, micro_batch=4, directory=str(sets))
    make = wan if "transformer" in made.names else kandinsky

    def run(directory: Path) -> None:
        fpq.quantize(
            make(), fpq.Recipe(rounding=LEARNED), directory, data, SamplerConfig(**made.options), accelerator="cpu",
            enable_progress_bar=False, logger=False,
        )  # fmt: skip

    run(tmp_path / "again")
    assert quantized_files(tmp_path / "again") == quantized_files(made.directory)
    for name in made.names:
        shutil.rmtree(sets / name)
    with pytest.raises((ValueError, FileNotFoundError), match="no calibration set") as error:
        run(tmp_path / "third")
    assert "\n" not in str(error.value)
