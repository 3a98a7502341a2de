"""The command line: ``fpq fit | test | predict``, a LightningCLI, and ``fpq study | export | inspect``.

Examples:
    fpq fit --config configs/quickstart.yaml
    fpq fit --config fp4_fp8 --model PATH_OR_HUB_ID
    fpq test --model runs/quickstart/quantized
    fpq predict --model runs/quickstart/quantized --output images
    fpq study --config study/cifar10
    fpq export runs/quickstart/quantized --format dequantized --output plain
    fpq inspect runs/quickstart/quantized
"""

from __future__ import annotations

import errno
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import lightning.pytorch as pl
import torch
from diffusers.utils import logging as diffusers_logging
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.nn.backends.hardware import Hardware, hardware_of
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.storage.export import export
from fpq_lightning.storage.inspect import inspect_pipeline, render
from fpq_lightning.storage.pipeline import is_quantized
from fpq_lightning.study.config import StudyConfig
from fpq_lightning.study.run import Study
from fpq_lightning.study.table import write_table
from fpq_lightning.training.callbacks.quality_report import QualityReport
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.generation import ImageGeneration, SeedDataModule, WriteImages
from fpq_lightning.training.run import TRAINER_DEFAULTS, Run, RunFinishedError, check_images, prepare_run
from fpq_lightning.utils.resources import find_config

