import dataclasses
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from lmsys import pipeline
from lmsys.config import PipelineConfig, build, to_dict
from lmsys.records import read_results
from lmsys.train import checkpoint
from lmsys.train.log import COLUMNS

TINY = [
    "train.steps=4",
    "train.eval_interval=2",
    "train.sample_interval=2",
    "train.checkpointing_interval=2",
    "data.text_mb=0.05",
]


def run(*overrides, **arguments):
    lines = []
    config = pipeline.settings("smoke", overrides=[*TINY, *overrides])
    return pipeline.run(config, progress=False, say=lines.append, **arguments), lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one finished run, to be copied by tests that go on from it."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("finished")
        patch.setenv("LMSYS_OUTPUT", str(root))
        patch.setenv("WANDB_MODE", "offline")
        result, lines = run()
    return root, result, lines


@pytest.fixture
def again(finished, output_root):
    """A copy of the finished run in this test's own output root, its files as old as they were."""
    shutil.copytree(finished[0], output_root, copy_function=shutil.copy2, symlinks=True)
    return output_root / "runs/pipeline-smoke"


def test_text_to_stories(finished):
    root, result, lines = finished
    folder = root / "runs" / "pipeline-smoke"
    assert [stage.name for stage in result.stages] == [
        "data",
        "tokenizer",
        "tokens",
        "training",
        "evaluation",
        "generation",
    ]
    assert all(stage.status == "ran" for stage in result.stages)
    assert lines[0].startswith("[data] stories: dataset_mode is 'stories'")
    assert result.config.model.vocab_size == 400
    assert [row["step"] for row in result.history.rows] == [1, 2, 3, 4]
    assert {sample["step"] for sample in result.history.samples} == {2, 4}
    assert result.evaluation["perplexity"] == pytest.approx(np.exp(result.evaluation["valid_loss"]))
    bytes_per_token = (folder / "valid.txt").stat().st_size / len(np.load(folder / "valid.npy"))
    bits = result.evaluation["valid_loss"] / np.log(2) / bytes_per_token
    assert result.evaluation["bits_per_byte"] == pytest.approx(bits)
    assert [story["prompt"] for story in result.stories] == list(result.config.generate.prompts)
    assert json.loads((folder / "stories.json").read_text()) == result.stories
    if importlib.util.find_spec("wandb"):
        assert any((folder / "wandb").iterdir()), "wandb is a required part of a pipeline run"


def test_report_and_metrics_presence(finished, tmp_path):
    result = finished[1]
    metrics, _ = pipeline.write_report(result, tmp_path)
    assert metrics.name == "pipeline_metrics.csv" and (tmp_path / "pipeline_loss.png").exists()
    frame = read_results(tmp_path / "pipeline_metrics.csv")
    assert tuple(frame.columns) == COLUMNS and len(frame) == 4
    stamp = json.loads((tmp_path / "pipeline_metrics.json").read_text())
    assert stamp["parameters"]["train"]["steps"] == 4


def test_stages_that_match_are_skipped_and_say_so(again):
    result, lines = run()
    assert [stage.status for stage in result.stages] == ["skipped"] * 4 + ["ran"] * 2
    assert all(
        ": " in line and "skipped" in line for line in lines if line.startswith(("[data]", "[tokenizer]", "[tokens]"))
    )
    assert "finished already" in result.stages[3].detail


def test_a_changed_output_or_setting_runs_its_stage_and_those_after_it(again):
    (again / "train.npy").unlink()
    result, _ = run()
    assert [stage.status for stage in result.stages[:3]] == ["skipped", "skipped", "ran"]
    result, _ = run("tokenizer.vocab_size=350", "run_dir=runs/pipeline-smoke", "train.resume=false")
    assert [stage.status for stage in result.stages[:4]] == ["skipped", "ran", "ran", "ran"]
    assert result.config.model.vocab_size == 350


def test_checkpoints_of_other_tokens_are_not_resumed(again):
    before, text = checkpoint.latest(again / "checkpoints"), (again / "train.txt").read_bytes()
    with pytest.raises(ValueError, match=r"other settings of the stage .data..*another run_dir, or train.resume=false"):
        run("data.seed=5")
    assert (again / "train.txt").read_bytes() == text
    assert checkpoint.latest(again / "checkpoints") == before


