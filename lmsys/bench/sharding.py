"""What sharding saves and costs: memory and speed of replicated training, ZeRO-1, ZeRO-2 and fully sharded training.

Each point is trained by lmsys.bench.replicas. Its memory is read after the model is made, before and after the first step of the
optimizer, and at the peak of a later step, beside what cost.memory_at says; the peak is predicted as that of replicated training less
the state that is not there. Source of the problems: Stanford CS336, assignment 2: optimizer_state_sharding_accounting and
fsdp_accounting at their setting (one node, two GPUs, the xl model).

The second part calculates: communication_accounting (2025) and the section on DP, FSDP, TP and both together (2026), with the rates of a
TPU v5p as the course gives them and with those of this machine: bus bandwidth as lmsys.bench.collectives measured it, and a matrix product
timed here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmsys import cost, records
from lmsys.bench import replicas, timeline
from lmsys.bench.attention import DTYPES as TORCH_DTYPES
from lmsys.bench.measure import measure
from lmsys.bench.replicas import Plan, TrainPoint, Workload
from lmsys.config import model_size, require, unknown_name
from lmsys.device import resolve_device

NAME, MEMORY, TIMELINE, PARALLELISM = (
    "sharding_results",
    "sharding_memory",
    "sharding_timeline",
    "sharding_parallelism",
)
EXTRA_COLUMNS = ("processes", "traced_comm_ms", "traced_hidden_ms", "device", "note")
PEAK = "peak"
_LIMIT_S = 240.0  # of one point, compilation included

# Name -> (formula of cost.SHARDINGS, fields of a TrainPoint).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "replicated": ("replicated", {"wrapper": "flashddp"}),
    "zero1": ("zero1", {"wrapper": "flashddp", "sharded_optimizer": True}),
    "zero2": (
        "zero2",
        {
            "wrapper": "flashddp",
            "sharded_optimizer": True,
            "optimizer_options": (("reduce_scatter_gradients", True),),
        },
    ),
    "fsdp": ("fsdp", {"wrapper": "fsdp"}),
    "torch_fsdp2": ("fsdp", {"wrapper": "torch_fsdp2"}),
}
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "size": "tiny",
        "batch": 2,
        "context_length": 32,
        "vocab_size": 256,
        "dtype": "fp32",
        "compiled": False,
        "kernel": "vectorized_torch",
        "steps": 2,
        "timed_steps": 3,
    },
    "cpu": {
        "size": "mini",
        "batch": 2,
        "context_length": 64,
        "vocab_size": 2048,
        "dtype": "fp32",
        "compiled": False,
        "kernel": "vectorized_torch",
        "steps": 3,
        "timed_steps": 7,
    },
    "full": {
        "size": "xl",
        "batch": 4,
        "context_length": 512,
        "vocab_size": None,
        "dtype": "bf16",
        "compiled": True,
        "kernel": "flash_attention_triton",
        "steps": 4,
        "timed_steps": 15,
    },
}


@dataclass(frozen=True)
class ShardingSettings:
    """What is run; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    workload: Workload
    variants: tuple[str, ...]
    gpus: tuple[int, ...]
    steps: int
    timed_steps: int
    device: str


