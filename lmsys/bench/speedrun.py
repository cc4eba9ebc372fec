"""From text to stories in a given time: the best validation loss that some minutes of training reach.

The run is the pipeline of lmsys.pipeline. Its warm-up is trained first and shows how long a step takes on this machine; the number of
steps is then planned so that the cosine schedule ends as the minutes do, and the run goes on from the warm-up's checkpoint. Interrupted,
it continues to the same plan. The minutes are those of training, with compilation, evaluations and checkpoints, without tokenizing.

Limits: a machine that slows down during the run takes longer than planned (the row says how long). The last step of the warm-up, where its
own schedule ends, has the smallest learning rate. The presets' learning rates are the usual ones for their sizes, not tuned.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmsys import config as cfg
from lmsys import cost, pipeline, records
from lmsys.config import PipelineConfig, require, resolve_scale, unknown_name

NAME, METRICS = "speedrun_results", "speedrun_metrics"
EXTRA_COLUMNS = ("parameters", "dtype", "device")
_MARGIN = 0.97  # of the minutes: evaluations, samples and checkpoints on the way

# Preset -> the pipeline's settings. t4 keeps to what a GPU of 16 GB and compute capability 7.5 can do: fp16 with a gradient scaler in
# place of bf16, nothing that Triton compiles (it wants 8.0), and about 9 GB by the shapes: 0.6 of state, 2.3 of logits, 6 of activations.
PRESETS: dict[str, dict[str, Any]] = {
    "h200": {
        "data": {"text_mb": None},
        "tokenizer": {"vocab_size": 10_000},
        "model": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "context_length": 512},
        "optim": {"learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_steps": 200},
        "train": {
            "batch_size": 128,
            "dtype": "bf16",
            "compile": True,
            "fused_loss": True,
            "fused_rope": True,
            "fused_optimizer": True,
            "attention_kernel": "flash_attention_triton",
            "eval_interval": 500,
            "eval_batches": 10,
            "sample_interval": 2000,
            "checkpointing_interval": 2000,
        },
    },
    "t4": {
        "data": {"text_mb": None},
        "tokenizer": {"vocab_size": 10_000},
        "model": {"d_model": 512, "d_ff": 1344, "num_layers": 8, "num_heads": 8, "context_length": 256},
        "optim": {"learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_steps": 100},
        "train": {
            "batch_size": 64,
            "dtype": "fp16",
            "compile": False,
            "attention_kernel": "vectorized_torch",
            "eval_interval": 250,
            "eval_batches": 10,
            "sample_interval": 1000,
            "checkpointing_interval": 500,
        },
    },
    "cpu": {
        "data": {"dataset_mode": "stories", "text_mb": 1.0},
        "tokenizer": {"vocab_size": 512},
        "model": {"d_model": 64, "d_ff": 192, "num_layers": 2, "num_heads": 2, "context_length": 64},
        "optim": {"learning_rate": 5e-3, "min_learning_rate": 1e-4, "warmup_steps": 20},
        "train": {
            "batch_size": 8,
            "dtype": "fp32",
            "compile": False,
            "attention_kernel": "vectorized_torch",
            "eval_interval": 50,
            "eval_batches": 4,
            "sample_interval": 0,
            "log_interval": 5,
            "checkpointing_interval": 0,
        },
        "generate": {"max_new_tokens": 80, "temperature": 0.6},
    },
    "smoke": {
        "data": {"dataset_mode": "stories", "text_mb": 0.1},
        "tokenizer": {"vocab_size": 300},
        "model": {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "context_length": 32},
        "optim": {"learning_rate": 5e-3, "min_learning_rate": 1e-4, "warmup_steps": 5},
        "train": {
            "batch_size": 4,
            "dtype": "fp16",
            "compile": False,
            "attention_kernel": "vectorized_torch",
            "eval_interval": 10,
            "eval_batches": 2,
            "sample_interval": 0,
            "log_interval": 1,
            "checkpointing_interval": 0,
        },
        "generate": {"max_new_tokens": 16},
    },
}
_MINUTES = {"smoke": 0.01, "cpu": 0.05, "full": 20.0}


@dataclass(frozen=True)
class Speedrun:
    """What is run; make it with settings(). minutes None: as many steps as epochs are, in whatever time."""

    scale: str
    preset: str
    minutes: float | None
    epochs: float | None
    config: PipelineConfig


def settings(
    scale: str = "auto",
    preset: str | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    processes: int | None = None,
    text_path: str | None = None,
    overrides: Sequence[str] | None = None,
    run_dir: str | None = None,
) -> Speedrun:
    """The settings of a run.

    Args:
        preset: of PRESETS; None: smoke and cpu at those scales, else by the GPU.
        minutes: of training (full scale: 20). epochs: passes over the text instead, a full pretraining run.
        processes: that train together, one a GPU. text_path: your own text. overrides: 'section.key=value' each.
    Raises:
        ValueError: an unknown name, both minutes and epochs, or settings that the pipeline does not take.
    """
    scale = resolve_scale(scale)
    preset = preset or (scale if scale != "full" else preset_here())
    if preset not in PRESETS:
        raise unknown_name("preset", preset, PRESETS)
    require(minutes is None or epochs is None, f"give minutes ({minutes}) or epochs ({epochs}), not both")
    require(minutes is None or minutes > 0, f"minutes is {minutes}; it must be positive")
    require(processes is None or processes >= 1, f"processes is {processes}; it must be at least 1")
    if minutes is None and epochs is None:
        minutes = _MINUTES[scale]
    layers = PRESETS[preset]
    given = [
        f"{section}.{key}={json.dumps(value)}" for section, values in layers.items() for key, value in values.items()
    ]
    flags: dict[str, Any] = {
        "run_dir": run_dir or f"runs/speedrun-{preset}",
        "data.dataset_mode": "local_text" if text_path else None,
        "data.text_path": text_path,
        "train.epochs": epochs,
    }
    if processes is not None and processes > 1:
        flags |= {"train.ddp_wrapper": "flashddp", "train.processes": processes}
    if minutes is not None:
        flags["train.steps"] = 10**9  # not known yet
    base = preset if preset in ("smoke", "cpu") else "full"
    config = cfg.pipeline_config(base, pipeline.DEFAULT_CONFIG, (*given, *(overrides or ())), flags)
    if minutes is not None:  # the warm-up; the rest is planned from it
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, steps=max(1, config.optim.warmup_steps))
        )
    return Speedrun(scale, preset, minutes, epochs, config)


def preset_here() -> str:
    """The preset for this machine's GPU: h200 from compute capability 8.0 and 40 GiB on, else t4; cpu where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    large = torch.cuda.get_device_properties(0).total_memory >= 40 * 2**30
    return "h200" if large and torch.cuda.get_device_capability() >= (8, 0) else "t4"