def test_a_longer_run_goes_on_from_the_checkpoint(again):
    config = dataclasses.replace(pipeline.settings("smoke", overrides=TINY))
    longer, _ = run("train.steps=6")
    assert longer.history.resumed_from == config.train.steps
    assert [row["step"] for row in longer.history.rows] == [1, 2, 3, 4, 5, 6]


def test_training_goes_on_in_several_processes(again, monkeypatch):
    """The pipeline starts them, passes their lines on and logs their rows to wandb; the rest happens once, as ever."""

    class Run:
        logged, summary = {}, {}

        def log(self, row, step):
            self.logged[step] = row

        def finish(self):
            pass

    monkeypatch.setattr("lmsys.pipeline.init_wandb", lambda *_: Run())
    settings = [
        "processes=2",
        "batch_size=2",
        "ddp_wrapper=flashddp",
        "sharded_optimizer=true",
        "steps=6",
        "device=cpu",
    ]
    config = pipeline.settings("smoke", overrides=[*TINY, *(f"train.{setting}" for setting in settings)])
    lines = []
    try:
        result = pipeline.run(config, say=lines.append)
    except ChildProcessError as error:
        pytest.fail("\n".join([f"{error}; what its processes printed:", *lines]))
    assert result.history.resumed_from == 4 and "in 2 processes, resumed from step 4" in result.stages[3].detail
    assert [row["step"] for row in result.history.rows] == [1, 2, 3, 4, 5, 6]
    assert result.history.rows[-1]["tokens"] == 6 * 4 * 64
    assert list(Run.logged) == [5, 6] and Run.logged[6]["train_loss"] == result.history.rows[-1]["train_loss"]
    assert Run.summary == result.evaluation
    assert any(line.startswith("step 6 of 6, 0 s left: loss ") for line in lines)
    assert {sample["step"] for sample in result.history.samples} == {2, 4, 6}
    assert len(result.stories) == 2 and result.history.checkpoint == again / "checkpoints" / "step-00000006"


def test_how_many_processes(monkeypatch):
    def count(gpus, **train):
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
        kind = "cuda" if gpus else "cpu"
        monkeypatch.setattr("lmsys.pipeline.resolve_device", lambda _name: torch.device(kind))
        return pipeline._processes(build(PipelineConfig, {"train": train}))

    assert count(8) == count(0) == 1  # no wrapper was chosen
    assert count(8, ddp_wrapper="flashddp") == 8
    assert count(8, ddp_wrapper="flashddp", processes=2) == 2
    assert count(0, ddp_wrapper="flashddp", processes=2) == 2
    for gpus in (0, 1):
        with pytest.raises(ValueError, match=f"'fsdp' needs more than one process.* {gpus} GPU"):
            count(gpus, ddp_wrapper="fsdp")
    with pytest.raises(ValueError, match=r"train\.processes is 3 and this machine has 2 GPU"):
        count(2, ddp_wrapper="flashddp", processes=3)
    with pytest.raises(ValueError, match="unknown ddp_wrapper 'flash'"):
        count(2, ddp_wrapper="flash")


def test_skip_data_takes_what_is_there(again, output_root):
    result, lines = run("data.seed=99", skip_data=True)
    assert "skip_data" in lines[0] and result.stages[0].status == "skipped"
    bits = (
        result.evaluation["valid_loss"]
        / np.log(2)
        * len(np.load(again / "valid.npy"))
        / (again / "valid.txt").stat().st_size
    )
    assert result.evaluation["bits_per_byte"] == pytest.approx(bits)
    with pytest.raises(ValueError, match="skip_data takes what an earlier run left"):
        run("run_dir=runs/none", skip_data=True)


def test_your_own_text_and_a_model_that_generates(tmp_path, output_root):
    text = tmp_path / "mine.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. Ünïcödé too! 🦊\n" * 400, encoding="utf-8")
    config = pipeline.settings("smoke", overrides=[*TINY, "train.dtype=bf16"], text_path=str(text), run_dir="runs/mine")
    result = pipeline.run(config, progress=False, say=lambda line: None)
    assert result.stages[0].detail.startswith("local_text")
    model, tokenizer = pipeline.load_run("runs/mine")
    assert model.config == result.config.model and tokenizer.vocab_size == result.config.model.vocab_size
    with pytest.raises(ValueError, match="no tokenizer at"):
        pipeline.load_run(output_root / "runs/mine/checkpoints/step-00000004", tmp_path / "none.json")


