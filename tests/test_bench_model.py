"""The model benchmark: its points, steps and rows, named ranges, and the comparison of two runs."""

import dataclasses
import itertools
import json
import math
import os
import weakref

import pandas as pd
import pytest
import torch

from lmsys import cost, records
from lmsys.__main__ import main
from lmsys.bench import model, model_report, ranges
from lmsys.bench.measure import StepClock
from lmsys.config import model_size

CPU = torch.device("cpu")
SMOKE = ["benchmark", "--scale", "smoke", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps this small are slower on several threads, by far where other work runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**given):
    return model.settings("smoke", device="cpu", **{"warmup": 1, "steps": 2} | given)


def one(**given):
    """A point, its subject and settings."""
    chosen = {"sizes": ["tiny"], "contexts": [32], "dtypes": ["fp32"], "modes": ["full_step"]} | given
    bench = settings(**chosen)
    (point,) = model.points(bench)
    return point, model.Subject(bench, point, CPU), bench


def measured_rows(bench):
    return [row for row, _ in model.rows(bench, CPU, model.points(bench), StepClock(CPU))]


# --- Points and settings --------------------------------------------------------------------------


def test_the_full_scale_is_what_the_course_asks_for_and_more():
    bench = model.settings("full", device="cpu")
    points = model.points(bench)
    assert len(points) == len(set(points)) and (bench.warmup, bench.steps, bench.batch) == (5, 10, 4)
    for size, mode in itertools.product(("small", "medium", "large", "xl", "2.7b"), model.MODES):
        of = [p for p in points if (p.size, p.mode) == (size, mode)]
        assert {p.dtype for p in of} == set(model.DTYPES) and {p.compiled for p in of} >= {"no", "blocks"}
        for dtype, compiled in itertools.product(("tf32", "bf16"), ("no", "blocks")):
            lengths = [p.context_length for p in of if (p.dtype, p.compiled) == (dtype, compiled)]
            assert lengths == sorted(lengths) and {128, 2048} <= set(lengths)
    runs = [key for key, _ in itertools.groupby(points, key=lambda p: p.model)]
    assert len(runs) == len(set(runs)), "a model is made once"


