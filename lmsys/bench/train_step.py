"""The training step, taken apart: the trainer's own step with everything, with each option taken away, with none, and a plain peer's.

What is timed is what lmsys.train runs: its replica, which draws a batch, computes loss and gradients, clips them and updates the
weights. The peer (bench/native.py) is the same model and step with what PyTorch has. All begin with the same weights and see the same
batches; the losses of the first steps are kept, and what options of less precision change is told from them.

Times are between events at the ends of steps, nothing synchronized in between; peak memory is that of the timed steps. A point that
fails is a row. On a GPU host_ms is how long the host takes to draw a batch and to issue a step's work when it need not wait: below the
step's time, neither data nor launches hold the GPU up; its clock and power during the timed steps (bench/power.py) tell what else may.
Where compilation takes long, all points are compiled ahead in several processes (bench/ahead.py).

Limits: one device; points run one after the other in one process; no accumulation over micro-batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lmsys import cost, records
from lmsys import train as training
from lmsys.bench import ahead, power
from lmsys.bench.measure import is_out_of_memory, one_thread, peak_bytes_cpu, quantiles, release, settled
from lmsys.bench.peers import NativeStep
from lmsys.bench.power import PowerWatch
from lmsys.bench.processes import Clock
from lmsys.bench.steps import live_bytes, pattern_tokens
from lmsys.config import (
    DTYPES,
    PipelineConfig,
    build,
    model_size,
    require,
    resolve_scale,
    unknown_name,
)
from lmsys.data import BatchSampler
from lmsys.device import device_name, fp32_products, peak_flops, resolve_device
from lmsys.options import WRITTEN_BACKWARD_ATTENTION
from lmsys.train.engine import Engine

NAME, LOSSES = "train_step_results", "train_step_losses"
EXTRA_COLUMNS = ("host_ms", "sm_mhz", "max_sm_mhz", "power_w", "limit_w", "device", "note")
OURS, PEER = "lmsys", "torch_native"
ALL, NONE = "all", "none"
_COMPILE_LIMIT_S = 100.0  # compiling ahead ends here; what is not done by then is compiled when it is measured

# What each option sets in the config's train section: on, and off.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fused_loss": ({"fused_loss": True}, {"fused_loss": False}),
    "fused_rope": ({"fused_rope": True}, {"fused_rope": False}),
    "merged_gate": ({"merged_gate": True}, {"merged_gate": False}),
    "fused_optimizer": ({"fused_optimizer": True}, {"fused_optimizer": False}),
    "bf16_residual": ({"residual_dtype": "bf16"}, {"residual_dtype": "fp32"}),
    "autotune": ({"autotune": True}, {"autotune": False}),
    "cuda_graph": ({"cuda_graph": True}, {"cuda_graph": False}),
}
_OF_BF16, _OF_COMPILE, _OF_GPUS = ("bf16_residual",), ("autotune",), ("cuda_graph",)
# Blocks with a backward pass of their own, in place of the compiled ones and of what only those have. Last, as it takes that back.
_WRITTEN = "written_backward"
OPTIONS[_WRITTEN] = (
    {_WRITTEN: True} | dict.fromkeys(("compile", "autotune", "fused_rope", "merged_gate"), False),
    {_WRITTEN: False},
)
WHERE_NAMED = ("autotune", "cuda_graph")  # takes minutes; is for a GPU that waits for its host, as these do not


# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSettings:
    """What is measured; make it with settings(), which fills it from a scale and checks it.

    Attributes:
        sizes: the options are taken away one by one at the first; the others run with all, with none, and as the peer.
        batch: of each size, sequences.
        loss_steps: from the initial weights, losses kept; they compile and warm up, too. timed_steps: after those.
        compile_ahead: processes that fill the compiler's cache on disk before the first point.
    """

    scale: str
    sizes: tuple[str, ...]
    options: tuple[str, ...]
    batch: tuple[int, ...]
    context_length: int
    vocab_size: int | None
    dtype: str
    compiled: bool
    kernel: str
    loss_steps: int
    timed_steps: int
    compile_ahead: int
    learning_rate: float
    device: str
    seed: int


_CPU = {
    "dtype": "fp32",
    "compiled": False,
    "kernel": "flash_attention_torch",
    "compile_ahead": 0,
    "learning_rate": 1e-3,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": _CPU
    | {"sizes": ("tiny",), "batch": 2, "context_length": 32, "vocab_size": 256, "loss_steps": 2, "timed_steps": 3},
    "cpu": _CPU
    | {"sizes": ("tiny",), "batch": 4, "context_length": 64, "vocab_size": 2048, "loss_steps": 12, "timed_steps": 9},
    "full": {
        "sizes": ("gpt2", "gpt2-medium"),
        "batch": None,
        "context_length": 1024,
        "vocab_size": None,
        "dtype": "bf16",
        "compiled": True,
        "kernel": "flash_attention_triton",
        "loss_steps": 20,
        "timed_steps": 15,
        "compile_ahead": 6,  # processes whose models fit an H200 together
        "learning_rate": 3e-4,
    },
}
_BATCH = {"gpt2": 32, "gpt2-medium": 16}  # of 1,024 tokens, as nanoGPT's results have it; 8 of other sizes


def possible_options(dtype: str, compiled: bool, kernel: str, device: str = "auto") -> list[str]:
    """The options that a precision, compilation or the lack of it, an attention kernel and a device leave."""
    excluded = (_OF_BF16 if dtype != "bf16" else ()) + (_OF_COMPILE if not compiled else ())
    excluded += _OF_GPUS if resolve_device(device).type != "cuda" else ()
    excluded += (_WRITTEN,) if kernel not in WRITTEN_BACKWARD_ATTENTION else ()
    return [name for name in OPTIONS if name not in excluded]


def settings(
    scale: str = "auto",
    sizes: Sequence[str] | None = None,
    options: Sequence[str] | None = None,
    batch: int | None = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
    dtype: str | None = None,
    compiled: bool | None = None,
    kernel: str | None = None,
    loss_steps: int | None = None,
    timed_steps: int | None = None,
    compile_ahead: int | None = None,
    learning_rate: float | None = None,
    device: str = "auto",
    seed: int = 0,
) -> StepSettings:
    """The settings of a scale, with what is given in their place.

    Args:
        options: that are on, and taken away one by one; None: all that dtype and compiled allow, but for autotune.
    Raises:
        ValueError: an unknown name, a number out of range, or a device that cannot run them.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    scale = resolve_scale(scale)
    values = _PRESETS[scale] | given | {"scale": scale}
    values["sizes"] = tuple(values["sizes"])
    require(len(values["sizes"]) > 0, "sizes is empty; give at least one")
    for name in ("context_length", "loss_steps", "timed_steps", "compile_ahead", "batch", "vocab_size"):
        value, least = values[name], 0 if name == "compile_ahead" else 1
        require(
            value is None or (type(value) is int and value >= least),
            f"{name} is {value!r}; it takes whole numbers of {least} or more",
        )
    if values["dtype"] not in DTYPES:
        raise unknown_name("dtype", values["dtype"], DTYPES)
    possible = possible_options(values["dtype"], values["compiled"], values["kernel"], device)
    values["options"] = tuple(
        options if options is not None else (name for name in possible if name not in WHERE_NAMED)
    )
    for name in values["options"]:
        if name not in OPTIONS:
            raise unknown_name("option", name, OPTIONS)
        require(
            name in possible,
            f"option {name} does not go with dtype {values['dtype']}, compiled {values['compiled']}, kernel {values['kernel']}; those "
            f"that do: {', '.join(possible)}",
        )
    values["batch"] = tuple(values["batch"] or _BATCH.get(size, 8) for size in values["sizes"])
    made = StepSettings(**values)
    for point in points(made):
        config = pipeline_config(made, point)
        if point.implementation == OURS:
            training.check_setup(config, 1)
    return made


