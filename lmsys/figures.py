"""The few shapes of figure the report uses: lines, bars, stacked, heatmap, timeline, roofline, and save.

Each takes a tidy DataFrame and names of its columns and returns a matplotlib Figure, made without pyplot. What they have in common:
    by: the column whose values are the series. A series has one colour in all panels of the figure.
    panel: a column, or a list of them, whose values get a panel each; of two columns the first goes down, the second across.
    styles: series -> Style or (label, colour, dashed); colour None: the palette's next. Bars are hatched where lines are dashed.
    dashed: series to dash that have no style.
    xlabel, ylabel: the axes' names with units; by default the columns' names.
Points without a value (NaN) are gaps. Without any value the figure says "no data".
"""

from __future__ import annotations

import base64
import colorsys
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lmsys.records import atomic_path, significant

# Okabe and Ito's colours without black and yellow, which vanish on a dark and on a light page, and six more that keep apart from them.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PALETTE += ("#7A5FC0", "#9A7B4F", "#8C8C8C", "#C23B5E", "#9BA32B", "#2FB5B5")
INK = "#777777"  # text and axes: a contrast of 4.5 to white, 4 to a dark page
GRID = (0.5, 0.5, 0.5, 0.22)
WIDTH, SMALL, TEXT, TITLE = 10.0, 9, 10, 11  # inches; points: 9 are 11 px where the figure is 880 px wide
LINE_STYLES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")
MANY_MARKS = 5000  # a figure with more is shown as PNG


class Style(NamedTuple):
    """How a series looks. dashed may also be a matplotlib line style: ":" dotted, "none" points alone."""

    label: str
    colour: str | None = None
    dashed: bool | str = False

    @property
    def line(self) -> str:
        return self.dashed if isinstance(self.dashed, str) else "--" if self.dashed else "-"

    @property
    def hatch(self) -> str | None:
        return "//" if self.dashed else None


@dataclass(frozen=True)
class Saved:
    """A saved figure, which a notebook shows with its alternative text."""

    path: Path  # of the PNG
    alt: str
    shows: Path  # SVG or PNG

    def _repr_mimebundle_(self, include=None, exclude=None):
        kind = "image/svg+xml" if self.shows.suffix == ".svg" else "image/png"
        data = self.shows.read_bytes()
        content = data.decode() if kind == "image/svg+xml" else base64.b64encode(data).decode()
        return {kind: content, "text/plain": self.alt}, {kind: {"alt": self.alt}}


def save(figure: Figure, path: str | Path, alt: str) -> Saved:
    """Write NAME.svg and NAME.png (200 dpi) beside each other, each atomically, and close the figure.

    Args:
        path: NAME.png or NAME. alt: what the figure shows, for those who do not see it.
    Raises:
        ValueError: another suffix, or no alternative text.
    """
    path = Path(path)
    if path.suffix not in ("", ".png"):
        raise ValueError(f"figure {path}: the suffix is {path.suffix}; give NAME.png, or NAME without a suffix")
    if not alt.strip():
        raise ValueError(f"figure {path}: alt is empty; say in a sentence what the figure shows")
    path, vector = path.with_suffix(".png"), path.with_suffix(".svg")
    many = _marks(figure) > MANY_MARKS
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.family": "sans-serif"}):
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200, transparent=True)
        with atomic_path(vector) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Title": alt, "Date": None})
    figure.clear()
    return Saved(path, alt, path if many else vector)


def _marks(figure: Figure) -> int:
    """How many points, bars and areas a figure draws."""
    points = sum(len(line.get_xdata()) for axis in figure.axes for line in axis.lines)
    shapes = sum(len(collection.get_paths()) for axis in figure.axes for collection in axis.collections)
    return points + shapes + sum(len(axis.patches) for axis in figure.axes)


# --- What the shapes have in common -----------------------------------------------------------------


def _resolve(names: Iterable, styles: Mapping | None, dashed: Collection | None = None) -> dict[Any, Style]:
    """A style for each series; no two have the same colour."""
    names, styles = list(dict.fromkeys(names)), styles or {}
    given = {name: Style(*styles[name]) for name in names if name in styles}
    fixed = {to_hex(style.colour) for style in given.values() if style.colour}
    hues = (to_hex(colorsys.hsv_to_rgb(0.618 * i % 1, 0.6, 0.75)) for i in itertools.count(1))
    free = (colour for colour in itertools.chain(map(to_hex, PALETTE), hues) if colour not in fixed)
    resolved, used = {}, set()
    for name in names:
        style = given.get(name) or Style(_text(name), None, name in (dashed or ()))
        colour = to_hex(style.colour) if style.colour and to_hex(style.colour) not in used else next(free)
        used.add(colour)
        resolved[name] = style._replace(colour=colour)
    return resolved


