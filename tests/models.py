"""Tiny pipelines on disk, and runs of the command line, in this process or in one that may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)

CHECKOUT = Path(__file__).parents[1]
STEPS = 4  # of the sampler


def tiny_unet(seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def tiny_pipeline(seed: int = 0) -> DDPMPipeline:
    pipeline = DDPMPipeline(tiny_unet(seed), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny(directory: Path, seed: int = 0, damage: Callable[[nn.Module], None] | None = None) -> str:
    """Writes a tiny pipeline; `damage` may change its denoiser first."""
    pipeline = tiny_pipeline(seed)
    if damage is not None:
        with torch.no_grad():
            damage(pipeline.unet)
    pipeline.save_pretrained(directory)
    return str(directory)


def fit_arguments(model: str, run_dir: Path | str, iterations: int = 10, n_images: int = 0) -> list[str]:
    """``fpq fit`` in a second or two."""
    options: dict[str, Any] = {
        "model": model,
        "run_dir": run_dir,
        "trainer.accelerator": "cpu",
        "sampler.steps": STEPS,
        "sampler.batch_size": 4,
        "data.n_samples": 16,
        "data.n_search": 8,
        "data.micro_batch": 8,
        "recipe.rounding.start": "nearest",  # the closed form takes longer for networks of this size
        "recipe.rounding.learned": "true",
        "recipe.rounding.straight_through": 0.5,
        "recipe.rounding.iterations": iterations,
        "recipe.rounding.batch_size": 4,
        "evaluation.n_images": n_images,
    }
    return ["fit", *(f"--{key}={value}" for key, value in options.items())]


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines that say what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith(("fpq:", "error:"))]


def run_fpq(capsys: Any, arguments: Sequence[str]) -> Outcome:
    """Runs ``fpq`` in this process."""
    from fpq_lightning.cli import main

    capsys.readouterr()
    code: Any = 0
    try:
        main(list(arguments))
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    if isinstance(code, str):  # what the interpreter does with sys.exit("message")
        return Outcome(1, captured.out, f"{captured.err}\n{code}\n")
    return Outcome(code or 0, captured.out, captured.err)


# The interpreter imports everything once; each command then runs in a fork of it, which is a process of its own.
_DRIVER = """
import json, os, signal, sys, tempfile
import torch
torch.set_num_threads(1)
import lightning.pytorch as pl
from fpq_lightning import cli
import fpq_lightning.training.command_line
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.reconstruction import unit
from fpq_lightning.training import run as training_run
import fpq_lightning.training.callbacks.checkpoint as checkpoint
import fpq_lightning.training.callbacks.finalize as finalize
import fpq_lightning.training.callbacks.image_quality as image_quality

owners = {"unit": unit.UnitTrainer, "steps": unit, "data": CalibrationDataModule, "trainer": pl.Trainer, "os": os}
owners |= {"checkpoint": checkpoint, "finalize": finalize, "image_quality": image_quality}

rehearse, rehearsing = training_run.rehearse, False

def rehearse_undisturbed(*args):
    global rehearsing
    rehearsing = True
    try:
        rehearse(*args)
    finally:
        rehearsing = False

def disturb(owner, name, call, file, halved, number, error):
    owner = owners[owner]
    original, calls = getattr(owner, name), 0
    def disturbed(*args, **kwargs):
        nonlocal calls
        paths = [a for a in args if isinstance(a, (str, os.PathLike))]
        if rehearsing or file and file not in map(os.path.basename, paths):
            return original(*args, **kwargs)
        calls += 1
        if error and calls >= call:
            raise OSError(error, os.strerror(error), str(paths[0]))
        if calls == call:
            if halved:
                original(*args, **kwargs)
                os.truncate(paths[0], os.path.getsize(paths[0]) // 2)
            if number:
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)
    setattr(owner, name, disturbed)

def run(scenario):
    training_run.rehearse = rehearse_undisturbed if scenario["rehearses"] else lambda *args: None
    if scenario["disturbance"]:
        disturb(**scenario["disturbance"])
    os.environ.update(scenario["environment"])
    tempfile.tempdir = None
    if scenario["directory"]:
        os.chdir(scenario["directory"])
    if scenario["file_size"]:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (scenario["file_size"], scenario["file_size"]))
    try:
        sys.exit(cli.main(scenario["arguments"]))
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return 1 if isinstance(e.code, str) else e.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        return 1

