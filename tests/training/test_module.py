"""Reconstruction: never worse than nearest, on the grid, reproducible, and with the right gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from models import tiny_pipeline
from packed_reader import read_denoiser
from torch import Tensor, nn

from fpq_lightning import (
    ActivationRecipe,
    CalibrationDataModule,
    Recipe,
    RoundingRecipe,
    SamplerConfig,
    WeightRecipe,
    load_quantized,
    quantize,
)
from fpq_lightning.calibration.disk import load_calibration_set
from fpq_lightning.calibration.replay import sample_energies
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.calibrated import quantized_layers
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.quantization.quantizer import Granularity, Quantizer
from fpq_lightning.reconstruction import initialise
from fpq_lightning.reconstruction.initialise import collect_layer_inputs, search_unit
from fpq_lightning.reconstruction.objective import relative_error


@dataclass
class Run:
    """A finished run, and what it left."""

    pipeline: DiffusionPipeline
    directory: Path

    @property
    def blocks(self) -> list[dict[str, Any]]:
        return json.loads((self.directory / "report.json").read_text())["blocks"]

    @property
    def saved(self) -> dict[str, Tensor]:
        """The stored weights and biases, read by a reader of the file format that knows nothing of the package."""
        tensors = read_denoiser(self.directory / "quantized" / "unet")
        return {name: torch.from_numpy(array.copy()) for name, array in tensors.items() if ".inputs." not in name}


def run(directory: Path, recipe: Recipe, pipeline: DDPMPipeline | None = None, **options: Any) -> Run:
    data = CalibrationDataModule(n_samples=16, n_search=8, micro_batch=8, held_out_fraction=0.25)
    sampler = SamplerConfig(steps=4, batch_size=4)
    found = quantize(
        pipeline or tiny_pipeline(),
        recipe,
        directory,
        data,
        sampler,
        base_model="tiny",
        accelerator="cpu",
        **options,
    )
    return Run(found, directory)


def rounding(**options: Any) -> RoundingRecipe:
    return RoundingRecipe(**{"start": "nearest", "learned": True, "iterations": 10, "batch_size": 4, **options})


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("learned") / "run", Recipe(rounding=rounding(iterations=20)))


def grid(name: str) -> Tensor:
    """Every value of a format by the textbook: ExMy with the IEEE bias, or integers."""
    if "int" in name:
        width, unsigned = int(name[-1]), name.startswith("u")
        low, high = (0, 2**width) if unsigned else (-(2 ** (width - 1)), 2 ** (width - 1))
        return torch.arange(low, high, dtype=torch.float64)
    exponent, mantissa = int(name[-3]), int(name[-1])
    bias = 2 ** (exponent - 1) - 1
    values = [
        2.0 ** (max(e, 1) - bias) * ((e > 0) + m / 2**mantissa) for e in range(2**exponent) for m in range(2**mantissa)
    ]
    return torch.tensor(sorted({*values, *([] if name.startswith("u") else [-v for v in values])}), dtype=torch.float64)


def _nearest(values: Tensor, points: Tensor) -> Tensor:
    index = torch.searchsorted(points, values).clamp(1, len(points) - 1)
    below, above = points[index - 1], points[index]
    return torch.where(values - below < above - values, below, above)


# --- learned rounding ------------------------------------------------------------------------------------------


def test_no_unit_is_worse_than_with_nearest_rounding(learned: Run) -> None:
    assert len(learned.blocks) == 12  # two resamplers belong to the block before them
    for block in learned.blocks:
        assert 0 < block["error_quantized"] <= block["error_nearest"] < 1
    kept = [block["kept"] for block in learned.blocks]
    assert kept.count("learned") >= 5  # the tiny model has units that can be improved
    assert all(b["error_quantized"] < b["error_nearest"] for b in learned.blocks if b["kept"] == "learned")


def test_the_reported_errors_are_those_of_the_held_out_samples(learned: Run) -> None:
    # conv_in reads the network's own input, so its error needs nothing else of the network.
    calibration = load_calibration_set(learned.directory / "calibration")
    base, layer = tiny_pipeline().unet.conv_in.double(), learned.pipeline.unet.conv_in
    x, weights = calibration.inputs["sample"][12:].double(), calibration.weights[12:].double()
    target = base(x)
    report = next(b for b in learned.blocks if b["name"] == "conv_in")
    saved = learned.saved

    def error(weight: Tensor, bias: Tensor, scale: Tensor) -> float:
        rounded = _nearest(x / scale.double(), grid(report["activation_formats"]["conv_in"][0])) * scale.double()
        found = nn.functional.conv2d(rounded, weight.double(), bias.double(), padding=1)
        energy = ((found - target) ** 2).mean((1, 2, 3)), (target**2).mean((1, 2, 3))
        return ((energy[0] * weights).sum() / (energy[1] * weights).sum()).item()

    scale = layer.variants["quantized"].inputs[0].scale
    learned_error = error(saved["conv_in.weight"], saved["conv_in.bias"], scale)
    assert learned_error == pytest.approx(report["error_quantized"], rel=1e-3)
    nearest = layer.variants["nearest"]
    q = nearest.weights[0]
    rows = base.weight.flatten(1) / q.scale.double()
    weight = (_nearest(rows, grid(q.format.name)) * q.scale.double()).reshape(base.weight.shape)
    assert error(weight, base.bias, nearest.inputs[0].scale) == pytest.approx(report["error_nearest"], rel=1e-3)


@pytest.mark.parametrize("rate", ["learning_rate", "scale_learning_rate"])
def test_what_learning_makes_worse_is_kept_at_nearest_bit_for_bit(tmp_path: Path, rate: str) -> None:
    # The one flips every rounding at random, the other drives scales to zero and infinity.
    recipe = Recipe(rounding=rounding(**{rate: 1e6 if rate == "learning_rate" else 50.0}))
    found = run(tmp_path / "run", recipe)
    assert {block["kept"] for block in found.blocks} == {"nearest"}
    saved = found.saved
    layers = quantized_layers(found.pipeline.unet)
    for name, layer in layers.items():
        expected = layer.from_rows(
            [q(r) for q, r in zip(layer.variants["nearest"].weights, layer.weight_rows(), strict=True)]
        )
        assert torch.equal(saved[f"{name}.weight"], expected)
    plain = run(tmp_path / "nearest", Recipe(rounding=rounding(learned=False))).saved
    first = ["conv_in.weight", "time_embedding.linear_1.weight"]  # of the units whose inputs are the same in both
    assert all(torch.equal(saved[name], plain[name]) for name in first)


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_saved_weights_lie_on_the_grid_of_the_reported_format_and_codes_decode_to_them(
    tmp_path: Path, learned: Run, granularity: str
) -> None:
    found = learned
    if granularity != "channel":
        weights = WeightRecipe(granularity=granularity, group_size=4 if granularity == "group" else None)
        recipe = Recipe(weights=weights, rounding=rounding(), exclude=["conv_in"])
        found = run(tmp_path / "run", recipe)
    saved, layers = found.saved, quantized_layers(found.pipeline.unet)
    formats = {name: names for block in found.blocks for name, names in block["weight_formats"].items()}
    assert formats.keys() == layers.keys()
    moved = 0
    for name, names in formats.items():
        layer = layers[name]
        quantization = layer.variants["quantized"]
        parts = saved[f"{name}.weight"].split(layer.splits, dim=1)
        assert len(names) == len(parts) == len(quantization.weights)
        for i, (part, q) in enumerate(zip(parts, quantization.weights, strict=True)):
            assert q.format.name == names[i]
            n_rows = {"tensor": 1, "channel": len(part), "group": part.numel() // 4}[granularity]
            rows = part.reshape(n_rows, -1)
            assert q.scale.shape == (n_rows, 1)
            points = grid(names[i])
            y = rows.double() / q.scale.double()
            assert (y - _nearest(y, points)).abs().max() <= 1e-6 * points.abs().max()
            if quantization.codes is not None:
                codes = quantization.codes[i]
                assert codes.max() < 2**q.format.bits
                assert torch.equal(q.decode(codes), rows)
                moved += (q.encode(layer.weight_rows()[i]) != codes).sum().item()
    assert moved > 0  # learning rounded some weights the other way


def test_units_report_the_parameters_of_their_layers(learned: Run) -> None:
    unet = tiny_pipeline().unet
    for block in learned.blocks:
        layers = [unet.get_submodule(name) for name in block["weight_formats"]]
        assert block["parameters"] == sum(p.numel() for layer in layers for p in layer.parameters())
    all_layers = [m for m in unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sum(b["parameters"] for b in learned.blocks) == sum(p.numel() for m in all_layers for p in m.parameters())


def test_the_same_seed_gives_the_same_bits(learned: Run, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # nothing may hang on the global generator
    again = run(tmp_path / "run", Recipe(rounding=rounding(iterations=20)))
    expected, found = learned.saved, again.saved
    assert expected.keys() == found.keys()
    assert {k for k in expected if expected[k].numpy().tobytes() != found[k].numpy().tobytes()} == set()


def test_learning_uses_the_gradient_of_the_unit_and_not_noise(learned: Run) -> None:
    # The mean over units of the error that is left: learned must be better by more than a chance flip would give.
    ratios = [b["error_quantized"] / b["error_nearest"] for b in learned.blocks]
    assert math.prod(ratios) < 0.9


# --- gradients -------------------------------------------------------------------------------------------------


class _DoneError(Exception):
    pass


class _Probe(pl.Callback):
    """Hands the objective of a unit to a function, and ends the run."""

    def __init__(self, unit: str, use: Callable[[Any, Any], None]) -> None:
        self.unit, self.use = unit, use

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.units[pl_module.plan.unit].name == self.unit:
            self.use(pl_module, pl_module.unit_trainer.backward.objective)
            raise _DoneError


@pytest.mark.parametrize("scale_aware", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_gradients_agree_with_finite_differences_in_float64(tmp_path: Path, scale_aware: bool, strength: float) -> None:
    result: dict[str, Any] = {}

    def use(module: Any, objective: Any) -> None:
        rows, beta = torch.tensor([0, 3, 3, 7]), 5.0
        (quantization,) = objective.quantizations
        (rounded,), (quantizer,) = quantization.roundings, quantization.weights
        with torch.no_grad():
            rounded.v.add_(torch.randn_like(rounded.v, generator=None) * 0.3)
        with torch.enable_grad():
            loss = sum(objective(rows, rows, torch.tensor(beta), torch.tensor(strength), torch.tensor(0.0)))
            gradients = torch.autograd.grad(loss, [rounded.v, quantizer.log_gain])
        layer = module.denoiser.conv_in
        x, weights = objective.replay.inputs(rows)[0][0].double(), objective.replay.weights(rows).double()
        full = {"weight": layer.weight.double(), "bias": layer.bias.double()}
        target = nn.functional.conv2d(x, full["weight"], full["bias"], padding=1)
        scale, fmt = quantizer.scale.double(), quantizer.format
        steps = rounded.step.double()
        relative = steps.abs() / steps.abs().amax(1, keepdim=True) if scale_aware else 1.0

        def by_hand(v: Tensor, gain: Tensor) -> float:
            h = (1.2 * torch.sigmoid(v / relative) - 0.1).clamp(0, 1)
            value = ((rounded.base.double() + h) * steps).clamp(-fmt.max, fmt.max)
            weight = (value * scale * gain.exp()).reshape(layer.weight.shape)
            error = (nn.functional.conv2d(x, weight, full["bias"], padding=1) - target).square().mean((1, 2, 3))
            ratio = (error * weights).sum() / (target.square().mean((1, 2, 3)) * weights).sum()
            regulariser = (1 - (2 * h - 1).abs() ** beta).mean()
            return (ratio / objective.start_error + strength * regulariser).item()

        v, gain = rounded.v.detach().double(), quantizer.log_gain.detach().double()
        result["loss"] = loss.item(), by_hand(v, gain)
        result["v"], result["gain"] = [], []
        for name, tensor, gradient in (("v", v, gradients[0]), ("gain", gain, gradients[1])):
            for i in range(0, tensor.numel(), 7 if name == "v" else 1):
                shift = torch.zeros_like(tensor)
                shift.view(-1)[i] = 1e-5
                args = [(v + s * shift, gain) if name == "v" else (v, gain + s * shift) for s in (1, -1)]
                difference = (by_hand(*args[0]) - by_hand(*args[1])) / 2e-5
                result[name].append((gradient.flatten()[i].item(), difference))

    torch.manual_seed(5)
    recipe = Recipe(activations=ActivationRecipe(formats=None), rounding=rounding(scale_aware=scale_aware))
    with pytest.raises(_DoneError):
        run(tmp_path / "run", recipe, callbacks=[_Probe("conv_in", use)])
    assert result["loss"][0] == pytest.approx(result["loss"][1], rel=1e-4)
    for name in ("v", "gain"):
        found, expected = torch.tensor(result[name], dtype=torch.float64).unbind(1)
        assert expected.abs().max() > 1e-4
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_relative_error_is_weighted_error_over_weighted_energy_averaged_over_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(5, 3, 2, generator=generator), torch.randn(5, 4, generator=generator)]
    targets = [torch.randn(o.shape, generator=generator) for o in outputs]
    weights = torch.rand(5, generator=generator)
    expected = []
    for o, t in zip(outputs, targets, strict=True):
        pairs = [(float(w), a.double(), b.double()) for w, a, b in zip(weights, o, t, strict=True)]
        error = sum(w * ((a - b) ** 2).mean().item() for w, a, b in pairs)
        expected.append(error / sum(w * (b**2).mean().item() for w, _, b in pairs))
    differences = [o - t for o, t in zip(outputs, targets, strict=True)]
    energies = [sample_energies(leaves, weights).sum(0) for leaves in (differences, targets)]
    assert relative_error(*energies).item() == pytest.approx(sum(expected) / 2, rel=1e-5)


# --- recipes ---------------------------------------------------------------------------------------------------


def _weights(**options: Any) -> Recipe:
    return Recipe(weights=WeightRecipe(**options), rounding=rounding())


RECIPES = {
    "not learned": Recipe(rounding=rounding(learned=False)),
    "weights only": Recipe(activations=ActivationRecipe(formats=None), rounding=rounding()),
    "activations only": Recipe(weights=WeightRecipe(formats=None), rounding=rounding()),
    "integers": Recipe(
        weights=WeightRecipe(formats="uint4"), activations=ActivationRecipe(formats="uint8"), rounding=rounding()
    ),
    "signed integers": _weights(formats="int4"),
    "per token": Recipe(activations=ActivationRecipe(granularity="token"), rounding=rounding()),
    "some layers per token": Recipe(
        activations=ActivationRecipe(unsigned=True, token_layers=["mid_block.*", "conv_in"]), rounding=rounding()
    ),
    "per tensor": _weights(granularity="tensor"),
    "tensor error": _weights(objective="tensor"),
    "max": _weights(objective="max"),
    "unsigned activations": Recipe(activations=ActivationRecipe(unsigned=True), rounding=rounding()),
    "output objective of activations": Recipe(activations=ActivationRecipe(objective="output"), rounding=rounding()),
    "one format": _weights(formats="e2m1"),
    "a list of formats": _weights(formats=["e2m1", "e3m0"]),
    "full-precision inputs": Recipe(quantized_inputs=False, rounding=rounding()),
    "no splits": Recipe(split_skips=False, rounding=rounding()),
    "scale aware, fixed scales": Recipe(
        rounding=rounding(scale_aware=True, learn_weight_scales=False, learn_activation_scales=False),
        correct_biases=False,
    ),
    "groups": Recipe(weights=WeightRecipe(granularity="group", group_size=4), exclude=["conv_in"], rounding=rounding()),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_recipe_runs_end_to_end(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    found = run(tmp_path / "run", recipe)
    learns = recipe.rounding.learned and recipe.weights.formats is not None
    for block in found.blocks:
        if not block["weight_formats"]:
            assert name == "groups"
            assert block["name"] == "conv_in"
            continue
        assert math.isfinite(block["error_quantized"])
        assert block["error_quantized"] <= block["error_nearest"]
        assert block["iterations"] == (10 if learns else 0)
        assert learns or block["kept"] == "nearest"
        candidates = {f.name for f in recipe.weight_formats()}
        assert all(set(names) <= candidates and bool(names) == bool(candidates)
                   for names in block["weight_formats"].values())  # fmt: skip
        candidates = {f.name for f in recipe.activation_formats()}
        assert all(set(names) <= candidates and bool(names) == bool(candidates)
                   for names in block["activation_formats"].values())  # fmt: skip
    loaded = load_quantized(found.directory / "quantized")
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])
    with torch.no_grad():
        expected = tiny_pipeline().unet(x, t).sample
        result = found.pipeline.unet(x, t).sample
        assert torch.equal(loaded.unet(x, t).sample, result)
    assert 0 < (result - expected).square().mean() / expected.square().mean() < 0.3
    if recipe.weights.formats is None:
        base = tiny_pipeline().unet.state_dict()
        assert all(torch.equal(v, base[k]) for k, v in found.saved.items() if k.endswith("weight"))


def test_excluded_layers_keep_full_precision(tmp_path: Path) -> None:
    recipe = Recipe(exclude=["conv_*", "*time_emb*"], rounding=rounding())
    found = run(tmp_path / "run", recipe)
    base, saved = tiny_pipeline().unet.state_dict(), found.saved
    excluded = {"conv_in", "conv_out", *(name.rsplit(".", 1)[0] for name in base if "time_emb" in name)}
    assert len(excluded) > 4
    for name in excluded:
        assert torch.equal(saved[f"{name}.weight"], base[f"{name}.weight"])
        assert torch.equal(saved[f"{name}.bias"], base[f"{name}.bias"])
    quantized = {name for block in found.blocks for name in block["weight_formats"]}
    assert not quantized & excluded
    assert all(not torch.equal(saved[f"{name}.weight"], base[f"{name}.weight"]) for name in quantized)
    description = json.loads((found.directory / "quantized" / "unet" / "config.json").read_text())
    assert set(description["quantization_config"]["layers"]) == quantized


def test_only_included_layers_are_quantized(tmp_path: Path) -> None:
    found = run(tmp_path / "run", Recipe(include=["mid_block.*"], rounding=rounding()))
    quantized = {name for block in found.blocks for name in block["weight_formats"]}
    assert quantized
    assert all(name.startswith("mid_block.") for name in quantized)
    base = tiny_pipeline().unet.state_dict()
    changed = {k for k, v in found.saved.items() if not torch.equal(v, base[k])}
    assert changed
    assert all(name.startswith("mid_block.") for name in changed)


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_weight_is_refused_by_the_name_of_its_layer(tmp_path: Path, value: float) -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0\.conv1") as error:
        run(tmp_path / "run", Recipe(rounding=rounding()), pipeline)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "quantized").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(weights=WeightRecipe(granularity="group", group_size=5)), r"conv_in.*group_size 5"),
        (Recipe(include=["decoder.*"]), r"pattern 'decoder\.\*' matches none"),
        (Recipe(exclude=["nothing"]), "pattern 'nothing' matches none"),
        (Recipe(include=["conv_in"], exclude=["conv_*"]), "leave no layer"),
        (Recipe(activations=ActivationRecipe(token_layers="attn.*")), r"pattern 'attn\.\*' matches none"),
    ],
    ids=["group size", "include", "exclude", "nothing left", "layers with a scale a token"],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused_before_anything_is_sampled(
    tmp_path: Path, recipe: Recipe, message: str
) -> None:
    pipeline = tiny_pipeline()
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    recipe.rounding = rounding()
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "run", recipe, pipeline)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "quantized").exists()
    assert calls == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _weights(formats="e9m9"), "unknown format|float format"),
        (lambda: _weights(formats="fp5"), "unknown format 'fp5'"),
        (lambda: _weights(formats=["e2m1", "e4m3"]), "one width"),
        (lambda: _weights(granularity="group"), "group_size"),
        (lambda: _weights(granularity="group", group_size=0), "group_size"),
        (lambda: Recipe(WeightRecipe(formats=None), ActivationRecipe(formats=None)), "neither"),
        (lambda: Recipe(rounding=RoundingRecipe(start="nearest", learned=True, iterations=0)), "iterations"),
        (lambda: Recipe(activations=ActivationRecipe("uint8", token_layers="*")), "token_layers needs a signed"),
        (lambda: Recipe(hardware_types=True, activations=ActivationRecipe(unsigned=True)), "unsigned"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(make: Callable[[], Recipe], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_quantize_refuses_a_finished_run_and_another_recipe_in_its_directory(learned: Run) -> None:
    with pytest.raises(ValueError, match="finished"):
        run(learned.directory, Recipe(rounding=rounding(iterations=20)))
    with pytest.raises(ValueError, match=r"recipe\.rounding\.iterations: 20 -> 10"):
        run(learned.directory, Recipe(rounding=rounding()))


def test_the_progress_bar_can_be_turned_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", Recipe(include=["conv_in"], rounding=rounding()), enable_progress_bar=False)
    captured = capsys.readouterr()
    assert "calibrating" not in captured.out + captured.err


# --- outliers --------------------------------------------------------------------------------------------------


def _search_one_layer(x: Tensor, **activations: Any) -> Quantizer:
    layer = make_quantized(nn.Linear(6, 4).requires_grad_(False), Granularity("channel"))
    unit = Unit("proj", layer, {"block.proj": layer})
    recipe = Recipe(activations=ActivationRecipe("e2m3", **activations))
    search_unit(unit, {"block.proj": x}, torch.ones(len(x)), recipe)
    return layer.variants["nearest"].inputs[0]


def test_a_static_scale_that_outliers_stretch_is_warned_of_by_name() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    x[:25, 2] = 1e6  # so many and so large that no clip leaves anything of the rest
    with pytest.warns(UserWarning, match=r"block\.proj: one static scale loses .*recipe\.activations\.token_layers"):
        _search_one_layer(x)


def test_layers_that_read_one_tensor_share_it_in_the_search() -> None:
    block = nn.ModuleDict({name: nn.Linear(6, 6) for name in "abc"}).requires_grad_(False)
    layers = {name: make_quantized(layer, Granularity("channel")) for name, layer in block.items()}

    def call(x: Tensor) -> None:
        layers["a"](x), layers["c"](layers["b"](x))

    batches = [torch.randn(2, 6), torch.randn(3, 6)]
    found = collect_layer_inputs(Unit("block", block, dict(layers)), map(call, batches))
    assert found["a"] is found["b"]
    assert torch.equal(found["a"], torch.cat(batches))
    assert torch.equal(found["c"], layers["b"](torch.cat(batches)))


@pytest.mark.parametrize("objective", ["output", "tensor"])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_search_of_half_precision_inputs_never_holds_them_in_float32(
    objective: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(12, 5, 6), torch.rand(12)
    sizes: list[int] = []
    to_float = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: sizes.append(x.numel() * (x.dtype == torch.bfloat16)) or to_float(x))
    monkeypatch.setattr(initialise, "_MAX_VALUES", 8)
    found = []
    for values in (x.bfloat16(), to_float(x.bfloat16())):
        layer = make_quantized(nn.Linear(6, 4).requires_grad_(False), Granularity("channel"))
        torch.nn.init.constant_(layer.weight, 0.3)
        layer.weight += torch.arange(24).reshape(4, 6) / 100
        recipe = Recipe(activations=ActivationRecipe("e2m3", objective=objective))  # type: ignore[arg-type]
        search_unit(Unit("proj", layer, {"proj": layer}), {"proj": values}, weights, recipe, passes)
        found.append(layer.variants["nearest"].to_state())
    assert max(sizes) == x.numel() // passes
    assert str(found[0]) == str(found[1])


@pytest.mark.parametrize("activations", [{}, {"granularity": "token"}, {"token_layers": ["*.proj"]}])
def test_inputs_without_outliers_or_with_a_scale_for_each_token_are_not_warned_of(
    activations: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 6).clamp(min=0)
    if activations:
        x[:25, 2] = 1e6
    quantizer = _search_one_layer(x, **activations)
    calm = quantizer(x)[25:]
    assert ((calm - x[25:]).square().sum() / x[25:].square().sum()).item() < 0.01  # whatever the other tokens are
    assert not [w for w in recwarn if "static scale" in str(w.message)]
