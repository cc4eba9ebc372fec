"""Data parallelism, step by step: from one blocking all-reduce a parameter to buckets that travel during the backward
pass.

Studies, each of points trained by lmsys.bench.steps:
- wrappers: naive, flat, overlap, flashddp and torch's DDP, each with a trace of one step;
- buckets: flashddp at several bucket sizes;
- options: what else flashddp can be told;
- captured: on GPUs, one GPU and the wrappers with the step's forward pass, backward pass and communication as one CUDA
  graph, where a host that cannot keep up no longer sets the pace; at larger batches flashddp and torch's DDP. Buckets
  and options are of such steps, too;
- scaling: flashddp, by copy engines too where GPUs reach each other's memory, and torch's DDP on 1, 2, 4 and 8 GPUs, as
  many as there are.

The first three are the course's problems (CS336, assignment 2: naive_ddp_benchmarking, minimal_ddp_flat_benchmarking,
ddp_overlap_individual_parameters_benchmarking, ddp_bucketed_benchmarking) at their setting, one node with two GPUs and
the xl model. Beside the time that communication adds stands what cost.exposed_communication says of it, from the
latency and bandwidth that lmsys.bench.collectives measured on the same machine and the backward pass of one GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from lmsys import cost, parallel
from lmsys.bench import experiment, processes, steps
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, Row
from lmsys.bench.measure import quantiles
from lmsys.config import TrainConfig, model_size, require
from lmsys.device import resolve_device
from lmsys.options import STEP_PRESETS
from lmsys.parallel.copy_engine import reachable
from lmsys.parallel.ddp import BUCKET_MB
from lmsys.parallel.group import Process

TIMELINE = "data_parallel_timeline"
STUDIES = ("wrappers", "buckets", "options", "captured", "scaling")
WRAPPERS = [name for name, wrapper in parallel.WRAPPERS.items() if wrapper.replicated]
OURS = "flashddp"  # of the studies buckets and options

Options = dict[str, Any]
Links = Mapping[tuple[str, int], cost.Link]  # by operation and number of processes, see collectives.links()
_COPIES: Options = {"transport": "copy_engine"}
_OPTIONS: list[Options] = [{"layout": "flat"}, {"layout": "flat", "communication_dtype": "bf16"}]
_NCCL_OPTIONS: list[Options] = [{"max_ctas": 4}, {"max_ctas": 8}, {"max_ctas": 16}, {"high_priority": True}]

Workload = tuple[str, int, int]  # size, sequences a GPU, tokens of a sequence
SCALING: dict[str, tuple[int, int]] = {"smoke": (2, 32), "cpu": (4, 64), "full": (32, 1024)}
CAPTURED: list[Workload] = [("gpt2", 32, 1024), ("gpt2-medium", 16, 1024)]  # beside the course's, at scale full


def check(p: Parameters) -> None:
    """Fill in studies, wrappers and numbers of processes.

    Raises:
        ValueError: an unknown name, a number out of range, or fewer than two GPUs.
    """
    processes.settle(p, NOTEBOOK)
    p.studies = p.studies or [name for name in STUDIES if name != "captured" or on_gpus(p)]
    p.wrappers = p.wrappers or list(WRAPPERS)
    experiment.require_names(p, {"studies": STUDIES, "wrappers": WRAPPERS, "step_preset": STEP_PRESETS})
    experiment.require_numbers(p, dict.fromkeys(("batch", "context_length", "vocab_size", "steps", "timed_steps"), 1))
    experiment.require_numbers(p, {"bucket_sizes_mb": 0})
    p.gpus = list(processes.process_counts(p.device, p.gpus))
    require(p.gpus[-1] > 1, f"gpus are {p.gpus}: data parallelism needs two or more, which this machine does not have")


NOTEBOOK = Notebook("data_parallel", check)


def on_gpus(p: Parameters) -> bool:
    """Whether steps of the studies buckets and options are captured."""
    return resolve_device(p.device).type == "cuda"


def copies(p: Parameters) -> bool:
    """Whether copy engines can carry gradients."""
    return on_gpus(p) and reachable()


def course_gpus(p: Parameters) -> int:
    """Two, the course's setting, or the fewest of several that are to be measured."""
    return min(n for n in p.gpus if n > 1)


