"""Where the time of a forward pass and of a training step goes: kernels by phase, part of the model and kind, from
PyTorch's profiler.

Answers the problem nsys_profile of Stanford CS336, assignment 2, which reads the same from NVIDIA's Nsight Systems.
While a step is traced, hooks put a range around each module of lmsys.model.TransformerLM, and attention is the formula
with a range around each operation (the same operations as attention.reference.scaled_dot_prod_attention, an operation a
line). Each kernel is then traced back:
bench/traces.py traces each kernel back to them. What a CPU's scale profiles runs on one thread: it is too small to
share.

Limits: eager execution (a compiled block is one operator). Tracing slows the host down, so a traced step of a small
model is longer than a timed one; the times of kernels are the device's own. A phase's kernels are those launched in it,
whenever they ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lmsys import cost
from lmsys.attention.reference import causal_mask, repeat_heads
from lmsys.bench.experiment import (
    Experiment,
    Measured,
    Notebook,
    Parameters,
    Point,
    Row,
    require_names,
    require_numbers,
)
from lmsys.bench.measure import Repeated, one_thread, quantiles, release
from lmsys.bench.timeline import phase, union
from lmsys.bench.traces import MATMUL, PHASES, Kernel, Trace, busy_ms, trace
from lmsys.config import MODEL_SIZES, PipelineConfig, build, model_size, require
from lmsys.device import fp32_products as fp32_matmuls
from lmsys.device import resolve_device
from lmsys.model import RMSNorm, SwiGLU, TransformerLM
from lmsys.train.engine import Engine, autocast

DTYPES = ("fp32", "tf32", "bf16")
MODES = ("inference", "training")
WHOLE = "step"  # all phases of a mode together
ATTENTION_PARTS = ("scores", "scale and mask", "softmax", "values")
_SOFTMAX_FLOPS = 5  # an element: maximum, difference, exponential, sum, quotient

# --- What is profiled -----------------------------------------------------------------------------


def check(p: Parameters) -> None:
    """Raises ValueError: an unknown name or a number out of range."""
    require_names(p, {"sizes": MODEL_SIZES, "dtypes": DTYPES})
    require(len(p.contexts) > 0, "contexts must not be empty")
    require_numbers(p, {"contexts": 2, "batch": 1, "samples": 3})
    p.contexts = sorted(set(p.contexts))
    gpu = resolve_device(p.device).type == "cuda"
    require(gpu or "tf32" not in p.dtypes, "tf32 is a format of GPUs; give dtypes fp32 or bf16")


NOTEBOOK = Notebook("profiling", check)


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
    logits = model.logits

    def head(*args: Any) -> Tensor:
        with phase("head"):
            return logits(*args)

    model.logits = head
    attends = [layer.attn.attend for layer in model.layers]
    for layer in model.layers:
        layer.attn.attend = annotated_attention
    try:
        yield
    finally:
        del model.logits  # the class's again
        for handle in handles:
            handle.remove()
        for layer, attend in zip(model.layers, attends, strict=True):
            layer.attn.attend = attend


# --- The steps ------------------------------------------------------------------------------------


class Subject:
    """The trainer's engine at one size and precision, and the two kinds of step at any context up to the longest."""

    def __init__(self, size: str, dtype: str, p: Parameters):
        self.device, self.precision = resolve_device(p.device), "high" if dtype == "tf32" else "highest"
        model = dataclasses.asdict(model_size(size, context_length=p.contexts[-1]))
        train = {"dtype": "bf16" if dtype == "bf16" else "fp32", "attention_kernel": "scaled_dot_prod_attention"}
        train |= {"device": p.device, "seed": p.seed, "batch_size": p.batch}
        self.engine = Engine(build(PipelineConfig, {"model": model, "train": train}), self.device)
        self.plain_loss = self.engine.loss_function
        self.seed, self.vocab_size = p.seed, model["vocab_size"]

    def batch(self, batch: int, context_length: int) -> tuple[Tensor, Tensor]:
        """Random tokens and targets, (batch, context_length) each."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(self.vocab_size, (2, batch, context_length), generator=generator)
        return tuple(tokens.to(self.device))

    def step(self, mode: str, batch: tuple[Tensor, Tensor], mark: Callable = phase) -> None:
        """One forward pass without gradients, or one step of the trainer. mark: a context for each of PHASES."""
        engine = self.engine
        engine.phase = mark

        def loss_function(logits: Tensor, targets: Tensor) -> Tensor:
            with mark("loss"):
                return self.plain_loss(logits, targets)

        with fp32_matmuls(self.precision):
            if mode == "inference":
                with mark("forward"), torch.no_grad(), autocast(self.device, engine.config.train.dtype):
                    engine.model(batch[0])
                return
            with mock.patch.object(engine, "loss_function", loss_function):
                engine.accumulate(Repeated(batch))
            engine.update(1e-4)

    def timed(self, step: Callable[[Callable], None], samples: int) -> dict[str, list[float]]:
        """Milliseconds of each phase and of the whole, by the wall clock, the device waited for at each border."""
        sample: dict[str, float] = {}

        @contextlib.contextmanager
        def mark(name: str) -> Iterator[None]:
            start = self._now()
            yield
            sample[name] = sample.get(name, 0.0) + (self._now() - start) * 1e3

        times: dict[str, list[float]] = {}
        for _ in range(samples):
            sample.clear()
            with mark(WHOLE):
                step(mark)
            sample["forward"] -= sample.get("loss", 0.0)  # is within the forward pass, and counted by itself
            for name in (*PHASES, WHOLE):
                if name in sample:
                    times.setdefault(name, []).append(sample[name])
        return times

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_subjects: dict[tuple[str, str], Subject] = {}  # the one at hand


def subject_of(point: Point, p: Parameters) -> Subject:
    """The point's subject, made anew where the one at hand is another."""
    key = point["size"], point["dtype"]
    if key not in _subjects or _subjects[key].seed != p.seed:
        _subjects.clear()  # its memory first
        release(resolve_device(p.device))
        _subjects[key] = Subject(*key, p)
    return _subjects[key]


