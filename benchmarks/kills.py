"""Runs that are killed again and again, and resumed each time, against one that is not: the same bits at the end?

    python benchmarks/kills.py --kills 20            # configs/quickstart.yaml
    python benchmarks/kills.py --kills 200 --tiny    # a tiny model, seconds a run
    python benchmarks/kills.py --kills 2 -- --recipe.rounding.iterations=20    # more options of fpq fit

Every command is a fork of this process and reports what it is at through a pipe, which outlives it. SIGKILL comes at
moments drawn from --seed: somewhere after a random step of the whole run, and never before a new step was made; a
share of them inside the writing of a checkpoint, and a few inside that of ``quantized/``. If a run ends before all
kills are done, another one begins. Images are not evaluated. Needs the checkout; --out must be new.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpq_lightning import cli
from fpq_lightning.reconstruction import unit
from fpq_lightning.training.callbacks import finalize
from fpq_lightning.training.callbacks.checkpoint import RunCheckpoint
from fpq_lightning.training.datamodule import STEPS_PER_BATCH
from fpq_lightning.training.module import BlockReconstruction

CHECKOUT = Path(__file__).parents[1]
WORK = {
    "e": "entering a unit (capture, search)",
    "l": "learning",
    "f": "finishing a unit",
    "c": "writing a checkpoint",
    "q": "writing quantized/",
    "-": "anything else",
}
TRIGGER = "!"


@dataclass
class Kill:
    """When a process is killed.

    Attributes:
        work: of `WORK`, at whose beginning the clock starts: ``l``, ``c`` or ``q``.
        step: of the whole run, from which on it may.
        delay: seconds on that clock, as a share of how long such work may take.
    """

    work: str
    step: int
    delay: float


@dataclass
class Life:
    """What became of a process.

    Attributes:
        code: its exit code, negative for a signal.
        marks: what it wrote to the pipe: the letters of `WORK`, capital at the end of work.
        seconds: that it lived.
        first_step: seconds until its first step was done, None without one.
        spans: seconds that pieces of work took.
    """

    code: int
    marks: str = ""
    seconds: float = 0.0
    first_step: float | None = None
    spans: dict[str, list[float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.marks.count("L")

    @property
    def at(self) -> str:
        """The innermost work that it had not ended."""
        begun: list[str] = []
        for mark in self.marks.replace(TRIGGER, ""):
            if mark.islower():
                begun.append(mark)
            else:  # of its own kind the last: checkpoints are written beside other work
                begun.reverse()
                begun.remove(mark.lower())
                begun.reverse()
        return begun[-1] if begun else "-"


def _watch(pipe: int, kill: Kill | None) -> None:
    """Makes this process tell what it is at, and when the clock of `kill` starts."""
    steps, armed = 0, kill is not None

    def wrap(owner: Any, name: str, letter: str, module: Callable[..., BlockReconstruction | None]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps, armed
            os.write(pipe, letter.encode())
            position = float("inf")
            if (at_work := module(*args)) is not None:
                position = at_work.plan.unit * at_work.recipe.rounding.iterations + at_work.plan.step
            made = steps > 0 or letter == "q"  # nothing is left to learn when quantized/ is written
            if armed and kill is not None and letter == kill.work and position >= kill.step and made:
                armed = False
                os.write(pipe, TRIGGER.encode())
            result = original(*args, **kwargs)
            os.write(pipe, letter.upper().encode())
            steps += letter == "l"
            return result

        setattr(owner, name, wrapped)

    def remember(module: BlockReconstruction) -> BlockReconstruction:
        current[:] = [module]
        return module

    current: list[BlockReconstruction] = []
    wrap(BlockReconstruction, "on_train_start", "e", remember)
    wrap(BlockReconstruction, "on_train_epoch_start", "e", remember)
    wrap(unit, "gradients", "l", lambda *args: current[0])
    wrap(BlockReconstruction, "on_train_epoch_end", "f", lambda module: module)
    wrap(RunCheckpoint, "_save", "c", lambda *args: current[0])
    wrap(RunCheckpoint, "_publish", "c", lambda *args: current[0])
    wrap(finalize, "save_quantized", "q", lambda *args: None)


def live(arguments: list[str], log: Path, kill: Kill | None = None, longest: dict[str, float] | None = None) -> Life:
    """Runs ``fpq`` in a process of its own and kills it at its moment, if it comes to that."""
    reading, writing = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        os.close(reading)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        _watch(writing, kill)
        code: Any = 1
        try:
            cli.main(arguments)
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    life, began = Life(0), {}
    while chunk := os.read(reading, 1):
        mark, now = chunk.decode(), time.perf_counter()
        life.marks += mark
        if mark == TRIGGER:
            assert kill is not None
            assert longest is not None
            time.sleep(kill.delay * longest[kill.work])
            os.kill(child, signal.SIGKILL)
        elif mark.islower():
            began[mark] = now
        else:
            life.spans.setdefault(mark.lower(), []).append(now - began[mark.lower()])
        if mark == "L" and life.first_step is None:
            life.first_step = now - start
    os.close(reading)
    life.code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    life.seconds = time.perf_counter() - start
    return life


def results(run: Path) -> dict[str, bytes]:
    """Weights and quantization of a finished run."""
    files = [*run.rglob("quantized/*/*.safetensors"), *run.rglob("quantized/*/config.json")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def left_behind(run: Path, reference: Path) -> list[str]:
    """What a run holds that an uninterrupted one does not, besides its log files."""
    found, expected = ({str(f.relative_to(r)) for f in r.rglob("*")} for r in (run, reference))
    extra = sorted(name for name in found - expected if not name.startswith("logs/"))
    return [name for name in extra if str(Path(name).parent) not in extra]


def plan(kills: int, steps: int, share: float, generator: random.Random) -> list[Kill]:
    """Kills in the order of the steps after which they come; one in twenty comes at the end."""
    drawn = []
    for i in range(kills):
        work = "q" if i % 20 == 19 else "c" if generator.random() < share else "l"
        drawn.append(Kill(work, generator.randint(1, steps), generator.random()))
    return sorted(drawn, key=lambda kill: (kill.work == "q", kill.step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--saving", type=float, default=0.3, help="share of kills while a checkpoint is written")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("options", nargs="*", help="of fpq fit, after --")
    args = parser.parse_args()
    out: Path = args.out.resolve()
    (out / "tmp").mkdir(parents=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(out / "tmp"), None
    os.chdir(CHECKOUT)
    common = ["--config", "configs/quickstart.yaml", "--evaluation.n_images=0"]
    if args.tiny:
        sys.path.insert(0, str(CHECKOUT / "tests"))
        from models import fit_arguments, save_tiny

        model = save_tiny(out / "model")
        common = [*fit_arguments(model, "", iterations=100)[1:], "--checkpoint_steps=10"]

    def command(name: str) -> list[str]:
        return ["fit", *common, *args.options, f"--run_dir={out / name}", "--ckpt_path=last"]

    def check(life: Life, name: str) -> None:
        if life.code not in (0, -signal.SIGKILL):
            sys.exit(f"{name} ended with code {life.code}:\n{(out / f'{name}.log').read_text()[-2000:]}")

    reference = live(command("reference"), out / "reference.log")
    check(reference, "reference")
    spans = {work: sum(times) / len(times) for work, times in reference.spans.items()}
    longest = {"l": 20 * reference.seconds / reference.steps, "c": 1.5 * spans["c"], "q": 1.2 * spans["q"]}
    print(
        f"uninterrupted: {reference.steps} steps in {reference.seconds:.1f} s, "
        f"{len(reference.spans['c']) // 2} checkpoints"
    )
    print("images are not evaluated", flush=True)

    pending = plan(args.kills, reference.steps - 2 * STEPS_PER_BATCH, args.saving, random.Random(args.seed))
    killed: Counter[str] = Counter()
    steps, restarts, finished, differing, extra = 0, [], 0, [], []
    start = time.perf_counter()
    while pending:
        name = f"killed-{finished}"
        while True:
            life = live(command(name), out / f"{name}.log", pending[0] if pending else None, longest)
            check(life, name)
            steps += life.steps
            restarts += [life.first_step] if life.first_step is not None else []
            if life.code == 0:
                if TRIGGER in life.marks:  # too late
                    pending[0].delay /= 2
                break
            killed[life.at] += 1
            pending.pop(0)
            if sum(killed.values()) % 20 == 0:
                print(f"{sum(killed.values())} kills, {time.perf_counter() - start:.0f} s", flush=True)
        finished += 1
        found, expected = results(out / name), results(out / "reference")
        differing += [f"{name}/{file}" for file in {**expected, **found} if found.get(file) != expected.get(file)]
        extra += [f"{name}/{file}" for file in left_behind(out / name, out / "reference")]

    print("\n| killed while | kills |\n| --- | --- |")
    for letter, work in WORK.items():
        if killed[letter]:
            print(f"| {work} | {killed[letter]} |")
    print(f"| **all** | **{sum(killed.values())}** |\n")
    temporary = len(list((out / "tmp").iterdir()))
    print(
        f"{finished} runs, {steps} steps instead of {finished * reference.steps}, {time.perf_counter() - start:.0f} s;"
    )
    mean = sum(restarts) / len(restarts)
    print(f"{mean:.1f} s from a start to its first step on average, {max(restarts):.1f} s at most")
    print(f"left behind: {', '.join(extra) or 'nothing'}; files in the temporary directory: {temporary}")
    compared = ", ".join(results(out / "reference"))
    print(f"result: {'DIFFERENT: ' + ', '.join(differing) if differing else 'bit-equal'} ({compared})")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