def settings(
    scale: str = "auto",
    size: str | None = None,
    variants: Sequence[str] | None = None,
    kernel: str | None = None,
    gpus: Sequence[int] | None = None,
    batch: int | None = None,
    context_length: int | None = None,
    dtype: str | None = None,
    compiled: bool | None = None,
    steps: int | None = None,
    timed_steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> ShardingSettings:
    """The settings of a scale, with what is given in their place.

    Args:
        variants: of VARIANTS. gpus: numbers of GPUs; one of them is measured without sharding.
        device: auto is the CPU on a machine with one GPU.
    Raises:
        ValueError: an unknown name, a number out of range, or fewer than two GPUs.
    """
    scale, device = replicas.several(scale, device)
    given = {
        "size": size,
        "kernel": kernel,
        "batch": batch,
        "context_length": context_length,
        "dtype": dtype,
        "compiled": compiled,
        "steps": steps,
        "timed_steps": timed_steps,
    }
    values = _PRESETS[scale] | {key: value for key, value in given.items() if value is not None}
    variants = tuple(VARIANTS) if variants is None else tuple(variants)
    for name in variants:
        if name not in VARIANTS:
            raise unknown_name("variant of sharding", name, VARIANTS)
    require(len(variants) > 0, f"variants must not be empty; known: {', '.join(VARIANTS)}")
    for name in ("batch", "steps", "timed_steps"):
        require(type(values[name]) is int and values[name] >= 1, f"{name} is {values[name]!r}; it must be 1 or more")
    counts = replicas.process_counts(device, gpus)
    require(counts[-1] > 1, f"gpus are {counts}: sharding needs two or more, which this machine does not have")
    workload = Workload(
        values["size"],
        model_size(values["size"], vocab_size=values["vocab_size"], context_length=values["context_length"]),
        values["kernel"],
        local_batch=values["batch"],
        dtype=values["dtype"],
        compiled=values["compiled"],
        seed=seed,
    )
    return ShardingSettings(scale, workload, variants, counts, values["steps"], values["timed_steps"], device)


def points(chosen: ShardingSettings) -> dict[TrainPoint, str]:
    """The points, and the name of the sharding that each shows."""
    workload, n = chosen.workload, min(count for count in chosen.gpus if count > 1)
    found = {TrainPoint(workload, "none", 1, n): "not sharded"}
    for count in chosen.gpus:
        for name in chosen.variants if count > 1 else ():
            fields = VARIANTS[name][1]
            if "fsdp" in fields["wrapper"] and workload.dtype != "fp32":
                fields = fields | {"options": (("compute_dtype", workload.dtype),)}
            found[TrainPoint(workload, gpus=count, processes=count, traced="fsdp" in name and count == n, **fields)] = (
                name
            )
    return found


def run(
    chosen: ShardingSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None
) -> tuple[Any, Any, Any]:
    """Run the points; write sharding_results.csv, sharding_memory.csv and sharding_timeline.csv; return them as DataFrames."""
    plan = Plan(chosen.steps, chosen.timed_steps, quiet_steps=0)
    stamp = {
        "method": replicas.method(plan, resolve_device(chosen.device), chosen.workload.dtype),
        "parameters": dataclasses.asdict(chosen),
    }
    results = records.ResultWriter(NAME, folder, **stamp, extra_columns=EXTRA_COLUMNS)
    memory = records.ResultWriter(MEMORY, folder, **stamp, extra_columns=("device",))
    traces = records.ResultWriter(TIMELINE, folder, **stamp)
    names = points(chosen)
    replicated: dict[int, float] = {}  # peak in bytes by number of GPUs
    with results, memory, traces:
        for point, row, result in replicas.rows(list(names), plan, device=chosen.device, limit_s=_LIMIT_S):
            name = names[point]
            row |= {"sharding": name, "processes": point.processes}
            if row["status"] == "ok":
                if name == "replicated":
                    replicated[point.gpus] = result["peak_bytes"]
                for line in _memory_rows(point, name, result, replicated.get(point.gpus)):
                    memory.write(line | {"device": row["device"]})
                if result.get("timeline"):
                    overlap = timeline.overlap(result["timeline"])
                    row["traced_comm_ms"], row["traced_hidden_ms"] = overlap["communication_ms"], overlap["hidden_ms"]
                    for interval in result["timeline"]:
                        traces.write({"wrapper": point.name} | interval)
            results.write(row)
            if on_row:
                on_row(row)
    return tuple(records.read_results(writer.path) for writer in (results, memory, traces))


def _memory_rows(
    point: TrainPoint, name: str, result: dict[str, Any], replicated_peak: float | None
) -> list[dict[str, Any]]:
    """The memory of a point at each point of the step, measured and predicted, in MiB."""
    formula = VARIANTS[name][0] if name in VARIANTS else "replicated"
    config = point.workload.model
    predicted = dict(cost.memory_at(config, formula, point.gpus))
    if replicated_peak is not None and name != "replicated":
        whole, left = (cost.training_state(config, each, point.gpus) for each in ("replicated", formula))
        predicted[PEAK] = replicated_peak - sum(whole.values()) + sum(left.values())
    measured = result["memory"] | {PEAK: result["peak_bytes"]}
    return [
        {
            "sharding": name,
            "wrapper": point.name,
            "gpus": point.gpus,
            "size": point.workload.size,
            "point": at,
            "status": "ok",
            "measured_mib": held / 2**20,
            "predicted_mib": predicted[at] / 2**20 if at in predicted else None,
        }
        for at, held in measured.items()
    ]


# --- What the points say --------------------------------------------------------------------------


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    what = f"{row['sharding']:<12} {row['wrapper']:<16} x{row['gpus']}"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row['note']}"
    return f"{what} {row['step_ms']:>9.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}] {row['peak_mib']:>9,.0f} MiB"


