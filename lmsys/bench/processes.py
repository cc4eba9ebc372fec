"""Measuring in several processes: points one after the other in a process group, results as they come.

stream() starts a group for each number of processes and measures its points in it. What a point computes comes back
through a file, so that a crash loses nothing: the point that was running becomes a row (oom or error, with the first
error), and the points after it go on in a new group. A point that takes longer than its limit ends its process, which
ends the group.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lmsys.bench import measure as measuring
from lmsys.bench.experiment import Notebook, Parameters
from lmsys.config import require, resolve_scale
from lmsys.device import resolve_device
from lmsys.parallel import group
from lmsys.parallel.group import Process


def process_counts(device: str, given: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of processes to measure with: those given, else 1, 2, 4 and 8 up to the GPUs there are, 1 and 2 on a CPU.

    Raises:
        ValueError: not a positive number, more than there are GPUs, or a device that is not one for several processes.
    """
    require(
        device in ("auto", "cpu", "cuda"),
        f"device is '{device}'; each process takes a GPU of its own: give auto, cpu or cuda",
    )
    here = torch.cuda.device_count() if resolve_device(device).type == "cuda" else None
    if given is None:
        return tuple(n for n in (1, 2, 4, 8) if n <= (here or 2))
    for n in given:
        require(type(n) is int and n >= 1, f"gpus {n!r} must be a whole number of 1 or more")
        require(here is None or n <= here, f"gpus {n} is more than this machine has: {here}")
    require(len(given) > 0, "gpus must not be empty")
    return tuple(sorted(set(given)))


def several(scale: str, device: str) -> tuple[str, str]:
    """The scale, resolved, and the device of what needs several processes.

    A machine with one GPU has none for a second process: device auto is then its CPU, and the scale full that of a CPU.
    """
    scale = resolve_scale(scale)
    if device == "auto" and torch.cuda.device_count() == 1:
        return ("cpu" if scale == "full" else scale), "cpu"
    return scale, device


def settle(p: Parameters, notebook: Notebook) -> None:
    """several() of a notebook's parameters; those that the user did not give are then that scale's."""
    scale, p.device = several(p.scale, p.device)
    if scale != p.scale:
        for name, value in notebook.presets[scale].items():
            if not p.is_given(name):
                setattr(p, name, value)
        p.scale = scale


# --- Points, one after the other ------------------------------------------------------------------


def stream(
    measure: Callable[[Process, Any], dict[str, Any] | None],
    items: Sequence[tuple[int, Any]],
    *,
    device: str = "auto",
    limit_s: float,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Run measure(process, point) for each (processes, point); yield (point, what rank 0 returned).

    Args:
        measure: what pickles, called in every process of the group; its result must be JSON.
        items: those of one number of processes share a group, in this order.
        limit_s: of one point.
    Yields:
        a point that failed with its status (oom, unsupported or error) and the first error as its note.
    """
    left = list(items)
    while left:
        world_size = left[0][0]
        batch = [point for size, point in left if size == world_size]
        left = [item for item in left if item[0] != world_size]
        while batch:
            try:
                for result in as_written(_measure_points, world_size, measure, list(batch), limit_s, device=device):
                    yield batch.pop(0), result
            except Exception as error:
                failed = measuring.failure(error)
                if "exited with code 1 and no result" in failed["note"]:
                    failed["note"] += f"; a point may take {limit_s:g} s"
                yield batch.pop(0), failed


def as_written(work: Callable, world_size: int, *args: Any, device: str) -> Iterator[Any]:
    """Run work(process, path, *args) in a new group; the JSON values that it writes to path, one a line, as they come.

    Then the error that ended the group is raised, if one did.
    """
    before = set(multiprocessing.active_children())
    failed: list[Exception] = []
    with tempfile.TemporaryDirectory(prefix="lmsys-") as folder:
        path = Path(folder) / "results.jsonl"
        path.touch()

        def start() -> None:
            try:
                group.spawn(work, world_size, path, *args, device=device)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        try:
            with path.open(encoding="utf-8") as file:
                unread, running = "", True
                while running:
                    thread.join(0.05)
                    running = thread.is_alive()
                    *lines, unread = (unread + file.read()).split("\n")
                    for line in lines:
                        yield json.loads(line)
        finally:
            if thread.is_alive():  # whoever wanted the results has gone
                for child in set(multiprocessing.active_children()) - before:
                    child.kill()
            thread.join()
    if failed:
        raise failed[0]


def _measure_points(process: Process, path: Path, measure: Callable, points: Sequence[Any], limit_s: float) -> None:
    """In each process: every point, its result written by rank 0 as a line."""
    if process.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as lmsys.train does
    for point in points:
        faulthandler.dump_traceback_later(limit_s, exit=True)
        result = measure(process, point)
        if process.rank == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        gc.collect()
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
        if process.world_size > 1:
            dist.barrier()
    faulthandler.cancel_dump_traceback_later()


class Clock:
    """Times between ticks: CUDA events on the current stream, or the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ticks: list[Any] = []

    def tick(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def times_ms(self) -> list[float]:
        """Milliseconds from each tick to the next. Waits for the device."""
        pairs = zip(self.ticks, self.ticks[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


def clocked_ms(device: torch.device, work: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each of so many calls, one after the other."""
    clock = Clock(device)
    clock.tick()
    for _ in range(count):
        work()
        clock.tick()
    return clock.times_ms()


def largest(process: Process, values: Sequence[float]) -> list[float]:
    """Each value's maximum over the processes of the group."""
    if process.world_size == 1 or not values:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=process.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
