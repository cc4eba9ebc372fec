"""The training loop: what it computes, saves and logs; exact resume; what it refuses before it starts."""

import csv
import dataclasses
import functools
import json
import math
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_generate import ByteTokenizer

from lmsys import cost
from lmsys.config import ModelConfig, PipelineConfig, build, to_dict
from lmsys.model import TransformerLM
from lmsys.train import History, checkpoint, checks, engine, init_wandb, logged, loop, total_steps, train
from lmsys.train.engine import evaluate
from lmsys.train.log import COLUMNS

TEXT = "Once upon a time there was a cat. The cat sat on a mat. The mat was flat. " * 30
TOKENS = np.frombuffer(TEXT.encode(), dtype=np.uint8).astype(np.uint16)
SETTINGS = {
    "tokenizer": {"vocab_size": 257},
    "model": {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "context_length": 16, "vocab_size": 257},
    "optim": {"warmup_steps": 2, "learning_rate": 1e-2},
    "train": {
        "steps": 10,
        "batch_size": 4,
        "eval_interval": 4,
        "eval_batches": 2,
        "sample_interval": 4,
        "log_interval": 1,
        "checkpointing_interval": 5,
        "device": "cpu",  # whose sums are the same bits in every run
    },
    "generate": {"max_new_tokens": 8, "prompts": ["The", ""]},
}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for two threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**sections) -> PipelineConfig:
    values = {name: dict(section) for name, section in SETTINGS.items()}
    for section, overrides in sections.items():
        values.setdefault(section, {}).update(overrides)
    return build(PipelineConfig, values)


def run(run_dir=None, on_step=None, tokens=TOKENS, tokenizer=None, **sections) -> History:
    return train(
        config(**sections),
        train_tokens=tokens,
        valid_tokens=TOKENS[:500],
        tokenizer=tokenizer,
        run_dir=run_dir,
        progress=False,
        on_step=on_step,
    )


class Interrupted(Exception):
    pass


def interrupt_at(step: int):
    def on_step(done: int, _loss: torch.Tensor) -> None:
        if done == step:
            raise Interrupted

    return on_step


def saved_steps(run_dir) -> list[int]:
    return [checkpoint.load(path).step for path in checkpoint.steps(run_dir / "checkpoints")]


WHAT_IS_COMPUTED = ("step", "tokens", "train_loss", "valid_loss", "learning_rate", "grad_norm")


def computed(history: History) -> list[list]:
    return [[row[name] for name in WHAT_IS_COMPUTED] for row in history.rows]


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "steps", "expected"),
    [(5, 10, [5, 10]), (4, 10, [4, 8, 10]), (3, 3, [3]), (100, 7, [7]), (0, 6, [6]), (-1, 6, [6])],
)
def test_checkpoint_cadence_and_final_save(tmp_path, interval, steps, expected):
    history = run(tmp_path, train={"checkpointing_interval": interval, "steps": steps, "keep_checkpoints": 9})
    assert saved_steps(tmp_path) == expected
    assert history.checkpoint == tmp_path / "checkpoints" / f"step-{steps:08d}"


def test_only_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path, train={"checkpointing_interval": 2, "keep_checkpoints": 2})
    assert saved_steps(tmp_path) == [8, 10]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_exact_resume(tmp_path, dtype):
    """An interrupted run, resumed, equals an uninterrupted one bit for bit; samples and evaluation disturb nothing."""
    settings = {"dtype": dtype, "gradient_accumulation_steps": 2}
    tokenizer = ByteTokenizer()
    whole = run(tmp_path / "whole", tokenizer=tokenizer, train=settings)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", tokenizer=tokenizer, on_step=interrupt_at(7), train=settings)
    torch.rand(100)  # a new process would have another random state
    resumed = run(tmp_path / "parts", tokenizer=tokenizer, train=settings)
    assert resumed.resumed_from == 5 and whole.resumed_from is None
    assert computed(resumed) == computed(whole)
    assert resumed.samples == whole.samples
    one, two = (checkpoint.load(history.checkpoint) for history in (whole, resumed))
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    for index, state in one.optimizer["state"].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(two.optimizer["state"][index][name]))
            for name, value in state.items()
        )
    without = run(train=settings | {"eval_interval": 0})  # neither samples nor files nor evaluation in between
    assert [row["train_loss"] for row in without.rows] == [row["train_loss"] for row in whole.rows]


