"""Figures of the notebooks that do not use lmsys.figures yet. No torch here."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmsys.records import atomic_path, significant


def save(figure: Figure, path: str | Path, *, dpi: int = 140) -> Path:
    """Write a figure as PNG, atomically."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    return Path(path)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, which="major", axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def _legend(figure, axes) -> None:
    """One legend for all axes, each name once."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _log_lengths(axis, lengths) -> None:
    lengths = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=8, rotation=45 if len(lengths) > 6 else 0)
    axis.set_xlabel("sequence length")


def _memory_unit(values_mib) -> tuple[int, str]:
    """What to divide MiB by, and the unit that it gives."""
    return (1024, "GiB") if values_mib.max() >= 1024 else (1, "MiB")


_PRECISION_COLOURS = {
    "fp32": "#000000",
    "fp16": "#D55E00",
    "fp16 into fp32": "#0072B2",
    "fp16 into fp32, cast first": "#56B4E9",
    "bf16": "#009E73",
}


# Of kinds of kernels, in every figure of the profile.


# --- notebooks/model_benchmark ------------------------------------------------------------------------

_MODES = {"forward": "forward", "forward_backward": "forward and backward", "full_step": "full step"}
_SIZE_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#882255", "#999999")
_PRECISION_COLOURS = {"fp32": "#999999", "tf32": "#56B4E9", "bf16": "#D55E00", "fp16": "#E69F00"}


def _by_mode(frame, height: float = 4.4):
    """A figure with a panel a mode: (figure, [(axis, rows)])."""
    modes = [name for name in _MODES if name in set(frame["mode"])]
    figure, axes = _figure(max(6.4, 4.4 * len(modes) + 0.6), height, 1, len(modes))
    for axis, name in zip(axes[0], modes, strict=True):
        axis.set_title(_MODES[name], loc="left", fontsize=10)
    return figure, [(axis, frame[frame["mode"] == name]) for axis, name in zip(axes[0], modes, strict=True)]


def benchmark_times(frame) -> Figure:
    """Mean time of a step against the context, eager where that was measured: a panel a mode, a colour a size, a line style a precision; bars: std."""
    frame = frame[(frame.status == "ok") & (frame.compiled == frame.compiled.iloc[0])]
    lengths = frame.groupby("dtype").context_length.transform("nunique")
    frame = frame[lengths == lengths.max()]  # a precision of fewer contexts is benchmark_precision's
    sizes, dtypes = list(dict.fromkeys(frame["size"])), list(dict.fromkeys(frame["dtype"]))
    figure, panels = _by_mode(frame)
    for axis, shown in panels:
        for (size, dtype), rows in shown.groupby(["size", "dtype"], sort=False):
            rows = rows.sort_values("context_length")
            axis.errorbar(
                rows.context_length,
                rows.mean_ms,
                yerr=rows.std_ms.fillna(0.0),
                color=_SIZE_COLOURS[sizes.index(size) % len(_SIZE_COLOURS)],
                linestyle=("-", "--", ":", "-.")[dtypes.index(dtype) % 4],
                marker="o",
                markersize=3,
                capsize=2,
                linewidth=1.3,
                label=f"{size}, {dtype}",
            )
        _log_lengths(axis, sorted(set(frame.context_length)))
        axis.set_yscale("log")
        axis.set_ylabel("ms, mean and standard deviation")
    _legend(figure, [axis for axis, _ in panels])
    figure.suptitle(_benchmark_setting(frame), fontsize=9, color="#555555")
    return figure


def _benchmark_setting(frame) -> str:
    compiled = "eager" if set(frame.compiled) == {"no"} else "compiled: " + ", ".join(dict.fromkeys(frame.compiled))
    kernels = ", ".join(dict.fromkeys(frame.kernel))
    return f"batch {', '.join(map(str, dict.fromkeys(frame.batch)))}, {kernels}, {compiled}; {frame.device.iloc[0]}"


def benchmark_precision(frame, context: int) -> Figure:
    """Speed in each precision over the widest at one context, eager: a panel a mode, a group a size; over each bar the time in ms."""
    frame = frame[(frame.status == "ok") & (frame.compiled == "no") & (frame.context_length == context)]
    names = [name for name in _PRECISION_COLOURS if name in set(frame["dtype"])]
    sizes = list(dict.fromkeys(frame[frame["dtype"] == names[0]]["size"]))
    width = 0.84 / max(1, len(names))
    figure, panels = _by_mode(frame)
    for axis, shown in panels:
        widest = shown[shown["dtype"] == names[0]].set_index("size").mean_ms
        for i, name in enumerate(names):
            rows = shown[(shown["dtype"] == name) & shown["size"].isin(widest.index)]
            x = [sizes.index(size) + (i - (len(names) - 1) / 2) * width for size in rows["size"]]
            speed = [widest[row.size_] / row.mean_ms for row in rows.rename(columns={"size": "size_"}).itertuples()]
            error = (rows.std_ms / rows.mean_ms).fillna(0.0) * speed
            axis.bar(x, speed, 0.92 * width, yerr=error, capsize=2, color=_PRECISION_COLOURS[name], label=name)
            for at, height, over, value in zip(x, speed, error, rows.mean_ms, strict=True):
                axis.annotate(
                    f" {significant(value)}", (at, height + over), ha="center", va="bottom", fontsize=6, rotation=90
                )
        axis.margins(y=0.15)
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_ylabel(f"speed over {names[0]}; above the bars, ms")
    _legend(figure, [axis for axis, _ in panels])
    figure.suptitle(f"{context:,} tokens, {_benchmark_setting(frame)}", fontsize=9, color="#555555")
    return figure


def benchmark_compiled(gains) -> Figure:
    """How many times as fast a step is compiled. gains: way of compiling -> rows with size, context_length, dtype, mode, speedup."""
    import pandas as pd

    frame = pd.concat([rows.assign(way=way) for way, rows in gains.items()], ignore_index=True)
    series = list(dict.fromkeys(zip(frame.way, frame["dtype"], frame.context_length, strict=True)))
    sizes, width = list(dict.fromkeys(frame["size"])), min(0.3, 0.86 / max(1, len(series)))
    figure, panels = _by_mode(frame)
    for axis, shown in panels:
        for i, (way, dtype, context) in enumerate(series):
            rows = shown[(shown.way == way) & (shown["dtype"] == dtype) & (shown.context_length == context)]
            x = [sizes.index(size) + (i - (len(series) - 1) / 2) * width for size in rows["size"]]
            colour = _SIZE_COLOURS[i % len(_SIZE_COLOURS)]
            axis.bar(x, rows.speedup, 0.92 * width, color=colour, label=f"{way}, {dtype}, {context:,} tokens")
        axis.axhline(1.0, color="#444444", linewidth=0.8)
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_ylabel("speed over eager")
    _legend(figure, [axis for axis, _ in panels])
    return figure


def benchmark_warmup(times, windows, steps: int) -> Figure:
    """The first steps of a process one by one, and the mean that a benchmark of so many steps reports after each number of warm-ups."""
    figure, axes = _figure(11.0, 4.2, 1, 2)
    left, right = axes[0]
    left.plot(times.step, times.time_ms, color="#0072B2", marker="o")
    left.set_yscale("log")
    left.set_xlabel("step of a fresh process")
    left.set_ylabel("ms")
    left.set_title("each step", loc="left", fontsize=10)
    left.set_xticks(list(times.step))
    x = range(len(windows))
    means, stds = ([window[name] for window in windows] for name in ("mean_ms", "std_ms"))
    low = [min(std, 0.9 * mean) for mean, std in zip(means, stds, strict=True)]  # a bar that ends above 0 on a log axis
    right.errorbar(x, means, yerr=[low, stds], color="#D55E00", marker="o", linestyle="none", capsize=4)
    right.set_yscale("log")
    right.set_xticks(list(x), [str(window["warmup"]) for window in windows])
    right.set_xlabel("warm-up steps")
    right.set_ylabel(f"ms, mean and standard deviation of {steps} steps")
    right.set_title("what is reported", loc="left", fontsize=10)
    first = times.iloc[0]
    name = f"{first['size']}, {first.batch} x {first.context_length} tokens, {first['dtype']}, {_MODES[first['mode']]}"
    figure.suptitle(name, fontsize=9, color="#555555")
    return figure


def memory_timeline(timeline, title: str) -> Figure:
    """Allocated memory during a step. timeline: time_ms, allocated_mib."""
    per, unit = _memory_unit(timeline.allocated_mib)
    figure, axes = _figure(9.0, 3.8)
    axis = axes[0, 0]
    axis.fill_between(timeline.time_ms, timeline.allocated_mib / per, step="post", color="#56B4E9", linewidth=0)
    peak = timeline.allocated_mib.idxmax()
    axis.annotate(
        f"{timeline.allocated_mib[peak] / per:.4g} {unit}",
        (timeline.time_ms[peak], timeline.allocated_mib[peak] / per),
        ha="center",
        va="bottom",
        fontsize=8,
    )
    axis.set_ylim(bottom=0)
    axis.margins(y=0.1)
    axis.set_xlabel("time since the first allocation, ms")
    axis.set_ylabel(f"allocated, {unit}")
    axis.set_title(title, loc="left", fontsize=10)
    return figure


# --- notebooks/train_step -------------------------------------------------------------------------

_STEP_COLOURS = {"PyTorch": "#999999", "lmsys": "#0072B2", "lmsys without options": "#56B4E9"}


def train_step_options(frame) -> Figure:
    """Time and peak memory of a step: the peer, ours, ours without each option. A row of panels a size. frame: with a column name."""
    sizes = list(dict.fromkeys(frame["size"]))
    counts = [int((frame["size"] == size).sum()) for size in sizes]
    figure = Figure(figsize=(11.0, 0.34 * sum(counts) + 1.0 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), 2, squeeze=False, sharey="row", height_ratios=counts)
    for pair, size in zip(axes, sizes, strict=True):
        rows = frame[frame["size"] == size]
        per, unit = _memory_unit(rows.peak_mib)
        panels = (("step_ms", 1, "time of a step, ms"), ("peak_mib", per, f"peak memory, {unit}"))
        for axis, (column, scale, text) in zip(pair, panels, strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            values = rows[column] / scale
            axis.barh(range(len(rows)), values, 0.7, color=[_STEP_COLOURS.get(name, "#E69F00") for name in rows.name])
            for y, (value, mfu) in enumerate(zip(values, rows.mfu, strict=True)):
                share = f", MFU {mfu:.1%}" if column == "step_ms" and mfu == mfu else ""
                axis.annotate(f" {significant(value)}{share}", (value, y), va="center", fontsize=7)
            axis.set_xlim(0, 1.3 * values.max())
            axis.set_xlabel(text, fontsize=8)
        pair[0].set_yticks(range(len(rows)), rows.name, fontsize=8)
        pair[0].invert_yaxis()
        first = rows.iloc[0]
        setting = f"{size}, {first.local_batch} x {first.context_length} tokens, {first['dtype']}"
        pair[0].set_title(f"{setting}; {first.device}", loc="left", fontsize=10)
    return figure


def train_step_loss(losses) -> Figure:
    """Losses of the first steps from the same weights, and their distance from the peer's: a row of panels a size. With a column name."""
    sizes = list(dict.fromkeys(losses["size"]))
    figure, axes = _figure(11.0, 3.4 * len(sizes) + 0.5, len(sizes), 2)
    for (left, right), size in zip(axes, sizes, strict=True):
        rows = losses[losses["size"] == size]
        peer = rows[rows.name == "PyTorch"].set_index("step").loss
        for name, curve in rows.groupby("name", sort=False):
            curve = curve.set_index("step").loss
            style = {"color": _STEP_COLOURS[name], "label": name}
            left.plot(curve.index, curve, linewidth=3 if name == "PyTorch" else 1.3, **style)
            if name != "PyTorch":
                right.plot(curve.index, (curve - peer).reindex(curve.index), marker="o", markersize=3, **style)
        right.axhline(0.0, color="#444444", linewidth=0.8)
        left.set_title(f"{size}, loss", loc="left", fontsize=10)
        right.set_title("less PyTorch's", loc="left", fontsize=10)
        for axis in (left, right):
            axis.set_xlabel("step")
    _legend(figure, axes.flat)
    return figure


# --- notebooks/race -------------------------------------------------------------------------------


def race(frame, reached: float) -> Figure:
    """Validation loss against seconds of training and against tokens, a line an arm (column name). reached: a loss to mark where each arm gets there."""
    figure, axes = _figure(11.0, 4.2, 1, 2)
    for axis, column, per, text in zip(
        axes[0], ("seconds", "tokens"), (1, 1e6), ("seconds of training", "million tokens"), strict=True
    ):
        for index, (name, rows) in enumerate(frame.groupby("name", sort=False)):
            width = 1.4 if column == "seconds" else 4.2 - 1.4 * index  # at the same tokens one lies on the other
            axis.plot(
                rows[column] / per, rows.valid_loss, color=_RACE_COLOURS[rows.arm.iloc[0]], linewidth=width, label=name
            )
        axis.axhline(reached, color="#444444", linewidth=0.8, linestyle=":")
        axis.set_xlim(left=0)
        axis.set_xlabel(text)
    axes[0, 0].set_ylabel("validation loss, nats a token")
    axes[0, 0].set_title(f"{frame.device.iloc[0]}; dotted: {reached:.3f}", loc="left", fontsize=10)
    _legend(figure, axes.flat)
    return figure


_RACE_COLOURS = {"naive": "#999999", "ours": "#0072B2", "ours_ddp": "#D55E00"}
