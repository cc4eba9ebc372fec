"""A race to the same loss: one model trained by a naive step, by ours on one GPU, and by ours on two with flashddp.

Every arm is a run of lmsys.train under settings of its own: the same initial weights, batches in the same order,
learning rates and validation batches. `naive` is eager, attention written out, no option of the trainer; `ours` has the
fast kernel and the step preset (bench/train_step.py takes it apart); `ours_ddp` halves the local batch, so that a step
reads the same sequences. All compute in the same precision. Time is that of training: from row to row of the trainer's
metrics, which leaves evaluations out; the first row's steps, which compile, count at the pace of the second's. An arm
ends with the schedule, or at its limit of such time, whichever is first.

The texts and the sizes of a scale are explained in configs/race.toml.

Limits: one seed; learning rates are usual ones, not tuned; a limit is looked at where a row is written. The stories
come from a grammar: their loss is lower than that of real text, and flat sooner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # now and not in the first step
from torch import Tensor

from lmsys import cost, records
from lmsys import train as training
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_names, require_numbers
from lmsys.bench.measure import failure, one_thread
from lmsys.bench.processes import as_written
from lmsys.config import MODEL_SIZES, PipelineConfig, build, model_size, require
from lmsys.data import load_tokens, stages, stories
from lmsys.data.workers import map_in_order, resolve_workers
from lmsys.device import resolve_device
from lmsys.options import STEP_PRESETS
from lmsys.parallel import group

NAIVE, OURS, OURS_DDP = ARMS = ("naive", "ours", "ours_ddp")
_PART_MB = 16.0  # of a text that is generated: what a process makes at a time
_VOCABULARY_MULTIPLE = 128  # rows of the embedding and the head, for the tensor cores


def check(p: Parameters) -> None:
    """Raises ValueError: an unknown name, a number out of range, or settings that the trainer does not take."""
    require_names(p, {"arms": ARMS, "size": MODEL_SIZES, "step_preset": STEP_PRESETS})
    require(len(set(p.arms)) == len(p.arms), f"arms is {', '.join(p.arms)}; give each once")
    for name in ("minutes", "text_mb"):
        require(getattr(p, name) > 0, f"{name} is {getattr(p, name)}; it must be positive")
    require_numbers(p, {"gpus": 2, "steps": 1, "batch_size": 1, "context_length": 1, "eval_interval": 1})
    require(
        p.batch_size % p.gpus == 0,
        f"batch_size {p.batch_size} is not a multiple of gpus {p.gpus}: each GPU reads its share of a step's sequences",
    )
    require(
        p.eval_interval % p.log_interval == 0,
        f"eval_interval {p.eval_interval} is not a multiple of log_interval {p.log_interval}, the steps between rows",
    )
    require(":" not in p.device, f"device is '{p.device}'; give auto, cpu or cuda: arms take GPUs from 0 on")
    p.warmup_steps = min(p.warmup_steps, p.steps)
    p.run_dir = p.run_dir or f"runs/race-{p.scale}"
    for arm in p.arms:
        if lacking(p, arm) is None:
            training.check_setup(pipeline_config(p, arm), processes(p, arm))


NOTEBOOK = Notebook("race", check)


def processes(p: Parameters, arm: str) -> int:
    """How many processes, a GPU each, train an arm."""
    return p.gpus if arm == OURS_DDP else 1


def lacking(p: Parameters, arm: str) -> str | None:
    """Why this machine cannot run an arm, or None."""
    count, needed = torch.cuda.device_count(), processes(p, arm)
    enough = resolve_device(p.device).type != "cuda" or needed <= count
    return None if enough else f"needs {needed} GPUs; this machine has {count}"


def pipeline_config(p: Parameters, arm: str) -> PipelineConfig:
    """An arm as the trainer takes it."""
    ours = arm != NAIVE
    padded = -(-p.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    model = model_size(p.size, vocab_size=padded, context_length=p.context_length)
    train = {
        "step_preset": p.step_preset if ours else "plain",
        "batch_size": p.batch_size // processes(p, arm),
        "attention_kernel": p.attention_kernel if ours else p.naive_kernel,
        "ddp_wrapper": "flashddp" if arm == OURS_DDP else "none",
    }
    if ours and not p.compile and p.step_preset == "fused":
        train["compile"] = False
    names = ("steps", "dtype", "log_interval", "eval_interval", "eval_batches", "device", "seed")
    values = {
        "run_dir": p.run_dir,
        "tokenizer": {"vocab_size": p.vocab_size},
        "model": dataclasses.asdict(model),
        "optim": {name: getattr(p, name) for name in ("learning_rate", "min_learning_rate", "warmup_steps")},
        "train": train | {name: getattr(p, name) for name in names},
    }
    return build(PipelineConfig, values)


TokenFiles = tuple[Path, Path]


def prepare(p: Parameters, *, progress: bool = True) -> tuple[TokenFiles, dict[str, Any]]:
    """Text, tokenizer and token files in the run folder: (training, validation) files, and what they are."""
    started = time.perf_counter()
    run_dir = records.writable_dir(records.output_path(p.run_dir))
    text = p.text or str(write_stories(run_dir, p.text_mb, p.seed))
    config = pipeline_config(p, NAIVE)
    data = {"dataset_mode": "local_text", "text_path": text, "valid_fraction": p.valid_fraction}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))

    def report(name: str, status: str, start: float, detail: str) -> None:
        if progress:
            print(f"[{name}] {'skipped: ' if status == 'skipped' else ''}{detail}", flush=True)

    done = stages.Stages(run_dir, report, frozen=False)
    tokenizer, train_tokens, valid_tokens, bytes_per_token = stages.prepare(config, run_dir, done, False)
    found = {"text": Path(text).name, "vocabulary": tokenizer.vocab_size, "training_tokens": len(train_tokens)}
    found |= {"validation_tokens": len(valid_tokens), "bytes_per_token": round(bytes_per_token, 3)}
    found["prepared_in_s"] = round(time.perf_counter() - started, 1)
    return (run_dir / "train.npy", run_dir / "valid.npy"), found


def write_stories(folder: Path, size_mb: float, seed: int) -> Path:
    """A text of about size_mb, generated in parts by as many processes as there are cores; one that is there is taken.

    The number of processes does not change the text.
    """
    path = folder / f"stories-{size_mb:g}mb-seed{seed}.txt"
    if path.exists():
        return path
    count = max(1, round(size_mb / _PART_MB))
    state = (folder, size_mb / count, seed * 100_000)
    parts = map_in_order(_write_part, state, range(count), min(resolve_workers(None), count))
    with records.atomic_path(path) as temporary, temporary.open("wb") as out, contextlib.closing(parts):
        for part in parts:
            out.write(part.read_bytes())
            part.unlink()
    return path


def _write_part(state: tuple[Path, float, int], index: int) -> Path:
    folder, size_mb, first_seed = state
    path = folder / f".stories-part-{index}.tmp"
    stories.generate(path, size_mb, first_seed + index)
    return path


# --- An arm ---------------------------------------------------------------------------------------


class LimitReached(Exception):
    """The arm has trained for as long as it may."""


class _Rows:
    """Takes the trainer's rows as its logger does, and passes them on with the seconds of training until then."""

    def __init__(self, on_row: Callable[[Row], None]):
        self.on_row, self.seconds, self._tokens = on_row, 0.0, 0
        self._first: Row | None = None  # waits for the pace of the second

    def log(self, values: Row, step: int) -> None:
        before, self._tokens = self._tokens, values["tokens"]
        if before == 0:
            self._first = dict(values)
            return
        if self._first is not None:
            self.seconds = before / values["tokens_per_s"]
            self.on_row(self._first | {"seconds": self.seconds, "tokens_per_s": None, "mfu": None})
            self._first = None
        self.seconds += (self._tokens - before) / values["tokens_per_s"]
        self.on_row(values | {"seconds": self.seconds})

    def close(self) -> None:
        """Of an arm with a single row: at its own pace."""
        if self._first is not None:
            self.on_row(self._first | {"seconds": self._first["tokens"] / self._first["tokens_per_s"]})


