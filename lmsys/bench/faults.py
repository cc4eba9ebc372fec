"""What a run survives: real training processes that are killed, stopped, or made to fail, and what the run that goes on
computes.

Each fault is tried several times. A trial counts where nothing was lost: the process ended as it should, the newest
checkpoint is whole, and the run, started again, gives the losses and the last weights of an undisturbed run: the same
bits on a CPU; on a GPU, whose sums may differ from run to run, and in another number of processes, to TOLERANCE.
Moments are random, of the seed.
"""

from __future__ import annotations

import math
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lmsys import train as training
from lmsys.bench import trainers
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_names, require_numbers
from lmsys.bench.repeated import at_hand
from lmsys.bench.trainers import Injection, Run, operations
from lmsys.config import MODEL_SIZES, PipelineConfig, build, to_dict
from lmsys.device import device_name, resolve_device
from lmsys.train import checkpoint

COMPUTED = ("train_loss", "valid_loss", "learning_rate", "grad_norm")
TOLERANCE = 1e-5  # relative, where the same bits cannot be had
ENDS_WITHIN_S = 10.0  # a run that is told to end
_SEQUENCES, _INTERVAL = 8, 5  # of a step; steps between checkpoints


def check(p: Parameters) -> None:
    """Raises ValueError: an unknown name, a number out of range, a device that is not here."""
    if p.kinds is None:
        order = ("smoke", "cpu", "full")
        p.kinds = [name for name, fault in FAULTS.items() if order.index(fault.scale) <= order.index(p.scale)]
    require_names(p, {"kinds": FAULTS, "saving": MODEL_SIZES})
    require_numbers(p, dict.fromkeys(("kills", "trials", "rounds", "interval"), 1) | {"steps": 16, "intervals": 2})
    p.trainers, p.device = str(resolve_device(p.trainers)), str(resolve_device(p.device))


NOTEBOOK = Notebook("faults", check)


def run_config(p: Parameters, processes: int = 1, **train: Any) -> PipelineConfig:
    """The run that is disturbed: a small model, a checkpoint every few steps."""
    base = {"steps": p.steps, "batch_size": _SEQUENCES // processes, "device": p.trainers, "seed": p.seed}
    base |= {"eval_interval": 2 * _INTERVAL, "eval_batches": 2, "log_interval": 1, "checkpointing_interval": _INTERVAL}
    shape = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "context_length": 32, "vocab_size": 64}
    return build(PipelineConfig, {"model": shape, "optim": {"warmup_steps": 5}, "train": base | train})


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
            self.notes.append(problem)


class Lab:
    """Where the trials run: a folder for the runs, and the undisturbed run that they are compared with."""

    def __init__(self, p: Parameters, root: Path):
        self.p, self.root = p, root
        self.random = random.Random(p.seed)
        self.exact = torch.device(p.trainers).type == "cpu"
        self._count = 0
        first = trainers.context(torch.device(p.trainers)).Process(target=time.sleep, args=(0,))
        first.start()  # with the first process, the fork server starts and imports torch
        first.join()
        started = time.monotonic()
        run = self.start()
        codes = run.codes()
        self.wall_s = time.monotonic() - started
        if codes != [0]:
            raise RuntimeError(f"the undisturbed run failed: {run.log()}")
        saved = run.saved()
        self.reference, self.weights = {row["step"]: row for row in run.rows()}, saved.weights
        self.operations: list[str] = []  # of one save
        with operations(lambda _number, name: self.operations.append(name)):
            state = {"weights": saved.weights, "optimizer": saved.optimizer, "sampler_state": saved.sampler}
            content = checkpoint.snapshot(saved.step, **state, rng=saved.rng, config=run_config(p))
            checkpoint.write(self.new_folder(), content)

    def new_folder(self) -> Path:
        self._count += 1
        return self.root / f"run-{self._count}"

    def start(
        self, folder: Path | None = None, injection: Injection | None = None, processes: int = 1, **train: Any
    ) -> Run:
        return Run(folder or self.new_folder(), run_config(self.p, processes, **train), injection, processes)

    def interrupted(self, first: int, last: int) -> Run:
        """A run that SIGTERM has ended after a random one of these steps."""
        run = self.start()
        run.reaches(self.random.randrange(first, last))
        run.signal(signal.SIGTERM)
        run.codes()
        return run

    def same(self, run: Run, exact: bool | None = None) -> str:
        """What of a run's rows, and of its weights if it ended well, is not the undisturbed run's; empty if nothing."""
        exact = self.exact if exact is None else exact
        rows = run.rows()
        if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
            return "steps are missing from metrics.csv"
        for row in rows:
            for name in COMPUTED:
                ours, theirs = row[name], self.reference[row["step"]][name]
                close = not exact and None not in (ours, theirs) and math.isclose(ours, theirs, rel_tol=TOLERANCE)
                if ours != theirs and not close:
                    return f"{name} of step {row['step']} is {ours} and was {theirs}"
        if all(process.exitcode == 0 for process in run.processes):
            saved = run.saved()
            if saved is None or saved.step != run.steps:
                return "the last checkpoint is missing"
            for name, tensor in self.weights.items():
                close = not exact and torch.allclose(saved.weights[name], tensor, rtol=1e-3, atol=1e-4)
                if not (close or torch.equal(saved.weights[name], tensor)):
                    return f"{name} is another one at the end"
        return ""

    def goes_on(self, folder: Path, exact: bool | None = None, processes: int = 1, **train: Any) -> str:
        """Run to the end from what a folder holds; what is wrong with it, or nothing."""
        run = self.start(folder, processes=processes, **train)
        return self.same(run, exact) if run.codes() == [0] * processes else f"it cannot go on: {run.end_of_log()}"

    def whole(self, run: Run, least: int) -> str:
        """What is wrong with the newest checkpoint of a run that ended; nothing if it is good and new enough."""
        saved = run.saved()
        if (0 if saved is None else saved.step) < least:
            return f"the newest good checkpoint is of step {saved and saved.step}, not {least}"
        return ""


