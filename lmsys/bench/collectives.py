"""How fast this machine's processes exchange data: all-reduce, reduce-scatter and all-gather over sizes and numbers of
processes.

Sizes and bus bandwidth are counted as nccl-tests does (its doc/PERFORMANCE.md): the size is that of each rank's tensor
for an all-reduce and of the whole tensor for the others; bandwidth is size / time x 2 (n - 1) / n for an all-reduce,
(n - 1) / n for the others, which is what each device sends in a ring and so compares between numbers of devices. NCCL
between GPUs, Gloo between processes on a CPU. In place, as nccl-tests is by default and as training uses them. float32
sums.

A sample is a batch of calls one after the other, between two CUDA events (two readings of the clock on a CPU), over its
number: a small message is timed as it is in a step, where the host is ahead. Its time is the largest over the ranks.
Results are checked once a size before they are timed. Source of the problem: Stanford CS336, assignment 2,
distributed_communication_single_node.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmsys import cost
from lmsys.bench import processes
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_names, require_numbers
from lmsys.bench.measure import quantiles
from lmsys.config import require
from lmsys.device import resolve_device
from lmsys.parallel import shards
from lmsys.parallel.group import Process

_BATCH_S = 2e-3  # calls in a sample: as many as take about this long, 1 to _MOST_CALLS
_MOST_CALLS = 50


def check(p: Parameters) -> None:
    """Fill in the numbers of processes.

    Raises:
        ValueError: an unknown name, more processes than GPUs, a number out of range.
    """
    processes.settle(p, NOTEBOOK)
    p.ops = list(cost.COLLECTIVES) if p.ops is None else p.ops
    require_names(p, {"ops": cost.COLLECTIVES})
    require(len(p.sizes_mib) > 0 and min(p.sizes_mib) > 0, f"sizes_mib are {p.sizes_mib}; each must be positive")
    require_numbers(p, {"samples": 1})
    counts = processes.process_counts(p.device, p.gpus)
    p.gpus = [n for n in counts if n > 1]
    require(
        len(p.gpus) > 0,
        f"gpus are {list(counts)}: a collective takes two processes or more, and this machine has no GPUs for them",
    )


NOTEBOOK = Notebook("collectives", check)


def points(p: Parameters) -> list[Point]:
    backend = "nccl" if resolve_device(p.device).type == "cuda" else "gloo"
    points = itertools.product(p.gpus, p.ops, p.sizes_mib)
    return [{"backend": backend, "op": op, "gpus": n, "size_mib": size} for n, op, size in points]


def measure_point(point: Point, p: Parameters, process: Process) -> Row:
    """Check and time one point. Every rank makes the same number of calls."""
    call, result, expected = _collective(process, point["op"], point["size_mib"])
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
    times = _batches(process, call, max(3, min(p.samples, int(p.budget_s / (calls * seconds)))), calls)
    median, p20, p80 = quantiles(times)
    rate = cost.bus_factor(point["op"], process.world_size) * point["size_mib"] * 2**20 / median / 1e6
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(times), "busbw_gb_s": rate}


def _collective(process: Process, name: str, size_mib: float) -> tuple[Callable[[], Any], Tensor, Tensor]:
    """The call, the tensor that it writes, and what its first call must write there."""
    rank, n, device = process.rank, process.world_size, process.device
    elements = max(1, round(size_mib * 2**20 / 4 / n)) * n

    def random(of: int) -> Tensor:
        return torch.rand(elements, generator=torch.Generator(device).manual_seed(of), device=device)

    whole = random(rank)
    part = whole.chunk(n)[rank]
    if name == "all_gather":
        expected = torch.cat([random(of).chunk(n)[of] for of in range(n)])
        return (lambda: shards.all_gather_tensor(whole, part)), whole, expected
    # NCCL averages, so that calls on the result of the last one stay finite; Gloo cannot.
    op = dist.ReduceOp.AVG if process.backend == "nccl" else dist.ReduceOp.SUM
    expected = random(0)
    for of in range(1, n):
        expected += random(of)
    expected /= n if op == dist.ReduceOp.AVG else 1
    if name == "all_reduce":
        return (lambda: dist.all_reduce(whole, op=op)), whole, expected
    return (lambda: shards.reduce_scatter_tensor(part, whole, op=op)), part, expected.chunk(n)[rank]


def _batches(process: Process, call: Callable[[], Any], batches: int, calls: int) -> list[float]:
    """Milliseconds a call in each batch of so many, the largest over the ranks."""
    dist.barrier()
    times = processes.clocked_ms(process.device, lambda: [call() for _ in range(calls)], batches)
    return [time_ms / calls for time_ms in processes.largest(process, times)]


def _method(p: Parameters) -> dict[str, Any]:
    timer = "CUDA events" if resolve_device(p.device).type == "cuda" else "time.perf_counter"
    return {
        "timer": f"{timer}, around a batch of calls one after the other; the largest of the ranks",
        "warmup": "3 calls",
        "samples": f"{p.samples}, fewer where they take more than {p.budget_s:g} s: see the column samples",
        "statistic": "median, 20th and 80th percentile",
        "bandwidth": "busbw_gb_s, 1e9 bytes/s: as nccl-tests counts it",
    }


COLLECTIVES = Experiment(
    name="collectives_results",
    columns=(
        *("backend", "op", "gpus", "size_mib", "status", "median_ms", "p20_ms", "p80_ms", "samples", "busbw_gb_s"),
        *("device", "note"),
    ),
    points=points,
    measure=measure_point,
    method=_method,
    processes=lambda point, p: point["gpus"],
    limit_s=60.0,
)


def links(frame) -> dict[tuple[str, int], cost.Link]:
    """(op, gpus) -> latency and bus bandwidth, fitted to the rows that were measured; none where they fit no line."""
    found = {}
    for (op, gpus), group in frame[frame.status == "ok"].groupby(["op", "gpus"], sort=False):
        with contextlib.suppress(ValueError):  # one size, or so much noise that times do not grow with it
            found[op, gpus] = cost.Link.fit(op, gpus, list(group.size_mib * 2**20), list(group.median_ms / 1e3))
    return found
