"""A race to the same loss: one model trained by a naive step, by ours on one GPU, and by ours on two with flashddp.

Every arm is a run of lmsys.train under settings of its own: the same initial weights, batches in the same order, learning rates and validation
batches. `naive` is eager, attention written out, no option of the trainer; `ours` has the fast kernel, compiled blocks and
every option of the fastest step (bench/train_step.py takes them apart); `ours_ddp` halves the local batch, so that a step reads the same sequences. All compute in the same precision. Time is that of training: from row to row of the trainer's
metrics, which leaves evaluations out; the first row's steps, which compile, count at the pace of the second's. An arm ends with the schedule, or
at its limit of such time, whichever is first.

At full scale: nanoGPT's 124M shape, 116 million parameters here, on stories of lmsys.data.stories, 3,000 steps of 32 x 1,024 tokens. These 98 million
tokens are drawn from 400 MB, 103 million tokens, so that a text is seen once on average and none can be learned by heart; 600,000 tokens/s
read them within three minutes. All words of the stories are single tokens from a vocabulary of 3,000 on, so it is 2,048; a text of your own can
take a larger one. Stories are generated in parts, by as many processes as there are cores: with tokenizer and token files two cores took 0.18 s a
MB (measured at 48 MB), and later runs find all in the run folder. Evaluations every 50 steps read three steps' tokens, forward only: 2% of the time.

Limits: one seed; learning rates are usual ones, not tuned; a limit is looked at where a row is written. The stories come from a grammar: their loss is
lower than that of real text, and flat sooner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # now and not in the first step
from torch import Tensor

from lmsys import cost, pipeline, records
from lmsys import train as training
from lmsys.bench.measure import is_out_of_memory, one_thread, release
from lmsys.bench.train_step import OPTIONS, WHERE_NAMED, possible_options
from lmsys.config import PipelineConfig, build, model_size, require, resolve_scale, unknown_name
from lmsys.data import load_tokens, stories
from lmsys.data.workers import map_in_order, resolve_workers
from lmsys.device import device_name, resolve_device
from lmsys.parallel import group

NAME = "race_results"
EXTRA_COLUMNS = ("planned_steps", "kernel", "local_batch", "dtype", "parameters", "device", "note")
NAIVE, OURS, OURS_DDP = ARMS = ("naive", "ours", "ours_ddp")
_PART_MB = 16.0  # of a text that is generated: what a process makes at a time
_VOCABULARY_MULTIPLE = 128  # rows of the embedding and the head, for the tensor cores


# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RaceSettings:
    """What is run; make it with settings(), which fills it from a scale and checks it.

    Attributes:
        arms: in the order in which they run. gpus: of ours_ddp; processes on a CPU.
        minutes: of training that an arm may take. steps: of the schedule, for all arms.
        batch: sequences of a step, over all GPUs. options: of bench/train_step.py that ours has.
        eval_batches: of a step's size. text_path: a UTF-8 text in place of stories, text_mb of which are generated.
    """

    scale: str
    arms: tuple[str, ...]
    gpus: int
    minutes: float
    steps: int
    size: str
    batch: int
    context_length: int
    vocab_size: int
    text_path: str | None
    text_mb: float
    valid_fraction: float
    dtype: str
    compiled: bool
    naive_kernel: str
    kernel: str
    options: tuple[str, ...]
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    log_interval: int
    eval_interval: int
    eval_batches: int
    run_dir: str
    device: str
    seed: int


_CPU = {
    "size": "tiny",
    "valid_fraction": 0.1,
    "dtype": "fp32",
    "compiled": False,
    "kernel": "vectorized_torch",
    "options": ("fused_loss", "fused_rope", "merged_gate", "fused_optimizer"),
    "learning_rate": 5e-3,
    "min_learning_rate": 1e-4,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": _CPU
    | {"minutes": 0.2, "steps": 12, "batch": 4, "context_length": 32, "vocab_size": 300, "text_mb": 0.1}
    | {"warmup_steps": 2, "log_interval": 2, "eval_interval": 4, "eval_batches": 1},
    "cpu": _CPU
    | {"minutes": 0.03, "steps": 75, "batch": 8, "context_length": 64, "vocab_size": 512, "text_mb": 0.5}
    | {"warmup_steps": 10, "log_interval": 5, "eval_interval": 5, "eval_batches": 2},
    "full": {
        "minutes": 4.0,
        "steps": 3000,
        "size": "gpt2",
        "batch": 32,
        "context_length": 1024,
        "vocab_size": 2048,
        "text_mb": 400.0,
        "valid_fraction": 0.01,
        "dtype": "bf16",
        "compiled": True,
        "kernel": "flash_attention_triton",
        "options": tuple(name for name in OPTIONS if name not in (*WHERE_NAMED, "written_backward")),
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-5,
        "warmup_steps": 150,
        "log_interval": 25,
        "eval_interval": 50,
        "eval_batches": 3,
    },
}


def settings(
    scale: str = "auto",
    arms: Sequence[str] = (OURS, OURS_DDP, NAIVE),
    gpus: int = 2,
    minutes: float | None = None,
    steps: int | None = None,
    size: str | None = None,
    batch: int | None = None,
    context_length: int | None = None,
    vocab_size: int | None = None,
    text_path: str | None = None,
    text_mb: float | None = None,
    dtype: str | None = None,
    compiled: bool | None = None,
    naive_kernel: str = "scaled_dot_prod_attention",
    kernel: str | None = None,
    options: Sequence[str] | None = None,
    learning_rate: float | None = None,
    eval_interval: int | None = None,
    run_dir: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> RaceSettings:
    """The settings of a scale, with what is given in their place.

    Raises:
        ValueError: an unknown name, a number out of range, or settings that the trainer does not take.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    scale = resolve_scale(scale)
    values = {"text_path": None, "run_dir": f"runs/race-{scale}"} | _PRESETS[scale] | given | {"scale": scale}
    if options is None:  # what the precision and the lack of compilation leave
        possible = possible_options(values["dtype"], values["compiled"], values["kernel"])
        values["options"] = [name for name in values["options"] if name in possible]
    values["arms"], values["options"] = tuple(values["arms"]), tuple(values["options"])
    for what, known in (("arm", ARMS), ("option", OPTIONS)):
        for name in values[f"{what}s"]:
            if name not in known:
                raise unknown_name(what, name, known)
    require(
        len(set(values["arms"])) == len(values["arms"]) > 0, f"arms is {', '.join(arms) or 'empty'}; give each once"
    )
    require(values["minutes"] > 0, f"minutes is {values['minutes']}; it must be positive")
    require(values["text_mb"] > 0, f"text_mb is {values['text_mb']}; it must be positive")
    for name, least in (("gpus", 2), ("steps", 1), ("batch", 1), ("context_length", 1), ("eval_interval", 1)):
        require(
            type(values[name]) is int and values[name] >= least,
            f"{name} is {values[name]!r}; it takes whole numbers of {least} or more",
        )
    require(
        values["batch"] % values["gpus"] == 0,
        f"batch {values['batch']} is not a multiple of gpus {values['gpus']}: each GPU reads its share of a step's sequences",
    )
    require(
        values["eval_interval"] % values["log_interval"] == 0,
        f"eval_interval {values['eval_interval']} is not a multiple of this scale's {values['log_interval']} steps between rows",
    )
    require(
        ":" not in values["device"], f"device is '{values['device']}'; give auto, cpu or cuda: arms take GPUs from 0 on"
    )
    values["warmup_steps"] = min(values["warmup_steps"], values["steps"])
    made = RaceSettings(**values)
    for arm in made.arms:
        if lacking(made, arm) is None:
            training.check_setup(pipeline_config(made, arm), processes(made, arm))
    return made


