"""Time of the weight search over a whole model, all formats of a family and all 111 clips.

python benchmarks/search.py                  # the architecture of google/ddpm-cifar10-32 (35.7 M), random weights
python benchmarks/search.py --model DIR      # a pipeline's own weights
"""

import argparse
import logging
import time

import torch
from diffusers import UNet2DModel

from fpq_lightning.diffusion.denoisers import find_denoisers
from fpq_lightning.diffusion.pipelines import load_pipeline
from fpq_lightning.formats.numbers import parse_formats
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.quantization.quantizer import Granularity
from fpq_lightning.quantization.search import search_tensor_error

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
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
