import json

import numpy as np
import pandas as pd
import pytest

from lmsys import records
from lmsys.bench import experiment, matrix, steps
from lmsys.config import ModelConfig

WRAPPERS = ["naive", "flashddp", "flashddp+zero1", "fsdp", "torch_fsdp2"]


def parameters(**given):
    return matrix.NOTEBOOK.parameters({"scale": "smoke", "device": "cpu"} | given)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A matrix at smoke scale with token files of its own: parameters, results, losses, folder."""
    folder = tmp_path_factory.mktemp("matrix")
    generator = np.random.default_rng(0)
    for name in ("train", "valid"):
        np.save(folder / f"{name}.npy", generator.integers(0, 200, 4000).astype(np.uint16))
    p = parameters(
        wrappers=WRAPPERS, train_path=str(folder / "train.npy"), val_path=str(folder / "valid.npy"), gpus=[1, 2]
    )
    rows = experiment.run(matrix.MATRIX, p, folder=folder)
    return p, rows, records.read_results(folder / "lm_matrix_losses.csv"), folder


def test_one_process_and_two_train_to_the_same_loss(measured):
    p, rows, losses, _ = measured
    assert list(rows.wrapper) == ["none", *WRAPPERS] and list(rows.gpus) == [1, 2, 2, 2, 2, 2]
    assert (rows.status == "ok").all(), rows.note.tolist()
    assert np.ptp(rows.final_loss) < 2e-5 and np.ptp(rows.valid_loss) < 2e-5
    each = losses.groupby("wrapper", sort=False).loss.apply(list)
    assert all(len(trace) == p.steps for trace in each)
    assert max(np.ptp(step) for step in zip(*each, strict=True)) < 2e-5


def test_the_columns_follow_from_the_times(measured):
    _, rows, _, folder = measured
    assert tuple(rows.columns) == (*steps.COLUMNS, "processes", "valid_loss", "device", "note")
    one = rows.iloc[0]
    for row in rows.itertuples():
        assert row.p20_ms <= row.step_ms <= row.p80_ms and row.samples == 3 and row.peak_mib > 1
        assert row.tokens_per_s == pytest.approx(row.gpus * 2 * 32 / (row.step_ms / 1e3), rel=1e-4)
        assert row.scaling_efficiency == pytest.approx(one.step_ms / row.step_ms, rel=1e-4)
        if row.wrapper in ("fsdp", "flashddp+zero1"):
            assert row.exposed_comm_ms == pytest.approx(row.step_ms - one.step_ms, rel=1e-3, abs=1e-3)
    assert one.exposed_comm_ms == 0
    stamp = json.loads((folder / "lm_matrix_results.json").read_text())
    assert stamp["parameters"]["steps"] == 3 and "no_sync" in stamp["method"]["exposed_comm_ms"]
    assert matrix.report_text(rows).count("| tiny |") == 6


def test_ours_stand_beside_the_peer_of_their_kind(measured):
    rows = measured[1].assign(step_ms=[9.0, 12.0, 10.0, 10.4, 5.0, 6.0], p20_ms=1.0, p80_ms=1.5)
    (line,) = steps.beside_peers(rows, ["size", "gpus"]).to_dict("records")
    assert (line["wrapper"], line["peer"], line["verdict"]) == ("fsdp", "torch_fsdp2", "ahead")
    assert line["speed"] == 1.2 and line["memory"] == pytest.approx(rows.peak_mib[4] / rows.peak_mib[5])
    within = steps.beside_peers(rows.assign(p80_ms=4.0), ["size", "gpus"])
    assert list(within.verdict) == ["within noise"] and steps.beside_peers(rows[:4], ["size", "gpus"]).empty


def test_a_loss_of_its_own_is_an_error():
    one = {"gpus": 1, "processes": 2, "final_loss": 5.0, "step_ms": 1.0}
    row = {"status": "ok", "gpus": 2, "processes": 2, "final_loss": 5.01, "step_ms": 2.0, "dtype": "fp32"}
    assert matrix.derive(row, [one])["status"] == "error"
    for other in ({"dtype": "bf16"}, {"processes": 4, "gpus": 4}):  # four train on other batches
        assert matrix.derive(row | other, [one]) == {"scaling_efficiency": 0.5, "exposed_comm_ms": 1.0}
    assert matrix.derive(row, []) == {} == matrix.derive(row | {"status": "oom"}, [one])


def test_failed_points_have_their_status_in_the_table():
    row = dict.fromkeys(("kernel", "wrapper", "mfu", "scaling_efficiency", "exposed_comm_ms"), "x")
    row |= {"size": "xl", "gpus": 2, "status": "oom", "device": "NVIDIA H200", "tokens_per_s": float("nan")}
    row |= dict.fromkeys(("step_ms", "p20_ms", "p80_ms", "peak_mib", "final_loss"), float("nan"))
    assert "| oom |" in matrix.report_text(pd.DataFrame([row]))


def test_points():
    points = matrix.points(parameters(scale="full", gpus=[1, 2, 4]))
    cells = dict.fromkeys((point["size"], point["kernel"]) for point in points)
    assert list(cells)[:2] == [("gpt2", "flash_attention_triton"), ("gpt2", "vectorized_torch")] and len(cells) == 4
    shapes = {point["size"]: (point["local_batch"], point["context_length"]) for point in points}
    assert shapes == {"gpt2": (32, 1024), "gpt2-medium": (16, 1024), "xl": (4, 512)}
    assert all(point["compiled"] and point["dtype"] == "bf16" for point in points)
    of_plain = [point for point in points if point["kernel"] == "vectorized_torch" and point["gpus"] < 4]
    assert [point["wrapper"] for point in of_plain] == ["none", "naive", "flashddp", "torch_ddp"]
    assert {point["processes"] for point in of_plain} == {2}
    assert {point["status"] for point in points if point not in of_plain and "status" in point} == {"unsupported"}
    given = matrix.points(parameters(scale="full", wrappers=["fsdp"], gpus=[1, 2]))
    assert {point["wrapper"] for point in given} == {"none", "fsdp"}
    own = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 1, "vocab_size": 50, "context_length": 8}
    p = parameters(**own, batch_size=3, dtype="bf16", compile=True, seed=7, gpus=[2])
    (point, *_) = matrix.points(p)
    assert matrix.model_of(p, "custom") == ModelConfig(16, 32, 1, 1, 8, 50) and point["size"] == "custom"
    train = point["config"]["train"]
    assert (train["batch_size"], train["dtype"], train["compile"], train["seed"]) == (3, "bf16", True, 7)
    product = parameters(sizes=["tiny", "mini"], kernels=["vectorized_torch", "flash_attention_torch"], gpus=[1])
    assert len(matrix.points(product)) == 4


def test_epochs_are_passes_over_the_tokens(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(2048, dtype=np.uint16) % 100)
    p = parameters(epochs=1.5, train_path=str(tmp_path / "train.npy"), gpus=[1, 2])
    assert p.steps == 1.5 * 2048 / (2 * 32 * 2)


def test_parameters_say_what_is_wrong(tmp_path):
    np.save(tmp_path / "high.npy", np.full(1000, 300, dtype=np.uint16))
    np.save(tmp_path / "short.npy", np.zeros(10, dtype=np.uint16))
    wrong = {
        "unknown wrapper 'none'": {"wrappers": ["none"]},
        "unknown wrapper 'flashdpp'. Did you mean 'flashddp'": {"wrappers": ["flashdpp"]},
        "optimizer state is sharded already": {"wrappers": ["fsdp+zero1"]},
        "unknown attention kernel|unknown kernel": {"kernels": ["x"]},
        "unknown model size": {"sizes": ["x"]},
        "steps or epochs, not both": {"steps": 2, "epochs": 1},
        "passes over train_path": {"epochs": 1},
        "steps is 0": {"steps": 0},
        "sizes or a shape of your own .*not both": {"sizes": ["tiny"], "d_model": 16},
        "no token file": {"train_path": str(tmp_path / "none.npy")},
        "holds token id 300": {"train_path": str(tmp_path / "high.npy")},
        "no more than one batch": {"val_path": str(tmp_path / "short.npy")},
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            parameters(**given)
