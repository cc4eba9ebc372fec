"""The 2026 board: a run in two processes, the twin's verdict, failures as rows, and a file that two boards share."""

import csv
import dataclasses
import json
import os

import pytest
import torch

from lmsys import records
from lmsys.__main__ import main
from lmsys.bench import board_2026 as board
from lmsys.bench import leaderboard, processes, replicas
from lmsys.bench.peers import NativeLM
from lmsys.model import TransformerLM
from lmsys.step import planner

RATES = dataclasses.asdict(planner.H200)
GOOD = {"loss_error": 1e-7, "plain_loss_error": 1e-7, "gradient_error": 1e-6, "plain_gradient_error": 9e-7}
OK = {"status": "ok", "losses": [5.0, 4.0], "times_ms": [1.0, 3.0, 2.0], "peak_bytes": 2.0**30, "ready_s": 1.0}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run at smoke scale beside a row of the other board: rows, lines of progress, folder."""
    folder = tmp_path_factory.mktemp("board")
    with leaderboard.writer("2025", folder, method={"timer": "t"}, parameters={"seed": 7}) as out:
        out.write(
            {"board": "2025", "implementation": "torch_flex", "status": "ok", "median_ms": 6.25, "compiled": True}
        )
    lines = []
    frame = board.run(board.settings("smoke"), folder, on_row=lambda row: lines.append(board.row_line(row)))
    return frame, lines, folder


def faked(monkeypatch, results):
    """stream() that gives these results, by what a point does, and the settings that it was called with."""
    called = []

    def stream(measure, points, chosen, **_):
        called.append((chosen, os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), [point.what for point in points]))
        for point in points:
            yield point, results[point.what].pop(0)

    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(replicas, "stream", stream)
    return called


def test_both_implementations_train_alike_and_the_twin_is_right(measured):
    frame, lines, _ = measured
    assert frame.implementation.tolist() == ["lmsys", "torch_native"] and set(frame.status) == {"ok"}, (
        frame.note.tolist()
    )
    ours, peer = frame.to_dict("records")
    assert ours["loss"] == pytest.approx(peer["loss"], abs=1e-4) and (ours["gpus"], ours["batch"]) == (2, 2)
    assert 0 < ours["error"] <= 2 * ours["error_pytorch"] + 1e-6
    assert ours["samples"] == 2 and ours["tokens_per_s"] == pytest.approx(2 * 32 / ours["median_ms"] * 1e3, rel=1e-3)
    assert "blocks of 3 that keep: " in ours["plan"] and "DOES NOT FIT" not in ours["plan"]
    assert ours["predicted_ms"] > 0 and ours["predicted_peak_mib"] == pytest.approx(ours["peak_mib"], rel=0.6)
    assert frame.note.str.contains("not the board's shape").all() and "moments in fp32" in peer["note"]
    assert len(lines) == 2 and all(len(line.splitlines()) == 1 for line in lines)
    said = " ".join(board.conclusions(frame))
    assert "gradients are within" in said and "times ours" in said and "The plan: blocks of 3" in said


def test_the_other_boards_rows_stay(measured, tmp_path):
    frame, _, folder = measured
    path = folder / "leaderboard_results.csv"
    rows = list(csv.DictReader(path.open()))
    assert [(row["board"], row["implementation"]) for row in rows] == [
        ("2025", "torch_flex"),
        ("2026", "lmsys"),
        ("2026", "torch_native"),
    ]
    assert rows[0]["median_ms"] == "6.25" and leaderboard.read(folder, "2025").compiled.tolist() == [True]
    stamp = json.loads(path.with_suffix(".json").read_text())
    assert stamp["parameters"]["implementations"] == ["lmsys", "torch_native"]
    assert stamp["parameters"]["others"]["2025"]["parameters"] == {"seed": 7}
    again = records.compare(path, path)
    assert again.verdict.eq("same").all() and len(again) == 3
    # The first board again: its row is replaced, the second's rows and their stamp stay.
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    copy.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    with leaderboard.writer("2025", tmp_path, method={}, parameters={"seed": 8}) as out:
        out.write({"board": "2025", "implementation": "torch_flex", "status": "error"})
    assert [row[1:5] for row in csv.reader(copy.open())][2:] != [] and len(leaderboard.read(tmp_path, "2026")) == 2
    others = json.loads(copy.with_suffix(".json").read_text())["parameters"]["others"]
    assert list(others) == ["2026"] and others["2026"]["parameters"]["timed_steps"] == 2
    assert leaderboard.read(tmp_path, "2025").status.tolist() == ["error"]
    assert leaderboard.read(tmp_path, "2026").loss.tolist() == frame.loss.tolist()


def test_the_report_says_both_and_names_the_public_entry(measured):
    frame, _, folder = measured
    text = board.write_report(frame, folder).read_text()
    assert "| `lmsys` | ours |" in text and "3,837 ms, on two B200s" in text
    assert "5.364 ms, on one H100" in leaderboard.public("2025")


def test_a_wrong_gradient_is_an_error(monkeypatch):
    assert board._verdict(GOOD, "fp32") == {}
    for wrong in ({"gradient_error": 1e-4}, {"loss_error": 1e-3}, {"gradient_error": float("nan")}):
        verdict = board._verdict(GOOD | wrong, "fp32")
        assert verdict["status"] == "error" and "the twin is wrong: loss_error" in verdict["note"]
    low = {"loss_error": 5e-5, "plain_loss_error": 1e-6, "gradient_error": 1.2e-2, "plain_gradient_error": 9e-3}
    assert board._verdict(low, "bf16") == {} and board._verdict(low, "fp32") != {}
    twin = GOOD | {"status": "ok"} | board._verdict(GOOD | {"gradient_error": 1e-2}, "fp32")
    plan = {"status": "ok", "rates": RATES, "free": None}
    faked(monkeypatch, {"twin": [twin], "plan": [plan], "lmsys": [OK], "torch_native": [OK]})
    ours, peer = board.rows(board.settings("smoke"), torch.device("cpu"))
    assert ours["status"] == "error" and "the twin is wrong" in ours["note"] and peer["status"] == "ok"
    assert "the twin is wrong" in board.row_line(ours)


def test_the_twin_is_right_in_bf16():
    """Matrices gathered, multiplied and averaged in bf16: no further from float64 than the plain model with matrices in bf16."""
    chosen = dataclasses.replace(board.settings("smoke"), dtype="bf16")
    ((_, result),) = replicas.stream(board.measure, [board.Point("twin")], chosen, device="cpu", limit_s=100)
    assert result["status"] == "ok", result["note"]
    assert 1e-3 < result["gradient_error"] <= 2 * result["plain_gradient_error"]


def test_out_of_memory_is_a_row_with_its_plan_and_tried_once_more(monkeypatch, tmp_path):
    full = {"status": "oom", "note": "CUDA out of memory. Tried to allocate 2.50 GiB"}
    # Memory for some of what the small model could keep, at either margin.
    chosen = dataclasses.replace(board.settings("smoke"), margin_gib=0.00001)
    step = board.shape(chosen)
    most = planner.Plan(step, planner.H200, 0.0, (frozenset(planner.KINDS),) * 3).peak_bytes
    plan = {"status": "ok", "rates": RATES, "free": most}
    results = {"twin": [GOOD | {"status": "ok"}], "plan": [plan, plan], "lmsys": [full, OK], "torch_native": [full]}
    called = faked(monkeypatch, results)
    frame = board.run(chosen, tmp_path)
    assert frame.status.tolist() == ["oom", "ok", "oom"] and frame.path.fillna("").tolist() == ["", "second plan", ""]
    assert frame.implementation.tolist() == ["lmsys", "lmsys", "torch_native"]
    assert [settings.margin_gib for settings, _, _ in called] == [chosen.margin_gib, 3 * chosen.margin_gib]
    assert called[1][2] == ["plan", "lmsys"] and {allocator for _, allocator, _ in called} == {
        "expandable_segments:True"
    }
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    first, second = frame.plan[:2]
    assert first != second and frame.predicted_peak_mib[1] < frame.predicted_peak_mib[0]
    said = " ".join(board.conclusions(frame))
    assert f"oom: CUDA out of memory. Tried to allocate 2.50 GiB; not the board's shape. The plan was: {first}." in said
    assert "oom" in board.table(frame) and "2 [1.40, 2.60]" in board.table(frame).replace("2.00", "2")
    records.compare(tmp_path / "leaderboard_results.csv", tmp_path / "leaderboard_results.csv")


def test_a_step_that_fits_no_plan_says_so(monkeypatch):
    plan = {"status": "ok", "rates": RATES, "free": 1000.0}
    failed = {"status": "error", "note": "rank 0 of 2 failed"}
    faked(monkeypatch, {"twin": [GOOD | {"status": "ok"}], "plan": [plan], "lmsys": [failed]})
    (row,) = board.rows(board.settings("smoke", implementations=["lmsys"]), torch.device("cpu"))
    assert row["status"] == "error" and "more than the budget of" in row["note"] and "plan" not in row


def test_the_peer_is_the_same_model_in_chunks(monkeypatch):
    torch.manual_seed(0)
    config = board.settings("smoke").model
    weights = TransformerLM(config).state_dict()
    whole, chunked = NativeLM(config), board.PeerLM(config)
    chunked.chunk_loss = board.chunk_loss
    monkeypatch.setattr(board, "_PEER_CHUNK", 24)
    data = board.batch(config, 2, 3, torch.device("cpu"))
    for model in (whole, chunked):
        model.load_state_dict(weights)
        model(*data).backward()
    torch.testing.assert_close(chunked(*data), whole(*data))
    for a, b in zip(chunked.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_full_scale_is_the_courses(monkeypatch):
    with pytest.raises(ValueError, match="takes 2 GPUs, and this run has 0; scale cpu"):
        board.settings("full", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "resolve_device", lambda _: torch.device("cuda", 0))
    full = board.settings("full", device="cuda")
    assert dataclasses.astuple(full.model)[:6] == (4096, 11008, 34, 32, 32768, 151936)
    assert (full.dtype, full.compiled, full.kernel) == ("bf16", True, "flash_attention_triton")
    assert full.twin.head_dim == full.model.head_dim == 128 and len(board.TWIN_KEEP) == full.twin.num_layers
    free = planner.H200_BYTES - 2**30
    assert board.make_plan(full, planner.H200, free).budget == free - 4 * 2**30
    text = board.explain_plan(board.paper_plan())
    assert "| attention | 260 |" in text and "34 of 34" in text and "With inputs alone: peak 66" in text


def test_a_machine_with_one_gpu_shows_the_small_model_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(processes, "resolve_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))
    assert board.settings("smoke").device == "cpu"
    with pytest.raises(ValueError, match="gpus 2 is more than this machine has: 1"):
        board.settings("smoke", device="cuda")


def test_settings_say_what_is_wrong():
    for message, given in {
        "unknown implementation of the 2026 board 'lmsy'": {"implementations": ["lmsy"]},
        "implementations must not be empty": {"implementations": []},
        "timed_steps is 0": {"timed_steps": 0},
        "margin_gib is -1": {"margin_gib": -1},
        "each process takes a GPU of its own": {"device": "cuda:1"},
    }.items():
        with pytest.raises(ValueError, match=message):
            board.settings("smoke", **given)


def test_on_the_command_line(measured, capsys, monkeypatch):
    assert main(["leaderboard", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "| attention | 260 |" in shown and "134" in shown and "GiB" in shown
    assert main(["leaderboard", "--board", "2026", "--scale", "full", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lmsys leaderboard: the 2026 board at scale full takes 2 GPUs")
    frame, _, _ = measured
    asked = {}

    def run(chosen, folder, *, on_row):
        asked.update(dataclasses.asdict(chosen))
        return frame

    monkeypatch.setattr(board, "run", run)
    assert main(["leaderboard", "--board", "2026", "--scale", "smoke", "--margin_gib", "9", "--timed_steps", "3"]) == 0
    assert (asked["margin_gib"], asked["timed_steps"], asked["scale"]) == (9.0, 3, "smoke")
    assert "leaderboard_2026_report.md" in capsys.readouterr().out
