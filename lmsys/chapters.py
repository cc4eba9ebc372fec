"""The chapters on the course's assignment (book/chapters/): what their pages are filled with.

A page holds the questions, what was measured, and the arguments; each number, table and figure in it stands behind a marker
`<!-- fill: NAME -->` with NAME a key of FILLS. It is made from the result files of the reference machines when the site is built, by the
functions that the notebooks' own tables and conclusions come from, or calculated by lmsys.cost. Where a file is not there yet, one line says
which command brings it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmsys import cost, records
from lmsys.assignment import MACHINE, PROBLEMS, SEVERAL, Missing, Part, bound_said, breakable, how, many, measured, one
from lmsys.config import model_size

Piece = Callable[[], str]
_TO_ROOT = "../.."  # from a page to the repository


# --- Pieces ---------------------------------------------------------------------------------------


def _block(notebook: str, *pieces: Piece, several: bool = False) -> Piece:
    """Pieces one after the other; in the place of what is not measured yet, one line that names the command."""

    def fill() -> str:
        made, missing = [], []
        for piece in pieces:
            try:
                made.append(piece().rstrip())
            except Missing:
                missing = [f"*{how(Part(list, notebook, several))}*"]
        return _joined([text for text in (*made, *missing) if text])

    return fill


def _joined(texts: Sequence[str]) -> str:
    """Texts as paragraphs; a list goes on with the next."""
    whole = ""
    for text in texts:
        gap = "\n" if whole.rpartition("\n")[2].startswith("- ") and text.startswith("- ") else "\n\n"
        whole += (gap if whole else "") + text
    return whole


def _said(sentences: Callable[[], Sequence[str]]) -> Piece:
    """Sentences as a list."""

    def piece() -> str:
        found = sentences()
        if not found:
            raise Missing
        return "\n".join(f"- {sentence}" for sentence in found)

    return piece


def _answer(problem: str, part: int) -> Piece:
    """The sentences of the assignment's table."""
    (found,) = (each for each in PROBLEMS if each.name == problem)
    return _said(lambda: [re.sub(r"^\([a-f]\) ", "", sentence) for sentence in found.parts[part].answer()])


def _starting(sentences: Sequence[str], *starts: str) -> list[str]:
    return [sentence for sentence in sentences if sentence.startswith(starts)]


def _captioned(caption: str, table: str) -> str:
    return f"{caption}\n\n{table}"


def _figure(name: str, alt: str, machines: Sequence[str] = (MACHINE,)) -> Piece:
    """artifacts/<machine>/NAME.png of the first machine that has it; nothing where none has."""

    def piece() -> str:
        for machine in machines:
            if (records.REPOSITORY / "artifacts" / machine / f"{name}.png").exists():
                return f"![{alt}]({_TO_ROOT}/artifacts/{machine}/{name}.png)"
        return ""

    return piece


def _page(notebook: str, machines: Sequence[str]) -> Piece:
    """A link to the executed notebook, or, where none is, the name of the one to execute."""

    def piece() -> str:
        for machine in machines:
            if (records.REPOSITORY / "book" / machine / f"{notebook}.ipynb").exists():
                return f"[`{notebook}`](../{machine}/{notebook}.ipynb)"
        return f"`notebooks/{notebook}.ipynb`"

    return piece


def _stamp(name: str) -> dict[str, Any]:
    """The sibling .json of a result of one GPU."""
    path = records.REPOSITORY / "artifacts" / MACHINE / f"{name}.json"
    if not path.exists():
        raise Missing
    return json.loads(path.read_text(encoding="utf-8"))


def _folder() -> Path:
    return records.REPOSITORY / "artifacts" / MACHINE


# --- Benchmarking and profiling -------------------------------------------------------------------


def _benchmark_dtype(frame) -> str:
    """The precision with the most points, of equals the widest."""
    from lmsys.bench.model import DTYPES

    return max(DTYPES, key=lambda dtype: int((frame["dtype"] == dtype).sum()))


def _eager():
    """The rows of the model benchmark that are not compiled, failed ones too."""
    frame = one("model_benchmark_results")
    measured(frame, compiled="no")
    return frame[frame.compiled == "no"]


def _benchmark_times() -> str:
    from lmsys.bench import model_report

    eager = _eager()
    shown = eager[eager["dtype"] == _benchmark_dtype(eager)]
    tables = [
        _captioned(
            f"**{model_report.MODES_SAID[mode].capitalize()}**, {shown['dtype'].iloc[0]} (oom: memory ran out; empty: not measured):",
            model_report.time_table(shown, mode),
        )
        for mode in ("forward", "forward_backward")
        if (shown["mode"] == mode).any()
    ]
    return "\n\n".join(table.rstrip() for table in tables)


def _backward_ratio() -> list[str]:
    from lmsys.bench import model_report

    return _starting(model_report.conclusions(_eager()), "The backward pass")


def _host_bound() -> str:
    """Which points are bound by the host; nothing where none is."""
    from lmsys.bench import model_report

    return "\n".join(f"- {said}" for said in model_report.host_said(measured(one("model_benchmark_results"))))


def _timing_overhead() -> list[str]:
    from lmsys.bench import model_report

    frame = measured(one("model_benchmark_results"))
    if "empty_step_ms" not in _stamp("model_benchmark_results")["method"]:
        raise Missing
    return [model_report.overhead_said(_folder(), frame)]