# --- Results --------------------------------------------------------------------------------------


def points(p: Parameters) -> list[Point]:
    return [
        {"size": size, "context_length": context, "batch": p.batch, "dtype": dtype, "mode": mode}
        for size in p.sizes
        for dtype in p.dtypes
        for context in p.contexts
        for mode in MODES
    ]


def measure_point(point: Point, p: Parameters) -> Measured:
    """Timed first, without ranges, then traced: a row for each phase, and one for the whole."""
    with one_thread(resolve_device(p.device).type == "cpu"):
        try:
            times, traced = _measured(subject_of(point, p), point, p)
        except Exception:
            _subjects.clear()  # gradients of a step that did not end
            raise
    shape = {key: point[key] for key in ("size", "context_length", "batch", "dtype", "mode")}
    tables = {"profiling_kernels": [shape | row for row in _kernel_rows(traced.kernels)]}
    if point["mode"] == "training" and point["context_length"] == p.contexts[-1]:
        shape = {key: point[key] for key in ("size", "context_length", "dtype")}
        tables["profiling_timeline"] = [shape | row for row in timeline_rows(traced.kernels)]
    return Measured(list(_result_rows(times, traced)), tables)


def _measured(subject: Subject, point: Point, p: Parameters) -> tuple[dict[str, list[float]], Trace]:
    batch = subject.batch(point["batch"], point["context_length"])

    def step(mark: Callable = phase) -> None:
        subject.step(point["mode"], batch, mark)

    for _ in range(2):
        step()
    times = subject.timed(step, p.samples)
    with ranges(subject.engine.model):
        return times, trace(step, subject.device)


