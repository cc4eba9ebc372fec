"""The LM matrix: a training step for attention kernels x data-parallel wrappers x model sizes x GPUs.

Each point trains the model from the same weights on the same data, whose loss all wrappers must reach alike, and is
then timed: with communication, and without it, whose difference is what the backward pass does not hide. One GPU and
several are measured in the same processes (lmsys.bench.steps says how). A loss away from that of one GPU on the same
batches is a row with status error, not a time.

lm_matrix_results.csv holds a row a point; lm_matrix_losses.csv every loss. The data are a pattern that a model can
learn, or token files.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np

from lmsys import parallel
from lmsys.attention import get_kernel
from lmsys.bench import experiment, steps
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, Row
from lmsys.bench.processes import process_counts
from lmsys.config import DTYPES, ModelConfig, model_size, require
from lmsys.device import device_name, resolve_device
from lmsys.options import STEP_PRESETS
from lmsys.parallel.group import Process

LOSSES = "lm_matrix_losses"
BRIEF = ("naive", "flashddp", "torch_ddp")  # wrappers of the kernels after a size's first, where none are given
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # of a final loss, relative to that of one GPU
_OWN_SHAPE = ("d_model", "d_ff", "num_layers", "num_heads")
_OTHER = (4, 512)  # batch and context of sizes that SHAPES does not name

SHAPES: dict[str, dict[str, tuple[int, int]]] = {  # scale -> size -> sequences a GPU, tokens of a sequence
    "smoke": {"tiny": (2, 32)},
    "cpu": {"tiny": (4, 64)},
    "full": {"gpt2": (32, 1024), "gpt2-medium": (16, 1024), "xl": (4, 512)},
}
KERNELS: dict[str, dict[str, list[str]]] = {  # the same of kernels; of other sizes the first kernel of all
    "smoke": {"tiny": ["vectorized_torch"]},
    "cpu": {"tiny": ["vectorized_torch", "flash_attention_torch"]},
    "full": {"gpt2": ["flash_attention_triton", "vectorized_torch"]},
}


def check(p: Parameters) -> None:
    """Fill in sizes, numbers of processes and steps.

    Raises:
        ValueError: an unknown name, a number out of range, tokens that do not fit the model.
    """
    experiment.require_names(p, {"dtype": DTYPES, "step_preset": STEP_PRESETS})
    experiment.require_numbers(
        p, dict.fromkeys(("steps", "timed_steps", "batch_size", "context_length", "vocab_size"), 1)
    )
    own = any(getattr(p, name) is not None for name in _OWN_SHAPE)
    require(not own or p.sizes is None, f"give sizes or a shape of your own ({', '.join(_OWN_SHAPE)}), not both")
    p.sizes = ["custom"] if own else list(SHAPES[p.scale]) if p.sizes is None else p.sizes
    if p.wrappers is None:  # all of several processes, and replicas with a sharded optimizer
        several = [name for name, wrapper in parallel.WRAPPERS.items() if wrapper.many_processes]
        p.wrappers = [*several, "flashddp+zero1"]
    require(p.sizes != [] and p.kernels != [] and p.wrappers != [], "sizes, kernels and wrappers must not be empty")
    for name in p.wrappers:
        steps.wrapped(name)
    for kernel in p.kernels or ():
        get_kernel(kernel)
    p.gpus = list(process_counts(p.device, p.gpus))
    models = {size: model_of(p, size) for size in p.sizes}
    for size, path in itertools.product(models, filter(None, (p.train_path, p.val_path))):
        _check_tokens(path, models[size], _shape(p, size)[0])
    require(not (p.is_given("steps") and p.epochs is not None), "give steps or epochs, not both")
    if p.epochs is not None:
        require(p.train_path is not None, "epochs are passes over train_path, which is not given; give steps")
        require(p.epochs > 0, f"epochs is {p.epochs}; it must be positive")
        batch, length = _shape(p, p.sizes[0])
        tokens = len(np.load(p.train_path, mmap_mode="r"))
        p.steps = max(1, math.ceil(p.epochs * tokens / (batch * length * max(p.gpus))))


def _check_tokens(path: str, model: ModelConfig, batch: int) -> None:
    require(Path(path).is_file(), f"no token file at {path}")
    tokens, length = np.load(path, mmap_mode="r"), model.context_length
    require(
        (highest := int(tokens.max())) < model.vocab_size,
        f"{path} holds token id {highest}, outside the vocabulary of {model.vocab_size}; raise vocab_size",
    )
    few = f"{path} has {len(tokens)} tokens, no more than one batch of {batch} x {length}"
    require(len(tokens) > batch * length, few)


def _shape(p: Parameters, size: str) -> tuple[int, int]:
    batch, length = SHAPES[p.scale].get(size, _OTHER)
    return p.batch_size or batch, p.context_length or length


def model_of(p: Parameters, size: str) -> ModelConfig:
    """The model of a size, or the one of your own."""
    length = _shape(p, size)[1]
    if size != "custom":
        return model_size(size, vocab_size=p.vocab_size, context_length=length)
    shape = {name: value for name in _OWN_SHAPE if (value := getattr(p, name)) is not None}
    return ModelConfig(context_length=length, vocab_size=p.vocab_size or 10_000, **shape)


NOTEBOOK = Notebook("lm_matrix", check)


def points(p: Parameters) -> list[Point]:
    """One GPU before several, within the smallest group of several: the same process, the same compiled code."""
    least = min((n for n in p.gpus if n > 1), default=1)
    first = next(iter(KERNELS[p.scale].values()))[:1]
    found = []
    for size in p.sizes:
        batch, _ = _shape(p, size)
        for index, kernel in enumerate(p.kernels or KERNELS[p.scale].get(size, first)):
            wrappers = p.wrappers if index == 0 or p.is_given("wrappers") else BRIEF
            for gpus, name in [(n, name) for n in p.gpus for name in (wrappers if n > 1 else ["none"])]:
                config = steps.step_config(
                    model_of(p, size),
                    learning_rate=p.learning_rate,
                    attention_kernel=kernel,
                    batch_size=batch,
                    dtype=p.dtype,
                    compile=p.compile,
                    step_preset=p.step_preset,
                    seed=p.seed,
                    device=p.device,
                    **(steps.wrapped(name) if gpus > 1 else {}),
                )
                found.append(steps.step_point(config, size, gpus=gpus, processes=max(gpus, least)))
    return found


def plan(p: Parameters) -> steps.Plan:
    return steps.Plan(p.steps, p.timed_steps, quiet_steps=max(2, p.timed_steps // 2))


def measure_point(point: Point, p: Parameters, process: Process) -> Measured | None:
    measured = steps.measure_point(process, point, plan(p), tokens=p.train_path, valid_tokens=p.val_path)
    if measured is None:
        return None
    columns, result = measured
    key = {name: point[name] for name in ("kernel", "wrapper", "gpus", "size", "processes")}
    key["device"] = device_name(process.device)
    losses = [key | {"step": step, "loss": loss} for step, loss in enumerate(result["losses"], start=1)]
    return Measured([columns | {"valid_loss": result.get("valid_loss")}], {LOSSES: losses})


def derive(row: Row, earlier: list[Row]) -> Row:
    """What a row is beside one GPU; an error where its loss is not that of one GPU on the same batches."""
    one = steps.one_gpu_of(row, earlier)
    if row["status"] != "ok" or one is None:
        return {}
    expected = one["final_loss"]
    if one["processes"] == row["processes"] and abs(row["final_loss"] / expected - 1) > _TOLERANCE[row["dtype"]]:
        note = f"wrong: the final loss is {row['final_loss']:.6g}, alone with the same batches {expected:.6g}"
        return {"status": "error", "note": note}
    return steps.beside_one_gpu(row, one["step_ms"])


MATRIX = Experiment(
    name="lm_matrix_results",
    columns=(*steps.COLUMNS, "processes", "valid_loss", "device", "note"),
    points=points,
    measure=measure_point,
    group=("size", "kernel"),
    method=lambda p: steps.step_method(plan(p), resolve_device(p.device), p.dtype),
    tables={LOSSES: ("kernel", "wrapper", "gpus", "size", "step", "loss", "processes", "device")},
    processes=lambda point, p: point["processes"],
    limit_s=240.0,  # compilation included
    derive=derive,
)


def report_text(frame) -> str:
    """lm_matrix_report.md: every row."""
    table = steps.table(frame, ["size", "kernel", "gpus", "wrapper"], ["mfu", "scaling_efficiency", "exposed_comm_ms"])
    return f"# LM matrix\n\nMeasured on {frame.device.iloc[0]}. Times in ms: median [20th, 80th percentile].\n\n{table}"
