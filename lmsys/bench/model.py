"""The model benchmark: forward pass, forward and backward, full training step, by size, context, precision, compiled.

Answers benchmarking_script, torch_compile (b) and benchmarking_mixed_precision (c) of Stanford CS336, assignment 2
(systems). A point is timed as that assignment asks (measure_steps in bench/measure.py): 5 warm-up steps and 10 samples,
the device idle around each. A slow step gets fewer: see the parameter budget_s.

- forward: inference, no graph is kept. forward_backward: with the loss. full_step: the trainer's whole step. Gradients
  are dropped at the end of each step, so that every step of a mode allocates the same.
- fp32: matmuls in fp32 proper. tf32: fp32 tensors, matmuls on the tensor cores as TF32. bf16, fp16: autocast over fp32
  parameters; fp16 with a gradient scaler.
- compile: no; blocks, one compilation for all blocks and one for the loss; model, the whole model as one graph. Shapes
  are static.

Where memory runs out, the point is a row (oom), and the points of its series that need more still are not tried
(oom_skipped).

Limits: one device. Tokens are random. A point's model has its weights from the point before, of the same size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmsys import cost, records
from lmsys.attention import KERNELS, check_support
from lmsys.bench import ahead, experiment, measure, ranges
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, Row
from lmsys.bench.measure import StepClock, StepMeasurement, profiled, release
from lmsys.config import MODEL_SIZES, ModelConfig, PipelineConfig, build, model_size, require, with_train
from lmsys.device import device_name, fp32_products, peak_flops, resolve_device
from lmsys.model import cross_entropy
from lmsys.parallel import group
from lmsys.train.engine import Engine, autocast

MODES = ("forward", "forward_backward", "full_step")  # each needs more memory than the one before
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of matmuls
COMPILED = ("no", "blocks", "model")
WARMUP_COUNTS = (0, 1, 2, 5)  # that the cold start compares
_COMPILE_LIMIT_S = 240.0  # compiling ahead ends here; what is not done by then is compiled when it is measured
_FIRST_SCALE = 2.0**10  # of fp16's gradients: a step whose gradients overflow would leave the optimizer out

# --- Parameters -----------------------------------------------------------------------------------

Grid = dict[str, list]  # every combination of these lists
_FIELDS = ("sizes", "contexts", "dtypes", "modes", "compile")


def check(p: Parameters) -> None:
    """Fill in the grids: the scale's, or where one of the five lists is given, every combination of them.

    Raises:
        ValueError: an unknown name, a number out of range, a file that cannot be written, or points none of which fits.
    """
    given = {name: getattr(p, name) for name in _FIELDS if getattr(p, name) is not None}
    known = {"sizes": MODEL_SIZES, "dtypes": DTYPES, "modes": MODES, "compile": COMPILED, "attention_kernels": KERNELS}
    experiment.require_names(p, known)
    require(p.contexts != [], "contexts must not be empty")
    numbers = ("contexts", "batch_size", "steps", "checkpoint", "vocab_size")
    experiment.require_numbers(p, dict.fromkeys(numbers, 1) | {"warmup": 0, "compile_ahead": 0})
    require(p.budget_s > 0, f"budget_s is {p.budget_s}; it must be above 0")
    grids = experiment.scales("model_benchmark_points")[p.scale]
    rest = {"modes": list(MODES), "compile": ["no"]}
    p.grids = [rest | grid for grid in grids["points"]]
    p.repeated, p.cold = (rest | grids[name] for name in ("repeated", "cold"))
    if given:
        p.grids = [p.grids[0] | given]
        p.repeated = {name: values[-1:] if name == "modes" else values[:1] for name, values in p.grids[0].items()}
        p.cold = p.repeated | {"compile": ["no"]}
    if p.output_json is not None:
        records.writable_dir(Path(p.output_json).parent)
        require(not Path(p.output_json).is_dir(), f"output_json is {p.output_json}, a folder; give the path of a file")
    device = resolve_device(p.device)
    too_large = [_shortage(point, p, device) for point in points(p)]
    require(
        not all(too_large),
        f"no point fits the memory of {device_name(device)}: {too_large[0]}; shorten contexts or batch_size",
    )


NOTEBOOK = Notebook("model_benchmark", check)


def points(p: Parameters, grids: Sequence[Grid] | None = None) -> list[Point]:
    """Every point once; those of a model one after the other, contexts ascending: a series ends where memory does."""
    found: dict[tuple, Point] = {}
    for grid in p.grids if grids is None else grids:
        names = ("size", "kernel", "compiled", "context_length", "dtype", "mode")
        rest = (grid[name] for name in ("compile", "contexts", "dtypes", "modes"))
        for values in itertools.product(grid["sizes"], p.attention_kernels, *rest):
            point = dict(zip(names, values, strict=True))
            found[values] = point | {"batch": p.batch_size, "checkpoint": p.checkpoint, "warmup": p.warmup}
    models = list(dict.fromkeys(map(model_key, found.values())))

    def place(point: Point) -> tuple:
        within = point["context_length"], list(DTYPES).index(point["dtype"]), MODES.index(point["mode"])
        return models.index(model_key(point)), *within

    return sorted(found.values(), key=place)


def model_key(point: Point) -> tuple:
    """What points that share a model have in common."""
    return tuple(point[name] for name in ("size", "kernel", "compiled", "checkpoint"))


def point_name(point: Point) -> str:
    """For the names of files."""
    names = ("size", "context_length", "batch", "dtype", "compiled", "mode", "kernel")
    checkpoint = "" if point["checkpoint"] is None else f"_checkpoint{point['checkpoint']}"
    return "_".join(str(point[name]) for name in names) + checkpoint


def needs_no_less(point: Point, other: Point) -> bool:
    """Of the same series, context and mode each as large: where the other ran out of memory, so does this."""
    same = model_key(point) == model_key(other) and point["dtype"] == other["dtype"]
    larger = point["context_length"] >= other["context_length"] and point["batch"] >= other["batch"]
    return same and larger and MODES.index(point["mode"]) >= MODES.index(other["mode"])


def model_config(p: Parameters, size: str) -> ModelConfig:
    """The model of all points of a size: its tables of angles are as long as the longest context."""
    longest = max(length for grid in (*p.grids, p.repeated, p.cold) for length in grid["contexts"])
    return model_size(size, vocab_size=p.vocab_size, context_length=longest)


def least_bytes(point: Point, config: ModelConfig) -> float:
    """Memory that a point cannot do without: parameters, gradients, moments, logits, and scores where they are held."""
    state = {"forward": 1, "forward_backward": 2, "full_step": 4}[point["mode"]] * 4 * cost.model_parameters(config)
    element, tokens = DTYPES[point["dtype"]].itemsize, point["batch"] * point["context_length"]
    logits = element * tokens * config.vocab_size
    if point["kernel"] not in ranges.PLAIN_KERNELS or point["compiled"] != "no":
        return state + logits
    kept = 1 if point["mode"] == "forward" or point["checkpoint"] is not None else config.num_layers
    return state + logits + kept * element * tokens * config.num_heads * point["context_length"]


def _shortage(point: Point, p: Parameters, device: torch.device) -> str:
    """Why a point cannot fit the device's memory; empty where it may."""
    needed = least_bytes(point, model_config(p, point["size"]))
    there = (
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else measure.available_bytes()
    )
    if there is None or needed < there:
        return ""
    what = f"{point['size']}, {point['batch']} x {point['context_length']} tokens, {point['mode']}"
    return f"{what} needs at least {needed / 2**30:,.1f} GiB; there are {there / 2**30:,.1f}"


