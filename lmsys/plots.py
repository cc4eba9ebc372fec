"""Figures: a DataFrame of results in, a matplotlib Figure out. No torch here.

A kernel keeps its colour in every figure; the implementations we compare with are hatched (bars) or dashed (lines).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmsys.bench.standings import GROUPS, of_group, with_series
from lmsys.records import atomic_path, captured, significant, units

PORTABLE = "flash_attention_triton (portable)"

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


# --- notebooks/flash_attention ----------------------------------------------------------------------

STEP_COLOURS = {
    "naive": "#999999",
    "vectorized": "#56B4E9",
    "compiled": "#0072B2",
    "tiled PyTorch": "#009E73",
    "portable Triton": "#F4A582",
    "TMA": "#E69F00",
    "warp specialization": "#CC79A7",
    "overlap": "#D55E00",
}
IMPLEMENTATION_COLOURS = {"naive": "#999999", "compiled": "#0072B2", "flash": "#D55E00"}
_HEAD_DIM_MARKERS = ("o", "s", "^", "D", "v", "P")


def _log_lengths(axis, lengths) -> None:
    lengths = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=8, rotation=45 if len(lengths) > 6 else 0)
    axis.set_xlabel("sequence length")


def flash_steps(frame) -> Figure:
    """TFLOP/s of each step, a panel a head dim: forward, and backward where a step has it; on a log scale."""
    steps = list(dict.fromkeys(frame.step))
    head_dims = sorted(set(frame.head_dim))
    figure, axes = _figure(5.4 * len(head_dims) + 1.6, 0.5 * len(steps) + 1.6, 1, len(head_dims))
    y, speeds = np.arange(len(steps)), frame[frame.status == "ok"].tflops
    for axis, head_dim in zip(axes[0], head_dims, strict=True):
        group = frame[frame.head_dim == head_dim]
        for which, offset, colour in (("forward", -0.2, "#D55E00"), ("backward", 0.2, "#56B4E9")):
            rows = {row.step: row for row in group[group["pass"] == which].itertuples()}
            speed = [rows[s].tflops if s in rows and rows[s].status == "ok" else np.nan for s in steps]
            axis.barh(y + offset, speed, 0.38, color=colour, label=which)
            for i, step in enumerate(steps):
                if step in rows:
                    timed = rows[step].status == "ok"
                    text = f" {rows[step].tflops:.3g}" if timed else f" {rows[step].status}"
                    at = speed[i] if timed else 0.02
                    axis.annotate(
                        text,
                        (at, i + offset),
                        xycoords="data" if timed else ("axes fraction", "data"),
                        va="center",
                        fontsize=8,
                    )
        axis.set_xscale("log")
        axis.set_xlim(speeds.min() / 2, speeds.max() * 2)
        axis.set_yticks(y, steps)
        axis.set_ylim(len(steps) - 0.5, -0.5)
        axis.grid(True, axis="x", color="#dddddd", linewidth=0.8)
        axis.grid(False, axis="y")
        axis.set_xlabel("TFLOP/s (log)")
        axis.set_title(f"head_dim {head_dim}", loc="left", fontsize=11)
    _legend(figure, axes.flat)
    row = frame.iloc[0]
    figure.suptitle(f"batch {row.batch}, {row.seq_len:,} tokens, causal, {row['dtype']}; {row.device}", fontsize=9)
    return figure


def flash_roofline(frame, ceilings, peak_tflops: float | None = None) -> Figure:
    """Speed of each step's forward pass against its FLOPs for a byte of device memory, under what the device reaches.

    frame: the steps with the columns counted_mib and, where a profiler counted it, dram_mib.
    ceilings: measured copy and product. peak_tflops: the datasheet's; None: not drawn.
    """
    figure, axes = _figure(8.6, 5.6)
    axis = axes[0, 0]
    ok = frame[(frame.status == "ok") & (frame["pass"] == "forward")]
    flops = ok.tflops * ok.median_ms * 1e9
    intensity = flops / (ok.counted_mib * 2**20)
    head_dims = sorted(set(frame.head_dim))
    rates = {row.what: row.rate for row in ceilings[ceilings.status == "ok"].itertuples()}
    span = np.geomspace(max(intensity.min(), 1e-3) / 3, intensity.max() * 4, 200)
    top = max([value for value in (rates.get("product"), peak_tflops) if value], default=None)
    if "copy" in rates:
        slope = rates["copy"] * 1e-3 * span
        axis.plot(
            span,
            np.minimum(slope, top) if top else slope,
            color="#333333",
            linewidth=1.4,
            label=f"copy, measured: {rates['copy']:,.0f} GB/s",
        )
    if "product" in rates:
        label = f"product, measured: {rates['product']:.3g} TFLOP/s"
        axis.axhline(rates["product"], color="#333333", linestyle="--", linewidth=1.2, label=label)
    if peak_tflops:
        label = f"peak, datasheet: {peak_tflops:.3g} TFLOP/s"
        axis.axhline(peak_tflops, color="#333333", linestyle=":", linewidth=1.2, label=label)
    for (_, row), x in zip(ok.iterrows(), intensity, strict=True):
        marker = _HEAD_DIM_MARKERS[head_dims.index(row.head_dim) % len(_HEAD_DIM_MARKERS)]
        label = f"{row.step}, head_dim {row.head_dim}"
        axis.plot(x, row.tflops, marker, color=STEP_COLOURS[row.step], markersize=8, linestyle="none", label=label)
        if row.get("dram_mib") and np.isfinite(row.dram_mib):
            measured = row.tflops * row.median_ms * 1e9 / (row.dram_mib * 2**20)
            axis.plot(
                measured,
                row.tflops,
                marker,
                markeredgecolor=STEP_COLOURS[row.step],
                markerfacecolor="none",
                markersize=8,
            )
            axis.plot([x, measured], [row.tflops] * 2, color=STEP_COLOURS[row.step], linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOPs for each byte of device memory (filled: bytes counted by hand; hollow: by the profiler)")
    axis.set_ylabel("TFLOP/s")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def flash_counters(frame) -> Figure:
    """How busy each step keeps the parts of a multiprocessor, in percent of their peak: a panel a head dim."""
    ok = frame[frame.status == "ok"]
    names = {
        "tensor_pct": "tensor cores",
        "exp_pct": "exponentials",
        "shared_pct": "shared memory",
        "issue_pct": "issue",
    }
    head_dims = sorted(set(ok.head_dim))
    figure, axes = _figure(10.0, 3.4 * max(1, len(head_dims)) + 0.8, max(1, len(head_dims)))
    for axis, head_dim in zip(axes[:, 0], head_dims, strict=False):
        group = ok[ok.head_dim == head_dim]
        for i, (column, label) in enumerate(names.items()):
            x = np.arange(len(group)) + (i - 1.5) * 0.2
            axis.bar(x, group[column].astype(float), 0.19, label=label, color=list(COLOURS.values())[i + 1])
        axis.set_xticks(np.arange(len(group)), list(group.step), fontsize=8)
        axis.set_ylabel("% of peak")
        axis.set_ylim(0, 100)
        axis.set_title(f"head_dim {head_dim}", loc="left", fontsize=11)
    _legend(figure, axes.flat)
    return figure


def course_memory(frame) -> Figure:
    """pytorch_attention at its largest head dim: memory in use before the backward pass, measured and by formula; and time."""
    group = frame[frame.head_dim == frame.head_dim.max()]
    figure, axes = _figure(11.0, 4.6, 1, 2)
    memory, speed = axes[0]
    for name, rows in group.groupby("implementation", sort=False):
        colour = IMPLEMENTATION_COLOURS.get(name, "#444444")
        each = rows[rows["pass"] == "forward"].sort_values("seq_len")
        memory.plot(each.seq_len, each.computed_mib, color=colour, linewidth=1.2, label=f"{name}, by formula")
        memory.plot(each.seq_len, each.before_backward_mib, "o", color=colour, markersize=6, label=f"{name}, measured")
        for which, style in (("forward", "-"), ("backward", "--")):
            timed = rows[(rows["pass"] == which) & (rows.status == "ok")].sort_values("seq_len")
            speed.plot(
                timed.seq_len, timed.median_ms, style, color=colour, marker="o", markersize=4, label=f"{name}, {which}"
            )
    for axis, label in ((memory, "memory before backward, MiB"), (speed, "time, ms")):
        _log_lengths(axis, group.seq_len)
        axis.set_ylabel(label)
        axis.legend(frameon=False, fontsize=8)
    row = group.iloc[0]
    figure.suptitle(f"batch {row.batch}, head_dim {row.head_dim}, {row['dtype']}, causal; {row.device}", fontsize=9)
    return figure


def flash_benchmarking(frame) -> Figure:
    """flash_benchmarking: time against the length, a panel for each dtype (down) and pass (across); a marker a head dim."""
    dtypes, passes = list(dict.fromkeys(frame["dtype"])), list(dict.fromkeys(frame["pass"]))
    head_dims = sorted(set(frame.head_dim))
    figure, axes = _figure(4.6 * len(passes), 3.8 * len(dtypes) + 0.9, len(dtypes), len(passes))
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, which in zip(line, passes, strict=True):
            group = frame[(frame["dtype"] == dtype) & (frame["pass"] == which) & (frame.status == "ok")]
            for (name, head_dim), rows in group.groupby(["implementation", "head_dim"], sort=False):
                rows = rows.sort_values("seq_len")
                axis.plot(
                    rows.seq_len,
                    rows.median_ms,
                    color=IMPLEMENTATION_COLOURS.get(name, "#444444"),
                    marker=_HEAD_DIM_MARKERS[head_dims.index(head_dim) % len(_HEAD_DIM_MARKERS)],
                    markersize=4,
                    linewidth=1.0,
                    label=f"{name}, head_dim {head_dim}",
                )
            _log_lengths(axis, frame.seq_len)
            axis.set_ylabel("time, ms")
            axis.set_title(f"{PASS_TITLES[which].capitalize()}, {dtype}", loc="left", fontsize=11)
    _legend(figure, axes.flat)
    figure.suptitle(f"batch {frame.batch.iloc[0]}, causal; {frame.device.iloc[0]}", fontsize=9, color="#555555")
    return figure


# --- notebooks/lm_matrix, data_parallel, sharding -----------------------------------------------------

WRAPPER_COLOURS = {
    "none": "#999999",
    "naive": "#56B4E9",
    "flat": "#0072B2",
    "overlap": "#009E73",
    "flashddp": "#D55E00",
    "flashddp+zero1": "#882255",
    "torch_ddp": "#F0C808",
    "fsdp": "#CC79A7",
    "torch_fsdp2": "#E69F00",
}
PEER_WRAPPERS = ("torch_ddp", "torch_fsdp2")
_OP_MARKERS = {"all_reduce": "o", "reduce_scatter": "s", "all_gather": "^"}
_STRATEGY_COLOURS = {"DP": "#0072B2", "FSDP": "#D55E00", "TP": "#009E73", "FSDP + TP": "#CC79A7"}


def _wrapper_colour(name: str) -> str:
    return WRAPPER_COLOURS.get(name, "#444444")


def _setting(frame) -> str:
    """What the rows of a training step have in common."""
    compiled = "compiled block by block" if frame.compiled.all() else "eager"
    return f"{', '.join(dict.fromkeys(frame['dtype']))}, {compiled}; {frame.device.iloc[0]}"


def _memory_unit(values_mib) -> tuple[int, str]:
    """What to divide MiB by, and the unit that it gives."""
    return (1024, "GiB") if values_mib.max() >= 1024 else (1, "MiB")


def collectives(frame) -> Figure:
    """Bus bandwidth and time of each collective against the size; a colour a number of processes."""
    ok = frame[frame.status == "ok"]
    figure, axes = _figure(11.0, 4.4, 1, 2)
    colours = dict(zip(sorted(set(ok.gpus)), ["#D55E00", "#0072B2", "#009E73", "#CC79A7"], strict=False))
    for (op, gpus), group in ok.groupby(["op", "gpus"], sort=False):
        group = group.sort_values("size_mib")
        style = {"color": colours.get(gpus, "#444444"), "marker": _OP_MARKERS[op], "markersize": 4, "linewidth": 1.3}
        axes[0, 0].plot(group.size_mib, group.busbw_gb_s, label=f"{op}, {gpus} processes", **style)
        axes[0, 1].plot(group.size_mib, group.median_ms, label=f"{op}, {gpus} processes", **style)
    for axis, label in ((axes[0, 0], "bus bandwidth, GB/s"), (axes[0, 1], "time, ms")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("size, MiB")
        axis.set_ylabel(label)
    axes[0, 1].set_yscale("log")
    axes[0, 0].set_ylim(bottom=0)
    _legend(figure, axes.flat)
    figure.suptitle(f"{ok.backend.iloc[0]}; {ok.device.iloc[0]}" if len(ok) else "", fontsize=9, color="#555555")
    return figure


def step_timeline(traces) -> Figure:
    """One traced step of each wrapper: its phases, when something computes and when something communicates."""
    names = list(dict.fromkeys(traces.wrapper))
    figure, axes = _figure(11.0, 1.35 * len(names) + 0.8, len(names))
    lanes = {"phase": 2, "compute": 1, "communication": 0}
    colours = {"forward": "#cccccc", "backward": "#999999", "optimizer": "#666666"}
    longest = (traces.start_ms + traces.duration_ms).max()
    for axis, name in zip(axes[:, 0], names, strict=True):
        rows = traces[traces.wrapper == name]
        for row in rows.itertuples():
            own = colours.get(row.name, "#0072B2" if row.lane == "compute" else "#D55E00")
            axis.broken_barh([(row.start_ms, row.duration_ms)], (lanes[row.lane] - 0.4, 0.8), facecolors=own)
            if row.lane == "phase" and row.duration_ms > 0.04 * longest:
                middle = row.start_ms + row.duration_ms / 2
                axis.annotate(row.name, (middle, lanes["phase"]), ha="center", va="center", fontsize=7)
        axis.set_yticks(list(lanes.values()), list(lanes), fontsize=8)
        axis.set_ylim(-0.6, 2.6)
        axis.set_xlim(0, longest)
        axis.grid(False, axis="y")
        axis.set_title(name, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("ms from the beginning of the forward pass, under the profiler")
    return figure


def step_breakdown(frame) -> Figure:
    """The step under each wrapper: what it takes without communication, and what communication adds, measured and by the model."""
    figure, axes = _figure(8.4, 0.5 * len(frame) + 1.5)
    axis = axes[0, 0]
    for y, row in enumerate(frame.itertuples()):
        exposed = 0.0 if np.isnan(row.exposed_comm_ms) else max(0.0, row.exposed_comm_ms)
        axis.barh(y, row.step_ms - exposed, 0.6, color="#bbbbbb")
        axis.barh(y, exposed, 0.6, left=row.step_ms - exposed, color=_wrapper_colour(row.wrapper))
        if not np.isnan(row.model_ms) and row.gpus > 1:
            axis.plot([row.step_ms - exposed + row.model_ms] * 2, [y - 0.4, y + 0.4], color="black")
        axis.annotate(f" {row.step_ms:.4g} ms", (row.step_ms, y), va="center", fontsize=8)
    names = [f"one {units(frame)[0]}" if row.gpus == 1 else row.wrapper for row in frame.itertuples()]
    axis.set_yticks(range(len(frame)), names)
    axis.set_ylim(len(frame) - 0.5, -0.5)
    axis.set_xlim(0, 1.15 * frame.step_ms.max())
    axis.grid(False, axis="y")
    axis.set_xlabel(
        "time of a step, ms (the bar's coloured end: what communication adds; black: what the model says it adds)"
    )
    graph = ", as one CUDA graph" if captured(frame).all() else ""
    axis.set_title(f"{frame['size'].iloc[0]}, {_setting(frame)}{graph}", loc="left", fontsize=10)
    return figure


def bucket_sizes(frame) -> Figure:
    """Time of flashddp's step, and the communication exposed in it and by the model, against the bucket size."""
    several = frame[frame.gpus > 1].sort_values("bucket_mb")
    figure, axes = _figure(11.0, 4.0, 1, 2)
    step, exposed = axes[0]
    step.errorbar(
        several.bucket_mb,
        several.step_ms,
        yerr=[several.step_ms - several.p20_ms, several.p80_ms - several.step_ms],
        color="#D55E00",
        marker="o",
        capsize=3,
    )
    step.set_ylabel("time of a step, ms")
    exposed.plot(several.bucket_mb, several.exposed_comm_ms, color="#D55E00", marker="o", label="measured")
    exposed.plot(several.bucket_mb, several.model_ms, color="black", linestyle="--", marker="x", label="by the model")
    exposed.set_ylabel("communication exposed, ms")
    exposed.legend(frameon=False, fontsize=8)
    for axis in (step, exposed):
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlabel("bucket size, MB")
    return figure