def _repeated() -> list[str]:
    from lmsys.bench.model_report import MODES_SAID

    again = one("model_benchmark_repeat")
    if again.empty:
        raise Missing
    one("model_benchmark_results")
    both = records.compare(_folder() / "model_benchmark_results.csv", _folder() / "model_benchmark_repeat.csv")
    both = both[both.ratio.notna()]
    if both.empty:
        raise Missing
    changed = [
        f"{row['size']}, {MODES_SAID[row['mode']]}, {int(row.context_length):,} tokens, {row['dtype']}: {row.a} and {row.b} ms"
        for _, row in both[both.verdict.isin(("slower", "faster"))].iterrows()
    ]
    apart = (
        f"further apart than 5% and the spread of both: {'; '.join(changed)}"
        if changed
        else "none is further apart than 5% and the spread of both"
    )
    return [
        f"Measured a second time after all others, the medians of {len(both)} points are {both.ratio.min():.2f} to {both.ratio.max():.2f} times the first "
        f"ones; {apart}."
    ]


def _warmup_table() -> str:
    from lmsys.bench import model_report

    times = one("model_benchmark_warmup")
    return model_report.warmup_table(times, int(_stamp("model_benchmark_warmup")["parameters"]["steps"]))


def _warmup_left() -> list[str]:
    from lmsys.bench import model_report

    times = one("model_benchmark_warmup")
    return [model_report.warmup_said(times, int(_stamp("model_benchmark_warmup")["parameters"]["steps"]))]


def _first_step() -> str:
    from lmsys.bench import model_report

    paid = one("model_benchmark_first_step")
    return f"{model_report.first_step_said(paid)}\n\n{model_report.first_step_table(paid)}"


def _compiled_model() -> list[str]:
    from lmsys.bench import model_report

    return model_report.compile_said(one("model_benchmark_results"))


def _profile(letter: str) -> Piece:
    """The sentences of one letter of nsys_profile."""

    def sentences() -> list[str]:
        from lmsys.bench import profile

        return profile.ANSWERS[letter][1](one(profile.NAME), profile.known(one(profile.KERNELS)))

    return _said(sentences)


def _profile_table(name: str, *arguments: str) -> Piece:
    """A table of lmsys.bench.profile, of results and kernels, or of kernels alone."""

    def piece() -> str:
        from lmsys.bench import profile

        results, kernels = one(profile.NAME), profile.known(one(profile.KERNELS))
        given = {
            "forward_table": (results,),
            "top_table": (results, kernels),
            "share_table": (kernels, *arguments),
            "attention_table": (kernels,),
        }
        return breakable(getattr(profile, name)(*given[name]))

    return piece


def _lost_operators() -> str:
    """How many kernels are sorted by their name, as their operator is not in the trace; nothing where none is."""
    from lmsys.bench import profile

    kernels = one(profile.KERNELS)
    rows = kernels[profile.known(kernels).category != kernels.category]
    if rows.empty:
        return ""
    points = "; ".join(
        f"{size}, {context:,} tokens, {dtype}"
        for size, context, dtype in rows[["size", "context_length", "dtype"]].drop_duplicates().itertuples(index=False)
    )
    return (
        f"- The trace names no operator for {rows['count'].sum():,} kernels ({points}): they count here as what kernels of their name are elsewhere, in the "
        "figures and the notebook as *other*."
    )


# --- Mixed precision ------------------------------------------------------------------------------


def _precision(study: str, what: str) -> Callable[[], Any]:
    """A table or the conclusions of a study of lmsys.bench.precision."""

    def made() -> Any:
        from lmsys.bench import precision

        return getattr(precision, f"{study}_{what}")(one(f"mixed_precision_{study}"))

    return made


def _precision_table() -> str:
    from lmsys.bench import model_report

    frame = one("model_benchmark_results")
    measured(frame, compiled="no")
    return _captioned(
        f"At {model_report.mixed_context(frame):,} tokens, eager; the gain over the widest precision in parentheses.",
        model_report.precision_table(frame),
    )


def _precision_trend() -> str:
    """Whether the gain of 16 bits grows with the size, and what they bring over tf32, in forward and backward, as far as it was measured."""
    from lmsys.bench import model_report

    eager = _eager()
    rows = eager[(eager["mode"] == "forward_backward") & (eager.context_length == model_report.mixed_context(eager))]
    said = []
    gains = model_report.paired(rows, "dtype", "fp32", "bf16").speedup
    if len(gains) > 1:
        grows = "grows" if gains.is_monotonic_increasing else "does not grow"
        said.append(f"That gain {grows} with each size, from {gains.iloc[0]:.2f} to {gains.iloc[-1]:.2f}.")
    found = model_report.paired(rows, "dtype", "tf32", "bf16")
    if len(found):
        parts = ", ".join(f"{row['size']} {row.speedup:.2f}" for _, row in found.iterrows())
        said.append(f"Times as fast as in tf32, which casts nothing: {parts}.")
    return "\n".join(f"- {sentence}" for sentence in said)


def _peaks_said() -> str:
    """The datasheet's rates, which bound what a precision can bring."""
    from lmsys.device import PEAK_TFLOPS

    peaks = PEAK_TFLOPS["NVIDIA H200"]
    return ", ".join(f"{dtype} {peaks[dtype]:,.0f}" for dtype in ("fp32", "tf32", "bf16", "fp16")) + " TFLOP/s"


