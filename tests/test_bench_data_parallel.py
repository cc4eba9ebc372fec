import functools
import json

import pytest
import torch

from lmsys import cost, records
from lmsys.bench import data_parallel, experiment, processes, steps
from lmsys.config import model_size

LINK = cost.Link(1e-4, 1e9)
LINKS = {("all_reduce", 2): LINK}


def parameters(scale="smoke", **given):
    return data_parallel.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | given)


def rows_of(p, folder):
    return experiment.run(data_parallel.studies(p, LINKS), p, folder=folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two studies at smoke scale: parameters, results, timeline, folder."""
    folder = tmp_path_factory.mktemp("data_parallel")
    p = parameters(studies=["wrappers", "buckets"], wrappers=["naive", "flashddp"], bucket_sizes_mb=[0])
    rows = rows_of(p, folder)
    return p, rows, records.read_results(folder / "data_parallel_timeline.csv"), folder


def test_each_study_has_its_rows(measured):
    _, rows, _, folder = measured
    assert (rows.status == "ok").all(), rows.note.tolist()
    assert tuple(rows.columns[:21]) == ("study", "options", *steps.COLUMNS)
    shown = {study: list(zip(of.wrapper, of.options.fillna(""), strict=True)) for study, of in rows.groupby("study")}
    assert shown["wrappers"] == [("none", ""), ("naive", ""), ("flashddp", "")]
    assert shown["buckets"] == [("none", ""), ("flashddp", ""), ("flashddp", "bucket_size_mb=0")]
    shared = rows[(rows.wrapper == "flashddp") & rows.options.isna()]
    assert len(shared) == 2 and shared.step_ms.nunique() == 1  # one measurement, shown in both
    several = rows[rows.gpus == 2]
    assert (several.finish_ms > 0).all() and (several.backward_ms + several.finish_ms < 1.5 * several.step_ms).all()
    assert (several.traced_comm_ms[several.study == "wrappers"] > 0).all()
    one = rows.step_ms.iloc[0]
    assert rows.scaling_efficiency.tolist() == pytest.approx([one / each for each in rows.step_ms], rel=1e-4)
    stamp = json.loads((folder / "data_parallel_results.json").read_text())
    assert stamp["method"]["links"]["all_reduce of 2"]["latency_s"] == LINK.latency_s


def test_the_model_stands_beside_the_measurement(measured):
    p, rows, _, _ = measured
    model = model_size("tiny", vocab_size=256, context_length=32)
    by = rows[rows.study == "wrappers"].set_index("wrapper").model_ms
    gradients, messages = 4 * cost.model_parameters(model), len(cost.parameter_sizes(model))
    assert by["none"] == 0
    assert by["naive"] == pytest.approx(1e3 * (messages * LINK.latency_s + gradients / LINK.bandwidth), rel=1e-3)
    assert by["flashddp"] == pytest.approx(1e3 * LINK.seconds("all_reduce", gradients, 2), rel=1e-3)  # one bucket
    row = {"wrapper": "overlap", "gpus": 2, "options": "", "size": "tiny", "context_length": 32}
    assert data_parallel.model_ms(row, p, LINKS, backward_s=10.0) == pytest.approx(
        1e3 * LINK.seconds("all_reduce", 4 * model.vocab_size * model.d_model, 2)
    )  # the embedding's gradient comes last, with nothing left to hide behind
    halved = data_parallel.model_ms(row | {"options": "communication_dtype=bf16"}, p, LINKS, backward_s=10.0)
    assert halved == pytest.approx(1e3 * LINK.seconds("all_reduce", 2 * model.vocab_size * model.d_model, 2))
    flat = data_parallel.model_ms(row | {"wrapper": "flat"}, p, LINKS, backward_s=10.0)
    assert flat == pytest.approx(1e3 * LINK.seconds("all_reduce", gradients, 2))  # waits for the backward pass
    assert data_parallel.model_ms(row, p, {}, 1.0) is None is data_parallel.model_ms(row, p, LINKS, None)
    best = data_parallel.bucket_model(p, LINKS)
    assert best["best_bucket_mb"] == pytest.approx(cost.best_bucket_bytes(gradients, 1e9, 1e-4) / 1e6)
    assert data_parallel.bucket_model(p, {}) is None


def test_the_traces_show_phases_and_lanes(measured):
    _, _, traces, _ = measured
    for name, rows in traces.groupby("wrapper"):
        assert set(rows.lane) == {"phase", "compute", "communication"}, name
        phases = rows[rows.lane == "phase"].set_index("name")
        assert {"forward", "backward", "optimizer"} <= set(phases.index)
        starts = phases.start_ms.groupby("name").min()
        assert starts["forward"] == 0 < starts["backward"] < starts["optimizer"]
    naive = traces[(traces.wrapper == "naive")]
    sent = naive[naive.lane == "communication"].start_ms.min()
    assert sent > naive[(naive.lane == "phase") & (naive.name == "forward")].duration_ms.max()


def of(p, study):
    return [point for point in data_parallel.points(p) if study in point["study"].split()]


def test_points_of_the_full_scale():
    p = parameters("full", gpus=[1, 2, 4])
    assert data_parallel.course_gpus(p) == 2 and data_parallel.points(p)[0]["wrapper"] == "none"
    scaling = [(point["wrapper"], point["gpus"], point["processes"]) for point in of(p, "scaling")]
    assert scaling == [("none", 1, 2), ("flashddp", 2, 2), ("torch_ddp", 2, 2), ("flashddp", 4, 4), ("torch_ddp", 4, 4)]
    sizes = [point["bucket_mb"] for point in of(p, "buckets") if point["gpus"] == 2]
    assert sorted(sizes) == [1, 10, 25, 100, 1000]
    assert [point["traced"] for point in of(p, "wrappers")] == [False] + 5 * [True]


@pytest.fixture
def gpus(monkeypatch):
    """As if there were GPUs that reach each other's memory."""
    monkeypatch.setattr(data_parallel, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(data_parallel, "reachable", lambda: True)
    return functools.partial(parameters, "full", gpus=[1, 2])


def test_scaling_shows_what_copy_engines_buy(gpus, monkeypatch):
    points = of(gpus(studies=["scaling"]), "scaling")
    found = [(point["wrapper"], point["options"], point.get("bucket_mb")) for point in points]
    copies = ("flashddp", "transport=copy_engine", 100)
    assert found == [("none", "", None), ("flashddp", "", 25), copies, ("torch_ddp", "", None)]
    peer = of(gpus(studies=["scaling"], wrappers=["torch_ddp"]), "scaling")
    assert [point["wrapper"] for point in peer] == ["none", "torch_ddp"]
    monkeypatch.setattr(data_parallel, "reachable", lambda: False)
    assert not any(point["options"] for point in of(gpus(studies=["scaling"]), "scaling"))


def test_studies_of_captured_steps(gpus):
    p = gpus()
    seen = {(point["size"], point["wrapper"], "captured=True" in point["options"]) for point in data_parallel.points(p)}
    for size in ("xl", "gpt2", "gpt2-medium"):
        assert {(size, "none", True), (size, "flashddp", True), (size, "torch_ddp", True)} <= seen
    assert {("gpt2", "none", False), ("gpt2", "flashddp", False)} <= seen
    buckets, options = of(p, "buckets"), of(p, "options")
    assert len(buckets) == 6 and len(options) == 9
    for point in buckets + options:
        assert point["config"]["train"]["cuda_graph"] and not point["traced"]
        default = None if point["gpus"] == 1 else "nccl"  # flashddp would take copy engines by itself
        wanted = "copy_engine" if "copy_engine" in point["options"] else default
        assert point["config"]["train"]["transport"] == wanted
    assert "layout" in options[2]["wrapper_options"] and "max_ctas=4" in options[4]["options"]


def test_captured_steps_are_compared_with_one_captured_gpu():
    base = {"status": "ok", "gpus": 1, "size": "tiny", "context_length": 32, "wrapper": "none", "options": ""}
    earlier = [base | {"step_ms": 10.0, "backward_ms": 4.0}, base | {"step_ms": 6.0, "options": "captured=True"}]
    row = base | {"gpus": 2, "wrapper": "flat", "step_ms": 12.0, "exposed_comm_ms": 1.0, "study": "captured options"}
    for options, efficiency in (("", 10 / 12), ("captured=True", 0.5), ("captured=True layout=flat", 0.5)):
        derived = data_parallel.derive(parameters(), LINKS, row | {"options": options}, earlier)
        assert [one["study"] for one in derived] == ["captured", "options"]
        assert all(one["scaling_efficiency"] == efficiency and one["model_ms"] > 0 for one in derived)
    assert data_parallel.derive(parameters(), LINKS, {"status": "oom", "study": "buckets"}, []) == [
        {"study": "buckets"}
    ]


def test_captured_steps_are_of_gpus(tmp_path):
    """By default a CPU has none; where they are asked for, their rows say why they are not."""
    assert "captured" not in parameters().studies
    rows = rows_of(parameters(studies=["captured"], wrappers=["flashddp"]), tmp_path)
    assert list(rows.wrapper) == ["none", "none", "flashddp"] and list(rows.study) == 3 * ["captured"]
    assert list(rows.status) == ["ok", "unsupported", "unsupported"]
    assert list(rows.options.fillna("")) == ["", "captured=True", "captured=True"]
    assert rows.note[1:].str.contains("train.cuda_graph is for a GPU").all()


def test_parameters_say_what_is_wrong():
    for message, given in {
        "unknown studie? 'bucket'. Did you mean 'buckets'": {"studies": ["bucket"]},
        "unknown wrapper 'fsdp'": {"wrappers": ["fsdp"]},
        "bucket_sizes_mb": {"bucket_sizes_mb": [-1]},
        "needs two or more": {"gpus": [1]},
        "timed_steps is 0": {"timed_steps": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            parameters(**given)


def test_one_gpu_shows_several_processes_on_its_cpu(monkeypatch):
    """A scale full is then that of a CPU, but for what was given."""
    monkeypatch.setattr(processes, "several", lambda scale, device: ("cpu", "cpu"))
    p = parameters("full", batch=3)
    assert (p.scale, p.size, p.batch, p.dtype, p.gpus) == ("cpu", "mini", 3, "fp32", [1, 2])
