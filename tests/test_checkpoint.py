"""Checkpoints: what they hold, that they are whole or absent, and what is said of a damaged one."""

import json
import random
import resource
import signal
import warnings

import pytest
import torch

from lmsys.config import ModelConfig, PipelineConfig, TokenizerConfig, to_dict
from lmsys.model import TransformerLM
from lmsys.step.optimizer import AdamW, parameter_groups
from lmsys.train import checkpoint

SAMPLER = {"draws": 3, "seed": 2**70}


def trained(tied: bool = False):
    """A small model after two steps, its optimizer and config."""
    torch.manual_seed(0)
    config = PipelineConfig(
        model=ModelConfig(16, 24, 2, 2, 8, 300, tie_embeddings=tied), tokenizer=TokenizerConfig(vocab_size=300)
    )
    model = TransformerLM(config.model)
    optimizer = AdamW(parameter_groups(model, 0.1), lr=0.1 + 0.2)
    for _ in range(2):
        model(torch.randint(300, (2, 8))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, config


def save(folder, step, parts=None, **options):
    model, optimizer, config = parts or trained()
    state = {"sampler_state": SAMPLER, "config": config, "extra": {"steps": 9}}
    state |= {"weights": checkpoint.model_weights(model), "optimizer": optimizer.state_dict()}
    kept = {name: options.pop(name) for name in ("keep_last", "keep_best") if name in options}
    return checkpoint.write(folder, checkpoint.snapshot(step, **(state | options)), **kept)


@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back_exactly(tmp_path, tied):
    model, optimizer, config = trained(tied)
    path = save(tmp_path, 12, (model, optimizer, config))
    assert path == tmp_path / "step-00000012"
    assert {file.name for file in path.iterdir()} == {
        *("model.safetensors", "optimizer.safetensors", "state.json", "checksums.json")
    }
    saved = checkpoint.load(path)
    assert (saved.step, saved.sampler, saved.config, saved.extra) == (12, SAMPLER, to_dict(config), {"steps": 9})

    twin, twin_optimizer, _ = trained(tied)
    for parameter in twin.parameters():
        parameter.data.zero_()
    checkpoint.load_weights(twin, saved.weights)
    twin_optimizer.load_state_dict(saved.optimizer)
    assert twin_optimizer.param_groups[0]["lr"] == 0.1 + 0.2
    ids = torch.randint(300, (2, 8))
    for one, one_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        one(ids).square().mean().backward()
        one_optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_states_come_back():
    state = json.loads(json.dumps(checkpoint.rng_state()))
    expected = random.random(), torch.rand(3), random.gauss(0, 1)
    torch.rand(5)
    checkpoint.set_rng_state(state)
    again = random.random(), torch.rand(3), random.gauss(0, 1)
    assert again[0] == expected[0] and torch.equal(again[1], expected[1]) and again[2] == expected[2]


def test_keep_last_keeps_the_newest(tmp_path):
    parts = trained()
    for step in (5, 10, 15):
        save(tmp_path, step, parts, keep_last=2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000010", "step-00000015"]
    save(tmp_path, 7, parts, keep_last=1)  # a run that went back to an earlier step leaves later ones alone
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000007", "step-00000010", "step-00000015"]
    save(tmp_path, 100_000_000_000, parts, keep_last=1)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-100000000000"]


def test_the_same_step_is_replaced(tmp_path):
    parts = trained()
    save(tmp_path, 5, parts)
    path = save(tmp_path, 5, parts, extra={"steps": 77})
    assert checkpoint.load(path).extra == {"steps": 77}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_with_the_newest_good_one(tmp_path, name, how):
    parts = trained()
    good, bad = save(tmp_path, 5, parts), save(tmp_path, 10, parts)
    file = bad / name
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(ValueError) as error:
        checkpoint.load(bad)
    named = "model.safetensors" if (name, how) == ("checksums.json", "flipped") else name
    assert str(bad) in str(error.value) and f"the newest good one is {good}" in str(error.value)
    assert named in str(error.value) or name in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="step-00000005"):
        checkpoint.load_model(bad)
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint: .*step-00000010"):
        assert checkpoint.latest(tmp_path) == good


def test_latest_of_nothing_and_a_missing_path(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.latest(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match=r"no checkpoint at .*step-00000003; no good one lies beside it"):
        checkpoint.load(tmp_path / "step-00000003")
    with pytest.raises(ValueError, match="no model at"):
        checkpoint.load_model(tmp_path / "model.safetensors")


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path):
    parts = trained()
    good = save(tmp_path, 5, parts)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        for step in (5, 10):
            with pytest.raises(OSError, match=r"model\.safetensors"):
                save(tmp_path, step, parts, keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [entry.name for entry in tmp_path.iterdir()] == [good.name]
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before
    checkpoint.load(good)


def test_an_unwritable_place_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file", 5)


def test_leftovers_of_a_killed_save_go(tmp_path):
    (tmp_path / ".step-00000004-abc").mkdir()
    save(tmp_path, 5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    path = save(tmp_path, 5)

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for place in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(place, refuse)
    checkpoint.load(path)
    checkpoint.load_model(path)


@pytest.mark.parametrize("tied", [False, True])
def test_exported_weights_are_a_model(tmp_path, tied):
    model, optimizer, config = trained(tied)
    path = save(tmp_path / "checkpoints", 5, (model, optimizer, config))
    file = checkpoint.export_weights(path, tmp_path / "out" / "model.safetensors")
    ids = torch.randint(300, (2, 8))
    for source in (path, file):
        loaded, loaded_config = checkpoint.load_model(source)
        assert loaded_config == config.model
        assert torch.equal(loaded(ids), model(ids))


def test_files_that_are_no_model_are_named(tmp_path):
    from safetensors.torch import save_file

    other, cut = tmp_path / "other.safetensors", tmp_path / "cut.safetensors"
    save_file({"x": torch.ones(2)}, other)
    cut.write_bytes(other.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"other\.safetensors has no model_config"):
        checkpoint.load_model(other)
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file"):
        checkpoint.load_model(cut)


def test_weights_of_another_shape_are_named():
    model = TransformerLM(ModelConfig(16, 24, 2, 2, 8, 300))
    other = TransformerLM(ModelConfig(16, 32, 2, 2, 8, 300))
    with pytest.raises(
        ValueError, match=r"layers\.0\.ffn\.w1\.weight is \(32, 16\) in the file and \(24, 16\) in the model"
    ):
        checkpoint.load_weights(model, other.state_dict())
    tied = TransformerLM(ModelConfig(16, 24, 2, 2, 8, 300, tie_embeddings=True))
    with pytest.raises(ValueError, match=r"lm_head\.weight is absent in the file"):
        checkpoint.load_weights(model, tied.state_dict())