def _text(value: Any) -> str:
    """A value as a label."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return (
        f"{value:,}"
        if isinstance(value, int | np.integer)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _panel_title(columns: Sequence[str], key: Sequence) -> str:
    parts = []
    for column, value in zip(columns, key, strict=True):
        name = column.replace("_", " ")
        if isinstance(value, bool | np.bool_):
            parts.append(name if value else f"not {name}")
        else:
            parts.append(value if isinstance(value, str) else f"{name} {_text(value)}")
    return ", ".join(parts)


def _groups(frame: pd.DataFrame, panel: str | Sequence[str] | None) -> list[tuple[tuple, pd.DataFrame]]:
    """(values of panel, rows) of each panel."""
    columns = [panel] if isinstance(panel, str) else list(panel or ())
    return list(frame.groupby(columns, sort=False, dropna=False)) if columns else [((), frame)]


class _Panel(NamedTuple):
    axis: Any
    rows: pd.DataFrame
    left: bool  # it has no panel beside it on the left
    bottom: bool  # nor one below


def _panels(
    frame: pd.DataFrame,
    panel: str | Sequence[str] | None,
    height,
    *,
    title: str | None = None,
    per_row: int | None = None,
    width: float | None = None,
    **shared: Any,
) -> tuple[Figure, list[_Panel]]:
    """A figure with a panel a value. height(rows, panels across): inches of a panel. shared: sharex, sharey."""
    columns = [panel] if isinstance(panel, str) else list(panel or ())
    groups = _groups(frame, panel)
    if len(columns) == 2 and per_row is None:
        down, across = (list(dict.fromkeys(frame[column])) for column in columns)
        places = [(down.index(first), across.index(second)) for (first, second), _ in groups]
    else:
        count = per_row or {1: 1, 2: 2, 4: 2}.get(len(groups), 3)
        places = [divmod(i, min(count, len(groups))) for i in range(len(groups))]
    down, across = (max(place[i] for place in places) + 1 for i in (0, 1))
    heights = [
        max(height(group, across) for (_, group), at in zip(groups, places, strict=True) if at[0] == i)
        for i in range(down)
    ]
    figure = Figure(figsize=(width or (WIDTH if across > 1 else 8.0), sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, height_ratios=heights, **shared)
    panels = []
    for (key, group), (i, j) in zip(groups, places, strict=True):
        axis = axes[i, j]
        bottom = (i + 1, j) not in places
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[:].set_color(INK)
        axis.tick_params(colors=INK, labelsize=SMALL, which="both")
        axis.grid(True, color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        if key:
            axis.set_title(_panel_title(columns, key), loc="left", fontsize=TEXT, color=INK)
        if shared.get("sharex"):
            axis.tick_params(labelbottom=bottom)
        panels.append(_Panel(axis, group, j == 0, bottom or not shared.get("sharex")))
    for i, j in set(np.ndindex(down, across)) - set(places):
        axes[i, j].set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE, color=INK)
    return figure, panels


def _no_data(title: str | None) -> Figure:
    figure = Figure(figsize=(8.0, 2.0), layout="constrained")
    figure.text(0.5, 0.45, "no data", ha="center", va="center", fontsize=TITLE, color=INK)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE, color=INK)
    return figure


def _check(frame: pd.DataFrame, *columns: str | None) -> None:
    missing = [column for column in columns if column is not None and column not in frame]
    if missing and len(frame.columns):
        raise ValueError(f"figure: no column {', '.join(missing)}; the frame has {', '.join(map(str, frame.columns))}")


def _named(panels: list[_Panel], xlabel: str, ylabel: str) -> None:
    """The axes' names, at the panels on the edge."""
    for panel in panels:
        if panel.bottom:
            panel.axis.set_xlabel(xlabel, fontsize=TEXT, color=INK)
        if panel.left:
            panel.axis.set_ylabel(ylabel, fontsize=TEXT, color=INK)