@dataclass(frozen=True)
class Point:
    """One measurement. option: all, none, or the one taken away, the others from the step without written_backward; of the peer, all."""

    size: str
    implementation: str
    option: str


def points(chosen: StepSettings) -> list[Point]:
    """The peer first, then ours; the first size with each option taken away, the others without written_backward."""
    found = []
    blocks = [_WRITTEN] if _WRITTEN in chosen.options else []
    for index, size in enumerate(chosen.sizes):
        single = [option for option in chosen.options if option != _WRITTEN] if index == 0 else []
        found += [Point(size, PEER, ALL), Point(size, OURS, ALL)]
        found += [Point(size, OURS, option) for option in blocks + single * (len(chosen.options) > 1) + [NONE]]
    return found


def pipeline_config(chosen: StepSettings, point: Point, num_layers: int | None = None) -> PipelineConfig:
    """A point as the trainer takes it. num_layers: in place of the size's."""
    train: dict[str, Any] = {}
    for name, (_, off) in OPTIONS.items():
        train |= off if name in chosen.options else {}
    if point.implementation == OURS and point.option != NONE:
        for name in chosen.options:
            train |= OPTIONS[name][0] if name != _WRITTEN or point.option == ALL else {}
        if point.option != ALL:
            train |= OPTIONS[point.option][1]
    model = model_size(point.size, vocab_size=chosen.vocab_size, context_length=chosen.context_length)
    if num_layers is not None:
        model = dataclasses.replace(model, num_layers=num_layers)
    values = {
        "model": dataclasses.asdict(model),
        "optim": {
            "learning_rate": chosen.learning_rate,
            "min_learning_rate": chosen.learning_rate,
            "warmup_steps": 0,
            "max_grad_norm": 1.0,
        },
        "train": {"compile": chosen.compiled}
        | train
        | {
            "steps": chosen.loss_steps + chosen.timed_steps,
            "batch_size": chosen.batch[chosen.sizes.index(point.size)],
            "dtype": chosen.dtype,
            "attention_kernel": chosen.kernel,
            "device": chosen.device,
            "seed": chosen.seed,
        },
    }
    return build(PipelineConfig, values)