def test_exact_resume_between_rows(tmp_path):
    """Rows average the steps since the last one: a checkpoint between two rows of the log closes a window."""
    settings = {"log_interval": 3, "checkpointing_interval": 5, "eval_interval": 0, "sample_interval": 0}
    whole = run(tmp_path / "whole", train=settings)
    assert [row["step"] for row in whole.rows] == [3, 5, 6, 9, 10]
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", on_step=interrupt_at(8), train=settings)
    assert computed(run(tmp_path / "parts", train=settings)) == computed(whole)


def test_a_finished_run_does_nothing_and_says_so(tmp_path, capsys):
    first = run(tmp_path, tokenizer=ByteTokenizer())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = run(tmp_path, tokenizer=ByteTokenizer(), on_step=interrupt_at(1))
    assert "is finished: step 10 of 10; nothing to do" in capsys.readouterr().out
    assert again.rows == first.rows and again.samples == first.samples
    assert (again.checkpoint, again.resumed_from, again.valid_loss) == (first.checkpoint, 10, first.valid_loss)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_can_go_on(tmp_path):
    run(tmp_path, train={"steps": 5})
    history = run(tmp_path, train={"steps": 8})
    assert history.resumed_from == 5 and [row["step"] for row in history.rows] == list(range(1, 9))


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path):
    whole = run(tmp_path)
    weights = tmp_path / "checkpoints" / "step-00000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"damaged checkpoint: .*step-00000010.*model\.safetensors"):
        history = run(tmp_path, train={"keep_checkpoints": 1})
    assert history.resumed_from == 5 and computed(history) == computed(whole)
    assert saved_steps(tmp_path) == [10]


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "d_ff", 48),
        ("model", "context_length", 8),
        ("model", "tie_embeddings", True),
        ("optim", "learning_rate", 5e-3),
        ("train", "batch_size", 8),
        ("train", "seed", 1),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, section, name, value):
    old = SETTINGS[section].get(name, getattr(getattr(config(), section), name))
    run(tmp_path, train={"steps": 5})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=rf"cannot resume .*{section}\.{name} is {value} and was {old}.*train\.resume=false"
    ):
        run(tmp_path, **{section: {name: value}})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming_on_other_tokens_is_refused(tmp_path):
    run(tmp_path, train={"steps": 5})
    with pytest.raises(ValueError, match="the training tokens are other ones"):
        run(tmp_path, tokens=TOKENS[::-1].copy())


def test_starting_anew_puts_the_earlier_run_aside(tmp_path, capsys):
    run(tmp_path)
    earlier = (tmp_path / "metrics.csv").read_bytes()
    for _ in range(2):
        history = run(tmp_path, train={"resume": False, "steps": 3, "seed": 1})
        assert history.resumed_from is None and saved_steps(tmp_path) == [3]
        assert "starting anew" in capsys.readouterr().out
        if earlier is not None:
            assert (tmp_path / "previous" / "metrics.csv").read_bytes() == earlier
            assert saved_steps(tmp_path / "previous") == [5, 10]
        earlier = None
    assert saved_steps(tmp_path / "previous") == [3]


# --- What it computes -----------------------------------------------------------------------------


def test_a_tiny_text_is_learned():
    history = run(train={"steps": 80, "batch_size": 8, "eval_interval": 40, "sample_interval": 0})
    assert history.rows[0]["train_loss"] == pytest.approx(math.log(257), abs=1.5)
    assert history.rows[-1]["train_loss"] < 1.5 and history.valid_loss < 1.5


