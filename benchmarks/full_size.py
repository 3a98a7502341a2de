"""What calibrating a large model takes on one GPU: seconds and memory, at its real configuration with random weights.

    python benchmarks/full_size.py sdxl --seconds 280 --output sdxl.json
    python benchmarks/full_size.py flux --profile single_transformer_blocks.0
    python benchmarks/full_size.py sd15 --scale tiny  # the same on a CPU, in seconds

Blocks lie in host memory, as with ``--offload true``. Units of one class, weights and inputs are a kind; one unit of
each kind (of FLUX the first and the last) is captured, searched, solved, learned for some steps and finished by the
library's own classes. The outputs of earlier units that it reads are drawn at random, at the scale that a forward pass
of the whole network shows; the quantized path differs from the other by a twentieth of that. Budgets of the store
shrink with the number of samples, so that activations lie where those of the whole calibration set would, and what the
store would hold beyond is taken off the memory that there is. Files of the store are read from the page cache here.

The estimate adds up, over kinds, count x (loading + search + solvers + iterations x step + (capture, moments, finish,
advance) x samples), and sampling: forward passes of a batch of trajectories, without text encoders and VAE. A kind that
was not measured is taken as the measured one closest in arithmetic, scaled by it.

Rounding is in closed form: its moments go with the samples, its solvers with the weights. ``--iterations`` adds the
steps of learned rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.calibration.calibration_set import CalibrationSet
from fpq_lightning.calibration.replay import PATHS, NetworkReplay
from fpq_lightning.calibration.shards import Samples, Shard
from fpq_lightning.calibration.store import ActivationStore
from fpq_lightning.graph.chain import parts_of
from fpq_lightning.graph.offload import Offload
from fpq_lightning.graph.trace import trace_units
from fpq_lightning.graph.tree import output_leaves
from fpq_lightning.graph.units import Unit, discover_units
from fpq_lightning.nn.calibrated import QuantizedModule
from fpq_lightning.nn.convert import make_quantized
from fpq_lightning.reconstruction import closed_form
from fpq_lightning.reconstruction.backward import Backward
from fpq_lightning.reconstruction.optimizer import GraphedAdam
from fpq_lightning.reconstruction.out_of_memory import gradients, within_memory
from fpq_lightning.reconstruction.report import UnitReport
from fpq_lightning.reconstruction.unit import UnitTrainer
from fpq_lightning.training.datamodule import STEPS_PER_BATCH, UnitBatches

GIB = 2**30
WARMUP = 5  # steps: three launched one by one, the capture of their graph, and a replay
SCALED = ("capture", "moments", "finish", "advance")  # phases that go with the number of samples


@dataclass(frozen=True)
class Case:
    """A model and how it is calibrated.

    Attributes:
        kind: class of diffusers.
        config: real configuration.
        tiny: what is other in a small one.
        samples: of the calibration set.
        measured: samples that units are measured with.
        n_search: samples that the search sees.
        steps: of the sampler.
        batch: trajectories at a time.
        passes: of the denoiser for each step of a trajectory, in one batch.
        memory: of the GPU, GiB.
        store, host_store: budgets, GiB.
        ends: measure the last unit of a kind, too.
    """

    kind: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    samples: int
    measured: int
    n_search: int
    steps: int
    batch: int
    passes: int
    memory: float
    store: float
    host_store: float = 64.0
    ends: bool = False


_SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TINY_UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
              "cross_attention_dim": 12, "attention_head_dim": (2, 2)}  # fmt: skip
CASES = {
    "sdxl": Case(
        "UNet2DConditionModel", _SDXL,
        {**_TINY_UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2)},
        samples=1024, measured=72, n_search=64, steps=50, batch=4, passes=2, memory=24, store=10.0,
    ),
    "flux": Case(
        "FluxTransformer2DModel",
        {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},
        {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 12, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)},
        samples=128, measured=32, n_search=16, steps=28, batch=2, passes=1, memory=40, store=8.0, ends=True,
    ),
    "sd15": Case(
        "UNet2DConditionModel",
        {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
         "attention_head_dim": 8},
        {**_TINY_UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        samples=1024, measured=72, n_search=64, steps=50, batch=4, passes=2, memory=24, store=12.0,
    ),
}  # fmt: skip


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:7.1f} s] {text}", flush=True)


START = time.perf_counter()


# --- the model ---------------------------------------------------------------------------------------------------


def build(case: Case, tiny: bool, device: torch.device) -> nn.Module:
    """The network in host memory in bfloat16, with the default initialisation drawn by the compute device."""
    with torch.device("meta"):
        model = getattr(diffusers, case.kind)(**{**case.config, **(case.tiny if tiny else {})})
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1:
                bound = p[0].numel() ** -0.5
                drawn = torch.empty(p.shape, dtype=p.dtype, device=device).uniform_(-bound, bound, generator=generator)
                p.data.copy_(drawn)
            else:
                p.data.fill_(1.0 if name == "weight" else 0.0)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
    return model


def calibration_set(model: Any, n: int, tiny: bool) -> CalibrationSet:
    """Random inputs of the network of the right shape."""
    config, half = model.config, torch.bfloat16

    def draw(*shape: int) -> Tensor:
        return torch.randn(n, *shape, dtype=half)

    torch.manual_seed(0)
    if "joint_attention_dim" in config:
        side, words = (2, 5) if tiny else (64, 512)
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1).reshape(-1, 2)
        inputs = {
            "hidden_states": draw(side**2, config.in_channels),
            "encoder_hidden_states": draw(words, config.joint_attention_dim),
            "pooled_projections": draw(config.pooled_projection_dim),
            "timestep": torch.linspace(0.05, 1, n).to(half),
            "guidance": torch.full((n,), 3.5),
        }
        ids = torch.cat([torch.zeros(side**2, 1), grid], dim=1)
        constants = {"img_ids": ids.to(half), "txt_ids": torch.zeros(words, 3, dtype=half), "return_dict": False}
    else:
        inputs = {
            "sample": draw(config.in_channels, config.sample_size, config.sample_size),
            "timestep": torch.linspace(1, 999, n).long(),
            "encoder_hidden_states": draw(5 if tiny else 77, config.cross_attention_dim),
        }
        if config.addition_embed_type == "text_time":
            inputs["added_cond_kwargs/text_embeds"] = draw(1280)
            inputs["added_cond_kwargs/time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * n).to(half)
        constants = {"return_dict": False}
    return CalibrationSet(inputs, torch.ones(n), constants)


# --- kinds of units ----------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """Units that cost the same.

    Attributes:
        label: for people.
        members: positions of the units.
        parameters: of one of them.
        macs: multiplications of a forward pass of one of them, for one sample.
        runs: what was measured, by the name of the unit.
    """

    label: str
    members: list[int]
    parameters: int
    macs: float
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)


@torch.no_grad()
def look(model: nn.Module, units: list[Unit], inputs: dict[str, Any]) -> tuple[list[float], list[list[float]]]:
    """Multiplications of each unit in a forward pass, and the standard deviations of what it gives."""
    macs = [0.0] * len(units)
    scales: list[list[float]] = [[] for _ in units]
    handles = []
    for i, unit in enumerate(units):
        for layer in unit.layers.values():

            def count(layer: Any, args: Any, output: Tensor, i: int = i) -> None:
                macs[i] += output.numel() * layer.weight[0].numel()

            handles.append(layer.register_forward_hook(count))
        for part in parts_of(unit.module):

            def scale(part: Any, args: Any, output: Any, i: int = i) -> None:
                scales[i] += [x.float().std().item() if x.numel() > 1 else 1.0 for x in output_leaves(output)]

            handles.append(part.register_forward_hook(scale))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return macs, scales


def kinds_of(replay: NetworkReplay, macs: list[float]) -> list[Kind]:
    """The units by class, weights and inputs, the kind with the most arithmetic first."""
    found: dict[Any, Kind] = {}
    for i, unit in enumerate(replay.units):
        (tree,) = replay._input_trees[i]
        shapes = [tuple(x.shape[1:]) for x, _ in tree._batched()]
        classes = "+".join(type(part).__name__ for part in parts_of(unit.module))
        weights = tuple(tuple(cast(Tensor, layer.weight).shape) for layer in unit.layers.values())
        largest = max(shapes, key=math.prod, default=())
        label = f"{classes} {unit.parameters / 1e6:.1f} M at {'x'.join(map(str, largest))}"
        kind = found.setdefault((classes, weights, tuple(shapes)), Kind(label, [], unit.parameters, macs[i]))
        kind.members.append(i)
    return sorted(found.values(), key=lambda kind: -kind.macs * len(kind.members))


# --- measuring ---------------------------------------------------------------------------------------------------


class Phases:
    """Seconds and memory of what is done one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.gib: dict[str, dict[str, float]] = {}

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.synchronize()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        self.synchronize()
        self.seconds[name] = time.perf_counter() - start
        if self.on_gpu:
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.gib[name] = {"allocated": allocated / GIB, "reserved": reserved / GIB}

    def peak(self, of: str) -> float:
        return max((gib[of] for gib in self.gib.values()), default=0.0)


