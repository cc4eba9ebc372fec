"""What the model benchmark says: tables, sentences made from its rows, figures and model_benchmark_report.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmsys import records
from lmsys.bench.model import COMPILED, DTYPES, NAME, WARMUP_COUNTS

MODES_SAID = {"forward": "forward", "forward_backward": "forward and backward", "full_step": "full step"}
_VARIANTS = {"dtype": "precision", "compiled": "compiled"}
_FLAT = 1.25  # times as long with twice the tokens: less, and the time does not follow the work


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    compiled = "" if row["compiled"] == "no" else f", compiled {row['compiled']}"
    what = f"{row['size']:<8} {row['batch']} x {row['context_length']:<6} {row['dtype']:<5} {row['mode']:<17}{compiled}"
    if row["status"] != "ok":
        return f"{what} {row['status']}: {row['note']}"
    std = "" if row["std_ms"] is None else f" +- {records.significant(row['std_ms'], 2)}"
    mfu = "" if row["mfu"] is None else f" {100 * row['mfu']:.1f}% MFU"
    return (
        f"{what} {records.significant(row['mean_ms'])}{std} ms ({row['samples']}) {row['tokens_per_s']:,.0f} tokens/s "
        f"{row['peak_mib']:,.0f} MiB{mfu}"
    )


def mean_std(mean: float, std: float) -> str:
    """A mean with its standard deviation, to the digits that the latter leaves."""
    return f"{records.significant(mean, 4)} ± {records.significant(std, 2)}"


def time_table(frame, mode: str) -> str:
    """Mean and standard deviation in ms of a mode as Markdown: a line for each size, precision and way of compiling, a column a context.

    A precision or way of compiling that all lines share has no column.
    """
    shown = frame[frame["mode"] == mode]
    contexts = sorted(set(shown.context_length))
    lines = []
    for key, group in shown.groupby(["size", "dtype", "compiled"], sort=False):
        line = dict(zip(("size", "dtype", "compiled"), key, strict=True))
        for row in group.itertuples():
            line[row.context_length] = mean_std(row.mean_ms, row.std_ms) if row.status == "ok" else row.status
        lines.append(line)
    columns = {"size": "size"}
    columns |= {name: head for name, head in _VARIANTS.items() if shown[name].nunique() > 1}
    return records.markdown_table(lines, columns | {n: f"{n:,} tokens, ms" for n in contexts})


def full_table(frame) -> str:
    """Throughput, MFU and memory of every point that ran, and why the others did not, as Markdown."""
    lines = []
    for row in frame.itertuples():
        line = {
            "size": row.size,
            "T": row.context_length,
            "dtype": row.dtype,
            "compiled": row.compiled,
            "mode": row.mode,
        }
        if row.status != "ok":
            lines.append(line | {"ms": row.status})
            continue
        lines.append(
            line
            | {
                "ms": records.spread(row.median_ms, row.p20_ms, row.p80_ms),
                "n": row.samples,
                "tokens": f"{row.tokens_per_s:,.0f}",
                "tflops": records.significant(row.tflops),
                "mfu": "" if row.mfu != row.mfu else f"{100 * row.mfu:.1f}%",
                "peak": f"{row.peak_mib:,.0f}",
                "reserved": "" if row.reserved_mib != row.reserved_mib else f"{row.reserved_mib:,.0f}",
            }
        )
    heads = {"size": "size", "T": "context", "dtype": "precision", "compiled": "compiled", "mode": "mode"}
    heads |= {"ms": "median, ms", "n": "samples", "tokens": "tokens/s", "tflops": "TFLOP/s", "mfu": "MFU"}
    return records.markdown_table(lines, heads | {"peak": "peak MiB", "reserved": "reserved MiB"})


def paired(frame, column: str, base: str, other: str):
    """Points that differ in one column alone, base and other: their means side by side, and the speed-up of other over base."""
    keys = [
        name for name in ("size", "context_length", "batch", "dtype", "compiled", "mode", "kernel") if name != column
    ]
    ok = frame[frame.status == "ok"]
    sides = [ok[ok[column] == value][[*keys, "mean_ms"]] for value in (base, other)]
    found = sides[0].merge(sides[1], on=keys, suffixes=("_base", "_other"))
    return found.assign(speedup=found.mean_ms_base / found.mean_ms_other)


def mixed_context(frame) -> int:
    """The context at which the most precisions ran, the longest of those: where mixed precision is compared."""
    ok = frame[(frame.status == "ok") & (frame.compiled == "no")]
    counts = ok.groupby("context_length")["dtype"].nunique()
    return int(counts[counts == counts.max()].index.max())


def precision_table(frame) -> str:
    """benchmarking_mixed_precision (c): a line for each size and mode, a column a precision, and what each gains over the widest."""
    ok = frame[(frame.status == "ok") & (frame.compiled == "no") & (frame.context_length == mixed_context(frame))]
    names = [name for name in DTYPES if name in set(ok["dtype"])]
    lines = []
    for (size, mode), group in ok.groupby(["size", "mode"], sort=False):
        rows_ = group.drop_duplicates("dtype").set_index("dtype")
        line = {"size": size, "mode": MODES_SAID[mode]}
        for name in names:
            if name in rows_.index:
                gain = f" ({rows_.mean_ms[names[0]] / rows_.mean_ms[name]:.2f}x)" if names[0] in rows_.index else ""
                line[name] = mean_std(rows_.mean_ms[name], rows_.std_ms[name]) + (gain if name != names[0] else "")
        lines.append(line)
    return records.markdown_table(lines, {"size": "size", "mode": "mode"} | {name: f"{name}, ms" for name in names})


def warmup_windows(times, steps: int) -> list[dict[str, Any]]:
    """Mean and standard deviation of the samples that follow each of WARMUP_COUNTS untimed steps of one cold start."""
    made = []
    for count in WARMUP_COUNTS:
        window = times[(times.step >= count) & (times.step < count + steps)].time_ms
        made.append({"warmup": count, "mean_ms": window.mean(), "std_ms": window.std(), "samples": len(window)})
    return made


def warmup_table(times, steps: int) -> str:
    """What a benchmark reports after so many warm-up steps, as Markdown."""
    windows = warmup_windows(times, steps)
    last = windows[-1]["mean_ms"]
    lines = [
        {
            "warmup": window["warmup"],
            "ms": mean_std(window["mean_ms"], window["std_ms"]),
            "off": f"{100 * (window['mean_ms'] / last - 1):+.1f}%",
        }
        for window in windows
    ]
    heads = {"warmup": "warm-up steps", "ms": "mean ± std, ms", "off": f"against {windows[-1]['warmup']} of them"}
    return records.markdown_table(lines, heads)


def warmup_said(times, steps: int) -> str:
    """How far the fewer warm-up steps are from the most, beside the spread."""
    *fewer, most = warmup_windows(times, steps)[1:]
    parts = ", ".join(
        f"{100 * (window['mean_ms'] / most['mean_ms'] - 1):+.1f}% after {window['warmup']}, "
        f"{'less' if abs(window['mean_ms'] - most['mean_ms']) <= window['std_ms'] else 'more'} than the standard deviation there"
        for window in fewer
    )
    return f"Against {most['warmup']} warm-up steps the mean is off by {parts}."


def first_step_table(paid, most: int = 10) -> str:
    """What the first step of a process spent more host time in than a later one, the largest first, as Markdown."""
    lines = [
        {
            "name": f"`{row.name}`",
            "first": f"{records.significant(row.first_ms)} ({row.first_calls})",
            "later": f"{records.significant(row.later_ms)} ({row.later_calls})",
        }
        for row in paid.head(most).itertuples(index=False)
    ]
    heads = {"name": "operator or call", "first": "first step, ms (calls)", "later": "later step, ms (calls)"}
    return records.markdown_table(lines, heads)


def first_step_said(paid, most: int = 10) -> str:
    """How much host time the first step spent beyond a later one, and how much of that the lines of the table explain."""
    more = (paid.first_ms - paid.later_ms).clip(lower=0)
    shown = min(most, len(paid))
    return (
        f"Under the profiler the first step took {paid.first_ms.sum():,.1f} ms of host time, the later one {paid.later_ms.sum():,.1f} ms. "
        f"The {shown} lines with the largest difference are {100 * more.head(shown).sum() / more.sum():.0f}% of what the first one spent more on."
    )


def conclusions(frame) -> list[str]:
    """What the rows show, in sentences made from their numbers."""
    said = []
    ok = frame[frame.status == "ok"]
    if len(ok):
        share = (ok.std_ms / ok.mean_ms).dropna()
        if len(share):
            said.append(
                f"The standard deviation is {100 * share.median():.1f}% of the mean at the median point, {100 * share.max():.0f}% at the worst."
            )
        said += host_said(ok)
        said += _backward_said(ok)
        said += compile_said(frame)
        said += _precision_said(frame)
        said += _mfu_said(ok)
    for status, group in frame[frame.status != "ok"].groupby("status", sort=False):
        first = group.iloc[0]
        points_ = f"{len(group)} point{'s' if len(group) > 1 else ''}"
        said.append(
            f"{points_} {status}, the first {first['size']} at {first.context_length:,} tokens, {first['dtype']}, {MODES_SAID[first['mode']]}: "
            f"{_reason(first.note)}"
        )
    return said


def _reason(note: str) -> str:
    """A note's first sentence: what went wrong, without the advice that an error may add."""
    return f"{note.split('. ')[0].rstrip('.')}."


