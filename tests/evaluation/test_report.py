"""Reports: figures that say what the numbers say, and a page that works in a browser without a network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from models import fit_arguments, save_tiny
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.cli import main
from fpq_lightning.evaluation.report.figures import unit_errors
from fpq_lightning.evaluation.report.files import write_reports
from fpq_lightning.evaluation.report.html import render_html
from fpq_lightning.evaluation.report.markdown import render_markdown, variants_table
from fpq_lightning.evaluation.statistics import activation_ranges, layer_statistics, weight_statistics
from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.nn.calibrated import LayerQuantization
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.quantization.quantizer import Granularity, Quantizer

QUANTIZED = "quantized"  # how the label of what was kept begins
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


def _block(i: int) -> dict[str, Any]:
    return {
        "name": f"unit.{i}",
        "parameters": 100,
        "weight_formats": {f"unit.{i}.a": ["e2m1"], f"unit.{i}.b": ["e1m2", "e2m1"]},
        "activation_formats": {f"unit.{i}.a": ["e2m5"]},
        "error_nearest": 1e-2 / (i + 1),
        "error_quantized": 3e-3 / (i + 1),
        "kept": "learned",
        "iterations": 10,
        "seconds": 1.0,
    }


def _report(**changes: Any) -> dict[str, Any]:
    variant = {"fd": 1.234, "fd_real": None, "kid": 0.00321, "psnr": 23.45, "ssim": 0.75, "n_images": 12}
    full_precision, quantized = {**variant, "psnr": None}, {**variant, "fd": 0.5}
    ranges = [{"name": "l0", "clip": 2.0, "largest": [1.0, None]}, {"name": "l1", "clip": None, "largest": [1, 1]}]
    report = {
        "model": "a <b>model</b>",
        "fingerprint": "abc",
        "variants": {"full_precision": full_precision, "nearest": variant, "quantized": quantized},
        "blocks": [_block(i) for i in range(4)],
        "calibration": {"seconds": 10.0, "peak_memory_bytes": 2**30, "samples": 16, "seeds": [0]},
        "weight_bits": 4.06,
        "sparsity": 0.1,
        "quantized_share": 0.99,
        "layers": [{"name": f"l{i}", "parameters": 9, "bits": 4.1, "zeros": 0.1 * i} for i in range(4)],
        "activation_ranges": {"timesteps": [0.0, 500.0, 1000.0], "layers": ranges},
        "device": "cpu",
        "versions": {"torch": "2"},
    }
    return {**report, **changes}


def _samples(n: int = 11, size: int = 8) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    names = ("full_precision", "nearest", "quantized")
    return {name: torch.rand(n, 3, size, size, generator=draw) * 2 - 1 for name in names}


# --- tables ----------------------------------------------------------------------------------------------------


def test_the_table_shows_what_was_measured_and_nothing_else() -> None:
    lines = variants_table(_report()["variants"]).splitlines()
    assert lines[0] == "| variant | FD | KID x1000 | PSNR dB | SSIM | images |"
    assert lines[2] == "| full precision, other seeds (noise floor) | 1.234 | 3.21 | - | 0.7500 | 12 |"
    assert lines[4] == "| quantized | 0.500 | 3.21 | 23.45 | 0.7500 | 12 |"


def test_reports_name_the_recipe_and_the_size_of_the_files() -> None:
    weights = fpq.WeightRecipe(["e2m1", "e1m2"], "group", 16)
    recipe = fpq.Recipe(
        weights=weights, rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=70)
    ).to_dict()
    report = _report(recipe=recipe, disk_bytes=3 * 2**20)
    phrase = (
        "e2m1/e1m2 weights with a scale for each group of 16, fp8 activations, rounding learned for 70 iterations a "
        "unit from rounding to nearest"
    )
    assert f"Recipe: {phrase}." in render_markdown(report)
    assert "files take 3.0 MiB" in render_markdown(report)
    assert f"on cpu: {phrase}" in render_html(report, _samples())
    nearest = fpq.Recipe(
        weights=fpq.WeightRecipe(None), rounding=fpq.RoundingRecipe(start="nearest"), correct_biases=False
    )
    assert "full-precision weights, fp8" in render_markdown(_report(recipe=nearest.to_dict()))
    assert "rounding to nearest" in render_markdown(_report(recipe=nearest.to_dict()))


def test_images_that_are_not_finite_are_counted_in_the_table() -> None:
    variants = {"quantized": {"fd": None, "psnr": None, "not_finite": 3, "n_images": 12}}
    assert variants_table(variants).splitlines()[2] == "| quantized | 12 (3 not finite) |"


def test_fid_says_by_which_convention() -> None:
    report = _report(variants={"quantized": {"fid": 12.3, "n_images": 5000}})
    text = render_markdown(report)
    assert "| 12.30 |" in text
    assert "without antialiasing" in text
    assert "without antialiasing" not in render_markdown(_report())


# --- statistics ------------------------------------------------------------------------------------------------


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.b(self.a(sample * (1 + timestep[:, None])))


def _quantized_layers(activations: str | None = "e4m3") -> _TwoLayers:
    torch.manual_seed(0)
    model = _TwoLayers().requires_grad_(False)
    for layer in (model.a, model.b):
        quantized = make_quantized(layer, Granularity("tensor"))
        weight = Quantizer(parse_format("e2m1"), torch.tensor([[layer.weight.abs().max() / 6]]))
        inputs = [] if activations is None else [Quantizer(parse_format(activations), torch.tensor(0.01))]
        quantized.variants["quantized"] = LayerQuantization([weight], inputs)
    return model


def test_bits_and_zeros_are_those_of_the_quantized_weights() -> None:
    model = _quantized_layers()
    expected = {}
    for name, layer in (("a", model.a), ("b", model.b)):
        scale = layer.weight.abs().max() / 6
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = grid[((layer.weight.abs() / scale)[..., None] - grid).abs().argmin(-1)]
        n = layer.weight.numel()
        expected[name] = (n, 4 + 32 / n, (nearest == 0).double().mean().item())
    found = layer_statistics(model)
    assert [layer["name"] for layer in found] == ["a", "b"]
    for layer in found:
        assert (layer["parameters"], layer["bits"], layer["zeros"]) == pytest.approx(expected[layer["name"]])
    assert 0 < expected["a"][2] < 1
    whole = weight_statistics(model)
    assert whole["weight_bits"] == pytest.approx((24 * 4 + 12 * 4 + 64) / 36)
    assert whole["sparsity"] == pytest.approx((24 * expected["a"][2] + 12 * expected["b"][2]) / 36)
    assert whole["quantized_share"] == 1


def test_bits_count_the_offsets_of_scales() -> None:
    layer = make_quantized(nn.Linear(12, 5).requires_grad_(False), Granularity("channel"))
    scale = torch.full((5, 1), 0.1)
    layer.variants["quantized"] = LayerQuantization([Quantizer(parse_format("uint4"), scale, -8 * scale)])
    (found,) = layer_statistics(nn.Sequential(layer))
    assert found["bits"] == pytest.approx(4 + (32 + 32) / 12)


def test_the_clip_of_an_input_in_parts_is_the_largest_of_them() -> None:
    model = _TwoLayers().requires_grad_(False)
    layer = make_quantized(model.b, Granularity("tensor"), (2, 4))
    e4m3 = parse_format("e4m3")
    inputs = [Quantizer(e4m3, torch.tensor(scale)) for scale in (0.03, 0.01)]
    layer.variants["quantized"] = LayerQuantization(inputs=inputs)
    calibration = CalibrationSet({"sample": torch.randn(5, 4), "timestep": torch.arange(5)}, torch.ones(5))
    (found,) = activation_ranges(model, calibration, 5, torch.device("cpu"))["layers"]
    assert found["clip"] == pytest.approx(0.03 * e4m3.max)


def test_activation_ranges_are_the_largest_inputs_of_each_span_of_timesteps() -> None:
    model = _quantized_layers()
    generator = torch.Generator().manual_seed(1)
    timestep = torch.randint(0, 1000, (50,), generator=generator)
    sample = torch.randn(50, 4, generator=generator)
    calibration = CalibrationSet({"sample": sample, "timestep": timestep}, torch.ones(50))
    found = activation_ranges(model, calibration, batch_size=7, device=torch.device("cpu"))
    edges = found["timesteps"]
    assert len(edges) == 11
    assert [layer["name"] for layer in found["layers"]] == ["a", "b"]
    x = sample * (1 + timestep[:, None])
    inputs = {"a": x, "b": nn.functional.linear(x, model.a.weight, model.a.bias)}
    for layer in found["layers"]:
        assert layer["clip"] == pytest.approx(0.01 * parse_format("e4m3").max)
        for low, high, largest in zip(edges, edges[1:], layer["largest"], strict=False):
            rows = (timestep >= low) & (timestep < high)
            expected = inputs[layer["name"]][rows].abs().amax().item() if rows.any() else None
            assert largest == (None if expected is None else pytest.approx(expected, rel=1e-5))
    assert model.a.mode == "full_precision"


def test_activation_ranges_know_timesteps_of_several_shapes() -> None:
    timesteps, sample = [torch.tensor([4.0]), torch.tensor([0.0, 9.0, 9.0])], torch.randn(2, 4)
    sets = [CalibrationSet({"sample": sample, "timestep": t}, torch.ones(2)) for t in (timesteps, torch.tensor([4, 9]))]

    class Noisiest(_TwoLayers):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(sample, timestep.reshape(len(sample), -1).amax(1))

    torch.manual_seed(0)
    model = Noisiest().requires_grad_(False)
    quantized = make_quantized(model.a, Granularity("tensor"))
    quantized.variants["quantized"] = LayerQuantization(inputs=[Quantizer(parse_format("e4m3"), torch.tensor(0.1))])
    found, expected = (activation_ranges(model, calibration, 2, torch.device("cpu")) for calibration in sets)
    assert found == expected
    assert found["timesteps"][0] == 4


def test_without_timesteps_or_static_clips_there_are_no_ranges() -> None:
    calibration = CalibrationSet({"sample": torch.randn(5, 4), "timestep": torch.arange(5)}, torch.ones(5))
    found = activation_ranges(_quantized_layers(None), calibration, 2, torch.device("cpu"))
    assert all(layer["clip"] is None for layer in found["layers"])
    renamed = CalibrationSet({"sample": torch.randn(5, 4), "sigma": torch.arange(5)}, torch.ones(5))
    assert activation_ranges(_quantized_layers(), renamed, 2, torch.device("cpu")) == {}


class _Awkward(_TwoLayers):
    """Timesteps of each token, a layer that runs twice with different shapes, and one that is given some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.vector = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = sample * (1 + timestep.amax(1))[:, None, None]
        self.some(sample[sample[:, 0, 0] > 0])
        self.vector(sample.new_ones(4))
        return self.b(self.a(x) + self.a(3 * x[:, :1]))


