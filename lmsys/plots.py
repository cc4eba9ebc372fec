"""Figures: a DataFrame of results in, a matplotlib Figure out. No torch here.

A kernel keeps its colour in every figure; the implementations we compare with are hatched (bars) or dashed (lines).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmsys.records import atomic_path

# Okabe and Ito's colour-blind safe palette; the last two extend it.
COLOURS = {
    "scaled_dot_prod_attention": "#999999",
    "vectorized_torch": "#56B4E9",
    "vectorized_torch_compiled": "#0072B2",
    "flash_attention_torch": "#009E73",
    "flash_attention_triton": "#D55E00",
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
    row = frame.iloc[0]
    return f"batch {row.batch}, {row.heads} heads, head_dim {row.head_dim}; {row.device}"


def attention_bars(frame, which: str = "forward") -> Figure:
    """Grouped bars: the time of each kernel at each tier, on a log scale, with 20th to 80th percentile."""
    panels = _panels(frame, which)
    tiers = [f"{q}:{k}" for q, k in dict.fromkeys(zip(frame.q_len, frame.k_len, strict=True))]
    kernels = list(dict.fromkeys(frame[frame.status != "unsupported"].kernel))
    figure, axes = _figure(max(7.5, 1.25 * len(tiers) + 1.5), 3.6 * len(panels) + 1.0, len(panels))
    width = 0.86 / len(kernels)
    for axis, (title, group) in zip(axes[:, 0], panels, strict=True):
        points = {(row.kernel, f"{row.q_len}:{row.k_len}"): row for row in group.itertuples()}
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
                hatch="////" if kernel in PEERS else None,
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
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    figure.suptitle(_shape(frame), fontsize=9, color="#555555")
    return figure


def attention_heatmap(frame) -> Figure:
    """Speed of each kernel at each tier relative to the fastest implementation there; the cell says TFLOP/s."""
    panels = [
        (f"{PASS_TITLES[which]}, {title}", group)
        for which in dict.fromkeys(frame["pass"])
        for title, group in _panels(frame, which)
    ]
    kernels = list(dict.fromkeys(frame.kernel))
    tiers = list(dict.fromkeys(zip(frame.q_len, frame.k_len, strict=True)))
    height = 0.42 * len(kernels) + 1.0
    figure, axes = _figure(max(7.0, 0.85 * len(tiers) + 3.0), height * len(panels) + 0.6, len(panels))
    for axis, (title, group) in zip(axes[:, 0], panels, strict=True):
        points = {(row.kernel, (row.q_len, row.k_len)): row for row in group.itertuples()}
        speed = np.full((len(kernels), len(tiers)), np.nan)
        for i, kernel in enumerate(kernels):
            for j, tier in enumerate(tiers):
                row = points.get((kernel, tier))
                if row and row.status == "ok":
                    speed[i, j] = row.tflops
        with np.errstate(invalid="ignore"):
            best = np.nanmax(speed, axis=0, initial=0)
            relative = speed / np.where(best > 0, best, np.nan)
        image = axis.imshow(relative, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, kernel in enumerate(kernels):
            for j, tier in enumerate(tiers):
                row = points.get((kernel, tier))
                if not row:
                    continue
                text = f"{row.tflops:.3g}" if row.status == "ok" else {"unsupported": "–"}.get(row.status, row.status)
                dark = not relative[i, j] > 0.6
                axis.text(
                    j,
                    i,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark and row.status == "ok" else "black",
                )
        axis.grid(False)
        axis.set_xticks(range(len(tiers)), [f"{q}:{k}" for q, k in tiers], fontsize=8)
        axis.set_yticks(range(len(kernels)), kernels, fontsize=8)
        axis.set_title(f"TFLOP/s, {title}", loc="left", fontsize=11)
        figure.colorbar(image, ax=axis, label="relative to\nthe fastest", pad=0.01)
    figure.suptitle(_shape(frame), fontsize=9, color="#555555")
    return figure


def attention_scaling(frame) -> Figure:
    """Time and peak memory against the sequence length at square tiers, log-log: a panel row for each pass and setting."""
    square = frame[frame.q_len == frame.k_len]
    if square.empty:
        square = frame
    panels = [
        (f"{PASS_TITLES[which]}, {title}", group)
        for which in dict.fromkeys(square["pass"])
        for title, group in _panels(square, which)
    ]
    figure, axes = _figure(10.0, 3.7 * len(panels) + 0.9, len(panels), 2)
    for (left, right), (title, group) in zip(axes, panels, strict=True):
        for kernel, points in group[group.status == "ok"].groupby("kernel", sort=False):
            points = points.sort_values("q_len")
            style = {
                "color": COLOURS.get(kernel, "#444444"),
                "linestyle": "--" if kernel in PEERS else "-",
                "marker": "o",
                "markersize": 4,
                "linewidth": 2.4 if kernel == "flash_attention_triton" else 1.4,
                "label": kernel,
            }
            left.plot(points.q_len, points.median_ms, **style)
            left.fill_between(points.q_len, points.p20_ms, points.p80_ms, color=style["color"], alpha=0.15, linewidth=0)
            right.plot(points.q_len, points.peak_mib, **style)
        for axis, label in ((left, "time, ms"), (right, "peak memory, MiB")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("sequence length")
            axis.set_ylabel(label)
            axis.set_title(f"{label.split(',')[0].capitalize()}: {title}", loc="left", fontsize=11)
            lengths = sorted(set(group.q_len))
            axis.set_xticks(lengths, [str(n) for n in lengths])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(_shape(frame), fontsize=9, color="#555555")
    return figure


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
