"""Training a TransformerLM: one function for one device, for a notebook, and for each process of a group.

A run folder holds metrics.csv (records.SCHEMAS["pipeline_metrics"]), samples.jsonl (step, prompt, text), checkpoints/, and
wandb's files. A step reads gradient_accumulation_steps batches a process, clips the global gradient norm, and takes one
AdamW step at the learning rate of the cosine schedule. The device is waited for only where a row of metrics is written;
with fp16 at each step, as torch's gradient scaler reads there whether a gradient overflowed and the step is to be skipped, and
with train.on_bad_step=skip, as the loss decides there whether the weights are updated.

Resuming is exact: on the CPU, with as many threads, an interrupted run gives the losses of an uninterrupted one bit for bit.
A checkpoint is written while training goes on (checkpoint.Saver); a write that fails ends the run at the next step. SIGTERM and
SIGINT end a run after the step at hand, with a checkpoint of it and the exit code 128 + signal; before the first step is done
there is nothing to save, and they end it at once. In several processes a signal to one of them ends all after the same step.
fp32 on a CUDA GPU uses TF32 in matrix products (torch's precision "high"), as is the practice; MFU is then against the TF32
peak.

In several processes, each trains on its rows of the batches that one process with the whole batch would read, and evaluates
its part of the validation batches; rank 0 samples, logs and saves. Losses are means over the ranks, taken where a row is written. A checkpoint is that of one
process: a run can go on with another number of processes or another wrapper, to the same losses to rounding, if processes x
batch_size x gradient_accumulation_steps stays what it was. Nothing that is computed draws from torch's random generators once
the weights are there (no dropout; batches and samples have generators of their own), so that rank 0's state stands for all.
The run folder must be one that all processes see.
"""

from __future__ import annotations

import csv
import errno
import functools
import json
import math
import os
import shutil
import signal
import statistics
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lmsys import checkpoint, cost, parallel
from lmsys import device as devices
from lmsys.attention import check_support
from lmsys.config import PipelineConfig, TrainConfig, to_dict, unknown_name
from lmsys.data import BatchSampler
from lmsys.parallel import group
from lmsys.records import SCHEMAS, atomic_path, writable_dir
from lmsys.replica import AUTOCAST, Replica, damage_told, first_line
from lmsys.step import blocks
from lmsys.step.optimizer import cosine_schedule

if TYPE_CHECKING:
    import pandas as pd

    from lmsys.data.tokenizer import Tokenizer

COLUMNS = SCHEMAS["pipeline_metrics"]
SPIKE_WINDOW, SPIKE_LEAST = 64, 8  # losses that a spike is measured against: at most, at least
SKIPS_IN_A_ROW = 10  # a run that skips more is beyond help
METRICS_FILE, SAMPLES_FILE, CHECKPOINTS = "metrics.csv", "samples.jsonl", "checkpoints"


@dataclass(frozen=True)
class History:
    """What a run did: the rows of metrics.csv and samples.jsonl, those before a resume included. Samples are rank 0's."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Path | None = None  # the last one
    resumed_from: int | None = None  # the step of the checkpoint that the run continued from
    skipped: list[dict[str, Any]] = field(default_factory=list)  # steps without an update: step, draw, fault

    @property
    def valid_loss(self) -> float | None:
        """The last validation loss."""
        return next((row["valid_loss"] for row in reversed(self.rows) if row["valid_loss"] is not None), None)

    @property
    def train_loss(self) -> float | None:
        """The last training loss; None where every step was skipped."""
        return next((row["train_loss"] for row in reversed(self.rows) if row["train_loss"] is not None), None)

    def frame(self) -> pd.DataFrame:
        """The rows as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))


class Stopped(SystemExit):
    """A signal ended the run; the process ends with its code, 128 + the signal's number, unless this is caught.

    Attributes:
        checkpoint: the last one, from which the run can go on; None where there is none.
    """

    def __init__(self, number: int, checkpoint: Path | None = None):
        super().__init__(128 + number)
        self.checkpoint = checkpoint