def _legend(figure: Figure, entries: Mapping[str, Any]) -> None:
    """One legend below all panels."""
    if entries:
        widest = 5.6 * max(map(len, entries)) + 40
        columns = max(1, min(len(entries), int(72 * figure.get_figwidth() / widest)))
        style = {"frameon": False, "fontsize": SMALL, "labelcolor": INK, "handlelength": 2.2}
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, **style)


def _swatches(styles: Iterable[Style]) -> dict[str, Patch]:
    return {s.label: Patch(facecolor=s.colour, hatch=s.hatch, edgecolor="white", linewidth=0) for s in styles}


def _log_scale(axis, which: str, low: float, high: float, base: int = 10) -> None:
    """A logarithmic axis with plain numbers for values from low to high; with values at or below 0 it is linear around 0."""
    line, set_scale = getattr(axis, f"{which}axis"), getattr(axis, f"set_{which}scale")
    if low <= 0:
        set_scale("symlog", base=base, linthresh=getattr(axis.dataLim, f"minpos{which}"))
    else:
        set_scale("log", base=base)
        line.set_major_locator(LogLocator(base=base, subs=(1, 2, 5) if base == 10 and high < 100 * low else (1,)))
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}" if abs(value) < 1e7 else f"{value:g}"))
    line.set_minor_formatter(NullFormatter())


