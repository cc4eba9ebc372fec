import json
import math

import numpy as np
import pandas as pd
import pytest

from lmsys.__main__ import main
from lmsys.bench import matrix
from lmsys.config import ModelConfig

WRAPPERS = ["naive", "flashddp", "flashddp+zero1", "fsdp"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A matrix at smoke scale with token files of its own: settings, results, losses, folder."""
    folder = tmp_path_factory.mktemp("matrix")
    generator = np.random.default_rng(0)
    for name in ("train", "valid"):
        np.save(folder / f"{name}.npy", generator.integers(0, 200, 4000).astype(np.uint16))
    chosen = matrix.settings(
        "smoke",
        wrappers=WRAPPERS,
        train_tokens=str(folder / "train.npy"),
        valid_tokens=str(folder / "valid.npy"),
        device="cpu",
    )
    rows = []
    frame, losses = matrix.run(chosen, folder, on_row=rows.append)
    assert len(rows) == len(frame)
    return chosen, frame, losses, folder


def test_one_process_and_two_train_to_the_same_loss(measured):
    chosen, frame, losses, _ = measured
    assert list(frame.wrapper) == ["none", *WRAPPERS] and list(frame.gpus) == [1, 2, 2, 2, 2]
    assert (frame.status == "ok").all(), frame.note.tolist()
    assert np.ptp(frame.final_loss) < 2e-5 and np.ptp(frame.valid_loss) < 2e-5
    each = losses.groupby("wrapper", sort=False).loss.apply(list)
    assert all(len(trace) == chosen.steps for trace in each)
    assert max(np.ptp(step) for step in zip(*each, strict=True)) < 2e-5


def test_the_columns_follow_from_the_times(measured):
    _, frame, _, _ = measured
    one = frame.iloc[0]
    for row in frame.itertuples():
        assert row.p20_ms <= row.step_ms <= row.p80_ms and row.samples == 3 and row.peak_mib > 1
        assert row.tokens_per_s == pytest.approx(row.gpus * 2 * 32 / (row.step_ms / 1e3), rel=1e-4)
        assert row.scaling_efficiency == pytest.approx(one.step_ms / row.step_ms, rel=1e-4)
        if row.wrapper in ("fsdp", "flashddp+zero1"):
            assert row.exposed_comm_ms == pytest.approx(row.step_ms - one.step_ms, rel=1e-3, abs=1e-3)
    assert one.exposed_comm_ms == 0


def test_its_report(measured):
    chosen, frame, losses, folder = measured
    written = matrix.write_report(frame, losses, folder)
    assert sorted(written) == ["convergence", "memory", "report", "speedup", "throughput", "time"]
    assert all(path.name.startswith("lm_matrix_") and path.stat().st_size > 1000 for path in written.values())
    text = written["report"].read_text()
    assert "final losses of 5 runs" in text and text.count("| tiny |") == 5
    stamp = json.loads((folder / "lm_matrix_results.json").read_text())
    assert stamp["parameters"]["steps"] == chosen.steps and "no_sync" in stamp["method"]["exposed_comm_ms"]


def test_a_loss_of_its_own_is_an_error():
    row = {"final_loss": 5.01, "dtype": "fp32"}
    assert matrix._disagreement(row, 5.0)["status"] == "error"
    assert matrix._disagreement(row | {"dtype": "bf16"}, 5.0) == {}


def test_failed_points_are_said():
    base = dict.fromkeys(("step_ms", "p20_ms", "p80_ms", "tokens_per_s", "mfu", "peak_mib", "final_loss"), 1.0)
    base |= {
        "size": "xl",
        "kernel": "k",
        "processes": 2,
        "exposed_comm_ms": math.nan,
        "status": "ok",
        "note": "",
        "device": "NVIDIA H200",
    }
    rows = [
        base | {"wrapper": "none", "gpus": 1, "step_ms": 9.0, "scaling_efficiency": 1.0},
        base | {"wrapper": "flashddp", "gpus": 2, "step_ms": 10.0, "scaling_efficiency": 0.9, "peak_mib": 1.1},
        base | {"wrapper": "torch_ddp", "gpus": 2, "step_ms": 11.0, "scaling_efficiency": 0.8},
        base | {"wrapper": "naive", "gpus": 2, "status": "oom", "note": "full"},
    ]
    said = matrix.conclusions(pd.DataFrame(rows))
    assert said[0] == "xl, k, one GPU: 9.00 ms a step, 1 tokens/s, 100.0% MFU."
    assert said[1] == "xl, k, 2 GPUs: **flashddp** is the fastest at 10.0 ms, 90.0% of linear scaling."
    assert "1.100 times the speed of torch_ddp; its peak memory is +10.0% of one alone" in said[2]
    assert said[-1] == "xl, k, naive x2: oom, full"
    assert "| oom |" in matrix.table(pd.DataFrame(rows))
    rows[1]["p80_ms"] = 3.1  # 1 ms is below half of 2.1
    assert "flashddp is as fast as torch_ddp within the spread; its peak" in matrix.conclusions(pd.DataFrame(rows))[2]
    rows[3] |= {"status": "ok", "step_ms": 12.0, "scaling_efficiency": 0.7}
    (beside,) = [text for text in matrix.conclusions(pd.DataFrame(rows)) if "flashddp" in text and "naive" in text]
    assert "flashddp has 1.200 times the speed of naive and is as fast as torch_ddp within the spread;" in beside


def test_settings():
    chosen = matrix.settings("full", device="cpu")
    cells = [(work.size, work.kernel) for work in chosen.workloads]
    assert cells[:2] == [("gpt2", "flash_attention_triton"), ("gpt2", "vectorized_torch")] and len(cells) == 4
    shapes = {work.size: (work.local_batch, work.model.context_length) for work in chosen.workloads}
    assert shapes == {"gpt2": (32, 1024), "gpt2-medium": (16, 1024), "xl": (4, 512)}
    assert all(work.compiled and work.dtype == "bf16" for work in chosen.workloads)
    sharded = {point.name: dict(point.options) for point in matrix.points(chosen)}
    assert sharded["fsdp"] == sharded["torch_fsdp2"] == {"compute_dtype": "bf16"} and sharded["flashddp"] == {}
    of_plain = [point.name for point in matrix.points(chosen) if point.workload == chosen.workloads[1]]
    assert of_plain == ["none", "naive", "flashddp", "torch_ddp"]
    given = matrix.settings("full", wrappers=["fsdp"], device="cpu")
    assert {point.name for point in matrix.points(given)} == {"none", "fsdp"}
    own = matrix.settings("smoke", shape={"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}, vocab_size=99)
    assert own.workloads[0].model == ModelConfig(32, 64, 1, 2, 512, 99) and own.workloads[0].size == "custom"
    product = matrix.settings("smoke", sizes=["tiny", "mini"], kernels=["vectorized_torch", "flash_attention_torch"])
    assert len(product.workloads) == 4


def test_epochs_are_passes_over_the_tokens(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(2048, dtype=np.uint16) % 100)
    chosen = matrix.settings("smoke", epochs=1.5, train_tokens=str(tmp_path / "train.npy"), gpus=[1, 2], device="cpu")
    assert chosen.steps == 1.5 * 2048 / (2 * 32 * 2)


def test_settings_say_what_is_wrong(tmp_path):
    np.save(tmp_path / "high.npy", np.full(1000, 300, dtype=np.uint16))
    np.save(tmp_path / "short.npy", np.zeros(10, dtype=np.uint16))
    wrong = {
        "unknown wrapper 'none'": {"wrappers": ["none"]},
        "unknown wrapper 'flashdpp'. Did you mean 'flashddp'": {"wrappers": ["flashdpp"]},
        "optimizer state is sharded already": {"wrappers": ["fsdp+zero1"]},
        "unknown attention kernel|unknown kernel": {"kernels": ["x"]},
        "unknown model size": {"sizes": ["x"]},
        "not both": {"steps": 2, "epochs": 1},
        "needs? ?train_tokens|passes over train_tokens": {"epochs": 1},
        "steps is 0": {"steps": 0},
        "unknown field of a model's shape 'width'": {"shape": {"width": 3}},
        "no token file": {"train_tokens": str(tmp_path / "none.npy")},
        "holds token id 300": {"train_tokens": str(tmp_path / "high.npy")},
        "no more than one batch": {"valid_tokens": str(tmp_path / "short.npy")},
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            matrix.settings("smoke", device="cpu", **given)


def test_the_command_takes_a_model_of_ones_own(measured, capsys, output_root, monkeypatch):
    asked = []
    monkeypatch.setattr(matrix, "run", lambda chosen, folder, on_row: asked.append(chosen) or measured[1:3])
    arguments = "--d_model 16 --d_ff 32 --num_layers 1 --num_heads 1 --vocab_size 50 --context_length 8 --batch_size 3"
    arguments += " --wrappers flat --steps 5 --timed_steps 4 --gpus 1 2 --device cpu --dtype bf16 --compile --seed 7"
    assert main(["lm-matrix", "--scale", "smoke", *arguments.split()]) == 0
    (workload,) = asked[0].workloads
    assert workload.model == ModelConfig(16, 32, 1, 1, 8, 50)
    assert (workload.local_batch, workload.dtype, workload.compiled, workload.seed) == (3, "bf16", True, 7)
    assert (asked[0].wrappers, asked[0].gpus, asked[0].steps, asked[0].timed_steps) == (("flat",), (1, 2), 5, 4)
    assert "final losses of 5 runs" in capsys.readouterr().out
    assert (output_root / "artifacts" / "local" / "lm_matrix_report.md").exists()
    for arguments, message in (
        ("lm-matrix --scale smoke --d_model 16 --sizes tiny", "not both"),
        ("collectives --scale smoke --gpus 1 --device cpu", "needs two processes"),
    ):
        assert main(arguments.split()) == 2
        assert message in capsys.readouterr().err
