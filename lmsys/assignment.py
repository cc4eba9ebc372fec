"""The problems of Stanford CS336, assignment 2 (systems), and their answers, filled from what was measured.

Names and points are those of the course's handouts: spring 2025, and spring 2026 (version 26.1.1). An answer is made from the CSV files of the
reference machines each time that the site is built; where a file is not there yet, the answer says what will measure it. Answers that are
calculated use lmsys.cost.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmsys import cost, records
from lmsys.records import HEADLINE_MACHINE as MACHINE

EDITIONS = ("2025", "2026")
SEVERAL = ("h200-x2", "h200-x4", "h200-x8")  # of those measured, the first: the course asks for two GPUs


class Missing(Exception):
    """No machine has measured this yet."""


def frame_of(name: str, machines: Sequence[str]):
    for machine in machines:
        path = records.REPOSITORY / "artifacts" / machine / f"{name}.csv"
        if path.exists():
            return records.read_results(path)
    raise Missing


def one(name: str):
    """A result of one GPU."""
    return frame_of(name, (MACHINE,))


def many(name: str):
    """A result of several GPUs."""
    return frame_of(name, SEVERAL)


def measured(frame, **columns: Any):
    """The rows with these values that were measured.

    Raises:
        Missing: there are none.
    """
    frame = frame[frame.status == "ok"]
    for column, value in columns.items():
        frame = frame[frame[column] == value]
    if frame.empty:
        raise Missing
    return frame


def _joined(letter: str, sentences: Iterable[str]) -> list[str]:
    """The sentences as the answer to one letter of a problem.

    Raises:
        Missing: there are none.
    """
    text = " ".join(sentences)
    if not text:
        raise Missing
    return [f"({letter}) {text}"]


# --- Answers --------------------------------------------------------------------------------------


def _benchmarking_script() -> list[str]:
    eager = measured(one("model_benchmark_results"), compiled="no")
    for dtype in ("fp32", "tf32", "bf16"):
        rows = eager[eager.dtype == dtype]
        if not rows.empty:
            break
    context = 512 if 512 in set(rows.context_length) else rows.context_length.max()
    rows = rows[rows.context_length == context]
    parts = []
    for size, group in rows.groupby("size", sort=False):
        by = group.drop_duplicates("mode").set_index("mode")
        if {"forward", "forward_backward"} <= set(by.index):
            backward = by.mean_ms["forward_backward"] - by.mean_ms["forward"]
            parts.append(
                f"{size} {records.significant(by.mean_ms['forward'])} ± {records.significant(by.std_ms['forward'], 2)} and "
                f"{records.significant(backward)} ms"
            )
    share = (rows.std_ms / rows.mean_ms).median()
    return [
        f"Forward and backward pass at {context:,} tokens, {dtype}: {'; '.join(parts)}; the standard deviation is "
        f"{100 * share:.1f}% of the mean at the median."
    ]


def _warmup() -> list[str]:
    from lmsys.bench.model_report import MODES_SAID

    frame = one("model_benchmark_warmup").sort_values("step")
    first, second, later = frame.time_ms.iloc[0], frame.time_ms.iloc[1], frame.time_ms.iloc[2:].median()
    row = frame.iloc[0]
    return [
        f"Without warm-up the first step counts ({row['size']}, {row.context_length:,} tokens, {row['dtype']}, {MODES_SAID[row['mode']]}), which takes "
        f"{records.significant(first)} ms; the second takes {records.significant(second)} ms and the later ones {records.significant(later)} ms."
    ]


def _nsys_profile() -> list[str]:
    from lmsys.bench import profile

    results, kernels = one(profile.NAME), profile.known(one(profile.KERNELS))
    said = []
    for letter, (_, answer) in profile.ANSWERS.items():
        said.append(f"({letter}) {answer(results, kernels)[-1]}")
    return said


def _accumulation() -> list[str]:
    from lmsys.bench import precision

    return precision.sums_conclusions(one("mixed_precision_sums"))[:2]


def _autocast_dtypes() -> list[str]:
    from lmsys.bench import precision

    return _joined("a", precision.dtypes_conclusions(one("mixed_precision_dtypes"))[:1])


def _layer_norm() -> list[str]:
    from lmsys.bench import precision

    return _joined("b", precision.layer_norm_conclusions(one("mixed_precision_layer_norm"))[:1])


def _mixed_precision_speed() -> list[str]:
    eager = measured(one("model_benchmark_results"), compiled="no", mode="forward_backward", context_length=512)
    parts = []
    for size, group in eager.groupby("size", sort=False):
        by = group.drop_duplicates("dtype").set_index("dtype").mean_ms
        if {"fp32", "bf16"} <= set(by.index):
            parts.append(f"{size} {by['fp32'] / by['bf16']:.2f}")
    if not parts:
        raise Missing
    return [f"(c) Forward and backward in bf16, times as fast as in fp32 at 512 tokens: {', '.join(parts)}."]


def _memory_profiling() -> list[str]:
    from lmsys.bench import memory

    frame = one("memory_peaks")
    ok = measured(frame)
    longest = ok[ok.context_length == ok.context_length.max()]
    peaks = ", ".join(
        f"{row.mode.replace('_', ' ')} in {row.dtype} {row.peak_mib:,.0f} MiB (`{row.kernel}`)"
        for row in longest.drop_duplicates(["mode", "dtype"]).itertuples()
    )
    return [f"Peaks at {int(longest.context_length.iloc[0]):,} tokens: {peaks}.", *memory.peaks_conclusions(frame)[:1]]


def _gradient_checkpointing() -> list[str]:
    from lmsys.bench import memory

    return memory.checkpointing_conclusions(one("memory_checkpointing"))[:3]


def _pytorch_attention() -> list[str]:
    from lmsys.bench import flash_report

    said = flash_report.course_conclusions(one("pytorch_attention_results"))
    return [
        sentence for sentence in said if sentence.startswith(("Memory: naive", "Accounting, naive", "Growth, naive"))
    ]


def _compiled_attention() -> list[str]:
    from lmsys.bench import flash_report

    said = flash_report.course_conclusions(one("pytorch_attention_results"))
    return _joined("a", (sentence for sentence in said if "torch.compile against eager" in sentence))


def _compiled_model() -> list[str]:
    from lmsys.bench import model_report

    return _joined("b", model_report.compile_said(one("model_benchmark_results")))


def _flash(which: str) -> Callable[[], list[str]]:
    def answer() -> list[str]:
        rows = measured(one("attention_sweep_results"), kernel="flash_attention_triton", causal=True)
        rows = rows[(rows["pass"] == which) & (rows.q_len == rows.k_len)]
        if rows.empty:
            raise Missing
        row = rows[rows.q_len == rows.q_len.max()].iloc[0]
        return [
            f"In Triton, {which}, causal, {row.q_len:,} tokens, batch {row.batch}, {row.heads} heads of {row.head_dim}, {row['dtype']}: "
            f"{records.significant(row.median_ms)} ms, {row.tflops:,.0f} TFLOP/s."
        ]

    return answer


def _flash_benchmarking() -> list[str]:
    from lmsys.bench import flash_report

    return flash_report.bench_conclusions(one("flash_benchmarking_results"))[:2]


def _board(board: str) -> Callable[[], list[str]]:
    def answer() -> list[str]:
        frame = one("leaderboard_results") if board == "2025" else many("leaderboard_results")
        frame = frame[frame.board.astype(str) == board]
        if frame.empty:
            raise Missing
        best = measured(frame).sort_values("median_ms")
        paths = best["path"].fillna("") if "path" in best else [""] * len(best)
        return [
            "; ".join(
                f"`{row.implementation}`{f' ({path} path)' if path else ''} {records.significant(row.median_ms)} ms"
                for row, path in zip(best.itertuples(), paths, strict=True)
            )
            + "."
        ]

    return answer


def _communication() -> list[str]:
    from lmsys.bench import collectives

    rows = many("collectives_results")
    return collectives.conclusions(rows[rows.op == "all_reduce"])


def _wrapper(name: str) -> Callable[[], list[str]]:
    def answer() -> list[str]:
        from lmsys.bench import data_parallel

        rows = measured(
            data_parallel.rows_of(many("data_parallel_results"), "wrappers"), study="wrappers", wrapper=name
        )
        row = rows[rows.gpus > 1].iloc[0]
        return [f"`{name}`, {row['size']} on {row.gpus} GPUs: {data_parallel.step_text(row)}."]

    return answer


def _buckets() -> list[str]:
    from lmsys.bench import data_parallel

    return data_parallel.conclusions(measured(many("data_parallel_results"), study="buckets"), "buckets")


def _bucket_formula() -> list[str]:
    return ["(b) The overhead is $s / (n w) + n o$ for $n$ buckets, least at buckets of $\\sqrt{s w o}$ bytes."]


def _accounting() -> list[str]:
    from lmsys.bench import sharding

    return sharding.accounting(None)


def _sharding_memory() -> list[str]:
    from lmsys.bench import sharding

    said = sharding.memory_conclusions(many("sharding_memory"))
    return _joined("a", (sentence for sentence in said if "zero1" in sentence))


def _sharding_speed() -> list[str]:
    from lmsys.bench import sharding

    said = sharding.speed_conclusions(many("sharding_results"))
    return _joined("b", (sentence for sentence in said if "step of zero1" in sentence))


def _zero_stages() -> list[str]:
    return [
        "(c) ZeRO's first stage scatters gradients to their owners and gathers parameters, $2 P (N-1) / N$ elements; all-reducing the gradients "
        "instead, as here, sends $3 P (N-1) / N$."
    ]


def _fsdp_memory() -> list[str]:
    from lmsys.bench import sharding

    said = sharding.memory_conclusions(many("sharding_memory"))
    return _joined("a", (sentence for sentence in said if sentence.startswith("fsdp on")))


def _fsdp_gathers() -> list[str]:
    from lmsys.bench import sharding

    return _joined("b", sharding.forward_gather(many("sharding_timeline")))


def _ring() -> list[str]:
    return ["$(N - 1) S / W$: whole tensors go around, $N / 2$ times as long as reduce-scatter and all-gather."]


def _bound(name: str, formula: str) -> Callable[[], list[str]]:
    """A formula with its number."""
    return lambda: [formula, bound_said(name)]


def bound_said(name: str) -> str:
    """The most devices of a strategy of sharding.bounds for a SwiGLU layer of the course's XXL width, 2^20 tokens, on a TPU v5p."""
    from lmsys.bench import sharding

    layer, tokens = cost.FeedForward(cost.XXL.d_model, cost.XXL.d_ff), 2**20
    most = math.floor(sharding.bounds(cost.TPU_V5P, layer, tokens)[name])
    return f"At $D$ = {layer.d_model:,}, $F$ = {layer.d_ff:,}, $B$ = {tokens:,} and a TPU v5p: up to {most:,} devices."