def processes(chosen: RaceSettings, arm: str) -> int:
    """How many processes, a GPU each, train an arm."""
    return chosen.gpus if arm == OURS_DDP else 1


def lacking(chosen: RaceSettings, arm: str) -> str | None:
    """Why this machine cannot run an arm, or None."""
    device = resolve_device(chosen.device)
    count = torch.cuda.device_count() if device.type == "cuda" else None
    needed = processes(chosen, arm)
    return None if count is None or needed <= count else f"needs {needed} GPUs; this machine has {count}"


def pipeline_config(chosen: RaceSettings, arm: str) -> PipelineConfig:
    """An arm as the trainer takes it."""
    ours = arm != NAIVE
    train: dict[str, Any] = {}
    for name in chosen.options if ours else ():
        train |= OPTIONS[name][0]
    padded = -(-chosen.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    model = model_size(chosen.size, vocab_size=padded, context_length=chosen.context_length)
    values = {
        "run_dir": chosen.run_dir,
        "tokenizer": {"vocab_size": chosen.vocab_size},
        "model": dataclasses.asdict(model),
        "optim": {name: getattr(chosen, name) for name in ("learning_rate", "min_learning_rate", "warmup_steps")},
        "train": {"compile": chosen.compiled and ours}
        | train
        | {
            "batch_size": chosen.batch // processes(chosen, arm),
            "attention_kernel": chosen.kernel if ours else chosen.naive_kernel,
            "ddp_wrapper": "flashddp" if arm == OURS_DDP else "none",
        }
        | {
            name: getattr(chosen, name)
            for name in ("steps", "dtype", "log_interval", "eval_interval", "eval_batches", "device", "seed")
        },
    }
    return build(PipelineConfig, values)


# --- Data -----------------------------------------------------------------------------------------


def prepare(chosen: RaceSettings, *, progress: bool = True) -> tuple[tuple[Path, Path], dict[str, Any]]:
    """Text, tokenizer and token files in the run folder, by the pipeline's stages: ((training, validation), what they are)."""
    started = time.perf_counter()
    run_dir = records.writable_dir(records.output_path(chosen.run_dir))
    text = chosen.text_path or str(write_stories(run_dir, chosen.text_mb, chosen.seed))
    config = pipeline_config(chosen, NAIVE)
    data = {"dataset_mode": "local_text", "text_path": text, "valid_fraction": chosen.valid_fraction}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))

    def report(name: str, status: str, start: float, detail: str) -> None:
        if progress:
            print(f"[{name}] {'skipped: ' if status == 'skipped' else ''}{detail}", flush=True)

    stages = pipeline.Stages(run_dir, report, frozen=False)
    tokenizer, train_tokens, valid_tokens, bytes_per_token = pipeline.prepare(config, run_dir, stages, False)
    found = {
        "text": Path(text).name,
        "vocabulary": tokenizer.vocab_size,
        "training_tokens": len(train_tokens),
        "validation_tokens": len(valid_tokens),
        "bytes_per_token": round(bytes_per_token, 3),
        "prepared_in_s": round(time.perf_counter() - started, 1),
    }
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

