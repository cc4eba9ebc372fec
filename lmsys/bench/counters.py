"""The GPU's hardware counters of each step of the attention kernel, read by NVIDIA's Nsight Compute (ncu).

COUNTERS starts `ncu python -m lmsys.bench.counters ...` on the steps of lmsys.bench.flash. The driver, main() here,
warms each step up outside the profile, then calls it once and launches an empty kernel as a mark; what ncu writes is
cut at the marks. A step of several kernels is their sum (time, bytes) or their mean weighted by time (percentages).

Of a counter's metrics, whose names change between GPU generations, the first that the GPU has is taken; a counter that
it has not stays empty. Where there is no ncu, or it refuses, each step is a row with status unsupported and the reason.

Limits: ncu flushes the caches before each kernel and runs it again for each group of counters, so bytes between the
kernels of a step are all counted as device memory's, and the time is that of one cold launch: times of the steps are in
flash_steps_results.csv.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lmsys import records
from lmsys.bench import flash
from lmsys.bench.experiment import Experiment, Parameters, Point, Row
from lmsys.device import resolve_device

_LIMIT_S, _LIST_LIMIT_S = 75, 20  # ncu is stopped after this long; listing metrics after this long
_MARK = "spin_kernel"  # the kernel of torch.cuda._sleep

# Column -> metrics. All are in ncu's base units: ns, bytes, percent of the peak.
METRICS: dict[str, tuple[str, ...]] = {
    "time_ms": ("gpu__time_duration.sum",),
    "dram_mib": ("dram__bytes.sum",),
    "l2_mib": ("lts__t_bytes.sum",),
    "tensor_pct": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "exp_pct": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",),
    "shared_pct": (
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
        "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    ),
    "issue_pct": ("sm__inst_issued.avg.pct_of_peak_sustained_active",),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
_SCALES = {"time_ms": 1e-6, "dram_mib": 2**-20, "l2_mib": 2**-20}
_LEFT_OUT = "counted at the largest head dim only: for each of its hundreds of kernels ncu takes tens of milliseconds"


def steps(p: Parameters) -> list[Point]:
    """The steps' forward passes."""
    return [point for point in flash.step_points(p) if point["pass"] == "forward"]


def rows(p: Parameters) -> list[Row]:
    """A row for each head dim and step."""
    counted: dict[tuple[int, str], Row] = {}
    reason = _missing(resolve_device(p.device))
    if reason is None:
        try:
            counted = _profile(p)
        except _Refused as refusal:
            reason = str(refusal)
    found = []
    for point in steps(p):
        row = {name: value for name, value in point.items() if name in COUNTERS.columns}
        why = reason or (_LEFT_OUT if left_out(point, p) else "does not run here")
        missing = {"status": "unsupported", "note": why}
        found.append(row | counted.get((point["head_dim"], point["step"]), missing))
    return found


def left_out(point: Point, p: Parameters) -> bool:
    return point["step"] == "tiled PyTorch" and point["head_dim"] != max(p.step_head_dims)


class _Refused(Exception):
    """Why ncu gave no counters."""


def _missing(device: torch.device) -> str | None:
    """Why there is nothing to count with, or None."""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if shutil.which("ncu") is None:
        return "needs ncu (NVIDIA Nsight Compute) on the PATH, which is not there"
    return None