# --- Memory ---------------------------------------------------------------------------------------


def _memory_settings():
    """The settings of the run, as its stamp has them."""
    from lmsys.bench import memory

    return memory.settings(**(_stamp("memory_peaks")["parameters"] | {"device": "cpu"}))


def _timelines() -> list[str]:
    from lmsys.bench import memory

    return memory.timeline_conclusions(one("memory_timeline"))


def _peaks() -> str:
    from lmsys.bench import memory

    return memory.peaks_table(one("memory_peaks"))


def _peaks_conclusions() -> list[str]:
    from lmsys.bench import memory

    frame = one("memory_peaks")
    out = frame[frame.status == "oom"]
    said = memory.peaks_conclusions(measured(frame))
    for (kernel, mode), rows in out.groupby(["kernel", "mode"], sort=False):
        points = ", ".join(f"{row.dtype} at {row.context_length:,} tokens" for row in rows.itertuples())
        said.append(f"Out of memory: {kernel}, {mode.replace('_', ' ')}, {points}.")
    return said


def _stream() -> list[str]:
    from lmsys.bench import memory

    return memory.stream_conclusions(_memory_settings(), one("memory_allocations"))


def _allocations(mode: str) -> Piece:
    def piece() -> str:
        from lmsys.bench import memory

        frame = one("memory_allocations")
        length = int(frame.context_length.max())
        return _captioned(
            f"**{mode.replace('_', ' ').capitalize()}**, {length:,} tokens:",
            memory.allocations_table(frame, "largest", mode, length),
        )

    return piece


def _largest_shape() -> str:
    """What the largest allocations of the forward pass are, where the model's shape explains them."""
    frame = one("memory_allocations")
    rows = measured(
        frame, kind="largest", mode="forward", category="temporary", context_length=frame.context_length.max()
    )
    row = rows.loc[rows.size_mib.idxmax()]
    config = model_size(row["size"], context_length=int(row.context_length))
    size = 2 if row["dtype"] != "fp32" else 4
    expected = size * row.batch * row.context_length * config.d_ff / 2**20
    if not math.isclose(expected, row.size_mib, rel_tol=1e-3):
        return ""
    return (
        f"- The largest of the forward pass, {row.size_mib:,.0f} MiB, are the feed-forward layer's hidden arrays: {row.batch} x {row.context_length:,} x "
        f"{config.d_ff:,} elements of {size} bytes."
    )


def _contributors() -> str:
    from lmsys.bench import memory

    return memory.contributors_table(one("memory_residuals"))


def _blocks() -> list[str]:
    from lmsys.bench import memory

    frames = {name: one(f"memory_{name}") for name in ("timeline", "peaks", "allocations", "blocks", "residuals")}
    results = memory.Results(checkpointing=one("memory_checkpointing"), **frames)
    return memory.blocks_conclusions(_memory_settings(), results)


def _norm(what: str) -> Callable[[], Any]:
    def made() -> Any:
        from lmsys.bench import memory

        return getattr(memory, f"norm_{what}")(one("memory_residuals"))

    return made


def _checkpointing(what: str) -> Callable[[], Any]:
    def made() -> Any:
        from lmsys.bench import memory

        return getattr(memory, f"checkpointing_{what}")(one("memory_checkpointing"))

    return made


def _nested_peak() -> str:
    """Whether nesting lowers the peak too; nothing where it, or what it is compared with, was not measured."""
    rows = measured(one("memory_checkpointing"))
    nested = rows[rows.strategy.str.startswith("nested")]
    others = rows[~rows.strategy.str.startswith("nested")]
    if nested.empty or others.empty:
        return ""
    nested, other = nested.loc[nested.peak_mib.idxmin()], others.loc[others.peak_mib.idxmin()]
    if nested.peak_mib < 0.99 * other.peak_mib:
        return ""
    return (
        f"- Nesting does not lower the peak here ({nested.peak_mib:,.0f} MiB, without it {other.peak_mib:,.0f}): with so few activations left, parameters, "
        "gradients and optimizer state are most of it."
    )


def group_size(num_blocks: int, stream: float, residuals: float) -> float:
    """sqrt(N c / r), the group of blocks at which N c / k + k r is least."""
    return math.sqrt(num_blocks * stream / residuals)


def _group_size() -> list[str]:
    row, chosen = one("memory_checkpointing").iloc[0], _memory_settings()
    shape = (chosen.model, int(row.batch), int(row.context_length))
    stream = cost.residual_stream_bytes(*shape)
    scores = row.kernel == "vectorized_torch"
    kept = sum(cost.block_residuals(*shape, row["dtype"], scores=scores, fp32_softmax=True).values())
    blocks = chosen.model.num_layers
    return [
        f"{row['size']}, {row.batch} x {row.context_length:,} tokens: $N$ = {blocks}, $c$ = {stream / 2**20:,.0f} MiB, $r$ = {kept / 2**20:,.0f} MiB, so "
        f"$\\sqrt{{N c / r}}$ = {group_size(blocks, stream, kept):.2f}."
    ]


# --- Attention ------------------------------------------------------------------------------------


def _course_table() -> str:
    from lmsys.bench import flash_report

    frame = one("pytorch_attention_results")
    rows = frame[frame.implementation == "naive"]
    if rows.empty:
        raise Missing
    first = rows.iloc[0]
    caption = (
        f"The formula in plain PyTorch, causal, batch {first.batch}, {first['dtype']}; median [20th, 80th percentile]:"
    )
    return _captioned(caption, flash_report.course_table(frame, "naive"))


