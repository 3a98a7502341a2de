"""The command line: what it writes, and one clear line for everything that can be wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from models import (
    CHECKOUT,
    STEPS,
    Outcome,
    fit_arguments,
    run_fpq,
    run_scenarios,
    save_tiny,
    scenario,
    tiny_text_to_image,
    tiny_unet,
)
from packed_reader import read_denoiser
from PIL import Image

import fpq_lightning as fpq
from fpq_lightning import SamplerConfig, load_quantized
from fpq_lightning.diffusion.sampling import sample, set_sampler
from fpq_lightning.evaluation import sampling
from fpq_lightning.storage.exports.registry import EXPORTS

FEATURES = CHECKOUT / "data" / "cifar10-features"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with evaluation."""
    from fpq_lightning.cli import main

    directory = tmp_path_factory.mktemp("run") / "run"
    options = [f"--evaluation.features={FEATURES}", f"--evaluation.real={FEATURES / 'cifar10_train.safetensors'}"]
    main([*fit_arguments(model, directory, n_images=3), *options, "--evaluation.seed=20"])
    return directory


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((finished / "report.json").read_text(), parse_constant=refuse)


# --- what a run leaves -----------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_of_the_pinned_interface(finished: Path) -> None:
    names = {
        "checkpoints/last.ckpt",
        "quantized",
        "report.json",
        "report.md",
        "samples.png",
        "config.yaml",
        "report.html",
    }
    assert {name for name in names if not (finished / name).exists()} == set()
    assert list(finished.rglob("events.out.tfevents.*"))


def test_the_report_has_the_pinned_schema(report: dict[str, Any]) -> None:
    assert report["schema_version"] == 2
    assert {"weight_bits", "sparsity", "versions", "fingerprint"} <= report.keys()
    assert report["variants"].keys() == {"full_precision", "nearest", "quantized"}
    for variant in report["variants"].values():
        assert {"fd", "fd_real", "psnr", "ssim", "n_images", "seeds", "kid", "is"} <= variant.keys()
        assert variant["n_images"] == 3
        assert all(v is None or isinstance(v, float) for k, v in variant.items() if k not in ("n_images", "seeds"))
        assert variant["fd"] >= 0
        assert variant["fd_real"] > 0
    assert report["variants"]["full_precision"]["psnr"] is None
    assert report["variants"]["nearest"]["psnr"] > 5
    assert report["variants"]["quantized"]["psnr"] > 5
    keys = {"name", "parameters", "weight_formats", "activation_formats", "error_nearest", "error_quantized", "kept"}
    for block in report["blocks"]:
        assert block.keys() == keys | {"error_closed_form", "iterations", "seconds"}
    calibration = report["calibration"]
    assert calibration.keys() == {"seconds", "peak_memory_bytes", "samples", "seeds"}
    assert calibration["samples"] == 16
    assert calibration["seconds"] > 0
    assert calibration["peak_memory_bytes"] > 2**26
    assert report["versions"]["torch"] == torch.__version__


def test_the_report_counts_bits_and_zeros_of_the_saved_weights(finished: Path, report: dict[str, Any]) -> None:
    saved = read_denoiser(finished / "quantized" / "unet")
    bits = zeros = total = 0
    for block in report["blocks"]:
        for name, formats in block["weight_formats"].items():
            weight = saved[f"{name}.weight"]
            total += weight.size
            zeros += int((weight == 0).sum())
            bits += 4 * weight.size + 32 * len(weight) * len(formats)  # a scale a channel and part
    assert report["weight_bits"] == pytest.approx(bits / total)
    assert report["sparsity"] == pytest.approx(zeros / total)


def test_the_readable_report_mentions_every_unit_and_variant(finished: Path, report: dict[str, Any]) -> None:
    text = (finished / "report.md").read_text()
    assert len(report["blocks"]) == 12
    for block in report["blocks"]:
        assert f"| {block['name']} |" in text
    assert "noise floor" in text
    assert "only rank" in text
    assert report["fingerprint"] in text