_DP = "Backward $12 B D F / N$ FLOPs a device, $12 D F (N - 1) / (N W)$ seconds of all-reduce: compute-bound up to $N = 1 + B W / C$."
_FSDP = "Forward $6 B D F / N$ FLOPs and $6 D F (N - 1) / (N W)$ seconds of all-gather, backward twice both: up to $N = 1 + B W / C$ in either pass."
_TP = (
    "Backward: $dz = dy\\,W_3^T$, through the product and the gate to $dx_1$, $dx_2$, then $dx$ = all-reduce$(dx_1 W_1^T + dx_2 W_2^T)$, each weight's gradient "
    "on its own device. Forward $6 B D F / N$ FLOPs, backward twice that; $4 B D (N - 1) / (N W)$ seconds in either: up to $N = 1 + 3 F W / (2 C)$ "
    "forward and $1 + 3 F W / C$ backward."
)
_MIXED = (
    "$6 B D F / (N_F N_T)$ FLOPs; max$(6 D F (N_F - 1), 4 B D (N_T - 1)) / (N_F N_T W)$ seconds: up to the product of the two bounds. On shared links "
    "$N \\le (3 B F W / C + 3 F + 2 B)^2 / (24 B F)$."
)


# --- The problems ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Part of an answer. notebook: where it is measured; None: nothing is. several: on several GPUs."""

    answer: Callable[[], list[str]]
    notebook: str | None = None
    several: bool = False


