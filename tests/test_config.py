import dataclasses
import json

import pytest

from lmsys.config import (
    MODEL_SIZES,
    ModelConfig,
    PipelineConfig,
    TrainConfig,
    build,
    model_size,
    pipeline_config,
    resolve_scale,
    to_dict,
)
from lmsys.pipeline import DEFAULT_CONFIG, settings


def write(tmp_path, value, name="config.json"):
    path = tmp_path / name
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
def test_presets_are_valid_and_round_trip(scale):
    config = pipeline_config(scale)
    assert config.scale == scale
    assert build(PipelineConfig, to_dict(config)) == config


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
def test_default_pipeline_json_agrees_with_the_presets(scale):
    assert pipeline_config(scale, DEFAULT_CONFIG) == pipeline_config(scale)


def test_override_precedence(tmp_path):
    """Preset of the scale < file < --override < named flag; a later override wins over an earlier one."""
    assert pipeline_config("smoke").train.batch_size == 4
    file = write(tmp_path, {"train": {"batch_size": 5, "seed": 3, "dtype": "bf16"}})
    assert pipeline_config("smoke", file).train.batch_size == 5
    overrides = ["train.batch_size=6", "train.batch_size=7", "train.attention_kernel=vectorized_torch"]
    config = pipeline_config("smoke", file, overrides)
    assert (config.train.batch_size, config.train.seed, config.train.dtype) == (7, 3, "bf16")
    config = pipeline_config("smoke", file, overrides, {"train.batch_size": 8, "train.attention_kernel": None})
    assert (config.train.batch_size, config.train.attention_kernel) == (8, "vectorized_torch")
    config = settings("smoke", file, overrides, attention_kernel="flash_attention_torch", run_dir="runs/other")
    assert (config.train.attention_kernel, config.run_dir) == ("flash_attention_torch", "runs/other")


def test_scale_comes_from_the_argument_the_file_or_the_environment(tmp_path, monkeypatch):
    file = write(tmp_path, {"scale": "smoke"})
    assert pipeline_config(None, file).scale == "smoke"
    assert pipeline_config("cpu", file).scale == "cpu"
    monkeypatch.setenv("LMSYS_SCALE", "smoke")
    assert resolve_scale("auto") == "smoke"
    assert resolve_scale("cpu") == "cpu"
    with pytest.raises(ValueError, match="unknown scale 'huge'.*smoke"):
        resolve_scale("huge")


def test_checkpoint_interval_names(tmp_path):
    """checkpointing_every is the same setting; save_interval is older and gives way to either, whatever the layer."""

    def interval(train, overrides=()):
        return pipeline_config("smoke", write(tmp_path, {"train": train}), overrides).train.checkpointing_interval

    assert interval({}) == 5  # the preset's
    assert interval({"checkpointing_every": 7}) == 7
    assert interval({"save_interval": 8}) == 8
    assert interval({"save_interval": 8, "checkpointing_interval": 9}) == 9
    assert interval({"save_interval": 8, "checkpointing_every": 0}) == 0
    assert interval({"checkpointing_interval": 9}, ["train.save_interval=3"]) == 9
    assert interval({"checkpointing_interval": 9}, ["train.checkpointing_every=-1"]) == -1
    with pytest.raises(ValueError, match="one setting with two values"):
        interval({"checkpointing_interval": 9, "checkpointing_every": 8})
    with pytest.raises(ValueError, match="must be int"):
        interval({"save_interval": "often"})


def test_epochs_take_the_place_of_the_presets_steps():
    config = pipeline_config("smoke", overrides=["train.epochs=2"])
    assert (config.train.steps, config.train.epochs) == (None, 2.0)
    with pytest.raises(ValueError, match="exactly one of train.steps"):
        pipeline_config("smoke", overrides=["train.epochs=2", "train.steps=5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=5", "unknown key 'train.stpes'. Did you mean 'train.steps'"),
        ("trian.steps=5", "unknown key 'trian'. Did you mean 'train'"),
        ("train=5", "'train' is a section"),
        ("train.steps", "section.key=value"),
        ("train.steps=many", "'train.steps' must be int or null, got \"many\""),
        ("train.steps=true", "'train.steps' must be int"),
        ("train.steps=1.5", "'train.steps' must be int"),
        ("optim.learning_rate=NaN", "'optim.learning_rate' must be float"),
        ("train.steps=0", "at least 1"),
        ("tokenizer.vocab_size=256", "at least 257"),
        ("tokenizer.special_tokens=[]", "<\\|endoftext\\|>"),
        ("model.num_heads=5", "not a multiple"),
        ("model.d_model=6", "even head_dim"),
        ("optim.warmup_steps=11", "more than train.steps"),
        ("optim.min_learning_rate=1", "between 0 and optim.learning_rate"),
        ("data.dataset_mode=web", "unknown data.dataset_mode 'web'.*tinystories"),
        ("data.dataset_mode=local_text", "needs data.text_path"),
        ("data.dataset_mode=local_npy", "needs data.train_tokens_path"),
        ("data.valid_fraction=1", "between 0 and 1"),
        ("train.dtype=fp8", "unknown train.dtype"),
        ("train.processes=0", "train.processes is 0"),
        ("train.sharded_optimizer=true", "among processes and train.ddp_wrapper 'none' is for one"),
        ("train.reduce_scatter_gradients=true", "an option of train.sharded_optimizer"),
        ("train.bucket_size_mb=5", "train.bucket_size_mb is an option of flashddp, torch_ddp"),
        ("generate.top_p=0", "top_p"),
        ("wandb.mode=maybe", "unknown wandb.mode"),
    ],
)
def test_bad_settings_are_errors(override, message):
    with pytest.raises(ValueError, match=message):
        pipeline_config("smoke", overrides=[override])


