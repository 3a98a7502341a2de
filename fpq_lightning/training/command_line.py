"""``fpq fit``, ``fpq test`` and ``fpq predict``: a LightningCLI whose model is a diffusers pipeline."""

from __future__ import annotations

import gc
import logging
import warnings
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fpq_lightning.diffusion.pipelines import load_pipeline, pipeline_class
from fpq_lightning.diffusion.sampling import SamplerConfig
from fpq_lightning.evaluation.config import EvaluationConfig
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.report.files import check_reports
from fpq_lightning.quantization.recipe import Recipe
from fpq_lightning.storage.pipeline import is_quantized, read_description
from fpq_lightning.training.callbacks.image_progress import ImageProgress
from fpq_lightning.training.callbacks.quality_report import QualityReport
from fpq_lightning.training.datamodule import CalibrationDataModule
from fpq_lightning.training.generation import ImageGeneration, SeedDataModule, WriteImages
from fpq_lightning.training.run import Run, RunFinishedError, check_images, prepare_run
from fpq_lightning.training.run_directory import RunDirectory
from fpq_lightning.training.strategy import TRAINER_DEFAULTS, precision_of
from fpq_lightning.training.summary import run_summary
from fpq_lightning.utils.options import OptionParser, option_help
from fpq_lightning.utils.tracebacks import RunError

logger = logging.getLogger(__name__)

_DESCRIPTIONS = {
    "fit": "Quantizes a diffusion model. Example: fpq fit --config fp4_fp8 --model PATH_OR_HUB_ID",
    "test": "Measures the image quality of a model. Example: fpq test --model runs/quickstart/quantized",
    "predict": "Samples images. Example: fpq predict --model runs/quickstart/quantized --output images",
}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class _Parser(OptionParser, LightningArgumentParser):
    """LightningCLI's parser, with our errors."""


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run directory."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes the file."""
        if stage == "fit":
            file = Path(self.config.run_dir).expanduser() / "config.yaml"
            self.parser.save(self.config, file, skip_none=False, overwrite=True, multifile=False)


