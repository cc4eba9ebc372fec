import json

import pytest
import torch

from lmsys import records
from lmsys.bench import experiment, speedrun
from lmsys.records import output_path


def parameters(scale, **given):
    return speedrun.NOTEBOOK.parameters({"scale": scale} | given)


def rows(*given):
    """(step, tokens a second, elapsed) with 100 tokens a step."""
    return [{"step": s, "tokens": 100 * s, "tokens_per_s": rate, "elapsed_s": t} for s, rate, t in given]


def test_the_plan_fills_the_minutes():
    """A step of 0.1 s after a first row that compiled.

    The warm-up's 20 steps took 7.01 s, 5.01 s too many, which come again: 46.18 s are left.
    """
    made = speedrun.plan(1.0, 20, rows((10, 20.0, 5.0), (15, 1000.0, 5.6), (20, 1000.0, 7.01)))
    assert (made.step_s, made.warmup_s) == (pytest.approx(0.1), 7.01)
    assert made.steps == 20 + 461
    kept = speedrun.plan(1.0, 20, rows((10, 20.0, 5.0), (15, 1000.0, 5.6), (20, 1000.0, 7.01)), compiles_again=False)
    assert kept.steps == 20 + 511  # the same process goes on, with what it compiled
    assert speedrun.plan(1.0, 20, rows((20, 1000.0, 2.0))).step_s == pytest.approx(0.1)  # one row must do
    assert speedrun.plan(0.05, 20, rows((20, 1000.0, 9.0))).steps == 21  # too late already


@pytest.mark.parametrize("preset", speedrun.PRESETS)
def test_presets_are_configs(preset):
    p = parameters("full", preset=preset, minutes=1, processes=2 if preset == "h200" else None)
    config = speedrun.config_of(p)
    assert config.train.steps == config.optim.warmup_steps == speedrun.PRESETS[preset]["optim"]["warmup_steps"]
    assert config.run_dir == f"runs/speedrun-{preset}"
    assert config.train.ddp_wrapper == ("flashddp" if preset == "h200" else "none")
    for section, values in speedrun.PRESETS[preset].items():
        assert {key: getattr(getattr(config, section), key) for key in values} == values


def test_t4_needs_neither_bf16_nor_triton():
    train = speedrun.config_of(parameters("full", preset="t4")).train
    assert (train.dtype, train.compile) == ("fp16", False) and "triton" not in train.attention_kernel


def test_the_preset_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speedrun.preset_here() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for memory, capability, preset in (
        (15, (7, 5), "t4"),
        (140, (9, 0), "h200"),
        (24, (8, 6), "t4"),
        (48, (7, 5), "t4"),
    ):
        properties = type("Properties", (), {"total_memory": memory * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert speedrun.preset_here() == preset


def test_a_run_follows_its_plan_and_goes_on_to_it(tmp_path):
    p = parameters("smoke", minutes=0.003, overrides=["wandb.mode=disabled"])
    result = speedrun.run(p, progress=False)
    config = speedrun.config_of(p)
    planned = json.loads((output_path(config.run_dir) / "plan.json").read_text())
    last = result.history.rows[-1]
    assert last["step"] == planned["steps"] > planned["warmup_steps"] == 5
    assert last["learning_rate"] == config.optim.min_learning_rate
    assert [row["step"] for row in result.history.rows] == list(range(1, planned["steps"] + 1))
    again = speedrun.run(p, progress=False)  # nothing to plan, nothing to train
    assert again.history.rows == result.history.rows

    row = experiment.run(speedrun.SPEEDRUN, p, folder=tmp_path).iloc[0]
    losses = [each["valid_loss"] for each in result.history.rows if each["valid_loss"] is not None]
    assert row.best_valid_loss == pytest.approx(min(losses), rel=1e-5) and row.steps == planned["steps"]
    assert (row.status, row["dtype"], row.minutes) == ("ok", "fp16", 0.003)
    assert len(records.read_results(tmp_path / "speedrun_metrics.csv")) == planned["steps"]
    assert records.read_results(tmp_path / "speedrun_samples.csv").step.unique() == [planned["steps"]]


def test_the_warm_up_is_the_one_asked_for():
    config = speedrun.config_of(parameters("smoke", overrides=["optim.warmup_steps=70"]))
    assert config.optim.warmup_steps == config.train.steps == 70


def test_epochs_in_place_of_minutes():
    p = parameters("smoke", epochs=0.5)
    train = speedrun.config_of(p).train
    assert p.minutes is None and (train.epochs, train.steps) == (0.5, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "h20"}, "unknown preset 'h20'. Did you mean 'h200'"),
        ({"minutes": 0}, "minutes is 0.0; it must be positive"),
        ({"minutes": 1, "epochs": 1}, "not both"),
        ({"processes": 0}, "processes is 0; it must be 1 or more"),
        ({"overrides": ["train.dtpe=fp16"]}, "unknown key 'train.dtpe'"),
    ],
)
def test_bad_input_is_one_clear_error(given, message):
    with pytest.raises(ValueError, match=message):
        parameters("smoke", **given)
