"""How the attention kernel is built, each step measured; and the course's three tables of attention.

- Steps: one shape, from the formula to the Hopper kernel, each step checked against float64 and timed beside the others.
- Ceilings: what this device copies and multiplies at, measured in the same run, for the roofline.
- pytorch_attention: batch 8, no heads: forward, memory in use before the backward pass, backward, until memory runs out;
  the formula, the same under torch.compile (the course's torch_compile, part a), and FlashAttention.
- flash_benchmarking: batch 1, causal: FlashAttention beside plain PyTorch, forward, backward and both.
Source of the tables: Stanford CS336, assignment 2 (2025). Differences: calls are timed by the clock of lmsys.bench.measure, a slow one
fewer than 100 times; pytorch_attention is causal, and goes on past the course's 16,384 tokens until it runs out of memory.

Limits: torch.compile is given one graph a head dim with the length left open, compiled at a middle length, as it does by itself from the
second length on; a graph for each length alone could be a little faster and would compile for minutes.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmsys import cost, records
from lmsys.attention import attention, get_kernel
from lmsys.attention.reference import own_code, scaled_dot_prod_attention
from lmsys.bench import ahead
from lmsys.bench import measure as clock
from lmsys.bench.attention import DTYPES, PASSES
from lmsys.bench.measure import Measurement, allocations, available_bytes, is_out_of_memory, measure, release
from lmsys.config import require, resolve_scale, unknown_name
from lmsys.device import device_name, resolve_device

_CHECKED_SCORES = 2**22  # scores of the float64 check: the last queries of one head against all keys
_ERROR_FLOOR = 4e-6  # see lmsys.bench.attention
_COMPILE_LIMIT_S = 90.0  # compiling ahead ends here; what is not done by then is compiled when it is measured
_INTERPRETED = "in Triton's CPU interpreter"


# --- The steps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the way to the kernel.

    Attributes:
        change: what it does that the step before does not.
        kernel, options: its name in KERNELS and what it is called with; empty where it is one of attention.flash_steps.
        function: its name in attention.flash_steps; forward only.
        score_bytes: bytes that go through device memory for each score if no cache holds any, by the size of an element.
        whole: the scores above the diagonal are computed, too.
    """

    name: str
    change: str
    kernel: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    function: str = ""
    score_bytes: Callable[[int], float] = lambda size: 0
    whole: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward") if self.kernel else ("forward",)

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why a step of attention.flash_steps does not run there; the others say so themselves when they are called."""
        if self.kernel:
            return None
        from lmsys.attention import flash_steps

        checks = {"tma_forward": flash_steps.no_tma, "specialized_forward": flash_steps.no_specialization}
        return checks[self.function](device, dtype, head_dim)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q, k, v (B, H, T, D)."""
        if self.kernel:
            return attention(q, k, v, causal=True, kernel=self.kernel, **dict(self.options))
        from lmsys.attention import flash_steps

        return getattr(flash_steps, self.function)(q, k, v, True)[0]


# Passes over the scores, read and written: naive 8 (product, scale, mask and softmax write; scale, mask, softmax and product read),
# vectorized 6 (the scale is in q), compiled 4 (one kernel between the products). Tiled PyTorch makes each tile's softmax of seven
# operations in float32: 40 bytes a score, and 4 more elements where a half precision is cast there and back.
STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        Step(
            "naive",
            "the formula, an operation a line",
            "scaled_dot_prod_attention",
            score_bytes=lambda size: 8 * size,
            whole=True,
        ),
        Step(
            "vectorized",
            "the scale goes into the queries, the mask is applied in place",
            "vectorized_torch",
            score_bytes=lambda size: 6 * size,
            whole=True,
        ),
        Step(
            "compiled",
            "torch.compile makes mask and softmax one kernel",
            "vectorized_torch_compiled",
            score_bytes=lambda size: 4 * size,
            whole=True,
        ),
        Step(
            "tiled PyTorch",
            "FlashAttention's tiles: no array of all scores, but each operation on a tile is a kernel",
            "flash_attention_torch",
            score_bytes=lambda size: 40 + (4 * size if size < 4 else 0),
        ),
        Step(
            "portable Triton",
            "one kernel: a tile's scores never leave the chip",
            "flash_attention_triton",
            (("path", "portable"),),
        ),
        Step("TMA", "tiles are fetched by the TMA unit, through tensor descriptors", function="tma_forward"),
        Step(
            "warp specialization",
            "one group of warps only loads, two only compute",
            function="specialized_forward",
        ),
        Step(
            "overlap",
            "the next scores are computed while this block's values are multiplied; tiles are handed out by a counter",
            "flash_attention_triton",
            (("path", "hopper"),),
        ),
    )
}