def _awkward() -> tuple[_Awkward, CalibrationSet]:
    torch.manual_seed(0)
    model = _Awkward().requires_grad_(False)
    for layer in (model.a, model.b, model.some, model.vector):
        quantized = make_quantized(layer, Granularity("tensor"))
        quantized.variants["quantized"] = LayerQuantization(inputs=[Quantizer(parse_format("e4m3"), torch.tensor(0.1))])
    timestep = torch.randint(1, 1000, (20, 5))
    timestep[:, 0] = 0  # a frame that is given
    return model, CalibrationSet({"sample": torch.randn(20, 7, 4), "timestep": timestep}, torch.ones(20))


def test_ranges_of_timesteps_of_tokens_and_of_layers_called_twice() -> None:
    model, calibration = _awkward()
    with pytest.warns(UserWarning, match="leave out layers that do not read each sample: some, vector"):
        found = activation_ranges(model, calibration, batch_size=3, device=torch.device("cpu"))
    (layer,) = (layer for layer in found["layers"] if layer["name"] == "a")
    assert {layer["name"] for layer in found["layers"]} == {"a", "b"}
    edges, steps = found["timesteps"], calibration.inputs["timestep"].amax(1)
    x = calibration.inputs["sample"] * (1 + steps)[:, None, None]
    values = torch.maximum(x.abs().amax((1, 2)), 3 * x[:, 0].abs().amax(1))
    for low, high, largest in zip(edges, edges[1:], layer["largest"], strict=False):
        rows = (steps >= low) & (steps < high)
        assert largest == (pytest.approx(values[rows].max().item(), rel=1e-5) if rows.any() else None)


