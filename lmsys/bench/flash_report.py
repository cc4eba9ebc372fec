"""What the rows of lmsys.bench.flash and lmsys.bench.counters say: tables, sentences made from their numbers, and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmsys import records
from lmsys.bench.flash import IMPLEMENTATIONS, STEPS
from lmsys.device import peak_flops

_PASS = {"forward": "forward", "backward": "backward", "forward_backward": "both"}


# --- Steps ----------------------------------------------------------------------------------------


def steps_table(frame) -> str:
    """Steps down: what changes; forward time, TFLOP/s and speed over the step before, and backward time, for each head dim."""
    lines = []
    for step in dict.fromkeys(frame.step):
        line = {"step": step, "what changes": STEPS[step].change}
        for head_dim in dict.fromkeys(frame.head_dim):
            rows = frame[(frame.step == step) & (frame.head_dim == head_dim)].set_index("pass")
            for which in ("forward", "backward"):
                text = "none" if which not in rows.index else _time(rows.loc[which])
                line[f"{which}, ms, head_dim {head_dim}"] = text
            ahead = rows.loc["forward"]
            line[f"TFLOP/s, {head_dim}"] = records.significant(ahead.tflops) if ahead.status == "ok" else ""
        lines.append(line)
    return records.markdown_table(lines)


def _time(row) -> str:
    return records.spread(row.median_ms, row.p20_ms, row.p80_ms) if row.status == "ok" else str(row.status)


def steps_conclusions(frame, ceilings, counters=None) -> list[str]:
    """What each step brought, and how far from the device's ceilings the last one is."""
    said = []
    for head_dim, group in frame[frame["pass"] == "forward"].groupby("head_dim"):
        ok = group[group.status == "ok"]
        timed = ok[~_interpreted(ok)]  # the interpreter's times say nothing
        if len(timed) < 2:
            continue
        gains = [
            f"{after.step} {before.median_ms / after.median_ms:.2f}"
            for before, after in zip(timed.itertuples(), timed.iloc[1:].itertuples(), strict=False)
        ]
        first, best = timed.iloc[0], timed.loc[timed.median_ms.idxmin()]
        said.append(
            f"Forward, head_dim {head_dim}: each step's speed over the step before it: {', '.join(gains)}. From {first.step} to "
            f"{best.step}, the fastest: {records.significant(first.median_ms)} to {records.significant(best.median_ms)} ms, "
            f"{first.median_ms / best.median_ms:.1f} times."
        )
        slower = [
            f"{after.step} ({after.median_ms / before.median_ms:.2f} times {before.step}'s time)"
            for before, after in zip(timed.itertuples(), timed.iloc[1:].itertuples(), strict=False)
            if after.p20_ms > before.p80_ms
        ]
        if slower:
            said.append(
                f"Not every step pays by itself: at head_dim {head_dim} slower than its predecessor: {', '.join(slower)}."
            )
        rates = ceilings[ceilings.status == "ok"].set_index("what").rate
        if "product" in rates:
            peak = peak_flops(best.device, best["dtype"])
            text = f"{best.step} reaches {records.significant(best.tflops)} TFLOP/s, {best.tflops / rates['product']:.0%} of what a "
            text += f"large product of PyTorch's reaches here ({records.significant(rates['product'])} TFLOP/s)"
            if peak:
                text += f" and {best.tflops * 1e12 / peak:.0%} of the datasheet's peak"
            said.append(f"{text[0].upper()}{text[1:]} (head_dim {head_dim}).")
        naive = timed[timed.step == "naive"]
        if len(naive) and "copy" in rates:
            row = naive.iloc[0]
            floor = row.counted_mib * 2**20 / rates["copy"] / 1e6
            said.append(
                f"The naive step moves {_mib(row.counted_mib)} MiB by counting, which takes {records.significant(floor)} ms at the "
                f"speed of a copy; it takes {records.significant(row.median_ms)} ms. Without arrays of scores {_mib(_io_mib(row))} MiB are left."
            )
    said += _gone_wrong(frame, "step")
    if counters is not None:
        said += counters_conclusions(counters)
    return said


def _io_mib(row) -> float:
    size = {"fp32": 4}.get(row["dtype"], 2)
    return 4 * row.batch * row.heads * row.seq_len * row.head_dim * size / 2**20


