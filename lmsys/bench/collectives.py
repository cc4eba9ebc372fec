"""How fast this machine's processes exchange data: all-reduce, reduce-scatter and all-gather over sizes and numbers of processes.

Sizes and bus bandwidth are counted as nccl-tests does (its doc/PERFORMANCE.md): the size is that of each rank's tensor for an
all-reduce and of the whole tensor for the others; bandwidth is size / time x 2 (n - 1) / n for an all-reduce, (n - 1) / n for the
others, which is what each device sends in a ring and so compares between numbers of devices. NCCL between GPUs, Gloo between
processes on a CPU. In place, as nccl-tests is by default and as training uses them. float32 sums.

A sample is a batch of calls one after the other, between two CUDA events (two readings of the clock on a CPU), over its number:
a small message is timed as it is in a step, where the host is ahead. Its time is the largest over the ranks. Results are checked
once a size before they are timed. Source of the problem: Stanford CS336, assignment 2, distributed_communication_single_node.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmsys import cost, records
from lmsys.bench import replicas
from lmsys.bench.measure import quantiles
from lmsys.config import require, unknown_name
from lmsys.device import device_name, resolve_device
from lmsys.parallel import shards
from lmsys.parallel.group import Process

NAME = "collectives_results"
EXTRA_COLUMNS = ("device", "note")
_BATCH_S = 2e-3  # calls in a sample: as many as take about this long, 1 to _MOST_CALLS
_MOST_CALLS = 50
_LIMIT_S = 60.0  # of one point
_MOST_COLUMNS = 4  # of a table on a page, beside its sizes

_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"sizes_mib": (0.0625, 1), "samples": 3, "budget_s": 0.05},
    "cpu": {"sizes_mib": (0.0625, 0.5, 4, 16), "samples": 7, "budget_s": 0.15},
    "full": {"sizes_mib": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), "samples": 20, "budget_s": 0.5},
}


@dataclass(frozen=True)
class CollectiveSettings:
    """What is measured; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    ops: tuple[str, ...]
    sizes_mib: tuple[float, ...]
    gpus: tuple[int, ...]
    samples: int
    budget_s: float  # seconds that a point's samples take, about; at least three are made
    device: str


def settings(
    scale: str = "auto",
    ops: Sequence[str] | None = None,
    sizes_mib: Sequence[float] | None = None,
    gpus: Sequence[int] | None = None,
    samples: int | None = None,
    device: str = "auto",
) -> CollectiveSettings:
    """The scale's settings, with what is given in their place.

    Args:
        gpus: numbers of processes, each with its GPU; None: 2, 4, 8 as far as there are GPUs; 2 on a CPU.
        device: auto is the CPU on a machine with one GPU.
    Raises:
        ValueError: an unknown name, more processes than GPUs, a number out of range.
    """
    scale, device = replicas.several(scale, device)
    values = dict(_PRESETS[scale])
    if sizes_mib is not None:
        values["sizes_mib"] = tuple(sizes_mib)
    if samples is not None:
        values["samples"] = samples
    ops = cost.COLLECTIVES if ops is None else tuple(ops)
    for op in ops:
        if op not in cost.COLLECTIVES:
            raise unknown_name("collective", op, cost.COLLECTIVES)
    require(len(ops) > 0 and len(values["sizes_mib"]) > 0, "ops and sizes_mib must not be empty")
    require(min(values["sizes_mib"]) > 0, f"sizes_mib are {values['sizes_mib']}; each must be positive")
    require(values["samples"] >= 1, f"samples is {values['samples']}; it must be at least 1")
    counts = replicas.process_counts(device, gpus)
    many = tuple(n for n in counts if n > 1)
    require(
        len(many) > 0,
        f"gpus are {counts}: a collective needs two processes or more, which this machine has no GPUs for",
    )
    return CollectiveSettings(scale, ops, gpus=many, device=device, **values)


