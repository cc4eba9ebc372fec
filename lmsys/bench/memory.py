"""Where the memory of a training step goes, and what activation checkpointing saves of it.

Every allocation and release of a step is recorded: on a GPU by the caching allocator's history (torch.cuda.memory._record_memory_history, sizes as
asked for, not as rounded or reserved), on a CPU by the profiler's memory events. Each is then of one category: parameters and optimizer state (there
before the step), gradients (held by a parameter after the backward pass), activations (made in the forward pass and there at its end: what the
backward pass was kept, and the loss), temporary (all else), other (there before the step: inputs, tables, libraries' workspaces).
Marks divide the record into phases and blocks: on a GPU a mark is an allocation that its stack trace tells from all others, as the history knows no
other kind of event; on a CPU it is a range of the profiler's.

Answers memory_profiling and gradient_checkpointing of Stanford CS336, assignment 2, and section 3.1 of its 2026 edition (autograd residuals). The
course's xl of 2026 (d_model 2560, 32 layers) is the 2.7b of 2025, one shape.

Limits: a GPU's autograd thread has no Python stack, so allocations of a backward pass are told by size alone there; memory that bypasses PyTorch's
allocator (the CUDA context, NCCL) is not seen; the optimizer is torch's fused AdamW, which needs no memory of its own during the step, at learning
rate 0, so that every step computes the same numbers.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import itertools
import linecache
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmsys import cost, records
from lmsys.attention import get_kernel
from lmsys.bench.measure import is_out_of_memory, one_thread, quantiles, release, without_native_stderr
from lmsys.bench.processes import Clock
from lmsys.config import DTYPES, ModelConfig, model_size, require, resolve_scale, unknown_name
from lmsys.device import device_name, fp32_products, resolve_device
from lmsys.model import RMSNorm, TransformerLM, cross_entropy

TIMELINE, PEAKS, ALLOCATIONS, BLOCKS = "memory_timeline", "memory_peaks", "memory_allocations", "memory_blocks"
RESIDUALS, CHECKPOINTING = "memory_residuals", "memory_checkpointing"
MODES = ("forward", "full_step")
CATEGORIES = ("parameters", "optimizer", "other", "gradients", "activations", "temporary")
FORWARD_END, BACKWARD_END, STEP_END = "end of forward", "end of backward", "end of optimizer step"
_PHASES = {FORWARD_END: "forward", BACKWARD_END: "backward", STEP_END: "optimizer"}
_CACHED = " cached"
_POINTS = 400  # of a timeline that are written
_SCORES = ("vectorized_torch",)  # kernels whose T x T tensors cost.block_residuals counts; those of _FUSED keep none
_FUSED = ("flash_attention_triton",)
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "size": "tiny",
        "vocab_size": 256,
        "batch": 2,
        "contexts": (32,),
        "timeline_contexts": (32,),
        "kernels": ("vectorized_torch",),
        "dtypes": ("fp32",),
        "dtype": "fp32",
        "strategies": ("none", "1"),
        "steps": 2,
        "backend": None,
    },
    "cpu": {
        "size": "mini",
        "vocab_size": 1024,
        "batch": 2,
        "contexts": (64, 128),
        "timeline_contexts": (32, 128),
        "kernels": ("vectorized_torch",),
        "dtypes": DTYPES,
        "dtype": "fp32",
        "strategies": ("none", "1", "2", "nested"),
        "steps": 3,
        "backend": "aot_eager_decomp_partition",
    },
    "full": {
        "size": "2.7b",
        "vocab_size": None,
        "batch": 4,
        "contexts": (128, 256, 512, 2048),
        "timeline_contexts": (128, 2048),
        "kernels": ("vectorized_torch", "flash_attention_triton"),
        "dtypes": DTYPES,
        "dtype": "bf16",
        "strategies": ("none", "1", "1 cached", "2", "4", "nested"),
        "steps": 3,
        "backend": "inductor",
    },
}


@dataclass(frozen=True)
class MemorySettings:
    """What is run; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    size: str
    vocab_size: int | None
    batch: int
    contexts: tuple[int, ...]
    timeline_contexts: tuple[int, ...]
    kernels: tuple[str, ...]
    dtypes: tuple[str, ...]
    dtype: str
    strategies: tuple[str, ...]
    steps: int
    backend: str | None
    device: str
    seed: int

    @property
    def model(self) -> ModelConfig:
        length = max(*self.contexts, *self.timeline_contexts)
        return model_size(self.size, vocab_size=self.vocab_size, context_length=length)

    @property
    def kernel(self) -> str:
        """Of everything but the table of peaks."""
        return self.kernels[-1]