@dataclass(frozen=True)
class Problem:
    """points: in EDITIONS' order, None where the edition does not have it. code: what was written for it, and its tests."""

    name: str
    points: tuple[int | None, int | None]
    parts: tuple[Part, ...] = ()
    code: tuple[str, ...] = ()
    optional: bool = False


def _single(answer: Callable[[], list[str]], notebook: str) -> Part:
    return Part(answer, notebook)


def _data_parallel(answer: Callable[[], list[str]]) -> Part:
    return Part(answer, "data_parallel", several=True)


def _sharding(answer: Callable[[], list[str]]) -> Part:
    return Part(answer, "sharding", several=True)


_FLASH_CODE = ("lmsys/attention/flash_torch.py", "lmsys/attention/flash_triton.py", "tests/test_attention_triton.py")
_DDP_CODE = ("lmsys/parallel/ddp.py", "tests/test_parallel_ddp.py")
_BENCHMARK, _PROFILE = ("lmsys/bench/model.py",), ("lmsys/bench/profile.py",)

PROBLEMS: tuple[Problem, ...] = (
    Problem(
        "benchmarking_script",
        (4, 4),
        (_single(_benchmarking_script, "model_benchmark"), _single(_warmup, "model_benchmark")),
        _BENCHMARK,
    ),
    Problem("nsys_profile", (5, 5), (_single(_nsys_profile, "profiling"),), _PROFILE),
    Problem("mixed_precision_accumulation", (1, 1), (_single(_accumulation, "mixed_precision"),)),
    Problem(
        "benchmarking_mixed_precision",
        (2, 2),
        (
            _single(_autocast_dtypes, "mixed_precision"),
            _single(_layer_norm, "mixed_precision"),
            _single(_mixed_precision_speed, "model_benchmark"),
        ),
    ),
    Problem("memory_profiling", (4, 4), (_single(_memory_profiling, "memory"),)),
    Problem("gradient_checkpointing", (None, 4), (_single(_gradient_checkpointing, "memory"),)),
    Problem("pytorch_attention", (2, 2), (_single(_pytorch_attention, "flash_attention"),)),
    Problem(
        "torch_compile",
        (2, 2),
        (_single(_compiled_attention, "flash_attention"), _single(_compiled_model, "model_benchmark")),
    ),
    Problem("flash_forward", (15, 15), (_single(_flash("forward"), "attention_sweep"),), _FLASH_CODE),
    Problem("flash_backward", (5, 5), (_single(_flash("backward"), "attention_sweep"),), _FLASH_CODE),
    Problem("flash_benchmarking", (5, 5), (_single(_flash_benchmarking, "flash_attention"),)),
    Problem(
        "leaderboard (attention)",
        (0, None),
        (_single(_board("2025"), "flash_attention"),),
        ("lmsys/bench/leaderboard.py",),
        True,
    ),
    Problem(
        "distributed_communication_single_node",
        (5, 5),
        (_data_parallel(_communication),),
        ("lmsys/bench/collectives.py",),
    ),
    Problem("naive_ddp", (5, 5), code=_DDP_CODE),
    Problem("naive_ddp_benchmarking", (3, 3), (_data_parallel(_wrapper("naive")),)),
    Problem("minimal_ddp_flat_benchmarking", (2, 2), (_data_parallel(_wrapper("flat")),)),
    Problem("ddp_overlap_individual_parameters", (5, 5), code=_DDP_CODE),
    Problem("ddp_overlap_individual_parameters_benchmarking", (1, 1), (_data_parallel(_wrapper("overlap")),)),
    Problem("ddp_overlap_bucketed", (8, None), code=_DDP_CODE),
    Problem("ddp_bucketed_benchmarking", (3, None), (_data_parallel(_buckets), Part(_bucket_formula))),
    Problem("communication_accounting", (10, None), (Part(_accounting),), ("lmsys/cost.py", "tests/test_cost.py")),
    Problem("optimizer_state_sharding", (15, 15), code=("lmsys/parallel/zero1.py", "tests/test_parallel_zero1.py")),
    Problem(
        "optimizer_state_sharding_accounting",
        (5, 5),
        (_sharding(_sharding_memory), _sharding(_sharding_speed), Part(_zero_stages)),
    ),
    Problem("fsdp", (None, 15), code=("lmsys/parallel/fsdp.py", "tests/test_parallel_fsdp.py")),
    Problem("fsdp_accounting", (None, 5), (_sharding(_fsdp_memory), _sharding(_fsdp_gathers))),
    Problem("alternate_ring_all_reduce", (None, 1), (Part(_ring),), ("lmsys/cost.py",)),
    Problem("data_parallel_calcs", (None, 3), (Part(_bound("DP", _DP)),), ("lmsys/cost.py",)),
    Problem("fsdp_calcs", (None, 3), (Part(_bound("FSDP", _FSDP)),), ("lmsys/cost.py",)),
    Problem("tp_calcs", (None, 4), (Part(_bound("TP", _TP)),), ("lmsys/cost.py",)),
    Problem("fsdp_tp_calcs", (None, 6), (Part(_bound("FSDP + TP", _MIXED)),), ("lmsys/cost.py",)),
    Problem("leaderboard (training step)", (None, 10), (Part(_board("2026"), "leaderboard", several=True),)),
)


