"""Long runs: what kills, signals, full disks and bad batches leave, and what the run that goes on computes.

Real processes, of lmsys.bench.faults' fork server; the whole table of faults is `python -m lmsys faults`.
"""

import ctypes
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import nbformat
import pytest
import torch
from test_checkpoint import save, trained
from test_train import TOKENS, Interrupted, computed, config, interrupt_at, one_thread, run, saved_steps  # noqa: F401

from lmsys import pipeline as pipelines
from lmsys import records, report
from lmsys.bench import experiment, faults, saving, trainers
from lmsys.parallel import shards
from lmsys.parallel.shards import Piece
from lmsys.train import Stopped, checkpoint, engine, guard, logged


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- Processes that are killed and stopped --------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    p = faults.NOTEBOOK.parameters({"scale": "smoke", "kills": 3})
    return faults.Lab(p, tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(
    "name", ["sigkill", "sigkill_in_save", "sigterm", "sigterm_one_of_two", "file_limit", "spike", "bit_flip"]
)
def test_nothing_is_lost(lab, name):
    tally = faults.Tally()
    faults.FAULTS[name].try_it(lab, tally)
    assert tally.tried == (3 if "kill" in name else 1)
    assert tally.kept == tally.tried, tally.notes
    if name.startswith("sigt"):
        assert tally.longest_s < faults.ENDS_WITHIN_S


def test_all_processes_skip_what_is_bad_in_one(lab):
    options = {"on_bad_step": "skip", "ddp_wrapper": "flashddp"}
    whole = lab.start(injection=trainers.Injection(draw=6, rank=1), processes=2, **options)
    assert whole.codes() == [0, 0]
    assert re.findall("step (\\d+) is skipped: (.*) \\(", whole.log()) == [("7", "the loss is nan")]
    assert [row["step"] for row in whole.rows() if row["train_loss"] is None] == [7]
    stopped = lab.start(injection=trainers.Injection(draw=6, rank=1), processes=2, ddp_wrapper="flashddp")
    assert stopped.codes() == [1, 1] and "the loss is nan at step 7;" in stopped.log()
    # All fail alike: one tells, or more if the first is gone already.
    told = re.findall(r"rank \d of 2 failed: (.*)", stopped.log())
    assert len(set(told)) == 1 and lab.whole(stopped, 5) == ""


def test_a_loss_is_noticed(lab):
    """The harness's own check: rows that differ, a missing step, an old checkpoint."""
    finished = lab.start()
    assert finished.codes() == [0] and lab.same(finished) == "" and lab.whole(finished, lab.p.steps) == ""
    other = lab.start(seed=1)
    other.codes()
    assert "of step 1 is" in lab.same(other)
    assert "not 99" in lab.whole(finished, 99)
    lines = (finished.folder / "metrics.csv").read_text().splitlines()
    (finished.folder / "metrics.csv").write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    assert lab.same(finished) == "steps are missing from metrics.csv"


def test_sigterm_under_torchrun_saves_and_ends(tmp_path):
    """To torchrun, which passes it on: within 10 s, with one line, and no traceback of ours."""
    settings = records.write_json(
        tmp_path / "config.json",
        {
            "model": {
                "d_model": 16,
                "d_ff": 32,
                "num_layers": 1,
                "num_heads": 2,
                "context_length": 16,
                "vocab_size": 64,
            },
            "optim": {"warmup_steps": 0},
            "train": {"steps": 100_000, "batch_size": 2, "ddp_wrapper": "flat", "device": "cpu", "log_interval": 1}
            | {"eval_interval": 0, "checkpointing_interval": 0},
        },
    )
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lmsys"]
    command += ["train", "--config", str(settings), "--run_dir", str(run_dir), "--num_tokens", "5000"]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            end = time.monotonic() + 60
            while len(logged(run_dir)[0]) < 3 and time.monotonic() < end:
                time.sleep(0.02)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        finally:
            process.kill()
    assert time.monotonic() - started < 10
    said = log.read_text()
    told = [line for line in said.splitlines() if line.startswith("stopped by SIGTERM after step")]
    assert len(told) == 1, said
    saved = checkpoint.load(checkpoint.latest(run_dir / "checkpoints"))
    assert f"after step {saved.step} of 100000" in told[0] and str(saved.path) in told[0]
    assert saved.step >= logged(run_dir)[0][-1]["step"] >= 3


@pytest.mark.parametrize("lost", [False, True])
def test_the_table_of_faults(lost, monkeypatch):
    """A loss is a row with status error."""

    def tried(_lab, tally):
        tally.add(True, 0.5)
        tally.add(not lost, 1.5, "step 7 is another one")

    monkeypatch.setattr(faults, "Lab", lambda *_: None)
    monkeypatch.setitem(faults.FAULTS, "nan", faults.Fault("SIGTERM, or so", tried))
    p = faults.NOTEBOOK.parameters({"scale": "smoke", "kinds": ["nan"], "device": "cpu", "seed": 1 + lost})
    (row,) = experiment.run(faults.FAULTS_TRIED, p).itertuples()
    assert (row.tried, row.nothing_lost, row.longest_s) == (2, 1 if lost else 2, 1.5)
    assert row.status == ("error" if lost else "ok") and ("step 7 is another one" in str(row.note)) == lost
    timed = {"none": [10.0] * 3, "synchronous": [12.0] * 3, "asynchronous": [10.1] * 3}
    monkeypatch.setattr(saving, "saving_times", lambda *_: (timed, timed, timed))
    monkeypatch.setattr(saving, "ProcessPoolExecutor", ThreadPool)
    rows = experiment.run(saving.SAVING, p).set_index("mode")
    assert rows.cost_pct.to_dict() == pytest.approx({"none": 0.0, "synchronous": 20.0, "asynchronous": 1.0})
    assert rows.hold_ms["asynchronous"] == 10.1 and rows.checkpoint_mib["synchronous"] > 0


class ThreadPool(futures.ThreadPoolExecutor):
    """In place of a pool of processes."""

    def __init__(self, count, mp_context):
        super().__init__(count)


def test_parameters_of_faults():
    given = {
        "unknown kind 'sigkil'. Did you mean 'sigkill'": {"kinds": ["sigkil"]},
        "kills is 0; it must be 1 or more": {"kills": 0},
        "trials is -1": {"trials": -1},
        "rounds is 0": {"rounds": 0},
        "kinds must not be empty": {"kinds": []},
    }
    for message, options in given.items():
        with pytest.raises(ValueError, match=message):
            faults.NOTEBOOK.parameters({"scale": "smoke"} | options)
    assert set(faults.NOTEBOOK.parameters({"scale": "full", "device": "cpu"}).kinds) == set(faults.FAULTS)


# --- Signals, in this process ---------------------------------------------------------------------


def signal_at(step: int, number: int = signal.SIGTERM):
    def on_step(done, _loss):
        if done == step:
            os.kill(os.getpid(), number)

    return on_step


def test_a_stop_between_rows_changes_no_row(tmp_path, capsys):
    """Rows are means since the row before: what had no row when the signal came is in the next one's."""
    settings = {"log_interval": 4, "checkpointing_interval": 0, "eval_interval": 0, "steps": 11}
    before = signal.getsignal(signal.SIGTERM)
    whole = run(tmp_path / "whole", train=settings)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "parts", on_step=signal_at(5), train=settings)
    assert stopped.value.code == 128 + signal.SIGTERM and saved_steps(tmp_path / "parts") == [6]
    assert stopped.value.checkpoint == checkpoint.latest(tmp_path / "parts" / "checkpoints")
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"stopped by SIGTERM after step 6 of 11; the last checkpoint is {stopped.value.checkpoint}")
    resumed = run(tmp_path / "parts", train=settings)
    assert computed(resumed) == computed(whole) and [row["step"] for row in whole.rows] == [4, 8, 11]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine.Engine, "accumulate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped) as stopped:
        run(tmp_path)
    assert stopped.value.code == 130 and stopped.value.checkpoint is None
    assert capsys.readouterr().out.startswith("stopped by SIGINT before a step was done; no checkpoint was saved")