Row = dict[str, Any]
TokenFiles = tuple[Path, Path]


class LimitReached(Exception):
    """The arm has trained for as long as it may."""


class _Rows:
    """Takes the trainer's rows as its logger does, and passes them on with the seconds of training until then."""

    def __init__(self, on_row: Callable[[Row], None]):
        self.on_row = on_row
        self.seconds = 0.0
        self._tokens = 0
        self._first: Row | None = None  # waits for the pace of the second

    def log(self, values: Row, step: int) -> None:
        window_s = (values["tokens"] - self._tokens) / values["tokens_per_s"]
        if self._tokens == 0:
            self._tokens, self._first = values["tokens"], dict(values)
            return
        if self._first is not None:
            self.seconds = self._first["tokens"] / values["tokens_per_s"]
            self.on_row(self._first | {"seconds": self.seconds, "tokens_per_s": None, "mfu": None})
            self._first = None
        self._tokens = values["tokens"]
        self.seconds += window_s
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
        training.train(
            config,
            train_tokens=train_tokens,
            valid_tokens=valid_tokens,
            progress=False,
            wandb_run=rows,
            on_step=on_step,
        )


def _rank(
    process: group.Process, config: PipelineConfig, token_files: TokenFiles, limit_s: float, rows_file: Path
) -> None:
    """One process of an arm; rank 0 appends its rows to a file, a JSON object a line."""
    with rows_file.open("a", encoding="utf-8") as file:
        train_arm(config, token_files, limit_s, lambda row: print(json.dumps(row), file=file, flush=True))


