"""The few shapes of figure the report uses: lines, bars, stacked, heatmap, timeline, roofline, and save.

Each takes a tidy DataFrame and the names of its columns, and returns a matplotlib Figure, made without pyplot. All take
    panel: a column, or a list of them, whose values get a panel each; of two the first goes down, the second across;
        per_row: how many panels side by side instead; share_x, share_y: True, False, "row" or "col"
    styles: series -> Style or (label, colour, dashed); colour None: the palette's next; dashed: series to dash that
        have no style. Bars are hatched where lines are dashed. A series has one colour in all panels, of its own
    xlabel, ylabel: the axes' names with units, by default the columns'; title: of the figure
    reference: a value, or names and values, of dotted lines across all panels
Points without a value (NaN) are gaps. Without any value the figure says "no data". A missing column is a ValueError.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import SVG, Image
from matplotlib import rc_context
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lmsys.records import atomic_path, significant

# Okabe and Ito's colours but black and yellow, which a dark or a light page swallows, and six more.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PALETTE += ("#7A5FC0", "#9A7B4F", "#8C8C8C", "#C23B5E", "#9BA32B", "#2FB5B5")
INK = "#777777"  # text and axes: a contrast of 4.5 to white, 4 to a dark page
SMALL, TEXT = 9, 10  # points; 9 are 11 px where the widest figure, of 10 inches, is 880 px wide
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")
LARGE = 600_000  # bytes; a figure whose SVG is larger, with some 5,000 marks, is shown as PNG


class Style(NamedTuple):
    """How a series looks. dashed may also be a matplotlib line style: ":" dotted, "none" points alone."""

    label: str
    colour: str | None = None
    dashed: bool | str = False

    @property
    def line(self) -> str:
        return self.dashed if isinstance(self.dashed, str) else "--" if self.dashed else "-"

    @property
    def patch(self) -> dict[str, Any]:
        return {"facecolor": self.colour, "hatch": "//" if self.dashed else None, "edgecolor": "white", "linewidth": 0}


def save(figure: Figure, path: str | Path, alt: str) -> Any:
    """Write NAME.svg and NAME.png (200 dpi), each atomically; what a notebook shows: one of them with alternative text.

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
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.family": "sans-serif"}):
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200, transparent=True)
        with atomic_path(vector) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Title": alt, "Date": None})
    figure.clear()
    if vector.stat().st_size > LARGE:
        return Image(filename=path, alt=alt)
    return SVG(filename=vector, metadata={"alt": alt})


def _styles(names: Iterable, styles: Mapping | None, dashed: Collection | None) -> dict[Any, Style]:
    """A style for each series; no two have the same colour."""
    names = list(dict.fromkeys(names))
    given = {name: Style(*styles[name]) for name in names if styles and name in styles}
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


def _text(value: Any, column: str = "") -> str:
    """A value as a label; with its column's name where it does not speak for itself."""
    name = column.replace("_", " ")
    if isinstance(value, bool | np.bool_):
        return (name or "yes") if value else f"not {name}" if name else "no"
    return f"{name} {value:,.10g}".strip() if isinstance(value, int | float | np.number) else str(value)


def _on(colour: Any) -> str:
    """Black or white: what reads on a colour."""
    return "black" if np.dot(to_rgb(colour), (0.3, 0.59, 0.11)) > 0.55 else "white"


def _key(colour: str = INK, line: str = "-", marker: str | None = None) -> Line2D:
    """A line of a legend."""
    return Line2D([], [], color=colour, linestyle=line, marker=marker, markersize=5)


def _write(axis, text: str, at: tuple, offset=(0, 0), colour: str = INK, **style: Any) -> None:
    """A small text at a point, centred unless style says else; offset in points."""
    style = {"ha": "center", "va": "center", "fontsize": SMALL, "annotation_clip": False} | style
    axis.annotate(text, at, offset, textcoords="offset points", color=colour, **style)


