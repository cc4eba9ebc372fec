import json

import pytest

from lmsys import cost
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
