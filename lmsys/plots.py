"""Figures: a DataFrame of results in, a matplotlib Figure out. No torch here.

A kernel keeps its colour in every figure; the implementations we compare with are hatched (bars) or dashed (lines).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmsys.bench.standings import GROUPS, PORTABLE, of_group, with_series
from lmsys.records import atomic_path

# Okabe and Ito's colour-blind safe palette; the last two extend it.
COLOURS = {
    "scaled_dot_prod_attention": "#999999",
    "vectorized_torch": "#56B4E9",
    "vectorized_torch_compiled": "#0072B2",
    "flash_attention_torch": "#009E73",
    "flash_attention_triton": "#D55E00",
    PORTABLE: "#F4A582",
    "flash_attention_cuda": "#882255",
    "torch_sdpa_flash": "#F0C808",
    "torch_sdpa_cudnn": "#E69F00",
    "torch_flex": "#CC79A7",
    "flash_attention_4": "#000000",
}
PEERS = ("torch_sdpa_flash", "torch_sdpa_cudnn", "torch_flex", "flash_attention_4")
PASS_TITLES = {"forward": "forward", "backward": "backward", "forward_backward": "forward and backward"}


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


def _panels(frame, which: str | None = None):
    """(title, rows) for each (dtype, causal) of a sweep, causal first."""
    if which is not None:
        frame = frame[frame["pass"] == which]
    panels = []
    for (dtype, causal), group in frame.groupby(["dtype", "causal"], sort=False):
        panels.append((f"{dtype}, {'causal' if causal else 'not causal'}", group))
    return panels


def _shape(frame) -> str:
    """What all rows have in common."""
    parts = [
        f"{label} {frame[column].iloc[0]}"
        for column, label in (("batch", "batch"), ("heads", "heads"), ("head_dim", "head_dim"))
        if frame[column].nunique() == 1
    ]
    return "; ".join([", ".join(parts), frame.device.iloc[0]] if parts else [frame.device.iloc[0]])


def _is_peer(series: str) -> bool:
    return series in PEERS


def _line_style(series: str) -> dict[str, Any]:
    return {
        "color": COLOURS.get(series, "#444444"),
        "linestyle": "--" if _is_peer(series) else "-",
        "marker": "o",
        "markersize": 4,
        "linewidth": 2.4 if series == "flash_attention_triton" else 1.4,
        "label": series,
    }


def _legend(figure, axes) -> None:
    """One legend for all axes, each name once."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _throughput_lines(axis, points, title: str, most: float) -> None:
    """TFLOP/s of each series against the length, on an axis from 0 to most."""
    for series, group in points[points.status == "ok"].groupby("series", sort=False):
        group = group.sort_values("q_len")
        axis.plot(group.q_len, group.tflops, **_line_style(series))
        slow, fast = (group.tflops * group.median_ms / group[name] for name in ("p80_ms", "p20_ms"))
        axis.fill_between(group.q_len, slow, fast, color=COLOURS.get(series, "#444444"), alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    lengths = sorted(set(points.q_len))
    axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=8)
    axis.set_ylim(0, 1.05 * most if most > 0 else None)
    axis.set_ylabel("TFLOP/s")
    axis.set_xlabel("sequence length")
    axis.set_title(title, loc="left", fontsize=11)


def _tokens(frame) -> str:
    tokens, width = (frame.batch * frame.q_len).min(), (frame.heads * frame.head_dim).iloc[0]
    return f"batch x length {tokens:,} tokens or one sequence, heads x head_dim {width:,}; {frame.device.iloc[0]}"


def attention_throughput(frame, which: str = "forward") -> Figure:
    """TFLOP/s against the sequence length, a panel for each head dim (across) and dtype and mask (down)."""
    frame = with_series(frame[frame["pass"] == which])
    panels, head_dims = _panels(frame), sorted(set(frame.head_dim))
    figure, axes = _figure(5.2 * len(head_dims) + 0.6, 3.6 * len(panels) + 1.0, len(panels), len(head_dims))
    for line, (title, group) in zip(axes, panels, strict=True):
        for axis, head_dim in zip(line, head_dims, strict=True):
            _throughput_lines(
                axis,
                group[group.head_dim == head_dim],
                f"{PASS_TITLES[which].capitalize()}, {title}, head_dim {head_dim}",
                frame.tflops.max(),
            )
    _legend(figure, axes.flat)
    figure.suptitle(_tokens(frame), fontsize=9, color="#555555")
    return figure


