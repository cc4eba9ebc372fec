"""The training step taken apart: what its points set, that the peer is the same model, and the files that a run leaves."""

import numpy as np
import pytest
import torch

from lmsys import records
from lmsys import train as training
from lmsys.bench import train_step
from lmsys.bench.peers import NativeLM, NativeStep
from lmsys.config import ModelConfig
from lmsys.model import TransformerLM, cross_entropy
from lmsys.train.engine import Engine


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_step")
    chosen = train_step.settings("smoke", device="cpu")
    return chosen, *train_step.run(chosen, folder), folder


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
    chosen, frame, losses, _ = measured
    assert (frame.status == "ok").all(), frame.note.tolist()
    names = ["written_backward", "fused_loss", "fused_rope", "merged_gate", "fused_optimizer"]
    assert list(frame.option) == ["all", "all", *names, "none"]
    assert list(frame.implementation) == ["torch_native"] + 7 * ["lmsys"]
    assert (losses.groupby(["implementation", "option"]).step.max() == chosen.loss_steps).all()
    curves = losses.pivot(index="step", columns=["implementation", "option"], values="loss")
    assert np.abs(curves.sub(curves["torch_native", "all"], axis=0)).to_numpy().max() < 1e-4
    assert curves.iloc[0].iloc[0] != curves.iloc[-1].iloc[0]
    assert (frame.peak_mib > 0).all() and (frame.p20_ms <= frame.step_ms).all()


def test_updates_are_the_trainers_own_and_the_peers_the_same():
    """Weights after a few steps: the trainer's with every option, and the peer's."""
    chosen = train_step.settings("smoke", device="cpu")
    made = []
    for point in train_step.points(chosen)[:2]:
        config = train_step.pipeline_config(chosen, point)
        step = NativeStep(config, torch.device("cpu")) if point.implementation == "torch_native" else None
        step = step or Engine(config, torch.device("cpu"), None)
        sampler = train_step._sampler(chosen, config)
        for _ in range(3):
            step.accumulate(sampler)
            step.update(1e-3)
        made.append(step.model.state_dict())
    for name, weight in made[0].items():
        torch.testing.assert_close(made[1][name], weight, rtol=1e-4, atol=1e-5)


def test_what_is_written(measured):
    _, frame, losses, folder = measured
    written = train_step.write_report(frame, losses, folder)
    assert sorted(written) == ["loss", "options", "report"]
    assert all(path.stat().st_size > 500 for path in written.values())
    text = written["report"].read_text()
    assert "beside PyTorch" in text and "without fused_rope" in text
    assert "tiny, `written_backward` " in text and "tiny, without written_backward, `fused_rope` " in text
    assert (
        records.compare(folder / "train_step_results.csv", folder / "train_step_results.csv").verdict.eq("same").all()
    )
    assert len(train_step.row_line(frame.iloc[0].to_dict()).splitlines()) == 1


def test_the_hosts_share_is_told(measured):
    _, frame, losses, _ = measured
    assert frame.host_ms.isna().all() and "host" not in " ".join(train_step.conclusions(frame, losses))
    for host_ms, said in ((0.5, "never waits"), (2.0, "GPU waits")):
        times = frame.assign(step_ms=1.0, host_ms=host_ms)
        assert said in " ".join(train_step.conclusions(times, losses))


def test_points_of_the_full_scale(monkeypatch):
    chosen = train_step.settings("full", kernel="vectorized_torch", compiled=False, device="cpu")
    assert chosen.batch == (32, 16) and "autotune" not in chosen.options
    found = train_step.points(chosen)
    assert len(found) == 2 + 5 + 1 + 3
    trains = {(p.size, p.implementation, p.option): train_step.pipeline_config(chosen, p).train for p in found}
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    shares = train_step._shares(chosen)
    assert sorted(str(point) for share in shares for point in share) == sorted(map(str, found))
    assert list(map(len, shares)) == [1, 1, 3, 2, 2, 2]
    everything, nothing = trains["gpt2", "lmsys", "all"], trains["gpt2", "lmsys", "none"]
    assert "written_backward" not in chosen.options and everything.fused_rope
    assert everything.residual_dtype == "bf16" and everything.fused_loss
    assert not (nothing.fused_optimizer or nothing.fused_rope or nothing.merged_gate)
    without = trains["gpt2", "lmsys", "fused_optimizer"]
    assert not without.fused_optimizer and without.fused_loss
    assert trains["gpt2", "lmsys", "bf16_residual"].residual_dtype == "fp32"


def test_a_written_backward_pass_takes_the_place_of_compiled_blocks(monkeypatch):
    monkeypatch.setattr(training, "check_setup", lambda *given: None)
    chosen = train_step.settings("full", device="cpu")
    found = train_step.points(chosen)
    trains = {
        (p.size, p.option): train_step.pipeline_config(chosen, p).train for p in found if p.implementation == "lmsys"
    }
    for size in chosen.sizes:
        everything, compiled, nothing = (trains[size, option] for option in ("all", "written_backward", "none"))
        assert everything.written_backward and not (everything.compile or everything.fused_rope)
        assert everything.fused_loss and everything.residual_dtype == "bf16"
        assert compiled.compile and compiled.fused_rope and not compiled.written_backward
        assert nothing.compile and not (nothing.written_backward or nothing.fused_loss)
    assert all(not train.written_backward for (_, option), train in trains.items() if option != "all")
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    ahead = [point for share in train_step._shares(chosen) for point in share]
    assert [point for point in found if point not in ahead] == [
        p for p in found if p.implementation == "lmsys" and p.option == "all"
    ]


def test_a_point_that_fails_is_a_row(tmp_path, monkeypatch):
    def full(self, sampler):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(NativeStep, "accumulate", full)
    chosen = train_step.settings("smoke", device="cpu", options=["fused_loss"])
    frame, losses = train_step.run(chosen, tmp_path)
    assert list(frame.status) == ["oom", "ok", "ok"] and "Tried to allocate" in frame.note[0]
    assert set(losses.implementation) == {"lmsys"}
    train_step.write_report(frame, losses, tmp_path)


def test_settings_that_cannot_be():
    cases = {
        "unknown option 'fused_los'": {"options": ["fused_los"]},
        "does not go with dtype fp32": {"options": ["bf16_residual"]},
        "option autotune does not go with": {"options": ["autotune"]},
        "unknown model size": {"sizes": ["gpt-2"]},
        "timed_steps is 0": {"timed_steps": 0},
        "sizes is empty": {"sizes": []},
        "unknown dtype": {"dtype": "fp8"},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            train_step.settings("smoke", device="cpu", **given)