class _Board:
    """A figure with a panel for each value of `panel`, all dressed alike, and its series' styles.

    Args:
        columns: that the frame must have; the first holds the values. by: of the series; None: all rows are one.
        lanes: columns whose values lie below each other in a panel and set its height; None: panels are plain.
    Attributes:
        panels: [(axis, rows)], empty without data. by: the column of series in rows. looks: series -> Style.
    """

    def __init__(self, frame, columns, by, lanes, *, panel=None, styles=None, dashed=None, reference=None, **layout):
        names = [panel] if isinstance(panel, str) else list(panel or ())
        missing = {*columns, *names, by} - {None, *frame.columns}
        if missing and len(frame.columns):
            raise ValueError(f"figure: no column {sorted(missing)}; the frame has {', '.join(map(str, frame.columns))}")
        self.xlabel, self.ylabel, title = (layout.pop(name, None) for name in ("xlabel", "ylabel", "title"))
        self.by, self.panels, self.looks, self.references = by or "_series", [], {}, {}
        if frame.empty or frame[columns[0]].isna().all():
            self.figure = Figure(figsize=(8.0, 2.0), layout="constrained")
            self.figure.text(0.5, 0.45, "no data", ha="center", va="center", fontsize=TEXT, color=INK)
        else:
            frame = frame if by else frame.assign(_series=columns[0])
            self.looks = _styles(frame[self.by], styles, dashed)
            named = reference if isinstance(reference, Mapping) else {_text(reference): reference}
            self.references = {} if reference is None else dict(named)
            self._make_panels(frame, names, lanes, **layout)
        if title:
            self.figure.suptitle(title, x=0.01, ha="left", fontsize=TEXT + 1, color=INK)

    def _make_panels(self, frame, names, lanes, per_row=None, width=None, share_x=False, share_y=False) -> None:
        groups = list(frame.groupby(names, sort=False, dropna=False)) if names else [((), frame)]
        if len(names) == 2 and per_row is None:
            codes = [pd.factorize(pd.Series(values))[0] for values in zip(*(key for key, _ in groups), strict=True)]
            places = list(zip(*codes, strict=True))
        else:
            per_row = min(per_row or {4: 2}.get(len(groups), 3), len(groups))
            places = [divmod(i, per_row) for i in range(len(groups))]
        down, across = (max(place[i] for place in places) + 1 for i in (0, 1))
        heights = [0.0] * down
        for (_, rows), (i, _) in zip(groups, places, strict=True):
            inches = 0.7 + 0.32 * len(rows[lanes].drop_duplicates()) if lanes else max(2.7, 4.6 - 0.7 * across)
            heights[i] = max(heights[i], inches)
        width = width or (10.0 if across > 1 else 8.0)
        self.inches = 0.85 * width / across  # of a panel's width
        self.figure = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained")
        axes = self.figure.subplots(down, across, squeeze=False, height_ratios=heights, sharex=share_x, sharey=share_y)
        for place in set(np.ndindex(down, across)) - set(places):
            axes[place].set_visible(False)
        for (key, rows), (i, j) in zip(groups, places, strict=True):
            axis, lowest = axes[i, j], not share_x or (i + 1, j) not in places
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[:].set_color(INK)
            axis.grid(True, color=(0.5, 0.5, 0.5, 0.22), linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(colors=INK, labelsize=SMALL, which="both", labelbottom=lowest)
            axis.set_title(", ".join(map(_text, key, names)), loc="left", fontsize=TEXT, color=INK)
            axis.xaxis.label.set_visible(lowest)
            axis.yaxis.label.set_visible(j == 0)
            self.panels.append((axis, rows))

    def finish(self, xlabel: str, ylabel: str, entries: Mapping | None, *, lying: bool = False) -> Figure:
        """Names of the axes (changed over where bars lie), reference lines, a legend below unless it is None."""
        names = [xlabel if self.xlabel is None else self.xlabel, ylabel if self.ylabel is None else self.ylabel]
        for axis, _ in self.panels:
            axis.set_xlabel(names[lying], fontsize=TEXT, color=INK)
            axis.set_ylabel(names[not lying], fontsize=TEXT, color=INK)
            for value in self.references.values():
                (axis.axvline if lying else axis.axhline)(value, color=INK, linestyle=":", linewidth=1.2)
        entries = None if entries is None else {**entries, **{name: _key(line=":") for name in self.references}}
        if entries:
            widest = 5.6 * max(map(len, entries)) + 40
            columns = max(1, min(len(entries), int(72 * self.figure.get_figwidth() / widest)))
            style = {"frameon": False, "fontsize": SMALL, "labelcolor": INK, "ncols": columns}
            self.figure.legend(list(entries.values()), list(entries), loc="outside lower center", **style)
        return self.figure

    def keys(self) -> dict[str, Any]:
        """The legend of bars or areas."""
        return {look.label: Patch(**look.patch) for look in self.looks.values()}


def _log_scale(axis, which: str, low: float, high: float, base: int = 10) -> None:
    """A logarithmic axis with plain numbers for values from low to high; linear around 0 where low is not above it."""
    line, set_scale = getattr(axis, f"{which}axis"), getattr(axis, f"set_{which}scale")
    if low <= 0:
        set_scale("symlog", base=base, linthresh=getattr(axis.dataLim, f"minpos{which}"))
    else:
        set_scale("log", base=base)
        line.set_major_locator(LogLocator(base=base, subs=(1, 2, 5) if base == 10 and high < 100 * low else (1,)))
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}" if abs(value) < 1e7 else f"{value:g}"))
    line.set_minor_formatter(NullFormatter())