# --- Measuring ------------------------------------------------------------------------------------


def run(chosen: StepSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] = lambda row: None):
    """Measure every point; write train_step_results.csv and train_step_losses.csv; return both as DataFrames."""
    device = resolve_device(chosen.device)
    parameters = dataclasses.asdict(chosen)
    writers = [
        records.ResultWriter(
            name, folder, method=method(chosen, device), parameters=parameters, extra_columns=EXTRA_COLUMNS * more
        )
        for name, more in ((NAME, 1), (LOSSES, 0))
    ]
    with settled(), contextlib.ExitStack() as stack:
        rows, losses = (stack.enter_context(writer) for writer in writers)
        compile_ahead(chosen)
        for point in points(chosen):
            row, curve = measure(chosen, point, device)
            rows.write(row)
            for step, loss in enumerate(curve, start=1):
                losses.write(dataclasses.asdict(point) | {"step": step, "loss": f"{loss:.9g}"})
            on_row(row)
    return tuple(records.read_results(writer.path) for writer in writers)


def method(chosen: StepSettings, device: torch.device) -> dict[str, Any]:
    """How points are measured, for the stamp of a result."""
    gpu = device.type == "cuda"
    peak = _peak_flops(chosen, device)
    return {
        "timer": f"{'CUDA events' if gpu else 'time.perf_counter'} between steps",
        "warmup": f"{chosen.loss_steps} steps of training",
        "samples": f"{chosen.timed_steps}",
        "statistic": "median, 20th and 80th percentile",
        "step": "batch drawn and sent, forward, backward, clipping, AdamW",
        "mfu": "none: the peak of this device is not known" if peak is None else f"against {peak / 1e12:g} TFLOP/s",
        "memory": "peak allocated of the timed steps" if gpu else "live tensors and the profiler's events of a step",
        "loss": f"of step {chosen.loss_steps} from the same weights on the same data",
    }


