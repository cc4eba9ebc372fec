"""From text to stories in a given time: the best validation loss that some minutes of training reach.

The run is the pipeline of lmsys.pipeline. Its warm-up is trained first and shows how long a step takes on this machine;
the number of steps is then planned so that the cosine schedule ends as the minutes do, and the run goes on from the
warm-up's checkpoint. Interrupted, it continues to the same plan. The minutes are those of training, with compilation,
evaluations and checkpoints, without tokenizing.

Limits: a machine that slows down during the run takes longer than planned (the row says how long). The last step of the
warm-up, where its own schedule ends, has the smallest learning rate. The presets' learning rates are the usual ones for
their sizes, not tuned.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmsys import config as cfg
from lmsys import cost, pipeline, records
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameters, Point, require_names, require_numbers
from lmsys.config import PipelineConfig, require, with_train
from lmsys.train.log import COLUMNS

_MARGIN = 0.97  # of the minutes: evaluations, samples and checkpoints on the way

# Preset -> the pipeline's settings by section. t4 keeps to what a GPU of 16 GB and compute capability 7.5 can do: fp16
# with a gradient scaler in place of bf16, nothing that Triton compiles (it wants 8.0), and about 9 GB by the shapes:
# 0.6 of state, 2.3 of logits, 6 of activations.
PRESETS: dict[str, dict[str, Any]] = cfg.read_json(Path(cfg.__file__).with_name("configs") / "speedrun_presets.json")


def check(p: Parameters) -> None:
    """Fill in the preset and the pipeline's config.

    Raises:
        ValueError: an unknown name, both minutes and epochs, or settings that the pipeline does not take.
    """
    p.preset = p.preset or (p.scale if p.scale != "full" else preset_here())
    require_names(p, {"preset": PRESETS})
    require_numbers(p, {"processes": 1})
    given = p.is_given("minutes")
    require(not given or p.epochs is None, f"give minutes ({p.minutes}) or epochs ({p.epochs}), not both")
    require(p.minutes > 0, f"minutes is {p.minutes}; it must be positive")
    if p.epochs is not None:
        p.minutes = None
    config_of(p)


NOTEBOOK = Notebook("speedrun_tinystories", check)


def config_of(p: Parameters) -> PipelineConfig:
    """The pipeline's config; with minutes, of the warm-up, from which the rest is planned."""
    sections = PRESETS[p.preset]
    preset = [f"{section}.{k}={json.dumps(v)}" for section in sections for k, v in sections[section].items()]
    flags: dict[str, Any] = {
        "run_dir": p.run_dir or f"runs/speedrun-{p.preset}",
        "data.dataset_mode": "local_text" if p.text_path else None,
        "data.text_path": p.text_path,
        "train.epochs": p.epochs,
    }
    if p.processes is not None and p.processes > 1:
        flags |= {"train.ddp_wrapper": "flashddp", "train.processes": p.processes}
    if p.minutes is not None:
        flags["train.steps"] = 10**9  # not known yet
    base = p.preset if p.preset in ("smoke", "cpu") else "full"
    config = cfg.pipeline_config(base, pipeline.DEFAULT_CONFIG, (*preset, *(p.overrides or ())), flags)
    if p.minutes is None:
        return config
    return with_train(config, steps=max(1, config.optim.warmup_steps))