def _categories(axis, categories: Iterable, horizontal: bool, inches: float) -> None:
    """Ticks with the names of categories; from the top down where bars lie."""
    names = [_text(name) for name in categories]
    if horizontal:
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
    else:
        wide = max(len(line) for name in names for line in name.split("\n")) * 0.08 > inches / len(names)
        axis.set_xticks(range(len(names)), names, rotation=35 if wide else 0, ha="right" if wide else "center")
    axis.grid(False, axis="y" if horizontal else "x")


def _value_text(row: Mapping, value: str, annotate: bool | str) -> str:
    """What stands at a bar or in a cell: a column's text, or the value in a format or in three digits."""
    if isinstance(annotate, str) and annotate in row:
        return "" if pd.isna(row[annotate]) else str(row[annotate])
    if not annotate or pd.isna(row[value]):
        return ""
    return annotate.format(row[value]) if isinstance(annotate, str) else significant(row[value])


# --- The shapes -------------------------------------------------------------------------------------


def lines(frame, x, y, by=None, *, low=None, high=None, log="", zero=False, nested=False, **more) -> Figure:
    """A line a series, named at its end in a single panel, else in a legend; series of one point are labelled points.

    Args:
        x: numbers, or names in their order. by: of two columns the first gives the colour, the second the line style.
        low, high: columns with the ends of the spread: a band, or whiskers at points and where by has two columns.
        log: "x", "y" or "xy"; followed by log2 ("xlog2", "xylog2") x counts in powers of two.
        nested: series lie on each other; each is thinner than the one before, so that all show.
        zero: the y axis begins at 0. more: as above; panels share their axes by default.
    """
    by, *dash_by = [by] if isinstance(by, str) or by is None else by
    letters, base = log.removesuffix("log2"), 2 if log.endswith("log2") else 10
    if set(letters) - set("xy"):
        raise ValueError(f'figure: log is "{log}"; it takes "", "x", "y", "xy", "xlog2" or "xylog2"')
    more = {"share_x": True, "share_y": True} | more
    board = _Board(frame, (y, x, low, high, *dash_by), by, None, **more)
    if not board.panels:
        return board.figure
    named, looks, ends = not pd.api.types.is_numeric_dtype(frame[x]), board.looks, []
    ticks = list(dict.fromkeys(frame[x])) if named else sorted(set(frame[x].dropna()))
    dashes = dict(zip(dict.fromkeys(frame[dash_by[0]]), itertools.cycle(LINES), strict=False)) if dash_by else {}
    for axis, rows in board.panels:
        for number, ((name, *dash), points) in enumerate(rows.groupby([board.by, *dash_by], sort=False, dropna=False)):
            points = points.assign(_x=points[x].map(ticks.index) if named else points[x]).sort_values("_x")
            at, values, look = points["_x"], points[y], looks[name]
            style = {"color": look.colour, "linestyle": dashes[dash[0]] if dash else look.line}
            style["linewidth"] = 1.3 + (len(looks) - 1 - number) * min(2.5, 12 / len(looks)) if nested else 1.7
            marked = style["linestyle"] == "none" or (len(points) <= 40 and not nested)
            axis.plot(at, values, marker="o" if marked else None, markersize=4, **style)
            if low and high and len(points) > 1 and look.line != "none" and not dash_by:
                axis.fill_between(at, points[low], points[high], color=look.colour, alpha=0.18, linewidth=0)
            elif low and high:
                whiskers = np.maximum([values - points[low], points[high] - values], 0)
                axis.errorbar(at, values, yerr=whiskers, fmt="none", ecolor=look.colour, capsize=2.5, linewidth=1)
            if values.notna().any():
                ends.append((look.label, look.colour, at[values.notna()].iloc[-1], values.dropna().iloc[-1]))
        if "x" in letters and not named:
            _log_scale(axis, "x", ticks[0], ticks[-1], base)
        if "y" in letters:
            _log_scale(axis, "y", rows[y].min(), rows[y].max())
        if named or ("x" in letters and len(ticks) <= 12):
            labels = [_text(tick) for tick in ticks]
            turned = 40 if 0.085 * sum(map(len, labels)) > board.inches else 0
            axis.set_xticks(range(len(ticks)) if named else ticks, labels, rotation=turned)
            axis.xaxis.set_minor_locator(NullLocator())
    entries = {look.label: _key(look.colour, look.line, "o") for look in looks.values()} if len(looks) > 1 else {}
    entries |= {_text(value): _key(line=line) for value, line in dashes.items()}
    direct = len(board.panels) == 1 and not dash_by and len(ends) <= 9
    figure = board.finish(x, y, None if direct else entries)
    for axis, _ in board.panels if zero and "y" not in letters else ():
        axis.set_ylim(bottom=0)
    if direct and (len(looks) > 1 or board.references):
        scattered = frame[y].notna().sum() == len(ends)
        ends = [*(ends if len(looks) > 1 else ()), *((name, INK, None, at) for name, at in board.references.items())]
        _label_ends(board.panels[0][0], ends, scattered)
    return figure