def test_accumulated_gradients_are_those_of_the_big_batch(monkeypatch):
    class Stream:
        """Windows of the tokens in order, whatever the batch size."""

        def __init__(self, tokens, batch_size, context_length, **_):
            self.tokens, self.batch_size, self.length, self.at = tokens, batch_size, context_length, 0

        def next(self):
            rows = [self.tokens[self.at + i : self.at + i + self.length + 1] for i in range(self.batch_size)]
            self.at += self.batch_size
            rows = np.stack(rows).astype(np.int64)
            return rows[:, :-1].copy(), rows[:, 1:].copy()

    monkeypatch.setattr(loop, "BatchSampler", Stream)
    big = run(train={"batch_size": 8, "eval_interval": 0})
    split = run(train={"batch_size": 2, "gradient_accumulation_steps": 4, "eval_interval": 0})
    for a, b in zip(big.rows, split.rows, strict=True):
        assert (a["tokens"], a["train_loss"]) == (b["tokens"], pytest.approx(b["train_loss"], rel=1e-4))
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_settings_reach_the_optimizer():
    history = run(optim={"warmup_steps": 4, "learning_rate": 0.4, "min_learning_rate": 0.04, "max_grad_norm": 1e-9})
    rates = [row["learning_rate"] for row in history.rows]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4]) and rates[-1] == pytest.approx(0.04)
    assert rates[6] == pytest.approx(0.04 + 0.36 * (1 + math.cos(math.pi / 2)) / 2)
    assert all(row["grad_norm"] > 1e-3 for row in history.rows)  # reported as it was before clipping


def test_fp16_skips_a_step_whose_gradients_overflow(tmp_path):
    """A loss scale beyond fp16 makes the first gradients infinite: weights stay, the scale falls, training goes on."""
    scales, weights = [], []
    make = loop.Engine

    class Watched(make):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-14)

        def apply(self, learning_rate):
            before = [p.detach().clone() for p in self.strategy.parameters]
            super().apply(learning_rate)
            weights.append(all(torch.equal(a, b) for a, b in zip(before, self.strategy.parameters, strict=True)))
            scales.append(self.scaler.get_scale())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Engine", Watched)
        history = run(tmp_path, train={"dtype": "fp16", "steps": 40})
    skipped = [row["grad_norm"] is None for row in history.rows]
    assert skipped[0] and weights == skipped and not any(skipped[4:])
    assert scales[0] == 2.0**26 and scales[-1] <= scales[0]
    assert history.rows[-1]["train_loss"] < 0.8 * history.rows[0]["train_loss"]
    assert checkpoint.load(history.checkpoint).extra["scaler"]["scale"] == scales[-1]
    rows, _ = logged(tmp_path)
    assert rows[0]["grad_norm"] is None and rows[-1]["grad_norm"] == history.rows[-1]["grad_norm"]


def test_fp16_is_near_fp32():
    exact, half = run(), run(train={"dtype": "fp16"})
    for a, b in zip(exact.rows, half.rows, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.02)


def test_bf16_autocast_trains():
    settings = {"steps": 20, "batch_size": 8, "eval_interval": 0}
    exact, half = run(train=settings), run(train=settings | {"dtype": "bf16"})
    assert half.rows[-1]["train_loss"] == pytest.approx(exact.rows[-1]["train_loss"], abs=0.1)
    assert half.rows[-1]["train_loss"] != exact.rows[-1]["train_loss"]


@pytest.mark.parametrize("kernel", ["flash_attention_torch", "torch_sdpa_flash"])
def test_attention_kernel_selection(kernel, monkeypatch):
    used = []
    build_model = TransformerLM.__init__

    def note(self, config, *, attention_kernel):
        used.append(attention_kernel)
        build_model(self, config, attention_kernel=attention_kernel)

    monkeypatch.setattr(TransformerLM, "__init__", note)
    settings = {"steps": 3, "eval_interval": 0}
    other = run(train=settings | {"attention_kernel": kernel})
    plain = run(train=settings)
    assert used == [kernel, "vectorized_torch"]
    assert other.rows[-1]["train_loss"] == pytest.approx(plain.rows[-1]["train_loss"], rel=1e-3)


