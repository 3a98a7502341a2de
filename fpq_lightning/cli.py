"""The command line ``fpq``. Each command imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fpq_lightning import __version__
from fpq_lightning.utils.resources import find_config
from fpq_lightning.utils.tracebacks import RehearsalError, RunError, save_traceback

_HELP = """usage: fpq COMMAND [options]

Quantizes diffusion models to low-bit floating point.

commands:
  fit       quantize a model
  test      measure the image quality of a model
  predict   sample images
  study     compare recipes on one model
  export    write a quantized model in another form
  inspect   list the layers of a quantized model and how they are computed
  doctor    list versions, GPUs and weights of metrics that are found, for reports of bugs

examples:
  fpq fit --config configs/quickstart.yaml
  fpq fit --config fp4_fp8 --model PATH_OR_HUB_ID
  fpq test --model runs/quickstart/quantized
  fpq predict --model runs/quickstart/quantized --output images
  fpq study --config study/cifar10
  fpq export runs/quickstart/quantized --format dequantized --output plain
  fpq inspect runs/quickstart/quantized

fpq COMMAND --help tells more; fpq --version prints the version."""

_PACKAGES = (
    "torch", "triton", "lightning", "diffusers", "transformers", "accelerate", "safetensors", "datasets",
    "torchmetrics", "torch-fidelity", "torchvision",
)  # fmt: skip

_GPUS = {(8, 0): "A100", (8, 9): "RTX 4090, L40S", (9, 0): "H100, H200", (10, 0): "B200"}

_FOREIGN_WARNINGS = (  # that say nothing a user could act on
    ".*num_workers.*",  # batches of seeds and indices need no workers
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*in eval mode at the start of training.*",  # the denoiser is frozen
    ".*is smaller than the logging interval.*",
    ".*recommended to use `self.log.*sync_dist=True.*",  # what is logged is that of all processes already
    ".*Checkpoint directory .* exists and is not empty.*",
)

logger = logging.getLogger("fpq_lightning.cli")  # also where this module runs as a script

# --- commands --------------------------------------------------------------------------------------------------


def run_trainer(arguments: list[str]) -> None:
    """``fpq fit``, ``fpq test`` and ``fpq predict``."""
    _share_gpu_memory()
    from fpq_lightning.training.command_line import run_command

    _quiet_libraries()
    run_command(arguments)


def study(arguments: list[str]) -> None:
    """``fpq study``: a grid of recipes on one model."""
    _share_gpu_memory()
    import torch

    from fpq_lightning.study.config import StudyConfig
    from fpq_lightning.study.run import Study
    from fpq_lightning.study.table import write_table
    from fpq_lightning.utils.options import OptionParser

    _quiet_libraries()
    parser = OptionParser(prog="fpq study", description="Computes the missing rows of a study, and its table.")
    parser.add_argument("--config", action="config", help="YAML file; a shipped one by name.")
    parser.add_class_arguments(StudyConfig)
    parser.add_argument("--only", type=list[str], default=[], help="Rows to compute; all by default.")
    options = parser.instantiate(parser.parse_args(arguments[1:]))
    only = options.pop("only")
    options.pop("config", None)
    config = StudyConfig(**vars(options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Study(config, device).run(only)
    for file in write_table(Path(config.output), list(config.rows)):
        logger.info("wrote %s", file)


def export_model(arguments: list[str]) -> None:
    """``fpq export``: a quantized pipeline in another form."""
    from fpq_lightning.utils.options import OptionParser

    parser = OptionParser(prog="fpq export", description="Writes a quantized pipeline in another form.")
    parser.add_argument("model", type=str, help="Directory of a quantized pipeline, such as runs/NAME/quantized.")
    formats = ""
    if {"-h", "--help"} & {*arguments}:  # they take seconds to import, which wrong options are not to wait for
        from fpq_lightning.storage.exports.registry import export_help

        formats = export_help()
    parser.add_argument("--format", type=str, required=True, help=formats)
    parser.add_argument("--output", type=str, required=True, help="A new directory.")
    options = parser.parse_args(arguments[1:])

    from fpq_lightning.storage.export import export

    _quiet_libraries()
    export(options.model, options.output, options.format)
    logger.info("wrote %s", options.output)


def inspect_model(arguments: list[str]) -> None:
    """``fpq inspect``: layers of a packed pipeline, and the paths they run on."""
    from fpq_lightning.utils.options import OptionParser

    parser = OptionParser(prog="fpq inspect", description="Formats, bytes and execution paths of packed layers.")
    parser.add_argument("model", type=str, help="Directory of a packed pipeline, such as runs/NAME/quantized.")
    parser.add_argument(
        "--dtype", type=Literal["float32", "float16", "bfloat16"], default="bfloat16", help="Of activations."
    )
    parser.add_argument(
        "--capability", type=str, help="Plan for an NVIDIA GPU of this compute capability, such as 9.0."
    )
    options = parser.parse_args(arguments[1:])
    match = re.fullmatch(r"(\d+)\.(\d)", options.capability or "0.0")
    if match is None:
        raise ValueError(f"--capability {options.capability}: give it as 9.0")

    import torch

    from fpq_lightning.nn.backends.hardware import Hardware, hardware_of
    from fpq_lightning.storage.inspect import coverage_lines, inspect_pipeline, render

    _quiet_libraries()
    if options.capability is None:
        hardware = hardware_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        hardware = Hardware((int(match[1]), int(match[2])), kernels=True)
    table = render(inspect_pipeline(options.model, hardware, getattr(torch, options.dtype)))
    print("; ".join([table, *coverage_lines(options.model)]))


def doctor(arguments: list[str]) -> None:
    """``fpq doctor``: what a report of a bug should say of the machine."""
    from fpq_lightning.utils.options import OptionParser

    OptionParser(prog="fpq doctor", description="Lists what a report of a bug should say.").parse_args(arguments[1:])

    import torch

    from fpq_lightning.evaluation.metrics import find_weights
    from fpq_lightning.nn.backends.hardware import Hardware, hardware_of
    from fpq_lightning.nn.backends.paths import PATHS

    def show(name: str, value: object) -> None:
        print(f"  {name:<36} {value}")

    def paths(hardware: Hardware) -> str:
        """The paths that some layer takes there."""
        found = sorted(PATHS, key=lambda path: path.rank)
        return ", ".join(path.name for path in found if path.available(hardware, torch.bfloat16))

    print("versions:")
    show("fpq-lightning", __version__)
    show("Python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            show(package, version(package))
        except PackageNotFoundError:
            show(package, "not installed")
    print("arithmetic of packed layers, in bfloat16:")
    show("this CPU", paths(hardware_of(torch.device("cpu"))))
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        with torch.cuda.device(i):
            hardware = hardware_of(torch.device("cuda", i))
        without = "" if hardware.kernels else "; Triton does not run"
        show(f"{torch.cuda.get_device_name(i)} ({memory:.0f} GiB)", paths(hardware) + without)
    for capability, names in _GPUS.items():
        sm = "".join(map(str, capability))
        show(f"sm_{sm} ({names}) with Triton", paths(Hardware(capability, kernels=True)))
    compilers = [path for name in (os.environ.get("CC"), "gcc", "clang") if name and (path := shutil.which(name))]
    show("C compiler, which Triton needs", compilers[0] if compilers else "not found")
    print("weights of metrics:")
    for name, place in find_weights().items():
        show(name, place or "not found")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fit": run_trainer,
    "test": run_trainer,
    "predict": run_trainer,
    "study": study,
    "export": export_model,
    "inspect": inspect_model,
    "doctor": doctor,
}

# --- messages --------------------------------------------------------------------------------------------------


class _Lines(logging.Handler):
    """Writes messages to standard output, and warnings to standard error, beside progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        stream = sys.stderr if is_warning else sys.stdout
        tqdm.write("warning: " * is_warning + self.format(record), file=stream)
        stream.flush()


