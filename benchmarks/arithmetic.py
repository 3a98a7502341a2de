"""Speed and memory of packed layers on a GPU, against the same layers in bfloat16.

    python benchmarks/arithmetic.py linears
    python benchmarks/arithmetic.py convolutions
    python benchmarks/arithmetic.py tilings
    python benchmarks/arithmetic.py model --network sdxl
    python benchmarks/arithmetic.py model --network flux
    python benchmarks/arithmetic.py loading
    python benchmarks/arithmetic.py simulation

`linears`, `convolutions` and `tilings` time single products whose weights are not in the L2 cache: a CUDA graph goes
through copies of a layer that are several times as large as the cache. `model` times a step of a network at its real
configuration with random weights (hence no quality), 1024 px, in bfloat16, eager and under `torch.compile`, then with
its Linear and Conv layers packed in the hardware's E4M3 with E4M3 inputs, and with E2M1 weights; as the host launches
it, and as one CUDA graph. Medians; every table names the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import fpq_lightning as fpq
from fpq_lightning.formats.numbers import parse_format
from fpq_lightning.nn.calibrated import LayerQuantization, is_quantizable, quantized_layers, running
from fpq_lightning.nn.convert import make_packed, make_quantized
from fpq_lightning.nn.packed_layer import packed_layers
from fpq_lightning.nn.packed_weight import PackedWeight
from fpq_lightning.quantization.quantizer import Granularity, Quantizer

SHAPES = [(3072, 12288), (3072, 3072), (1280, 10240)]  # in, out
ROWS = [1, 2, 16, 64, 256, 8192]
FILTERS = [(320, 320, 128), (640, 640, 64), (1280, 1280, 32), (960, 320, 128), (1920, 640, 64), (2560, 1280, 32)]
L2_BYTES = 2**26
WARM_UP, REPEATS, LOADS = 3, 20, 5
E4M3 = parse_format("float8_e4m3fn")

SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
FLUX = {"guidance_embeds": True}  # the class's defaults are FLUX.1's


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - START:.0f} s]", *words, flush=True)


START = time.perf_counter()


# --- timing ----------------------------------------------------------------------------------------------------


def graphed(run: Callable[[], object], calls: int) -> float:
    """Median microseconds of a call, of which `run` makes `calls`, replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed(graph.replay) * 1e3 / calls