def _mib(value: float) -> str:
    """MiB, whole numbers from 100."""
    return f"{value:,.0f}" if value >= 100 else records.significant(value)


def _interpreted(frame):
    return frame.note.astype(object).fillna("").astype(str).str.contains("interpreter")


def _gone_wrong(frame, column: str) -> list[str]:
    """Why rows are not ok, each reason once; out of memory is told elsewhere."""
    said = []
    for status, verb in (("unsupported", "did not run here"), ("error", "failed")):
        rows = frame[frame.status == status].drop_duplicates([column, "note"])
        said += [f"{getattr(row, column)} {verb}: {row.note}" for row in rows.itertuples()]
    for name in frame[(frame.status == "ok") & _interpreted(frame)][column].unique():
        said.append(f"{name} ran in Triton's CPU interpreter, which checks it; its times say nothing about a GPU.")
    return said


def counters_table(frame) -> str:
    """Steps down, counters across."""
    columns = {
        "head_dim": "head_dim",
        "step": "step",
        "kernels": "kernels",
        "time_ms": "time, ms",
        "dram_mib": "device memory, MiB",
        "l2_mib": "L2, MiB",
        "tensor_pct": "tensor cores, %",
        "exp_pct": "exponentials, %",
        "shared_pct": "shared memory, %",
        "issue_pct": "issue, %",
        "occupancy_pct": "warps resident, %",
        "registers": "registers a thread",
    }
    lines = []
    for row in frame[frame.status == "ok"].to_dict("records"):
        whole = {
            name: f"{row[name]:,.0f}"
            for name in ("kernels", "dram_mib", "l2_mib", "registers")
            if row[name] == row[name]
        }
        percent = {name: f"{row[name]:.0f}" for name in columns if name.endswith("_pct") and row[name] == row[name]}
        lines.append(row | whole | percent | {"time_ms": records.significant(row["time_ms"])})
    return records.markdown_table(lines, columns) if lines else "*No counters: see below.*\n"


def counters_conclusions(frame) -> list[str]:
    """What the counters say about each gain, or why there are none."""
    ok = frame[frame.status == "ok"]
    if ok.empty:
        return [f"No hardware counters: {reason}." for reason in frame.note.dropna().unique()]
    said = []
    for head_dim, group in ok.groupby("head_dim"):
        rows = group.set_index("step")
        if "naive" in rows.index:
            naive = rows.loc["naive"]
            text = f"head_dim {head_dim}: the naive step moves {naive.dram_mib:,.0f} MiB through device memory in {naive.kernels:.0f} kernels"
            if _has(naive.tensor_pct):
                text += f" and keeps the tensor cores busy {naive.tensor_pct:.0f}% of the time"
            fused = [
                name for name in ("portable Triton", "TMA", "warp specialization", "overlap") if name in rows.index
            ]
            if fused:
                parts = [
                    f"{name} {rows.loc[name].dram_mib:,.0f} MiB, {rows.loc[name].tensor_pct:.0f}%" for name in fused
                ]
                text += f"; in one kernel: {'; '.join(parts)}"
            said.append(text + ".")
        last = group.iloc[-1]
        busy = {
            "tensor cores": last.tensor_pct,
            "exponentials": last.exp_pct,
            "shared memory": last.shared_pct,
            "issue": last.issue_pct,
        }
        busy = {name: value for name, value in busy.items() if _has(value)}
        if busy:
            top = max(busy, key=busy.get)
            said.append(
                f"At the last step ({last.step}, head_dim {head_dim}) the busiest part is {top}, {busy[top]:.0f}% of its peak: "
                + ", ".join(f"{name} {value:.0f}%" for name, value in busy.items())
                + "."
            )
    return said


def _has(value: float) -> bool:
    return value == value


# --- The course's tables --------------------------------------------------------------------------


def course_table(frame, implementation: str) -> str:
    """pytorch_attention of one implementation: forward, memory before backward (measured, and by formula), backward."""
    lines = []
    rows = frame[frame.implementation == implementation]
    for (head_dim, length), group in rows.groupby(["head_dim", "seq_len"], sort=False):
        each = group.set_index("pass")
        ahead, back = each.loc["forward"], each.loc["backward"]
        memory = ahead.before_backward_mib
        lines.append(
            {
                "head_dim": head_dim,
                "length": f"{length:,}",
                "forward, ms": _time(ahead),
                "before backward, MiB": _mib(memory) if _has(memory) else "",
                "by formula, MiB": _mib(ahead.computed_mib),
                "backward, ms": _time(back),
            }
        )
    return records.markdown_table(lines)


