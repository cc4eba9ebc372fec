import json

import numpy as np
import pandas as pd
import pytest
import torch

from lmsys import train as training
from lmsys.bench import experiment, race
from lmsys.data import BatchSampler


def parameters(scale="smoke", **given):
    return race.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | given)


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """All three arms at smoke scale: (parameters, frame, folder)."""
    folder = tmp_path_factory.mktemp("race")
    p = parameters(minutes=5, run_dir=str(folder / "run"))
    return p, experiment.run(race.RACE, p, folder=folder), folder


def by_hand(step_s: dict[str, float], losses: list[float], **other) -> pd.DataFrame:
    """A frame of arms whose steps take so many seconds, 100 tokens a step, evaluated at each.

    Fewer losses where an arm is named in other.
    """
    rows = []
    for arm, seconds in step_s.items():
        for step, loss in enumerate(losses[: other.get(arm)], start=1):
            rows.append(
                dict.fromkeys(race.RACE.columns)
                | {
                    "arm": arm,
                    "gpus": 2 if arm == "ours_ddp" else 1,
                    "status": "ok",
                    "step": step,
                    "tokens": 100 * step,
                }
                | {
                    "seconds": step * seconds,
                    "valid_loss": loss,
                    "tokens_per_s": 100 / seconds,
                    "elapsed_s": step * seconds,
                }
                | {"planned_steps": len(losses), "parameters": 10, "device": "a GPU"}
            )
    return pd.DataFrame(rows)


def test_arms_differ_in_nothing_but_speed(raced):
    """The losses of all arms coincide to the rounding of fp32, at each row, and each arm read the same tokens."""
    p, frame, _ = raced
    assert set(frame.status) == {"ok"} and list(dict.fromkeys(frame.arm)) == list(p.arms)
    for name in ("train_loss", "valid_loss"):
        losses = frame.pivot(index="tokens", columns="arm", values=name).dropna()
        assert len(losses) == p.steps // (p.log_interval if name == "train_loss" else p.eval_interval)
        assert (losses.max(axis=1) - losses.min(axis=1)).max() < 1e-5
    assert frame.valid_loss.dropna().iloc[-1] < frame.valid_loss.dropna().iloc[0] - 0.3  # and it learned
    assert frame.groupby("arm").tokens.max().eq(p.steps * p.batch_size * p.context_length).all()
    assert dict(zip(frame.arm, frame.local_batch, strict=True)) == {"ours": 4, "ours_ddp": 2, "naive": 4}
    difference = race.loss_difference(frame)
    assert difference[0] < 1e-5 and difference[3] == p.steps * p.batch_size * p.context_length


def test_seconds_are_those_of_the_trainers_windows(raced):
    _, frame, _ = raced
    for _, rows in frame.groupby("arm"):
        windows = np.diff(rows.tokens) / rows.tokens_per_s.iloc[1:]
        assert np.diff(rows.seconds) == pytest.approx(windows, rel=1e-3)
        assert rows.seconds.iloc[0] == pytest.approx(windows.iloc[0], rel=1e-3)  # as many steps, at the second's pace
        assert np.isnan(rows.tokens_per_s.iloc[0])
        assert all(np.diff(rows.seconds) <= np.diff(rows.elapsed_s) + 1e-5)  # what evaluations take is left out


def test_the_summary_tells_the_run(raced):
    p, frame, folder = raced
    lines = {line["arm"]: line for line in race.summary(frame)}
    assert list(lines) == ["naive attention, naive step, 1 GPU", "lmsys, 1 GPU", "lmsys, flashddp, 2 GPUs"]
    assert all(line["status"] == "ok" and line["step"] == "12 of 12" for line in lines.values())
    stamp = json.loads((folder / "race_results.json").read_text())
    assert stamp["method"]["vocabulary"] == 300 and stamp["parameters"]["steps"] == p.steps


