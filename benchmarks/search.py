"""Time of the weight search over a whole model, all formats of a family; and what error it leaves on the table.

python benchmarks/search.py                  # the architecture of google/ddpm-cifar10-32 (35.7 M), random weights
python benchmarks/search.py --model DIR      # a pipeline's own weights
python benchmarks/search.py --excess         # error over the least of 20,000 clips, and of 111, for some formats
"""

import argparse
import logging
import time

import torch
from diffusers import UNet2DModel

from fpq_lightning.diffusion.denoisers import find_denoisers
from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.formats.numbers import Format, IntFormat, parse_format, parse_formats
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.quantization.quantizer import Granularity
from fpq_lightning.quantization.search import CLIPS, SortedRows, search_clip, search_tensor_error

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


def least_error(rows: SortedRows, fmt: Format, fractions: torch.Tensor) -> torch.Tensor:
    """The least error of each row among clips that are fractions of the largest magnitude."""
    full, offset, _ = search_clip(rows, fmt, max_only=True)
    if offset is not None:
        offset = offset * (fractions if isinstance(fmt, IntFormat) else torch.ones_like(fractions))
    return rows.squared_error(fmt, full * fractions, offset).amin(1, keepdim=True)


def print_excess(weights: list[torch.Tensor]) -> None:
    """Compares the error of some channels of every layer with that of the best of many clips."""
    print("| format | mean, % | most, % | of 111 clips: mean, % | most, % |\n| --- | --- | --- | --- | --- |")
    many = 0.1 * 22 ** torch.linspace(0, 1, 20_000, device=weights[0].device)  # the search reaches up to twice
    for name in ("e5m2", "e4m3", "e3m4", "e2m5", "int8", "ue4m4", "ue2m6", "uint8", "e3m2", "e2m3", "e2m1", "int4"):
        fmt, excess = parse_format(name), []
        for weight in weights:
            rows = SortedRows(weight.flatten(1)[:4])
            errors = torch.cat([search_clip(rows, fmt)[2], least_error(rows, fmt, CLIPS.to(weight.device))], 1)
            least = torch.minimum(errors.amin(1, keepdim=True), least_error(rows, fmt, many))
            excess.append(100 * (errors / least - 1))
        (mean, coarse_mean), (most, coarse_most) = torch.cat(excess).mean(0), torch.cat(excess).amax(0)
        print(f"| {name} | {mean:.2f} | {most:.2f} | {coarse_mean:.2f} | {coarse_most:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--excess", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.model is None:
        model = UNet2DModel(**CIFAR10)
    else:
        pipeline = load_pipeline(args.model)
        model = next(iter(find_denoisers(pipeline).values()))
    weights = [m.weight.detach().float().to(device) for m in model.modules() if is_quantizable(m)]
    if args.excess:
        print_excess(weights)
        return
    total = sum(w.numel() for w in weights)
    search_tensor_error(weights[0].reshape(1, -1), parse_formats("fp4"))  # start the device's libraries
    print(f"{total / 1e6:.1f} M weights on {device}, torch {torch.__version__}")
    print("| formats | granularity | seconds |\n| --- | --- | --- |")
    for names in ("fp4", "fp8"):
        for kind in ("channel", "tensor"):
            formats, granularity = parse_formats(names), Granularity(kind)
            start = time.perf_counter()
            for weight in weights:
                search_tensor_error(granularity.rows(weight), formats)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            print(f"| {names} | {kind} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