def course_conclusions(frame) -> list[str]:
    """The course's questions on pytorch_attention and torch_compile (a), answered from the rows."""
    said = []
    for name, rows in frame.groupby("implementation", sort=False):
        lost = rows[rows.status == "oom"]
        if lost.empty:
            said.append(f"Memory: {name} did not run out of it, up to {rows.seq_len.max():,} tokens.")
            continue
        least = {which: group.seq_len.min() for which, group in lost.groupby("pass")}
        for which in ("forward", "backward"):
            if which not in least or (which == "backward" and least.get("forward") == least["backward"]):
                continue
            row = lost[(lost["pass"] == which) & (lost.seq_len == least[which])].iloc[0]
            said.append(
                f"Memory: {name} runs out of it in the {which} pass from {row.seq_len:,} tokens (head_dim {row.head_dim}), where "
                f"the formula asks for {row.computed_mib / 1024:,.1f} GiB before the backward pass."
            )
    ahead = frame[(frame["pass"] == "forward") & frame.before_backward_mib.notna()]
    for name, rows in ahead.groupby("implementation", sort=False):
        wide = rows[rows.head_dim == rows.head_dim.max()].sort_values("seq_len")
        last = wide.iloc[-1]
        said.append(
            f"Accounting, {name}, {last.seq_len:,} tokens, head_dim {last.head_dim}: {_formula(name)}, by formula {_mib(last.computed_mib)} "
            f"MiB; measured {_mib(last.before_backward_mib)}. Largest difference of all points: "
            f"{_mib((rows.before_backward_mib - rows.computed_mib).abs().max())} MiB."
        )
        if len(wide) > 1:
            before = wide.iloc[-2]
            said.append(
                f"Growth, {name}: from {before.seq_len:,} to {last.seq_len:,} tokens memory before backward grows "
                f"{last.before_backward_mib / before.before_backward_mib:.2f} times."
            )
    said += _beside(frame, "compiled", "naive", "torch.compile against eager")
    said += _beside(frame, "flash", "naive", "FlashAttention against eager")
    if "flash" in set(ahead.implementation) and "naive" in set(ahead.implementation):
        both = ahead.pivot_table(
            index=["head_dim", "seq_len"], columns="implementation", values="before_backward_mib"
        ).dropna()
        (head_dim, length), row = both.index[-1], both.iloc[-1]
        said.append(
            "How to be rid of the cost: compute the probabilities again in the backward pass, a tile at a time, from the log-sum-exp of "
            f"each row. FlashAttention holds {_mib(row.flash)} MiB before backward at {length:,} tokens (head_dim {head_dim}), "
            f"naive attention {_mib(row.naive)}."
        )
    return said + _gone_wrong(frame, "implementation")


def _formula(name: str) -> str:
    if name == "flash":
        return "q, k, v, o and the output's gradient, and the log-sum-exp, 4 bytes a row"
    return "q, k, v, o and the output's gradient, the probabilities (batch x length x length), and a byte of mask for each of length x length"


def _beside(frame, name: str, other: str, title: str) -> list[str]:
    """Speed of one implementation over another at the points that both have: range and geometric mean, a pass a sentence."""
    said = []
    ok = frame[(frame.status == "ok") & ~_interpreted(frame)]
    for which in ("forward", "backward", "forward_backward"):
        rows = ok[ok["pass"] == which]
        table = rows.pivot_table(index=["dtype", "head_dim", "seq_len"], columns="implementation", values="median_ms")
        if not {name, other} <= set(table.columns) or table[[name, other]].dropna().empty:
            continue
        both = table[[name, other]].dropna()
        ratio = both[other] / both[name]
        (dtype, head_dim, length), least = ratio.idxmin(), ratio.min()
        (most_dtype, most_dim, most_length), most = ratio.idxmax(), ratio.max()
        mean = math.exp(ratio.map(math.log).mean())
        said.append(
            f"{title}, {_PASS[which]}: {mean:.2f} times the speed in the geometric mean of {len(ratio)} points, from {least:.2f} ({dtype}, head_dim "
            f"{head_dim}, {length:,} tokens) to {most:.2f} ({most_dtype}, head_dim {most_dim}, {most_length:,} tokens)."
        )
    return said