def test_the_first_steps_count_at_the_second_rows_pace():
    """60 s of compilation in the first row are left out: 10 tokens/s count as the second row's 1,000."""
    rows: list[dict] = []
    taker = race._Rows(rows.append)
    taker.log({"step": 1, "tokens": 600, "tokens_per_s": 10.0, "mfu": 0.1}, step=1)
    assert rows == [] and taker.seconds == 0
    taker.log({"step": 2, "tokens": 1600, "tokens_per_s": 1000.0, "mfu": 0.2}, step=2)
    taker.log({"step": 3, "tokens": 2600, "tokens_per_s": 500.0, "mfu": 0.2}, step=3)
    taker.close()
    assert [row["seconds"] for row in rows] == pytest.approx([0.6, 1.6, 3.6])
    assert (rows[0]["tokens_per_s"], rows[0]["mfu"]) == (None, None) and rows[1]["tokens_per_s"] == 1000.0
    alone: list[dict] = []
    taker = race._Rows(alone.append)
    taker.log({"step": 1, "tokens": 600, "tokens_per_s": 10.0}, step=1)
    taker.close()
    assert alone == [{"step": 1, "tokens": 600, "tokens_per_s": 10.0, "seconds": 60.0}]


@pytest.mark.parametrize("count", [1, 2])
def test_the_limit_ends_an_arm_in_every_process(raced, count):
    """Rank 0 alone knows the seconds.

    With no time to train, all processes end at the first row, and what was trained is kept.
    """
    p, frame, folder = raced
    config = race.pipeline_config(p, "ours_ddp" if count > 1 else "ours")
    files, rows = tuple(folder / "run" / name for name in ("train.npy", "valid.npy")), []
    if count > 1:
        race.train_in_processes(config, count, files, 0.0, rows.append)
    else:
        race.train_arm(config, files, 0.0, rows.append)
    assert [row["step"] for row in rows] == [p.log_interval]
    assert rows[0]["train_loss"] == pytest.approx(frame.train_loss.iloc[0], abs=1e-5)


def test_both_halves_of_a_batch_are_the_whole():
    tokens = np.arange(1000)
    p = parameters()
    local = race.pipeline_config(p, "ours_ddp").train.batch_size
    whole = BatchSampler(tokens, p.batch_size, 8, seed=3).next()[0]
    halves = [BatchSampler(tokens, local, 8, seed=3, rank=rank, world_size=2).next()[0] for rank in (0, 1)]
    assert np.array_equal(whole, np.concatenate(halves))


def test_an_arm_that_fails_is_a_row_and_not_the_end(raced, tmp_path, monkeypatch):
    p, frame, folder = raced
    train = training.train

    def failing(config, **given):
        if config.train.attention_kernel == p.naive_kernel:
            given["on_step"] = lambda step, loss: (_ for _ in ()).throw(
                torch.OutOfMemoryError("CUDA out of memory\nmore")
            )
        return train(config, **given)

    monkeypatch.setattr(training, "train", failing)
    p = parameters(arms=["naive", "ours"], minutes=5, run_dir=str(folder / "run"))
    failed = experiment.run(race.RACE, p, folder=tmp_path)
    assert list(dict.fromkeys(zip(failed.arm, failed.status, strict=True))) == [("naive", "oom"), ("ours", "ok")]
    ours = failed[failed.arm == "ours"].train_loss.to_numpy()
    assert ours == pytest.approx(frame[frame.arm == "ours"].train_loss.to_numpy(), abs=1e-6)
    assert race.summary(failed)[0]["status"].startswith("oom: ") and "more" not in race.summary(failed)[0]["status"]


