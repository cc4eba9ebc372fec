"""Training in several processes computes what one does on the whole batch; a fault ends it and spares the checkpoint.

Real processes with Gloo. What leaves the group whole shares a start of two processes; one that dies needs its own.
"""

import functools
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import TOKENS, ByteTokenizer, Interrupted, computed, config, interrupt_at, saved_steps

from lmsys.parallel import WRAPPERS, group
from lmsys.train import checkpoint, engine, train

TIME_LIMIT_S = 100.0  # of a start of processes, generous because CI's cores are few
SEQUENCES = 8  # of a step, over all processes and micro-batches
STEPS = {"steps": 12, "eval_interval": 3, "sample_interval": 6, "checkpointing_interval": 3, "keep_checkpoints": 9}
CASES = {
    **{name: {"ddp_wrapper": name} for name, wrapper in WRAPPERS.items() if wrapper.many_processes},
    "accumulated": {"ddp_wrapper": "flashddp", "gradient_accumulation_steps": 2, "bucket_size_mb": 0.0},
    "zero1": {"ddp_wrapper": "flashddp", "sharded_optimizer": True},
    "zero1_accumulated": {"ddp_wrapper": "torch_ddp", "sharded_optimizer": True, "gradient_accumulation_steps": 2},
    "reduce_scatter": {"ddp_wrapper": "flashddp", "sharded_optimizer": True, "reduce_scatter_gradients": True},
    "fsdp_accumulated": {"ddp_wrapper": "fsdp", "gradient_accumulation_steps": 2},
}
FUSED = {"fused_loss": True, "fused_rope": True, "merged_gate": True}
CASES |= {
    f"{name}_fused": {"ddp_wrapper": name, "fused_optimizer": True, **FUSED}
    for name in ("flashddp", "torch_ddp", "fsdp")
}
CASES["torch_fsdp2_fused"] = {"ddp_wrapper": "torch_fsdp2", **FUSED}
WRITTEN = {"written_backward": True, "attention_kernel": "flash_attention_torch", "fused_loss": True}
CASES |= {f"{name}_written": {"ddp_wrapper": name, **WRITTEN} for name in ("flashddp", "fsdp")}
COMPILED = {"ddp_wrapper": "fsdp", "compile": True}
CASES["reduce_scatter_accumulated"] = CASES["reduce_scatter"] | {"gradient_accumulation_steps": 4}
RESUMED = {f"{name}, resumed": CASES[name] for name in ("flashddp", "zero1", "fsdp", "fsdp_fused", "torch_fsdp2")}


