"""What saving costs: the time of a step without checkpoints, with synchronous and with asynchronous ones.

The runs have a process of their own, which has nothing else on the device; the modes take turns.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from lmsys import cost
from lmsys import train as training
from lmsys.bench.experiment import Experiment, Parameters, Point, Row
from lmsys.bench.measure import one_thread, quantiles
from lmsys.config import PipelineConfig, build, model_size, to_dict, with_train
from lmsys.device import device_name
from lmsys.parallel import group
from lmsys.train import checkpoint

MODES = ("none", "synchronous", "asynchronous")
_SHAPE = {"gpt2": {"context_length": 1024}}  # else 64 tokens and a vocabulary of 4096
_BATCH = {"gpt2": 32}  # sequences; else 2


def measure_point(point: Point, p: Parameters) -> list[Row]:
    """A row for each mode: ms of a step, and what a save holds up the loop and takes to be written."""
    config = saving_config(p)
    context = group.context(torch.device(p.device), __name__, "tqdm")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        times, holds, writes = pool.submit(saving_times, config, p.interval, p.rounds).result()
    usual = statistics.median(times["none"])
    rows = []
    for mode in MODES:
        median, p20, p80 = quantiles(times[mode])
        row = {"mode": mode, "step_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(times[mode])}
        row["cost_pct"] = 100 * (median / usual - 1)
        if mode != "none":
            row |= {"hold_ms": statistics.median(holds[mode]), "write_ms": statistics.median(writes[mode])}
            row["checkpoint_mib"] = 12 * cost.model_parameters(config.model) / 2**20
        rows.append(row)
    return rows


def saving_config(p: Parameters) -> PipelineConfig:
    device = torch.device(p.device)
    model = to_dict(model_size(p.saving, **_SHAPE.get(p.saving, {"context_length": 64, "vocab_size": 4096})))
    train = {"steps": p.interval * p.intervals + 2, "batch_size": _BATCH.get(p.saving, 2), "eval_interval": 0}
    train |= {"eval_batches": 1, "log_interval": p.interval, "device": p.device, "seed": p.seed, "resume": False}
    if device.type == "cuda":
        train |= {"dtype": "bf16", "compile": True, "attention_kernel": "flash_attention_triton"}
    return build(PipelineConfig, {"model": model, "optim": {"warmup_steps": 1}, "train": train})


def saving_times(config: PipelineConfig, interval: int, rounds: int) -> tuple[dict[str, list[float]], ...]:
    """By mode: ms of a step in each interval after a run's first, of each save's hold on the loop, of each write."""
    times, holds, writes = ({mode: [] for mode in MODES} for _ in range(3))
    tokens = np.random.default_rng(config.train.seed).integers(config.model.vocab_size, size=200_000).astype(np.uint16)
    data = {"train_tokens": tokens, "valid_tokens": tokens[: 4 * config.model.context_length], "progress": False}
    with one_thread(torch.device(config.train.device).type == "cpu"):
        for _, mode in itertools.product(range(rounds), MODES):
            every = 0 if mode == "none" else interval
            settings = {"checkpointing_interval": every, "async_checkpoints": mode == "asynchronous"}
            ends: list[float] = []  # of intervals

            def on_step(step: int, _loss: torch.Tensor, ends: list[float] = ends) -> None:
                if step % interval == 0 and step < config.train.steps:  # a row was written: the device has finished
                    ends.append(time.perf_counter())

            with (
                tempfile.TemporaryDirectory(prefix="lmsys-saving-") as folder,
                mock.patch.object(checkpoint.Saver, "save", _timed(checkpoint.Saver.save, holds[mode])),
                mock.patch.object(checkpoint, "write", _timed(checkpoint.write, writes[mode])),
                contextlib.redirect_stdout(None),
            ):
                training.train(with_train(config, **settings), **data, run_dir=Path(folder), on_step=on_step)
            times[mode] += [(end - start) / interval * 1e3 for start, end in itertools.pairwise(ends)]
    return times, holds, writes


def _timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            times.append((time.perf_counter() - started) * 1e3)

    return timed


def _method(p: Parameters) -> dict[str, Any]:
    return {
        "timer": f"time.perf_counter, over {p.interval} steps with one checkpoint; the device is idle at both ends",
        "warmup": f"{p.interval} steps of each run",
        "order": "a run of each mode in turn, several times",
        "statistic": "median, 20th and 80th percentile; cost_pct: of the median step over that without checkpoints",
        "hold_ms": "what a save holds up the training loop; the median, as the first allocates the host's copy",
        "device": device_name(torch.device(p.device)),
        "config": to_dict(saving_config(p)),
    }


SAVING = Experiment(
    name="saving_results",
    columns=(
        *("mode", "size", "interval", "status", "step_ms", "p20_ms", "p80_ms", "samples"),
        *("cost_pct", "hold_ms", "write_ms", "checkpoint_mib", "note"),
    ),
    points=lambda p: [{"size": p.saving, "interval": p.interval}],
    measure=measure_point,
    method=_method,
)
