"""From the events of PyTorch's profiler to what a training step did: kernels and where they belong, and what computes
and what communicates when.

trace() tells of each kernel its operator, the phase of the step and the part of the model. A kernel is traced back:

- to the operator that launched it, by the profiler's correlation id. The operator says what kind of kernel it is: names
  of kernels change from GPU to GPU, `aten::mm` does not;
- in the forward pass, to the innermost range that the operator ran in;
- in the backward pass, which runs in a thread of its own without ranges, to the node of the graph that autograd
  evaluates, and by the node's sequence number to the forward operator that made it: the last one to start with that
  number.

On a CPU the operators take the place of kernels, each with the time that it spends outside of the operators it calls.

lanes() gives intervals. On a GPU they are those of kernels: NCCL's communicate, with their waiting for a peer, as do
copies from GPU to GPU; all others compute. On a CPU, those of operators of the calling thread (compute) and of Gloo's
collectives, which run in threads of their own; a Gloo interval begins when the collective is queued, so that several of
them overlap each other. The profiler slows the host down: a traced step takes longer than a timed one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lmsys.bench.measure import profiled

PHASES = ("forward", "loss", "backward", "optimizer")
MATMUL = "matmuls"
OTHER = "other"
_PREFIX = "lmsys."  # of the ranges
_LAUNCH = re.compile("cu(da)?[A-Z]")  # CUDA's calls, which have the ids of the kernels that they launch
_GAP_MS = 0.02  # intervals of a lane this close are shown as one
_NODE = "autograd::engine::evaluate_function: "
_NO_OPERATOR = re.compile(
    r"cu(da)?[A-Z]|\[|Activity Buffer|Buffer Flush|Command Buffer|Driver Compiler|Instrumentation|Lazy Function"
    r"|Resource|Runtime Triggered|Unknown"
)  # CUDA's calls, which have ids of their own, and what tracing itself costs

# Kind of kernel -> the operators that launch it. The first that matches counts; what none matches is "other".
CATEGORIES = {
    MATMUL: r"aten::(mm|bmm|addmm|baddbmm|_scaled_mm|mv|dot)$",
    "softmax": r"aten::_(log_)?softmax(_backward_data)?$",
    "copies and casts": r"aten::(copy_|_to_copy|clone|cat|stack|fill_|zero_|zeros_like|contiguous)$",
    "reductions": r"aten::(sum|mean|max|amax|norm|linalg_vector_norm|cumsum|any|all)$",
    "lookups": r"aten::(embedding|embedding_dense_backward|gather|scatter_add_?|index|index_put_?|_index_put_impl_)$",
    "element-wise": r"aten::(add|sub|mul|div|neg|rsqrt|sqrt|pow|square|exp|silu|silu_backward|sigmoid|reciprocal"
    r"|complex|where|masked_fill|threshold_backward|triu|lerp|addcmul|addcdiv|clamp|conj_physical|arange)_?$",
}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a part of the step for trace() and lanes()."""
    with torch.profiler.record_function(_PREFIX + name):
        yield


def category(operator: str) -> str:
    """The kind of kernel that an operator launches."""
    return next((name for name, pattern in CATEGORIES.items() if re.match(pattern, operator)), OTHER)


@dataclass(frozen=True)
class Kernel:
    """One kernel's run; on a CPU, one operator's own time. Times in ms from the beginning of the first phase."""

    name: str
    operator: str
    phase: str
    part: str
    layer: int | None
    start_ms: float
    duration_ms: float

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.duration_ms

    @property
    def category(self) -> str:
        return self.phase if self.phase == "optimizer" else category(self.operator)


@dataclass
class _Op:
    """An operator or range of the host. Times in ns."""

    id: int
    name: str
    thread: int
    start: int
    end: int
    sequence: int
    parent: _Op | None = None
    children: int = 0  # ns

    def ancestors(self) -> Iterator[_Op]:
        op: _Op | None = self
        while op is not None:
            yield op
            op = op.parent


class Trace(NamedTuple):
    """What a traced step did: kernels in the order of their start, and how long the host was in each phase, ms."""

    kernels: list[Kernel]
    phases_ms: dict[str, float]


def trace(step: Callable[[], Any], device: torch.device) -> Trace:
    """Run step(), whose phases and parts are in ranges, under the profiler."""
    with profiled(device) as profile:
        step()
    return attribute(profile.profiler.kineto_results.events(), gpu=device.type == "cuda")


