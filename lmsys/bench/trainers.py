"""Trainers that are disturbed: real training processes, and what goes wrong within one.

Trainers on a CPU are forks of a server that has imported torch once, so that a start takes a fraction of a second. What
has to happen within a trainer (a kill at an operation of a save, a disk that is full from then on, a batch whose loss
is not a number) is put there by an Injection. A full disk is an error of the system call (ENOSPC), and once the
kernel's own: a limit of the size of files (EFBIG), which needs no privileges.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import resource
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from lmsys import train as training
from lmsys.config import PipelineConfig
from lmsys.parallel import group
from lmsys.train import checkpoint, engine

LIMIT_S = 120.0  # of a process that should end by itself


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
    numbers = itertools.count()

    def ahead(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            before(next(numbers), name)
            return function(*args, **options)

        return wrapped

    write = checkpoint._write

    def in_halves(path: Path, parts: Iterable[bytes | memoryview]) -> str:
        def halves() -> Iterator[memoryview]:
            for part in parts:
                view = memoryview(part)
                for half in (view[: len(view) // 2], view[len(view) // 2 :]):
                    before(next(numbers), "write")
                    yield half

        return write(path, halves())

    with (
        mock.patch.object(checkpoint, "_write", in_halves),
        mock.patch.object(checkpoint, "flush", ahead("flush", checkpoint.flush)),
        mock.patch.object(checkpoint.os, "rename", ahead("rename", os.rename)),
    ):
        yield


def _train_here(
    folder: Path, config: PipelineConfig, injection: Injection | None, rank: int, processes: int, port: int
) -> None:
    """A trainer's process. Its output goes to log.txt."""
    from tqdm import tqdm

    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    generator = np.random.default_rng(0)  # tokens that can be learned: each is mostly the one before it plus one
    steps = np.where(generator.random(20_000) < 0.9, 1, generator.integers(64, size=20_000))
    tokens = (np.cumsum(steps) % 64).astype(np.uint16)
    spoiled = injection.installed() if injection and injection.rank in (None, rank) else contextlib.nullcontext()
    device = torch.device(config.train.device).type
    with spoiled:
        try:
            with group.process_group(device) if processes > 1 else contextlib.nullcontext():
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
        start = context(torch.device(config.train.device))
        with socket.socket() as opened:  # a free port
            opened.bind(("127.0.0.1", 0))
            port = opened.getsockname()[1]
        self.processes = [
            start.Process(target=_train_here, args=(folder, config, injection, rank, processes, port), daemon=True)
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
        self.ends_within(LIMIT_S)
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid, number)

    def reaches(self, step: int) -> bool:
        """Wait until a step after the start is logged; False if the run ended before."""
        end = time.monotonic() + LIMIT_S
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

    def end_of_log(self) -> str:
        return self.log().strip()[-300:]

    def saved(self) -> checkpoint.Checkpoint | None:
        """The newest good checkpoint."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = checkpoint.latest(self.folder / training.CHECKPOINTS)
        return None if path is None else checkpoint.load(path)


def context(device: torch.device) -> BaseContext:
    """What starts processes that train there."""
    return group.context(device, __name__, "tqdm")  # a run imports the latter when it starts
