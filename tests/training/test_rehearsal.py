"""Before the long part a run is rehearsed: what would break it later breaks it now, in one line, and leaves nothing."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from models import fit_arguments, quantized_files, run_fpq, save_tiny, tiny_pipeline, tiny_text_to_image
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fpq_lightning import CalibrationDataModule, EvaluationConfig, Recipe, RoundingRecipe, SamplerConfig, quantize
from fpq_lightning.evaluation.metrics.registry import METRICS, Column, ImageMetric
from fpq_lightning.evaluation.report import files as report_files
from fpq_lightning.nn.calibrated import quantized_layers
from fpq_lightning.training import rehearsal, run
from fpq_lightning.training.run_directory import RunDirectory

pytestmark = pytest.mark.rehearsed

Run = Callable[..., DiffusionPipeline]
LEARNED = RoundingRecipe(start="nearest", learned=True, iterations=5, batch_size=4)


@pytest.fixture
def fit(tmp_path: Path) -> Run:
    def fit(pipeline: DiffusionPipeline, recipe: Recipe | None = None, n_images: int = 2, **options: Any) -> Any:
        return quantize(
            pipeline,
            recipe or Recipe(rounding=LEARNED, include=["conv_*"]),
            options.pop("run_dir", tmp_path / "run"),
            CalibrationDataModule(n_samples=12, n_search=4, micro_batch=5),
            options.pop("sampler", SamplerConfig(steps=3, batch_size=4)),
            EvaluationConfig(n_images=n_images),
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
            **options,
        )

    return fit


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO, logger="fpq_lightning")
    return lambda: "\n".join(line for line in caplog.messages if line.startswith("rehearsed"))


# --- the run after it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_after_a_rehearsal_is_bit_equal_to_one_without(
    offload: bool, fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, reports = Recipe(rounding=LEARNED), []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(run, "rehearse", lambda *args: None)
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        fit(tiny_pipeline(), recipe, run_dir=tmp_path / name, offload=offload, base_model="tiny")
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
        reports[-1].pop("digest")  # which is that of the seconds, too
        for report in reports:
            for timed in (*report["blocks"], report["calibration"]):
                timed.pop("seconds", None), timed.pop("peak_memory_bytes", None)
    assert quantized_files(tmp_path / "with") == quantized_files(tmp_path / "without")
    assert reports[0] == reports[1]
    names = [sorted(p.name for p in (tmp_path / name).rglob("*")) for name in ("with", "without")]
    assert names[0] == names[1]


def test_it_draws_no_random_numbers_and_leaves_the_pipeline_as_it_was(
    fit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pipeline()
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    kinds = [type(module) for module in pipeline.unet.modules()]
    drawn: list[Any] = []
    rehearse = run.rehearse

    def watched(*args: Any) -> None:
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        rehearse(*args)
        drawn.append(torch.equal(states[0], torch.get_rng_state()) and states[2] == random.getstate())
        drawn.append((states[1] == np.random.get_state()[1]).all())
        assert [type(module) for module in pipeline.unet.modules()] == kinds
        assert pipeline.unet.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())

    monkeypatch.setattr(run, "rehearse", watched)
    fit(pipeline)
    assert drawn == [True, True]


def test_it_says_what_was_rehearsed_and_takes_a_few_seconds(fit: Run, said: Callable[[], str]) -> None:
    fit(tiny_pipeline(), Recipe(rounding=LEARNED))
    line = said()
    for stage in (
        "sampling two short trajectories",
        "tracing the network",
        "quantizing mid_block.attentions.0",
        "writing the quantized model",
        "opening the written model",
        "sampling and judging images",
        "writing the report",
    ):
        assert stage in line
    assert "left out" not in line
    assert float(line.split()[2]) < 10


def test_what_there_is_no_time_for_is_left_out_and_said(
    fit: Run, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.0)
    fit(tiny_pipeline())
    left = said().split("left out, for it took too long: ")[1]
    assert left.startswith("writing the quantized model, opening the written model, sampling and judging images")


def test_a_block_too_large_for_the_time_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpq_lightning.graph.units import Unit

    def unit(name: str, *widths: int) -> Unit:
        layers = {f"{name}.{i}": nn.Linear(width, 1, bias=False) for i, width in enumerate(widths)}
        return Unit(name, nn.Sequential(*layers.values()), layers)

    units = [unit("lone", 10), unit("large", 300, 300), unit("small", 150, 150), unit("other", 20)]
    assert rehearsal._cheapest(units, 1.0).name == "small"  # type: ignore[union-attr]
    assert rehearsal._cheapest(units, 0.1).name == "lone"  # type: ignore[union-attr]
    assert rehearsal._cheapest([], 1.0) is None


def test_without_images_none_are_sampled(fit: Run, said: Callable[[], str]) -> None:
    fit(tiny_pipeline(), n_images=0)
    assert "opening the written model" in said()
    assert "images" not in said()


def test_a_resumed_run_is_not_rehearsed_again(fit: Run, said: Callable[[], str], tmp_path: Path) -> None:
    fit(tiny_pipeline())
    assert said()
    (tmp_path / "run" / "report.json").unlink()
    before = said()
    fit(tiny_pipeline(), ckpt_path="last")
    assert said() == before


def test_what_a_killed_rehearsal_left_is_removed(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", {"model": {}})
    left = tmp_path / "run" / ".rehearsal-abc"
    (left / "quantized").mkdir(parents=True)
    with directory.working():
        assert not left.exists()


def test_a_large_pipeline_is_opened_without_writing_its_weights(
    fit: Run, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rehearsal, "_WRITTEN", 0)
    written: list[Any] = []
    monkeypatch.setattr(rehearsal, "load_quantized", lambda *args: written.append(args))
    pipeline = DiffusionPipeline.from_pretrained(tiny_text_to_image(tmp_path / "model"))
    fit(pipeline, sampler=SamplerConfig(steps=2, batch_size=2, prompts=["a cat", "a dog"]))
    assert "opening the quantized model" in said()
    assert not written


# --- what it finds ---------------------------------------------------------------------------------------------


def _refused(fit: Run, tmp_path: Path, pipeline: DiffusionPipeline, match: str, **options: Any) -> str:
    """Fits, and gives the line that ends it before the calibration set is sampled."""
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=match) as error:
        fit(pipeline, **options)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("rehearsal: ")
    assert not (tmp_path / "run").exists()
    components = [c for c in pipeline.components.values() if isinstance(c, nn.Module)]
    assert not any(quantized_layers(component) for component in components)
    return str(error.value)


class _BreaksOnSquares(MeanMetric):
    def update(self, images: Tensor) -> None:  # type: ignore[override]
        raise IndexError(f"no images of\n{images.shape[-1]} pixels")


@pytest.fixture
def broken_metric() -> Iterator[None]:
    metric = ImageMetric(
        name="breaks",
        help="Breaks.",
        columns=(Column("breaks", "breaks", digits=3),),
        inputs=("images",),
        make=lambda config: _BreaksOnSquares(),
    )
    with METRICS.temporarily(metric):
        yield


def test_a_metric_that_breaks_on_a_shape(broken_metric: None, fit: Run, tmp_path: Path) -> None:
    line = _refused(fit, tmp_path, tiny_pipeline(), "sampling and judging images failed: IndexError")
    assert "no images of 8 pixels" in line


def test_the_command_line_keeps_the_traceback_of_what_nobody_foresaw(
    broken_metric: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny")
    outcome = run_fpq(capsys, fit_arguments(model, tmp_path / "run", n_images=2))
    (line,) = outcome.errors
    assert line.startswith("fpq: rehearsal: sampling and judging images failed: IndexError: no images of 8 pixels")
    file = Path(line.split("the traceback is in ")[1])
    assert "_BreaksOnSquares" in file.read_text() or "in update" in file.read_text()
    file.unlink()
    assert not (tmp_path / "run").exists()


def test_report_code_that_breaks_costs_a_line_and_not_the_run(
    fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def fail(*args: Any) -> str:
        raise KeyError("psnr")

    monkeypatch.setattr(report_files, "render_html", fail)
    fit(tiny_pipeline())
    lines = [str(warning.message) for warning in recwarn]
    assert lines.index("rehearsal: report.html: left out, for KeyError: 'psnr'") < lines.index(
        "report.html: left out, for KeyError: 'psnr'"
    )


@pytest.mark.parametrize("written", [2**40, 0])
def test_fused_projections_that_a_fresh_model_does_not_have(
    written: int, fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "check_as_configured", lambda denoiser: None)  # which finds them even before
    monkeypatch.setattr(rehearsal, "_WRITTEN", written)
    pipeline = DiffusionPipeline.from_pretrained(tiny_text_to_image(tmp_path / "model"))
    with torch.no_grad():
        pipeline.unet.fuse_qkv_projections()
    sampler = SamplerConfig(steps=2, batch_size=2, prompts=["a cat"])
    recipe = Recipe(rounding=LEARNED, include=["*to_qkv"])
    line = _refused(fit, tmp_path, pipeline, "to_qkv", recipe=recipe, sampler=sampler)
    assert "opening the " in line


class MadeUpDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.leave(self.enter(x)),)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(_WithoutGradient.apply(self.inner(x)))


class UnlearnableDenoiser(ModelMixin, ConfigMixin):
    """Its block cannot be learned."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        for block in self.blocks:
            x = x + block(x)
        return (x,)


