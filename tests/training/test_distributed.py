"""Runs on several processes: what they share out adds up to a run on one, and none outlives the others."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from models import Outcome, checkpoint_layers, fit_arguments, run_fpq, save_tiny
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fpq_lightning.calibration.disk import load_calibration_set
from fpq_lightning.cli import main
from fpq_lightning.nn.calibrated import QuantizedLayer
from fpq_lightning.reconstruction import backward, unit
from fpq_lightning.reconstruction.optimizer import GraphedAdam
from fpq_lightning.training import run as training_run
from fpq_lightning.training.strategy import CalibrationStrategy, calibration_trainer
from fpq_lightning.training.watchdog import Watchdog
from fpq_lightning.utils import distributed

ITERATIONS = 20
UNITS = 12  # of the tiny network
TIMEOUT = 300.0  # s; generous, since the machine may be shared
END_TOGETHER = 60.0  # s between the death of a process and the end of the others
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")

_CLUSTER = ("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# --- what happens inside a process -----------------------------------------------------------------------------


def halt_at(step: int, directory: Path) -> None:
    """Every process stops at a step for good, as in a collective whose other end is silent, and says so in a file."""
    original, steps = unit.gradients, iter(range(1, 10**9))

    def halting(*args: Any) -> Tensor:
        if next(steps) == step:
            directory.joinpath(f"halted-{distributed.rank()}").touch()
            time.sleep(10 * TIMEOUT)
        return original(*args)

    unit.gradients = halting  # type: ignore[attr-defined]


def signal_at(step: int, rank: int, number: int, file: Path | None = None) -> None:
    """One process sends itself a signal at a step, and says so in a file before."""
    original, steps = unit.gradients, iter(range(1, 10**9))

    def signalled(*args: Any) -> Tensor:
        if next(steps) == step and distributed.rank() == rank:
            if file is not None:
                file.touch()
            os.kill(os.getpid(), number)
        return original(*args)

    unit.gradients = signalled  # type: ignore[attr-defined]


def lose_patience(seconds: float) -> None:
    """Shortens how long processes wait for a sign of life of the others."""
    Watchdog.__init__.__defaults__ = (seconds,)  # type: ignore[misc]


def both(*changes: Callable[[], None]) -> None:
    for change in changes:
        change()


def digest(network: nn.Module) -> str:
    """Of all that is known about the quantized network: codes, scales, biases."""
    found = hashlib.blake2b(digest_size=16)
    for name, layer in network.named_modules():
        if isinstance(layer, QuantizedLayer) and "quantized" in layer.variants:
            found.update(name.encode())
            for leaf in tree_leaves(layer.variants["quantized"].to_state()):  # type: ignore[operator]
                found.update(leaf.numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
    return found.hexdigest()


def record_digests(directory: Path) -> None:
    """Every process keeps a digest of the network after every unit."""
    original = unit.UnitTrainer.end
    digests: list[str] = []

    def recording(self: unit.UnitTrainer, *args: Any) -> None:
        original(self, *args)
        digests.append(digest(self.replay.model))
        directory.joinpath(f"digests-{distributed.rank()}.json").write_text(json.dumps(digests))

    unit.UnitTrainer.end = recording  # type: ignore[assignment,method-assign]


def leave_gradients_unsummed() -> None:
    backward.sum_over_ranks = lambda tensor: tensor  # type: ignore[attr-defined]


def fpq(change: Callable[[], None] | None, arguments: Sequence[str]) -> None:
    if change is not None:
        training_run.rehearse = lambda *args: None  # changes count what the run itself does
        change()
    main(list(arguments))


def _enter(work: Callable[[], None], log: Path, environment: dict[str, str]) -> None:
    """What a forked process does; `log` takes its output."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    code = 0
    try:
        work()
    except SystemExit as exit_:
        code = 1 if isinstance(exit_.code, str) else exit_.code or 0
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- processes -------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Processes that run together, started one by one as torchrun or SLURM does."""

    processes: list[Any]
    logs: list[Path]

    def wait(self, timeout: float = TIMEOUT) -> list[Outcome]:
        """How each ended; those that do not are killed and have the code of SIGKILL."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        return self.kill()

    def wait_for(self, files: Sequence[Path]) -> None:
        """Waits until the processes have written files.

        Raises:
            AssertionError: if they end without.
        """
        deadline = time.monotonic() + TIMEOUT
        while not all(file.exists() for file in files):
            alive = all(process.is_alive() for process in self.processes)
            assert alive, [outcome.err for outcome in self.kill()]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> list[Outcome]:
        for process in self.processes:
            process.kill()
            process.join()
        texts = [[Path(f"{log}.{kind}").read_text() for kind in ("out", "err")] for log in self.logs]
        return [Outcome(p.exitcode, out, err) for p, (out, err) in zip(self.processes, texts, strict=True)]