def limit_memory(gib: float | None, device: torch.device) -> None:
    """Lets the allocator have so much of a GPU, as if that were all there is."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib * GIB / total))


@torch.no_grad()
def draw_sources(replay: NetworkReplay, scales: list[list[float]]) -> None:
    """Puts outputs of the units that the current one reads into the store, both paths."""
    for source in replay.unit.sources:
        for path in PATHS:
            replay._outputs(path, source)[0].allocate(replay.store, replay.n, replay.position)
        for chunk in replay._batches():
            (tree,) = replay._outputs(PATHS[0], source)
            value = tree.placeholder(len(chunk), in_memory=True)
            leaves = output_leaves(value)
            for leaf, scale in zip(leaves, scales[source], strict=True):
                leaf.normal_(0, scale)
            tree.write(replay.store, chunk.places.start, value)
            for leaf, scale in zip(leaves, scales[source], strict=True):
                leaf.add_(torch.randn_like(leaf), alpha=scale / 20)
            replay._outputs(PATHS[1], source)[0].write(replay.store, chunk.places.start, value)


def tiers(replay: NetworkReplay) -> str:
    """Where lies what an optimisation step reads."""
    trees = *replay._input_trees[replay.position], *replay._outputs(PATHS[0], replay.position)
    return "+".join(sorted({replay.store._entries[key].tier for tree in trees for key in tree.all_keys()}))


def profile_steps(label: str, steps: Callable[[int], None], on_gpu: bool, rows: int = 12) -> list[dict[str, Any]]:
    """Kernels of an optimisation step, with their share of the time."""
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    n = 3
    with torch.profiler.profile(activities=[activity]) as profiler:
        start = time.perf_counter()
        steps(n)
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start

    def spent(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=lambda event: -spent(event))
    busy = max(sum(spent(event) for event in events), 1e-9)
    table = [
        {"kernel": e.key[:100], "launches": e.count / n, "ms": spent(e) / n / 1e3, "share": spent(e) / busy}
        for e in events[:rows]
    ]
    print(f"{label}: {1e3 * wall / n:.2f} ms a step while profiled, kernels {busy / 1e3 / n:.2f} ms")
    print("| kernel | launches a step | ms a step | share |\n| --- | --- | --- | --- |")
    for row in table:
        print(f"| {row['kernel']} | {row['launches']:g} | {row['ms']:.3f} | {row['share']:.1%} |", flush=True)
    return table


@contextmanager
def timed_moments(phases: Phases) -> Iterator[list[float]]:
    """Seconds that the moments of each stage take."""
    seconds: list[float] = []
    original = closed_form._moments

    def timed(*args: Any) -> Any:
        phases.synchronize()
        start = time.perf_counter()
        found = original(*args)
        phases.synchronize()
        seconds.append(time.perf_counter() - start)
        return found

    closed_form._moments = timed
    try:
        yield seconds
    finally:
        closed_form._moments = original


@dataclass
class Bench:
    """What is common to all measurements."""

    replay: NetworkReplay
    offload: Offload
    recipe: fpq.Recipe
    case: Case
    scales: list[list[float]]
    n_search: int
    micro_batch: int
    step_seconds: float
    deadline: float

    def store(self, share: float) -> ActivationStore:
        """An empty store, its budgets those of a share of the samples."""
        device, host = (int(share * gib * GIB) for gib in (self.case.store, self.case.host_store))
        return ActivationStore(self.replay.store.device, torch.bfloat16, device, host)

    def run(self, index: int, profiled: bool) -> dict[str, Any]:
        """The life of one unit, with fewer samples and steps."""
        try:
            return self._run(index, profiled)
        finally:
            for module in (*self.replay.units[index].layers.values(), *self.replay.units[index].attention.values()):
                cast(QuantizedModule, module).variants.clear()
                cast(QuantizedModule, module).set_mode("full_precision")
            self.replay.store.close()

    def _run(self, index: int, profiled: bool) -> dict[str, Any]:
        replay, n = self.replay, self.replay.n
        replay.position, replay.micro_batch = index, self.micro_batch
        replay.store = self.store(min(1.0, n / self.case.samples))
        unit, device = replay.unit, replay.store.device
        phases = Phases(device)
        with phases("load"):
            self.offload.hold(parts_of(unit.module))
        draw_sources(replay, self.scales)
        held_out = max(1, round(n * 0.0625))
        every = torch.arange(n)
        train = every[:-held_out]
        batch_size = min(self.recipe.rounding.batch_size, len(train))
        samples = Samples(n, train, every[-held_out:], train[: self.n_search], Shard(batch_size))
        report = UnitReport(unit.name, unit.parameters)
        reconstruction = UnitTrainer(replay, samples, self.recipe, report)
        with phases("capture"):
            reconstruction.capture()
        with phases("search"):
            within_memory(replay, reconstruction._search)
        budgets = replay.store.budgets
        reduced, budgets["device"] = budgets["device"], int(self.case.store * GIB)  # moments do not go with samples
        with timed_moments(phases) as moments, phases("solvers"):
            within_memory(replay, reconstruction.initialise)
        budgets["device"] = reduced
        phases.seconds["moments"] = sum(moments)
        phases.seconds["solvers"] -= sum(moments)
        row: dict[str, Any] = {"step": 0.0, "steps_timed": 0, "inputs": tiers(replay)}
        if self.recipe.rounding.learned:
            with phases("learn"), torch.enable_grad():
                row |= self._learn(reconstruction, batch_size, phases, profiled)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the CUDA graph of the optimizer
        with phases("finish"):
            reconstruction.stop_learning()
            reconstruction.harden()
            error = reconstruction.held_out_error("quantized")
        with phases("advance"):
            reconstruction.end(error, row["steps_timed"])
        row |= {"samples_a_pass": replay.micro_batch, "seconds": phases.seconds, "gib": phases.gib}
        row |= {f"error_{name}": getattr(report, f"error_{name}") for name in ("nearest", "closed_form", "quantized")}
        row |= {"allocated_gib": phases.peak("allocated"), "reserved_gib": phases.peak("reserved")}
        return row

    def _learn(self, reconstruction: UnitTrainer, batch_size: int, phases: Phases, profiled: bool) -> dict[str, Any]:
        """Times steps of learned rounding."""
        on_gpu = self.replay.store.device.type == "cuda"
        within_memory(self.replay, lambda: reconstruction.start_learning(None))
        steps = self._steps(reconstruction, batch_size)
        seconds: list[float] = []
        steps(WARMUP if on_gpu else 1)
        begin = time.perf_counter()
        while len(seconds) < 3 or (len(seconds) < 20 and time.perf_counter() - begin < self.step_seconds):
            phases.synchronize()
            start = time.perf_counter()
            steps(1)
            phases.synchronize()
            seconds.append(time.perf_counter() - start)
            if time.perf_counter() > self.deadline:
                break
        return {
            "kernels": profile_steps(self.replay.unit.name, steps, on_gpu) if profiled else None,
            "step": statistics.median(seconds),
            "steps_timed": len(seconds),
            "at_a_time": cast(Backward, reconstruction.backward).chunk,
        }

    def _steps(self, reconstruction: UnitTrainer, batch_size: int) -> Callable[[int], None]:
        """What makes a number of optimisation steps of the unit."""
        replay, backward = self.replay, cast(Backward, reconstruction.backward)
        variables = [p for _, p in reconstruction.variables()]
        if replay.store.device.type == "cuda":
            optimizer: Any = GraphedAdam(variables, replay.is_on_device)
        else:
            optimizer = torch.optim.Adam(variables, fused=True)
        n_train = len(reconstruction.samples.train)
        batches = iter(UnitBatches(0, replay.position, n_train, batch_size, steps=10**6))
        schedule = torch.tensor([10.0, 1.0, 1.0, 1.0]).expand(STEPS_PER_BATCH, -1)
        planned = 0

        def steps(n: int) -> None:
            nonlocal planned
            for _ in range(n):
                if not planned:
                    batch = next(batches)
                    backward.plan(reconstruction.samples.shard.local_batch(batch), batch, schedule[: len(batch)])
                    planned = len(batch)
                optimizer.step(lambda: gradients(replay, backward))
                planned -= 1

        return steps


@torch.no_grad()
def time_forward(model: nn.Module, inputs: dict[str, Any], phases: Phases) -> None:
    """A forward pass of the whole network, blocks coming from host memory, after one to warm up."""
    model(**inputs)
    with phases("forward"):
        model(**inputs)


# --- the estimate ------------------------------------------------------------------------------------------------


def unit_seconds(run: dict[str, Any], n: int, samples: int, iterations: int) -> dict[str, float]:
    """Seconds of one unit of a whole calibration, by phase."""
    seconds = run["seconds"]
    scaled = {name: seconds[name] * samples / n for name in SCALED}
    fixed = {name: seconds[name] for name in ("load", "search", "solvers")}
    return {**fixed, "learning": iterations * run["step"], **scaled}


def estimate(kinds: list[Kind], n: int, samples: int, iterations: int) -> list[dict[str, Any]]:
    """A row for each kind, with the seconds of all its units by phase."""
    measured = [kind for kind in kinds if kind.runs]
    rows = []
    for kind in kinds:
        row: dict[str, Any] = {"kind": kind.label, "units": len(kind.members), "parameters": kind.parameters}
        basis = kind
        if not kind.runs and measured:
            basis = min(measured, key=lambda other: abs(math.log((kind.macs + 1) / (other.macs + 1))))
        if basis.runs:
            factor = 1.0 if basis is kind else kind.macs / max(basis.macs, 1.0)
            every = [unit_seconds(run, n, samples, iterations) for run in basis.runs.values()]
            parts = {name: len(kind.members) * factor * statistics.mean(e[name] for e in every) for name in every[0]}
            row |= {"taken_from": None if basis is kind else basis.label, "phases": parts}
            row["seconds"] = sum(parts.values())
        rows.append({**row, "macs": kind.macs, "measured": kind.runs})
    return rows


def summarise(result: dict[str, Any], kinds: list[Kind], iterations: int) -> dict[str, Any]:
    """Everything measured so far and what follows from it."""
    samples, n = result["samples"], result["measured_samples"]
    rows = estimate(kinds, n, samples, iterations)
    runs = [run for kind in kinds for run in kind.runs.values()]
    total = {"sampling": result["sampling_seconds"]}
    for row in rows:
        for name, seconds in row.get("phases", {}).items():
            total[name] = total.get(name, 0.0) + seconds
    absent = result["store_not_held_gib"]
    return {
        **result,
        "kinds": rows,
        "estimate_seconds": {**total, "all": sum(total.values())},
        "peak_allocated_gib": absent + max([result["forward_gib"], *(run["allocated_gib"] for run in runs)]),
        "peak_reserved_gib": absent + max([result["forward_gib"], *(run["reserved_gib"] for run in runs)]),
        "not_measured": [kind.label for kind in kinds if not kind.runs],
    }


def markdown(result: dict[str, Any]) -> str:
    """The table and the sums."""
    lines = [
        f"{result['model']}, {result['parameters'] / 1e9:.2f} B parameters, {result['units']} units of "
        f"{len(result['kinds'])} kinds, bfloat16, {result['device']}, torch {result['torch']}; "
        f"{result['iterations']} iterations x batch {result['batch_size']}, {result['samples']} samples, measured with "
        f"{result['measured_samples']}",
        "",
        "| kind | units | step ms | inputs in | search s | moments s | solvers s | capture + advance s | peak GiB | "
        "minutes, all units |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["kinds"]:
        runs, minutes = list(row["measured"].values()), f"{row.get('seconds', math.nan) / 60:.1f}"
        if not runs:
            source = f" (from {row['taken_from']})" if row.get("taken_from") else ""
            lines.append(f"| {row['kind']} | {row['units']} | not measured{source} | | | | | | | {minutes} |")
            continue
        phases = {name: value / row["units"] for name, value in row["phases"].items()}
        cells = [
            f"{1e3 * statistics.mean(run['step'] for run in runs):.2f}",
            "/".join(dict.fromkeys(run["inputs"] for run in runs)),
            *(f"{phases[name]:.2f}" for name in ("search", "moments", "solvers")),
            f"{phases['capture'] + phases['advance']:.2f}",
            f"{max(run['reserved_gib'] for run in runs) + result['store_not_held_gib']:.1f}",
        ]
        lines.append(f"| {row['kind']} | {row['units']} | {' | '.join(cells)} | {minutes} |")
    spent, stored = result["estimate_seconds"], result["store_bytes"]
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in spent.items() if name != "all")
    lines += [
        "",
        f"Whole model: {spent['all'] / 60:.1f} minutes ({parts}). Sampling: {result['forwards']} forward passes of "
        f"{result['forward_batch']} samples, {result['forward_seconds']:.2f} s each.",
        f"Peak GPU memory: {result['peak_reserved_gib']:.1f} GiB reserved, {result['peak_allocated_gib']:.1f} "
        f"allocated, of which {result['store_not_held_gib']:.1f} stand for the store at all samples; limit "
        f"{result['memory_limit_gib']} GiB.",
        "Store, both paths: "
        + "; ".join(
            f"{samples} samples {size['all'] / GIB:.1f} GiB (device {size['device'] / GIB:.1f}, host "
            f"{size['host'] / GIB:.1f}, disk {size['disk'] / GIB:.1f})"
            for samples, size in stored.items()
        ),
    ]
    if result["not_measured"]:
        lines.append(f"Not measured: {', '.join(result['not_measured'])}")
    return "\n".join(lines)


def lies(size: int, case: Case) -> dict[str, int]:
    """Where so many bytes of activations go."""
    device = min(size, int(case.store * GIB))
    host = min(size - device, int(case.host_store * GIB))
    return {"all": size, "device": device, "host": host, "disk": size - device - host}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    case, tiny = CASES[args.model], args.scale == "tiny"
    overrides = {k: getattr(args, k) for k in ("samples", "measured", "memory", "store", "host_store")}
    case = Case(**{**vars(case), **{k: v for k, v in overrides.items() if v is not None}})
    deadline = START + args.seconds
    device = torch.device("cuda", 0) if torch.cuda.is_available() and not args.cpu else torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not args.no_tf32
    rounding = fpq.RoundingRecipe(learned=args.iterations > 0, batch_size=args.batch_size)
    rounding.iterations = args.iterations or rounding.iterations
    recipe = fpq.Recipe(rounding=rounding)
    n = min(case.measured, case.samples)
    limit = case.memory if device.type == "cuda" else None

    phases = Phases(device)
    with phases("build"):
        model = build(case, tiny, device)
    say(f"{args.model} made in {phases.seconds['build']:.1f} s")
    offload = Offload(model, [unit.module for unit in discover_units(model)])
    with phases("place"):
        offload.place(device)
    calibration = calibration_set(model, n, tiny)
    units, splits = trace_units(model, discover_units(model), calibration.batch(slice(0, 1), device))
    for unit in units:
        for name, layer in unit.layers.items():
            make_quantized(layer, recipe.granularity(), splits.get(name))
    say(f"{len(units)} units; {phases.seconds['place']:.1f} s to place the rest of the network")
    limit_memory(limit, device)
    macs, scales = look(model, units, calibration.batch(slice(0, 1), device))
    forward_batch = case.batch * case.passes
    time_forward(model, calibration.batch(torch.arange(forward_batch) % n, device), phases)
    trajectories = -(-case.samples // case.steps)
    forwards = -(-trajectories // case.batch) * case.steps
    forward = phases.seconds["forward"]
    say(f"a forward pass of {forward_batch} samples takes {forward:.2f} s; {forwards} of them are needed")
    store = ActivationStore(device, torch.bfloat16)
    replay = NetworkReplay(model, units, calibration, store, args.micro_batch, keep_reference=recipe.solves)
    replay._check_stubs = lambda: None  # type: ignore[method-assign]  # outputs of earlier units are drawn at random
    kinds = kinds_of(replay, macs)
    sizes = {samples: lies(replay.rehearse(samples), case) for samples in sorted({case.samples, 512}, reverse=True)}
    absent = sizes[case.samples]["device"] * (1 - n / case.samples) / GIB if device.type == "cuda" else 0.0
    say(f"{len(kinds)} kinds; the store holds {sizes[case.samples]['all'] / GIB:.1f} GiB at most")
    if limit is not None:
        torch.cuda.empty_cache()
        limit_memory(limit - absent, device)
    result: dict[str, Any] = {
        "model": args.model,
        "scale": args.scale,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tf32": not args.no_tf32,
        "parameters": sum(p.numel() for p in model.parameters()),
        "units": len(units),
        "iterations": args.iterations,
        "batch_size": args.batch_size,
        "samples": case.samples,
        "measured_samples": n,
        "forward_seconds": forward,
        "forward_batch": forward_batch,
        "forwards": forwards,
        "sampling_seconds": forward * forwards,
        "forward_gib": phases.gib.get("forward", {}).get("reserved", 0.0),
        "build_seconds": phases.seconds["build"],
        "memory_limit_gib": limit,
        "store_bytes": sizes,
        "store_not_held_gib": absent,
    }

    bench = Bench(
        replay, offload, recipe, case, scales, min(case.n_search, n), args.micro_batch, args.step_seconds, deadline
    )

    def keep() -> dict[str, Any]:
        found = summarise(result, kinds, args.iterations)
        if args.output is not None:
            args.output.write_text(json.dumps(found, indent=1))
        return found

    def profiled(kind: Kind) -> bool:
        names = [kind.label, *(units[i].name for i in kind.members)]
        return any(wanted in name for wanted in args.profile for name in names)

    wanted = [kind for kind in kinds if profiled(kind) or not args.profile_only]
    wanted.sort(key=lambda kind: not profiled(kind))
    tasks = [(kind, kind.members[0]) for kind in wanted]
    if case.ends and not args.profile_only:
        tasks += [(kind, kind.members[-1]) for kind in wanted if len(kind.members) > 1]
    if device.type == "cuda" and tasks and not args.cold:
        bench.step_seconds = 0.0
        with suppress(torch.OutOfMemoryError):  # which is told of when it counts
            bench.run(tasks[0][1], False)
        bench.step_seconds = args.step_seconds
        torch.cuda.empty_cache()
        say("kernels compiled")
    longest = 0.0
    for kind, index in tasks:
        left = deadline - time.perf_counter()
        if left < 1.1 * longest or left < 0:
            say(f"{left:.0f} s left, a unit takes up to {longest:.0f}: no more")
            break
        start = time.perf_counter()
        name = units[index].name
        try:
            run = bench.run(index, profiled(kind) and index == kind.members[0])
        except torch.OutOfMemoryError as error:
            say(f"{name} ({kind.label}): {str(error).splitlines()[0]}")
            longest = max(longest, time.perf_counter() - start)
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        kind.runs[name] = run
        longest = max(longest, time.perf_counter() - start)
        spent = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in run["seconds"].items())
        say(
            f"{name} ({len(kind.members)} x {kind.label}): step {1e3 * run['step']:.2f} ms, inputs in "
            f"{run['inputs']}; s: {spent}; peak GiB {run['allocated_gib']:.1f} ({run['reserved_gib']:.1f})"
        )
        keep()
    result["left_behind_gib"] = torch.cuda.memory_allocated() / GIB if device.type == "cuda" else 0.0
    return keep()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    global START
    START = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(CASES))
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--seconds", type=float, default=280, help="no unit is begun that would end later")
    parser.add_argument("--output", type=Path, help="JSON, written after each unit")
    parser.add_argument("--iterations", type=int, default=0, help="of learned rounding after the closed form")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=64)
    parser.add_argument("--samples", type=int, help="of the calibration set that is estimated")
    parser.add_argument("--measured", type=int, help="samples that units are measured with")
    parser.add_argument("--memory", type=float, help="GiB that the allocator gets")
    parser.add_argument("--store", type=float, help="GiB of activations on the device")
    parser.add_argument("--host_store", type=float, help="GiB of activations in host memory")
    parser.add_argument("--step_seconds", type=float, default=3.0, help="for which steps of a unit are timed")
    parser.add_argument("--profile", nargs="+", default=[], metavar="KIND", help="part of the name of a unit or kind")
    parser.add_argument("--profile_only", action="store_true", help="measure nothing else")
    parser.add_argument("--cold", action="store_true", help="do not run the first unit twice, to compile kernels")
    parser.add_argument("--no_tf32", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    warnings.simplefilter("always")
    result = measure(parser.parse_args(arguments))
    print(markdown(result), flush=True)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
