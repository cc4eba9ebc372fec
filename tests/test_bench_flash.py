import math

import pandas as pd
import pytest
import torch

from lmsys import plots
from lmsys.attention import attention
from lmsys.bench import counters, flash, flash_report
from lmsys.bench.measure import Measurement
from lmsys.records import SCHEMAS

pytestmark = pytest.mark.filterwarnings("ignore:no CUDA GPU")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton runs nothing on the CPU")
CPU = torch.device("cpu")
NAMES = ("flash_steps", "ceilings", "counters", "pytorch_attention", "flash_benchmarking")


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """All that the notebook measures but the board, at its smallest."""
    folder = tmp_path_factory.mktemp("flash")
    settings = flash.settings(
        "smoke",
        steps=["naive", "vectorized", "tiled PyTorch", "warp specialization", "overlap"],
        step_seq_len=48,
        course_seq_lens=[16, 33],
        bench_seq_lens=[16, 33],
        implementations=["naive", "flash"],
        device="cpu",
    )
    return {
        "folder": folder,
        "ceilings": flash.run_ceilings(settings, folder),
        "steps": flash.run_steps(settings, folder),
        "counters": counters.run(settings, folder),
        "pytorch_attention": flash.run_pytorch_attention(settings, folder),
        "flash_benchmarking": flash.run_flash_benchmarking(settings, folder),
    }