@dataclass
class Lab:
    """Starts processes by fork from one that has imported everything; `root` takes what they write."""

    root: Path
    model: str

    def arguments(self, name: str, *more: str, n_images: int = 0) -> list[str]:
        """Of ``fpq fit`` with 32 samples and a checkpoint after every ten steps."""
        common = fit_arguments(self.model, self.root / name, ITERATIONS, n_images)
        return [*common, "--data.n_samples=32", "--trainer.enable_progress_bar=false", "--checkpoint_steps=10", *more]

    def start(self, log: str, works: Sequence[Callable[[], None]]) -> Group:
        """Starts a process for each callable."""
        context = multiprocessing.get_context("forkserver")
        port, group = free_port(), Group([], [])
        for rank, work in enumerate(works):
            environment = {"OMP_NUM_THREADS": "1"}
            if len(works) > 1:
                environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(len(works))}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            group.logs.append(self.root / f"{log}-{rank}")
            process = context.Process(target=_enter, args=(work, group.logs[-1], environment), daemon=True)
            process.start()
            group.processes.append(process)
        return group

    def start_fpq(
        self, log: str, arguments: Sequence[str], world_size: int, change: Callable[[], None] | None = None
    ) -> Group:
        """Starts ``fpq`` on some processes, each with a change made to it first."""
        devices = [f"--trainer.devices={world_size}", "--trainer.strategy=ddp"] if world_size > 1 else []
        return self.start(log, [partial(fpq, change, [*arguments, *devices])] * world_size)

    def run_fpq(
        self, log: str, arguments: Sequence[str], world_size: int, change: Callable[[], None] | None = None
    ) -> list[Outcome]:
        """Runs ``fpq`` on some processes."""
        return self.start_fpq(log, arguments, world_size, change).wait()

    def fit(self, name: str, world_size: int, *more: str, n_images: int = 0) -> Path:
        """The directory of a run that has to finish."""
        return finished(
            self.run_fpq(f"log-{name}", self.arguments(name, *more, n_images=n_images), world_size), self.root / name
        )

    def resume(self, name: str, world_size: int) -> Path:
        """Ends an interrupted run on some processes."""
        arguments = self.arguments(name, "--ckpt_path=last")
        return finished(self.run_fpq(f"log-{name}-resumed", arguments, world_size), self.root / name)

    def kill_at(self, name: str, world_size: int, step: int) -> None:
        """Starts a run and kills all its processes at a step."""
        directory = self.root / f"halts-{name}"
        directory.mkdir()
        group = self.start_fpq(f"log-{name}", self.arguments(name), world_size, partial(halt_at, step, directory))
        group.wait_for([directory / f"halted-{rank}" for rank in range(world_size)])
        assert [outcome.code for outcome in group.kill()] == [-signal.SIGKILL] * world_size


def finished(outcomes: Sequence[Outcome], run: Path) -> Path:
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), "\n".join(o.err for o in outcomes)
    return run


