"""What sharding saves and costs: memory and speed of replicated training, ZeRO-1, ZeRO-2 and fully sharded training.

Each point is trained by lmsys.bench.steps. Its memory is read after the model is made, before and after the first step
of the optimizer, and at the peak of a later step, beside what cost.memory_at says; the peak is predicted as that of
replicated training less the state that is not there. Source of the problems: Stanford CS336, assignment 2:
optimizer_state_sharding_accounting and fsdp_accounting at their setting (one node, two GPUs, the xl model).

The second part calculates: communication_accounting (2025) and the section on DP, FSDP, TP and both together (2026),
with the rates of a TPU v5p as the course gives them and with those of this machine: bus bandwidth as
lmsys.bench.collectives measured it, and a matrix product timed here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lmsys import cost, parallel, records
from lmsys.bench import collectives, experiment, processes, steps, traces
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, Row
from lmsys.bench.measure import DTYPES, measure
from lmsys.config import ModelConfig, model_size, require
from lmsys.device import device_name, resolve_device
from lmsys.options import STEP_PRESETS
from lmsys.parallel.group import Process

MEMORY, TIMELINE = "sharding_memory", "sharding_timeline"
ONE = "not sharded"  # one GPU
PEAK = "peak"

# Name -> (formula of cost.SHARDINGS, settings of train).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    ONE: ("replicated", {}),
    "replicated": ("replicated", {"ddp_wrapper": "flashddp"}),
    "zero1": ("zero1", {"ddp_wrapper": "flashddp", "sharded_optimizer": True}),
    "zero2": ("zero2", {"ddp_wrapper": "flashddp", "sharded_optimizer": True, "reduce_scatter_gradients": True}),
    "fsdp": ("fsdp", {"ddp_wrapper": "fsdp"}),
    "torch_fsdp2": ("fsdp", {"ddp_wrapper": "torch_fsdp2"}),
}


def check(p: Parameters) -> None:
    """Fill in variants and numbers of processes.

    Raises:
        ValueError: an unknown name, a number out of range, or fewer than two GPUs.
    """
    processes.settle(p, NOTEBOOK)
    p.variants = [name for name in VARIANTS if name != ONE] if p.variants is None else p.variants
    experiment.require_names(p, {"variants": [name for name in VARIANTS if name != ONE], "step_preset": STEP_PRESETS})
    experiment.require_numbers(p, dict.fromkeys(("batch", "context_length", "vocab_size", "steps", "timed_steps"), 1))
    p.gpus = list(processes.process_counts(p.device, p.gpus))
    require(p.gpus[-1] > 1, f"gpus are {p.gpus}: sharding needs two or more, which this machine does not have")


NOTEBOOK = Notebook("sharding", check)


def model_of(p: Parameters) -> ModelConfig:
    return model_size(p.size, vocab_size=p.vocab_size, context_length=p.context_length)


def points(p: Parameters) -> list[Point]:
    """One GPU, then each number of several; fully sharded models are traced on the fewest."""
    least = min(n for n in p.gpus if n > 1)
    found = []
    for gpus, name in [(1, ONE), *((n, name) for n in p.gpus if n > 1 for name in p.variants)]:
        settings = VARIANTS[name][1]
        config = steps.step_config(
            model_of(p),
            attention_kernel=p.kernel,
            batch_size=p.batch,
            dtype=p.dtype,
            compile=p.compiled,
            step_preset=p.step_preset,
            seed=p.seed,
            device=p.device,
            **settings,
        )
        traced = gpus == least and parallel.get_wrapper(config.train.ddp_wrapper).sharded
        point = steps.step_point(config, p.size, gpus=gpus, processes=max(gpus, least))
        found.append(point | {"sharding": name, "traced": traced})
    return found


def plan(p: Parameters) -> steps.Plan:
    return steps.Plan(p.steps, p.timed_steps)


_replicated_peak: dict[int, float] = {}  # bytes by number of GPUs, of replicated training in this group of processes


def measure_point(point: Point, p: Parameters, process: Process) -> Measured | None:
    measured = steps.measure_point(process, point, plan(p), traced=point["traced"])
    if measured is None:
        return None
    columns, result = measured
    if point["sharding"] == "replicated":
        _replicated_peak[point["gpus"]] = result["peak_bytes"]
    rows = steps.with_timeline(point, columns, result, TIMELINE)
    return Measured(rows.rows, {**rows.tables, MEMORY: _memory_rows(point, model_of(p), result, process.device)})


def _memory_rows(point: Point, model: ModelConfig, result: dict[str, Any], device: torch.device) -> list[Row]:
    """The memory of a point at each point of the step, measured and predicted, in MiB."""
    name, gpus = point["sharding"], point["gpus"]
    formula = VARIANTS[name][0]
    predicted = dict(cost.memory_at(model, formula, gpus))
    if name not in (ONE, "replicated") and gpus in _replicated_peak:
        whole, left = (sum(cost.training_state(model, each, gpus).values()) for each in ("replicated", formula))
        predicted[PEAK] = _replicated_peak[gpus] - whole + left
    same = {"sharding": name, "status": "ok", "device": device_name(device)}
    same |= {key: point[key] for key in ("wrapper", "gpus", "size")}
    return [
        same
        | {"point": at, "measured_mib": held / 2**20}
        | {"predicted_mib": predicted[at] / 2**20 if at in predicted else None}
        for at, held in (result["memory"] | {PEAK: result["peak_bytes"]}).items()
    ]


def derive(row: Row, earlier: list[Row]) -> Row:
    one = steps.one_gpu_of(row, earlier)
    return {} if row["status"] != "ok" or one is None else steps.beside_one_gpu(row, one["step_ms"])


SHARDING = Experiment(
    name="sharding_results",
    columns=("sharding", *steps.COLUMNS, "processes", "traced_comm_ms", "traced_hidden_ms", "device", "note"),
    points=points,
    measure=measure_point,
    group=("size",),
    method=lambda p: steps.step_method(plan(p), resolve_device(p.device), p.dtype),
    tables={
        MEMORY: ("sharding", "wrapper", "gpus", "size", "point", "status", "measured_mib", "predicted_mib", "device"),
        TIMELINE: steps.TIMELINE_COLUMNS,
    },
    processes=lambda point, p: point["processes"],
    limit_s=240.0,  # compilation included
    derive=derive,
)


def state_rows(p: Parameters) -> list[Row]:
    """What the state is made of by formula, MiB on each of N devices."""
    rows = []
    for name, gpus in [("replicated", 1), *((name, n) for n in p.gpus if n > 1 for name in cost.SHARDINGS)]:
        state = {part: size / 2**20 for part, size in cost.training_state(model_of(p), name, gpus).items()}
        rows.append({"sharding": name, "N": gpus} | state | {"sum": sum(state.values())})
    return rows


def forward_gathers(intervals) -> list[Row]:
    """fsdp_accounting (b): the forward pass of each trace, communication that begins in it, and what of that waits."""
    rows = []
    for name, group in intervals.groupby("wrapper", sort=False):
        forward = group[(group.lane == "phase") & (group.name == "forward")]
        if len(forward):
            end = (forward.start_ms + forward.duration_ms).max()
            overlap = traces.overlap(group[group.start_ms < end].to_dict("records"))
            waiting = overlap["communication_ms"] - overlap["hidden_ms"]
            rows.append({"wrapper": name, "forward_ms": end} | overlap | {"waiting_ms": waiting})
    return rows


# --- Parallel feed-forward layers, calculated -----------------------------------------------------


def measured_links(p: Parameters, folder: Path) -> dict[tuple[str, int], cost.Link]:
    """Latency and bandwidth by the collectives that the folder holds, if of this machine; else measured now."""
    several, path = [n for n in p.gpus if n > 1], folder / f"{collectives.COLLECTIVES.name}.csv"
    if path.exists():
        rows = records.read_results(path)
        if set(rows.device) == {device_name(resolve_device(p.device))} and set(several) <= set(rows.gpus):
            return collectives.links(rows)
    given = {"scale": p.scale, "machine": p.machine, "gpus": several, "device": p.device}
    return collectives.links(experiment.run(collectives.COLLECTIVES, collectives.NOTEBOOK.parameters(given)))


def accelerator(p: Parameters, links: dict[tuple[str, int], cost.Link]) -> cost.Accelerator | None:
    """This machine: its matrix product in the compute dtype, and the largest bus bandwidth; None without a link."""
    if not links:
        return None
    device = resolve_device(p.device)
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(DTYPES[p.dtype]) for _ in range(2))
    time_ms = measure(lambda: a @ b, device=device, warmup=3, iterations=10, budget_s=0.5).median_ms
    return cost.Accelerator(2.0 * n**3 / time_ms * 1e3, max(link.bandwidth for link in links.values()))


def accounting(here: cost.Accelerator | None, tokens: int = 1024, mesh: tuple[int, int] = (16, 4)) -> list[Row]:
    """communication_accounting (2025), (a) to (c), for the course's TPU v5p and, where it was measured, this machine.

    Args:
        tokens: a device, whose activations are counted. mesh: sizes of the FSDP and the tensor-parallel axis.
    """
    xxl = cost.XXL
    state, saved = xxl.state_bytes, xxl.activation_bytes(tokens)
    rows = [
        ("a", "parameters, 10^9", xxl.parameters / 1e9),
        ("a", "fp32 master weights, gradients and optimizer state, TB", state / 1e12),
        ("a", "GPUs of 80 GB that hold them", state / 80e9),
        ("a", "saved for the backward pass in bf16, MB a token", saved / tokens / 1e6),
        ("a", f"GPUs of 80 GB more for {tokens:,} tokens", saved / 80e9),
        ("b", "devices of 95 GB, (16 P + A / 2) / N + A / 2 bytes each, without activations", xxl.devices_for(0, 95e9)),
        ("b", f"the same with the activations A of {tokens:,} tokens", xxl.devices_for(tokens, 95e9)),
    ]
    for name, device, rings in [("TPU v5p", cost.TPU_V5P, 2)] + ([("this machine", here, 1)] if here else []):
        least = xxl.tokens_per_device(*mesh, device, rings)
        where = f"{name}, {device.flops / 1e12:.4g} TFLOP/s and {device.bandwidth / 1e9:.3g} GB/s"
        what = f"compute-bound on a mesh of {mesh[0]} x {mesh[1]} from so many tokens"
        rows.append(("c", f"{where}: {what} a device", "never" if least is None else least))
        if least is not None:
            rows.append(("c", f"{where}: {what} in all", least * mesh[0] * mesh[1]))
    return [dict(zip(("part", "quantity", "value"), row, strict=True)) for row in rows]


def bounds(device: cost.Accelerator, layer: cost.FeedForward, tokens: float) -> dict[str, float]:
    """The most devices at which each strategy's forward pass is compute-bound; of DP, which sends nothing in it, the
    backward pass.
    """
    return {
        "DP": layer.most_data_parallel(tokens, device),
        "FSDP": layer.most_data_parallel(tokens, device),
        "TP": layer.most_tensor(device),
        "FSDP + TP": layer.most_mixed(tokens, device),
        "FSDP + TP, axes in turn": layer.most_mixed(tokens, device, overlapped=False),
    }


def parallelism(device: cost.Accelerator, layer: cost.FeedForward, tokens: float, most: int = 4096) -> Experiment:
    """Forward and backward times of each strategy over numbers of devices, calculated: nothing is measured.

    FSDP + TP takes the mesh with the least of the larger of both axes' times.
    """
    counts = [2**power for power in range(1, int(math.log2(most)) + 1)]

    def times(point: Point, _: Parameters) -> list[Row]:
        which, n = point["pass"], point["devices"]
        compute = layer.compute_s(tokens, n, device, which)
        rows = []
        for name, seconds in _communication(device, layer, tokens, n, which).items():
            bound = "compute" if compute >= seconds else "communication"
            rows.append(
                {"strategy": name, "compute_ms": 1e3 * compute, "communication_ms": 1e3 * seconds, "bound": bound}
            )
        return rows

    of = {"accelerator": dataclasses.asdict(device), "layer": dataclasses.asdict(layer), "tokens": tokens}
    return Experiment(
        name="sharding_parallelism",
        columns=("strategy", "pass", "tokens", "devices", "compute_ms", "communication_ms", "bound"),
        points=lambda _: [
            {"pass": which, "tokens": tokens, "devices": n} for which in ("forward", "backward") for n in counts
        ],
        measure=times,
        method=lambda _: {"timer": "none: calculated by lmsys.cost"} | of,
    )


def _communication(
    device: cost.Accelerator, layer: cost.FeedForward, tokens: float, n: int, which: str
) -> dict[str, float]:
    """Seconds of communication of each strategy on n devices."""
    weights = layer.weights_s(n, 1, device, which)
    meshes: Iterable[tuple[int, int]] = ((2**power, n // 2**power) for power in range(int(math.log2(n)) + 1))
    return {
        "DP": 0.0 if which == "forward" else weights,
        "FSDP": weights,
        "TP": layer.activations_s(tokens, 1, n, device),
        "FSDP + TP": min(
            max(layer.weights_s(fsdp, tensor, device, which), layer.activations_s(tokens, fsdp, tensor, device))
            for fsdp, tensor in meshes
        ),
    }
