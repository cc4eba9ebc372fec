"""The training step, taken apart: the trainer's fastest step, with each option taken away, with none, and a plain
peer's.

What is timed is what lmsys.train runs (bench/steps.py). The peer (bench/peers.py) is the same model and step with what
PyTorch has. All begin with the same weights and see the same batches; the losses of the first steps are kept, and what
options of less precision change is told from them.

On a GPU host_ms is how long the host takes to draw a batch and to issue a step's work when it need not wait: below the
step's time, neither data nor launches hold the GPU up; its clock and power during the timed steps tell what else may.

Limits: one device; points run one after the other in one process; no accumulation over micro-batches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lmsys.bench import ahead
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, require_names, require_numbers
from lmsys.bench.peers import NativeStep
from lmsys.bench.steps import Plan, Subject, alone, measure_step, step_columns, step_config, step_method
from lmsys.config import DTYPES, MODEL_SIZES, PipelineConfig, model_size, require, unknown_name
from lmsys.device import fp32_products, resolve_device
from lmsys.train import check_setup

OURS, PEER = "lmsys", "torch_native"
ALL, WRITTEN, NONE = "all", "written", "none"
_COMPILE_LIMIT_S = 100.0  # compiling ahead ends here; what is not done by then is compiled when it is measured
_POWER = ("sm_mhz", "max_sm_mhz", "power_w", "limit_w")

# What turns an option of the step on, in the config's train section; the preset plain has none.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {name: True} for name in ("fused_loss", "fused_rope", "merged_gate", "fused_optimizer")},
    "bf16_residual": {"residual_dtype": "bf16"},
    **{name: {name: True} for name in ("autotune", "cuda_graph")},
}
WHERE_NAMED = ("autotune", "cuda_graph")  # takes minutes; is for a GPU that waits for its host, as these do not

_BATCH = {"gpt2": 32, "gpt2-medium": 16}  # of 1,024 tokens, as nanoGPT's results have it; 8 of other sizes


def check(p: Parameters) -> None:
    """Fill in the options that are on: those given, else all that precision, kernel and device allow.

    Raises:
        ValueError: an unknown name, a number out of range, options that do not go together, a device that is not here.
    """
    require_names(p, {"sizes": MODEL_SIZES, "dtype": DTYPES})
    numbers = ("context_length", "loss_steps", "timed_steps", "batch_size", "vocab_size")
    require_numbers(p, dict.fromkeys(numbers, 1) | {"compile_ahead": 0})
    plain = {"step_preset": "plain", "compile": p.compile}
    possible = [name for name, settings in OPTIONS.items() if _is_possible(p, plain | settings)]
    if p.options is None:
        p.options = [name for name in possible if name not in WHERE_NAMED]
    for name in p.options:
        if name not in OPTIONS:
            raise unknown_name("option", name, OPTIONS)
        require(
            name in possible,
            f"option {name} does not go with dtype {p.dtype}, compile {p.compile}, kernel {p.attention_kernel} on "
            f"{resolve_device(p.device).type}; those that do: {', '.join(possible)}",
        )
    for point in points(p):
        if point["implementation"] == OURS:
            check_setup(config_of(p, point), 1)


NOTEBOOK = Notebook("train_step", check)


def _is_possible(p: Parameters, train: dict[str, Any]) -> bool:
    """Whether settings go with the rest, by the rules of lmsys.options."""
    try:
        config = _config(p, p.sizes[0], dict(train))
    except ValueError:
        return False
    return not config.train.cuda_graph or resolve_device(p.device).type == "cuda"


def points(p: Parameters) -> list[Point]:
    """Of each size the peer and ours; of the first, with each option taken away, and what the written blocks take."""
    found, written = [], [WRITTEN] if _is_possible(p, {"step_preset": WRITTEN}) else []
    for index, size in enumerate(p.sizes):
        single = p.options if index == 0 and len(p.options) > 1 else []
        for implementation, option in [(PEER, ALL), *((OURS, name) for name in (ALL, *written, *single, NONE))]:
            point = {"size": size, "implementation": implementation, "option": option}
            batch = p.batch_size or _BATCH.get(size, 8)
            found.append(point | {"context_length": p.context_length, "local_batch": batch, "dtype": p.dtype})
    return found


def config_of(p: Parameters, point: Point) -> PipelineConfig:
    """A point as the trainer takes it."""
    train: dict[str, Any] = {"step_preset": "plain", "compile": p.compile}
    if point["option"] == WRITTEN:
        return _config(p, point["size"], {"step_preset": WRITTEN})
    if point["option"] != NONE:
        for name in p.options:
            if name != point["option"]:
                train |= OPTIONS[name]
    return _config(p, point["size"], train)


def _config(p: Parameters, size: str, train: dict[str, Any]) -> PipelineConfig:
    model = model_size(size, vocab_size=p.vocab_size, context_length=p.context_length)
    batch = p.batch_size or _BATCH.get(size, 8)
    train |= {"batch_size": batch, "dtype": p.dtype, "attention_kernel": p.attention_kernel}
    return step_config(model, learning_rate=p.learning_rate, device=p.device, seed=p.seed, **train)


def measure_point(point: Point, p: Parameters) -> Measured:
    """A step's time, memory and host time; its losses."""
    config, device = config_of(p, point), resolve_device(p.device)
    peer = NativeStep if point["implementation"] == PEER else None
    result = measure_step(alone(device), config, Plan(p.loss_steps, p.timed_steps), peer=peer)
    columns = step_columns(config, result, device=device)
    names = ("step_ms", "p20_ms", "p80_ms", "samples", "tokens_per_s", "mfu", "peak_mib")
    row = {name: columns[name] for name in names} | {"loss": result["losses"][-1]}
    row |= {name: result.get(name) for name in ("host_ms", *_POWER)}
    key = {name: point[name] for name in ("size", "implementation", "option")}
    losses = [key | {"step": step, "loss": f"{loss:.9g}"} for step, loss in enumerate(result["losses"], start=1)]
    return Measured([row], {"train_step_losses": losses})


