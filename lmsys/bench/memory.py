"""Where the memory of a training step goes, and what activation checkpointing saves of it.

The step is the trainer's, at learning rate 0, so that every step computes the same numbers; its allocations are
recorded by bench/allocations.py. Answers memory_profiling and gradient_checkpointing of Stanford CS336, assignment 2,
and section 3.1 of its 2026 edition (autograd residuals). The course's xl of 2026 (d_model 2560, 32 layers) is the 2.7b
of 2025, one shape.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lmsys import cost
from lmsys.attention import KERNELS
from lmsys.bench import allocations, experiment
from lmsys.bench.allocations import Recording, Timeline
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, Row
from lmsys.bench.measure import one_thread, quantiles, release
from lmsys.bench.processes import clocked_ms
from lmsys.bench.repeated import RepeatedStep, at_hand
from lmsys.config import DTYPES, MODEL_SIZES, ModelConfig, model_size, require, unknown_name, with_train
from lmsys.device import device_name, fp32_products, resolve_device
from lmsys.model import RMSNorm, TransformerLM
from lmsys.train.engine import autocast

MODES = ("forward", "full_step")
_CACHED = " cached"
_SCORES = ("vectorized_torch",)  # kernels whose T x T tensors cost.block_residuals counts; those of _FUSED keep none
_FUSED = ("flash_attention_triton",)


def check(p: Parameters) -> None:
    """Raises ValueError: an unknown name or a number out of range."""
    experiment.require_names(p, {"size": MODEL_SIZES, "kernels": KERNELS, "dtypes": DTYPES, "dtype": DTYPES})
    for name in ("contexts", "timeline_contexts", "strategies"):
        require(len(getattr(p, name)) > 0, f"{name} must not be empty")
    experiment.require_numbers(p, {"contexts": 2, "timeline_contexts": 2, "batch": 1, "steps": 1, "vocab_size": 1})
    for name in p.strategies:
        if name not in ("none", "nested") and not re.fullmatch(r"[1-9]\d*( cached)?", name):
            raise unknown_name("checkpointing strategy", name, ("none", "nested", "1", "2", "4", "1 cached"))
    resolve_device(p.device)


NOTEBOOK = Notebook("memory", check)


def model_of(p: Parameters) -> ModelConfig:
    """The model of all studies: as long as the longest context."""
    return model_size(p.size, vocab_size=p.vocab_size, context_length=max(*p.contexts, *p.timeline_contexts))


# --- A step, recorded -----------------------------------------------------------------------------


class Subject(RepeatedStep):
    """The trainer's engine, whose steps are recorded and timed at any context, precision and kernel."""

    def __init__(self, p: Parameters):
        # The fused optimizer works in place. It is a Triton kernel, for a GPU.
        train = {"attention_kernel": p.kernels[-1], "fused_optimizer": resolve_device(p.device).type == "cuda"}
        super().__init__(model_of(p), device=p.device, seed=p.seed, batch_size=p.batch, **train)
        self.p, self.model = p, self.engine.model

    @contextlib.contextmanager
    def set(self, dtype: str, kernel: str | None = None, cached: bool = True) -> Iterator[None]:
        """Within the block, steps of this precision and kernel. Autocast's cache, unless cached is False, keeps every
        weight that it has cast until the forward pass ends."""
        self.engine.config = with_train(self.engine.config, dtype=dtype)
        self.model.set_attention_kernel(kernel or self.p.kernels[-1])
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(cached)
        precision = "high" if self.device.type == "cuda" else None
        try:
            with fp32_products(precision), one_thread(self.device.type == "cpu"):
                yield
        finally:
            torch.set_autocast_cache_enabled(before)
            self.model.set_attention_kernel(self.p.kernels[-1])

    def step(self, mode: str, batch: tuple[Tensor, Tensor], mark: Callable[[str], Any] = lambda name: None) -> Any:
        """A forward pass without autograd, or a step of the trainer and its loss; mark(name) where its phases end."""

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            yield
            if name in allocations.ENDS:
                mark(allocations.ENDS[name])

        return self.run(mode == "full_step", batch, phase)

    def held(self) -> dict[str, int]:
        """Bytes there between steps, by category."""
        state = self.engine.optimizer.state.values()
        moments = (value for each in state for value in each.values() if isinstance(value, Tensor))
        found = {"parameters": _storage_bytes(self.model.parameters()), "optimizer": _storage_bytes(moments)}
        if self.device.type == "cuda":
            found["other"] = torch.cuda.memory_allocated(self.device) - sum(found.values())
        return found

    def settled(self, mode: str, context_length: int) -> tuple[Tensor, Tensor]:
        """A batch, after a step of it that is not recorded. A forward pass has no optimizer state, as inference has."""
        batch = self.batch(self.p.batch, context_length)
        if mode == "forward":
            self.engine.optimizer.state.clear()
        self.step(mode, batch)
        if self.device.type == "cuda":
            release(self.device)
        return batch

    def timeline(self, mode: str, context_length: int, *, stacks: bool = False) -> Timeline:
        """Record a step after one that is not; marks at its phases and around every block."""
        batch, held, addresses = self.settled(mode, context_length), self.held(), set()
        with allocations.recording(self.device, stacks=stacks) as record, _block_marks(self.model, record):

            def mark(name: str) -> None:
                record.mark(name)
                if name == allocations.BACKWARD_END:
                    grads = (parameter.grad for parameter in self.model.parameters())
                    addresses.update(grad.untyped_storage().data_ptr() for grad in grads if grad is not None)

            peak = self._allocator_peak(lambda: self.step(mode, batch, mark))
        return Timeline(record, held, frozenset(addresses), peak)

    def peak(self, mode: str, context_length: int) -> int:
        """Bytes at the most during a step; on a GPU, unlike a timeline, without a record."""
        if self.device.type != "cuda":
            return self.timeline(mode, context_length).peak
        batch = self.settled(mode, context_length)
        return self._allocator_peak(lambda: self.step(mode, batch))

    def _allocator_peak(self, work: Callable[[], Any]) -> int | None:
        """Call work(); bytes at the most meanwhile, or None where no allocator counts them."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def subject_of(p: Parameters) -> Subject:
    """The engine of these parameters."""
    return at_hand(("memory", p), lambda: Subject(p), resolve_device(p.device))


@contextlib.contextmanager
def _block_marks(model: TransformerLM, record: Recording) -> Iterator[None]:
    """Mark where each block's forward and backward pass begins; L stands for the end of the last, -1 of the first."""

    def at_input(index: int) -> Callable:
        def hook(_module: nn.Module, inputs: tuple) -> None:
            record.mark(f"forward {index}")
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _grad: record.mark(f"backward {index - 1}"))

        return hook

    with contextlib.ExitStack() as stack:
        for index, module in enumerate([*model.layers, model.ln_final]):
            stack.callback(module.register_forward_pre_hook(at_input(index)).remove)
        yield


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# --- The studies ----------------------------------------------------------------------------------

