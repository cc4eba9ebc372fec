"""Time and memory of a callable, on a GPU by events and on a CPU by the wall clock.

As in Triton's do_bench, each sample on a GPU starts with a cold L2 (a buffer larger than it is written first), is timed
by a pair of events, and nothing synchronizes between samples. The buffer is written so often that the GPU is still at
it when the host has launched the call, as inside a training step, where the host is ahead: the time is the GPU's,
whatever the host is worth. Memory is measured in a call of its own, before the timed ones.

measure_steps() times a training step as the course's benchmarking_script does: by the host's clock, read before and
after each step when the device has finished, so that a step's launches count as far as the device waits for them. All
steps are kept, warm-up too.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmsys.device import _output

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_L2_FLUSH_BYTES = 256 * 2**20  # several times the largest L2 of a GPU today (60 MB on an H200)
_L2_FLUSHES = 8, 160  # at least and at most: 8 x 256 MiB at 4 TB/s are half a millisecond on an H200
_LEAD = 2.0  # times as long as the call took the host once: it varies


@dataclass(frozen=True)
class Measurement:
    """What a callable took: its samples' median and 20th and 80th percentile, and the peak of its memory."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_mib: float
    times_ms: list[float] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return len(self.times_ms)

    def columns(self) -> dict[str, Any]:
        """As columns of a row: median_ms, p20_ms, p80_ms, samples, peak_mib."""
        times = {"median_ms": self.median_ms, "p20_ms": self.p20_ms, "p80_ms": self.p80_ms}
        return times | {"samples": self.samples, "peak_mib": self.peak_mib}

    @property
    def mean_ms(self) -> float:
        return statistics.fmean(self.times_ms)

    @property
    def std_ms(self) -> float | None:
        """Standard deviation of the samples, with n - 1; None for fewer than two."""
        return statistics.stdev(self.times_ms) if self.samples > 1 else None


@dataclass(frozen=True)
class StepMeasurement(Measurement):
    """What a step took. warmup_ms: the untimed steps, the first of which compiles. reserved_mib: by the allocator."""

    warmup_ms: list[float] = field(default_factory=list)
    reserved_mib: float | None = None


def method(device: torch.device, warmup: int, iterations: int) -> dict[str, Any]:
    """How measure() measures, for the stamp of a result."""
    gpu = device.type == "cuda"
    return {
        "timer": "CUDA events, cold L2, host ahead" if gpu else "time.perf_counter",
        "warmup": f"{warmup} calls, fewer of a slow function",
        "samples": f"{iterations}, fewer of a slow function: see the column samples",
        "statistic": "median, 20th and 80th percentile",
        "memory": "peak allocated, inputs included" + ("" if gpu else " (from the profiler's allocation events)"),
    }


def measure(
    function: Callable[..., Any],
    *,
    device: torch.device,
    warmup: int,
    iterations: int,
    prepare: Callable[[], tuple] | None = None,
    resident: Iterable[torch.Tensor] = (),
    budget_s: float = math.inf,
) -> Measurement:
    """Time function(*prepare()), with only function in the timed region.

    Args:
        function: the work. prepare: makes its arguments anew for each sample, untimed; None for no arguments.
        warmup: untimed calls first (compilation and autotuning belong there); at least 2.
        iterations: samples.
        budget_s: a slow function gets fewer warm-up calls and samples (not under one and three), about this many
            seconds of each.
        resident: tensors that exist before the call and count as memory on a CPU; a GPU's allocator counts them itself.
    Raises:
        what the function raises, out of memory too.
    """
    arguments = prepare or (lambda: ())
    _timed_call(function, arguments, device)  # compiles and tunes: its time says nothing about the next
    seconds = _timed_call(function, arguments, device)
    for _ in range(min(warmup - 2, math.floor(budget_s / seconds)) if warmup > 2 else 0):
        function(*arguments())
    iterations = min(iterations, max(3, int(min(budget_s / seconds, iterations))))
    if device.type == "cuda":
        peak = _peak_bytes_cuda(function, arguments, device)
        times = _times_cuda(function, arguments, iterations, device)
    else:
        peak = sum(t.numel() * t.element_size() for t in resident) + peak_bytes_cpu(function, arguments)
        times = _times_cpu(function, arguments, iterations)
    return Measurement(*quantiles(times), peak / 2**20, times)


