import pytest

from lmsys import cost
from lmsys.bench import sharding

VARIANTS = ["replicated", "zero1", "zero2", "fsdp", "torch_fsdp2"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All variants at smoke scale: settings, results, memory, timeline, folder."""
    folder = tmp_path_factory.mktemp("sharding")
    chosen = sharding.settings("smoke", device="cpu")
    return chosen, *sharding.run(chosen, folder), folder


def test_memory_is_what_the_formulas_say(measured):
    _, frame, memory, _, _ = measured
    assert (frame.status == "ok").all(), frame.note.tolist()
    assert list(frame.sharding) == ["not sharded", *VARIANTS]
    held = memory[memory.point != sharding.PEAK]
    assert len(held) == 18
    for row in held.itertuples():
        assert row.measured_mib == pytest.approx(row.predicted_mib, rel=0.04), (row.sharding, row.point)
    peaks = memory[memory.point == sharding.PEAK].set_index("sharding").measured_mib
    after = held[held.point == cost.MEMORY_POINTS[-1]].set_index("sharding").measured_mib
    assert (peaks > after).all() and peaks["zero1"] < peaks["replicated"]


def test_the_state_of_zero1_is_half(measured):
    _, _, memory, _, _ = measured
    said = " ".join(sharding.memory_conclusions(memory))
    share = float(said.split("zero1's optimizer adds ")[1].split("%")[0])
    assert share == pytest.approx(50, rel=0.05)


def test_sharding_does_not_change_the_training(measured):
    _, frame, _, _, _ = measured
    assert frame.final_loss.max() - frame.final_loss.min() < 2e-5


def test_fsdp_is_traced_and_everything_is_said(measured):
    chosen, frame, memory, traces, folder = measured
    assert set(traces.wrapper) == {"fsdp", "torch_fsdp2"}
    assert len(sharding.forward_gather(traces)) == 2
    calculated = sharding.parallelism(cost.TPU_V5P, cost.FeedForward(1024, 4096), 2**16, folder, most=16)
    written = sharding.write_report(frame, memory, traces, folder, calculated)
    assert sorted(written) == ["memory", "parallelism", "report", "speed", "timeline"]
    assert all(path.name.startswith("sharding_") and path.stat().st_size > 500 for path in written.values())
    assert "by formula" in written["report"].read_text()
    assert sharding.state_table(chosen).count("zero2") == 1 and len(sharding.speed_conclusions(frame)) >= 3


def test_parallelism_agrees_with_the_bounds(tmp_path):
    device, layer, tokens = cost.Accelerator(8e14, 3e11), cost.FeedForward(4096, 11008), 2**16
    frame = sharding.parallelism(device, layer, tokens, tmp_path, most=1024)
    bounds = sharding.bounds(device, layer, tokens)
    forward = frame[frame["pass"] == "forward"]
    for strategy in ("FSDP", "TP"):
        rows = forward[forward.strategy == strategy]
        assert ((rows.devices <= bounds[strategy]) == (rows.bound == "compute")).all(), strategy
    mixed = forward[forward.strategy == "FSDP + TP"]
    assert mixed[mixed.bound == "compute"].devices.max() > bounds["FSDP"]
    assert (mixed.communication_ms.to_numpy() <= forward[forward.strategy == "FSDP"].communication_ms.to_numpy()).all()


def test_the_accounting_names_what_it_counts():
    said = sharding.accounting(None)
    assert "3.52 TB" in said[0] and "44.0 GPUs" in said[0] and "N = 38 " in said[1] and len(said) == 3
    assert "319 tokens a device, 20,444 in all" in said[2]
    slow = sharding.accounting(cost.Accelerator(1e15, 1e9))
    assert "never is compute-bound" in slow[3]


def test_this_machine_is_measured():
    links = {("all_gather", 2): cost.Link(0.0, 2e9), ("all_reduce", 2): cost.Link(0.0, 1e9)}
    here = sharding.accelerator(sharding.settings("smoke", device="cpu"), links)
    assert here.bandwidth == 2e9 and 1e9 < here.flops < 1e14
    assert sharding.accelerator(sharding.settings("smoke", device="cpu"), {}) is None


def test_settings_say_what_is_wrong():
    for message, given in {
        "unknown variant of sharding 'zero3'": {"variants": ["zero3"]},
        "needs two or more": {"gpus": [1]},
        "batch is 0": {"batch": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            sharding.settings("smoke", device="cpu", **given)
