"""The model benchmark: forward pass, forward and backward, full training step, over sizes, contexts, precisions, compiled or not.

Answers benchmarking_script, torch_compile (b) and benchmarking_mixed_precision (c) of Stanford CS336, assignment 2 (systems). A point is
timed as that assignment asks (bench/measure.py, measure_steps): 5 warm-up steps and 10 samples, the device idle around each.

- forward: inference, no graph is kept. forward_backward: with the loss. full_step: with this package's AdamW. Gradients are dropped at the
  end of each step, so that every step of a mode allocates the same.
- fp32: products in fp32 proper. tf32: fp32 tensors, products on the tensor cores as TF32. bf16, fp16: autocast over fp32 parameters; fp16 with
  a gradient scaler.
- compiled: no; blocks, one compilation for all blocks and one for the loss; model, the whole model as one graph. Shapes are static.

Where memory runs out, the point is a row (oom), and the points of its series that need more still are not tried (oom_skipped). A slow
step gets fewer warm-up steps and samples: see settings(budget_s).

Limits: one device. Tokens are random. A point's model has its weights from the point before, of the same size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmsys import cost, records
from lmsys.attention import check_support, get_kernel
from lmsys.bench import ahead, ranges
from lmsys.bench.measure import (
    StepClock,
    StepMeasurement,
    allocations,
    available_bytes,
    gpu_state,
    is_out_of_memory,
    measure_steps,
    one_thread,
    profiled,
    release,
    settled,
    time_steps,
)
from lmsys.config import ModelConfig, model_size, require, resolve_scale, unknown_name
from lmsys.device import device_name, fp32_products, peak_flops, resolve_device
from lmsys.model import TransformerLM, cross_entropy
from lmsys.parallel import group
from lmsys.step.optimizer import AdamW, parameter_groups

NAME = "model_benchmark_results"
REPEAT, WARMUP, FIRST_STEP = "model_benchmark_repeat", "model_benchmark_warmup", "model_benchmark_first_step"
MODES = ("forward", "forward_backward", "full_step")  # each needs more memory than the one before
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of products
COMPILED = ("no", "blocks", "model")
WARMUP_COUNTS = (0, 1, 2, 5)  # that warmup_study compares
EXTRA_COLUMNS = (
    *("p20_ms", "p80_ms", "first_ms", "warmup_done", "tflops", "reserved_mib", "kernel", "checkpoint", "times_ms"),
    *("device", "note"),
)
_COMPILE_LIMIT_S = 240.0  # compiling ahead ends here; what is not done by then is compiled when it is measured


# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Every combination of these."""

    sizes: tuple[str, ...]
    contexts: tuple[int, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    compiled: tuple[str, ...] = ("no",)

    def __str__(self) -> str:
        names = (self.sizes, self.contexts, self.dtypes, self.modes, self.compiled)
        return " x ".join("{" + ", ".join(map(str, values)) + "}" for values in names)


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how. Made by settings().

    Attributes:
        repeat: points that repeat() measures a second time. study: the point that warmup_study() runs cold.
        compile_ahead: processes that fill the compiler's cache on disk before the first point.
    """

    scale: str
    grids: tuple[Grid, ...]
    repeat: Grid
    study: Grid
    attention_kernels: tuple[str, ...]
    checkpoint: int | None
    batch: int
    vocab_size: int | None
    warmup: int
    steps: int
    budget_s: float
    compile_ahead: int
    nvtx: bool
    memory_profile: bool
    trace: bool
    device: str
    seed: int


_COURSE_SIZES = ("small", "medium", "large", "xl", "2.7b")
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "grids": (Grid(("tiny",), (32, 64), ("fp32", "bf16")),),
        "repeat": Grid(("tiny",), (32,), ("fp32",), ("full_step",)),
        "study": Grid(("tiny",), (32,), ("fp32",), ("forward_backward",)),
        "batch": 2,
        "warmup": 2,
        "steps": 3,
        "budget_s": 0.05,
        "compile_ahead": 0,
    },
    "cpu": {
        "grids": (
            Grid(("tiny",), (64, 128), ("fp32", "bf16")),
            Grid(("mini",), (64, 128), ("fp32",)),
            Grid(("tiny",), (64,), ("fp32",), ("forward",), ("blocks",)),  # compiling C++ takes seconds
        ),
        "repeat": Grid(("tiny", "mini"), (128,), ("fp32",), ("full_step",)),
        "study": Grid(("mini",), (128,), ("fp32",), ("forward_backward",)),
        "batch": 2,
        "warmup": 5,
        "steps": 10,
        "budget_s": 0.03,
        "compile_ahead": 0,
    },
    "full": {
        "grids": (
            Grid(_COURSE_SIZES, (128, 256, 512, 1024, 2048), ("tf32", "bf16")),
            Grid(_COURSE_SIZES, (512,), ("fp32", "fp16")),
            Grid(_COURSE_SIZES, (128, 512, 2048), ("tf32", "bf16"), MODES, ("blocks",)),
            Grid(("small",), (512,), ("bf16",), MODES, ("model",)),
            Grid(("10b",), (512,), ("bf16",)),
        ),
        "repeat": Grid(_COURSE_SIZES, (512,), ("bf16",), ("full_step",)),
        "study": Grid(("small",), (512,), ("tf32",), ("forward_backward",)),
        "batch": 4,
        "warmup": 5,
        "steps": 10,
        "budget_s": 0.4,
        "compile_ahead": 12,
    },
}
_GRID_FIELDS = ("sizes", "contexts", "dtypes", "modes", "compiled")


def settings(
    scale: str = "auto",
    sizes: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    compiled: Sequence[str] | None = None,
    attention_kernels: Sequence[str] = ("vectorized_torch",),
    checkpoint: int | None = None,
    batch: int | None = None,
    vocab_size: int | None = None,
    warmup: int | None = None,
    steps: int | None = None,
    budget_s: float | None = None,
    compile_ahead: int | None = None,
    nvtx: bool = False,
    memory_profile: bool = False,
    trace: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> BenchSettings:
    """The settings of a run: the scale's, with what is given in their place.

    Args:
        sizes, contexts, dtypes, modes, compiled: where one is given, every combination of these takes the place of the scale's points;
            what is not given is that of the scale's first grid.
        checkpoint: activation checkpointing of groups of so many blocks; None for none.
        warmup, steps: untimed and timed steps of a point. budget_s: where the steps of a point would take longer, after two warm-up steps
            about so many seconds each of further warm-up and of samples, not under three samples; math.inf: all, always.
        nvtx: named ranges (bench/ranges.py). memory_profile, trace: of a further step of each point, as files beside the results.
    Raises:
        ValueError: an unknown name, a number out of range, or points none of which the device's memory can hold.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    scale = resolve_scale(scale)
    values = {"checkpoint": None, "vocab_size": None, **_PRESETS[scale], **given, "scale": scale}
    chosen = {name: tuple(values.pop(name)) for name in _GRID_FIELDS if name in values}
    if chosen:
        grid = dataclasses.replace(values["grids"][0], **chosen)
        first = Grid(grid.sizes[:1], grid.contexts[:1], grid.dtypes[:1], grid.modes[-1:], grid.compiled[:1])
        values |= {"grids": (grid,), "repeat": first, "study": dataclasses.replace(first, compiled=("no",))}
    values["attention_kernels"] = tuple(values["attention_kernels"])
    require(len(values["attention_kernels"]) > 0, "attention_kernels is empty; give at least one")
    for name in values["attention_kernels"]:
        get_kernel(name)
    for grid in values["grids"]:
        for name in _GRID_FIELDS:
            require(len(getattr(grid, name)) > 0, f"{name} is empty; give at least one")
        for what, known in (("dtypes", DTYPES), ("modes", MODES), ("compiled", COMPILED)):
            for name in getattr(grid, what):
                if name not in known:
                    raise unknown_name(what.removesuffix("s"), name, known)
        for length in grid.contexts:
            _check_whole("contexts", length, 1)
    for name, least in (
        ("batch", 1),
        ("warmup", 0),
        ("steps", 1),
        ("compile_ahead", 0),
        ("checkpoint", 1),
        ("vocab_size", 1),
    ):
        if values[name] is not None:
            _check_whole(name, values[name], least)
    require(values["budget_s"] > 0, f"budget_s is {values['budget_s']!r}; it must be above 0")
    made = BenchSettings(**values)
    where = resolve_device(made.device)
    too_large = [_shortage(made, point, where) for point in points(made)]  # also knows the sizes by their names
    require(
        not all(too_large),
        f"no point fits the memory of {device_name(where)}: {too_large[0]}; shorten contexts or batch",
    )
    return made


def _check_whole(name: str, value: Any, least: int) -> None:
    require(type(value) is int and value >= least, f"{name} is {value!r}; it takes whole numbers of {least} or more")


@dataclass(frozen=True)
class Point:
    """One measurement. checkpoint: blocks of a checkpointed group, None for no checkpointing."""

    size: str
    context_length: int
    batch: int
    dtype: str
    compiled: str
    mode: str
    kernel: str
    checkpoint: int | None

    @property
    def model(self) -> tuple:
        """What points that share a model have in common."""
        return self.size, self.kernel, self.compiled, self.checkpoint

    @property
    def name(self) -> str:
        """For the names of files."""
        parts = (self.size, self.context_length, self.batch, self.dtype, self.compiled, self.mode, self.kernel)
        return "_".join(map(str, parts)) + ("" if self.checkpoint is None else f"_checkpoint{self.checkpoint}")

    def needs_no_less_than(self, other: Point) -> bool:
        """Of the same series, with a context, batch and mode each as large: where the other ran out of memory, so does this."""
        same = all(getattr(self, name) == getattr(other, name) for name in ("model", "dtype"))
        shapes = self.context_length >= other.context_length and self.batch >= other.batch
        return same and shapes and MODES.index(self.mode) >= MODES.index(other.mode)


def points(bench: BenchSettings, grids: Sequence[Grid] | None = None) -> list[Point]:
    """Every point once; those that share a model one after the other, contexts ascending, so that a series ends where memory does."""
    found = dict.fromkeys(
        Point(size, context, bench.batch, dtype, compiled, mode, kernel, bench.checkpoint)
        for grid in (bench.grids if grids is None else grids)
        for size in grid.sizes
        for kernel in bench.attention_kernels
        for compiled in grid.compiled
        for context in grid.contexts
        for dtype in grid.dtypes
        for mode in grid.modes
    )
    order = {model: place for place, model in enumerate(dict.fromkeys(point.model for point in found))}
    return sorted(
        found, key=lambda p: (order[p.model], p.context_length, list(DTYPES).index(p.dtype), MODES.index(p.mode))
    )


def model_config(bench: BenchSettings, size: str) -> ModelConfig:
    """The model of all points of a size: its tables of angles are as long as the longest context."""
    longest = max(length for grid in (*bench.grids, bench.repeat, bench.study) for length in grid.contexts)
    return model_size(size, vocab_size=bench.vocab_size, context_length=longest)


def least_bytes(point: Point, config: ModelConfig) -> float:
    """Memory that a point cannot do without: parameters, gradients and moments, logits, and scores where they are kept or held."""
    state = {"forward": 1, "forward_backward": 2, "full_step": 4}[point.mode] * 4 * cost.model_parameters(config)
    element = DTYPES[point.dtype].itemsize
    logits = element * point.batch * point.context_length * config.vocab_size
    if point.kernel not in ranges.PLAIN_KERNELS or point.compiled != "no":
        return state + logits
    kept = 1 if point.mode == "forward" or point.checkpoint is not None else config.num_layers
    return state + logits + kept * element * point.batch * config.num_heads * point.context_length**2


def _shortage(bench: BenchSettings, point: Point, device: torch.device) -> str:
    """Why a point cannot fit the device's memory; empty where it may."""
    needed = least_bytes(point, model_config(bench, point.size))
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else available_bytes()
    if there is None or needed < there:
        return ""
    what = f"{point.size}, {point.batch} x {point.context_length} tokens, {point.mode}"
    return f"{what} needs at least {needed / 2**30:,.1f} GiB; there are {there / 2**30:,.1f}"


def unsupported(point: Point, config: ModelConfig, device: torch.device) -> str | None:
    """Why a point cannot run on the device, known before it is tried."""
    if point.dtype == "tf32" and device.type != "cuda":
        return "tf32 is a mode of NVIDIA's tensor cores; this is a CPU"
    try:
        check_support(
            point.kernel,
            device=device,
            dtype=DTYPES[point.dtype],
            head_dim=config.head_dim,
            heads=config.num_heads,
            backward=point.mode != "forward",
        )
    except ValueError as error:
        return str(error)
    return None


# --- What is measured -----------------------------------------------------------------------------


class Subject:
    """A model on the device, and the step of each point that shares it."""

    def __init__(self, bench: BenchSettings, point: Point, device: torch.device, *, num_layers: int | None = None):
        config = model_config(bench, point.size)
        if num_layers is not None:
            config = dataclasses.replace(config, num_layers=num_layers)
        self.bench, self.model_key, self.device = bench, point.model, device
        self.shape: tuple | None = None
        self.optimizer: AdamW | None = None
        torch.manual_seed(bench.seed)
        with device:
            self.model = TransformerLM(config, attention_kernel=point.kernel)
        self.model.checkpoint_blocks(point.checkpoint)
        self.forward, self.loss = self.model, cross_entropy
        if point.compiled != "no":
            self.loss = torch.compile(cross_entropy, dynamic=False)
        if point.compiled == "blocks":
            self.model.compile_blocks(dynamic=False)
        elif point.compiled == "model":
            self.forward = torch.compile(self.model, dynamic=False)
        elif bench.nvtx:
            ranges.name_parts(self.model)

    @contextlib.contextmanager
    def ready(self, point: Point) -> Iterator[Callable[[], None]]:
        """The step of a point, to be called in this context; afterwards its gradients and optimizer are gone."""
        if point.compiled != "no" and self.shape != (point.context_length, point.dtype):
            torch._dynamo.reset()  # its limit on recompilations is one for all shapes
            self.shape = point.context_length, point.dtype
        with contextlib.ExitStack() as stack:
            stack.enter_context(_products(self.device, point.dtype))
            if point.compiled != "no":  # past the limit the rest would run eager without a word
                stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
            if self.bench.nvtx:  # or a recomputation leaves a block before its ranges end
                stack.enter_context(torch.utils.checkpoint.set_checkpoint_early_stop(False))
            stack.callback(self._drop)
            yield self._step(point)

    def _drop(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer = None

    def _step(self, point: Point) -> Callable[[], None]:
        generator = torch.Generator(self.device).manual_seed(self.bench.seed)
        shape, vocabulary = (point.batch, point.context_length), self.model.config.vocab_size
        ids, targets = (torch.randint(vocabulary, shape, generator=generator, device=self.device) for _ in range(2))
        autocast = functools.partial(
            torch.autocast, self.device.type, DTYPES[point.dtype], enabled=point.dtype in ("bf16", "fp16")
        )
        phase = ranges.named if self.bench.nvtx else lambda name: contextlib.nullcontext()
        numbers = iter(range(sys.maxsize))
        if point.mode == "forward":

            def forward() -> None:
                with phase(f"step {next(numbers)}"), phase("forward"), torch.no_grad(), autocast():
                    self.forward(ids)

            return forward

        if point.mode == "full_step":
            self.optimizer = AdamW(parameter_groups(self.model, 0.1), lr=1e-4)
        # A first scale that the gradients of a new model fit in, as a step whose gradients overflow would leave the optimizer out.
        scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**10, enabled=point.dtype == "fp16")

        def train() -> None:
            with phase(f"step {next(numbers)}"):
                with phase("forward"), autocast():
                    loss = self.loss(self.forward(ids), targets)
                with phase("backward"):
                    scaler.scale(loss).backward()
                if self.optimizer is not None:
                    with phase("optimizer"):
                        scaler.step(self.optimizer)
                        scaler.update()
                self.model.zero_grad(set_to_none=True)

        return train

    def resident(self) -> Iterator[Tensor]:
        """The tensors that are there between steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def measure(self, clock: StepClock, step: Callable[[], None]) -> StepMeasurement:
        bench = self.bench
        return measure_steps(
            step,
            device=self.device,
            clock=clock,
            warmup=bench.warmup,
            steps=bench.steps,
            budget_s=bench.budget_s,
            resident=self.resident,
        )


def _products(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[None]:
    """fp32 products as a dtype has them: TF32 on a GPU, but not for fp32."""
    return fp32_products("high" if device.type == "cuda" and dtype != "fp32" else "highest")


OnRow = Callable[[dict[str, Any]], None] | None
Extra = Callable[[Subject, Point, Callable[[], None]], None]


def rows(
    bench: BenchSettings,
    device: torch.device,
    chosen: Sequence[Point],
    clock: StepClock,
    extra: Extra = lambda subject, point, step: None,
) -> Iterator[tuple[dict[str, Any], StepMeasurement | None]]:
    """Measure points one after the other; yield each as a row of the schema, and its measurement.

    extra: called with what was measured, for what else a point leaves (traces).
    """
    with settled(), one_thread(bench.scale == "smoke"):
        yield from _rows(bench, device, chosen, clock, extra)


def _rows(
    bench: BenchSettings, device: torch.device, chosen: Sequence[Point], clock: StepClock, extra: Extra
) -> Iterator[tuple[dict[str, Any], StepMeasurement | None]]:
    subject: Subject | None = None
    step: Callable[[], None] | None = None
    ended: list[Point] = []  # where memory ran out
    for point in chosen:
        config = model_config(bench, point.size)
        base = dataclasses.asdict(point) | {"warmup": bench.warmup, "device": device_name(device)}
        smaller = next((other for other in ended if point.needs_no_less_than(other)), None)
        if reason := unsupported(point, config, device):
            yield base | {"status": "unsupported", "note": reason}, None
            continue
        if smaller is not None:
            note = f"memory ran out at context {smaller.context_length}, {smaller.mode}"
            yield base | {"status": "oom_skipped", "note": note}, None
            continue
        if device.type == "cpu" and (shortage := _shortage(bench, point, device)):
            ended.append(point)
            yield base | {"status": "oom", "note": shortage}, None
            continue
        step = None  # which holds the subject
        if subject is not None and subject.model_key != point.model:
            subject = None
        release(device)
        failed, measured = None, None
        try:
            if subject is None:
                subject = Subject(bench, point, device)
            with subject.ready(point) as step:
                measured = subject.measure(clock, step)
                extra(subject, point, step)
        except OSError:  # a trace that cannot be written
            raise
        except Exception as error:
            failed = _failure(error)
        if failed is not None:  # out of the except block, whose traceback holds tensors
            release(device)
            if failed["status"] == "oom":
                ended.append(point)
            yield base | failed, None
            continue
        yield base | _figures(point, config, measured, device), measured


def _failure(error: Exception) -> dict[str, str]:
    """Status and note of what ended a point."""
    if isinstance(error, ValueError):  # a kernel says what it does not take
        return {"status": "unsupported", "note": str(error)}
    text = f"{type(error).__name__}: {error}"
    full = is_out_of_memory(error) or "out of memory" in text or "OutOfMemoryError" in text or "ALLOC_FAILED" in text
    return {"status": "oom" if full else "error", "note": text.strip().splitlines()[0]}


def _figures(point: Point, config: ModelConfig, measured: StepMeasurement, device: torch.device) -> dict[str, Any]:
    """The measured part of a row. Rates are of the median. MFU counts the model's FLOPs, not those that checkpointing repeats."""
    tokens_per_s = point.batch * point.context_length / measured.median_ms * 1e3
    flops = cost.train_flops_per_token(config, point.context_length) / (3 if point.mode == "forward" else 1)
    return {
        "status": "ok",
        "mean_ms": measured.mean_ms,
        "std_ms": measured.std_ms,
        "median_ms": measured.median_ms,
        "p20_ms": measured.p20_ms,
        "p80_ms": measured.p80_ms,
        "samples": measured.samples,
        "first_ms": measured.warmup_ms[0] if measured.warmup_ms else None,
        "warmup_done": len(measured.warmup_ms),
        "tokens_per_s": tokens_per_s,
        "tflops": tokens_per_s * flops / 1e12,
        "mfu": cost.mfu(tokens_per_s, flops, peak_flops(device_name(device), point.dtype)),
        "peak_mib": measured.peak_mib,
        "reserved_mib": measured.reserved_mib,
        "times_ms": " ".join(f"{value:.6g}" for value in measured.times_ms),
    }


# --- Running --------------------------------------------------------------------------------------


def run(bench: BenchSettings, folder: str | Path, *, output_json: str | Path | None = None, on_row: OnRow = None):
    """Measure every point; write model_benchmark_results.csv to folder; return its rows as a DataFrame.

    output_json: also one JSON file: environment, method, parameters, and rows with all samples and the times of warm-up steps.
    Raises:
        OSError, before any work: output_json cannot be written.
    """
    if output_json is not None:
        output_json = Path(output_json)
        records.writable_dir(output_json.parent)
        require(not output_json.is_dir(), f"output_json is {output_json}, a folder; give the path of a file")
    return _run(NAME, bench, folder, points(bench), output_json, on_row)


def repeat(bench: BenchSettings, folder: str | Path, *, on_row: OnRow = None):
    """Measure the points of bench.repeat a second time; write model_benchmark_repeat.csv; return its rows as a DataFrame."""
    return _run(REPEAT, bench, folder, points(bench, [bench.repeat]), None, on_row)


def _run(
    name: str, bench: BenchSettings, folder: str | Path, chosen: list[Point], output_json: Path | None, on_row: OnRow
):
    device = resolve_device(bench.device)
    clock = StepClock(device)
    method = {
        "timer": "host clock, device idle before and after each step",
        "warmup": f"{bench.warmup} steps, fewer of a slow one: see the column warmup_done",
        "samples": f"{bench.steps}, fewer of a slow step: see the column samples",
        "statistic": "mean and standard deviation; median, 20th and 80th percentile; all samples in times_ms",
        "memory": "peak allocated and reserved, parameters included"
        if device.type == "cuda"
        else "from the profiler's events",
        "empty_step_ms": clock.overhead_ms(),
        "gpu": [],
    }
    writer = records.ResultWriter(
        name, folder, method=method, parameters=dataclasses.asdict(bench), extra_columns=EXTRA_COLUMNS
    )
    kept = []
    with writer:
        _note_state(writer, device, "before")
        compile_ahead(bench, chosen)
        before = None
        for row, measured in rows(bench, device, chosen, clock, functools.partial(_extra, Path(folder))):
            writer.write(row)
            kept.append(
                row | ({} if measured is None else {"times_ms": measured.times_ms, "warmup_ms": measured.warmup_ms})
            )
            if before not in (None, row["size"]):
                _note_state(writer, device, f"after {before}")
            before = row["size"]
            if on_row:
                on_row(row)
        _note_state(writer, device, "after")
    if output_json is not None:
        records.write_json(output_json, writer.stamp | {"rows": kept})
    return records.read_results(writer.path)


def _note_state(writer: records.ResultWriter, device: torch.device, when: str) -> None:
    if (state := gpu_state(device)) is not None:
        writer.method["gpu"].append({"when": when} | state)


def _extra(folder: Path, subject: Subject, point: Point, step: Callable[[], None]) -> None:
    """What --trace and --memory_profile leave of a point."""
    path = folder / f"model_benchmark_{point.name}"
    if subject.bench.trace:
        write_trace(step, subject.device, path.with_name(path.name + ".trace.json"))
    if subject.bench.memory_profile:
        from lmsys import plots

        held = 0 if subject.device.type == "cuda" else sum(t.nbytes for t in subject.resident())
        timeline = memory_timeline(step, subject.device, path.with_name(path.name + ".pickle"), held)
        plots.save(
            plots.memory_timeline(timeline, point.name.replace("_", " ")), path.with_name(path.name + ".memory.png")
        )


def write_trace(step: Callable[[], None], device: torch.device, path: Path) -> Path:
    """One step as a Chrome trace, for chrome://tracing or Perfetto."""
    with profiled(device) as profile:
        step()
    with records.atomic_path(path) as temporary:
        profile.export_chrome_trace(str(temporary))
    return path


def memory_timeline(step: Callable[[], None], device: torch.device, path: Path, held_bytes: int = 0):
    """Allocated memory during one step as a DataFrame of time_ms, allocated_mib.

    On a GPU from the allocator's history, whose snapshot goes to path (for pytorch.org/memory_viz). On a CPU, which has no snapshot, from the
    profiler's events over held_bytes, and no file is written.
    """
    import pandas as pd

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held_bytes = torch.cuda.memory_allocated(device)
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        try:
            step()
            torch.cuda.synchronize(device)
            with records.atomic_path(path) as temporary:
                torch.cuda.memory._dump_snapshot(str(temporary))
            snapshot = torch.cuda.memory._snapshot(device)
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        index = device.index if device.index is not None else torch.cuda.current_device()
        changes = snapshot_changes(snapshot["device_traces"][index])
    else:
        _, found = allocations(step)
        changes = [(when / 1e3, size) for when, size in found]
    times = [0.0] + [(when - changes[0][0]) / 1e3 for when, _ in changes]
    total = [held_bytes]
    for _, size in changes:
        total.append(total[-1] + size)
    return pd.DataFrame({"time_ms": times, "allocated_mib": [value / 2**20 for value in total]})


def snapshot_changes(trace: Sequence[dict[str, Any]]) -> list[tuple[float, int]]:
    """(microseconds, bytes) of each allocation, and, negative, of each free of a snapshot's device trace."""
    signs = {"alloc": 1, "free_requested": -1}
    return [(event["time_us"], signs[event["action"]] * event["size"]) for event in trace if event["action"] in signs]


# --- Compiling ahead ------------------------------------------------------------------------------


def compile_ahead(bench: BenchSettings, chosen: Sequence[Point]) -> None:
    """Compile the blocks of all points once, in several processes, so that the measuring process finds them in the cache on disk.

    A block compiles the same in a model of one layer. Tracing and compiling is single-threaded for the most part: on a host of many cores
    this takes most of the waiting out of a run. What fails here fails again when it is measured, and is a row there.
    """
    work = _compilations(chosen)
    shares = min(bench.compile_ahead, os.cpu_count() or 1, len(work))
    if shares < 2:
        return
    ahead.compile_shares(_compile_share, bench, shares, _COMPILE_LIMIT_S)


def _compilations(chosen: Sequence[Point]) -> list[Point]:
    """A point for each compilation of blocks: inference and training apart; the largest first, which take longest to run."""
    found: dict[tuple, Point] = {}
    for point in chosen:
        if point.compiled == "blocks":
            found.setdefault((point.model, point.context_length, point.dtype, point.mode == "forward"), point)
    return sorted(found.values(), key=lambda point: -point.context_length)


def _compile_share(bench: BenchSettings, share: int, shares: int) -> None:
    """One process's part: every shares-th compilation."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # the processes are the parallelism
    device = resolve_device(bench.device)
    for point in _compilations(points(bench))[share::shares]:
        try:
            with Subject(bench, point, device, num_layers=1).ready(point) as step:
                step()
        except Exception as error:
            print(f"compile ahead: {point.name}: {_failure(error)['note']}", file=sys.stderr)
        release(device)


# --- Fresh processes ------------------------------------------------------------------------------


def _in_fresh_process(work: Callable[..., Any], bench: BenchSettings, number: int) -> Any:
    """What work(bench, number) returns in a process that has computed nothing before, though it may have imported what that needs."""
    with ProcessPoolExecutor(1, mp_context=group.context(resolve_device(bench.device), __name__)) as pool:
        return pool.submit(_calm, work, bench, number).result()


def _calm(work: Callable[..., Any], bench: BenchSettings, number: int) -> Any:
    with one_thread(bench.scale == "smoke"):
        return work(bench, number)


def _cold_times(bench: BenchSettings, steps: int) -> list[float]:
    """Milliseconds of the first steps that a process makes."""
    device = resolve_device(bench.device)
    (point,) = points(bench, [bench.study])
    with Subject(bench, point, device).ready(point) as step:
        return time_steps(step, clock=StepClock(device), warmup=0, steps=steps)[1]


def _cold_profile(bench: BenchSettings, later: int) -> list[dict[str, Any]]:
    """Host time of each operator and call of CUDA in a process's first step, and in a later one, itself only."""
    device = resolve_device(bench.device)
    (point,) = points(bench, [bench.study])
    both = []
    with Subject(bench, point, device).ready(point) as step:
        for index in range(later):
            if index in (0, later - 1):
                with profiled(device) as profile:
                    step()
                both.append(
                    {event.key: (event.self_cpu_time_total / 1e3, event.count) for event in profile.key_averages()}
                )
            else:
                step()
    first, last = both
    return [
        {
            "name": name,
            "first_ms": first.get(name, (0.0, 0))[0],
            "later_ms": last.get(name, (0.0, 0))[0],
            "first_calls": first.get(name, (0.0, 0))[1],
            "later_calls": last.get(name, (0.0, 0))[1],
        }
        for name in {**first, **last}
    ]


def warmup_study(bench: BenchSettings, folder: str | Path) -> tuple[Any, Any]:
    """The first steps of a fresh process, one by one, and what the very first pays for; two CSV files, returned as DataFrames.

    Two processes, as the profiler that finds the second would disturb the first. A process has made its model before its first step, and with
    it the device's context. Both run the point bench.study, eager.
    """
    (point,) = points(bench, [bench.study])
    steps = max(WARMUP_COUNTS) + bench.steps
    base = {name: getattr(point, name) for name in ("size", "context_length", "batch", "dtype", "mode")}
    cold = _in_fresh_process(_cold_times, bench, steps)
    times = [base | {"step": step, "time_ms": value} for step, value in enumerate(cold)]
    paid = _in_fresh_process(_cold_profile, bench, max(WARMUP_COUNTS) + 1)
    paid.sort(key=lambda row: row["later_ms"] - row["first_ms"])
    made = []
    for name, found in ((WARMUP, times), (FIRST_STEP, paid)):
        writer = records.ResultWriter(
            name,
            folder,
            method={"timer": "a fresh process; host clock, device idle around each step"},
            parameters=dataclasses.asdict(bench),
        )
        with writer:
            for row in found:
                writer.write(row)
        made.append(records.read_results(writer.path))
    return made[0], made[1]