def attention_bars(frame, which: str = "forward") -> Figure:
    """Grouped bars: the time of each kernel at each tier, on a log scale, with 20th to 80th percentile."""
    frame = with_series(frame)
    panels = _panels(frame, which)
    tiers = list(dict.fromkeys(map(_point_name, frame.itertuples())))
    kernels = list(dict.fromkeys(frame[frame.status != "unsupported"].series))
    figure, axes = _figure(max(7.5, 1.25 * len(tiers) + 1.5), 3.6 * len(panels) + 1.0, len(panels))
    width = 0.86 / max(1, len(kernels))
    for axis, (title, group) in zip(axes[:, 0], panels, strict=True):
        points = {(row.series, _point_name(row)): row for row in group.itertuples()}
        for i, kernel in enumerate(kernels):
            x = np.arange(len(tiers)) + (i - (len(kernels) - 1) / 2) * width
            timed = [points.get((kernel, tier)) for tier in tiers]
            median = np.array([row.median_ms if row and row.status == "ok" else np.nan for row in timed])
            low = np.array([row.p20_ms if row and row.status == "ok" else np.nan for row in timed])
            high = np.array([row.p80_ms if row and row.status == "ok" else np.nan for row in timed])
            axis.bar(
                x,
                median,
                width,
                label=kernel,
                color=COLOURS.get(kernel, "#444444"),
                hatch="////" if _is_peer(kernel) else None,
                edgecolor="white",
                linewidth=0.4,
                yerr=np.vstack([np.maximum(median - low, 0), np.maximum(high - median, 0)]),
                error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            )
            for at, row in zip(x, timed, strict=True):
                if row and row.status in ("oom", "error"):
                    axis.annotate(
                        row.status, (at, axis.get_ylim()[0]), rotation=90, ha="center", va="bottom", fontsize=7
                    )
        axis.set_yscale("log")
        axis.set_xticks(np.arange(len(tiers)), tiers)
        axis.set_ylabel("time, ms (log)")
        axis.set_title(f"Attention {PASS_TITLES[which]}, {title}", loc="left", fontsize=11)
    axes[-1, 0].set_xlabel("queries : keys")
    _legend(figure, axes[:1, 0])
    figure.suptitle(_shape(frame), fontsize=9, color="#555555")
    return figure


def _point_name(row: Any) -> str:
    """A shape as a tick: its lengths, and what sets it apart from the plain case."""
    name = f"{row.q_len}:{row.k_len}"
    return name if row.heads == row.kv_heads else f"{name}\n{row.heads}/{row.kv_heads} heads"