def preset_here() -> str:
    """The preset of this machine: h200 for a GPU of compute capability 8.0 and 40 GiB or more, else t4; cpu without."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    large = torch.cuda.get_device_properties(0).total_memory >= 40 * 2**30
    return "h200" if large and torch.cuda.get_device_capability() >= (8, 0) else "t4"


class Plan(NamedTuple):
    """How many steps the minutes are."""

    minutes: float
    warmup_steps: int
    warmup_s: float
    step_s: float
    steps: int


def plan(minutes: float, warmup_steps: int, rows: Sequence[dict[str, Any]], *, compiles_again: bool = True) -> Plan:
    """The plan from the rows of the warm-up's metrics, of which the first has the compilation and counts only if alone.

    What the warm-up took beyond its steps comes once more when the run goes on in new processes, which compile again.
    """
    steps = np.diff([0, *(row["step"] for row in rows)])
    tokens_per_step = rows[0]["tokens"] / steps[0]
    seconds = np.repeat([tokens_per_step / row["tokens_per_s"] for row in rows], steps)
    counted = np.sort(seconds[steps[0] :] if len(rows) > 1 else seconds)
    step_s = float(counted[len(counted) // 2])
    elapsed = rows[-1]["elapsed_s"]
    left = _MARGIN * 60 * minutes - elapsed
    if compiles_again:
        left -= max(0.0, elapsed - warmup_steps * step_s)
    return Plan(minutes, warmup_steps, elapsed, step_s, warmup_steps + max(1, int(left / step_s)))


def run(p: Parameters, *, progress: bool = True) -> pipeline.PipelineResult:
    """Train to the plan, which is made first where the run folder has none of these minutes."""
    config = config_of(p)
    if p.minutes is None:
        return pipeline.run(config, progress=progress)
    path = records.output_path(config.run_dir) / "plan.json"
    planned = json.loads(path.read_text(encoding="utf-8")) if path.exists() and config.train.resume else None
    if planned is None or planned["minutes"] != p.minutes:
        warm = pipeline.run(config, progress=progress)
        new_processes = (config.train.processes or 1) > 1
        warmup_steps, rows = config.optim.warmup_steps, warm.history.rows
        planned = plan(p.minutes, warmup_steps, rows, compiles_again=new_processes)._asdict()
        records.write_json(path, planned)
        print(
            f"[plan] a step takes {1e3 * planned['step_s']:.4g} ms: {planned['steps']:,} steps in {p.minutes:g} "
            f"minutes, {planned['warmup_s']:.3g} s of which are gone"
        )
    return pipeline.run(with_train(config, steps=planned["steps"], resume=True), progress=progress)


def measure_point(point: Point, p: Parameters) -> Measured:
    """The run as a row; the rows of its metrics and its last samples as tables."""
    from lmsys.device import device_name, resolve_device

    result = run(p)
    config, rows = result.config, result.history.frame()
    losses = rows.dropna(subset=["valid_loss"])
    best = losses.loc[losses.valid_loss.idxmin()]
    row = {
        "gpus": config.train.processes or 1,
        "steps": int(rows.step.iloc[-1]),
        "tokens": int(rows.tokens.iloc[-1]),
        "train_s": float(rows.elapsed_s.iloc[-1]),
        "tokens_per_s": float(rows.tokens_per_s.median()),
        "mfu": float(rows.mfu.median()) if rows.mfu.notna().any() else None,
        "best_valid_loss": float(best.valid_loss),
        "best_step": int(best.step),
        "valid_loss": float(losses.valid_loss.iloc[-1]),
        "bits_per_byte": result.evaluation.get("bits_per_byte"),
        "parameters": cost.model_parameters(config.model),
        "dtype": config.train.dtype,
        "device": device_name(resolve_device(config.train.device)),
    }
    samples = [sample for sample in result.history.samples if sample["step"] == row["steps"]]
    return Measured([row], {"speedrun_metrics": result.history.rows, "speedrun_samples": samples})


SPEEDRUN = Experiment(
    name="speedrun_results",
    columns=(
        *("preset", "gpus", "minutes", "status", "steps", "tokens", "train_s", "tokens_per_s", "mfu"),
        *("best_valid_loss", "best_step", "valid_loss", "bits_per_byte", "parameters", "dtype", "device", "note"),
    ),
    points=lambda p: [{"preset": p.preset, "minutes": p.minutes}],
    measure=measure_point,
    method=lambda p: {
        "timer": "time.perf_counter around training, with its evaluations, samples and checkpoints",
        "config": cfg.to_dict(config_of(p)),
    },
    tables={"speedrun_metrics": COLUMNS, "speedrun_samples": ("step", "prompt", "text")},
)
