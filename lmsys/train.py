"""Training a TransformerLM: one function for one device, for a notebook, and for each process under torchrun.

A run folder holds metrics.csv (records.SCHEMAS["pipeline_metrics"]), samples.jsonl (step, prompt, text), checkpoints/, and
wandb's files. A step reads gradient_accumulation_steps batches a process, clips the global gradient norm, and takes one
AdamW step at the learning rate of the cosine schedule. The device is waited for only where a row of metrics is written.

Resuming is exact: on the CPU, with as many threads, an interrupted run gives the losses of an uninterrupted one bit for bit.
fp32 on a CUDA GPU uses TF32 in matrix products (torch's precision "high"), as is the practice; MFU is then against the TF32
peak. The loss that is reported under torchrun is that of rank 0's share of the batch.
"""

from __future__ import annotations

import csv
import errno
import functools
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmsys import checkpoint, cost, parallel
from lmsys import device as devices
from lmsys.attention import check_support
from lmsys.config import PipelineConfig, TrainConfig, to_dict
from lmsys.data import BatchSampler, sequential_batches
from lmsys.generate import generate_text
from lmsys.model import TransformerLM, cross_entropy
from lmsys.optim import AdamW, clip_grad_norm, cosine_schedule, parameter_groups
from lmsys.records import SCHEMAS, atomic_path, writable_dir

if TYPE_CHECKING:
    import pandas as pd

    from lmsys.tokenizer import Tokenizer

COLUMNS = SCHEMAS["pipeline_metrics"]
METRICS_FILE, SAMPLES_FILE, CHECKPOINTS = "metrics.csv", "samples.jsonl", "checkpoints"