def test_a_second_sigint_insists_and_an_echo_does_not(tmp_path, monkeypatch):
    def twice(done, _loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        run(tmp_path, on_step=twice)
    monkeypatch.setattr(guard.Requests, "_TWICE_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_step=twice)


# --- Bad steps ------------------------------------------------------------------------------------


def spoiled(monkeypatch, draws: set[int], factor: float = math.nan):
    accumulate = engine.Engine.accumulate

    def wrapped(replica, sampler):
        if sampler.draws in draws:
            with monkeypatch.context() as patch:
                true = replica.loss_function
                patch.setattr(replica, "loss_function", lambda *given: true(*given) * factor)
                return accumulate(replica, sampler)
        return accumulate(replica, sampler)

    monkeypatch.setattr(engine.Engine, "accumulate", wrapped)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_skipped_steps_change_nothing_but_the_batch(tmp_path, monkeypatch, dtype):
    """Skipping a step is training without it: weights and moments stay, later steps are the same after a resume."""
    settings = {"on_bad_step": "skip", "steps": 12, "dtype": dtype, "checkpointing_interval": 4, "keep_checkpoints": 9}
    spoiled(monkeypatch, {2, 3, 7})
    whole = run(tmp_path / "whole", train=settings)
    assert [each["step"] for each in whole.skipped] == [3, 4, 8] and [each["draw"] for each in whole.skipped] == [
        2,
        3,
        7,
    ]
    assert [row["step"] for row in whole.rows if row["train_loss"] is None] == [3, 4, 8]
    four, eight = (checkpoint.load(path) for path in checkpoint.steps(tmp_path / "whole" / "checkpoints")[:2])
    steps = {float(values["step"]) for values in four.optimizer["state"].values()}
    assert steps == {2.0 if dtype == "fp32" else max(steps)} and eight.extra["guard"]["skipped"][-1]["step"] == 8
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", on_step=interrupt_at(9), train=settings)
    resumed = run(tmp_path / "parts", train=settings)
    assert computed(resumed) == computed(whole) and resumed.skipped == whole.skipped


def test_too_many_skips_end_the_run(tmp_path, monkeypatch):
    spoiled(monkeypatch, set(range(3, 30)))
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 14, as in the 10 steps before it.*draw 13 of"
    ):
        run(tmp_path, train={"on_bad_step": "skip", "steps": 20})


def test_a_spike_is_told_from_a_loss_that_falls(monkeypatch):
    settings = {"loss_spike": 1.5, "steps": 20, "log_interval": 5, "eval_interval": 0}
    assert len(run(train=settings).rows) == 4
    spoiled(monkeypatch, {12}, 2.0)
    with pytest.raises(
        FloatingPointError, match=r"the loss is [\d.]+, [\d.]+ times the median [\d.]+ of the 12 before it, at step 13;"
    ):
        run(train=settings)


# --- Which checkpoints stay, and saving in the background -----------------------------------------


def test_the_best_stay(tmp_path):
    parts = trained()
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5), (6, None)):
        save(tmp_path, step, parts, valid_loss=loss, keep_last=1, keep_best=2)
    assert [checkpoint.step_of(path) for path in checkpoint.steps(tmp_path)] == [2, 4, 6]
    assert checkpoint.best(tmp_path).name == "step-00000002"
    (tmp_path / "step-00000002" / "model.safetensors").unlink()
    assert checkpoint.best(tmp_path).name == "step-00000004"
    assert checkpoint.latest(tmp_path).name == "step-00000006"