def step_bytes(step: Step, batch: int, heads: int, seq_len: int, head_dim: int, size: int) -> float:
    """Bytes through device memory of a causal forward pass by counting: q, k, v and o once, and what a step does to each score."""
    scores = batch * heads * seq_len * seq_len / (1 if step.whole else 2)
    return 4 * batch * heads * seq_len * head_dim * size + step.score_bytes(size) * scores


# --- Implementations of the course's tables -------------------------------------------------------

IMPLEMENTATIONS = {
    "naive": "`scaled_dot_prod_attention`, the formula in plain PyTorch",
    "compiled": "the same function under `torch.compile`",
    "flash": "`flash_attention_triton`",
}


class _Compiled:
    """The formula under torch.compile, a graph for each batch, head dim and dtype with the length left open."""

    def __init__(self) -> None:
        self._graphs: dict[Any, Callable] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = (q.shape[0], q.shape[2], q.dtype, q.device)
        if key not in self._graphs:
            self._graphs[key] = torch.compile(own_code(scaled_dot_prod_attention), fullgraph=True)
        for t in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(t, 1)
        return self._graphs[key](q, k, v, True)


def implementations() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """name -> causal attention of q, k, v (B, T, D). Each call makes its own compiled graphs."""
    return {
        "naive": lambda q, k, v: scaled_dot_prod_attention(q, k, v, True),
        "compiled": _Compiled(),
        "flash": lambda q, k, v: attention(q, k, v, causal=True, kernel="flash_attention_triton"),
    }


def before_backward_bytes(implementation: str, batch: int, seq_len: int, head_dim: int, size: int) -> int:
    """Memory in use before the backward pass by formula: q, k, v, o and the output's gradient, and what is saved beside them.

    naive and compiled save the probabilities, (B, T, T), and the mask, a byte for each of (T, T). FlashAttention saves the
    log-sum-exp, (B, T) in float32, and computes the probabilities again.
    """
    five = 5 * batch * seq_len * head_dim * size
    if implementation == "flash":
        return five + 4 * batch * seq_len
    return five + batch * seq_len**2 * size + seq_len**2


# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlashSettings:
    """What the notebook runs; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    steps: tuple[str, ...]
    step_batch: int
    step_width: int  # heads x head_dim
    step_seq_len: int
    step_head_dims: tuple[int, ...]
    step_dtype: str
    implementations: tuple[str, ...]
    course_batch: int
    course_seq_lens: tuple[int, ...]
    course_head_dims: tuple[int, ...]
    course_dtype: str
    past_seq_lens: tuple[int, ...]
    bench_seq_lens: tuple[int, ...]
    bench_head_dims: tuple[int, ...]
    bench_dtypes: tuple[str, ...]
    board_kernels: tuple[str, ...] | None  # on the 2025 board; None: all that it knows
    iterations: int
    budget_s: float
    device: str
    seed: int


_ALL = tuple(STEPS)
_NOT_COMPILED = tuple(name for name in _ALL if name != "compiled")  # compiling takes longer than small scales may
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "steps": _NOT_COMPILED,
        "step_batch": 1,
        "step_width": 16,
        "step_seq_len": 32,
        "step_head_dims": (16,),
        "step_dtype": "fp32",
        "implementations": ("naive", "flash"),
        "course_batch": 2,
        "course_dtype": "fp32",
        "course_seq_lens": (16, 32),
        "course_head_dims": (16,),
        "past_seq_lens": (),
        "bench_seq_lens": (16, 32),
        "bench_head_dims": (16,),
        "bench_dtypes": ("fp32",),
        "board_kernels": ("torch_sdpa_flash",),
        "iterations": 3,
        "budget_s": 0.05,
    },
    "cpu": {
        "steps": _NOT_COMPILED,
        "step_batch": 1,
        "step_width": 64,
        "step_seq_len": 128,
        "step_head_dims": (64,),
        "step_dtype": "fp32",
        "implementations": tuple(IMPLEMENTATIONS),
        "course_batch": 1,
        "course_dtype": "fp32",
        "course_seq_lens": (128,),  # each is compiled
        "course_head_dims": (64,),
        "past_seq_lens": (),
        "bench_seq_lens": (64, 128),
        "bench_head_dims": (64,),
        "bench_dtypes": ("fp32",),
        "board_kernels": ("flash_attention_triton", "torch_sdpa_flash"),
        "iterations": 20,
        "budget_s": 0.05,
    },
    "full": {
        "steps": _ALL,
        "step_batch": 4,
        "step_width": 2048,
        "step_seq_len": 4096,
        "step_head_dims": (64, 128),
        "step_dtype": "bf16",
        "implementations": tuple(IMPLEMENTATIONS),
        "course_batch": 8,
        "course_dtype": "fp32",
        "course_seq_lens": (256, 1024, 4096, 8192, 16384),
        "course_head_dims": (16, 32, 64, 128),
        "past_seq_lens": (32768, 65536),
        "bench_seq_lens": tuple(2**i for i in range(7, 17)),
        "bench_head_dims": (16, 32, 64, 128),
        "bench_dtypes": ("bf16", "fp32"),
        "board_kernels": None,
        "iterations": 100,
        "budget_s": 0.15,
    },
}


_LENGTHS = ("course_seq_lens", "course_head_dims", "bench_seq_lens")


def settings(
    scale: str = "auto",
    steps: Sequence[str] | None = None,
    step_seq_len: int | None = None,
    step_head_dims: Sequence[int] | None = None,
    step_dtype: str | None = None,
    implementations: Sequence[str] | None = None,
    course_seq_lens: Sequence[int] | None = None,
    course_head_dims: Sequence[int] | None = None,
    past_seq_lens: Sequence[int] | None = None,
    bench_seq_lens: Sequence[int] | None = None,
    bench_head_dims: Sequence[int] | None = None,
    bench_dtypes: Sequence[str] | None = None,
    board_kernels: Sequence[str] | None = None,
    iterations: int | None = None,
    budget_s: float | None = None,
    device: str = "auto",
    seed: int = 0,
) -> FlashSettings:
    """The settings of a run: the scale's, with what is given in their place.

    Args:
        steps: names in STEPS. implementations: names in IMPLEMENTATIONS. board_kernels: names in KERNELS, for the 2025 board.
        past_seq_lens: lengths of pytorch_attention past the course's, at its largest head dim only.
        iterations: most samples of a point. budget_s: about how long the samples of a point may take.
    Raises:
        ValueError: an unknown scale, step, implementation, kernel or dtype, or a number out of range.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    scale = resolve_scale(scale)
    values = {**_PRESETS[scale], **given, "scale": scale}
    values = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in values.items()}
    for what, known in (("steps", STEPS), ("implementations", IMPLEMENTATIONS)):
        for name in values[what]:
            if name not in known:
                raise unknown_name(what.rstrip("s"), name, known)
    for name in values["board_kernels"] or ():
        get_kernel(name)
    for name in (values["step_dtype"], values["course_dtype"], *values["bench_dtypes"]):
        if name not in DTYPES:
            raise unknown_name("dtype", name, DTYPES)
    for name in ("steps", "implementations", "step_head_dims", *_LENGTHS, "bench_head_dims", "bench_dtypes"):
        require(len(values[name]) > 0, f"{name} is empty; give at least one")
    for name in ("step_seq_len", "step_head_dims", *_LENGTHS, "past_seq_lens", "bench_head_dims", "iterations"):
        numbers = values[name] if isinstance(values[name], tuple) else (values[name],)
        fine = all(type(n) is int and n >= 1 for n in numbers)
        require(fine, f"{name} is {values[name]!r}; it takes whole numbers of 1 or more")
    require(
        all(values["step_width"] % d == 0 for d in values["step_head_dims"]),
        f"step_width {values['step_width']} is not a multiple of every one of step_head_dims {values['step_head_dims']}",
    )
    require(values["budget_s"] > 0, f"budget_s is {values['budget_s']!r}; it must be above 0")
    resolve_device(values["device"])
    return FlashSettings(**values)