def _compiled_table() -> str:
    """Medians of the formula and of the same under torch.compile side by side."""
    frame = one("pytorch_attention_results")
    frame = frame[frame["pass"].isin(("forward", "backward")) & frame.implementation.isin(("naive", "compiled"))]
    if frame.implementation.nunique() < 2:
        raise Missing
    lines = []
    for (head_dim, length), rows in frame.groupby(["head_dim", "seq_len"], sort=False):
        line = {"head_dim": head_dim, "length": f"{length:,}"}
        for which in ("forward", "backward"):
            for name in ("naive", "compiled"):
                row = rows[(rows["pass"] == which) & (rows.implementation == name)].iloc[0]
                shown = records.significant(row.median_ms) if row.status == "ok" else row.status
                line[f"{which}, {name}, ms"] = shown
        lines.append(line)
    return records.markdown_table(lines)


def _course_said(*starts: str) -> Callable[[], list[str]]:
    def sentences() -> list[str]:
        from lmsys.bench import flash_report

        return _starting(flash_report.course_conclusions(one("pytorch_attention_results")), *starts)

    return sentences


def _course_accounting() -> list[str]:
    """Memory before the backward pass beside the formula, which knows of attention only."""
    frame = one("pytorch_attention_results")
    ahead = frame[(frame["pass"] == "forward") & frame.before_backward_mib.notna()]
    naive = ahead[ahead.implementation == "naive"].sort_values("computed_mib")
    if naive.empty:
        raise Missing
    last = naive.iloc[-1]
    left = (ahead.before_backward_mib - ahead.computed_mib).rename("left")
    by_point = ahead.assign(left=left).groupby(["seq_len", "head_dim"]).left
    apart = (by_point.max() - by_point.min()).max()
    said = (
        f"Accounting: naive attention at {last.seq_len:,} tokens, head_dim {last.head_dim}, holds {last.before_backward_mib:,.0f} MiB before the backward pass, by "
        f"the formula {last.computed_mib:,.0f} ({100 * (last.before_backward_mib / last.computed_mib - 1):+.1f}%). "
    )
    if left.abs().max() < 1:
        return [f"{said}At no point of any implementation are the two a MiB apart."]
    said += f"Over all points {left.min():,.0f} to {left.max():,.0f} MiB are there beside what the formula counts"
    if ahead.implementation.nunique() > 1 and apart < 1:
        said += (
            ", the same for every implementation of a point, so that it belongs to the measurement and not to attention"
        )
    return [f"{said}."]


def intensities() -> list[tuple[str, int, float, float]]:
    """(step, head_dim, FLOPs for each byte by counting, those at which the device's products and its memory take as long)."""
    steps, ceilings = one("flash_steps_results"), measured(one("ceilings_results")).set_index("what").rate
    if not {"copy", "product"} <= set(ceilings.index):
        raise Missing
    balance = 1e12 * ceilings["product"] / (1e9 * ceilings["copy"])
    found = []
    for row in measured(steps, **{"pass": "forward"}).itertuples():
        flops = cost.attention_flops(
            row.batch, row.heads, row.seq_len, row.seq_len, row.head_dim, bool(row.causal), "forward"
        )
        found.append((row.step, int(row.head_dim), flops / (row.counted_mib * 2**20), balance))
    return found


def _intensity() -> list[str]:
    rows = [row for row in intensities() if row[0] in ("naive", "compiled", "portable Triton")]
    if not rows:
        raise Missing
    wide = max(head_dim for _, head_dim, _, _ in rows)
    parts = ", ".join(f"{step} {flops:,.0f}" for step, head_dim, flops, _ in rows if head_dim == wide)
    return [
        f"The device does {rows[0][3]:,.0f} FLOPs of a matrix product in the time in which it copies a byte (both measured). FLOPs for each byte by counting, "
        f"head_dim {wide}: {parts}."
    ]


def _steps_table() -> str:
    """Medians of each step, and what it changes."""
    from lmsys.bench.flash import STEPS

    frame = one("flash_steps_results")
    lines = []
    for step, rows in frame.groupby("step", sort=False):
        line = {"step": step, "what changes": STEPS[step].change}
        for row in rows.sort_values(["pass", "head_dim"], ascending=[False, True]).to_dict("records"):
            shown = records.significant(row["median_ms"]) if row["status"] == "ok" else row["status"]
            line[f"{row['pass']}, ms, {row['head_dim']}"] = shown
        lines.append(line)
    columns = {key: key for line in lines for key in line}
    return _captioned("Medians, by pass and head_dim:", records.markdown_table(lines, columns))


def _steps_said() -> list[str]:
    from lmsys.bench import flash_report

    counters = one("counters_results") if (_folder() / "counters_results.csv").exists() else None
    return flash_report.steps_conclusions(one("flash_steps_results"), one("ceilings_results"), counters)


def _accuracy() -> list[str]:
    from lmsys.bench import accuracy

    return accuracy.conclusions(one(accuracy.NAME))


def _standings() -> str:
    from lmsys.bench import standings

    rows = [row for row in standings.standings(one("attention_sweep_results")) if row["bar"]]
    if not rows:
        raise Missing
    table = breakable(standings.table(rows), longest=12)
    return _captioned("The peer's time over ours, with the bars that ours are held to:", table)


