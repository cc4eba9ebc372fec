"""The training step as every benchmark measures it: the engine that `lmsys train` runs, in one process or in several.

measure_step() trains a PipelineConfig from its initial weights for some steps, whose losses are kept, then times
further steps. step_columns() makes of that the columns that all results of a step share. The only other step is the
PyTorch peer's (lmsys.bench.peers).
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmsys import cost, parallel
from lmsys.bench import traces
from lmsys.bench.experiment import Measured
from lmsys.bench.measure import failure, live_bytes, one_thread, peak_bytes_cpu, quantiles, release
from lmsys.bench.power import PowerWatch
from lmsys.bench.processes import Clock, largest
from lmsys.config import ModelConfig, PipelineConfig, build, require, to_dict, unknown_name
from lmsys.data import BatchSampler
from lmsys.device import device_name, fp32_products, peak_flops
from lmsys.parallel import group
from lmsys.parallel.group import Process
from lmsys.records import spread, units, verdict
from lmsys.records import table as records_table
from lmsys.step import graphs
from lmsys.train import check_setup
from lmsys.train.engine import Engine

POINTS = cost.MEMORY_POINTS  # of the first step, at which memory is read
_UNCOUNTED = 2  # steps ahead of those that are timed
_HOST_SAMPLES = 3
# Settings of train that leave a block's compiled code as it is.
_NOT_COMPILED = (
    *("ddp_wrapper", "sharded_optimizer", "reduce_scatter_gradients", "bucket_size_mb", "communication_dtype"),
    *("transport", "cuda_graph", "gradient_accumulation_steps", "device", "seed"),
)


@dataclass(frozen=True)
class Plan:
    """How long a point trains.

    Attributes:
        loss_steps: from the initial weights, losses kept; they compile and warm up, too.
        timed_steps, quiet_steps: after that, with communication and without it.
        eval_batches: of the validation tokens, after the loss steps; on one GPU and on all the same ones.
    """

    loss_steps: int
    timed_steps: int
    quiet_steps: int = 0
    eval_batches: int = 4


def alone(device: torch.device) -> Process:
    """The process of a measurement without a group."""
    return Process(0, 0, 1, 1, device, "")


def step_config(model: ModelConfig, *, learning_rate: float = 3e-4, **train: Any) -> PipelineConfig:
    """The config of a benchmark's step: a constant learning rate, the trainer's AdamW and clipping.

    Args:
        train: fields of TrainConfig: attention_kernel, batch_size, dtype, compile, ddp_wrapper, seed, ...
    Raises:
        ValueError: an unknown field, or settings that do not go together.
    """
    optim = {"learning_rate": learning_rate, "min_learning_rate": learning_rate, "warmup_steps": 0}
    return build(PipelineConfig, {"model": dataclasses.asdict(model), "optim": optim, "train": train})


# --- Measuring ------------------------------------------------------------------------------------


def measure_step(
    process: Process,
    config: PipelineConfig,
    plan: Plan,
    *,
    peer: Callable[..., Any] | None = None,
    traced: bool = False,
    tokens: str | Path | np.ndarray | None = None,
    valid_tokens: str | Path | np.ndarray | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Train and time one point. Where it is one GPU's within a larger group, it is rank 0's; the others only compile.

    Args:
        peer: (config, device) -> what trains in place of the engine, with its methods of a step; see lmsys.bench.peers.
        traced: one more step, under the profiler.
        tokens: the training tokens or their file; None: pattern_tokens(). valid_tokens: with them, a validation loss.
        options: further arguments of the engine (prepare, options of the wrapper) or of the peer.
    Returns:
        on rank 0 (elsewhere the same or None), JSON values: losses (of the loss steps, means over the whole batch),
        ready_s, from here to their end; valid_loss; times_ms; backward_ms and finish_ms of uncaptured steps, the
        backward pass and the wait after it; quiet_ms, steps without communication, of replicas; memory (bytes by
        POINTS) and peak_bytes, both over what was there before; host_ms, of a step that begins on an idle GPU; clock
        and power (PowerWatch); timeline. A time is the largest over the ranks; a loss step sees as many sequences on
        one GPU as on all.
    Raises:
        ValueError: a setting that cannot run here. FloatingPointError: a loss that is not finite.
    """
    train = dataclasses.replace(config.train, device=process.device.type)
    config = dataclasses.replace(config, train=train)
    several = parallel.get_wrapper(train.ddp_wrapper).many_processes
    shares = 1 if several else process.world_size  # of a loss step, that one GPU takes in turn
    waits = not several and process.rank > 0
    if waits and not train.compile:
        return None
    if not several:
        process = dataclasses.replace(process, rank=0, world_size=1, local_world_size=1)
    check_setup(config, process.world_size)
    gpu = process.device.type == "cuda"
    with one_thread(not gpu), fp32_products("high" if gpu else None):  # as training has it
        subject = Subject(process, config, tokens, shares, peer or Engine, **options)
        with closing(subject.engine):
            if waits:
                subject.step()
                return None
            return subject.measure(plan, traced, valid_tokens)