for line in sys.stdin:
    scenario = json.loads(line)
    with open(scenario["log"] + ".out", "wb") as out, open(scenario["log"] + ".err", "wb") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            signal.alarm(120)  # ends a command that hangs
            code = run(scenario)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""


def disturbance(
    owner: str,
    name: str,
    call: int,
    *,
    file: str = "",
    halved: bool = False,
    number: int = signal.SIGKILL,
    error: int = 0,
) -> dict[str, Any]:
    """What happens to a command of `scenario` at the n-th call of a function, not counting those of a rehearsal.

    Args:
        owner: of the function: ``unit``, ``steps``, ``data``, ``trainer``, ``checkpoint``, ``finalize``,
            ``image_quality`` or ``os``.
        name: of the function.
        call: n.
        file: only calls with a path of that name count.
        halved: the call is made, and the file it wrote (its first path) is cut to half, before the signal comes.
        number: of the signal that the process sends itself, 0 for none.
        error: that number of an `OSError` is raised by this call and the later ones, instead of a signal.
    """
    return {
        "owner": owner,
        "name": name,
        "call": call,
        "file": file,
        "halved": halved,
        "number": number,
        "error": error,
    }


def scenario(
    log: Path,
    arguments: Sequence[str],
    kill: tuple[str, str, int] | dict[str, Any] | None = None,
    file_size: int = 0,
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
    rehearses: bool = False,
) -> dict[str, Any]:
    """A command for `run_scenarios` or a `Driver`.

    Args:
        log: its output goes to ``log.out`` and ``log.err``.
        arguments: of ``fpq``.
        kill: ``(owner, function, n)`` sends SIGKILL at the n-th call of a function; a `disturbance` does other harm.
        file_size: bytes that a file may have at most, 0 for any; writing beyond fails as on a full disk.
        environment: variables to set.
        directory: to run in.
        rehearses: whether a run is rehearsed, as it is outside of tests; it takes a second.
    """
    return {
        "log": str(log),
        "arguments": list(arguments),
        "disturbance": disturbance(*kill) if isinstance(kill, tuple) else kill,
        "file_size": file_size,
        "environment": environment or {},
        "directory": directory and str(directory),
        "rehearses": rehearses,
    }


class Driver:
    """Runs ``fpq`` commands one after the other, each in a process of its own (killed: a negative code)."""

    def __enter__(self) -> Driver:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(self, scenario: dict[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(scenario) + "\n")
        self._process.stdin.flush()
        answer = next(line for line in self._process.stdout if line.startswith("ended "))
        log = scenario["log"]
        return Outcome(int(answer.split()[1]), Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text())


def run_scenarios(scenarios: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Runs ``fpq`` commands one after the other, each in a process of its own (killed: a negative code)."""
    with Driver() as driver:
        return [driver.run(s) for s in scenarios]


def quantized_files(run: Path) -> dict[str, bytes]:
    """What a run wrote to ``quantized/``, to the byte."""
    files = [f for f in (run / "quantized").rglob("*") if f.is_file()]
    return {str(f.relative_to(run / "quantized")): f.read_bytes() for f in files}


def checkpoint_layers(run: Path) -> dict[str, Any]:
    """The quantization of layers in the newest checkpoint of a run: of finished units, and of the one in work."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    units = sorted((run / "checkpoints" / "units").iterdir())[: len(checkpoint["finished_units"])]
    finished = [torch.load(file, weights_only=True) for file in units]
    return {name: state for layers in [*finished, checkpoint["fpq"]["layers"]] for name, state in layers.items()}


_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LETTERS = [*_ALPHABET, *(f"{letter}</w>" for letter in _ALPHABET), "<|startoftext|>", "<|endoftext|>"]


def save_letters(directory: Path) -> CLIPTokenizer:
    """A tokenizer that knows letters and takes 16 of them."""
    words = directory / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(LETTERS)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=16)


def tiny_text_to_image(directory: Path, seed: int = 0) -> str:
    """Writes a tiny Stable Diffusion pipeline; its tokenizer knows letters."""
    directory.mkdir(parents=True)
    tokenizer = save_letters(directory)
    torch.manual_seed(seed)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(LETTERS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=len(LETTERS) - 2, eos_token_id=len(LETTERS) - 1, projection_dim=16,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, upsampling_scaling_factor=2,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    pipeline = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.save_pretrained(directory)
    return str(directory)
