"""From the events of PyTorch's profiler to kernels: of each its operator, the phase of the step and the part of the
model.

Each kernel is traced back:

- to the operator that launched it, by the profiler's correlation id. The operator says what kind of kernel it is: names
  of kernels change from GPU to GPU, `aten::mm` does not;
- in the forward pass, to the innermost range that the operator ran in;
- in the backward pass, which runs in a thread of its own without ranges, to the node of the graph that autograd
  evaluates, and by the node's sequence number to the forward operator that made it: the last one to start with that
  number.

On a CPU the operators take the place of kernels, each with the time that it spends outside of the operators it calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmsys.bench.measure import profiled
from lmsys.bench.timeline import union

PHASES = ("forward", "loss", "backward", "optimizer")
MATMUL = "matmuls"
_PREFIX = "lmsys."  # of the ranges, as lmsys.bench.timeline writes them
_NODE = "autograd::engine::evaluate_function: "
_NO_OPERATOR = re.compile(
    r"cu(da)?[A-Z]|\[|Activity Buffer|Buffer Flush|Command Buffer|Driver Compiler|Instrumentation|Lazy Function"
    r"|Resource|Runtime Triggered|Unknown"
)  # CUDA's calls, which have ids of their own, and what tracing itself costs

# Kind of kernel -> the operators that launch it. The first that matches counts; what none matches is "other".
CATEGORIES: tuple[tuple[str, re.Pattern], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        (MATMUL, r"aten::(mm|bmm|addmm|baddbmm|_scaled_mm|mv|dot)$"),
        ("softmax", r"aten::_(log_)?softmax(_backward_data)?$"),
        ("copies and casts", r"aten::(copy_|_to_copy|clone|cat|stack|fill_|zero_|zeros_like|contiguous)$"),
        ("reductions", r"aten::(sum|mean|max|amax|norm|linalg_vector_norm|cumsum|any|all)$"),
        (
            "lookups",
            r"aten::(embedding|embedding_dense_backward|gather|scatter_add_?|index|index_put_?|_index_put_impl_)$",
        ),
        (
            "element-wise",
            r"aten::(add|sub|mul|div|neg|rsqrt|sqrt|pow|square|exp|silu|silu_backward|sigmoid|reciprocal|complex|where|masked_fill"
            r"|threshold_backward|triu|lerp|addcmul|addcdiv|clamp|conj_physical|arange)_?$",
        ),
    )
)
OTHER = "other"


def category(operator: str) -> str:
    """The kind of kernel that an operator launches."""
    return next((name for name, pattern in CATEGORIES if pattern.match(operator)), OTHER)


# --- Events to kernels ----------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Trace:
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
                ops.append(
                    _Op(
                        event.correlation_id(),
                        event.name(),
                        event.start_thread_id(),
                        event.start_ns(),
                        event.end_ns(),
                        event.sequence_nr(),
                    )
                )
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
    made = _forward_ops(ops, phases)

    def kernel(name: str, op: _Op, start: int, duration: int) -> Kernel:
        part, layer = _place(op, made)
        # Autograd's threads open no phases: theirs is the one that the step was in.
        inside = next((each for each, span in phases.items() if span.start <= op.start < span.end), "")
        return Kernel(name, _operator(op), inside, part, layer, (start - origin) / 1e6, duration / 1e6)

    if gpu:
        by_id = {op.id: op for op in ops if op.id > 0}
        kernels = [
            kernel(
                event.name(), by_id[event.linked_correlation_id()], event.start_ns(), event.end_ns() - event.start_ns()
            )
            for event in launched
            if event.linked_correlation_id() in by_id
        ]
        spans = {
            name: (min(k.start_ms for k in group), max(k.start_ms + k.duration_ms for k in group))
            for name in phases
            if (group := [k for k in kernels if k.phase == name])
        }
    else:
        own = [(op, op.end - op.start - op.children) for op in ops if op.name.startswith("aten::")]
        kernels = [kernel(op.name, op, op.start, duration) for op, duration in own if duration > 0]
        spans = {name: (op.start / 1e6, op.end / 1e6) for name, op in phases.items()}
    kernels = sorted((k for k in kernels if k.phase), key=lambda k: k.start_ms)
    return Trace(kernels, {name: end - start for name, (start, end) in spans.items()})


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


def _forward_ops(ops: Sequence[_Op], phases: dict[str, _Op]) -> dict[int, _Op]:
    """Sequence number -> the last operator of the forward pass and the loss that started with it."""
    spans = [phases[name] for name in ("forward", "loss") if name in phases]
    made: dict[int, _Op] = {}
    for op in sorted(ops, key=lambda op: op.start):
        if op.sequence >= 0 and any(span.thread == op.thread and span.start <= op.start < span.end for span in spans):
            made[op.sequence] = op
    return made


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


def _operator(op: _Op) -> str:
    """The innermost operator that is not a range."""
    return next((each.name for each in op.ancestors() if not each.name.startswith(_PREFIX)), op.name)


def busy_ms(kernels: Iterable[Kernel]) -> float:
    """How long at least one of the kernels ran."""
    return sum(end - start for start, end in union((k.start_ms, k.start_ms + k.duration_ms) for k in kernels))


def known(kernels):
    """Rows of kernels, those that have an event of the tracer's own as their operator as kernels of the same name
    elsewhere.
    """
    lost = kernels.operator.astype(str).str.match(_NO_OPERATOR) & (kernels.category == OTHER)
    usual = kernels[~lost].drop_duplicates("name").set_index("name").category
    return kernels.assign(category=kernels.category.where(~lost, kernels.name.map(usual).fillna(OTHER)))
