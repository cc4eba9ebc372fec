import json

import pytest

from lmsys import cost, plots, records
from lmsys.bench import collectives


def test_every_collective_is_checked_timed_and_fitted(tmp_path):
    chosen = collectives.settings("smoke", gpus=[2], device="cpu")
    lines = []
    frame = collectives.run(chosen, tmp_path, on_row=lambda row: lines.append(collectives.row_line(row)))
    assert (frame.status == "ok").all() and set(frame.backend) == {"gloo"} and len(frame) == len(lines) == 6
    assert set(frame.op) == set(cost.COLLECTIVES) and (frame.samples >= 3).all()
    for row in frame.itertuples():
        bus = cost.bus_factor(row.op, 2) * row.size_mib * 2**20 / (row.median_ms / 1e3)
        assert row.busbw_gb_s == pytest.approx(bus / 1e9, rel=1e-4)
    for (op, gpus), link in collectives.links(frame).items():
        largest = frame[(frame.op == op) & (frame.gpus == gpus)].iloc[-1]
        assert link.seconds(op, largest.size_mib * 2**20, 2) == pytest.approx(largest.median_ms / 1e3, rel=0.5)
    assert len(collectives.conclusions(frame)) == 3
    heading, _, smallest, largest = collectives.table(frame).splitlines()
    assert heading.count(", 2 processes: GB/s (ms) |") == 3 and smallest.startswith("| 0.0625 MiB |")
    assert largest.split("|")[2].strip() == (
        f"{records.significant(frame.busbw_gb_s[1])} ({records.significant(frame.median_ms[1])})"
    )
    plots.save(plots.collectives(frame), tmp_path / "collectives.png")
    assert collectives.recorded(chosen, tmp_path).equals(frame)  # this device's, of these numbers: not measured again
    stamp = json.loads((tmp_path / "collectives_results.json").read_text())
    assert "nccl-tests" in stamp["method"]["bandwidth"] and stamp["parameters"]["gpus"] == [2]


def test_a_failed_point_is_said(tmp_path):
    import pandas as pd

    base = {"backend": "nccl", "gpus": 2, "device": "a GPU", "note": None, "p20_ms": 1.0, "p80_ms": 1.0, "samples": 3}
    ok = [
        base | {"op": "all_reduce", "size_mib": s, "status": "ok", "median_ms": m, "busbw_gb_s": 1.0}
        for s, m in ((1, 2.0), (4, 1.0))
    ]
    bad = base | {"op": "all_gather", "size_mib": 1, "status": "oom", "note": "full"}
    frame = pd.DataFrame([*ok, bad])
    assert collectives.links(frame) == {}  # times that shrink with the size show no bandwidth
    said = collectives.conclusions(frame)
    assert said[-1] == "all_gather of 2 at 1 MiB: oom, full" and "| oom |" in collectives.table(frame)


def test_a_table_of_many_columns_is_one_for_each_number_of_processes():
    import pandas as pd

    base = {"status": "ok", "median_ms": 1.0}
    frame = pd.DataFrame(
        base | {"op": op, "gpus": gpus, "size_mib": size, "busbw_gb_s": float(gpus)}
        for gpus in (2, 4, 8)
        for op in cost.COLLECTIVES
        for size in (1, 1024)
    )
    tables = [part.splitlines() for part in collectives.table(frame).split("\n\n")]
    assert [rows[-1] for rows in tables] == [f"| 1,024 MiB{f' | {n}.00 (1.00)' * 3} |" for n in (2, 4, 8)]
    (alone,) = collectives.table(frame[frame.op == "all_reduce"]).split("\n\n")  # three columns
    assert alone.splitlines()[2] == "| 1 MiB | 2.00 (1.00) | 4.00 (1.00) | 8.00 (1.00) |"


def test_settings_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown collective 'all_reduc'. Did you mean 'all_reduce'"):
        collectives.settings("smoke", ops=["all_reduc"], device="cpu")
    with pytest.raises(ValueError, match="needs two processes"):
        collectives.settings("smoke", gpus=[1], device="cpu")
    for wrong in ({"sizes_mib": [0]}, {"sizes_mib": []}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            collectives.settings("smoke", device="cpu", **wrong)
    assert collectives.settings("full", gpus=[2, 4], device="cpu").sizes_mib[-1] == 1024


def test_what_is_recorded_of_another_device_is_measured_anew(tmp_path, monkeypatch):
    chosen = collectives.settings("smoke", gpus=[2], device="cpu")
    other = [{"op": op, "gpus": 2, "size_mib": 1.0, "status": "ok", "device": "another"} for op in cost.COLLECTIVES]
    monkeypatch.setattr(collectives, "rows", lambda *_: iter(other))
    collectives.run(chosen, tmp_path)
    fresh = [row | {"device": "measured anew"} for row in other]
    monkeypatch.setattr(collectives, "rows", lambda *_: iter(fresh))
    assert set(collectives.recorded(chosen, tmp_path).device) == {"measured anew"}
