"""Tiny pipelines of diffusers with random weights: calibrated, saved, reopened, sampled.

    python benchmarks/pipelines.py
    python benchmarks/pipelines.py --only FluxPipeline WanPipeline
    python benchmarks/pipelines.py --write docs/pipelines.md
    python benchmarks/pipelines.py --write docs/pipelines.md --only FluxPipeline     # that row again

A pipeline is ok if the one that was opened from its files gives the images, video or sound of the one in memory, bit
for bit. The pipelines are those of `tiny_pipelines.py`, and those of `related_pipelines.py`, which take their parts. Of
the latter, one that does not run in full precision is no test of quantization and left out. Needs no GPU, no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import Outcome, page, quiet
from related_pipelines import make_related, related
from tiny_pipelines import PIPELINES, tiny_pipeline

import fpq_lightning as fpq
from fpq_lightning.diffusion.pipelines import move_pipeline
from fpq_lightning.diffusion.sampling import generate

RELATED = related()
PIPELINES.update({name: partial(make_related, name, base) for name, base in RELATED.items()})


def runs(name: str) -> bool:
    """Whether a tiny pipeline runs in full precision."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            pipeline, options = tiny_pipeline(name, Path(directory))
            return bool(values(generate(pipeline, fpq.SamplerConfig(**options), range(3, 5))).isfinite().all())
        except Exception:  # whatever it misses
            return False


def examine(name: str, directory: Path, trace: bool) -> Outcome:
    """Takes a pipeline through recording, quantization, files and back."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        pipeline, options = tiny_pipeline(name, directory)
        sampler = fpq.SamplerConfig(**options)
        fpq.quantize(
            pipeline,
            run_dir=directory / "run",
            data=fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4),
            sampler=sampler,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
        )
        report = json.loads((directory / "run" / "report.json").read_text())
        outcome.units, outcome.share = len(report["blocks"]), report["quantized_share"]
        opened = fpq.load_quantized(directory / "run" / "quantized")
        move_pipeline(opened, torch.device("cpu"))  # where its tensors lie in files no longer matters then
        outcome.result = compared(*(values(generate(one, sampler, range(3, 5))) for one in (pipeline, opened)))
    except Exception as error:
        if trace:
            traceback.print_exc(file=sys.stdout)
        outcome.result = textwrap.shorten(f"{type(error).__name__}: {error}".replace(f"{directory}", "DIR"), 240)
    outcome.seconds = time.perf_counter() - start
    return outcome


def values(output: Any) -> torch.Tensor:
    """The first array that a pipeline gives."""
    return torch.as_tensor(next(iter(output.values())))


def compared(expected: torch.Tensor, found: torch.Tensor) -> str:
    if not expected.isfinite().all():
        return "the quantized pipeline gives NaN or Inf"
    return "ok" if torch.equal(expected, found) else "the opened pipeline gives other bits"


def written(file: Path) -> list[Outcome]:
    """The outcomes in a table of before."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    return [
        Outcome(
            name.strip("`"), result, int(units.replace("-", "0")), float(share.strip("-%") or 0) / 100, float(seconds)
        )
        for name, result, units, share, seconds in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PIPELINES), metavar="CLASS", help="these pipelines alone")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the table there; with --only the other rows stay"
    )
    parser.add_argument("--trace", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for name in args.only or PIPELINES:
        if name in RELATED and not runs(name):
            print(f"{name} does not run in full precision with these parts", flush=True)
            continue
        with tempfile.TemporaryDirectory() as directory, quiet():
            outcomes.append(examine(name, Path(directory), args.trace))
        print(outcomes[-1].row(), flush=True)
    print(f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)} are ok")
    if args.write:
        made = {outcome.name for outcome in outcomes}
        kept = [outcome for outcome in written(args.write) if args.only and outcome.name not in made]
        text = page("Pipelines", "pipeline", [*outcomes, *kept], "python " + " ".join(sys.argv))
        args.write.write_text(
            text + ("\nThe rows of classes that this command does not name are older.\n" if kept else "")
        )


if __name__ == "__main__":
    main()