def _on(colour: Any) -> str:
    """Black or white: what reads on a colour."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"


def _references(reference: float | Mapping[str, float] | None) -> dict[str, float]:
    return (
        dict(reference)
        if isinstance(reference, Mapping)
        else {}
        if reference is None
        else {_text(reference): reference}
    )


# --- The shapes -------------------------------------------------------------------------------------


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str | Sequence[str] | None = None,
    *,
    panel: str | Sequence[str] | None = None,
    low: str | None = None,
    high: str | None = None,
    spread: str = "band",
    log: str = "",
    styles: Mapping | None = None,
    dashed: Collection | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str | None = None,
    reference: float | Mapping[str, float] | None = None,
    direct_labels: bool = True,
    share_x: bool | str = True,
    share_y: bool | str = True,
    zero: bool = False,
    nested: bool = False,
    per_row: int | None = None,
) -> Figure:
    """A line a series; series of one point are labelled points.

    Args:
        x: numbers, or names in their order. by: of two columns the first gives the colour, the second the line style.
        low, high: columns with the ends of the spread, as "band" or "whiskers".
        log: "x", "y" or "xy"; followed by log2 ("xlog2", "xylog2") x counts in powers of two.
        reference: a value, or names and values, of horizontal lines. zero: the y axis begins at 0.
        nested: series lie on each other; each is thinner than the one before, so that all show.
        direct_labels: names at the ends of the lines of a single panel; else, and with several panels, a legend below.
        share_x, share_y: among panels: True, False, "row" or "col".
    """
    colour_by, *rest = [by] if isinstance(by, str) or by is None else by
    _check(frame, x, y, colour_by, *rest, low, high)
    if frame.empty or frame[y].notna().sum() == 0:
        return _no_data(title)
    letters, base = log.removesuffix("log2"), 2 if log.endswith("log2") else 10
    if set(letters) - set("xy"):
        raise ValueError(f'figure: log is "{log}"; it takes "", "x", "y", "xy", "xlog2" or "xylog2"')
    named = not pd.api.types.is_numeric_dtype(frame[x])
    ticks = list(dict.fromkeys(frame[x])) if named else sorted(set(frame[x].dropna()))
    if colour_by is None:
        frame, colour_by = frame.assign(**{"": ylabel or y}), ""
    looks = _resolve(frame[colour_by], styles, dashed)
    kinds = list(dict.fromkeys(frame[rest[0]])) if rest else []
    figure, panels = _panels(
        frame,
        panel,
        lambda _, across: {1: 3.9, 2: 3.2}.get(across, 2.7),
        title=title,
        per_row=per_row,
        sharex=share_x,
        sharey=share_y,
    )
    references, ends, scattered = _references(reference), [], []
    for axis, rows, _, _ in panels:
        for number, (key, points) in enumerate(rows.groupby([colour_by, *rest], sort=False, dropna=False)):
            look = looks[key[0]]
            points = points.sort_values(x, kind="stable") if not named else points
            at = points[x].map(ticks.index) if named else points[x]
            width = 1.3 + 0.7 * (len(looks) - 1 - number) if nested else 1.7
            line = LINE_STYLES[kinds.index(key[1]) % len(LINE_STYLES)] if rest else look.line
            marker = "o" if line == "none" or (len(points) <= 40 and not nested) else None
            axis.plot(at, points[y], color=look.colour, linestyle=line, linewidth=width, marker=marker, markersize=4)
            if low and high and spread == "band":
                axis.fill_between(at, points[low], points[high], color=look.colour, alpha=0.18, linewidth=0)
            elif low and high:
                ends_of = np.maximum([points[y] - points[low], points[high] - points[y]], 0)
                axis.errorbar(at, points[y], yerr=ends_of, fmt="none", ecolor=look.colour, capsize=2.5, linewidth=1)
            known = points[y].notna()
            if known.any():
                ends.append((look.label, look.colour, at[known].iloc[-1], points[y][known].iloc[-1]))
            scattered.append(known.sum() <= 1)
        for value in references.values():
            axis.axhline(value, color=INK, linestyle=":", linewidth=1.2)
        if "x" in letters and not named:
            _log_scale(axis, "x", ticks[0], ticks[-1], base)
        if "y" in letters:
            _log_scale(axis, "y", rows[y].min(), rows[y].max())
        if named or ("x" in letters and len(ticks) <= 12):
            labels = [_text(tick) for tick in ticks]
            crowded = sum(map(len, labels)) * 0.085 > figure.get_figwidth() * 0.85 / max(1, _across(panels))
            axis.set_xticks(range(len(ticks)) if named else ticks, labels, rotation=40 if crowded else 0)
            axis.xaxis.set_minor_locator(NullLocator())
    for panel_ in panels if zero and "y" not in letters else ():
        panel_.axis.set_ylim(bottom=0)
    _named(panels, x if xlabel is None else xlabel, y if ylabel is None else ylabel)
    direct = direct_labels and len(panels) == 1 and not rest and len(ends) + len(references) <= 9
    if direct and all(scattered):
        for label, colour, at, value in ends:
            panels[0].axis.annotate(
                label, (at, value), xytext=(6, 3), textcoords="offset points", color=colour, fontsize=SMALL
            )
    elif direct and (len(looks) > 1 or references):
        _label_ends(panels[0].axis, ends + [(label, INK, None, value) for label, value in references.items()])
    elif len(looks) > 1 or references or rest:
        entries = {
            s.label: Line2D([], [], color=s.colour, linestyle="-" if rest else s.line, marker="o", markersize=4)
            for s in looks.values()
        }
        entries |= {_text(k): Line2D([], [], color=INK, linestyle=LINE_STYLES[i % 4]) for i, k in enumerate(kinds)}
        _legend(figure, entries | {label: Line2D([], [], color=INK, linestyle=":") for label in references})
    return figure


def _across(panels: list[_Panel]) -> int:
    return panels[0].axis.get_subplotspec().get_gridspec().ncols


def _label_ends(axis, ends: Sequence[tuple]) -> None:
    """Names right of the axis at the height of the lines' ends (label, colour, x, y), moved apart where they would overlap."""
    height = 72 * axis.figure.get_figheight() * 0.75
    scale = axis.transScale + axis.transLimits
    right = axis.get_xlim()[1]
    wanted = [scale.transform((right if x is None else x, y)) for _, _, x, y in ends]
    order, gap = sorted(range(len(ends)), key=lambda i: wanted[i][1]), 1.25 * SMALL / height
    heights = [max(0.0, wanted[i][1]) for i in order]
    for k in range(1, len(order)):
        heights[k] = max(heights[k], heights[k - 1] + gap)
    heights[-1] = min(heights[-1], max(1.0, gap * len(heights)))
    for k in reversed(range(len(order) - 1)):
        heights[k] = min(heights[k], heights[k + 1] - gap)
    for i, at in zip(order, heights, strict=True):
        label, colour, _, _ = ends[i]
        far = wanted[i][0] < 0.9 or abs(at - wanted[i][1]) > gap
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7} if far else None
        axis.annotate(
            label,
            tuple(wanted[i]),
            xycoords="axes fraction",
            xytext=(1.02, at),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=SMALL,
            arrowprops=arrow,
        )


