"""The pipeline: text -> tokenizer -> token files -> a trained model -> evaluation -> stories.

The stages before training are in lmsys.data.stages. Training resumes from its newest checkpoint; it runs in this
process, or in several under torchrun, which this one starts and follows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmsys import config as cfg
from lmsys import cost, records
from lmsys.config import PipelineConfig, require
from lmsys.data import RandomTokenDataset, TextFileDataset, load_tokens
from lmsys.data.corpora import choose_mode, input_file
from lmsys.data.stages import Stages, existing, load_tokenizer, prepare
from lmsys.data.tokenizer import Tokenizer
from lmsys.device import device_name, environment, resolve_device
from lmsys.generate import generate_text
from lmsys.parallel import get_wrapper, group
from lmsys.train import CHECKPOINTS, History, check_setup, checkpoint, init_wandb, logged, train
from lmsys.train.engine import autocast
from lmsys.train.engine import evaluate as mean_loss
from lmsys.train.log import COLUMNS

if TYPE_CHECKING:
    import numpy as np

    from lmsys.model import TransformerLM

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "default_pipeline.json"


@dataclass(frozen=True)
class StageReport:
    """What one stage did."""

    name: str
    status: str  # ran or skipped
    seconds: float
    detail: str


@dataclass
class PipelineResult:
    config: PipelineConfig
    run_dir: Path
    history: History
    evaluation: dict[str, Any]
    stories: list[dict[str, str]]
    stages: list[StageReport] = field(default_factory=list)


def settings(
    scale: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] | None = None,
    text_path: str | None = None,
    attention_kernel: str | None = None,
    ddp_wrapper: str | None = None,
    run_dir: str | None = None,
    sharded_optimizer: bool | None = None,
    processes: int | None = None,
) -> PipelineConfig:
    """The config of a pipeline run: preset of the scale < config file < overrides < the other arguments.

    Args:
        config: a JSON file, the package's default_pipeline.json if None.
        text_path: your own text (dataset_mode local_text).
        run_dir: None: the config's. Where that is the preset's, a text of your own has runs/<name of the text> instead,
            so that it does not meet the checkpoints of another text.
    """
    flags = {
        "data.dataset_mode": "local_text" if text_path else None,
        "data.text_path": text_path,
        "train.attention_kernel": attention_kernel,
        "train.ddp_wrapper": ddp_wrapper,
        "train.sharded_optimizer": sharded_optimizer,
        "train.processes": processes,
        "run_dir": run_dir,
    }
    built = cfg.pipeline_config(scale, DEFAULT_CONFIG if config is None else config, overrides or (), flags)
    if run_dir is None and built.data.text_path and built.run_dir == cfg.pipeline_preset(built.scale)["run_dir"]:
        built = dataclasses.replace(built, run_dir=f"runs/{Path(built.data.text_path).stem}")
    return built


def check(config: PipelineConfig, *, skip_data: bool = False) -> None:
    """ValueError or OSError for all that can be known to be wrong before any work: device, wrapper, inputs, folders."""
    require(
        not _under_torchrun(),
        "the pipeline starts its processes itself: run it without torchrun, with train.ddp_wrapper and "
        "train.processes; what torchrun can start is `train`",
    )
    check_setup(config, _processes(config))
    mode = config.data.dataset_mode if skip_data else choose_mode(config.data)[0]
    size, vocabulary = config.model.vocab_size, config.tokenizer
    if vocabulary.path is not None:
        input_file(vocabulary.path, "tokenizer.path")
    elif mode == "local_npy":
        missing = "dataset_mode 'local_npy' needs tokenizer.path (the tokenizer of the token files) or model.vocab_size"
        require(size is not None, missing)
    elif not skip_data:
        below = f"model.vocab_size {size} is below tokenizer.vocab_size {vocabulary.vocab_size}"
        require(size is None or size >= vocabulary.vocab_size, f"{below}: raise it, or leave it out")
    records.writable_dir(records.output_path(config.run_dir))


def run(
    config: PipelineConfig, *, skip_data: bool = False, progress: bool = True, say: Callable[[str], None] = print
) -> PipelineResult:
    """Run the pipeline of a config. ValueError or OSError for bad input comes before anything is run or lost.

    Args:
        skip_data: take the tokenizer and token files that the run folder holds, whatever settings they came from.
        progress: show progress bars. say: where each stage reports its line.
    """
    check(config, skip_data=skip_data)
    run_dir = records.output_path(config.run_dir)
    reports: list[StageReport] = []

    def report(name: str, status: str, start: float, detail: str) -> None:
        reports.append(StageReport(name, status, time.perf_counter() - start, detail))
        say(f"[{name}] {'skipped: ' if status == 'skipped' else ''}{detail}")

    resumes = config.train.resume and any((run_dir / CHECKPOINTS).glob("step-*"))
    stages = Stages(run_dir, report, frozen=resumes)
    prepared = existing(run_dir, report) if skip_data else prepare(config, run_dir, stages, progress)
    tokenizer, train_tokens, valid_tokens, bytes_per_token = prepared
    config = _with_vocabulary(config, tokenizer)

    start = time.perf_counter()
    wandb_run = init_wandb(config, run_dir)
    inputs = {"train_tokens": train_tokens, "valid_tokens": valid_tokens, "tokenizer": tokenizer}
    inputs |= {"run_dir": run_dir, "wandb_run": wandb_run}
    processes = _processes(config)
    try:
        if processes == 1:
            history = train(config, progress=progress, **inputs)
        else:
            history = _train_in_processes(config, processes, say=say if progress else None, **inputs)
        (step, tokens), resumed_from = (history.rows[-1][name] for name in ("step", "tokens")), history.resumed_from
        detail = f"{cost.model_parameters(config.model):,} parameters, step {step}, {tokens:,} tokens"
        detail += f", in {processes} processes" if processes > 1 else ""
        finished = resumed_from is not None and resumed_from >= step
        if finished:
            detail += "; the run was finished already"
        elif resumed_from is not None:
            detail += f", resumed from step {resumed_from}"
        report("training", "skipped" if finished else "ran", start, detail)

        start = time.perf_counter()
        model = load_model(history.checkpoint, config.train.device, config.train.attention_kernel)
        evaluation = evaluate(config, model, valid_tokens, bytes_per_token)
        detail = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in evaluation.items())
        report("evaluation", "ran", start, detail)

        start = time.perf_counter()
        with autocast(resolve_device(config.train.device), config.train.dtype):  # as it was trained
            stories = [
                {"prompt": prompt, "text": generate_text(model, tokenizer, prompt, config.generate)}
                for prompt in (config.generate.prompts if tokenizer else ())
            ]
        records.write_json(run_dir / "stories.json", stories)
        detail = f"{len(stories)} stories" if tokenizer else "no tokenizer given (tokenizer.path): no stories"
        report("generation", "ran" if stories else "skipped", start, detail)
        if wandb_run is not None:
            wandb_run.summary.update(evaluation)
    finally:
        if wandb_run is not None:
            wandb_run.finish()
    return PipelineResult(config, run_dir, history, evaluation, stories, reports)


def evaluate(config: PipelineConfig, model, valid_tokens, bytes_per_token: float | None) -> dict[str, float]:
    """Validation loss in nats a token over up to 100 batches, its perplexity, bits per byte where the text is known."""
    batches = {"batch_size": config.train.batch_size, "max_batches": max(100, config.train.eval_batches)}
    loss = mean_loss(model, valid_tokens, dtype=config.train.dtype, **batches)
    result = {"valid_loss": loss, "perplexity": math.exp(loss)}
    return result | ({"bits_per_byte": loss / math.log(2) / bytes_per_token} if bytes_per_token else {})


# --- Training in several processes ----------------------------------------------------------------


def _under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _processes(config: PipelineConfig) -> int:
    """How many processes train: train.processes, else one for each GPU where the wrapper is for several."""
    wrapper, count = config.train.ddp_wrapper, config.train.processes
    needs_several = get_wrapper(wrapper).many_processes
    gpus = torch.cuda.device_count() if resolve_device(config.train.device).type == "cuda" else 0
    if count is None:
        count = max(1, gpus) if needs_several else 1
    require(
        count > 1 or not needs_several,
        f"ddp_wrapper '{wrapper}' needs more than one process, and this run has 1 on a machine with {gpus} GPU(s) "
        "to use; give train.processes (--processes), also on a CPU with train.device=cpu, or ddp_wrapper none",
    )
    too_many = f"train.processes is {count} and this machine has {gpus} GPU(s), one for each process"
    require(count == 1 or gpus == 0 or count <= gpus, f"{too_many}; give at most {gpus}, or train.device=cpu")
    return count


def _train_in_processes(
    config: PipelineConfig,
    processes: int,
    *,
    train_tokens: np.ndarray,
    valid_tokens: np.ndarray,
    tokenizer: Tokenizer | None,
    run_dir: Path,
    wandb_run: Any,
    say: Callable[[str], None] | None,
) -> History:
    """Run `train` under torchrun, passing on its lines to say and its rows to wandb; ChildProcessError: one failed."""
    resumed = checkpoint.latest(run_dir / CHECKPOINTS) if config.train.resume else None
    resumed_from = None if resumed is None else checkpoint.step_of(resumed)
    given = records.writable_dir(run_dir / "training")  # what its processes are given
    settings = cfg.to_dict(config)
    settings["data"] |= {"dataset_mode": "local_npy", "text_path": None, "valid_text_path": None}
    files = {"train_tokens_path": train_tokens, "valid_tokens_path": valid_tokens}
    settings["data"] |= {name: str(tokens.filename) for name, tokens in files.items()}
    settings["tokenizer"]["path"] = tokenizer and str(tokenizer.save(given / "tokenizer.json"))
    records.write_json(given / "config.json", settings)
    arguments = ["train", "--config", str(given / "config.json"), *(["--resume"] if config.train.resume else [])]

    last = resumed_from or 0  # step that wandb has

    def on_line(line: str) -> None:
        nonlocal last
        if say is not None:
            say(line)
        # Before the first step's line, the file may be an earlier run's.
        for row in logged(run_dir)[0] if wandb_run is not None and line.startswith("step ") else ():
            if row["step"] > last:
                wandb_run.log({name: value for name, value in row.items() if value is not None}, step=row["step"])
                last = row["step"]

    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    try:
        group.launch(arguments, processes, on_line=on_line, environment=environment)
    except group.RankError as error:
        message = str(error)
        if error.signal is not None:
            kept = checkpoint.latest(run_dir / CHECKPOINTS)
            message += f" (run it again to go on from {kept})" if kept else " (no checkpoint was saved)"
        raise ChildProcessError(message) from None
    return History(*logged(run_dir), checkpoint.latest(run_dir / CHECKPOINTS), resumed_from)


# --- The parts by themselves ----------------------------------------------------------------------


def _with_vocabulary(config: PipelineConfig, tokenizer: Tokenizer | None) -> PipelineConfig:
    """The config with model.vocab_size set: the tokenizer's, unless a larger one is asked for."""
    if tokenizer is None:
        return config
    size = config.model.vocab_size or tokenizer.vocab_size
    message = f"model.vocab_size {size} is below the tokenizer's {tokenizer.vocab_size}: raise it, or leave it out"
    require(size >= tokenizer.vocab_size, message)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def train_alone(
    size: str | None = None,
    *,
    context_length: int | None = None,
    vocab_size: int | None = None,
    text: str | None = None,
    tokenizer_path: str | None = None,
    num_tokens: int = 1_000_000,
    resume: bool = False,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    flags: dict[str, Any] | None = None,
    progress: bool = True,
) -> History:
    """Train on token files, on random tokens, or on a text file, without the pipeline's stages; also under torchrun.

    Args:
        size: see config.MODEL_SIZES; None: the file's model, else small.
        context_length, vocab_size: None: the file's, else 512 and the size's own, or the tokenizer's for a text.
        text: a UTF-8 file; None for the config's token files if it has them, else num_tokens random tokens.
        tokenizer_path: of the text or the token files; without it a tokenizer is trained on the text.
        resume: continue the newest checkpoint of the run folder.
        file, overrides, flags: as for config.pipeline_config; without steps or epochs in any, one epoch.
    """
    flags = {key: value for key, value in (flags or {}).items() if value is not None}
    flags |= {"train.resume": resume, "tokenizer.path": tokenizer_path}
    config = _alone_settings(size, context_length, vocab_size, file, overrides, flags)
    run_dir = records.writable_dir(records.output_path(config.run_dir))
    if text is None:
        data = _given_tokens(config, num_tokens)
    else:
        data = _tokens_of_text(config, text, run_dir, fixed_vocabulary=vocab_size is not None, progress=progress)
    config, train_tokens, valid_tokens, tokenizer = data
    with group.process_group(config.train.device) if _under_torchrun() else nullcontext():
        inputs = {"train_tokens": train_tokens, "valid_tokens": valid_tokens, "tokenizer": tokenizer}
        return train(config, **inputs, run_dir=run_dir, progress=progress)