# --- Inputs and their check -----------------------------------------------------------------------


class Point:
    """Random q, k, v and the output's gradient of one shape (..., T, D), and the float64 answer for the first head's last queries."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.q, self.k, self.v, self.grad = (
            torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(4)
        )
        self.inputs = (self.q, self.k, self.v)
        self._answers: tuple[list[Tensor], list[float]] | None = None

    def errors(self, function: Callable, backward: bool) -> tuple[float, float]:
        """Largest relative error (2-norm) of function's o, dq and, where all queries are checked, dk and dv; and PyTorch's."""
        for t in self.inputs:
            t.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            o = function(*self.inputs)
        results = [o.detach()]
        if backward:
            results += torch.autograd.grad(o, self.inputs, self.grad)
        if self._answers is None:
            exact = self._head(torch.float64)
            self._answers = exact, [_error(p, e) for p, e in zip(self._head(self.dtype), exact, strict=True)]
        exact, plain = self._answers
        rows = self._rows()
        results = [t.flatten(0, -3)[0] for t in results]
        results[:2] = [t[-rows:] for t in results[:2]]
        pairs = zip(results, exact, plain, strict=False)
        if rows < self.shape[-2]:
            pairs = list(pairs)[:2]  # dk and dv sum over all queries
        errors = [(_error(a, e), p) for a, e, p in pairs]
        return max(error for error, _ in errors), max(p for _, p in errors)

    def _rows(self) -> int:
        return min(self.shape[-2], max(1, _CHECKED_SCORES // self.shape[-2]))

    def _head(self, dtype: torch.dtype) -> list[Tensor]:
        """o, dq (rows, D), dk, dv (T, D) of plain PyTorch for the first head's last queries."""
        rows, length = self._rows(), self.shape[-2]
        q, k, v, grad = (t.detach().flatten(0, -3)[0].to(dtype) for t in (*self.inputs, self.grad))
        leaves = [t.requires_grad_() for t in (q[-rows:].clone(), k.clone(), v.clone())]
        with torch.enable_grad():
            scores = leaves[0] @ leaves[1].T / math.sqrt(self.shape[-1])
            hidden = torch.ones(rows, length, dtype=torch.bool, device=self.device).triu(length - rows + 1)
            o = torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ leaves[2]
        return [o.detach(), *torch.autograd.grad(o, leaves, grad[-rows:])]


def _error(actual: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm().item() or 1.0
    error = (actual.double() - exact.double()).norm().item() / norm
    return math.inf if math.isnan(error) else error


# --- The clock of three passes --------------------------------------------------------------------


class Passes(NamedTuple):
    """What one implementation took at one point. before_backward_mib: memory in use between the passes, inputs included."""

    forward: Measurement
    backward: Measurement
    forward_backward: Measurement
    before_backward_mib: float | None = None


def measure_passes(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], Any],
    *,
    device: torch.device,
    iterations: int,
    budget_s: float,
    resident: Sequence[Tensor] = (),
) -> Passes:
    """Time forward() and backward(its output), each alone and both together, all from the same samples.

    As in measure(): samples start with a cold L2 on a GPU and the host ahead of it; memory comes from a call of its own, before.
    Both are called once before this, to compile and to tune. Where memory runs out in the backward pass only, forward is measured.
    """
    before = None
    failure = ""
    try:
        before, peaks = _memory(forward, backward, device, resident)
        start = time.perf_counter()
        backward(forward())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        whole_s = time.perf_counter() - start
        samples = min(iterations, max(3, int(min(budget_s / whole_s, iterations))))
        times = (_times_cuda if device.type == "cuda" else _times_cpu)(forward, backward, samples, device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error).splitlines()[0]
    if failure:  # out of the except block, whose traceback holds tensors
        release(device)
        out = Measurement("oom", note=failure)
        alone = measure(forward, device=device, warmup=2, iterations=iterations, resident=resident, budget_s=budget_s)
        if alone.status == "ok" and before is None:
            before = _before_backward(forward, device, resident)
        return Passes(alone, out, out, before)

    def measured(values: list[float], peak: float) -> Measurement:
        return Measurement("ok", *clock.quantiles(values), peak, values)

    first, second = zip(*times, strict=True)
    both = [a + b for a, b in times]
    return Passes(measured(list(first), peaks[0]), measured(list(second), peaks[1]), measured(both, max(peaks)), before)