def train_in_processes(
    config: PipelineConfig, count: int, token_files: TokenFiles, limit_s: float, on_row: Callable[[Row], None]
) -> None:
    """train_arm() in so many new processes; on_row gets the rows as they come, from a thread.

    Raises:
        group.RankError: a process failed. The rows until then were passed on.
    """
    rows_file = token_files[0].with_name("race_rows.jsonl")
    rows_file.write_text("", encoding="utf-8")
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(_follow, rows_file, ended, on_row)
        try:
            group.spawn(_rank, count, config, token_files, limit_s, rows_file, device=config.train.device)
        finally:
            ended.set()
        follower.result()


def _follow(path: Path, ended: threading.Event, on_row: Callable[[Row], None], every_s: float = 0.2) -> None:
    """Pass on the lines of a growing file until its writers have ended."""
    text = ""
    with path.open(encoding="utf-8") as file:
        while True:
            last = ended.wait(every_s)  # before reading: what was written until then is read
            *lines, text = (text + file.read()).split("\n")
            for line in lines:
                on_row(json.loads(line))
            if last:
                return


# --- The race -------------------------------------------------------------------------------------


def run(chosen: RaceSettings, folder: str | Path, *, on_row: Callable[[Row], None] = lambda row: None):
    """Prepare the text, train every arm, write race_results.csv as they go; return it as a DataFrame."""
    token_files, corpus = prepare(chosen)
    device = resolve_device(chosen.device)
    with records.ResultWriter(
        NAME, folder, method=method() | corpus, parameters=dataclasses.asdict(chosen), extra_columns=EXTRA_COLUMNS
    ) as writer:

        def write(row: Row) -> None:
            writer.write(row)
            on_row(row)

        with one_thread(device.type == "cpu"):
            for arm in chosen.arms:
                run_arm(chosen, arm, device, token_files, write)
    return records.read_results(writer.path)


def method() -> dict[str, Any]:
    """How time is taken, for the stamp of a result."""
    return {
        "timer": "time.perf_counter from row to row of the trainer's metrics, the device synchronized at each",
        "seconds": "of training: without evaluations; the first row's steps, which compile, at the second row's pace",
        "elapsed_s": "with both, from the trainer's start",
        "samples": "one run of each arm",
    }


def run_arm(
    chosen: RaceSettings, arm: str, device: torch.device, token_files: TokenFiles, write: Callable[[Row], None]
) -> None:
    """Train an arm and write its rows; what fails, or cannot run here, is a row."""
    config, count = pipeline_config(chosen, arm), processes(chosen, arm)
    common = {
        "arm": arm,
        "gpus": count,
        "status": "ok",
        "planned_steps": chosen.steps,
        "kernel": config.train.attention_kernel,
        "local_batch": config.train.batch_size,
        "dtype": chosen.dtype,
        "parameters": cost.model_parameters(config.model),
        "device": device_name(device),
    }
    reason = lacking(chosen, arm)
    if reason is not None:
        write(common | {"status": "unsupported", "note": reason})
        return

    def on_row(values: Row) -> None:
        kept = {name: value for name, value in values.items() if name in records.SCHEMAS[NAME]}
        losses = {name: f"{kept[name]:.9g}" for name in ("train_loss", "valid_loss") if kept.get(name) is not None}
        write(common | kept | losses)

    failed: Row = {}
    try:
        if count > 1:
            train_in_processes(config, count, token_files, 60 * chosen.minutes, on_row)
        else:
            train_arm(config, token_files, 60 * chosen.minutes, on_row)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        failed = {"status": "oom" if is_out_of_memory(error) or "out of memory" in text else "error", "note": text}
    if chosen.compiled:
        torch._dynamo.reset()  # compiled code, what it holds, and the limit on recompilations
    release(device)  # out of the except block, whose traceback holds tensors
    if failed:
        write(common | failed)