def memory_table(memory) -> str:
    """Memory at each point of the first step, measured and (by formula), MiB, as Markdown."""
    lines, (_, units) = [], records.units(memory)
    for (name, gpus), group in memory.groupby(["sharding", "gpus"], sort=False):
        line = {"sharding": name, units: gpus}
        for row in group.itertuples():
            computed = "" if math.isnan(row.predicted_mib) else f" ({records.significant(row.predicted_mib)})"
            line[row.point] = f"{records.significant(row.measured_mib)}{computed}"
        lines.append(line)
    return records.markdown_table(lines)


def state_table(chosen: ShardingSettings) -> str:
    """What the state is made of by formula, MiB on each of N devices, as Markdown."""
    config = chosen.workload.model
    lines = []
    for gpus in chosen.gpus:
        for name in cost.SHARDINGS if gpus > 1 else ("replicated",):
            state = cost.training_state(config, name, gpus)
            parts = {part: records.significant(size / 2**20) for part, size in state.items()}
            lines.append(
                {"sharding": name, "N": gpus} | parts | {"sum": records.significant(sum(state.values()) / 2**20)}
            )
    return records.markdown_table(lines)


def speed_table(frame) -> str:
    """Time and peak memory of each sharding, as Markdown."""
    columns = {
        "sharding": "sharding",
        "wrapper": "wrapper",
        "gpus": records.units(frame)[1],
        "step": "step, ms",
        "tokens": "tokens/s",
        "efficiency": "of linear",
        "peak": "peak MiB",
        "loss": "final loss",
    }
    lines = []
    for row in frame.itertuples():
        line = {"sharding": row.sharding, "wrapper": f"`{row.wrapper}`", "gpus": row.gpus, "step": row.status}
        if row.status == "ok":
            efficiency = row.scaling_efficiency
            line |= {
                "step": records.spread(row.step_ms, row.p20_ms, row.p80_ms),
                "tokens": f"{row.tokens_per_s:,.0f}",
                "efficiency": "" if math.isnan(efficiency) else f"{100 * efficiency:.1f}%",
                "peak": f"{row.peak_mib:,.0f}",
                "loss": f"{row.final_loss:.5f}",
            }
        lines.append(line)
    return records.markdown_table(lines, columns)


def memory_conclusions(memory) -> list[str]:
    """What the memory rows show, in sentences made from their numbers."""
    said = []
    held = memory[memory.point != PEAK].dropna(subset=["predicted_mib"])
    if len(held):
        off = (held.measured_mib / held.predicted_mib - 1).abs()
        worst = held.loc[off.idxmax()]
        said.append(
            f"Outside the peak the formulas are off by at most {100 * off.max():.1f}% ({worst.sharding}, {worst.point})."
        )
    _, units = records.units(memory)
    for gpus, group in memory[memory.gpus > 1].groupby("gpus", sort=False):
        peaks = group[group.point == PEAK].set_index("sharding")
        for name in [name for name in peaks.index if name != "replicated" and "replicated" in peaks.index]:
            saved = peaks.measured_mib["replicated"] - peaks.measured_mib[name]
            expected = peaks.measured_mib["replicated"] - peaks.predicted_mib[name]
            said.append(
                f"{name} on {gpus} {units} takes {records.significant(saved)} MiB less at the peak than replicated training; "
                f"the formulas expect {records.significant(expected)} MiB."
            )
        after = group[group.point == cost.MEMORY_POINTS[2]].set_index("sharding").measured_mib
        before = group[group.point == cost.MEMORY_POINTS[1]].set_index("sharding").measured_mib
        if {"replicated", "zero1"} <= set(after.index):
            share = (after["zero1"] - before["zero1"]) / (after["replicated"] - before["replicated"])
            said.append(
                f"The first step of zero1's optimizer adds {100 * share:.1f}% of what the whole one adds; 1/N is {100 / gpus:.1f}%."
            )
    return said


def speed_conclusions(frame) -> list[str]:
    """What the times show, in sentences made from their numbers."""
    said = []
    ok = frame[frame.status == "ok"]
    for gpus, group in ok[ok.gpus > 1].groupby("gpus", sort=False):
        by = group.set_index("sharding")
        for ours, other in (("zero1", "replicated"), ("zero2", "replicated"), ("fsdp", "torch_fsdp2")):
            if {ours, other} <= set(by.index):
                ratio, memory = by.step_ms[ours] / by.step_ms[other], by.peak_mib[ours] / by.peak_mib[other]
                said.append(
                    f"On {gpus} {records.units(frame)[1]} a step of {ours} takes {ratio:.3f} times as long as one of {other}, with {memory:.3f} times its peak memory."
                )
        for name in [name for name in by.index if by.traced_comm_ms[name] > 0]:
            row = by.loc[name]
            said.append(
                f"{name}, traced: {row.traced_comm_ms:.1f} ms of communication, {100 * row.traced_hidden_ms / row.traced_comm_ms:.1f}% of it "
                "beside computation."
            )
    for row in frame[frame.status != "ok"].itertuples():
        said.append(f"{row.sharding} ({row.wrapper}) x{row.gpus}: {row.status}, {row.note}")
    return said


def forward_gather(traces) -> list[str]:
    """fsdp_accounting (b): whether all-gathers finish in time for the forward pass, from the traces."""
    said = []
    for name, group in traces.groupby("wrapper", sort=False):
        rows = group.to_dict("records")
        forward = [row for row in rows if row["lane"] == "phase" and row["name"] == "forward"]
        if not forward:
            continue
        end = max(row["start_ms"] + row["duration_ms"] for row in forward)
        within = [row for row in rows if row["start_ms"] < end]
        overlap = timeline.overlap(within)
        waiting = overlap["communication_ms"] - overlap["hidden_ms"]
        said.append(
            f"{name}: the forward pass takes {end:.1f} ms; {overlap['communication_ms']:.1f} ms of communication begin in it, of which "
            f"{waiting:.1f} ms have no computation beside them."
        )
    return said


# --- Parallel feed-forward layers, calculated -----------------------------------------------------


def product_rate(device: torch.device, dtype: str) -> float:
    """FLOPs a second of a large matrix product, measured."""
    n = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
    return 2.0 * n**3 / measure(lambda: a @ b, device=device, warmup=3, iterations=10, budget_s=0.5).median_ms * 1e3


def accelerator(chosen: ShardingSettings, links: dict[tuple[str, int], cost.Link]) -> cost.Accelerator | None:
    """This machine: its matrix product in the compute dtype, and the largest bus bandwidth of its collectives; None without such."""
    bandwidths = [link.bandwidth for link in links.values()]
    if not bandwidths:
        return None
    return cost.Accelerator(product_rate(resolve_device(chosen.device), chosen.workload.dtype), max(bandwidths))


def accounting(here: cost.Accelerator | None) -> list[str]:
    """communication_accounting (2025), (a) to (c), for the course's TPU v5p and, where it was measured, this machine."""
    xxl, tokens = cost.XXL, 1024
    state, saved = xxl.state_bytes, xxl.activation_bytes(tokens)
    said = [
        f"(a) {xxl.parameters / 1e9:,.1f} billion parameters: {state / 1e12:.2f} TB of fp32 master weights, gradients and optimizer state, "
        f"which is {state / 80e9:.1f} GPUs of 80 GB. Saved for backward in bf16: {saved / tokens / 1e6:.1f} MB a token, {saved / 1e9:,.1f} GB for "
        f"{tokens:,} tokens, {saved / 80e9:.2f} GPUs more.",
        f"(b) A device holds (16 P + A / 2) / N + A / 2 bytes, with P parameters and A bytes of activations. Below 95 GB: N = "
        f"{xxl.devices_for(0, 95e9)} without activations, {xxl.devices_for(tokens, 95e9)} with those of {tokens:,} tokens.",
    ]
    fsdp, tensor = 16, 4
    meshes = [("(c) TPU v5p", cost.TPU_V5P, 2)] + ([("This machine", here, 1)] if here else [])
    for name, device, rings in meshes:
        least = xxl.tokens_per_device(fsdp, tensor, device, rings)
        where = f"{name}, {device.flops / 1e12:.4g} TFLOP/s and {device.bandwidth / 1e9:.3g} GB/s"
        if least is None:
            said.append(f"{where}: tensor parallelism over {tensor} never is compute-bound at this width.")
        else:
            said.append(
                f"{where}: compute-bound from {least:,.0f} tokens a device, {least * fsdp * tensor:,.0f} in all, on a mesh of {fsdp} x {tensor}."
            )
    return said


STRATEGIES = ("DP", "FSDP", "TP", "FSDP + TP")


def bounds(device: cost.Accelerator, layer: cost.FeedForward, tokens: float) -> dict[str, float]:
    """The most devices at which each strategy's forward pass (for DP, which sends nothing in it, the backward) is compute-bound."""
    return {
        "DP": layer.most_data_parallel(tokens, device),
        "FSDP": layer.most_data_parallel(tokens, device),
        "TP": layer.most_tensor(device),
        "FSDP + TP": layer.most_mixed(tokens, device),
        "FSDP + TP, axes in turn": layer.most_mixed(tokens, device, overlapped=False),
    }


def bounds_table(device: cost.Accelerator, layer: cost.FeedForward, batches: Sequence[float]) -> str:
    """bounds() over batches, as Markdown."""
    lines = [
        {"tokens": f"{tokens:,.0f}"}
        | {
            name: f"{most:,.1f}" if most < 100 else f"{most:,.0f}"
            for name, most in bounds(device, layer, tokens).items()
        }
        for tokens in batches
    ]
    return records.markdown_table(lines)


def parallelism(device: cost.Accelerator, layer: cost.FeedForward, tokens: float, folder: str | Path, most: int = 4096):
    """Forward and backward times of each strategy over numbers of devices, calculated; writes sharding_parallelism.csv.

    FSDP + TP takes the mesh with the least of the larger of both axes' times.
    """
    parameters = {"accelerator": dataclasses.asdict(device), "layer": dataclasses.asdict(layer), "tokens": tokens}
    writer = records.ResultWriter(
        PARALLELISM, folder, method={"timer": "none: calculated by lmsys.cost"}, parameters=parameters
    )
    counts = [2**power for power in range(1, int(math.log2(most)) + 1)]
    with writer:
        for which in ("forward", "backward"):
            for n in counts:
                for name, seconds in _communication(device, layer, tokens, n, which).items():
                    compute = layer.compute_s(tokens, n, device, which)
                    writer.write(
                        {
                            "strategy": name,
                            "pass": which,
                            "tokens": tokens,
                            "devices": n,
                            "compute_ms": 1e3 * compute,
                            "communication_ms": 1e3 * seconds,
                            "bound": "compute" if compute >= seconds else "communication",
                        }
                    )
    return records.read_results(writer.path)


def _communication(
    device: cost.Accelerator, layer: cost.FeedForward, tokens: float, n: int, which: str
) -> dict[str, float]:
    """Seconds of communication of each strategy on n devices."""
    meshes = [(2**power, n // 2**power) for power in range(int(math.log2(n)) + 1)]
    weights = layer.weights_s(n, 1, device, which)
    return {
        "DP": 0.0 if which == "forward" else weights,
        "FSDP": weights,
        "TP": layer.activations_s(tokens, 1, n, device),
        "FSDP + TP": min(
            max(layer.weights_s(fsdp, tensor, device, which), layer.activations_s(tokens, fsdp, tensor, device))
            for fsdp, tensor in meshes
        ),
    }


def write_report(frame, memory, traces, folder: str | Path, calculated: Any = None) -> dict[str, Path]:
    """Write the figures and sharding_report.md to folder; return their paths by their short names."""
    from lmsys import plots

    folder = Path(folder)
    figures = {}
    if len(memory):
        figures["memory"] = plots.sharding_memory(memory)
    if len(frame[frame.status == "ok"]):
        figures["speed"] = plots.sharding_speed(frame)
    if len(traces):
        figures["timeline"] = plots.step_timeline(traces)
    if calculated is not None:
        figures["parallelism"] = plots.parallelism(calculated)
    written = {name: plots.save(figure, folder / f"sharding_{name}.png") for name, figure in figures.items()}
    written["report"] = records.write_text(folder / "sharding_report.md", report_text(frame, memory))
    return written


def report_text(frame, memory) -> str:
    """sharding_report.md: what to conclude, memory and speed."""
    text = ["# Sharding", "", f"Measured on {frame.device.iloc[0]}.", ""]
    text += [f"- {sentence}" for sentence in [*memory_conclusions(memory), *speed_conclusions(frame)]]
    text += ["", "Memory, MiB: measured (by formula).", "", memory_table(memory)]
    text += ["Times, ms: median [20th, 80th percentile].", "", speed_table(frame)]
    return "\n".join(text)
