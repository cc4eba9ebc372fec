"""How the attention kernel is built, each step measured; and the course's three tables of attention.

- STEPS: one shape, from the formula to the Hopper kernel, each step checked against float64 and timed.
- CEILINGS: what this device copies and multiplies at, measured in the same run, for the roofline.
- PYTORCH_ATTENTION: batch 8, no heads: forward, memory in use before the backward pass, backward, until memory ends;
  the formula, the same under torch.compile (the course's torch_compile, part a), and FlashAttention.
- FLASH_BENCHMARKING: batch 1, causal: FlashAttention beside plain PyTorch, forward, backward and both.
Source of the tables: Stanford CS336, assignment 2 (2025). Differences: calls are timed by the clock of
lmsys.bench.measure, a slow one fewer than 100 times; pytorch_attention is causal and goes on past 16,384 tokens.

Limits: torch.compile is given one graph a head dim with the length left open, compiled at a middle length, as it does
by itself from the second length on; a graph for each length could be a little faster and would compile for minutes.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmsys.attention import KERNELS
from lmsys.attention.reference import own_code, scaled_dot_prod_attention
from lmsys.bench import ahead
from lmsys.bench import attention as sweeps
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_names, require_numbers
from lmsys.bench.measure import DTYPES, allocations, measure, method
from lmsys.config import require
from lmsys.device import resolve_device

PASSES = sweeps.PASSES
_COMPILE_LIMIT_S = 90.0  # compiling ahead ends here; what is not done by then is compiled when it is measured
_TYPICAL, _LONG = 4096, 16384  # compiled graphs are made at the longest length up to the first, tried up to the second

# --- The steps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the way to the kernel.

    Attributes:
        change: what it does that the step before does not.
        kernel, options: its name in KERNELS and what it is called with; `function` is one of attention.flash_steps,
            forward only.
        score_bytes: bytes through device memory for each score if no cache holds any, by the size of an element.
        whole: the scores above the diagonal are computed, too.
    """

    name: str
    change: str
    kernel: str
    options: Mapping[str, Any] = field(default_factory=dict)
    score_bytes: Callable[[int], float] = lambda size: 0
    whole: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward",) if "function" in self.options else ("forward", "backward")


_TRITON = "flash_attention_triton"
# Passes over the scores, read and written: naive 8 (matmul, scale, mask and softmax write; scale, mask, softmax and
# matmul read), vectorized 6 (the scale is in q), compiled 4 (one kernel between the matmuls). Tiled PyTorch makes each
# tile's softmax of seven operations in float32: 40 bytes a score, and 4 more elements where a half precision is cast.
# fmt: off
STEPS: dict[str, Step] = {step.name: step for step in (
    Step("naive", "the formula, an operation a line", "scaled_dot_prod_attention", {}, lambda size: 8 * size, True),
    Step("vectorized", "the scale goes into the queries, the mask is applied in place", "vectorized_torch", {},
         lambda size: 6 * size, True),
    Step("compiled", "torch.compile makes mask and softmax one kernel", "vectorized_torch_compiled", {},
         lambda size: 4 * size, True),
    Step("tiled PyTorch", "FlashAttention's tiles: no array of all scores, but each operation on a tile is a kernel",
         "flash_attention_torch", {}, lambda size: 40 + (4 * size if size < 4 else 0)),
    Step("portable Triton", "one kernel: a tile's scores never leave the chip", _TRITON, {"path": "portable"}),
    Step("TMA", "tiles are fetched by the TMA unit, through tensor descriptors", _TRITON, {"function": "tma_forward"}),
    Step("warp specialization", "one group of warps only loads, two only compute",
         _TRITON, {"function": "specialized_forward"}),
    Step("overlap", "the next scores are computed while this block's values are multiplied; a counter hands out tiles",
         _TRITON, {"path": "hopper"}),
)}
# fmt: on


def step_bytes(step: Step, batch: int, heads: int, seq_len: int, head_dim: int, size: int) -> float:
    """Bytes through device memory of a causal forward pass: q, k, v, o once, and what a step does to each score."""
    scores = batch * heads * seq_len * seq_len / (1 if step.whole else 2)
    return 4 * batch * heads * seq_len * head_dim * size + step.score_bytes(size) * scores