# --- Report ---------------------------------------------------------------------------------------


def label(arm: str, gpus: int, units: tuple[str, str]) -> str:
    """An arm's name in tables and figures. units: see records.units."""
    named = {NAIVE: "naive attention, naive step", OURS: "lmsys", OURS_DDP: "lmsys, flashddp"}[arm]
    return f"{named}, {gpus} {units[gpus > 1]}"


def row_line(row: Row) -> str:
    """A row in a line, as it is measured."""
    if row["status"] != "ok":
        return f"{row['arm']:9} {row['status']}: {row['note']}"
    valid = f", validation {float(row['valid_loss']):.4f}" if row.get("valid_loss") is not None else ""
    rate = f", {row['tokens_per_s']:,.0f} tokens/s" if row.get("tokens_per_s") is not None else ""
    return f"{row['arm']:9} step {row['step']:6,} {row['seconds']:8.2f} s, loss {float(row['train_loss']):.4f}{valid}{rate}"


def curves(frame) -> dict[str, Any]:
    """The evaluations of each arm that has any, by arm in the order of ARMS."""
    ok = frame[(frame.status == "ok") & frame.valid_loss.notna()]
    return {arm: ok[ok.arm == arm].sort_values("step") for arm in ARMS if (ok.arm == arm).any()}


def reaching(curve, loss: float) -> tuple[float, float] | None:
    """(seconds, tokens) at which an arm's validation loss first is as low as that, between evaluations interpolated; None: never."""
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
    """Losses that every arm reached, falling: what the arm of the fewest tokens had at a quarter, at half and at all of them."""
    found = curves(frame)
    if not found:
        return []
    lowest = max(curve.valid_loss.min() for curve in found.values())
    shortest = min(found.values(), key=lambda curve: curve.tokens.max())
    least = shortest.valid_loss.cummin().to_numpy()
    marks = {max(lowest, least[max(0, round(share * len(least)) - 1)]) for share in (0.25, 0.5, 1.0)} | {lowest}
    return sorted(map(float, marks), reverse=True)


def loss_difference(frame) -> tuple[float, int, float, int] | None:
    """Between arms' validation losses at the same tokens: (largest, its tokens, at the last that arms share, its tokens)."""
    by_tokens = {arm: curve.set_index("tokens").valid_loss for arm, curve in curves(frame).items()}
    shared = sorted(set().union(*(curve.index for curve in by_tokens.values())))
    spread = {}
    for tokens in shared:
        values = [curve[tokens] for curve in by_tokens.values() if tokens in curve.index]
        if len(values) > 1:
            spread[int(tokens)] = float(max(values) - min(values))
    if not spread:
        return None
    worst, last = max(spread, key=spread.get), max(spread)
    return spread[worst], worst, spread[last], last


def table(frame) -> str:
    """The arms: time to the losses that all reached, over the slowest arm's; throughput, tokens and loss at the end."""
    found, losses, units = curves(frame), common_losses(frame), records.units(frame)
    baseline = NAIVE if NAIVE in found else next(iter(found), None)
    lines = []
    for arm in [arm for arm in ARMS if (frame.arm == arm).any()]:
        rows = frame[frame.arm == arm]
        first = rows.iloc[0]
        line: dict[str, Any] = {"arm": label(arm, int(first.gpus), units)}
        bad = rows[rows.status != "ok"]
        if arm not in found:
            lines.append(line | {"end": f"{bad.status.iloc[0]}: {bad.note.iloc[0]}" if len(bad) else "no evaluation"})
            continue
        for index, loss in enumerate(losses):
            line[f"loss{index}"] = records.significant(reaching(found[arm], loss)[0])
        ratio = reaching(found[baseline], losses[-1])[0] / reaching(found[arm], losses[-1])[0]
        last = rows[rows.status == "ok"].iloc[-1]
        line |= {
            "ratio": f"{ratio:.2f}",
            "rate": f"{rows.tokens_per_s.median():,.0f}",
            "end": f"{found[arm].valid_loss.iloc[-1]:.4f} after {_tokens(last.tokens)} tokens, {last.seconds:,.3g} s",
        }
        if len(bad):
            line["end"] += f"; then {bad.status.iloc[0]}: {bad.note.iloc[0]}"
        lines.append(line)
    columns = {"arm": "arm"} | {f"loss{index}": f"s to {loss:.3f}" for index, loss in enumerate(losses)}
    columns |= {"ratio": "times as fast to the last", "rate": "tokens/s", "end": "validation loss, nats a token"}
    return records.markdown_table(lines, columns)