def test_a_given_list_takes_the_place_of_the_scales_points():
    bench = settings(contexts=[16], attention_kernels=["vectorized_torch", "torch_sdpa_flash"], checkpoint=1)
    points = model.points(bench)
    assert {p.context_length for p in points} == {16} and {p.kernel for p in points} == set(bench.attention_kernels)
    assert {p.checkpoint for p in points} == {1} and len(points) == 2 * 2 * 3
    assert model.points(bench, [bench.repeat])[0] in points


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "smal"], "unknown model size 'smal'. Did you mean 'small'?"),
        (["--modes", "backward"], "unknown mode 'backward'"),
        (["--dtypes", "fp8"], "unknown dtype 'fp8'"),
        (["--compile", "yes"], "unknown compiled 'yes'"),
        (["--attention_kernels", "flash"], "unknown attention kernel 'flash'"),
        (["--contexts", "0"], "contexts is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--warmup", "-1"], "warmup is -1"),
        (["--batch_size", "0"], "batch is 0"),
        (["--checkpoint", "0"], "checkpoint is 0"),
        (["--budget_s", "0"], "budget_s is 0"),
        (["--device", "cuda:64"], "cuda:64"),
        (["--sizes", "2.7b", "--contexts", "10000000"], "no point fits the memory of"),
        (["--output_json", "/proc/none/x.json"], "cannot write to this folder"),
        (["--output_json", "/"], "a folder; give the path of a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_before_any_work(arguments, message, capsys, output_root, monkeypatch):
    def work(*_):
        raise AssertionError("it must be found before any work")

    monkeypatch.setattr(model, "Subject", work)
    assert main([*SMOKE, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1 and captured.out == ""
    assert not list(output_root.rglob("*.csv"))


def test_least_memory_by_hand():
    config = model_size("tiny", context_length=32)
    point = model.Point("tiny", 32, 2, "bf16", "no", "full_step", "vectorized_torch", None)
    state, logits, scores = 16 * cost.model_parameters(config), 2 * 2 * 32 * 10_000, 2 * 2 * 2 * 32 * 32
    assert model.least_bytes(point, config) == state + logits + 2 * scores  # two layers
    assert model.least_bytes(dataclasses.replace(point, checkpoint=1), config) == state + logits + scores
    assert model.least_bytes(dataclasses.replace(point, kernel="torch_sdpa_flash"), config) == state + logits


# --- Steps ----------------------------------------------------------------------------------------


def test_each_mode_does_its_part():
    for mode, moves, differentiates in (("forward", 0, 0), ("forward_backward", 0, 1), ("full_step", 1, 1)):
        point, subject, _ = one(modes=[mode])
        made: list[torch.Tensor] = []
        hooks = [p.register_post_accumulate_grad_hook(made.append) for p in subject.model.parameters()]
        before = [p.detach().clone() for p in subject.model.parameters()]
        with subject.ready(point) as step:
            step()
            assert all(p.grad is None for p in subject.model.parameters()), "gradients are dropped with the step"
        changed = [not torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True)]
        assert all(changed) if moves else not any(changed)
        assert len(made) == differentiates * len(hooks)
        assert subject.optimizer is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_computes_in_its_dtype_and_fp16_steps_are_scaled(dtype):
    point, subject, _ = one(dtypes=[dtype])
    seen = []
    subject.model.layers[0].ffn.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    before = subject.model.layers[0].ffn.w1.weight.detach().clone()
    with subject.ready(point) as step:
        step()
    assert seen == [model.DTYPES[dtype]]
    assert not torch.equal(before, subject.model.layers[0].ffn.w1.weight), "the scaler left no step out"


def test_checkpointing_trades_memory_for_time():
    peaks = []
    for checkpoint in (None, 1):
        (row,) = measured_rows(
            settings(sizes=["tiny"], contexts=[256], dtypes=["fp32"], modes=["forward_backward"], checkpoint=checkpoint)
        )
        assert row["checkpoint"] == checkpoint
        peaks.append(row["peak_mib"])
    assert peaks[1] < 0.9 * peaks[0]


def test_products_are_set_as_asked_and_put_back():
    before = torch.get_float32_matmul_precision()
    found = []
    for dtype in ("fp32", "tf32", "bf16"):
        with model._products(torch.device("cuda"), dtype):
            found.append(torch.get_float32_matmul_precision())
    assert found == ["highest", "high", "high"] and torch.get_float32_matmul_precision() == before


def test_compiled_blocks_are_compiled_once_a_shape_and_never_run_eager(monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **options: compile_(*a, **options | {"backend": counting}))
    bench = settings(
        sizes=["tiny"], contexts=[16, 32], dtypes=["fp32"], modes=["forward", "full_step"], compiled=["blocks"]
    )
    rows = measured_rows(bench)
    assert [row["status"] for row in rows] == ["ok"] * 4
    # A context: the block for inference; the block for training, and the loss. Two layers share a block's graph.
    assert len(graphs) == 2 * (1 + 2)
    assert len(model._compilations(model.points(bench))) == 4

    graphs.clear()
    rows = measured_rows(dataclasses.replace(bench, grids=(dataclasses.replace(bench.grids[0], compiled=("model",)),)))
    assert [row["status"] for row in rows] == ["ok"] * 4 and len(graphs) == 2 * (1 + 2), "the whole model is one graph"


# --- Rows -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of the smoke scale with a JSON file: settings, results, folder."""
    folder = tmp_path_factory.mktemp("model")
    bench = model.settings("smoke", device="cpu")
    rows = []
    frame = model.run(bench, folder, output_json=folder / "all.json", on_row=rows.append)
    assert len(rows) == len(frame)
    assert all(model_report.row_line(row).startswith("tiny") for row in rows)
    return bench, frame, folder


def test_rows_follow_from_their_samples(measured):
    bench, frame, folder = measured
    assert len(frame) == 12 and (frame.status == "ok").all()
    kept = json.loads((folder / "all.json").read_text())["rows"]
    for row, full in zip(frame.itertuples(), kept, strict=True):
        samples = pd.Series([float(value) for value in row.times_ms.split()])
        assert row.samples == len(samples) == 3 and full["times_ms"] == pytest.approx(list(samples), rel=1e-5)
        assert row.mean_ms == pytest.approx(samples.mean(), rel=1e-4)
        assert row.std_ms == pytest.approx(samples.std(), rel=1e-2, abs=1e-4)  # the CSV's samples are rounded
        assert row.median_ms == pytest.approx(samples.median(), rel=1e-4)
        assert len(full["warmup_ms"]) == row.warmup_done == 2 and row.first_ms == pytest.approx(
            full["warmup_ms"][0], rel=1e-4
        )
        assert row.tokens_per_s == pytest.approx(2 * row.context_length / row.median_ms * 1e3, rel=1e-4)
        flops = cost.train_flops_per_token(model_size("tiny"), row.context_length) / (3 if row.mode == "forward" else 1)
        assert row.tflops == pytest.approx(row.tokens_per_s * flops / 1e12, rel=1e-4)
    assert frame.mfu.isna().all(), "no peak of a CPU is known"
    peaks = frame[frame["dtype"] == "fp32"].pivot(index="context_length", columns="mode", values="peak_mib")
    assert (peaks.forward < peaks.forward_backward).all() and (peaks.forward_backward < peaks.full_step).all()
    assert (
        peaks.full_step[32] > model.least_bytes(model.points(bench)[2], model_size("tiny", context_length=64)) / 2**20
    )


def test_its_report(measured):
    _, frame, folder = measured
    written = model_report.write_report(frame, folder)
    assert sorted(written) == ["precision", "report", "time"]
    text = written["report"].read_text()
    assert text.count("| tiny |") == 12 and "standard deviation" in text and "a step that does nothing" in text
    assert model_report.time_table(frame, "forward").count("±") == 4
    assert model_report.precision_table(frame).count("x)") == 3
    stamp = json.loads((folder / f"{model.NAME}.json").read_text())
    assert stamp["method"]["empty_step_ms"] < 0.01 * frame.median_ms.min()


def test_a_planted_out_of_memory_ends_its_series_and_no_other(monkeypatch):
    plain = model.Subject._step
    held = []

    def step(self, point):
        run = plain(self, point)
        fits = point.size == "mini" or point.context_length == 16 or point.mode == "forward"

        def full():
            run()
            self.model.token_embeddings.weight.grad = torch.zeros_like(self.model.token_embeddings.weight)
            held.append(self.model)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        return run if fits else full

    monkeypatch.setattr(model.Subject, "_step", step)
    bench = settings(sizes=["tiny", "mini"], contexts=[16, 32, 64], dtypes=["fp32"], warmup=0, steps=1)
    rows = {(row["size"], row["context_length"], row["mode"]): row for row in measured_rows(bench)}
    status = {key: row["status"] for key, row in rows.items()}
    assert {mode: status["tiny", 16, mode] for mode in model.MODES} == dict.fromkeys(model.MODES, "ok")
    assert [status["tiny", 32, mode] for mode in model.MODES] == ["ok", "oom", "oom_skipped"]
    assert [status["tiny", 64, mode] for mode in model.MODES] == ["ok", "oom_skipped", "oom_skipped"]
    assert all(status["mini", length, mode] == "ok" for length in (16, 32, 64) for mode in model.MODES)
    assert "2 GiB" in rows["tiny", 32, "forward_backward"]["note"]
    assert rows["tiny", 64, "full_step"]["note"] == "memory ran out at context 32, forward_backward"
    assert len(held) == 1 and held[0].token_embeddings.weight.grad is None, "the gradients of the failed step are gone"
    frame = pd.DataFrame(list(rows.values()))
    assert any("3 points oom_skipped" in sentence for sentence in model_report.conclusions(frame))
    assert "oom_skipped" in model_report.time_table(frame, "full_step")


def test_one_model_at_a_time(monkeypatch):
    """The next size is made when the one before has left the memory."""
    made = []
    plain = model.Subject.__init__

    def recorded(self, *args, **options):
        assert all(before() is None for before in made)
        plain(self, *args, **options)
        made.append(weakref.ref(self.model))

    monkeypatch.setattr(model.Subject, "__init__", recorded)
    rows = measured_rows(settings(sizes=["tiny", "mini"], contexts=[16], dtypes=["fp32"], nvtx=True))
    assert [row["status"] for row in rows] == ["ok"] * 6 and len(made) == 2


def test_other_failures_are_rows_too(monkeypatch):
    rows = measured_rows(settings(sizes=["tiny"], contexts=[16], dtypes=["fp32", "tf32"], modes=["forward"]))
    assert [row["status"] for row in rows] == ["ok", "unsupported"] and "tensor cores" in rows[1]["note"]
    rows = measured_rows(settings(contexts=[16], modes=["forward"], attention_kernels=["torch_sdpa_cudnn"]))
    assert {row["status"] for row in rows} == {"unsupported"} and "torch_sdpa_cudnn" in rows[0]["note"]

    def broken(self, point):
        raise RuntimeError("mine\nsecond line")

    monkeypatch.setattr(model.Subject, "_step", broken)
    (row,) = measured_rows(settings(sizes=["tiny"], contexts=[16], dtypes=["fp32"], modes=["forward"]))
    assert (row["status"], row["note"]) == ("error", "RuntimeError: mine")


def test_what_a_compiler_or_a_library_says_of_full_memory_counts_as_such():
    for text in ("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert model._failure(RuntimeError(text))["status"] == "oom"
    assert model._failure(RuntimeError("shapes differ"))["status"] == "error"


def whose_process(bench, number):
    """What the process was given, and its number."""
    return bench, 2 / number, os.getpid()


def test_each_cold_start_has_a_process_of_its_own():
    bench = model.settings("smoke", device="cpu")
    found = [model._in_fresh_process(whose_process, bench, number) for number in (1, 2)]
    assert [given for *given, _ in found] == [[bench, 2], [bench, 1]]
    assert len({os.getpid(), *(process for *_, process in found)}) == 3
    with pytest.raises(ZeroDivisionError):  # its own error
        model._in_fresh_process(whose_process, bench, 0)


def test_what_a_cold_start_pays_for():
    bench = model.settings("smoke", device="cpu")
    assert len(model._cold_times(bench, steps=3)) == 3
    paid = model._cold_profile(bench, later=2)
    product = next(row for row in paid if row["name"] == "aten::mm")
    assert product["first_calls"] == product["later_calls"] > 0 and product["first_ms"] > 0


def test_windows_of_a_cold_start():
    times = pd.DataFrame({"step": range(8), "time_ms": [100.0, 20, 10, 10, 10, 10, 10, 10]})
    found = {window["warmup"]: window for window in model_report.warmup_windows(times, steps=3)}
    assert found[0]["mean_ms"] == pytest.approx(130 / 3) and found[1]["mean_ms"] == pytest.approx(40 / 3)
    assert found[5]["mean_ms"] == 10 and found[5]["std_ms"] == 0 and found[0]["std_ms"] > 40
    assert "+333.3%" in model_report.warmup_table(times, steps=3)


# --- Traces and memory ----------------------------------------------------------------------------


def test_trace_and_memory_profile_of_a_point(tmp_path):
    bench = settings(
        sizes=["tiny"], contexts=[32], dtypes=["fp32"], modes=["full_step"], trace=True, memory_profile=True
    )
    frame = model.run(bench, tmp_path)
    (point,) = model.points(bench)
    names = [
        event.get("name")
        for event in json.loads((tmp_path / f"model_benchmark_{point.name}.trace.json").read_text())["traceEvents"]
    ]
    assert "aten::mm" in names
    assert (tmp_path / f"model_benchmark_{point.name}.memory.png").stat().st_size > 1000
    subject = model.Subject(bench, point, CPU)
    with subject.ready(point) as step:
        step()
        timeline = model.memory_timeline(step, CPU, tmp_path / "x.pickle", sum(t.nbytes for t in subject.resident()))
    assert timeline.allocated_mib.max() == pytest.approx(frame.peak_mib[0], rel=0.01)
    assert timeline.time_ms.is_monotonic_increasing and timeline.allocated_mib.iloc[-1] < timeline.allocated_mib.max()


def test_the_history_of_an_allocator():
    trace = [
        {"action": "segment_alloc", "size": 2**21, "time_us": 5},
        {"action": "alloc", "size": 512, "time_us": 10},
        {"action": "free_requested", "size": 512, "time_us": 12},
        {"action": "free_completed", "size": 512, "time_us": 13},
    ]
    assert model.snapshot_changes(trace) == [(10, 512), (12, -512)]


# --- Named ranges ---------------------------------------------------------------------------------


def events_of(point, subject):
    with subject.ready(point) as step:
        step()
        with model.profiled(CPU) as profile:
            step()
    return [(e.name, e.time_range.start, e.time_range.end) for e in profile.events()]


def inside(events, outer):
    """The names of what ran within the ranges of a name."""
    spans = [(start, end) for name, start, end in events if name == outer]
    assert spans, f"no range {outer}"
    return [name for name, a, b in events if any(start <= a and b <= end for start, end in spans) and name != outer]


@pytest.mark.parametrize("kernel", ranges.PLAIN_KERNELS)
@pytest.mark.parametrize("checkpoint", [None, 1])
def test_ranges_hold_what_their_names_say(kernel, checkpoint):
    point, subject, _ = one(nvtx=True, attention_kernels=[kernel], checkpoint=checkpoint)
    events = events_of(point, subject)
    names = [name for name, *_ in events]

    def products(outer):
        return inside(events, outer).count("aten::bmm")

    layers, again = 2, 1 if checkpoint is None else 2  # a checkpointed block runs forward twice
    assert names.count("block 0") == names.count("block 1") == again and names.count("softmax") == layers * again
    assert products("scores") == products("values") == layers * again
    assert "aten::_softmax" in inside(events, "softmax") and "aten::bmm" not in inside(events, "softmax")
    assert "aten::_softmax_backward_data" in inside(events, "backward softmax")
    assert "aten::bmm" not in inside(events, "backward softmax")
    assert products("backward scores") == products("backward values") == 2 * layers, "two products for each one"
    for outer, inner in (("backward block 1", "backward attention"), ("backward attention", "backward scores")):
        assert inner in inside(events, outer)
    assert "backward feed-forward" not in inside(events, "backward attention")
    for part in ("backward block 0", "backward block 1", "backward head"):
        assert part in inside(events, "backward")
    assert {"forward", "backward", "optimizer"} <= set(inside(events, "step 1"))
    assert not ranges._open(), "every range was closed"


def test_a_kernel_of_one_operation_is_one_range():
    point, subject, _ = one(nvtx=True, attention_kernels=["torch_sdpa_flash"])
    events = events_of(point, subject)
    assert {"attention kernel", "backward attention kernel"} <= {name for name, *_ in events}
    assert "scores" not in {name for name, *_ in events} and not ranges._open()


def test_ranges_change_no_number():
    found = []
    for nvtx in (False, True):
        point, subject, _ = one(nvtx=nvtx)
        with subject.ready(point) as step:
            step()
            step()
        found.append([p.detach().clone() for p in subject.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- Two runs -------------------------------------------------------------------------------------


def results(path, times, statuses=("ok", "ok", "ok", "ok")):
    """A result file with a row a size: median, p20, p80."""
    rows = []
    for size, row, status in zip(("small", "medium", "large", "xl"), times, statuses, strict=True):
        base = dict.fromkeys(records.SCHEMAS["model_benchmark_results"]) | {
            "size": size,
            "context_length": 128,
            "mode": "forward",
        }
        if status == "ok":
            base |= dict(zip(("median_ms", "p20_ms", "p80_ms"), row, strict=True))
        rows.append(base | {"status": status, "kernel": "k", "checkpoint": None})
    columns = [*records.SCHEMAS["model_benchmark_results"], "p20_ms", "p80_ms", "kernel", "checkpoint"]
    pd.DataFrame(rows)[columns].to_csv(path, index=False)
    return str(path)


def test_compare_tells_a_slowdown_from_noise(tmp_path, capsys):
    quiet, noisy = (10.0, 9.9, 10.1), (10.0, 8.0, 13.0)
    a = results(tmp_path / "a.csv", [quiet, noisy, quiet, quiet])
    b = results(tmp_path / "b.csv", [(11.0, 10.9, 11.2), (11.0, 9.0, 14.0), (9.0, 8.9, 9.1), (10.3, 10.2, 10.4)])
    frame = records.compare(a, b)
    assert list(frame.verdict) == ["slower", "same", "faster", "same"]
    assert frame.ratio.tolist() == pytest.approx([1.1, 1.1, 0.9, 1.03])
    assert main(["compare", a, b]) == 1
    assert "| small | 10.0 [9.90, 10.1] | 11.0 [10.9, 11.2] | 1.100 | slower |" in capsys.readouterr().out
    assert main(["compare", a, b, "--threshold", "0.15"]) == 0
    assert main(["compare", a, a]) == 0
    assert records.compare(a, b, threshold=0.02).verdict.iloc[3] == "slower"


def test_compare_where_rows_are_missing_or_failed(tmp_path):
    quiet = (10.0, 9.9, 10.1)
    a = results(tmp_path / "a.csv", [quiet] * 4, ["ok", "ok", "oom", "ok"])
    b = results(tmp_path / "b.csv", [quiet] * 4, ["ok", "oom", "oom", "ok"])
    lines = (tmp_path / "b.csv").read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([*lines[:-1], lines[-1].replace("xl,", "2.7b,")]) + "\n")
    frame = records.compare(a, b).set_index("size")
    assert frame.verdict.to_dict() == {
        "small": "same",
        "medium": "gone",
        "large": "same",
        "xl": "only in A",
        "2.7b": "only in B",
    }
    assert math.isnan(frame.ratio["medium"]) and main(["compare", a, b]) == 1


def test_compare_refuses_what_it_cannot_compare(tmp_path, capsys):
    a = results(tmp_path / "a.csv", [(1.0, 1.0, 1.0)] * 4)
    twice = (tmp_path / "a.csv").read_text().splitlines()
    (tmp_path / "twice.csv").write_text("\n".join([*twice, twice[-1]]) + "\n")
    (tmp_path / "loss.csv").write_text("step,loss\n1,2.0\n")
    (tmp_path / "other.csv").write_text("kernel,status,median_ms,p20_ms,p80_ms\nk,ok,1,1,1\n")
    for other, message in (
        ("twice.csv", "two rows of"),
        ("loss.csv", "no times to compare"),
        ("other.csv", "different kinds"),
        ("none.csv", "no results at"),
    ):
        assert main(["compare", a, str(tmp_path / other)]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", a, a, "--threshold", "-1"]) == 2


def test_the_same_points_again(tmp_path):
    bench = settings(sizes=["tiny"], contexts=[16], dtypes=["fp32"], modes=["forward"])
    model.run(bench, tmp_path)
    model.repeat(bench, tmp_path)
    frame = records.compare(tmp_path / f"{model.NAME}.csv", tmp_path / f"{model.REPEAT}.csv")
    assert len(frame) == 1 and not math.isnan(frame.ratio[0])


@pytest.mark.parametrize("command", ["benchmark", "compare"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"python -m lmsys {command}" in capsys.readouterr().out