def bars(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str | None = None,
    *,
    panel: str | Sequence[str] | None = None,
    low: str | None = None,
    high: str | None = None,
    horizontal: bool = False,
    annotate: bool | str = True,
    predicted: str | None = None,
    log: bool = False,
    styles: Mapping | None = None,
    dashed: Collection | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str | None = None,
    reference: float | Mapping[str, float] | None = None,
    share: bool = True,
    per_row: int | None = None,
) -> Figure:
    """Bars grouped by the values of x, one a series; with by equal to x each bar has its own colour.

    Args:
        x, xlabel: the categories; y, ylabel: the values, whichever way the bars lie.
        low, high: columns with the ends of a whisker.
        annotate: what stands at each bar: True for the value in three digits, a format such as "{:.1f}", or a column of texts, which
            also stand where there is no value ("oom").
        predicted: a column of values, drawn as a black or white line across the bar. log: the axis of values.
        share: panels have one scale of values.
    """
    _check(frame, x, y, by, low, high, predicted)
    if frame.empty or frame[y].notna().sum() == 0:
        return _no_data(title)
    looks = _resolve(frame[by] if by else [y], styles, dashed)
    ends = [column for column in (y, high, predicted) if column]

    def height(rows: pd.DataFrame, across: int) -> float:
        return 0.24 * len(rows) + 0.1 * rows[x].nunique() + 0.6 if horizontal else 3.6 if across == 1 else 3.0

    shared = {"sharex" if horizontal else "sharey": share}
    figure, panels = _panels(frame, panel, height, title=title, per_row=per_row, **shared)
    references = _references(reference)
    for axis, rows, _, _ in panels:
        places, categories = pd.factorize(rows[x], use_na_sentinel=False)
        beside = rows.groupby(places)[y]
        width = 0.84 / beside.size().max()
        at = places + (beside.cumcount() - (beside.transform("size") - 1) / 2) * width
        series = [looks[name] for name in rows[by]] if by else [looks[y]] * len(rows)
        style = {"color": [s.colour for s in series], "hatch": [s.hatch for s in series], "edgecolor": "white"}
        (axis.barh if horizontal else axis.bar)(at, rows[y], 0.94 * width, linewidth=0, **style)
        if low and high:
            whisker = np.maximum([rows[y] - rows[low], rows[high] - rows[y]], 0)
            where = (rows[y], at, None, whisker) if horizontal else (at, rows[y], whisker, None)
            axis.errorbar(*where, fmt="none", ecolor=INK, elinewidth=1.2)
        if predicted:
            across = (axis.vlines if horizontal else axis.hlines)(rows[predicted], at - width / 2, at + width / 2)
            across.set(color=INK, linewidth=2.2)
        for value in references.values():
            (axis.axvline if horizontal else axis.axhline)(value, color=INK, linestyle=":", linewidth=1.2)
        for row, place in zip(rows.to_dict("records") if annotate else (), at, strict=False):
            _annotate(axis, _value_text(row, y, annotate), place, row[y], np.nanmax([row[c] for c in ends]), horizontal)
        _categories(axis, categories, horizontal)
        seen = frame if share else rows
        least, most = seen[y].min(), seen[ends].max().max()
        if log:
            _log_scale(axis, "x" if horizontal else "y", least, most)
            limits = least / 2, most * (most / least * 2) ** (0.2 if horizontal and annotate else 0.1)
        else:
            limits = min(0.0, 1.1 * least), max(most, 0.0) * (1.25 if horizontal and annotate else 1.1)
        if limits[0] < limits[1]:
            (axis.set_xlim if horizontal else axis.set_ylim)(*limits)
    names = (x if xlabel is None else xlabel, y if ylabel is None else ylabel)
    _named(panels, *(names[::-1] if horizontal else names))
    entries = _swatches(looks.values()) if by and by != x else {}
    entries |= {label: Line2D([], [], color=INK, linestyle=":") for label in references}
    _legend(figure, entries | ({"predicted": Line2D([], [], color=INK, linewidth=2.2)} if predicted else {}))
    return figure


def _value_text(row: Mapping, y: str, annotate: bool | str) -> str:
    """What stands at a bar or in a cell: a column's text, else the value in a format or in three digits."""
    if isinstance(annotate, str) and annotate in row:
        return "" if pd.isna(row[annotate]) else str(row[annotate])
    if pd.isna(row[y]):
        return ""
    return annotate.format(row[y]) if isinstance(annotate, str) else significant(row[y])


def _annotate(axis, text: str, at: float, value: float, end: float, horizontal: bool) -> None:
    """A text at the end of a bar, or at the foot of a place without one."""
    missing = pd.isna(value)
    foot, coordinates = (0.0, "axes fraction") if missing else (end, "data")
    style = {"textcoords": "offset points", "color": INK, "fontsize": SMALL, "annotation_clip": False}
    if horizontal:
        axis.annotate(text, (foot, at), (4, 0), xycoords=(coordinates, "data"), va="center", **style)
    else:
        turned = 90 if len(text) > 5 or missing else 0
        axis.annotate(
            text, (at, foot), (0, 2), xycoords=("data", coordinates), ha="center", va="bottom", rotation=turned, **style
        )


