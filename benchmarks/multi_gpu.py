"""Time of calibration on several GPUs against one.

    for n in 1 2; do
        python -m torch.distributed.run --nproc_per_node $n benchmarks/multi_gpu.py blocks
        python -m torch.distributed.run --nproc_per_node $n benchmarks/multi_gpu.py run --model DIR --run_dir OUT-$n
    done

`blocks` times optimisation steps of single blocks at the sizes of Stable Diffusion XL (and smaller ones, to see where
splitting a batch stops paying). `run` times the phases of a whole calibration by the command line, also on CPUs;
options after ``--`` go to ``fpq fit``. TF32 matrix products throughout.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning import distributed
from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.shards import Samples, Shard
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.calibration.trajectories import CalibrationSet
from fpq_lightning.layers import is_quantizable, make_quantized
from fpq_lightning.model.blocks import Unit
from fpq_lightning.reconstruction.unit import UnitReconstruction, UnitReport

Block = tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]


def resnet(channels: int, size: int) -> Block:
    inputs = {"input_tensor": (channels, size, size), "temb": (1280,)}
    return lambda: ResnetBlock2D(in_channels=channels, out_channels=channels, temb_channels=1280), inputs


def transformer(width: int, tokens: int) -> Block:
    inputs = {"hidden_states": (tokens, width), "encoder_hidden_states": (77, 2048)}
    return lambda: BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=2048), inputs


BLOCKS: dict[str, Block] = {
    "ResNet 320 at 128x128": resnet(320, 128),
    "ResNet 640 at 64x64": resnet(640, 64),
    "ResNet 1280 at 32x32": resnet(1280, 32),
    "transformer 640, 4096 tokens": transformer(640, 4096),
    "transformer 1280, 1024 tokens": transformer(1280, 1024),
    "ResNet 256 at 16x16": resnet(256, 16),
    "ResNet 128 at 32x32": resnet(128, 32),
    "transformer 320, 256 tokens": transformer(320, 256),
}


class Whole(nn.Module):
    """A network of one unit."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.block(**inputs)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_block(name: str, n: int, batch_size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Median time of a step, and the memory of the store."""
    make, shapes = BLOCKS[name]
    torch.manual_seed(0)
    with torch.device(device):
        block = make().eval().requires_grad_(False)
    model = Whole(block)
    layers = {f"block.{k}": m for k, m in block.named_modules() if is_quantizable(m)}
    recipe = fpq.Recipe()
    for layer in layers.values():
        make_quantized(layer, recipe.granularity())
    unit = Unit("block", block, layers)
    shard = Shard(batch_size, distributed.rank(), distributed.world_size())
    every = torch.arange(n)
    samples = Samples(n, every, every[-4:], every[:4], shard)
    local = len(shard.owned(n))
    inputs = {k: torch.randn(local, *shape) for k, shape in shapes.items()}
    store = ActivationStore(device, torch.float32, 2**36)
    replay = NetworkReplay(model, [unit], CalibrationSet(inputs, torch.ones(local)), store, micro_batch=4)
    replay.capture()
    reconstruction = UnitReconstruction(
        replay, replay.target_energies(), samples, recipe, UnitReport("block", unit.parameters)
    )
    reconstruction.initialise()
    reconstruction.start_learning(None)
    reconstruction.make_backward(device, nullcontext())
    backward = reconstruction.backward
    optimizer = torch.optim.Adam([p for _, p in reconstruction.variables()], fused=True)
    schedule = torch.tensor([10.0, 1.0, 1.0], device=device)
    batch = torch.arange(batch_size)
    seconds = []
    for i in range(steps + 5):
        synchronize()
        start = time.perf_counter()
        backward(shard.local_batch(batch), batch, schedule)
        optimizer.step()
        synchronize()
        if i >= 5:
            seconds.append(time.perf_counter() - start)
    row = {"block": name, "parameters": unit.parameters, "ms": round(1e3 * statistics.median(seconds), 3)}
    row |= {"store_gib": round(store.peak / 2**30, 2)}
    store.close()
    return row


def blocks(args: argparse.Namespace) -> None:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for name in BLOCKS:
        row = time_block(name, 2 * args.batch_size, args.batch_size, args.steps, device)
        if distributed.rank() == 0:
            print(json.dumps({"gpus": distributed.world_size(), **row}), flush=True)
        torch.cuda.empty_cache()
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> None:
    from fpq_lightning import api, cli
    from fpq_lightning.calibration.datamodule import CalibrationDataModule
    from fpq_lightning.callbacks import FinalizeQuantization, ImageQuality
    from fpq_lightning.reconstruction.module import BlockReconstruction

    phases: dict[str, float] = defaultdict(float)

    def timed(owner: Any, function: str, phase: str) -> None:
        original = getattr(owner, function)

        @wraps(original)
        def measured(*a: Any, **k: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            try:
                return original(*a, **k)
            finally:
                synchronize()
                phases[phase] += time.perf_counter() - start

        setattr(owner, function, measured)

    timed(CalibrationDataModule, "make_set", "sampling")
    timed(NetworkReplay, "capture", "capture")
    timed(NetworkReplay, "advance", "capture")
    timed(UnitReconstruction, "initialise", "search")
    timed(UnitReconstruction, "make_backward", "graph")
    timed(BlockReconstruction, "training_step", "learning")
    timed(UnitReconstruction, "harden", "finish")
    timed(UnitReconstruction, "correct_bias", "finish")
    timed(FinalizeQuantization, "on_train_end", "writing")
    timed(ImageQuality, "on_train_end", "evaluation")
    timed(api, "print_estimate", "estimate")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = "ddp" if world_size > 1 else "auto"
    fit = ["fit", "--config", "fp4_fp8", "--model", args.model, "--run_dir", args.run_dir]
    fit += [f"--trainer.devices={world_size}", f"--trainer.strategy={strategy}", *args.options]
    start = time.perf_counter()
    cli.main(fit)
    if int(os.environ.get("RANK", "0")) == 0:
        total = time.perf_counter() - start
        row = {"processes": world_size, "total": total, **phases}
        if torch.cuda.is_available():
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps({k: round(v, 2) for k, v in row.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("blocks")
    command.add_argument("--batch_size", type=int, default=32)
    command.add_argument("--steps", type=int, default=20)
    command.set_defaults(call=blocks)
    command = commands.add_parser("run")
    command.add_argument("--model", required=True)
    command.add_argument("--run_dir", required=True)
    command.set_defaults(call=run)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:at])
    args.options = sys.argv[at + 1 :]
    args.call(args)


if __name__ == "__main__":
    main()
