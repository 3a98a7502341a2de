"""Tiny pipelines of diffusers with random weights: calibrated, saved, reopened, sampled.

    python benchmarks/pipelines.py
    python benchmarks/pipelines.py --only FluxPipeline WanPipeline
    python benchmarks/pipelines.py --diffusers CHECKOUT --rows rows.jsonl --write docs/pipelines.md

A pipeline is ok if the one that was opened from its files gives the images, video or sound of the one in memory, bit
for bit. The pipelines are those of `tiny_pipelines.py`; given a checkout of diffusers, those of its tests, too; and
those of `related_pipelines.py`, which take the parts of others. One that does not run in full precision is no test of
quantization: it is listed apart. Each has a process and a time limit of its own. Needs no GPU, no network.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers_tests import PipelineTest, pipeline_tests
from models import Outcome, page, quiet
from related_pipelines import make_related, related
from tiny_pipelines import PIPELINES, tiny_pipeline

import fpq_lightning as fpq
from fpq_lightning.diffusion.denoisers import find_denoisers
from fpq_lightning.diffusion.pipelines import move_pipeline, take_settings
from fpq_lightning.diffusion.sampling import generate

_SECONDS = 300
_SEEDS = 3
_ALONE = "set sampler.batch_size 1"  # what a run says of a pipeline that makes one image in a call


@dataclass
class Trial(Outcome):
    """What became of a pipeline.

    Attributes:
        plain: why it does not run in full precision; nothing if it does.
        alone: whether it makes one image in a call.
    """

    plain: str = ""
    alone: bool = False


def runs_plainly(name: str, test: PipelineTest | None) -> None:
    """Runs a tiny pipeline in full precision, one of a test as that does.

    Raises:
        Exception: whatever it raises; ValueError if it gives NaN or Inf.
    """
    with tempfile.TemporaryDirectory() as directory:
        pipeline, options = tiny_pipeline(name, Path(directory))
        find_denoisers(pipeline)
        if test is not None:
            test.run()
        elif not sampled(pipeline, fpq.SamplerConfig(**options)).isfinite().all():
            raise ValueError("it gives NaN or Inf")


def examine(name: str, test: PipelineTest | None, trace: bool) -> Trial:
    """Takes a pipeline through recording, quantization, files and back."""
    trial, start = Trial(name), time.perf_counter()
    with tempfile.TemporaryDirectory() as path, quiet():
        directory = Path(path)

        def attempt(work: Callable[[], Any]) -> str:
            try:
                work()
                return ""
            except Exception as error:  # whatever a pipeline may raise
                if trace:
                    traceback.print_exc(file=sys.stdout)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}".replace(str(directory), "DIR")
                return textwrap.shorten(reason, 240)

        trial.plain = attempt(lambda: runs_plainly(name, test))
        if not trial.plain:
            trial.result = attempt(lambda: go_through(trial, directory)) or trial.result
    trial.seconds = time.perf_counter() - start
    return trial


def go_through(trial: Trial, directory: Path) -> None:
    """Fills in what becomes of a pipeline."""
    pipeline, options = tiny_pipeline(trial.name, directory)
    sampler = fpq.SamplerConfig(**options)
    trial.alone = not takes_several(pipeline, sampler)
    if not trial.alone:
        try:
            calibrate(trial, pipeline, sampler, directory / "run")
            return
        except ValueError as error:
            if _ALONE not in str(error):
                raise
            trial.alone = True
    calibrate(trial, pipeline, replace(sampler, batch_size=1), directory / "alone")


def takes_several(pipeline: diffusers.DiffusionPipeline, sampler: fpq.SamplerConfig) -> bool:
    """Whether a pipeline makes several images in a call."""
    try:
        sampled(pipeline, replace(sampler, batch_size=_SEEDS))
        return True
    except Exception:  # whatever it does with them
        return False


def calibrate(trial: Trial, pipeline: diffusers.DiffusionPipeline, sampler: fpq.SamplerConfig, run: Path) -> None:
    """Takes a pipeline through recording, quantization, files and back."""
    plain = sampled(pipeline, sampler)
    fpq.quantize(
        pipeline,
        run_dir=run,
        data=fpq.CalibrationDataModule(n_samples=8, n_search=4, micro_batch=4),
        sampler=sampler,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
    )
    report = json.loads((run / "report.json").read_text())
    trial.units, trial.share = len(report["blocks"]), report["quantized_share"]
    opened = fpq.load_quantized(run / "quantized")
    move_pipeline(opened, torch.device("cpu"))  # where its tensors lie in files no longer matters then
    take_settings(opened, pipeline)
    trial.result = compared(plain, *(sampled(one, sampler) for one in (pipeline, opened)))


def sampled(pipeline: diffusers.DiffusionPipeline, sampler: fpq.SamplerConfig) -> torch.Tensor:
    """What a pipeline gives for some seeds: the first array of each batch."""
    batches = torch.arange(_SEEDS).split(sampler.batch_size)
    outputs = [generate(pipeline, sampler, seeds.tolist()) for seeds in batches]
    arrays = [torch.as_tensor(next(iter(output.values()))) for output in outputs]
    if len(arrays[0]) < len(batches[0]):
        raise ValueError(f"it gives {len(arrays[0])} for {len(batches[0])} seeds")
    return torch.cat(arrays)


def compared(plain: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> str:
    if not expected.isfinite().all():
        return "the quantized pipeline gives NaN or Inf"
    if torch.equal(expected, plain):
        return "quantization changed nothing"
    return "ok" if torch.equal(expected, found) else "the opened pipeline gives other bits"


def in_time(name: str, test: PipelineTest | None, trace: bool) -> Trial:
    """`examine` in a process of its own, which is killed when its time is over."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(examine(name, test, trace)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_SECONDS) else Trial(name, f"took longer than {_SECONDS} s")
    except EOFError:
        return Trial(name, "its process was killed")
    finally:
        process.kill()
        process.join()