def _bench_said() -> list[str]:
    from lmsys.bench import flash_report

    return flash_report.bench_conclusions(one("flash_benchmarking_results"))


def _slower_than_naive() -> list[str]:
    """Where FlashAttention loses to plain PyTorch, by precision."""
    frame = measured(one("flash_benchmarking_results"), **{"pass": "forward_backward"})
    by = frame.pivot_table(
        index=["dtype", "head_dim", "seq_len"], columns="implementation", values="median_ms"
    ).dropna()
    if not {"naive", "flash"} <= set(by.columns):
        raise Missing
    parts = []
    for dtype, rows in by.groupby("dtype"):
        slower = rows[rows.flash > rows.naive].index.get_level_values("seq_len")
        parts.append(
            f"{dtype} {len(slower)} of {len(rows)} points" + (f", up to {slower.max():,} tokens" if len(slower) else "")
        )
    return [f"Forward and backward, FlashAttention is the slower one: {'; '.join(parts)}."]


def _bench_table() -> str:
    from lmsys.bench import flash_report

    frame = one("flash_benchmarking_results")
    dtype = "bf16" if "bf16" in set(frame["dtype"]) else str(frame["dtype"].iloc[0])
    frame = frame[frame.head_dim.isin(sorted(set(frame.head_dim))[-2:])]
    return _captioned(
        f"Forward and backward, {dtype}, ms, by implementation and head_dim; the others are in the figure.",
        flash_report.bench_table(frame, dtype, "forward_backward"),
    )


# --- Data parallel training -----------------------------------------------------------------------


def _messages() -> str:
    """What one all-reduce a parameter sends, from the model's shape."""
    sizes = cost.parameter_sizes(model_size("xl"))
    return (
        f"The `xl` model has {len(sizes)} parameter tensors, {4 * sum(sizes) / 1e9:.2f} GB of fp32 gradients, of which the smallest messages are "
        f"{4 * min(sizes) / 1e3:.1f} kB."
    )


def _data_parallel_rows(study: str):
    """The rows of a study, failed ones too; Missing where all are."""
    from lmsys.bench import data_parallel

    frame = many("data_parallel_results")
    measured(frame, study=study)
    return data_parallel.rows_of(frame, study)


def _steps_table_of(study: str, heading: str, label: Callable[[Any], str]) -> Piece:
    """A line for each row of a study: label(row), its step, and what communication adds, measured and by the model."""

    def piece() -> str:
        rows = _data_parallel_rows(study)
        first, lines = rows.iloc[0], []
        for row in rows.sort_values(
            "bucket_mb" if study == "buckets" else "gpus", kind="stable", na_position="first"
        ).itertuples():
            line = {heading: label(row), "GPUs": row.gpus, "step, ms": row.status}
            if row.status == "ok":
                line |= {
                    "step, ms": records.spread(row.step_ms, row.p20_ms, row.p80_ms),
                    "communication adds, ms": f"{row.exposed_comm_ms:.2f} ({100 * row.exposed_comm_ms / row.step_ms:.1f}%)",
                    "by the model": "" if math.isnan(row.model_ms) else f"{row.model_ms:.2f}",
                    "peak MiB": f"{row.peak_mib:,.0f}",
                }
            lines.append(line)
        columns = {key: key for line in lines for key in line}
        graph = ", as one CUDA graph" if records.captured(rows).all() else ""
        caption = f"{first['size']}, {first.local_batch} x {first.context_length:,} tokens a GPU, {first['dtype']}{graph}, on {first.device}:"
        return _captioned(caption, records.markdown_table(lines, columns))

    return piece


def _wrapper_and_options(row: Any) -> str:
    return f"`{row.wrapper}`" + (f" {row.options}" if isinstance(row.options, str) else "")


def _wrapper_said(*names: str) -> Callable[[], list[str]]:
    """What is said of these wrappers."""

    def sentences() -> list[str]:
        from lmsys.bench import data_parallel

        return _starting(
            data_parallel.conclusions(_data_parallel_rows("wrappers"), "wrappers"), *(f"{name}:" for name in names)
        )

    return sentences


def _flash_ddp_said() -> list[str]:
    from lmsys.bench import data_parallel

    return _starting(data_parallel.conclusions(_data_parallel_rows("wrappers"), "wrappers"), "flashddp", "torch_ddp")


def _collectives_table() -> str:
    from lmsys.bench import collectives

    return collectives.table(measured(many("collectives_results"), op="all_reduce"))


def _study_said(study: str) -> Callable[[], list[str]]:
    def sentences() -> list[str]:
        from lmsys.bench import data_parallel

        return data_parallel.conclusions(_data_parallel_rows(study), study)

    return sentences


def _captured_table() -> str:
    from lmsys.bench import data_parallel

    return data_parallel.table(_data_parallel_rows("captured"), "captured")


def _bucket_model() -> list[str]:
    """The formula with the latency and bandwidth that were measured on the same machine."""
    from lmsys.bench import collectives, data_parallel

    rows = _data_parallel_rows("buckets")
    row = rows[rows.gpus > 1].iloc[0]
    gpus = int(row.gpus)
    chosen = data_parallel.settings("full", size=row["size"], gpus=[1, gpus], device="cpu")
    return data_parallel.bucket_model(chosen, collectives.links(many("collectives_results")))