def _profile(p: Parameters) -> dict[tuple[int, str], Row]:
    """(head_dim, step) -> the measured part of a row."""
    with tempfile.TemporaryDirectory(prefix="lmsys-ncu-") as temporary:
        log, done = Path(temporary) / "log.csv", Path(temporary) / "done.json"
        metrics = _available()
        points = [point for point in steps(p) if not left_out(point, p)]
        work = {"points": points, "device": p.device, "done": str(done)}
        driver = [sys.executable, "-m", "lmsys.bench.counters", json.dumps(work)]
        command = [
            *("ncu", "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)),
            *("--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"),
            *("--metrics", ",".join(metrics.values())),
        ]
        output = _call([*command, *driver], _LIMIT_S)
        ran = json.loads(done.read_text()) if done.exists() else []
        text = log.read_text(errors="replace") if log.exists() else ""
        if not ran or _MARK not in text:
            raise _Refused(_reason(text + "\n" + output))
    counted = parse(text, metrics)
    if len(counted) != len(ran):
        raise _Refused(f"ncu counted {len(counted)} steps of {len(ran)}")
    return dict(zip(map(tuple, ran), counted, strict=True))


def _available() -> dict[str, str]:
    """Column -> the first of its metrics that this GPU has; launch__ metrics are always there.

    Just the first where ncu lists none in time.
    """
    try:
        output = _call(["ncu", "--query-metrics"], _LIST_LIMIT_S)
    except _Refused:
        return {column: names[0] for column, names in METRICS.items()}
    listed = {line.split()[0] for line in output.splitlines() if line.strip()}
    there = {
        column: [name for name in names if name.startswith("launch__") or name.split(".")[0] in listed]
        for column, names in METRICS.items()
    }
    chosen = {column: names[0] for column, names in there.items() if names}
    if "time_ms" not in chosen:
        raise _Refused(_reason(output))
    return chosen


def _call(command: Sequence[str], limit_s: float) -> str:
    """Output and errors of a command, as text. It and what it started are ended where it takes too long."""
    path = os.pathsep.join(filter(None, [str(records.REPOSITORY), os.environ.get("PYTHONPATH")]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    try:
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes)
    except OSError as error:
        raise _Refused(f"{command[0]} did not start: {error}") from None
    try:
        return process.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise _Refused(f"{command[0]} took longer than {limit_s} s") from None


def _reason(text: str) -> str:
    """The line that says why: ncu's first error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("==ERROR==")] or [line for line in lines if "Error" in line]
    return "ncu: " + (errors[0].removeprefix("==ERROR== ") if errors else (lines or ["no output"])[-1])


def parse(text: str, metrics: dict[str, str]) -> list[dict[str, Any]]:
    """The measured part of a row for each step, from ncu's CSV of raw metrics: a row a kernel, in launch order."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    del lines[1]  # units
    table = pd.read_csv(io.StringIO("\n".join(lines)), thousands=",")
    marks = table["Kernel Name"].str.contains(_MARK)
    return [_sum(table[~marks & (marks.cumsum() == step)], metrics) for step in range(marks.sum())]


def _sum(kernels: pd.DataFrame, metrics: dict[str, str]) -> dict[str, Any]:
    if kernels.empty:
        return {"status": "error", "note": "ncu saw no kernel of this step"}
    times = kernels[metrics["time_ms"]]
    row: dict[str, Any] = {"status": "ok", "kernels": len(kernels)}
    for column, metric in metrics.items():
        values = kernels.get(metric)
        if values is None or values.isna().any():  # not counted: ncu writes n/a, or leaves the column out
            continue
        if column in _SCALES:
            row[column] = values.sum() * _SCALES[column]
        elif column == "registers":
            row[column] = int(values[times.idxmax()])  # of the longest kernel
        else:
            row[column] = (values * times).sum() / (times.sum() or 1.0)
    return row


def main(text: str) -> None:
    """The driver that ncu profiles: each step once, and a mark after it. text: points, device, done as JSON."""
    work = json.loads(text)
    p = Parameters(passes=["forward"], device=work["device"], seed=0)
    done = []
    for point in work["points"]:
        case = flash.sweeps.case_of(point, p, flash.Case)
        run = functools.partial(case.outputs, point["kernel"], point["options"], backward=False)
        try:
            for _ in range(2):  # compile and tune
                run()
        except Exception as error:  # one step's failure leaves the counters of the others
            print(f"{point['step']}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        torch.cuda.synchronize(case.device)
        torch.cuda.cudart().cudaProfilerStart()
        run()
        torch.cuda._sleep(1)
        torch.cuda.synchronize(case.device)
        torch.cuda.cudart().cudaProfilerStop()
        done.append([point["head_dim"], point["step"]])
    Path(work["done"]).write_text(json.dumps(done))


COUNTERS = Experiment(
    name="counters_results",
    columns=(
        *("step", "batch", "heads", "seq_len", "head_dim", "dtype", "causal", "status", "kernels", *METRICS),
        *("device", "note"),
    ),
    points=lambda p: [{"tool": "ncu"}],  # one call of it counts all steps
    measure=lambda point, p: rows(p),
    method=lambda p: {"tool": "ncu, one launch of each kernel with cold caches, clocks as found", "metrics": METRICS},
)

if __name__ == "__main__":
    main(sys.argv[1])
