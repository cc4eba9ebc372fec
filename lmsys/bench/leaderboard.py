"""The course's leaderboards: the file that both share, and that of 2025. That of 2026, a training step, is lmsys.bench.board_2026.

2025: attention forward and backward, batch 1, 16 heads, 16,384 tokens, head_dim 64, causal, bf16.

The timed step is that of Stanford CS336's assignment 2 (2025): q, k and v are the thirds of one random tensor, the attention function runs under
torch.compile, the output's sum is differentiated, gradients accumulate, and triton.testing.do_bench times the whole; only the time
spent on it is shorter (rep). Sum, split and accumulation cost the same 0.1 to 0.2 ms for everybody; the column bare_ms is
the same compiled function without them, for a given random gradient, on the clock of lmsys.bench.measure.

Every implementation is checked against float64 first, as in the attention sweep; one that fails is a row. Where torch.compile cannot take an
implementation, it is measured without, and its row says so (compiled, note). On a machine without a GPU a smaller shape shows that
all of this works; such rows say that they are not the board's.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmsys import cost, records
from lmsys.attention import KERNELS, attention, get_kernel
from lmsys.attention.reference import own_code
from lmsys.bench import attention as sweeps
from lmsys.bench.measure import is_out_of_memory, measure, quantiles, release
from lmsys.config import require, resolve_scale
from lmsys.device import device_name, peak_flops, resolve_device

NAME = "leaderboard_results"
BOARD = "2025"
EXTRA_COLUMNS = (
    *("path", "batch", "heads", "seq_len", "head_dim", "dtype", "compiled", "p20_ms", "p80_ms", "bare_ms", "tflops"),
    *("error", "error_pytorch", "device", "note"),
    *("tokens_per_s", "loss", "plan", "predicted_ms", "predicted_peak_mib", "rates", "ready_s", "elapsed_s"),  # 2026
)
# The best verified entries of the course's public boards, times in ms: what others reach, on the hardware that they name.
PUBLIC = {"2025": (5.364, "one H100"), "2026": (3837.0, "two B200s")}
# Not run: at this length they take a second, or tens of GiB, or (tiles in PyTorch, under torch.compile) a graph of thousands of nodes.
_LEFT_OUT = ("scaled_dot_prod_attention", "vectorized_torch", "vectorized_torch_compiled", "flash_attention_torch")


@dataclass(frozen=True)
class BoardSettings:
    """What is run; make it with settings(). warmup_ms, rep_ms: do_bench's, in ms of work."""

    scale: str
    implementations: tuple[str, ...]
    heads: int
    seq_len: int
    head_dim: int
    dtype: str
    warmup_ms: int
    rep_ms: int
    device: str
    seed: int


_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"heads": 2, "seq_len": 64, "head_dim": 16, "dtype": "fp32"},
    "cpu": {"heads": 1, "seq_len": 128, "head_dim": 64, "dtype": "fp32"},
    "full": {"heads": 16, "seq_len": 16384, "head_dim": 64, "dtype": "bf16"},
}
_INTERPRETED = "in Triton's CPU interpreter, whose times say nothing"
_SAMPLES = {"smoke": 2, "cpu": 3, "full": 20}  # of bare_ms, and of all times on a CPU, where there is no do_bench


def settings(
    scale: str = "auto",
    implementations: Sequence[str] | None = None,
    warmup_ms: int = 200,
    rep_ms: int = 1000,
    device: str = "auto",
    seed: int = 0,
) -> BoardSettings:
    """The settings of the board: its shape at scale full, a small one else.

    Raises:
        ValueError: unknown implementation or scale, a time that is not positive, a device that is not here.
    """
    scale = resolve_scale(scale)
    for name, value in (("warmup_ms", warmup_ms), ("rep_ms", rep_ms)):
        require(type(value) is int and value >= 1, f"{name} is {value!r}; it must be 1 or more")
    if implementations is None:
        implementations = [name for name in KERNELS if name not in _LEFT_OUT]
    require(len(implementations) > 0, "implementations must not be empty")
    for name in implementations:
        get_kernel(name)
    resolve_device(device)
    return BoardSettings(
        scale=scale,
        implementations=tuple(implementations),
        warmup_ms=warmup_ms,
        rep_ms=rep_ms,
        device=device,
        seed=seed,
        **_PRESETS[scale],
    )