# --- What is measured -----------------------------------------------------------------------------


class Subject:
    """The trainer's engine, and the step of each point that shares its model."""

    def __init__(self, point: Point, p: Parameters, *, num_layers: int | None = None):
        config, self.device, self.p = model_config(p, point["size"]), resolve_device(p.device), p
        if num_layers is not None:
            config = dataclasses.replace(config, num_layers=num_layers)
        self.key, self.shape = model_key(point), None
        train = {"compile": point["compiled"] == "blocks", "attention_kernel": point["kernel"], "device": p.device}
        values = {"model": dataclasses.asdict(config), "train": train | {"seed": p.seed}}
        self.engine = Engine(
            build(PipelineConfig, values),
            self.device,
            prepare=lambda model: model.checkpoint_blocks(point["checkpoint"]),
        )
        if point["compiled"] == "model":
            self.engine.module = torch.compile(self.engine.module, dynamic=False)
            self.engine.loss_function = torch.compile(cross_entropy, dynamic=False)
        elif point["compiled"] == "no" and p.nvtx:
            ranges.name_parts(self.engine.model)

    @contextlib.contextmanager
    def ready(self, point: Point) -> Iterator[Callable[[], None]]:
        """The step of a point, to be called in this context; afterwards its gradients and optimizer state are gone."""
        engine, compiled = self.engine, point["compiled"] != "no"
        if compiled and self.shape != (point["context_length"], point["dtype"]):
            torch._dynamo.reset()  # its limit on recompilations is one for all shapes
            self.shape = point["context_length"], point["dtype"]
        engine.config = with_train(engine.config, dtype="fp32" if point["dtype"] == "tf32" else point["dtype"])
        scaled = point["dtype"] == "fp16"
        engine.scaler = torch.amp.GradScaler(self.device.type, init_scale=_FIRST_SCALE, enabled=scaled)
        if self.p.nvtx:
            engine.phase = ranges.named
        with contextlib.ExitStack() as stack:
            tf32 = self.device.type == "cuda" and point["dtype"] != "fp32"
            stack.enter_context(fp32_products("high" if tf32 else "highest"))
            if compiled:  # past the limit the rest would run eager without a word
                stack.enter_context(torch._dynamo.config.patch(fail_on_recompile_limit_hit=True))
            if self.p.nvtx:  # or a recomputation leaves a block before its ranges end
                stack.enter_context(torch.utils.checkpoint.set_checkpoint_early_stop(False))
            stack.callback(engine.optimizer.state.clear)
            stack.callback(engine.optimizer.zero_grad, set_to_none=True)
            yield self._step(point)

    def _step(self, point: Point) -> Callable[[], None]:
        engine, generator = self.engine, torch.Generator(self.device).manual_seed(self.p.seed)
        shape, vocabulary = (point["batch"], point["context_length"]), engine.config.model.vocab_size
        ids, targets = (torch.randint(vocabulary, shape, generator=generator, device=self.device) for _ in range(2))
        numbers, batches = itertools.count(), measure.Repeated((ids, targets))

        def forward() -> None:
            with engine.phase("forward"), torch.no_grad(), autocast(self.device, engine.config.train.dtype):
                engine.module(ids)

        def train() -> None:
            engine.accumulate(batches)
            if point["mode"] == "full_step":
                engine.update(1e-4)
            else:
                engine.optimizer.zero_grad(set_to_none=True)

        work = forward if point["mode"] == "forward" else train

        def step() -> None:
            with ranges.named(f"step {next(numbers)}") if self.p.nvtx else contextlib.nullcontext():
                work()

        return step

    def resident(self) -> Iterator[Tensor]:
        """The tensors that are there between steps."""
        yield from self.engine.model.parameters()
        yield from self.engine.model.buffers()
        for state in self.engine.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def measure(self, step: Callable[[], None]) -> StepMeasurement:
        """Warm-up and samples of a step."""
        options = {name: getattr(self.p, name) for name in ("warmup", "steps", "budget_s")}
        with measure.one_thread(self.p.scale == "smoke" and self.device.type == "cpu"):
            clock = StepClock(self.device)
            return measure.measure_steps(step, device=self.device, clock=clock, resident=self.resident, **options)