def _timed_call(function: Callable, arguments: Callable[[], tuple], device: torch.device) -> float:
    """Seconds of one whole call, preparation included, by the wall clock."""
    start = time.perf_counter()
    function(*arguments())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or the process that it speaks of, says that a GPU's or the CPU's memory ran out."""
    signs = ("DefaultCPUAllocator", "OutOfMemoryError", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)


def failure(error: BaseException) -> dict[str, str]:
    """Status and note of a row that failed: ValueError is unsupported, no memory is oom, all else is an error."""
    note = (str(error).strip().splitlines() or [""])[0]
    if is_out_of_memory(error):
        return {"status": "oom", "note": note}
    if isinstance(error, ValueError):
        return {"status": "unsupported", "note": note}
    return {"status": "error", "note": f"{type(error).__name__}: {note}".removesuffix(": ")}


def release(device: torch.device) -> None:
    """Give back what a failed or finished point still holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def settled() -> Iterator[None]:
    """In here the collector, which release() calls at each point, does not look through what was imported before."""
    importlib.import_module("torch._dynamo")  # which a process's first optimizer imports, a second of work
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def quantiles(times_ms: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, interpolated linearly."""
    values = torch.tensor(times_ms, dtype=torch.float64)
    return tuple(torch.quantile(values, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist())


def _peak_bytes_cuda(function: Callable, arguments: Callable[[], tuple], device: torch.device) -> int:
    release(device)
    given = arguments()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    function(*given)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


class Flush:
    """Called before a sample: empties the L2 cache, and keeps the GPU busy while the host launches what is measured."""

    def __init__(self, device: torch.device):
        self.buffer = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.times = _L2_FLUSHES[0]

    def __call__(self) -> None:
        for _ in range(self.times):
            self.buffer.zero_()

    def lead(self, call: Callable[[], Any]) -> None:
        """Take as many writes as the host needs to launch the call, the most where the call waits for the GPU."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.times = _L2_FLUSHES[1]
        torch.cuda.synchronize(self.buffer.device)
        start.record()
        self()
        end.record()
        begin = time.perf_counter()
        call()
        host_ms = (time.perf_counter() - begin) * 1e3
        torch.cuda.synchronize(self.buffer.device)
        self.times = writes(host_ms, start.elapsed_time(end) / self.times)


def writes(host_ms: float, write_ms: float) -> int:
    """How many writes of write_ms last _LEAD times as long as the host needs, within bounds."""
    least, most = _L2_FLUSHES
    return min(most, max(least, math.ceil(_LEAD * host_ms / write_ms)))


def _times_cuda(
    function: Callable, arguments: Callable[[], tuple], iterations: int, device: torch.device
) -> list[float]:
    flush, given = Flush(device), arguments()
    flush.lead(lambda: function(*given))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
    for start, end in pairs:
        given = arguments()
        flush()
        start.record()
        function(*given)
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairs]


def _times_cpu(function: Callable, arguments: Callable[[], tuple], iterations: int) -> list[float]:
    times = []
    for _ in range(iterations):
        given = arguments()
        start = time.perf_counter()
        function(*given)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def live_bytes(device: torch.device, module: torch.nn.Module | None = None) -> float:
    """Bytes that tensors hold now: a GPU's allocator knows; on a CPU those that Python can see, and gradients."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    seen = [*gc.get_objects(), *(parameter.grad for parameter in (module.parameters() if module else ()))]
    tensors = [one for one in seen if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu"]
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        with suppress(RuntimeError):  # one without memory, as compilers trace with
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_bytes_cpu(function: Callable, arguments: Callable[[], tuple]) -> int:
    """The largest sum of the allocations and frees that PyTorch's profiler sees during the call."""
    given = arguments()
    changes = allocations(lambda: function(*given))[1]
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def allocations(function: Callable[[], Any]) -> tuple[Any, list[tuple[int, int]]]:
    """The result of a call on a CPU, and in order (ns, bytes) of each allocation and, negative, of each free in it."""
    with without_native_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return result, [(event.start_ns(), event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns())]


