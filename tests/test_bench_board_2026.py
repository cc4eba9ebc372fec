"""The 2026 board: a run in two processes, the twin's verdict, failures as rows, and a file that two boards share."""

import dataclasses
import json
import os

import pytest
import torch

from lmsys import records
from lmsys.__main__ import main
from lmsys.bench import board_2026 as board
from lmsys.bench import leaderboard, peers, processes
from lmsys.bench.steps import alone
from lmsys.device import cpu_name
from lmsys.model import TransformerLM
from lmsys.step import planner

GOOD = {"loss_error": 1e-7, "plain_loss_error": 1e-7, "gradient_error": 1e-6, "plain_gradient_error": 9e-7}
OK = {"rows": [{"median_ms": 2.0, "p20_ms": 1.4, "p80_ms": 2.6, "samples": 3}], "tables": {}}


def parameters(*, scale="smoke", **given):
    given = {"scale": scale, "board": ["2026"]} | given
    return board.parameters(leaderboard.NOTEBOOK.parameters(given))


def run(folder, p):
    return board.run(p, folder=folder, say=lambda text: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run at smoke scale beside a row of the other board: rows, folder."""
    folder = tmp_path_factory.mktemp("board")
    row = {"board": "2025", "implementation": "torch_flex", "status": "ok", "median_ms": 6.25, "device": cpu_name()}
    stamp = {"environment": {}, "method": {}, "parameters": {"seed": 7}}
    records.write_results(folder / "leaderboard_results.csv", leaderboard.COLUMNS, [row], stamp)
    return run(folder, parameters()), folder


def test_both_implementations_train_alike_and_the_twin_is_right(measured):
    frame, _ = measured
    notes = frame.note.tolist()
    assert frame.implementation.tolist() == ["lmsys", "torch_native"] and set(frame.status) == {"ok"}, notes
    ours, peer = frame.to_dict("records")
    assert ours["loss"] == pytest.approx(peer["loss"], abs=1e-4) and (ours["gpus"], ours["batch"]) == (2, 2)
    assert 0 < ours["error"] <= 2 * ours["error_pytorch"] + 1e-6
    assert ours["samples"] == 2 and ours["tokens_per_s"] == pytest.approx(2 * 32 / ours["median_ms"] * 1e3, rel=1e-3)
    assert "blocks of 3 that keep: " in ours["plan"] and "DOES NOT FIT" not in ours["plan"]
    assert ours["predicted_ms"] > 0 and ours["predicted_peak_mib"] == pytest.approx(ours["peak_mib"], rel=0.6)
    assert frame.note.str.contains("not the board's shape").all() and "moments in fp32" in peer["note"]
    shown = leaderboard.table(frame).set_index("implementation")["ours beside it"]
    assert shown["lmsys"] == "ours" and shown["torch_native"].startswith(f"{peer['median_ms'] / ours['median_ms']:.2f}")


def test_the_other_boards_rows_and_their_stamp_stay(measured):
    _, folder = measured
    path = folder / "leaderboard_results.csv"
    rows = records.read_results(path)
    assert rows.board.tolist() == [2025, 2026, 2026] and rows.median_ms[0] == 6.25
    stamp = json.loads(path.with_suffix(".json").read_text())
    assert stamp["parameters"]["implementations"] == ["lmsys", "torch_native"]
    assert stamp["kept"]["parameters"] == {"seed": 7}
    assert records.compare(path, path).verdict.eq("same").all()


def test_a_wrong_gradient_is_an_error():
    board.check_errors(GOOD, "fp32")
    for wrong in ({"gradient_error": 1e-4}, {"loss_error": 1e-3}, {"gradient_error": float("nan")}):
        with pytest.raises(ArithmeticError, match="the twin is wrong: loss_error"):
            board.check_errors(GOOD | wrong, "fp32")
    low = {"loss_error": 5e-5, "plain_loss_error": 1e-6, "gradient_error": 1.2e-2, "plain_gradient_error": 9e-3}
    board.check_errors(low, "bf16")
    with pytest.raises(ArithmeticError):
        board.check_errors(low, "fp32")


def twin_in_bf16(process, p):
    """For stream: as the board at scale full computes, on the CPU."""
    leaderboard.SCALES["smoke"]["step"]["dtype"] = "bf16"
    board._KERNELS["bf16"] = "flash_attention_torch"
    return board.check_twin(process, p)


def test_the_twin_is_right_in_bf16():
    """Matrices gathered, multiplied and averaged in bf16.

    No further from float64 than the plain model with matrices in bf16.
    """
    ((_, result),) = processes.stream(twin_in_bf16, [(2, parameters())], device="cpu", limit_s=100)
    assert "status" not in result, result["note"]
    assert 1e-3 < result["error"] <= 2 * result["error_pytorch"]


def test_out_of_memory_is_a_row_and_tried_once_more(monkeypatch, tmp_path):
    full = {"status": "oom", "note": "CUDA out of memory. Tried to allocate 2.50 GiB The plan: blocks of 3"}
    results, called = [full, full, OK], []

    def stream(call, items, **_):
        called.append((call.args[1].margin_gib, os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), len(items)))
        for count, point in items:
            assert count == 2
            yield point, results.pop(0)

    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(processes, "stream", stream)
    frame = run(tmp_path, parameters(margin_gib=2))
    assert frame.implementation.tolist() == ["lmsys", "torch_native", "lmsys"]
    assert frame.status.tolist() == ["oom", "oom", "ok"] and frame.path.fillna("").tolist() == ["", "", "second plan"]
    assert called == [(2, "expandable_segments:True", 2), (6, "expandable_segments:True", 1)]
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "The plan: blocks of 3" in frame.note[0]
    assert sorted(leaderboard.table(frame)["step, ms"]) == ["2.00 [1.40, 2.60]", "oom", "oom"]


def test_a_step_that_runs_out_of_memory_names_its_plan(monkeypatch):
    def measure_step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nmore")

    monkeypatch.setattr(board, "measure_step", measure_step)
    monkeypatch.setattr(board, "check_twin", lambda *_: {})
    monkeypatch.setattr(board, "device_rates", lambda *_: planner.H200)
    p = parameters()
    with pytest.raises(torch.OutOfMemoryError, match=r"2.50 GiB. The plan: blocks of 3 that keep: .*qkv 3"):
        board.measure_point(board.points(p)[0], p, alone(torch.device("cpu")))
    monkeypatch.setattr(board, "free_bytes", lambda _: 1000.0)
    with pytest.raises(ValueError, match="more than the budget of"):
        board.measure_point(board.points(p)[0], p, alone(torch.device("cpu")))


def test_the_peer_is_the_same_model_in_chunks(monkeypatch):
    torch.manual_seed(0)
    config = board.config_of(parameters()).model
    weights = TransformerLM(config).state_dict()
    whole, chunked = peers.NativeLM(config), peers.ChunkedLM(config)
    monkeypatch.setattr(chunked, "chunk", 24)
    drawn = torch.randint(config.vocab_size, (2, config.context_length + 1))
    data = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    for model in (whole, chunked):
        model.load_state_dict(weights)
        model(*data).backward()
    torch.testing.assert_close(chunked(*data), whole(*data))
    for a, b in zip(chunked.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_full_scale_is_the_courses(monkeypatch):
    with pytest.raises(ValueError, match="takes 2 GPUs, and this run has 0; scale cpu"):
        parameters(scale="full", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "resolve_device", lambda _: torch.device("cuda", 0))
    p = parameters(scale="full", device="cuda")
    (ours, peer), twin = (board.config_of(p, name) for name in board.IMPLEMENTATIONS), board.config_of(p, twin=True)
    assert dataclasses.astuple(ours.model)[:6] == (4096, 11008, 34, 32, 32768, 151936)
    assert (ours.train.dtype, ours.train.attention_kernel) == ("bf16", "flash_attention_triton")
    assert (ours.train.compile, peer.train.compile) == (False, True)
    assert twin.model.head_dim == ours.model.head_dim == 128 and len(board.TWIN_KEEP) == twin.model.num_layers
    free = planner.H200_BYTES - 2**30
    assert board.make_plan(ours, 4.0, planner.H200, free).budget == free - 4 * 2**30
    kinds, totals = board.plan_kinds(board.paper_plan()), board.plan_totals(board.paper_plan()).set_index("a GPU")
    attention = kinds.set_index("kind").loc["attention"]
    assert round(attention["MiB a block"]) == 260 and attention["blocks that keep it"] == "34 of 34"
    assert 66 < totals.loc["peak, GiB", "inputs alone"] < 67 < 135 < totals.loc["peak, GiB", "plan"] < 136


def test_a_machine_with_one_gpu_shows_the_small_model_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(processes, "resolve_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))
    assert (parameters().device, parameters(scale="full").scale) == ("cpu", "cpu")
    with pytest.raises(ValueError, match="gpus 2 is more than this machine has: 1"):
        parameters(device="cuda")


def test_parameters_say_what_is_wrong():
    for message, given in {
        "unknown implementation 'lmsy'": {"implementations": ["lmsy"]},
        "implementations must not be empty": {"implementations": []},
        "timed_steps is 0": {"timed_steps": 0},
        "margin_gib is -1": {"margin_gib": -1},
        "margin_gib is inf": {"margin_gib": float("inf")},
        "each process takes a GPU of its own": {"device": "cuda:1"},
    }.items():
        with pytest.raises(ValueError, match=message):
            parameters(**given)


def test_on_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LMSYS_OUTPUT", str(tmp_path))
    assert main(["leaderboard", "--plan", "true", "--margin_gib", "9"]) == 0
    shown = capsys.readouterr().out
    assert "| attention | 260 |" in shown and "130.8" in shown and "GiB" in shown
    assert main(["leaderboard", "--board", "2026", "--scale", "full", "--device", "cpu"]) == 2
    assert "the 2026 board at scale full takes 2 GPUs" in capsys.readouterr().err