def run(run_dir=None, on_step=None, sections=None, **settings):
    """Train on the batches that all runs here share, as one of however many processes there are."""
    settings = STEPS | settings
    processes = group.current()[1]
    settings.setdefault("batch_size", SEQUENCES // processes // settings.get("gradient_accumulation_steps", 1))
    return train(
        config(train=settings, **(sections or {})),
        train_tokens=TOKENS,
        valid_tokens=TOKENS[:500],
        tokenizer=ByteTokenizer(),
        run_dir=run_dir,
        progress=False,
        on_step=on_step,
    )


def state(run_dir, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint, by name."""
    saved = checkpoint.load(run_dir / "checkpoints" / f"step-{step:08d}")
    moments = {
        f"{index} {name}": torch.as_tensor(value, dtype=torch.float32)
        for index, values in saved.optimizer["state"].items()
        for name, value in values.items()
    }
    return saved.weights | moments


def assert_same_run(history, run_dir, expected, expected_dir):
    """Losses, gradient norms, learning rates, and the last checkpoint's weights and optimizer state, to rounding."""
    ours, theirs = (np.array(computed(each), dtype=float) for each in (history, expected))
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)  # a value that is not there is a NaN in both
    ours, theirs = state(run_dir, 12), state(expected_dir, 12)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-5, atol=3e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process on the whole batch: (history, run folder)."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    return run(folder), folder


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """What two processes did, by case: histories of ranks 0 and 1, or their errors; and their folder."""
    folder = tmp_path_factory.mktemp("together")
    for name in RESUMED:  # from step 9 of the one process
        shutil.copytree(alone[1], folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-00000012")
    by_rank = group.spawn(in_two_processes, 2, folder, alone[1], device="cpu", timeout_s=TIME_LIMIT_S)
    return {name: [results[name] for results in by_rank] for name in by_rank[0]}, folder


def large_scale(make):
    """GradScaler.__init__ with a scale at which the first steps overflow."""
    return lambda self, *arguments, **options: make(self, *arguments, init_scale=2.0**22, **options)


def in_two_processes(process, folder, alone):
    """For spawn: every case in one group. Errors are what all processes raise, so that the group stays whole."""
    torch.set_num_threads(1)
    seldom = {"checkpointing_interval": 0}  # at the end alone
    results = {name: run(folder / name, **seldom, **settings) for name, settings in (CASES | RESUMED).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        results["compiled"] = run(folder / "compiled", **seldom, **COMPILED)
    for name in ("fsdp", "torch_fsdp2"):
        results[f"{name}, bf16"] = run(ddp_wrapper=name, dtype="bf16")
    results["written, bf16"] = run(ddp_wrapper="flashddp", dtype="bf16", fused_optimizer=True, **WRITTEN)
    results["bf16 gradients"] = run(ddp_wrapper="flashddp", communication_dtype="bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "__init__", large_scale(torch.amp.GradScaler.__init__))
        results["fp16"] = run(ddp_wrapper="flashddp", dtype="fp16")
    with pytest.raises(Interrupted):
        run(folder / "resumed", interrupt_at(4), ddp_wrapper="flashddp", sharded_optimizer=True)

    def error(*args, **kwargs):
        with pytest.raises((ValueError, OSError)) as caught:
            run(*args, **({"ddp_wrapper": "flat"} | kwargs))
        return f"{caught.type.__name__}: {caught.value}"

    results["another global batch"] = error(alone, batch_size=SEQUENCES)
    results["another model on a rank"] = error(sections={"model": {"d_ff": 32 + 8 * process.rank}})
    results["none"] = error(ddp_wrapper="none")
    results["one GPU for all"] = error(device="cpu" if process.rank == 0 else "cuda:64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "cross_entropy", spoil(process.rank, step=5))
        with pytest.raises(FloatingPointError) as caught:
            run(folder / "nan", ddp_wrapper="flashddp", log_interval=4, eval_interval=0, sample_interval=0)
        results["nan"] = str(caught.value)
    with pytest.MonkeyPatch.context() as patch:
        if process.rank == 0:
            patch.setattr(checkpoint, "flush", full_disk)
        results["full disk"] = error(folder / "full")
    return results


def spoil(rank: int, step: int):
    """cross_entropy, but not a number in the given call on rank 1."""
    true_loss, calls = engine.cross_entropy, []

    def spoiled(logits, targets):
        calls.append(1)
        return true_loss(logits, targets) * (float("nan") if (rank, len(calls)) == (1, step) else 1.0)

    return spoiled


def full_disk(path):
    raise OSError(28, "No space left on device", str(path))


# --- What it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES | RESUMED)
def test_two_processes_train_as_one_does(alone, together, name):
    results, folder = together
    for history in results[name]:
        assert_same_run(history, folder / name, *alone)
        assert history.resumed_from == (9 if name in RESUMED else None)
    first, second = results[name]
    assert [sample["text"] for sample in first.samples] == [sample["text"] for sample in alone[0].samples]
    assert {sample["step"] for sample in second.samples} <= {6} and first.checkpoint == second.checkpoint
    assert saved_steps(folder / name) == ([3, 6, 9, 12] if name in RESUMED else [12])
    assert len((folder / name / "metrics.csv").read_text().splitlines()) == 13


def test_a_compiled_model_trains_alike(alone, together):
    results, folder = together
    assert_same_run(results["compiled"][0], folder / "compiled", *alone)


def test_bf16_reaches_the_wrapper(alone, together):
    """Parameters as they are gathered, whole blocks, or gradients on their way, in bf16: close, and not the same."""
    rounded = run(dtype="bf16")
    expected = dict.fromkeys(("fsdp, bf16", "torch_fsdp2, bf16", "written, bf16"), rounded)
    expected |= {"bf16 gradients": alone[0]}
    for name, history in expected.items():
        ours, theirs = (np.array([row["train_loss"] for row in each.rows]) for each in (together[0][name][0], history))
        assert 1e-6 < np.abs(ours / theirs - 1).max() < 5e-3, name


def test_processes_skip_the_same_overflows(alone, together, monkeypatch):
    """Both skip the same steps, one more than one process: a token's gradient is twice as large in half the batch."""
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", large_scale(torch.amp.GradScaler.__init__))
    one = run(dtype="fp16")
    first, second = together[0]["fp16"]
    assert computed(first) == computed(second)
    skipped, alone_skipped = ([row["grad_norm"] is None for row in each.rows] for each in (first, one))
    count = sum(skipped)
    assert 0 < count < 10 and skipped == [True] * count + [False] * (12 - count)
    assert sum(alone_skipped) in (count, count - 1)
    assert first.rows[-1]["train_loss"] == pytest.approx(one.rows[-1]["train_loss"], rel=0.05)


def test_a_run_goes_on_in_another_number_of_processes_and_after_a_kill(alone, together, tmp_path):
    """Two processes to step 3, one to step 6, two to step 9, where one is killed in mid-step; one to the end."""
    folder = together[1] / "resumed"
    with pytest.raises(Interrupted):
        run(folder, interrupt_at(7))
    started = time.monotonic()
    with pytest.raises(group.RankError, match="rank 1 of 2 was killed by SIGKILL") as caught:
        group.spawn(killed_in_a_step, 2, folder, device="cpu", timeout_s=TIME_LIMIT_S)
    assert caught.value.signal == signal.SIGKILL and time.monotonic() - started < 60
    assert saved_steps(folder) == [3, 6, 9]
    assert not list((folder / "checkpoints").glob(".*"))
    history = run(folder)
    assert history.resumed_from == 9
    assert_same_run(history, folder, *alone)


def killed_in_a_step(process, folder):
    """For spawn: rank 1 dies at the start of step 11, when rank 0 is on its way into the same step."""

    def on_step(step, _loss):
        if (process.rank, step) == (1, 10):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    run(folder, on_step, ddp_wrapper="fsdp")


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "another global batch",
            "ValueError: cannot resume from .*: a step has 16 sequences and had 8 .the number of processes is 2",
        ),
        ("another model on a rank", "ValueError: what train.. was given differs between processes: rank.s. 1 .*d_ff"),
        ("none", "ValueError: ddp_wrapper 'none' is for one process and this run has 2"),
        ("one GPU for all", "ValueError: what train.. was given differs .*cuda:64"),
        ("nan", "the loss is nan at step 5; lower optim.learning_rate .*the last checkpoint is .*step-00000003"),
        ("full disk", "OSError: .*No space left on device"),
    ],
)
def test_every_process_raises_the_same_error(together, name, message):
    first, second = together[0][name]
    assert first == second and "\n" not in first
    assert re.match(message, first), first


def test_a_fault_in_every_process_spares_the_checkpoints(together):
    assert saved_steps(together[1] / "nan") == [3]
    assert saved_steps(together[1] / "full") == []


def test_a_process_out_of_memory_ends_the_run_under_torchrun_with_one_message(tmp_path):
    lines = []
    environment = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with pytest.raises(group.RankError) as caught:
        group.launch([str(tmp_path)], 2, module=Path(__file__).stem, on_line=lines.append, environment=environment)
    assert time.monotonic() - started < 60
    message = str(caught.value)
    assert re.match(r"rank 1 of 2 failed: OSError: .*out of memory at step 5 .*: 20 GiB are not there", message), (
        message
    )
    assert (caught.value.rank, caught.value.signal) == (1, None)
    assert "the last checkpoint is " in message and "step-00000003)" in message and "train.ddp_wrapper=fsdp" in message
    assert [line for line in lines if "failed" in line] == [message], lines
    assert not [line for line in lines if "Traceback" in line or "elastic" in line], lines
    assert saved_steps(tmp_path) == [3]
    assert run(tmp_path).resumed_from == 3


def out_of_memory(step, _loss):
    if (group.current()[0], step) == (1, 5):
        raise torch.OutOfMemoryError("20 GiB are not there.")


if __name__ == "__main__":  # one of the processes of the test above
    with group.process_group("cpu"):
        run(Path(sys.argv[1]), out_of_memory, ddp_wrapper="flashddp")
