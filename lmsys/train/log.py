"""What a run writes as it goes: metrics.csv, samples.jsonl, Weights & Biases, progress on the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmsys.config import PipelineConfig, to_dict
from lmsys.records import atomic_path, writable_dir
from lmsys.train.checkpoint import first_line

COLUMNS = (
    *("step", "tokens", "train_loss", "valid_loss", "learning_rate", "grad_norm", "tokens_per_s", "elapsed_s", "mfu"),
)
METRICS_FILE, SAMPLES_FILE = "metrics.csv", "samples.jsonl"


class Log:
    """Rows and samples, in memory, in the run folder's files and in wandb's run, where there are such.

    The files begin with the rows and samples given, put in place atomically, and grow a flushed line at a time.
    """

    def __init__(self, run_dir: Path | None, rows: list[dict[str, Any]], samples: list[dict[str, Any]], wandb_run: Any):
        self.rows, self.samples, self._wandb = rows, samples, wandb_run
        self._files: list[Any] = []
        if run_dir is not None:
            self._start(run_dir / METRICS_FILE, [",".join(COLUMNS), *map(_csv_line, rows)])
            self._start(run_dir / SAMPLES_FILE, [json.dumps(sample, ensure_ascii=False) for sample in samples])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add_row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._append(0, _csv_line(row))
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def add_sample(self, sample: dict[str, Any]) -> None:
        self.samples.append(sample)
        self._append(1, json.dumps(sample, ensure_ascii=False))

    def _start(self, path: Path, lines: Sequence[str]) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._files.append(path.open("a", encoding="utf-8"))

    def _append(self, index: int, line: str) -> None:
        if self._files:
            self._files[index].write(line + "\n")
            self._files[index].flush()


def _csv_line(row: dict[str, Any]) -> str:
    """Every digit of a float, so that a resumed run reads back what it wrote."""
    return ",".join("" if row[name] is None else repr(row[name]) for name in COLUMNS)


def logged(run_dir: Path | None, step: float = math.inf) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows and samples of a run folder up to a step; what an interrupted run logged after it is left out."""
    if run_dir is None or step == 0:
        return [], []
    names, *lines = [line.split(",") for line in _whole_lines(run_dir / METRICS_FILE)] or [[]]
    rows = []
    for values in lines:
        if len(values) == len(names):
            row = {name: float(value) if value else None for name, value in zip(names, values, strict=True)}
            rows.append(row | {"step": int(row["step"]), "tokens": int(row["tokens"])})
    samples = [json.loads(line) for line in _whole_lines(run_dir / SAMPLES_FILE)]
    return [row for row in rows if row["step"] <= step], [sample for sample in samples if sample["step"] <= step]


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that may be missing; one without its end was cut off in the middle of a write."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def init_wandb(config: PipelineConfig, run_dir: str | Path) -> Any:
    """Start a Weights & Biases run whose files lie under run_dir. ValueError: online was asked for and cannot be had.

    WANDB_MODE decides, then wandb.mode; `auto` is online where the user is logged in and the server answers, else
    offline. None where it is disabled, or not installed and not asked to be online. wandb reads its key from its own
    places; none passes through here.
    """
    mode = os.environ.get("WANDB_MODE") or config.wandb.mode
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        if mode == "online":
            raise ValueError("wandb is not installed; pip install wandb, or set wandb.mode=disabled") from None
        print(f"wandb is not installed: rows are logged to {METRICS_FILE} alone")
        return None
    if mode == "auto":
        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
        except wandb.errors.Error as error:
            print(f"wandb: logging offline, the server does not take the login: {first_line(error)}")
            mode = "offline"
    try:
        return wandb.init(
            project=config.wandb.project,
            name=config.wandb.name,
            dir=str(writable_dir(run_dir)),
            mode=mode,
            config=to_dict(config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
    except wandb.errors.Error as error:
        raise ValueError(f"wandb cannot start in mode '{mode}': {first_line(error)}; set wandb.mode=offline") from None


def progress_bar(total: int, initial: int, shown: bool, world_size: int) -> Any:
    """tqdm's bar in one process; lines in several, whose output another program reads and passes on."""
    if shown and world_size > 1:
        return _Lines(total, initial)
    from tqdm import tqdm

    # Not at every row: an executed notebook keeps all that a bar ever showed.
    return tqdm(total=total, initial=initial, desc="training", unit="step", disable=not shown, mininterval=0.5)


class _Lines:
    """Progress as lines, at most one a second, and one at the end. What train() uses of tqdm's interface."""

    def __init__(self, total: int, initial: int):
        self.total, self.initial, self.step, self.printed = total, initial, initial, -math.inf
        self.start = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self) -> None:
        self.step += 1

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        now = time.monotonic()
        if now - self.printed >= 1 or self.step == self.total:
            seconds = (now - self.start) / (self.step - self.initial) * (self.total - self.step)
            left = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
            print(f"step {self.step} of {self.total}, {left} left: {text}", flush=True)
            self.printed = now
