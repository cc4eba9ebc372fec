"""The course's leaderboards: the file that both share, and that of 2025. That of 2026, a training step, is board_2026.

2025: attention forward and backward, batch 1, 16 heads, 16,384 tokens, head_dim 64, causal, bf16.

The timed step is that of Stanford CS336's assignment 2 (2025): q, k and v are the thirds of one random tensor, the
attention function runs under torch.compile, the output's sum is differentiated, gradients accumulate, and
triton.testing.do_bench times the whole; only the time spent on it is shorter (rep_ms). Sum, split and accumulation cost
the same 0.1 to 0.2 ms for everybody; the column bare_ms is the same compiled function without them, for a given random
gradient, on the clock of lmsys.bench.measure.

Every implementation is checked against float64 first, as in the attention sweep. Where torch.compile cannot take an
implementation, it is measured without, and its row says so (compiled, note). On a machine without a GPU a smaller shape
shows that all of this works; such rows say that they are not the board's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lmsys import cost, records
from lmsys.attention import KERNELS, attention
from lmsys.attention.reference import own_code
from lmsys.bench import attention as sweeps
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_names, require_numbers, scales
from lmsys.bench.measure import DTYPES, Measurement, failure, measure, quantiles
from lmsys.device import device_name, peak_flops, resolve_device

NAME, BOARD = "leaderboard_results", "2025"
COLUMNS = (
    *("board", "implementation", "gpus", "status", "median_ms", "samples", "mfu", "peak_mib"),
    *("path", "batch", "heads", "seq_len", "head_dim", "dtype", "compiled", "p20_ms", "p80_ms", "bare_ms", "tflops"),
    *("error", "error_pytorch", "device", "note"),
    *("tokens_per_s", "loss", "plan", "predicted_ms", "predicted_peak_mib", "rates", "ready_s", "elapsed_s"),  # 2026
)
# The best verified entries of the course's public boards, ms: what others reach, on the hardware that they name.
PUBLIC = {"2025": (5.364, "one H100"), "2026": (3837.0, "two B200s")}
# Left out: at this length they take a second, or tens of GiB, or (tiles in PyTorch) a graph of thousands of nodes.
IMPLEMENTATIONS = tuple(name for name, kernel in KERNELS.items() if not kernel.slow)
SCALES = scales("leaderboard_shapes")
_PASS = "forward_backward"
_INTERPRETED = "in Triton's CPU interpreter, whose times say nothing"


def check(p: Parameters) -> None:
    """Raises ValueError: an unknown board or implementation of it, a number out of range."""
    from lmsys.bench import board_2026

    known = {BOARD: tuple(KERNELS), board_2026.BOARD: board_2026.IMPLEMENTATIONS}
    require_names(p, {"board": known})
    require_names(p, {"implementations": [name for board in p.board for name in known[board]]})
    require_numbers(p, {"warmup_ms": 1, "rep_ms": 1, "timed_steps": 1, "margin_gib": 0})
    p.board_kernels = [name for name in p.implementations or () if name in KERNELS]
    if p.plan:
        p.board = []
    if board_2026.BOARD in p.board:
        board_2026.parameters(p)


NOTEBOOK = Notebook("leaderboard", check)


def points(p: Parameters) -> list[Point]:
    """Each implementation, flash_attention_triton also on its portable path where that is not its default."""
    device, shape = resolve_device(p.device), {"batch": 1} | SCALES[p.scale]["attention"]
    shape |= {"q_len": shape["seq_len"], "k_len": shape["seq_len"], "kv_heads": shape["heads"], "causal": True}
    base = {"board": BOARD, "gpus": int(device.type == "cuda"), "tier": BOARD} | shape
    return [
        base | {"implementation": name, "path": paths.get(_PASS, ""), "options": options}
        for name in p.board_kernels or IMPLEMENTATIONS
        for options, paths in sweeps.variants(name, shape, device)
    ]


def measure_point(point: Point, p: Parameters) -> Row:
    """Errors against float64, then the board's step under torch.compile, or without where that cannot take it."""
    name, options = point["implementation"], point["options"]
    case = sweeps.case_of(point, Parameters(passes=[_PASS], device=p.device, seed=p.seed))
    checked = case.check(name, options)[_PASS]
    if "status" in checked:
        return checked

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, causal=True, kernel=name, **options)

    notes = [] if p.scale == "full" else ["not the board's shape"]
    if case.device.type == "cpu" and "triton" in name:
        notes.append(_INTERPRETED)
    try:
        row = step_times(torch.compile(own_code(call)), case, p) | {"compiled": True}
    except Exception as error:
        row = failure(error)
    if row.get("status", "ok") not in ("ok", "oom"):
        notes.append(f"measured without torch.compile, which fails: {row['note']}")
        row = step_times(call, case, p) | {"compiled": False}
    return checked | row | {"note": "; ".join(filter(None, [row.get("note"), *notes]))}