def _alone_settings(
    size: str | None, context_length: int | None, vocab_size: int | None, file: str | Path | None, overrides, flags
) -> PipelineConfig:
    """The config of train_alone: its defaults lie under the overrides, and only where the file says nothing."""
    given = {} if file is None else cfg.read_json(file)
    defaults = {} if "run_dir" in given else {"run_dir": f"runs/train-{size or 'small'}"}
    named = [*flags, *(text.partition("=")[0].strip() for text in overrides)]
    named += [f"train.{key}" for key in given.get("train", {})]
    if not {"train.steps", "train.epochs"} & set(named):
        defaults["train.epochs"] = 1.0
    if file is None:
        defaults["optim.warmup_steps"] = 0  # the preset's warm-up may be longer than the run
    if size is not None or "model" not in given:
        shape = cfg.model_size(size or "small", vocab_size=vocab_size, context_length=context_length or 512)
        defaults |= {f"model.{key}": value for key, value in cfg.to_dict(shape).items()}
    else:
        flags |= {"model.context_length": context_length, "model.vocab_size": vocab_size}
    under = [f"{key}={json.dumps(value)}" for key, value in defaults.items()]
    return cfg.pipeline_config(None, file, [*under, *overrides], flags)


# (config, training tokens, validation tokens, tokenizer)
Data = tuple[PipelineConfig, "np.ndarray", "np.ndarray", Tokenizer | None]


