"""Training a TransformerLM: one function for one device, for a notebook, and for each process of a group.

A run folder holds metrics.csv (its columns: lmsys.train.log), samples.jsonl (step, prompt, text), checkpoints/, and
wandb's files. The device is waited for only where a row of metrics is written; with fp16 at each step, as torch's
gradient scaler reads there whether a gradient overflowed, and with train.on_bad_step=skip.

Resuming is exact: on the CPU, with as many threads, an interrupted run gives the losses of an uninterrupted one bit for
bit. A write of a checkpoint that fails ends the run at the next step. SIGTERM and SIGINT to any process end a run after
the step at hand, with a checkpoint of it and the exit code 128 + signal; before the first step is done, at once. fp32
on a CUDA GPU uses TF32 in matrix products, as is the practice; MFU is then against the TF32 peak.

In several processes, each trains on its rows of the batches that one process with the whole batch would read, and
evaluates its part of the validation batches; rank 0 samples, logs and saves. Losses are means over the ranks. A
checkpoint is that of one process: a run can go on with another number of processes or another wrapper, to the same
losses to rounding, if processes x batch_size x gradient_accumulation_steps stays what it was. Nothing draws from
torch's random generators once the weights are there, so that rank 0's state stands for all. All see the run folder.
"""

from __future__ import annotations

import errno
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmsys import cost
from lmsys import device as devices
from lmsys.config import PipelineConfig
from lmsys.data import BatchSampler
from lmsys.parallel import group
from lmsys.step.optimizer import cosine_schedule
from lmsys.train import checkpoint
from lmsys.train.checkpoint import CHECKPOINTS, damage_told, first_line
from lmsys.train.checks import check, fingerprint, resume_point, tokens_per_step
from lmsys.train.engine import Engine
from lmsys.train.guard import Guard, Requests
from lmsys.train.log import COLUMNS, Log, logged, progress_bar

