from types import SimpleNamespace

import pytest
import torch

from lmsys import cost
from lmsys.attention import Explanation
from lmsys.attention.reference import reference_attention
from lmsys.bench import attention as sweeps
from lmsys.bench import experiment, leaderboard
from lmsys.bench.experiment import Parameters
from lmsys.bench.measure import Measurement

CPU = torch.device("cpu")


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile that gives the function back, which takes no seconds."""
    compiled = []
    monkeypatch.setattr(leaderboard.torch, "compile", lambda function: compiled.append(function) or function)
    return compiled


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(sweeps, "_current", None)


def parameters(*implementations, scale="smoke", **given):
    given |= {"scale": scale, "board": ["2025"], "implementations": list(implementations) or None}
    return leaderboard.NOTEBOOK.parameters({"device": "cpu"} | given)


def run(folder, *implementations):
    p = parameters(*implementations)
    keep = leaderboard.other_boards("2025")
    return experiment.run(leaderboard.ATTENTION, p, folder=folder, keep=keep, say=lambda text: None)


def case_of(p):
    (point, *_) = leaderboard.points(p)
    return sweeps.Case(point, Parameters(passes=["forward_backward"], device="cpu", seed=0))


def test_the_board_is_the_courses():
    points = leaderboard.points(parameters(scale="full"))
    shapes = {tuple(point[key] for key in ("batch", "heads", "q_len", "head_dim", "dtype")) for point in points}
    assert shapes == {(1, 16, 16384, 64, "bf16")}
    names = {point["implementation"] for point in points}
    assert {"flash_attention_triton", "flash_attention_cuda", "torch_sdpa_cudnn", "flash_attention_4"} <= names
    assert "scaled_dot_prod_attention" not in names
    for bad, message in (
        ({"rep_ms": 0}, "rep_ms is 0"),
        ({"warmup_ms": 1.5}, "warmup_ms is 1.5"),
        ({"board": ["2024"]}, "unknown board '2024'"),
        ({"device": "tpu"}, "unknown device"),
    ):
        with pytest.raises(ValueError, match=message):
            leaderboard.points(leaderboard.NOTEBOOK.parameters({"scale": "smoke", "board": ["2025"]} | bad))
    for name in ("cudnn", "torch_native"):  # torch_native is of the 2026 board
        with pytest.raises(ValueError, match=f"unknown implementation '{name}'"):
            parameters(name)


def test_a_board_leaves_its_rows(uncompiled, tmp_path):
    names = ("flash_attention_torch", "torch_sdpa_flash", "torch_sdpa_cudnn")
    frame = run(tmp_path, *names)
    assert tuple(frame.columns[:8]) == (
        *("board", "implementation", "gpus", "status", "median_ms", "samples", "mfu", "peak_mib"),
    )
    assert frame.implementation.tolist() == list(names) and frame.status.tolist() == ["ok", "ok", "unsupported"]
    assert set(frame.board) == {2025} and set(frame.gpus) == {0} and len(uncompiled) == 2
    assert frame.note[:2].tolist() == ["not the board's shape"] * 2
    row = frame.iloc[0]
    flops = cost.attention_flops(1, 2, 64, 64, 16, True, "forward_backward")
    assert row.tflops == pytest.approx(flops / row.median_ms / 1e9, rel=1e-3) and row.samples == 2 and row.bare_ms > 0
    assert row.error <= 2 * row.error_pytorch + 4e-6 and row.peak_mib > 0


def test_the_other_boards_rows_and_their_stamp_stay(uncompiled, tmp_path):
    run(tmp_path, "torch_sdpa_flash")
    path = tmp_path / "leaderboard_results.csv"
    path.write_text(path.read_text().replace("2025,torch_sdpa_flash", "2026,lmsys"))
    frame = run(tmp_path, "flash_attention_torch")
    assert frame.board.tolist() == [2026, 2025] and len(leaderboard.of_board(frame, "2026")) == 1
    assert '"kept"' in path.with_suffix(".json").read_text()
    assert run(tmp_path, "torch_sdpa_flash").implementation.tolist() == ["lmsys", "torch_sdpa_flash"]


def test_the_step_accumulates_the_gradient_of_one_tensor(monkeypatch):
    """The course's step: sum, backward, into the gradient of the tensor that q, k and v are thirds of."""
    seen = []

    def once(function, **options):
        function()
        function()
        seen.append(options["resident"][0].grad)
        return Measurement(1.0, 1.0, 1.0, 2.0, [1.0])

    monkeypatch.setattr(leaderboard, "measure", once)
    p = parameters("vectorized_torch")
    case = case_of(p)
    row = leaderboard.step_times(lambda q, k, v: reference_attention(q, k, v, causal=True)[0], case, p)
    q, k, v = (t.detach().double().requires_grad_() for t in (case.q, case.k, case.v))
    exact = torch.autograd.grad(reference_attention(q, k, v, causal=True)[0].sum(), (q, k, v))
    torch.testing.assert_close(seen[0], 2 * torch.stack(exact).float(), rtol=1e-4, atol=1e-5)
    assert row["median_ms"] == row["bare_ms"] == 1.0