class Command:
    """A command line with a session of its own, that other commands may run beside.

    Args:
        log: its output goes to ``log.out`` and ``log.err``.
        command: the arguments.
    """

    def __init__(self, log: Path, command: Sequence[str]) -> None:
        self.log = log
        environment = {k: v for k, v in os.environ.items() if k not in _CLUSTER} | {"OMP_NUM_THREADS": "1"}
        with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
            self.process = subprocess.Popen(
                list(command), stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )

    def alive(self) -> list[int]:
        """Processes of the session that have not ended."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (directory / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # gone since
                continue
            if int(session) == self.process.pid and state not in "ZX":
                found.append(int(directory.name))
        return found

    def wait(self, death: Path | None = None) -> Outcome:
        """How it ended, all its processes included; they have a minute once the file `death` is there.

        Raises:
            AssertionError: if some do not end; they are killed.
        """
        timeout, begin = TIMEOUT, time.monotonic()
        while self.alive() and time.monotonic() < begin + timeout:
            self.process.poll()
            if death is not None and death.exists():
                timeout, begin, death = END_TOGETHER, time.monotonic(), None
            time.sleep(0.1)
        late = len(self.alive())
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        out, err = (Path(f"{self.log}.{kind}").read_text() for kind in ("out", "err"))
        assert not late, f"{late} processes have not ended within {timeout:.0f} s:\n{err}"
        return Outcome(self.process.wait(), out, err)


def script(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).with_name(name))


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "fpq_lightning.cli"]


# --- results ---------------------------------------------------------------------------------------------------


def blocks(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "report.json").read_text())["blocks"]


def codes(run: Path) -> dict[str, list[Tensor] | None]:
    """Learned codes by layer, None where nearest rounding stayed."""
    return {name: modes["quantized"]["codes"] for name, modes in checkpoint_layers(run).items()}


def bits(run: Path) -> dict[str, Any]:
    """All that a quantized network is."""
    weights = (run / "quantized" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "layers": json.loads((run / "quantized" / "unet" / "config.json").read_text())["quantization_config"]["layers"],
        "codes": {name: None if c is None else [part.tolist() for part in c] for name, c in codes(run).items()},
    }


def differing(found: list[Tensor] | None, expected: list[Tensor] | None) -> int:
    if found is None or expected is None:
        return sum(part.numel() for part in (found or expected or []))
    return sum(int((f != e).sum()) for f, e in zip(found, expected, strict=True))


def assert_same_result(found: Path, expected: Path) -> None:
    """Formats and the first three units are the same to the bit.

    Later ones may differ by ties that the order of float32 sums decides: in 2 % of all codes, in 5 % of the errors, and
    in the choice between learned and nearest rounding where their errors are within 2 % of each other.
    """
    for key in ("name", "weight_formats", "activation_formats"):
        assert [block[key] for block in blocks(found)] == [block[key] for block in blocks(expected)]
    found_codes, expected_codes = codes(found), codes(expected)
    assert found_codes.keys() == expected_codes.keys()
    differences = {name: differing(found_codes[name], expected_codes[name]) for name in expected_codes}
    first = [name for block in blocks(expected)[:3] for name in block["weight_formats"]]
    assert len(first) >= 3
    assert {name: differences[name] for name in first} == dict.fromkeys(first, 0)
    assert any(expected_codes[name] is not None for name in first), "nothing was learned"
    for pair in zip(blocks(found), blocks(expected), strict=True):
        if pair[0]["kept"] != pair[1]["kept"]:
            for block in pair:
                assert block["error_quantized"] == pytest.approx(block["error_nearest"], rel=0.02)
            for name in pair[0]["weight_formats"]:
                del differences[name]
    total = sum(part.numel() for name in differences for part in expected_codes[name] or [])
    assert total > 7_000
    assert sum(differences.values()) <= 0.02 * total
    for key in ("error_nearest", "error_quantized"):
        assert [b[key] for b in blocks(found)] == pytest.approx([b[key] for b in blocks(expected)], rel=0.05)


# --- fixtures --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in _CLUSTER:
            patch.delenv(name, raising=False)
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["fpq_lightning.training.command_line", "pytest", "torch.utils.tensorboard"]
        )
        yield Lab(root, save_tiny(root / "model"))


_DYING = """
import os, sys
sys.path[:0] = [{tests!r}, os.path.dirname({tests!r})]
from pathlib import Path
import test_distributed as shared

shared.training_run.rehearse = lambda *args: None  # steps of the run itself are counted
if os.environ.get("LOCAL_RANK") == "1":
    shared.signal_at({step}, 1, shared.signal.SIGKILL, Path({file!r}))
elif {silent}:
    shared.halt_at({step}, Path({file!r}).parent)