@dataclass(frozen=True)
class History:
    """What a run did: the rows of metrics.csv and samples.jsonl, those before a resume included."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Path | None = None  # the last one
    resumed_from: int | None = None  # the step of the checkpoint that the run continued from

    @property
    def valid_loss(self) -> float | None:
        """The last validation loss."""
        return next((row["valid_loss"] for row in reversed(self.rows) if row["valid_loss"] is not None), None)

    def frame(self) -> pd.DataFrame:
        """The rows as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))


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
        progress: show a bar.
        wandb_run: what init_wandb returned; metrics are logged to it.
        on_step: called with each step that is done and its loss, a scalar on the device.
    Raises:
        ValueError: settings, data or device that cannot work, found before any work; a checkpoint that does not fit.
        OSError: a folder that cannot be written, a full disk.
        FloatingPointError: the loss or the gradient norm is not finite; names the step. The last checkpoint is good.
    """
    settings = config.train
    rank, world_size = _process()
    run_dir = None if run_dir is None else Path(run_dir)
    device, steps = check(config, train_tokens, valid_tokens, tokenizer, run_dir, world_size)
    tokens_per_step = _tokens_per_step(config, world_size)
    is_main = rank == 0
    say = print if is_main else _quiet

    saved = _resume_point(config, train_tokens, run_dir, is_main, say)
    rows, samples = _logged(run_dir, saved.step if saved else 0)
    if saved and saved.step >= steps:
        say(f"the run in {run_dir} is finished: step {saved.step} of {steps}; nothing to do")
        return History(rows, samples, saved.path, saved.step)

    torch.manual_seed(settings.seed)
    with device:  # initialized where it will be: a large model takes minutes on the CPU
        model = TransformerLM(config.model, attention_kernel=settings.attention_kernel)
    optimizer = AdamW(
        parameter_groups(model, config.optim.weight_decay),
        lr=config.optim.learning_rate,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )
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
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
    )
    if saved:
        checkpoint.load_weights(model, saved.weights)
        optimizer.load_state_dict(saved.optimizer)
        sampler.load_state_dict(saved.sampler)
        checkpoint.set_rng_state(saved.rng)
        say(f"resuming from step {saved.step} of {steps}: {saved.path}")
    loss_function = cross_entropy
    if settings.compile:
        model.compile_blocks()
        loss_function = torch.compile(cross_entropy)
    trained = parallel.wrap(model, settings.ddp_wrapper)
    parameters = list(model.parameters())

    flops_per_token = cost.train_flops_per_token(config.model) / world_size
    tensor_cores = "tf32" if settings.dtype == "fp32" and device.type == "cuda" else settings.dtype
    peak = devices.peak_flops(devices.device_name(device), tensor_cores)
    last_checkpoint, resumed_from = (saved.path, saved.step) if saved else (None, None)
    del saved  # its tensors are in the model and the optimizer now
    first_step = 1 if resumed_from is None else resumed_from + 1
    started = time.perf_counter() - (rows[-1]["elapsed_s"] if rows else 0.0)
    losses: list[Tensor] = []  # of the steps since the last row, on the device
    norms: list[Tensor] = []

    with (
        _matmul_precision(device),
        _Log(run_dir if is_main else None, rows, samples, wandb_run if is_main else None) as log,
        _bar(steps, first_step - 1, progress and is_main) as bar,
    ):
        window_started = time.perf_counter()
        for step in range(first_step, steps + 1):
            learning_rate = rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            step_loss = torch.zeros((), device=device)
            for _ in range(settings.gradient_accumulation_steps):
                inputs, targets = (_to_device(array, device) for array in sampler.next())
                with autocast(device, settings.dtype):
                    loss = loss_function(trained(inputs), targets) / settings.gradient_accumulation_steps
                loss.backward()
                step_loss += loss.detach()
            if world_size > 1:
                trained.finish_gradient_synchronization()
            norms.append(clip_grad_norm(parameters, config.optim.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(step_loss)
            bar.update()

            evaluating = _due(step, settings.eval_interval, steps)
            sampling = tokenizer is not None and _due(step, settings.sample_interval, steps)
            saving = run_dir is not None and _due(step, settings.checkpointing_interval, steps)
            if evaluating or sampling or saving or step % settings.log_interval == 0:
                window = _finite(step, losses, norms, last_checkpoint)  # waits for the device
                seconds = time.perf_counter() - window_started
                rate = len(losses) * tokens_per_step / seconds
                row = dict.fromkeys(COLUMNS) | {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "train_loss": sum(window) / len(window),
                    "learning_rate": learning_rate,
                    "grad_norm": norms[-1].item(),
                    "tokens_per_s": rate,
                    "mfu": cost.mfu(rate, flops_per_token, peak),
                }
                losses.clear()
                norms.clear()
                if evaluating:
                    row["valid_loss"] = evaluate(
                        model,
                        valid_tokens,
                        batch_size=settings.batch_size,
                        max_batches=settings.eval_batches,
                        dtype=settings.dtype,
                    )
                row["elapsed_s"] = time.perf_counter() - started
                log.add_row(row)
                bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {rate:,.0f} tokens/s")
            if sampling and is_main:
                for prompt in config.generate.prompts:
                    with autocast(device, settings.dtype):
                        text = generate_text(model, tokenizer, prompt, config.generate)
                    log.add_sample({"step": step, "prompt": prompt, "text": text})
            if saving and is_main:
                last_checkpoint = checkpoint.save(
                    run_dir / CHECKPOINTS,
                    step,
                    model=model,
                    optimizer=optimizer,
                    sampler_state=sampler.state_dict(),
                    rng=checkpoint.rng_state(),
                    config=config,
                    extra={"steps": steps, "train_tokens": fingerprint(train_tokens)},
                    keep_last=settings.keep_checkpoints,
                )
            if on_step is not None:
                on_step(step, step_loss)
            if not losses:
                window_started = time.perf_counter()  # evaluation, samples and checkpoints do not count as training
    return History(log.rows, log.samples, last_checkpoint, resumed_from)


@torch.no_grad()
def evaluate(
    model: TransformerLM, tokens: np.ndarray, *, batch_size: int, max_batches: int, dtype: str = "fp32"
) -> float:
    """Mean next-token loss in nats over the first max_batches batches of the tokens, the same ones at every call."""
    device = model.token_embeddings.weight.device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for inputs, targets in sequential_batches(tokens, batch_size, model.config.context_length, max_batches):
        with autocast(device, dtype):
            loss = cross_entropy(model(_to_device(inputs, device)), _to_device(targets, device))
        total += loss.double() * targets.size
        count += targets.size
    return total.item() / count


def total_steps(config: PipelineConfig, train_length: int, world_size: int = 1) -> int:
    """train.steps, or train.epochs as steps: enough to draw that many times the training tokens."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * train_length / _tokens_per_step(config, world_size)))