def _format_warning(message: Warning | str, *args: object, **kwargs: object) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


def _share_gpu_memory() -> None:
    """Lets what one unit has freed serve the next, whose tensors have other sizes. Read when torch is imported."""
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def _messages() -> Iterator[None]:
    """Shows the package's messages, and warnings in one line; leaves out foreign ones that help no user."""
    # Read when these libraries are imported. What they would say is of their own use here.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    package, handler, format_warning = logging.getLogger("fpq_lightning"), _Lines(), warnings.formatwarning
    level = package.level
    with warnings.catch_warnings():
        for message in _FOREIGN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        warnings.formatwarning = _format_warning
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        try:
            yield
        finally:
            package.removeHandler(handler)
            package.setLevel(level)
            warnings.formatwarning = format_warning


def _quiet_libraries() -> None:
    """Turns off what libraries say of every run, once they are imported; downloads still show bars."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    enable_progress_bars()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.formatwarning = _format_warning  # Lightning has put its own there


def _explain(error: BaseException) -> str:
    """What went wrong, in one line."""
    directory = error.directory if isinstance(error, RunError) else None
    error = error.__cause__ if isinstance(error, RunError) and error.__cause__ else error
    text = " ".join(str(error).split())
    if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
        advice = "lower data.store_budget, data.micro_batch, data.n_search or batch sizes"
        return f"out of memory ({text[:200]}): {advice}"
    if isinstance(error, RehearsalError):
        return f"{text}; the traceback is in {save_traceback(error, directory)}"
    if isinstance(error, (ValueError, FileNotFoundError)):
        return text
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        reason = " ".join(str(error.strerror or error).split())
        return f"{error.filename or 'writing'}: {reason}{'; free space or choose another place' * full}"
    file = save_traceback(error, directory)
    return (
        f"unexpected {type(error).__name__} ({text[:200]}): the traceback is in {file}; please report it with that "
        "file and what `fpq doctor` prints"
    )


@contextmanager
def _interruptible(command: str) -> Iterator[None]:
    """Within the block Ctrl-C ends the process with a line and code 130.

    It does not raise KeyboardInterrupt, which Lightning catches, to end the process with code 1.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, which all get the signal
    line = "\nfpq: interrupted" + ": go on with --ckpt_path last" * (command == "fit") + "\n"

    def interrupt(number: int, frame: object) -> None:
        if is_first:
            os.write(2, line.encode())  # print may be what was interrupted
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- the entry point -------------------------------------------------------------------------------------------


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP)
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"fpq {__version__}")
        return
    name = arguments[0]
    if name.startswith("-"):  # options of LightningCLI that come before its command
        name = next((argument for argument in arguments if argument in _COMMANDS), name)
    if name not in _COMMANDS:
        from fpq_lightning.utils.options import suggestion

        what = "option" if name.startswith("-") else "command"
        hint = suggestion(name, ["--help", "--version"] if what == "option" else _COMMANDS)
        raise ValueError(f"there is no {what} {name!r}{hint or ':'} fpq --help lists all: {', '.join(_COMMANDS)}")
    for i, argument in enumerate(arguments):
        if i and arguments[i - 1] in ("--config", "-c"):
            arguments[i] = find_config(argument)
        elif argument.startswith("--config="):
            arguments[i] = f"--config={find_config(argument.removeprefix('--config='))}"
    with _interruptible(name):
        _COMMANDS[name](arguments)


def main(arguments: Sequence[str | Path] | None = None) -> None:
    """Entry point of ``fpq``.

    Args:
        arguments: of the command line; those of the process by default.

    Raises:
        SystemExit: with a line that says what is wrong.
    """
    with _messages():
        try:
            _run([str(argument) for argument in (sys.argv[1:] if arguments is None else arguments)])
        except KeyboardInterrupt:  # before the command has begun
            print("fpq: interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            sys.exit(f"fpq: {_explain(error)}")


if __name__ == "__main__":
    main()