_compiled_for: tuple | None = None  # of this process


def _forget_compiled(config: PipelineConfig, make: Callable) -> None:
    """Drop compiled code of another model: a second shape would be compiled for any shape, which is slower code."""
    global _compiled_for
    train = {name: value for name, value in to_dict(config.train).items() if name not in _NOT_COMPILED}
    if config.train.compile and (config.model, train, make) != _compiled_for:
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # or the rest would run eager without a word
        torch._dynamo.config.optimize_ddp = False  # would cut a graph at torch DDP's buckets; a block is smaller
        _compiled_for = config.model, train, make


class Subject:
    """The engine of a point, or the peer, with its data, and what is measured of its steps."""

    def __init__(
        self,
        process: Process,
        config: PipelineConfig,
        tokens: str | Path | np.ndarray | None = None,
        shares: int = 1,
        make: Callable[..., Any] = Engine,
        **options: Any,
    ):
        self.process, self.config, self.device, self.shares = process, config, process.device, shares
        self._start = time.perf_counter()
        _forget_compiled(config, make)
        release(self.device)
        gc.freeze()  # what was imported and compiled, which the collector and live_bytes() need not look through
        self._before = live_bytes(self.device)
        train = config.train
        self.sampler = BatchSampler(
            tokens_of(config, tokens),
            train.batch_size,
            config.model.context_length,
            micro_batches=shares * train.gradient_accumulation_steps,
            seed=train.seed,
            rank=process.rank,
            world_size=process.world_size,
        )
        self.engine = make(config, self.device, **options)

    def step(self, **options: Any) -> Tensor:
        """One step of training, as `lmsys train` takes it; its loss in this process, on the device."""
        loss = self.engine.accumulate(self.sampler, **options)
        self.engine.update(self.config.optim.learning_rate)
        return loss

    def measure(self, plan: Plan, traced: bool, valid_tokens: str | Path | np.ndarray | None) -> dict[str, Any]:
        """See measure_step()."""
        self.engine.capture_after = max(graphs.WARMUP, plan.loss_steps)
        watched = self.device if self.process.rank == 0 else torch.device("cpu")
        with PowerWatch(watched) as watch:
            result = self._losses(plan) | {"ready_s": time.perf_counter() - self._start}
            if valid_tokens is not None:
                count = plan.eval_batches * self.process.world_size * self.shares
                result["valid_loss"] = self.engine.evaluate(tokens_of(self.config, valid_tokens), count)
            for _ in range(self.engine.capture_after - plan.loss_steps if self.config.train.cuda_graph else 0):
                self.step()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            start = datetime.now()
            result |= self._timed(plan.timed_steps)
            end = datetime.now()
        result |= watch.between(start, end)
        result["peak_bytes"] = largest(self.process, [self._peak()])[0]
        if traced:
            with self._phases(lambda name: traces.phase(name) if name in traces.PHASES else nullcontext()):
                result["timeline"] = traces.lanes(self.step, self.device)
        if plan.quiet_steps and self.process.world_size > 1 and not self.engine.strategy.gathers:
            result["quiet_ms"] = self._timed(plan.quiet_steps, communicate=False)["times_ms"]
        result["host_ms"] = self._host_ms()
        return result

    def _losses(self, plan: Plan) -> dict[str, Any]:
        """losses, and memory at POINTS of the first step."""
        memory = {POINTS[0]: self._held()}

        @contextmanager
        def note(name: str) -> Iterator[None]:
            if name == "optimizer":
                memory.setdefault(POINTS[1], self._held())
            yield
            if name == "optimizer":
                memory[POINTS[2]] = self._held()

        whole = {"micro_batches": self.sampler.micro_batches} if self.shares > 1 else {}
        with self._phases(note):
            losses = [self.step(**whole)]
        losses = torch.stack(losses + [self.step(**whole) for _ in range(plan.loss_steps - 1)])
        values = (group.mean_over_ranks(losses) if self.process.world_size > 1 else losses).tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(f"the losses are {values}")
        most = largest(self.process, list(memory.values()))
        return {"losses": values, "memory": dict(zip(memory, most, strict=True))}

    def _timed(self, steps: int, **options: Any) -> dict[str, list[float]]:
        """times_ms of so many steps, and backward_ms and finish_ms where they can be told. Largest over the ranks."""
        clock, marks = Clock(self.device), Clock(self.device)
        train = self.config.train
        in_parts = not train.cuda_graph and train.gradient_accumulation_steps == 1 and not options

        @contextmanager
        def mark(name: str) -> Iterator[None]:
            if in_parts and name in ("backward", "synchronize"):
                marks.tick()
            yield
            if in_parts and name == "synchronize":
                marks.tick()

        gc.collect()
        if self.process.world_size > 1:
            torch.distributed.barrier()
        with self._phases(mark):
            for _ in range(steps + _UNCOUNTED):
                self.step(**options)
                clock.tick()
        times = {"times_ms": largest(self.process, clock.times_ms()[_UNCOUNTED - 1 :])}
        parts = largest(self.process, marks.times_ms())  # backward, finish, the rest up to the next backward
        return times | ({"backward_ms": parts[0::3], "finish_ms": parts[1::3]} if parts else {})

    def _host_ms(self) -> float | None:
        """The host's time for a step that begins on an idle GPU, whose queue then takes all of it."""
        if self.device.type != "cuda":
            return None
        times = []
        for _ in range(_HOST_SAMPLES):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            self.step()
            times.append((time.perf_counter() - start) * 1e3)
        return quantiles(largest(self.process, times))[0]

    @contextmanager
    def _phases(self, phase: Callable[[str], AbstractContextManager]) -> Iterator[None]:
        """In here these are the contexts of the step's parts."""
        self.engine.phase = phase
        yield
        self.engine.phase = lambda name: nullcontext()

    def _held(self) -> float:
        return live_bytes(self.device, self.engine.module) - self._before

    def _peak(self) -> float:
        """Bytes at the most during a step: a GPU's of all timed ones."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - self._before
            return peak + getattr(self.engine.module, "extra_bytes", 0)
        return self._held() + peak_bytes_cpu(self.step, lambda: ())


# --- Columns --------------------------------------------------------------------------------------


def step_columns(
    config: PipelineConfig, result: Mapping[str, Any], *, device: torch.device, gpus: int = 1
) -> dict[str, Any]:
    """The columns that all results of a step share, of what measure_step() returned.

    exposed_comm_ms: the step less the step under no_sync; None where that still communicates, see beside_one_gpu().
    """
    train, model = config.train, config.model
    median, p20, p80 = quantiles(result["times_ms"])
    tokens = gpus * train.batch_size * train.gradient_accumulation_steps * model.context_length
    rate = tokens / median * 1e3
    flops, peak = cost.train_flops_per_token(model), step_peak_flops(device, train.dtype)
    quiet = result.get("quiet_ms")
    times = {"step_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(result["times_ms"])}
    return times | {
        "tokens_per_s": rate,
        "mfu": cost.mfu(rate / gpus, flops, peak),
        "exposed_comm_ms": 0.0 if gpus == 1 else median - quantiles(quiet)[0] if quiet else None,
        "peak_mib": result["peak_bytes"] / 2**20,
        "final_loss": result["losses"][-1],
    }


def beside_one_gpu(row: Mapping[str, Any], one_gpu_ms: float) -> dict[str, float]:
    """The columns that compare a row with the step of one GPU at the same batch a GPU."""
    columns = {"scaling_efficiency": one_gpu_ms / row["step_ms"]}
    if row.get("exposed_comm_ms") is None:
        columns["exposed_comm_ms"] = row["step_ms"] - one_gpu_ms
    return columns


def step_peak_flops(device: torch.device, dtype: str) -> float | None:
    """What MFU is against: the dense peak of the GPU's matrix units, which take fp32 as TF32; None: not known."""
    return peak_flops(device_name(device), "tf32" if dtype == "fp32" and device.type == "cuda" else dtype)