class MadeUpPipeline(DiffusionPipeline):
    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size: int, generator: list[torch.Generator], num_inference_steps: int, output_type: str
    ) -> ImagePipelineOutput:
        x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, timestep=t)[0], t, x).prev_sample
        return ImagePipelineOutput(images=x.permute(0, 2, 3, 1).sigmoid().numpy())


def _made_up(denoiser: nn.Module) -> DiffusionPipeline:
    return MadeUpPipeline(denoiser.eval(), DDIMScheduler(clip_sample=False))


def test_a_layer_that_cannot_be_learned(fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "UnlearnableDenoiser", UnlearnableDenoiser, raising=False)
    recipe = Recipe(rounding=LEARNED)
    _refused(fit, tmp_path, _made_up(UnlearnableDenoiser()), r"quantizing blocks\.\d failed: ", recipe=recipe)


def test_a_pipeline_of_a_users_own_class_is_opened_by_that_class(
    fit: Run, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "MadeUpDenoiser", MadeUpDenoiser, raising=False)
    fit(_made_up(MadeUpDenoiser()), Recipe(rounding=LEARNED))
    assert "opening the written model" in said()


def test_a_pipeline_that_cannot_be_opened_again(fit: Run, tmp_path: Path) -> None:
    class Hidden(MadeUpDenoiser):
        """No module has it by its name."""

    line = _refused(fit, tmp_path, _made_up(Hidden()), "cannot load the pipeline", recipe=Recipe(rounding=LEARNED))
    assert line.startswith("rehearsal: opening the written model failed: ")
    assert "Hidden" in line


def test_images_that_cannot_be_judged(fit: Run, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()

    def sampler(pipeline: DiffusionPipeline, seeds: list[int]) -> dict[str, int]:
        pipeline(batch_size=len(seeds), num_inference_steps=2, output_type="np")
        return {"images": 3}

    _refused(fit, tmp_path, pipeline, "holds no images", sampler=sampler)


def test_a_written_model_that_gives_other_images_is_said(
    fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def changed(*args: Any) -> DiffusionPipeline:
        opened = load_quantized(*args)
        opened.unet.conv_norm_out.bias.add_(1)
        return opened

    load_quantized = rehearsal.load_quantized
    fit(tiny_pipeline(), n_images=0)
    line = "rehearsal: the written model does not give the very images of the calibrated one when opened"
    assert line not in [str(warning.message) for warning in recwarn]
    monkeypatch.setattr(rehearsal, "load_quantized", changed)
    fit(tiny_pipeline(1), n_images=0, run_dir=tmp_path / "other")
    assert line in [str(warning.message) for warning in recwarn]
