"""What computes and what communicates during a training step, from PyTorch's profiler: intervals, and how much of them
overlaps.

On a GPU the intervals are those of kernels: NCCL's communicate, which includes waiting for a peer, as do copies from
GPU to GPU; all others compute. On a CPU, those of operators of the calling thread (compute) and of Gloo's collectives,
which run in threads of their own; a Gloo interval begins when the collective is queued, so that several of them overlap
each other. The profiler slows the host down: a traced step takes longer than a timed one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from lmsys.bench.measure import profiled

PHASES = ("forward", "backward", "optimizer")
_PREFIX = "lmsys."  # of the profiler's annotations
_LAUNCH = re.compile("cu(da)?[A-Z]")  # CUDA's calls, which have the ids of the kernels that they launch
_GAP_MS = 0.02  # intervals of a lane this close are shown as one


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a part of the step for trace()."""
    with torch.profiler.record_function(_PREFIX + name):
        yield


def trace(step: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Run step() under the profiler; its intervals as rows: lane (phase, compute, communication), name, start_ms,
    duration_ms.

    step marks its parts with phase(). Times count from the beginning of the first phase.
    """
    with profiled(device) as profile:
        step()
    return _rows(_intervals(profile.events(), device))


def _intervals(events: Sequence[Any], device: torch.device) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(lane, name) -> intervals in ms."""
    gpu = device.type == "cuda"
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for event in events:
        if _on_gpu(event) == gpu and (key := _lane(event, gpu)):
            found.setdefault(key, []).append(_span(event))
    return found | (_gpu_phases(events) if gpu else {})


def _lane(event: Any, gpu: bool) -> tuple[str, str] | None:
    """Lane and name of an event."""
    name = event.name
    if gpu:
        if event.is_user_annotation:
            return None
        if "nccl" in name.lower():
            return "communication", "NCCL"
        return ("communication", "copies") if name.startswith("Memcpy PtoP") else ("compute", "kernels")
    if name.startswith(_PREFIX):
        return "phase", name.removeprefix(_PREFIX)
    if name.startswith("gloo:"):
        return "communication", "Gloo"
    return ("compute", "operators") if name.startswith("aten::") else None


def _gpu_phases(events: Sequence[Any]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The phases on the GPU: from the first to the last computing kernel that was launched during each on the host.

    It is the time of the launch that counts, whichever thread made it. An annotation's shadow on the GPU covers less:
    not what autograd launches from threads of its own, nor what is launched in an annotation within it, as PyTorch's
    optimizers and wrappers have.
    """
    launched_at = {e.id: e.time_range.start for e in events if not _on_gpu(e) and _LAUNCH.match(e.name)}
    kernels = [e for e in events if _on_gpu(e) and e.id in launched_at and _lane(e, True) == ("compute", "kernels")]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for phase in [e for e in events if not _on_gpu(e) and e.name.startswith(_PREFIX)]:
        begin, end = phase.time_range.start, phase.time_range.end
        if spans := [_span(kernel) for kernel in kernels if begin <= launched_at[kernel.id] < end]:
            span = min(start for start, _ in spans), max(end for _, end in spans)
            found.setdefault(("phase", phase.name.removeprefix(_PREFIX)), []).append(span)
    return found


def _on_gpu(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start / 1e3, event.time_range.end / 1e3


def _rows(found: dict[tuple[str, str], list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """The intervals of each lane, joined and in order."""
    first = found.get(("phase", "forward")) or [span for spans in found.values() for span in spans]
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
    """Milliseconds of a trace: how long something communicated, and how much of that ran beside computation."""
    lanes: dict[str, list[tuple[float, float]]] = {"compute": [], "communication": []}
    for row in rows:
        if row["lane"] in lanes:
            lanes[row["lane"]].append((row["start_ms"], row["start_ms"] + row["duration_ms"]))
    compute, communication = union(lanes["compute"]), union(lanes["communication"])
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in compute for b in communication)
    return {"communication_ms": sum(end - start for start, end in communication), "hidden_ms": both}