# --- Training -------------------------------------------------------------------------------------


def train(
    config: PipelineConfig,
    *,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    tokenizer: Tokenizer | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    wandb_run: Any = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> History:
    """Train a model, or continue the run of the folder.

    Args:
        config: model.vocab_size must be set.
        train_tokens, valid_tokens: (N,) integers, a memory map or an array.
        tokenizer: draws samples of config.generate.prompts, if given.
        run_dir: where metrics, samples and checkpoints go; None keeps them in memory and saves no checkpoint.
        progress: show a bar, or lines in several processes.
        wandb_run: what init_wandb returned; metrics are logged to it.
        on_step: called with each step that is done and its loss in this process, a scalar on the device.
    Raises:
        ValueError: settings, data or device that cannot work, found before any work; a checkpoint that does not fit.
        OSError: a folder that cannot be written, a full disk, a device out of memory.
        FloatingPointError: the loss or the gradient norm is not finite, or a spike; names the step and the batch. The last
            checkpoint is good.
        Stopped: SIGTERM or SIGINT, after a checkpoint.
    In several processes, ValueError, FloatingPointError and an OSError of rank 0's files are raised in all of them.
    """
    settings = config.train
    rank, world_size = group.current()
    run_dir = None if run_dir is None else Path(run_dir)
    device, steps = check(config, train_tokens, valid_tokens, tokenizer, run_dir)
    tokens_per_step = _tokens_per_step(config, world_size)
    is_main = rank == 0
    say = print if is_main else _quiet

    saved = _resume_point(config, train_tokens, run_dir, say)
    rows, samples = logged(run_dir, saved.step if saved else 0)
    if saved and saved.step >= steps:
        say(f"the run in {run_dir} is finished: step {saved.step} of {steps}; nothing to do")
        return History(rows, samples, saved.path, saved.step)

    with _memory_errors_told(lambda: "before the first step"):
        replica = Replica(config, device, saved)
    rate_at = functools.partial(
        cosine_schedule,
        learning_rate=config.optim.learning_rate,
        min_learning_rate=config.optim.min_learning_rate,
        warmup_steps=config.optim.warmup_steps,
        total_steps=steps,
    )
    sampler = BatchSampler(
        train_tokens,
        settings.batch_size,
        config.model.context_length,
        micro_batches=settings.gradient_accumulation_steps,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
    )
    if saved:
        sampler.load_state_dict(saved.sampler)
        checkpoint.set_rng_state(saved.rng)
        say(f"resuming from step {saved.step} of {steps}: {saved.path}")

    flops_per_token = cost.train_flops_per_token(config.model) / world_size
    tensor_cores = "tf32" if settings.dtype == "fp32" and device.type == "cuda" else settings.dtype
    peak = devices.peak_flops(devices.device_name(device), tensor_cores)
    last_checkpoint, resumed_from = (saved.path, saved.step) if saved else (None, None)
    with damage_told(last_checkpoint):
        guard = _Guard(settings, sampler, saved.extra.get("guard") if saved else None)
        # Of the steps since the last row, on the device. A run that a signal ended goes on with those that had no row yet.
        losses, norms = ([*values] for values in replica.tensors(saved.extra.get("since_row") if saved else None))
    del saved  # its tensors are in the model and the optimizer now
    first_step = 1 if resumed_from is None else resumed_from + 1
    step = first_step
    started = time.perf_counter() - (rows[-1]["elapsed_s"] if rows else 0.0)

    def save(step: int, valid_loss: float | None, since_row: list[tuple[float, float]]) -> None:
        """Save on rank 0, in the background if so set; all processes give their part."""
        weights, optimizer = replica.whole_state()
        content = {"steps": steps, "train_tokens": fingerprint(train_tokens), "world_size": world_size}
        content |= {"scaler": replica.scaler.state_dict(), "guard": guard.state_dict(), "since_row": since_row}

        def save_here() -> None:
            saver.save(
                checkpoint.snapshot(
                    step,
                    weights=weights,
                    optimizer=optimizer,
                    sampler_state=sampler.state_dict(),
                    rng=checkpoint.rng_state(),
                    config=config,
                    extra=content,
                    valid_loss=valid_loss,
                ),
                owned=replica.gathers,
            )

        group.from_rank0(save_here)

    def read_window() -> list[tuple[float, float]]:
        """Loss and gradient norm of the steps since the last row, means over the ranks. Waits for the device.

        Raises:
            FloatingPointError: one is bad, in every process, as each has the same means.
        """
        pairs = [tuple(pair) for pair in _means(losses, norms)]
        for at, (loss, norm) in enumerate(pairs, start=step - len(pairs) + 1):
            if at <= guard.step:  # looked at before: where steps are skipped, each is before its update
                continue
            if fault := guard.fault(loss, None if replica.scaler.is_enabled() else norm):
                kept = _kept(group.from_rank0(saver.finish))
                raise FloatingPointError(
                    f"{fault} at step {at}; lower optim.learning_rate or warm up longer, or set train.on_bad_step=skip "
                    f"({guard.batch(step - at)}; {kept})"
                )
            guard.accept(at, loss)
        losses.clear()
        norms.clear()
        return pairs

    skips = settings.on_bad_step == "skip"
    with (
        closing(replica),
        devices.fp32_products("high" if device.type == "cuda" else None),  # TF32
        checkpoint.Saver(
            (run_dir or Path()) / CHECKPOINTS,
            keep_last=settings.keep_checkpoints,
            keep_best=settings.keep_best_checkpoints,
            background=settings.async_checkpoints,
            device=device,
            last=last_checkpoint,
        ) as saver,
        _memory_errors_told(lambda: f"at step {step} ({_kept(last_checkpoint)})"),
        _Log(run_dir if is_main else None, rows, samples, wandb_run if is_main else None) as log,
        _bar(steps, first_step - 1, progress and is_main, world_size) as bar,
        _Requests(device, lambda number: _stopped(number, None, steps, last_checkpoint, say)) as requests,
    ):
        window_started, timed = time.perf_counter(), 0  # and how many steps since then
        for step in range(first_step, steps + 1):
            step_loss = replica.accumulate(sampler)
            saver.before_update()
            learning_rate = rate_at(step)
            if skips:
                norm = replica.clip()
                ((loss, seen_norm),) = _means([step_loss], [norm])
                fault = guard.fault(loss, None if replica.scaler.is_enabled() else seen_norm)
                if fault:
                    replica.discard()
                    guard.skip(step, fault, say)
                else:
                    replica.apply(learning_rate)
                    guard.accept(step, loss)
                    losses.append(step_loss)
                    norms.append(norm)
            else:
                losses.append(step_loss)
                norms.append(replica.update(learning_rate))
            timed += 1
            bar.update()
            requests.something_to_save()

            request = requests.agreed(saver.failed)
            if request == _Requests.FAILED:
                group.from_rank0(saver.finish)  # raises the error of the write, in every process
            stopping = request == _Requests.STOP
            saving = run_dir is not None and _due(step, settings.checkpointing_interval, steps)
            evaluating = _due(step, settings.eval_interval, steps) or (saving and settings.keep_best_checkpoints > 0)
            sampling = tokenizer is not None and _due(step, settings.sample_interval, steps)
            logging = evaluating or sampling or saving or step % settings.log_interval == 0
            valid_loss = None
            if logging:
                window = read_window()
                seconds = time.perf_counter() - window_started
                rate = timed * tokens_per_step / seconds
                row = dict.fromkeys(COLUMNS) | {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "learning_rate": learning_rate,
                    "tokens_per_s": rate,
                    "mfu": cost.mfu(rate, flops_per_token, peak),
                }
                if window:  # else all its steps were skipped
                    norm = window[-1][1]
                    row["train_loss"] = sum(loss for loss, _ in window) / len(window)
                    row["grad_norm"] = norm if math.isfinite(norm) else None
                if evaluating:
                    row["valid_loss"] = valid_loss = replica.evaluate(valid_tokens)
                row["elapsed_s"] = time.perf_counter() - started
                log.add_row(row)
                shown = "skipped" if row["train_loss"] is None else f"loss {row['train_loss']:.3f}"
                bar.set_postfix_str(f"{shown}, {rate:,.0f} tokens/s", refresh=False)
            if sampling:
                for sample in replica.samples(tokenizer):
                    log.add_sample({"step": step} | sample)
            if saving or (stopping and run_dir is not None):
                save(step, valid_loss, since_row=read_window())
                last_checkpoint = run_dir / CHECKPOINTS / f"step-{step:08d}"
            if on_step is not None:
                on_step(step, step_loss)
            if stopping:
                break
            if logging:
                # Evaluation, samples and what a checkpoint holds up do not count as training.
                window_started, timed = time.perf_counter(), 0
        last_checkpoint = group.from_rank0(saver.finish)
    if requests.number is not None or step < steps:
        raise _stopped(requests.number or signal.SIGTERM, step, steps, last_checkpoint, say)
    return History(log.rows, log.samples, last_checkpoint, resumed_from, guard.skipped)


def total_steps(config: PipelineConfig, train_length: int, world_size: int = 1) -> int:
    """train.steps, or train.epochs as steps: enough to draw that many times the training tokens."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * train_length / _tokens_per_step(config, world_size)))


def init_wandb(config: PipelineConfig, run_dir: str | Path) -> Any:
    """Start a Weights & Biases run whose files lie under run_dir.

    WANDB_MODE decides, then wandb.mode; `auto` is online where the user is logged in and the server answers, else offline.
    wandb reads its key from its own places; none passes through here. None where it is disabled, or not installed and not asked
    to be online: the rows are in metrics.csv either way.

    Raises:
        ValueError: online was asked for and cannot be had.
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


# --- Checks ---------------------------------------------------------------------------------------


def check_setup(config: PipelineConfig, world_size: int | None = None) -> torch.device:
    """The device of a run, after checking that this process can train on it with the kernel and the wrapper of the config.

    Args:
        world_size: processes that will train; None: those of this process's group.
    Raises:
        ValueError: no such device, kernel or wrapper, or one that does not take this model.
    """
    settings, model = config.train, config.model
    device = devices.resolve_device(settings.device)
    world_size = group.current()[1] if world_size is None else world_size
    parallel.check_wrapper(settings.ddp_wrapper, world_size)
    if world_size > 1 and device.type == "cuda" and ":" in settings.device:
        raise ValueError(
            f"train.device is '{settings.device}', one GPU for {world_size} processes, each of which needs its own; give auto "
            "or cuda"
        )
    check_support(
        settings.attention_kernel,
        device=device,
        dtype=AUTOCAST.get(settings.dtype, torch.float32),
        head_dim=model.head_dim,
        heads=model.num_heads,
        kv_heads=model.num_heads,
        backward=True,
    )
    if settings.written_backward and settings.attention_kernel not in blocks.ATTENTION:
        raise unknown_name("attention kernel for train.written_backward", settings.attention_kernel, blocks.ATTENTION)
    if settings.cuda_graph and device.type != "cuda":
        raise ValueError(f"train.cuda_graph is for a GPU, and this run is on {device}; set train.cuda_graph=false")
    if settings.compile and device.type == "cpu" and "triton" in settings.attention_kernel:
        raise ValueError(
            f"train.compile cannot compile '{settings.attention_kernel}' on the CPU, where Triton's interpreter runs it; "
            "set train.compile=false or choose another kernel"
        )
    return device


def check(
    config: PipelineConfig,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    tokenizer: Tokenizer | None = None,
    run_dir: Path | None = None,
) -> tuple[torch.device, int]:
    """Everything that can be known to fail before a run starts. Returns the device and the number of steps.

    In several processes, what they were given is compared; then each checks its device, and rank 0 the data and the folder.

    Raises:
        ValueError, OSError: as train(); the same in every process.
    """
    rank, world_size = group.current()
    if world_size > 1:
        given = to_dict(config) | {"run_dir": str(run_dir), "tokenizer": tokenizer is not None}
        given |= {"training tokens": fingerprint(train_tokens), "validation tokens": fingerprint(valid_tokens)}
        group.check_same_everywhere(json.dumps(given, indent=1), "what train() was given")

    def check_here() -> torch.device:
        device = check_setup(config)
        if rank == 0:
            _check_data(config, train_tokens, valid_tokens, tokenizer)
            _check_length(config, len(train_tokens), world_size)
            if run_dir is not None:
                _check_folder(config, run_dir)
        return device

    device = group.by_rank(check_here)[rank]
    return device, total_steps(config, len(train_tokens), world_size)


def _check_data(
    config: PipelineConfig, train_tokens: np.ndarray, valid_tokens: np.ndarray, tokenizer: Tokenizer | None
) -> None:
    model = config.model
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is not set: give it the tokenizer's vocabulary size")
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer's vocabulary of {tokenizer.vocab_size} is larger than model.vocab_size {model.vocab_size}; raise it"
        )
    for name, tokens in (("training", train_tokens), ("validation", valid_tokens)):
        if len(tokens) <= model.context_length:
            raise ValueError(
                f"the {name} data have {len(tokens)} tokens, fewer than one context of {model.context_length} and its next "
                "token; give more text or lower model.context_length"
            )
        low, high = _extremes(tokens)
        if low < 0 or high >= model.vocab_size:
            raise ValueError(
                f"the {name} data hold token id {low if low < 0 else high}, outside the model's vocabulary of "
                f"{model.vocab_size}; raise model.vocab_size or use the tokenizer of these tokens"
            )


