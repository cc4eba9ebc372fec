"""Where the time of a forward pass and of a training step goes: kernels by phase, part of the model and kind, from
PyTorch's profiler.

Answers the problem nsys_profile of Stanford CS336, assignment 2, which reads the same from NVIDIA's Nsight Systems.
While a step is traced, hooks put a range around each module of lmsys.model.TransformerLM, and attention is the formula
with a range around each operation; bench/traces.py traces each kernel back to them. What a CPU's scale profiles runs on
one thread: it is too small to share.

Limits: eager execution (a compiled block is one operator). Tracing slows the host down, so a traced step of a small
model is longer than a timed one; the times of kernels are the device's own. A phase's kernels are those launched in it,
whenever they ran.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lmsys import cost
from lmsys.attention.reference import causal_mask, repeat_heads
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, require_names, require_numbers
from lmsys.bench.measure import one_thread, quantiles
from lmsys.bench.repeated import RepeatedStep, at_hand
from lmsys.bench.traces import MATMUL, PHASES, busy_ms, phase, trace, union
from lmsys.config import MODEL_SIZES, model_size, require
from lmsys.device import fp32_products, resolve_device
from lmsys.model import RMSNorm, SwiGLU, TransformerLM

DTYPES = ("fp32", "tf32", "bf16")
MODES = ("inference", "training")
WHOLE = "step"  # all phases of a mode together
_SOFTMAX_FLOPS = 5  # an element: maximum, difference, exponential, sum, quotient


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
    """attention.reference.scaled_dot_prod_attention with a range around each operation. Shapes as there."""
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
        parts += [(layer, f"layer {index}"), (layer.attn, "attention")]
        parts += [(linear, "projections") for linear in (layer.attn.qkv_proj, layer.attn.output_proj)]
    for module in model.modules():
        if isinstance(module, (RMSNorm, SwiGLU)):
            parts.append((module, "norm" if isinstance(module, RMSNorm) else "feed-forward"))
    open_ranges: list[Any] = []
    logits = model.logits

    def enter(name: str) -> Callable:
        def hook(*_: Any) -> None:
            open_ranges.append(phase(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    def head(*args: Any) -> Tensor:
        with phase("head"):
            return logits(*args)

    with contextlib.ExitStack() as stack:
        for module, name in parts:
            stack.callback(module.register_forward_pre_hook(enter(name)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(mock.patch.object(model, "logits", head))
        for layer in model.layers:
            stack.enter_context(mock.patch.object(layer.attn, "attend", annotated_attention))
        yield


class Subject(RepeatedStep):
    """The trainer's engine at one size and precision, and the two kinds of step at any context up to the longest."""

    def __init__(self, size: str, dtype: str, p: Parameters):
        train = {"dtype": "bf16" if dtype == "bf16" else "fp32", "attention_kernel": "scaled_dot_prod_attention"}
        train |= {"device": p.device, "seed": p.seed, "batch_size": p.batch}
        super().__init__(model_size(size, context_length=p.contexts[-1]), **train)
        self.precision = "high" if dtype == "tf32" else "highest"

    def step(self, mode: str, batch: tuple[Tensor, Tensor], mark: Callable = phase) -> None:
        """One forward pass without gradients, or one step of the trainer. mark: a context for each of PHASES."""
        plain_loss = self.engine.loss_function

        def loss_function(logits: Tensor, targets: Tensor) -> Tensor:
            with mark("loss"):
                return plain_loss(logits, targets)

        with fp32_products(self.precision), mock.patch.object(self.engine, "loss_function", loss_function):
            self.run(mode == "training", batch, mark, 1e-4)

    def timed(self, step: Callable[[Callable], None], samples: int) -> dict[str, list[float]]:
        """Milliseconds of each phase and of the whole, by the wall clock, the device waited for at each border."""
        sample: dict[str, float] = {}

        def now() -> float:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.perf_counter()

        @contextlib.contextmanager
        def mark(name: str) -> Iterator[None]:
            start = now()
            yield
            sample[name] = sample.get(name, 0.0) + (now() - start) * 1e3

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
    import pandas as pd

    device, size, dtype = resolve_device(p.device), point["size"], point["dtype"]
    with one_thread(device.type == "cpu"):
        subject = at_hand(("profile", size, dtype, p), lambda: Subject(size, dtype, p), device)
        batch = subject.batch(point["batch"], point["context_length"])

        def step(mark: Callable = phase) -> None:
            subject.step(point["mode"], batch, mark)

        for _ in range(2):
            step()
        times = subject.timed(step, p.samples)
        with ranges(subject.engine.model):
            kernels, phases_ms = trace(step, device)
    rows = []
    for name in (*phases_ms, WHOLE):
        inside = [k for k in kernels if name in (k.phase, WHOLE)]
        median, p20, p80 = quantiles(times[name])
        row = {"phase": name, "timed_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(times[name])}
        whole_ms = max(k.end_ms for k in inside) - min(k.start_ms for k in inside)
        row |= {"traced_ms": phases_ms.get(name, whole_ms), "busy_ms": busy_ms(inside), "kernels": len(inside)}
        row["kernel_ms"] = sum(k.duration_ms for k in inside)
        rows.append(row | {"matmul_ms": sum(k.duration_ms for k in inside if k.category == MATMUL)})
    frame = pd.DataFrame([vars(k) | {"category": k.category, "end_ms": k.end_ms} for k in kernels])
    same = frame.groupby(["phase", "part", "category", "operator", "name"], sort=False).duration_ms
    sums = same.agg(count="count", total_ms="sum").reset_index()
    sums = sums.sort_values("total_ms", ascending=False, kind="stable")
    tables = {"profiling_kernels": sums.assign(**point).to_dict("records")}
    if point["mode"] == "training" and point["context_length"] == p.contexts[-1]:
        tables["profiling_timeline"] = [point | row for row in timeline_rows(frame)]
    return Measured(rows, tables)


def timeline_rows(kernels) -> list[dict[str, Any]]:
    """Intervals of a step's kernels for the figures: the phases, three lanes of kernels joined where they touch, and
    one layer's forward pass kernel by kernel.
    """
    spans = {}
    for category, group in kernels.groupby("category", sort=False):
        lane = category if category in (MATMUL, "softmax") else "other kernels"
        spans.setdefault((lane, lane), []).extend(zip(group.start_ms, group.end_ms, strict=True))
    for name, group in kernels.groupby("phase", sort=False):
        spans["phase", name] = [(group.start_ms.min(), group.end_ms.max())]
    rows = [
        {"lane": lane, "name": name, "start_ms": start, "duration_ms": end - start}
        for (lane, name), each in spans.items()
        for start, end in union(each, kernels.end_ms.max() / 800)
    ]
    layers = kernels.layer.dropna().unique()
    layer = kernels[(kernels.layer == sorted(layers)[len(layers) // 2]) & (kernels.phase == "forward")]
    layer = layer.assign(lane="layer", name=layer.part + ": " + layer.category)
    return rows + layer[["lane", "name", "start_ms", "duration_ms"]].to_dict("records")


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
    """(b) The kernel with the most time of each point and mode, without the optimizer: runs, ms, share of all."""
    rows = kernels[kernels.phase != "optimizer"]
    sums = rows.groupby([*POINT, "mode", "name", "category"], sort=False)[["count", "total_ms"]].sum().reset_index()
    sums["share"] = sums.total_ms / sums.groupby([*POINT, "mode"]).total_ms.transform("sum")
    top = sums.loc[sums.groupby([*POINT, "mode"], sort=False).total_ms.idxmax()]
    return top.assign(name=[f"`{short_name(name)}`" for name in top.name])


def shares(kernels, mode: str, least: float = 0.05):
    """(c), (d) The share of each kind in the kernels' time, by point. Kinds below `least` everywhere are `rest`."""
    rows = kernels[kernels["mode"] == mode]
    sums = rows.pivot_table("total_ms", POINT, "category", aggfunc="sum", fill_value=0.0, sort=False)
    share = sums.div(sums.sum(axis=1), axis=0)
    kinds = [kind for kind in sums.sum().sort_values(ascending=False).index if share[kind].max() >= least]
    return share[kinds].assign(rest=1 - share[kinds].sum(axis=1)).reset_index()


def attention_rows(kernels):
    """(e) Time and FLOPs of the matmuls and the softmax inside attention in inference, all layers together.

    FLOPs: all scores are computed, hidden ones too; a softmax counts five an element.
    """
    import pandas as pd

    found = []
    rows = kernels[(kernels["mode"] == "inference") & (kernels.phase == "forward")]
    for (size, context, dtype, batch), part in rows.groupby([*POINT, "batch"], sort=False):
        matmuls = part[part.part.isin(("scores", "values")) & (part.category == MATMUL)].total_ms.sum()
        softmax = part[part.part == "softmax"].total_ms.sum()
        if not (matmuls > 0 and softmax > 0):
            continue
        config = model_size(size, context_length=int(context))
        shape = (int(batch), config.num_heads, int(context), int(context), config.head_dim)
        flops = config.num_layers * cost.attention_flops(*shape, False, "forward")
        softmax_flops = _SOFTMAX_FLOPS * config.num_layers * int(batch) * config.num_heads * int(context) ** 2
        row = {"size": size, "context_length": context, "dtype": dtype, "matmul_ms": matmuls}
        row["mask_ms"] = part[part.part == "scale and mask"].total_ms.sum()
        row |= {"softmax_ms": softmax, "time ratio": softmax / matmuls, "FLOP ratio": softmax_flops / flops}
        row |= {"matmul TFLOP/s": flops / matmuls / 1e9, "softmax TFLOP/s": softmax_flops / softmax / 1e9}
        found.append(row)
    return pd.DataFrame(found)


def nsys_commands(p: Parameters) -> list[str]:
    """For each size at the longest context: steps with NVTX ranges under `nsys profile`, and two summaries of what it
    wrote: kernels by time, and by the innermost range that launched them.
    """
    commands = []
    for size in p.sizes:
        name = f"profile-{size}-{p.contexts[-1]}"
        commands.append(
            f"nsys profile --trace=cuda,nvtx --force-overwrite=true --output={name} "
            f"python -m lmsys benchmark --sizes {size} --contexts {p.contexts[-1]} --modes forward full_step "
            f"--dtypes {p.dtypes[-1]} --batch_size {p.batch} --attention_kernels scaled_dot_prod_attention --nvtx"
        )
        commands += [
            f"nsys stats --report {report} {name}.nsys-rep" for report in ("cuda_gpu_kern_sum", "nvtx_kern_sum")
        ]
    return commands