def _given_tokens(config: PipelineConfig, num_tokens: int) -> Data:
    """The config's token files and their tokenizer, else random tokens."""
    paths = {f"data.{name}": getattr(config.data, name) for name in ("train_tokens_path", "valid_tokens_path")}
    if not any(paths.values()):
        require(config.model.vocab_size is not None, "random tokens need model.vocab_size")
        tokens = RandomTokenDataset(num_tokens, config.model.vocab_size, seed=config.train.seed).tokens
        return config, *_split(config, tokens), None
    require(all(paths.values()), f"give both {' and '.join(paths)} (--train_tokens, --valid_tokens)")
    tokens = [load_tokens(input_file(path, setting)) for setting, path in paths.items()]
    tokenizer = load_tokenizer(config)
    return _with_vocabulary(config, tokenizer), *tokens, tokenizer


def _tokens_of_text(
    config: PipelineConfig, text: str, run_dir: Path, *, fixed_vocabulary: bool, progress: bool
) -> Data:
    """A text, tokenized by the config's tokenizer, else by one trained on it."""
    require(
        not _under_torchrun(),
        "a text is tokenized once, not by each process under torchrun: give the pipeline the text, which starts its "
        "processes itself, or give --train_tokens and --valid_tokens",
    )
    source = input_file(text, "--text")
    special = config.tokenizer.special_tokens
    tokenizer = load_tokenizer(config) or Tokenizer.train(source, config.model.vocab_size, special, progress=progress)
    tokenizer.save(run_dir / "tokenizer.json")
    if not fixed_vocabulary:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
    return _with_vocabulary(config, tokenizer), *_split(config, TextFileDataset(source, tokenizer).tokens), tokenizer