def settings(
    scale: str = "auto",
    size: str | None = None,
    vocab_size: int | None = None,
    batch: int | None = None,
    contexts: Sequence[int] | None = None,
    timeline_contexts: Sequence[int] | None = None,
    kernels: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    dtype: str | None = None,
    strategies: Sequence[str | int] | None = None,
    steps: int | None = None,
    backend: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> MemorySettings:
    """The settings of a scale, with what is given in their place.

    Args:
        contexts, kernels, dtypes: of the table of peaks. timeline_contexts: of the timelines, in dtype with the last of the kernels;
            the largest is that of the residuals and of checkpointing, too.
        strategies: of checkpointing: none, a number of blocks in a group, or nested (halves of halves, down to one block). All run
            without autocast's cache of cast weights; '1 cached' is groups of one block with it.
        steps: timed, of each strategy. backend: of torch.compile for RMSNorm; smoke compiles nothing unless one is given.
    Raises:
        ValueError: an unknown name or a number out of range.
    """
    scale = resolve_scale(scale)
    given = {
        "size": size,
        "vocab_size": vocab_size,
        "batch": batch,
        "contexts": contexts,
        "timeline_contexts": timeline_contexts,
        "kernels": kernels,
        "dtypes": dtypes,
        "dtype": dtype,
        "strategies": None if strategies is None else [str(name) for name in strategies],
        "steps": steps,
        "backend": backend,
    }
    values = _PRESETS[scale] | {key: value for key, value in given.items() if value is not None}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for name in ("contexts", "timeline_contexts", "kernels", "dtypes", "strategies"):
        require(len(values[name]) > 0, f"{name} must not be empty")
    for name, numbers in (("contexts", values["contexts"]), ("timeline_contexts", values["timeline_contexts"])):
        require(
            all(type(n) is int and n >= 2 for n in numbers), f"{name} are {numbers}; give whole numbers of 2 or more"
        )
    for name in ("batch", "steps"):
        require(type(values[name]) is int and values[name] >= 1, f"{name} is {values[name]!r}; it must be 1 or more")
    for name in (*values["dtypes"], values["dtype"]):
        if name not in DTYPES:
            raise unknown_name("dtype", name, DTYPES)
    for name in values["kernels"]:
        get_kernel(name)
    for name in values["strategies"]:
        if name not in ("none", "nested") and not re.fullmatch(r"[1-9]\d*( cached)?", name):
            raise unknown_name("checkpointing strategy", name, ("none", "nested", "1", "2", "4", "1 cached"))
    resolve_device(device)
    chosen = MemorySettings(scale=scale, device=device, seed=seed, **values)
    assert chosen.model  # an unknown size ends here
    return chosen


# --- Recording ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """An allocation of size bytes, or, where size is negative, its release. where: the operation, then frames, the innermost first."""

    address: int
    size: int
    where: tuple[str, ...] = ()


@dataclass
class Recording:
    """The changes of a step in their order; marks: name -> how many changes came before it."""

    changes: list[Change] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Records what the body of recording() allocates and releases on a device; stacks: on a CPU, with Python frames (slower)."""

    def __init__(self, device: torch.device, *, stacks: bool = False):
        self.device, self.stacks = device, stacks
        self._names: list[str] = []

    def mark(self, name: str) -> None:
        """Note this place of the record by a name."""
        if self.device.type == "cuda":
            self._names.append(name)
            _lmsys_memory_mark(self.device)
        else:
            with torch.profiler.record_function(_MARK_PREFIX + name):
                pass

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """The Recording is filled when the body is done."""
        found = Recording()
        if self.device.type == "cuda":
            yield from self._on_gpu(found)
        else:
            yield from self._on_cpu(found)

    def _on_gpu(self, found: Recording) -> Iterator[Recording]:
        history = torch.cuda.memory._record_memory_history
        torch.cuda.synchronize(self.device)
        history("all", context="alloc", stacks="python", clear_history=True)
        try:
            yield found
            torch.cuda.synchronize(self.device)
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            trace = torch.cuda.memory._snapshot(self.device)["device_traces"][index]
        finally:
            history(None)
        from_trace(trace, self._names, found)

    def _on_cpu(self, found: Recording) -> Iterator[Recording]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with without_native_stderr():
            profile = torch.profiler.profile(activities=activities, profile_memory=True, with_stack=self.stacks)
            with profile:
                yield found
        from_profile(profile.profiler.kineto_results.experimental_event_tree(), found)


_MARK_PREFIX = "lmsys.mark."


def _lmsys_memory_mark(device: torch.device) -> None:
    """An allocation that is told from others by this function's name in its stack trace."""
    torch.empty(1, dtype=torch.uint8, device=device)


def from_trace(trace: Iterable[Mapping[str, Any]], names: Sequence[str], found: Recording) -> None:
    """Fill a Recording from a device trace of the caching allocator's snapshot. names: of the marks in it, in order."""
    live: dict[int, int] = {}
    left = iter(names)
    for entry in trace:
        if entry["action"] == "alloc":
            address = entry["addr"]
            frames = entry.get("frames") or ()
            if any(frame["name"] == _lmsys_memory_mark.__name__ for frame in frames):
                found.marks[next(left)] = len(found.changes)
                continue
            live[address] = entry["size"]
            where = tuple(filter(None, (_frame(f["filename"], f["line"], f["name"]) for f in frames)))
            found.changes.append(Change(address, entry["size"], ("", *where)))
        elif entry["action"] == "free_completed" and entry["addr"] in live:
            found.changes.append(Change(entry["addr"], -live.pop(entry["addr"])))
    assert next(left, None) is None, "the allocator's history lacks marks"


def from_profile(roots: Sequence[Any], found: Recording) -> None:
    """Fill a Recording from the event tree of PyTorch's profiler on a CPU."""
    changes: list[tuple[int, Change]] = []
    marks: list[tuple[int, str]] = []
    stack = [(root, ()) for root in roots]
    while stack:
        event, above = stack.pop()
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            where = _names_to_where(above) if fields.alloc_size > 0 else ()
            changes.append((event.start_time_ns, Change(fields.ptr, fields.alloc_size, where)))
        elif event.name.startswith(_MARK_PREFIX):
            marks.append((event.start_time_ns, event.name.removeprefix(_MARK_PREFIX)))
        stack += [(child, (event.name, *above)) for child in event.children]
    live: set[int] = set()
    times = []
    for time_ns, change in sorted(changes, key=lambda item: item[0]):
        if change.size > 0:
            live.add(change.address)
        elif change.address in live:
            live.discard(change.address)
        else:
            continue  # was there before
        times.append(time_ns)
        found.changes.append(change)
    for time_ns, name in sorted(marks):
        found.marks[name] = int(np.searchsorted(times, time_ns))


def _names_to_where(names: Sequence[str]) -> tuple[str, ...]:
    """Names of profiler events, the innermost first, as Change.where: the operator that Python or autograd called, then our frames."""
    operator, frames = "", []
    for name in names:
        if name.startswith("aten::") or (name.endswith(("Backward", "Backward0", "Backward1")) and "::" not in name):
            operator = name
        elif match := re.fullmatch(r"(.+\.py)\((\d+)\): (.+)", name):
            frames.append(_frame(match[1], int(match[2]), match[3]))
    return (operator, *filter(None, frames))


@functools.cache
def _frame(filename: str, line: int, name: str) -> str | None:
    """'model.py:142 SwiGLU.forward' of a frame in this package, None of others and of this module's.

    A profiler gives the line of the definition, the allocator's history that being executed.
    """
    match = re.search(r"(?:^|/)lmsys/(.+\.py)$", filename)
    if match is None or match[1] == "bench/memory.py":
        return None
    around = [(first, full) for first, last, full in _functions(match[1]) if first <= line <= last]
    return f"{match[1]}:{line} {max(around)[1] if around else name}"


@functools.cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    """(first line, last line, qualified name) of the functions of a file of this package."""
    file = Path(records.__file__).parent / path
    if not file.exists():
        return []
    found, left = [], [(node, "") for node in ast.parse(file.read_text(encoding="utf-8")).body]
    while left:
        node, prefix = left.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = min(item.lineno for item in (node, *node.decorator_list))
            if isinstance(node, ast.FunctionDef):
                found.append((first, node.end_lineno, prefix + node.name))
            left += [(child, f"{prefix}{node.name}.") for child in node.body]
    return found


# --- A step, recorded -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Timeline:
    """A recorded step. held: bytes there before it, by category. gradients: addresses after the backward pass."""

    recording: Recording
    held: dict[str, int]
    gradients: frozenset[int]
    allocator_peak: int | None = None  # bytes, as a GPU's allocator has counted them, with its rounding

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        return int(self.total.max()) if self.allocator_peak is None else self.allocator_peak

    @functools.cached_property
    def allocations(self) -> list[tuple[Change, int, int]]:
        """(allocation, index of its change, index of its release, or the number of changes)."""
        started: dict[int, int] = {}
        found, changes = [], self.recording.changes
        for index, change in enumerate(changes):
            if change.size > 0:
                started[change.address] = index
            else:
                begin = started.pop(change.address)
                found.append((changes[begin], begin, index))
        found += [(changes[begin], begin, len(changes)) for begin in started.values()]
        return sorted(found, key=lambda item: item[1])

    def category(self, change: Change, begin: int, end: int) -> str:
        """Of an allocation, by when it was there: see the module."""
        marks = self.recording.marks
        if begin < marks[FORWARD_END] <= end:
            return "activations"
        if BACKWARD_END in marks and begin < marks[BACKWARD_END] <= end and change.address in self.gradients:
            return "gradients"
        return "temporary"

    def phase(self, index: int) -> str:
        """The part of the step that a change is in."""
        marks = self.recording.marks
        return next((name for mark, name in _PHASES.items() if mark in marks and index < marks[mark]), "after")

    @functools.cached_property
    def series(self) -> dict[str, np.ndarray]:
        """Category -> bytes before the first change and after each."""
        length = len(self.recording.changes) + 1
        deltas = {name: np.zeros(length + 1, dtype=np.int64) for name in CATEGORIES}
        for change, begin, end in self.allocations:
            delta = deltas[self.category(change, begin, end)]
            delta[begin + 1] += change.size
            delta[end + 1] -= change.size
        return {name: np.cumsum(delta)[:length] + self.held.get(name, 0) for name, delta in deltas.items()}

    @functools.cached_property
    def total(self) -> np.ndarray:
        return sum(self.series.values())

    def at(self, mark: str) -> int:
        """Bytes in all at a mark."""
        return int(self.total[self.recording.marks[mark]])

    @property
    def peak_activations(self) -> int:
        """Bytes at the most beside parameters, optimizer state, gradients and what is not the step's."""
        return int((self.series["activations"] + self.series["temporary"]).max())


class Bench:
    """A model whose steps are measured; make_optimizer() once forward passes alone have been."""

    def __init__(self, chosen: MemorySettings):
        self.chosen, self.device = chosen, resolve_device(chosen.device)
        torch.manual_seed(chosen.seed)
        with torch.device(self.device):
            self.model = TransformerLM(chosen.model, attention_kernel=chosen.kernel)
        self.optimizer: torch.optim.Optimizer | None = None
        self.caches_casts = True

    def autocast(self, dtype: str) -> torch.autocast:
        """As training has it. Autocast's cache keeps every weight that it has cast until its context ends: see caches_casts."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=dtype == "bf16", cache_enabled=self.caches_casts
        )

    def make_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def batch(self, context_length: int) -> tuple[Tensor, Tensor]:
        """Random inputs and targets on the device."""
        generator = torch.Generator().manual_seed(self.chosen.seed)
        shape = (2, self.chosen.batch, context_length)
        ids = torch.randint(self.chosen.model.vocab_size, shape, generator=generator).to(self.device)
        return ids[0], ids[1]

    def step(
        self, mode: str, batch: tuple[Tensor, Tensor], dtype: str, mark: Callable[[str], Any] | None = None
    ) -> Tensor:
        """One forward pass without autograd, or one whole step of training; its loss, or nothing of interest."""
        mark = mark or (lambda _name: None)
        inputs, targets = batch
        if mode == "forward":
            with torch.no_grad(), self.autocast(dtype):
                logits = self.model(inputs)
            mark(FORWARD_END)
            return logits.new_zeros(())
        with self.autocast(dtype):
            loss = cross_entropy(self.model(inputs), targets)
        mark(FORWARD_END)
        loss.backward()
        mark(BACKWARD_END)
        self.optimizer.step()
        mark(STEP_END)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def held(self) -> dict[str, int]:
        """Bytes there between steps, by category."""
        state = self.optimizer.state.values() if self.optimizer else ()
        found = {
            "parameters": _storage_bytes(self.model.parameters()),
            "optimizer": _storage_bytes(
                value for each in state for value in each.values() if isinstance(value, Tensor)
            ),
        }
        if self.device.type == "cuda":
            found["other"] = torch.cuda.memory_allocated(self.device) - sum(found.values())
        return found

    def timeline(self, mode: str, context_length: int, dtype: str, *, stacks: bool = False) -> Timeline:
        """Record a step after one that is not; marks at its phases and around every block."""
        batch = self.batch(context_length)
        self.step(mode, batch, dtype)
        if self.device.type == "cuda":
            release(self.device)
        held, recorder = self.held(), Recorder(self.device, stacks=stacks)
        addresses: set[int] = set()

        def mark(name: str) -> None:
            recorder.mark(name)
            if name == BACKWARD_END:
                grads = (parameter.grad for parameter in self.model.parameters())
                addresses.update(grad.untyped_storage().data_ptr() for grad in grads if grad is not None)

        with _block_marks(self.model, recorder), recorder.recording() as recording:
            peak = self._allocator_peak(lambda: self.step(mode, batch, dtype, mark))
        return Timeline(recording, held, frozenset(addresses), peak)

    def peak(self, mode: str, context_length: int, dtype: str) -> int:
        """Bytes at the most during a step; on a GPU, unlike a timeline, without a record."""
        if self.device.type != "cuda":
            return self.timeline(mode, context_length, dtype).peak
        batch = self.batch(context_length)
        self.step(mode, batch, dtype)
        release(self.device)
        return self._allocator_peak(lambda: self.step(mode, batch, dtype))

    def _allocator_peak(self, work: Callable[[], Any]) -> int | None:
        """Call work(); bytes at the most meanwhile, or None where no allocator counts them."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def times_ms(self, work: Callable[[], Any], steps: int) -> list[float]:
        """Milliseconds of each of so many calls, after one that is not counted."""
        work()
        clock = Clock(self.device)
        clock.tick()
        for _ in range(steps):
            work()
            clock.tick()
        return clock.times_ms()

    def clear(self) -> None:
        """Let go of what a step that failed has left."""
        self.model.zero_grad(set_to_none=True)
        release(self.device)


@contextlib.contextmanager
def _block_marks(model: TransformerLM, recorder: Recorder) -> Iterator[None]:
    """Mark where each block's forward pass begins and where its backward pass does; L stands for the end of the last, -1 of the first."""

    def at_input(index: int) -> Callable:
        def hook(_module: nn.Module, inputs: tuple) -> None:
            recorder.mark(f"forward {index}")
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _grad: recorder.mark(f"backward {index - 1}"))

        return hook

    modules = [*model.layers, model.ln_final]
    handles = [module.register_forward_pre_hook(at_input(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# --- The studies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The DataFrames of all studies."""

    peaks: Any
    timeline: Any
    allocations: Any
    blocks: Any
    residuals: Any
    checkpointing: Any


def run(
    chosen: MemorySettings, folder: str | Path, *, on_row: Callable[[str, dict[str, Any]], None] | None = None
) -> Results:
    """Run all studies; write a CSV of each to folder. on_row: called with a study's name and each of its rows, timelines' excepted."""
    device = resolve_device(chosen.device)
    stamp = {"method": method(device), "parameters": dataclasses.asdict(chosen)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(fp32_products("high" if device.type == "cuda" else None))
        stack.enter_context(one_thread(device.type == "cpu"))
        writers = {
            name: stack.enter_context(records.ResultWriter(name, folder, **stamp))
            for name in (PEAKS, TIMELINE, ALLOCATIONS, BLOCKS, RESIDUALS, CHECKPOINTING)
        }

        def write(name: str, row: dict[str, Any]) -> None:
            writers[name].write(row)
            if on_row and name != TIMELINE:
                on_row(name, row)

        bench = Bench(chosen)
        for mode in MODES:
            if mode == "full_step":
                bench.make_optimizer()
            for row in peak_rows(bench, mode):
                write(PEAKS, row)
            for context_length in chosen.timeline_contexts:
                for name, row in timeline_rows(bench, mode, context_length):
                    write(name, row)
        for row in [*block_residuals(bench), *norm_residuals(bench)]:
            write(RESIDUALS, row)
        for row in checkpointing_rows(bench):
            write(CHECKPOINTING, row)
    return Results(*(records.read_results(writer.path) for writer in writers.values()))


def method(device: torch.device) -> dict[str, str]:
    """How it is measured, for the stamp of a result."""
    gpu = device.type == "cuda"
    return {
        "memory": "the allocator's peak; timelines from its history" if gpu else "the profiler's memory events",
        "timer": "CUDA events between steps" if gpu else "time.perf_counter between steps, one thread",
        "warmup": "one step",
        "step": "forward, backward, torch's fused AdamW at learning rate 0, gradients set to None; inputs on the device",
        "statistic": "median, 20th and 80th percentile",
    }


def _point(bench: Bench, context_length: int, dtype: str, kernel: str, **more: Any) -> dict[str, Any]:
    chosen = bench.chosen
    return {
        "size": chosen.size,
        "context_length": context_length,
        "batch": chosen.batch,
        "dtype": dtype,
        "kernel": kernel,
        "device": device_name(bench.device),
    } | more


def _attempt(bench: Bench, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What measure() returns, or the status and note of its failure: memory ran out, or the kernel cannot do it."""
    try:
        return {"status": "ok"} | measure()
    except ValueError as error:
        return {"status": "unsupported", "note": str(error)}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        note = str(error).splitlines()[0]
    bench.clear()
    return {"status": "oom", "note": note}


def peak_rows(bench: Bench, mode: str) -> Iterator[dict[str, Any]]:
    """memory_profiling (b), (c): the peak of a mode at each kernel, dtype and context."""
    for kernel in bench.chosen.kernels:
        bench.model.set_attention_kernel(kernel)
        for dtype in bench.chosen.dtypes:
            for length in bench.chosen.contexts:
                point = _point(bench, length, dtype, kernel, mode=mode)
                yield point | _attempt(
                    bench, lambda n=length, kind=dtype: {"peak_mib": bench.peak(mode, n, kind) / 2**20}
                )
    bench.model.set_attention_kernel(bench.chosen.kernel)


def timeline_rows(bench: Bench, mode: str, context_length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """memory_profiling (a), (d), (e), (f): rows of memory_timeline, memory_allocations and memory_blocks from one recorded step."""
    chosen = bench.chosen
    found: list[Timeline] = []

    def record() -> dict[str, Any]:
        found.append(bench.timeline(mode, context_length, chosen.dtype, stacks=True))
        return {}

    outcome = _attempt(bench, record)
    point = _point(bench, context_length, chosen.dtype, chosen.kernel, mode=mode)
    if not found:
        yield ALLOCATIONS, point | {"kind": "largest"} | outcome
        return
    timeline = found[0]
    for row in sampled(timeline):
        yield TIMELINE, point | row
    stream = cost.residual_stream_bytes(chosen.model, chosen.batch, context_length)
    for row in largest(timeline):
        yield ALLOCATIONS, point | {"kind": "largest", "status": "ok"} | row
    if mode == "full_step":
        for row in largest(timeline, size=stream, category="activations"):
            yield ALLOCATIONS, point | {"kind": "stream", "status": "ok"} | row
        for row in block_rows(timeline, chosen.model):
            yield BLOCKS, point | row


def sampled(timeline: Timeline, points: int = _POINTS) -> Iterator[dict[str, Any]]:
    """Rows of a timeline: of each stretch of changes the one with the most memory, MiB by category."""
    total = timeline.total
    edges = np.unique(np.linspace(0, len(total), min(points, len(total)) + 1).astype(int))
    for begin, end in itertools.pairwise(edges):
        index = int(begin + np.argmax(total[begin:end]))
        row = {f"{name}_mib": timeline.series[name][index] / 2**20 for name in CATEGORIES}
        yield {"change": index, "phase": timeline.phase(max(0, index - 1))} | row


def largest(
    timeline: Timeline, *, size: int | None = None, category: str | None = None, top: int = 8
) -> list[dict[str, Any]]:
    """The largest allocations, those of one size, category and place together; size, category: only those."""
    groups: dict[tuple, list[int]] = {}
    for change, begin, end in timeline.allocations:
        kind = timeline.category(change, begin, end)
        if size in (None, change.size) and category in (None, kind):
            key = (change.size, kind, timeline.phase(begin), change.where)
            groups.setdefault(key, []).append(begin)
    rows = []
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], -len(item[1])))
    for (each, kind, phase, where), found in ordered[:top]:
        rows.append(
            {
                "size_mib": each / 2**20,
                "count": len(found),
                "category": kind,
                "phase": phase,
                "operator": where[0] if where else "",
                "stack": " < ".join(where[1:5]),
            }
        )
    return rows


def block_rows(timeline: Timeline, config: ModelConfig) -> list[dict[str, Any]]:
    """Of each block: bytes that its forward pass adds and that its backward pass adds, and the gradients that follow from both.

    Between the beginnings of two blocks' backward passes the residuals go and the gradients come: gradients = change + residuals.
    """
    rows, n = [], config.num_layers
    for index in range(n):
        forward = timeline.at(f"forward {index + 1}") - timeline.at(f"forward {index}")
        backward = timeline.at(f"backward {index - 1}") - timeline.at(f"backward {index}")
        rows.append(
            {
                "block": index,
                "forward_mib": forward / 2**20,
                "backward_mib": backward / 2**20,
                "gradients_mib": (forward + backward) / 2**20,
                "expected_gradients_mib": block_gradient_bytes(config) / 2**20,
            }
        )
    return rows


def block_gradient_bytes(config: ModelConfig) -> int:
    """Bytes of the fp32 gradients of one block."""
    d, f = config.d_model, config.d_ff
    return 4 * (4 * d * d + 3 * d * f + 2 * d)


# --- Residuals ------------------------------------------------------------------------------------


def saved_tensors(work: Callable[[], Any], known: Iterable[Tensor]) -> list[dict[str, Any]]:
    """The tensors that work() saves for its backward pass, those that share memory once, and not those of known; the largest first."""
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
            rows.append(
                {
                    "shape": "x".join(map(str, tensor.shape)),
                    "tensor_dtype": str(tensor.dtype).removeprefix("torch."),
                    "mib": storage.nbytes() / 2**20,
                    "where": where,
                }
            )
    del result
    return sorted(rows, key=lambda row: -row["mib"])


def _caller() -> str:
    """The innermost line of this package, outside this module, that is being executed: 'SwiGLU.forward: source'.

    A Linear is one of many: whose it is, is said, too.
    """
    frames, frame = [], sys._getframe(2)
    while frame is not None and len(frames) < 2:
        if _frame(frame.f_code.co_filename, frame.f_lineno, "") is not None:
            frames.append(frame)
        frame = frame.f_back
    if not frames:
        return "code outside the package"
    code = frames[0].f_code
    said = f"{code.co_qualname}: {linecache.getline(code.co_filename, frames[0].f_lineno).partition('#')[0].strip()}"
    return f"{said} in {frames[1].f_code.co_qualname}" if code.co_qualname == "Linear.forward" else said


def block_residuals(bench: Bench) -> list[dict[str, Any]]:
    """memory_profiling (f): what one block keeps, its input counted, parameters not; a row a tensor."""
    chosen, model = bench.chosen, bench.model
    length = max(chosen.timeline_contexts)
    block = model.layers[len(model.layers) // 2]
    x = torch.randn(chosen.batch, length, chosen.model.d_model, device=bench.device).requires_grad_()
    found: list[dict[str, Any]] = []

    def inspect() -> dict[str, Any]:
        with bench.autocast(chosen.dtype):
            rows = saved_tensors(
                lambda: block(x, model.rope.cos[:length], model.rope.sin[:length]),
                [*model.parameters(), *model.buffers()],
            )
        found.extend(rows)
        return {}

    outcome = _attempt(bench, inspect)
    point = _point(bench, length, chosen.dtype, chosen.kernel, what="block", mode="eager")
    return [point | outcome | row for row in found or [{}]]


def norm_residuals(bench: Bench) -> list[dict[str, Any]]:
    """What RMSNorm keeps, eager and compiled, of an fp32 input as the residual stream is; a row a tensor."""
    chosen = bench.chosen
    length, d = max(chosen.timeline_contexts), chosen.model.d_model
    with torch.device(bench.device):
        norm = RMSNorm(d)
        x = torch.randn(chosen.batch, length, d).requires_grad_()
    modes: dict[str, Callable] = {"eager": norm}
    if chosen.backend is not None:
        modes["compiled"] = torch.compile(norm, backend=chosen.backend, dynamic=False, fullgraph=True)
    rows = []
    for mode, function in modes.items():
        function(x)  # compiles
        point = _point(bench, length, "fp32", "", what="RMSNorm", mode=mode, status="ok")
        for row in saved_tensors(lambda call=function: call(x), norm.parameters()):
            rows.append(point | row | ({"where": "compiled code"} if mode == "compiled" else {}))
    return rows


# --- Checkpointing --------------------------------------------------------------------------------


def plan(strategy: str, num_blocks: int) -> cost.Checkpointing:
    """The plan of a strategy's name."""
    if strategy == "none":
        return cost.Checkpointing(num_blocks)
    nested = strategy == "nested"
    return cost.Checkpointing(num_blocks, 1 if nested else int(strategy.removesuffix(_CACHED)), nested)


def predicted(bench: Bench, strategy: str, context_length: int) -> dict[str, float] | None:
    """Bytes at the peak by formula, in all and of activations alone; None for a kernel whose residuals no formula counts.

    Left out: what the backward pass of one block works with beside the residuals, and what is 'other'.
    """
    chosen = bench.chosen
    if chosen.kernel not in (*_SCORES, *_FUSED):
        return None
    config, shape = chosen.model, (chosen.model, chosen.batch, context_length)
    scores, gpu = chosen.kernel in _SCORES, bench.device.type == "cuda"
    parts = cost.block_residuals(*shape, chosen.dtype, scores=scores, fp32_softmax=gpu)
    head = cost.head_peak(*shape, chosen.dtype)
    if strategy.endswith(_CACHED):
        head += config.num_layers * parts["cast weights"]
    activations, whole = plan(strategy, config.num_layers).peaks(
        cost.residual_stream_bytes(*shape),
        sum(parts.values()),
        head,
        block_gradient_bytes(config),
        4.0 * (config.vocab_size + 1) * config.d_model,
    )
    at_end = 4.0 * cost.model_parameters(config)  # the optimizer's step has all gradients and no activations
    return {"activations": activations, "whole": 12.0 * cost.model_parameters(config) + max(whole, at_end)}


def checkpointing_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """gradient_checkpointing (b): each strategy's peak and time, predicted and measured, at the largest context of the timelines.

    Without autocast's cache: a step casts each weight once a pass, and the cache would keep the casts of all blocks to the end of the
    forward pass, more than all inputs of the checkpoints.
    """
    chosen, model = bench.chosen, bench.model
    length = max(chosen.timeline_contexts)
    batch, num_blocks = bench.batch(length), chosen.model.num_layers
    baseline: float | None = None  # ms of a step without checkpoints
    forward = math.nan

    def keep_graph() -> None:
        with bench.autocast(chosen.dtype):
            model(batch[0])

    def measure() -> dict[str, Any]:
        timeline, losses = bench.timeline("full_step", length, chosen.dtype), []
        times = bench.times_ms(lambda: losses.append(bench.step("full_step", batch, chosen.dtype)), chosen.steps)
        median, p20, p80 = quantiles(times)
        return {
            "step_ms": median,
            "p20_ms": p20,
            "p80_ms": p80,
            "samples": len(times),
            "peak_mib": timeline.peak / 2**20,
            "activations_mib": timeline.peak_activations / 2**20,
            "loss": losses[-1].item(),
        }

    for strategy in chosen.strategies:
        planned = plan(strategy, num_blocks)
        model.checkpoint_blocks(planned.size, nested=planned.nested)
        bench.caches_casts = strategy.endswith(_CACHED)
        row = _point(bench, length, chosen.dtype, chosen.kernel, strategy=strategy) | _attempt(bench, measure)
        if strategy == "none" and row["status"] == "ok":
            baseline, forward = row["step_ms"], quantiles(bench.times_ms(keep_graph, chosen.steps))[0]
        expected = predicted(bench, strategy, length)
        row["block_forwards"] = planned.forwards()
        if expected:
            row |= {
                "predicted_peak_mib": expected["whole"] / 2**20,
                "predicted_activations_mib": expected["activations"] / 2**20,
            }
        if baseline is not None:
            row["predicted_ms"] = baseline + (planned.forwards() / num_blocks - 1) * forward
        yield row
    model.checkpoint_blocks(None)
    bench.caches_casts = True


# --- What the rows say ----------------------------------------------------------------------------


def row_line(study: str, row: Mapping[str, Any]) -> str:
    """One row as a line of progress; an empty line for rows that are many."""
    what = f"{row['kernel']:<22} {row['dtype']} x {row['context_length']:<5}"
    if row.get("status", "ok") != "ok":
        return f"{study:<22} {what} {row['status']}: {row['note']}"
    if study == PEAKS:
        return f"{study:<22} {what} {row['mode']:<10} {row['peak_mib']:>10,.1f} MiB"
    if study == CHECKPOINTING:
        return f"{study:<22} {what} {row['strategy']:<10} {row['peak_mib']:>10,.1f} MiB {row['step_ms']:>9.4g} ms"
    return ""


def _mib(value: float) -> str:
    return "" if math.isnan(value) else records.significant(value)


def peaks_table(frame) -> str:
    """Peak memory, MiB: rows contexts, columns mode and dtype, of each kernel, as Markdown."""
    lines = []
    for (kernel, length), rows in frame.groupby(["kernel", "context_length"], sort=False):
        line = {"kernel": f"`{kernel}`", "context": length}
        for row in rows.itertuples():
            line[f"{row.mode}, {row.dtype}"] = _mib(row.peak_mib) if row.status == "ok" else row.status
        lines.append(line)
    lines.sort(key=lambda line: line["kernel"])
    return records.markdown_table(lines)


def peaks_conclusions(frame) -> list[str]:
    """memory_profiling (b), (c) in sentences made from the rows."""
    said = []
    wide = frame[frame.status == "ok"].pivot_table(
        index=["kernel", "mode", "context_length"], columns="dtype", values="peak_mib", sort=False
    )
    if {"fp32", "bf16"} <= set(wide.columns):
        both = wide.dropna()
        for (kernel, mode), rows in both.groupby(["kernel", "mode"], sort=False):
            lengths = rows.index.get_level_values("context_length")
            first, last = (rows.bf16.iloc[i] / rows.fp32.iloc[i] for i in (0, -1))
            said.append(
                f"{kernel}, {mode.replace('_', ' ')}: bf16 autocast takes {first:.2f} times the peak of fp32 at {lengths[0]} tokens"
                + (f" and {last:.2f} times at {lengths[-1]}." if len(rows) > 1 else ".")
            )
        said.append(
            "Autocast keeps parameters, gradients and optimizer state in fp32 and adds 16-bit copies of the weights, which its cache holds to the end of "
            "the forward pass; what it halves is most of the "
            "activations, which count where the context is long."
        )
    for row in frame[frame.status != "ok"].itertuples():
        said.append(
            f"{row.kernel}, {row.mode.replace('_', ' ')}, {row.dtype}, {row.context_length} tokens: {row.status}, {row.note}"
        )
    return said


def timeline_conclusions(frame) -> list[str]:
    """memory_profiling (a): what each timeline is made of where it is highest, in sentences made from the rows."""
    said = []
    for (mode, length), rows in frame.groupby(["mode", "context_length"], sort=False):
        parts = rows[[f"{name}_mib" for name in CATEGORIES]]
        top = parts.sum(axis=1).idxmax()
        shares = ", ".join(
            f"{name} {_mib(parts.loc[top, f'{name}_mib'])}"
            for name in CATEGORIES
            if parts.loc[top, f"{name}_mib"] > 1e-3 * parts.loc[top].sum()
        )
        said.append(
            f"{mode.replace('_', ' ').capitalize()}, {length} tokens: the peak, {_mib(parts.loc[top].sum())} MiB, is in the {rows.phase[top]} pass: {shares} MiB."
        )
    return said


def stream_conclusions(chosen: MemorySettings, allocations) -> list[str]:
    """memory_profiling (d): the residual stream derived, and how often that size is among what the forward pass left, from the rows."""
    said = []
    for length in chosen.timeline_contexts:
        size = cost.residual_stream_bytes(chosen.model, chosen.batch, length) / 2**20
        rows = allocations[(allocations.kind == "stream") & (allocations.context_length == length)]
        added = rows[rows["stack"].astype(str).str.fullmatch(r"model\.py:\d+ TransformerBlock\.forward( < .*)?")]
        said.append(
            f"{chosen.batch} x {length} x {chosen.model.d_model} elements of 4 bytes over 2^20 are {_mib(size)} MiB; {int(rows['count'].sum())} "
            f"activations that the forward pass of a training step leaves have exactly that size, {int(added['count'].sum())} of them made where one of "
            f"the {chosen.model.num_layers} blocks adds to its input."
        )
    return said


def allocations_table(allocations, kind: str, mode: str, context_length: int) -> str:
    """memory_profiling (e): allocations of a recorded step with their stacks, as Markdown."""
    rows = allocations[
        (allocations.kind == kind) & (allocations["mode"] == mode) & (allocations.context_length == context_length)
    ]
    lines = []
    for row in rows.rename(columns={"count": "times"}).itertuples():  # a tuple has a method count
        if row.status != "ok":
            lines.append({"MiB": row.status, "where": row.note})
            continue
        operator, stack = ("" if isinstance(text, float) else text for text in (row.operator, row.stack))
        where = " < ".join(f"`{frame}`" for frame in ([operator] if operator else []) + stack.split(" < ") if frame)
        lines.append(
            {
                "MiB": _mib(row.size_mib),
                "times": int(row.times),
                "category": row.category,
                "where": where or "the autograd thread, without Python frames",
            }
        )
    return records.markdown_table(lines)


def contributors(residuals):
    """memory_profiling (f): what a block keeps by the line that keeps it: DataFrame of where, tensors, mib, share; the largest first."""
    block = residuals[(residuals.what == "block") & (residuals.status == "ok")]
    grouped = block.groupby("where", sort=False).mib.agg(tensors="count", mib="sum").reset_index()
    grouped["share"] = grouped.mib / grouped.mib.sum()
    return grouped.sort_values("mib", ascending=False, ignore_index=True)


def contributors_table(residuals, top: int = 5) -> str:
    """The largest contributors, as Markdown."""
    lines = [
        {"kept by": f"`{row.where}`", "tensors": row.tensors, "MiB": _mib(row.mib), "share": f"{100 * row.share:.1f}%"}
        for row in contributors(residuals).head(top).itertuples()
    ]
    return records.markdown_table(lines)


def blocks_conclusions(chosen: MemorySettings, results: Results) -> list[str]:
    """memory_profiling (f): residuals and gradients of one block, three ways, in sentences made from the rows."""
    said, length = [], max(chosen.timeline_contexts)
    kept = contributors(results.residuals)
    if len(kept):
        said.append(
            f"One block keeps {_mib(kept.mib.sum())} MiB at {length} tokens, counted by saved_tensors_hooks; the five largest contributors "
            f"are {100 * kept.share.head(5).sum():.1f}% of it."
        )
    if chosen.kernel in (*_SCORES, *_FUSED):
        gpu = resolve_device(chosen.device).type == "cuda"
        parts = cost.block_residuals(
            chosen.model, chosen.batch, length, chosen.dtype, scores=chosen.kernel in _SCORES, fp32_softmax=gpu
        )
        terms = ", ".join(
            f"{name} {_mib(size / 2**20)}" for name, size in sorted(parts.items(), key=lambda i: -i[1]) if size
        )
        said.append(f"The formula says {_mib(sum(parts.values()) / 2**20)} MiB: {terms}.")
    blocks = results.blocks[results.blocks.context_length == length]
    if len(blocks):
        middle = blocks.iloc[len(blocks) // 2]
        said.append(
            f"In the recorded step a block's forward pass adds {_mib(middle.forward_mib)} MiB; its backward pass changes memory by "
            f"{middle.backward_mib:+,.4g} MiB: the residuals go and {_mib(middle.gradients_mib)} MiB of gradients come. fp32 gradients of "
            f"its parameters are {_mib(middle.expected_gradients_mib)} MiB."
        )
    return said


def norm_table(residuals) -> str:
    """What RMSNorm keeps beside its parameters, eager and compiled, as Markdown."""
    rows = residuals[residuals.what == "RMSNorm"]
    lines = [
        {
            "mode": row.mode,
            "tensor": f"{row.shape} {row.tensor_dtype}",
            "MiB": _mib(row.mib),
            "kept by": f"`{row.where}`",
        }
        for row in rows.itertuples()
    ]
    return records.markdown_table(lines)


def norm_conclusions(residuals) -> list[str]:
    """What compiling RMSNorm saves, in sentences made from the rows."""
    sums = residuals[residuals.what == "RMSNorm"].groupby("mode", sort=False).mib.sum()
    said = [f"Eager RMSNorm keeps {_mib(sums['eager'])} MiB, its input among them."]
    if "compiled" in sums.index:
        said.append(
            f"Compiled it keeps {_mib(sums['compiled'])} MiB, {sums['compiled'] / sums['eager']:.2f} times as much: the partitioner computes the normalized "
            "values again in the backward pass from the input and 1 / rms, one number a token."
        )
    return said


def checkpointing_table(frame) -> str:
    """Each strategy: peak, activations, time, measured and (predicted), as Markdown."""
    lines = []
    for row in frame.itertuples():
        line = {"strategy": strategy_name(row.strategy), "block forwards": row.block_forwards}
        measured = {"peak MiB": row.peak_mib, "activations MiB": row.activations_mib, "step, ms": row.step_ms}
        expected = (row.predicted_peak_mib, row.predicted_activations_mib, row.predicted_ms)
        for (name, value), by_formula in zip(measured.items(), expected, strict=True):
            shown = row.status if math.isnan(value) else _mib(value)
            line[name] = shown if math.isnan(by_formula) else f"{shown} ({_mib(by_formula)})"
        line["loss"] = "" if math.isnan(row.loss) else f"{row.loss:.5f}"
        lines.append(line)
    return records.markdown_table(lines)


def strategy_name(strategy: str) -> str:
    """A strategy as tables and figures call it."""
    named = {"none": "keep everything", "nested": "nested halves", "1": "each block"}
    size = str(strategy).removesuffix(_CACHED)
    return named.get(size, f"groups of {size}") + (", casts cached" if str(strategy).endswith(_CACHED) else "")


def checkpointing_conclusions(frame) -> list[str]:
    """gradient_checkpointing (b) in sentences made from the rows."""
    ok = frame[frame.status == "ok"].assign(strategy=frame.strategy.astype(str))
    said = []
    flat = ok[~ok.strategy.isin(("none", "nested")) & ~ok.strategy.str.endswith(_CACHED)]
    if len(flat):
        best = flat.loc[flat.activations_mib.idxmin()]
        text = f"Without nesting, the least memory is that of '{strategy_name(best.strategy)}': {_mib(best.peak_mib)} MiB at the peak, activations {_mib(best.activations_mib)}"
        whole = ok[ok.strategy == "none"]
        if len(whole):
            base = whole.iloc[0]
            text += f", against {_mib(base.peak_mib)} and {_mib(base.activations_mib)} MiB when everything is kept, for {best.step_ms / base.step_ms:.2f} times the time"
        said.append(text + ".")
        expected = flat.dropna(subset=["predicted_activations_mib"])
        if len(expected):
            said.append(
                f"The formula's choice is '{strategy_name(expected.loc[expected.predicted_activations_mib.idxmin()].strategy)}'."
            )
        nested = ok[ok.strategy == "nested"]
        if len(nested):
            row = nested.iloc[0]
            said.append(
                f"Nested halves need {row.activations_mib / best.activations_mib:.2f} times its activations in {row.step_ms / best.step_ms:.2f} times its time."
            )
    for row in ok[ok.strategy.str.endswith(_CACHED)].itertuples():
        without = ok[ok.strategy == row.strategy.removesuffix(_CACHED)]
        if len(without):
            said.append(
                f"With autocast's cache of cast weights, '{strategy_name(without.strategy.iloc[0])}' holds {_mib(row.activations_mib)} MiB of activations "
                f"instead of {_mib(without.activations_mib.iloc[0])}: the cache keeps every block's casts until the forward pass ends, and each is used once in it."
            )
    both = ok.dropna(subset=["predicted_peak_mib"])
    if len(both):
        off = (both.peak_mib / both.predicted_peak_mib - 1).abs()
        said.append(
            f"Predicted peaks are off by at most {100 * off.max():.1f}% ({strategy_name(both.strategy[off.idxmax()])})."
        )
    if ok.loss.nunique() == 1 and len(ok) > 1:
        said.append("All strategies compute the same loss.")
    for row in frame[frame.status != "ok"].itertuples():
        said.append(f"{strategy_name(row.strategy)}: {row.status}, {row.note}")
    return said


def write_report(chosen: MemorySettings, results: Results, folder: str | Path) -> dict[str, Path]:
    """Write the figures and memory_report.md to folder; return their paths by their short names."""
    from lmsys import plots

    folder = Path(folder)
    figures = {}
    if len(results.timeline):
        figures["timeline"] = plots.memory_categories(results.timeline)
    kept = contributors(results.residuals)
    if len(kept):
        figures["residuals"] = plots.memory_residuals(kept)
    if len(results.checkpointing[results.checkpointing.status == "ok"]):
        names = [strategy_name(name) for name in results.checkpointing.strategy]
        figures["checkpointing"] = plots.checkpointing(results.checkpointing.assign(name=names))
    written = {name: plots.save(figure, folder / f"memory_{name}.png") for name, figure in figures.items()}
    written["report"] = records.write_text(folder / "memory_report.md", report_text(chosen, results))
    return written


def report_text(chosen: MemorySettings, results: Results) -> str:
    """memory_report.md: what to conclude, and the tables."""
    length = max(chosen.timeline_contexts)
    parts = (
        ("Timelines", timeline_conclusions(results.timeline), ""),
        ("Peaks, MiB", peaks_conclusions(results.peaks), peaks_table(results.peaks)),
        (
            "The residual stream and the largest allocations",
            stream_conclusions(chosen, results.allocations),
            allocations_table(results.allocations, "largest", "full_step", length),
        ),
        ("What one block keeps", blocks_conclusions(chosen, results), contributors_table(results.residuals)),
        ("RMSNorm", norm_conclusions(results.residuals), norm_table(results.residuals)),
        (
            "Activation checkpointing: measured (predicted)",
            checkpointing_conclusions(results.checkpointing),
            checkpointing_table(results.checkpointing),
        ),
    )
    text = ["# Memory", "", f"{chosen.size}, batch {chosen.batch}, measured on {results.peaks.device.iloc[0]}.", ""]
    for title, said, table in parts:
        text += [f"## {title}", "", *(f"- {sentence}" for sentence in said), "", table]
    return "\n".join(text)