def _memory(forward: Callable, backward: Callable, device: torch.device, resident: Sequence[Tensor]):
    """MiB in use between the passes, and the peaks of both."""
    base = _bytes(resident)
    output, kept, peak_forward = _traced(forward, device)
    _, _, peak_backward = _traced(lambda: backward(output), device)
    return (base + kept) / 2**20, ((base + peak_forward) / 2**20, (base + kept + peak_backward) / 2**20)


def _before_backward(forward: Callable, device: torch.device, resident: Sequence[Tensor]) -> float:
    _output, kept, _ = _traced(forward, device)
    return (_bytes(resident) + kept) / 2**20


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of what exists before the call. The allocator would count cuBLAS's workspace and the float64 answers, too."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _traced(function: Callable, device: torch.device) -> tuple[Any, int, int]:
    """The result, the bytes that it holds, and the most that were held during the call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        torch.cuda.synchronize(device)
        return result, torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what is freed during the call must have been made during the call
    result, changes = allocations(function)
    held = list(itertools.accumulate((size for _, size in changes), initial=0))
    return result, held[-1], max(held)


def _times_cuda(forward: Callable, backward: Callable, samples: int, device: torch.device) -> list[tuple[float, float]]:
    flush = clock.Flush(device)
    flush.lead(lambda: backward(forward()))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(samples)]
    for start, middle, end in events:
        flush()
        start.record()
        output = forward()
        middle.record()
        backward(output)
        end.record()
        del output
    torch.cuda.synchronize(device)
    return [(start.elapsed_time(middle), middle.elapsed_time(end)) for start, middle, end in events]


def _times_cpu(forward: Callable, backward: Callable, samples: int, device: torch.device) -> list[tuple[float, float]]:
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        output = forward()
        middle = time.perf_counter()
        backward(output)
        times.append(((middle - start) * 1e3, (time.perf_counter() - middle) * 1e3))
        del output
    return times


# --- Running --------------------------------------------------------------------------------------

OnRow = Callable[[dict[str, Any]], None] | None


def run_steps(flash: FlashSettings, folder: str | Path, *, on_row: OnRow = None):
    """Measure the steps; write flash_steps_results.csv to folder; return its rows as a DataFrame."""
    extra = ("counted_mib", "error", "error_pytorch", "device", "note")
    return _run("flash_steps_results", step_rows(flash), flash, folder, extra, on_row)


def run_ceilings(flash: FlashSettings, folder: str | Path, *, on_row: OnRow = None):
    """Measure copy bandwidth and a large product; write ceilings_results.csv to folder; return its rows as a DataFrame."""
    return _run("ceilings_results", ceiling_rows(flash), flash, folder, ("device",), on_row)


def run_pytorch_attention(flash: FlashSettings, folder: str | Path, *, on_row: OnRow = None):
    """The course's pytorch_attention and torch_compile (a); write pytorch_attention_results.csv; return its rows as a DataFrame."""
    return _run("pytorch_attention_results", course_rows(flash), flash, folder, _TABLE_EXTRA, on_row)


def run_flash_benchmarking(flash: FlashSettings, folder: str | Path, *, on_row: OnRow = None):
    """The course's flash_benchmarking; write flash_benchmarking_results.csv to folder; return its rows as a DataFrame."""
    return _run("flash_benchmarking_results", bench_rows(flash), flash, folder, _TABLE_EXTRA, on_row)


_TABLE_EXTRA = ("error", "error_pytorch", "device", "note")


