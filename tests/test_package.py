"""Importing the package is light, and the wheel works away from the checkout."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from diffusers import DDPMPipeline, UNet2DModel
from models import CHECKOUT, save_tiny

import fpq_lightning as fpq

# --- importing -------------------------------------------------------------------------------------------------

_HEAVY = ("lightning", "matplotlib", "jinja2", "torchmetrics", "datasets")

_OPEN = """
import gc, json, logging, sys, time, warnings
from diffusers import DiffusionPipeline
import torch

plain, packed = sys.argv[1:]

def state():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    loggers = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict if "fpq" not in name}
    return repr([
        warnings.filters, warnings.showwarning, warnings.formatwarning, gc.isenabled(), gc.get_threshold(),
        gc.get_freeze_count(), [b.allow_tf32 for b in backends], torch.backends.cudnn.benchmark,
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        logging.root.level, logging.root.handlers, logging.root.manager.disable, loggers,
    ])

DiffusionPipeline.from_pretrained(plain)
modules, before = set(sys.modules), state()
start = time.process_time()
import fpq_lightning
import diffusers.quantizers.auto
import fpq_lightning.storage.diffusers_quantizer
seconds = time.process_time() - start
pipeline = DiffusionPipeline.from_pretrained(packed)
layers = [type(m).__name__ for m in pipeline.unet.modules() if "Packed" in type(m).__name__]
imported = sorted({name.partition(".")[0] for name in sys.modules.keys() - modules})
print(json.dumps({"seconds": seconds, "layers": layers, "imported": imported, "same": before == state()}))
"""


def _python(code: str, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_opening_a_packed_model_is_light_and_changes_nothing_else(tmp_path: Path) -> None:
    plain = Path(save_tiny(tmp_path / "plain"))
    unet = UNet2DModel.from_pretrained(plain / "unet", quantization_config=fpq.FPQConfig("fp4"))
    DDPMPipeline(unet, DDPMPipeline.from_pretrained(plain).scheduler).save_pretrained(tmp_path / "packed")
    found = json.loads(_python(_OPEN, str(plain), str(tmp_path / "packed")))
    assert found["layers"]  # that it was read as a packed one
    assert "fpq_lightning" in found["imported"]
    assert not {*_HEAVY} & {*found["imported"]}
    assert found["same"]
    assert found["seconds"] < 0.3


@pytest.mark.parametrize("order", ["fpq_lightning, diffusers", "diffusers.quantizers.auto, fpq_lightning"])
def test_importing_the_package_before_or_after_diffusers_registers_the_quantizer_once(order: str) -> None:
    code = f"""
import sys
finders = len(sys.meta_path)
import {order}
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["fpq"].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING["fpq"].__name__)
print(any(type(f).__module__.startswith("fpq_lightning") for f in sys.meta_path))
"""
    assert _python(code).splitlines() == ["FPQQuantizer FPQConfig", "False"]


_ORDERS = (
    "import fpq_lightning; from fpq_lightning import FPQConfig",
    "import fpq_lightning.storage.config",
    "import fpq_lightning; from transformers import CLIPTextModel",
    "from transformers import CLIPTextModel; from diffusers import UNet2DModel; import fpq_lightning",
)


@pytest.mark.parametrize("order", _ORDERS)
def test_both_libraries_know_the_quantizer_whatever_is_imported_first(order: str) -> None:
    lists = "; import diffusers.quantizers.auto as d, transformers.quantizers.auto as t, sys"
    show = "; print('fpq' in d.AUTO_QUANTIZER_MAPPING, 'fpq' in t.AUTO_QUANTIZATION_CONFIG_MAPPING, "
    ours = "sum('fpq' in type(finder).__module__ for finder in sys.meta_path))"
    assert _python(order + lists + show + ours).split() == ["True", "True", "0"]


def test_importing_the_package_alone_imports_no_library() -> None:
    code = "import sys, fpq_lightning; print(sorted({'torch', 'diffusers', 'numpy', 'transformers'} & {*sys.modules}))"
    assert _python(code).strip() == "[]"


def test_what_the_package_exports_can_be_listed_used_and_seen_by_type_checkers() -> None:
    (block,) = [node for node in ast.parse(Path(fpq.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {*fpq.__all__}
    assert {*fpq.__all__, "__version__"} <= {*dir(fpq)}
    for name in fpq.__all__:
        assert getattr(fpq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        fpq.quantise  # noqa: B018
    assert (Path(fpq.__file__).parent / "py.typed").is_file()


# --- the wheel -------------------------------------------------------------------------------------------------


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
    assert f"fpq_lightning-{fpq.__version__}-" in wheel.name
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
    assert config["recipe"]["rounding"]["start"] == "closed_form"
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
