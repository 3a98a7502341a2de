"""The wheel works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from models import CHECKOUT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy, so that building leaves nothing in the checkout.
    source = tmp_path_factory.mktemp("source")
    for name in ("fpq_lightning", "configs"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    shutil.copytree(CHECKOUT / "data" / "cifar10-features", source / "data" / "cifar10-features")
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (file,) = output.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True, text=True)
    return target


def _run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fpq_lightning.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def test_the_wheel_holds_the_package_the_recipes_and_the_feature_network_but_no_model(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packaged = {name.removeprefix("fpq_lightning/") for name in names if name.endswith(".py")}
    sources = {str(f.relative_to(CHECKOUT / "fpq_lightning")) for f in (CHECKOUT / "fpq_lightning").rglob("*.py")}
    assert packaged == sources
    configs = {str(f.relative_to(CHECKOUT)) for f in (CHECKOUT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("fpq_lightning/") for name in names if name.endswith(".yaml")} == configs
    data = [name for name in names if name.endswith((".safetensors", ".ckpt")) or "data/" in name]
    assert data == ["fpq_lightning/data/cifar10-features/model.safetensors"]
    assert any(name.endswith("LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "fpq = fpq_lightning.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_an_installed_fpq_finds_a_shipped_recipe_by_its_name(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('fpq_lightning').origin)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert where.stdout.startswith(str(installed))  # and not the checkout
    found = _run(installed, tmp_path, "fit", "--config", "fp4_fp8_hardware", "--model", "x", "--print_config")
    assert found.returncode == 0, found.stderr
    config = yaml.safe_load(found.stdout)
    assert config["recipe"]["hardware_types"] is True
    assert config["recipe"]["rounding"]["iterations"] == 2500
    assert config["model"] == "x"
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_without_the_embedded_model_is_one_clear_line(installed: Path, tmp_path: Path) -> None:
    found = _run(installed, tmp_path, "fit", "--config", "quickstart")
    assert found.returncode != 0
    assert "Traceback" not in found.stderr
    lines = [line for line in found.stderr.splitlines() if line.startswith(("fpq:", "error:"))]
    assert len(lines) == 1
    assert found.stderr.rstrip().splitlines()[-1] == lines[0]
    assert "data/cifar10-" in lines[0]
    assert list(tmp_path.iterdir()) == []