def test_one_gpu_leaves_two_out_with_a_note(monkeypatch):
    monkeypatch.setattr(race, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(training, "check_setup", lambda config, world_size: None)
    p = parameters("full")
    assert [race.lacking(p, arm) is None for arm in race.ARMS] == [True, True, False]
    (point,) = [point for point in race.points(p) if point["arm"] == "ours_ddp"]
    assert (point["status"], point["note"]) == ("unsupported", "needs 2 GPUs; this machine has 1")


def test_full_scale_is_what_the_docstring_says():
    """A model of 100M or more, the same step of it in each arm.

    Options only in ours; evaluations under 3% of the time.
    """
    p = parameters("full", compile=False, attention_kernel="vectorized_torch")
    naive, ours = (race.pipeline_config(p, arm) for arm in ("naive", "ours"))
    assert 100e6 < race.cost.model_parameters(ours.model) < 150e6 and naive.model == ours.model
    assert naive.optim == ours.optim and naive.train.dtype == ours.train.dtype == "bf16"
    assert p.eval_batches / 3 / p.eval_interval < 0.03  # a forward pass is a third of a step
    assert not any(getattr(naive.train, name) for name in ("compile", "fused_loss", "fused_rope", "fused_optimizer"))
    assert ours.train.fused_loss and ours.train.fused_rope and not ours.train.compile


def test_time_to_the_same_loss_and_its_ratio():
    """Naive takes 4 s a step and stops after two; ours takes 1, two GPUs 0.5. The losses at the same tokens are one."""
    frame = by_hand({"ours": 1.0, "ours_ddp": 0.5, "naive": 4.0}, [4.0, 3.0, 2.0, 1.9], naive=2)
    curves = race.curves(frame)
    assert race.common_losses(frame)[-1] == 3.0
    assert [race.reaching(curves[arm], 3.0) for arm in race.ARMS] == [(8.0, 200.0), (2.0, 200.0), (1.0, 200.0)]
    assert race.reaching(curves["ours"], 3.5) == (1.5, 150.0)  # between evaluations
    assert race.reaching(curves["ours"], 4.5) == (1.0, 100.0) and race.reaching(curves["naive"], 2.5) is None
    assert [line["times as fast to the last"] for line in race.summary(frame)] == ["1.00", "4.00", "8.00"]
    assert race.summary(frame)[0]["step"] == "2 of 4" and race.loss_difference(frame)[0] == 0


def test_a_loss_that_rises_again_and_one_that_differs():
    frame = by_hand({"ours": 1.0, "naive": 2.0}, [3.0, 2.0, 2.5, 1.0])
    assert race.reaching(race.curves(frame)["ours"], 2.5) == (1.5, 150.0)  # the first time
    frame.loc[(frame.arm == "naive") & (frame.step == 2), "valid_loss"] += 0.25
    frame.loc[(frame.arm == "naive") & (frame.step == 4), "valid_loss"] += 0.125
    assert race.loss_difference(frame) == (0.25, 200, 0.125, 400)
    assert race.common_losses(frame)[-1] == 1.125  # the higher of the arms' lowest


def test_stories_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "_PART_MB", 0.02)
    texts = []
    for workers in (1, 2):
        monkeypatch.setattr(race, "resolve_workers", lambda _, workers=workers: workers)
        folder = tmp_path / str(workers)
        folder.mkdir()
        path = race.write_stories(folder, 0.06, seed=1)
        texts.append(path.read_bytes())
        assert [found.name for found in folder.iterdir()] == ["stories-0.06mb-seed1.txt"]
    assert texts[0] == texts[1] and 60_000 <= len(texts[0]) < 70_000
    first = texts[0][:20_000].split(b"<|endoftext|>")
    assert not set(first[:-1]) & set(texts[0][25_000:].split(b"<|endoftext|>"))  # parts are not alike
    path.write_text("kept")
    assert race.write_stories(folder, 0.06, seed=1).read_text() == "kept"


def test_a_text_of_ones_own(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"Story {i}: the cat saw {i % 7} dogs.\n<|endoftext|>\n" for i in range(800)))
    p = parameters(arms=["ours"], steps=4, text=str(text), run_dir=str(tmp_path / "run"))
    frame = experiment.run(race.RACE, p, folder=tmp_path)
    assert list(frame.step) == [2, 4] and set(frame.arm) == {"ours"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": ["our"]}, "unknown arm 'our'. Did you mean 'ours'"),
        ({"arms": []}, "arms must not be empty"),
        ({"arms": ["ours", "ours"]}, "give each once"),
        ({"step_preset": "fuse"}, "unknown step_preset 'fuse'"),
        ({"batch_size": 3}, "batch_size 3 is not a multiple of gpus 2"),
        ({"gpus": 1}, "gpus is 1; it must be 2 or more"),
        ({"minutes": 0}, "minutes is 0.0; it must be positive"),
        ({"eval_interval": 3}, "eval_interval 3 is not a multiple"),
        ({"device": "cuda:1"}, "arms take GPUs from 0 on"),
        ({"naive_kernel": "naive"}, "unknown .*kernel 'naive'"),
    ],
)
def test_bad_input_is_one_clear_error(given, message):
    with pytest.raises(ValueError, match=message):
        parameters(**given)