_SHAPE = ("size", "context_length", "batch", "dtype", "kernel", "device")


def _point(p: Parameters, context_length: int, **more: Any) -> Point:
    """The shape of a point; dtype and kernel are in `more` where they are not those of most."""
    shape = {"size": p.size, "context_length": context_length, "batch": p.batch, "dtype": p.dtype}
    return shape | {"kernel": p.kernels[-1]} | more


def peak_points(p: Parameters) -> list[Point]:
    combinations = itertools.product(MODES, p.kernels, p.dtypes, p.contexts)
    return [_point(p, length, dtype=dtype, kernel=kernel, mode=mode) for mode, kernel, dtype, length in combinations]


def measure_peak(point: Point, p: Parameters) -> Row:
    """memory_profiling (b), (c): the peak of a mode at a kernel, dtype and context."""
    subject = subject_of(p)
    with subject.set(point["dtype"], point["kernel"]):
        return {"peak_mib": subject.peak(point["mode"], point["context_length"]) / 2**20}


def measure_timeline(point: Point, p: Parameters) -> Measured:
    """memory_profiling (a), (d), (e), (f): the allocations of a recorded step; its timeline and its blocks."""
    subject, length, config = subject_of(p), point["context_length"], model_of(p)
    with subject.set(point["dtype"]):
        timeline = subject.timeline(point["mode"], length, stacks=True)
    shape = point | {"device": device_name(subject.device)}
    rows = [{"kind": "largest"} | row for row in allocations.largest(timeline)]
    tables = {"memory_timeline": [shape | row for row in allocations.sampled(timeline)]}
    if point["mode"] == "full_step":
        residual = cost.residual_stream_bytes(config, p.batch, length)
        stream = allocations.largest(timeline, size=residual, category="activations")
        rows += [{"kind": "stream"} | row for row in stream]
        tables["memory_blocks"] = [shape | row for row in block_rows(timeline, config)]
    return Measured(rows, tables)