def train_arm(config: PipelineConfig, token_files: TokenFiles, limit_s: float, on_row: Callable[[Row], None]) -> None:
    """Train in this process, one of a group or alone, until the schedule or the limit ends it. on_row: on rank 0."""
    rows = _Rows(on_row)

    def on_step(step: int, loss: Tensor) -> None:
        if step % config.train.log_interval == 0:  # rank 0, which has the rows, decides for all
            over = loss.new_tensor(float(rows.seconds >= limit_s))
            if group.mean_over_ranks(over).item() > 0:
                raise LimitReached

    train_tokens, valid_tokens = map(load_tokens, token_files)
    with contextlib.suppress(LimitReached), contextlib.closing(rows):
        data = {"train_tokens": train_tokens, "valid_tokens": valid_tokens}
        training.train(config, **data, progress=False, wandb_run=rows, on_step=on_step)


def _rank(process: group.Process, rows_file: Path, *arm: Any) -> None:
    """One process of an arm; rank 0 appends its rows to a file, a JSON object a line."""
    with rows_file.open("a", encoding="utf-8") as file:
        train_arm(*arm, lambda row: print(json.dumps(row), file=file, flush=True))


def train_in_processes(
    config: PipelineConfig, count: int, token_files: TokenFiles, limit_s: float, on_row: Callable[[Row], None]
) -> None:
    """train_arm() in so many new processes; on_row gets the rows as they come, until one fails (group.RankError)."""
    for row in as_written(_rank, count, config, token_files, limit_s, device=config.train.device):
        on_row(row)