def init_wandb(config: PipelineConfig, run_dir: str | Path) -> Any:
    """Start a Weights & Biases run whose files lie under run_dir.

    WANDB_MODE decides, then wandb.mode; `auto` is online where the user is logged in and the server answers, else offline.
    wandb reads its key from its own places; none passes through here.

    Raises:
        ValueError: online was asked for and cannot be had.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE") or config.wandb.mode
    if mode == "auto":
        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
        except wandb.errors.Error as error:
            print(f"wandb: logging offline, the server does not take the login: {_first_line(error)}")
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
        raise ValueError(f"wandb cannot start in mode '{mode}': {_first_line(error)}; set wandb.mode=offline") from None


# --- Checks ---------------------------------------------------------------------------------------


def check_setup(config: PipelineConfig) -> torch.device:
    """The device of a run, after checking that this process can train on it with the kernel and the wrapper of the config.

    Raises:
        ValueError: no such device, kernel or wrapper, or one that does not take this model.
    """
    settings, model = config.train, config.model
    device = devices.resolve_device(settings.device)
    parallel.check_wrapper(settings.ddp_wrapper, _process()[1])
    check_support(
        settings.attention_kernel,
        device=device,
        dtype=torch.bfloat16 if settings.dtype == "bf16" else torch.float32,
        head_dim=model.head_dim,
        heads=model.num_heads,
        kv_heads=model.num_heads,
        backward=True,
    )
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
    world_size: int = 1,
) -> tuple[torch.device, int]:
    """Everything that can be known to fail before a run starts. Returns the device and the number of steps.

    Raises:
        ValueError, OSError: as train().
    """
    model = config.model
    device = check_setup(config)
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
    steps = total_steps(config, len(train_tokens), world_size)
    if config.optim.warmup_steps > steps:
        raise ValueError(
            f"optim.warmup_steps {config.optim.warmup_steps} is more than the run's {steps} steps; lower it, or train longer"
        )
    if run_dir is not None:
        free = shutil.disk_usage(writable_dir(run_dir)).free
        needed = 12 * cost.model_parameters(model)  # weights and two moments in fp32
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free",
                str(run_dir),
            )
    return device, steps


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


def _finite(step: int, losses: list[Tensor], norms: list[Tensor], last_checkpoint: Path | None) -> list[float]:
    """The losses of the steps up to `step` as numbers; FloatingPointError where one of them or of the norms is not finite."""
    pairs = torch.stack([torch.stack(losses), torch.stack(norms)], -1).tolist()
    for at, (loss, norm) in enumerate(pairs, start=step - len(pairs) + 1):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
            kept = f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was saved"
            raise FloatingPointError(f"{what} at step {at}; lower optim.learning_rate or warm up longer ({kept})")
    return [loss for loss, _ in pairs]


# --- Resuming -------------------------------------------------------------------------------------


def _resume_point(
    config: PipelineConfig, train_tokens: np.ndarray, run_dir: Path | None, is_main: bool, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint of the run folder, checked to fit; None to start anew.

    Starting anew (train.resume false) moves the earlier run's files to previous/, in place of what was put there before.
    """
    if run_dir is None:
        return None
    if not config.train.resume:
        if is_main:
            _put_aside(run_dir, say)
        return None
    path = checkpoint.latest(run_dir / CHECKPOINTS)
    if path is None:
        return None
    saved = checkpoint.load(path)
    differing = _differences(saved.config, to_dict(config))
    if saved.extra["train_tokens"] != fingerprint(train_tokens):
        differing.append("the training tokens are other ones")
    if differing:
        raise ValueError(
            f"cannot resume from {path}: {'; '.join(differing)}. Restore that, choose another run_dir, or set "
            "train.resume=false to start anew"
        )
    return saved


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two configs give differently of the settings that decide what a run computes. The length may change."""
    keys = [(section, key) for section in ("model", "optim") for key in new[section]]
    keys += [("train", key) for key in ("batch_size", "gradient_accumulation_steps", "seed")]
    return [
        f"{section}.{key} is {new[section][key]} and was {old[section].get(key)}"
        for section, key in keys
        if old[section].get(key) != new[section][key]
    ]


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


def _logged(run_dir: Path | None, step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
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


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The context in which a model of train.dtype computes: bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def _process() -> tuple[int, int]:
    """Rank and number of processes: torch.distributed's where it is initialized, else 0 and 1."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def _matmul_precision(device: torch.device) -> Iterator[None]:
    """TF32 for fp32 products on CUDA while training; what was set before comes back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _bar(total: int, initial: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=initial, desc="training", unit="step", disable=not shown)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _quiet(_message: str) -> None:
    """Say nothing: for all ranks but 0."""