def _check_length(config: PipelineConfig, train_length: int, world_size: int) -> None:
    steps = total_steps(config, train_length, world_size)
    if config.optim.warmup_steps > steps:
        raise ValueError(
            f"optim.warmup_steps {config.optim.warmup_steps} is more than the run's {steps} steps; lower it, or train longer"
        )


def _check_folder(config: PipelineConfig, run_dir: Path) -> None:
    free = shutil.disk_usage(writable_dir(run_dir)).free
    needed = 12 * cost.model_parameters(config.model)  # weights and two moments in fp32
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free",
            str(run_dir),
        )


def fingerprint(tokens: np.ndarray) -> dict[str, int]:
    """Length and CRC-32 of the first and last 2^18 tokens: tells other data from the same ones without reading all."""
    crc = 0
    for part in (tokens[: 1 << 18], tokens[-(1 << 18) :]):
        crc = zlib.crc32(np.asarray(part, dtype="<i8").tobytes(), crc)
    return {"length": len(tokens), "crc32": crc}


def _extremes(tokens: np.ndarray, block: int = 1 << 24) -> tuple[int, int]:
    """The smallest and the largest id, read a block at a time: a memory map can be larger than memory."""
    blocks = [tokens[start : start + block] for start in range(0, len(tokens), block)]
    return min(int(part.min()) for part in blocks), max(int(part.max()) for part in blocks)