def points(edition: str) -> int:
    """All points of an edition."""
    return sum(problem.points[EDITIONS.index(edition)] or 0 for problem in PROBLEMS)


def answer(problem: Problem) -> str:
    """The answer as text: what was measured, and what will be measured by what."""
    said: list[str] = []
    missing: list[str] = []
    for part in problem.parts:
        try:
            said += part.answer()
        except Missing:
            missing.append(how(part))
    if not problem.parts:
        said.append("Implemented here, with tests.")
    return " ".join([*said, *dict.fromkeys(missing)])


def how(part: Part) -> str:
    """What will bring a part's measurement."""
    if part.notebook is None:
        return "Not measured yet; no notebook runs it so far."
    machine = SEVERAL[0] if part.several else MACHINE
    return f"Not measured yet; `python -m lmsys report {part.notebook} --scale full --machine {machine}` measures it."


def breakable(text: str, longest: int = 28) -> str:
    """Markdown whose code spans of more than so many characters may break after each underscore, comma and slash: else they set the width of a table."""

    def code(found: re.Match) -> str:
        name = found[1]
        if len(name) <= longest:
            return found[0]
        pieces = (
            html.escape(piece).replace("_", "&#95;").replace("*", "&#42;") for piece in re.split(r"(?<=[_,/])", name)
        )
        return f'<code class="docutils literal">{"<wbr>".join(pieces)}</code>'

    return re.sub(r"`([^`]+)`", code, text)


def where(problem: Problem) -> str:
    """Links to the executed notebooks and names of the files."""
    found = []
    for part in problem.parts:
        if part.notebook is not None:
            machines = SEVERAL if part.several else (MACHINE,)
            executed = (f"{machine}/{part.notebook}.ipynb" for machine in machines)
            link = next((name for name in executed if (records.REPOSITORY / "book" / name).exists()), None)
            found.append(f"[{part.notebook}]({link})" if link else f"`{part.notebook}`")
    return ", ".join(dict.fromkeys([*found, *(f"`{name}`" for name in problem.code)]))


def table() -> str:
    """Every problem: its points in each edition, the answer, and where it is worked out."""
    lines = []
    for problem in PROBLEMS:
        shown = ["" if count is None else "optional" if problem.optional else str(count) for count in problem.points]
        place = where(problem)
        lines.append(
            {"problem": problem.name.replace("_", "\\_<wbr>")}  # long names may break, so that the answers have room
            | dict(zip(EDITIONS, shown, strict=True))
            | {"answer, and where": breakable(answer(problem) + (f" *In* {place}." if place else ""))}
        )
    sums = {edition: str(points(edition)) for edition in EDITIONS}
    return records.markdown_table([*lines, {"problem": "all"} | sums]).rstrip()