def flat(ok):
    """Of each point whether its time hardly grows with the context: one of the same series with at least twice the tokens takes less than _FLAT
    times as long. NaN where there is no such other. Full steps are left out (NaN), as the optimizer's work does not depend on the context."""
    found = {}
    series = ["size", "batch", "dtype", "compiled", "mode", "kernel"]
    for _, group in ok[ok["mode"] != "full_step"].groupby(series, sort=False):
        for index, row in group.iterrows():
            later = group.mean_ms[group.context_length >= 2 * row.context_length]
            if len(later):
                found[index] = float(later.min() < _FLAT * row.mean_ms)
    return ok.index.to_series().map(found).astype(float)


def host_said(ok) -> list[str]:
    """Which points are bound by the host, and how much more they scatter."""
    said, verdict = [], flat(ok)
    share = 100 * ok.std_ms / ok.mean_ms
    for compiled in COMPILED:
        judged = verdict[(ok.compiled == compiled) & verdict.notna()]
        bound, others = judged.index[judged == 1], judged.index[judged == 0]
        if bound.empty:
            continue
        longest = ok.loc[bound].groupby("size", sort=False).context_length.max()
        points = "; ".join(
            f"{', '.join(sizes.index)} up to {context:,} tokens"
            for context, sizes in longest.groupby(longest, sort=False)
        )
        text = f"Bound by the host, {_way(compiled)}: {len(bound)} of {len(judged)} points ({points})"
        if len(others) and share[bound].notna().any() and share[others].notna().any():
            text += (
                f"; their standard deviation is {share[bound].median():.1f}% of the mean at the median point, that of the others "
                f"{share[others].median():.1f}%"
            )
        said.append(f"{text}.")
    if said:
        said[0] += (
            f" With at least twice the tokens these passes take less than {_FLAT:g} times as long: their time follows the number of operations that the "
            "host issues, not the device's work, and scatters as the host does."
        )
    return said


