"""Before the first step: everything that can be known to fail, and the checkpoint that a run goes on from."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmsys import cost, parallel
from lmsys import device as devices
from lmsys.attention import check_support
from lmsys.config import PipelineConfig, require, to_dict
from lmsys.parallel import group
from lmsys.records import writable_dir
from lmsys.train import checkpoint
from lmsys.train.checkpoint import CHECKPOINTS
from lmsys.train.engine import AUTOCAST
from lmsys.train.log import METRICS_FILE, SAMPLES_FILE

if TYPE_CHECKING:
    from lmsys.data.tokenizer import Tokenizer


def total_steps(config: PipelineConfig, train_length: int, world_size: int = 1) -> int:
    """train.steps, or train.epochs as steps: enough to draw that many times the training tokens."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * train_length / tokens_per_step(config, world_size)))


def tokens_per_step(config: PipelineConfig, world_size: int) -> int:
    train = config.train
    return train.batch_size * config.model.context_length * train.gradient_accumulation_steps * world_size


def check_setup(config: PipelineConfig, world_size: int | None = None) -> torch.device:
    """The device of a run, once it is known that this process can train on it; ValueError where it cannot.

    world_size: processes that will train; None: those of this process's group.
    """
    settings, model = config.train, config.model
    device = devices.resolve_device(settings.device)
    world_size = group.current()[1] if world_size is None else world_size
    parallel.check_wrapper(settings.ddp_wrapper, world_size)
    one_gpu = f"train.device is '{settings.device}', one GPU for {world_size} processes, each of which needs its own"
    require(world_size == 1 or device.type != "cuda" or ":" not in settings.device, f"{one_gpu}; give auto or cuda")
    shape = {"head_dim": model.head_dim, "heads": model.num_heads, "kv_heads": model.num_heads}
    dtype = AUTOCAST.get(settings.dtype, torch.float32)
    check_support(settings.attention_kernel, device=device, dtype=dtype, backward=True, **shape)
    graph = f"train.cuda_graph is for a GPU, and this run is on {device}; set train.cuda_graph=false"
    require(not settings.cuda_graph or device.type == "cuda", graph)
    require(
        not settings.compile or device.type != "cpu" or "triton" not in settings.attention_kernel,
        f"train.compile cannot compile '{settings.attention_kernel}' on the CPU, where Triton's interpreter runs it; "
        "set train.compile=false or choose another kernel",
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

    Several processes compare what they were given; then each checks its device, and rank 0 the data and the folder.
    """
    rank, world_size = group.current()
    if world_size > 1:
        given = to_dict(config) | {"run_dir": str(run_dir), "tokenizer": tokenizer is not None}
        given |= {"training tokens": fingerprint(train_tokens), "validation tokens": fingerprint(valid_tokens)}
        group.check_same_everywhere(json.dumps(given, indent=1), "what train() was given")

    steps = total_steps(config, len(train_tokens), world_size)

    def check_here() -> torch.device:
        device = check_setup(config)
        if rank == 0:
            warmup = f"optim.warmup_steps {config.optim.warmup_steps} is more than the run's {steps} steps"
            require(config.optim.warmup_steps <= steps, f"{warmup}; lower it, or train longer")
            _check_data(config, train_tokens, valid_tokens, tokenizer)
            if run_dir is not None:
                _check_folder(config, run_dir)
        return device

    return group.by_rank(check_here)[rank], steps


def _check_data(
    config: PipelineConfig, train_tokens: np.ndarray, valid_tokens: np.ndarray, tokenizer: Tokenizer | None
) -> None:
    model = config.model
    require(model.vocab_size is not None, "model.vocab_size is not set: give it the tokenizer's vocabulary size")
    require(
        tokenizer is None or tokenizer.vocab_size <= model.vocab_size,
        f"the tokenizer's vocabulary of {tokenizer and tokenizer.vocab_size} is larger than model.vocab_size "
        f"{model.vocab_size}; raise it",
    )
    for name, tokens in (("training", train_tokens), ("validation", valid_tokens)):
        require(
            len(tokens) > model.context_length,
            f"the {name} data have {len(tokens)} tokens, fewer than one context of {model.context_length} and its next "
            "token; give more text or lower model.context_length",
        )
        blocks = [tokens[at : at + (1 << 24)] for at in range(0, len(tokens), 1 << 24)]  # a map may exceed memory
        low, high = min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)
        require(
            low >= 0 and high < model.vocab_size,
            f"the {name} data hold token id {low if low < 0 else high}, outside the model's vocabulary of "
            f"{model.vocab_size}; raise model.vocab_size or use the tokenizer of these tokens",
        )


def _check_folder(config: PipelineConfig, run_dir: Path) -> None:
    free = shutil.disk_usage(writable_dir(run_dir)).free
    needed = 12 * cost.model_parameters(config.model)  # weights and two moments in fp32
    if free < needed:
        message = f"a checkpoint needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, message, str(run_dir))


def fingerprint(tokens: np.ndarray) -> dict[str, int]:
    """Length and CRC-32 of the first and last 2^18 tokens: tells other data from the same ones without reading all."""
    ends = np.concatenate((tokens[: 1 << 18], tokens[-(1 << 18) :]))
    return {"length": len(tokens), "crc32": zlib.crc32(ends.astype("<i8").tobytes())}


# --- Resuming -------------------------------------------------------------------------------------


def resume_point(
    config: PipelineConfig, train_tokens: np.ndarray, run_dir: Path | None, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """The newest good checkpoint of the run folder, checked to fit; None to start anew.

    Rank 0 finds and verifies it; the others read the same one. Starting anew (train.resume false) moves the earlier
    run's files to previous/, in place of what was put there before.
    """
    if run_dir is None:
        return None
    if not config.train.resume:
        group.from_rank0(lambda: _put_aside(run_dir, say))
        return None
    rank, world_size = group.current()
    folder = run_dir / CHECKPOINTS
    path = group.from_rank0(lambda: (checkpoint.recover(folder), checkpoint.latest(folder))[1])
    if path is None:
        return None
    saved: checkpoint.Checkpoint | None = None  # not returned by read(), as by_rank() sends results to all processes

    def read() -> None:
        nonlocal saved
        seen = rank == 0 or path.is_dir()
        require(seen, f"rank {rank} sees no {path}: give a run_dir on a file system that all processes share")
        saved = checkpoint.load(path, verify=rank == 0)
        differing = _differences(saved, config, world_size)
        if saved.extra.get("train_tokens") != fingerprint(train_tokens):
            differing.append("the training tokens are other ones")
        require(
            not differing,
            f"cannot resume from {path}: {'; '.join(differing)}. Restore that, choose another run_dir, or set "
            "train.resume=false to start anew",
        )

    group.by_rank(read)
    return saved


def _differences(saved: checkpoint.Checkpoint, config: PipelineConfig, world_size: int) -> list[str]:
    """What of the settings that decide the computation a checkpoint's run and this one give differently.

    The length may change, and how a step's sequences are shared among processes and micro-batches.
    """
    old, new = _flat(saved.config), _flat(to_dict(config))
    same = [name for name in new if name.startswith(("model.", "optim."))] + ["train.seed"]
    differing = [f"{name} is {new[name]} and was {old.get(name)}" for name in same if old.get(name) != new[name]]
    processes = "the number of processes"
    shared = (processes, "train.batch_size", "train.gradient_accumulation_steps")
    old[processes], new[processes] = saved.extra.get("world_size", 1), world_size
    are_numbers = all(type(old.get(name)) is int for name in shared)
    require(are_numbers, f"{saved.path} is damaged: of {', '.join(shared)}, one is not a number")
    had, has = (math.prod(values[name] for name in shared) for values in (old, new))
    if had != has:
        changed = ", ".join(f"{name} is {new[name]} and was {old[name]}" for name in shared if new[name] != old[name])
        differing.append(f"a step has {has} sequences and had {had} ({changed}; their product must stay)")
    return differing


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config's values by section.name."""
    sections = {section: values for section, values in config.items() if isinstance(values, dict)}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


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