def _run(
    name: str,
    rows: Iterator[dict[str, Any]],
    flash: FlashSettings,
    folder: str | Path,
    extra: Sequence[str],
    on_row: OnRow,
):
    device = resolve_device(flash.device)
    writer = records.ResultWriter(
        name,
        folder,
        method=clock.method(device, 2, flash.iterations),
        parameters=dataclasses.asdict(flash),
        extra_columns=extra,
    )
    with clock.settled(), writer:
        for row in rows:
            writer.write(row)
            if on_row:
                on_row(row)
    return records.read_results(writer.path)


def step_rows(flash: FlashSettings) -> Iterator[dict[str, Any]]:
    """Each step at one shape, forward and, where it has one, backward."""
    device, dtype = resolve_device(flash.device), DTYPES[flash.step_dtype]
    for head_dim in flash.step_head_dims:
        heads = flash.step_width // head_dim
        shape = (flash.step_batch, heads, flash.step_seq_len, head_dim)
        point = Point(shape, dtype, device, flash.seed)
        for step in (STEPS[name] for name in flash.steps):
            counted = step_bytes(step, *shape, dtype.itemsize) / 2**20
            for which in step.passes:
                base = {
                    "step": step.name,
                    "batch": flash.step_batch,
                    "heads": heads,
                    "seq_len": flash.step_seq_len,
                    "head_dim": head_dim,
                    "dtype": flash.step_dtype,
                    "causal": True,
                    "pass": which,
                    "counted_mib": counted if which == "forward" else None,
                    "device": device_name(device),
                }
                yield base | _step_row(step, point, which, flash)
        del point
        release(device)


def _step_row(step: Step, point: Point, which: str, flash: FlashSettings) -> dict[str, Any]:
    refusal = step.refusal(point.device, point.dtype, point.shape[-1])
    if refusal:
        return {"status": "unsupported", "note": refusal}

    def backward(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, point.inputs, point.grad)

    def forward() -> Tensor:
        with torch.no_grad():
            return step(*point.inputs)

    try:
        errors = point.errors(step, which == "backward")
        if wrong := _wrong(*errors):
            return wrong
        result = measure(
            backward if which == "backward" else forward,
            prepare=(lambda: (step(*point.inputs),)) if which == "backward" else None,
            device=point.device,
            warmup=3,
            iterations=flash.iterations,
            resident=(*point.inputs, point.grad),
            budget_s=flash.budget_s,
        )
    except Exception as reason:  # one step's failure is a row, not the end of the others' measurements
        release(point.device)
        return _failure(reason)
    triton = "triton" in step.kernel or not step.kernel
    return _measured(result, point.shape, which, *errors, _note(point.device, triton))


def _note(device: torch.device, triton: bool) -> str:
    return _INTERPRETED if triton and device.type == "cpu" else ""


def _wrong(error: float, error_pytorch: float) -> dict[str, Any] | None:
    """The row of a result that is off by more than twice PyTorch's error."""
    if error <= 2 * error_pytorch + _ERROR_FLOOR:
        return None
    note = f"wrong: error {error:.2e} against float64, PyTorch's {error_pytorch:.2e}"
    return {"status": "error", "error": error, "error_pytorch": error_pytorch, "note": note}


def _failure(reason: Exception) -> dict[str, Any]:
    """What was raised as a row's status and note."""
    first = (str(reason).strip().splitlines() or [""])[0]
    if isinstance(reason, ValueError):  # a kernel does not take this shape, dtype or device, and says so
        return {"status": "unsupported", "note": first}
    return {"status": "oom" if is_out_of_memory(reason) else "error", "note": f"{type(reason).__name__}: {first}"}


def _measured(
    result: Measurement, shape: tuple[int, ...], which: str, error: float, error_pytorch: float, note: str
) -> dict[str, Any]:
    """The measured part of a row. shape: (..., T, D)."""
    row = {
        "status": result.status,
        "error": error,
        "error_pytorch": error_pytorch,
        "note": result.note or note,
    }
    if result.status == "ok":
        heads, (length, head_dim) = math.prod(shape[:-2]), shape[-2:]
        flops = cost.attention_flops(1, heads, length, length, head_dim, True, which)
        row |= {
            "median_ms": result.median_ms,
            "p20_ms": result.p20_ms,
            "p80_ms": result.p80_ms,
            "samples": result.samples,
            "tflops": flops / result.median_ms / 1e9,
            "peak_mib": result.peak_mib,
        }
    return row