def block_rows(timeline: Timeline, config: ModelConfig) -> list[dict[str, Any]]:
    """Of each block: MiB that its forward pass adds and that its backward pass adds, and the gradients that follow from
    both: between the beginnings of two blocks' backward passes the residuals go and the gradients come.
    """
    rows, expected = [], block_gradient_bytes(config) / 2**20
    for index in range(config.num_layers):
        forward = (timeline.at(f"forward {index + 1}") - timeline.at(f"forward {index}")) / 2**20
        backward = (timeline.at(f"backward {index - 1}") - timeline.at(f"backward {index}")) / 2**20
        row = {"block": index, "forward_mib": forward, "backward_mib": backward, "gradients_mib": forward + backward}
        rows.append(row | {"expected_gradients_mib": expected})
    return rows


def block_gradient_bytes(config: ModelConfig) -> int:
    """Bytes of the fp32 gradients of one block."""
    d, f = config.d_model, config.d_ff
    return 4 * (4 * d * d + 3 * d * f + 2 * d)


# --- Residuals ------------------------------------------------------------------------------------


def saved_tensors(work: Callable[[], Any], known: Iterable[Tensor]) -> list[dict[str, Any]]:
    """The tensors that work() saves for its backward pass, those that share memory once, and not those of known; the
    largest first.
    """
    saved: list[tuple[Tensor, str]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor, _caller()))  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    rows = []
    for tensor, where in saved:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            row = {"shape": "x".join(map(str, tensor.shape)), "tensor_dtype": str(tensor.dtype).removeprefix("torch.")}
            rows.append(row | {"mib": storage.nbytes() / 2**20, "where": where})
    del result
    return sorted(rows, key=lambda row: -row["mib"])


def _caller() -> str:
    """The innermost line of this package, outside this module, that is being executed: 'SwiGLU.forward: source'; of a
    Linear, which is one of many, whose it is, too.
    """
    frames, frame = [], sys._getframe(2)
    while frame is not None and len(frames) < 2:
        if allocations.frame_name(frame.f_code.co_filename, frame.f_lineno, "") is not None:
            frames.append(frame)
        frame = frame.f_back
    if not frames:
        return "code outside the package"
    code = frames[0].f_code
    said = f"{code.co_qualname}: {linecache.getline(code.co_filename, frames[0].f_lineno).partition('#')[0].strip()}"
    return f"{said} in {frames[1].f_code.co_qualname}" if code.co_qualname == "Linear.forward" else said


def residual_points(p: Parameters) -> list[Point]:
    length = max(p.timeline_contexts)
    modes = ["eager"] if p.backend is None else ["eager", "compiled"]
    norms = [_point(p, length, dtype="fp32", kernel="", what="RMSNorm", mode=mode) for mode in modes]
    return [_point(p, length, what="block", mode="eager"), *norms]