# --- Implementations of the course's tables -------------------------------------------------------

IMPLEMENTATIONS = {
    "naive": "`scaled_dot_prod_attention`, the formula in plain PyTorch",
    "compiled": "the same function under `torch.compile`",
    "flash": "`flash_attention_triton`",
}
_NAIVE = "scaled_dot_prod_attention"


def before_backward_bytes(implementation: str, batch: int, seq_len: int, head_dim: int, size: int) -> int:
    """Memory in use before the backward pass by formula: q, k, v, o, the output's gradient, and what is saved beside.

    naive and compiled save the probabilities, (B, T, T), and the mask, a byte for each of (T, T). FlashAttention saves
    the log-sum-exp, (B, T) in float32, and recomputes the probabilities.
    """
    five = 5 * batch * seq_len * head_dim * size
    if implementation == "flash":
        return five + 4 * batch * seq_len
    return five + batch * seq_len**2 * size + seq_len**2


_graphs: dict[Any, Callable] = {}  # (batch, head dim, dtype, device) -> the compiled formula


class Case(sweeps.Case):
    """A case of the attention sweep, which also calls the steps of flash_steps and the formula under torch.compile."""

    def call(self, kernel: str, options: Mapping[str, Any]) -> Tensor:
        if "function" in options:
            return self._step(options["function"])
        if "compiled_at" in options:
            return self._compiled(options["compiled_at"])
        return super().call(kernel, options)

    def _step(self, name: str) -> Tensor:
        from lmsys.attention import flash_steps

        check = {"tma_forward": flash_steps.no_tma, "specialized_forward": flash_steps.no_specialization}[name]
        if refusal := check(self.device, self.dtype, self.q.shape[-1]):
            raise ValueError(refusal)
        return getattr(flash_steps, name)(self.q, self.k, self.v, True)[0]

    def _compiled(self, length: int) -> Tensor:
        """The formula, compiled at this length with the length left open: a graph a batch, head dim and dtype."""
        batch, _, _, head_dim = self.q.shape
        key = (batch, head_dim, self.dtype, self.device)
        if key not in _graphs:
            _graphs[key] = torch.compile(own_code(scaled_dot_prod_attention), fullgraph=True)
            size = (batch, 1, length, head_dim)
            q, k, v = (torch.randn(size, dtype=self.dtype, device=self.device, requires_grad=True) for _ in range(3))
            with torch.enable_grad():
                self._open(q, k, v).sum().backward()
            gc.collect()
            gc.freeze()  # what compilers keep, which release() need not look through before each measurement
        return self._open(self.q, self.k, self.v)

    def _open(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for t in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(t, 2)
        return _graphs[q.shape[0], q.shape[3], q.dtype, q.device](q, k, v, True)

    def before_backward_mib(self, kernel: str, options: Mapping[str, Any]) -> float:
        """Memory in use between the passes, inputs and the output's gradient included.

        By counting what the forward pass leaves: the allocator would count cuBLAS's workspace and the answers, too.
        """
        resident = sum(t.numel() * t.element_size() for t in (*self.inputs(True), self.grad))
        gc.collect()  # what is freed during the call must have been made during the call
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            output = self.call(kernel, options)
            torch.cuda.synchronize(self.device)
            kept = torch.cuda.memory_allocated(self.device) - before
        else:
            output, changes = allocations(lambda: self.call(kernel, options))
            kept = sum(size for _, size in changes)
        del output
        return (resident + kept) / 2**20


# --- Parameters -----------------------------------------------------------------------------------

_LISTS = ("step_head_dims", "course_seq_lens", "course_head_dims", "bench_seq_lens", "bench_head_dims", "bench_dtypes")


def check(p: Parameters) -> None:
    """Raises ValueError: an unknown step, implementation, kernel or dtype, or a number out of range."""
    require_names(p, {"steps": STEPS, "implementations": IMPLEMENTATIONS, "board_kernels": KERNELS})
    require_names(p, dict.fromkeys(("step_dtype", "course_dtype", "bench_dtypes"), DTYPES))
    for name in _LISTS:
        require(len(getattr(p, name)) > 0, f"{name} is empty; give at least one")
    numbers = ("step_batch", "step_seq_len", "course_batch", "past_seq_lens", "iterations", "warmup_ms", "rep_ms")
    require_numbers(p, dict.fromkeys((*numbers, *_LISTS[:-1]), 1))
    require(
        all(p.step_width % d == 0 for d in p.step_head_dims),
        f"step_width {p.step_width} is not a multiple of every one of step_head_dims {p.step_head_dims}",
    )
    require(p.budget_s > 0, f"budget_s is {p.budget_s!r}; it must be above 0")
    resolve_device(p.device)


NOTEBOOK = Notebook("flash_attention", check)

# --- Points ---------------------------------------------------------------------------------------


def _shape(batch: int, heads: int, seq_len: int, head_dim: int, dtype: str) -> Point:
    lengths = dict.fromkeys(("seq_len", "q_len", "k_len"), seq_len)
    shape = {"tier": "", "batch": batch, "heads": heads, "kv_heads": heads, **lengths}
    return shape | {"head_dim": head_dim, "dtype": dtype, "causal": True}


def step_points(p: Parameters) -> list[Point]:
    """Each step at one shape: all forward, then those that have one backward."""
    size = DTYPES[p.step_dtype].itemsize
    points = []
    for head_dim in p.step_head_dims:
        heads = p.step_width // head_dim
        shape = _shape(p.step_batch, heads, p.step_seq_len, head_dim, p.step_dtype)
        for which in PASSES[:2]:
            for step in (STEPS[name] for name in p.steps if which in STEPS[name].passes):
                counted = step_bytes(step, p.step_batch, heads, p.step_seq_len, head_dim, size) / 2**20
                point = shape | {"step": step.name, "kernel": step.kernel, "options": dict(step.options)}
                point |= {"pass": which, "passes": [which], "counted_mib": counted if which == "forward" else None}
                points.append(point)
    return points


def course_points(p: Parameters) -> list[Point]:
    """pytorch_attention: batch course_batch, no heads."""
    size = DTYPES[p.course_dtype].itemsize
    points = []
    for head_dim in p.course_head_dims:
        lengths = p.course_seq_lens + (p.past_seq_lens if head_dim == max(p.course_head_dims) else [])
        for point in _table_points(p, p.course_batch, lengths, head_dim, p.course_dtype):
            computed = before_backward_bytes(point["implementation"], p.course_batch, point["seq_len"], head_dim, size)
            point |= {"computed_mib": computed / 2**20, "before_backward": point["pass"] == "forward"}
            points.append(point)
    return points


def bench_points(p: Parameters) -> list[Point]:
    """flash_benchmarking: batch 1."""
    shapes = itertools.product(p.bench_dtypes, p.bench_head_dims)
    return [point for dtype, dim in shapes for point in _table_points(p, 1, p.bench_seq_lens, dim, dtype)]


def _table_points(p: Parameters, batch: int, lengths: Sequence[int], head_dim: int, dtype: str) -> list[Point]:
    """Three, one a pass, for each length and implementation."""
    typical = max((n for n in lengths if n <= _TYPICAL), default=min(lengths))
    calls = {"naive": (_NAIVE, {}), "compiled": (_NAIVE, {"compiled_at": typical}), "flash": (_TRITON, {})}
    return [
        _shape(batch, 1, length, head_dim, dtype)
        | {"implementation": name, "kernel": calls[name][0], "options": calls[name][1]}
        | {"pass": which, "passes": list(PASSES)}
        for length, name, which in itertools.product(lengths, p.implementations, PASSES)
    ]


# --- Measuring ------------------------------------------------------------------------------------


def case_of(point: Point, p: Parameters) -> Case:
    """The case of a point's shape."""
    own = {"passes": point["passes"], "warmup": 2, "iters": p.iterations, "budget_s": p.budget_s}
    return sweeps.case_of(point, Parameters(**own, device=p.device, seed=p.seed), Case)


def prepare(group: list[Point], p: Parameters) -> None:
    """Check, and so compile, all of a shape before the first is timed."""
    for point in group:
        case_of(point, p).check(point["kernel"], point["options"])


def measure_point(point: Point, p: Parameters) -> Row:
    """Errors beside float64, then times and memory; before the backward pass, too, where the point asks for it."""
    case = case_of(point, p)
    row = sweeps.measured(case, point)
    if point.get("before_backward") and row["status"] == "ok":
        row |= {"before_backward_mib": case.before_backward_mib(point["kernel"], point["options"])}
    return row


def compile_ahead(points: Callable[[Parameters], list[Point]]) -> Callable[[Parameters], None]:
    """Before a GPU's run: compile each kernel and graph once, at the longest length up to _LONG."""

    def before(p: Parameters) -> None:
        work: dict[Any, Point] = {}
        for point in points(p) if resolve_device(p.device).type == "cuda" else ():
            open_length = "compiled_at" in point["options"]
            compiles = "compiled" in point["kernel"] or KERNELS[point["kernel"]].compiled_per
            if point["seq_len"] <= _LONG and (open_length or compiles):
                batch = point["batch"] if open_length else None  # FlashAttention's kernels do not depend on it
                key = (point["kernel"], *(str(point[key]) for key in ("options", "head_dim", "dtype", "passes")), batch)
                work[key] = point
        ahead.compile_points(compile_point, list(work.values()), p, 8, _COMPILE_LIMIT_S)

    return before


def compile_point(point: Point, p: Parameters) -> None:
    """Run the point once, backward too where it has such a pass."""
    prepare([point], p)


def ceiling_points(p: Parameters) -> list[Point]:
    """A copy in memory, read and written, and a square product of PyTorch's."""
    copied, side = {"smoke": (2**24, 128), "cpu": (2**26, 1024), "full": (2**31, 8192)}[p.scale]  # bytes, rows
    return [
        {"what": "copy", "size": copied, "dtype": "fp32", "unit": "GB/s"},
        {"what": "product", "size": side, "dtype": p.step_dtype, "unit": "TFLOP/s"},
    ]


def measure_ceiling(point: Point, p: Parameters) -> Row:
    """What this device reaches."""
    device, size = resolve_device(p.device), point["size"]
    if point["what"] == "copy":
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        function, work = lambda: target.copy_(source), 2 * size / 1e9
    else:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[point["dtype"]]) for _ in range(2))
        function, work = lambda: a @ b, 2 * size**3 / 1e12
    result = measure(function, device=device, warmup=5, iterations=p.iterations, budget_s=p.budget_s)
    row = {name: value for name, value in result.columns().items() if name != "peak_mib"}
    return row | {"rate": work / result.median_ms * 1e3}


