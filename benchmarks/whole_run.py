"""A whole run of ``fpq fit`` on a pipeline of the real size with random weights: seconds and memory.

    python benchmarks/whole_run.py sdxl --output sdxl.json -- --data.n_samples=512 --offload=true
    python benchmarks/whole_run.py sdxl --scale tiny  # the same on a CPU, in seconds

The pipeline is written to --work first, which is not part of the run. The run is the command line in a process of its
own, from loading to the report. Meanwhile the memory of the GPU is read from its driver and that of the process from
the kernel, twice a second. Files of units tell when units end, so that seconds and memory are given for the time before
the first has ended, for that of the others, and for that after the last. Options after ``--`` go to ``fpq fit``.
--profile writes where Python's time goes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from full_size import CASES, build
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

GIB = 2**30
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_TEXT = {  # configurations of the text encoders
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "projection_dim": 768},
    "bigG": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
             "projection_dim": 1280, "hidden_act": "gelu"},
}  # fmt: skip
_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
_VAE["down_block_types"] = ("DownEncoderBlock2D",) * 4
_VAE["up_block_types"] = ("UpDecoderBlock2D",) * 4
_T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_TINY_T5 = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
_CONFIGS = {"sdxl": "sdxl", "sd15": "stable_diffusion_1_5", "flux": "flux_dev"}

_PROFILED = """
import cProfile, sys
from fpq_lightning import cli
profile = cProfile.Profile()
try:
    profile.runcall(cli.main, sys.argv[2:])
finally:
    profile.dump_stats(sys.argv[1])