def exported() -> dict[str, type]:
    """All pipeline classes that diffusers has."""
    classes = {name: getattr(diffusers, name, None) for name in dir(diffusers) if name != "DiffusionPipeline"}
    return {k: v for k, v in classes.items() if inspect.isclass(v) and issubclass(v, diffusers.DiffusionPipeline)}


def rest_of_page(trials: list[Trial], tests: dict[str, PipelineTest]) -> str:
    """What the table does not say: whose components they are, and what was not tried."""
    tried = {trial.name.split()[0] for trial in trials if not trial.plain}
    reasons = {trial.name: trial.plain for trial in trials if trial.plain}
    kinds = exported()
    alone = ", ".join(f"`{trial.name}`" for trial in trials if trial.alone and trial.ok)
    others: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if name not in tried:
            without = "deprecated by diffusers" if "deprecated" in kind.__module__ else "no tiny components"
            others.setdefault(reasons.get(name, "not run" if name in PIPELINES else without), []).append(f"`{name}`")
    return "\n".join(
        [
            "",
            f"diffusers exports {len(kinds)} pipeline classes, of which {len(tried)} were tried: those that run in "
            "full precision. Components are of our",
            f"making, or else those of diffusers' own tests ({sum(name in tests for name in tried)} classes) with tiny "
            "models, tokenizers and processors in place of those of the hub,",
            "or those of a pipeline that has the same parts.",
            "",
            f"These make one image in a call, and were calibrated with `sampler.batch_size` 1: {alone}.",
            "",
            "## Not tried",
            "",
            *(f"- {reason}: {', '.join(names)}" for reason, names in sorted(others.items())),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these pipelines alone")
    parser.add_argument("--diffusers", type=Path, metavar="PATH", help="a checkout of diffusers, for its tests")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep results there, and leave out those it has")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--trace", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    own = {name.split()[0] for name in PIPELINES}
    found = {} if args.diffusers is None else pipeline_tests(args.diffusers.resolve())
    tests = {name: test for name, test in found.items() if name not in own}
    PIPELINES.update({name: test.make for name, test in tests.items()})
    PIPELINES.update({name: partial(make_related, name, base) for name, base in related().items()})
    if unknown := sorted(set(args.only or []) - set(PIPELINES)):
        parser.error(f"no tiny {', '.join(unknown)}")
    torch.set_num_threads(1)
    kept = args.rows.read_text().splitlines() if args.rows is not None and args.rows.exists() else []
    trials = {trial.name: trial for trial in (Trial(**json.loads(line)) for line in kept)}
    for name in args.only or PIPELINES:
        if name not in trials:
            trials[name] = trial = in_time(name, tests.get(name), args.trace)
            print(f"{name} does not run: {trial.plain}" if trial.plain else trial.row(), flush=True)
            if args.rows is not None:
                with args.rows.open("a") as file:
                    file.write(json.dumps(asdict(trial)) + "\n")
    outcomes = [trial for trial in trials.values() if not trial.plain]
    print(f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)} are ok")
    if args.write:
        source = "" if args.diffusers is None else " --diffusers CHECKOUT"
        text = page("Pipelines", "pipeline", outcomes, f"python benchmarks/pipelines.py{source} --write {args.write}")
        args.write.write_text(text + rest_of_page(list(trials.values()), tests))


if __name__ == "__main__":
    main()