_TIMES = ("pass", "status", "median_ms", "p20_ms", "p80_ms", "samples", "tflops", "peak_mib")
_TABLE = ("implementation", "batch", "seq_len", "head_dim", "dtype", "causal", *_TIMES)
_CHECKED = ("error", "error_pytorch", "device", "note")


def _experiment(name: str, columns: Sequence[str], points: Callable[[Parameters], list[Point]]) -> Experiment:
    return Experiment(
        name, columns, points, measure_point, group=(*sweeps.SHAPE, "passes"), method=_method,
        prepare=prepare, before=compile_ahead(points),
    )  # fmt: skip


def _method(p: Parameters) -> dict[str, Any]:
    return method(resolve_device(p.device), 2, p.iterations)


STEP_TIMES = _experiment(
    "flash_steps_results",
    ("step", "batch", "heads", "seq_len", "head_dim", "dtype", "causal", *_TIMES, "counted_mib", *_CHECKED),
    step_points,
)
CEILINGS = Experiment(
    name="ceilings_results",
    columns=(
        *("what", "size", "dtype", "status", "median_ms", "p20_ms", "p80_ms", "samples", "rate", "unit"),
        "device",
    ),
    points=ceiling_points,
    measure=measure_ceiling,
    method=_method,
)
PYTORCH_ATTENTION = _experiment(
    "pytorch_attention_results", (*_TABLE, "before_backward_mib", "computed_mib", *_CHECKED), course_points
)
FLASH_BENCHMARKING = _experiment("flash_benchmarking_results", (*_TABLE, *_CHECKED), bench_points)