def measure_residuals(point: Point, p: Parameters) -> list[Row]:
    """A row a tensor: what one block keeps, its input counted (memory_profiling (f)), or RMSNorm of an fp32 input."""
    subject, length = subject_of(p), point["context_length"]
    shape = (p.batch, length, model_of(p).d_model)
    x = torch.randn(shape, device=subject.device).requires_grad_()
    if point["what"] == "block":
        model = subject.model
        block = model.layers[len(model.layers) // 2]
        with subject.set(point["dtype"]), autocast(subject.device, point["dtype"]):
            cos, sin = model.rope.cos[:length], model.rope.sin[:length]
            return saved_tensors(lambda: block(x, cos, sin), [*model.parameters(), *model.buffers()])
    with subject.device:
        norm = RMSNorm(shape[-1])
    if point["mode"] == "eager":
        return saved_tensors(lambda: norm(x), norm.parameters())
    compiled = torch.compile(norm, backend=p.backend, dynamic=False, fullgraph=True)
    compiled(x)
    return [row | {"where": "compiled code"} for row in saved_tensors(lambda: compiled(x), norm.parameters())]


def contributors(residuals):
    """memory_profiling (f): what a block keeps by line (where, tensors, mib, share), largest first."""
    block = residuals[(residuals.what == "block") & (residuals.status == "ok")]
    grouped = block.groupby("where", sort=False).mib.agg(tensors="count", mib="sum").reset_index()
    grouped["share"] = grouped.mib / grouped.mib.sum()
    return grouped.sort_values("mib", ascending=False, ignore_index=True)


# --- Checkpointing --------------------------------------------------------------------------------


def plan(strategy: str, num_blocks: int) -> cost.Checkpointing:
    """The plan of a strategy's name."""
    if strategy == "none":
        return cost.Checkpointing(num_blocks)
    nested = strategy == "nested"
    return cost.Checkpointing(num_blocks, 1 if nested else int(strategy.removesuffix(_CACHED)), nested)


def block_formula(p: Parameters) -> dict[str, float]:
    """Bytes that one block keeps by cost.block_residuals, by term; empty for a kernel that no formula counts."""
    if p.kernels[-1] not in (*_SCORES, *_FUSED):
        return {}
    options = {"scores": p.kernels[-1] in _SCORES, "fp32_softmax": resolve_device(p.device).type == "cuda"}
    terms = cost.block_residuals(model_of(p), p.batch, max(p.timeline_contexts), p.dtype, **options)
    return {name: size for name, size in terms.items() if size}


def predicted(p: Parameters, strategy: str) -> dict[str, float] | None:
    """Bytes at the peak by formula, in all and of activations; None for a kernel whose residuals no formula counts.

    Left out: what the backward pass of one block works with beside the residuals, and what is 'other'.
    """
    parts, config = block_formula(p), model_of(p)
    if not parts:
        return None
    shape = (config, p.batch, max(p.timeline_contexts))
    head = cost.head_peak(*shape, p.dtype)
    if strategy.endswith(_CACHED):
        head += config.num_layers * parts["cast weights"]
    activations, whole = plan(strategy, config.num_layers).peaks(
        cost.residual_stream_bytes(*shape),
        sum(parts.values()),
        head,
        block_gradient_bytes(config),
        4.0 * (config.vocab_size + 1) * config.d_model,
    )
    weights = 4.0 * cost.model_parameters(config)
    # The optimizer's step has all gradients and no activations; unless it is fused, one more array to work with.
    at_end = weights * (1 if resolve_device(p.device).type == "cuda" else 2)
    return {"activations": activations, "whole": 3 * weights + max(whole, at_end)}


def measure_checkpointing(point: Point, p: Parameters) -> Row:
    """gradient_checkpointing (b): a strategy's peak and time, predicted and measured.

    Without autocast's cache: a step casts each weight once a pass, and the cache would keep the casts of all blocks to
    the end of the forward pass, more than all inputs of the checkpoints.
    """
    subject, strategy, length = subject_of(p), point["strategy"], point["context_length"]
    model, batch, losses = subject.model, subject.batch(p.batch, length), []
    planned = plan(strategy, len(model.layers))
    model.checkpoint_blocks(planned.size, nested=planned.nested)
    try:
        with subject.set(point["dtype"], cached=strategy.endswith(_CACHED)):
            timeline = subject.timeline("full_step", length)
            # The first is not counted.
            times = clocked_ms(subject.device, lambda: losses.append(subject.step("full_step", batch)), p.steps + 1)[1:]
            forward = None
            if strategy == "none":

                def keep_graph() -> None:
                    with autocast(subject.device, point["dtype"]):
                        model(batch[0])

                forward = quantiles(clocked_ms(subject.device, keep_graph, p.steps + 1)[1:])[0]
    finally:
        model.checkpoint_blocks(None)
    median, p20, p80 = quantiles(times)
    row = {"step_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(times), "forward_ms": forward}
    row |= {"peak_mib": timeline.peak / 2**20, "activations_mib": timeline.peak_activations / 2**20}
    row |= {"block_forwards": planned.forwards(), "loss": losses[-1].item()}
    if expected := predicted(p, strategy):
        row["predicted_peak_mib"] = expected["whole"] / 2**20
        row["predicted_activations_mib"] = expected["activations"] / 2**20
    return row


def predicted_time(row: Row, siblings: list[Row]) -> Row:
    """The step that keeps everything, and a forward pass for each block that is run again."""
    base = next((other for other in [*siblings, row] if other["strategy"] == "none"), None)
    if base is None or "step_ms" not in row:
        return {}
    again = row["block_forwards"] / base["block_forwards"] - 1
    return {"predicted_ms": base["step_ms"] + again * base["forward_ms"]}


def strategy_name(strategy: str) -> str:
    """A strategy as tables and figures call it."""
    named = {"none": "keep everything", "nested": "nested halves", "1": "each block"}
    size = str(strategy).removesuffix(_CACHED)
    return named.get(size, f"groups of {size}") + (", casts cached" if str(strategy).endswith(_CACHED) else "")


def _method(p: Parameters) -> dict[str, str]:
    gpu = resolve_device(p.device).type == "cuda"
    return {
        "memory": "the allocator's peak; timelines from its history" if gpu else "the profiler's memory events",
        "timer": "CUDA events between steps" if gpu else "time.perf_counter between steps, one thread",
        "warmup": "one step",
        "step": "the trainer's, at learning rate 0; inputs on the device",
        "statistic": "median, 20th and 80th percentile",
    }


PEAKS = Experiment(
    name="memory_peaks",
    columns=(*_SHAPE, "mode", "status", "peak_mib", "note"),
    points=peak_points,
    measure=measure_peak,
    method=_method,
)
TIMELINES = Experiment(
    name="memory_allocations",
    columns=(
        *_SHAPE,
        *("mode", "kind", "status", "size_mib", "count", "category", "phase", "operator", "stack", "note"),
    ),
    points=lambda p: [_point(p, length, mode=mode) for mode in MODES for length in p.timeline_contexts],
    measure=measure_timeline,
    method=_method,
    tables={
        "memory_timeline": (*_SHAPE, "mode", "change", "phase", *(f"{name}_mib" for name in allocations.CATEGORIES)),
        "memory_blocks": (
            *(*_SHAPE, "mode", "block", "forward_mib", "backward_mib", "gradients_mib", "expected_gradients_mib"),
        ),
    },
)
RESIDUALS = Experiment(
    name="memory_residuals",
    columns=(*_SHAPE, "what", "mode", "status", "shape", "tensor_dtype", "mib", "where", "note"),
    points=residual_points,
    measure=measure_residuals,
    method=_method,
)
CHECKPOINTING = Experiment(
    name="memory_checkpointing",
    columns=(
        *(*_SHAPE, "strategy", "status", "step_ms", "p20_ms", "p80_ms", "samples", "peak_mib", "activations_mib"),
        *("block_forwards", "loss", "predicted_peak_mib", "predicted_activations_mib", "predicted_ms", "forward_ms"),
        "note",
    ),
    points=lambda p: [_point(p, max(p.timeline_contexts), strategy=strategy) for strategy in p.strategies],
    measure=measure_checkpointing,
    group=("size", "context_length", "batch", "dtype", "kernel"),
    method=_method,
    derive=predicted_time,
)