def step_times(function: Callable, case: sweeps.Case, p: Parameters) -> Row:
    """The board's step, and the function alone."""
    thirds = torch.stack([t.detach() for t in (case.q, case.k, case.v)]).requires_grad_()
    q, k, v = thirds.unbind(0)

    def step() -> None:
        function(q, k, v).sum().backward()

    def bare() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(q, k, v), (q, k, v), case.grad)

    def timed(call: Callable, samples: int) -> Measurement:
        return measure(call, device=case.device, warmup=2, iterations=samples, resident=[thirds])

    gpu, samples = case.device.type == "cuda", SCALES[p.scale]["samples"]
    whole, alone = timed(step, 3 if gpu else samples), timed(bare, samples)
    times = whole.times_ms
    if gpu:
        from triton.testing import do_bench

        times = do_bench(step, warmup=p.warmup_ms, rep=p.rep_ms, return_mode="all")
    median, p20, p80 = quantiles(times)
    batch, heads, length, head_dim = case.q.shape
    rate = cost.attention_flops(batch, heads, length, length, head_dim, True, _PASS) / median * 1e3
    peak = peak_flops(device_name(case.device), next(name for name, dtype in DTYPES.items() if dtype == case.q.dtype))
    row = {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(times), "bare_ms": alone.median_ms}
    return row | {"tflops": rate / 1e12, "mfu": peak and rate / peak, "peak_mib": whole.peak_mib}


ATTENTION = Experiment(
    name=NAME,
    columns=COLUMNS,
    points=points,
    measure=measure_point,
    group=("board",),
    method=lambda p: {
        "timer": "triton.testing.do_bench" if resolve_device(p.device).type == "cuda" else "time.perf_counter",
        "step": "torch.compile of attention, sum, backward into one tensor's gradient",
        "bare": "the same function's forward and gradients alone: CUDA events, cold L2",
        "statistic": "median, 20th and 80th percentile",
    },
)


def other_boards(board: str) -> Callable[[Row], bool]:
    """Which rows of leaderboard_results.csv are not this board's: those that its run keeps."""
    return lambda row: str(row["board"]) != board


def of_board(frame, board: str):
    """A board's rows."""
    return frame[frame.board.astype(str) == board].reset_index(drop=True)


def table(frame):
    """A board, fastest first; `ours beside it`: a peer's time over that of the fastest of ours, with a verdict."""
    ours = {name for name, kernel in KERNELS.items() if kernel.ours} | {"lmsys"}
    frame = frame.sort_values("median_ms", na_position="last")
    frame = frame.assign(**frame[["path", "note"]].astype(object).fillna(""))
    timed = (frame.status == "ok") & ~frame.note.str.contains(_INTERPRETED)
    best = next((row for _, row in frame[frame.implementation.isin(ours) & timed].iterrows()), None)

    def beside(row: Any) -> str:
        if row.implementation in ours or best is None or row.status != "ok":
            return "ours" if row.implementation in ours else ""
        return f"{row.median_ms / best.median_ms:.2f}, {records.verdict(row, best)}"

    rows = [row for _, row in frame.iterrows()]
    steps = [records.spread(r.median_ms, r.p20_ms, r.p80_ms) if r.status == "ok" else r.status for r in rows]
    frame = frame.assign(**{"step, ms": steps, "ours beside it": [beside(row) for row in rows]})
    columns = [
        "implementation",
        "path",
        "step, ms",
        "ours beside it",
        "predicted_ms",
        "bare_ms",
        "tokens_per_s",
        "tflops",
    ]
    columns += ["mfu", "peak_mib", "predicted_peak_mib", "loss", "error", "error_pytorch", "plan", "rates", "note"]
    return frame[columns].dropna(axis=1, how="all")