def test_a_run_keeps_its_best(tmp_path):
    """Every checkpoint is evaluated then, whatever the interval of evaluations; the losses are those of metrics.csv."""
    settings = {
        "steps": 12,
        "checkpointing_interval": 2,
        "eval_interval": 0,
        "keep_checkpoints": 1,
        "keep_best_checkpoints": 2,
    }
    history = run(tmp_path, train=settings)
    losses = {row["step"]: row["valid_loss"] for row in history.rows if row["valid_loss"] is not None}
    assert sorted(losses) == [2, 4, 6, 8, 10, 12]
    best = sorted(losses, key=losses.get)[:2]
    assert saved_steps(tmp_path) == sorted({*best, 12})
    assert checkpoint.load(checkpoint.best(tmp_path / "checkpoints")).valid_loss == losses[best[0]]


def test_saving_in_the_background_holds_the_moments_of_its_call(tmp_path, monkeypatch):
    """Training changes the tensors while the thread waits to write them; at most one save is on its way."""
    model, optimizer, settings = trained()
    writing, order = checkpoint.write, []

    def slow(*args, **options):
        time.sleep(0.2)
        order.append(args[1].step)
        return writing(*args, **options)

    monkeypatch.setattr(checkpoint, "write", slow)
    expected = []
    with checkpoint.Saver(tmp_path) as saver:
        for step in (1, 2):
            expected.append({name: tensor.clone() for name, tensor in checkpoint.model_weights(model).items()})
            started = time.perf_counter()
            content = {"weights": checkpoint.model_weights(model), "optimizer": optimizer.state_dict()}
            saver.save(checkpoint.snapshot(step, config=settings, **content))
            assert (time.perf_counter() - started < 0.15) == (step == 1) and order == [1][: step - 1]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 1
    for step, weights in zip((1, 2), expected, strict=True):
        saved = checkpoint.load(tmp_path / f"step-{step:08d}").weights
        assert all(torch.equal(saved[name], weights[name]) for name in weights)
    assert saver.last == tmp_path / "step-00000002"