def test_compiled_training_agrees(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = {"steps": 3, "sample_interval": 0}
    compiled = run(tokenizer=ByteTokenizer(), train=settings | {"compile": True})
    plain = run(tokenizer=ByteTokenizer(), train=settings)
    for a, b in zip(compiled.rows, plain.rows, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert compiled.valid_loss == pytest.approx(plain.valid_loss, rel=1e-4)
    assert len(compiled.samples) == 2


def test_evaluation_is_the_mean_over_its_tokens():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(16, 32, 1, 2, 16, 257))
    tokens = TOKENS[: 16 * 7 + 1]
    inputs = torch.from_numpy(tokens[:-1].astype(np.int64)).view(7, 16)
    targets = torch.from_numpy(tokens[1:].astype(np.int64)).view(7, 16)
    expected = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    for batch_size in (1, 4, 7):  # 4: the last batch is smaller
        assert evaluate(model, tokens, batch_size=batch_size, max_batches=10) == pytest.approx(expected, rel=1e-5)


def test_mfu_is_flops_over_the_peak(monkeypatch):
    monkeypatch.setattr(loop.devices, "peak_flops", lambda _name, dtype: 1e12 if dtype == "fp32" else None)
    for row in run(train={"steps": 3}).rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * cost.train_flops_per_token(config().model) / 1e12)


def test_epochs_become_steps():
    by_epochs = config(
        train={"steps": None, "epochs": 2.0, "gradient_accumulation_steps": 2}, optim={"warmup_steps": 1}
    )
    assert total_steps(by_epochs, 16 * 4 * 2 * 5 + 1) == 11
    assert total_steps(by_epochs, 100) == 2
    assert total_steps(config(), 100) == 10


# --- What it writes -------------------------------------------------------------------------------


def test_metrics_and_samples_are_written_as_they_come(tmp_path):
    seen = []

    def on_step(step, loss):
        seen.append((step, loss.item(), len((tmp_path / "metrics.csv").read_text().splitlines())))

    history = run(tmp_path, tokenizer=ByteTokenizer(), on_step=on_step)
    assert [(step, lines) for step, _, lines in seen] == [(step, step + 1) for step in range(1, 11)]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["train_loss"]) for row in rows] == [loss for _, loss, _ in seen]
    assert [row["step"] for row in rows if row["valid_loss"]] == ["4", "8", "10"]
    assert rows[-1]["tokens"] == "640" and rows[-1]["mfu"] == ""
    frame = history.frame()
    assert tuple(frame.columns) == COLUMNS and len(frame) == 10
    assert frame["valid_loss"].iloc[-1] == history.valid_loss
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (s, p) for s in (4, 8, 10) for p in ("The", "")
    ]
    assert samples[0]["text"].startswith("The") and samples == history.samples


def test_intervals_below_one_mean_only_at_the_end(tmp_path):
    history = run(tmp_path, tokenizer=ByteTokenizer(), train={"eval_interval": 0, "sample_interval": -1})
    assert [row["step"] for row in history.rows if row["valid_loss"] is not None] == [10]
    assert {sample["step"] for sample in history.samples} == {10}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = run(tokenizer=ByteTokenizer())
    assert history.checkpoint is None and len(history.rows) == 10 and history.samples
    assert not list(tmp_path.iterdir())


def test_rows_cut_off_by_a_crash_are_dropped(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, on_step=interrupt_at(7))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,51")
    history = run(tmp_path)
    assert [row["step"] for row in history.rows] == list(range(1, 11))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 11


def test_wandb_logs_every_row(tmp_path):
    class Run:
        logged: list = []  # noqa: RUF012

        def log(self, row, step):
            self.logged.append((step, row))

    train(config(), train_tokens=TOKENS, valid_tokens=TOKENS[:500], progress=False, wandb_run=Run())
    assert [step for step, _ in Run.logged] == list(range(1, 11))
    assert "valid_loss" in Run.logged[3][1] and "valid_loss" not in Run.logged[0][1]


