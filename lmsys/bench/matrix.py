"""The LM matrix: a training step for attention kernels x data-parallel wrappers x model sizes x GPUs, one and several in the same run.

Each point trains the model from the same weights on the same data, whose loss all wrappers must reach alike, and is then timed: with
communication, and without it, whose difference is what the backward pass does not hide. A point is trained by lmsys.bench.replicas,
which says how it is measured. A loss away from that of one GPU on the same batches is a row with status error, not a time.

lm_matrix_results.csv holds a row a point; lm_matrix_losses.csv every loss. The data are a pattern that a model can learn, or token files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmsys import parallel, records
from lmsys.attention import get_kernel
from lmsys.bench import replicas
from lmsys.bench.replicas import Plan, TrainPoint, Workload
from lmsys.config import DTYPES, ModelConfig, model_size, require, resolve_scale, unknown_name
from lmsys.device import resolve_device

NAME, LOSSES = "lm_matrix_results", "lm_matrix_losses"
EXTRA_COLUMNS = ("processes", "valid_loss", "device", "note")
ZERO1 = "+zero1"  # after a wrapper's name: with the sharded optimizer
WRAPPERS = ("naive", "flat", "overlap", "flashddp", "torch_ddp", f"flashddp{ZERO1}", "fsdp", "torch_fsdp2")
_LIMIT_S = 240.0  # of one point, compilation included
_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # of a final loss, relative to that of one GPU

_PLAIN, _TRITON = "vectorized_torch", "flash_attention_triton"
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "cells": {"tiny": (_PLAIN,)},
        "wrappers": ("naive", "flashddp", f"flashddp{ZERO1}"),
        "brief": ("naive", "flashddp", f"flashddp{ZERO1}"),
        "batch": {"tiny": 2},
        "context_length": {"tiny": 32},
        "vocab_size": 256,
        "dtype": "fp32",
        "compiled": False,
        "learning_rate": 3e-3,
        "steps": 3,
        "timed_steps": 3,
    },
    "cpu": {
        "cells": {"tiny": (_PLAIN, "flash_attention_torch")},
        "wrappers": WRAPPERS,
        "brief": ("naive", "flashddp", "torch_ddp"),
        "batch": {"tiny": 4},
        "context_length": {"tiny": 64},
        "vocab_size": 1024,
        "dtype": "fp32",
        "compiled": False,
        "learning_rate": 3e-3,
        "steps": 6,
        "timed_steps": 5,
    },
    "full": {
        "cells": {"gpt2": (_TRITON, _PLAIN), "gpt2-medium": (_TRITON,), "xl": (_TRITON,)},
        "wrappers": WRAPPERS,
        "brief": ("naive", "flashddp", "torch_ddp"),
        "batch": {"gpt2": 32, "gpt2-medium": 16, "xl": 4},
        "context_length": {"gpt2": 1024, "gpt2-medium": 1024, "xl": 512},
        "vocab_size": None,
        "dtype": "bf16",
        "compiled": True,
        "learning_rate": 3e-4,
        "steps": 6,
        "timed_steps": 15,
    },
}
_OTHER_BATCH, _OTHER_CONTEXT = 4, 512  # of sizes that a preset does not name


@dataclass(frozen=True)
class MatrixSettings:
    """What is run; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    workloads: tuple[Workload, ...]
    wrappers: tuple[str, ...]
    brief_wrappers: tuple[str, ...]  # of the kernels after a size's first
    gpus: tuple[int, ...]
    steps: int
    timed_steps: int
    device: str

    def wrappers_of(self, workload: Workload) -> tuple[str, ...]:
        """The wrappers that a workload is measured under on several GPUs."""
        first = next(known for known in self.workloads if known.size == workload.size)
        return self.wrappers if workload == first else self.brief_wrappers

    @property
    def smallest(self) -> int:
        """The smallest number of several GPUs, on whose batches one GPU trains too."""
        return min((n for n in self.gpus if n > 1), default=1)