@pytest.mark.parametrize(
    ("wrapper", "override", "message"),
    [
        ("fsdp", "sharded_optimizer=true", "what train.ddp_wrapper 'fsdp' has sharded already"),
        ("torch_fsdp2", "sharded_optimizer=true", "what train.ddp_wrapper 'torch_fsdp2' has sharded already"),
        ("fsdp", "communication_dtype=bf16", "'fsdp' does not take it"),
        ("flat", "bucket_size_mb=1", "'flat' does not take it"),
        ("fsdp", "dtype=fp16", "each process must see whole; with train.ddp_wrapper 'fsdp'"),
        ("flashddp", "dtype=fp8", "unknown train.dtype 'fp8'.*fp16"),
        ("flashddp", "bucket_size_mb=-1", "bucket_size_mb is -1.0; it must be positive, or 0"),
        ("torch_ddp", "transport=nccl", "'torch_ddp' does not take it"),
        ("flashddp", "transport=pigeon", "unknown train.transport 'pigeon'.*copy_engine"),
        ("flashddp", "communication_dtype=fp16", "unknown train.communication_dtype 'fp16'.*bf16"),
    ],
)
def test_settings_that_a_wrapper_does_not_take(wrapper, override, message):
    with pytest.raises(ValueError, match=message):
        pipeline_config("smoke", overrides=[f"train.ddp_wrapper={wrapper}", f"train.{override}"])


def test_bad_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no config file at"):
        pipeline_config("smoke", tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json: not a JSON file"):
        pipeline_config("smoke", broken)
    with pytest.raises(ValueError, match="expected a JSON object"):
        pipeline_config("smoke", write(tmp_path, [1]))
    with pytest.raises(ValueError, match="unknown scale '3'"):
        pipeline_config(None, write(tmp_path, {"scale": 3}))


def test_model_sizes_of_the_courses_table():
    xl = model_size("xl")
    assert (xl.d_model, xl.d_ff, xl.num_layers, xl.num_heads, xl.head_dim, xl.vocab_size) == (
        1600,
        6400,
        48,
        25,
        64,
        10_000,
    )
    assert model_size("gpt2").vocab_size == 50_304
    assert {"small", "medium", "large", "xl", "2.7b"} <= set(MODEL_SIZES)
    with pytest.raises(ValueError, match="unknown model size 'smal'. Did you mean 'small'"):
        model_size("smal")


def test_a_step_preset_sets_the_switches_that_are_not_given():
    full = pipeline_config("full", overrides=["train.merged_gate=false"])
    train = full.train
    assert train.compile and train.fused_loss and train.fused_rope and train.fused_optimizer and not train.merged_gate
    assert train.residual_dtype == "bf16" and not train.written_backward
    assert build(PipelineConfig, to_dict(full)) == full
    plain = TrainConfig()
    assert not (plain.compile or plain.fused_loss or plain.fused_optimizer) and plain.residual_dtype is None
    written = TrainConfig(step_preset="written", attention_kernel="flash_attention_torch")
    assert written.written_backward and written.fused_loss and not written.compile and written.residual_dtype is None


def test_what_a_preset_sets_gives_way_to_the_wrapper_and_what_is_given_does_not():
    given = {"step_preset": "fused", "ddp_wrapper": "flat", "sharded_optimizer": True}
    assert not TrainConfig(**given).fused_optimizer
    with pytest.raises(ValueError, match="train.fused_optimizer=false"):
        TrainConfig(**given, fused_optimizer=True)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().d_model = 3