def _means(losses: list[Tensor], norms: list[Tensor]) -> list[list[float]]:
    """(loss, gradient norm) of each step, means over the ranks, as numbers: waits for the device."""
    if not losses:
        return []
    return group.mean_over_ranks(torch.stack([torch.stack(losses), torch.stack(norms)], -1)).tolist()


def _kept(last_checkpoint: Path | None) -> str:
    return f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was saved"


class _Guard:
    """Tells bad steps: a loss or gradient norm that is not finite, a loss far above the median of those before it.

    It is given means over the ranks, so that each process tells the same. The state is what a resumed run needs to do so too.
    """

    def __init__(self, settings: TrainConfig, sampler: BatchSampler, state: dict[str, Any] | None):
        self.factor, self.sampler = settings.loss_spike, sampler
        state = state or {"step": 0, "losses": [], "in_a_row": 0, "skipped": []}
        self.step = int(state["step"])  # the last one that was looked at
        self.losses = deque((float(loss) for loss in state["losses"]), maxlen=SPIKE_WINDOW)
        self.in_a_row = int(state["in_a_row"])
        self.skipped: list[dict[str, Any]] = list(state["skipped"])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "losses": [*self.losses], "in_a_row": self.in_a_row, "skipped": [*self.skipped]}

    def fault(self, loss: float, norm: float | None) -> str | None:
        """What is bad about a step, or None. norm None: it may be infinite, as where fp16 overflows."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.factor is None or len(self.losses) < SPIKE_LEAST:
            return None
        usual = statistics.median(self.losses)
        if loss <= self.factor * usual:
            return None
        return f"the loss is {loss:.4g}, {loss / usual:.3g} times the median {usual:.4g} of the {len(self.losses)} before it,"

    def accept(self, step: int, loss: float) -> None:
        """A good step."""
        self.step, self.in_a_row = step, 0
        self.losses.append(loss)

    def skip(self, step: int, fault: str, say: Callable[[str], None]) -> None:
        """A bad step that changes nothing. FloatingPointError where it is one of too many."""
        self.step, self.in_a_row = step, self.in_a_row + 1
        self.skipped.append({"step": step, "draw": self.sampler.draws - 1, "fault": fault})
        if self.in_a_row > SKIPS_IN_A_ROW:
            raise FloatingPointError(
                f"{fault} at step {step}, as in the {SKIPS_IN_A_ROW} steps before it, which were skipped; lower "
                f"optim.learning_rate or warm up longer ({self.batch()})"
            )
        say(f"step {step} is skipped: {fault} ({self.batch()})")

    def batch(self, ago: int = 0) -> str:
        """Which batch the step `ago` steps back read."""
        return f"its batch is draw {self.sampler.draws - 1 - ago} of the sampler with seed {self.sampler.seed}"


# --- Ending early ---------------------------------------------------------------------------------


def _stopped(number: int, step: int | None, steps: int, path: Path | None, say: Callable[[str], None]) -> Stopped:
    """The exception that ends a run by a signal, after a line about it. step None: before the first one."""
    when = "before a step was done" if step is None else f"after step {step} of {steps}"
    say(
        f"stopped by {signal.Signals(number).name} {when}; {_kept(path)}"
        + ("; the same command with train.resume=true (train: --resume) goes on from there" if path else "")
    )
    return Stopped(number, path)


class _Requests:
    """What asks a run to end after the step at hand: SIGTERM or SIGINT to a process, a failed write on rank 0.

    with _Requests(device, stop) as requests:
        ...; requests.something_to_save()   # a step is done
        request = requests.agreed(failed)   # once a step, by all processes: the same NOTHING, STOP or FAILED in each

    Within the block, a signal is noted; until there is something to save, it raises stop(number) at once. A second SIGINT
    raises KeyboardInterrupt, unless it follows within a moment: torchrun passes on what its processes may have got as well.
    Between processes the request travels as one number a step. On a GPU it is that of the step before, whose end the host
    then waits for: it stays one step ahead of the GPU, which is never idle for it.
    """

    NOTHING, STOP, FAILED = range(3)
    _TWICE_S = 2.0

    def __init__(self, device: torch.device, stop: Callable[[int], BaseException]):
        self.number: int | None = None  # of the signal that this process got
        self._device, self._stop = device, stop
        self._at = -math.inf
        self._savable = False
        self._handlers: dict[int, Any] = {}
        self._flying: tuple[Tensor, torch.cuda.Event] | None = (
            None  # the request of the step before, on its way to the host
        )
        self._slots: list[Tensor] = []

    def __enter__(self) -> _Requests:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        before, self._at = self._at, time.monotonic()
        if self.number is None:
            self.number = number
            if not self._savable:
                raise self._stop(number)
        elif number == signal.SIGINT and self._at - before > self._TWICE_S:
            raise KeyboardInterrupt

    def something_to_save(self) -> None:
        self._savable = True

    def agreed(self, failed: bool) -> int:
        """The gravest request of any process, the same in all of them."""
        mine = self.FAILED if failed else self.NOTHING if self.number is None else self.STOP
        if group.current()[1] == 1:
            return mine
        request = torch.full((1,), mine, dtype=torch.int32, device=self._device)
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        if self._device.type != "cuda":
            return int(request)
        self._slots = self._slots or [torch.zeros(1, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        arrived, slot = self._flying, self._slots[0]
        self._slots.reverse()
        slot.copy_(request, non_blocking=True)
        self._flying = slot, torch.cuda.current_stream(self._device).record_event()
        if arrived is None:
            return self.NOTHING
        arrived[1].synchronize()
        return int(arrived[0])


# --- Resuming -------------------------------------------------------------------------------------


def _resume_point(
    config: PipelineConfig, train_tokens: np.ndarray, run_dir: Path | None, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint of the run folder, checked to fit; None to start anew.

    Rank 0 finds and verifies it; the others read the same one. Starting anew (train.resume false) moves the earlier run's
    files to previous/, in place of what was put there before.
    """
    if run_dir is None:
        return None
    if not config.train.resume:
        group.from_rank0(lambda: _put_aside(run_dir, say))
        return None
    rank, world_size = group.current()

    def newest() -> Path | None:
        checkpoint.recover(run_dir / CHECKPOINTS)
        return checkpoint.latest(run_dir / CHECKPOINTS)

    path = group.from_rank0(newest)
    if path is None:
        return None

    def read() -> None:
        nonlocal saved
        if rank != 0 and not path.is_dir():
            raise ValueError(f"rank {rank} sees no {path}: give a run_dir on a file system that all processes share")
        saved = checkpoint.load(path, verify=rank == 0)
        differing = _differences(saved, config, world_size)
        if saved.extra.get("train_tokens") != fingerprint(train_tokens):
            differing.append("the training tokens are other ones")
        if differing:
            raise ValueError(
                f"cannot resume from {path}: {'; '.join(differing)}. Restore that, choose another run_dir, or set "
                "train.resume=false to start anew"
            )

    saved: checkpoint.Checkpoint | None = None
    group.by_rank(read)
    return saved