def attribute(events: Iterable[Any], gpu: bool) -> Trace:
    """The kernels among the profiler's raw events, each with its operator, phase and part.

    Of an event this reads name(), device_type(), correlation_id(), linked_correlation_id(), sequence_nr(),
    start_thread_id(), start_ns() and end_ns().
    """
    ops, launched = [], []
    for event in events:
        if event.device_type() == torch.autograd.DeviceType.CPU:
            if not _NO_OPERATOR.match(event.name()):
                times = event.start_ns(), event.end_ns()
                ids = event.correlation_id(), event.name(), event.start_thread_id()
                ops.append(_Op(*ids, *times, event.sequence_nr()))
        elif gpu and not event.name().startswith(_PREFIX):  # the ranges have shadows on the device
            launched.append(event)
    _nest(ops)
    phases: dict[str, _Op] = {}
    for op in sorted(ops, key=lambda op: op.start):
        name = op.name.removeprefix(_PREFIX)
        if op.name.startswith(_PREFIX) and name in PHASES:
            phases.setdefault(name, op).end = op.end  # the optimizer's has two ranges: clipping, and the update
    assert phases, "the step marked no phase"
    if "loss" in phases:  # is within the forward pass, and counted by itself
        phases["forward"].end = phases["loss"].start
    origin = min(op.start for op in phases.values())
    forward_spans = [phases[name] for name in ("forward", "loss") if name in phases]
    made = {  # sequence number -> the last operator of the forward pass and the loss that started with it
        op.sequence: op
        for op in sorted(ops, key=lambda op: op.start)
        if op.sequence >= 0
        and any(span.thread == op.thread and span.start <= op.start < span.end for span in forward_spans)
    }

    def kernel(name: str, op: _Op, start: int, duration: int) -> Kernel:
        part, layer = _place(op, made)
        # Autograd's threads open no phases: theirs is the one that the step was in.
        inside = next((each for each, span in phases.items() if span.start <= op.start < span.end), "")
        operator = next((each.name for each in op.ancestors() if not each.name.startswith(_PREFIX)), op.name)
        return Kernel(name, operator, inside, part, layer, (start - origin) / 1e6, duration / 1e6)

    if gpu:
        by_id = {op.id: op for op in ops if op.id > 0}
        kernels = [
            kernel(event.name(), op, event.start_ns(), event.end_ns() - event.start_ns())
            for event in launched
            if (op := by_id.get(event.linked_correlation_id()))
        ]
        groups = ((name, [k for k in kernels if k.phase == name]) for name in phases)
        spans = {name: max(k.end_ms for k in of) - min(k.start_ms for k in of) for name, of in groups if of}
    else:
        own = [(op, op.end - op.start - op.children) for op in ops if op.name.startswith("aten::")]
        kernels = [kernel(op.name, op, op.start, duration) for op, duration in own if duration > 0]
        spans = {name: (op.end - op.start) / 1e6 for name, op in phases.items()}
    return Trace(sorted((k for k in kernels if k.phase), key=lambda k: k.start_ms), spans)


def _nest(ops: list[_Op]) -> None:
    """Set the parent and the children's time of each operator: in its thread, the shortest other that encloses it."""
    stacks: dict[int, list[_Op]] = {}
    for op in sorted(ops, key=lambda op: (op.start, -op.end)):
        stack = stacks.setdefault(op.thread, [])
        while stack and stack[-1].end <= op.start:
            stack.pop()
        if stack:
            op.parent = stack[-1]
            stack[-1].children += op.end - op.start
        stack.append(op)


def _place(op: _Op, made: dict[int, _Op]) -> tuple[str, int | None]:
    """The part of the model that an operator belongs to, and its layer."""
    for ancestor in op.ancestors():
        if ancestor.name.startswith(_NODE):
            forward = made.get(ancestor.sequence)
            return _place(forward, {}) if forward is not None else ("gradients", None)
    inner = [each.name.removeprefix(_PREFIX) for each in op.ancestors() if each.name.startswith(_PREFIX)]
    layer = next((int(name.removeprefix("layer ")) for name in inner if name.startswith("layer ")), None)
    part = inner[0] if inner else ""
    return ("residual" if part.startswith("layer ") else part), layer


def busy_ms(kernels: Iterable[Kernel]) -> float:
    """How long at least one of the kernels ran."""
    return sum(end - start for start, end in union((k.start_ms, k.end_ms) for k in kernels))


def known(kernels):
    """Rows of kernels; one whose operator is an event of the tracer's own has the category of its name elsewhere."""
    lost = kernels.operator.astype(str).str.match(_NO_OPERATOR) & (kernels.category == OTHER)
    usual = kernels[~lost].drop_duplicates("name").set_index("name").category
    return kernels.assign(category=kernels.category.where(~lost, kernels.name.map(usual).fillna(OTHER)))


# --- Lanes ----------------------------------------------------------------------------------------


def lanes(step: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Run step(), which marks its parts with phase(), under the profiler; its intervals as rows: lane (phase, compute,
    communication), name, start_ms (from the beginning of the first phase), duration_ms.
    """
    with profiled(device) as profile:
        step()
    return lane_rows(profile.events(), gpu=device.type == "cuda")


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


def lane_rows(events: Iterable[Any], gpu: bool) -> list[dict[str, Any]]:
    """The intervals of each lane, joined and in order.

    The phases on a GPU are from the first to the last computing kernel that was launched during each on the host. It is
    the time of the launch that counts, whichever thread made it. An annotation's shadow on the GPU covers less: not
    what autograd launches from threads of its own, nor what is launched in an annotation within it, as PyTorch's
    optimizers and wrappers have.
    """
    host, device = [], []
    for event in events:
        (device if event.device_type == torch.autograd.DeviceType.CUDA else host).append(event)
    launched_at = {event.id: event.time_range.start for event in host if _LAUNCH.match(event.name)}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    launched: list[tuple[float, float, float]] = []  # of computing kernels: launch, start, end
    for event in device if gpu else host:
        if key := _lane(event, gpu):
            span = event.time_range.start / 1e3, event.time_range.end / 1e3
            found.setdefault(key, []).append(span)
            if key == ("compute", "kernels") and event.id in launched_at:
                launched.append((launched_at[event.id], *span))
    for event in host if gpu else ():
        if event.name.startswith(_PREFIX):
            begin, end = event.time_range.start, event.time_range.end
            if inside := [kernel for kernel in launched if begin <= kernel[0] < end]:
                span = min(start for _, start, _ in inside), max(end for *_, end in inside)
                found.setdefault(("phase", event.name.removeprefix(_PREFIX)), []).append(span)
    first = found.get(("phase", "forward")) or [span for spans in found.values() for span in spans]
    origin = min((start for start, _ in first), default=0.0)
    rows = [
        {"lane": lane, "name": name, "start_ms": start - origin, "duration_ms": end - start}
        for (lane, name), spans in found.items()
        for start, end in union(spans, _GAP_MS if lane != "phase" else 0.0)
        if end > origin
    ]
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