def compile_ahead(p: Parameters) -> None:
    """Compile what the points compile in several processes, so that the measuring process finds it on disk."""
    if p.compile:
        work = [point for point in points(p) if point["option"] != WRITTEN]
        ahead.compile_points(compile_point, work, p, p.compile_ahead, _COMPILE_LIMIT_S)


def compile_point(point: Point, p: Parameters) -> None:
    """A step. A block compiles the same in a model of one layer; the peer, compiled whole, needs all."""
    config, device = config_of(p, point), resolve_device(p.device)
    if point["implementation"] == OURS:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    with fp32_products("high" if device.type == "cuda" else None):
        make = {"make": NativeStep} if point["implementation"] == PEER else {}
        Subject(alone(device), config, **make).step()


TRAIN_STEP = Experiment(
    name="train_step_results",
    columns=(
        *("size", "implementation", "option", "context_length", "local_batch", "dtype", "status"),
        *("step_ms", "p20_ms", "p80_ms", "samples", "tokens_per_s", "mfu", "peak_mib", "loss"),
        *("host_ms", *_POWER, "device", "note"),
    ),
    points=points,
    measure=measure_point,
    group=("size",),
    method=lambda p: step_method(Plan(p.loss_steps, p.timed_steps), resolve_device(p.device), p.dtype),
    tables={"train_step_losses": ("size", "implementation", "option", "step", "loss")},
    before=compile_ahead,
)


def label(implementation: str, option: str) -> str:
    """A point's name in tables and figures."""
    names = {(PEER, ALL): "PyTorch", (OURS, ALL): "lmsys", (OURS, WRITTEN): "lmsys, written blocks"}
    return names.get((implementation, option), "lmsys, plain blocks" if option == NONE else f"without {option}")


def beside(rows, losses):
    """The rows with label, times lmsys's step, and the largest distance of the losses from the peer's at one step."""
    rows = rows.assign(step=[label(*pair) for pair in zip(rows.implementation, rows.option, strict=True)])
    whole = rows[(rows.implementation == OURS) & (rows.option == ALL)].set_index("size").step_ms
    rows["times lmsys"] = rows.step_ms / rows["size"].map(whole)
    curves = losses.pivot(index="step", columns=["size", "implementation", "option"], values="loss")
    distances = []
    for row in rows.itertuples():
        mine, peer = (row.size, row.implementation, row.option), (row.size, PEER, ALL)
        both = mine in curves and peer in curves
        distances.append((curves[mine] - curves[peer]).abs().max() if both else float("nan"))
    return rows.assign(**{"loss beside PyTorch's": distances})