def conclusions(frame) -> list[str]:
    """What the race shows."""
    found, units = curves(frame), records.units(frame)
    names = {arm: label(arm, int(curve.gpus.iloc[0]), units) for arm, curve in found.items()}
    said = []
    if OURS in found:
        curve = found[OURS]
        first, last = curve.iloc[0], curve.iloc[-1]
        late = curve[curve.tokens >= 0.8 * last.tokens].valid_loss
        said.append(
            f"A model of {int(last.parameters):,} parameters read {_tokens(last.tokens)} tokens in {last.seconds:,.3g} s of training, "
            f"{last.elapsed_s:,.3g} s with compilation and evaluations, on one {units[0]}: its validation loss went from {first.valid_loss:.3f} at step "
            f"{int(first.step)} to {last.valid_loss:.4f} nats a token"
            + (
                f", and moved by {late.max() - late.min():.4f} over the last fifth of its tokens."
                if len(late) > 1
                else "."
            )
        )
    if NAIVE in found and len(found) > 1:
        loss = common_losses(frame)[-1]
        seconds = {arm: reaching(curve, loss)[0] for arm, curve in found.items()}
        others = [
            f"{names[arm]} in {seconds[arm]:,.3g} s, {seconds[NAIVE] / seconds[arm]:.2f} times as fast"
            for arm in found
            if arm != NAIVE
        ]
        said.append(
            f"To a validation loss of {loss:.4f}, the lowest that every arm reached: {names[NAIVE]} in {seconds[NAIVE]:,.3g} s; "
            f"{'; '.join(others)}."
        )
    for arm in found:
        last = frame[(frame.arm == arm) & (frame.status == "ok")].iloc[-1]
        if last.step < last.planned_steps:
            said.append(
                f"{names[arm]} ended at step {int(last.step):,} of {int(last.planned_steps):,}, after {last.seconds:,.3g} s."
            )
    difference = loss_difference(frame)
    if difference is not None:
        worst, at, end, end_at = difference
        said.append(
            f"At the same tokens the arms' validation losses differ by {worst:.2g} at most, at {_tokens(at)} tokens, and by {end:.2g} at the last "
            f"evaluation that arms share, at {_tokens(end_at)}."
        )
    for row in frame[frame.status != "ok"].itertuples():
        said.append(f"{label(row.arm, int(row.gpus), units)}: {row.status}, {row.note}.")
    return said


def _tokens(count: float) -> str:
    return f"{count / 1e6:,.3g} million" if count >= 1e6 else f"{count:,.0f}"


def write_report(frame, folder: str | Path) -> dict[str, Path]:
    """Write race_loss.png and race_report.md to folder; return their paths by their short names."""
    from lmsys import plots

    folder, units = Path(folder), records.units(frame)
    named = {arm: label(arm, int(curve.gpus.iloc[0]), units) for arm, curve in curves(frame).items()}
    written = {}
    if named:
        shown = frame[(frame.status == "ok") & frame.valid_loss.notna()]
        shown = shown.assign(name=shown.arm.map(named))
        written["loss"] = plots.save(plots.race(shown, common_losses(frame)[-1]), folder / "race_loss.png")
    text = ["# A race to the same loss", "", f"Measured on {frame.device.iloc[0]}.", ""]
    text += [f"- {sentence}" for sentence in conclusions(frame)]
    written["report"] = records.write_text(folder / "race_report.md", "\n".join([*text, "", table(frame)]))
    return written
