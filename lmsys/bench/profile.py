"""Where the time of a forward pass and of a training step goes: kernels by phase, part of the model and kind, from PyTorch's profiler.

Answers the problem nsys_profile of Stanford CS336, assignment 2, which reads the same from NVIDIA's Nsight Systems. While a step is
traced, hooks put a range around each module of lmsys.model.TransformerLM, and attention is the formula with a range around each operation
(the same operations as attention.reference.scaled_dot_prod_attention, an operation a line). Each kernel is then traced back:

- to the operator that launched it, by the profiler's correlation id. The operator says what kind of kernel it is: names of kernels
  change from GPU to GPU, `aten::mm` does not;
- in the forward pass, to the innermost range that the operator ran in;
- in the backward pass, which runs in a thread of its own without ranges, to the node of the graph that autograd evaluates, and by the
  node's sequence number to the forward operator that made it: the last one to start with that number.

On a CPU the operators take the place of kernels, each with the time that it spends outside of the operators it calls, on one thread: what
a CPU's scale profiles is too small to share.

Limits: eager execution (a compiled block is one operator). Tracing slows the host down, so a traced step of a small model is longer than
a timed one; the times of kernels are the device's own. A phase's kernels are those launched in it, whenever they ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmsys import cost, records
from lmsys.attention.reference import causal_mask, repeat_heads
from lmsys.bench.measure import is_out_of_memory, one_thread, profiled, quantiles, release, settled
from lmsys.bench.timeline import phase, union
from lmsys.config import MODEL_SIZES, model_size, require, resolve_scale, unknown_name
from lmsys.device import device_name, fp32_products, resolve_device
from lmsys.model import RMSNorm, SwiGLU, TransformerLM, cross_entropy
from lmsys.step.optimizer import AdamW, parameter_groups
from lmsys.train.engine import autocast

NAME, KERNELS, TIMELINE = "profiling_results", "profiling_kernels", "profiling_timeline"
EXTRA_COLUMNS = ("device", "note")
DTYPES = ("fp32", "tf32", "bf16")
MODES = ("inference", "training")
PHASES = ("forward", "loss", "backward", "optimizer")
WHOLE = "step"  # all phases of a mode together
MATMUL = "matrix products"
ATTENTION_PARTS = ("scores", "scale and mask", "softmax", "values")
_PREFIX = "lmsys."  # of the ranges, as lmsys.bench.timeline writes them
_NODE = "autograd::engine::evaluate_function: "
_NO_OPERATOR = re.compile(
    r"cu(da)?[A-Z]|\[|Activity Buffer|Buffer Flush|Command Buffer|Driver Compiler|Instrumentation|Lazy Function|Resource|Runtime Triggered|Unknown"
)  # CUDA's calls, which have ids of their own, and what tracing itself costs
_SOFTMAX_FLOPS = 5  # an element: maximum, difference, exponential, sum, quotient

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


# --- What is profiled -----------------------------------------------------------------------------

_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"sizes": ("tiny",), "contexts": (16, 32), "dtypes": ("fp32",), "batch": 1, "samples": 3},
    "cpu": {"sizes": ("tiny", "mini"), "contexts": (64, 128, 256), "dtypes": ("fp32",), "batch": 2, "samples": 3},
    "full": {
        "sizes": ("small", "2.7b"),
        "contexts": (256, 512, 1024),
        "dtypes": ("fp32", "bf16"),
        "batch": 4,
        "samples": 3,
    },
}


@dataclass(frozen=True)
class ProfileSettings:
    """What is profiled; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    sizes: tuple[str, ...]
    contexts: tuple[int, ...]
    dtypes: tuple[str, ...]
    batch: int
    samples: int
    device: str
    seed: int