def run(board: BoardSettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None):
    """Measure the board; write leaderboard_results.csv and its .json to folder; return the rows as a DataFrame."""
    device = resolve_device(board.device)
    how = {
        "timer": "triton.testing.do_bench" if device.type == "cuda" else "time.perf_counter",
        "step": "torch.compile of attention, sum, backward into one tensor's gradient",
        "bare": "the same function's forward and gradients alone: CUDA events, cold L2",
        "statistic": "median, 20th and 80th percentile",
    }
    parameters = dataclasses.asdict(board)
    with writer(BOARD, folder, method=how, parameters=parameters) as out:
        for row in rows(board, device):
            out.write(row)
            if on_row:
                on_row(row)
    return read(folder, BOARD)


@contextlib.contextmanager
def writer(
    board: str, folder: str | Path, *, method: dict[str, Any], parameters: dict[str, Any]
) -> Iterator[records.ResultWriter]:
    """Write a board's rows to leaderboard_results.csv, where those of the other boards stay, as they are; their stamp goes to `others`."""
    path = Path(folder) / f"{NAME}.csv"
    stays, others = [], {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            stays = [row for row in csv.DictReader(file) if row["board"] != board]
        if stays and path.with_suffix(".json").exists():
            stamp = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            earlier = stamp["parameters"].pop("others", {})
            boards = {row["board"] for row in stays}
            others = {name: earlier.get(name, stamp) for name in sorted(boards)}
    if others:
        parameters = parameters | {"others": others}
    with records.ResultWriter(NAME, folder, method=method, parameters=parameters, extra_columns=EXTRA_COLUMNS) as out:
        for row in stays:
            out.write({name: value for name, value in row.items() if name in out.columns})
        yield out


def read(folder: str | Path, board: str):
    """A board's rows of a folder's leaderboard_results.csv, as a DataFrame."""
    frame = records.read_results(Path(folder) / f"{NAME}.csv")
    frame = frame[frame.board.astype(str) == board].reset_index(drop=True)
    for name in ("compiled",):  # mixed with another board's failed rows, truth comes back as text
        frame[name] = frame[name].map(lambda value: str(value).lower() == "true")
    return frame


def public(board: str) -> str:
    """The public board's best entry, in a sentence."""
    time_ms, hardware = PUBLIC[board]
    return f"Context: the best verified entry of the course's public board of {board} takes {time_ms:,.6g} ms, on {hardware}.\n"


def rows(board: BoardSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each implementation, flash_attention_triton's portable path beside its default where that is another."""
    shape = {"batch": 1, "heads": board.heads, "head_dim": board.head_dim, "dtype": board.dtype}
    case = sweeps.Case(BOARD, kv_heads=board.heads, q_len=board.seq_len, k_len=board.seq_len, causal=True, **shape)
    which = "forward_backward"
    sweep = sweeps.settings(
        board.scale, kernels=board.implementations, passes=[which], device=board.device, seed=board.seed
    )
    point = sweeps.Point(sweep, case, device)
    base = {"board": BOARD, "gpus": int(device.type == "cuda"), **shape, "seq_len": board.seq_len}
    base["device"] = device_name(device)
    remarks = [] if board.scale == "full" else ["not the board's shape"]
    for name in board.implementations:
        for runner in point.runners(name):
            named = base | {"implementation": name, "path": runner.paths.get(which, "")}
            checked = point.check(runner)[which]
            row = checked if "status" in checked else checked | _timed(board, runner, point, device)
            interpreted = [_INTERPRETED] if device.type == "cpu" and row["status"] == "ok" and "triton" in name else []
            yield named | row | {"note": "; ".join(filter(None, [row.get("note"), *interpreted, *remarks]))}
            release(device)


def _timed(board: BoardSettings, runner: sweeps.Runner, point: sweeps.Point, device: torch.device) -> dict[str, Any]:
    """The measured part of a row, under torch.compile, or without where that cannot take the implementation."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, causal=True, kernel=runner.kernel, **runner.options)

    try:
        return _step_times(board, torch.compile(own_code(call)), point, device) | {"compiled": True}
    except Exception as reason:  # said in the row's note, or the row itself
        if is_out_of_memory(reason):
            return point.failure(reason)
        note = f"measured without torch.compile, which fails: {point.failure(reason)['note']}"
    try:
        return _step_times(board, call, point, device) | {"compiled": False, "note": note}
    except Exception as reason:
        return point.failure(reason)


def _step_times(board: BoardSettings, function: Callable, point: sweeps.Point, device: torch.device) -> dict[str, Any]:
    thirds = torch.stack([t.detach() for t in (point.q, point.k, point.v)]).requires_grad_()
    q, k, v = thirds.unbind(0)

    def step() -> None:
        function(q, k, v).sum().backward()

    def bare() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(q, k, v), (q, k, v), point.grad)

    samples = _SAMPLES[board.scale]
    measured = measure(
        step, device=device, warmup=2, iterations=3 if device.type == "cuda" else samples, resident=[thirds]
    )
    alone = measure(bare, device=device, warmup=2, iterations=samples, resident=[thirds])
    if measured.status != "ok" or alone.status != "ok":
        return {"status": "oom", "note": measured.note or alone.note}
    times = measured.times_ms
    if device.type == "cuda":
        from triton.testing import do_bench

        times = do_bench(step, warmup=board.warmup_ms, rep=board.rep_ms, return_mode="all")
    median, p20, p80 = quantiles(times)
    shape = (1, board.heads, board.seq_len, board.seq_len, board.head_dim, True, "forward_backward")
    flops = cost.attention_flops(*shape)
    rate = flops / median * 1e3
    peak = peak_flops(device_name(device), board.dtype)
    return {
        "status": "ok",
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "samples": len(times),
        "bare_ms": alone.median_ms,
        "tflops": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
        "peak_mib": measured.peak_mib,
    }


# --- What it says ---------------------------------------------------------------------------------


def series(row: Any) -> str:
    """An implementation as it is shown: with its path where it has one."""
    path = row["path"]
    return f"{row['implementation']} ({path})" if isinstance(path, str) and path else row["implementation"]


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    if row["status"] != "ok":
        return f"{series(row):<40} {row['status']}: {row['note']}"
    how = "" if row["compiled"] else ", not compiled"
    return (
        f"{series(row):<40} {row['median_ms']:>9.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}]{how}; "
        f"alone {row['bare_ms']:.4g} ms"
    )


def table(frame) -> str:
    """The board as Markdown, fastest first."""
    ok = frame[frame.status == "ok"].sort_values("median_ms")
    lines = []
    for _, row in ok.iterrows():
        lines.append(
            {
                "implementation": f"`{row.implementation}`"
                + (f", {row.path} path" if isinstance(row.path, str) else ""),
                "ours": _ours(row),
                "time": records.spread(row.median_ms, row.p20_ms, row.p80_ms)
                + ("" if row.compiled else ", not compiled"),
                "bare": records.significant(row.bare_ms),
                "tflops": records.significant(row.tflops),
                "mfu": "" if row.mfu != row.mfu else f"{100 * row.mfu:.1f}%",
                "peak": f"{row.peak_mib:,.0f}",
            }
        )
    for _, row in frame[frame.status != "ok"].iterrows():
        lines.append({"implementation": _name(row), "ours": _ours(row), "time": row.status})
    columns = {
        "implementation": "implementation",
        "ours": "",
        "time": "the board's step, ms",
        "bare": "attention alone, ms",
    }
    return records.markdown_table(lines, columns | {"tflops": "TFLOP/s", "mfu": "of peak", "peak": "peak MiB"})


def _name(row: Any) -> str:
    return f"`{row.implementation}`" + (f", {row.path} path" if isinstance(row.path, str) else "")


def _ours(row: Any) -> str:
    return "ours" if KERNELS[row.implementation].ours else ""


def conclusions(frame) -> list[str]:
    """What the board shows, in sentences made from its rows."""
    ok = frame[frame.status == "ok"].sort_values("median_ms")
    said = []
    if len(ok):
        first = ok.iloc[0]
        shape = f"batch 1, {first.heads} heads, {first.seq_len:,} tokens, head_dim {first.head_dim}, {first['dtype']}, causal"
        said.append(
            f"Forward and backward, {shape}: **{series(first)}** is the fastest at {records.significant(first.median_ms)} ms."
        )
        ours = ok[[KERNELS[name].ours for name in ok.implementation]]
        peers = ok[[not KERNELS[name].ours for name in ok.implementation]]
        if len(ours) and len(peers) and _INTERPRETED not in str(ours.iloc[0].note):
            best = ours.iloc[0]
            ratios = [
                f"{row.median_ms / best.median_ms:.2f} times the speed of {row.implementation}"
                for row in peers.itertuples()
            ]
            said.append(
                f"The best of ours, {series(best)}, takes {records.significant(best.median_ms)} ms: {', '.join(ratios)}."
            )
    for _, row in frame[frame.status != "ok"].iterrows():
        said.append(f"{row.implementation} has no time, {row.status}: {row.note}")
    for _, row in ok[~ok.compiled.astype(bool)].iterrows():
        said.append(f"{row.implementation}: {row.note}")
    return said


def write_report(frame, folder: str | Path) -> Path:
    """Write leaderboard_report.md of the board's rows to folder; return its path."""
    text = ["# The 2025 board", "", f"Measured on {frame.device.iloc[0]}.", ""]
    text += [*(f"- {sentence}" for sentence in conclusions(frame)), "", table(frame), public(BOARD)]
    return records.write_text(Path(folder) / "leaderboard_report.md", "\n".join(text))