def test_the_samples_show_three_rows_of_as_many_images_as_there_are(finished: Path) -> None:
    image = Image.open(finished / "samples.png")
    image.load()
    width, height = image.size
    assert width > height * 0.8
    assert height >= 3 * 64
    assert width >= 3 * 64
    assert np.asarray(image.convert("L")).std() > 5


def test_the_saved_configuration_runs_again_as_the_same_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert yaml.safe_load((finished / "config.yaml").read_text())["recipe"]["rounding"]["iterations"] == 10
    outcome = run_fpq(capsys, ["fit", "--config", str(finished / "config.yaml")])
    assert outcome.code == 0, outcome.err
    assert "finished" in outcome.out


def test_a_run_writes_one_line_a_unit(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_fpq(capsys, fit_arguments(model, tmp_path / "run"))
    assert outcome.code == 0, outcome.err
    lines = [line for line in (outcome.out + outcome.err).replace("\r", "\n").splitlines() if "->" in line]
    assert len(lines) == 12
    assert all(
        "error" in line and any(kept in line for kept in ("(learned)", "(closed form)", "(nearest")) for line in lines
    )
    assert str(tmp_path / "run" / "quantized") in outcome.out


def test_the_last_lines_of_a_run_say_what_came_of_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    outcome = run_fpq(capsys, fit_arguments(model, run, iterations=2, n_images=2))
    assert outcome.code == 0, outcome.err
    found = dict(line.split(":", 1) for line in outcome.out.splitlines()[-6:])
    found = {name: value.strip() for name, value in found.items()}
    assert found["quantized model"] == str(run / "quantized")
    assert found["report"] == str(run / "report.html")
    variants = json.loads((run / "report.json").read_text())["variants"]
    kept, nearest = (variants[name] for name in ("quantized", "nearest"))
    assert found["quality"] == (
        f"FD {kept['fd']:.3f}, PSNR {kept['psnr']:.2f} dB "
        f"(nearest rounding: FD {nearest['fd']:.3f}, PSNR {nearest['psnr']:.2f} dB)"
    )
    after = sum(file.stat().st_size for file in (run / "quantized" / "unet").glob("*.safetensors"))
    before = 2 * sum(p.numel() for p in tiny_unet().parameters())
    assert found["size of the denoiser"] == (
        f"{after / 1024:.0f} KiB in files, {before / 1024:.0f} KiB in half precision"
    )
    share = run_fpq(capsys, ["inspect", str(run / "quantized"), "--capability=9.0"]).out.splitlines()[-1]
    expected = float(re.search(r"([\d.]+)% of their operations", share)[1])  # type: ignore[index]
    if not torch.cuda.is_available():
        said = re.fullmatch(rf"(\d+)% on an H100: see fpq inspect {run / 'quantized'}", found["low-bit operations"])
        assert said is not None
        assert abs(int(said[1]) - expected) <= 0.5
    command = found["next"].removeprefix("fpq ").split()
    options = ["--evaluation.n_images=2", "--trainer.accelerator=cpu"]
    assert run_fpq(capsys, [*command, *options, f"--output={tmp_path / 'test'}"]).code == 0


def test_a_finished_run_does_not_fail_for_what_its_last_lines_cannot_say(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr("fpq_lightning.training.summary.inspect_pipeline", fail)
    outcome = run_fpq(capsys, fit_arguments(model, tmp_path / "run", iterations=2))
    assert outcome.code == 0, outcome.err
    names = [line.partition(":")[0] for line in outcome.out.splitlines()[-4:]]
    assert names == ["quantized model", "report", "size of the denoiser", "next"]  # and no quality without images


# --- the other commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_print_config_prints_every_value_as_yaml(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--output=x"] if command == "predict" else []
    outcome = run_fpq(capsys, [command, "--model=m", "--sampler.steps=7", *more, "--print_config"])
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load(outcome.out)
    assert config["model"] == "m"
    assert config["sampler"]["steps"] == 7
    if command == "fit":
        assert config["recipe"]["weights"]["formats"] == "fp4"
        assert config["data"]["n_samples"] == 1024


def test_predict_writes_the_images_that_load_quantized_samples(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized, output = finished / "quantized", tmp_path / "images"
    arguments = ["predict", f"--model={quantized}", f"--output={output}", "--n_images=5", "--seed=30"]
    arguments += [f"--sampler.steps={STEPS}", "--sampler.batch_size=3", "--trainer.accelerator=cpu"]
    outcome = run_fpq(capsys, arguments)
    assert outcome.code == 0, outcome.err
    assert sorted(f.name for f in output.iterdir()) == [f"{seed:06d}.png" for seed in range(30, 35)]
    pipeline, sampler = load_quantized(quantized), SamplerConfig(steps=STEPS, batch_size=3)
    set_sampler(pipeline, sampler)
    images = torch.cat([sample(pipeline, sampler, seeds) for seeds in ([30, 31, 32], [33, 34])])
    for seed, image in zip(range(30, 35), images, strict=True):
        found = np.asarray(Image.open(output / f"{seed:06d}.png"))
        expected = ((image.permute(1, 2, 0).double().numpy() + 1) / 2 * 255).round()
        assert found.shape == (8, 8, 3)
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 0.05


def test_test_prints_the_quality_of_a_quantized_model(
    finished: Path, report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "test",
        f"--model={finished / 'quantized'}",
        "--sampler.batch_size=4",
    ]  # the steps are those of the run
    arguments += ["--evaluation.n_images=3", "--evaluation.seed=20", f"--evaluation.features={FEATURES}"]
    outcome = run_fpq(capsys, [*arguments, "--trainer.accelerator=cpu", f"--output={tmp_path}"])
    assert outcome.code == 0, outcome.err
    values = {}
    for line in outcome.out.splitlines():
        words = line.replace("│", " ").replace("|", " ").split()
        if len(words) == 2 and words[0] in ("fd", "psnr", "ssim"):
            values[words[0]] = float(words[1])
    # The same images as in the run, so the same figures.
    assert values["psnr"] == pytest.approx(report["variants"]["quantized"]["psnr"], abs=1e-2)
    assert values["fd"] == pytest.approx(report["variants"]["quantized"]["fd"], rel=1e-2)


def test_a_test_leaves_a_report_and_does_not_sample_again_what_is_there(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["test", f"--model={finished / 'quantized'}", f"--sampler.steps={STEPS}", "--sampler.batch_size=2"]
    arguments += ["--evaluation.n_images=3", "--trainer.accelerator=cpu", f"--output={tmp_path / 'out'}"]
    assert run_fpq(capsys, arguments).code == 0
    files = {"report.json", "report.md", "report.html", "samples.png", "images"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    first = json.loads((tmp_path / "out" / "report.json").read_text())
    assert first["variants"]["quantized"]["psnr"] > 5
    assert first["disk_bytes"] > 1000
    assert first["weight_bits"] > 4
    (tmp_path / "out" / "images" / "quantized" / "000001.png").unlink()
    sampled: list[list[int]] = []
    original = sampling.sample

    def counted(pipeline: Any, sampler: Any, seeds: Any, *rest: Any) -> Any:
        sampled.append(list(seeds))
        return original(pipeline, sampler, seeds, *rest)

    monkeypatch.setattr(sampling, "sample", counted)
    assert run_fpq(capsys, arguments).code == 0
    assert sampled == [[1]]
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert again["variants"]["quantized"]["psnr"] == pytest.approx(first["variants"]["quantized"]["psnr"], rel=1e-3)


def test_a_test_with_another_sampler_in_the_same_place_is_refused_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["test", f"--model={finished / 'quantized'}", "--sampler.batch_size=2", "--evaluation.n_images=2"]
    arguments += ["--trainer.accelerator=cpu", f"--output={tmp_path / 'out'}"]
    assert run_fpq(capsys, [*arguments, "--sampler.steps=2"]).code == 0
    outcome = run_fpq(capsys, [*arguments, "--sampler.steps=3"])
    assert outcome.code != 0
    assert len(outcome.errors) == 1
    assert "made with other settings (sampler.steps: 2 -> 3)" in outcome.errors[0]


# --- help, and what comes at once ------------------------------------------------------------------------------


def _python(code: str, *arguments: str) -> Outcome:
    """Runs Python in a fresh process."""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, timeout=100)  # bytes: a \r is not to become a \n
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def _fpq(*arguments: str) -> tuple[Outcome, float]:
    """Runs ``fpq`` in a fresh process, and says how much CPU time it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = _python("from fpq_lightning.cli import main; main()", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: fpq COMMAND"),
        (["--version"], 0, f"fpq {fpq.__version__}"),
        ([], 2, "usage: fpq COMMAND"),
        (["fti", "--model=x"], 1, "did you mean fit?"),
        (["fit", "--config", "fp4_fp9"], 1, "there is no configuration fp4_fp9"),
        (["export", "x", "--ouput=y"], 2, "did you mean --output?"),
        (["inspect", "x", "--capability=9"], 1, "--capability 9: give it as 9.0"),
    ],
)
def test_help_and_refusals_come_at_once(arguments: list[str], code: int, said: str) -> None:
    found, seconds = _fpq(*arguments)
    assert found.code == code
    assert said in found.out + found.err
    assert len(found.err.splitlines()) == (1 if said not in found.out else 0)
    assert seconds < 1.5


def test_doctor_says_what_a_report_of_a_bug_should_say() -> None:
    found, _ = _fpq("doctor")
    assert found.code == 0, found.err
    lines = {line.strip().split("  ")[0]: line.split("  ")[-1].strip() for line in found.out.splitlines()}
    assert lines["fpq-lightning"] == fpq.__version__
    assert lines["torch"] == torch.__version__
    assert str(CHECKOUT / "data" / "cifar10-features") in found.out
    paths = {name.split()[0]: value.split(", ") for name, value in lines.items() if name.startswith("sm_")}
    assert paths["sm_80"] == ["weight_only", "decode"]
    assert {"fp8", "weight_only"} <= {*paths["sm_89"]}
    assert {"fp8", "fp8_conv"} <= {*paths["sm_90"]}
    assert {"fp8", "fp8_conv"} <= {*paths["sm_100"]}
    for name in ("C compiler, which Triton needs", "Inception (FID)", "LPIPS alex"):
        assert name in lines
    assert "CLIP" in found.out


@pytest.mark.parametrize(("command", "groups"), [
    ("fit", {"recipe", "data", "sampler", "evaluation"}),
    ("test", {"sampler", "evaluation"}),
    ("predict", {"sampler"}),
])  # fmt: skip
def test_help_shows_our_options_and_those_of_the_trainer_when_asked(
    command: str, groups: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run_fpq(capsys, [command, "--help"]).out
    lines = shown.splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 120
    assert "  --model " in shown
    assert {line.partition(":")[0] for line in lines if line and line[0].isalpha() and ": " in line} >= groups
    assert not any(line.startswith("  --trainer.") for line in lines)
    config = yaml.safe_load(
        run_fpq(capsys, [command, "--model=m", "--print_config", "--output=x"][: 4 if command == "predict" else 3]).out
    )
    ours = {path for path in _paths(config) if not path.startswith("trainer.")}
    options = {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}
    assert ours <= options
    (pointer,) = [line for line in lines if f"fpq {command} --help GROUP" in line]
    assert "trainer" in pointer
    trainer = run_fpq(capsys, [command, "--help", "trainer"]).out
    assert "--trainer.devices" in trainer
    assert "--model" not in trainer


def _paths(config: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in config.items():
        nested = isinstance(value, dict) and value
        found |= _paths(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}"}
    return found


def test_help_on_a_group_says_all_of_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_fpq(capsys, ["fit", "--help", "recipe"]).out
    assert "--recipe.weights.granularity {tensor,channel,group} [channel]" in shown
    assert "..." not in shown
    assert "--data" not in shown
    _assert_one_line(run_fpq(capsys, ["fit", "--help", "recipes"]), "there is help on recipe, data, sampler")


def test_help_on_export_lists_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(run_fpq(capsys, ["export", "--help"]).out.split())
    assert all(f"{export.name}: {export.help}" in shown for export in EXPORTS)


def test_the_commands_of_a_run_say_nothing_that_a_user_cannot_act_on(tmp_path: Path) -> None:
    model, run = tiny_text_to_image(tmp_path / "tiny"), tmp_path / "run"
    fit = [*fit_arguments(model, run, iterations=2, n_images=2), "--sampler.prompts=['a cat','a dog']"]
    quantized = f"--model={run / 'quantized'}"
    common = [f"--sampler.steps={STEPS}", "--sampler.batch_size=2", "--trainer.accelerator=cpu"]
    test = ["test", quantized, *common, "--evaluation.n_images=2", f"--output={tmp_path / 'test'}"]
    predict = ["predict", quantized, *common, "--n_images=2", f"--output={tmp_path / 'images'}"]
    export = ["export", str(run / "quantized"), "--format=dequantized", f"--output={tmp_path / 'plain'}"]
    test += ["--sampler.prompts=['a cat','a dog']"]
    predict += ["--prompts=['a cat','a dog']"]
    commands = [fit, test, predict, export, ["inspect", str(run / "quantized")]]
    found = _python(f"from fpq_lightning.cli import main\nfor command in {commands!r}: main(command)")
    assert found.code == 0, found.err
    assert "\r" not in found.err
    for line in found.err.splitlines():
        is_progress = re.fullmatch(r"[\w .+]+: +\d+% \d+/\d+ \[.*\]", line)
        assert is_progress or line.startswith("warning: 2 images are too few"), line


# --- bad input -------------------------------------------------------------------------------------------------


def _with(file: str, change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A model directory with one file changed."""

    def make(root: Path) -> Path:
        directory = Path(save_tiny(root / "bad"))
        change(directory / file)
        return directory

    return make


def _damaged(name: str, value: float) -> Callable[[Path], Path]:
    def damage(unet: torch.nn.Module) -> None:
        unet.get_parameter(name).view(-1)[0] = value

    return lambda root: Path(save_tiny(root / "bad", damage=damage))


def _empty(root: Path) -> Path:
    (root / "bad").mkdir()
    return root / "bad"


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda root: root / "none", "no model"),
    "no hub id": (lambda root: "nothing", "no model"),
    "empty directory": (_empty, "model_index.json"),
    "a file": (lambda root: Path(__file__), "model_index.json"),
    "damaged index": (_with("model_index.json", lambda f: f.write_text("{")), "bad"),
    "damaged weights": (_with(_WEIGHTS, _cut), "bad"),
    "missing weights": (_with(_WEIGHTS, Path.unlink), "bad"),
    "damaged configuration": (_with("unet/config.json", lambda f: f.write_text("x")), "bad"),
    "missing unet": (_with("unet", shutil.rmtree), "bad"),
    "unreadable index": (_with("model_index.json", lambda f: (f.unlink(), f.mkdir())), "bad"),
    "nan weight": (_damaged("mid_block.resnets.0.conv1.weight", float("nan")), "NaN"),
    "inf weight": (_damaged("conv_in.weight", float("inf")), "NaN or Inf"),
    "inf in activations": (_damaged("conv_in.bias", 3e38), "NaN or Inf"),
}

OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown format": (["--recipe.weights.formats=e9m9x"], "unknown format"),
    "unknown activation format": (["--recipe.activations.formats=fp7"], "unknown format"),
    "group size": (["--recipe.weights.granularity=group", "--recipe.weights.group_size=5"], "group_size 5"),
    "include": (['--recipe.include=["decoder.*"]'], "decoder"),
    "exclude": (['--recipe.exclude=["decoder.*"]'], "decoder"),
    "empty calibration set": (["--data.n_samples=0"], "empty"),
    "unknown option": (["--recipe.wieghts.formats=fp4"], "wieghts"),
    "unknown scheduler": (["--sampler.scheduler=Nope"], "Nope"),
    "features that are not there": (["--evaluation.features=/none"], "/none"),
    "images that are not there": (["--data.source=/none.parquet"], "/none.parquet"),
    "a checkpoint that is not there": (["--ckpt_path=/none.ckpt"], "/none.ckpt"),
    "unknown configuration": (["--config=no_such_recipe"], "no_such_recipe"),
}


def _assert_one_line(outcome: Any, message: str) -> None:
    assert outcome.code != 0
    assert "Traceback" not in outcome.err
    assert len(outcome.errors) == 1, outcome.err
    assert message in outcome.errors[0]
    # Nothing after it.
    assert outcome.err.rstrip().splitlines()[-1] == outcome.errors[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_ends_fit_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = MODELS[name]
    outcome = run_fpq(capsys, fit_arguments(str(make(tmp_path)), tmp_path / "run"))
    _assert_one_line(outcome, message)
    assert not (tmp_path / "run" / "quantized").exists()
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option_ends_fit_in_one_line(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = OPTIONS[name]
    outcome = run_fpq(capsys, [*fit_arguments(model, tmp_path / "run"), *options])
    _assert_one_line(outcome, message)
    assert not (tmp_path / "run" / "quantized").exists()
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(("arguments", "wrong", "nearest"), [
    (["fit", "--modle=x"], "--modle", "--model"),
    (["fit", "--mod=x"], "--mod", "--model"),
    (["fit", "--steps=3"], "--steps", "--sampler.steps"),
    (["fit", "--recipe.weights.format", "fp4"], "--recipe.weights.format", "--recipe.weights.formats"),
    (["fit", "--trainer.device=2"], "--trainer.device", "--trainer.devices"),
    (["test", "--evaluation.n_image=3"], "--evaluation.n_image", "--evaluation.n_images"),
    (["predict", "--out=x"], "--out", "--output"),
    (["study", "--conf=x"], "--conf", "--config"),
    (["export", "x", "--form=fpq"], "--form", "--format"),
    (["inspect", "x", "--capa=9.0"], "--capa", "--capability"),
])  # fmt: skip
def test_an_abbreviated_or_wrong_option_is_refused_and_the_nearest_suggested(
    arguments: list[str], wrong: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_fpq(capsys, arguments)
    _assert_one_line(outcome, f"fpq {arguments[0]} has no option {wrong}: did you mean {nearest}?")
    assert len(outcome.err.splitlines()) == 1


def test_an_unforeseen_error_ends_in_one_line_that_names_a_file_with_its_traceback(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("nobody\nforesaw this")

    def file_of(outcome: Any) -> Path:
        _assert_one_line(outcome, "unexpected ZeroDivisionError (nobody foresaw this)")
        assert outcome.code == 1
        assert "fpq doctor" in outcome.errors[0]
        file = Path(re.search(r"traceback is in (\S+);", outcome.errors[0])[1])  # type: ignore[index]
        text = file.read_text()
        assert text.startswith("Traceback")
        assert text.rstrip().endswith("foresaw this")
        assert "in fail" in text
        return file

    temporary, run = tmp_path / "temporary", tmp_path / "run"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with monkeypatch.context() as patch:
        patch.setattr("fpq_lightning.training.command_line.load_pipeline", fail)
        assert file_of(run_fpq(capsys, fit_arguments(model, run))).parent == temporary
    assert not run.exists()
    with monkeypatch.context() as patch:
        patch.setattr("fpq_lightning.training.run.rehearse", lambda *args: None)  # which would find it before the run
        patch.setattr("fpq_lightning.training.callbacks.image_quality.ImageQuality.on_train_end", fail)
        outcome = run_fpq(capsys, fit_arguments(model, run, n_images=2))
        assert file_of(outcome).parent == run
    assert run_fpq(capsys, [*fit_arguments(model, run, n_images=2), "--ckpt_path=last"]).code == 0


def test_an_unknown_command_and_help_say_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_fpq(capsys, ["inspec", "somewhere"])
    assert outcome.code
    assert "there is no command 'inspec': did you mean inspect?" in outcome.errors[0]
    shown = run_fpq(capsys, ["--help"]).out
    for command in ("fit", "test", "predict", "study", "export", "inspect", "doctor"):
        assert command in outcome.errors[0]
        assert command in shown


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_command_without_a_model_asks_for_one(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"--output={tmp_path / 'images'}"] if command == "predict" else []
    _assert_one_line(run_fpq(capsys, [command, *more]), "--model")


def test_an_empty_calibration_set_on_disk_ends_in_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = {"sample": [], "timestep": [], "sample_weight": []}
    datasets.Dataset.from_dict(empty).save_to_disk(str(tmp_path / "set"))
    outcome = run_fpq(capsys, [*fit_arguments(model, tmp_path / "run"), f"--data.directory={tmp_path / 'set'}"])
    _assert_one_line(outcome, "empty")


def test_another_runs_directory_is_refused_in_one_line_and_left_alone(
    finished: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {f: f.stat().st_mtime_ns for f in finished.rglob("*")}
    outcome = run_fpq(capsys, [*fit_arguments(model, finished), "--recipe.activations.formats=fp6"])
    _assert_one_line(outcome, "recipe.activations.formats: fp8 -> fp6")
    assert {f: f.stat().st_mtime_ns for f in finished.rglob("*")} == before


def test_a_directory_of_something_else_is_refused_in_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    _assert_one_line(run_fpq(capsys, fit_arguments(model, tmp_path)), "choose another --run_dir")
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_directory_that_cannot_be_made_ends_in_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    _assert_one_line(run_fpq(capsys, fit_arguments(model, tmp_path / "file" / "run")), "--run_dir")


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_two_end_in_one_line(
    finished: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*fit_arguments(model, tmp_path / "run"), "--ckpt_path=last"]
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    last, previous = (tmp_path / "run" / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    _cut(last)
    shutil.copytree(tmp_path / "run", tmp_path / "both")
    with pytest.warns(UserWarning, match=f"{last} cannot be read.*the one before it"):
        outcome = run_fpq(capsys, arguments)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "report.json").is_file()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "both").rename(tmp_path / "run")
    _cut(previous)
    with pytest.warns(UserWarning, match="cannot be read"):
        outcome = run_fpq(capsys, arguments)
    _assert_one_line(outcome, str(last.parent))


@pytest.mark.parametrize("command", ["test", "predict"])
@pytest.mark.parametrize("name", ["missing", "empty directory", "damaged index", "damaged weights"])
def test_a_bad_model_ends_test_and_predict_in_one_line(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = MODELS[name]
    more = [f"--output={tmp_path / 'images'}"] if command == "predict" else []
    _assert_one_line(run_fpq(capsys, [command, f"--model={make(tmp_path)}", *more]), message)


def test_predict_without_images_or_onto_a_file_ends_in_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", f"--model={model}", "--trainer.accelerator=cpu"]
    _assert_one_line(run_fpq(capsys, [*arguments, f"--output={tmp_path}", "--n_images=0"]), "--n_images")
    (tmp_path / "file").write_text("x")
    _assert_one_line(run_fpq(capsys, [*arguments, f"--output={tmp_path / 'file'}"]), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(model: str, tmp_path: Path) -> None:
    # Files of at most so many bytes: too few for what a rehearsal writes first and later, and then for what a run does
    # that was not rehearsed: its calibration set, and its quantized model.
    limits = {3_000: True, 75_000: True, 9_000: False, 20_000: False}
    outcomes = run_scenarios(
        [
            scenario(tmp_path / f"log{n}", fit_arguments(model, tmp_path / f"run{n}"), file_size=n, rehearses=rehearses)
            for n, rehearses in limits.items()
        ]
    )
    for (limit, rehearses), outcome in zip(limits.items(), outcomes, strict=True):
        run = tmp_path / f"run{limit}"
        assert outcome.code not in (0, None), f"{limit}: nothing was too large"
        assert "Traceback" not in outcome.err, f"{limit}: {outcome.err[-600:]}"
        assert len(outcome.errors) == 1
        assert not (run / "quantized").exists()
        assert not (run / "report.json").exists()
        assert [f.name for f in run.glob(".*")] == []
        assert run.exists() != rehearses