def points(p: Parameters) -> list[Point]:
    """A point an arm."""
    found = []
    for arm in p.arms:
        config = pipeline_config(p, arm)
        point = {"arm": arm, "gpus": processes(p, arm), "planned_steps": p.steps, "dtype": p.dtype}
        point |= {"kernel": config.train.attention_kernel, "local_batch": config.train.batch_size}
        point["parameters"] = cost.model_parameters(config.model)
        if reason := lacking(p, arm):
            point |= {"status": "unsupported", "note": reason}
        found.append(point)
    return found


def measure_arm(point: Point, p: Parameters) -> list[Row]:
    """Train an arm: its rows, printed as they come, and where it fails one more that says why."""
    config, rows = pipeline_config(p, point["arm"]), []
    token_files, _ = prepare(p, progress=point["arm"] == p.arms[0])

    def on_row(values: Row) -> None:
        losses = {name: f"{values[name]:.9g}" for name in ("train_loss", "valid_loss") if values.get(name) is not None}
        rows.append({name: value for name, value in values.items() if name in RACE.columns} | losses)
        valid = f", validation {losses['valid_loss']}" if "valid_loss" in losses else ""
        print(f"{point['arm']}: step {values['step']}, {values['seconds']:.2f} s{valid}", flush=True)

    with one_thread(resolve_device(p.device).type == "cpu"):
        try:
            if point["gpus"] > 1:
                train_in_processes(config, point["gpus"], token_files, 60 * p.minutes, on_row)
            else:
                train_arm(config, token_files, 60 * p.minutes, on_row)
        except Exception as error:
            rows.append(failure(error))
    if p.compile:
        torch._dynamo.reset()  # compiled code, what it holds, and the limit on recompilations
    return rows


def _method(p: Parameters) -> dict[str, Any]:
    return {
        "timer": "time.perf_counter from row to row of the trainer's metrics, the device synchronized at each",
        "seconds": "of training: without evaluations; the first row's steps, which compile, at the second row's pace",
        "elapsed_s": "with both, from the trainer's start",
        "samples": "one run of each arm",
    } | prepare(p)[1]


RACE = Experiment(
    name="race_results",
    columns=(
        *("arm", "gpus", "status", "step", "tokens", "seconds", "train_loss", "valid_loss", "learning_rate"),
        *("tokens_per_s", "mfu", "elapsed_s", "planned_steps", "kernel", "local_batch", "dtype", "parameters"),
        *("device", "note"),
    ),
    points=points,
    measure=measure_arm,
    group=("planned_steps",),  # all arms
    method=_method,
)