def step_method(plan: Plan, device: torch.device, dtype: str) -> dict[str, str]:
    """How measure_step() measures, for the stamp of a result."""
    gpu, peak = device.type == "cuda", step_peak_flops(device, dtype)
    quiet = f"step less the step under no_sync ({plan.quiet_steps} samples); " if plan.quiet_steps else ""
    return {
        "timer": f"{'CUDA events' if gpu else 'time.perf_counter'} between steps; of each the largest over the ranks",
        "warmup": f"{plan.loss_steps} steps of training and {_UNCOUNTED} more",
        "samples": f"{plan.timed_steps}",
        "statistic": "median, 20th and 80th percentile",
        "step": "as lmsys train: batch drawn and sent, forward, backward, synchronization, clipping, AdamW",
        "mfu": f"against {peak / 1e12:g} TFLOP/s a GPU" if peak else "none: the peak of this device is not known",
        "exposed_comm_ms": f"{quiet}of sharded wrappers, step less the step of one GPU",
        "memory": "peak allocated of the timed steps" if gpu else "live tensors and the profiler's events of a step",
        "final_loss": f"of step {plan.loss_steps} from the same weights, of the same sequences on one GPU and on all",
    }


# --- Points of experiments ------------------------------------------------------------------------

COLUMNS = (  # of the result files of training steps
    *("kernel", "wrapper", "gpus", "size", "context_length", "local_batch", "dtype", "compiled", "status"),
    *("step_ms", "p20_ms", "p80_ms", "samples", "tokens_per_s", "mfu", "exposed_comm_ms", "peak_mib"),
    *("scaling_efficiency", "final_loss"),
)
TIMELINE_COLUMNS = ("wrapper", "lane", "name", "start_ms", "duration_ms")