_subject: list[Subject] = []  # the one at hand
_ended: list[Point] = []  # where memory ran out


def subject_of(point: Point, p: Parameters) -> Subject:
    """The point's subject, made anew where the one at hand is of another model."""
    if not _subject or _subject[0].key != model_key(point) or _subject[0].p != p:
        _subject.clear()  # its memory first
        release(resolve_device(p.device))
        _subject.append(Subject(point, p))
    return _subject[0]


def measure_point(point: Point, p: Parameters) -> Row:
    """A point's times, rates and memory; oom_skipped where a smaller one ran out of memory."""
    config, device = model_config(p, point["size"]), resolve_device(p.device)
    require(point["dtype"] != "tf32" or device.type == "cuda", "tf32 is a mode of NVIDIA's tensor cores; this is a CPU")
    shape = {"head_dim": config.head_dim, "heads": config.num_heads, "backward": point["mode"] != "forward"}
    check_support(point["kernel"], device=device, dtype=DTYPES[point["dtype"]], **shape)
    smaller = next((other for other in _ended if needs_no_less(point, other)), None)
    if smaller is not None:
        note = f"memory ran out at context {smaller['context_length']}, {smaller['mode']}"
        return {"status": "oom_skipped", "note": note}
    try:
        if device.type == "cpu" and (shortage := _shortage(point, p, device)):
            raise MemoryError(shortage)
        subject = subject_of(point, p)
        with subject.ready(point) as step:
            measured = subject.measure(step)
            _leave_files(subject, point, step)
    except Exception as error:
        _subject.clear()
        if measure.is_out_of_memory(error):
            _ended.append(point)
        raise
    return figures_of(point, config, measured, device)


