"""Whole runs on networks that are hard to cut into units: what can be quantized is, and the rest is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.calibration.axes import Axis
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.graph.units import discover_units
from fpq_lightning.reconstruction.unit import UnitTrainer
from fpq_lightning.training.callbacks import report as report_callback
from fpq_lightning.training.units import find_units

WIDTH = 16


def _two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


class TwoStreams(nn.Module):
    """One feed-forward for the tokens of the image and those of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.feed_forward, self.text = _two_layers(), nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x) + self.feed_forward(self.text.expand(len(x), -1, -1)).mean(1, keepdim=True)


class Experts(nn.Module):
    """Each token goes to one of three, the last of which none goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList([_two_layers() for _ in range(3)])
        self.gate.bias.data[2] = -1e4

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen, out = self.gate(tokens).argmax(-1), torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(tokens[chosen == i])
        return out.view_as(x)


class AwkwardDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, width, 2, 2)
        self.clock = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([TwoStreams(), Experts()])
        self.leave = nn.ConvTranspose2d(width, 4, 2, 2)

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        h = self.enter(x)
        tokens = h.flatten(2).transpose(1, 2)
        clock = self.clock(timestep.float().reshape(-1, 1).expand(len(x), 1) / 1000) + self.clock(x.new_zeros(1, 1))
        for block in self.blocks:
            tokens = tokens + block(tokens + clock[:, None])
        return (self.leave(tokens.transpose(1, 2).reshape(h.shape)),)


class AwkwardPipeline(DiffusionPipeline):
    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size: int, generator: list[torch.Generator], num_inference_steps: int, output_type: str
    ) -> ImagePipelineOutput:
        x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, timestep=t)[0], t, x).prev_sample
        return ImagePipelineOutput(images=x[:, :3].permute(0, 2, 3, 1).sigmoid().numpy())


@pytest.fixture(autouse=True)
def known_to_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    for made_up in (AwkwardPipeline, AwkwardDenoiser):
        monkeypatch.setattr(diffusers, made_up.__name__, made_up, raising=False)


def run(directory: Path, **recipe: Any) -> tuple[DiffusionPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    pipeline = AwkwardPipeline(AwkwardDenoiser().eval(), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    fpq.quantize(
        pipeline,
        fpq.Recipe(**recipe),
        directory,
        fpq.CalibrationDataModule(n_samples=12, n_search=4, micro_batch=5),
        fpq.SamplerConfig(steps=2, batch_size=4),
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
    )
    return pipeline, json.loads((directory / "report.json").read_text())


def images(pipeline: DiffusionPipeline) -> Tensor:
    return torch.from_numpy(pipeline(2, [torch.Generator().manual_seed(i) for i in range(2)], 3, "np").images)


LEFT = {
    "transposed convolutions": ["leave"],
    "layers that run more than once in a pass of the network": ["clock.2", "clock.0"],
    "matrices outside of layers": ["blocks.0.text"],
}


@pytest.mark.parametrize("learned", [False, True])
def test_an_awkward_network_is_quantized_saved_opened_and_its_rest_is_named(
    learned: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fpq_lightning")
    pipeline, report = run(tmp_path / "run", rounding=fpq.RoundingRecipe(learned=learned, iterations=5, batch_size=4))
    assert [block["name"] for block in report["blocks"]] == ["enter", "blocks.0", "blocks.1"]
    assert all(block["error_quantized"] <= block["error_nearest"] for block in report["blocks"])
    assert len(report["blocks"][2]["weight_formats"]) == 7
    assert {kept["kind"]: kept["names"] for kept in report["coverage"]["kept"]} == LEFT
    size = 16 * 16
    assert report["coverage"]["quantized"] == 16 * 16 + 2 * size + 3 * 16 + 6 * size
    assert report["coverage"]["parameters"] == report["coverage"]["quantized"] + 260 + 16 + size + 5 * 16
    assert report["quantized_share"] == report["coverage"]["quantized"] / report["coverage"]["parameters"]
    said = [str(warning.message) for warning in recwarn]
    (left,) = (line for line in said if line.startswith("left in full precision"))
    assert "transposed convolutions (leave)" in left
    assert "run more than once in a pass of the network (clock.2, clock.0)" in left
    (unreached,) = (line for line in said if "no sample to learn from" in line)
    assert unreached.startswith("blocks.1.experts.2.0, blocks.1.experts.2.2: ")
    assert not [line for line in said if "no finite statistics" in line]
    assert f"quantized: {report['quantized_share']:.2%} of the denoiser's parameters" in caplog.messages
    assert any("in full precision: " in line and "(blocks.0.text)" in line for line in caplog.messages)
    assert "transposed convolutions (leave)" in (tmp_path / "run" / "report.md").read_text()
    again = fpq.load_quantized(tmp_path / "run" / "quantized")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again), images(pipeline))


@pytest.mark.parametrize("skipping", [torch.tensor(0), "low"])
def test_a_block_that_one_sample_skips_is_left_to_the_network(skipping: Any) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([_two_layers() for _ in range(3)])

        def forward(self, x: Tensor, noise: Any) -> Tensor:
            low = noise == "low" if isinstance(noise, str) else noise.min() == 0
            for i, block in enumerate(self.blocks):
                if not (low and i == 1):
                    x = x + block(x)
            return x

    network, usual = Skipping(), "top" if isinstance(skipping, str) else torch.tensor(9)
    noise = [usual] * 5 + [skipping] + [usual] * 2
    axes = {"noise": Axis("shared")} if isinstance(skipping, str) else {}
    inputs = {"x": torch.randn(8, 3, WIDTH), "noise": noise if axes else torch.stack(noise)}
    calibration = CalibrationSet(inputs, torch.ones(8), axes=axes)
    found = find_units(network, discover_units(network), calibration, torch.device("cpu"))
    assert [unit.name for unit in found.units] == ["blocks.0", "blocks.2"]
    assert list(found.left) == ["blocks.1.0", "blocks.1.2"]


def test_what_is_excluded_may_run_twice_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    _, report = run(tmp_path / "run", exclude=["clock.*"], rounding=fpq.RoundingRecipe(start="nearest"))
    kept = {entry["kind"]: entry["names"] for entry in report["coverage"]["kept"]}
    assert kept["Linear and Conv layers left out by choice"] == ["clock.2", "clock.0"]
    assert not [warning for warning in recwarn if "clock" in str(warning.message)]


def test_a_network_of_which_nothing_can_be_quantized_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layer can be quantized: .* more than once .*\(clock"):
        run(tmp_path / "run", include=["clock.*"])


def test_side_work_that_fails_costs_a_line_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("out of\nrange")

    monkeypatch.setattr(UnitTrainer, "_mean_errors", fail)
    monkeypatch.setattr(report_callback, "activation_ranges", fail)
    monkeypatch.setattr(report_callback, "layer_statistics", fail)
    _, report = run(tmp_path / "run", rounding=fpq.RoundingRecipe(start="nearest"))
    said = [str(warning.message) for warning in recwarn]
    for what in ("enter: bias correction", "activation ranges", "statistics of the weights"):
        assert f"{what}: left out, for IndexError: out of range" in said
    assert len(report["blocks"]) == 3
    assert "activation_ranges" not in report
    assert "layers" not in report