def ceiling_rows(flash: FlashSettings) -> Iterator[dict[str, Any]]:
    """What this device reaches: a copy in memory, in GB/s read and written, and a square product, in TFLOP/s."""
    device, dtype = resolve_device(flash.device), DTYPES[flash.step_dtype]
    copied, side = {"smoke": (2**24, 128), "cpu": (2**26, 1024), "full": (2**31, 8192)}[flash.scale]  # bytes, rows
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for what, size, function, work, unit in (
        ("copy", copied, lambda: target.copy_(source), 2 * copied / 1e9, "GB/s"),
        ("product", side, lambda: a @ b, 2 * side**3 / 1e12, "TFLOP/s"),
    ):
        result = measure(function, device=device, warmup=5, iterations=flash.iterations, budget_s=flash.budget_s)
        yield {
            "what": what,
            "size": size,
            "dtype": "fp32" if what == "copy" else flash.step_dtype,
            "status": result.status,
            "median_ms": result.median_ms,
            "p20_ms": result.p20_ms,
            "p80_ms": result.p80_ms,
            "samples": result.samples,
            "rate": work / result.median_ms * 1e3 if result.status == "ok" else None,
            "unit": unit,
            "device": device_name(device),
        }


def course_rows(flash: FlashSettings) -> Iterator[dict[str, Any]]:
    """pytorch_attention: batch course_batch, no heads."""
    largest = max(flash.course_head_dims)
    for head_dim in flash.course_head_dims:
        past = flash.past_seq_lens if head_dim == largest else ()
        lengths = (*flash.course_seq_lens, *past)
        for row in _table_rows(flash, flash.course_batch, lengths, head_dim, flash.course_dtype):
            size = DTYPES[flash.course_dtype].itemsize
            computed = before_backward_bytes(row["implementation"], row["batch"], row["seq_len"], head_dim, size)
            yield row | {"computed_mib": computed / 2**20}


def bench_rows(flash: FlashSettings) -> Iterator[dict[str, Any]]:
    """flash_benchmarking: batch 1."""
    for dtype in flash.bench_dtypes:
        for head_dim in flash.bench_head_dims:
            for row in _table_rows(flash, 1, flash.bench_seq_lens, head_dim, dtype):
                yield {name: value for name, value in row.items() if name != "before_backward_mib"}


def _table_rows(
    flash: FlashSettings, batch: int, lengths: Sequence[int], head_dim: int, dtype: str
) -> Iterator[dict[str, Any]]:
    """Three rows, one a pass, for each length and implementation."""
    device = resolve_device(flash.device)
    functions = implementations()
    if "compiled" in flash.implementations:  # its graph is made, and tuned, for lengths about this one
        _try(functions["compiled"], Point((batch, _typical(lengths), head_dim), DTYPES[dtype], device, flash.seed))
        gc.collect()
        gc.freeze()  # what compilers keep, as well as what was imported
    for length in lengths:
        point = Point((batch, length, head_dim), DTYPES[dtype], device, flash.seed)
        for name in flash.implementations:
            base = {
                "implementation": name,
                "batch": batch,
                "seq_len": length,
                "head_dim": head_dim,
                "dtype": dtype,
                "causal": True,
                "device": device_name(device),
            }
            for which, row in _three(functions[name], name, point, flash).items():
                yield base | {"pass": which} | row
    release(device)


def _typical(lengths: Sequence[int]) -> int:
    """The longest length up to 4096, or the shortest there is."""
    return max((n for n in lengths if n <= 4096), default=min(lengths))