def test_wandb_is_offline_without_a_login_and_obeys_its_variable(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    started = init_wandb(config(), tmp_path / "run")
    assert started.settings.mode == "offline" and started.config["model"]["d_model"] == 16
    started.log({"train_loss": 1.0}, step=1)
    started.finish()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    off = init_wandb(
        dataclasses.replace(config(), wandb=build(type(config().wandb), {"mode": "offline"})), tmp_path / "off"
    )
    assert off is None and not (tmp_path / "off" / "wandb").exists()


def test_a_run_goes_on_without_wandb_unless_it_is_to_be_online(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for mode, told in (("disabled", ""), ("offline", "wandb is not installed"), ("auto", "wandb is not installed")):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert init_wandb(config(), tmp_path) is None
        assert told in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb"):
        init_wandb(config(), tmp_path)


def test_a_smaller_last_batch_of_an_evaluation_is_not_compiled_anew(monkeypatch):
    """65 tokens are 4 windows of 16 and the next token: a batch of 3, and one of 1."""
    model = TransformerLM(config().model)
    usual = evaluate(model, TOKENS[:65], batch_size=3, max_batches=9)
    stances, model.compiled = [], True
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: (stances.append(stance), nullcontext())[1])
    assert evaluate(model, TOKENS[:65], batch_size=3, max_batches=9) == usual
    assert stances == ["force_eager"]


def test_a_run_closes_its_engine_however_it_ends(monkeypatch):
    closed, close = [], engine.Engine.close
    monkeypatch.setattr(engine.Engine, "close", lambda self: (closed.append(True), close(self)))
    train(config(), train_tokens=TOKENS, valid_tokens=TOKENS[:500], progress=False)

    def fails(step, loss):
        raise KeyError(step)

    with pytest.raises(KeyError):
        train(config(), train_tokens=TOKENS, valid_tokens=TOKENS[:500], progress=False, on_step=fails)
    assert closed == [True, True]


# --- What it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"attention_kernel": "flash"}}, "unknown .*kernel 'flash'"),
        ({"train": {"device": "tpu"}}, "tpu"),
        ({"train": {"ddp_wrapper": "flashddp"}}, "'flashddp' averages gradients .* this run has 1"),
        ({"train": {"compile": True, "device": "cpu", "attention_kernel": "flash_attention_triton"}}, "train.compile"),
        ({"model": {"context_length": 5000}}, "the training data have 2220 tokens, fewer than one context of 5000"),
        ({"model": {"context_length": 500}}, "the validation data have 500 tokens"),
        ({"model": {"vocab_size": None}}, "vocab_size is not set"),
        (
            {"train": {"steps": None, "epochs": 0.01}, "optim": {"warmup_steps": 50}},
            "warmup_steps 50 is more than the run's 1",
        ),
    ],
)
def test_bad_settings_are_found_before_any_work(tmp_path, sections, message, monkeypatch):
    if "triton" in str(sections):
        monkeypatch.setattr(checks, "check_support", lambda *_, **__: None)  # as where the interpreter is on
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "run", **sections)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_token_ids_beyond_the_vocabulary_are_found_before_any_work(tmp_path):
    tokens = TOKENS.copy()
    tokens[-1] = 300
    with pytest.raises(ValueError, match="the training data hold token id 300, outside the model's vocabulary of 257"):
        run(tmp_path / "run", tokens=tokens)
    with pytest.raises(ValueError, match="hold token id -1"):
        run(tmp_path / "run", tokens=np.where(tokens == 300, -1, tokens.astype(np.int32)))
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 400
    with pytest.raises(ValueError, match="the tokenizer's vocabulary of 400 is larger than model.vocab_size 257"):
        run(tmp_path / "run", tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_found_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to this folder"):
        run(tmp_path / "file" / "run", on_step=interrupt_at(1))


def test_too_little_disk_is_found_before_any_work(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="a checkpoint needs .* MB"):
        run(tmp_path, on_step=interrupt_at(1))


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch):
    true_loss, calls = engine.cross_entropy, []

    def spoiled(logits, targets):
        calls.append(1)
        return true_loss(logits, targets) * (math.nan if len(calls) == 7 else 1.0)

    monkeypatch.setattr(engine, "cross_entropy", spoiled)
    settings = {"log_interval": 10, "eval_interval": 0, "checkpointing_interval": 5}
    with pytest.raises(FloatingPointError, match="the loss is nan at step 7; .*step-00000005"):
        run(tmp_path, train=settings)
    assert saved_steps(tmp_path) == [5]
    assert all(
        tensor.isfinite().all()
        for tensor in checkpoint.load(checkpoint.latest(tmp_path / "checkpoints")).weights.values()
    )