def settings(
    scale: str = "auto",
    kernels: Sequence[str] | None = None,
    wrappers: Sequence[str] | None = None,
    sizes: Sequence[str] | None = None,
    gpus: Sequence[int] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    timed_steps: int | None = None,
    batch: int | None = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
    shape: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    compiled: bool | None = None,
    learning_rate: float | None = None,
    train_tokens: str | None = None,
    valid_tokens: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> MatrixSettings:
    """The settings of a matrix: the scale's, with what is given in their place.

    Args:
        kernels: of every size; None: the scale's, which are more than one for its first size only.
        wrappers: of several GPUs, from lmsys.parallel; +zero1 after a name adds the sharded optimizer. One GPU takes none. None: the
            scale's, of which the kernels after a size's first get fewer.
        gpus: numbers of GPUs (of processes, on a CPU).
        steps, epochs: of training before the timing: steps, or passes over train_tokens by the largest number of GPUs.
        batch: sequences a GPU. shape: a model of one's own, fields of ModelConfig such as d_model, in place of sizes.
        train_tokens, valid_tokens: .npy files of token ids.
    Raises:
        ValueError: an unknown name, a number out of range, tokens that do not fit the model.
    """
    scale = resolve_scale(scale)
    preset = _PRESETS[scale]
    require(shape is None or sizes is None, "give sizes or a shape of your own, not both")
    chosen_wrappers = preset["wrappers"] if wrappers is None else tuple(wrappers)
    for name in chosen_wrappers:
        if (plain := name.removesuffix(ZERO1)) not in parallel.WRAPPERS or plain == "none":
            raise unknown_name(
                "wrapper", name, [*(known for known in parallel.WRAPPERS if known != "none"), f"flashddp{ZERO1}"]
            )
        require(
            ZERO1 not in name or "fsdp" not in name,
            f"'{name}': a fully sharded model's optimizer state is sharded already",
        )
    dtype = preset["dtype"] if dtype is None else dtype
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    names = ["custom"] if shape is not None else list(preset["cells"] if sizes is None else sizes)
    default = next(iter(preset["cells"].values()))[:1]
    workloads = []
    for size in names:
        length = context_length or preset["context_length"].get(size, _OTHER_CONTEXT)
        vocabulary = vocab_size or preset["vocab_size"]
        if shape is None:
            model = model_size(size, vocab_size=vocabulary, context_length=length)
        else:
            model = _own_shape(shape, vocabulary, length)
        for kernel in preset["cells"].get(size, default) if kernels is None else kernels:
            get_kernel(kernel)
            workloads.append(
                Workload(
                    size,
                    model,
                    kernel,
                    local_batch=batch or preset["batch"].get(size, _OTHER_BATCH),
                    dtype=dtype,
                    compiled=preset["compiled"] if compiled is None else compiled,
                    learning_rate=learning_rate or preset["learning_rate"],
                    seed=seed,
                    train_tokens=train_tokens,
                    valid_tokens=valid_tokens,
                )
            )
    require(len(workloads) > 0 and len(chosen_wrappers) > 0, "sizes, kernels and wrappers must not be empty")
    counts = replicas.process_counts(device, gpus)
    require(steps is None or epochs is None, "give steps or epochs, not both")
    if epochs is not None:
        require(train_tokens is not None, "epochs are passes over train_tokens, which are not given; give steps")
        steps = _steps(epochs, workloads[0], max(counts))
    steps = preset["steps"] if steps is None else steps
    timed_steps = preset["timed_steps"] if timed_steps is None else timed_steps
    for name, value in (("steps", steps), ("timed_steps", timed_steps)):
        require(type(value) is int and value >= 1, f"{name} is {value!r}; it must be a whole number of 1 or more")
    for path in (train_tokens, valid_tokens):
        if path is not None:
            _check_tokens(path, workloads)
    brief = preset["brief"] if wrappers is None else chosen_wrappers
    return MatrixSettings(scale, tuple(workloads), chosen_wrappers, brief, counts, steps, timed_steps, device)


def _own_shape(shape: Mapping[str, Any], vocab_size: int | None, context_length: int) -> ModelConfig:
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in shape:
        if name not in known:
            raise unknown_name("field of a model's shape", name, known)
    values = {"context_length": context_length, "vocab_size": vocab_size or 10_000, **shape}
    return ModelConfig(**values)


def _steps(epochs: float, workload: Workload, gpus: int) -> int:
    require(epochs > 0, f"epochs is {epochs}; it must be positive")
    tokens = len(np.load(workload.train_tokens, mmap_mode="r"))
    return max(1, math.ceil(epochs * tokens / (workload.local_batch * workload.model.context_length * gpus)))


def _check_tokens(path: str, workloads: Sequence[Workload]) -> None:
    require(Path(path).is_file(), f"no token file at {path}")
    tokens = np.load(path, mmap_mode="r")
    highest = int(tokens.max())
    for workload in workloads:
        model = workload.model
        require(
            highest < model.vocab_size,
            f"{path} holds token id {highest}, outside the vocabulary of {model.vocab_size}; raise vocab_size",
        )
        require(
            len(tokens) > workload.local_batch * model.context_length,
            f"{path} has {len(tokens)} tokens, no more than one batch of {workload.local_batch} x {model.context_length}",
        )


def points(matrix: MatrixSettings) -> list[TrainPoint]:
    """The points of a matrix, one GPU before several."""
    return replicas.points_of(
        matrix.workloads,
        matrix.gpus,
        lambda workload: [variant(name, workload) for name in matrix.wrappers_of(workload)],
    )


def variant(name: str, workload: Workload) -> dict[str, Any]:
    """The fields of a TrainPoint that a name stands for, such as flashddp+zero1. A fully sharded model gathers in the compute dtype."""
    gathers = "fsdp" in name and workload.dtype != "fp32"
    return {
        "wrapper": name.removesuffix(ZERO1),
        "sharded_optimizer": name.endswith(ZERO1),
        "options": (("compute_dtype", workload.dtype),) if gathers else (),
    }


def run(
    matrix: MatrixSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None
) -> tuple[Any, Any]:
    """Run a matrix; write lm_matrix_results.csv and lm_matrix_losses.csv to folder; return both as DataFrames."""
    plan = Plan(matrix.steps, matrix.timed_steps, quiet_steps=max(2, matrix.timed_steps // 2))
    stamp = {
        "method": replicas.method(plan, resolve_device(matrix.device), matrix.workloads[0].dtype),
        "parameters": dataclasses.asdict(matrix),
    }
    results = records.ResultWriter(NAME, folder, **stamp, extra_columns=EXTRA_COLUMNS)
    losses = records.ResultWriter(LOSSES, folder, **stamp, extra_columns=("processes", "device"))
    expected: dict[Workload, float] = {}
    with results, losses:
        for point, row, result in replicas.rows(points(matrix), plan, device=matrix.device, limit_s=_LIMIT_S):
            row |= {"processes": point.processes, "valid_loss": result.get("valid_loss")}
            if point.gpus == 1 and row["status"] == "ok":
                expected[point.workload] = row["final_loss"]
            elif row["status"] == "ok" and point.processes == matrix.smallest and point.workload in expected:
                row |= _disagreement(row, expected[point.workload])
            results.write(row)
            for step, loss in enumerate(result.get("losses", ()), start=1):
                key = {name: row[name] for name in ("kernel", "wrapper", "gpus", "size", "processes", "device")}
                losses.write(key | {"step": step, "loss": loss})
            if on_row:
                on_row(row)
    return records.read_results(results.path), records.read_results(losses.path)


def _disagreement(row: dict[str, Any], expected: float) -> dict[str, Any]:
    """The status and note of a row whose loss is not that of one GPU on the same batches."""
    off = abs(row["final_loss"] - expected) / expected
    if off <= _TOLERANCE[row["dtype"]]:
        return {}
    note = f"wrong: the final loss is {row['final_loss']:.6g}, alone with the same batches {expected:.6g}"
    return {"status": "error", "note": note}


# --- What a matrix says ---------------------------------------------------------------------------


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    what = f"{row['size']:<12} {row['kernel']:<24} {row['wrapper']:<16} x{row['gpus']}"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row['note']}"
    efficiency = row.get("scaling_efficiency")
    return (
        f"{what} {row['step_ms']:>9.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}] {row['tokens_per_s']:>10,.0f} tokens/s "
        f"{row['peak_mib']:>9,.0f} MiB" + ("" if efficiency is None else f" {100 * efficiency:>6.1f}% of linear")
    )


def table(frame) -> str:
    """Every point as a line, as Markdown."""
    columns = {
        "size": "size",
        "kernel": "kernel",
        "gpus": records.units(frame)[1],
        "wrapper": "wrapper",
        "step": "step, ms",
        "tokens": "tokens/s",
        "mfu": "MFU",
        "efficiency": "of linear",
        "exposed": "exposed comm, ms",
        "peak": "peak MiB",
        "loss": "final loss",
    }
    lines = []
    for row in frame.itertuples():
        line = {"size": row.size, "kernel": f"`{row.kernel}`", "gpus": row.gpus, "wrapper": f"`{row.wrapper}`"}
        if row.status != "ok":
            lines.append(line | {"step": row.status})
            continue
        lines.append(
            line
            | {
                "step": records.spread(row.step_ms, row.p20_ms, row.p80_ms),
                "tokens": f"{row.tokens_per_s:,.0f}",
                "mfu": "" if math.isnan(row.mfu) else f"{100 * row.mfu:.1f}%",
                "efficiency": "" if math.isnan(row.scaling_efficiency) else f"{100 * row.scaling_efficiency:.1f}%",
                "exposed": "" if math.isnan(row.exposed_comm_ms) else f"{row.exposed_comm_ms:.2f}",
                "peak": f"{row.peak_mib:,.0f}",
                "loss": f"{row.final_loss:.5f}",
            }
        )
    return records.markdown_table(lines, columns)


def conclusions(frame) -> list[str]:
    """What the rows show, in sentences made from their numbers."""
    said = []
    ok = frame[frame.status == "ok"]
    unit, units = records.units(frame)
    for (size, kernel, processes), group in ok.groupby(["size", "kernel", "processes"], sort=False):
        one, several = group[group.gpus == 1], group[group.gpus > 1].set_index("wrapper")
        where = f"{size}, {kernel}, {processes} {units}"
        if len(one):
            said.append(
                f"{size}, {kernel}, one {unit}: {records.significant(one.step_ms.iloc[0])} ms a step, {one.tokens_per_s.iloc[0]:,.0f} tokens/s"
                + ("." if math.isnan(one.mfu.iloc[0]) else f", {100 * one.mfu.iloc[0]:.1f}% MFU.")
            )
        if several.empty:
            continue
        best = several.step_ms.idxmin()
        text = f"{where}: **{best}** is the fastest at {records.significant(several.step_ms[best])} ms"
        if not math.isnan(several.scaling_efficiency[best]):
            text += f", {100 * several.scaling_efficiency[best]:.1f}% of linear scaling"
        exposed = several.exposed_comm_ms[best]
        if len(one) and not math.isnan(exposed):
            quiet = several.step_ms[best] - exposed
            text += (
                f"; without communication the same {units} take {records.significant(quiet)} ms, the slowest setting the pace, "
                f"where the first alone takes {records.significant(one.step_ms.iloc[0])}"
            )
        said.append(text + ".")
        said += _beside(several, where, "flashddp", ("naive", "torch_ddp"), one)
        said += _beside(several, where, "fsdp", ("torch_fsdp2",), one)
        if len(group) > 1:
            spread = (group.final_loss.max() - group.final_loss.min()) / group.final_loss.min()
            said.append(
                f"{where}: the final losses of {len(group)} runs on the same batches differ by at most {spread:.1e} of their value."
            )
    for row in frame[frame.status != "ok"].itertuples():
        said.append(f"{row.size}, {row.kernel}, {row.wrapper} x{row.gpus}: {row.status}, {row.note}")
    return said


def _beside(several, where: str, ours: str, others: Sequence[str], one) -> list[str]:
    """One of ours beside its peers, as fast where the difference is within the spread, and its memory beside that of one GPU."""
    there = [name for name in others if name in several.index]
    if ours not in several.index or not there:
        return []
    own, parts = several.loc[ours], []
    alike = [n for n in there if records.within_spread(several.step_ms[n] - own.step_ms, own, several.loc[n])]
    ratios = [f"{several.step_ms[n] / own.step_ms:.3f} times the speed of {n}" for n in there if n not in alike]
    if ratios:
        parts.append(f"has {', '.join(ratios)}")
    if alike:
        parts.append(f"is as fast as {' and '.join(alike)} within the spread")
    text = f"{where}: {ours} {' and '.join(parts)}"
    if len(one):
        text += f"; its peak memory is {100 * (several.peak_mib[ours] / one.peak_mib.iloc[0] - 1):+.1f}% of one alone"
    return [text + "."]


def write_report(frame, losses, folder: str | Path) -> dict[str, Path]:
    """Write the figures and lm_matrix_report.md to folder; return their paths by their short names."""
    from lmsys import plots

    folder = Path(folder)
    figures = {
        "time": plots.matrix_time(frame),
        "memory": plots.matrix_memory(frame),
        "throughput": plots.matrix_throughput(frame),
        "convergence": plots.matrix_convergence(losses),
    }
    if (frame.gpus > 1).any() and frame.scaling_efficiency.notna().any():
        figures["speedup"] = plots.matrix_speedup(frame)
    written = {name: plots.save(figure, folder / f"lm_matrix_{name}.png") for name, figure in figures.items()}
    written["report"] = records.write_text(folder / "lm_matrix_report.md", report_text(frame))
    return written


def report_text(frame) -> str:
    """lm_matrix_report.md: what to conclude, and every row."""
    text = ["# LM matrix", "", f"Measured on {frame.device.iloc[0]}. Times in ms: median [20th, 80th percentile].", ""]
    text += [f"- {sentence}" for sentence in conclusions(frame)]
    return "\n".join([*text, "", table(frame)])