def _differences(saved: checkpoint.Checkpoint, config: PipelineConfig, world_size: int) -> list[str]:
    """What a checkpoint's run and this one give differently of what decides the computation. The length may change, and how
    a step's sequences are shared among processes and micro-batches."""
    old, new = saved.config, to_dict(config)
    for section in ("model", "optim", "train"):
        if not isinstance(old.get(section), dict):
            raise ValueError(f"{saved.path} is damaged: its config has no section '{section}'")
    keys = [(section, key) for section in ("model", "optim") for key in new[section]] + [("train", "seed")]
    differing = [
        f"{section}.{key} is {new[section][key]} and was {old[section].get(key)}"
        for section, key in keys
        if old[section].get(key) != new[section][key]
    ]
    names = ("batch_size", "gradient_accumulation_steps")
    was, now = (
        {"the number of processes": processes} | {f"train.{name}": train.get(name) for name in names}
        for processes, train in ((saved.extra.get("world_size", 1), old["train"]), (world_size, new["train"]))
    )
    if not all(type(value) is int for value in was.values()):
        raise ValueError(f"{saved.path} is damaged: of {', '.join(was)}, one is not a number")
    if math.prod(was.values()) != math.prod(now.values()):
        changed = ", ".join(f"{name} is {now[name]} and was {was[name]}" for name in was if was[name] != now[name])
        differing.append(
            f"a step has {math.prod(now.values())} sequences and had {math.prod(was.values())} ({changed}; their product must "
            "stay)"
        )
    return differing