def _way(compiled: str) -> str:
    return "eager" if compiled == "no" else f"compiled ({compiled})"


def _mfu_said(ok) -> list[str]:
    """The highest MFU in each precision: each is a share of that precision's own peak."""
    parts = []
    for dtype in DTYPES:
        rows_ = ok[(ok["dtype"] == dtype) & ok.mfu.notna()]
        if len(rows_):
            best = rows_.loc[rows_.mfu.idxmax()]
            parts.append(
                f"{dtype} {100 * best.mfu:.1f}% ({best['size']}, {MODES_SAID[best['mode']]}, {best.context_length:,} tokens, {_way(best.compiled)})"
            )
    return [f"The highest MFU, of each precision's own peak: {'; '.join(parts)}."] if parts else []


def compile_said(frame) -> list[str]:
    """torch_compile (b): what compiling gains in each mode, and what it costs before the first step."""
    said = []
    for compiled in COMPILED[1:]:
        for mode, group in paired(frame, "compiled", "no", compiled).groupby("mode", sort=False):
            said.append(f"Compiled ({compiled}), {MODES_SAID[mode]}: {_range_said(group)}.")
    first = frame[(frame.status == "ok") & (frame.compiled != "no")]
    if first.first_ms.notna().any():
        longest = first.loc[first.first_ms.idxmax()]
        said.append(
            f"The longest first step of a compiled point took {longest.first_ms / 1e3:.1f} s ({longest['size']}, {MODES_SAID[longest['mode']]}, "
            f"compiled: {longest.compiled}); a compilation that an earlier run left in the cache on disk is not in it."
        )
    return said