# --- Sharding -------------------------------------------------------------------------------------


def _state_table() -> str:
    """Bytes a parameter of each part of the state, by formula: cost.training_state at two devices and eight."""
    config = model_size("xl")
    lines = []
    for name in cost.SHARDINGS:
        line: dict[str, Any] = {"sharding": name}
        for gpus in (2, 8):
            state = cost.training_state(config, name, gpus)
            per = {part: size / cost.model_parameters(config) for part, size in state.items()}
            line[f"on {gpus}: parameters, gradients, optimizer"] = ", ".join(
                records.significant(value, 3) for value in per.values()
            )
            line[f"sum, {gpus}"] = records.significant(sum(per.values()), 3)
        lines.append(line)
    return records.markdown_table(lines)


def _sharding_memory(*names: str) -> Callable[[], list[str]]:
    def sentences() -> list[str]:
        from lmsys.bench import sharding

        said = sharding.memory_conclusions(many("sharding_memory"))
        return [sentence for sentence in said if any(name in sentence for name in ("Outside the peak", *names))]

    return sentences


def _sharding_speed(*names: str) -> Callable[[], list[str]]:
    def sentences() -> list[str]:
        from lmsys.bench import sharding

        said = sharding.speed_conclusions(many("sharding_results"))
        return [sentence for sentence in said if any(name in sentence for name in names)]

    return sentences


def _sharding_table(name: str) -> Piece:
    def piece() -> str:
        from lmsys.bench import sharding

        if name == "memory":
            return _captioned("MiB, measured (by formula):", sharding.memory_table(many("sharding_memory")))
        return sharding.speed_table(many("sharding_results"))

    return piece


def _gathers() -> list[str]:
    from lmsys.bench import sharding

    return sharding.forward_gather(many("sharding_timeline"))


def _accounting(letter: str) -> Piece:
    def sentences() -> list[str]:
        from lmsys.bench import sharding

        return [said.removeprefix(f"({letter}) ") for said in _starting(sharding.accounting(None), f"({letter}) ")]

    return _said(sentences)


def _bound(name: str) -> Piece:
    return _said(lambda: [bound_said(name)])


def _bounds_table() -> str:
    from lmsys.bench import sharding

    layer, device = cost.FeedForward(cost.XXL.d_model, cost.XXL.d_ff), cost.TPU_V5P
    return _captioned(
        f"The most devices at which the layer is compute-bound, on TPU v5p ($C / W$ = {device.intensity:,.0f} FLOPs a byte):",
        sharding.bounds_table(device, layer, [2**16, 2**18, 2**20, 2**22]),
    )


def _ring() -> list[str]:
    size, gpus, bandwidth = 2**30, 8, 3e11
    whole = cost.odd_ring_all_reduce_s(size, gpus, bandwidth)
    usual = cost.Link(0.0, bandwidth).seconds("all_reduce", size, gpus)
    return [
        f"1 GiB between {gpus} GPUs at {bandwidth / 1e9:,.0f} GB/s: {1e3 * whole:.1f} ms, and {1e3 * usual:.1f} ms by reduce-scatter and all-gather."
    ]


# --- What did not work ----------------------------------------------------------------------------


def _costly_options() -> list[str]:
    """Options of the training step without which it is faster, or that there are none."""
    from lmsys.bench import train_step

    frame, losses = one("train_step_results"), one("train_step_losses")
    said = train_step.conclusions(measured(frame), losses)
    return [sentence for sentence in said if "` costs " in sentence.partition(" and ")[0]] or [
        "None of those measured."
    ]


# --- Leaderboards ---------------------------------------------------------------------------------


def _board(board: str, machines: Sequence[str]):
    """A board's rows of the first machine that measured one.

    Raises:
        Missing: there is none.
    """
    from lmsys.bench import leaderboard

    for machine in machines:
        folder = records.REPOSITORY / "artifacts" / machine
        if (folder / f"{leaderboard.NAME}.csv").exists() and len(frame := leaderboard.read(folder, board)):
            measured(frame)
            return frame
    raise Missing


def _board_2025(what: str) -> Callable[[], Any]:
    def made() -> Any:
        from lmsys.bench import leaderboard

        return getattr(leaderboard, what)(_board(leaderboard.BOARD, (MACHINE,)))

    return made


def _board_floor() -> list[str]:
    """The time of the 2025 board's FLOPs at the device's peak, and the public board."""
    from lmsys.bench import leaderboard
    from lmsys.device import peak_flops

    row = measured(_board(leaderboard.BOARD, (MACHINE,))).iloc[0]
    shape = (int(row.batch), int(row.heads), int(row.seq_len), int(row.seq_len), int(row.head_dim), True)
    flops, peak = cost.attention_flops(*shape, "forward_backward"), peak_flops(row.device, row["dtype"])
    if peak is None:
        raise Missing
    floor = f"The step needs {flops / 1e12:.2f} TFLOP, {1e3 * flops / peak:.2f} ms at the datasheet's {peak / 1e12:,.1f} TFLOP/s."
    return [floor, leaderboard.public(leaderboard.BOARD).strip()]


def _board_2026(what: str) -> Callable[[], Any]:
    def made() -> Any:
        from lmsys.bench import board_2026

        return getattr(board_2026, what)(_board(board_2026.BOARD, SEVERAL))

    return made


