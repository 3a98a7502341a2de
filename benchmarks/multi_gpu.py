"""Time of calibration on several GPUs against one.

    for n in 1 2; do
        python -m torch.distributed.run --nproc_per_node $n benchmarks/multi_gpu.py blocks
        python -m torch.distributed.run --nproc_per_node $n benchmarks/multi_gpu.py run --model DIR --run_dir OUT-$n
    done

`blocks` times optimisation steps of single blocks at the sizes of Stable Diffusion XL (and smaller ones, to see where
splitting a batch stops paying); `profile` lists the kernels of a step of one of them. `run` times the phases of a whole
calibration by the command line, also on CPUs; options after ``--`` go to ``fpq fit``. TF32 matrix products throughout.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.replay import NetworkReplay
from fpq_lightning.calibration.shards import Samples, Shard
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.graph.units import Unit
from fpq_lightning.nn.calibrated import is_quantizable
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.reconstruction.backward import Backward
from fpq_lightning.reconstruction.optimizer import GraphedAdam
from fpq_lightning.reconstruction.report import UnitReport
from fpq_lightning.reconstruction.unit import UnitTrainer
from fpq_lightning.training.datamodule import STEPS_PER_BATCH
from fpq_lightning.utils import distributed

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


def prepare(name: str, n: int, batch_size: int, device: torch.device) -> tuple[dict[str, Any], Callable[[], None]]:
    """One block being learned: what there is to say about it, and ten steps of it."""
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
    reconstruction = UnitTrainer(replay, samples, recipe, UnitReport("block", unit.parameters))
    reconstruction.begin(learns=True)
    backward = cast(Backward, reconstruction.backward)
    optimizer = GraphedAdam([p for _, p in reconstruction.variables()], replay.is_on_device)
    batches = torch.arange(batch_size).expand(STEPS_PER_BATCH, -1)
    schedule = torch.tensor([10.0, 1.0, 1.0, 1.0]).expand(STEPS_PER_BATCH, -1)

    def ten_steps() -> None:
        backward.plan(shard.local_batch(batches), batches, schedule)
        for _ in range(STEPS_PER_BATCH):
            optimizer.step(backward)

    ten_steps()
    return {"block": name, "parameters": unit.parameters, "store_gib": round(store.peak / 2**30, 2)}, ten_steps


def start_processes() -> torch.device:
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


def blocks(args: argparse.Namespace) -> None:
    device = start_processes()
    for name in BLOCKS:
        row, ten_steps = prepare(name, 2 * args.batch_size, args.batch_size, device)
        seconds = []
        for _ in range(args.rounds):
            synchronize()
            start = time.perf_counter()
            ten_steps()
            synchronize()
            seconds.append((time.perf_counter() - start) / STEPS_PER_BATCH)
        if distributed.rank() == 0:
            row = {"gpus": distributed.world_size(), **row, "ms": round(1e3 * statistics.median(seconds), 3)}
            print(json.dumps(row), flush=True)
        del ten_steps  # NCCL waits for graphs that hold its collectives before the group can end
        gc.collect()
        torch.cuda.empty_cache()
    dist.destroy_process_group()


def profile(args: argparse.Namespace) -> None:
    device = start_processes()
    _, ten_steps = prepare(args.block, 2 * args.batch_size, args.batch_size, device)
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        ten_steps()
        synchronize()
        seconds = time.perf_counter() - start
    if distributed.rank() == 0:
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        busy = sum(event.self_device_time_total for event in events)
        steps = STEPS_PER_BATCH
        print(f"{args.block}: {1e3 * seconds / steps:.3f} ms a step, kernels {busy / 1e3 / steps:.3f} ms")
        print("| kernel | launches | us |\n| --- | --- | --- |")
        for event in events[: args.rows]:
            print(f"| {event.key[:90]} | {event.count / steps:g} | {event.self_device_time_total / steps:.1f} |")
    del ten_steps
    gc.collect()
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> None:
    from fpq_lightning import cli
    from fpq_lightning.training.callbacks.checkpoint import RunCheckpoint
    from fpq_lightning.training.callbacks.finalize import FinalizeQuantization
    from fpq_lightning.training.callbacks.image_quality import ImageQuality
    from fpq_lightning.training.datamodule import CalibrationDataModule
    from fpq_lightning.training.run import Run

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
    timed(UnitTrainer, "initialise", "search")
    timed(UnitTrainer, "train", "learning")
    timed(UnitTrainer, "harden", "finish")
    timed(UnitTrainer, "held_out_error", "finish")
    timed(UnitTrainer, "correct_bias", "finish")
    timed(NetworkReplay, "target_energies", "capture")
    timed(RunCheckpoint, "_save", "checkpoints")
    timed(FinalizeQuantization, "on_train_end", "writing")
    timed(ImageQuality, "on_train_end", "evaluation")
    timed(Run, "log_estimate", "estimate")
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
    command.add_argument("--rounds", type=int, default=10)
    command.set_defaults(call=blocks)
    command = commands.add_parser("profile")
    command.add_argument("--batch_size", type=int, default=32)
    command.add_argument("--block", choices=list(BLOCKS), default="ResNet 256 at 16x16")
    command.add_argument("--rows", type=int, default=15)
    command.set_defaults(call=profile)
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