_DESCRIPTION = (
    "Quantizes diffusion models to low-bit floating point. Further commands, each with its own --help: study (a grid "
    "of recipes), export (a quantized pipeline in another form), inspect (formats, bytes and arithmetic of layers)."
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run directory."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the file."""
        if stage == "fit":
            file = Path(self.config.run_dir) / "config.yaml"
            self.parser.save(self.config, file, skip_none=False, overwrite=True, multifile=False)


class FPQCommandLine(LightningCLI):
    """LightningCLI whose ``--model`` is a diffusers pipeline."""

    run: Run

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are commands."""
        skip = {"model", "datamodule", "dataloaders"}
        return {
            "fit": {*skip, "train_dataloaders", "val_dataloaders", "weights_only"},
            "test": {*skip, "ckpt_path", "verbose", "weights_only"},
            "predict": {*skip, "ckpt_path", "return_predictions", "weights_only"},
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._preparing = subcommand
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what the command at hand needs."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})
        parser.add_argument("--model", type=str, help="Directory or hub id of a diffusers pipeline.")
        parser.add_argument("--sampler", type=SamplerConfig, default=SamplerConfig(), help="How images are sampled.")
        if self._preparing in ("fit", "test"):
            parser.add_argument(
                "--evaluation", type=EvaluationConfig, default=EvaluationConfig(), help="Image quality."
            )
        if self._preparing == "fit":
            parser.add_argument("--run_dir", type=str | None, default=None, help="Default: runs/<model>-<formats>.")
            parser.add_argument("--recipe", type=Recipe, default=Recipe(), help="What to quantize to.")
            parser.add_argument("--dry_run", type=bool, default=False, help="Only say what the run would take.")
            parser.add_argument(
                "--torch_dtype", type=Literal["float32", "bfloat16"], default="float32", help="Of the model."
            )
            parser.add_argument(
                "--offload", type=bool, default=False, help="Keep blocks in host memory until they run."
            )
            parser.add_argument("--checkpoint_steps", type=int, default=2500, help="Steps between checkpoints.")
            parser.add_lightning_class_args(CalibrationDataModule, "data")
        if self._preparing == "test":
            parser.add_argument("--output", type=str | None, default=None, help="Default: runs/<model>-test.")
        if self._preparing == "predict":
            parser.add_argument("--output", type=str, required=True, help="Directory for the images.")
            parser.add_argument("--n_images", type=int, default=16, help="Number of images.")
            parser.add_argument("--prompts", type=list[str] | None, default=None, help="One for each image.")
            parser.add_argument("--seed", type=int, default=0, help="Seed of the first image; image i has seed + i.")

    def _parse_ckpt_path(self) -> None:
        """Leaves checkpoints to `api.fit`, which says what is wrong with one; they hold no options."""

    def instantiate_classes(self) -> None:
        """Makes module, datamodule and trainer of the command."""
        self.config_init = self.parser.instantiate_classes(self.config)
        options = self.config_init[self.subcommand]
        if not options.model:
            raise ValueError("no model: give --model, the directory or hub id of a diffusers pipeline")
        prepare = {"fit": self._prepare_fit, "test": self._prepare_test, "predict": self._prepare_predict}
        callbacks: list[pl.Callback] = prepare[cast(str, self.subcommand)](options)
        trainer = dict(options.trainer)
        trainer["callbacks"] = [*(trainer.get("callbacks") or []), *callbacks]
        if self.subcommand == "fit":
            self.trainer = self.run.trainer(cast("type[pl.Trainer]", self.trainer_class), **trainer)
            return
        if trainer["logger"] is None:
            trainer["logger"] = False
        self.trainer = self.trainer_class(**trainer)
        if self.subcommand == "test":
            check_images(options.evaluation.n_images, self.trainer.world_size, "--evaluation.n_images")
        if self.subcommand == "predict":
            check_images(options.n_images, self.trainer.world_size, "--n_images")

    def _prepare_fit(self, options: Namespace) -> list[pl.Callback]:
        if is_quantized(options.model):
            raise ValueError(f"{options.model} is quantized already: give the full-precision model")
        pipeline = load_pipeline(options.model, _DTYPES[options.torch_dtype])
        run_dir = options.run_dir or default_run_dir(options.model, options.recipe)
        options.run_dir = self.config[self.subcommand].run_dir = run_dir
        try:
            self.run = prepare_run(
                pipeline, options.model, options.recipe, options.data, options.sampler, options.evaluation, run_dir,
                resume=options.ckpt_path is not None, offload=options.offload,
                checkpoint_steps=options.checkpoint_steps,
            )  # fmt: skip
        except RunFinishedError:
            print(f"{run_dir} is finished: see {Path(run_dir) / 'report.md'}. To run it again, delete it.")
            raise SystemExit(0) from None
        self.model, self.datamodule = self.run.module, self.run.data
        return [_SaveConfig(self._parser(self.subcommand), self.config[self.subcommand], save_to_log_dir=False)]

    def _prepare_test(self, options: Namespace) -> list[pl.Callback]:
        if not options.evaluation.n_images:
            raise ValueError("--evaluation.n_images must be at least 2 to evaluate a model")
        Evaluator(options.evaluation, options.sampler).check()
        output = Path(options.output or default_test_directory(options.model))
        if options.evaluation.images is None:
            options.evaluation.images = str(output / "images")
        self.model = ImageGeneration(options.model, options.sampler, options.evaluation)
        self.datamodule = SeedDataModule(options.evaluation.seeds, options.sampler.batch_size)
        return [QualityReport(options.model, output)]

    def _prepare_predict(self, options: Namespace) -> list[pl.Callback]:
        if options.n_images < 1:
            raise ValueError(f"--n_images must be at least 1, got {options.n_images}")
        options.sampler.check()
        self.model = ImageGeneration(options.model, options.sampler)
        if options.prompts and len(options.prompts) != options.n_images:
            raise ValueError(
                f"{len(options.prompts)} prompts for --n_images {options.n_images}: give one for each image"
            )
        seeds = range(options.seed, options.seed + options.n_images)
        self.datamodule = SeedDataModule(seeds, options.sampler.batch_size, options.prompts)
        return [WriteImages(options.output)]

    def fit(self, **options: Any) -> None:
        """Runs the calibration in its run directory."""
        self.run.log_estimate(self.trainer)
        if self.config_init[self.subcommand].dry_run:
            return
        self.run.fit(self.trainer, options.get("ckpt_path"))
        directory = self.run.directory
        if (directory.path / "report.md").is_file():
            print(f"wrote {directory.quantized}, {directory.path / 'report.md'}")


def default_run_dir(model: str, recipe: Recipe) -> str:
    """``runs/<model>-<weight formats>-<activation formats>``."""

    def name(formats: str | list[str] | None) -> str:
        return "fp32" if formats is None else formats if isinstance(formats, str) else "+".join(formats)

    stem = Path(model).name or Path(model).resolve().name
    return f"runs/{stem}-{name(recipe.weights.formats)}-{name(recipe.activations.formats)}"


def default_test_directory(model: str) -> str:
    """``runs/<model>-test``; a model in a run directory has the name of the run."""
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    return f"runs/{path.parent.name if path.name == 'quantized' else path.name}-test"


def study(arguments: list[str]) -> None:
    """``fpq study``: a grid of recipes on one model, which is no run of a Trainer."""
    parser = ArgumentParser(prog="fpq study", description="Computes the missing rows of a study, and its table.")
    parser.add_argument("--config", action="config", help="YAML file; a shipped one by name.")
    parser.add_class_arguments(StudyConfig)
    parser.add_argument("--only", type=list[str], default=[], help="Rows to compute; all by default.")
    options = parser.instantiate_classes(parser.parse_args(arguments))
    only = options.pop("only")
    options.pop("config", None)
    config = StudyConfig(**vars(options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Study(config, device).run(only)
    for file in write_table(Path(config.output), list(config.rows)):
        print(f"wrote {file}")


def export_model(arguments: list[str]) -> None:
    """``fpq export``: a quantized pipeline in another form."""
    parser = ArgumentParser(prog="fpq export", description="Writes a quantized pipeline in another form.")
    parser.add_argument("model", type=str, help="Directory of a quantized pipeline, such as runs/NAME/quantized.")
    forms = (
        "fpq: packed codes; dequantized: float32; modelopt: FP8 in the keys of ModelOpt; nvfp4, mxfp4: blocks of FP4."
    )
    parser.add_argument("--format", type=str, required=True, help=forms)
    parser.add_argument("--output", type=str, required=True, help="A new directory.")
    options = parser.parse_args(arguments)
    export(options.model, options.output, options.format)
    print(f"wrote {options.output}")


def inspect_model(arguments: list[str]) -> None:
    """``fpq inspect``: layers of a packed pipeline, and the paths they run on."""
    parser = ArgumentParser(prog="fpq inspect", description="Formats, bytes and execution paths of packed layers.")
    parser.add_argument("model", type=str, help="Directory of a packed pipeline, such as runs/NAME/quantized.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "float16", "bfloat16"], default="bfloat16", help="Of activations."
    )
    parser.add_argument(
        "--capability", type=str, help="Plan for an NVIDIA GPU of this compute capability, such as 9.0."
    )
    options = parser.parse_args(arguments)
    if options.capability is None:
        hardware = hardware_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    elif match := re.fullmatch(r"(\d+)\.(\d)", options.capability):
        hardware = Hardware((int(match[1]), int(match[2])), kernels=True)
    else:
        raise ValueError(f"--capability {options.capability}: give it as 9.0")
    print(render(inspect_pipeline(options.model, hardware, getattr(torch, options.dtype))))


class _Plain(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*torch_dtype.*")
    warnings.filterwarnings("ignore", message=".*num_workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``fpq``."""
    _quiet()
    root = logging.getLogger("fpq_lightning")
    root.setLevel(logging.INFO)
    root.handlers = [_Plain()]
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        for i, argument in enumerate(arguments):
            if i and arguments[i - 1] in ("--config", "-c"):
                arguments[i] = find_config(argument)
            elif argument.startswith("--config="):
                arguments[i] = f"--config={find_config(argument.removeprefix('--config='))}"
        commands = {"study": study, "export": export_model, "inspect": inspect_model}
        names = [*FPQCommandLine.subcommands(), *commands]
        if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
            raise ValueError(f"there is no command {arguments[0]!r}: use {', '.join(names[:-1])} or {names[-1]}")
        if arguments and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
            return
        FPQCommandLine(
            trainer_defaults=TRAINER_DEFAULTS,
            args=arguments,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            parser_kwargs={"description": _DESCRIPTION},
        )
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())[:200]
        sys.exit(
            f"fpq: out of memory ({reason}): lower data.store_budget, data.micro_batch, data.n_search or batch sizes"
        )
    except (ValueError, FileNotFoundError, MisconfigurationException) as error:
        sys.exit(f"fpq: {' '.join(str(error).split())}")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        advice = "; free space or choose another place" if full else ""
        sys.exit(f"fpq: {error.filename or 'writing'}: {' '.join(str(error.strerror or error).split())}{advice}")


if __name__ == "__main__":
    main()