def _board_2026_floor() -> str:
    """The 2026 board's step by formula: parameters, state, FLOPs, and their time on two GPUs at the datasheet's rate."""
    from lmsys.bench import board_2026, leaderboard
    from lmsys.device import PEAK_TFLOPS

    config, gpus = board_2026.MODEL, board_2026.GPUS
    parameters, tokens = cost.model_parameters(config), gpus * config.context_length
    flops = tokens * cost.train_flops_per_token(config)
    seconds = flops / gpus / (1e12 * PEAK_TFLOPS["NVIDIA H200"]["bf16"])
    return (
        f"By formula: {parameters / 1e9:.2f} billion parameters, {16 * parameters / 1e9:,.0f} GB of fp32 weights, gradients and moments; "
        f"{flops / 1e15:.2f} PFLOP a step of {tokens:,} tokens, {seconds:.2f} s on {gpus} H200s at their datasheet's rate. "
        f"{leaderboard.public(board_2026.BOARD).strip()}"
    )


# --- All of them ----------------------------------------------------------------------------------

_BENCHMARK, _PROFILE, _MIXED, _MEMORY, _FLASH = (
    "model_benchmark",
    "profiling",
    "mixed_precision",
    "memory",
    "flash_attention",
)

_OF_SEVERAL = ("lm_matrix", "data_parallel", "sharding", "leaderboard")

_NOTEBOOKS = sorted(path.stem for path in (records.REPOSITORY / "notebooks").glob("*.ipynb"))