def _split(config: PipelineConfig, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens, and data.valid_fraction of them held out, at least one context."""
    context_length = config.model.context_length
    held_out = max(context_length + 1, int(len(tokens) * config.data.valid_fraction))
    too_few = f"{len(tokens):,} tokens are too few to train on and to validate with at context_length {context_length}"
    require(len(tokens) >= 2 * held_out, too_few)
    return tokens[:-held_out], tokens[-held_out:]


def load_run(path: str | Path, tokenizer_path: str | Path | None = None, *, device: str = "auto"):
    """(model, tokenizer) of a checkpoint, or of a run folder: its newest good one and, by default, its tokenizer."""
    path = Path(path).expanduser()
    path = path if path.exists() else records.output_path(path)
    require(path.is_dir(), f"no checkpoint or run folder at {path}")
    run_dir = path if (path / CHECKPOINTS).is_dir() else path.parent.parent
    saved = checkpoint.latest(path / CHECKPOINTS) if path == run_dir else path
    require(saved is not None, f"{path} holds no good checkpoint")
    tokenizer_file = Path(tokenizer_path) if tokenizer_path else run_dir / "tokenizer.json"
    require(tokenizer_file.is_file(), f"no tokenizer at {tokenizer_file}: give --tokenizer")
    return load_model(saved, device), Tokenizer.load(tokenizer_file)


def load_model(path: str | Path, device: str = "auto", attention_kernel: str = "vectorized_torch") -> TransformerLM:
    """The model of a checkpoint, on a device, ready to evaluate and to generate."""
    model, _ = checkpoint.load_model(path, attention_kernel=attention_kernel)
    return model.to(resolve_device(device)).eval()


# --- Results --------------------------------------------------------------------------------------


def write_report(result: PipelineResult, folder: str | Path) -> tuple[Path, Any]:
    """Write pipeline_metrics.csv with its stamp and pipeline_loss.png to folder; return the path and the figure."""
    from lmsys import figures  # matplotlib

    device = device_name(resolve_device(result.config.train.device))
    timer = "time.perf_counter around the steps since the row before, synchronized at each row"
    stamp = {"environment": environment(), "method": {"timer": timer, "device": device}}
    path = records.writable_dir(folder) / "pipeline_metrics.csv"
    records.write_results(path, COLUMNS, result.history.rows, stamp | {"parameters": cfg.to_dict(result.config)})
    names = {"train_loss": "training", "valid_loss": "validation", "tokens_per_s": "training speed"}
    rows = result.history.frame().melt("step", list(names), "series").dropna()
    rows["panel"] = rows.series.map(lambda name: "tokens/s" if name == "tokens_per_s" else "loss, nats a token")
    title = f"{result.config.train.attention_kernel} on {device}"
    figure = figures.lines(
        rows.replace({"series": names}), "step", "value", "series", panel="panel", share_y=False, title=title, ylabel=""
    )
    alt = "Training and validation loss, and tokens per second, against the step"
    return path, figures.save(figure, Path(folder) / "pipeline_loss.png", alt)
