import json
import sys

import pytest
import torch

from lmsys.attention import attention
from lmsys.bench import attention as sweeps
from lmsys.bench import counters, experiment, flash

pytestmark = pytest.mark.filterwarnings("ignore:no CUDA GPU")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton runs nothing on the CPU")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(sweeps, "_current", None)


def parameters(scale="smoke", **given):
    return flash.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | given)


def run(what, p, folder):
    return experiment.run(what, p, folder=folder, say=lambda text: None)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """All that the notebook measures but the board, at its smallest."""
    folder = tmp_path_factory.mktemp("flash")
    p = parameters(
        steps=["naive", "vectorized", "tiled PyTorch", "warp specialization", "overlap"],
        step_seq_len=48,
        course_seq_lens=[16, 33],
        bench_seq_lens=[16, 33],
    )
    kinds = (flash.CEILINGS, flash.STEP_TIMES, counters.COUNTERS, flash.PYTORCH_ATTENTION, flash.FLASH_BENCHMARKING)
    return {kind.name.removesuffix("_results"): run(kind, p, folder) for kind in kinds}


def test_parameters_fill_from_the_scale_and_refuse_what_is_wrong():
    full = parameters("full")
    assert full.steps == list(flash.STEPS) and full.course_batch == 8 and full.course_dtype == "fp32"
    assert full.course_seq_lens == [256, 1024, 4096, 8192, 16384] and full.course_head_dims == [16, 32, 64, 128]
    assert full.bench_seq_lens == [2**i for i in range(7, 17)] and set(full.bench_dtypes) == {"bf16", "fp32"}
    assert parameters(bench_seq_lens=[8]).bench_seq_lens == [8]
    for bad, message in (
        ({"steps": ["navie"]}, "unknown step 'navie'. Did you mean 'naive'"),
        ({"implementations": ["x"]}, "unknown implementation"),
        ({"implementations": []}, "implementations must not be empty"),
        ({"board_kernels": ["x"]}, "unknown board_kernel 'x'"),
        ({"bench_dtypes": ["fp8"]}, "unknown bench_dtype"),
        ({"course_head_dims": []}, "course_head_dims is empty"),
        ({"bench_seq_lens": [0]}, "bench_seq_lens is 0; it must be 1 or more"),
        ({"step_head_dims": [24]}, "step_width 16 is not a multiple"),
        ({"budget_s": 0}, "budget_s is 0.0; it must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parameters(**bad)


@interpreted
def test_every_table_has_its_columns_and_a_row_for_each_point(frames):
    times = ["pass", "status", "median_ms", "p20_ms", "p80_ms", "samples", "tflops", "peak_mib"]
    for name, first in (
        ("flash_steps", ["step", "batch", "heads", "seq_len", "head_dim", "dtype", "causal", *times]),
        ("ceilings", ["what", "size", "dtype", "status", "median_ms", "p20_ms", "p80_ms", "samples", "rate", "unit"]),
        (
            "counters",
            ["step", "batch", "heads", "seq_len", "head_dim", "dtype", "causal", "status", "kernels", "time_ms"],
        ),
        ("pytorch_attention", ["implementation", "batch", "seq_len", "head_dim", "dtype", "causal", *times]),
        ("flash_benchmarking", ["implementation", "batch", "seq_len", "head_dim", "dtype", "causal", *times]),
    ):
        assert list(frames[name].columns[: len(first)]) == first
    steps = frames["flash_steps"]
    assert len(steps) == 5 + 4 and (frames["ceilings"].rate > 0).all()
    assert set(steps[steps.status != "ok"].step) == {"warp specialization", "overlap"}
    assert set(steps[steps.status != "ok"].status) == {"unsupported"}
    assert set(frames["counters"].note) == {"needs a CUDA GPU"} and len(frames["counters"]) == 5
    for name in ("pytorch_attention", "flash_benchmarking"):
        frame = frames[name]
        assert len(frame) == 2 * 2 * 3 and (frame.status == "ok").all()
        assert (frame.error <= 2 * frame.error_pytorch + 4e-6).all()
        assert (frame[frame.implementation == "flash"].note == "in Triton's CPU interpreter").all()


@interpreted
def test_memory_before_backward_is_what_the_formula_says(frames):
    course = frames["pytorch_attention"]
    forward = course[course["pass"] == "forward"]
    assert forward.before_backward_mib.tolist() == pytest.approx(forward.computed_mib.tolist(), rel=0.02)
    naive = flash.before_backward_bytes("naive", 8, 16384, 64, 4)
    assert naive == 5 * 8 * 16384 * 64 * 4 + 8 * 16384**2 * 4 + 16384**2
    assert flash.before_backward_bytes("flash", 8, 16384, 64, 4) < naive / 40


def test_compiled_stands_in_for_the_formula():
    """One graph for all lengths, compiled at a typical one."""
    p = parameters(implementations=["compiled"], bench_seq_lens=[24, 40])
    before = len(flash._graphs)
    points = flash.bench_points(p)
    assert {str(point["options"]) for point in points} == {"{'compiled_at': 40}"}
    for point in (points[0], points[-1]):
        checked = flash.case_of(point, p).check(point["kernel"], point["options"])
        assert all(row["error"] <= 2 * row["error_pytorch"] + 4e-6 for row in checked.values())
    assert len(flash._graphs) == before + 1
    assert {point["options"]["compiled_at"] for point in flash.bench_points(parameters("full"))
            if point["implementation"] == "compiled"} == {4096}  # fmt: skip


def test_bytes_of_a_step_by_counting():
    shape, size = (2, 3, 64, 16), 2
    arrays = 4 * 2 * 3 * 64 * 16 * size
    assert flash.step_bytes(flash.STEPS["naive"], *shape, size) == arrays + 8 * size * 2 * 3 * 64 * 64
    assert flash.step_bytes(flash.STEPS["tiled PyTorch"], *shape, size) == arrays + 48 * 2 * 3 * 64 * 64 / 2
    assert flash.step_bytes(flash.STEPS["TMA"], *shape, size) == arrays


@interpreted
def test_a_step_of_its_own_is_checked_like_a_kernel(monkeypatch, tmp_path):
    from lmsys.attention import flash_steps

    p = parameters(steps=["TMA"])
    (row,) = run(flash.STEP_TIMES, p, tmp_path).to_dict("records")
    assert row["status"] == "ok" and row["error"] <= 2 * row["error_pytorch"] + 4e-6
    monkeypatch.setattr(flash_steps, "tma_forward", lambda q, k, v, causal: (q + k + v, None))
    monkeypatch.setattr(sweeps, "_current", None)
    (row,) = run(flash.STEP_TIMES, p, tmp_path).to_dict("records")
    assert row["status"] == "error" and "wrong" in row["note"] and row["median_ms"] != row["median_ms"]


def naive_rows(monkeypatch, tmp_path, answer):
    """The rows of one length of pytorch_attention, all three passes, where the formula is another function."""
    monkeypatch.setattr(sweeps, "attention", lambda q, k, v, *, causal, kernel: answer(q, k, v))
    p = parameters(implementations=["naive"], course_seq_lens=[16])
    return run(flash.PYTORCH_ATTENTION, p, tmp_path).set_index("pass")


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")


def test_where_memory_runs_out_is_a_row(monkeypatch, tmp_path):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return attention(q, k, v, causal=True, kernel="vectorized_torch")

        backward = staticmethod(no_memory)

    assert set(naive_rows(monkeypatch, tmp_path, no_memory).status) == {"oom"}
    monkeypatch.setattr(sweeps, "_current", None)
    late = naive_rows(monkeypatch, tmp_path, NoBackward.apply)
    assert late.status.to_dict() == {"forward": "ok", "backward": "oom", "forward_backward": "oom"}
    assert late.before_backward_mib["forward"] > 0 and "out of memory" in late.note["backward"]


def test_a_wrong_result_and_a_failure_are_rows(monkeypatch, tmp_path):
    def fails(q, k, v):
        raise RuntimeError("ptxas died\nlong story")

    for function, status, note in (
        (lambda q, k, v: 0 * (q + k + v), "error", "wrong: error"),
        (fails, "error", "RuntimeError: ptxas died"),
        (lambda *qkv: attention(*qkv, causal=True, kernel="torch_sdpa_cudnn"), "unsupported", "torch_sdpa_cudnn"),
    ):
        monkeypatch.setattr(sweeps, "_current", None)
        frame = naive_rows(monkeypatch, tmp_path, function)
        assert len(frame) == 3 and set(frame.status) == {status} and frame.note.str.contains(note).all()


def test_compiling_ahead_covers_what_compiles(monkeypatch):
    asked = []
    monkeypatch.setattr(flash.ahead, "compile_points", lambda call, points, p, processes, limit_s: asked.extend(points))
    full = parameters("full")
    flash.compile_ahead(flash.bench_points)(full)
    assert asked == []  # nothing to gain without a GPU
    monkeypatch.setattr(flash, "resolve_device", lambda device: torch.device("cuda"))
    flash.compile_ahead(flash.bench_points)(full)
    assert len(asked) == 2 * 4 * 2 and {point["seq_len"] for point in asked} == {16384}
    asked.clear()
    flash.compile_ahead(flash.step_points)(full)
    compiled = {"compiled", "portable Triton", "TMA", "warp specialization", "overlap"}
    assert {point["step"] for point in asked} == compiled and len(asked) == 2 * (5 + 3)


LOG = """==PROF== Connected to process 7 (python)
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum","sm__x.avg.pct","launch__registers_per_thread"
"","","ns","byte","%","register/thread"
"0","gemm","3,000,000","2097152","50","128"
"1","softmax","1000000","1048576","10","32"
"2","void at::cuda::spin_kernel(long)","10","0","0","16"
"3","attention","2000000","1048576","n/a","168"
"4","void at::cuda::spin_kernel(long)","10","0","0","16"
"""
METRICS = {
    "time_ms": "gpu__time_duration.sum",
    "dram_mib": "dram__bytes.sum",
    "tensor_pct": "sm__x.avg.pct",
    "registers": "launch__registers_per_thread",
}


def test_the_profilers_csv_is_cut_at_the_marks_and_summed():
    first, second = counters.parse(LOG, METRICS)
    assert first == {"status": "ok", "kernels": 2, "time_ms": 4, "dram_mib": 3, "tensor_pct": 40, "registers": 128}
    assert second == {"status": "ok", "kernels": 1, "time_ms": 2, "dram_mib": 1, "registers": 168}
    empty = counters.parse(LOG.replace('"3","attention"', '"3","spin_kernel"'), METRICS)[1]
    assert empty["status"] == "error" and "no kernel" in empty["note"]


FAKE_NCU = """#!{python}
import json, sys
if "--query-metrics" in sys.argv:
    print("gpu__time_duration  Counter\\ndram__bytes  Counter\\nsm__inst_executed_pipe_tensor  Counter")
elif {refuses}:
    print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters")
else:
    metrics = sys.argv[sys.argv.index("--metrics") + 1].split(",")
    lines = [["Kernel Name", *metrics], ["", *metrics]]
    lines += [["a_kernel", *["1000000"] * len(metrics)], ["spin_kernel", *["1"] * len(metrics)]]
    with open(sys.argv[sys.argv.index("--log-file") + 1], "w") as log:
        log.write("\\n".join(",".join('"%s"' % cell for cell in line) for line in lines))
    with open(json.loads(sys.argv[-1])["done"], "w") as file:
        json.dump([[16, "naive"]], file)
"""


@pytest.fixture
def here(monkeypatch):
    """As on a machine with a GPU and a profiler."""
    monkeypatch.setattr(counters, "_missing", lambda device: None)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_profiler_is_called_or_its_refusal_is_a_row(tmp_path, monkeypatch, here, refuses):
    program = tmp_path / "ncu"
    program.write_text(FAKE_NCU.format(python=sys.executable, refuses=refuses))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    frame = run(counters.COUNTERS, parameters(steps=["naive", "overlap"]), tmp_path)
    naive, overlap = frame.to_dict("records")
    if refuses:
        assert naive["status"] == overlap["status"] == "unsupported" and "ERR_NVGPUCTRPERM" in naive["note"]
        return
    assert naive["status"] == "ok" and naive["time_ms"] == 1 and naive["tensor_pct"] == pytest.approx(1e6)
    assert naive["l2_mib"] != naive["l2_mib"] and overlap["status"] == "unsupported"


@pytest.mark.parametrize("case", ["no such program", "too long"])
def test_a_profiler_that_does_not_answer(tmp_path, monkeypatch, here, case):
    if case == "too long":
        (tmp_path / "ncu").write_text("#!/bin/sh\nsleep 30 & wait\n")
        (tmp_path / "ncu").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counters, "_LIMIT_S", 0.3)
    monkeypatch.setattr(counters, "_LIST_LIMIT_S", 0.3)
    (row,) = counters.rows(parameters(steps=["naive"]))
    assert row["status"] == "unsupported"
    assert ("longer than 0.3 s" if case == "too long" else "did not start") in row["note"]


def test_steps_that_are_left_out_of_counting_say_so(monkeypatch, here):
    monkeypatch.setattr(counters, "_profile", lambda p: {})
    small, large = counters.rows(parameters(steps=["tiled PyTorch"], step_head_dims=[8, 16]))
    assert "largest head dim only" in small["note"] and large["note"] == "does not run here"


def test_the_profilers_driver_runs_each_step_and_marks_it(monkeypatch, tmp_path):
    called = []

    class Runtime:
        cudaProfilerStart = staticmethod(lambda: called.append("start"))
        cudaProfilerStop = staticmethod(lambda: called.append("stop"))

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: called.append("mark"))
    points = counters.steps(parameters(steps=["naive", "warp specialization"]))
    done = tmp_path / "done.json"
    counters.main(json.dumps({"points": points, "device": "cpu", "done": str(done)}))
    assert json.loads(done.read_text()) == [[16, "naive"]] and called == ["start", "mark", "stop"]
