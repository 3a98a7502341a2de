"""The commands and code in README and docs run, with a tiny model and few steps in place of the real ones."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from models import CHECKOUT, fit_arguments, run_fpq, save_tiny, tiny_text_to_image
from PIL import Image

README = (CHECKOUT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^fpq .*$", README, re.MULTILINE)]
SMALL = ["--sampler.steps=4", "--sampler.batch_size=4", "--trainer.accelerator=cpu"]


def test_readme_names_the_two_commands_and_they_are_targets() -> None:
    targets = re.findall(r"^(\w+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    shown = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert shown == ["quickstart", "test"]
    assert set(shown) <= set(targets)


def test_the_commands_of_the_readme_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CHECKOUT / "configs")
    commands = ["fit", "fit", "test", "predict", "export", "inspect", "fit"]
    assert [command.split()[1] for command in COMMANDS] == commands
    for command in COMMANDS[:6]:
        words = shlex.split(command.replace("PATH_OR_HUB_ID", model))[1:]
        if words[0] == "fit":
            overrides = fit_arguments(model, "runs/mine", iterations=2, n_images=2)[1:]
        else:
            overrides = [] if words[0] in ("export", "inspect") else SMALL
            overrides = [*overrides, *(["--evaluation.n_images=2"] if words[0] == "test" else [])]
        outcome = run_fpq(capsys, [*words, *overrides])
        assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "images").glob("*.png"))) == 16
    assert (tmp_path / "runs" / "mine" / "report.md").is_file()
    assert (tmp_path / "runs" / "mine" / "plain" / "quantization.json").is_file()


def test_the_text_to_image_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = re.findall(r"^(fpq fit .*captions\.csv \\\n.*)$", README, re.MULTILINE)
    model = tiny_text_to_image(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CHECKOUT / "configs")
    (tmp_path / "captions.csv").write_text("id,caption\n1,a cat\n2,a red bus\n")
    words = shlex.split(found.replace("\\\n", " ").replace("PATH_OR_HUB_ID", model))[1:]
    outcome = run_fpq(capsys, [*words, *fit_arguments(model, "runs/text", iterations=2, n_images=2)[1:]])
    assert outcome.code == 0, outcome.err


def test_the_commands_of_the_evaluation_docs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (CHECKOUT / "docs" / "evaluation.md").read_text()
    commands = [line.strip() for line in re.findall(r"^    fpq .*$", text, re.MULTILINE)]
    assert [command.split()[1] for command in commands] == ["test", "test", "study", "study"]
    model = save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert run_fpq(capsys, fit_arguments(model, "runs/mine", iterations=2)).code == 0
    (tmp_path / "real").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (60 * i, 90, 30)).save(tmp_path / "real" / f"{i}.png")
    for command in commands:
        words = shlex.split(command.replace("FOLDER", "real"))[1:]
        if words[0] == "test":
            words += [*SMALL, "--evaluation.n_images=2"]
        else:
            small = {"n_samples": 8, "n_search": 4}, {"rounding": {"iterations": 2, "batch_size": 4}}
            words += [f"--model={model}", "--output=study", "--evaluation.real=null", "--evaluation.n_images=2"]
            words += [*SMALL[:2], "--trajectories=2", f"--data={small[0]}", f"--recipe={small[1]}"]
            words += [] if "--only" in words else ["--only=[fp32]"]
        outcome = run_fpq(capsys, words)
        assert outcome.code == 0, outcome.err
    for directory in ("mine-5000", "mine-real"):
        assert (tmp_path / "runs" / directory / "report.html").is_file()
    rows = {file.name for file in (tmp_path / "study" / "rows").iterdir()}
    names = {f"{name}.{rounding}.json" for name in ("fp8_fp8", "fp4_fp8") for rounding in ("nearest", "quantized")}
    assert rows == {"fp32.full_precision.json", "fp32.other_seeds.json", *names}


def test_the_notebook_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code) == 1
    model = save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    program = code[0].replace("data/cifar10-ddpm-small", model).replace("n_samples=256", "n_samples=8")
    program = program.replace(
        'fpq.WeightRecipe("fp4")',
        'fpq.WeightRecipe("fp4"), rounding=fpq.RoundingRecipe(start="nearest", learned=True, iterations=2)',
    )
    program = program.replace('run_dir="runs/notebook"', 'run_dir="runs/notebook", sampler=fpq.SamplerConfig(steps=4)')
    assert program.count("iterations=2") == program.count("steps=4") == program.count("n_samples=8") == 1
    exec(compile(program, "README.md", "exec"), {})
    config = (tmp_path / "runs" / "notebook" / "quantized" / "unet" / "config.json").read_text()
    assert '"quant_method": "fpq"' in config
    assert '"quant_method": "fpq"' in (tmp_path / "runs" / "notebook" / "fp8" / "unet" / "config.json").read_text()


@pytest.mark.parametrize(
    "script", ["search.py", "figures.py", "multi_gpu.py", "kills.py", "arithmetic.py", "full_size.py"]
)
def test_benchmark_scripts_of_the_docs_start(script: str) -> None:
    assert f"benchmarks/{script}" in (CHECKOUT / "docs" / "benchmarks.md").read_text()
    file = CHECKOUT / "benchmarks" / script
    shown = subprocess.run([sys.executable, str(file), "--help"], capture_output=True, text=True, check=True).stdout
    assert f"benchmarks/{script}" in shown  # the command of its docstring


def test_links_and_pictures_of_the_readme_exist() -> None:
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert targets
    for target in targets:
        name, _, anchor = target.partition("#")
        assert (CHECKOUT / name).exists(), target
        headings = re.findall(r"^#+ (.*)$", (CHECKOUT / name).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], target