def _peak_flops(chosen: StepSettings, device: torch.device) -> float | None:
    return peak_flops(device_name(device), "tf32" if chosen.dtype == "fp32" and device.type == "cuda" else chosen.dtype)


def measure(chosen: StepSettings, point: Point, device: torch.device) -> tuple[dict[str, Any], list[float]]:
    """A point as a row, and its losses. What fails is a row."""
    config = pipeline_config(chosen, point)
    row = dataclasses.asdict(point) | {
        "context_length": chosen.context_length,
        "local_batch": config.train.batch_size,
        "dtype": chosen.dtype,
        "device": device_name(device),
    }
    failed: dict[str, str] = {}
    try:
        found, losses = _measured(chosen, config, point, device)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        failed = {"status": "oom" if is_out_of_memory(error) or "OutOfMemoryError" in text else "error", "note": text}
    release(device)  # out of the except block, whose traceback holds tensors
    if failed:
        return row | failed, []
    tokens = config.train.batch_size * chosen.context_length
    rate = tokens / found["step_ms"] * 1e3
    flops = cost.train_flops_per_token(config.model)
    status = "ok" if all(map(math.isfinite, losses)) else "error"
    row |= found | {"status": status, "tokens_per_s": rate, "loss": losses[-1]}
    row["mfu"] = cost.mfu(rate, flops, _peak_flops(chosen, device))
    return row | ({"note": "a loss is not finite"} if status == "error" else {}), losses


def _measured(
    chosen: StepSettings, config: PipelineConfig, point: Point, device: torch.device
) -> tuple[dict[str, Any], list[float]]:
    with one_thread(device.type == "cpu"), fp32_products("high" if device.type == "cuda" else None):
        replica, held = _replica(config, point, device)
        sampler = _sampler(chosen, config)

        def step() -> torch.Tensor:
            loss = replica.accumulate(sampler)
            replica.update(chosen.learning_rate)
            return loss

        with PowerWatch(device) as watch:
            losses = [step() for _ in range(chosen.loss_steps)]
            curve = torch.stack(losses).tolist()
            clock = Clock(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = datetime.now()
            clock.tick()
            for _ in range(chosen.timed_steps):
                step()
                clock.tick()
            times = clock.times_ms()
            end = datetime.now()
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = live_bytes(device, replica.model) + peak_bytes_cpu(step, lambda: ())
        host_ms = _host_ms(step, device)
    found = dict(zip(("step_ms", "p20_ms", "p80_ms"), quantiles(times), strict=True))
    return found | {"samples": len(times), "peak_mib": (peak - held) / 2**20, "host_ms": host_ms} | watch.between(
        start, end
    ), curve


def _host_ms(step: Callable[[], Any], device: torch.device, samples: int = 3) -> float | None:
    """The host's time for a step that begins on an idle GPU, whose queue then takes all of it."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(samples):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return quantiles(times)[0]


def _replica(config: PipelineConfig, point: Point, device: torch.device) -> tuple[Any, float]:
    """What trains a point, and the bytes that were there before it."""
    torch._dynamo.reset()  # compiled code of another point, the memory that it holds, and its limit on recompilations
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or the rest would run eager without a word
    release(device)
    held = live_bytes(device)
    if point.implementation == PEER:
        return NativeStep(config, device), held
    return Engine(config, device, None), held


def _sampler(chosen: StepSettings, config: PipelineConfig) -> BatchSampler:
    length = max(1 << 18, 4 * chosen.context_length)
    tokens = pattern_tokens(config.model.vocab_size, length, chosen.seed)
    return BatchSampler(tokens, config.train.batch_size, chosen.context_length, seed=chosen.seed)


# --- Compiling ahead ------------------------------------------------------------------------------


def compile_ahead(chosen: StepSettings) -> None:
    """Compile what the points compile in several processes, so that the measuring process finds it on disk."""
    shares = _shares(chosen)
    if len(shares) > 1 and chosen.compiled:
        ahead.compile_shares(_compile_share, chosen, len(shares), _COMPILE_LIMIT_S)


def _shares(chosen: StepSettings) -> list[list[Point]]:
    """The points of each process: a peer, which takes longest, alone; the others dealt out. None where one process would have all."""
    peers = [point for point in points(chosen) if point.implementation == PEER]
    rest = [
        point
        for point in points(chosen)
        if point.implementation == OURS and not pipeline_config(chosen, point).train.written_backward
    ]
    others = min(chosen.compile_ahead, os.cpu_count() or 1) - len(peers)
    return [[peer] for peer in peers] + [rest[index::others] for index in range(others)] if others > 0 else []


def _compile_share(chosen: StepSettings, share: int, shares: int) -> None:
    """One process's part: a step of each of its points. A block compiles the same in a model of one layer; a whole model needs all."""
    import torch._inductor.config as inductor

    device = resolve_device(chosen.device)
    for point in _shares(chosen)[share]:
        inductor.compile_threads = 4 if point.implementation == PEER else 1  # the processes are the parallelism
        config = pipeline_config(chosen, point, None if point.implementation == PEER else 1)
        try:
            with fp32_products("high" if device.type == "cuda" else None):
                replica, _ = _replica(config, point, device)
                replica.accumulate(_sampler(chosen, config))
                replica.update(chosen.learning_rate)
        except Exception as error:  # fails again when it is measured, and is a row there
            print(f"compile ahead: {point}: {type(error).__name__}: {error}", file=sys.stderr)
        replica = None
        release(device)


# --- Report ---------------------------------------------------------------------------------------

_NAMES = {(PEER, ALL): "PyTorch", (OURS, ALL): "lmsys", (OURS, NONE): "lmsys without options"}


def label(implementation: str, option: str) -> str:
    """A point's name in tables and figures."""
    return _NAMES.get((implementation, option), f"without {option}")


def row_line(row: dict[str, Any]) -> str:
    """A row in a line, as it is measured."""
    name = f"{row['size']:12} {label(row['implementation'], row['option']):24}"
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row['note']}"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    return f"{name} {row['step_ms']:9.2f} ms{mfu}, {row['peak_mib']:,.0f} MiB, loss {row['loss']:.4f}"