def available_bytes() -> int | None:
    """Free memory of the CPU; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


@contextmanager
def one_thread(when: bool) -> Iterator[None]:
    """PyTorch's CPU operators in here on one thread, when so: several share small work badly on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if when else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def profiled(device: torch.device, **options: Any) -> Iterator[torch.profiler.profile]:
    """PyTorch's profiler around what the CPU and the device do in here; the device is waited for at both ends."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with without_native_stderr(), torch.profiler.profile(activities=activities, **options) as profile:
        yield profile
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@contextmanager
def without_native_stderr() -> Iterator[None]:
    """The profiler's library writes two lines to file descriptor 2 at each use; nothing of interest is lost."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


# --- Steps ----------------------------------------------------------------------------------------


class StepClock:
    """The host's clock, read when the device has nothing left to do."""

    def __init__(self, device: torch.device):
        self.device = device

    def read_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def overhead_ms(self, steps: int = 100) -> float:
        """The median time of a step that does nothing: what the clock adds to every step."""
        return statistics.median(time_steps(lambda: None, clock=self, warmup=5, steps=steps)[1])


def time_steps(
    step: Callable[[], Any],
    *,
    clock: StepClock,
    warmup: int,
    steps: int,
    budget_s: float = math.inf,
    warmed: Callable[[], Any] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Milliseconds of each warm-up step and of each sample, the device idle before and after each.

    Args:
        budget_s: where the second warm-up step shows that more would take longer, fewer follow (not under three
            samples).
        warmed: called between the warm-up and the samples.
    """

    def timed() -> float:
        start = clock.read_s()
        step()
        return (clock.read_s() - start) * 1e3

    first = [timed() for _ in range(min(warmup, 2))]
    fit = budget_s / (first[1] / 1e3) if len(first) == 2 and first[1] > 0 else math.inf
    first += [timed() for _ in range(int(min(warmup - len(first), fit)))]
    warmed()
    return first, [timed() for _ in range(int(min(steps, max(3, fit))))]


def measure_steps(
    step: Callable[[], Any],
    *,
    device: torch.device,
    clock: StepClock,
    warmup: int,
    steps: int,
    budget_s: float = math.inf,
    resident: Callable[[], Iterable[torch.Tensor]] = tuple,
) -> StepMeasurement:
    """Time step() and its memory; what it raises, out of memory too, is the caller's.

    On a GPU the peak is that of the samples; on a CPU, that of a further step under the profiler, over what is
    resident() before it.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()  # a collection in one step would be that step's time
    try:
        reset = (lambda: torch.cuda.reset_peak_memory_stats(device)) if device.type == "cuda" else (lambda: None)
        first, times = time_steps(step, clock=clock, warmup=warmup, steps=steps, budget_s=budget_s, warmed=reset)
    finally:
        if enabled:
            gc.enable()
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device) / 2**20
    else:
        held = sum(tensor.numel() * tensor.element_size() for tensor in resident())
        peak, reserved = held + peak_bytes_cpu(step, lambda: ()), None
    return StepMeasurement(*quantiles(times), peak / 2**20, times, first, reserved)


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Clocks, temperature, power and processes of a GPU now, as nvidia-smi says; None without one, or without that."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    line = _output("nvidia-smi", "-i", uuid, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    processes = _output("nvidia-smi", "-i", uuid, "--query-compute-apps=pid,used_memory", "--format=csv,noheader")
    return None if line is None else _parsed_state(fields, line, processes or "")


def _parsed_state(fields: Sequence[str], line: str, processes: str) -> dict[str, Any]:
    """nvidia-smi's lines as a dict. `this` marks the process that asks, where it knows itself by the same number."""
    state: dict[str, Any] = dict(zip(fields, map(str.strip, line.splitlines()[0].split(",")), strict=True))
    entries = [entry.partition(",") for entry in processes.splitlines() if entry]
    state["processes"] = [
        {"pid": pid.strip(), "memory": memory.strip(), "this": pid.strip() == str(os.getpid())}
        for pid, _, memory in entries
    ]
    return state


class Repeated:
    """The same batch, as often as a step asks for one."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor]):
        self.batch = batch

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch
