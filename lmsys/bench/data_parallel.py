"""Data parallelism, step by step: from one blocking all-reduce a parameter to buckets that travel during the backward pass.

Studies, each of points trained by lmsys.bench.replicas:
- wrappers: naive, flat, overlap, flashddp and torch's DDP, each with a trace of one step;
- buckets: flashddp at several bucket sizes;
- options: what else flashddp can be told;
- captured: on GPUs, one GPU and the wrappers with the step's forward pass, backward pass and communication as one CUDA graph, where a
  host that cannot keep up no longer sets the pace; at larger batches flashddp and torch's DDP. Buckets and options are of such steps, too;
- scaling: flashddp, by copy engines too where GPUs reach each other's memory, and torch's DDP on 1, 2, 4 and 8 GPUs, as many as there are.

The first three are the course's problems (CS336, assignment 2: naive_ddp_benchmarking, minimal_ddp_flat_benchmarking,
ddp_overlap_individual_parameters_benchmarking, ddp_bucketed_benchmarking) at their setting, one node with two GPUs and the xl
model. Beside the time that communication adds stands what cost.exposed_communication says of it, from the latency and bandwidth that
lmsys.bench.collectives measured on the same machine and the backward pass of one GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmsys import cost, records
from lmsys.bench import replicas, timeline
from lmsys.bench.measure import quantiles
from lmsys.bench.replicas import Plan, TrainPoint, Workload
from lmsys.config import model_size, require, unknown_name
from lmsys.device import resolve_device
from lmsys.parallel.copy_engine import reachable
from lmsys.parallel.ddp import BUCKET_MB

NAME, TIMELINE = "data_parallel_results", "data_parallel_timeline"
STUDIES = ("wrappers", "buckets", "options", "captured", "scaling")
WRAPPERS = ("naive", "flat", "overlap", "flashddp", "torch_ddp")
EXTRA_COLUMNS = (
    *(
        "processes",
        "bucket_mb",
        "backward_ms",
        "finish_ms",
        "model_ms",
        "traced_comm_ms",
        "traced_hidden_ms",
        "device",
        "note",
    ),
)
_LIMIT_S = 240.0  # of one point, compilation included

Options = tuple[tuple[str, Any], ...]
_EVERYWHERE: tuple[Options, ...] = (
    (("layout", "flat"),),
    (("layout", "flat"), ("communication_dtype", "bf16")),
)
_COPIES: Options = (("transport", "copy_engine"),)
_ON_GPUS: tuple[Options, ...] = (
    (("max_ctas", 4),),
    (("max_ctas", 8),),
    (("max_ctas", 16),),
    (("high_priority", True),),
)
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "size": "tiny",
        "scaling_size": "tiny",
        "shape": (2, 32, 2, 32),
        "captured": (),
        "vocab_size": 256,
        "dtype": "fp32",
        "compiled": False,
        "kernel": "vectorized_torch",
        "bucket_sizes_mb": (0.05, 1),
        "steps": 2,
        "timed_steps": 3,
    },
    "cpu": {
        "size": "mini",
        "scaling_size": "tiny",
        "shape": (2, 64, 4, 64),
        "captured": (),
        "vocab_size": 2048,
        "dtype": "fp32",
        "compiled": False,
        "kernel": "vectorized_torch",
        "bucket_sizes_mb": (0.2, 2),
        "steps": 2,
        "timed_steps": 5,
    },
    "full": {
        "size": "xl",
        "scaling_size": "gpt2",
        "shape": (4, 512, 32, 1024),
        "captured": (("gpt2", 32, 1024), ("gpt2-medium", 16, 1024)),
        "vocab_size": None,
        "dtype": "bf16",
        "compiled": True,
        "kernel": "flash_attention_triton",
        "bucket_sizes_mb": (1, 10, 100, 1000),
        "steps": 4,
        "timed_steps": 15,
    },
}


@dataclass(frozen=True)
class DataParallelSettings:
    """What is run; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    studies: tuple[str, ...]
    workload: Workload  # of the studies at the course's setting
    scaling_workload: Workload
    captured_workloads: tuple[Workload, ...]  # beside the course's
    wrappers: tuple[str, ...]
    bucket_sizes_mb: tuple[float, ...]
    options: tuple[Options, ...]
    gpus: tuple[int, ...]
    steps: int
    timed_steps: int
    device: str

    @property
    def graphs(self) -> bool:
        """Whether steps of the studies buckets and options are captured: on GPUs."""
        return resolve_device(self.device).type == "cuda"

    @property
    def course_gpus(self) -> int:
        """Two, the course's setting, or the fewest of several that are to be measured."""
        return min(n for n in self.gpus if n > 1)


def settings(
    scale: str = "auto",
    studies: Sequence[str] | None = None,
    size: str | None = None,
    scaling_size: str | None = None,
    kernel: str | None = None,
    wrappers: Sequence[str] | None = None,
    bucket_sizes_mb: Sequence[float] | None = None,
    gpus: Sequence[int] | None = None,
    batch: int | None = None,
    context_length: int | None = None,
    dtype: str | None = None,
    compiled: bool | None = None,
    steps: int | None = None,
    timed_steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> DataParallelSettings:
    """The settings of a scale, with what is given in their place.

    Args:
        size, batch, context_length: of the course's studies; scaling_size: of scaling, at the scale's own batch and context.
        gpus: numbers of GPUs of scaling; the others use the smallest of them above one.
        device: auto is the CPU on a machine with one GPU.
    Raises:
        ValueError: an unknown name, a number out of range, or fewer than two GPUs.
    """
    scale, device = replicas.several(scale, device)
    given = {
        "size": size,
        "scaling_size": scaling_size,
        "kernel": kernel,
        "dtype": dtype,
        "compiled": compiled,
        "bucket_sizes_mb": bucket_sizes_mb,
        "steps": steps,
        "timed_steps": timed_steps,
    }
    values = _PRESETS[scale] | {key: value for key, value in given.items() if value is not None}
    on_gpus = resolve_device(device).type == "cuda"
    if studies is None:
        studies = [name for name in STUDIES if name != "captured" or on_gpus]
    studies = tuple(studies)
    for name in studies:
        if name not in STUDIES:
            raise unknown_name("study", name, STUDIES)
    wrappers = WRAPPERS if wrappers is None else tuple(wrappers)
    for name in wrappers:
        if name not in WRAPPERS:
            raise unknown_name("wrapper", name, WRAPPERS)
    for name in ("steps", "timed_steps"):
        require(type(values[name]) is int and values[name] >= 1, f"{name} is {values[name]!r}; it must be 1 or more")
    sizes_mb = tuple(values["bucket_sizes_mb"])
    require(all(size_mb >= 0 for size_mb in sizes_mb), f"bucket_sizes_mb are {sizes_mb}; each must be 0 or more")
    counts = replicas.process_counts(device, gpus)
    require(counts[-1] > 1, f"gpus are {counts}: data parallelism needs two or more, which this machine does not have")
    own_batch, own_length, scaling_batch, scaling_length = values["shape"]

    def workload(of_size: str, local_batch: int, length: int) -> Workload:
        model = model_size(of_size, vocab_size=values["vocab_size"], context_length=length)
        what = {name: values[name] for name in ("kernel", "dtype", "compiled")}
        return Workload(of_size, model, local_batch=local_batch, seed=seed, **what)

    return DataParallelSettings(
        scale=scale,
        studies=studies,
        workload=workload(values["size"], batch or own_batch, context_length or own_length),
        scaling_workload=workload(values["scaling_size"], scaling_batch, scaling_length),
        captured_workloads=tuple(workload(*shape) for shape in values["captured"]),
        wrappers=wrappers,
        bucket_sizes_mb=sizes_mb,
        options=(*_EVERYWHERE, *(_ON_GPUS if on_gpus else ()), *((_COPIES,) if reachable() and on_gpus else ())),
        gpus=counts,
        steps=values["steps"],
        timed_steps=values["timed_steps"],
        device=device,
    )


def points(chosen: DataParallelSettings) -> dict[TrainPoint, list[str]]:
    """The points, and the studies that each belongs to. One GPU comes first of its workload."""
    course, n = chosen.workload, chosen.course_gpus
    found: dict[TrainPoint, list[str]] = {}

    def add(study: str, point: TrainPoint) -> None:
        found.setdefault(point, []).append(study)

    variants: list[tuple[str, Options]] = []
    for wrapper in chosen.wrappers:
        variants.append((wrapper, ()))
        if wrapper == "flashddp" and _COPIES in chosen.options:
            variants.append((wrapper, _COPIES))
    fast = [variant for variant in variants if variant[0] in ("flashddp", "torch_ddp")]
    alone, ours = TrainPoint(course, "none", 1, n), TrainPoint(course, "flashddp", n, n)
    for study in ("wrappers", "captured"):
        if study in chosen.studies:
            add(study, alone)
    if "wrappers" in chosen.studies:
        for wrapper in chosen.wrappers:
            add("wrappers", dataclasses.replace(ours, wrapper=wrapper, traced=True))
    # Captured ones after the others, as rows are compared with the last one of one GPU.
    if chosen.graphs:
        ours = dataclasses.replace(ours, captured=True)
    elif "wrappers" in chosen.studies and "flashddp" in chosen.wrappers:
        ours = dataclasses.replace(ours, traced=True)
    sizes_mb, own_mb = chosen.bucket_sizes_mb, bucket_mb(ours)
    varied: dict[str, list[Options]] = {
        "buckets": [() if mb == own_mb else (("bucket_size_mb", mb),) for mb in sorted({*sizes_mb, own_mb})],
        "options": [(), *chosen.options],
    }
    for study, variations in varied.items():
        if study in chosen.studies:
            add(study, dataclasses.replace(alone, captured=chosen.graphs))
            for options in variations:
                add(study, dataclasses.replace(ours, options=options, traced=ours.traced and not options))
    if "captured" in chosen.studies:
        add("captured", dataclasses.replace(alone, captured=True))
        for wrapper, options in variants:
            add("captured", TrainPoint(course, wrapper, n, n, options=options, captured=True))
        for workload in chosen.captured_workloads:
            add("captured", TrainPoint(workload, "none", 1, n, captured=True))
            for wrapper, options in fast:
                add("captured", TrainPoint(workload, wrapper, n, n, options=options, captured=True))
    if "scaling" in chosen.studies:
        for count in chosen.gpus:
            if count == 1:
                add("scaling", TrainPoint(chosen.scaling_workload, "none", 1, n))
                continue
            for wrapper, options in fast:
                add("scaling", TrainPoint(chosen.scaling_workload, wrapper, count, count, options=options))
    return found


def run(
    chosen: DataParallelSettings,
    folder: str | Path,
    links: dict[tuple[str, int], cost.Link],
    *,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Any, Any]:
    """Run the studies; write data_parallel_results.csv and data_parallel_timeline.csv to folder; return both as DataFrames.

    links: what collectives.links made of this machine's times; a number of GPUs without one gets no model_ms.
    """
    plan = Plan(chosen.steps, chosen.timed_steps, quiet_steps=max(2, chosen.timed_steps // 2))
    method = replicas.method(plan, resolve_device(chosen.device), chosen.workload.dtype)
    fitted = {f"{op} of {n}": dataclasses.asdict(link) for (op, n), link in links.items()}
    parameters = dataclasses.asdict(chosen) | {"links": fitted}
    results = records.ResultWriter(NAME, folder, method=method, parameters=parameters, extra_columns=EXTRA_COLUMNS)
    traces = records.ResultWriter(TIMELINE, folder, method=method, parameters=parameters)
    backward_s: dict[Workload, float] = {}
    studies = points(chosen)
    with results, traces:
        for point, row, result in replicas.rows(list(studies), plan, device=chosen.device, limit_s=_LIMIT_S):
            row |= {
                "processes": point.processes,
                "options": records.option_text(records.CAPTURED * point.captured + point.options),
            }
            if point.wrapper == "flashddp":
                row["bucket_mb"] = bucket_mb(point)
            if row["status"] == "ok":
                parts = [part for part in ("backward", "finish") if f"{part}_ms" in result]
                row |= {f"{part}_ms": quantiles(result[f"{part}_ms"])[0] for part in parts}
                if point.gpus == 1 and not point.captured:
                    backward_s[point.workload] = row["backward_ms"] / 1e3
                row["model_ms"] = model_ms(point, links, backward_s.get(point.workload))
                if result.get("timeline"):
                    overlap = timeline.overlap(result["timeline"])
                    row["traced_comm_ms"] = overlap["communication_ms"]
                    row["traced_hidden_ms"] = overlap["hidden_ms"]
                    for interval in result["timeline"]:
                        traces.write({"wrapper": point.name} | interval)
            for study in studies[point]:
                results.write({"study": study} | row)
            if on_row:
                on_row(row)
    return records.read_results(results.path), records.read_results(traces.path)


def bucket_mb(point: TrainPoint) -> float:
    """The bucket size of a wrapper with buckets, 10^6 bytes."""
    options = dict(point.options)
    return float(options.get("bucket_size_mb", BUCKET_MB[options.get("transport", "nccl")]))


def model_ms(point: TrainPoint, links: dict[tuple[str, int], cost.Link], backward_s: float | None) -> float | None:
    """Communication past the end of the backward pass by cost.exposed_communication; None where nothing to go by was measured."""
    link = links.get(("all_reduce", point.gpus))
    if point.gpus == 1 or link is None or backward_s is None:
        return 0.0 if point.gpus == 1 else None
    sizes, options = cost.parameter_sizes(point.workload.model), dict(point.options)
    element = 2 if options.get("communication_dtype") == "bf16" else 4
    bucket_bytes = {"naive": 0.0, "overlap": 0.0, "flat": math.inf}.get(point.wrapper, 1e6 * bucket_mb(point))
    messages = cost.buckets(sizes, element, bucket_bytes)
    hidden = 0.0 if point.wrapper in ("naive", "flat") else backward_s
    return 1e3 * cost.exposed_communication(messages, link, point.gpus, hidden)


# --- What the studies say -------------------------------------------------------------------------


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    what = f"{row['size']:<8} {row['wrapper']:<10} {row['options']:<44} x{row['gpus']}"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row['note']}"
    return f"{what} {row['step_ms']:>9.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}], exposed {row['exposed_comm_ms']:.3g} ms"


def table(frame, study: str) -> str:
    """A study's rows as Markdown."""
    columns = {
        "size": "size",
        "gpus": records.units(frame)[1],
        "wrapper": "wrapper",
        "options": "options",
        "step": "step, ms",
        "tokens": "tokens/s",
        "efficiency": "of linear",
        "exposed": "communication exposed, ms",
        "share": "of the step",
        "finish": "wait after backward, ms",
        "model": "exposed by the model, ms",
        "peak": "peak MiB",
    }
    rows = frame[frame.study == study]
    if not any(map(_text, rows.options)):
        del columns["options"]
    if rows["size"].nunique() == 1:
        del columns["size"]
    lines = []
    for row in rows.itertuples():
        line = {
            "size": row.size,
            "gpus": row.gpus,
            "wrapper": f"`{row.wrapper}`",
            "options": _text(row.options),
            "step": row.status,
        }
        if row.status == "ok":
            line |= {
                "step": records.spread(row.step_ms, row.p20_ms, row.p80_ms),
                "tokens": f"{row.tokens_per_s:,.0f}",
                "efficiency": _percent(row.scaling_efficiency),
                "exposed": _fixed(row.exposed_comm_ms),
                "share": _percent(row.exposed_comm_ms / row.step_ms),
                "finish": _fixed(row.finish_ms),
                "model": _fixed(row.model_ms),
                "peak": f"{row.peak_mib:,.0f}",
            }
        lines.append(line)
    return records.markdown_table(lines, columns)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def rows_of(frame, study: str):
    """The rows that a study's figure and sentences are of; empty without the study.

    Of wrappers, captured steps where these were measured, as else a slow host is what times tell. Traces are of steps that the host launched.
    """
    rows = frame[frame.study == study]
    if study != "wrappers" or rows.empty:
        return rows
    plain = frame.options == records.option_text(records.CAPTURED)
    graph = frame[(frame.study == "captured") & plain & frame["size"].isin(rows["size"])]
    if graph.empty:
        return rows
    traced = [column for column in ("traced_comm_ms", "traced_hidden_ms") if column in rows]
    seen = rows.set_index("wrapper")
    graph = graph.sort_values("wrapper", key=lambda names: names.map({name: at for at, name in enumerate(seen.index)}))
    return graph.assign(study="wrappers", **{column: graph.wrapper.map(seen[column]) for column in traced})


def _label(row: Any) -> str:
    """A row's wrapper, with its options if it has some."""
    options = records.own_options(row.options)
    return f"{row.wrapper} with {options}" if options else row.wrapper


def _fixed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}%"


def conclusions(frame, study: str) -> list[str]:
    """What a study's rows show, in sentences made from their numbers."""
    rows = rows_of(frame, study)
    ok = rows[rows.status == "ok"]
    several = ok[ok.gpus > 1]
    said = {
        "wrappers": _of_wrappers,
        "buckets": _of_buckets,
        "options": _of_options,
        "captured": _of_captured,
        "scaling": _of_scaling,
    }[study](ok if study == "captured" else several)
    for row in rows[rows.status != "ok"].itertuples():
        said.append(f"{_label(row)} x{row.gpus}: {row.status}, {row.note}")
    return said


def step_text(row: Any) -> str:
    """A step's time and what communication adds to it, unless that is negative or within the spread of the step."""
    text = f"{records.significant(row.step_ms)} ms a step"
    if row.exposed_comm_ms < 0 or records.within_spread(row.exposed_comm_ms, row):
        spread = f"{records.significant(row.p20_ms)} to {records.significant(row.p80_ms)} ms (20th to 80th percentile)"
        return f"{text}; what communication adds does not show beside the spread of the steps, {spread}"
    share = _percent(row.exposed_comm_ms / row.step_ms)
    return f"{text}, of which communication adds {row.exposed_comm_ms:.2f} ms ({share})"


def _of_wrappers(rows) -> list[str]:
    by = rows.set_index("wrapper")
    said = []
    for name in by.index:
        row = by.loc[name]
        text = f"{name}: {step_text(row)}"
        if not math.isnan(row.traced_comm_ms) and row.traced_comm_ms > 0:
            hidden = row.traced_hidden_ms / row.traced_comm_ms
            text += f"; in the traced step {_percent(hidden)} of the time of communication lies beside computation"
        said.append(text + ".")
    for name, shown in (("naive", "naive's"), ("torch_ddp", "torch DDP's")):
        if {name, "flashddp"} <= set(by.index):
            ours, other = by.loc["flashddp"], by.loc[name]
            if records.within_spread(other.step_ms - ours.step_ms, ours, other):
                said.append(f"flashddp's step is as fast as {shown} within the spread.")
            else:
                said.append(f"flashddp's step has {other.step_ms / ours.step_ms:.3f} times the speed of {shown}.")
    return said


def _of_buckets(rows) -> list[str]:
    if rows.empty:
        return []
    best = rows.loc[rows.step_ms.idxmin()]
    slowest = rows.loc[rows.step_ms.idxmax()]
    return [
        f"The fastest bucket size is {best.bucket_mb:g} MB, {records.significant(best.step_ms)} ms a step; the slowest, "
        f"{slowest.bucket_mb:g} MB, takes {records.significant(slowest.step_ms)} ms."
    ]


def _of_options(rows) -> list[str]:
    plain = rows[~rows.options.map(records.own_options).map(bool)]
    if plain.empty:
        return []
    base, said = plain.iloc[0], []
    for row in rows.itertuples():
        if options := records.own_options(row.options):
            more = row.step_ms - base.step_ms
            lost = ", within the spread" if records.within_spread(more, row, base) else ""
            said.append(f"{options}: {more:+.2f} ms a step ({100 * more / base.step_ms:+.1f}%){lost}.")
    return said


def _of_captured(rows) -> list[str]:
    """By size: one GPU with and without a graph, the fastest wrapper beside torch's DDP."""
    said = []
    for size, of_size in rows.groupby("size", sort=False):
        alone, several = of_size[of_size.gpus == 1], of_size[of_size.gpus > 1]
        graph = records.captured(alone)
        if len(alone[graph]) and len(alone[~graph]):
            times = [records.significant(alone[which].step_ms.iloc[0]) for which in (~graph, graph)]
            said.append(f"{size}, one {records.units(rows)[0]}: {times[0]} ms a step, {times[1]} ms as one graph.")
        several = several[several.scaling_efficiency.notna()]
        if several.empty:
            continue
        best, torch_ddp = several.loc[several.step_ms.idxmin()], several[several.wrapper == "torch_ddp"]
        text = f"{size}, {best.gpus} {records.units(rows)[1]}: {_label(best)} is the fastest, {_reached(best)}"
        if len(torch_ddp) and best.wrapper != "torch_ddp":
            other = torch_ddp.iloc[0]
            text += f"; torch_ddp {_reached(other)}, {other.step_ms / best.step_ms:.3f} times as long"
        if best.exposed_comm_ms > 0:
            quiet = best.step_ms - best.exposed_comm_ms
            text += f". Without communication the same take {records.significant(quiet)} ms, {_percent(quiet / best.step_ms)} of it"
        said.append(f"{text}.")
    return said


def _reached(row: Any) -> str:
    return f"{records.significant(row.step_ms)} ms a step and {_percent(row.scaling_efficiency)} of linear scaling"


def _of_scaling(rows) -> list[str]:
    return [
        f"{_label(row)} on {row.gpus} {records.units(rows)[1]}: {_percent(row.scaling_efficiency)} of linear scaling."
        for row in rows.itertuples()
        if not math.isnan(row.scaling_efficiency)
    ]


def bucket_model(chosen: DataParallelSettings, links: dict[tuple[str, int], cost.Link]) -> list[str]:
    """The course's model of bucketed DDP with the numbers of this machine: the best bucket size, and the overhead there."""
    n = chosen.course_gpus
    link = links.get(("all_reduce", n))
    if link is None:
        return ["All-reduce was not measured at two sizes or more: the model has no latency and bandwidth to go by."]
    size = 4.0 * cost.model_parameters(chosen.workload.model)
    bandwidth = link.bandwidth / cost.bus_factor("all_reduce", n)
    said = [
        f"s = {size / 1e6:,.1f} MB of gradients, w = {bandwidth / 1e9:.3g} GB/s, o = {1e6 * link.latency_s:.3g} us from the all-reduces "
        "measured here."
    ]
    if link.latency_s == 0:
        return [*said, "No latency shows in these times, so that the model would have ever smaller buckets."]
    best = min(size, cost.best_bucket_bytes(size, bandwidth, link.latency_s))
    overhead = cost.ddp_overhead(size, bandwidth, link.latency_s, size / best)
    said.append(
        f"The best bucket is sqrt(s w o) = {best / 1e6:.3g} MB, {size / best:.3g} of them, with an overhead of {1e3 * overhead:.3g} ms."
    )
    return said


def write_report(frame, traces, folder: str | Path) -> dict[str, Path]:
    """Write the figures to folder; return their paths by their short names."""
    from lmsys import plots

    folder = Path(folder)
    figures = {}
    if len(traces):
        figures["timeline"] = plots.step_timeline(traces)
    for study, plot in (
        ("wrappers", plots.step_breakdown),
        ("buckets", plots.bucket_sizes),
        ("scaling", plots.scaling),
    ):
        rows = rows_of(frame, study)
        rows = rows[rows.status == "ok"]
        if len(rows):
            figures[study] = plot(rows)
    return {name: plots.save(figure, folder / f"data_parallel_{name}.png") for name, figure in figures.items()}