def attention_heatmap(frame) -> Figure:
    """Speed of each kernel at each point relative to the fastest implementation there; the cell says TFLOP/s.

    A panel for each group of points, pass and mask; the tiers' only where there is no other group (their bars say the same).
    """
    groups = [group for group in GROUPS if len(of_group(frame, group))]
    frame = with_series(frame)
    panels = [
        (f"{group.replace('_', ' ')}, {PASS_TITLES[which]}, {title}", points)
        for group in (groups[:-1] if len(groups) > 1 and groups[-1] == "tiers" else groups)
        for which in dict.fromkeys(frame["pass"])
        for title, points in _panels(of_group(frame, group), which)
    ]
    sizes = [(points.series.nunique(), len(_columns(points))) for _, points in panels]
    heights = [0.42 * kernels + 1.1 for kernels, _ in sizes]
    figure = Figure(figsize=(max(7.0, 0.85 * max(n for _, n in sizes) + 3.0), sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axis, (title, points) in zip(axes[:, 0], panels, strict=True):
        image = _heat(axis, points)
        axis.set_title(f"TFLOP/s, {title}", loc="left", fontsize=11)
        figure.colorbar(image, ax=axis, label="relative to\nthe fastest", pad=0.01)
    figure.suptitle(frame.device.iloc[0], fontsize=9, color="#555555")
    return figure


def _columns(points) -> list[tuple]:
    return list(
        dict.fromkeys(zip(points.head_dim, points.heads, points.kv_heads, points.q_len, points.k_len, strict=True))
    )


def _heat(axis, points):
    """One panel of the heatmap; its image."""
    kernels, columns = list(dict.fromkeys(points.series)), _columns(points)
    cells = {
        (row.series, (row.head_dim, row.heads, row.kv_heads, row.q_len, row.k_len)): row for row in points.itertuples()
    }
    speed = np.full((len(kernels), len(columns)), np.nan)
    for (kernel, column), row in cells.items():
        if row.status == "ok":
            speed[kernels.index(kernel), columns.index(column)] = row.tflops
    with np.errstate(invalid="ignore"):
        best = np.nanmax(speed, axis=0, initial=0)
        relative = speed / np.where(best > 0, best, np.nan)
    image = axis.imshow(relative, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (kernel, column), row in cells.items():
        i, j = kernels.index(kernel), columns.index(column)
        text = f"{row.tflops:.3g}" if row.status == "ok" else {"unsupported": "-"}.get(row.status, row.status)
        light = row.status == "ok" and not relative[i, j] > 0.6
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if light else "black")
    many = len({column[0] for column in columns}) > 1
    axis.set_xticks(range(len(columns)), [_column_name(column, many) for column in columns], fontsize=8)
    axis.set_yticks(range(len(kernels)), kernels, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return image


def _column_name(column: tuple, with_head_dim: bool) -> str:
    head_dim, heads, kv_heads, q_len, k_len = column
    name = str(q_len) if q_len == k_len else f"{q_len}:{k_len}"
    if heads != kv_heads:
        name += f"\n{heads}/{kv_heads} heads"
    return f"{name}\nd {head_dim}" if with_head_dim else name


def attention_scaling(frame) -> Figure:
    """Growth with the length at square shapes: TFLOP/s at each head dim of the group throughput, and time and peak memory at the
    tiers (log-log), a row of panels for each pass and setting; causal only where both masks were measured.
    """
    frame = with_series(frame[frame.q_len == frame.k_len] if (frame.q_len == frame.k_len).any() else frame)
    throughput, tiers = of_group(frame, "throughput"), of_group(frame, "tiers")
    if throughput.empty and tiers.empty:
        tiers = frame
    speed, growth = _by_pass(throughput), _by_pass(tiers)
    head_dims = sorted(set(throughput.head_dim))
    columns = max(2 if growth else 1, len(head_dims))
    figure, axes = _figure(5.0 * columns, 3.7 * len(speed + growth) + 0.9, len(speed + growth), columns)
    for line, (title, group) in zip(axes, speed, strict=False):
        for axis, head_dim in zip(line, head_dims, strict=False):
            _throughput_lines(
                axis,
                group[group.head_dim == head_dim],
                f"{title.capitalize()}, head_dim {head_dim}",
                group.tflops.max(),
            )
        for axis in line[len(head_dims) :]:
            axis.set_visible(False)
    for line, (title, group) in zip(axes[len(speed) :], growth, strict=True):
        for axis, column, label in ((line[0], "median_ms", "time, ms"), (line[1], "peak_mib", "peak memory, MiB")):
            for series, points in group[group.status == "ok"].groupby("series", sort=False):
                points = points.sort_values("q_len")
                axis.plot(points.q_len, points[column], **_line_style(series))
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("sequence length")
            axis.set_ylabel(label)
            axis.set_title(f"{label.split(',')[0].capitalize()}: {title}", loc="left", fontsize=11)
            lengths = sorted(set(group.q_len))
            axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=8)
        for axis in line[2:]:
            axis.set_visible(False)
    _legend(figure, axes.flat)
    figure.suptitle(
        "; ".join([*([_shape(tiers)] if growth else []), *([_tokens(throughput)] if speed else [])]),
        fontsize=9,
        color="#555555",
    )
    return figure


def _by_pass(frame):
    """(title, rows) for each pass and setting; without the unmasked ones where there are causal ones."""
    if frame.causal.any():
        frame = frame[frame.causal]
    return [
        (f"{PASS_TITLES[which]}, {title}", group)
        for which in dict.fromkeys(frame["pass"])
        for title, group in _panels(frame, which)
    ]


def loss_curve(frame, title: str = "") -> Figure:
    """Training and validation loss (nats a token) against the step, and the throughput under it."""
    figure, axes = _figure(8.0, 5.6, 2)
    upper, lower = axes[:, 0]
    train, valid = frame.dropna(subset=["train_loss"]), frame.dropna(subset=["valid_loss"])
    upper.plot(train.step, train.train_loss, color="#0072B2", linewidth=1.2, label="training")
    upper.plot(
        valid.step, valid.valid_loss, color="#D55E00", marker="o", markersize=4, linewidth=1.6, label="validation"
    )
    if not valid.empty:
        last = valid.iloc[-1]
        upper.annotate(
            f"{last.valid_loss:.3f}", (last.step, last.valid_loss), xytext=(4, 6), textcoords="offset points"
        )
    upper.set_ylabel("loss, nats a token")
    upper.legend(frameon=False)
    upper.set_title(title, loc="left", fontsize=11)
    speed = frame.dropna(subset=["tokens_per_s"])
    lower.plot(speed.step, speed.tokens_per_s / 1e3, color="#009E73", linewidth=1.2)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("thousand tokens/s")
    lower.set_xlabel("step")
    return figure