def test_a_text_of_your_own_has_a_run_folder_of_its_own():
    assert pipeline.settings("smoke", text_path="some/my.txt").run_dir == "runs/my"
    assert (
        pipeline.settings("smoke", text_path="my.txt", run_dir="runs/pipeline-smoke").run_dir == "runs/pipeline-smoke"
    )
    assert pipeline.settings("smoke", overrides=["run_dir=runs/here"], text_path="my.txt").run_dir == "runs/here"


def test_token_files_need_a_tokenizer_or_a_vocabulary(tmp_path):
    for name in ("train", "valid"):
        np.save(tmp_path / f"{name}.npy", np.arange(2000, dtype=np.uint16) % 300)
    overrides = [
        "data.dataset_mode=local_npy",
        f"data.train_tokens_path={tmp_path / 'train.npy'}",
        f"data.valid_tokens_path={tmp_path / 'valid.npy'}",
    ]
    with pytest.raises(ValueError, match="needs tokenizer.path"):
        run(*overrides)
    result, _ = run(*overrides, "model.vocab_size=300")
    assert result.stories == [] and "bits_per_byte" not in result.evaluation
    assert result.stages[-1].status == "skipped"


def test_train_alone_on_random_tokens_and_on_a_text(tmp_path):
    flags = {"train.steps": 2, "train.batch_size": 2, "optim.warmup_steps": 1}
    history = pipeline.train_alone(
        "tiny", context_length=16, vocab_size=300, num_tokens=2000, flags=flags, progress=False
    )
    assert history.rows[-1]["step"] == 2
    text = tmp_path / "text.txt"
    text.write_text("Once there was a cat who sat on a mat. " * 200, encoding="utf-8")
    flags["run_dir"] = "runs/text"
    history = pipeline.train_alone(
        "tiny", context_length=16, vocab_size=280, text=str(text), flags=flags, progress=False
    )
    assert to_dict(pipeline.load_run("runs/text")[0].config)["vocab_size"] <= 280


def test_train_alone_takes_a_config_and_token_files(tmp_path):
    """What the file says stands, unless overrides or arguments say otherwise."""
    for name, size in (("train", 3000), ("valid", 500)):
        np.save(tmp_path / f"{name}.npy", np.arange(size, dtype=np.uint16) % 300)
    file = tmp_path / "config.json"
    config = {
        "scale": "smoke",
        "run_dir": "runs/mine",
        "model": {"d_model": 16, "num_heads": 2, "context_length": 16, "vocab_size": 300},
        "train": {"steps": 3, "batch_size": 2},
    }
    file.write_text(json.dumps(config))
    paths = {f"data.{name}_tokens_path": str(tmp_path / f"{name}.npy") for name in ("train", "valid")}
    history = pipeline.train_alone(file=file, flags=paths, progress=False)
    assert history.rows[-1]["step"] == 3 and "runs/mine/" in str(history.checkpoint)
    saved = checkpoint.load(history.checkpoint)
    assert (saved.config["model"]["d_model"], saved.extra["train_tokens"]["length"]) == (16, 3000)
    history = pipeline.train_alone(
        "tiny",
        context_length=8,
        file=file,
        flags=paths,
        overrides=["train.steps=2", "model.num_layers=1"],
        progress=False,
    )
    model = checkpoint.load(history.checkpoint).config["model"]
    assert (model["d_model"], model["context_length"], model["num_layers"], history.rows[-1]["step"]) == (64, 8, 1, 2)
    with pytest.raises(ValueError, match="give both data.train_tokens_path and data.valid_tokens_path"):
        pipeline.train_alone(file=file, flags={"data.train_tokens_path": paths["data.train_tokens_path"]})


def test_what_torchrun_cannot_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the pipeline starts its processes itself: run it without torchrun"):
        run()
    with pytest.raises(ValueError, match="a text is tokenized once, not by each process under torchrun"):
        pipeline.train_alone("tiny", text="text.txt")