def _categories(axis, categories: Iterable, horizontal: bool) -> None:
    """Ticks with the names of categories; from the top down where bars lie."""
    names = [_text(name) for name in categories]
    if horizontal:
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(False, axis="y")
        return
    inches = axis.figure.get_figwidth() * 0.85 / axis.get_subplotspec().get_gridspec().ncols
    wide = max(len(line) for name in names for line in name.split("\n")) * 0.08 > inches / len(names)
    axis.set_xticks(range(len(names)), names, rotation=35 if wide else 0, ha="right" if wide else "center")
    if wide:
        axis.tick_params(axis="x", rotation=35)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(False, axis="x")


def stacked(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    *,
    areas: bool = False,
    panel: str | Sequence[str] | None = None,
    horizontal: bool = False,
    annotate: bool | str = False,
    total: bool | str = False,
    phases: str | None = None,
    predicted: str | None = None,
    styles: Mapping | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str | None = None,
    share: bool = False,
    per_row: int | None = None,
) -> Figure:
    """Series on top of each other: bars at the categories of x or, with areas, steps over the numbers of x.

    Args:
        annotate: the value in each part that is large enough: True or a format. total: the sum at the end of each bar, likewise.
        phases: with areas, a column that names stretches of x; they are parted by dotted lines.
        predicted: with bars, a column with a sum, the same in each row of a bar, drawn as a line across it.
        share: panels have one scale of values.
    """
    _check(frame, x, y, by, phases, predicted)
    if frame.empty or frame[y].notna().sum() == 0:
        return _no_data(title)
    looks = _resolve(frame[by], styles)

    def height(rows: pd.DataFrame, across: int) -> float:
        return 0.34 * rows[x].nunique() + 0.6 if horizontal else 3.4 if across == 1 else 2.9

    shared = {"sharex" if horizontal else "sharey": share}
    figure, panels = _panels(frame, panel, height, title=title, per_row=per_row, **shared)
    for axis, rows, _, _ in panels:
        table = rows.pivot_table(index=x, columns=by, values=y, aggfunc="sum", sort=False, observed=True)
        table = table[[name for name in looks if name in table]].fillna(0.0)
        if areas:
            table = table.sort_index()
            colours = [looks[name].colour for name in table]
            axis.stackplot(table.index, table.T.to_numpy(), colors=colours, linewidth=0, step="post")
            axis.set_xlim(table.index.min(), table.index.max())
            _phases(axis, rows, x, phases)
            axis.set_ylim(0, 1.08 * table.sum(axis=1).max())
            continue
        base, at, sums = np.zeros(len(table)), np.arange(len(table)), table.sum(axis=1)
        for name in table:
            values, look = table[name].to_numpy(), looks[name]
            place = {"left" if horizontal else "bottom": base, "color": look.colour, "hatch": look.hatch}
            (axis.barh if horizontal else axis.bar)(at, values, 0.78, linewidth=0, edgecolor="white", **place)
            for i in at if annotate else ():
                if values[i] > 0.06 * sums.max():
                    middle = (base[i] + values[i] / 2, i) if horizontal else (i, base[i] + values[i] / 2)
                    text = _value_text({y: values[i]}, y, annotate)
                    axis.text(*middle, text, ha="center", va="center", fontsize=SMALL, color=_on(look.colour))
            base = base + values
        for i, value in enumerate(sums if total else ()):
            _annotate(axis, _value_text({y: value}, y, total), i, value, value, horizontal)
        if predicted:
            expected = rows.groupby(x, sort=False)[predicted].first()
            across = (axis.vlines if horizontal else axis.hlines)(expected, at - 0.42, at + 0.42)
            across.set(color=INK, linewidth=2.2)
        _categories(axis, table.index, horizontal)
        (axis.set_xlim if horizontal else axis.set_ylim)(0, sums.max() * (1.2 if total and horizontal else 1.08))
    names = (x if xlabel is None else xlabel, y if ylabel is None else ylabel)
    _named(panels, *(names[::-1] if horizontal else names))
    entries = _swatches(looks.values())
    _legend(figure, entries | ({"predicted": Line2D([], [], color=INK, linewidth=2.2)} if predicted else {}))
    return figure