def settings(
    scale: str = "auto",
    sizes: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    batch: int | None = None,
    samples: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> ProfileSettings:
    """The settings of a scale, with what is given in their place.

    Args:
        sizes: model sizes. contexts: tokens of a sequence. dtypes: fp32 (IEEE products), tf32, bf16 (autocast).
        batch: sequences. samples: timed steps of each point.
    Raises:
        ValueError: an unknown name or a number out of range.
    """
    scale = resolve_scale(scale)
    given = {"sizes": sizes, "contexts": contexts, "dtypes": dtypes, "batch": batch, "samples": samples}
    values = _PRESETS[scale] | {key: value for key, value in given.items() if value is not None}
    for name, known in (("sizes", MODEL_SIZES), ("dtypes", DTYPES)):
        values[name] = tuple(values[name])
        for value in values[name]:
            if value not in known:
                raise unknown_name(name.removesuffix("s"), value, known)
    require(
        all(type(n) is int for n in values["contexts"]), f"contexts are {values['contexts']!r}; they must be integers"
    )
    for name in ("sizes", "contexts", "dtypes"):
        require(len(values[name]) > 0, f"{name} must not be empty")
    values["contexts"] = tuple(sorted(set(values["contexts"])))
    require(values["contexts"][0] >= 2, f"a context of {values['contexts'][0]} tokens; it must be at least 2")
    for name, least in (("batch", 1), ("samples", 3)):
        require(
            type(values[name]) is int and values[name] >= least,
            f"{name} is {values[name]!r}; it must be {least} or more",
        )
    resolved = resolve_device(device)
    require(
        resolved.type == "cuda" or "tf32" not in values["dtypes"], "tf32 is a format of GPUs; give dtypes fp32 or bf16"
    )
    return ProfileSettings(scale, device=device, seed=seed, **values)


# --- Ranges ---------------------------------------------------------------------------------------


def annotated_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """attention.reference.scaled_dot_prod_attention with a range around each of ATTENTION_PARTS. Shapes as there."""
    k, v = repeat_heads(q, k), repeat_heads(q, v)
    with phase("scores"):
        scores = q @ k.transpose(-2, -1)
    with phase("scale and mask"):
        scores = scores / math.sqrt(q.shape[-1]) if scale is None else scores * scale
        if causal:
            scores = scores.masked_fill(causal_mask(q.shape[-2], k.shape[-2], q.device), -math.inf)
    with phase("softmax"):
        probabilities = torch.softmax(scores, -1)
    with phase("values"):
        return probabilities @ v


@contextlib.contextmanager
def ranges(model: TransformerLM) -> Iterator[None]:
    """While it is open, each part of the model runs in a range of its name, and attention is annotated_attention."""
    parts: list[tuple[nn.Module, str]] = [(model.token_embeddings, "embedding")]
    for index, layer in enumerate(model.layers):
        parts.append((layer, f"layer {index}"))
        parts.append((layer.attn, "attention"))
        parts += [(linear, "projections") for linear in (layer.attn.qkv_proj, layer.attn.output_proj)]
    for module in model.modules():
        if isinstance(module, (RMSNorm, SwiGLU)):
            parts.append((module, "norm" if isinstance(module, RMSNorm) else "feed-forward"))
    open_ranges: list[Any] = []
    handles = []

    def enter(name: str) -> Callable:
        def hook(*_: Any) -> None:
            open_ranges.append(phase(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for module, name in parts:
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    attends = [layer.attn.attend for layer in model.layers]
    for layer in model.layers:
        layer.attn.attend = annotated_attention
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, attend in zip(model.layers, attends, strict=True):
            layer.attn.attend = attend


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

    Of an event this reads name(), device_type(), correlation_id(), linked_correlation_id(), sequence_nr(), start_thread_id(), start_ns()
    and end_ns().
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
    marked = {op.name: op for op in ops}
    phases = {name: marked[_PREFIX + name] for name in PHASES if _PREFIX + name in marked}
    assert phases, "the step marked no phase"
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


# --- The steps ------------------------------------------------------------------------------------


class Bench:
    """A model of one size with its optimizer, and the two kinds of step at any context and precision.

    Args:
        context_length: the longest.
    """

    def __init__(self, size: str, context_length: int, device: torch.device, seed: int):
        self.device = device
        self.config = model_size(size, context_length=context_length)
        torch.manual_seed(seed)
        with device:
            self.model = TransformerLM(self.config, attention_kernel="scaled_dot_prod_attention")
        self.optimizer = AdamW(parameter_groups(self.model, 0.1), lr=1e-4)

    def batch(self, batch: int, context_length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Random tokens and targets, (batch, context_length) each."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.config.vocab_size, (2, batch, context_length), generator=generator)
        return tuple(tokens.to(self.device))

    def step(self, mode: str, dtype: str, inputs: Tensor, targets: Tensor, mark: Callable = phase) -> None:
        """One forward pass without gradients, or one training step. mark: a context for each of PHASES."""
        training = mode == "training"
        with fp32_products("high" if dtype == "tf32" else "highest"), torch.set_grad_enabled(training):
            with autocast(self.device, dtype):
                with mark("forward"):
                    hidden = self.model.hidden(inputs)
                    with phase("head"):
                        logits = self.model.logits(hidden)
                if not training:
                    return
                with mark("loss"):
                    loss = cross_entropy(logits, targets)
            with mark("backward"):
                loss.backward()
            with mark("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    def timed(self, step: Callable[[Callable], None], samples: int) -> dict[str, list[float]]:
        """Milliseconds of each phase and of the whole, by the wall clock with the device waited for at each border."""
        times: dict[str, list[float]] = {}

        @contextlib.contextmanager
        def mark(name: str) -> Iterator[None]:
            start = self._now()
            yield
            times.setdefault(name, []).append((self._now() - start) * 1e3)

        for _ in range(samples):
            with mark(WHOLE):
                step(mark)
        return times

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


# --- Results --------------------------------------------------------------------------------------


def run(chosen: ProfileSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None):
    """Profile every point; write the three CSV files; return them as DataFrames: results, kernels, timeline."""
    device = resolve_device(chosen.device)
    stamp = {
        "method": {
            "timed": "time.perf_counter, the device waited for at each border of a phase; median, 20th and 80th percentile",
            "traced": "one step under torch.profiler" + (" with CUPTI" if device.type == "cuda" else ""),
            "warmup": "2 steps of each mode",
            "samples": chosen.samples,
            "attention": "scaled_dot_prod_attention, eager",
            "threads": "one" if device.type == "cpu" else "the host's",
        },
        "parameters": dataclasses.asdict(chosen),
    }
    results = records.ResultWriter(NAME, folder, **stamp, extra_columns=EXTRA_COLUMNS)
    kernels = records.ResultWriter(KERNELS, folder, **stamp)
    lanes = records.ResultWriter(TIMELINE, folder, **stamp)
    with settled(), results, kernels, lanes, one_thread(device.type == "cpu"):
        for size in chosen.sizes:
            for base, mode, times, traced in _points(chosen, size, device):
                for row in _result_rows(base, mode, times, traced):
                    results.write(row)
                    if on_row:
                        on_row(row)
                if traced is None:
                    continue
                shape = {key: base[key] for key in ("size", "context_length", "batch", "dtype")}
                for row in _kernel_rows(traced.kernels):
                    kernels.write(shape | {"mode": mode} | row)
                if mode == "training" and base["context_length"] == max(chosen.contexts):
                    for row in timeline_rows(traced.kernels):
                        lanes.write({key: base[key] for key in ("size", "context_length", "dtype")} | row)
    return tuple(records.read_results(writer.path) for writer in (results, kernels, lanes))


def _points(chosen: ProfileSettings, size: str, device: torch.device) -> Iterator[tuple]:
    """(what all rows say, mode, times, trace) of each point of a size; times is the note where memory ran out."""
    bench = None
    for dtype in chosen.dtypes:
        for context in chosen.contexts:
            base = {"size": size, "context_length": context, "batch": chosen.batch, "dtype": dtype}
            base["device"] = device_name(device)
            for mode in MODES:
                try:
                    if bench is None:
                        bench = Bench(size, max(chosen.contexts), device, chosen.seed)
                    yield base, mode, *_measured(bench, chosen, mode, dtype, context)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    note = str(error).splitlines()[0]
                    if bench is not None:
                        bench.optimizer.zero_grad(set_to_none=True)
                    yield base, mode, note, None
                release(device)


def _measured(bench: Bench, chosen: ProfileSettings, mode: str, dtype: str, context: int) -> tuple[dict, Trace]:
    inputs, targets = bench.batch(chosen.batch, context, chosen.seed)

    def step(mark: Callable = phase) -> None:
        bench.step(mode, dtype, inputs, targets, mark)

    for _ in range(2):
        step()
    times = bench.timed(step, chosen.samples)
    with ranges(bench.model):
        return times, trace(step, bench.device)


def _result_rows(
    base: dict[str, Any], mode: str, times: dict[str, list[float]] | str, traced: Trace | None
) -> Iterator[dict]:
    """A row for each phase, and one for the whole."""
    if traced is None:
        yield base | {"mode": mode, "phase": WHOLE, "status": "oom", "note": times}
        return
    for name in (*traced.phases_ms, WHOLE):
        kernels = [k for k in traced.kernels if name in (k.phase, WHOLE)]
        median, p20, p80 = quantiles(times[name])
        first, last = min(k.start_ms for k in kernels), max(k.start_ms + k.duration_ms for k in kernels)
        yield base | {
            "mode": mode,
            "phase": name,
            "status": "ok",
            "timed_ms": median,
            "p20_ms": p20,
            "p80_ms": p80,
            "samples": len(times[name]),
            "traced_ms": traced.phases_ms.get(name, last - first),
            "busy_ms": busy_ms(kernels),
            "kernels": len(kernels),
            "kernel_ms": sum(k.duration_ms for k in kernels),
            "matmul_ms": sum(k.duration_ms for k in kernels if k.category == MATMUL),
        }


def _kernel_rows(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Kernels of one phase, part, operator and name added up, the longest first."""
    sums: dict[tuple, list[float]] = {}
    for k in kernels:
        entry = sums.setdefault((k.phase, k.part, k.category, k.operator, k.name), [0, 0.0])
        entry[0] += 1
        entry[1] += k.duration_ms
    keys = ("phase", "part", "category", "operator", "name")
    rows = [
        dict(zip(keys, key, strict=True)) | {"count": count, "total_ms": total} for key, (count, total) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["total_ms"])


_LANES = {MATMUL: MATMUL, "softmax": "softmax"}  # the others share one
_OTHERS = "other kernels"
_LAYER = "layer"  # the lane of one layer's forward pass, kernel by kernel


def timeline_rows(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Intervals of a step for the figures: phases, three lanes of kernels joined where they touch, and one layer in detail."""
    length = max(k.start_ms + k.duration_ms for k in kernels)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for k in kernels:
        lane = _LANES.get(k.category, _OTHERS)
        found.setdefault((lane, lane), []).append((k.start_ms, k.start_ms + k.duration_ms))
    for name in PHASES:
        spans = [(k.start_ms, k.start_ms + k.duration_ms) for k in kernels if k.phase == name]
        if spans:
            found["phase", name] = [(min(start for start, _ in spans), max(end for _, end in spans))]
    rows = [
        {"lane": lane, "name": name, "start_ms": start, "duration_ms": end - start}
        for (lane, name), spans in found.items()
        for start, end in union(spans, length / 800)
    ]
    layers = {k.layer for k in kernels if k.layer is not None}
    middle = sorted(layers)[len(layers) // 2]
    rows += [
        {"lane": _LAYER, "name": f"{k.part}: {k.category}", "start_ms": k.start_ms, "duration_ms": k.duration_ms}
        for k in kernels
        if k.layer == middle and k.phase == "forward"
    ]
    return rows


def row_line(row: dict[str, Any]) -> str:
    """One line of progress."""
    name = f"{row['size']}, {row['context_length']} tokens, {row['dtype']}, {row['mode']}, {row['phase']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}"
    share = 100 * row["matmul_ms"] / row["kernel_ms"]
    return f"{name}: {row['timed_ms']:.4g} ms timed, {row['traced_ms']:.4g} ms traced, {share:.0f}% matrix products"


# --- Answers --------------------------------------------------------------------------------------

_POINT = ["size", "context_length", "dtype"]


def _title(point: Sequence[Any]) -> str:
    size, context, dtype = point
    return f"{size}, {context:,} tokens, {dtype}"


def _ok(results):
    return results[results.status == "ok"]


def _largest(frame) -> list[tuple]:
    """The longest context that ran, of each size and precision."""
    longest = frame.groupby(["size", "dtype"], sort=False).context_length.max()
    return [(size, context, dtype) for (size, dtype), context in longest.items()]


def _at(frame, point: Sequence[Any], **columns: str):
    """The rows of one point, and of one mode, phase or part where they are given."""
    for column, value in (*zip(_POINT, point, strict=True), *columns.items()):
        frame = frame[frame[column] == value]
    return frame


def _points_of(frame) -> list[tuple]:
    return list(frame[_POINT].drop_duplicates().itertuples(index=False, name=None))


def _kernel(results) -> str:
    """What is counted: kernels, or on a CPU operators."""
    from lmsys.device import cpu_name

    return "operator" if set(results.device) == {cpu_name()} else "kernel"


def short_name(name: str) -> str:
    """A kernel's name without its return type, namespaces and arguments, and not longer than 60 characters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").split("(")[0]
    name = re.sub(r"\w+::(?=\w)", "", name).removesuffix("::operator")
    name += ">" * (name.count("<") - name.count(">"))  # arguments inside of the template took its end along
    return name if len(name) <= 60 else f"{name[:57]}..."


def lost(kernels):
    """Which rows have an event of the tracer's own in the place of their operator."""
    return kernels.operator.astype(str).str.match(_NO_OPERATOR)


def known(kernels):
    """The rows, those that lost their operator as kernels of the same name elsewhere."""
    gone = lost(kernels) & (kernels.category == OTHER)
    usual = kernels[~gone].drop_duplicates("name").set_index("name").category
    return kernels.assign(category=kernels.category.where(~gone, kernels.name.map(usual).fillna(OTHER)))


def forward_table(results) -> str:
    """(a) The forward pass without gradients, timed and traced, at each point."""
    lines = []
    for point in _points_of(results):
        row = _at(results, point, mode="inference").iloc[-1]
        line = dict(zip(_POINT, point, strict=True)) | {"timed": row.status}
        if row.status == "ok":
            row = _at(results, point, mode="inference", phase="forward").iloc[0]
            line |= {
                "timed": records.spread(row.timed_ms, row.p20_ms, row.p80_ms),
                "traced": records.significant(row.traced_ms),
                "ratio": f"{row.traced_ms / row.timed_ms:.3f}",
                "busy": f"{100 * row.busy_ms / row.traced_ms:.1f}%",
                "kernels": f"{int(row.kernels):,}",
            }
        lines.append(line)
    columns = {
        "size": "size",
        "context_length": "tokens",
        "dtype": "precision",
        "timed": "timed, ms",
        "traced": "traced, ms",
    }
    return records.markdown_table(
        lines, columns | {"ratio": "traced / timed", "busy": "busy", "kernels": f"{_kernel(results)}s"}
    )


def answer_a(results, kernels) -> list[str]:
    """Total time of the forward pass against the timed one."""
    ok = _ok(results)
    sentences = []
    for point in _largest(ok[ok["mode"] == "inference"]):
        row = _at(ok, point, mode="inference", phase="forward").iloc[0]
        sentences.append(
            f"{_title(point)}: the forward pass takes {records.significant(row.timed_ms)} ms by the host's clock and "
            f"{records.significant(row.traced_ms)} ms in the trace, a ratio of {row.traced_ms / row.timed_ms:.2f}; "
            f"{_kernel(ok)}s run during {100 * row.busy_ms / row.traced_ms:.0f}% of it."
        )
    return sentences


def _top(kernels) -> tuple[str, int, float, str]:
    """Name, runs, ms and category of the kernel with the most time."""
    sums = kernels.groupby("name").agg(
        total=("total_ms", "sum"), count=("count", "sum"), category=("category", "first")
    )
    first = sums.total.idxmax()
    return first, int(sums["count"][first]), float(sums.total[first]), str(sums.category[first])


def top_table(results, kernels) -> str:
    """(b) The kernel with the most time in the forward pass, and in forward and backward together."""
    lines = []
    for point in _points_of(kernels):
        line = dict(zip(_POINT, point, strict=True))
        forward = _at(kernels, point, mode="inference")
        both = _at(kernels, point, mode="training")
        for key, rows in (("forward", forward), ("both", both[both.phase != "optimizer"])):
            if len(rows):
                name, count, total, _ = _top(rows)
                share = 100 * total / rows.total_ms.sum()
                line[key] = f"`{short_name(name)}` {count} x, {records.significant(total)} ms, {share:.0f}%"
        lines.append(line)
    columns = {"size": "size", "context_length": "tokens", "dtype": "precision", "forward": "forward alone"}
    return records.markdown_table(lines, columns | {"both": "forward and backward"})


def answer_b(results, kernels) -> list[str]:
    """The kernel with the most cumulative time."""
    sentences = []
    for point in _largest(kernels):
        forward = _at(kernels, point, mode="inference")
        both = _at(kernels, point, mode="training")
        both = both[both.phase != "optimizer"]
        name, count, total, kind = _top(forward)
        text = f"{_title(point)}: `{short_name(name)}` ({kind}), run {count} times, {records.significant(total)} ms"
        text += f" or {100 * total / forward.total_ms.sum():.0f}% of the forward pass's {_kernel(results)} time"
        if len(both):
            other = _top(both)
            same = "the same" if other[0] == name else f"`{short_name(other[0])}` ({other[3]})"
            text += f"; with the backward pass it is {same}, {other[1]} runs, {records.significant(other[2])} ms"
        sentences.append(text + ".")
    return sentences


def share_table(kernels, mode: str) -> str:
    """(c), (d) The share of each kind of kernel in the kernels' time, by point; kinds below 5% at all points together as the rest."""
    rows = kernels[kernels["mode"] == mode]
    sums = rows.pivot_table(
        index=_POINT, columns="category", values="total_ms", aggfunc="sum", fill_value=0.0, sort=False
    )
    shares = sums.div(sums.sum(axis=1), axis=0)
    kinds = [kind for kind in sums.sum().sort_values(ascending=False).index if shares[kind].max() >= 0.05]
    shares = shares[kinds].assign(rest=1 - shares[kinds].sum(axis=1)).loc[_points_of(rows)]
    lines = [
        dict(zip(_POINT, point, strict=True)) | {kind: f"{100 * share:.1f}%" for kind, share in row.items()}
        for point, row in shares.iterrows()
    ]
    columns = {"size": "size", "context_length": "tokens", "dtype": "precision"}
    return records.markdown_table(lines, columns | {kind: kind for kind in shares.columns})


def answer_c(results, kernels) -> list[str]:
    """Kernels other than matrix products in the forward pass."""
    sentences = []
    for point in _largest(kernels):
        forward = _at(kernels, point, mode="inference")
        others = forward[forward.category != MATMUL].groupby(["part", "category"]).total_ms.sum()
        largest = others.sort_values(ascending=False).head(4)
        listed = ", ".join(
            f"{kind} in {part} {100 * t / forward.total_ms.sum():.1f}%" for (part, kind), t in largest.items()
        )
        sentences.append(
            f"{_title(point)}: {100 * others.sum() / forward.total_ms.sum():.0f}% of the forward pass is not matrix products: {listed}."
        )
    return sentences


def _matmul_share(rows) -> float:
    return float(rows.total_ms[rows.category == MATMUL].sum() / rows.total_ms.sum())


def answer_d(results, kernels) -> list[str]:
    """Share of matrix products in inference and in a training step with AdamW."""
    sentences = []
    for point in _largest(kernels[kernels["mode"] == "training"]):
        inference, training = (_at(kernels, point, mode=mode) for mode in MODES)
        optimizer = training.total_ms[training.phase == "optimizer"].sum() / training.total_ms.sum()
        sentences.append(
            f"{_title(point)}: matrix products are {100 * _matmul_share(inference):.0f}% of inference and "
            f"{100 * _matmul_share(training):.0f}% of a training step, of which AdamW, which has none, is {100 * optimizer:.0f}%."
        )
    return sentences


def attention_rows(kernels, mode: str = "inference") -> list[dict[str, Any]]:
    """(e) Time and FLOPs of the matrix products and the softmax inside attention in the forward pass, all layers together.

    FLOPs: all scores are computed, hidden ones too; a softmax counts five an element.
    """
    found = []
    for point in _points_of(kernels):
        rows = _at(kernels, point, mode=mode, phase="forward")
        products = rows[rows.part.isin(("scores", "values")) & (rows.category == MATMUL)].total_ms.sum()
        softmax = rows[rows.part == "softmax"].total_ms.sum()
        if not (products > 0 and softmax > 0):
            continue
        size, context, _ = point
        config, batch = model_size(size, context_length=context), int(rows.batch.iloc[0])
        elements = config.num_layers * batch * config.num_heads * context**2
        flops = config.num_layers * cost.attention_flops(
            batch, config.num_heads, context, context, config.head_dim, False, "forward"
        )
        found.append(
            dict(zip(_POINT, point, strict=True))
            | {
                "matmul_ms": products,
                "mask_ms": rows[rows.part == "scale and mask"].total_ms.sum(),
                "softmax_ms": softmax,
                "matmul_gflop": flops / 1e9,
                "softmax_gflop": _SOFTMAX_FLOPS * elements / 1e9,
            }
        )
    return found


def attention_table(kernels) -> str:
    """(e) as a table."""
    lines = [
        {key: row[key] for key in _POINT}
        | {key: records.significant(row[key]) for key in ("matmul_ms", "mask_ms", "softmax_ms")}
        | {
            "time": f"{row['softmax_ms'] / row['matmul_ms']:.2f}",
            "flops": f"{row['softmax_gflop'] / row['matmul_gflop']:.4f}",
            "rates": f"{row['matmul_gflop'] / row['matmul_ms']:.3g} / {row['softmax_gflop'] / row['softmax_ms']:.3g}",
        }
        for row in attention_rows(kernels)
    ]
    columns = {"size": "size", "context_length": "tokens", "dtype": "precision", "matmul_ms": "products, ms"}
    columns |= {"mask_ms": "scale and mask, ms", "softmax_ms": "softmax, ms", "time": "softmax / products, time"}
    return records.markdown_table(lines, columns | {"flops": "the same, FLOPs", "rates": "TFLOP/s of each"})


def answer_e(results, kernels) -> list[str]:
    """Softmax against matrix products in attention: time and FLOPs."""
    rows = {tuple(row[key] for key in _POINT): row for row in attention_rows(kernels)}
    sentences = []
    for point in _largest(kernels):
        if point in rows:
            row = rows[point]
            time_ratio, flop_ratio = row["softmax_ms"] / row["matmul_ms"], row["softmax_gflop"] / row["matmul_gflop"]
            sentences.append(
                f"{_title(point)}: the softmax takes {time_ratio:.2f} times as long as the two products, with "
                f"{100 * flop_ratio:.1f}% of their FLOPs: {time_ratio / flop_ratio:,.0f} times the time a FLOP."
            )
    return sentences


ANSWERS: dict[str, tuple[str, Callable[[Any, Any], list[str]]]] = {
    "a": ("Total time of the forward pass, against the timed one", answer_a),
    "b": ("The kernel with the most cumulative time", answer_b),
    "c": ("Kernels other than matrix products in the forward pass", answer_c),
    "d": ("Matrix products in inference and in a training step with AdamW", answer_d),
    "e": ("Softmax against matrix products in attention", answer_e),
}


def figures(results, kernels, lanes, folder: str | Path) -> dict[str, Path]:
    """The figures as PNG files in folder, by name."""
    from lmsys import plots

    made = {"share": plots.profile_share(kernels)}
    if attention := attention_rows(kernels):
        made["attention"] = plots.profile_attention(attention)
    if len(lanes):
        made |= {"timeline": plots.profile_timeline(lanes), "layer": plots.profile_layer(lanes)}
    return {name: plots.save(figure, Path(folder) / f"profiling_{name}.png") for name, figure in made.items()}


def write_report(results, kernels, folder: str | Path) -> Path:
    """profiling_report.md: the answers with their tables."""
    text = [
        "# Profile of the forward pass and of a training step",
        f"On {results.device.iloc[0]}.",
        forward_table(results),
    ]
    tables = {
        "b": top_table(results, kernels),
        "c": share_table(kernels, "inference"),
        "d": share_table(kernels, "training"),
    }
    tables["e"] = attention_table(kernels)
    for letter, (title, answer) in ANSWERS.items():
        text.append(f"## ({letter}) {title}")
        text.append("\n".join(f"- {sentence}" for sentence in answer(results, kernels)))
        if letter in tables:
            text.append(tables[letter])
    return records.write_text(Path(folder) / "profiling_report.md", "\n\n".join(part.rstrip() for part in text) + "\n")


# --- Nsight Systems -------------------------------------------------------------------------------

# nsys's reports that answer the same questions: kernels by time, and by the innermost range that launched them.
_NSYS_REPORTS = ("cuda_gpu_kern_sum", "nvtx_kern_sum")


def nsys_commands(chosen: ProfileSettings) -> list[str]:
    """For each size at the longest context: steps with their NVTX ranges under `nsys profile`, and the summaries of what it wrote."""
    commands = []
    for size in chosen.sizes:
        name = f"profile-{size}-{chosen.contexts[-1]}"
        commands.append(
            f"nsys profile --trace=cuda,nvtx --force-overwrite=true --output={name} "
            f"python -m lmsys benchmark --sizes {size} --contexts {chosen.contexts[-1]} --modes forward full_step "
            f"--dtypes {chosen.dtypes[-1]} --batch_size {chosen.batch} --attention_kernels scaled_dot_prod_attention --nvtx"
        )
        commands += [f"nsys stats --report {report} {name}.nsys-rep" for report in _NSYS_REPORTS]
    return commands