def _label_ends(axis, ends: Sequence[tuple], scattered: bool) -> None:
    """Names (label, colour, x, y): at scattered points, else right of the axis at their height, moved apart."""
    gap = 1.25 * SMALL / (72 * 0.75 * axis.figure.get_figheight())
    wanted = [(axis.transScale + axis.transLimits).transform((axis.get_xlim()[1], end[3]))[1] for end in ends]
    order, steps = np.argsort(wanted), gap * np.arange(len(ends))
    heights = np.maximum.accumulate(np.sort(wanted) - steps) + steps
    for i, height in zip(order, heights - max(0.0, heights[-1] - 1.0), strict=True):
        label, colour, x, y = ends[i]
        if scattered and x is not None:
            _write(axis, label, (x, y), (6, 6), colour, ha="left")
        else:
            _write(axis, label, (1.0, height), (8, 0), colour, ha="left", xycoords="axes fraction")


def bars(
    frame, x, y, by=None, *, low=None, high=None, predicted=None, horizontal=False, annotate=True, log=False, **more
) -> Figure:
    """Bars at the categories of x, one a series beside each other; with by equal to x each has its own colour.

    Args:
        x, xlabel: the categories; y, ylabel: the values, whichever way the bars lie.
        low, high: columns with the ends of a whisker. predicted: a column of values, drawn as a line across the bar.
        annotate: what stands at each bar: True for the value in three digits, a format such as "{:.1f}", or a column of
            texts, which also stand where there is no value ("oom"). log: the axis of values.
        more: as above, and share: panels have one scale of values; True by default.
    """
    frame = frame.reset_index(drop=True)
    more.setdefault("share_x" if horizontal else "share_y", more.pop("share", True))
    board = _Board(frame, (y, x, low, high, predicted), by, list({x, by or x}) if horizontal else None, **more)
    texts = pd.Series([_value_text(row, y, annotate) for row in frame.to_dict("records")], dtype=str)
    longest, tops = 0.08 * texts.str.len().max() + 0.1, [column for column in (y, high, predicted) if column]
    for axis, rows in board.panels:
        places, categories = pd.factorize(rows[x], use_na_sentinel=False)
        groups = rows.groupby(places)[y]
        width = 0.84 / groups.size().max()
        at = places + (groups.cumcount() - (groups.transform("size") - 1) / 2) * width
        turned = longest > width * board.inches / len(categories) and not horizontal
        for index, row in rows.iterrows():
            look, place, end = board.looks[row[board.by]], at[index], row[tops].max()
            (axis.barh if horizontal else axis.bar)(place, row[y], 0.94 * width, **look.patch)
            ends, missing = (place, 0.0 if pd.isna(end) else end), ("data", "axes fraction" if pd.isna(end) else "data")
            if horizontal:
                _write(axis, texts[index], ends[::-1], (4, 0), xycoords=missing[::-1], ha="left")
            else:
                _write(axis, texts[index], ends, (0, 3), xycoords=missing, va="bottom", rotation=90 * turned)
        if low and high:
            whisker = np.maximum([rows[y] - rows[low], rows[high] - rows[y]], 0)
            where = (rows[y], at, None, whisker) if horizontal else (at, rows[y], whisker, None)
            axis.errorbar(*where, fmt="none", ecolor=INK, elinewidth=1.2)
        if predicted:
            across = axis.vlines if horizontal else axis.hlines
            across(rows[predicted], at - width / 2, at + width / 2, color=INK, linewidth=2.2)
        if log:
            _log_scale(axis, "x" if horizontal else "y", frame[y].min(), frame[y].max())
            limits = frame[y].min() / 2, frame[tops].max().max() * (4 if turned else 2)
            (axis.set_xlim if horizontal else axis.set_ylim)(*limits)
        else:
            room = min(0.6, longest / board.inches if horizontal else longest / 2.5 if turned else 0.1)
            axis.margins(**{"x" if horizontal else "y": room / (1 - room)})
        _categories(axis, categories, horizontal, board.inches)
    entries = (board.keys() if by and by != x else {}) | ({"predicted": _key()} if predicted else {})
    return board.finish(x, y, entries, lying=horizontal)