class FPQCommandLine(LightningCLI):
    """LightningCLI whose ``--model`` is a diffusers pipeline."""

    run: Run
    finished: tuple[RunDirectory, int] | None = None  # a run, and the parameters of its denoisers

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Trainer methods that are commands, with the arguments that are no options."""
        skip = {"model", "datamodule", "dataloaders", "weights_only"}
        return {
            "fit": {*skip, "train_dataloaders", "val_dataloaders", "ckpt_path"},
            "test": {*skip, "ckpt_path", "verbose"},
            "predict": {*skip, "ckpt_path", "return_predictions"},
        }

    # --- options -----------------------------------------------------------------------------------------------

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._preparing = subcommand
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what the command at hand needs."""
        parser.add_argument("--model", type=str, help="Directory or hub id of a diffusers pipeline.")
        parser.add_argument(
            "--pipeline_arguments",
            type=dict[str, Any],
            default={},
            help="Further arguments of from_pretrained, such as {text_encoder_3: null}; a quantized model keeps them.",
        )
        parser.add_argument(
            "--pipeline", type=str | None, default=None, help="Class of diffusers to open it as. Default: its own."
        )
        if self._preparing == "fit":
            parser.add_argument("--run_dir", type=str | None, default=None, help="Default: runs/<model>-<formats>.")
            parser.add_argument(
                "--ckpt_path", type=str | None, default=None, help="last goes on with an interrupted run; or a file."
            )
            parser.add_argument("--dry_run", type=bool, default=False, help="Only say what the run would take.")
            parser.add_argument(
                "--torch_dtype", type=Literal["float32", "bfloat16"], default="float32", help="Of the model."
            )
            parser.add_argument(
                "--offload", type=bool, default=False, help="Keep blocks in host memory until they run."
            )
            parser.add_argument("--checkpoint_steps", type=int, default=2500, help="Steps between checkpoints.")
            parser.add_argument("--recipe", type=Recipe, default=Recipe(), help="What to quantize to.")
            parser.add_lightning_class_args(CalibrationDataModule, "data")
        if self._preparing == "test":
            parser.add_argument("--output", type=str | None, default=None, help="Default: runs/<model>-test.")
        if self._preparing == "predict":
            parser.add_argument("--output", type=str, required=True, help="Directory for the images.")
            parser.add_argument("--n_images", type=int, default=16, help="Number of images.")
            parser.add_argument("--prompts", type=list[str] | None, default=None, help="One for each image.")
            parser.add_argument("--seed", type=int, default=0, help="Seed of the first image; image i has seed + i.")
        parser.add_argument("--sampler", type=SamplerConfig, default=SamplerConfig(), help="How images are sampled.")
        if self._preparing in ("fit", "test"):
            parser.add_argument(
                "--evaluation", type=EvaluationConfig, default=EvaluationConfig(), help="Image quality."
            )
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line, or shows help: ``--help`` our own options, ``--help GROUP`` those of a group."""
        words = [str(word) for word in args]
        asked = next((i for i, word in enumerate(words) if word in ("-h", "--help")), None)
        if asked is not None and words[0] in self._subcommand_parsers:
            topic = words[asked + 1] if asked + 1 < len(words) else ""
            print(option_help(self._subcommand_parsers[words[0]], f"fpq {words[0]}", topic, hidden=("trainer",)))
            raise SystemExit(0)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leaves checkpoints to `Run.fit`, which says what is wrong with one; they hold no options."""

    # --- module, datamodule and trainer ------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Makes module, datamodule and trainer of the command."""
        self.config_init = self.parser.instantiate(self.config)
        options = self.config_init[self.subcommand]
        if not options.model:
            raise ValueError("no model: give --model, the directory or hub id of a diffusers pipeline")
        if self.subcommand != "fit" and is_quantized(options.model):
            options.sampler = options.sampler.or_else(read_description(options.model).get("sampler", {}))
        if self.subcommand == "predict":
            options.sampler.check()
        else:
            Evaluator(options.evaluation, options.sampler).check()
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
        kind = pipeline_class(options.pipeline)
        pipeline = load_pipeline(options.model, _DTYPES[options.torch_dtype], options.pipeline_arguments, kind)
        run_dir = options.run_dir or default_run_dir(options.model, options.recipe)
        options.run_dir = self.config[self.subcommand].run_dir = run_dir
        try:
            self.run = prepare_run(
                pipeline, options.model, options.recipe, options.data, options.sampler, options.evaluation, run_dir,
                resume=options.ckpt_path is not None, offload=options.offload,
                checkpoint_steps=options.checkpoint_steps, pipeline_arguments=options.pipeline_arguments,
                precision=precision_of(options.trainer),
            )  # fmt: skip
        except RunFinishedError:
            logger.info("%s is finished: see %s. To run it again, delete it.", run_dir, Path(run_dir) / "report.md")
            raise SystemExit(0) from None
        self.model, self.datamodule = self.run.module, self.run.data
        return [_SaveConfig(self._parser(self.subcommand), self.config[self.subcommand], save_to_log_dir=False)]

    def _prepare_test(self, options: Namespace) -> list[pl.Callback]:
        if not options.evaluation.n_images:
            raise ValueError("--evaluation.n_images must be at least 2 to evaluate a model")
        output = Path(options.output or default_test_directory(options.model))
        check_reports(output)
        if options.evaluation.images is None:
            options.evaluation.images = str(output / "images")
        self.model = ImageGeneration(
            options.model,
            options.sampler,
            options.evaluation,
            options.pipeline_arguments,
            pipeline_class(options.pipeline),
        )
        self.datamodule = SeedDataModule(options.evaluation.seeds, options.sampler.batch_size)
        return [*([ImageProgress()] if _shows_progress(options) else []), QualityReport(options.model, output)]

    def _prepare_predict(self, options: Namespace) -> list[pl.Callback]:
        if options.n_images < 1:
            raise ValueError(f"--n_images must be at least 1, got {options.n_images}")
        arguments, kind = options.pipeline_arguments, pipeline_class(options.pipeline)
        self.model = ImageGeneration(options.model, options.sampler, pipeline_arguments=arguments, kind=kind)
        if options.prompts and len(options.prompts) != options.n_images:
            raise ValueError(
                f"{len(options.prompts)} prompts for --n_images {options.n_images}: give one for each image"
            )
        seeds = range(options.seed, options.seed + options.n_images)
        self.datamodule = SeedDataModule(seeds, options.sampler.batch_size, options.prompts)
        return [*([ImageProgress()] if _shows_progress(options) else []), WriteImages(options.output)]

    # --- runs --------------------------------------------------------------------------------------------------

    def fit(self, **options: Any) -> None:
        """Runs the calibration in its run directory."""
        directory = self.run.directory
        try:
            dry_run = self.config_init[self.subcommand].dry_run
            self.run.log_estimate(self.trainer, required=dry_run)
            if dry_run:
                return
            parameters = sum(p.numel() for p in self.run.module.denoiser.parameters())
            self.run.fit(self.trainer, self.config_init[self.subcommand].ckpt_path)
        except Exception as error:
            raise RunError(directory.path if directory.is_begun else None) from error
        if self.trainer.is_global_zero:
            self.finished = (directory, parameters)


def run_command(arguments: list[str]) -> None:
    """Runs ``fit``, ``test`` or ``predict``.

    Args:
        arguments: the command and its options.

    Raises:
        RunError: if a calibration fails.
        ValueError: if an option is wrong.
    """
    # Options are checked before the processes know each other: the first one warns for all.
    if getattr(rank_zero_only, "rank", 0):
        warnings.filterwarnings("ignore", message=".*images are too few.*")
    try:
        command = FPQCommandLine(
            trainer_defaults=TRAINER_DEFAULTS,
            args=arguments,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            parser_class=_Parser,
            parser_kwargs={"prog": "fpq", **{name: {"description": text} for name, text in _DESCRIPTIONS.items()}},
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    finished = command.finished
    del command  # the model that was quantized makes room for the quantized one
    gc.collect()
    if finished:
        for line in run_summary(*finished):
            logger.info(line)


def _shows_progress(options: Namespace) -> bool:
    return options.trainer.enable_progress_bar in (None, True)


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