def _phases(axis, rows: pd.DataFrame, x: str, phases: str | None) -> None:
    low, high = axis.get_xlim()
    for name, part in rows.groupby(phases, sort=False) if phases else ():
        begin, end = part[x].min(), part[x].max()
        axis.axvline(begin, color=INK, linewidth=0.9, linestyle=":")
        if end - begin > 0.012 * len(name) * (high - low):
            axis.annotate(
                name, ((begin + end) / 2, 1.0), xycoords=("data", "axes fraction"), ha="center", va="top", color=INK
            )


def heatmap(
    frame: pd.DataFrame,
    rows: str,
    columns: str | Sequence[str],
    value: str,
    *,
    panel: str | Sequence[str] | None = None,
    annotate: bool | str = True,
    relative: str | None = None,
    styles: Mapping | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str | None = None,
    label: str | None = None,
) -> Figure:
    """A coloured cell a row and column, panels one below the other.

    Args:
        columns: a column or several, whose values stand below each other. annotate: as in bars.
        relative: "column max" or "row max": the colour says the share of the largest value there, the text the value.
        styles: only the labels of rows count. label: of the colour bar.
    """
    across = [columns] if isinstance(columns, str) else list(columns)
    _check(frame, rows, *across, value)
    if frame.empty or frame[value].notna().sum() == 0:
        return _no_data(title)
    if relative not in (None, "column max", "row max"):
        raise ValueError(f'figure: relative is "{relative}"; it takes "column max", "row max" or None')
    names = {name: Style(*(styles or {}).get(name, (_text(name),))).label for name in frame[rows]}
    wide = max(len(group[across].drop_duplicates()) for _, group in _groups(frame, panel))
    width = min(13.0, max(7.0, 0.62 * wide + 2.8))
    figure, panels = _panels(
        frame, panel, lambda group, _: 0.32 * group[rows].nunique() + 0.9, title=title, per_row=1, width=width
    )
    for axis, group, _, _ in panels:
        group = group.assign(_column=["\n".join(map(_text, key)) for key in group[across].itertuples(index=False)])
        places = [pd.factorize(group[name], use_na_sentinel=False) for name in (rows, "_column")]
        (down, row_names), (along, column_names) = places
        table = np.full((len(row_names), len(column_names)), np.nan)
        table[down, along] = group[value]
        if relative:
            most = pd.DataFrame(table).max(axis=0 if relative == "column max" else 1).to_numpy()
            table = table / (most if relative == "column max" else most[:, None])
        image = axis.imshow(table, vmin=0 if relative else None, vmax=1 if relative else None, aspect="auto")
        for i, j, cell in zip(down, along, group.to_dict("records"), strict=True):
            known = not np.isnan(table[i, j])
            text = _value_text(cell, value, annotate) if annotate else ""
            colour = _on(image.cmap(image.norm(table[i, j]))[:3]) if known else INK
            axis.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=colour)
        axis.grid(False)
        axis.set_xticks(range(len(column_names)), list(column_names))
        axis.set_yticks(range(len(row_names)), [names[name] for name in row_names])
        bar = figure.colorbar(image, ax=axis, pad=0.01)
        bar.set_label(label or (f"share of {relative}" if relative else value), color=INK, fontsize=SMALL)
        bar.ax.tick_params(colors=INK, labelsize=SMALL)
        bar.outline.set_visible(False)
    _named(panels[-1:], ", ".join(across) if xlabel is None else xlabel, ylabel or "")
    return figure