def scaling(frame) -> Figure:
    """Tokens a second against the number of GPUs, beside linear scaling from one."""
    figure, axes = _figure(6.4, 4.4)
    axis = axes[0, 0]
    one = frame[frame.gpus == 1]
    counts = sorted(set(frame.gpus))
    if len(one):
        rate = one.tokens_per_s.iloc[0]
        axis.plot(counts, [rate * n / 1e3 for n in counts], color="#999999", linestyle=":", label="linear")
    several = frame[frame.gpus > 1]
    for (wrapper, options), rows in several.groupby(["wrapper", several.options.fillna("")], sort=False):
        points = [*one.itertuples(), *rows.sort_values("gpus").itertuples()]
        axis.plot(
            [row.gpus for row in points],
            [row.tokens_per_s / 1e3 for row in points],
            color=_wrapper_colour(wrapper),
            linestyle="--" if wrapper in PEER_WRAPPERS else "-." if options else "-",
            marker="s" if options else "o",
            markerfacecolor="none" if options else None,
            label=f"{wrapper} {options}".strip(),
        )
    axis.set_xticks(counts)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(units(frame)[1])
    axis.set_ylabel("thousand tokens/s")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(f"{frame['size'].iloc[0]}, {_setting(frame)}", loc="left", fontsize=10)
    return figure