def stacked(frame, x, y, by, *, areas=False, phases=None, **more) -> Figure:
    """Series on top of each other: bars at the categories of x or, with areas, steps over the numbers of x.

    Args:
        phases: with areas, a column that names stretches of x; dotted lines part them.
        more: as above, and share: panels have one scale of values; False by default.
    """
    more.setdefault("share_y", more.pop("share", False))
    board = _Board(frame, (y, x, phases), by, None, **more)
    for axis, rows in board.panels:
        table = rows.pivot_table(index=x, columns=by, values=y, aggfunc="sum", sort=False).fillna(0.0)
        table = table.reindex(columns=[name for name in board.looks if name in table])
        if areas:
            table = table.sort_index()
            colours = [board.looks[name].colour for name in table]
            axis.stackplot(table.index, table.T.to_numpy(), colors=colours, linewidth=0, step="post")
            low, high = table.index.min(), table.index.max()
            axis.margins(x=0, y=0.1)
            for name, part in rows.groupby(phases, sort=False) if phases else ():
                begin, end = part[x].min(), part[x].max()
                axis.axvline(begin, color=INK, linewidth=0.9, linestyle=":")
                if (end - begin) * board.inches > 0.08 * len(name) * (high - low):
                    _write(axis, name, ((begin + end) / 2, 1.0), va="top", xycoords=("data", "axes fraction"))
        else:
            tops = table.cumsum(axis=1)
            for name, values in table.items():
                foot = tops[name] - values
                axis.bar(np.arange(len(table)), values, 0.8, bottom=foot, **board.looks[name].patch)
            _categories(axis, table.index, False, board.inches)
    return board.finish(x, y, board.keys())


def heatmap(frame, rows, columns, value, *, annotate=True, relative=None, **more) -> Figure:
    """A coloured cell a row and column, panels one below the other. Of styles only the labels count.

    Args:
        columns: a column or several, whose values stand below each other. annotate: as in bars.
        relative: "column max": the colour says the share of the column's largest value, the text the value.
    """
    if relative not in (None, "column max"):
        raise ValueError(f'figure: relative is "{relative}"; it takes "column max" or None')
    across = [columns] if isinstance(columns, str) else list(columns)
    cells = len(frame[across].drop_duplicates()) if len(frame) else 0
    more = {"per_row": 1, "width": min(13.0, max(7.0, 0.62 * cells + 2.8))} | more
    board = _Board(frame, (value, rows, *across), rows, [rows], **more)
    for axis, group in board.panels:
        names = pd.Series(["\n".join(map(_text, key)) for key in group[across].itertuples(index=False)])
        (down, row_names), (along, column_names) = pd.factorize(group[rows]), pd.factorize(names)
        table = np.full((len(row_names), len(column_names)), np.nan)
        table[down, along] = group[value]
        if relative:
            table = table / pd.DataFrame(table).max().to_numpy()
        image = axis.imshow(table, aspect="auto", vmin=0 if relative else None, vmax=1 if relative else None)
        for i, j, cell in zip(down, along, group.to_dict("records"), strict=True):
            colour = INK if np.isnan(table[i, j]) else _on(image.to_rgba(table[i, j])[:3])
            _write(axis, _value_text(cell, value, annotate), (j, i), colour=colour)
        axis.grid(False)
        axis.set_xticks(range(len(column_names)), column_names)
        axis.set_yticks(range(len(row_names)), [board.looks[name].label for name in row_names])
        bar = board.figure.colorbar(image, ax=axis, pad=0.01)
        bar.set_label(f"share of {relative}" if relative else value, color=INK, fontsize=SMALL)
        bar.ax.tick_params(colors=INK, labelsize=SMALL)
        bar.outline.set_visible(False)
    return board.finish(", ".join(across), "", {})