def timeline(
    frame: pd.DataFrame,
    *,
    lane: str,
    start: str,
    duration: str,
    name: str | None = None,
    colour: str | None = None,
    panel: str | Sequence[str] | None = None,
    styles: Mapping | None = None,
    xlabel: str = "time, ms",
    title: str | None = None,
    share_x: bool = True,
) -> Figure:
    """Bars in lanes, from the top in the order in which lanes appear; panels one below the other.

    Args:
        start, duration: columns, in the unit of xlabel. name: a column of texts that stand in the bars that are wide enough.
        colour: the column that gives the colour; by default the lane.
    """
    colour = colour or lane
    _check(frame, lane, start, duration, name, colour)
    if frame.empty or frame[duration].notna().sum() == 0:
        return _no_data(title)
    looks, lanes = _resolve(frame[colour], styles), list(dict.fromkeys(frame[lane]))
    figure, panels = _panels(
        frame,
        panel,
        lambda rows, _: 0.34 * rows[lane].nunique() + 0.6,
        title=title,
        per_row=1,
        width=WIDTH,
        sharex=share_x,
    )
    for axis, rows, _, _ in panels:
        here = [at for at in lanes if at in set(rows[lane])]
        seen = frame if share_x else rows
        low, high = seen[start].min(), (seen[start] + seen[duration]).max()
        for (at, key), spans in rows.groupby([lane, colour], sort=False):
            pieces = list(zip(spans[start], spans[duration], strict=True))
            axis.broken_barh(pieces, (here.index(at) - 0.4, 0.8), facecolors=looks[key].colour)
            for text, begin, length in zip(spans[name] if name else (), spans[start], spans[duration], strict=False):
                if length > 0.011 * (len(text) + 1) * (high - low):
                    middle = (begin + length / 2, here.index(at))
                    axis.text(*middle, text, ha="center", va="center", fontsize=SMALL, color=_on(looks[key].colour))
        _categories(axis, here, True)
        axis.set_xlim(low, high)
    _named(panels, xlabel, "")
    _legend(figure, _swatches(looks.values()) if colour != lane else {})
    return figure


def roofline(
    frame: pd.DataFrame,
    *,
    intensity: str,
    rate: str,
    by: str,
    ceilings: Mapping[str, float],
    bandwidths: Mapping[str, float],
    marker: str | None = None,
    counted: str | None = None,
    styles: Mapping | None = None,
    xlabel: str = "FLOPs for each byte of device memory",
    ylabel: str = "TFLOP/s",
    title: str | None = None,
) -> Figure:
    """Rates over arithmetic intensity, on log axes, under what the device reaches.

    Args:
        intensity: FLOPs a byte. rate: TFLOP/s. by: gives the colour; marker: a column that gives the marker's shape.
        ceilings: name -> TFLOP/s. bandwidths: name -> TB/s, which slope up to the highest ceiling.
        counted: a column with a second intensity, such as a profiler's; hollow, joined to the first.
    """
    _check(frame, intensity, rate, by, marker, counted)
    if frame.empty or (frame[rate].notna() & frame[intensity].notna()).sum() == 0:
        return _no_data(title)
    looks = _resolve(frame[by], styles)
    shapes = dict(zip(dict.fromkeys(frame[marker]), itertools.cycle(MARKERS), strict=False)) if marker else {}
    figure, [(axis, *_)] = _panels(frame, None, lambda *_: 4.6, title=title, width=9.0)
    entries = {}
    for row in frame.to_dict("records"):
        shape, look = shapes[row[marker]] if marker else "o", looks[row[by]]
        style = {"color": look.colour, "marker": shape, "markersize": 7}
        axis.plot(row[intensity], row[rate], linestyle="none", **style)
        if counted and pd.notna(row[counted]):
            xs, ys = [row[intensity], row[counted]], [row[rate]] * 2
            axis.plot(xs, ys, linewidth=0.9, markerfacecolor="none", markevery=[1], **style)
    for look in looks.values():
        entries[look.label] = Line2D([], [], color=look.colour, marker="o", linestyle="none")
    for value, shape in shapes.items():
        entries[f"{marker} {_text(value)}"] = Line2D([], [], color=INK, marker=shape, linestyle="none")
    low, high = frame[intensity].min() / 3, frame[intensity].max() * 4
    xs, top = np.geomspace(low, high, 200), max(ceilings.values(), default=np.inf)
    for (label, value), line in zip(bandwidths.items(), itertools.cycle(LINE_STYLES)):
        ys = np.minimum(value * xs, top)
        axis.plot(xs, ys, color=INK, linestyle=line, linewidth=1.3)
        axis.annotate(label, (xs[8], ys[8]), (4, -4), textcoords="offset points", va="top", color=INK, fontsize=SMALL)
    for (label, value), line in zip(ceilings.items(), itertools.cycle(LINE_STYLES[1:])):
        axis.axhline(value, color=INK, linestyle=line, linewidth=1.3)
        axis.annotate(label, (high, value), (0, 3), textcoords="offset points", ha="right", color=INK, fontsize=SMALL)
    axis.set_xlim(low, high)
    _log_scale(axis, "x", low, high)
    _log_scale(axis, "y", *axis.dataLim.intervaly)
    _named([_Panel(axis, frame, True, True)], xlabel, ylabel)
    _legend(figure, entries)
    return figure
