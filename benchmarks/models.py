"""Every denoiser class of diffusers, tiny and with random weights: recorded, quantized, saved, reopened, run.

    python benchmarks/models.py                                   # all of them, some minutes on one core
    python benchmarks/models.py --only WanTransformer3DModel UNet2DModel
    python benchmarks/models.py --write docs/models.md

The denoisers are those of `tiny_denoisers.py`. A pipeline calls each along a trajectory. It is ok if the denoiser that
was reopened from the files gives the bits of the one in memory. Needs no GPU and no network.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import logging
import platform
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput
from tiny_denoisers import HELPERS, denoisers, inputs_of, make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fpq_lightning as fpq
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.disk import load_calibration_set
from fpq_lightning.nn.calibrated import running


class Probe(DiffusionPipeline):
    """Calls any denoiser along a trajectory, of which its first input is the state."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size: int, generator: list[torch.Generator], num_inference_steps: int, output_type: str = "np"
    ) -> ImagePipelineOutput:
        seeds = [g.initial_seed() for g in generator]
        self.scheduler.set_timesteps(num_inference_steps)
        state: Tensor | None = None
        for t in self.scheduler.timesteps:
            inputs = inputs_of(self.transformer, seeds, t)
            name, noise = next((k, v) for k, v in inputs.items() if _is_floating(v))
            if state is None:
                state = noise if isinstance(noise, Tensor) else torch.stack(noise)
            inputs[name] = state.clone() if isinstance(noise, Tensor) else list(state)
            output = outputs(self.transformer(**inputs))
            found = output[0] if isinstance(noise, Tensor) else torch.stack(output)
            found = found if found.shape == state.shape else 0.1 * state  # it predicts something else
            state = self.scheduler.step(found, t, state).prev_sample
        pixels = state.float().reshape(batch_size, -1)[:, :12].sigmoid()
        return ImagePipelineOutput(images=pixels.reshape(batch_size, 2, 2, 3).numpy())


def _is_floating(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Tensor) and first.is_floating_point()


def outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors that a denoiser gives."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass
class Outcome:
    """What became of a class.

    Attributes:
        name: of it.
        result: ``ok``, or what went wrong in one line.
        units: that were reconstructed.
        share: of the weights that are quantized.
        seconds: that all took.
    """

    name: str
    result: str = "ok"
    units: int = 0
    share: float = 0.0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.result == "ok"

    def row(self) -> str:
        """A line of the table."""
        numbers = f"{self.units} | {self.share:.0%}" if self.units else "- | -"
        return f"| `{self.name}` | {self.result.replace('|', '/')} | {numbers} | {self.seconds:.1f} |"


def examine(name: str, kind: type, directory: Path, trace: bool = False) -> Outcome:
    """Takes a class through recording, quantization, files and back."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        pipeline = Probe(make(kind), DDIMScheduler(clip_sample=False))
        pipeline.set_progress_bar_config(disable=True)
        plain = run(pipeline.transformer)
        fpq.quantize(
            pipeline,
            run_dir=directory,
            data=fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4),
            sampler=fpq.SamplerConfig(steps=2, batch_size=2),
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
        )
        report = json.loads((directory / "report.json").read_text())
        outcome.units, outcome.share = len(report["blocks"]), report["quantized_share"]
        quantized = run(pipeline.transformer)
        reopened = run(kind.from_pretrained(directory / "quantized" / "transformer").eval())
        if not independent(pipeline.transformer, load_calibration_set(directory / "calibration")):
            outcome.result = "a recorded sample gives another output in a batch than alone"
        elif not all(x.isfinite().all() for x in quantized):
            outcome.result = "the quantized denoiser gives NaN or Inf"
        elif not all(map(torch.equal, quantized, reopened)):
            outcome.result = "the reopened denoiser gives other bits"
        elif all(map(torch.equal, quantized, plain)):
            outcome.result = "quantization changed nothing"
    except Exception as error:
        if trace:
            traceback.print_exc(file=sys.stdout)
        outcome.result = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
    outcome.seconds = time.perf_counter() - start
    return outcome


@torch.no_grad()
def independent(denoiser: nn.Module, found: CalibrationSet) -> bool:
    """Whether the samples that may share a batch with the first give in it what they give alone."""
    rows = torch.arange(len(found)) if found.group_of is None else (found.group_of == found.group_of[0]).nonzero()[:, 0]
    with running(denoiser, "full_precision"):
        together = outputs(denoiser(**found.batch(rows, torch.device("cpu"))))
        alone = [outputs(denoiser(**found.batch(row, torch.device("cpu")))) for row in rows.split(1)]
    if len(together) == len(rows) * len(alone[0]):  # an output for each image
        pairs = list(zip([x for one in alone for x in one], together, strict=True))
    else:
        pairs = list(zip(map(torch.cat, zip(*alone, strict=True)), together, strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)


@torch.no_grad()
def run(denoiser: nn.Module) -> list[Tensor]:
    """What a denoiser gives for two images that it was not calibrated with."""
    return outputs(denoiser(**inputs_of(denoiser, [101, 102], torch.tensor(400))))


def page(title: str, what: str, outcomes: list[Outcome], command: str) -> str:
    """The table with what it was made from.

    Args:
        title: of the page.
        what: the classes are.
        outcomes: of them.
        command: that made it.
    """
    good = sum(outcome.ok for outcome in outcomes)
    lines = [
        f"# {title}",
        "",
        f"{good} of {len(outcomes)} {what} classes of diffusers go through recording, quantization (closed form, the",
        "default recipe), saving and reopening, and give the same bits after it. Each is tiny and has random weights:",
        "the table says that a class works, not how good its images are.",
        "",
        f"Made on {datetime.date.today()} by `{command}` with Python {platform.python_version()}, PyTorch "
        f"{torch.__version__}, diffusers {diffusers.__version__} on a CPU.",
        "",
        "| class | result | units | weights quantized | seconds |",
        "| --- | --- | --- | --- | --- |",
        *(outcome.row() for outcome in sorted(outcomes, key=lambda o: (o.ok, o.name))),
        "",
    ]
    return "\n".join(lines)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing is logged, warned of or shown as a bar."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def main(arguments: list[str] | None = None) -> list[Outcome]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes alone")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--trace", action="store_true", help="show tracebacks")
    args = parser.parse_args(arguments)
    found = denoisers()
    if unknown := sorted(set(args.only or []) - set(found)):
        parser.error(f"no denoiser class {', '.join(unknown)}")
    torch.set_num_threads(1)
    outcomes = []
    for name in args.only or found:
        with tempfile.TemporaryDirectory() as directory, quiet():
            outcomes.append(examine(name, found[name], Path(directory) / "run", args.trace))
        print(outcomes[-1].row(), flush=True)
    print(f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)} are ok")
    if args.write:
        command = " ".join(["python benchmarks/models.py", *(sys.argv[1:] if arguments is None else arguments)])
        left = "; ".join(f"`{name}` ({reason})" for name, reason in HELPERS.items())
        args.write.write_text(page("Models", "denoiser", outcomes, command) + f"\nLeft out: {left}.\n")
    return outcomes


if __name__ == "__main__":
    main()