def figures_of(point: Point, config: ModelConfig, measured: StepMeasurement, device: torch.device) -> Row:
    """The measured part of a row. Rates are of the median; MFU counts the model's FLOPs, not recomputed ones."""
    tokens_per_s = point["batch"] * point["context_length"] / measured.median_ms * 1e3
    flops = cost.train_flops_per_token(config, point["context_length"]) / (3 if point["mode"] == "forward" else 1)
    columns = {name: getattr(measured, name) for name in ("mean_ms", "std_ms", "reserved_mib")}
    return measured.columns() | columns | {
        "first_ms": measured.warmup_ms[0] if measured.warmup_ms else None,
        "warmup_done": len(measured.warmup_ms),
        "tokens_per_s": tokens_per_s,
        "tflops": tokens_per_s * flops / 1e12,
        "mfu": cost.mfu(tokens_per_s, flops, peak_flops(device_name(device), point["dtype"])),
        "times_ms": " ".join(f"{value:.6g}" for value in measured.times_ms),
    }  # fmt: skip


# --- Files of a point -----------------------------------------------------------------------------


def _leave_files(subject: Subject, point: Point, step: Callable[[], None]) -> None:
    """What trace (for chrome://tracing or Perfetto) and memory_profile leave of a point beside the results."""
    path = records.artifacts_dir(subject.p.machine) / f"model_benchmark_{point_name(point)}"
    if subject.p.trace:
        with profiled(subject.device) as profile:
            step()
        with records.atomic_path(path.with_name(path.name + ".trace.json")) as temporary:
            profile.export_chrome_trace(str(temporary))
    if subject.p.memory_profile:
        from lmsys import figures

        held = 0 if subject.device.type == "cuda" else sum(t.nbytes for t in subject.resident())
        timeline = memory_timeline(step, subject.device, path.with_name(path.name + ".pickle"), held)
        figure = figures.lines(timeline, "time_ms", "allocated_mib", xlabel="ms", ylabel="allocated, MiB")
        figures.save(figure, path.with_name(path.name + ".memory.png"), "Allocated memory during one step")


