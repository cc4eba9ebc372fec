from types import SimpleNamespace

import pytest
import torch

from lmsys import attention as kernels
from lmsys import cost
from lmsys.attention.reference import reference_attention
from lmsys.bench import attention as sweeps
from lmsys.bench import leaderboard
from lmsys.bench.measure import Measurement
from lmsys.records import SCHEMAS

CPU = torch.device("cpu")


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile that gives the function back, which takes no seconds."""
    compiled = []
    monkeypatch.setattr(leaderboard.torch, "compile", lambda function: compiled.append(function) or function)
    return compiled


def board(*implementations, **other):
    return leaderboard.settings("smoke", implementations=implementations or None, device="cpu", **other)


def test_the_board_is_the_courses():
    full = leaderboard.settings("full", device="cpu")
    assert (full.heads, full.seq_len, full.head_dim, full.dtype) == (16, 16384, 64, "bf16")
    assert {"flash_attention_triton", "flash_attention_cuda", "torch_sdpa_cudnn", "flash_attention_4"} <= set(
        full.implementations
    )
    assert "scaled_dot_prod_attention" not in full.implementations
    for bad, message in (
        ({"rep_ms": 0}, "rep_ms is 0"),
        ({"warmup_ms": 1.5}, "warmup_ms is 1.5"),
        ({"implementations": []}, "must not be empty"),
        ({"implementations": ["cudnn"]}, "unknown attention kernel 'cudnn'"),
        ({"device": "tpu"}, "unknown device"),
    ):
        with pytest.raises(ValueError, match=message):
            leaderboard.settings("smoke", **bad)


def test_a_board_leaves_its_artifacts(uncompiled, tmp_path):
    shown = []
    names = ("flash_attention_torch", "torch_sdpa_flash", "torch_sdpa_cudnn")
    frame = leaderboard.run(board(*names), tmp_path, on_row=lambda row: shown.append(leaderboard.row_line(row)))
    assert tuple(frame.columns) == (*SCHEMAS["leaderboard_results"], *leaderboard.EXTRA_COLUMNS)
    assert frame.implementation.tolist() == list(names) and frame.status.tolist() == ["ok", "ok", "unsupported"]
    assert set(frame.board) == {2025} and set(frame.gpus) == {0} and len(uncompiled) == 2 and len(shown) == 3
    assert frame.note.str.contains("not the board's shape").all()
    row = frame.iloc[0]
    flops = cost.attention_flops(1, 2, 64, 64, 16, True, "forward_backward")
    assert row.tflops == pytest.approx(flops / row.median_ms / 1e9, rel=1e-3) and row.samples == 2 and row.bare_ms > 0
    assert row.error <= 2 * row.error_pytorch + 4e-6 and row.peak_mib > 0
    report = leaderboard.write_report(frame, tmp_path).read_text()
    assert "is the fastest at" in report and "times the speed of torch_sdpa_flash" in report
    assert "torch_sdpa_cudnn has no time, unsupported" in report and "| `torch_sdpa_cudnn` |  | unsupported |" in report
    assert (tmp_path / "leaderboard_results.json").exists()


def test_the_step_accumulates_the_gradient_of_one_tensor(uncompiled, monkeypatch):
    """The course's step: sum, backward, into the gradient of the tensor that q, k and v are thirds of."""
    seen = []

    def once(function, **options):
        function()
        function()
        seen.append(options["resident"][0].grad)
        return Measurement("ok", 1.0, 1.0, 1.0, 2.0, [1.0])

    monkeypatch.setattr(leaderboard, "measure", once)
    sweep = sweeps.settings("smoke", kernels=["vectorized_torch"], passes=["forward_backward"], device="cpu")
    point = sweeps.Point(sweep, sweeps.Case("2025", 1, 2, 2, 8, 8, 16, "fp32", True), CPU)
    row = leaderboard._step_times(board(), lambda q, k, v: reference_attention(q, k, v, causal=True)[0], point, CPU)
    q, k, v = (t.detach().double().requires_grad_() for t in (point.q, point.k, point.v))
    exact = torch.autograd.grad(reference_attention(q, k, v, causal=True)[0].sum(), (q, k, v))
    torch.testing.assert_close(seen[0], 2 * torch.stack(exact).float(), rtol=1e-4, atol=1e-5)
    assert row["status"] == "ok" and row["median_ms"] == row["bare_ms"] == 1.0


