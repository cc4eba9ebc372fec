import pandas as pd
import pytest

from lmsys import cost, records
from lmsys.bench import collectives, experiment, sharding, steps
from lmsys.device import cpu_name

VARIANTS = ["replicated", "zero1", "zero2", "fsdp", "torch_fsdp2"]


def parameters(**given):
    return sharding.NOTEBOOK.parameters({"scale": "smoke", "device": "cpu"} | given)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All variants at smoke scale: results, memory, timeline."""
    folder = tmp_path_factory.mktemp("sharding")
    rows = experiment.run(sharding.SHARDING, parameters(), folder=folder)
    return rows, *(records.read_results(folder / f"{name}.csv") for name in (sharding.MEMORY, sharding.TIMELINE))


def test_memory_is_what_the_formulas_say(measured):
    rows, memory, _ = measured
    assert (rows.status == "ok").all(), rows.note.tolist()
    assert tuple(rows.columns[:20]) == ("sharding", *steps.COLUMNS)
    assert list(rows.sharding) == ["not sharded", *VARIANTS]
    held = memory[memory.point != sharding.PEAK]
    assert len(held) == 18
    for row in held.itertuples():
        assert row.measured_mib == pytest.approx(row.predicted_mib, rel=0.04), (row.sharding, row.point)
    peaks = memory[memory.point == sharding.PEAK].set_index("sharding")
    after = held[held.point == cost.MEMORY_POINTS[-1]].set_index("sharding").measured_mib
    assert (peaks.measured_mib > after).all() and peaks.measured_mib["zero1"] < peaks.measured_mib["replicated"]
    state = [sum(cost.training_state(sharding.model_of(parameters()), name, 2).values()) for name in cost.SHARDINGS[:2]]
    expected = peaks.measured_mib["replicated"] - (state[0] - state[1]) / 2**20
    assert peaks.predicted_mib["zero1"] == pytest.approx(expected, rel=1e-4)
    assert peaks.predicted_mib[["not sharded", "replicated"]].isna().all()


def test_the_state_of_zero1_is_half(measured):
    held = measured[1].pivot_table(index="sharding", columns="point", values="measured_mib")
    added = held[cost.MEMORY_POINTS[2]] - held[cost.MEMORY_POINTS[1]]
    assert added["zero1"] / added["replicated"] == pytest.approx(0.5, rel=0.05)


def test_sharding_does_not_change_the_training(measured):
    assert measured[0].final_loss.max() - measured[0].final_loss.min() < 2e-5


def test_fully_sharded_models_are_traced(measured):
    rows, _, traces = measured
    assert set(traces.wrapper) == {"fsdp", "torch_fsdp2"}
    gathers = sharding.forward_gathers(traces)
    assert len(gathers) == 2 and all(0 <= row["waiting_ms"] <= row["communication_ms"] for row in gathers)
    assert (rows.set_index("sharding").traced_comm_ms[["fsdp", "torch_fsdp2"]] > 0).all()
    assert [row["sharding"] for row in sharding.state_rows(parameters())] == ["replicated", *cost.SHARDINGS]


def test_parallelism_agrees_with_the_bounds(tmp_path):
    device, layer, tokens = cost.Accelerator(8e14, 3e11), cost.FeedForward(4096, 11008), 2**16
    calculated = sharding.parallelism(device, layer, tokens, most=1024)
    frame = experiment.run(calculated, parameters(), folder=tmp_path)
    bounds = sharding.bounds(device, layer, tokens)
    forward = frame[frame["pass"] == "forward"]
    for strategy in ("FSDP", "TP"):
        rows = forward[forward.strategy == strategy]
        assert ((rows.devices <= bounds[strategy]) == (rows.bound == "compute")).all(), strategy
    mixed = forward[forward.strategy == "FSDP + TP"]
    assert mixed[mixed.bound == "compute"].devices.max() > bounds["FSDP"]
    assert (mixed.communication_ms.to_numpy() <= forward[forward.strategy == "FSDP"].communication_ms.to_numpy()).all()


def test_the_accounting():
    rows = sharding.accounting(None)
    values = [round(row["value"], 2) for row in rows]
    assert [row["part"] for row in rows] == ["a"] * 5 + ["b"] * 2 + ["c"] * 2
    assert values[1:3] == [3.52, 43.97] and values[5] == 38
    assert (round(values[7]), round(values[8])) == (319, 20_444)
    assert sharding.accounting(cost.Accelerator(1e15, 1e9))[-1]["value"] == "never"


def test_this_machine_is_measured():
    links = {("all_gather", 2): cost.Link(0.0, 2e9), ("all_reduce", 2): cost.Link(0.0, 1e9)}
    here = sharding.accelerator(parameters(), links)
    assert here.bandwidth == 2e9 and 1e9 < here.flops < 1e14
    assert sharding.accelerator(parameters(), {}) is None


def test_collectives_measured_here_are_taken(tmp_path, monkeypatch):
    """Those of this machine and these numbers of processes; others are measured anew."""
    asked = []
    monkeypatch.setattr(experiment, "run", lambda what, p: asked.append(p.gpus) or recorded)
    columns = {"op": "all_reduce", "gpus": 2, "status": "ok", "device": cpu_name()}
    recorded = pd.DataFrame([columns | {"size_mib": mib, "median_ms": 1.0 + mib} for mib in (1.0, 8.0)])
    recorded = recorded.reindex(columns=collectives.COLLECTIVES.columns)
    path = tmp_path / "collectives_results.csv"
    recorded.to_csv(path, index=False)
    assert set(sharding.measured_links(parameters(), tmp_path)) == {("all_reduce", 2)} and not asked
    recorded.assign(device="another").to_csv(path, index=False)
    assert set(sharding.measured_links(parameters(), tmp_path)) == {("all_reduce", 2)} and asked == [[2]]


def test_parameters_say_what_is_wrong():
    for message, given in {
        "unknown variant 'zero3'": {"variants": ["zero3"]},
        "needs two or more": {"gpus": [1]},
        "batch is 0": {"batch": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            parameters(**given)