if TYPE_CHECKING:
    import pandas as pd

    from lmsys.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class History:
    """What a run did: the rows of metrics.csv and, on rank 0, of samples.jsonl, those before a resume included."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Path | None = None  # the last one
    resumed_from: int | None = None  # the step of the checkpoint that the run continued from
    skipped: list[dict[str, Any]] = field(default_factory=list)  # steps without an update: step, draw, fault

    @property
    def valid_loss(self) -> float | None:
        """The last validation loss."""
        return self._last("valid_loss")

    @property
    def train_loss(self) -> float | None:
        """The last training loss; None where every step was skipped."""
        return self._last("train_loss")

    def _last(self, name: str) -> float | None:
        return next((row[name] for row in reversed(self.rows) if row[name] is not None), None)

    def frame(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))


class Stopped(SystemExit):
    """A signal ended the run; the process ends with its code, 128 + the signal's number, unless this is caught."""

    def __init__(self, number: int, checkpoint: Path | None = None):
        super().__init__(128 + number)
        self.checkpoint = checkpoint  # the last one, from which the run can go on, if there is one


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
        wandb_run: what init_wandb returned.
        on_step: called with each step that is done and its loss in this process, a scalar on the device.
    Raises, in several processes in all of them:
        ValueError: settings, data or device that cannot work, found before any work; a checkpoint that does not fit.
        OSError: a folder that cannot be written, a full disk, a device out of memory (in its process alone).
        FloatingPointError: a bad loss or gradient norm; names the step and the batch. The last checkpoint is good.
        Stopped: SIGTERM or SIGINT, after a checkpoint.
    """
    settings = config.train
    rank, world_size = group.current()
    run_dir = None if run_dir is None else Path(run_dir)
    device, steps = check(config, train_tokens, valid_tokens, tokenizer, run_dir)
    step_tokens = tokens_per_step(config, world_size)
    is_main = rank == 0
    say = print if is_main else lambda _line: None

    saved = resume_point(config, train_tokens, run_dir, say)
    rows, samples = logged(run_dir, saved.step if saved else 0)
    if saved and saved.step >= steps:
        say(f"the run in {run_dir} is finished: step {saved.step} of {steps}; nothing to do")
        return History(rows, samples, saved.path, saved.step)

    with _memory_errors_told(lambda: "before the first step"):
        engine = Engine(config, device, saved)
    schedule = {name: getattr(config.optim, name) for name in ("learning_rate", "min_learning_rate", "warmup_steps")}
    shape = settings.batch_size, config.model.context_length
    sharing = {"micro_batches": settings.gradient_accumulation_steps, "rank": rank, "world_size": world_size}
    sampler = BatchSampler(train_tokens, *shape, seed=settings.seed, **sharing)
    if saved:
        sampler.load_state_dict(saved.sampler)
        checkpoint.set_rng_state(saved.rng)
        say(f"resuming from step {saved.step} of {steps}: {saved.path}")

    flops_per_token = cost.train_flops_per_token(config.model) / world_size
    tensor_cores = "tf32" if settings.dtype == "fp32" and device.type == "cuda" else settings.dtype
    peak = devices.peak_flops(devices.device_name(device), tensor_cores)
    last_checkpoint, resumed_from = (saved.path, saved.step) if saved else (None, None)
    with damage_told(last_checkpoint):
        guard = Guard(settings, sampler, saved.extra.get("guard") if saved else None)
        # (loss, gradient norm) of the steps that have no row yet, on the device.
        numbers = saved.extra.get("since_row", ()) if saved else ()
        since_row = [tuple(torch.tensor(float(n), device=device) for n in (loss, norm)) for loss, norm in numbers]
    del saved  # its tensors are in the model and the optimizer now
    first_step = 1 if resumed_from is None else resumed_from + 1
    step = first_step
    started = time.perf_counter() - (rows[-1]["elapsed_s"] if rows else 0.0)

    def save(valid_loss: float | None, window: list[tuple[float, float]]) -> None:
        """Save on rank 0, in the background if so set; all processes give their part."""
        weights, optimizer = engine.strategy.whole_state()
        extra = {"steps": steps, "train_tokens": fingerprint(train_tokens), "world_size": world_size}
        extra |= {"scaler": engine.scaler.state_dict(), "guard": guard.state_dict(), "since_row": window}
        content = {"sampler_state": sampler.state_dict(), "extra": extra, "valid_loss": valid_loss}

        def save_here() -> None:
            snapshot = checkpoint.snapshot(step, weights=weights, optimizer=optimizer, config=config, **content)
            saver.save(snapshot, owned=engine.strategy.copies_state)

        group.from_rank0(save_here)

    def read_window() -> list[tuple[float, float]]:
        """Loss and gradient norm since the last row, means over the ranks; FloatingPointError at a bad one."""
        pairs = _means(since_row)
        for at, (loss, norm) in enumerate(pairs, start=step - len(pairs) + 1):
            if at <= guard.step:  # looked at before: where steps are skipped, each is before its update
                continue
            if fault := guard.fault(loss, norm):
                kept = _kept(group.from_rank0(saver.finish))
                raise FloatingPointError(
                    f"{fault} at step {at}; lower optim.learning_rate or warm up longer, or set train.on_bad_step=skip "
                    f"({guard.batch(step - at)}; {kept})"
                )
            guard.accept(at, loss)
        since_row.clear()
        return pairs

    skips = settings.on_bad_step == "skip"
    keep = {"keep_last": settings.keep_checkpoints, "keep_best": settings.keep_best_checkpoints}
    saving_options = {"background": settings.async_checkpoints, "device": device, "last": last_checkpoint}
    with (
        closing(engine),
        devices.fp32_products("high" if device.type == "cuda" else None),  # TF32
        checkpoint.Saver((run_dir or Path()) / CHECKPOINTS, **saving_options, **keep) as saver,
        _memory_errors_told(lambda: f"at step {step} ({_kept(last_checkpoint)})"),
        Log(run_dir if is_main else None, rows, samples, wandb_run if is_main else None) as log,
        progress_bar(steps, first_step - 1, progress and is_main, world_size) as bar,
        Requests(device, lambda number: _stopped(number, None, steps, last_checkpoint, say)) as requests,
    ):
        window_started, timed = time.perf_counter(), 0  # and how many steps since then
        for step in range(first_step, steps + 1):
            step_loss = engine.accumulate(sampler)
            saver.before_update()
            learning_rate = cosine_schedule(step, total_steps=steps, **schedule)
            norm = engine.clip()
            fault = None
            if skips:  # the host waits for the loss before the update
                ((loss, seen_norm),) = _means([(step_loss, norm)])
                fault = guard.fault(loss, seen_norm)
            if fault:
                engine.discard()
                guard.skip(step, fault, say)
            else:
                engine.apply(learning_rate)
                since_row.append((step_loss, norm))
                if skips:
                    guard.accept(step, loss)
            timed += 1
            bar.update()
            requests.savable = True

            request = requests.agreed(saver.failed)
            if request == Requests.FAILED:
                group.from_rank0(saver.finish)  # raises the error of the write, in every process
            stopping = request == Requests.STOP
            saving = run_dir is not None and _due(step, settings.checkpointing_interval, steps)
            evaluating = _due(step, settings.eval_interval, steps) or (saving and settings.keep_best_checkpoints > 0)
            sampling = tokenizer is not None and _due(step, settings.sample_interval, steps)
            logging = evaluating or sampling or saving or step % settings.log_interval == 0
            valid_loss = None
            if logging:
                window = read_window()
                rate = timed * step_tokens / (time.perf_counter() - window_started)
                row = dict.fromkeys(COLUMNS) | {"step": step, "tokens": step * step_tokens}
                row |= {"learning_rate": learning_rate, "tokens_per_s": rate}
                row["mfu"] = cost.mfu(rate, flops_per_token, peak)
                if window:  # else all its steps were skipped
                    norm = window[-1][1]
                    row["train_loss"] = sum(loss for loss, _ in window) / len(window)
                    row["grad_norm"] = norm if math.isfinite(norm) else None
                if evaluating:
                    row["valid_loss"] = valid_loss = engine.evaluate(valid_tokens)
                row["elapsed_s"] = time.perf_counter() - started
                log.add_row(row)
                shown = "skipped" if row["train_loss"] is None else f"loss {row['train_loss']:.3f}"
                bar.set_postfix_str(f"{shown}, {rate:,.0f} tokens/s", refresh=False)
            if sampling:
                for sample in engine.samples(tokenizer):
                    log.add_sample({"step": step} | sample)
            if saving or (stopping and run_dir is not None):
                save(valid_loss, read_window())
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


def _means(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, means over the ranks, as numbers: waits for the device."""
    if not pairs:
        return []
    numbers = torch.stack([number for pair in pairs for number in pair]).view(-1, 2)
    return [tuple(pair) for pair in group.mean_over_ranks(numbers).tolist()]


def _kept(last_checkpoint: Path | None) -> str:
    return f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was saved"


def _stopped(number: int, step: int | None, steps: int, path: Path | None, say: Callable[[str], None]) -> Stopped:
    """The exception that ends a run by a signal, after a line about it. step None: before the first one."""
    when = "before a step was done" if step is None else f"after step {step} of {steps}"
    how = "; the same command with train.resume=true (train: --resume) goes on from there" if path else ""
    say(f"stopped by {signal.Signals(number).name} {when}; {_kept(path)}{how}")
    return Stopped(number, path)


def _due(step: int, interval: int, steps: int) -> bool:
    """True every `interval` steps, if that is positive, and at the last step."""
    return step == steps or (interval > 0 and step % interval == 0)


@contextmanager
def _memory_errors_told(when: Callable[[], str]) -> Iterator[None]:
    """OSError in place of torch.OutOfMemoryError: says when, and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch says it so on a GPU, and in a message on the CPU
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        remedy = "Lower train.batch_size and raise train.gradient_accumulation_steps, or shard the model"
        message = f"out of memory {when()}: {first_line(error)} {remedy}: train.ddp_wrapper=fsdp"
        raise OSError(errno.ENOMEM, message) from error
