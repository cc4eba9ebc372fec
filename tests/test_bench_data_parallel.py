import json
import math

import pandas as pd
import pytest
import torch

from lmsys import cost, plots, records
from lmsys.bench import data_parallel
from lmsys.bench.replicas import TrainPoint

LINK = cost.Link(1e-4, 1e9)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two studies at smoke scale: settings, results, timeline, folder."""
    folder = tmp_path_factory.mktemp("data_parallel")
    chosen = data_parallel.settings(
        "smoke",
        studies=["wrappers", "buckets"],
        wrappers=["naive", "flashddp"],
        bucket_sizes_mb=[0],
        device="cpu",
    )
    frame, traces = data_parallel.run(chosen, folder, {("all_reduce", 2): LINK})
    return chosen, frame, traces, folder


def test_each_study_has_its_rows(measured):
    _, frame, _, _ = measured
    assert (frame.status == "ok").all(), frame.note.tolist()
    shown = {
        study: list(zip(rows.wrapper, rows.options.fillna(""), strict=True)) for study, rows in frame.groupby("study")
    }
    assert shown["wrappers"] == [("none", ""), ("naive", ""), ("flashddp", "")]
    assert shown["buckets"] == [("none", ""), ("flashddp", ""), ("flashddp", "bucket_size_mb=0")]
    shared = frame[(frame.wrapper == "flashddp") & frame.options.isna()]
    assert len(shared) == 2 and shared.step_ms.nunique() == 1  # one measurement, shown in both
    several = frame[frame.gpus == 2]
    assert (several.finish_ms > 0).all() and (several.backward_ms + several.finish_ms < 1.5 * several.step_ms).all()
    assert (several.traced_comm_ms[several.study == "wrappers"] > 0).all()


def test_the_model_stands_beside_the_measurement(measured):
    chosen, frame, _, _ = measured
    config = chosen.workload.model
    by = frame[frame.study == "wrappers"].set_index("wrapper").model_ms
    gradients, messages = 4 * cost.model_parameters(config), len(cost.parameter_sizes(config))
    assert by["none"] == 0
    assert by["naive"] == pytest.approx(1e3 * (messages * LINK.latency_s + gradients / LINK.bandwidth), rel=1e-3)
    assert by["flashddp"] == pytest.approx(1e3 * LINK.seconds("all_reduce", gradients, 2), rel=1e-3)  # one bucket
    point = TrainPoint(chosen.workload, "overlap", 2, 2)
    assert data_parallel.model_ms(point, {("all_reduce", 2): LINK}, backward_s=10.0) == pytest.approx(
        1e3 * LINK.seconds("all_reduce", 4 * config.vocab_size * config.d_model, 2)
    )  # the embedding's gradient comes last, with nothing left to hide behind
    assert (
        data_parallel.model_ms(point, {}, 1.0) is None
        and data_parallel.model_ms(point, {("all_reduce", 2): LINK}, None) is None
    )
    said = " ".join(data_parallel.bucket_model(chosen, {("all_reduce", 2): LINK}))
    assert f"{cost.best_bucket_bytes(gradients, 1e9, 1e-4) / 1e6:.3g} MB" in said


def test_the_traces_show_phases_and_lanes(measured):
    _, _, traces, _ = measured
    for name, rows in traces.groupby("wrapper"):
        assert set(rows.lane) == {"phase", "compute", "communication"}, name
        phases = rows[rows.lane == "phase"].set_index("name")
        assert {"forward", "backward", "optimizer"} <= set(phases.index)
        assert phases.start_ms["forward"] == 0 < phases.start_ms["backward"] < phases.start_ms["optimizer"]
    naive = traces[(traces.wrapper == "naive")]
    sent = naive[naive.lane == "communication"].start_ms.min()
    assert sent > naive[(naive.lane == "phase") & (naive.name == "forward")].duration_ms.max()


def test_its_figures_and_sentences(measured):
    chosen, frame, traces, folder = measured
    written = data_parallel.write_report(frame, traces, folder)
    assert sorted(written) == ["buckets", "timeline", "wrappers"]
    assert all(path.stat().st_size > 1000 for path in written.values())
    for study in chosen.studies:
        assert data_parallel.conclusions(frame, study) and "| 2 |" in data_parallel.table(frame, study)
    stamp = json.loads((folder / "data_parallel_results.json").read_text())
    assert stamp["parameters"]["links"]["all_reduce of 2"]["latency_s"] == LINK.latency_s


def test_points_of_the_full_scale():
    chosen = data_parallel.settings("full", gpus=[1, 2, 4], device="cpu")
    points = data_parallel.points(chosen)
    assert chosen.course_gpus == 2 and chosen.workload.size == "xl"
    scaling = [(p.wrapper, p.gpus, p.processes) for p, studies in points.items() if "scaling" in studies]
    assert scaling == [("none", 1, 2), ("flashddp", 2, 2), ("torch_ddp", 2, 2), ("flashddp", 4, 4), ("torch_ddp", 4, 4)]
    sizes = [dict(p.options).get("bucket_size_mb") for p, s in points.items() if "buckets" in s and p.gpus == 2]
    assert sorted(size for size in sizes if size) == [1, 10, 100, 1000]
    assert next(iter(points)).wrapper == "none"


def test_scaling_shows_what_copy_engines_buy(monkeypatch):
    monkeypatch.setattr(data_parallel, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(data_parallel, "reachable", lambda: True)
    chosen = data_parallel.settings("full", studies=["scaling"], gpus=[1, 2], device="cpu")
    points = list(data_parallel.points(chosen))
    assert [(p.wrapper, records.option_text(p.options)) for p in points] == [
        ("none", ""),
        ("flashddp", ""),
        ("flashddp", "transport=copy_engine"),
        ("torch_ddp", ""),
    ]
    assert [data_parallel.bucket_mb(p) for p in points[1:3]] == [25, 100]
    peer = data_parallel.settings("full", studies=["scaling"], wrappers=["torch_ddp"], gpus=[1, 2], device="cpu")
    assert [p.wrapper for p in data_parallel.points(peer)] == ["none", "torch_ddp"]
    monkeypatch.setattr(data_parallel, "reachable", lambda: False)
    chosen = data_parallel.settings("full", studies=["scaling"], gpus=[1, 2], device="cpu")
    assert not any(p.options for p in data_parallel.points(chosen))


def rows(study, *given):
    """Results of a study: the measured columns as given, for tables, sentences and plots."""
    same = {"study": study, "size": "xl", "dtype": "bf16", "compiled": "true", "status": "ok", "device": "GPU X"}
    numbers = dict.fromkeys(("exposed_comm_ms", "traced_comm_ms", "model_ms", "finish_ms", "peak_mib"), math.nan)
    base = same | numbers | {"options": math.nan, "gpus": 2, "tokens_per_s": 1e4, "scaling_efficiency": math.nan}
    return pd.DataFrame([base | row for row in given])


def timed(wrapper, step_ms, p20_ms, p80_ms, **more):
    return {"wrapper": wrapper, "step_ms": step_ms, "p20_ms": p20_ms, "p80_ms": p80_ms} | more


def test_rows_of_one_wrapper_are_told_apart_by_their_options(tmp_path):
    frame = rows(
        "scaling",
        timed("none", 10.0, 10.0, 10.0, gpus=1, scaling_efficiency=1.0),
        timed("flashddp", 10.0, 10.0, 10.0, scaling_efficiency=0.98),
        timed("flashddp", 10.0, 10.0, 10.0, scaling_efficiency=0.93, options="transport=copy_engine"),
        timed("flashddp", 10.0, 10.0, 10.0, options="transport=copy_engine", gpus=4, status="oom", note="full"),
    )
    assert data_parallel.conclusions(frame, "scaling") == [
        "flashddp on 2 GPUs: 98.0% of linear scaling.",
        "flashddp with transport=copy_engine on 2 GPUs: 93.0% of linear scaling.",
        "flashddp with transport=copy_engine x4: oom, full",
    ]
    assert "| `flashddp` | transport=copy_engine |" in data_parallel.table(frame, "scaling")
    assert "options" not in data_parallel.table(frame[:2], "scaling")
    figure = plots.scaling(frame[frame.status == "ok"])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["linear", "flashddp", "flashddp transport=copy_engine"]
    ours, nccl = figure.axes[0].get_lines()[1:]
    assert (ours.get_linestyle(), ours.get_marker()) != (nccl.get_linestyle(), nccl.get_marker())


def test_what_lies_within_the_spread_is_not_said_as_a_difference():
    frame = rows(
        "wrappers",
        timed("naive", 134.0, 120.0, 150.0, exposed_comm_ms=-14.9),  # of a host slower than its GPU
        timed("flat", 150.0, 149.0, 155.0, exposed_comm_ms=2.9),  # less than half of 6
        timed("flashddp", 148.0, 146.0, 150.0, exposed_comm_ms=2.0),  # half of 4
        timed("torch_ddp", 149.0, 147.0, 150.0, exposed_comm_ms=3.0),
    )
    naive, flat, ours, peer, *beside = data_parallel.conclusions(frame, "wrappers")
    hidden = "what communication adds does not show beside the spread of the steps"
    assert naive == f"naive: 134 ms a step; {hidden}, 120 to 150 ms (20th to 80th percentile)."
    assert flat == f"flat: 150 ms a step; {hidden}, 149 to 155 ms (20th to 80th percentile)."
    assert ours == "flashddp: 148 ms a step, of which communication adds 2.00 ms (1.4%)."
    assert peer == "torch_ddp: 149 ms a step, of which communication adds 3.00 ms (2.0%)."
    assert beside == [
        "flashddp's step is as fast as naive's within the spread.",  # 14 of half of 30
        "flashddp's step is as fast as torch DDP's within the spread.",
    ]
    frame.loc[0, "step_ms"] = 163.0
    assert data_parallel.conclusions(frame, "wrappers")[-2] == "flashddp's step has 1.101 times the speed of naive's."
    options = rows(
        "options",
        timed("flashddp", 100.0, 99.0, 101.0, options="captured=True"),
        timed("flashddp", 102.0, 99.0, 104.0, options="captured=True max_ctas=4"),
        timed("flashddp", 102.0, 101.0, 103.0, options="captured=True max_ctas=8"),
    )
    assert data_parallel.conclusions(options, "options") == [
        "max_ctas=4: +2.00 ms a step (+2.0%), within the spread.",
        "max_ctas=8: +2.00 ms a step (+2.0%).",
    ]


def test_settings_say_what_is_wrong():
    for message, given in {
        "unknown study 'bucket'. Did you mean 'buckets'": {"studies": ["bucket"]},
        "unknown wrapper 'fsdp'": {"wrappers": ["fsdp"]},
        "bucket_sizes_mb": {"bucket_sizes_mb": [-1]},
        "needs two or more": {"gpus": [1]},
        "timed_steps is 0": {"timed_steps": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            data_parallel.settings("smoke", device="cpu", **given)


def test_captured_steps_are_of_gpus(tmp_path):
    """By default a CPU has none; where they are asked for, their rows say why they are not."""
    assert "captured" not in data_parallel.settings("smoke", device="cpu").studies
    chosen = data_parallel.settings("smoke", studies=["captured"], wrappers=["flashddp"], device="cpu")
    frame, _ = data_parallel.run(chosen, tmp_path, {})
    assert [(row.wrapper, row.status) for row in frame.itertuples()] == [
        ("none", "unsupported"),
        ("flashddp", "unsupported"),
        ("none", "ok"),
    ]
    said = data_parallel.conclusions(frame, "captured")
    assert len(said) == 2 and all("train.cuda_graph is for a GPU" in sentence for sentence in said)
    assert list(frame.options.fillna("")) == ["captured=True", "captured=True", ""]


@pytest.mark.parametrize("studies", [None, ["captured", "buckets", "scaling"]])
def test_captured_steps_are_compared_with_one_captured_gpu(monkeypatch, studies):
    """Rows are compared with the last one of one GPU: that is captured for captured steps, and not for the others."""
    monkeypatch.setattr(data_parallel, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(data_parallel, "reachable", lambda: True)
    chosen = data_parallel.settings("full", studies=studies, gpus=[1, 2], device="cpu")
    last, seen = {}, set()
    for point in data_parallel.points(chosen):
        if point.gpus == 1:
            last[point.workload] = point
        assert last[point.workload].captured == point.captured
        seen.add((point.workload.size, point.wrapper, point.captured))
    for size in ("xl", "gpt2", "gpt2-medium"):
        assert {(size, "none", True), (size, "flashddp", True), (size, "torch_ddp", True)} <= seen
    assert {("gpt2", "none", False), ("gpt2", "flashddp", False)} <= seen
    of = {study: [p for p, of in data_parallel.points(chosen).items() if study in of] for study in chosen.studies}
    assert all(point.captured and not point.traced for point in of["buckets"]) and len(of["buckets"]) == 6
    assert all(len(set(points)) == len(points) for points in of.values())
    if studies is None:
        assert [point.traced for point in of["wrappers"]] == [False] + 5 * [True]
        assert all(point.captured for point in of["options"]) and len(of["options"]) == 9


def test_the_course_is_answered_from_captured_steps_where_there_are_some():
    launched = rows(
        "wrappers",
        timed("none", 96.0, 90.0, 99.0, gpus=1),
        timed("naive", 134.0, 133.0, 135.0, exposed_comm_ms=10.0, traced_comm_ms=4.0, traced_hidden_ms=1.0),
    )
    captured = rows(
        "captured",
        timed("none", 96.0, 90.0, 99.0, gpus=1),
        timed("none", 74.0, 73.0, 75.0, gpus=1, options="captured=True"),
        timed("naive", 107.0, 106.0, 108.0, exposed_comm_ms=33.0, options="captured=True"),
        timed("naive", 40.0, 40.0, 40.0, size="gpt2", options="captured=True"),
        timed("naive", 82.0, 81.0, 83.0, options="captured=True transport=copy_engine"),
    )
    frame = pd.concat([launched, captured], ignore_index=True)
    assert data_parallel.rows_of(frame, "wrappers").step_ms.tolist() == [74.0, 107.0]
    assert data_parallel.conclusions(frame, "wrappers") == [
        "naive: 107 ms a step, of which communication adds 33.00 ms (30.8%); in the traced step 25.0% of the time of communication lies "
        "beside computation."
    ]
    assert data_parallel.conclusions(launched, "wrappers")[0].startswith("naive: 134 ms a step")
    assert data_parallel.rows_of(captured, "wrappers").empty
    assert "134 [133, 135]" in data_parallel.table(frame, "wrappers")
    assert (
        plots.step_breakdown(data_parallel.rows_of(frame, "wrappers"))
        .axes[0]
        .get_title(loc="left")
        .endswith("as one CUDA graph")
    )
