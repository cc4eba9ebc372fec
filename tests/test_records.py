import json
import os

import pytest

from lmsys import records

SWEEP = (
    *("kernel", "batch", "heads", "q_len", "k_len", "head_dim", "dtype", "causal", "pass", "status"),
    *("median_ms", "p20_ms", "p80_ms", "samples", "tflops", "peak_mib"),
)


def test_result_file_has_its_columns_and_its_stamp(tmp_path):
    path, stamp = tmp_path / "x.csv", {"method": {"timer": "t"}, "parameters": {"seed": 0}}
    rows = [{"kernel": "k", "median_ms": 1.23456789, "causal": True}, {"kernel": "k", "median_ms": None}]
    records.write_results(path, ("kernel", "causal", "median_ms", "note"), rows, stamp)
    frame = records.read_results(path)
    assert tuple(frame.columns) == ("kernel", "causal", "median_ms", "note")
    assert frame.median_ms[0] == pytest.approx(1.23457) and frame.median_ms.isna()[1] and frame.causal[0]
    assert json.loads(path.with_suffix(".json").read_text()) == stamp
    with pytest.raises(ValueError, match="no results at"):
        records.read_results(tmp_path / "y.csv")


def test_machine_tag(monkeypatch):
    assert records.machine_tag() == "local"
    monkeypatch.setenv("LMSYS_MACHINE", "h200-x2")
    assert records.machine_tag() == "h200-x2"
    assert records.machine_tag("mine") == "mine"
    for bad in ("../up", "a b", "A", "."):
        with pytest.raises(ValueError, match="lower-case letters"):
            records.machine_tag(bad)


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to this folder") as caught:
        records.writable_dir(tmp_path / "file" / "sub")
    assert caught.value.filename == str(tmp_path / "file" / "sub")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="cannot write to this folder"):
        records.writable_dir(tmp_path)


def test_atomic_path_leaves_the_old_file_and_no_other_after_a_failure(tmp_path):
    target = tmp_path / "x.txt"
    records.write_text(target, "old")
    with pytest.raises(RuntimeError), records.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_markdown_table():
    table = records.markdown_table([{"a": 1.0, "b": None}, {"a": True, "b": "x | y"}], {"a": "A", "b": "B"})
    assert table == "| A | B |\n| --- | --- |\n| 1 |  |\n| true | x \\| y |\n"


def test_significant_digits():
    shown = [records.significant(value) for value in (0.0081234, 3.5, 12.345, 1084.3, 999.9, 0, -0.5)]
    assert shown == ["0.00812", "3.50", "12.3", "1,084", "1,000", "0", "-0.500"]


def test_experiments_keep_the_columns_that_readers_rely_on():
    from lmsys.bench import accuracy, attention, leaderboard

    board = ("board", "implementation", "gpus", "status", "median_ms", "samples", "mfu", "peak_mib")
    assert leaderboard.COLUMNS[:8] == board and attention.SWEEP.columns[:16] == SWEEP
    ratios = {f"{name}_ratio" for name in ("o", "lse", "dq", "dk", "dv")}
    assert {"kernel", "path", "status", "deterministic", *ratios} <= set(accuracy.ACCURACY.columns)
    for experiment in (leaderboard.ATTENTION, attention.SWEEP, accuracy.ACCURACY):
        assert len(set(experiment.columns)) == len(experiment.columns), experiment.name