def test_an_error_in_the_background_is_told_at_the_next_step(tmp_path, monkeypatch):
    flush, seen = checkpoint.flush, []

    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def on_step(step, _loss):
        seen.append(step)
        if step == 4:
            monkeypatch.setattr(checkpoint, "flush", fail)
        time.sleep(0.02)

    with pytest.raises(OSError, match="No space left on device.*step-00000006"):
        run(tmp_path, on_step=on_step, train={"steps": 40, "checkpointing_interval": 3})
    assert seen[-1] in (6, 7, 8) and saved_steps(tmp_path) == [3]
    monkeypatch.setattr(checkpoint, "flush", flush)
    assert run(tmp_path, train={"steps": 40, "checkpointing_interval": 3}).resumed_from == 3


def test_an_error_at_the_end_is_told_and_one_beside_another_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "flush", lambda path: os.stat(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "end", train={"steps": 3})
    with pytest.warns(UserWarning, match="the last checkpoint was not saved"), pytest.raises(Interrupted):
        run(tmp_path / "other", on_step=interrupt_at(5))


# --- Saves that are cut off -----------------------------------------------------------------------


def test_every_operation_of_a_save_can_be_the_last(tmp_path):
    """A process killed ahead of any operation, in a new step and in one that is replaced, leaves a good checkpoint.

    Each kill is of a forked child: the save alone, its tensors ready.
    """
    parts = trained()
    names = []
    with trainers.operations(lambda _number, name: names.append(name)):
        save(tmp_path / "counted", 5, parts)
        save(tmp_path / "counted", 5, parts)
    assert names.count("rename") == 3 and names.count("flush") == 12 and names.count("write") > 60
    first = len(names) // 2
    interesting = [at for at, name in enumerate(names) if name != "write" or at % 11 == 0]
    for at in interesting:
        folder = tmp_path / str(at)
        save(folder, 4, parts)
        child = os.fork()
        if child == 0:
            with trainers.Injection(operation=at).installed():
                save(folder, 5, parts, keep_last=1)
                save(folder, 5, parts, keep_last=1)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        checkpoint.recover(folder)
        newest = checkpoint.latest(folder)
        assert newest.name == ("step-00000004" if at < first - 1 else "step-00000005"), (at, names[at])
        assert not list(folder.glob(".*"))
        checkpoint.load(newest)


def test_a_full_disk_at_every_kind_of_operation(tmp_path):
    parts = trained()
    good = save(tmp_path, 5, parts)
    before = content(good)
    names = []
    with trainers.operations(lambda _number, name: names.append(name)):
        save(tmp_path / "counted", 5, parts)
    for kind in ("write", "flush", "rename"):
        for step in (5, 6):
            at = len(names) - 1 - names[::-1].index(kind) - (kind == "flush")  # the last flush is after the rename
            with (
                trainers.Injection(operation=at, action="full").installed(),
                pytest.raises(OSError, match="No space left"),
            ):
                save(tmp_path, step, parts)
            assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000005"] and content(good) == before


def test_a_disk_that_is_really_full(tmp_path):
    """A small tmpfs, in a mount namespace of a forked child; it is filled by checkpoints, and freed again."""
    parts = trained()
    child = os.fork()
    if child == 0:
        try:
            os._exit(fill(tmp_path, parts))
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 77:
        pytest.skip("no mount namespaces here")
    assert code == 0


def fill(folder: Path, parts) -> int:
    """77 where it cannot mount, 0 where all is well."""
    libc = ctypes.CDLL(None)
    new_mounts, new_user, recursive, private = 0x20000, 0x10000000, 0x4000, 0x40000
    if (
        libc.unshare(new_mounts | (0 if os.geteuid() == 0 else new_user))
        or libc.mount(b"none", b"/", None, recursive | private, None)
        or libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=600k")
    ):
        return 77
    with pytest.raises(OSError) as error:
        for step in range(1, 99):
            save(folder, step, parts)
    kept = checkpoint.steps(folder)
    assert error.value.errno == errno.ENOSPC and 2 <= len(kept) == step - 1
    assert all(checkpoint._damage(path) is None for path in kept) and len(list(folder.iterdir())) == len(kept)
    shutil.rmtree(kept[0])
    assert checkpoint.latest(folder) == kept[-1] and save(folder, step, parts, keep_last=1) == checkpoint.latest(folder)
    return 0


def test_a_link_in_place_of_a_checkpoint_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    folder = tmp_path / "checkpoints"
    parts = trained()
    folder.mkdir()
    (folder / "step-00000001").symlink_to(outside)
    (folder / ".step-00000003-link").symlink_to(outside)
    for step in (1, 2, 3):
        save(folder, step, parts, keep_last=1)
    assert (outside / "kept.txt").read_text() == "kept"
    assert saved_steps_of(folder) == [3]


