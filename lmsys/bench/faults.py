"""What a run survives: real training processes that are killed, stopped, or made to fail, and what the run that goes on computes.

Each fault is tried several times. A trial counts where nothing was lost: the process ended as it should, the newest checkpoint
is whole, and the run, started again, gives the losses and the last weights of an undisturbed run: the same bits on a CPU; on a
GPU, whose sums may differ from run to run, and in another number of processes, to TOLERANCE. Moments are random, of the seed.

Trainers on a CPU are forks of a server that has imported torch once, so that a start takes a fraction of a second. What has to
happen within a trainer (a kill at an operation of a save, a disk that is full from then on, a batch whose loss is not a number)
is put there by an Injection. A full disk is an error of the system call (ENOSPC), and once the kernel's own: a limit of the size
of files (EFBIG), which needs no privileges.

measure_saving() is the price: the time of a step without checkpoints, with synchronous and with asynchronous ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from lmsys import cost, records
from lmsys import train as training
from lmsys.bench.measure import one_thread, quantiles
from lmsys.config import PipelineConfig, TrainConfig, build, model_size, require, resolve_scale, to_dict, unknown_name
from lmsys.device import device_name, resolve_device
from lmsys.parallel import group
from lmsys.records import significant
from lmsys.train import checkpoint, engine

NAME, SAVING_NAME = "faults_results", "saving_results"
COMPUTED = ("train_loss", "valid_loss", "learning_rate", "grad_norm")
TOLERANCE = 1e-5  # relative, where the same bits cannot be had
ENDS_WITHIN_S = 10.0  # a run that is told to end
_LIMIT_S = 120.0  # of a process that should end by itself
_SEQUENCES, _INTERVAL = 8, 5  # of a step; steps between checkpoints


@dataclass(frozen=True)
class Saving:
    """The run in which saving is timed. batch: sequences. interval: steps between checkpoints."""

    size: str
    batch: int
    steps: int
    interval: int


_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "steps": 20,
        "kills": 1,
        "trials": 1,
        "rounds": 1,
        "saving": Saving("tiny", batch=2, steps=18, interval=6),
    },
    "cpu": {"steps": 30, "kills": 2, "trials": 1, "rounds": 1, "saving": Saving("tiny", batch=2, steps=34, interval=8)},
    "full": {
        "steps": 60,
        "kills": 20,
        "trials": 5,
        "rounds": 2,
        "saving": Saving("gpt2", batch=32, steps=242, interval=60),  # longer than a checkpoint takes to be written
    },
}
_SAVING_SHAPE = {"gpt2": {"context_length": 1024}}  # else 64 tokens and a vocabulary of 4096
SAVING_MODES = ("none", "synchronous", "asynchronous")


@dataclass(frozen=True)
class FaultSettings:
    """What is tried; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    kinds: tuple[str, ...]  # names of FAULTS
    steps: int  # of a run
    kills: int  # times that each kind of SIGKILL is tried
    trials: int  # times that every other fault is tried
    rounds: int  # of runs in each mode of saving
    saving: Saving
    trainers: str  # the device of the runs that are disturbed
    device: str  # on which saving is timed
    seed: int


def settings(
    scale: str = "auto",
    kinds: Sequence[str] | None = None,
    kills: int | None = None,
    trials: int | None = None,
    rounds: int | None = None,
    trainers: str = "cpu",
    device: str = "auto",
    seed: int = 0,
) -> FaultSettings:
    """The scale's settings, with what is given in their place.

    Args:
        kinds: names of FAULTS; None: those of the scale; full has all.
        kills: times that each kind of SIGKILL is tried. trials: times for each other fault. rounds: of runs in which saving is timed.
        trainers: the device of the runs that are disturbed; on a GPU each takes seconds more to start.
        device: on which saving is timed.
    Raises:
        ValueError: an unknown name, a number out of range, a device that is not here.
    """
    scale = resolve_scale(scale)
    values = dict(_PRESETS[scale])
    given = {"kills": kills, "trials": trials, "rounds": rounds}
    values |= {name: value for name, value in given.items() if value is not None}
    for name in given:
        require(values[name] >= 1, f"{name} is {values[name]}; it must be at least 1")
    if kinds is None:
        order = ("smoke", "cpu", "full")
        kinds = [name for name, fault in FAULTS.items() if order.index(fault.scale) <= order.index(scale)]
    for name in kinds:
        if name not in FAULTS:
            raise unknown_name("fault", name, FAULTS)
    require(len(kinds) > 0, "kinds must not be empty")
    return FaultSettings(
        scale,
        tuple(kinds),
        trainers=str(resolve_device(trainers)),
        device=str(resolve_device(device)),
        seed=seed,
        **values,
    )