def test_settings_fill_from_the_scale_and_refuse_what_is_wrong():
    full = flash.settings("full")
    assert full.steps == tuple(flash.STEPS) and full.course_batch == 8 and full.course_dtype == "fp32"
    assert full.course_seq_lens == (256, 1024, 4096, 8192, 16384) and full.course_head_dims == (16, 32, 64, 128)
    assert full.bench_seq_lens == tuple(2**i for i in range(7, 17)) and set(full.bench_dtypes) == {"bf16", "fp32"}
    assert flash.settings("smoke", bench_seq_lens=[8]).bench_seq_lens == (8,)
    for bad, message in (
        ({"steps": ["navie"]}, "unknown step 'navie'. Did you mean 'naive'"),
        ({"implementations": ["x"]}, "unknown implementation"),
        ({"implementations": []}, "implementations is empty"),
        ({"board_kernels": ["x"]}, "unknown attention kernel"),
        ({"bench_dtypes": ["fp8"]}, "unknown dtype"),
        ({"bench_seq_lens": [0]}, "bench_seq_lens is .*whole numbers of 1 or more"),
        ({"step_head_dims": [24]}, "step_width 16 is not a multiple"),
        ({"budget_s": 0}, "budget_s is 0; it must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            flash.settings("smoke", **bad)


@interpreted
def test_every_table_has_its_schema_and_a_row_for_each_point(frames):
    for name in NAMES:
        frame = frames[name.removeprefix("flash_") if name == "flash_steps" else name]
        schema = SCHEMAS[f"{name}_results"]
        assert tuple(frame.columns[: len(schema)]) == schema
        assert (frames["folder"] / f"{name}_results.json").exists()
    steps = frames["steps"]
    assert set(steps[steps.status != "ok"].step) == {"warp specialization", "overlap"}
    assert set(steps[steps.status != "ok"].status) == {"unsupported"}
    for name in ("pytorch_attention", "flash_benchmarking"):
        frame = frames[name]
        assert len(frame) == 2 * 2 * 3 and (frame.status == "ok").all()
        assert (frame.error <= 2 * frame.error_pytorch + 4e-6).all()
        both = frame.pivot_table(index=["implementation", "seq_len"], columns="pass", values="median_ms")
        assert (both.forward_backward > both[["forward", "backward"]].max(axis=1)).all()


@interpreted
def test_memory_before_backward_is_what_the_formula_says(frames):
    course = frames["pytorch_attention"]
    assert course.before_backward_mib.tolist() == pytest.approx(course.computed_mib.tolist(), rel=0.02)
    naive = flash.before_backward_bytes("naive", 8, 16384, 64, 4)
    assert naive == 5 * 8 * 16384 * 64 * 4 + 8 * 16384**2 * 4 + 16384**2
    assert flash.before_backward_bytes("flash", 8, 16384, 64, 4) < naive / 40


def test_compiled_stands_in_for_the_formula():
    point = flash.Point((2, 24, 16), torch.float32, CPU, seed=1)
    compiled = flash.implementations()["compiled"]
    error, pytorch = point.errors(compiled, True)
    assert error <= 2 * pytorch + 4e-6
    assert len(compiled._graphs) == 1


def test_bytes_of_a_step_by_counting():
    shape, size = (2, 3, 64, 16), 2
    arrays = 4 * 2 * 3 * 64 * 16 * size
    assert flash.step_bytes(flash.STEPS["naive"], *shape, size) == arrays + 8 * size * 2 * 3 * 64 * 64
    assert flash.step_bytes(flash.STEPS["tiled PyTorch"], *shape, size) == arrays + 48 * 2 * 3 * 64 * 64 / 2
    assert flash.step_bytes(flash.STEPS["TMA"], *shape, size) == arrays


@pytest.mark.parametrize("shape", [(2, 50, 16), (2, 3, 50, 16), (1, 1, 3000, 16)])
def test_a_point_finds_errors_in_any_result(shape):
    """In o, and in a gradient; where there are more queries than are checked, in the last of them."""

    def right(q, k, v):
        return attention(q, k, v, causal=True, kernel="vectorized_torch")

    point = flash.Point(shape, torch.float32, CPU, seed=0)
    error, pytorch = point.errors(right, True)
    assert error <= 2 * pytorch + 4e-6
    for wrong in (
        lambda q, k, v: right(q, k, v) + torch.where(torch.arange(shape[-2]) == shape[-2] - 1, 0.1, 0.0)[:, None],
        lambda q, k, v: attention(q, k, v, causal=False, kernel="vectorized_torch"),
        lambda q, k, v: right(q, k, v) + 1e-2 * (q - q.detach()),
    ):
        assert point.errors(wrong, True)[0] > 1e-3
    assert point.errors(lambda q, k, v: right(q, k, v) * math.nan, False)[0] == math.inf


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")


def test_where_memory_runs_out_is_a_row():
    settings = flash.settings("smoke", device="cpu")
    point = flash.Point((1, 16, 8), torch.float32, CPU, seed=0)
    everywhere = flash._three(lambda q, k, v: no_memory(), "naive", point, settings)
    assert {row["status"] for row in everywhere.values()} == {"oom"}

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return attention(q, k, v, causal=True, kernel="vectorized_torch")

        backward = staticmethod(no_memory)

    late = flash._three(NoBackward.apply, "naive", point, settings)
    assert [late[which]["status"] for which in ("forward", "backward", "forward_backward")] == ["ok", "oom", "oom"]
    assert late["forward"]["before_backward_mib"] > 0 and "out of memory" in late["backward"]["note"]


def test_memory_of_a_cpu_is_asked_for_first(monkeypatch):
    monkeypatch.setattr("lmsys.bench.flash.available_bytes", lambda: 2**20)
    point = flash.Point((1, 1024, 8), torch.float32, CPU, seed=0)
    assert "0.0 GiB are free" in flash._shortage("naive", point) and flash._shortage("flash", point) == ""


def test_a_wrong_result_and_a_failure_are_rows():
    settings = flash.settings("smoke", device="cpu")
    point = flash.Point((1, 16, 8), torch.float32, CPU, seed=0)

    def fails(q, k, v):
        raise RuntimeError("ptxas died\nlong story")

    for function, status, note in (
        (lambda q, k, v: 0 * (q + k + v), "error", "wrong: error"),
        (fails, "error", "RuntimeError: ptxas died"),
        (lambda *qkv: attention(*qkv, causal=True, kernel="torch_sdpa_cudnn"), "unsupported", "torch_sdpa_cudnn"),
    ):
        for row in flash._three(function, "naive", point, settings).values():
            assert row["status"] == status and note in row["note"]


def test_passes_are_timed_apart_and_together():
    inputs = [torch.randn(64, 64, requires_grad=True)]
    passes = flash.measure_passes(
        lambda: inputs[0] @ inputs[0],
        lambda o: torch.autograd.grad(o.sum(), inputs),
        device=CPU,
        iterations=4,
        budget_s=1,
        resident=inputs,
    )
    assert all(isinstance(m, Measurement) and m.status == "ok" and m.samples == 4 for m in passes[:3])
    assert passes.forward_backward.times_ms == pytest.approx(
        [a + b for a, b in zip(passes.forward.times_ms, passes.backward.times_ms, strict=True)]
    )
    assert passes.before_backward_mib == pytest.approx(2 * 64 * 64 * 4 / 2**20)  # the input and the output
    assert passes.backward.peak_mib > passes.before_backward_mib


def test_figures_and_report(frames):
    folder = frames["folder"]
    for name in flash_report.FIGURES:
        path = flash_report.figure(name, frames, folder)
        assert (path is None) == (name == "counters")
        assert path is None or path.read_bytes().startswith(b"\x89PNG")
    text = flash_report.write_report(frames, folder).read_text()
    for part in ("did not run here: needs a Hopper GPU", "No hardware counters: needs a CUDA GPU", "Accounting, naive"):
        assert part in text
    assert "nan" not in text.lower()


def test_conclusions_come_from_the_rows():
    """Rows such as a GPU gives: out of memory, a step that is slower, flash beside naive."""
    base = {"batch": 8, "head_dim": 64, "dtype": "fp32", "causal": True, "device": "NVIDIA H200", "note": ""}
    rows = []
    for name, factor in (("naive", 1.0), ("flash", 0.25)):
        for length in (1024, 2048, 4096):
            lost = name == "naive" and length == 4096
            for which in ("forward", "backward"):
                oom = lost and which == "backward"
                rows.append(
                    base
                    | {"implementation": name, "seq_len": length, "pass": which, "status": "oom" if oom else "ok"}
                    | {"median_ms": math.nan if oom else factor * length, "computed_mib": factor * length**2}
                    | {"before_backward_mib": factor * length**2}
                )
    said = " ".join(flash_report.course_conclusions(pd.DataFrame(rows)))
    assert "naive runs out of it in the backward pass from 4,096 tokens" in said
    assert "from 2,048 to 4,096 tokens memory before backward grows 4.00 times" in said
    assert "FlashAttention against eager, forward: 4.00 times the speed in the geometric mean of 3 points" in said
    steps = [
        base | {"step": step, "heads": 4, "seq_len": 64, "pass": "forward", "status": "ok", "counted_mib": 10.0}
        | {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "tflops": 100 / ms}
        for step, ms in (("naive", 4.0), ("vectorized", 2.0), ("TMA", 2.5))
    ]  # fmt: skip
    ceilings = pd.DataFrame({"what": ["copy", "product"], "status": ["ok", "ok"], "rate": [4000.0, 200.0]})
    said = " ".join(flash_report.steps_conclusions(pd.DataFrame(steps), ceilings))
    assert "vectorized 2.00, TMA 0.80" in said and "slower than its predecessor: TMA (1.25 times" in said
    assert "25% of what a large product" in said


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
    done = json.loads({done!r})
    for _ in done:
        lines += [["a_kernel", *["1000000"] * len(metrics)], ["spin_kernel", *["1"] * len(metrics)]]
    with open(sys.argv[sys.argv.index("--log-file") + 1], "w") as log:
        log.write("\\n".join(",".join('"%s"' % cell for cell in line) for line in lines))
    with open(sys.argv[sys.argv.index("--done") + 1], "w") as file:
        json.dump(done, file)
"""


@pytest.mark.parametrize("refuses", [False, True])
def test_a_profiler_is_called_or_its_refusal_is_a_row(tmp_path, monkeypatch, refuses):
    import sys

    fake = tmp_path / "ncu"
    fake.write_text(FAKE_NCU.format(python=sys.executable, refuses=refuses, done='[[16, "naive"]]'))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(counters, "_missing", lambda device: None)
    settings = flash.settings("smoke", steps=["naive", "overlap"], device="cpu")
    naive, overlap = counters.rows(settings)
    if refuses:
        assert naive["status"] == overlap["status"] == "unsupported" and "ERR_NVGPUCTRPERM" in naive["note"]
        return
    assert naive["status"] == "ok" and naive["time_ms"] == 1 and naive["tensor_pct"] == pytest.approx(1e6)
    assert "l2_mib" not in naive and overlap["status"] == "unsupported"
    frame = pd.DataFrame([naive | dict.fromkeys(set(SCHEMAS["counters_results"]) - set(naive)), overlap])
    assert "naive" in flash_report.counters_table(frame)
    assert plots.save(plots.flash_counters(frame), tmp_path / "counters.png").exists()


@pytest.mark.parametrize("case", ["no such program", "too long"])
def test_a_profiler_that_does_not_answer(tmp_path, monkeypatch, case):
    if case == "too long":
        (tmp_path / "ncu").write_text("#!/bin/sh\nsleep 30 & wait\n")
        (tmp_path / "ncu").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counters, "_LIMIT_S", 0.3)
    monkeypatch.setattr(counters, "_LIST_LIMIT_S", 0.3)
    monkeypatch.setattr(counters, "_missing", lambda device: None)
    (row,) = counters.rows(flash.settings("smoke", steps=["naive"], device="cpu"))
    assert row["status"] == "unsupported"
    assert ("longer than 0.3 s" if case == "too long" else "did not start") in row["note"]


@interpreted
def test_compiling_ahead_covers_what_compiles_and_a_failure_ends_nothing(capsys):
    full = flash.settings("full", device="cpu")
    tasks = flash._compilations(full)
    assert len(tasks) == len(set(tasks)) == 5 * 2 + 2 * 4 * 2 + 2 * 4
    assert ("overlap", (4, 16, 4096, 128), "bf16") in tasks and ("compiled", (8, 4096, 16), "fp32") in tasks
    small = flash.settings(
        "smoke", steps=["naive", "warp specialization", "TMA"], implementations=["naive"], device="cpu"
    )
    assert flash.compile_ahead(small) == 0.0  # nothing to gain without a GPU
    flash._compile_share(small, 0, 1)
    said = capsys.readouterr().out
    assert "compile ahead: warp specialization" in said and "TMA" not in said


def test_steps_that_are_left_out_of_counting_say_so(monkeypatch):
    monkeypatch.setattr(counters, "_missing", lambda device: None)
    monkeypatch.setattr(counters, "_profile", lambda settings: {})
    settings = flash.settings("smoke", steps=["tiled PyTorch"], step_head_dims=[8, 16], device="cpu")
    small, large = counters.rows(settings)
    assert "largest head dim only" in small["note"] and large["note"] == "does not run here"