def test_config_of_a_checkpoint_builds_again(tmp_path):
    history = run(tmp_path, train={"steps": 2})
    assert build(PipelineConfig, checkpoint.load(history.checkpoint).config) == config(train={"steps": 2})
    assert to_dict(config())["model"]["d_model"] == 16


# --- Options of the step --------------------------------------------------------------------------

STEP_OPTIONS = ("fused_loss", "fused_rope", "merged_gate", "fused_optimizer")
BF16 = {"dtype": "bf16", "fused_optimizer": True, "residual_dtype": "bf16"}
WRITTEN = {"written_backward": True, "attention_kernel": "flash_attention_torch"}


def losses(history: History) -> np.ndarray:
    return np.array([row["train_loss"] for row in history.rows] + [history.valid_loss])


@pytest.mark.parametrize(
    "options",
    [
        *[{name: True} for name in STEP_OPTIONS],
        dict.fromkeys(STEP_OPTIONS, True),
        WRITTEN,
        WRITTEN | {"fused_loss": True},
    ],
    ids=str,
)
def test_options_of_the_step_compute_the_same(options):
    np.testing.assert_allclose(losses(run(train=options)), losses(run()), rtol=2e-6)


@pytest.mark.parametrize("options", [BF16, {"dtype": "bf16", "residual_dtype": "bf16"}, BF16 | WRITTEN], ids=str)
def test_less_precision_stays_near(options):
    distance = np.abs(losses(run(train=options)) / losses(run(train={"dtype": "bf16"})) - 1).max()
    assert 1e-7 < distance < 2e-3


def test_a_run_in_bf16_resumes_exactly(tmp_path):
    whole = run(tmp_path / "whole", train=BF16 | WRITTEN)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", interrupt_at(7), train=BF16 | WRITTEN)
    assert computed(run(tmp_path / "cut", train=BF16 | WRITTEN)) == computed(whole)
    assert {tensor.dtype for tensor in checkpoint.load(whole.checkpoint).weights.values()} == {torch.float32}


def test_a_run_goes_on_under_other_options_of_the_step(tmp_path):
    """The checkpoint is the same whatever the options: fp32 weights and moments, from the plain optimizer and to it."""
    expected = losses(run(train={"dtype": "bf16"}))
    for index, (first, then) in enumerate((({}, BF16 | WRITTEN), (BF16, {}))):
        folder = tmp_path / str(index)
        with pytest.raises(Interrupted):
            run(folder, interrupt_at(7), train={"dtype": "bf16"} | first)
        history = run(folder, train={"dtype": "bf16"} | then)
        assert history.resumed_from == 5
        np.testing.assert_allclose(losses(history), expected, rtol=2e-3)


def test_fused_optimizer_clips_as_the_plain_one():
    strict = {"max_grad_norm": 0.05}
    ours, theirs = (run(train={"fused_optimizer": fused}, optim=strict) for fused in (True, False))
    for a, b in zip(computed(ours), computed(theirs), strict=True):
        np.testing.assert_allclose(np.array(a, dtype=float), np.array(b, dtype=float), rtol=2e-5)
    assert all(row["grad_norm"] > 0.05 for row in ours.rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autotune": True}, "train.compile"),
        ({"residual_dtype": "fp8"}, "train.residual_dtype"),
        ({"residual_dtype": "bf16"}, "training in bf16"),
        ({"step_preset": "fast"}, "unknown train.step_preset 'fast'.*plain, fused, written"),
        ({"step_preset": "fused", "written_backward": True}, "train.compile=true"),
        ({"fused_optimizer": True, "ddp_wrapper": "torch_fsdp2"}, "train.fused_optimizer=false"),
        ({"fused_optimizer": True, "ddp_wrapper": "flat", "sharded_optimizer": True}, "train.fused_optimizer=false"),
        (WRITTEN | {"compile": True}, "train.compile"),
        (WRITTEN | {"dtype": "fp16"}, "fp32 or bf16"),
        ({"written_backward": True}, "flash_attention_triton"),
        (WRITTEN | BF16 | {"residual_dtype": "fp32"}, "leave train.residual_dtype out"),
        (WRITTEN | {"ddp_wrapper": "torch_fsdp2"}, "use fsdp"),
    ],
    ids=str,
)
def test_options_of_the_step_that_cannot_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        config(train=options)
