import json

import pandas as pd
import pytest

from lmsys import cost
from lmsys.bench import collectives, experiment


def parameters(scale="smoke", **given):
    return collectives.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | given)


def test_every_collective_is_checked_timed_and_fitted(tmp_path):
    frame = experiment.run(collectives.COLLECTIVES, parameters(gpus=[2]), folder=tmp_path)
    assert (frame.status == "ok").all() and set(frame.backend) == {"gloo"} and len(frame) == 6
    assert set(frame.op) == set(cost.COLLECTIVES) and (frame.samples >= 3).all()
    for row in frame.itertuples():
        bus = cost.bus_factor(row.op, 2) * row.size_mib * 2**20 / (row.median_ms / 1e3)
        assert row.busbw_gb_s == pytest.approx(bus / 1e9, rel=1e-4)
    for (op, gpus), link in collectives.links(frame).items():
        largest = frame[(frame.op == op) & (frame.gpus == gpus)].iloc[-1]
        assert link.seconds(op, largest.size_mib * 2**20, 2) == pytest.approx(largest.median_ms / 1e3, rel=0.5)
    stamp = json.loads((tmp_path / "collectives_results.json").read_text())
    assert "nccl-tests" in stamp["method"]["bandwidth"] and stamp["parameters"]["gpus"] == [2]


def test_times_that_shrink_with_the_size_show_no_bandwidth():
    base = {"op": "all_reduce", "gpus": 2, "status": "ok"}
    frame = pd.DataFrame(base | {"size_mib": size, "median_ms": time_ms} for size, time_ms in ((1, 2.0), (4, 1.0)))
    assert collectives.links(frame) == {}


def test_parameters_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown op 'all_reduc'. Did you mean 'all_reduce'"):
        parameters(ops=["all_reduc"])
    with pytest.raises(ValueError, match="takes two processes"):
        parameters(gpus=[1])
    for wrong in ({"sizes_mib": [0]}, {"sizes_mib": []}, {"samples": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            parameters(**wrong)
    assert parameters("full", gpus=[2, 4]).sizes_mib[-1] == 1024
