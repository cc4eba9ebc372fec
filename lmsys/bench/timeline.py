"""What computes and what communicates during a training step, from PyTorch's profiler: intervals, and how much of them overlaps.

On a GPU the intervals are those of kernels: NCCL's communicate, which includes waiting for a peer, as do copies from GPU to GPU; all
others compute. On a CPU, those of operators of the calling thread (compute) and of Gloo's collectives, which run in threads of their
own; a Gloo interval begins when the collective is queued, so that several of them overlap each other. The profiler slows the host down:
a traced step takes longer than a timed one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from lmsys.bench.measure import profiled

PHASES = ("forward", "backward", "optimizer")
_PREFIX = "lmsys."  # of the profiler's annotations
_GAP_MS = 0.02  # intervals of a lane this close are shown as one


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a part of the step for trace()."""
    with torch.profiler.record_function(_PREFIX + name):
        yield


def trace(step: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Run step() under the profiler; its intervals as rows: lane (phase, compute, communication), name, start_ms, duration_ms.

    step marks its parts with phase(). Times count from the beginning of the first phase.
    """
    with profiled(device) as profile:
        step()
    return _rows(_intervals(profile.events(), device))


def _intervals(events: Iterable[Any], device: torch.device) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(lane, name) -> intervals in ms."""
    gpu = device.type == "cuda"
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for event in events:
        if (event.device_type == torch.autograd.DeviceType.CUDA) != gpu:
            continue
        name = event.name
        if name.startswith(_PREFIX):
            key = ("phase", name.removeprefix(_PREFIX))
        elif gpu:
            if event.is_user_annotation:
                continue
            key = ("compute", "kernels")
            if "nccl" in name.lower():
                key = ("communication", "NCCL")
            elif name.startswith("Memcpy PtoP"):
                key = ("communication", "copies")
        elif name.startswith("gloo:"):
            key = ("communication", "Gloo")
        elif name.startswith("aten::"):
            key = ("compute", "operators")
        else:
            continue
        span = event.time_range
        found.setdefault(key, []).append((span.start / 1e3, span.end / 1e3))
    return found


def _rows(found: dict[tuple[str, str], list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """The intervals of each lane, joined and in order. What ran during the backward pass but in no phase on the GPU is its phase.

    Autograd launches from threads of its own, whose kernels no annotation of the caller covers: between forward pass and optimizer.
    """
    phases = {name: spans for (lane, name), spans in found.items() if lane == "phase"}
    if {"forward", "optimizer"} <= set(phases):
        end, begin = max(end for _, end in phases["forward"]), min(start for start, _ in phases["optimizer"])
        found["phase", "backward"] = [(end, begin)]
    first = phases.get("forward") or [span for spans in found.values() for span in spans]
    origin = min((start for start, _ in first), default=0.0)
    rows = []
    for (lane, name), spans in found.items():
        for start, end in union(spans, _GAP_MS if lane != "phase" else 0.0):
            if end > origin:
                rows.append({"lane": lane, "name": name, "start_ms": start - origin, "duration_ms": end - start})
    return sorted(rows, key=lambda row: row["start_ms"])


def union(spans: Iterable[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float]]:
    """Intervals that cover the same time, none closer to the next than gap."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def overlap(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a trace: how long something communicated, and how much of that ran beside computation (hidden)."""
    lanes: dict[str, list[tuple[float, float]]] = {"compute": [], "communication": []}
    for row in rows:
        if row["lane"] in lanes:
            lanes[row["lane"]].append((row["start_ms"], row["start_ms"] + row["duration_ms"]))
    compute, communication = union(lanes["compute"]), union(lanes["communication"])
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in compute for b in communication)
    return {"communication_ms": sum(end - start for start, end in communication), "hidden_ms": both}