def _put_aside(run_dir: Path, say: Callable[[str], None]) -> None:
    old = [path for name in (METRICS_FILE, SAMPLES_FILE, CHECKPOINTS) if (path := run_dir / name).exists()]
    if not old:
        return
    aside = run_dir / "previous"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in old:
        os.rename(path, aside / path.name)
    say(f"starting anew; the earlier run's files are in {aside}")


# --- metrics.csv and samples.jsonl ----------------------------------------------------------------


class _Log:
    """Rows and samples, in memory, in the run folder's files and in wandb's run, where there are such.

    The files begin with the rows and samples given, put in place atomically, and grow a flushed line at a time.
    """

    def __init__(self, run_dir: Path | None, rows: list[dict[str, Any]], samples: list[dict[str, Any]], wandb_run: Any):
        self.rows, self.samples = rows, samples
        self._wandb = wandb_run
        self._files: list[Any] = []
        if run_dir is not None:
            header = ",".join(COLUMNS)
            self._start(run_dir / METRICS_FILE, [header, *map(self._csv, rows)])
            self._start(run_dir / SAMPLES_FILE, list(map(self._json, samples)))

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add_row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._append(0, self._csv(row))
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in row.items() if value is not None}, step=row["step"])

    def add_sample(self, sample: dict[str, Any]) -> None:
        self.samples.append(sample)
        self._append(1, self._json(sample))

    @staticmethod
    def _csv(row: dict[str, Any]) -> str:
        """Every digit of a float, so that a resumed run reads back what it wrote."""
        return ",".join("" if row[name] is None else repr(row[name]) for name in COLUMNS)

    @staticmethod
    def _json(sample: dict[str, Any]) -> str:
        return json.dumps(sample, ensure_ascii=False)

    def _start(self, path: Path, lines: Sequence[str]) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._files.append(path.open("a", encoding="utf-8"))

    def _append(self, index: int, line: str) -> None:
        if self._files:
            self._files[index].write(line + "\n")
            self._files[index].flush()


