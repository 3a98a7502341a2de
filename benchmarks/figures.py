"""Image quality, time and memory of recipes on one model: the tables of docs/benchmarks.md.

    python benchmarks/figures.py --model data/cifar10-ddpm-small --recipes fp8_fp8 fp4_fp8 --n_images 5000 --out DIR

Sampling is 25-step DDIM in float32 with TF32 off; image i starts from the CPU generator with seed i. Calibration
uses TF32 matrix products on a GPU. Each row is one JSON file in the output directory.
"""

import argparse
import json
import logging
import time
import warnings
from datetime import date
from pathlib import Path

import torch
import yaml

import fpq_lightning as fpq
from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.evaluation.evaluator import Evaluator
from fpq_lightning.evaluation.sampling import sample_variant
from fpq_lightning.evaluation.statistics import weight_statistics
from fpq_lightning.utils.resources import find_config

REAL = "data/cifar10-features/cifar10_train.safetensors"


def precision(tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def build_recipe(name: str, overrides: dict) -> tuple[fpq.Recipe, dict]:
    config = yaml.safe_load(Path(find_config(name)).read_text())
    options = config["recipe"]
    rounding = {**options.pop("rounding", {}), **overrides.get("rounding", {})}
    recipe = fpq.Recipe(
        weights=fpq.WeightRecipe(**options.pop("weights")),
        activations=fpq.ActivationRecipe(**options.pop("activations")),
        rounding=fpq.RoundingRecipe(**rounding),
        **options,
    )
    return recipe, {**config["data"], **overrides.get("data", {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/cifar10-ddpm-small")
    parser.add_argument("--recipes", nargs="+", default=["fp8_fp8", "fp4_fp8"])
    parser.add_argument("--n_images", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON with rounding and data options")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"))
    parser.add_argument("--label", default="")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    sampler = fpq.SamplerConfig(batch_size=args.batch_size)
    evaluation = fpq.EvaluationConfig(args.n_images, features="data/cifar10-features", real=REAL)
    evaluator = Evaluator(evaluation, sampler)
    stem = Path(args.model).name

    precision(tf32=False)
    pipeline = load_pipeline(args.model).to(device)
    reference = sample_variant(pipeline, sampler, evaluation.seeds, "full_precision")

    def write(name: str, row: dict) -> None:
        row = {"model": stem, "row": name, **row, "hardware": hardware, "torch": torch.__version__}
        (args.out / f"{stem}-{name}.json").write_text(json.dumps({**row, "date": str(date.today())}, indent=2))
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k not in ("torch", "model")}
        print(stem, shown, flush=True)

    for name in args.recipes:
        recipe, data_options = build_recipe(name, args.overrides)
        pipeline = load_pipeline(args.model).to(device)
        data = fpq.CalibrationDataModule(**data_options)
        run_dir = args.out / "runs" / f"{stem}-{name}{args.label}"
        precision(tf32=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        fpq.quantize(pipeline, recipe, run_dir, data, sampler, accelerator="auto", devices=1)
        seconds = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        precision(tf32=False)
        pipeline.to(device)
        statistics = weight_statistics(pipeline.unet)
        for mode in ("nearest", "quantized"):
            images = sample_variant(pipeline, sampler, evaluation.seeds, mode)
            metrics = evaluator.compare(images, evaluation.seeds, reference, device)
            row = {**metrics, **statistics}
            if mode == "quantized":
                row |= {"calibration_seconds": seconds, "peak_gib": memory}
                row |= {"iterations": recipe.rounding.iterations, "samples": data.n_samples}
            write(f"{name}{args.label}-{mode}", row)
    pipeline = load_pipeline(args.model).to(device)
    other_seeds = range(args.n_images, 2 * args.n_images)
    others = sample_variant(pipeline, sampler, other_seeds, "full_precision")
    write("seed_noise", evaluator.compare(others, other_seeds, reference, device, same_seeds=False))


if __name__ == "__main__":
    main()
