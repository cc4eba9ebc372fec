"""The training step taken apart: what its points set, that the peer is the same model, and what a run leaves."""

import numpy as np
import pytest
import torch

from lmsys import records
from lmsys.bench import experiment, train_step
from lmsys.bench.peers import NativeLM, NativeStep
from lmsys.bench.steps import Subject, alone
from lmsys.config import ModelConfig
from lmsys.model import TransformerLM, cross_entropy
from lmsys.train.engine import Engine

CPU = torch.device("cpu")


def parameters(scale="smoke", **given):
    return train_step.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | given)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, p = tmp_path_factory.mktemp("train_step"), parameters()
    frame = experiment.run(train_step.TRAIN_STEP, p, folder=folder)
    return p, frame, records.read_results(folder / "train_step_losses.csv"), folder


@pytest.mark.parametrize("tied", [False, True])
def test_the_peer_is_the_same_model(tied):
    torch.manual_seed(0)
    config = ModelConfig(16, 32, 2, 2, 12, 40, tie_embeddings=tied)
    ours, theirs = TransformerLM(config), NativeLM(config)
    theirs.load_state_dict(ours.state_dict(), strict=not tied)
    ids, targets = torch.randint(40, (2, 3, 12))
    loss, other = cross_entropy(ours(ids), targets), theirs(ids, targets)
    torch.testing.assert_close(loss, other)
    for one in (loss, other):
        one.backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


def test_every_point_trains_alike(measured):
    p, frame, losses, folder = measured
    assert (frame.status == "ok").all(), frame.note.tolist()
    names = ["fused_loss", "fused_rope", "merged_gate", "fused_optimizer"]
    assert list(frame.option) == ["all", "all", "written", *names, "none"]
    assert list(frame.implementation) == ["torch_native"] + 7 * ["lmsys"]
    assert (losses.groupby(["implementation", "option"]).step.max() == p.loss_steps).all()
    curves = losses.pivot(index="step", columns=["implementation", "option"], values="loss")
    assert np.abs(curves.sub(curves["torch_native", "all"], axis=0)).to_numpy().max() < 1e-4
    assert curves.iloc[0].iloc[0] != curves.iloc[-1].iloc[0]
    assert (frame.peak_mib > 0).all() and (frame.p20_ms <= frame.step_ms).all() and frame.host_ms.isna().all()
    same = records.compare(folder / "train_step_results.csv", folder / "train_step_results.csv")
    assert same.verdict.eq("same").all()


def test_updates_are_the_trainers_own_and_the_peers_the_same():
    """Weights after a few steps: the trainer's with every option, and the peer's."""
    p, weights = parameters(), []
    for point in train_step.points(p)[:2]:
        make = NativeStep if point["implementation"] == "torch_native" else Engine
        subject = Subject(alone(CPU), train_step.config_of(p, point), make=make)
        for _ in range(3):
            subject.step()
        weights.append(subject.engine.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def test_points_of_the_full_scale():
    p = parameters("full", attention_kernel="vectorized_torch", compile=False)
    found = train_step.points(p)
    assert [point["local_batch"] for point in found if point["option"] == "none"] == [32, 16]
    assert "autotune" not in p.options and "written" not in {point["option"] for point in found}
    assert len(found) == 2 + 5 + 1 + 3
    trains = {
        (point["size"], point["implementation"], point["option"]): train_step.config_of(p, point).train
        for point in found
    }
    everything, nothing = trains["gpt2", "lmsys", "all"], trains["gpt2", "lmsys", "none"]
    assert everything.fused_rope and everything.residual_dtype == "bf16" and everything.fused_loss
    assert not (nothing.fused_optimizer or nothing.fused_rope or nothing.merged_gate or nothing.residual_dtype)
    without = trains["gpt2", "lmsys", "fused_optimizer"]
    assert not without.fused_optimizer and without.fused_loss
    assert trains["gpt2", "lmsys", "bf16_residual"].residual_dtype is None


def test_written_blocks_take_the_place_of_compiled_ones(monkeypatch):
    monkeypatch.setattr(train_step, "check_setup", lambda *given: None)
    p = parameters("full")
    trains = {
        point["option"]: train_step.config_of(p, point).train
        for point in train_step.points(p)
        if point["implementation"] == "lmsys"
    }
    written, fused, plain = (trains[option] for option in ("written", "all", "none"))
    assert written.written_backward and not (written.compile or written.fused_rope) and written.fused_loss
    assert fused.compile and fused.fused_rope and not fused.written_backward
    assert plain.compile and not (plain.written_backward or plain.fused_loss)


def test_a_point_that_fails_is_a_row(tmp_path, monkeypatch):
    def full(self, sampler):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(NativeStep, "accumulate", full)
    frame = experiment.run(train_step.TRAIN_STEP, parameters(options=["fused_loss"]), folder=tmp_path)
    assert list(frame.status) == ["oom", "ok", "ok", "ok"] and "Tried to allocate" in frame.note[0]
    losses = records.read_results(tmp_path / "train_step_losses.csv")
    assert set(losses.implementation) == {"lmsys"}
    assert train_step.beside(frame, losses)["times lmsys"][1] == 1.0


def test_parameters_that_cannot_be():
    cases = {
        "unknown option 'fused_los'": {"options": ["fused_los"]},
        "does not go with dtype fp32": {"options": ["bf16_residual"]},
        "option autotune does not go with": {"options": ["autotune"]},
        "unknown size 'gpt-2'": {"sizes": ["gpt-2"]},
        "timed_steps is 0": {"timed_steps": 0},
        "sizes must not be empty": {"sizes": []},
        "unknown dtype": {"dtype": "fp8"},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            parameters(**given)