def presets_table(names: Sequence[str] = ("h200", "t4")) -> str:
    """The presets side by side."""
    keys = dict.fromkeys(
        (section, key) for name in names for section in PRESETS[name] for key in PRESETS[name][section]
    )
    lines = [
        {"setting": f"{section}.{key}"} | {name: f"`{PRESETS[name].get(section, {}).get(key)}`" for name in names}
        for section, key in keys
    ]
    return records.markdown_table(lines)


@dataclass(frozen=True)
class Plan:
    """How many steps the minutes are."""

    minutes: float
    warmup_steps: int
    warmup_s: float
    step_s: float
    steps: int


def plan(minutes: float, warmup_steps: int, rows: Sequence[dict[str, Any]], *, compiles_again: bool = True) -> Plan:
    """The plan from the rows of the warm-up's metrics.

    The first row, which has the compilation, does not count for a step's time where there are more. What the warm-up took beyond its
    steps comes once more when the run goes on in new processes, which compile again; this one keeps what it compiled.
    """
    seconds = []
    steps = [0, *(row["step"] for row in rows)]
    tokens_per_step = rows[0]["tokens"] / rows[0]["step"]
    for row, first, last in zip(rows, steps[:-1], steps[1:], strict=True):
        seconds += [tokens_per_step / row["tokens_per_s"]] * (last - first)
    counted = seconds[rows[0]["step"] :] or seconds
    step_s = sorted(counted)[len(counted) // 2]
    elapsed = rows[-1]["elapsed_s"]
    left = _MARGIN * 60 * minutes - elapsed
    if compiles_again:
        left -= max(0.0, elapsed - warmup_steps * step_s)
    return Plan(minutes, warmup_steps, elapsed, step_s, warmup_steps + max(1, int(left / step_s)))


def run(chosen: Speedrun, *, progress: bool = True) -> pipeline.PipelineResult:
    """Train to the plan, which is made first where the run folder has none of these minutes."""
    config = chosen.config
    if chosen.minutes is None:
        return pipeline.run(config, progress=progress)
    path = records.output_path(config.run_dir) / "plan.json"
    planned = json.loads(path.read_text(encoding="utf-8")) if path.exists() and config.train.resume else None
    if planned is None or planned["minutes"] != chosen.minutes:
        warm = pipeline.run(config, progress=progress)
        new_processes = (config.train.processes or 1) > 1
        made = plan(chosen.minutes, config.optim.warmup_steps, warm.history.rows, compiles_again=new_processes)
        planned = dataclasses.asdict(made)
        records.write_json(path, planned)
        print(
            f"[plan] a step takes {1e3 * planned['step_s']:.4g} ms: {planned['steps']:,} steps in {chosen.minutes:g} minutes, "
            f"{planned['warmup_s']:.3g} s of which are gone"
        )
    train = dataclasses.replace(config.train, steps=planned["steps"], resume=True)
    return pipeline.run(dataclasses.replace(config, train=train), progress=progress)


def write_results(chosen: Speedrun, result: pipeline.PipelineResult, folder: str | Path):
    """Write speedrun_results.csv, a row, and speedrun_metrics.csv; return the row as a DataFrame."""
    from lmsys.device import device_name, resolve_device

    config = result.config
    stamp = {
        "method": {"timer": "time.perf_counter around training, with its evaluations, samples and checkpoints"},
        "parameters": cfg.to_dict(config)
        | {"preset": chosen.preset, "minutes": chosen.minutes, "epochs": chosen.epochs},
    }
    rows = result.history.frame()
    losses = rows.dropna(subset=["valid_loss"])
    best = losses.loc[losses.valid_loss.idxmin()]
    speed = rows.tokens_per_s.median()
    row = {
        "preset": chosen.preset,
        "gpus": config.train.processes or 1,
        "minutes": chosen.minutes,
        "status": "ok",
        "steps": int(rows.step.iloc[-1]),
        "tokens": int(rows.tokens.iloc[-1]),
        "train_s": float(rows.elapsed_s.iloc[-1]),
        "tokens_per_s": float(speed),
        "mfu": float(rows.mfu.median()) if rows.mfu.notna().any() else None,
        "best_valid_loss": float(best.valid_loss),
        "best_step": int(best.step),
        "valid_loss": float(losses.valid_loss.iloc[-1]),
        "bits_per_byte": result.evaluation.get("bits_per_byte"),
        "parameters": cost.model_parameters(config.model),
        "dtype": config.train.dtype,
        "device": device_name(resolve_device(config.train.device)),
    }
    with records.ResultWriter(METRICS, folder, **stamp) as writer:
        for each in result.history.rows:
            writer.write(each)
    with records.ResultWriter(NAME, folder, **stamp, extra_columns=EXTRA_COLUMNS) as writer:
        writer.write(row)
    return records.read_results(writer.path)


def conclusions(frame) -> list[str]:
    """What the run shows."""
    row = frame.iloc[0]
    given = "" if frame.minutes.isna().all() else f" of the {row.minutes:g} minutes given"
    sentences = [
        f"A model of {int(row.parameters):,} parameters ({row['dtype']}) reached a validation loss of {row.best_valid_loss:.3f} nats a token at "
        f"step {int(row.best_step):,} of {int(row.steps):,}, in {row.train_s / 60:.3g} minutes{given}, on {int(row.gpus)} x {row.device}.",
        f"It read {int(row.tokens):,} tokens at a median of {row.tokens_per_s:,.0f} tokens/s"
        + ("." if frame.mfu.isna().all() else f", {100 * row.mfu:.1f}% MFU."),
    ]
    if frame.bits_per_byte.notna().all():
        sentences.append(f"On held-out text that is {row.bits_per_byte:.3f} bits a byte at the end.")
    return sentences


def write_report(frame, result: pipeline.PipelineResult, folder: str | Path) -> dict[str, Path]:
    """speedrun_loss.png and speedrun_report.md."""
    from lmsys import plots

    figure = plots.loss_curve(result.history.frame(), f"{frame.preset.iloc[0]} preset on {frame.device.iloc[0]}")
    written = {"loss": plots.save(figure, Path(folder) / "speedrun_loss.png")}
    text = ["# A timed pretraining run", "", *(f"- {sentence}" for sentence in conclusions(frame)), ""]
    text += [pipeline.stages_table(result), "## Samples", "", pipeline.samples_page(result)]
    return written | {"report": records.write_text(Path(folder) / "speedrun_report.md", "\n".join(text))}