def timed(run: Callable[[], object]) -> float:
    """Median milliseconds."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


# --- single products -------------------------------------------------------------------------------------------


def packed_linear(k: int, n: int, fmt: str, inputs: bool, per_channel: bool = True) -> nn.Linear:
    layer = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    return pack(layer, fmt, torch.tensor(3.0) if inputs else None, per_channel)


def pack(layer: Any, fmt: str, largest_input: Tensor | None, per_channel: bool) -> Any:
    """Packs a layer: scales from its largest weights, one for the input from what it was."""
    form = parse_format(fmt)
    rows = layer.weight.detach().float().flatten(1)
    top = rows.abs().amax(1, keepdim=True) if per_channel else rows.abs().amax().reshape(1, 1)
    quantizer = Quantizer(form, (top / form.max).clamp(min=1e-12))
    weight = PackedWeight.of(quantizer, quantizer.encode(rows), layer.weight.shape)
    inputs = [] if largest_input is None else [Quantizer(E4M3, largest_input.float().clamp(min=1e-6) / E4M3.max)]
    return make_packed(layer, [layer.weight.shape[1]], [weight], inputs).to(layer.type_of_weight.device)


def copies(make: Callable[[], nn.Module], bytes_each: float) -> list[nn.Module]:
    return [make() for _ in range(max(2, -(-6 * L2_BYTES // int(bytes_each))))]


@torch.no_grad()
def linears() -> list[dict[str, Any]]:
    rows = []
    for k, n in SHAPES:
        plain = copies(lambda: nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16), 2 * k * n)  # noqa: B023
        kinds = {
            "FP4 weight only": copies(lambda: packed_linear(k, n, "float4_e2m1fn", False), k * n / 2),  # noqa: B023
            "FP8/FP8": copies(lambda: packed_linear(k, n, "float8_e4m3fn", True), k * n),  # noqa: B023
            "FP8 per tensor/FP8": copies(lambda: packed_linear(k, n, "float8_e4m3fn", True, False), k * n),  # noqa: B023
            "FP4/FP8": copies(lambda: packed_linear(k, n, "float4_e2m1fn", True), k * n / 2),  # noqa: B023
        }
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            base = graphed(lambda: [layer(x) for layer in plain], len(plain))  # noqa: B023
            row = {"K": k, "N": n, "M": m, "bf16 us": round(base, 2)}
            for name, layers in kinds.items():
                us = graphed(lambda: [layer(x) for layer in layers], len(layers))  # noqa: B023
                row[name] = f"{us:.2f} ({base / us:.2f}x)"
            rows.append(row)
            say(row)
    return rows


@torch.no_grad()
def convolutions() -> list[dict[str, Any]]:
    """Filters of 3 by 3, inputs and weights in the memory format of channels last, against cuDNN; the best tilings."""
    from fpq_lightning.kernels.conv import Tiling, conv, tiling_for  # needs Triton

    rows = []
    for c, n, size in FILTERS:
        make = lambda: nn.Conv2d(c, n, 3, padding=1, device="cuda", dtype=torch.bfloat16)  # noqa: B023, E731
        plain = [layer.to(memory_format=torch.channels_last) for layer in copies(make, 18 * c * n)]
        fp8, fp4 = (
            copies(lambda: pack(make(), fmt, torch.tensor(3.0), fmt == "float4_e2m1fn"), width * 9 * c * n)  # noqa: B023
            for fmt, width in (("float8_e4m3fn", 1), ("float4_e2m1fn", 0.5))
        )
        x = torch.randn(2, c, size, size, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        base = graphed(lambda: [layer(x) for layer in plain], len(plain))  # noqa: B023
        row: dict[str, Any] = {"filter": f"{c} to {n} at {size}", "bf16 us": round(base, 1)}
        for name, layers in (("FP8/FP8", fp8), ("FP4/FP8", fp4)):
            us = graphed(lambda: [layer(x) for layer in layers], len(layers))  # noqa: B023
            row[name] = f"{us:.1f} ({base / us:.2f}x)"
        codes = x.permute(0, 2, 3, 1).to(torch.float8_e4m3fn)
        weights = [torch.randn(n, 3, 3, c, device="cuda").to(torch.float8_e4m3fn) for _ in fp8]
        scale, found = torch.ones(1, 1, device="cuda"), []
        for pixels, inputs, warps, stages in (
            (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4), (256, 64, 8, 4), (256, 128, 8, 3)
        ):  # fmt: skip
            cut = Tiling(pixels // 16, 16, 128, inputs, warps, stages)
            run = lambda: [  # noqa: E731
                conv(codes, w, scale, scale, None, 1, (1, 1), torch.bfloat16, tiling=cut)  # noqa: B023
                for w in weights  # noqa: B023
            ]
            try:
                found.append((graphed(run, len(weights)), tuple(cut)))
            except Exception as error:  # what does not fit the chip
                say("left out", cut, str(error)[:80])
        ours = tuple(tiling_for(size, size, c, n))
        row["kernel us"] = next((round(us, 1) for us, cut in found if cut == ours), None)
        row["TFLOP/s"] = round(2 * 9 * c * n * 2 * size**2 / min(found)[0] / 1e6)
        row["best tilings"] = "; ".join(f"{us:.1f} {cut}" for us, cut in sorted(found)[:3])
        rows.append(row)
        say(row)
    return rows


@torch.no_grad()
def tilings() -> list[dict[str, Any]]:
    """The fastest tilings for FP4."""
    from fpq_lightning.kernels.weight_gemm import Tiling, weight_gemm  # needs Triton

    rows, form = [], parse_format("float4_e2m1fn")
    for k, n in SHAPES:
        layers = copies(lambda: packed_linear(k, n, "float4_e2m1fn", False), k * n / 2)  # noqa: B023
        for m in (1, 64):
            x, found = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), []
            for outputs, inputs, splits, warps in product((32, 64), (128, 256), (1, 2, 4), (4,)):
                cut = Tiling(outputs, inputs, splits, warps, stages=4)
                run = lambda: [  # noqa: E731
                    weight_gemm(x, w.weights[0].bytes, form, w.weights[0].scale, None, cut)  # noqa: B023
                    for w in layers  # noqa: B023
                ]
                try:
                    found.append((graphed(run, len(layers)), cut))
                except Exception as error:  # what does not fit the chip
                    say("left out", cut, str(error)[:80])
            for us, cut in sorted(found)[:4]:
                rows.append({"K": k, "N": n, "M": m, "us": round(us, 2), **cut._asdict()})
            say(rows[-4])
    return rows


# --- networks --------------------------------------------------------------------------------------------------


def network(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            if name == "sdxl":
                model: nn.Module = UNet2DConditionModel(**SDXL)
                added = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.randn(2, 6)}
                inputs: dict[str, Any] = {
                    "sample": torch.randn(2, 4, 128, 128), "timestep": torch.tensor(500),
                    "encoder_hidden_states": torch.randn(2, 77, 2048), "added_cond_kwargs": added,
                }  # fmt: skip
            else:
                model = FluxTransformer2DModel(**FLUX)
                ids = torch.stack(torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"), -1).reshape(-1, 2)
                inputs = {
                    "hidden_states": torch.randn(2, 4096, 64), "encoder_hidden_states": torch.randn(2, 512, 4096),
                    "pooled_projections": torch.randn(2, 768), "timestep": torch.full((2,), 0.5),
                    "img_ids": torch.cat([torch.zeros(4096, 1), ids.to(torch.bfloat16)], 1),
                    "txt_ids": torch.zeros(512, 3), "guidance": torch.full((2,), 3.5),
                }  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False), {**inputs, "return_dict": False}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if is_quantizable(m)}


def ranges(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Largest magnitude of each layer's input, and the floating-point operations of its product."""
    largest: dict[str, Tensor] = {}
    work: dict[str, float] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Tensor) -> None:
            largest[name] = args[0].abs().amax()
            channels = output.shape[-1] if isinstance(layer, nn.Linear) else output.shape[1]
            work[name] = 2.0 * layer.weight.numel() * output.numel() / channels

        return hook

    handles = [layer.register_forward_hook(look(name)) for name, layer in layers_of(model).items()]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return largest, work