# --- What it shows --------------------------------------------------------------------------------


def label(arm: str, gpus: int) -> str:
    """An arm's name in tables and figures."""
    named = {NAIVE: "naive attention, naive step", OURS: "lmsys", OURS_DDP: "lmsys, flashddp"}[arm]
    return f"{named}, {gpus} GPU{'s' * (gpus > 1)}"


def curves(frame) -> dict[str, Any]:
    """The evaluations of each arm that has any, by arm in the order of ARMS."""
    ok = frame[(frame.status == "ok") & frame.valid_loss.notna()]
    return {arm: ok[ok.arm == arm].sort_values("step") for arm in ARMS if (ok.arm == arm).any()}


def reaching(curve, loss: float) -> tuple[float, float] | None:
    """(seconds, tokens) at which an arm's validation loss first is that low, interpolated; None: never."""
    below = (curve.valid_loss <= loss).to_numpy()
    if not below.any():
        return None
    at = int(below.argmax())
    now = curve.iloc[at]
    if at == 0:
        return float(now.seconds), float(now.tokens)
    before = curve.iloc[at - 1]
    share = (before.valid_loss - loss) / (before.valid_loss - now.valid_loss)
    return tuple(float(before[name] + share * (now[name] - before[name])) for name in ("seconds", "tokens"))


def common_losses(frame) -> list[float]:
    """Losses that every arm reached, falling: of the arm of fewest tokens at a quarter, at half and at all of them."""
    found = curves(frame)
    if not found:
        return []
    lowest = max(curve.valid_loss.min() for curve in found.values())
    shortest = min(found.values(), key=lambda curve: curve.tokens.max())
    least = shortest.valid_loss.cummin().to_numpy()
    marks = {max(lowest, least[max(0, round(share * len(least)) - 1)]) for share in (0.25, 0.5, 1.0)} | {lowest}
    return sorted(map(float, marks), reverse=True)


def loss_difference(frame) -> tuple[float, int, float, int] | None:
    """Between arms' validation losses at the same tokens: (largest, its tokens, last, its tokens)."""
    import pandas as pd

    by_tokens = pd.DataFrame({arm: curve.set_index("tokens").valid_loss for arm, curve in curves(frame).items()})
    by_tokens = by_tokens[by_tokens.notna().sum(axis=1) > 1].sort_index()
    if by_tokens.empty:
        return None
    spread = by_tokens.max(axis=1) - by_tokens.min(axis=1)
    worst, last = spread.idxmax(), spread.index[-1]
    return float(spread[worst]), int(worst), float(spread[last]), int(last)


def summary(frame) -> list[dict[str, Any]]:
    """The arms: time to the losses that all reached, over the baseline's; throughput, tokens and loss at the end."""
    found, losses, lines = curves(frame), common_losses(frame), []
    baseline = NAIVE if NAIVE in found else next(iter(found), None)
    for arm in [arm for arm in ARMS if (frame.arm == arm).any()]:
        rows = frame[frame.arm == arm]
        line: dict[str, Any] = {"arm": label(arm, int(rows.gpus.iloc[0]))}
        bad = rows[rows.status != "ok"]
        if arm in found:
            line |= {f"s to {loss:.3f}": records.significant(reaching(found[arm], loss)[0]) for loss in losses}
            ratio = reaching(found[baseline], losses[-1])[0] / reaching(found[arm], losses[-1])[0]
            last = rows[rows.status == "ok"].iloc[-1]
            line |= {"times as fast to the last": f"{ratio:.2f}", "tokens/s": f"{rows.tokens_per_s.median():,.0f}"}
            line |= {"tokens": f"{last.tokens:,.0f}", "seconds": f"{last.seconds:,.3g}"}
            line |= {"step": f"{last.step:,.0f} of {last.planned_steps:,.0f}"}
            line["validation loss"] = f"{found[arm].valid_loss.iloc[-1]:.4f}"
        line["status"] = f"{bad.status.iloc[0]}: {bad.note.iloc[0]}" if len(bad) else "ok"
        lines.append(line)
    return lines
