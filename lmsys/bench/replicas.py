"""Measuring in several processes: points are run one after the other in a process group, and results come back as they are made.

stream() starts a group for each number of processes and runs its points in it. What a point computes comes back through a file,
so that a crash loses nothing: the point that was running becomes a row (oom or error, with the first error), and the points after it
go on in a new group. A point that takes longer than its limit ends its process, which ends the group.

train() is the point that the LM matrix and the notebooks on data parallelism and sharding share: a model under a wrapper, trained for
some steps on fixed data, then timed. Points on one GPU run in rank 0 of the larger group, while the others wait: the same
process, the same compiled code. A model is compiled block by block, once for all wrappers that leave its code as it is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import math
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmsys import cost, parallel
from lmsys.attention import check_support
from lmsys.bench.attention import DTYPES as TORCH_DTYPES
from lmsys.bench.measure import is_out_of_memory, peak_bytes_cpu, quantiles
from lmsys.config import ModelConfig, require, resolve_scale
from lmsys.data import BatchSampler, sequential_batches
from lmsys.device import device_name, peak_flops, resolve_device
from lmsys.model import TransformerLM, cross_entropy
from lmsys.parallel import group
from lmsys.parallel.group import Process
from lmsys.step import graphs
from lmsys.train.engine import autocast


def process_counts(device: str, given: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of processes to measure with: those given, else 1, 2, 4 and 8 as far as there are GPUs, and 1 and 2 on a CPU.

    Raises:
        ValueError: not a positive number, more than there are GPUs, or a device that is not one for several processes.
    """
    require(
        device in ("auto", "cpu", "cuda"),
        f"device is '{device}'; each process takes a GPU of its own: give auto, cpu or cuda",
    )
    here = torch.cuda.device_count() if resolve_device(device).type == "cuda" else None
    if given is None:
        return tuple(n for n in (1, 2, 4, 8) if n <= (here or 2))
    for n in given:
        require(type(n) is int and n >= 1, f"gpus {n!r} must be a whole number of 1 or more")
        require(here is None or n <= here, f"gpus {n} is more than this machine has: {here}")
    require(len(given) > 0, "gpus must not be empty")
    return tuple(sorted(set(given)))


def several(scale: str, device: str) -> tuple[str, str]:
    """The scale, resolved, and the device of what needs several processes.

    A machine with one GPU has none for a second process: device auto is then its CPU, and the scale full that of a CPU.
    """
    scale = resolve_scale(scale)
    if device == "auto" and torch.cuda.device_count() == 1:
        return ("cpu" if scale == "full" else scale), "cpu"
    return scale, device


# --- Points, one after the other ------------------------------------------------------------------