def sharding_memory(memory) -> Figure:
    """Memory of each sharding at each point of a step: bars as measured, a line as the formula says."""
    points = list(dict.fromkeys(memory.point))
    series = list(dict.fromkeys(zip(memory.sharding, memory.gpus, strict=True)))
    colours = ["#999999", "#D55E00", "#882255", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#009E73"]
    figure, axes = _figure(10.0, 4.6)
    axis, width = axes[0, 0], 0.84 / max(1, len(series))
    per, unit = _memory_unit(memory.measured_mib)
    for i, (name, gpus) in enumerate(series):
        rows = memory[(memory.sharding == name) & (memory.gpus == gpus)].set_index("point")
        for j, point in enumerate(points):
            if point not in rows.index:
                continue
            x = j + (i - (len(series) - 1) / 2) * width
            label = name if gpus == 1 else f"{name}, {gpus} {units(memory)[1]}"
            axis.bar(x, rows.measured_mib[point] / per, 0.92 * width, color=colours[i % len(colours)], label=label)
            if not np.isnan(rows.predicted_mib[point]):
                height = rows.predicted_mib[point] / per
                axis.plot(
                    [x - width / 2, x + width / 2], [height] * 2, color="black", linewidth=1.6, label="by formula"
                )
    axis.set_xticks(range(len(points)), points)
    axis.set_ylabel(f"memory a {units(memory)[0]}, {unit}")
    axis.set_title(memory["size"].iloc[0], loc="left", fontsize=10)
    _legend(figure, axes.flat)
    return figure


def sharding_speed(frame) -> Figure:
    """Time of a step and peak memory of each sharding, one against the other."""
    ok = frame[frame.status == "ok"]
    figure, axes = _figure(7.2, 4.6)
    axis = axes[0, 0]
    per, unit = _memory_unit(ok.peak_mib)
    for row in ok.itertuples():
        x, y = row.peak_mib / per, row.step_ms
        axis.plot(x, y, "o", color=_wrapper_colour(row.wrapper), markersize=8)
        name = row.sharding if row.gpus == 1 else f"{row.sharding}, {row.gpus} {units(frame)[1]}"
        axis.annotate(f" {name}", (x, y), fontsize=8, va="bottom")
    axis.set_xlim(0, 1.25 * ok.peak_mib.max() / per)
    axis.set_ylim(0, 1.15 * ok.step_ms.max())
    axis.set_xlabel(f"peak memory a {units(frame)[0]}, {unit}")
    axis.set_ylabel("time of a step, ms")
    axis.set_title(f"{ok['size'].iloc[0]}, {_setting(ok)}", loc="left", fontsize=10)
    return figure


def parallelism(frame) -> Figure:
    """Calculated time of communication of each strategy beside that of computation, against the number of devices."""
    passes = list(dict.fromkeys(frame["pass"]))
    figure, axes = _figure(5.4 * len(passes), 4.4, 1, len(passes))
    for axis, which in zip(axes[0], passes, strict=True):
        rows = frame[frame["pass"] == which]
        compute = rows.drop_duplicates("devices").sort_values("devices")
        axis.plot(compute.devices, compute.compute_ms, color="black", linewidth=2, label="computation")
        for strategy, group in rows[rows.communication_ms > 0].groupby("strategy", sort=False):
            group = group.sort_values("devices")
            axis.plot(
                group.devices,
                group.communication_ms,
                color=_STRATEGY_COLOURS.get(strategy, "#444444"),
                linestyle="--" if strategy == "DP" else "-",
                marker="o",
                markersize=3,
                label=f"communication, {strategy}",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("devices")
        axis.set_ylabel("ms")
        axis.set_title(f"{which.capitalize()}, {rows.tokens.iloc[0]:,.0f} tokens", loc="left", fontsize=10)
    _legend(figure, axes.flat)
    return figure


_PRECISION_COLOURS = {
    "fp32": "#000000",
    "fp16": "#D55E00",
    "fp16 into fp32": "#0072B2",
    "fp16 into fp32, cast first": "#56B4E9",
    "bf16": "#009E73",
}


def partial_sums(frame) -> Figure:
    """The same number added again and again: partial sums, and their errors beside the spacing of the accumulator's numbers."""
    figure, axes = _figure(11.0, 4.2, 1, 2)
    values, errors = axes[0]
    for name, rows in frame.groupby("name", sort=False):
        style = {
            "color": _PRECISION_COLOURS.get(name, "#444444"),
            "linestyle": "--" if name.endswith("first") else "-",
            "linewidth": 2.4 if name == "fp16 into fp32" else 1.4,
            "label": name,
        }
        values.plot(rows.additions, rows["sum"], **style)
        errors.plot(rows.additions, rows.error.abs().clip(lower=1e-9), **style)
        if rows.accumulator.iloc[0] == rows.addend.iloc[0] != "fp32":
            errors.plot(
                rows.additions,
                rows.spacing,
                color=style["color"],
                linestyle=":",
                linewidth=1,
                label=f"spacing of {name}",
            )
    values.plot(rows.additions, rows["sum"] - rows.error, color="#999999", linestyle=":", label="truth")
    values.set_ylabel("partial sum")
    errors.set_ylabel("distance from the truth")
    errors.set_yscale("log")
    errors.set_ylim(bottom=1e-8)
    for axis in (values, errors):
        axis.set_xlabel("additions")
    _legend(figure, axes.flat)
    return figure


def layer_norm_errors(frame) -> Figure:
    """Error of layer norm against the input's standard deviation and mean; a colour a dtype, a line style for what is in fp32."""
    figure, axes = _figure(11.0, 4.4, 1, 2)
    styles = {"all low": "-", "sums fp32": "--", "inside fp32": ":"}
    said = {"all low": "all of it", "sums fp32": "all but the sums", "inside fp32": "input and output alone"}
    labels = {"scale": "standard deviation of the input, mean 0", "mean": "mean of the input, standard deviation 1"}
    for axis, (what, label) in zip(axes[0], labels.items(), strict=True):
        for (dtype, statistics), rows in frame[frame.what == what].groupby(["dtype", "statistics"], sort=False):
            colour = _PRECISION_COLOURS[dtype]
            axis.plot(
                rows.value, rows.error, color=colour, linestyle=styles[statistics], label=f"{dtype}: {said[statistics]}"
            )
            lost = rows[rows.lost]
            axis.plot(lost.value, lost.error, "x", color=colour)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel("relative error of layer norm (x: nothing is left)")
    _legend(figure, axes.flat)
    return figure


# Of kinds of kernels, in every figure of the profile.
_CATEGORY_COLOURS = {
    "matrix products": "#0072B2",
    "softmax": "#D55E00",
    "element-wise": "#56B4E9",
    "copies and casts": "#F0C808",
    "reductions": "#009E73",
    "lookups": "#CC79A7",
    "optimizer": "#999999",
    "other": "#444444",
    "other kernels": "#56B4E9",
}


def profile_share(kernels) -> Figure:
    """The share of each kind of kernel in a forward pass and in a training step, at each point."""
    modes = list(dict.fromkeys(kernels["mode"]))
    points = kernels[["size", "dtype", "context_length"]].drop_duplicates()
    figure, axes = _figure(5.6 * len(modes), 0.32 * len(points) + 1.8, 1, len(modes))
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = kernels[kernels["mode"] == mode]
        sums = rows.groupby(["size", "dtype", "context_length", "category"]).total_ms.sum()
        for y, point in enumerate(points.itertuples(index=False, name=None)):
            left = 0.0
            for kind, colour in _CATEGORY_COLOURS.items():
                if (*point, kind) not in sums.index:
                    continue
                share = 100 * sums[(*point, kind)] / sums[point].sum()
                axis.barh(y, share, 0.8, left=left, color=colour, label=kind)
                if share > 7:
                    axis.annotate(
                        f"{share:.0f}", (left + share / 2, y), ha="center", va="center", fontsize=7, color="white"
                    )
                left += share
        axis.set_yticks(
            range(len(points)), [f"{s}, {d}, {c:,}" for s, d, c in points.itertuples(index=False, name=None)]
        )
        axis.set_ylim(len(points) - 0.5, -0.5)
        axis.set_xlim(0, 100)
        axis.grid(False, axis="y")
        axis.set_xlabel("% of the time in kernels")
        axis.set_title({"inference": "forward pass", "training": "training step"}[mode], loc="left", fontsize=10)
    _legend(figure, axes.flat)
    return figure


def profile_attention(rows) -> Figure:
    """Softmax over matrix products in attention: their times beside their FLOPs, at each point."""
    figure, axes = _figure(7.2, 0.5 * len(rows) + 1.5)
    axis = axes[0, 0]
    for y, row in enumerate(rows):
        for offset, (key, colour, label) in enumerate(
            (("ms", _CATEGORY_COLOURS["softmax"], "time"), ("gflop", "#999999", "FLOPs"))
        ):
            ratio = 100 * row[f"softmax_{key}"] / row[f"matmul_{key}"]
            axis.barh(y + 0.4 * offset - 0.2, ratio, 0.38, color=colour, label=label)
            axis.annotate(f" {ratio:.3g}%", (ratio, y + 0.4 * offset - 0.2), va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{row['size']}, {row['dtype']}, {row['context_length']:,}" for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.margins(x=0.12)
    axis.grid(False, axis="y")
    axis.set_xlabel("softmax, in % of the two matrix products of attention")
    _legend(figure, axes.flat)
    return figure


def profile_timeline(lanes) -> Figure:
    """A training step of each size and precision: its phases, and when each kind of kernel ran."""
    points = list(lanes[["size", "context_length", "dtype"]].drop_duplicates().itertuples(index=False, name=None))
    figure, axes = _figure(11.0, 1.5 * len(points) + 0.8, len(points))
    names = ["other kernels", "softmax", "matrix products", "phase"]
    shades = {"forward": "#cccccc", "loss": "#d8b890", "backward": "#999999", "optimizer": "#666666"}
    for axis, (size, context, dtype) in zip(axes[:, 0], points, strict=True):
        rows = lanes[(lanes["size"] == size) & (lanes.context_length == context) & (lanes.dtype == dtype)]
        rows = rows[rows.lane != "layer"]
        end = (rows.start_ms + rows.duration_ms).max()
        for (lane, name), spans in rows.groupby(["lane", "name"], sort=False):
            colour = shades[name] if lane == "phase" else _CATEGORY_COLOURS[name]
            axis.broken_barh(
                list(zip(spans.start_ms, spans.duration_ms, strict=True)),
                (names.index(lane) - 0.4, 0.8),
                facecolors=colour,
            )
            if lane == "phase" and spans.duration_ms.sum() > 0.06 * end:
                middle = spans.start_ms.iloc[0] + spans.duration_ms.sum() / 2
                axis.annotate(name, (middle, names.index(lane)), ha="center", va="center", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.set_xlim(0, end)
        axis.grid(False, axis="y")
        axis.set_title(f"{size}, {context:,} tokens, {dtype}", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("ms from the beginning of the step, under the profiler")
    return figure


def profile_layer(lanes) -> Figure:
    """The forward pass of a layer in the middle, kernel by kernel: a lane for each part, a colour for each kind."""
    lanes = lanes[lanes.lane == "layer"]
    points = list(lanes[["size", "context_length", "dtype"]].drop_duplicates().itertuples(index=False, name=None))
    figure, axes = _figure(11.0, 2.3 * len(points) + 0.6, len(points))
    for axis, (size, context, dtype) in zip(axes[:, 0], points, strict=True):
        rows = lanes[(lanes["size"] == size) & (lanes.context_length == context) & (lanes.dtype == dtype)]
        split = rows.name.str.split(": ", expand=True)
        parts = list(dict.fromkeys(split[0]))
        start = rows.start_ms.min()
        for (part, kind), spans in rows.groupby([split[0], split[1]], sort=False):
            bars = list(zip((spans.start_ms - start) * 1e3, spans.duration_ms * 1e3, strict=True))
            colour = _CATEGORY_COLOURS[kind]
            axis.broken_barh(bars, (parts.index(part) - 0.4, 0.8), facecolors=colour, label=kind)
        axis.set_yticks(range(len(parts)), parts, fontsize=8)
        axis.set_ylim(len(parts) - 0.4, -0.6)
        axis.grid(False, axis="y")
        axis.set_title(f"one layer of {size}, {context:,} tokens, {dtype}", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("µs from the beginning of the layer")
    _legend(figure, axes.flat)
    return figure


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


_MEMORY_COLOURS = {
    "parameters": "#0072B2",
    "optimizer": "#56B4E9",
    "other": "#999999",
    "gradients": "#009E73",
    "activations": "#D55E00",
    "temporary": "#F0C808",
}


def memory_categories(frame) -> Figure:
    """Live memory through a step, stacked by category: a row of panels a mode, a column a context. Phases are named at the bottom."""
    modes, lengths = list(dict.fromkeys(frame["mode"])), list(dict.fromkeys(frame.context_length))
    figure, axes = _figure(5.8 * len(lengths), 3.3 * len(modes) + 0.6, len(modes), len(lengths))
    columns = [f"{name}_mib" for name in _MEMORY_COLOURS]
    per, unit = _memory_unit(frame[columns].sum(axis=1))
    for i, mode in enumerate(modes):
        for j, length in enumerate(lengths):
            axis = axes[i, j]
            rows = frame[(frame["mode"] == mode) & (frame.context_length == length)]
            if rows.empty:
                axis.set_axis_off()
                continue
            axis.stackplot(
                rows.change,
                *(rows[column] / per for column in columns),
                labels=list(_MEMORY_COLOURS),
                colors=list(_MEMORY_COLOURS.values()),
                linewidth=0,
                step="post",
            )
            for phase, part in rows.groupby("phase", sort=False):
                begin, end = part.change.min(), part.change.max()
                axis.axvline(begin, color="black", linewidth=0.6, linestyle=":")
                if end - begin > 0.05 * rows.change.max():
                    axis.annotate(
                        phase, ((begin + end) / 2, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8
                    )
            axis.set_xlim(0, rows.change.max())
            axis.set_ylim(0, 1.05 * rows[columns].sum(axis=1).max() / per)
            axis.set_ylabel(f"live memory, {unit}")
            axis.set_title(f"{mode.replace('_', ' ')}, {length} tokens", loc="left", fontsize=10)
            axis.set_xlabel("allocations and releases, in order")
    _legend(figure, axes.flat)
    first = frame.iloc[0]
    figure.suptitle(
        f"{first['size']}, batch {first.batch}, {first['dtype']}, {first.kernel}; {first.device}",
        fontsize=9,
        color="#555555",
    )
    return figure


def memory_residuals(frame, top: int = 8) -> Figure:
    """What one block keeps for its backward pass, by the line of code that keeps it."""
    rows = frame.head(top)
    figure, axes = _figure(10.0, 0.42 * len(rows) + 1.2)
    axis = axes[0, 0]
    per, unit = _memory_unit(rows.mib)
    for y, row in enumerate(rows.itertuples()):
        axis.barh(y, row.mib / per, 0.6, color="#D55E00")
        axis.annotate(f" {100 * row.share:.1f}%", (row.mib / per, y), va="center", fontsize=8)
    axis.set_yticks(
        range(len(rows)), [text if len(text) <= 70 else text[:67] + "..." for text in rows["where"]], fontsize=8
    )
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1.15 * rows.mib.max() / per)
    axis.grid(False, axis="y")
    axis.set_xlabel(f"kept by one block, {unit}")
    return figure


def checkpointing(frame) -> Figure:
    """Peak memory, its activations and the time of a step of each checkpointing strategy: bars as measured, a line as predicted."""
    figure, axes = _figure(12.0, 4.0, 1, 3)
    panels = (
        ("peak memory", "peak_mib", "predicted_peak_mib", "#0072B2"),
        ("activations at their peak", "activations_mib", "predicted_activations_mib", "#D55E00"),
        ("time of a step", "step_ms", "predicted_ms", "#999999"),
    )
    for axis, (title, measured, expected, colour) in zip(axes[0], panels, strict=True):
        per, unit = (1, "ms") if measured == "step_ms" else _memory_unit(frame[measured].dropna())
        for x, row in enumerate(frame.to_dict("records")):
            if row["status"] == "ok":
                axis.bar(x, row[measured] / per, 0.7, color=colour, label="measured")
            else:
                axis.annotate(row["status"], (x, 0), ha="center", va="bottom", fontsize=8)
            if not np.isnan(row[expected]):
                axis.plot(
                    [x - 0.4, x + 0.4], [row[expected] / per] * 2, color="black", linewidth=1.6, label="predicted"
                )
        axis.set_xticks(range(len(frame)), frame["name"], rotation=35, ha="right", fontsize=8)
        axis.set_ylabel(f"{title}, {unit}")
        axis.set_ylim(bottom=0)
    _legend(figure, axes[0, :1])
    first = frame.iloc[0]
    figure.suptitle(
        f"{first['size']}, batch {first.batch} x {first.context_length} tokens, {first['dtype']}, {first.kernel}; {first.device}",
        fontsize=9,
        color="#555555",
    )
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