def saved_steps_of(folder):
    return [checkpoint.step_of(path) for path in checkpoint.steps(folder) if not path.is_symlink()]


# --- Sharded state --------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def sharded(folder, value: float = 1.0):
    pieces = [Piece("a", (4, 3), 0, torch.full((6,), value)), Piece("a", (4, 3), 6, torch.full((6,), 2 * value))]
    shards.save_pieces([*pieces, Piece("empty", (0,), 0, torch.empty(0))], {"rest": {"a/step": 3}}, folder)


def test_sharded_state_is_never_unpickled(tmp_path, monkeypatch):
    """Malicious pickles in place of every file are refused unread; with the old format's index as well."""
    import pickle

    sharded(tmp_path / "good")
    files = [path.name for path in (tmp_path / "good").iterdir()]
    assert sorted(Path(name).suffix for name in files) == [".json", ".safetensors"]
    for name in (*files, ".metadata"):
        folder = tmp_path / f"bad-{name}"
        sharded(folder)
        for path in folder.iterdir():
            if path.suffix == Path(name).suffix or name == ".metadata":
                path.unlink()
                (folder / (name if name == ".metadata" else path.name)).write_bytes(
                    pickle.dumps(Payload(tmp_path / "run"))
                )
        with pytest.raises(ValueError, match="damaged|no sharded state") as error:
            shards.load_shared(folder)
            shards.load_pieces([("a", 0, 12)], folder)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for place in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(place, refuse)
    assert shards.load_shared(tmp_path / "good") == {"rest": {"a/step": 3}, "shapes": {"a": [4, 3], "empty": [0]}}
    part, empty = shards.load_pieces([("a", 4, 9), ("empty", 0, 0)], tmp_path / "good")
    assert part.tolist() == [1, 1, 2, 2, 2] and empty.numel() == 0


def test_damaged_sharded_state_is_named(tmp_path):
    sharded(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for at in (3, len(whole) - 2):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            shards.load_pieces([("a", 0, 12)], tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        shards.load_pieces([("a", 0, 12)], tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["pieces"]["a"][0]["file"] = "../elsewhere.safetensors"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not an index of pieces"):
        shards.load_pieces([("a", 0, 12)], tmp_path)


def test_sharded_state_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    sharded(tmp_path)
    monkeypatch.setattr(shards, "flush", lambda path: os.stat(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="nowhere"):
        sharded(tmp_path, 5.0)
    monkeypatch.undo()
    assert shards.load_pieces([("a", 0, 1)], tmp_path)[0].item() == 1.0
    sharded(tmp_path, 7.0)
    assert shards.load_pieces([("a", 0, 1)], tmp_path)[0].item() == 7.0
    assert len(list(tmp_path.iterdir())) == 2  # what was replaced is gone


# --- What a run leaves for others to read ---------------------------------------------------------


def test_keys_and_home_folders_stay_out(tmp_path, output_root, monkeypatch):
    """A pipeline of a text in the user's home folder, with a key in the environment and in netrc."""
    home, key = tmp_path / "home" / "ann", "0123456789abcdef" * 2 + "01234567"
    home.mkdir(parents=True)
    (home / "text.txt").write_text("Once upon a time there was a cat. It sat on a mat.<|endoftext|>\n" * 400)
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {key}\n")
    for name, value in {"HOME": home, "WANDB_API_KEY": key, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, str(value))
    overrides = ["train.steps=2", "tokenizer.vocab_size=270", "generate.max_new_tokens=2", "tokenizer.num_workers=1"]
    chosen = pipelines.settings("smoke", overrides=overrides, text_path=str(home / "text.txt"))
    folder = records.artifacts_dir()
    pipelines.write_report(pipelines.run(chosen, progress=False, say=lambda _line: None), folder)
    executed = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text=f"no file at {home}/text.txt")])
        ]
    )
    nbformat.write(executed, folder / "executed.ipynb")
    report._clean(folder / "executed.ipynb")

    left = content(output_root)
    assert not [name for name, data in left.items() if key.encode() in data]
    published = {name: data for name, data in left.items() if name.startswith("artifacts/")}
    assert not [name for name, data in published.items() if str(home).encode() in data]
    assert b'"text_path": "~/text.txt"' in published["artifacts/local/pipeline_metrics.json"]
    assert b"no file at ~/text.txt" in published["artifacts/local/executed.ipynb"]
    (stages,) = (data for name, data in left.items() if name.endswith("stages.json"))
    assert str(home).encode() in stages  # which must find it again