def step_point(config: PipelineConfig, size: str, *, gpus: int, processes: int, **more: Any) -> dict[str, Any]:
    """A point of an experiment: its columns, and its config for measure_point(). A status where it cannot run here.

    Args:
        size: the model's name. gpus: that take part, of the group's processes: all, or one without a wrapper.
    """
    train = config.train
    point = {
        "kernel": train.attention_kernel,
        "wrapper": train.ddp_wrapper + parallel.ZERO1 * train.sharded_optimizer,
        "gpus": gpus,
        "size": size,
        "context_length": config.model.context_length,
        "local_batch": train.batch_size,
        "dtype": train.dtype,
        "compiled": bool(train.compile),
        "processes": processes,
        "config": to_dict(config),
    }
    try:
        check_setup(config, gpus)
    except ValueError as error:
        point |= failure(error)
    return point | more


def wrapped(name: str) -> dict[str, Any]:
    """The settings of train that a wrapper's name in results stands for, as flashddp+zero1; ValueError for others."""
    plain, sharded = name.removesuffix(parallel.ZERO1), name.endswith(parallel.ZERO1)
    known = [each for each, wrapper in parallel.WRAPPERS.items() if wrapper.many_processes]
    if plain not in known:
        raise unknown_name("wrapper", name, [*known, *(each + parallel.ZERO1 for each in known if plain == each)])
    require(
        not sharded or parallel.get_wrapper(plain).replicated,
        f"wrapper '{name}': a fully sharded model's optimizer state is sharded already; give {plain}",
    )
    return {"ddp_wrapper": plain, "sharded_optimizer": sharded}