# --- Points ---------------------------------------------------------------------------------------


def points(p: Parameters) -> list[Point]:
    """Each point once; its column study names all that it belongs to, which have a row each in the results."""
    course, n = (p.size, p.batch, p.context_length), course_gpus(p)
    found: dict[str, Point] = {}

    def add(study: str, workload: Workload, wrapper: str = "none", gpus: int = 1, **more: Any) -> None:
        traced = more.pop("traced", False)
        point = found.setdefault(
            json.dumps([workload, wrapper, gpus, more]), _point(p, workload, wrapper, gpus, max(gpus, n), **more)
        )
        point["study"] = f"{point.get('study', '')} {study}".strip()
        point["traced"] = point.get("traced", False) or traced

    variants = [
        (wrapper, options)
        for wrapper in p.wrappers
        for options in ({}, _COPIES)
        if not options or ("transport" in parallel.get_wrapper(wrapper).options and copies(p))
    ]
    fast = [variant for variant in variants if "bucket_size_mb" in parallel.get_wrapper(variant[0]).options]
    for study in [name for name in ("wrappers", "captured") if name in p.studies]:
        add(study, course)
    for wrapper in p.wrappers if "wrappers" in p.studies else ():
        add("wrappers", course, wrapper, n, traced=True)
    own_mb = BUCKET_MB["nccl"]
    sizes_mb = sorted({*p.bucket_sizes_mb, own_mb})
    varied: dict[str, list[Options]] = {
        "buckets": [{} if size_mb == own_mb else {"bucket_size_mb": size_mb} for size_mb in sizes_mb],
        "options": [{}, *_OPTIONS, *(_NCCL_OPTIONS * on_gpus(p)), *([_COPIES] * copies(p))],
    }
    graph = {"captured": True} if on_gpus(p) else {}
    for study in [name for name in varied if name in p.studies]:
        add(study, course, **graph)
        for options in varied[study]:
            add(study, course, OURS, n, **graph, **({"options": options} if options else {}))
    if "captured" in p.studies:
        for workload, wrapped in ((course, variants), *((each, fast) for each in CAPTURED if p.scale == "full")):
            add("captured", workload, captured=True)
            for wrapper, options in wrapped:
                add("captured", workload, wrapper, n, captured=True, **({"options": options} if options else {}))
    for gpus in p.gpus if "scaling" in p.studies else ():
        for wrapper, options in fast if gpus > 1 else [("none", {})]:
            workload = (p.scaling_size, *SCALING[p.scale])
            add("scaling", workload, wrapper, gpus, **({"options": options} if options else {}))
    return list(found.values())


def _point(
    p: Parameters,
    workload: Workload,
    wrapper: str,
    gpus: int,
    in_processes: int,
    captured: bool = False,
    options: Options | None = None,
) -> Point:
    size, batch, length = workload
    options, takes = options or {}, parallel.get_wrapper(wrapper).options
    settings = {name: value for name, value in options.items() if name in TrainConfig.__dataclass_fields__}
    if "transport" in takes:  # captured steps would take copy engines by themselves
        settings.setdefault("transport", "nccl")
    config = steps.step_config(
        model_size(size, vocab_size=p.vocab_size, context_length=length),
        attention_kernel=p.kernel,
        batch_size=batch,
        dtype=p.dtype,
        compile=p.compiled,
        step_preset=p.step_preset,
        seed=p.seed,
        device=p.device,
        ddp_wrapper=wrapper,
        cuda_graph=captured,
        **settings,
    )
    point = steps.step_point(config, size, gpus=gpus, processes=in_processes)
    named = [f"{name}={value:g}" if type(value) is float else f"{name}={value}" for name, value in options.items()]
    point["options"] = " ".join(["captured=True"] * captured + named)
    point["wrapper_options"] = {name: value for name, value in options.items() if name not in settings}
    if "transport" in takes:
        point["bucket_mb"] = float(options.get("bucket_size_mb", BUCKET_MB[settings["transport"]]))
    return point


# --- Measuring ------------------------------------------------------------------------------------