def _result_rows(times: dict[str, list[float]], traced: Trace) -> Iterator[Row]:
    for name in (*traced.phases_ms, WHOLE):
        kernels = [k for k in traced.kernels if name in (k.phase, WHOLE)]
        median, p20, p80 = quantiles(times[name])
        first, last = min(k.start_ms for k in kernels), max(k.start_ms + k.duration_ms for k in kernels)
        yield {
            "phase": name,
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
    """Intervals of a step for the figures.

    Phases, three lanes of kernels joined where they touch, and one layer in detail.
    """
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


PROFILE = Experiment(
    name="profiling_results",
    columns=(
        *("size", "context_length", "batch", "dtype", "mode", "phase", "status", "timed_ms", "p20_ms", "p80_ms"),
        *("samples", "traced_ms", "busy_ms", "kernels", "kernel_ms", "matmul_ms", "device", "note"),
    ),
    points=points,
    measure=measure_point,
    method=lambda p: {
        "timed": "time.perf_counter, the device waited for at each border of a phase; median, 20th and 80th percentile",
        "traced": "one step under torch.profiler" + (" with CUPTI" * (resolve_device(p.device).type == "cuda")),
        "warmup": "2 steps of each mode",
        "samples": p.samples,
        "step": "the trainer's, eager, attention scaled_dot_prod_attention",
        "threads": "one" if resolve_device(p.device).type == "cpu" else "the host's",
    },
    tables={
        "profiling_kernels": (
            *("size", "context_length", "batch", "dtype", "mode", "phase", "part", "category", "operator", "name"),
            *("count", "total_ms"),
        ),
        "profiling_timeline": ("size", "context_length", "dtype", "lane", "name", "start_ms", "duration_ms"),
    },
)


# --- Answers --------------------------------------------------------------------------------------

POINT = ["size", "context_length", "dtype"]


def short_name(name: str) -> str:
    """A kernel's name without its return type, namespaces and arguments, and not longer than 60 characters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").split("(")[0]
    name = re.sub(r"\w+::(?=\w)", "", name).removesuffix("::operator")
    name += ">" * (name.count("<") - name.count(">"))  # arguments inside of the template took its end along
    return name if len(name) <= 60 else f"{name[:57]}..."


def top_kernels(kernels):
    """(b) The kernel with the most time of each point and mode, without the optimizer.

    Runs, ms, share of all kernels.
    """
    rows = kernels[kernels.phase != "optimizer"]
    sums = rows.groupby([*POINT, "mode", "name", "category"], sort=False)[["count", "total_ms"]].sum().reset_index()
    sums["share"] = sums.total_ms / sums.groupby([*POINT, "mode"]).total_ms.transform("sum")
    top = sums.loc[sums.groupby([*POINT, "mode"], sort=False).total_ms.idxmax()]
    return top.assign(name=[f"`{short_name(name)}`" for name in top.name])


def shares(kernels, mode: str, least: float = 0.05):
    """(c), (d) The share of each kind of kernel in the kernels' time, by point.

    Kinds below `least` everywhere are `rest`.
    """
    rows = kernels[kernels["mode"] == mode]
    sums = rows.pivot_table(
        index=POINT, columns="category", values="total_ms", aggfunc="sum", fill_value=0.0, sort=False
    )
    share = sums.div(sums.sum(axis=1), axis=0)
    kinds = [kind for kind in sums.sum().sort_values(ascending=False).index if share[kind].max() >= least]
    return share[kinds].assign(rest=1 - share[kinds].sum(axis=1)).reset_index()


def attention_rows(kernels, mode: str = "inference"):
    """(e) Time and FLOPs of the matmuls and the softmax inside attention in the forward pass, all layers together.

    FLOPs: all scores are computed, hidden ones too; a softmax counts five an element.
    """
    import pandas as pd

    found = []
    rows = kernels[(kernels["mode"] == mode) & (kernels.phase == "forward")]
    for (size, context, dtype, batch), part in rows.groupby([*POINT, "batch"], sort=False):
        matmuls = part[part.part.isin(("scores", "values")) & (part.category == MATMUL)].total_ms.sum()
        softmax = part[part.part == "softmax"].total_ms.sum()
        if not (matmuls > 0 and softmax > 0):
            continue
        config = model_size(size, context_length=int(context))
        shape = (int(batch), config.num_heads, int(context), int(context), config.head_dim)
        flops = config.num_layers * cost.attention_flops(*shape, False, "forward")
        softmax_flops = _SOFTMAX_FLOPS * config.num_layers * int(batch) * config.num_heads * int(context) ** 2
        found.append(
            {
                "size": size,
                "context_length": context,
                "dtype": dtype,
                "matmul_ms": matmuls,
                "mask_ms": part[part.part == "scale and mask"].total_ms.sum(),
                "softmax_ms": softmax,
                "time ratio": softmax / matmuls,
                "FLOP ratio": softmax_flops / flops,
                "matmul TFLOP/s": flops / matmuls / 1e9,
                "softmax TFLOP/s": softmax_flops / softmax / 1e9,
            }
        )
    return pd.DataFrame(found)


# --- Nsight Systems -------------------------------------------------------------------------------

# nsys's reports that answer the same questions: kernels by time, and by the innermost range that launched them.
_NSYS_REPORTS = ("cuda_gpu_kern_sum", "nvtx_kern_sum")


def nsys_commands(p: Parameters) -> list[str]:
    """For each size at the longest context.

    Steps with their NVTX ranges under `nsys profile`, and the summaries of what it wrote.
    """
    commands = []
    for size in p.sizes:
        name = f"profile-{size}-{p.contexts[-1]}"
        commands.append(
            f"nsys profile --trace=cuda,nvtx --force-overwrite=true --output={name} "
            f"python -m lmsys benchmark --sizes {size} --contexts {p.contexts[-1]} --modes forward full_step "
            f"--dtypes {p.dtypes[-1]} --batch_size {p.batch} --attention_kernels scaled_dot_prod_attention --nvtx"
        )
        commands += [f"nsys stats --report {report} {name}.nsys-rep" for report in _NSYS_REPORTS]
    return commands