def _range_said(found) -> str:
    low, high = found.loc[found.speedup.idxmin()], found.loc[found.speedup.idxmax()]
    if len(found) == 1:
        return f"{low.speedup:.2f} times as fast ({_place(low)})"
    places = [f"{row.speedup:.2f} ({_place(row)})" for row in (low, high)]
    return f"{places[0]} to {places[1]} times as fast over {len(found)} points, median {found.speedup.median():.2f}"


def _place(row) -> str:
    """Size, context, and the precision where it is not what is compared."""
    return ", ".join([row["size"], f"{row.context_length:,} tokens", *([row["dtype"]] if "dtype" in row.index else [])])


def _backward_said(ok) -> list[str]:
    verdict = flat(ok)
    eager = ok[ok.compiled == "no"]
    found = paired(eager, "mode", "forward_backward", "forward")
    if found.empty:
        return []
    ratio = found.speedup - 1
    text = (
        "The backward pass (forward and backward less the forward pass) takes "
        f"{ratio.min():.2f} to {ratio.max():.2f} times the forward pass, median {ratio.median():.2f}"
    )
    follows = paired(eager[verdict[eager.index] != 1], "mode", "forward_backward", "forward").speedup - 1
    if 0 < len(follows) < len(ratio):
        text += (
            f"; over the {len(follows)} of {len(ratio)} points where neither is bound by the host {follows.min():.2f} to {follows.max():.2f}, median "
            f"{follows.median():.2f}"
        )
    return [f"{text}."]


def _precision_said(frame) -> list[str]:
    said = []
    for wide in ("fp32", "tf32"):
        for narrow in ("bf16", "fp16"):
            found = paired(frame[frame.compiled == "no"], "dtype", wide, narrow)
            for mode, group in found.groupby("mode", sort=False):
                said.append(f"{narrow} against {wide}, {MODES_SAID[mode]}: {_range_said(group)}.")
    return said


def overhead_said(folder: str | Path, frame) -> str:
    """What timing itself costs, against the shortest step."""
    stamp = json.loads((Path(folder) / f"{NAME}.json").read_text(encoding="utf-8"))
    empty, shortest = stamp["method"]["empty_step_ms"], frame.median_ms.min()
    return (
        f"Timing a step that does nothing takes {1e3 * empty:.1f} µs, {100 * empty / shortest:.2g}% of the shortest step measured "
        f"({records.significant(shortest)} ms)."
    )


def state_said(folder: str | Path) -> list[str]:
    """Clocks and other processes of the GPU as found during the run; empty on a CPU."""
    stamp = json.loads((Path(folder) / f"{NAME}.json").read_text(encoding="utf-8"))
    states = stamp["method"]["gpu"]
    said = [f"{s['when']}: {s['clocks.sm']}, {s['temperature.gpu']} C, {s['power.draw']}" for s in states]
    others = max((sum(not process["this"] for process in state["processes"]) for state in states), default=0)
    if others:
        said.append(
            f"nvidia-smi listed {others} process(es) on the GPU under numbers other than this one's, which a container may give it too"
        )
    return said


def write_report(frame, folder: str | Path) -> dict[str, Path]:
    """Write the figures and model_benchmark_report.md to folder; return their paths by their short names."""
    from lmsys import plots

    folder = Path(folder)
    figures = {}
    if (frame.status == "ok").any():
        figures["time"] = plots.benchmark_times(frame)
        figures["precision"] = (
            plots.benchmark_precision(frame, mixed_context(frame)) if (frame.compiled == "no").any() else None
        )
        gains = {way: paired(frame, "compiled", "no", way) for way in COMPILED[1:]}
        if any(len(found) for found in gains.values()):
            figures["compile"] = plots.benchmark_compiled({way: found for way, found in gains.items() if len(found)})
    written = {
        name: plots.save(figure, folder / f"model_benchmark_{name}.png") for name, figure in figures.items() if figure
    }
    written["report"] = records.write_text(folder / "model_benchmark_report.md", report_text(frame, folder))
    return written


def report_text(frame, folder: str | Path) -> str:
    """model_benchmark_report.md: what to conclude, and every row."""
    text = [
        "# Model benchmark",
        "",
        f"Measured on {frame.device.iloc[0]}. Times in ms: median [20th, 80th percentile].",
        "",
    ]
    said = conclusions(frame)
    if (frame.status == "ok").any():
        said.append(overhead_said(folder, frame))
    text += [f"- {sentence}" for sentence in (*said, *state_said(folder))]
    return "\n".join([*text, "", full_table(frame)])