def test_a_report_says_what_stays_in_full_precision() -> None:
    kept = [{"kind": "transposed convolutions", "parameters": 25, "names": ["up.<b>"], "expected": False}]
    report = _report(coverage={"parameters": 100, "quantized": 75, "kept": kept})
    assert "In full precision stay 25.00% transposed convolutions (up.<b>)." in render_markdown(report)
    assert "25.00% transposed convolutions (up.&lt;b&gt;)" in render_html(report, _samples())
    assert "full precision stay" not in render_markdown(_report())


def test_a_page_that_cannot_be_made_costs_no_more_than_itself(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"report\.html: left out, for KeyError: 'largest'"):
        write_reports(tmp_path, _report(activation_ranges={"layers": [{"clip": 1.0}], "timesteps": []}), {})
    assert {file.name for file in tmp_path.iterdir()} == {"report.md", "report.json"}


# --- the page --------------------------------------------------------------------------------------------------


class _Links(HTMLParser):
    """Collects every address that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        addresses = ("src", "href", "xlink:href", "data", "action")
        self.found += [(tag, value or "") for name, value in attrs if name in addresses]


def test_the_page_fetches_nothing() -> None:
    page = render_html(_report(), _samples())
    links = _Links()
    links.feed(page)
    assert len([link for tag, link in links.found if tag == "img" and link.startswith("data:image/png")]) == 3
    assert not [link for _, link in links.found if not link.startswith(("data:", "#"))]
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_the_figure_of_units_shows_each_error_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, list[float]] = {}
    monkeypatch.setattr(Axes, "scatter", lambda axis, x, y, label, **options: shown.update({label: list(y)}))
    monkeypatch.setattr(Axes, "legend", lambda axis, **options: None)
    blocks = [_block(i) for i in range(4)]
    unit_errors(blocks)
    nearest, quantized = (next(v for label, v in shown.items() if label.startswith(n)) for n in ("nearest", QUANTIZED))
    assert nearest == [block["error_nearest"] for block in blocks]
    assert quantized == [block["error_quantized"] for block in blocks]


def test_the_page_escapes_what_it_is_told() -> None:
    page = render_html(_report(), _samples())
    assert "<b>model</b>" not in page
    assert html.escape("a <b>model</b>") in page


def test_the_page_does_without_what_is_not_there() -> None:
    report = {"model": "m", "variants": {}, "versions": {}, "blocks": []}
    page = render_html(report, {})
    assert "<table" not in page
    assert "<figure" not in page


def test_images_that_are_not_finite_make_a_page_all_the_same() -> None:
    samples = _samples()
    samples["quantized"][2] = torch.nan
    assert "data:image/png" in render_html(_report(), samples)


_DRIVE = """
<script>
window.addEventListener("load", () => {
  const shown = () => [...document.querySelectorAll(".compare .over")].filter((i) => !i.hidden).map((i) => i.alt);
  const clip = () => document.querySelector(".compare .over:not([hidden])").style.clipPath;
  const result = {};
  result.decoded = [...document.images].map((i) => i.complete && i.naturalWidth);
  result.figures = [...document.querySelectorAll("figure svg")].map((s) => s.getBoundingClientRect().height > 50);
  result.rows = document.querySelectorAll("#quality tbody tr").length;
  result.first = shown();
  document.querySelector("input[name=variant]").click();
  result.toggled = shown();
  const split = document.getElementById("split");
  split.value = 25;
  split.dispatchEvent(new Event("input"));
  result.clip = clip();
  result.overflow = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.body.innerHTML = "";
  const out = document.createElement("pre");
  out.id = "result";
  out.textContent = JSON.stringify(result);
  document.body.append(out);
});
</script>
"""


def _in_browser(page: str, directory: Path) -> dict[str, Any]:
    """What a script finds that clicks through the page."""
    if not BROWSER:
        if os.environ.get("FPQ_REQUIRE_BROWSER"):
            pytest.fail("no Chromium is installed")
        pytest.skip("no Chromium is installed")
    file = directory / "driven.html"
    file.write_text(page.replace("</body>", f"{_DRIVE}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--window-size=900,1400", "--dump-dom", file.as_uri()]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="result">(.*?)</pre>', outcome.stdout, re.S)
    assert match, outcome.stderr[-2000:]
    return json.loads(html.unescape(match[1]))


def test_the_page_opens_its_images_decode_and_its_toggle_works(tmp_path: Path) -> None:
    found = _in_browser(render_html(_report(), _samples()), tmp_path)
    assert found["decoded"] == [8 * 8] * 3  # eight images of eight pixels in a row
    assert found["figures"] == [True] * 4
    assert found["rows"] == 3
    assert found["first"] == ["quantized"]
    assert found["toggled"] == ["nearest rounding"]
    assert found["clip"] == "inset(0px 0px 0px 25%)"
    assert not found["overflow"]


def test_the_report_of_a_run_opens_in_a_browser(tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(fit_arguments(save_tiny(tmp_path / "model"), run, n_images=4))
    report = json.loads((run / "report.json").read_text())
    assert len(report["layers"]) > 5
    assert len(report["activation_ranges"]["layers"]) == len(report["layers"])
    assert report["disk_bytes"] > 1000
    found = _in_browser((run / "report.html").read_text(), tmp_path)
    assert all(found["decoded"])
    assert len(found["decoded"]) == 3
    assert found["figures"] == [True] * 4