TryIt = Callable[[Lab, Tally], None]


def _trials(trial: Callable[..., tuple[str, float | None]], *given: Any, least: int = 1) -> TryIt:
    """Several trials: trial(lab, its number, *given) -> (what was lost, or nothing; seconds until all had ended)."""

    def try_it(lab: Lab, tally: Tally) -> None:
        for number in range(max(lab.p.trials, least)):
            problem, seconds = trial(lab, number, *given)
            tally.add(not problem, seconds, problem)

    return try_it


def _kills(kill: Callable[[Lab, Path], tuple[Run, bool]]) -> TryIt:
    """Kills one after another: each run goes on from what the one before left."""

    def try_it(lab: Lab, tally: Tally) -> None:
        folder, pending = lab.new_folder(), False
        while tally.tried + pending < lab.p.kills or pending:
            # The last one goes to its end.
            run, killed = kill(lab, folder) if tally.tried + pending < lab.p.kills else (lab.start(folder), False)
            codes, rows = run.codes(), run.rows()
            # A kill loses at most the checkpoint that was on its way, which is whole before the next one's step is
            # followed by another.
            least = (((rows[-1]["step"] if rows else 0) - 1) // _INTERVAL - 1) * _INTERVAL
            problem = lab.same(run) or lab.whole(run, least)
            if not killed and codes != [0]:
                problem = f"it cannot go on: {run.end_of_log()}"
            if pending:
                tally.add(not problem, problem=problem)
            pending = killed
            if not killed:
                folder = lab.new_folder()

    return try_it


def _at_a_random_moment(lab: Lab, folder: Path) -> tuple[Run, bool]:
    run = lab.start(folder)
    if run.ends_within(lab.random.uniform(0.1, 1.0) * lab.wall_s):
        return run, False
    run.signal(signal.SIGKILL)
    run.codes()
    return run, True


def _in_a_save(lab: Lab, folder: Path) -> tuple[Run, bool]:
    """Within the first three saves after a start."""
    run = lab.start(folder, Injection(operation=lab.random.randrange(3 * len(lab.operations))))
    return run, run.codes() == [-signal.SIGKILL]


def _ended_by(lab: Lab, _number: int, signal_number: int, processes: int = 1) -> tuple[str, float]:
    """A signal to one process ends all, with a checkpoint of the step at hand."""
    wrapper = {"ddp_wrapper": "flashddp"} if processes > 1 else {}
    # Checkpoints at the end only: what is saved is saved because of the signal.
    run = lab.start(processes=processes, checkpointing_interval=0, **wrapper)
    run.reaches(lab.random.randrange(1, lab.p.steps // 2))
    started = time.monotonic()
    run.signal(signal_number, rank=processes - 1)
    in_time = run.ends_within(ENDS_WITHIN_S)
    seconds = time.monotonic() - started
    codes = run.codes()
    told = re.search(rf"stopped by SIG\w+ after step (\d+) of {lab.p.steps}; the last checkpoint is", run.log())
    if not in_time or codes != [128 + signal_number] * processes or told is None:
        return f"exit codes {codes} after {seconds:.1f} s; it said: {run.end_of_log()}", seconds
    return lab.whole(run, int(told[1])) or lab.goes_on(run.folder, exact=lab.exact and processes == 1), seconds


def _one_of_two_killed(lab: Lab, _number: int) -> tuple[str, float]:
    """The other one ends too, and the run goes on in one process."""
    run = lab.start(processes=2, ddp_wrapper="flashddp")
    run.reaches(lab.random.randrange(2 * _INTERVAL, lab.p.steps - _INTERVAL))
    started = time.monotonic()
    run.signal(signal.SIGKILL, rank=1)
    codes = run.codes()
    seconds = time.monotonic() - started
    problem = "" if codes[0] > 0 else f"exit codes {codes}"
    return problem or lab.whole(run, _INTERVAL) or lab.goes_on(run.folder, exact=False), seconds


def _disk_full(lab: Lab, tally: Tally) -> None:
    """From a write, a flush or a rename of the second save on, in turn."""
    kinds = sorted(set(lab.operations))
    for number in range(lab.p.trials * len(kinds)):
        kind = kinds[number % len(kinds)]
        places = [at for at, name in enumerate(lab.operations) if name == kind]
        at = len(lab.operations) + lab.random.choice(places)
        problem, _ = _no_space(lab, number, Injection(operation=at, action="full"))
        tally.add(not problem, problem=f"at {kind}: {problem}")


def _file_limit(lab: Lab, number: int) -> tuple[str, None]:
    limit = sum(tensor.nbytes for tensor in lab.weights.values()) // 2
    return _no_space(lab, number, Injection(operation=len(lab.operations), action="limit", limit_bytes=limit))


def _no_space(lab: Lab, _number: int, injection: Injection) -> tuple[str, None]:
    """The disk is full from some operation of the second save on, until the run is started again."""
    run = lab.start(injection=injection)
    codes, said = run.codes(), run.log()
    if codes != [2] or not re.search("No space left on device|File too large", said) or "Traceback" in said:
        return f"exit codes {codes}; it said: {run.end_of_log()}", None
    return lab.whole(run, _INTERVAL) or lab.same(run) or lab.goes_on(run.folder), None


def _bad_loss(lab: Lab, _number: int, factor: float, train: dict[str, Any]) -> tuple[str, None]:
    """A batch whose loss is bad stops the run, which names the step and the batch; without it, it goes on as it was."""
    draw = lab.random.randrange(2 * _INTERVAL, lab.p.steps - _INTERVAL)
    run = lab.start(injection=Injection(draw=draw, factor=factor), **train)
    codes, said = run.codes(), run.log()
    if codes != [2] or f"at step {draw + 1};" not in said or f"draw {draw} of the sampler" not in said:
        return f"exit codes {codes}; it said: {run.end_of_log()}", None
    return lab.whole(run, draw // _INTERVAL * _INTERVAL) or lab.same(run) or lab.goes_on(run.folder), None


def _bad_loss_skipped(lab: Lab, _number: int) -> tuple[str, None]:
    """A batch whose loss is not a number changes nothing; the run is the same where it is interrupted as well."""
    draw = lab.random.randrange(2 * _INTERVAL, lab.p.steps // 2)
    options = {"injection": Injection(draw=draw), "on_bad_step": "skip", "loss_spike": 5.0}
    whole, parts = lab.start(**options), lab.start(**options)
    codes = whole.codes()
    if parts.reaches(draw + 2):
        parts.signal(signal.SIGTERM)
    parts.codes()
    parts = lab.start(parts.folder, **options)
    codes += parts.codes()
    ours, theirs = ([[row[name] for name in COMPUTED] for row in run.rows()] for run in (parts, whole))
    before = [[lab.reference[step][name] for name in COMPUTED] for step in range(1, draw + 1)]
    if codes != [0, 0] or f"step {draw + 1} is skipped: the loss is nan" not in whole.log():
        return f"exit codes {codes}; it said: {whole.end_of_log()}", None
    if theirs[draw][0] is not None or not all(row[0] is not None for row in theirs[draw + 1 :]):
        return "other steps were skipped", None
    different = lab.exact and (ours != theirs or theirs[:draw] != before)
    return "the interrupted run is another one" if different else "", None


def _damaged(lab: Lab, _number: int) -> tuple[str, None]:
    """A bit of the newest checkpoint flips while nobody looks: the run goes on from the one before."""
    run = lab.interrupted(2 * _INTERVAL + 1, lab.p.steps - 2)
    newest = checkpoint.steps(run.folder / training.CHECKPOINTS)[-1]
    file = lab.random.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[lab.random.randrange(len(content))] ^= 1 << lab.random.randrange(8)
    file.write_bytes(content)
    problem = lab.goes_on(run.folder)
    return problem and f"{file.name}: {problem}", None


_WRAPPERS = ({"ddp_wrapper": "flashddp"}, {"ddp_wrapper": "fsdp"}, {"ddp_wrapper": "flat", "sharded_optimizer": True})


def _elsewhere(lab: Lab, number: int) -> tuple[str, None]:
    """A run of one process goes on in two, under each kind of wrapper."""
    options = _WRAPPERS[number % len(_WRAPPERS)]
    run = lab.interrupted(1, lab.p.steps // 2)
    problem = lab.goes_on(run.folder, exact=False, processes=2, **options)
    return problem and f"{options}: {problem}", None


class Fault(NamedTuple):
    """try_it makes the trials. processes: of its runs, at most. scale: the smallest at which it is tried unasked."""

    what: str
    try_it: TryIt
    processes: int = 1
    scale: str = "cpu"


FAULTS: dict[str, Fault] = {
    "sigkill": Fault("SIGKILL at a random moment", _kills(_at_a_random_moment)),
    "sigkill_in_save": Fault("SIGKILL at a random operation of saving", _kills(_in_a_save), scale="smoke"),
    "sigterm": Fault("SIGTERM", _trials(_ended_by, signal.SIGTERM), scale="smoke"),
    "sigint": Fault("SIGINT", _trials(_ended_by, signal.SIGINT), scale="full"),
    "sigterm_one_of_two": Fault("SIGTERM to one of two processes", _trials(_ended_by, signal.SIGTERM, 2), 2),
    "sigkill_one_of_two": Fault("SIGKILL of one of two processes", _trials(_one_of_two_killed), 2, scale="full"),
    "disk_full": Fault("Disk full (ENOSPC) at a write, a flush, a rename", _disk_full),
    "file_limit": Fault("File-size limit (EFBIG) during a save", _trials(_file_limit), scale="full"),
    "nan": Fault("A loss that is not a number: stop", _trials(_bad_loss, math.nan, {}), scale="smoke"),
    "spike": Fault("A loss 50 times the median: stop", _trials(_bad_loss, 50.0, {"loss_spike": 5.0}), scale="full"),
    "nan_skipped": Fault("A loss that is not a number: skip", _trials(_bad_loss_skipped)),
    "bit_flip": Fault("A flipped bit in the newest checkpoint", _trials(_damaged)),
    "elsewhere": Fault(
        "Going on in two processes, DDP, FSDP, ZeRO-1", _trials(_elsewhere, least=len(_WRAPPERS)), 2, scale="full"
    ),
}


def points(p: Parameters) -> list[Point]:
    """A point a kind of fault; one that needs more GPUs than there are is a row with its reason."""
    gpus = torch.cuda.device_count() if torch.device(p.trainers).type == "cuda" else math.inf
    found = []
    for kind in p.kinds:
        needed = FAULTS[kind].processes
        lacking = {"status": "unsupported", "note": f"needs {needed} GPUs, or trainers=cpu"} if needed > gpus else {}
        found.append({"kind": kind, "fault": FAULTS[kind].what} | lacking)
    return found


def measure_point(point: Point, p: Parameters) -> Row:
    """Try a fault so often; error where something was lost. The undisturbed run is made once for all kinds."""

    def make() -> tuple[Lab, tempfile.TemporaryDirectory]:
        folder = tempfile.TemporaryDirectory(prefix="lmsys-faults-")  # removed with the process
        return Lab(p, Path(folder.name)), folder

    lab, _ = at_hand(("faults", p), make, torch.device(p.device))
    tally = Tally()
    FAULTS[point["kind"]].try_it(lab, tally)
    row = {"tried": tally.tried, "nothing_lost": tally.kept, "longest_s": tally.longest_s}
    return row | {"status": "ok" if tally.kept == tally.tried else "error", "note": "; ".join(tally.notes)}


def _method(p: Parameters) -> dict[str, Any]:
    bits = "bit for bit" if torch.device(p.trainers).type == "cpu" else f"to {TOLERANCE:g}"
    return {
        "trial": "processes that train are disturbed, started again, and compared with an undisturbed run",
        "nothing lost": "right end, whole checkpoint; losses, gradient norms and last weights equal: "
        f"{bits}; to {TOLERANCE:g} where the number of processes changes",
        "device": device_name(torch.device(p.trainers)),
        "run": to_dict(run_config(p)),
    }


FAULTS_TRIED = Experiment(
    name="faults_results",
    columns=("fault", "tried", "nothing_lost", "longest_s", "status", "note"),
    points=points,
    measure=measure_point,
    method=_method,
)