def memory_timeline(step: Callable[[], None], device: torch.device, path: Path, held_bytes: int = 0):
    """Allocated memory during one step as a DataFrame of time_ms, allocated_mib.

    On a GPU from the allocator's history, whose snapshot goes to path (for pytorch.org/memory_viz). On a CPU, which has
    no snapshot, from the profiler's events over held_bytes, and no file is written.
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
        index = torch.cuda.current_device() if device.index is None else device.index
        changes = snapshot_changes(snapshot["device_traces"][index])
    else:
        _, found = measure.allocations(step)
        changes = [(when / 1e3, size) for when, size in found]
    frame = pd.DataFrame([(changes[0][0], held_bytes), *changes], columns=["at_us", "bytes"])
    return pd.DataFrame(
        {"time_ms": (frame.at_us - frame.at_us[0]) / 1e3, "allocated_mib": frame.bytes.cumsum() / 2**20}
    )


def snapshot_changes(trace: Sequence[dict[str, Any]]) -> list[tuple[float, int]]:
    """(microseconds, bytes) of each allocation, and, negative, of each free of a snapshot's device trace."""
    signs = {"alloc": 1, "free_requested": -1}
    return [(event["time_us"], signs[event["action"]] * event["size"]) for event in trace if event["action"] in signs]


# --- Compiling ahead ------------------------------------------------------------------------------


def compile_ahead(p: Parameters) -> None:
    """Compile the blocks of all points once: inference and training apart, the largest first, which take longest."""
    work: dict[tuple, Point] = {}
    for point in sorted(points(p), key=lambda point: -point["context_length"]):
        if point["compiled"] == "blocks":
            key = (model_key(point), point["context_length"], point["dtype"], point["mode"] == "forward")
            work.setdefault(key, point)
    ahead.compile_points(compile_point, list(work.values()), p, p.compile_ahead, _COMPILE_LIMIT_S)


def compile_point(point: Point, p: Parameters) -> None:
    """A block compiles the same in a model of one layer."""
    with Subject(point, p, num_layers=1).ready(point) as step:
        step()


# --- Cold starts ----------------------------------------------------------------------------------


def measure_cold(point: Point, p: Parameters) -> Measured:
    """The first steps of a fresh process, one by one; and what the very first pays for, as a table.

    Two processes, as the profiler that finds the second would disturb the first. A process has made its model before
    its first step, and with it the device's context.
    """
    times = _in_fresh_process(_cold_times, p, max(WARMUP_COUNTS) + p.steps)
    paid = _in_fresh_process(_cold_profile, p, max(WARMUP_COUNTS) + 1)
    paid.sort(key=lambda row: row["later_ms"] - row["first_ms"])
    rows = [{"step": step, "time_ms": value} for step, value in enumerate(times)]
    return Measured(rows, {"model_benchmark_first_step": paid})


def _in_fresh_process(work: Callable[..., Any], p: Parameters, number: int) -> Any:
    """work(p, number) in a process that has computed nothing before, though it may have imported much."""
    calm = {"initializer": torch.set_num_threads, "initargs": (1,)} if p.scale == "smoke" else {}
    with ProcessPoolExecutor(1, group.context(resolve_device(p.device), __name__), **calm) as pool:
        return pool.submit(work, p, number).result()


def _cold_times(p: Parameters, steps: int) -> list[float]:
    """Milliseconds of the first steps that a process makes."""
    (point,) = points(p, [p.cold])
    subject = Subject(point, p)
    with subject.ready(point) as step:
        return measure.time_steps(step, clock=StepClock(subject.device), warmup=0, steps=steps)[1]