def timeline(frame, *, lane, start, duration, name=None, colour=None, **more) -> Figure:
    """Bars in lanes, from the top in the order in which lanes appear; panels one below the other, with one scale.

    Args:
        start, duration: columns, in the unit of xlabel, which is "time, ms" by default.
        name: a column of texts that stand in the bars that are wide enough.
        colour: the column that gives the colour; by default the lane.
    """
    more = {"per_row": 1, "width": 10.0, "share_x": True} | more
    columns, by = (duration, start, lane, name), colour or lane
    board = _Board(frame, columns, by, [lane], **more)
    for axis, rows in board.panels:
        lanes = [each for each in dict.fromkeys(frame[lane]) if each in set(rows[lane])]
        span = (rows[start] + rows[duration]).max() - rows[start].min()
        for (each, key), bars in rows.groupby([lane, by], sort=False):
            at, shade = lanes.index(each), board.looks[key].colour
            axis.broken_barh(list(zip(bars[start], bars[duration], strict=True)), (at - 0.4, 0.8), facecolors=shade)
            for text, begin, length in zip(bars[name] if name else (), bars[start], bars[duration], strict=False):
                if length * board.inches > 0.08 * (len(text) + 1) * span:
                    _write(axis, text, (begin + length / 2, at), colour=_on(shade))
        axis.margins(x=0)
        _categories(axis, lanes, True, board.inches)
    return board.finish("time, ms", "", board.keys() if by != lane else {})


def roofline(frame, *, intensity, rate, by, ceilings, bandwidths, marker=None, counted=None, **more) -> Figure:
    """Rates over arithmetic intensity, on log axes, under what the device reaches.

    Args:
        intensity: FLOPs a byte. rate: TFLOP/s. by: gives the colour; marker: a column that gives the marker's shape.
        ceilings: name -> TFLOP/s. bandwidths: name -> TB/s, which slope up to the highest ceiling.
        counted: a column with a second intensity, such as a profiler's; hollow, joined to the first.
    """
    board = _Board(frame, (rate, intensity, marker, counted), by, None, **{"width": 9.0} | more)
    entries = {look.label: _key(look.colour, "none", "o") for look in board.looks.values()}
    for axis, rows in board.panels:
        shapes = dict(zip(dict.fromkeys(frame[marker]), itertools.cycle(MARKERS), strict=False)) if marker else {}
        for row in rows.to_dict("records"):
            style = {"color": board.looks[row[by]].colour, "marker": shapes.get(row.get(marker), "o"), "markersize": 7}
            axis.plot(row[intensity], row[rate], linestyle="none", **style)
            if counted and pd.notna(row[counted]):
                both = [row[intensity], row[counted]], [row[rate]] * 2
                axis.plot(*both, linewidth=0.9, markerfacecolor="none", markevery=[1], **style)
        entries |= {_text(value, marker): _key(line="none", marker=shape) for value, shape in shapes.items()}
        xs = np.geomspace(rows[intensity].min() / 3, rows[intensity].max() * 4, 200)
        highest = max(ceilings.values(), default=np.inf)
        roofs = [(name, np.minimum(value * xs, highest)) for name, value in bandwidths.items()]
        roofs += [(name, np.full(len(xs), value)) for name, value in ceilings.items()]
        for (name, ys), line in zip(roofs, itertools.cycle(LINES), strict=False):
            axis.plot(xs, ys, color=INK, linestyle=line, linewidth=1.3)
            entries[name] = _key(line=line)
        _log_scale(axis, "x", xs[0], xs[-1])
        _log_scale(axis, "y", *axis.dataLim.intervaly)
        axis.margins(x=0)
    return board.finish("FLOPs for each byte of device memory", "TFLOP/s", entries)