def loss_distance(losses, size: str, a: tuple[str, str], b: tuple[str, str]) -> float:
    """The largest difference between two points' losses at one step; NaN where one has none."""
    curves = [
        losses[(losses["size"] == size) & (losses.implementation == one[0]) & (losses.option == one[1])].set_index(
            "step"
        )
        for one in (a, b)
    ]
    return float((curves[0].loss - curves[1].loss).abs().max())


def table(frame, losses) -> str:
    """Every point: time, rate, MFU, memory; time over that with all options; distance of the losses from the peer's."""
    lines = []
    for size, rows in frame.groupby("size", sort=False):
        whole = rows[(rows.implementation == OURS) & (rows.option == ALL) & (rows.status == "ok")].step_ms
        for row in rows.to_dict("records"):
            line = {"size": size, "step": label(row["implementation"], row["option"])}
            if row["status"] != "ok":
                lines.append(line | {"ms": row["status"]})
                continue
            distance = loss_distance(losses, size, (row["implementation"], row["option"]), (PEER, ALL))
            lines.append(
                line
                | {
                    "ms": records.spread(row["step_ms"], row["p20_ms"], row["p80_ms"]),
                    "over lmsys": f"{row['step_ms'] / whole.iloc[0]:.3f}" if len(whole) else "",
                    "tokens_per_s": f"{row['tokens_per_s']:,.0f}",
                    "mfu": "" if math.isnan(row["mfu"]) else f"{row['mfu']:.1%}",
                    "peak": f"{row['peak_mib']:,.0f}",
                    "distance": "" if math.isnan(distance) else f"{distance:.2g}",
                }
            )
    columns = {
        "size": "size",
        "step": "step",
        "ms": "ms",
        "over lmsys": "times lmsys",
        "tokens_per_s": "tokens/s",
        "mfu": "MFU",
        "peak": "peak MiB",
        "distance": "loss beside PyTorch's",
    }
    return records.markdown_table(lines, columns)