def _cold_profile(p: Parameters, later: int) -> list[Row]:
    """Host time of each operator and call of CUDA in a process's first step, and in a later one, itself only."""
    (point,) = points(p, [p.cold])
    subject, both = Subject(point, p), []
    with subject.ready(point) as step:
        for index in range(later):
            with profiled(subject.device) if index in (0, later - 1) else contextlib.nullcontext() as profile:
                step()
            if profile is not None:
                events = profile.key_averages()
                both.append({event.key: (event.self_cpu_time_total / 1e3, event.count) for event in events})
    first, last = both
    columns = ("name", "first_ms", "first_calls", "later_ms", "later_calls")
    none = (0.0, 0)
    return [
        dict(zip(columns, (name, *first.get(name, none), *last.get(name, none)), strict=True))
        for name in {**first, **last}
    ]


def warmup_windows(times, steps: int) -> list[Row]:
    """What a benchmark of so many samples reports of a cold start after each of WARMUP_COUNTS steps."""
    windows = {warmup: times.time_ms.iloc[warmup : warmup + steps] for warmup in WARMUP_COUNTS}
    return [
        {"warm-up steps": warmup, "mean_ms": window.mean(), "std_ms": window.std()}
        for warmup, window in windows.items()
    ]


# --- Experiments ----------------------------------------------------------------------------------


def _method(p: Parameters) -> dict[str, Any]:
    device = resolve_device(p.device)
    return {
        "timer": "host clock, device idle before and after each step",
        "warmup": f"{p.warmup} steps, fewer of a slow one: see the column warmup_done",
        "samples": f"{p.steps}, fewer of a slow step: see the column samples",
        "statistic": "mean and standard deviation; median, 20th and 80th percentile; all samples in times_ms",
        "memory": "peak allocated and reserved, parameters included; on a CPU from the profiler's events",
        "empty_step_ms": StepClock(device).overhead_ms(),
        "gpu": measure.gpu_state(device),
    }


RESULTS = Experiment(
    name="model_benchmark_results",
    columns=(
        *("size", "context_length", "batch", "dtype", "compiled", "mode", "warmup", "status"),
        *("mean_ms", "std_ms", "median_ms", "samples", "tokens_per_s", "mfu", "peak_mib"),
        *("p20_ms", "p80_ms", "first_ms", "warmup_done", "tflops", "reserved_mib", "kernel", "checkpoint", "times_ms"),
        *("device", "note"),
    ),
    points=points,
    measure=measure_point,
    group=("size", "dtype"),
    method=_method,
    before=lambda p: (_ended.clear(), compile_ahead(p)),
)
REPEAT = dataclasses.replace(
    RESULTS, name="model_benchmark_repeat", points=lambda p: points(p, [p.repeated]), before=lambda p: _ended.clear()
)
COLD = Experiment(
    name="model_benchmark_warmup",
    columns=("size", "context_length", "batch", "dtype", "mode", "step", "time_ms"),
    points=lambda p: points(p, [p.cold]),
    measure=measure_cold,
    method=lambda p: {"timer": "a fresh process; host clock, device idle around each step"},
    tables={"model_benchmark_first_step": ("name", "first_ms", "later_ms", "first_calls", "later_calls")},
)


# --- Tables ---------------------------------------------------------------------------------------


def paired(rows, column: str, base: str, other: str):
    """The points that are ok with both values of a column, one beside the other; gain: base's median over other's."""
    keys = [name for name in ("size", "context_length", "dtype", "compiled", "mode", "kernel") if name != column]
    ok = rows[rows.status == "ok"]
    both = ok[ok[column] == base].merge(ok[ok[column] == other], on=keys, suffixes=("", "_other"))
    return both.assign(gain=both.median_ms / both.median_ms_other, **{column: other})


def mean_std(mean: float, std: float) -> str:
    """A mean with its standard deviation, to the digits that the latter leaves."""
    return f"{records.significant(mean, 4)} ± {records.significant(std, 2)}"