def test_a_gpu_is_timed_by_do_bench(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    asked = {}

    def do_bench(step, **options):
        asked.update(options)
        step()
        return [4.0, 2.0, 3.0]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(leaderboard, "measure", lambda *_, **__: Measurement("ok", 9.0, 9.0, 9.0, 2.0, [9.0]))
    monkeypatch.setattr(leaderboard, "device_name", lambda _: "NVIDIA H200")
    full = leaderboard.settings("full", rep_ms=700, warmup_ms=50, device="cpu")
    tensors = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(4)]
    point = SimpleNamespace(**dict(zip(("q", "k", "v", "grad"), tensors, strict=True)))
    gpu = SimpleNamespace(type="cuda")
    row = leaderboard._step_times(full, lambda q, k, v: reference_attention(q, k, v, causal=True)[0], point, gpu)
    assert asked == {"warmup": 50, "rep": 700, "return_mode": "all"}
    assert (row["median_ms"], row["samples"], row["bare_ms"], row["peak_mib"]) == (3.0, 3, 9.0, 2.0)
    flops = 3.5 * 2 * 16 * 64 * 16384**2
    assert row["mfu"] == pytest.approx(flops / 3e-3 / 989.5e12) and row["tflops"] == pytest.approx(flops / 3e-3 / 1e12)


def test_what_cannot_be_compiled_is_measured_without_and_says_so(monkeypatch, tmp_path):
    def refuses(function):
        def fails(*_):
            raise RuntimeError("Unsupported: a graph\nmore")

        return fails

    monkeypatch.setattr(leaderboard.torch, "compile", refuses)
    frame = leaderboard.run(board("torch_sdpa_flash"), tmp_path)
    (row,) = frame.to_dict("records")
    assert row["status"] == "ok" and not row["compiled"]
    assert "measured without torch.compile, which fails: RuntimeError: Unsupported: a graph" in row["note"]
    assert "not compiled" in leaderboard.table(frame) and "not compiled" in leaderboard.row_line(row)
    assert any("without torch.compile" in sentence for sentence in leaderboard.conclusions(frame))


def test_failures_are_rows(uncompiled, monkeypatch):
    def times(error):
        def fails(*_):
            raise error

        monkeypatch.setattr(leaderboard, "_step_times", fails)
        (row,) = leaderboard.rows(board("torch_sdpa_flash"), CPU)
        return row

    assert times(torch.OutOfMemoryError("no memory"))["status"] == "oom"
    row = times(RuntimeError("illegal memory access"))
    assert row["status"] == "error" and "illegal memory access" in leaderboard.row_line(row)
    monkeypatch.setattr(sweeps, "attention", lambda q, k, v, **_: q + k + v)
    (row,) = leaderboard.rows(board("torch_sdpa_flash"), CPU)
    assert row["status"] == "error" and "wrong" in row["note"] and "median_ms" not in row


def test_out_of_memory_in_the_step_is_a_status(uncompiled, monkeypatch):
    monkeypatch.setattr(leaderboard, "measure", lambda *_, **__: Measurement("oom", note="CUDA out of memory"))
    (row,) = leaderboard.rows(board("torch_sdpa_flash"), CPU)
    assert row["status"] == "oom" and row["note"].startswith("CUDA out of memory")


def test_both_paths_have_a_row_where_there_are_two(uncompiled, monkeypatch):
    def explain(q, k, v, causal, *, path="auto"):
        name = "hopper" if path == "auto" else path
        return kernels.Explanation(name, name, ())

    monkeypatch.setattr(kernels, "explain", explain)
    monkeypatch.setattr(sweeps.Point, "check", lambda *_: {"forward_backward": {"error": 1.0, "error_pytorch": 1.0}})
    measured = {"status": "ok", "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "bare_ms": 1.0}
    monkeypatch.setattr(leaderboard, "_step_times", lambda *_: dict(measured))
    found = list(leaderboard.rows(board("flash_attention_triton"), CPU))
    assert [(row["path"], row["compiled"]) for row in found] == [("hopper", True), ("portable", True)]
    assert all("interpreter" in row["note"] for row in found)
    assert leaderboard.row_line(found[0]).startswith("flash_attention_triton (hopper)")