@dataclass(frozen=True)
class Point:
    """One collective at one size."""

    op: str
    gpus: int
    size_mib: float

    @property
    def processes(self) -> int:
        return self.gpus


def run(chosen: CollectiveSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None):
    """Measure; write collectives_results.csv and its .json to folder; return the rows as a DataFrame."""
    device = resolve_device(chosen.device)
    timer = "CUDA events" if device.type == "cuda" else "time.perf_counter"
    writer = records.ResultWriter(
        NAME,
        folder,
        method={
            "timer": f"{timer}, around a batch of calls one after the other; the largest of the ranks",
            "warmup": "3 calls",
            "samples": f"{chosen.samples}, fewer where they take more than {chosen.budget_s:g} s: see the column samples",
            "statistic": "median, 20th and 80th percentile",
            "bandwidth": "busbw_gb_s, 1e9 bytes/s: as nccl-tests counts it",
        },
        parameters=dataclasses.asdict(chosen),
        extra_columns=EXTRA_COLUMNS,
    )
    with writer:
        for row in rows(chosen, device):
            writer.write(row)
            if on_row:
                on_row(row)
    return records.read_results(writer.path)


def recorded(chosen: CollectiveSettings, folder: str | Path):
    """The rows that folder holds, where they are of this device and these numbers of processes; else measure, as run() does."""
    path = Path(folder) / f"{NAME}.csv"
    if path.exists():
        frame = records.read_results(path)
        if set(frame.device) == {device_name(resolve_device(chosen.device))} and set(chosen.gpus) <= set(frame.gpus):
            return frame
    return run(chosen, folder)


def rows(chosen: CollectiveSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure each point and yield it as a row."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    points = [Point(op, n, size) for n in chosen.gpus for op in chosen.ops for size in chosen.sizes_mib]
    limits = (chosen.samples, chosen.budget_s)
    for point, result in replicas.stream(_measure, points, *limits, device=chosen.device, limit_s=_LIMIT_S):
        row = {"backend": backend, "device": device_name(device)} | dataclasses.asdict(point)
        times = result.pop("times_ms", None)
        if times:
            median, p20, p80 = quantiles(times)
            rate = cost.bus_factor(point.op, point.gpus) * point.size_mib * 2**20 / median / 1e6
            row |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(times), "busbw_gb_s": rate}
        yield row | result


def links(frame) -> dict[tuple[str, int], cost.Link]:
    """(op, gpus) -> latency and bus bandwidth, fitted to the rows that were measured; none where they fit no line."""
    found = {}
    for (op, gpus), group in frame[frame.status == "ok"].groupby(["op", "gpus"], sort=False):
        with contextlib.suppress(ValueError):  # one size, or so much noise that times do not grow with it
            found[op, gpus] = cost.Link.fit(op, gpus, list(group.size_mib * 2**20), list(group.median_ms / 1e3))
    return found


# --- In the processes -----------------------------------------------------------------------------


def _measure(process: Process, point: Point, samples: int, budget_s: float) -> dict[str, Any]:
    """Check and time one point. Every rank makes the same number of calls."""
    call, result, expected = _collective(process, point)
    call()
    error = ((result - expected).abs().max() / expected.abs().max()).reshape(1)
    del expected
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    if not error.item() < 1e-5:
        return {"status": "error", "note": f"wrong: an element is off by {error.item():.2g} of the largest"}
    for _ in range(2):
        call()
    seconds = _batches(process, call, 1, 3)[0] / 1e3
    calls = max(1, min(_MOST_CALLS, int(_BATCH_S / seconds)))
    batches = max(3, min(samples, int(budget_s / (calls * seconds))))
    return {"status": "ok", "times_ms": _batches(process, call, batches, calls)}