def bench_table(frame, dtype: str, which: str) -> str:
    """flash_benchmarking of one dtype and pass: lengths down; head dims and implementations across."""
    rows = frame[(frame["dtype"] == dtype) & (frame["pass"] == which)]
    lines = []
    for length, group in rows.groupby("seq_len", sort=False):
        line = {"length": f"{length:,}"}
        for row in group.itertuples():
            text = records.significant(row.median_ms) if row.status == "ok" else row.status
            line[f"{row.implementation}, {row.head_dim}"] = text
        lines.append(line)
    return records.markdown_table(lines)


def bench_conclusions(frame) -> list[str]:
    """FlashAttention beside PyTorch, from the rows of flash_benchmarking."""
    said = _beside(frame, "flash", "naive", "FlashAttention against plain PyTorch")
    said += _beside(frame, "flash", "compiled", "FlashAttention against torch.compile")
    for name, rows in frame[frame.status == "oom"].groupby("implementation", sort=False):
        least = rows.loc[rows.seq_len.idxmin()]
        said.append(
            f"{name} runs out of memory from {least.seq_len:,} tokens ({least['dtype']}, head_dim {least.head_dim}, {_PASS[least['pass']]})."
        )
    if not (frame.status == "oom").any():
        said.append(
            f"None of them runs out of memory at batch {frame.batch.iloc[0]} up to {frame.seq_len.max():,} tokens here."
        )
    return said + _gone_wrong(frame, "implementation")


# --- The report -----------------------------------------------------------------------------------


FIGURES = ("steps", "roofline", "counters", "memory", "benchmarking")


def figure(name: str, frames: Mapping[str, Any], folder: str | Path) -> Path | None:
    """Write one of FIGURES, flash_attention_NAME.png, to folder; None where there is nothing to draw: no counters."""
    from lmsys import plots

    if name == "steps":
        drawn = plots.flash_steps(frames["steps"])
    elif name == "roofline":
        first = frames["steps"].iloc[0]
        counted = frames["counters"][["step", "head_dim", "dram_mib"]]
        wide = frames["steps"].merge(counted, on=["step", "head_dim"], how="left")
        peak = peak_flops(first.device, first["dtype"])
        drawn = plots.flash_roofline(wide, frames["ceilings"], peak and peak / 1e12)
    elif name == "counters":
        if not (frames["counters"].status == "ok").any():
            return None
        drawn = plots.flash_counters(frames["counters"])
    elif name == "memory":
        drawn = plots.course_memory(frames["pytorch_attention"])
    else:
        drawn = plots.flash_benchmarking(frames["flash_benchmarking"])
    return plots.save(drawn, Path(folder) / f"flash_attention_{name}.png")


def write_report(frames: Mapping[str, Any], folder: str | Path) -> Path:
    """flash_attention_report.md: all tables, each after what it says."""
    steps, counters = frames["steps"], frames["counters"]
    course, bench = frames["pytorch_attention"], frames["flash_benchmarking"]
    text = [
        "# How the attention kernel is built",
        "",
        f"Measured on {steps.device.iloc[0]}. Times in ms: median [20th, 80th percentile].",
    ]

    def section(title: str, sentences: list[str], *tables: str) -> None:
        text.extend(["", f"## {title}", "", *(f"- {sentence}" for sentence in sentences)])
        for table in tables:
            text.extend(["", table.rstrip()])

    section("Steps", steps_conclusions(steps, frames["ceilings"]), steps_table(steps))
    section("Counters", counters_conclusions(counters), counters_table(counters))
    names = [name for name in IMPLEMENTATIONS if name in set(course.implementation)]
    section("pytorch_attention and torch_compile", course_conclusions(course))
    for name in names:
        text += ["", f"### {name}: {IMPLEMENTATIONS[name]}", "", course_table(course, name).rstrip()]
    section("flash_benchmarking", bench_conclusions(bench))
    for dtype in dict.fromkeys(bench["dtype"]):
        for which in dict.fromkeys(bench["pass"]):
            text += [
                "",
                f"### {dtype}, {_PASS[which]}, ms (implementation, head_dim)",
                "",
                bench_table(bench, dtype, which).rstrip(),
            ]
    return records.write_text(Path(folder) / "flash_attention_report.md", "\n".join(text) + "\n")