FILLS: dict[str, Piece] = {
    **{f"page_{name}": _page(name, SEVERAL if name in _OF_SEVERAL else (MACHINE,)) for name in _NOTEBOOKS},
    # Benchmarking and profiling
    "benchmarking_script_b": _block(
        _BENCHMARK,
        _figure("model_benchmark_time", "Time of a step against the context, for each size and precision"),
        _benchmark_times,
        _answer("benchmarking_script", 0),
        _host_bound,
        _said(_backward_ratio),
        _said(_repeated),
        _said(_timing_overhead),
    ),
    "benchmarking_script_c": _block(
        _BENCHMARK,
        _figure(
            "model_benchmark_warmup", "The first steps of a process, and what is reported after 0, 1, 2 and 5 of them"
        ),
        _warmup_table,
        _answer("benchmarking_script", 1),
        _said(_warmup_left),
        _first_step,
    ),
    "nsys_profile_a": _block(_PROFILE, _profile_table("forward_table"), _profile("a")),
    "nsys_profile_b": _block(_PROFILE, _profile_table("top_table"), _profile("b")),
    "nsys_profile_c": _block(
        _PROFILE,
        _figure("profiling_layer", "One layer's forward pass, kernel by kernel"),
        _profile_table("share_table", "inference"),
        _profile("c"),
        _lost_operators,
    ),
    "nsys_profile_d": _block(
        _PROFILE,
        _figure("profiling_share", "Share of each kind of kernel in a forward pass and in a training step"),
        _figure("profiling_timeline", "Phases and kernels of a training step"),
        _profile_table("share_table", "training"),
        _profile("d"),
    ),
    "nsys_profile_e": _block(
        _PROFILE,
        _figure("profiling_attention", "Softmax over matrix products in attention: time and FLOPs"),
        _profile_table("attention_table"),
        _profile("e"),
    ),
    # Mixed precision
    "mixed_precision_sums": _block(
        _MIXED,
        _figure("mixed_precision_sums", "Partial sums, and their distance from the truth"),
        _precision("sums", "table"),
        _said(_precision("sums", "conclusions")),
    ),
    "mixed_precision_dtypes": _block(_MIXED, _precision("dtypes", "table"), _said(_precision("dtypes", "conclusions"))),
    "mixed_precision_layer_norm": _block(
        _MIXED,
        _figure("mixed_precision_layer_norm", "Error of layer norm against the input's standard deviation and mean"),
        _precision("layer_norm", "table"),
        _said(_precision("layer_norm", "conclusions")),
    ),
    "mixed_precision_speed": _block(
        _BENCHMARK,
        _figure("model_benchmark_precision", "Speed of each precision over the widest one, for each size"),
        _precision_table,
        _answer("benchmarking_mixed_precision", 2),
        _precision_trend,
    ),
    "mixed_precision_peaks": _peaks_said,
    # Memory
    "memory_timeline": _block(
        _MEMORY, _figure("memory_timeline", "Live memory through a step, by category"), _said(_timelines)
    ),
    "memory_peaks": _block(_MEMORY, _peaks, _said(_peaks_conclusions)),
    "memory_stream": _block(_MEMORY, _said(_stream)),
    "memory_largest": _block(_MEMORY, _allocations("forward"), _allocations("full_step"), _largest_shape),
    "memory_block": _block(
        _MEMORY,
        _figure("memory_residuals", "What one block keeps, by the line that keeps it"),
        _contributors,
        _said(_blocks),
    ),
    "memory_norm": _block(_MEMORY, _norm("table"), _said(_norm("conclusions"))),
    "memory_checkpointing": _block(
        _MEMORY,
        _figure("memory_checkpointing", "Peak memory, activations and time of each strategy"),
        _checkpointing("table"),
        _said(_group_size),
        _said(_checkpointing("conclusions")),
        _nested_peak,
    ),
    # Attention
    "pytorch_attention": _block(
        _FLASH,
        _figure("flash_attention_memory", "Memory before the backward pass, and time, against the length"),
        _course_table,
        _said(_course_said("Memory: naive")),
        _said(_course_accounting),
        _said(_course_said("Growth, naive", "How to be rid")),
    ),
    "attention_intensity": _block(_FLASH, _said(_intensity)),
    "torch_compile_a": _block(_FLASH, _compiled_table, _said(_course_said("torch.compile against"))),
    "torch_compile_b": _block(
        _BENCHMARK,
        _figure("model_benchmark_compile", "Speed of a compiled step over an eager one"),
        _said(_compiled_model),
    ),
    "flash_forward": _block(
        "attention_sweep",
        _figure("attention_sweep_tiers_forward", "Time of each kernel at each pair of lengths, forward"),
        _answer("flash_forward", 0),
        _said(_accuracy),
    ),
    "flash_steps": _block(
        _FLASH,
        _figure("flash_attention_steps", "TFLOP/s of each step from the formula to the fastest kernel"),
        _steps_table,
        _figure("flash_attention_roofline", "Speed of each step against FLOPs for each byte"),
        _figure("flash_attention_counters", "How busy each step keeps the parts of a multiprocessor"),
        _said(_steps_said),
    ),
    "flash_backward": _block(
        "attention_sweep",
        _figure("attention_sweep_tiers_backward", "Time of each kernel at each pair of lengths, backward"),
        _answer("flash_backward", 0),
        _standings,
    ),
    "flash_benchmarking": _block(
        _FLASH,
        _figure(
            "flash_attention_benchmarking",
            "Time of plain, compiled and FlashAttention against the length, by pass, precision and head_dim",
        ),
        _bench_table,
        _said(_bench_said),
        _said(_slower_than_naive),
    ),
    # Data parallel training
    "collectives": _block(
        "data_parallel",
        _figure("collectives", "Bus bandwidth over message sizes", SEVERAL),
        _collectives_table,
        _answer("distributed_communication_single_node", 0),
        several=True,
    ),
    "wrappers": _block(
        "data_parallel",
        _figure("data_parallel_wrappers", "Time of a step under each wrapper", SEVERAL),
        _steps_table_of("wrappers", "wrapper", lambda row: f"`{row.wrapper}`"),
        several=True,
    ),
    "ddp_messages": _messages,
    "naive_ddp": _block("data_parallel", _said(_wrapper_said("naive")), several=True),
    "flat_ddp": _block("data_parallel", _said(_wrapper_said("flat")), several=True),
    "overlap_ddp": _block(
        "data_parallel",
        _figure("data_parallel_timeline", "When each wrapper computes and communicates", SEVERAL),
        _said(_wrapper_said("overlap")),
        several=True,
    ),
    "bucketed_ddp": _block(
        "data_parallel",
        _figure("data_parallel_buckets", "Time of a step over bucket sizes", SEVERAL),
        _steps_table_of("buckets", "bucket", lambda row: f"{row.bucket_mb:g} MB" if row.gpus > 1 else "one GPU"),
        _said(_study_said("buckets")),
        _said(_flash_ddp_said),
        several=True,
    ),
    "bucket_model": _block("data_parallel", _said(_bucket_model), several=True),
    "captured": _block("data_parallel", _captured_table, _said(_study_said("captured")), several=True),
    "scaling": _block(
        "data_parallel",
        _figure("data_parallel_scaling", "Tokens a second against the number of GPUs", SEVERAL),
        _steps_table_of("scaling", "wrapper", _wrapper_and_options),
        _said(_study_said("scaling")),
        several=True,
    ),
    # Sharding
    "sharding_state": _state_table,
    "sharding_memory": _block(
        "sharding",
        _figure("sharding_memory", "Memory of each sharding at each point of a step", SEVERAL),
        _sharding_table("memory"),
        _said(_sharding_memory("zero1", "zero2")),
        several=True,
    ),
    "sharding_speed": _block(
        "sharding",
        _figure("sharding_speed", "Time of a step against peak memory", SEVERAL),
        _sharding_table("speed"),
        _said(_sharding_speed("zero1", "zero2")),
        several=True,
    ),
    "fsdp_memory": _block("sharding", _said(_sharding_memory("fsdp on")), _said(_sharding_speed("fsdp")), several=True),
    "fsdp_gathers": _block(
        "sharding",
        _figure("sharding_timeline", "When fully sharded models compute and communicate", SEVERAL),
        _said(_gathers),
        several=True,
    ),
    **{f"accounting_{letter}": _accounting(letter) for letter in "abc"},
    "ring": _said(_ring),
    "bound_dp": _bound("DP"),
    "bound_fsdp": _bound("FSDP"),
    "bound_tp": _bound("TP"),
    "bound_mixed": _bound("FSDP + TP"),
    "bound_in_turn": _bound("FSDP + TP, axes in turn"),
    "bounds": _bounds_table,
    "parallelism": _figure("sharding_parallelism", "Computation and communication of each strategy", SEVERAL),
    # Leaderboards
    "board_2025": _block(_FLASH, _board_2025("table"), _said(_board_2025("conclusions")), _said(_board_floor)),
    "board_2026_floor": _board_2026_floor,
    # What did not work
    "costly_options": _block("train_step", _said(_costly_options)),
    "board_2026": _block("leaderboard", _board_2026("table"), _said(_board_2026("conclusions")), several=True),
}