def _collective(process: Process, point: Point) -> tuple[Callable[[], Any], Tensor, Tensor]:
    """The call, the tensor that it writes, and what its first call must write there."""
    rank, n, device = process.rank, process.world_size, process.device
    elements = max(1, round(point.size_mib * 2**20 / 4 / n)) * n

    def random(of: int) -> Tensor:
        return torch.rand(elements, generator=torch.Generator(device).manual_seed(of), device=device)

    whole = random(rank)
    part = whole.chunk(n)[rank]
    if point.op == "all_gather":
        expected = torch.cat([random(of).chunk(n)[of] for of in range(n)])
        return (lambda: shards.all_gather_tensor(whole, part)), whole, expected
    # NCCL averages, so that calls on the result of the last one stay finite; Gloo cannot.
    op = dist.ReduceOp.AVG if process.backend == "nccl" else dist.ReduceOp.SUM
    expected = random(0)
    for of in range(1, n):
        expected += random(of)
    expected /= n if op == dist.ReduceOp.AVG else 1
    if point.op == "all_reduce":
        return (lambda: dist.all_reduce(whole, op=op)), whole, expected
    return (lambda: shards.reduce_scatter_tensor(part, whole, op=op)), part, expected.chunk(n)[rank]


def _batches(process: Process, call: Callable[[], Any], batches: int, calls: int) -> list[float]:
    """Milliseconds a call in each batch of so many, the largest over the ranks."""
    clock = replicas.Clock(process.device)
    dist.barrier()
    clock.tick()
    for _ in range(batches):
        for _ in range(calls):
            call()
        clock.tick()
    return [time_ms / calls for time_ms in replicas.largest(process, clock.times_ms())]


# --- What was measured ----------------------------------------------------------------------------


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    what = f"{row['backend']} {row['op']:<15} {row['gpus']} processes {row['size_mib']:>9g} MiB"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row.get('note', '')}"
    return (
        f"{what} {row['median_ms']:>10.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}] {row['busbw_gb_s']:>8.4g} GB/s"
    )


def table(frame) -> str:
    """Bus bandwidth and time of each collective over sizes, as Markdown: one table, or one for each number of processes where columns are many."""
    whole = len(set(zip(frame.op, frame.gpus, strict=True))) <= _MOST_COLUMNS
    return "\n".join(_table(part) for part in ([frame] if whole else [part for _, part in frame.groupby("gpus")]))


def _table(frame) -> str:
    lines: dict[float, dict[str, str]] = {}
    columns = {"size": "size"}
    for row in frame.itertuples():
        name = f"{row.op}, {row.gpus} processes: GB/s (ms)"
        columns[name] = name
        line = lines.setdefault(row.size_mib, {"size": f"{row.size_mib:,g} MiB"})
        shown = f"{records.significant(row.busbw_gb_s)} ({records.significant(row.median_ms)})"
        line[name] = shown if row.status == "ok" else row.status
    return records.markdown_table([lines[size] for size in sorted(lines)], columns)


def conclusions(frame) -> list[str]:
    """What the rows show, in sentences made from their numbers."""
    said, fitted = [], links(frame)
    for (op, gpus), group in frame[frame.status == "ok"].groupby(["op", "gpus"], sort=False):
        best = group.loc[group.busbw_gb_s.idxmax()]
        text = f"{op} of {gpus}: at most {records.significant(best.busbw_gb_s)} GB/s of bus bandwidth, at {best.size_mib:g} MiB."
        if link := fitted.get((op, gpus)):
            half = link.latency_s * link.bandwidth / cost.bus_factor(op, gpus) / 2**20
            text += (
                f" A line through the times: {records.significant(link.latency_s * 1e6)} us and {records.significant(link.bandwidth / 1e9)} "
                f"GB/s, so that a message of {records.significant(half)} MiB spends half of its time on latency."
            )
        said.append(text)
    for row in frame[frame.status != "ok"].itertuples():
        said.append(f"{row.op} of {row.gpus} at {row.size_mib:g} MiB: {row.status}, {row.note}")
    return said
