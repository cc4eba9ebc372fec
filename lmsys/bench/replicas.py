"""Points of data-parallel training: a workload under a wrapper, measured by lmsys.bench.steps in groups of processes.

Points on one GPU run in rank 0 of the larger group, while the others wait: the same process, the same compiled code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmsys import parallel
from lmsys.bench import processes, steps
from lmsys.bench.attention import DTYPES as TORCH_DTYPES
from lmsys.bench.processes import process_counts, several  # noqa: F401
from lmsys.bench.steps import Plan
from lmsys.bench.steps import step_method as method  # noqa: F401
from lmsys.config import ModelConfig, PipelineConfig
from lmsys.device import device_name, resolve_device
from lmsys.parallel.group import Process
from lmsys.train import check_setup


def stream(
    measure: Callable[..., dict[str, Any] | None], points: Sequence[Any], *args: Any, device: str, limit_s: float
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """processes.stream of points that say how many processes they take, with further arguments for measure."""
    items = [(point.processes, point) for point in points]
    return processes.stream(functools.partial(_call, measure, args), items, device=device, limit_s=limit_s)


def _call(measure: Callable[..., Any], args: tuple, process: Process, point: Any) -> Any:
    return measure(process, point, *args)


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
    def sharded(self) -> bool:
        """Whether its no_sync() still communicates: parameters are gathered whatever becomes of gradients."""
        return self.sharded_optimizer or parallel.get_wrapper(self.wrapper).sharded

    def config(self, device: str = "auto") -> PipelineConfig:
        """The point as the trainer takes it."""
        workload = self.workload
        return steps.step_config(
            workload.model,
            learning_rate=workload.learning_rate,
            attention_kernel=workload.kernel,
            batch_size=workload.local_batch,
            dtype=workload.dtype,
            compile=workload.compiled,
            seed=workload.seed,
            device=device,
            ddp_wrapper=self.wrapper,
            sharded_optimizer=self.sharded_optimizer,
            cuda_graph=self.captured,
            **dict(self.optimizer_options),
        )


def train(process: Process, point: TrainPoint, plan: Plan) -> dict[str, Any] | None:
    """Train and time one point."""
    workload = point.workload
    options = {n: TORCH_DTYPES[value] if n.endswith("dtype") else value for n, value in point.options}
    result = steps.measure_step(
        process,
        point.config(),
        plan,
        traced=point.traced,
        tokens=workload.train_tokens,
        valid_tokens=workload.valid_tokens,
        **options,
    )
    return None if result is None else {"status": "ok"} | result


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
    try:
        check_setup(point.config(device.type), point.gpus)
    except ValueError as error:
        return str(error)
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
    row |= steps.step_columns(point.config(), result, device=device, gpus=point.gpus)
    if one_gpu is not None:
        row |= steps.beside_one_gpu(row, steps.quantiles(one_gpu["times_ms"])[0])
    return row