def measure_point(
    process: Process, point: Mapping[str, Any], plan: Plan, **options: Any
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The measured columns of a step_point(), and what measure_step() returned; None in processes without a result."""
    config = build(PipelineConfig, point["config"])
    result = measure_step(process, config, plan, **options)
    if result is None:
        return None
    return step_columns(config, result, device=process.device, gpus=point["gpus"]), result


def with_timeline(point: Mapping[str, Any], columns: dict[str, Any], result: Mapping[str, Any], name: str) -> Measured:
    """The columns with what a traced step shows of communication, and its intervals as rows of the table `name`."""
    if not result.get("timeline"):
        return Measured([columns])
    overlap = traces.overlap(result["timeline"])
    columns |= {"traced_comm_ms": overlap["communication_ms"], "traced_hidden_ms": overlap["hidden_ms"]}
    return Measured([columns], {name: [{"wrapper": point["wrapper"]} | row for row in result["timeline"]]})


def one_gpu_of(row: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of one GPU that a row is compared with: itself, or the last of the earlier ones."""
    return row if row["gpus"] == 1 else next((one for one in reversed(earlier) if one["gpus"] == 1), None)


def wrapper_styles(wrappers: Iterable[str]) -> dict[str, tuple[str, str, bool]]:
    """Label, colour and whether dashed (a peer) of each wrapper of a result."""
    entries = {name: parallel.drawn_as(name) for name in wrappers}
    return {name: (entry.label, entry.colour, entry.peer) for name, entry in entries.items()}


def table(frame, keys: Sequence[str], more: Sequence[str] = ()) -> str:
    """Rows as Markdown: the keys, the step's time with its spread or the status, what is asked for, memory, loss."""
    step = [
        spread(row.step_ms, row.p20_ms, row.p80_ms) if row.status == "ok" else row.status for row in frame.itertuples()
    ]
    shown = frame.assign(step=step)[[*keys, "step", "tokens_per_s", *more, "peak_mib", "final_loss"]]
    shown = shown.drop(columns=[name for name in more if shown[name].isna().all()])
    percent = dict.fromkeys(("mfu", "scaling_efficiency"), "{:.1%}")
    formats = {"tokens_per_s": "{:,.0f}", "peak_mib": "{:,.0f}", "final_loss": "{:.5f}", "gpus": "{:d}"} | percent
    headings = {"gpus": units(frame)[1], "step": "step, ms", "tokens_per_s": "tokens/s", "peak_mib": "peak MiB"}
    headings |= {"mfu": "MFU", "scaling_efficiency": "of linear", "exposed_comm_ms": "communication exposed, ms"}
    headings |= {"finish_ms": "wait after backward, ms", "model_ms": "exposed by the model, ms"}
    return records_table(shown, formats, headings | {"final_loss": "final loss"})


def beside_peers(frame, keys: Sequence[str]):
    """Each wrapper of ours beside PyTorch's of its kind (replicas, or fully sharded) among rows that agree in the keys.

    Returns a DataFrame: keys, wrapper, options where there are some, peer, speed (the peer's time over ours), memory
    (our peak over the peer's), verdict.
    """
    import pandas as pd

    ok, lines = frame[(frame.status == "ok") & (frame.gpus > 1)], []
    for key, rows in ok.groupby(list(keys), sort=False):
        entries = [(parallel.drawn_as(row.wrapper), row) for _, row in rows.iterrows()]
        for (peer, other), (entry, ours) in itertools.product(entries, entries):
            if peer.peer and not entry.peer and peer.sharded == entry.sharded:
                speed, memory = other.step_ms / ours.step_ms, ours.peak_mib / other.peak_mib
                line = dict(zip(keys, key, strict=True)) | {"wrapper": ours.wrapper}
                line |= {name: ours[name] for name in ("options",) if name in frame} | {"peer": other.wrapper}
                judged = verdict(other, ours, "step_ms")
                lines.append(line | {"speed": speed, "memory": memory, "verdict": judged})
    return pd.DataFrame(lines)


# --- Data -----------------------------------------------------------------------------------------


def tokens_of(config: PipelineConfig, tokens: str | Path | np.ndarray | None = None) -> np.ndarray:
    """Those given, or their file's; else a pattern long enough for the model."""
    if tokens is None:
        length = max(1 << 18, 4 * config.model.context_length)
        return pattern_tokens(config.model.vocab_size, length, config.train.seed)
    return tokens if isinstance(tokens, np.ndarray) else np.load(tokens, mmap_mode="r")


def pattern_tokens(vocab_size: int, length: int, seed: int) -> np.ndarray:
    """Ids that a model can learn: Zipf's law, and three in four follow from the token before. (length,), uint32."""
    generator = np.random.default_rng(seed)
    streams = 256
    cumulative = np.cumsum(1.0 / (10 + np.arange(vocab_size)))
    follower = generator.permutation(vocab_size)
    steps = math.ceil(length / streams)
    drawn = np.searchsorted(cumulative, generator.random((steps, streams)) * cumulative[-1])
    drawn = np.minimum(drawn, vocab_size - 1)
    follows = generator.random((steps, streams)) < 0.75
    for index in range(1, steps):
        drawn[index] = np.where(follows[index], follower[drawn[index - 1]], drawn[index])
    return drawn.T.reshape(-1)[:length].astype(np.uint32)