def plan(p: Parameters) -> steps.Plan:
    return steps.Plan(p.steps, p.timed_steps, quiet_steps=max(2, p.timed_steps // 2))


def measure_point(point: Point, p: Parameters, process: Process) -> Measured | None:
    measured = steps.measure_point(process, point, plan(p), traced=point["traced"], **point["wrapper_options"])
    if measured is None:
        return None
    columns, result = measured
    columns |= {name: quantiles(result[name])[0] for name in ("backward_ms", "finish_ms") if name in result}
    return steps.with_timeline(point, columns, result, TIMELINE)


def derive(p: Parameters, links: Links, row: Row, earlier: list[Row]) -> list[Row]:
    """What a row is beside one GPU with a step like it, and by the model of communication; a row for each study."""
    more: Row = {}
    if row["status"] == "ok":
        launched = [one for one in earlier if not one["options"].startswith("captured")]
        alike = [one for one in earlier if (one in launched) != row["options"].startswith("captured")]
        if one := steps.one_gpu_of(row, alike):
            more |= steps.beside_one_gpu(row, one["step_ms"])
        plain = steps.one_gpu_of({"gpus": None}, launched)
        more["model_ms"] = model_ms(row, p, links, plain["backward_ms"] / 1e3 if plain else None)
    return [more | {"study": study} for study in row["study"].split()]


def model_ms(row: Row, p: Parameters, links: Links, backward_s: float | None) -> float | None:
    """Communication past the end of the backward pass by cost.exposed_communication.

    None where nothing to go by was measured.
    """
    link, wrapper = links.get(("all_reduce", row["gpus"])), parallel.get_wrapper(row["wrapper"])
    if row["gpus"] == 1 or link is None or backward_s is None:
        return 0.0 if row["gpus"] == 1 else None
    model = model_size(row["size"], vocab_size=p.vocab_size, context_length=row["context_length"])
    element = 2 if "communication_dtype=bf16" in row["options"] else 4
    bucket_bytes = {"parameter": 0.0, "all": math.inf, "bucket": 1e6 * (row.get("bucket_mb") or BUCKET_MB["nccl"])}
    messages = cost.buckets(cost.parameter_sizes(model), element, bucket_bytes[wrapper.message])
    return 1e3 * cost.exposed_communication(messages, link, row["gpus"], backward_s if wrapper.overlaps else 0.0)


def studies(p: Parameters, links: Links) -> Experiment:
    """The studies. links: of this machine; a number of GPUs without one gets no model_ms."""
    fitted = {f"{op} of {n}": dataclasses.asdict(link) for (op, n), link in links.items()}
    return Experiment(
        name="data_parallel_results",
        columns=(
            *("study", "options", *steps.COLUMNS, "processes", "bucket_mb", "backward_ms", "finish_ms", "model_ms"),
            *("traced_comm_ms", "traced_hidden_ms", "device", "note"),
        ),
        points=points,
        measure=measure_point,
        group=("size", "context_length", "local_batch"),
        method=lambda p: steps.step_method(plan(p), resolve_device(p.device), p.dtype) | {"links": fitted},
        tables={TIMELINE: steps.TIMELINE_COLUMNS},
        processes=lambda point, p: point["processes"],
        limit_s=240.0,  # compilation included
        derive=functools.partial(derive, p, links),
    )


def bucket_model(p: Parameters, links: Links) -> dict[str, float] | None:
    """The course's model of bucketed DDP with this machine's numbers: the best bucket size, and the overhead there.

    None where all-reduces show no latency and bandwidth to go by.
    """
    n = course_gpus(p)
    link = links.get(("all_reduce", n))
    if link is None or link.latency_s == 0:
        return None
    model = model_size(p.size, vocab_size=p.vocab_size, context_length=p.context_length)
    size, bandwidth = 4.0 * cost.model_parameters(model), link.bandwidth / cost.bus_factor("all_reduce", n)
    best = min(size, cost.best_bucket_bytes(size, bandwidth, link.latency_s))
    return {
        "gradients_mb": size / 1e6,
        "bandwidth_gb_s": bandwidth / 1e9,
        "latency_us": 1e6 * link.latency_s,
        "best_bucket_mb": best / 1e6,
        "buckets": size / best,
        "overhead_ms": 1e3 * cost.ddp_overhead(size, bandwidth, link.latency_s, size / best),
    }