"""


def tokenizer(directory: Path) -> CLIPTokenizer:
    """One that knows letters."""
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=77)


def text_encoder(kind: type[Any], config: dict[str, Any], width: int) -> Any:
    """With random weights; small but for its width where that is small."""
    if width < 100:
        config = {**config, "hidden_size": width, "intermediate_size": width, "num_attention_heads": 2}
        config |= {"num_hidden_layers": 2}
    return kind(CLIPTextConfig(**config, bos_token_id=52, eos_token_id=53, pad_token_id=53)).to(torch.bfloat16)


def t5(width: int, tiny: bool, device: torch.device) -> T5EncoderModel:
    """With random weights that a device draws, in bfloat16 from the start."""
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(vocab_size=32128, **{**_T5, **(_TINY_T5 if tiny else {}), "d_model": width}))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for p in model.parameters():
        drawn = torch.empty(p.shape, dtype=p.dtype, device=device)
        p.data.copy_(drawn.normal_(0, 0.02) if p.ndim > 1 else drawn.fill_(1.0))
    return model


def write_pipeline(case: str, tiny: bool, directory: Path, device: torch.device) -> None:
    """Writes a pipeline with random weights in bfloat16."""
    torch.manual_seed(0)
    network = build(CASES[case], tiny, device)
    small = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1} if tiny else {}
    words = tokenizer(directory.with_name("tokenizer"))
    pipeline: DiffusionPipeline
    if case == "flux":
        config = network.config
        latents = {"latent_channels": config.in_channels // 4, "use_quant_conv": False, "use_post_quant_conv": False}
        latents |= {"shift_factor": 0.1159, "scaling_factor": 0.3611, "sample_size": 1024}
        vae = AutoencoderKL(**{**_VAE, **latents, **small})
        pipeline = FluxPipeline(
            vae=vae.to(torch.bfloat16), transformer=network, tokenizer=words, tokenizer_2=words,
            text_encoder=text_encoder(CLIPTextModel, _TEXT["clip"], config.pooled_projection_dim),
            text_encoder_2=t5(config.joint_attention_dim, tiny, device),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )  # fmt: skip
        pipeline.save_pretrained(directory)
        return
    vae = AutoencoderKL(**{**_VAE, **small}, sample_size=8 * network.config.sample_size).to(torch.bfloat16)
    width = network.config.cross_attention_dim
    if case == "sdxl":
        widths = (6, 6) if tiny else (768, 1280)
        pipeline = StableDiffusionXLPipeline(
            vae=vae, unet=network, tokenizer=words, tokenizer_2=words,
            text_encoder=text_encoder(CLIPTextModel, _TEXT["clip"], widths[0]),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, _TEXT["bigG"], widths[1]),
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        )  # fmt: skip
    else:
        pipeline = StableDiffusionPipeline(
            vae=vae, unet=network, tokenizer=words, text_encoder=text_encoder(CLIPTextModel, _TEXT["clip"], width),
            scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipeline.save_pretrained(directory)


class Memory(threading.Thread):
    """Reads the memory of a process and of the GPU until it has ended.

    Attributes:
        host: the most bytes of the process, with pages of files that are mapped to memory, and without.
        gpu: bytes of the GPU that the driver reports, by the time.
    """

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.host = {"VmRSS": 0, "RssAnon": 0}
        self.gpu: dict[float, int] = {}

    def run(self) -> None:
        while self.process.poll() is None:
            try:
                status = Path(f"/proc/{self.process.pid}/status").read_text()
                for name, most in self.host.items():
                    self.host[name] = max(most, 1024 * int(status.split(f"{name}:")[1].split()[0]))
            except (OSError, IndexError):
                pass
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                self.gpu[time.time()] = total - free
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=_CONFIGS)
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "whole_run")
    parser.add_argument("--output", type=Path, help="JSON of the figures")
    parser.add_argument("--profile", type=Path, help="what cProfile finds in the run")
    stop = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, further = parser.parse_args(sys.argv[1:stop]), sys.argv[stop + 1 :]
    tiny, device = args.scale == "tiny", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, run = args.work / args.case, args.work / f"{args.case}-run"
    if not (model / "model_index.json").is_file():
        shutil.rmtree(args.work, ignore_errors=True)
        write_pipeline(args.case, tiny, model, device)
        print(f"wrote {sum(f.stat().st_size for f in model.rglob('*') if f.is_file()) / GIB:.1f} GiB", flush=True)
    torch.cuda.empty_cache() if device.type == "cuda" else None
    shutil.rmtree(run, ignore_errors=True)
    before = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
    options = [f"--config={_CONFIGS[args.case]}", f"--model={model}", f"--run_dir={run}", "--torch_dtype=bfloat16"]
    options += ["--sampler.prompts=['a cat', 'a dog on a bicycle']", "--sampler.prompt_column=null"]
    options += ["--evaluation.n_images=0", "--trainer.enable_progress_bar=false", *further]
    command = ["-c", _PROFILED, str(args.profile)] if args.profile else ["-m", "fpq_lightning.cli"]
    start = time.time()
    process = subprocess.Popen([sys.executable, *command, "fit", *options])
    memory = Memory(process)
    memory.start()
    code = process.wait()
    end = time.time()
    memory.join()
    if code:
        sys.exit(code)
    report = json.loads((run / "report.json").read_text())
    units = [block["seconds"] for block in report["blocks"]]
    written = sorted(file.stat().st_mtime for file in (run / "checkpoints" / "units").iterdir())
    phases = {"first unit": (start, written[0]), "units": (written[0], written[-1]), "files": (written[-1], end)}
    seconds = {name: last - first for name, (first, last) in phases.items()}
    gpu = {
        name: max((used - before for at, used in memory.gpu.items() if first <= at <= last), default=0)
        for name, (first, last) in phases.items()
    }
    found = {
        "case": args.case, "options": options, "seconds": end - start, "phase_seconds": seconds, "phase_gpu_bytes": gpu,
        "unit_seconds": sum(units), "units": units, "host_bytes": memory.host,
        "device": report["device"], "versions": report["versions"],
    }  # fmt: skip
    print(
        f"{args.case}: {end - start:.0f} s in all, {sum(units):.0f} s in {len(units)} units "
        f"(first {sum(units[:5]) / 5:.2f} s, last {sum(units[-5:]) / 5:.2f} s each), "
        f"host {memory.host['RssAnon'] / GIB:.1f} GiB and with mapped files {memory.host['VmRSS'] / GIB:.1f}"
    )
    for name in phases:
        print(f"until the end of the {name}: {seconds[name]:.0f} s, peak GPU {gpu[name] / GIB:.1f} GiB")
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