def stream(
    measure: Callable[..., dict[str, Any] | None],
    points: Sequence[Any],
    *args: Any,
    device: str = "auto",
    limit_s: float,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Run measure(process, point, *args) for each point, in a group of point.processes; yield (point, what rank 0 returned).

    Args:
        measure: a function of a module, called in every process of the group; its result must be JSON.
        points: those of one number of processes share a group, in this order.
        limit_s: of one point.
    Yields:
        a point that failed with {"status": "oom" or "error", "note": the first error}.
    """
    left = list(points)
    while left:
        world_size = left[0].processes
        batch = [point for point in left if point.processes == world_size]
        left = [point for point in left if point.processes != world_size]
        while batch:
            try:
                for result in _results(measure, world_size, batch, args, device, limit_s):
                    yield batch.pop(0), result
            except Exception as error:
                yield batch.pop(0), _failure(error, limit_s)


def _failure(error: Exception, limit_s: float) -> dict[str, Any]:
    """Status and note of what ended a group."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if "exited with code 1 and no result" in first:
        first += f"; a point may take {limit_s:g} s"
    oom = is_out_of_memory(error) or "OutOfMemoryError" in first or "DefaultCPUAllocator" in first
    return {"status": "oom" if oom else "error", "note": first}


def _results(
    measure: Callable, world_size: int, points: Sequence[Any], args: tuple, device: str, limit_s: float
) -> Iterator[dict[str, Any]]:
    """The results of one group, in the order of the points, as they come; then the error that ended it, if one did."""
    before = set(multiprocessing.active_children())
    failed: list[Exception] = []
    with tempfile.TemporaryDirectory(prefix="lmsys-") as folder:
        path = Path(folder) / "results.jsonl"
        path.touch()

        def start() -> None:
            try:
                group.spawn(_run_points, world_size, measure, list(points), args, str(path), limit_s, device=device)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        try:
            with path.open(encoding="utf-8") as file:
                unread, running = "", True
                while running:
                    thread.join(0.05)
                    running = thread.is_alive()
                    *lines, unread = (unread + file.read()).split("\n")
                    for line in lines:
                        yield json.loads(line)
        finally:
            if thread.is_alive():  # whoever wanted the results has gone
                for child in set(multiprocessing.active_children()) - before:
                    child.kill()
            thread.join()
    if failed:
        raise failed[0]


def _run_points(
    process: Process, measure: Callable, points: Sequence[Any], args: tuple, path: str, limit_s: float
) -> None:
    """In each process: every point, its result written by rank 0 as a line."""
    if process.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as lmsys.train does
    for point in points:
        faulthandler.dump_traceback_later(limit_s, exit=True)
        result = measure(process, point, *args)
        if process.rank == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        gc.collect()
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
        if process.world_size > 1:
            dist.barrier()
    faulthandler.cancel_dump_traceback_later()


class Clock:
    """Times between ticks: CUDA events on the current stream, or the host's clock on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ticks: list[Any] = []

    def tick(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def times_ms(self) -> list[float]:
        """Milliseconds from each tick to the next. Waits for the device."""
        pairs = zip(self.ticks, self.ticks[1:], strict=False)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


def largest(process: Process, values: Sequence[float]) -> list[float]:
    """Each value's maximum over the processes of the group."""
    if process.world_size == 1 or not values:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=process.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


# --- Training, wrapped ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What is trained, the same under every wrapper.

    Attributes:
        size: its name in the results. local_batch: sequences a process and step. dtype: fp32 or bf16 (autocast).
        train_tokens, valid_tokens: token files; without the first, pattern_tokens(); without the second, no validation.
    """

    size: str
    model: ModelConfig
    kernel: str
    local_batch: int
    dtype: str
    compiled: bool
    learning_rate: float = 3e-4
    seed: int = 0
    train_tokens: str | None = None
    valid_tokens: str | None = None

    def __str__(self) -> str:
        shape = f"d_model {self.model.d_model}, {self.model.num_layers} layers, vocabulary {self.model.vocab_size}"
        compiled = ", compiled" if self.compiled else ""
        return f"{self.size} ({shape}), {self.kernel}, {self.local_batch} x {self.model.context_length}, {self.dtype}{compiled}"


@dataclass(frozen=True)
class TrainPoint:
    """A workload under a wrapper.

    Attributes:
        gpus: that take part, of the group's processes: all, or one with the wrapper none.
        sharded_optimizer: ZeRO-1. options: of the wrapper. optimizer_options: of the sharded optimizer.
        traced: one more step, under the profiler.
        captured: timed steps replay forward, backward and communication as one CUDA graph (lmsys.step.graphs); their parts are not timed.
    A loss step sees processes x local_batch sequences, whether all GPUs take part or one takes them in turn.
    """

    workload: Workload
    wrapper: str
    gpus: int
    processes: int
    sharded_optimizer: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    optimizer_options: tuple[tuple[str, Any], ...] = ()
    traced: bool = False
    captured: bool = False

    @property
    def name(self) -> str:
        return f"{self.wrapper}+zero1" if self.sharded_optimizer else self.wrapper

    @property
    def scatters(self) -> bool:
        """Whether the sharded optimizer averages gradients, each process getting its part, in place of the wrapper."""
        return self.sharded_optimizer and dict(self.optimizer_options).get("reduce_scatter_gradients", False)

    @property
    def sharded(self) -> bool:
        """Whether its no_sync() still communicates: parameters are gathered whatever becomes of gradients."""
        return self.sharded_optimizer or "fsdp" in self.wrapper


@dataclass(frozen=True)
class Plan:
    """How long a point trains.

    Attributes:
        loss_steps: from the initial weights, losses kept; they compile and warm up, too.
        timed_steps, quiet_steps: after that, with communication and without it.
        eval_batches: of valid_tokens, after the loss steps.
    """

    loss_steps: int
    timed_steps: int
    quiet_steps: int
    eval_batches: int = 4


def train(process: Process, point: TrainPoint, plan: Plan) -> dict[str, Any] | None:
    """Train and time one point; see Replica.measure. A point on one GPU is rank 0's; the others compile meanwhile."""
    waits = point.gpus == 1 and process.rank > 0
    if waits and not point.workload.compiled:
        return None
    if point.gpus == 1:
        process = Process(0, process.local_rank, 1, 1, process.device, "")
    replica = Replica(process, point, plan)
    try:
        if not waits:
            return replica.measure()
        replica.step(replica.batches[0])
        return None
    finally:
        replica.close()


_compiled_for: Workload | None = None  # of this process


class Replica:
    """One process's part of a point."""

    def __init__(self, process: Process, point: TrainPoint, plan: Plan):
        global _compiled_for
        self.process, self.point, self.plan, self.device = process, point, plan, process.device
        workload = point.workload
        if workload.compiled and _compiled_for != workload:
            _compiled_for = workload
            torch._dynamo.reset()  # a second shape would be compiled for any shape
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # or the rest would run eager without a word
            torch._dynamo.config.optimize_ddp = False  # would cut a graph at torch DDP's buckets; a block is smaller
        gc.collect()
        gc.freeze()  # what was imported and compiled, which the collector and live_bytes() need not look through
        self.alone = point.gpus == 1
        self._passes: dict[bool, graphs.GraphedPass] = {}  # by whether they communicate
        self._may_capture = False  # once the loss steps are over
        if point.captured:
            graphs.on_own_stream(self.device)
        self.batches = self._batches()
        self.memory: dict[str, float] = {}
        self._nothing = live_bytes(self.device)

        torch.manual_seed(workload.seed)
        with self.device:
            model = TransformerLM(workload.model, attention_kernel=workload.kernel)
        self.loss_function = cross_entropy
        if workload.compiled:
            model.compile_blocks()
            self.loss_function = torch.compile(cross_entropy)
        self.trained = parallel.wrap(model, point.wrapper, **_options(point.options))
        self.optimizer = self._optimizer()
        self._remember("after init")

    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's AdamW for all wrappers. All parameters decay: a shard does not show whether it is of a matrix or of a norm."""
        settings = {
            "lr": self.point.workload.learning_rate,
            "betas": (0.9, 0.95),
            "weight_decay": 0.1,
            "fused": self.device.type == "cuda",
        }
        parameters = [p for p in self.trained.parameters() if p.requires_grad]
        if self.point.sharded_optimizer:
            from lmsys.parallel.zero1 import ShardedOptimizer

            options = _options(self.point.optimizer_options)
            return ShardedOptimizer(parameters, torch.optim.AdamW, **options, **settings)
        return torch.optim.AdamW(parameters, **settings)

    def _batches(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For each loss step, this process's batches, on its device."""
        workload, shares = self.point.workload, self.point.processes
        each = shares // self.point.gpus
        tokens = tokens_of(workload)
        shape = (workload.local_batch, workload.model.context_length)
        samplers = [
            BatchSampler(tokens, *shape, seed=workload.seed, rank=share, world_size=shares)
            for share in range(self.process.rank * each, (self.process.rank + 1) * each)
        ]
        return [[self._to_device(sampler.next()) for sampler in samplers] for _ in range(self.plan.loss_steps)]

    def _to_device(self, arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        inputs, targets = (torch.from_numpy(array).to(self.device) for array in arrays)
        return inputs, targets

    def measure(self) -> dict[str, Any]:
        """Losses a step (means over the whole batch), times, memory.

        Times are of each step, the largest over the ranks: times_ms with communication, of which backward_ms the backward pass and
        finish_ms the wait after it; quiet_ms without. Memory in bytes: memory at the points of the first step, peak_bytes of a later one.
        """
        plan, timed = self.plan, [step[:1] for step in self.batches]
        losses = [self.step(batches, first=index == 0) for index, batches in enumerate(self.batches)]
        result: dict[str, Any] = {"status": "ok"}
        mean = torch.stack(losses)
        result["losses"] = (mean if self.alone else group.mean_over_ranks(mean)).tolist()
        if self.point.workload.valid_tokens is not None:
            result["valid_loss"] = self.validate()
        finite = all(math.isfinite(loss) for loss in result["losses"])
        if not finite:
            return result | {"status": "error", "note": f"the losses are {result['losses']}"}

        if self.point.captured:
            for _ in range(graphs.WARMUP - plan.loss_steps):
                self.step(timed[0])
        self._may_capture = self.point.captured
        result["peak_bytes"] = self._peak(timed)
        if self.point.captured:
            result["times_ms"] = self._timed(timed, plan.timed_steps)
        else:
            marks = Clock(self.device)
            result["times_ms"] = self._timed(timed, plan.timed_steps, marks=marks)
            parts = largest(self.process, marks.times_ms())  # backward, finish, and the rest up to the next backward
            result |= {"backward_ms": parts[0::3], "finish_ms": parts[1::3]}
        if self.point.traced:
            from lmsys.bench import timeline

            result["timeline"] = timeline.trace(lambda: self.step(timed[0]), self.device)
        if plan.quiet_steps and not self.alone and not self.point.sharded:
            result["quiet_ms"] = self._timed(timed, plan.quiet_steps, communicate=False)
        result["memory"] = dict(zip(self.memory, largest(self.process, list(self.memory.values())), strict=True))
        return result

    def step(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        communicate: bool = True,
        first: bool = False,
        marks: Clock | None = None,
    ) -> Tensor:
        """One step of the optimizer; the loss, a scalar on the device. first: note the memory; marks: time its parts."""
        from lmsys.bench.timeline import phase

        if self._may_capture:
            total = self._captured(communicate)(*batches[0])
        else:
            total = self._pass(batches, communicate, (lambda: None) if marks is None else marks.tick)
        if first:
            self._remember("before optimizer step")
        with phase("optimizer"):
            self.optimizer.step()
        if first:
            self._remember("after optimizer step")
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _pass(
        self, batches: Sequence[tuple[Tensor, Tensor]], communicate: bool, tick: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Forward and backward over the batches and the wait for their gradients; the mean loss. tick is called where a part begins."""
        from lmsys.bench.timeline import phase

        total = torch.zeros((), device=self.device)
        for index, (inputs, targets) in enumerate(batches):
            with self._quiet(communicate and index == len(batches) - 1):
                with phase("forward"), autocast(self.device, self.point.workload.dtype):
                    loss = self.loss_function(self.trained(inputs), targets) / len(batches)
                tick()
                with phase("backward"):
                    loss.backward()
            total += loss.detach()
        del loss
        tick()
        if communicate and not self.alone:
            (self.optimizer if self.point.scatters else self.trained).finish_gradient_synchronization()
        tick()
        return total

    def _captured(self, communicate: bool) -> graphs.GraphedPass:
        """The pass over one batch as a CUDA graph."""
        if communicate not in self._passes:
            self._passes[communicate] = graphs.GraphedPass(
                lambda inputs, targets: self._pass([(inputs, targets)], communicate), list(self.trained.parameters())
            )
        return self._passes[communicate]

    def close(self) -> None:
        """Let go of captured passes. They hold this object, which the collector does not look at (gc.freeze), and its communicators."""
        self._passes.clear()

    @contextlib.contextmanager
    def _quiet(self, sends: bool) -> Iterator[None]:
        """A backward pass in here communicates only if it sends, and then as the point has it."""
        with contextlib.ExitStack() as stack:
            if not self.alone and (not sends or self.point.scatters):
                stack.enter_context(self.trained.no_sync())
            if not sends and self.point.scatters:
                stack.enter_context(self.optimizer.no_sync())
            yield

    def _timed(self, batches: Sequence, steps: int, **options: Any) -> list[float]:
        """Milliseconds of each of so many steps, the largest over the ranks. The first two are not counted."""
        clock = Clock(self.device)
        gc.collect()
        if not self.alone:
            dist.barrier()
        for index in range(steps + 2):
            self.step(batches[index % len(batches)], **options)
            clock.tick()
        return largest(self.process, clock.times_ms()[1:])

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the first batches of the validation tokens, the same ones in every process."""
        workload = self.point.workload
        tokens = np.load(workload.valid_tokens, mmap_mode="r")
        shape = (workload.local_batch, workload.model.context_length)
        losses = []
        for arrays in sequential_batches(tokens, *shape, self.plan.eval_batches):
            inputs, targets = self._to_device(arrays)
            with autocast(self.device, workload.dtype):
                losses.append(self.loss_function(self.trained(inputs), targets))
        return torch.stack(losses).mean().item()

    def _remember(self, point: str) -> None:
        self.memory[point] = live_bytes(self.device, self.trained) - self._nothing

    def _peak(self, batches: Sequence) -> float:
        """Bytes at the most during a step, the largest over the ranks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(batches[0])
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) + getattr(self.trained, "extra_bytes", 0)
        else:
            held = live_bytes(self.device, self.trained)
            peak = held + peak_bytes_cpu(lambda: self.step(batches[0]), lambda: ())
        return largest(self.process, [peak])[0]


def _options(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Options as a wrapper takes them: dtypes are named in a point."""
    return {name: TORCH_DTYPES[value] if name.endswith("dtype") else value for name, value in options}


def live_bytes(device: torch.device, module: nn.Module | None = None) -> float:
    """Bytes that tensors hold now. A GPU's allocator knows; on a CPU, those of the tensors that Python can see, and of gradients."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    seen = [*gc.get_objects(), *(parameter.grad for parameter in (module.parameters() if module else ()))]
    tensors = [found for found in seen if type(found) in (Tensor, nn.Parameter) and found.device.type == "cpu"]
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        with contextlib.suppress(RuntimeError):  # one without memory, as compilers trace with
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


# --- Rows -----------------------------------------------------------------------------------------


def points_of(
    workloads: Sequence[Workload], counts: Sequence[int], variants: Callable[[Workload], Sequence[dict[str, Any]]]
) -> list[TrainPoint]:
    """The points of workloads x numbers of GPUs, each workload's one GPU first; it runs once, in the smallest group of several.

    variants: of a workload on several GPUs: each the fields of a TrainPoint beside workload, gpus and processes.
    """
    many = [n for n in counts if n > 1]
    made = []
    for n in many or [1]:
        for workload in workloads:
            if 1 in counts and n == (many or [1])[0]:
                made.append(TrainPoint(workload, "none", 1, n))
            if n > 1:
                made += [TrainPoint(workload, gpus=n, processes=n, **variant) for variant in variants(workload)]
    return made


def unsupported(point: TrainPoint, device: torch.device) -> str | None:
    """Why a point cannot run on the device, known before it is tried."""
    workload = point.workload
    try:
        parallel.check_wrapper(point.wrapper, point.gpus)
        check_support(
            workload.kernel,
            device=device,
            dtype=torch.bfloat16 if workload.dtype == "bf16" else torch.float32,
            head_dim=workload.model.head_dim,
            heads=workload.model.num_heads,
            kv_heads=workload.model.num_heads,
            backward=True,
        )
    except ValueError as error:
        return str(error)
    if point.captured and (device.type != "cuda" or point.sharded):
        return f"a CUDA graph is captured on a GPU, of replicas; this is {point.name} on {device.type}"
    return None


def rows(
    points: Sequence[TrainPoint], plan: Plan, *, device: str, limit_s: float
) -> Iterator[tuple[TrainPoint, dict[str, Any], dict[str, Any]]]:
    """Train the points; yield each with its row of the columns that all step results share, and what was measured."""
    where = resolve_device(device)
    reasons = {point: unsupported(point, where) for point in points}
    for point in points:
        if reasons[point]:
            yield point, _row(point, {"status": "unsupported", "note": reasons[point]}, None, where), {}
    alone: dict[Workload, dict[str, Any]] = {}
    runnable = [point for point in points if not reasons[point]]
    for point, result in stream(train, runnable, plan, device=device, limit_s=limit_s):
        one = alone.get(point.workload)
        if point.gpus == 1 and result["status"] == "ok":
            alone[point.workload] = one = result
        yield point, _row(point, result, one, where), result


def _row(
    point: TrainPoint, result: dict[str, Any], one_gpu: dict[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """The columns that all step results share. one_gpu: what was measured there, of the same workload."""
    workload, model = point.workload, point.workload.model
    row = {
        "kernel": workload.kernel,
        "wrapper": point.name,
        "gpus": point.gpus,
        "size": workload.size,
        "context_length": model.context_length,
        "local_batch": workload.local_batch,
        "dtype": workload.dtype,
        "compiled": workload.compiled,
        "status": result["status"],
        "device": device_name(device),
        "note": result.get("note"),
    }
    if result["status"] != "ok":
        return row
    median, p20, p80 = quantiles(result["times_ms"])
    rate = point.gpus * workload.local_batch * model.context_length / median * 1e3
    flops, peak = cost.train_flops_per_token(model), _peak_flops(device, workload.dtype)
    row |= {
        "step_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "samples": len(result["times_ms"]),
        "tokens_per_s": rate,
        "mfu": cost.mfu(rate / point.gpus, flops, peak),
        "exposed_comm_ms": exposed_ms(point, result, one_gpu),
        "peak_mib": result["peak_bytes"] / 2**20,
        "final_loss": result["losses"][-1],
    }
    if one_gpu is not None:
        row["scaling_efficiency"] = quantiles(one_gpu["times_ms"])[0] / median
    return row


def exposed_ms(point: TrainPoint, result: dict[str, Any], one_gpu: dict[str, Any] | None) -> float | None:
    """The step less the step without communication: under no_sync, or, where that still communicates, on one GPU."""
    median = quantiles(result["times_ms"])[0]
    if point.gpus == 1:
        return 0.0
    if result.get("quiet_ms"):
        return median - quantiles(result["quiet_ms"])[0]
    return None if one_gpu is None else median - quantiles(one_gpu["times_ms"])[0]


def _peak_flops(device: torch.device, dtype: str) -> float | None:
    """What MFU is measured against: the dense peak of the GPU's matrix units, which take fp32 as TF32; None where it is not known."""
    return peak_flops(device_name(device), "tf32" if dtype == "fp32" and device.type == "cuda" else dtype)


def method(plan: Plan, device: torch.device, dtype: str) -> dict[str, str]:
    """How train() measures, for the stamp of a result."""
    gpu = device.type == "cuda"
    peak = _peak_flops(device, dtype)
    quiet = f"step less the step under no_sync ({plan.quiet_steps} samples); " if plan.quiet_steps else ""
    return {
        "timer": f"{'CUDA events' if gpu else 'time.perf_counter'} between steps; of each step the largest over the ranks",
        "warmup": f"{plan.loss_steps} steps of training and 3 more",
        "samples": f"{plan.timed_steps}",
        "statistic": "median, 20th and 80th percentile",
        "step": "forward, backward, gradient synchronization, AdamW (torch's); inputs on the device; gradients are not clipped",
        "mfu": "none: the peak of this device is not known"
        if peak is None
        else f"against {peak / 1e12:g} TFLOP/s a GPU",
        "exposed_comm_ms": f"{quiet}of sharded wrappers, step less the step of one GPU",
        "memory": "peak allocated of a step, the largest over the ranks"
        + ("" if gpu else " (live tensors and the profiler)"),
        "final_loss": f"of step {plan.loss_steps} from the same weights on the same data, as many sequences a step on one GPU as on all",
    }


# --- Data -----------------------------------------------------------------------------------------


def tokens_of(workload: Workload) -> np.ndarray:
    """The workload's training tokens: its file as a memory map, or a pattern long enough for it."""
    if workload.train_tokens is not None:
        return np.load(workload.train_tokens, mmap_mode="r")
    return pattern_tokens(workload.model.vocab_size, max(1 << 18, 4 * workload.model.context_length), workload.seed)


def pattern_tokens(vocab_size: int, length: int, seed: int) -> np.ndarray:
    """Ids that a model can learn: frequencies as Zipf's law has them, and three in four follow from the token before."""
    generator = np.random.default_rng(seed)
    streams = 256
    cumulative = np.cumsum(1.0 / (10 + np.arange(vocab_size)))
    follower = generator.permutation(vocab_size)
    steps = math.ceil(length / streams)
    drawn = np.searchsorted(cumulative, generator.random((steps, streams)) * cumulative[-1])
    drawn = np.minimum(drawn, vocab_size - 1)
    follows = generator.random((steps, streams)) < 0.75
    for index in range(1, steps):
        drawn[index] = np.where(follows[index], follower[drawn[index - 1]], drawn[index])
    return drawn.T.reshape(-1)[:length].astype(np.uint32)