def logged(run_dir: Path | None, step: float = math.inf) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows and samples of a run folder up to a step; what an interrupted run logged after it is left out."""
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    if run_dir is None or step == 0:
        return rows, samples
    if (path := run_dir / METRICS_FILE).exists():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if None in line.values():  # cut off in the middle of a write
                    continue
                row = {name: None if value == "" else float(value) for name, value in line.items()}
                rows.append(row | {"step": int(row["step"]), "tokens": int(row["tokens"])})
    if (path := run_dir / SAMPLES_FILE).exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a line without its end was cut off
        samples = [json.loads(line) for line in lines]
    return [row for row in rows if row["step"] <= step], [sample for sample in samples if sample["step"] <= step]


# --- Small parts ----------------------------------------------------------------------------------


def _due(step: int, interval: int, steps: int) -> bool:
    """True every `interval` steps, if that is positive, and at the last step."""
    return step == steps or (interval > 0 and step % interval == 0)


def _tokens_per_step(config: PipelineConfig, world_size: int) -> int:
    train: TrainConfig = config.train
    return train.batch_size * config.model.context_length * train.gradient_accumulation_steps * world_size


@contextmanager
def _memory_errors_told(when: Callable[[], str]) -> Iterator[None]:
    """OSError in place of torch.OutOfMemoryError: says when, and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch says it so on a GPU, and in a message on the CPU
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise OSError(
            errno.ENOMEM,
            f"out of memory {when()}: {first_line(error)} Lower train.batch_size and raise "
            "train.gradient_accumulation_steps, or shard the model: train.ddp_wrapper=fsdp",
        ) from error


def _bar(total: int, initial: int, shown: bool, world_size: int) -> Any:
    """tqdm's bar in one process; lines in several, whose output another program reads and passes on."""
    if shown and world_size > 1:
        return _Lines(total, initial)
    from tqdm import tqdm

    # Not at every row: an executed notebook keeps all that a bar ever showed.
    return tqdm(total=total, initial=initial, desc="training", unit="step", disable=not shown, mininterval=0.5)


class _Lines:
    """Progress as lines, at most one a second, and one at the end. What train() uses of tqdm's interface."""

    def __init__(self, total: int, initial: int):
        self.total, self.step, self.printed = total, initial, -math.inf

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self) -> None:
        self.step += 1

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        if time.monotonic() - self.printed >= 1 or self.step == self.total:
            print(f"step {self.step} of {self.total}: {text}", flush=True)
            self.printed = time.monotonic()


def _quiet(_message: str) -> None:
    """Say nothing: for all ranks but 0."""