shared.main()
"""


SILENT = {"second died": False, "second died unnoticed": True}
MID_UNIT = 3 * ITERATIONS + 16  # a checkpoint of the unit is there
UNIT_BOUNDARY = 4 * ITERATIONS + 1

Commands = dict[str, "Future[list[Outcome]]"]


def run_launched(lab: Lab, name: str, *more: str) -> list[Outcome]:
    """``fpq fit`` on two processes that Lightning starts."""
    return [Command(lab.root / f"log-{name}", [script("fpq"), *lab.arguments(name, *TWO, *more)]).wait()]


def run_torchrun(lab: Lab) -> list[Outcome]:
    command = [*torchrun("--standalone", "--nproc_per_node=2"), *lab.arguments("torchrun", *TWO)]
    return [Command(lab.root / "log-torchrun", command).wait()]


def run_nodes(lab: Lab) -> list[Outcome]:
    """Two nodes of one device each, here both on this machine."""
    address = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    options = lab.arguments("nodes", "--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=ddp")
    commands = [[*torchrun(*address, f"--node_rank={node}"), *options] for node in (0, 1)]
    running = [Command(lab.root / f"log-node-{node}", command) for node, command in enumerate(commands)]
    return [command.wait() for command in running]


def run_dying(lab: Lab, name: str) -> list[Outcome]:
    """Two processes that Lightning starts, the second of which kills itself.

    In some the first one is left waiting for it, as by NCCL, whose collectives do not end when a process dies.
    """
    death, file = lab.root / f"death-{name}", lab.root / f"{name}.py"
    tests = str(Path(__file__).parent)
    file.write_text(_DYING.format(tests=tests, silent=SILENT[name], step=MID_UNIT, file=str(death)))
    command = [sys.executable, str(file), *lab.arguments(name, *TWO)]
    outcome = Command(lab.root / f"log-{name}", command).wait(death)
    assert death.exists(), outcome.err
    return [outcome]


@pytest.fixture(scope="module")
def commands(lab: Lab) -> Iterator[Commands]:
    """All that takes interpreters of its own; runs beside the tests, two at a time."""
    jobs: dict[str, Callable[[], list[Outcome]]] = {
        "launched": partial(run_launched, lab, "launched"),
        "refused": partial(run_launched, lab, "refused", "--recipe.rounding.batch_size=1"),
        "torchrun": partial(run_torchrun, lab),
        "nodes": partial(run_nodes, lab),
    }
    jobs |= {name: partial(run_dying, lab, name) for name in SILENT}
    with ThreadPoolExecutor(2) as executor:
        yield {name: executor.submit(job) for name, job in jobs.items()}
        executor.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="module")
def one(lab: Lab) -> Path:
    """A run on one process."""
    return lab.fit("one", 1)


@pytest.fixture(scope="module")
def two(lab: Lab) -> Path:
    """The same on two, which keep digests."""
    arguments = lab.arguments("two")
    return finished(lab.run_fpq("log-two", arguments, 2, partial(record_digests, lab.root)), lab.root / "two")


# --- the result ------------------------------------------------------------------------------------------------


def test_fpq_fit_on_two_devices_finishes_as_on_one(commands: Commands, lab: Lab, one: Path) -> None:
    launched = finished(commands["launched"].result(), lab.root / "launched")
    assert (launched / "report.json").is_file()
    assert (launched / "quantized" / "model_index.json").is_file()
    assert len(blocks(one)) == UNITS
    assert_same_result(launched, one)
    # Nothing that a user could not act on, and no process repeats what the first one says.
    (outcome,) = commands["launched"].result()
    warned = [line for line in outcome.err.splitlines() if "warning" in line.lower()]
    assert all("images are too few" in line for line in warned), warned
    assert len(warned) == len(set(warned))


def test_processes_hold_equal_weights_after_every_unit(two: Path, lab: Lab) -> None:
    digests = [json.loads((lab.root / f"digests-{rank}.json").read_text()) for rank in (0, 1)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == len(set(digests[0])) == UNITS


def test_processes_that_learn_different_weights_end_the_run(lab: Lab) -> None:
    outcomes = lab.run_fpq("log-unsummed", lab.arguments("unsummed"), 2, leave_gradients_unsummed)
    assert all(outcome.code for outcome in outcomes)
    assert all("processes learned different weights" in outcome.err for outcome in outcomes)
    assert not (lab.root / "unsummed" / "quantized").exists()


@pytest.fixture(scope="module")
def uneven(lab: Lab) -> list[Path]:
    """Runs on one and on two processes whose shares differ.

    Batches of three samples; 31 samples, the two held out on different processes; three batches of trajectories.
    """
    options = ("--recipe.rounding.batch_size=3", "--data.n_samples=31", "--sampler.batch_size=3")
    return [lab.fit(f"uneven-{n}", n, *options) for n in (1, 2)]


def test_shares_of_different_size_add_up_as_well(uneven: list[Path]) -> None:
    assert_same_result(uneven[1], uneven[0])


def test_the_closed_form_is_the_same_on_two_processes_until_a_rounding_error_tips_a_weight(lab: Lab) -> None:
    options = ("--recipe.rounding.start=closed_form", "--recipe.rounding.learned=false")
    one, two = (json.loads((lab.fit(f"solved-{n}", n, *options) / "report.json").read_text()) for n in (1, 2))
    errors = [[block["error_closed_form"] for block in report["blocks"]] for report in (one, two)]
    assert errors[1][:2] == pytest.approx(errors[0][:2], rel=1e-3)  # sums in another order tip a weight or two
    assert errors[1] == pytest.approx(errors[0], rel=0.25)
    assert "closed_form" in {block["kept"] for block in two["blocks"]}


def assert_same_sets(runs: Sequence[Path], n: int) -> None:
    found, expected = (load_calibration_set(run / "calibration") for run in runs)
    assert len(expected) == n
    assert found.inputs.keys() == expected.inputs.keys() >= {"sample", "timestep"}
    for name, values in expected.inputs.items():
        assert torch.equal(found.inputs[name], values), name
    assert torch.equal(found.weights, expected.weights)
    assert found.constants == expected.constants


def test_calibration_sets_are_the_same_to_the_bit_whatever_made_them(one: Path, two: Path) -> None:
    assert_same_sets([two, one], 32)


def test_calibration_sets_of_unevenly_shared_trajectories_are_the_same_to_the_bit(uneven: list[Path]) -> None:
    assert_same_sets(uneven, 31)


def test_gathered_rows_lie_where_they_belong_though_some_processes_have_none(lab: Lab) -> None:
    group = lab.start("log-gather", [_gather] * 3)
    assert [outcome.code for outcome in group.wait()] == [0, 0, 0], [outcome.err for outcome in group.kill()]


def _join() -> None:
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), timeout=timedelta(seconds=TIMEOUT))


def _gather() -> None:
    _join()
    expected = torch.arange(12.0).reshape(6, 2)
    owned = [torch.tensor([4, 0, 5]), torch.tensor([], dtype=torch.long), torch.tensor([1, 3, 2])]
    found = distributed.gather_rows(expected[owned[distributed.rank()]], owned)
    assert torch.equal(found, expected)
    assert distributed.all_gather_objects(distributed.rank()) == [0, 1, 2]
    assert distributed.broadcast_from_rank0(f"of {distributed.rank()}") == "of 0"
    assert distributed.sum_over_ranks(torch.ones(3)).tolist() == [3, 3, 3]


# --- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_killed_after_a_unit_goes_on_with_another_number_of_processes(
    before: int, after: int, lab: Lab, one: Path
) -> None:
    name = f"{before}-then-{after}"
    lab.kill_at(name, before, UNIT_BOUNDARY)
    assert_same_result(lab.resume(name, after), one)


def test_a_run_killed_in_the_middle_of_a_unit_resumes_to_the_same_bits(lab: Lab, two: Path) -> None:
    lab.kill_at("2-then-2", 2, MID_UNIT)
    state = torch.load(lab.root / "2-then-2" / "checkpoints" / "last.ckpt", weights_only=True)["fpq"]
    assert (state["unit"], state["step"]) == (3, 10)
    assert bits(lab.resume("2-then-2", 2)) == bits(two)


def test_a_signal_to_any_process_stops_all_after_a_checkpoint(lab: Lab, two: Path) -> None:
    change = partial(signal_at, 3 * ITERATIONS + 6, 1, signal.SIGTERM)
    outcomes = lab.run_fpq("log-signal", lab.arguments("signal", "--checkpoint_steps=1000"), 2, change)
    assert [outcome.code for outcome in outcomes] == [128 + signal.SIGTERM] * 2, outcomes[0].err + outcomes[1].err
    assert "--ckpt_path last" in outcomes[0].out
    state = torch.load(lab.root / "signal" / "checkpoints" / "last.ckpt", weights_only=True)["fpq"]
    assert (state["unit"], state["step"]) == (3, 10)
    assert bits(lab.resume("signal", 2)) == bits(two)


# --- deaths ----------------------------------------------------------------------------------------------------


def says_how_to_go_on(outcome: Outcome) -> bool:
    return any("--ckpt_path last" in line for line in outcome.errors)


@pytest.fixture(scope="module", params=[1, 0], ids=["second", "first"])
def widowed(request: pytest.FixtureRequest, lab: Lab) -> tuple[str, Outcome]:
    """The name of a run of which one process has been killed, and how the other one ended."""
    victim = request.param
    name = f"{victim}-died"
    group = lab.start_fpq(f"log-{name}", lab.arguments(name), 2, partial(signal_at, MID_UNIT, victim, signal.SIGKILL))
    group.processes[victim].join(TIMEOUT)
    outcomes = group.wait(END_TOGETHER)
    assert outcomes[victim].code == -signal.SIGKILL, outcomes[victim].err
    return name, outcomes[1 - victim]


def test_a_process_whose_partner_died_ends(widowed: tuple[str, Outcome]) -> None:
    assert widowed[1].code not in (0, -signal.SIGKILL)


def test_a_process_whose_partner_died_says_how_to_go_on(widowed: tuple[str, Outcome]) -> None:
    assert says_how_to_go_on(widowed[1]), widowed[1].err


def test_a_run_of_which_a_process_died_resumes_to_the_same_bits(
    widowed: tuple[str, Outcome], lab: Lab, two: Path
) -> None:
    assert bits(lab.resume(widowed[0], 2)) == bits(two)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_whose_collective_hangs_is_ended_by_the_watchdog(victim: int, lab: Lab) -> None:
    # As NCCL does, whose collectives wait for a dead process.
    name = f"{victim}-silent"
    directory = lab.root / f"halts-{name}"
    directory.mkdir()
    change = partial(both, partial(lose_patience, 3.0), partial(halt_at, MID_UNIT, directory))
    group = lab.start_fpq(f"log-{name}", lab.arguments(name), 2, change)
    group.wait_for([directory / f"halted-{rank}" for rank in (0, 1)])
    group.processes[victim].kill()
    outcomes = group.wait(END_TOGETHER)
    assert [outcomes[victim].code, outcomes[1 - victim].code] == [-signal.SIGKILL, 1]
    assert len(outcomes[1 - victim].errors) == 1
    assert says_how_to_go_on(outcomes[1 - victim])


def _watch(patience: float, work: Callable[[], None]) -> None:
    _join()
    watchdog = Watchdog("127.0.0.1", patience)
    work()
    watchdog.close()
    print("closed")


def _wait_forever(file: Path) -> None:
    file.touch()
    time.sleep(10 * TIMEOUT)


def test_a_process_that_answers_no_more_ends_the_others(lab: Lab) -> None:
    watching = [lab.root / f"watching-{rank}" for rank in range(3)]
    group = lab.start("log-frozen", [partial(_watch, 2.0, partial(_wait_forever, file)) for file in watching])
    group.wait_for(watching)
    os.kill(group.processes[2].pid, signal.SIGSTOP)
    for process in group.processes[:2]:
        process.join(END_TOGETHER)
    outcomes = group.kill()
    assert [outcome.code for outcome in outcomes] == [1, 1, -signal.SIGKILL]
    assert all(says_how_to_go_on(outcome) for outcome in outcomes[:2])
    # Of those left one sees it first, and perhaps ends before the other has seen it too.
    assert any("process 2 has not answered for 2 s" in outcome.err for outcome in outcomes[:2])


def test_processes_may_be_done_one_long_after_the_other(lab: Lab) -> None:
    # The second one's last sign of life is older than the patience when the first one ends.
    waits = [partial(time.sleep, seconds) for seconds in (3.0, 0.0, 3.5)]
    outcomes = lab.start("log-done", [partial(_watch, 2.0, wait) for wait in waits]).wait()
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], [outcome.err for outcome in outcomes]
    assert [outcome.out.strip() for outcome in outcomes] == ["closed"] * 3


# --- images ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(lab: Lab) -> list[dict[str, Any]]:
    """Reports of runs on one and on two processes that round to nearest and compare images."""
    runs = [lab.fit(f"images-{n}", n, "--recipe.rounding.learned=false", n_images=6) for n in (1, 2)]
    return [json.loads((run / "report.json").read_text()) for run in runs]


def test_images_are_shared_out_and_judged_together(evaluated: list[dict[str, Any]]) -> None:
    one, two = evaluated
    for key in ("weight_formats", "activation_formats"):
        assert [block[key] for block in two["blocks"]] == [block[key] for block in one["blocks"]]
    assert list(two["variants"]) == list(one["variants"]) == ["full_precision", "nearest", "quantized"]
    for variant, expected in one["variants"].items():
        found = two["variants"][variant]
        assert found["n_images"] == expected["n_images"] == 6
        for metric in ("psnr", "ssim"):
            if variant == "full_precision":  # compared with those of other seeds
                assert found[metric] is expected[metric] is None
            else:
                assert found[metric] == pytest.approx(expected[metric], rel=1e-3)


def test_predict_writes_the_same_images_on_two_processes_as_on_one(lab: Lab, two: Path) -> None:
    images = []
    for n in (1, 2):
        output = lab.root / f"predicted-{n}"
        options = [f"--model={two / 'quantized'}", f"--output={output}", "--n_images=5", "--trainer.accelerator=cpu"]
        sampler = ["--sampler.steps=4", "--sampler.batch_size=4", "--trainer.enable_progress_bar=false"]
        finished(lab.run_fpq(f"log-predict-{n}", ["predict", *options, *sampler], n), output)
        files = sorted(output.iterdir())
        assert [file.name for file in files] == [f"{seed:06d}.png" for seed in range(5)]
        images.append(np.stack([np.asarray(Image.open(file)) for file in files]).astype(int))
    assert np.abs(images[1] - images[0]).max() <= 1
    assert len(np.unique(images[0])) > 10


def test_fewer_images_than_processes_are_written_or_refused_in_one_line(lab: Lab, two: Path) -> None:
    output = lab.root / "predicted-one-image"
    options = [f"--model={two / 'quantized'}", f"--output={output}", "--n_images=1", "--trainer.accelerator=cpu"]
    outcomes = lab.run_fpq("log-predict-one-image", ["predict", *options, "--sampler.steps=4"], 2)
    for outcome in outcomes:
        assert "Traceback" not in outcome.err
        assert len(outcome.errors) == (1 if outcome.code else 0)


def test_test_gives_the_same_metrics_on_two_processes_as_on_one(lab: Lab, two: Path) -> None:
    metrics = []
    for n in (1, 2):
        options = [f"--model={two / 'quantized'}", "--evaluation.n_images=8", "--trainer.accelerator=cpu"]
        options.append(f"--output={lab.root / f'tested-{n}'}")
        sampler = ["--sampler.steps=4", "--sampler.batch_size=4", "--trainer.enable_progress_bar=false"]
        outcomes = lab.run_fpq(f"log-test-{n}", ["test", *options, *sampler], n)
        finished(outcomes, lab.root)
        found = {name: float(v) for name, v in re.findall(r"(psnr|ssim|fd|kid|is)\W+(-?[\d.]+)", outcomes[0].out)}
        assert found.keys() == {"psnr", "ssim", "fd", "kid", "is"}, outcomes[0].out
        metrics.append(found)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3)


# --- what is refused -------------------------------------------------------------------------------------------


def test_a_strategy_that_lightning_refuses_ends_in_one_line(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = lab.arguments("fsdp", "--trainer.devices=2", "--trainer.strategy=fsdp")
    outcome = run_fpq(capsys, arguments)
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert "fsdp" in outcome.errors[0].lower()
    assert "Traceback" not in outcome.err


def trainer(strategy: Strategy | str, devices: int = 2) -> pl.Trainer:
    return calibration_trainer(pl.Trainer, accelerator="cpu", devices=devices, strategy=strategy, logger=False)


class OtherStrategy(DDPStrategy):
    """One that does something else than DDP, as those of FSDP and DeepSpeed do."""


@pytest.mark.parametrize("strategy", [OtherStrategy(), "ddp_spawn", "ddp_fork"], ids=["other", "spawn", "fork"])
def test_other_strategies_are_refused_for_several_devices_with_the_one_to_use(strategy: Strategy | str) -> None:
    with pytest.raises(ValueError, match=r"trainer\.strategy .* is not supported: use ddp"):
        trainer(strategy)


def test_ddp_becomes_the_strategy_of_a_calibration_and_one_device_keeps_its_own() -> None:
    assert type(trainer("ddp").strategy) is CalibrationStrategy
    assert type(trainer("auto").strategy) is CalibrationStrategy
    assert type(trainer(CalibrationStrategy()).strategy) is CalibrationStrategy
    assert isinstance(trainer("auto", 1).strategy, SingleDeviceStrategy)


# --- command lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["launched", "torchrun", "nodes"])
def test_a_run_is_the_same_to_the_bit_however_its_processes_were_started(
    name: str, commands: Commands, lab: Lab, two: Path
) -> None:
    assert bits(finished(commands[name].result(), lab.root / name)) == bits(two)


@pytest.mark.parametrize("name", SILENT)
def test_when_a_process_that_lightning_launched_dies_the_run_ends_and_says_how_to_go_on(
    name: str, commands: Commands
) -> None:
    [outcome] = commands[name].result()  # which there is only if all processes ended
    assert outcome.code != 0
    assert says_how_to_go_on(outcome), outcome.err


def test_a_launched_run_of_which_a_process_died_resumes_to_the_same_bits(
    commands: Commands, lab: Lab, two: Path
) -> None:
    assert commands["second died"].result()
    assert bits(lab.resume("second died", 2)) == bits(two)


def test_more_processes_than_samples_of_a_batch_end_in_one_line(commands: Commands) -> None:
    [outcome] = commands["refused"].result()
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert len(outcome.errors) == 1, outcome.errors
    assert "recipe.rounding.batch_size" in outcome.errors[0]


# --- the rehearsal ---------------------------------------------------------------------------------------------


def test_one_process_rehearses_and_the_others_wait(lab: Lab) -> None:
    arguments = lab.arguments("rehearsed", "--recipe.include=['conv_in']")
    outcomes = lab.run_fpq("log-rehearsed", arguments, 2)
    finished(outcomes, lab.root / "rehearsed")
    assert ["rehearsed in" in outcome.out for outcome in outcomes] == [True, False]
    assert not list((lab.root / "rehearsed").glob(".*"))


def test_a_rehearsal_that_fails_ends_all_processes_in_one_line(lab: Lab) -> None:
    options = lab.arguments("failing", *TWO, "--sampler.arguments={eta: none}")
    for name, command in {"own": [script("fpq")], "torchrun": torchrun("--standalone", "--nproc_per_node=2")}.items():
        outcome = Command(lab.root / f"log-failing-{name}", [*command, *options]).wait()
        assert outcome.code
        (line,) = outcome.errors
        assert line.startswith("fpq: rehearsal: sampling two short trajectories failed: ")
        assert not (lab.root / "failing").exists()


def test_captured_steps_go_before_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = GraphedAdam.__new__(GraphedAdam)  # making one needs a GPU
    captured._graph = cast(Any, object())
    held: list[Any] = []
    monkeypatch.setattr(DDPStrategy, "teardown", lambda self: held.append(captured._graph))
    strategy = CalibrationStrategy()
    strategy._optimizers = [captured]
    strategy.teardown()
    assert held == [None]
