"""Tiny pipelines on disk, and runs of the command line, in this process or in one that may be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

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
    pipeline = DDPMPipeline(tiny_unet(seed), DDPMScheduler(clip_sample=False))
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
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from fpq_lightning import cli
from fpq_lightning.reconstruction.module import BlockReconstruction
import fpq_lightning.callbacks.finalize as finalize

def kill_in(owner, name, call):
    original, calls = getattr(owner, name), 0
    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, killing)

owners = {"module": BlockReconstruction, "finalize": finalize}
outcomes = []
for scenario in json.loads(sys.stdin.read()):
    with open(scenario["log"] + ".out", "wb") as out, open(scenario["log"] + ".err", "wb") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            if scenario["kill"]:
                owner, name, call = scenario["kill"]
                kill_in(owners[owner], name, call)
            if scenario["file_size"]:
                import resource
                resource.setrlimit(resource.RLIMIT_FSIZE, (scenario["file_size"], scenario["file_size"]))
            try:
                sys.exit(cli.main(scenario["arguments"]))
            except SystemExit as e:
                if isinstance(e.code, str):
                    print(e.code, file=sys.stderr)
                code = 1 if isinstance(e.code, str) else e.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
    outcomes.append(os.waitstatus_to_exitcode(status))
print(json.dumps(outcomes))
"""


def scenario(
    log: Path, arguments: Sequence[str], kill: tuple[str, str, int] | None = None, file_size: int = 0
) -> dict[str, Any]:
    """A command for `run_scenarios`.

    Args:
        log: its output goes to ``log.out`` and ``log.err``.
        arguments: of ``fpq``.
        kill: ``(owner, function, n)`` sends SIGKILL at the n-th call of a function.
        file_size: bytes that a file may have at most, 0 for any; writing beyond fails as on a full disk.
    """
    return {"log": str(log), "arguments": list(arguments), "kill": kill, "file_size": file_size}


def run_scenarios(scenarios: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Runs ``fpq`` commands one after the other, each in a process of its own (killed: a negative code)."""
    finished = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps(list(scenarios)),
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    codes = json.loads(finished.stdout.splitlines()[-1])
    logs = [Path(s["log"]) for s in scenarios]
    return [
        Outcome(code, log.with_name(f"{log.name}.out").read_text(), log.with_name(f"{log.name}.err").read_text())
        for code, log in zip(codes, logs, strict=True)
    ]