def _three(function: Callable, name: str, point: Point, flash: FlashSettings) -> dict[str, dict[str, Any]]:
    """A row for each pass: checked, then measured."""
    try:
        if shortage := _shortage(name, point):
            return _alike({"status": "oom", "note": shortage})
        errors = _try(function, point) or _try(function, point, backward=False)
        if errors is None:
            return _alike({"status": "oom", "note": "memory runs out in the forward pass"})
        if wrong := _wrong(*errors):
            return _alike(wrong)
        for t in point.inputs:
            t.requires_grad_()
        results = measure_passes(
            lambda: function(*point.inputs),
            lambda output: torch.autograd.grad(output, point.inputs, point.grad),
            device=point.device,
            iterations=flash.iterations,
            budget_s=flash.budget_s,
            resident=(*point.inputs, point.grad),
        )
    except Exception as reason:  # one implementation's failure is a row, not the end of the others' measurements
        release(point.device)
        return _alike(_failure(reason))
    note = _note(point.device, name == "flash")
    return {
        which: _measured(getattr(results, which), point.shape, which, *errors, note)
        | {"before_backward_mib": results.before_backward_mib}
        for which in PASSES
    }


def _alike(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(PASSES, row)


def _try(function: Callable, point: Point, backward: bool = True) -> tuple[float, float] | None:
    """point.errors, or None where memory runs out."""
    try:
        return point.errors(function, backward)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    release(point.device)
    return None


def _shortage(name: str, point: Point) -> str:
    """Why a point would not fit the CPU's free memory; empty where it does. A CPU's own OOM ends the process."""
    if point.device.type == "cuda" or name == "flash":
        return ""
    needed = 4 * math.prod(point.shape[:-1]) * point.shape[-2] * point.dtype.itemsize
    free = available_bytes()
    if free is None or needed < 0.8 * free:
        return ""
    return f"four arrays of scores need {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"


# --- Compiling ahead ------------------------------------------------------------------------------


def compile_ahead(flash: FlashSettings) -> float:
    """Compile what a GPU run needs; see lmsys.bench.ahead. What fails here fails again when it is measured, and is a row there.

    Returns:
        the seconds that it took.
    """
    start = time.monotonic()
    if resolve_device(flash.device).type != "cuda":
        return 0.0
    shares = min(8, os.cpu_count() or 1, len(_compilations(flash)))
    ahead.compile_shares(_compile_share, flash, shares, _COMPILE_LIMIT_S)
    return time.monotonic() - start


def _compilations(flash: FlashSettings) -> list[tuple[str, tuple[int, ...], str]]:
    """(step or implementation, shape, dtype) of each compilation of its own."""
    found = [
        (name, (flash.step_batch, flash.step_width // d, flash.step_seq_len, d), flash.step_dtype)
        for name in flash.steps
        if name not in ("naive", "vectorized", "tiled PyTorch")
        for d in flash.step_head_dims
    ]
    length = _typical(flash.bench_seq_lens)
    for name in set(flash.implementations) - {"naive"}:
        found += [(name, (1, length, d), dtype) for d in flash.bench_head_dims for dtype in flash.bench_dtypes]
    if "compiled" in flash.implementations:  # FlashAttention's kernels do not depend on the batch
        # From 2^31 scores on indices have 64 bits, in code of its own.
        lengths = {_typical(flash.course_seq_lens), max(flash.course_seq_lens)}
        found += [
            ("compiled", (flash.course_batch, length, d), flash.course_dtype)
            for length in sorted(lengths)
            for d in flash.course_head_dims
        ]
    return found


def _compile_share(flash: FlashSettings, share: int, shares: int) -> None:
    """One process's part: every shares-th compilation."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # the processes are the parallelism
    device = resolve_device(flash.device)
    for name, shape, dtype in _compilations(flash)[share::shares]:
        step = len(shape) == 4
        function = STEPS[name] if step else implementations()[name]
        try:
            Point(shape, DTYPES[dtype], device, flash.seed).errors(
                function, "backward" in STEPS[name].passes if step else True
            )
        except Exception as reason:
            print(f"compile ahead: {name} {shape}: {_failure(reason)['note']}")
        release(device)


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    what = f"{row.get('step') or row['implementation']:<20} {row['pass']:<16}"
    where = f"{row['dtype']} head_dim {row['head_dim']:>3} {row['seq_len']:>6} tokens"
    if row["status"] != "ok":
        return f"{where} {what} {row['status']}: {row.get('note', '')}"
    spread = f"{row['median_ms']:>10.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}]"
    return f"{where} {what} {spread} {row['tflops']:>8.4g} TFLOP/s {row['peak_mib']:>9.1f} MiB"