def weight_bytes(model: nn.Module) -> int:
    return sum(map(bytes_of, (*model.parameters(), *model.buffers())))


def bytes_of(x: Tensor) -> int:
    if hasattr(x, "__tensor_flatten__"):  # of torchao: tensors in one that says it is bfloat16
        return sum(bytes_of(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


def measure(
    name: str, model: Any, inputs: dict[str, Any], compiled: str | None, share: float
) -> dict[str, Any]:  # fmt: skip
    """Time, memory of the weights and peak of a step, memory after the third.

    `compiled` is ``whole`` for `torch.compile`, ``blocks`` for diffusers' `compile_repeated_blocks`, None for eager.
    """
    torch.compiler.reset()
    step = torch.compile(model) if compiled == "whole" else model
    if compiled == "blocks":
        model.compile_repeated_blocks(fullgraph=True)
    begin = time.perf_counter()
    try:
        for _ in range(3):
            step(**inputs)
        torch.cuda.synchronize()
    except Exception as error:  # the others are still of interest
        row = {"what": name, "compiled": compiled, "failed": " ".join(str(error).split())[-300:]}
        say(row)
        return row
    ready = time.perf_counter() - begin
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    ms = timed(lambda: step(**inputs))
    row: dict[str, Any] = {
        "what": name, "compiled": compiled, "ms": round(ms, 2), "ms as CUDA graph": None,
        "weights GB": round(weight_bytes(model) / 1e9, 3), "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "low-bit FLOPs": round(share, 3), "ready after s": round(ready, 1),
    }  # fmt: skip
    say(row)
    try:
        row["ms as CUDA graph"] = round(graphed(lambda: step(**inputs), 1) / 1e3, 2)
    except Exception as error:  # what asks the device for something on the way
        say("no graph:", " ".join(str(error).split())[-200:])
        torch.cuda.synchronize()
    say(row)
    if compiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(**inputs)
            torch.cuda.synchronize()
        for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)[:8]:
            print(f"    {event.self_device_time_total / 1e3:8.2f} ms {event.count:5} {event.key[:100]}")
    return row


KINDS = {  # formats of the weights, whether they have a scale for each channel, whether convolutions stay as they are
    "fp8": ("FP8/FP8", "float8_e4m3fn", False, False),
    "fp8_linear": ("FP8/FP8, convolutions in bf16", "float8_e4m3fn", False, True),
    "fp8_channel": ("FP8 per channel/FP8", "float8_e4m3fn", True, False),
    "fp4": ("FP4 per channel/FP8", "float4_e2m1fn", True, False),
}


@torch.no_grad()
def steps(name: str, kinds: list[str], ways: list[str | None]) -> list[dict[str, Any]]:
    model, inputs = network(name)
    say("made", name, f"{sum(p.numel() for p in model.parameters()) / 1e9:.3f} B")
    largest, work = ranges(model, inputs)
    rows = [measure("bf16", model, inputs, how, 0.0) for how in ways if "bf16" in kinds]
    total = sum(work.values())
    linear = {n for n, m in layers_of(model).items() if isinstance(m, nn.Linear)}
    say(f"share of Linear layers in the products: {sum(work[n] for n in linear) / total:.3f}")
    for kind in kinds:
        model = None  # one at a time
        torch.cuda.empty_cache()
        if kind == "torchao":
            rows += [against_torchao(name, how, sum(work[n] for n in linear) / total) for how in ways if how]
        if kind not in KINDS:
            continue
        label, fmt, per_channel, linear_only = KINDS[kind]
        model, inputs = network(name)
        for n in linear if linear_only else work:
            pack(model.get_submodule(n), fmt, largest[n], per_channel)
        torch.cuda.empty_cache()
        share = sum(work[n] for n, m in packed_layers(model).items() if {*m.paths} - {"weight_only", "decode"}) / total
        rows += [measure(label, model, inputs, how, share) for how in ways]
    return rows


def against_torchao(name: str, how: str, share: float) -> dict[str, Any]:
    """Linear layers in torchao's FP8 with dynamic activations, a scale a row."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    model, inputs = network(name)
    fits = lambda m, _: isinstance(m, nn.Linear) and m.in_features % 16 == 0 and m.out_features % 16 == 0  # noqa: E731
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=fits)
    return measure("torchao FP8 dynamic", model, inputs, how, share)


@torch.no_grad()
def simulation() -> list[dict[str, Any]]:
    """A forward with fake-quantized inputs, weights on the grid already, against bfloat16, both eager."""
    model, inputs = network("sdxl")
    rows = [measure("bf16", model, inputs, None, 0.0)]
    largest, _ = ranges(model, inputs)
    for n, layer in layers_of(model).items():
        quantized = make_quantized(layer, Granularity("channel"))
        quantizers = [Quantizer(parse_format("e4m3"), largest[n].float() / 480)]
        quantized.variants["quantized"] = LayerQuantization([], quantizers).to("cuda")
    assert quantized_layers(model)
    with running(model, "quantized"):
        rows.append(measure("FP8 inputs, simulated", model, inputs, None, 0.0))
    return rows


def loading() -> list[dict[str, Any]]:
    """Seconds from files in the page cache to the GPU, until a forward can start, each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for step in (write_plain, write_packed):
            in_process(step, place)
        for kind in ("bf16", "float8_e4m3fn", "float4_e2m1fn"):
            times = sorted(round(in_process(load, f"{place}/{kind}"), 3) for _ in range(LOADS))
            size = sum(f.stat().st_size for f in Path(place, kind).iterdir())
            rows.append({"files": kind, "GB": round(size / 1e9, 3), "s": statistics.median(times), "all": times})
            say(rows[-1])
    return rows


def in_process(step: Callable[[str], Any], argument: str) -> Any:
    """What a function returns in a new process, which has imported what this one has."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(step, (argument,))


def write_plain(place: str) -> None:
    network("sdxl")[0].save_pretrained(f"{place}/bf16", max_shard_size="20GB")


def write_packed(place: str) -> None:
    for fmt in ("float8_e4m3fn", "float4_e2m1fn"):
        begin = time.perf_counter()
        packed = UNet2DConditionModel.from_pretrained(
            f"{place}/bf16", torch_dtype=torch.bfloat16, quantization_config=fpq.FPQConfig(fmt), device_map="cuda"
        )
        torch.cuda.synchronize()
        say(fmt, "quantized at load in", round(time.perf_counter() - begin, 1), "s")
        packed.save_pretrained(f"{place}/{fmt}", max_shard_size="20GB")


def load(directory: str) -> float:
    torch.ones(1, device="cuda")  # a context, which takes its time with any files
    torch.cuda.synchronize()
    begin = time.perf_counter()
    UNet2DConditionModel.from_pretrained(directory, torch_dtype=torch.bfloat16, device_map="cuda")
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def table(rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([str(row.get(key, "")) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SINGLE = {f.__name__: f for f in (linears, convolutions, tilings, simulation, loading)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SINGLE, "model"])
    parser.add_argument("--network", choices=["sdxl", "flux"], default="sdxl")
    every = ["bf16", "fp8", "torchao", "fp8_linear", "fp8_channel", "fp4"]
    parser.add_argument("--kinds", nargs="+", choices=every, default=[kind for kind in every if kind != "torchao"])
    parser.add_argument("--ways", nargs="+", choices=["eager", "blocks", "whole"], default=["eager", "whole"])
    parser.add_argument("--output", help="a JSON file")
    options = parser.parse_args()
    if options.what == "model":
        ways = [None if way == "eager" else way for way in options.ways]
        rows = steps(options.network, options.kinds, ways)
    else:
        rows = SINGLE[options.what]()
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"\n{device}\n\n{table(rows)}")
    if options.output:
        Path(options.output).write_text(json.dumps({"device": device, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