def test_a_gpu_is_timed_by_do_bench(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    asked = {}

    def do_bench(step, **options):
        asked.update(options)
        step()
        return [4.0, 2.0, 3.0]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(leaderboard, "measure", lambda *_, **__: Measurement(9.0, 9.0, 9.0, 2.0, [9.0]))
    monkeypatch.setattr(leaderboard, "device_name", lambda _: "NVIDIA H200")
    q, k, v, grad = (torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    case = SimpleNamespace(q=q, k=k, v=v, grad=grad, device=SimpleNamespace(type="cuda"))
    p = parameters(scale="full", rep_ms=700, warmup_ms=50)
    row = leaderboard.step_times(lambda q, k, v: reference_attention(q, k, v, causal=True)[0], case, p)
    assert asked == {"warmup": 50, "rep": 700, "return_mode": "all"}
    assert (row["median_ms"], row["samples"], row["bare_ms"], row["peak_mib"]) == (3.0, 3, 9.0, 2.0)
    flops = 3.5 * 2 * 2 * 16 * 8**2
    assert row["mfu"] == pytest.approx(flops / 3e-3 / 989.5e12) and row["tflops"] == pytest.approx(flops / 3e-3 / 1e12)


def test_what_cannot_be_compiled_is_measured_without_and_says_so(monkeypatch, tmp_path):
    def refuses(function):
        def fails(*_):
            raise RuntimeError("Unsupported: a graph\nmore")

        return fails

    monkeypatch.setattr(leaderboard.torch, "compile", refuses)
    (row,) = run(tmp_path, "torch_sdpa_flash").to_dict("records")
    assert row["status"] == "ok" and not row["compiled"]
    assert "measured without torch.compile, which fails: RuntimeError: Unsupported: a graph" in row["note"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("no memory"), "oom"), (RuntimeError("illegal memory access"), "error")],
)
def test_failures_are_rows(uncompiled, monkeypatch, tmp_path, error, status):
    def fails(*_):
        raise error

    monkeypatch.setattr(leaderboard, "step_times", fails)
    (row,) = run(tmp_path, "torch_sdpa_flash").to_dict("records")
    assert row["status"] == status and str(error) in row["note"]


def test_a_wrong_result_has_no_time(uncompiled, monkeypatch, tmp_path):
    monkeypatch.setattr(sweeps, "attention", lambda q, k, v, **_: q + k + v)
    (row,) = run(tmp_path, "torch_sdpa_flash").to_dict("records")
    assert row["status"] == "error" and "wrong" in row["note"] and row["median_ms"] != row["median_ms"]


def test_out_of_memory_in_the_step_is_a_status(uncompiled, monkeypatch, tmp_path):
    def measure(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(leaderboard, "measure", measure)
    (row,) = run(tmp_path, "torch_sdpa_flash").to_dict("records")
    assert row["status"] == "oom" and row["note"].startswith("CUDA out of memory")


def test_both_paths_have_a_row_where_there_are_two_and_peers_a_verdict(uncompiled, monkeypatch, tmp_path):
    def explain(q, k, v, causal, *, path="auto"):
        name = "hopper" if path == "auto" else path
        return Explanation(name, name, ())

    times = iter([3.0, 4.0, 6.0])

    def step_times(*_):
        ms = next(times)
        return {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "bare_ms": ms, "tflops": 1 / ms}

    monkeypatch.setattr(sweeps, "explain", explain)
    monkeypatch.setattr(sweeps.Case, "check", lambda *_: {"forward_backward": {"error": 1.0, "error_pytorch": 1.0}})
    monkeypatch.setattr(leaderboard, "step_times", step_times)
    frame = run(tmp_path, "flash_attention_triton", "torch_sdpa_flash")
    assert frame.path[:2].tolist() == ["hopper", "portable"] and frame.note.str.contains("interpreter").sum() == 2
    assert leaderboard.table(frame)["ours beside it"].tolist() == [
        "ours",
        "ours",
        "",
    ]  # the interpreter's times say nothing
    table = leaderboard.table(frame.assign(note=None))
    assert table["ours beside it"].tolist() == ["ours", "ours", "2.00, ahead"] and table["step, ms"][0].startswith(
        "3.00 ["
    )