def conclusions(frame, losses) -> list[str]:
    """What is measured, in sentences: beside the peer, then what each option brings."""
    said = []
    ok = frame[frame.status == "ok"]
    steps = int(losses.step.max()) if len(losses) else 0
    for size, rows in ok.groupby("size", sort=False):
        found = {(row.implementation, row.option): row for row in rows.itertuples()}
        ours, peer = found.get((OURS, ALL)), found.get((PEER, ALL))
        if ours is None:
            continue
        mfu = "" if math.isnan(ours.mfu) else f", an MFU of {ours.mfu:.1%}"
        said.append(
            f"**{size}**, {ours.local_batch} x {ours.context_length} tokens, {ours.dtype}: {records.significant(ours.step_ms)} ms a "
            f"step, {ours.tokens_per_s:,.0f} tokens/s{mfu}, peak memory {ours.peak_mib / 1024:.3g} GiB."
        )
        if peer is not None:
            distance = loss_distance(losses, size, (OURS, ALL), (PEER, ALL))
            less = loss_distance(losses, size, (OURS, NONE), (PEER, ALL))
            said.append(
                f"{size} beside PyTorch: {peer.step_ms / ours.step_ms:.3g} times as fast, "
                f"{ours.peak_mib / peer.peak_mib:.2g} of its memory; over {steps} steps losses differ by {distance:.2g} at most"
                + ("." if math.isnan(less) else f", without the options by {less:.2g}.")
            )
        if not math.isnan(ours.host_ms):
            waits = "never waits for it" if ours.host_ms < ours.step_ms else "waits for it"
            said.append(
                f"{size}: the host draws a batch and issues a step in {ours.host_ms:.3g} ms, so the GPU {waits}."
            )
        for what, row in ((size, ours), (f"{size}, PyTorch's step", peer)):
            if row is not None and (drawn := power.sentence(what, row._asdict())):
                said.append(drawn)
        compiled = found.get((OURS, _WRITTEN))
        gains = []
        for (implementation, option), row in found.items():
            if implementation == OURS and option not in (ALL, NONE):
                base = ours if compiled is None or option == _WRITTEN else compiled
                gains.append((row.step_ms - base.step_ms, row.peak_mib - base.peak_mib, option, base))
        for saved_ms, saved_mib, option, base in sorted(gains, reverse=True, key=lambda gain: gain[:2]):
            distance = loss_distance(losses, size, (OURS, base.option), (OURS, option))
            share = abs(saved_ms) / (base.step_ms + saved_ms)
            where = size if base is ours else f"{size}, without {_WRITTEN}"
            said.append(
                f"{where}, `{option}` {'saves' if saved_ms >= 0 else 'costs'} {abs(saved_ms):.2f} ms ({share:.1%}) and "
                f"{'saves' if saved_mib >= 0 else 'costs'} {abs(saved_mib):,.0f} MiB; losses differ by {distance:.2g} at most."
            )
    return said


def write_report(frame, losses, folder: str | Path) -> dict[str, Path]:
    """Write the figures and train_step_report.md to folder; return their paths by their short names."""
    from lmsys import plots

    folder, ok = Path(folder), frame[frame.status == "ok"]
    ok, curves = (
        some.assign(name=[label(*pair) for pair in zip(some.implementation, some.option, strict=True)])
        for some in (ok, losses[losses.option.isin((ALL, NONE))])
    )
    figures = {"options": plots.train_step_options(ok), "loss": plots.train_step_loss(curves)} if len(ok) else {}
    written = {name: plots.save(figure, folder / f"train_step_{name}.png") for name, figure in figures.items()}
    text = ["# The training step", "", f"Measured on {frame.device.iloc[0]}.", ""]
    text += [f"- {sentence}" for sentence in conclusions(frame, losses)]
    text += ["", "Times: median [20th, 80th percentile].", "", table(frame, losses)]
    written["report"] = records.write_text(folder / "train_step_report.md", "\n".join(text))
    return written