# --- A trainer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Injection:
    """What goes wrong within a trainer.

    Attributes:
        operation: the number, from 0, of the operation of saving (writing half of a part of a file, flushing, renaming)
            before which `action` happens. action: kill, full (ENOSPC from then on) or limit (files end at limit_bytes).
        draw: the batch whose loss is multiplied by `factor`.
        rank: the only process of several in which it happens; None: in all.
    """

    operation: int | None = None
    action: str = "kill"
    limit_bytes: int = 0
    draw: int | None = None
    factor: float = math.nan
    rank: int | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.operation is not None:
                stack.enter_context(operations(self._strike))
            if self.draw is not None:
                accumulate = engine.Engine.accumulate

                def spoiled(replica: Any, sampler: Any) -> torch.Tensor:
                    if sampler.draws != self.draw:
                        return accumulate(replica, sampler)
                    true = replica.loss_function
                    with mock.patch.object(replica, "loss_function", lambda *args: true(*args) * self.factor):
                        return accumulate(replica, sampler)

                stack.enter_context(mock.patch.object(engine.Engine, "accumulate", spoiled))
            yield

    def _strike(self, number: int, name: str) -> None:
        if number < self.operation:
            return
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def operations(before: Callable[[int, str], None]) -> Iterator[None]:
    """Within the block, call before(number, name) ahead of each operation of saving a checkpoint, counted from 0."""
    count = 0

    def operation(name: str) -> None:
        nonlocal count
        number, count = count, count + 1
        before(number, name)

    def ahead(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            operation(name)
            return function(*args, **options)

        return wrapped

    write = checkpoint._write

    def in_halves(path: Path, parts: Iterable[bytes | memoryview]) -> str:
        def halves() -> Iterator[memoryview]:
            for part in parts:
                view = memoryview(part)
                for half in (view[: len(view) // 2], view[len(view) // 2 :]):
                    operation("write")
                    yield half

        return write(path, halves())

    with (
        mock.patch.object(checkpoint, "_write", in_halves),
        mock.patch.object(checkpoint, "flush", ahead("flush", checkpoint.flush)),
        mock.patch.object(checkpoint.os, "rename", ahead("rename", os.rename)),
    ):
        yield


def run_config(chosen: FaultSettings, processes: int = 1, **train: Any) -> PipelineConfig:
    """The run that is disturbed: a small model, a checkpoint every few steps."""
    base = {
        "steps": chosen.steps,
        "batch_size": _SEQUENCES // processes,
        "eval_interval": 2 * _INTERVAL,
        "eval_batches": 2,
        "log_interval": 1,
        "checkpointing_interval": _INTERVAL,
        "device": chosen.trainers,
        "seed": chosen.seed,
    }
    shape = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "context_length": 32, "vocab_size": 64}
    return build(PipelineConfig, {"model": shape, "optim": {"warmup_steps": 5}, "train": base | train})


def _tokens() -> np.ndarray:
    """Tokens that can be learned: each is mostly the one before it plus one."""
    generator = np.random.default_rng(0)
    steps = np.where(generator.random(20_000) < 0.9, 1, generator.integers(64, size=20_000))
    return (np.cumsum(steps) % 64).astype(np.uint16)


def _train_here(
    folder: Path, config: PipelineConfig, injection: Injection | None, rank: int, processes: int, port: int
) -> None:
    """A trainer's process. Its output goes to log.txt."""
    from tqdm import tqdm

    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore of the system, which a process that is killed leaves behind
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    tokens = _tokens()
    with injection.installed() if injection and injection.rank in (None, rank) else contextlib.nullcontext():
        try:
            with (
                group.process_group(torch.device(config.train.device).type)
                if processes > 1
                else contextlib.nullcontext()
            ):
                training.train(config, train_tokens=tokens, valid_tokens=tokens[:2000], run_dir=folder, progress=False)
        except (ValueError, OSError, FloatingPointError) as error:  # as the command line does
            print(error, flush=True)
            raise SystemExit(2) from None


class Run:
    """A started run: its processes and its folder."""

    def __init__(self, folder: Path, config: PipelineConfig, injection: Injection | None = None, processes: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.steps = folder, config.train.steps
        self.log_start = (folder / "log.txt").stat().st_size if (folder / "log.txt").exists() else 0
        self.rows_before = len(self.rows())
        context = _context(torch.device(config.train.device))
        port = _free_port() if processes > 1 else 0
        self.processes = [
            context.Process(target=_train_here, args=(folder, config, injection, rank, processes, port), daemon=True)
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return not any(process.is_alive() for process in self.processes)

    def codes(self) -> list[int]:
        """The exit codes, once all have ended; those that do not are killed, which shows in their code."""
        self.ends_within(_LIMIT_S)
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def reaches(self, step: int) -> bool:
        """Wait until a step after the start is logged; False if the run ended before."""
        end = time.monotonic() + _LIMIT_S
        while time.monotonic() < end:
            rows = self.rows()
            if rows and rows[-1]["step"] >= step:
                return any(process.is_alive() for process in self.processes)
            if self.ends_within(0.005):
                return False
        return False

    def rows(self) -> list[dict[str, Any]]:
        return training.logged(self.folder)[0]

    def log(self) -> str:
        """What this start has printed."""
        return (self.folder / "log.txt").read_text(errors="replace")[self.log_start :]

    def saved(self) -> checkpoint.Checkpoint | None:
        """The newest good checkpoint."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = checkpoint.latest(self.folder / training.CHECKPOINTS)
        return None if path is None else checkpoint.load(path)


def _context(device: torch.device) -> BaseContext:
    """What starts processes that train there."""
    return group.context(device, __name__, "tqdm")  # a run imports the latter when it starts


def _nothing() -> None:
    """What a process does that is started for the fork server's sake."""


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


# --- The faults -----------------------------------------------------------------------------------


@dataclass
class Tally:
    """The trials of one fault."""

    tried: int = 0
    kept: int = 0
    longest_s: float | None = None  # until the processes had ended
    notes: list[str] = field(default_factory=list)

    def add(self, kept: bool, seconds: float | None = None, problem: str = "") -> None:
        self.tried += 1
        self.kept += kept
        if seconds is not None:
            self.longest_s = max(seconds, self.longest_s or 0.0)
        if not kept:
            self.notes.append(problem or "the run that went on is another one")


class Lab:
    """Where the trials run: a folder for the runs, and the undisturbed run that they are compared with."""

    def __init__(self, chosen: FaultSettings, root: Path):
        self.chosen, self.root = chosen, root
        self.random = random.Random(chosen.seed)
        self.exact = torch.device(chosen.trainers).type == "cpu"
        self._count = 0
        first = _context(torch.device(chosen.trainers)).Process(
            target=_nothing
        )  # with the first process, the fork server starts and imports torch
        first.start()
        first.join()
        started = time.monotonic()
        run = self.start()
        codes = run.codes()
        self.wall_s = time.monotonic() - started
        if codes != [0]:
            raise RuntimeError(f"the undisturbed run failed: {run.log()}")
        self.reference, self.weights = {row["step"]: row for row in run.rows()}, run.saved().weights
        counted: list[str] = []
        with operations(lambda _number, name: counted.append(name)):
            saved = run.saved()
            checkpoint.save(
                self.new_folder(),
                saved.step,
                weights=saved.weights,
                optimizer=saved.optimizer,
                sampler_state=saved.sampler,
                rng=saved.rng,
                config=run_config(chosen),
            )
        self.operations = counted  # of one save

    def new_folder(self) -> Path:
        self._count += 1
        return self.root / f"run-{self._count}"

    def start(
        self, folder: Path | None = None, injection: Injection | None = None, processes: int = 1, **train: Any
    ) -> Run:
        return Run(folder or self.new_folder(), run_config(self.chosen, processes, **train), injection, processes)

    def same(self, run: Run, exact: bool | None = None) -> str:
        """What of a run's rows, and of its weights if it ended well, is not the undisturbed run's; empty if nothing."""
        exact = self.exact if exact is None else exact
        rows = run.rows()
        if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
            return "steps are missing from metrics.csv"
        for row in rows:
            for name in COMPUTED:
                ours, theirs = row[name], self.reference[row["step"]][name]
                if ours != theirs and (
                    exact or None in (ours, theirs) or not math.isclose(ours, theirs, rel_tol=TOLERANCE)
                ):
                    return f"{name} of step {row['step']} is {ours} and was {theirs}"
        if all(process.exitcode == 0 for process in run.processes):
            saved = run.saved()
            if saved is None or saved.step != run.steps:
                return "the last checkpoint is missing"
            for name, tensor in self.weights.items():
                if not (
                    torch.equal(saved.weights[name], tensor)
                    if exact
                    else torch.allclose(saved.weights[name], tensor, rtol=1e-3, atol=1e-4)
                ):
                    return f"{name} is another one at the end"
        return ""

    def goes_on(self, folder: Path, exact: bool | None = None, processes: int = 1, **train: Any) -> str:
        """Run to the end from what a folder holds; what is wrong with it, or nothing."""
        run = self.start(folder, processes=processes, **train)
        codes = run.codes()
        return self.same(run, exact) if codes == [0] * processes else f"it cannot go on: {run.log().strip()[-300:]}"

    def whole(self, run: Run, least: int) -> str:
        """What is wrong with the newest checkpoint of a run that ended: empty where it is good and not older than `least`."""
        saved = run.saved()
        if (0 if saved is None else saved.step) < least:
            return f"the newest good checkpoint is of step {saved and saved.step}, not {least}"
        return ""


def _sigkill(lab: Lab, tally: Tally) -> None:
    """Kills one after another: each goes on from what the one before left."""
    _killed_again_and_again(lab, tally, lambda folder: _at_a_random_moment(lab, folder))


def _at_a_random_moment(lab: Lab, folder: Path) -> tuple[Run, bool]:
    run = lab.start(folder)
    if run.ends_within(lab.random.uniform(0.1, 1.0) * lab.wall_s):
        return run, False
    run.signal(signal.SIGKILL)
    run.codes()
    return run, True


def _sigkill_in_a_save(lab: Lab, tally: Tally) -> None:
    def kill(folder: Path) -> tuple[Run, bool]:
        most = 3 * len(lab.operations)  # within the first three saves after a start
        run = lab.start(folder, Injection(operation=lab.random.randrange(most)))
        return run, run.codes() == [-signal.SIGKILL]

    _killed_again_and_again(lab, tally, kill)


def _killed_again_and_again(lab: Lab, tally: Tally, kill: Callable[[Path], tuple[Run, bool]]) -> None:
    folder, pending = lab.new_folder(), False
    while tally.tried + pending < lab.chosen.kills or pending:
        if tally.tried + pending < lab.chosen.kills:
            run, killed = kill(folder)
        else:  # the last one goes to its end
            run, killed = lab.start(folder), False
        codes = run.codes()
        # A kill loses at most the checkpoint that was on its way, which is whole before the next one's step is followed by another.
        rows = run.rows()
        least = (((rows[-1]["step"] if rows else 0) - 1) // _INTERVAL - 1) * _INTERVAL
        problem = lab.same(run) or lab.whole(run, least)
        if not killed and codes != [0]:
            problem = f"it cannot go on: {run.log().strip()[-300:]}"
        if pending:
            tally.add(not problem, problem=problem)
        pending = killed
        if not killed:
            folder = lab.new_folder()


def _ended_by(number: int, processes: int = 1) -> Callable[[Lab, Tally], None]:
    """A signal to one process ends all, with a checkpoint of the step at hand."""

    def fault(lab: Lab, tally: Tally) -> None:
        for _ in range(lab.chosen.trials):
            folder = lab.new_folder()
            wrapper = {"ddp_wrapper": "flashddp"} if processes > 1 else {}
            # Checkpoints at the end only: what is saved is saved because of the signal.
            run = lab.start(folder, processes=processes, checkpointing_interval=0, **wrapper)
            run.reaches(lab.random.randrange(1, lab.chosen.steps // 2))
            started = time.monotonic()
            run.signal(number, rank=processes - 1)
            in_time = run.ends_within(ENDS_WITHIN_S)
            seconds = time.monotonic() - started
            codes = run.codes()
            told = re.search(
                rf"stopped by SIG\w+ after step (\d+) of {lab.chosen.steps}; the last checkpoint is", run.log()
            )
            if not in_time or codes != [128 + number] * processes or told is None:
                problem = f"exit codes {codes} after {seconds:.1f} s; it said: {run.log().strip()[-300:]}"
            else:
                problem = lab.whole(run, int(told[1])) or lab.goes_on(folder, exact=lab.exact and processes == 1)
            tally.add(not problem, seconds, problem)

    return fault


def _one_of_two_killed(lab: Lab, tally: Tally) -> None:
    """The other one ends too, and the run goes on in one process."""
    for _ in range(lab.chosen.trials):
        folder = lab.new_folder()
        run = lab.start(folder, processes=2, ddp_wrapper="flashddp")
        run.reaches(lab.random.randrange(2 * _INTERVAL, lab.chosen.steps - _INTERVAL))
        started = time.monotonic()
        run.signal(signal.SIGKILL, rank=1)
        codes = run.codes()
        seconds = time.monotonic() - started
        problem = "" if codes[0] > 0 else f"exit codes {codes}"
        problem = problem or lab.whole(run, _INTERVAL) or lab.goes_on(folder, exact=False)
        tally.add(not problem, seconds, problem)


def _disk(action: str) -> Callable[[Lab, Tally], None]:
    """The disk is full from some operation of the second save on, until the run is started again."""

    def fault(lab: Lab, tally: Tally) -> None:
        kinds = sorted(set(lab.operations))
        count = len(lab.operations)
        limit = checkpoint_bytes(lab.weights) // 2
        for trial in range(lab.chosen.trials * len(kinds) if action == "full" else lab.chosen.trials):
            kind = kinds[trial % len(kinds)] if action == "full" else "write"
            places = [at for at, name in enumerate(lab.operations) if name == kind]
            at = count + (lab.random.choice(places) if action == "full" else 0)
            run = lab.start(injection=Injection(operation=at, action=action, limit_bytes=limit))
            codes = run.codes()
            said = run.log()
            if codes != [2] or not re.search("No space left on device|File too large", said) or "Traceback" in said:
                problem = f"exit codes {codes}; it said: {said.strip()[-300:]}"
            else:
                problem = lab.whole(run, _INTERVAL) or lab.same(run) or lab.goes_on(run.folder)
            tally.add(not problem, problem=problem and f"at {kind}: {problem}")

    return fault


def checkpoint_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    """The bytes of a checkpoint's weights."""
    return sum(tensor.nbytes for tensor in weights.values())


def _bad_loss(factor: float, **train: Any) -> Callable[[Lab, Tally], None]:
    """A batch whose loss is bad stops the run, which names the step and the batch; without it, it goes on as it was."""

    def fault(lab: Lab, tally: Tally) -> None:
        for _ in range(lab.chosen.trials):
            draw = lab.random.randrange(2 * _INTERVAL, lab.chosen.steps - _INTERVAL)
            run = lab.start(injection=Injection(draw=draw, factor=factor), **train)
            codes, said = run.codes(), run.log()
            if codes != [2] or f"at step {draw + 1};" not in said or f"draw {draw} of the sampler" not in said:
                problem = f"exit codes {codes}; it said: {said.strip()[-300:]}"
            else:
                problem = lab.whole(run, draw // _INTERVAL * _INTERVAL) or lab.same(run) or lab.goes_on(run.folder)
            tally.add(not problem, problem=problem)

    return fault


def _bad_loss_skipped(lab: Lab, tally: Tally) -> None:
    """A batch whose loss is not a number changes nothing; the run is the same where it is interrupted as well."""
    for _ in range(lab.chosen.trials):
        draw = lab.random.randrange(2 * _INTERVAL, lab.chosen.steps // 2)
        options = {"on_bad_step": "skip", "loss_spike": 5.0}
        injection = Injection(draw=draw)
        whole = lab.start(injection=injection, **options)
        parts = lab.start(injection=injection, **options)
        codes = whole.codes()
        if parts.reaches(draw + 2):
            parts.signal(signal.SIGTERM)
        parts.codes()
        parts = lab.start(parts.folder, injection=injection, **options)
        codes += parts.codes()
        ours, theirs = ([[row[name] for name in COMPUTED] for row in run.rows()] for run in (parts, whole))
        before = [[lab.reference[step][name] for name in COMPUTED] for step in range(1, draw + 1)]
        if codes != [0, 0] or f"step {draw + 1} is skipped: the loss is nan" not in whole.log():
            problem = f"exit codes {codes}; it said: {whole.log().strip()[-300:]}"
        elif theirs[draw][0] is not None or not all(row[0] is not None for row in theirs[draw + 1 :]):
            problem = "other steps were skipped"
        elif lab.exact and (ours != theirs or theirs[:draw] != before):
            problem = "the interrupted run is another one"
        else:
            problem = ""
        tally.add(not problem, problem=problem)


def _damaged(lab: Lab, tally: Tally) -> None:
    """A bit of the newest checkpoint flips while nobody looks: the run goes on from the one before."""
    for _ in range(lab.chosen.trials):
        run = lab.start()
        run.reaches(lab.random.randrange(2 * _INTERVAL + 1, lab.chosen.steps - 2))
        run.signal(signal.SIGTERM)
        run.codes()
        newest = checkpoint.steps(run.folder / training.CHECKPOINTS)[-1]
        file = lab.random.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        content[lab.random.randrange(len(content))] ^= 1 << lab.random.randrange(8)
        file.write_bytes(content)
        problem = lab.goes_on(run.folder)
        tally.add(not problem, problem=f"{file.name}: {problem}" if problem else "")


def _elsewhere(lab: Lab, tally: Tally) -> None:
    """A run of one process goes on in two, under each kind of wrapper."""
    wrappers = (
        {"ddp_wrapper": "flashddp"},
        {"ddp_wrapper": "fsdp"},
        {"ddp_wrapper": "flat", "sharded_optimizer": True},
    )
    for trial in range(max(lab.chosen.trials, len(wrappers))):
        run = lab.start()
        run.reaches(lab.random.randrange(1, lab.chosen.steps // 2))
        run.signal(signal.SIGTERM)
        run.codes()
        options = wrappers[trial % len(wrappers)]
        problem = lab.goes_on(run.folder, exact=False, processes=2, **options)
        tally.add(not problem, problem=problem and f"{options}: {problem}")


@dataclass(frozen=True)
class Fault:
    """try_it makes the trials. processes: of its runs, at most. scale: the smallest at which it is tried unasked."""

    what: str
    try_it: Callable[[Lab, Tally], None]
    processes: int = 1
    scale: str = "cpu"


FAULTS: dict[str, Fault] = {
    "sigkill": Fault("SIGKILL at a random moment", _sigkill),
    "sigkill_in_save": Fault("SIGKILL at a random operation of saving", _sigkill_in_a_save, scale="smoke"),
    "sigterm": Fault("SIGTERM", _ended_by(signal.SIGTERM), scale="smoke"),
    "sigint": Fault("SIGINT", _ended_by(signal.SIGINT), scale="full"),
    "sigterm_one_of_two": Fault("SIGTERM to one of two processes", _ended_by(signal.SIGTERM, 2), 2),
    "sigkill_one_of_two": Fault("SIGKILL of one of two processes", _one_of_two_killed, 2, scale="full"),
    "disk_full": Fault("Disk full (ENOSPC) at a write, a flush, a rename", _disk("full")),
    "file_limit": Fault("File-size limit (EFBIG) during a save", _disk("limit"), scale="full"),
    "nan": Fault("A loss that is not a number: stop", _bad_loss(math.nan), scale="smoke"),
    "spike": Fault("A loss 50 times the median: stop", _bad_loss(50.0, loss_spike=5.0), scale="full"),
    "nan_skipped": Fault("A loss that is not a number: skip", _bad_loss_skipped),
    "bit_flip": Fault("A flipped bit in the newest checkpoint", _damaged),
    "elsewhere": Fault("Going on in two processes, DDP, FSDP, ZeRO-1", _elsewhere, 2, scale="full"),
}


def run(chosen: FaultSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None):
    """Try the faults; write faults_results.csv and its .json to folder; return the rows as a DataFrame."""
    device = torch.device(chosen.trainers)
    gpus = torch.cuda.device_count() if device.type == "cuda" else None
    writer = records.ResultWriter(
        NAME,
        folder,
        method={
            "trial": "processes that train are disturbed, started again, and compared with an undisturbed run",
            "nothing lost": "right end, whole checkpoint; losses, gradient norms and last weights equal: "
            + ("bit for bit" if device.type == "cpu" else f"to {TOLERANCE:g}")
            + f"; to {TOLERANCE:g} where the number of processes changes",
            "device": device_name(device),
        },
        parameters={**dataclasses.asdict(chosen), "run": to_dict(run_config(chosen))},
    )
    with tempfile.TemporaryDirectory(prefix="lmsys-faults-") as root, writer:
        lab = Lab(chosen, Path(root))
        for name in chosen.kinds:
            fault, tally = FAULTS[name], Tally()
            row: dict[str, Any] = {"fault": fault.what}
            if gpus is not None and fault.processes > gpus:
                row |= {"status": "unsupported", "note": f"needs {fault.processes} GPUs, or trainers=cpu"}
            else:
                fault.try_it(lab, tally)
                row |= {"tried": tally.tried, "nothing_lost": tally.kept, "longest_s": tally.longest_s}
                row |= {"status": "ok" if tally.kept == tally.tried else "error", "note": "; ".join(tally.notes)}
            writer.write(row)
            if on_row:
                on_row(row)
    return records.read_results(writer.path)


# --- What saving costs ----------------------------------------------------------------------------


def measure_saving(
    chosen: FaultSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None
):
    """The time of a step by how checkpoints are saved; write saving_results.csv and its .json; return the rows."""
    device = torch.device(chosen.device)
    config = _saving_config(chosen, device)
    interval = chosen.saving.interval
    writer = records.ResultWriter(
        SAVING_NAME,
        folder,
        method={
            "timer": f"time.perf_counter, over {interval} steps with one checkpoint; the device has finished at both ends",
            "warmup": f"{interval} steps of each run",
            "order": "a run of each mode in turn, several times",
            "statistic": "median, 20th and 80th percentile; cost_pct: of the median step over that without checkpoints",
            "hold_ms": "what a save holds up the training loop, the host's part; the median, as the first allocates the host's copy",
            "device": device_name(device),
        },
        parameters=to_dict(config) | {"saving": dataclasses.asdict(chosen.saving)},
    )
    with ProcessPoolExecutor(1, mp_context=_context(device)) as pool:  # a process that has nothing else on the device
        times, holds, writes = pool.submit(_saving_times, config, interval, chosen.rounds).result()
    with writer:
        usual = statistics.median(times["none"])
        for mode in SAVING_MODES:
            median, p20, p80 = quantiles(times[mode])
            row = {"mode": mode, "size": chosen.saving.size, "interval": interval, "status": "ok"}
            row |= {"step_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(times[mode])}
            row |= {"cost_pct": 100 * (median / usual - 1)}
            if mode != "none":
                row |= {"hold_ms": statistics.median(holds[mode]), "write_ms": statistics.median(writes[mode])}
                row |= {"checkpoint_mib": 12 * cost.model_parameters(config.model) / 2**20}
            writer.write(row)
            if on_row:
                on_row(row)
    return records.read_results(writer.path)


def _saving_config(chosen: FaultSettings, device: torch.device) -> PipelineConfig:
    saving = chosen.saving
    shape = _SAVING_SHAPE.get(saving.size, {"context_length": 64, "vocab_size": 4096})
    model = to_dict(model_size(saving.size, **shape))
    train = {"steps": saving.steps, "batch_size": saving.batch, "eval_interval": 0, "eval_batches": 1}
    train |= {"log_interval": saving.interval, "device": chosen.device, "seed": chosen.seed, "resume": False}
    if device.type == "cuda":
        train |= {"dtype": "bf16", "compile": True, "attention_kernel": "flash_attention_triton"}
    return build(PipelineConfig, {"model": model, "optim": {"warmup_steps": 1}, "train": train})


def _saving_times(config: PipelineConfig, interval: int, rounds: int) -> tuple[dict[str, list[float]], ...]:
    """By mode: ms of a step, of a save's hold on the loop, of a write."""
    times, holds, writes = ({mode: [] for mode in SAVING_MODES} for _ in range(3))
    on_cpu = torch.device(config.train.device).type == "cpu"
    with tempfile.TemporaryDirectory(prefix="lmsys-saving-") as root, one_thread(on_cpu):
        for _ in range(rounds):
            for mode in SAVING_MODES:
                _time_a_run(config, mode, interval, Path(root) / "run", times[mode], holds[mode], writes[mode])
    return times, holds, writes


def _time_a_run(
    config: PipelineConfig,
    mode: str,
    interval: int,
    folder: Path,
    times: list[float],
    holds: list[float],
    writes: list[float],
) -> None:
    """Add the run's times in ms: of a step in each interval after the first, of each save, of each write."""
    settings = {
        "checkpointing_interval": 0 if mode == "none" else interval,
        "async_checkpoints": mode == "asynchronous",
    }
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    vocabulary = config.model.vocab_size
    tokens = np.random.default_rng(config.train.seed).integers(vocabulary, size=200_000).astype(np.uint16)
    last: float | None = None

    def on_step(step: int, _loss: torch.Tensor) -> None:
        nonlocal last
        if step % interval == 0 and step < config.train.steps:  # a row was written: the device has finished
            now = time.perf_counter()
            if last is not None:
                times.append((now - last) / interval * 1e3)
            last = now

    with (
        mock.patch.object(checkpoint.Saver, "save", _timed(checkpoint.Saver.save, holds)),
        mock.patch.object(checkpoint, "write", _timed(checkpoint.write, writes)),
        contextlib.redirect_stdout(None),
    ):
        training.train(
            config,
            train_tokens=tokens,
            valid_tokens=tokens[: 4 * config.model.context_length],
            run_dir=folder,
            progress=False,
            on_step=on_step,
        )
    shutil.rmtree(folder)


def _timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            times.append((time.perf_counter() - started) * 1e3)

    return timed


# --- What it says ---------------------------------------------------------------------------------


def row_line(row: Mapping[str, Any]) -> str:
    """A row of either file in a line."""
    if "mode" in row:
        line = f"{row['mode']:12} {significant(row['step_ms'])} ms a step, {row['cost_pct']:+.1f}%"
        return line if row["mode"] == "none" else f"{line}; a save holds up {significant(row['hold_ms'])} ms"
    if row["status"] == "unsupported":
        return f"{row['fault']:52} {row['note']}"
    line = f"{row['fault']:52} tried {row['tried']}, nothing lost {row['nothing_lost']}"
    return f"{line}: {row['note']}" if row["note"] else line


def faults_table(frame) -> str:
    """faults_results as a Markdown table."""
    columns = {"fault": "fault", "tried": "tried", "nothing_lost": "nothing lost", "longest_s": "ended within, s"}
    lines = [
        {
            "fault": row.fault,
            "tried": "not here" if row.status == "unsupported" else int(row.tried),
            "nothing_lost": "" if row.status == "unsupported" else int(row.nothing_lost),
            "longest_s": "" if math.isnan(row.longest_s) else significant(row.longest_s, 2),
        }
        for row in frame.itertuples()
    ]
    return records.markdown_table(lines, columns)


def saving_table(frame) -> str:
    """saving_results as a Markdown table."""
    columns = {
        "mode": "checkpoints",
        "step": "ms a step",
        "cost": "cost",
        "hold": "held up, ms",
        "write": "written in, ms",
    }
    lines = [
        {
            "mode": f"{row.mode}" if row.mode == "none" else f"{row.mode}, every {row.interval} steps",
            "step": records.spread(row.step_ms, row.p20_ms, row.p80_ms),
            "cost": "" if row.mode == "none" else f"{row.cost_pct:+.1f}%",
            "hold": "" if row.mode == "none" else significant(row.hold_ms),
            "write": "" if row.mode == "none" else significant(row.write_ms),
        }
        for row in frame.itertuples()
    ]
    return records.markdown_table(lines, columns)


def conclusions(frame, saving=None) -> list[str]:
    """What the results show, in sentences made from their numbers."""
    tried = frame[frame.status != "unsupported"]
    lost = tried[tried.status == "error"]
    said = [
        f"{int(tried.tried.sum())} faults of {len(tried)} kinds; nothing was lost in {int(tried.nothing_lost.sum())} of them."
    ]
    said += [f"**{row.fault}**: {row.note}" for row in lost.itertuples()]
    stopped = tried[tried.fault.str.startswith(("SIGTERM", "SIGINT"))].longest_s.dropna()
    if len(stopped):
        said.append(f"A run that was told to end had saved and ended within {significant(stopped.max(), 2)} s.")
    if saving is not None:
        by_mode = saving.set_index("mode")
        usual = TrainConfig().checkpointing_interval
        held = {mode: by_mode.loc[mode].hold_ms for mode in SAVING_MODES[1:]}
        share = {mode: 100 * hold / (usual * by_mode.loc["none"].step_ms) for mode, hold in held.items()}
        said.append(
            f"A checkpoint of {significant(by_mode.loc['asynchronous'].checkpoint_mib)} MiB holds up the loop for "
            f"{significant(held['asynchronous'])} ms when it is written in the background and for "
            f"{significant(held['synchronous'])} ms when not: of the time of {usual} steps, after as many of which one is saved "
            f"unless told otherwise, {significant(share['asynchronous'], 2)}% and {significant(share['synchronous'], 2)}%."
        )
        cost_pct = by_mode.loc["asynchronous"].cost_pct
        said.append(
            f"With one every {int(by_mode.loc['none'].interval)} steps, the time of a step changes by {cost_pct:+.1f}%, what the "
            f"writing takes from it included, and by {by_mode.loc['synchronous'].cost_pct:+.1f}% when it is waited for; the times "
            "without checkpoints spread over "
            f"{100 * (by_mode.loc['none'].p80_ms / by_mode.loc['none'].p20_ms - 1):.1f}%."
        )
    return said


def write_report(frame, saving, folder: str | Path) -> Path:
    """Write faults_report.md; return its path."""
    text = ["# Faults", "", faults_table(frame), "", "## What saving costs", "", saving_table(saving), ""]
    text += [f"- {sentence}" for sentence in conclusions(frame, saving)]
    return records.write_text(Path(folder) / "faults_report.md", "\n".join(text) + "\n")
