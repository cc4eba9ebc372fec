"""The model benchmark: its points, steps and rows, named ranges, and the comparison of two runs."""

import itertools
import json
import math
import os
import re
import types
import weakref

import pandas as pd
import pytest
import torch

from lmsys import cost, records
from lmsys.__main__ import main
from lmsys.bench import experiment, model, ranges
from lmsys.bench.measure import failure
from lmsys.config import model_size

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Steps this small are slower on several threads, by far where other work runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(scale="smoke", **given):
    counts = {"warmup": 1, "steps": 2} if scale == "smoke" else {}
    return model.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | counts | given)


def one(**given):
    """A point, its subject and the parameters."""
    p = parameters(**{"sizes": ["tiny"], "contexts": [32], "dtypes": ["fp32"], "modes": ["full_step"]} | given)
    (point,) = model.points(p)
    return point, model.Subject(point, p), p


def measured_rows(p, folder):
    return experiment.run(model.RESULTS, p, folder=folder).to_dict("records")


# --- Points and settings --------------------------------------------------------------------------


def test_the_full_scale_is_what_the_course_asks_for_and_more():
    bench = parameters("full")
    points = [types.SimpleNamespace(**point, model=model.model_key(point)) for point in model.points(bench)]
    assert (bench.warmup, bench.steps, bench.batch_size) == (5, 10, 4)
    for size, mode in itertools.product(("small", "medium", "large", "xl", "2.7b"), model.MODES):
        of = [p for p in points if (p.size, p.mode) == (size, mode)]
        assert {p.dtype for p in of} == set(model.DTYPES) and {p.compiled for p in of} >= {"no", "blocks"}
        for dtype, compiled in itertools.product(("tf32", "bf16"), ("no", "blocks")):
            lengths = [p.context_length for p in of if (p.dtype, p.compiled) == (dtype, compiled)]
            assert lengths == sorted(lengths) and {128, 2048} <= set(lengths)
    runs = [key for key, _ in itertools.groupby(points, key=lambda p: p.model)]
    assert len(runs) == len(set(runs)), "a model is made once"


def test_a_given_list_takes_the_place_of_the_scales_points():
    p = parameters(contexts=[16], attention_kernels=["vectorized_torch", "torch_sdpa_flash"], checkpoint=1)
    points = model.points(p)
    values = {name: {point[name] for point in points} for name in ("context_length", "kernel", "checkpoint")}
    assert values == {"context_length": {16}, "kernel": set(p.attention_kernels), "checkpoint": {1}}
    assert len(points) == 2 * 2 * 3 and model.points(p, [p.repeated])[0] in points


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": ["smal"]}, "unknown size 'smal'. Did you mean 'small'?"),
        ({"modes": ["backward"]}, "unknown mode 'backward'"),
        ({"dtypes": ["fp8"]}, "unknown dtype 'fp8'"),
        ({"compile": ["yes"]}, "unknown compile 'yes'"),
        ({"attention_kernels": ["flash"]}, "unknown attention_kernel 'flash'"),
        ({"contexts": [0]}, "contexts is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"checkpoint": 0}, "checkpoint is 0"),
        ({"budget_s": 0}, "budget_s is 0"),
        ({"device": "cuda:64"}, "cuda:64"),
        ({"sizes": ["2.7b"], "contexts": [10_000_000]}, "no point fits the memory of"),
        ({"output_json": "/"}, "a folder; give the path of a file"),
    ],
)
def test_bad_input_is_one_line_before_any_work(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parameters(**given)
    with pytest.raises(OSError, match="cannot write to this folder"):
        parameters(output_json="/proc/none/x.json")


def test_least_memory_by_hand():
    config = model_size("tiny", context_length=32)
    point = {"size": "tiny", "context_length": 32, "batch": 2, "dtype": "bf16", "compiled": "no"}
    point |= {"mode": "full_step", "kernel": "vectorized_torch", "checkpoint": None}
    state, logits, scores = 16 * cost.model_parameters(config), 2 * 2 * 32 * 10_000, 2 * 2 * 2 * 32 * 32
    assert model.least_bytes(point, config) == state + logits + 2 * scores  # two layers
    assert model.least_bytes(point | {"checkpoint": 1}, config) == state + logits + scores
    assert model.least_bytes(point | {"kernel": "torch_sdpa_flash"}, config) == state + logits


# --- Steps ----------------------------------------------------------------------------------------


def test_each_mode_does_its_part():
    for mode, moves, differentiates in (("forward", 0, 0), ("forward_backward", 0, 1), ("full_step", 1, 1)):
        point, subject, _ = one(modes=[mode])
        made: list[torch.Tensor] = []
        hooks = [p.register_post_accumulate_grad_hook(made.append) for p in subject.engine.model.parameters()]
        before = [p.detach().clone() for p in subject.engine.model.parameters()]
        with subject.ready(point) as step:
            step()
            assert all(p.grad is None for p in subject.engine.model.parameters()), "gradients are dropped with the step"
        changed = [not torch.equal(a, b) for a, b in zip(before, subject.engine.model.parameters(), strict=True)]
        assert all(changed) if moves else not any(changed)
        assert len(made) == differentiates * len(hooks)
        assert not subject.engine.optimizer.state


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_computes_in_its_dtype_and_fp16_steps_are_scaled(dtype):
    point, subject, _ = one(dtypes=[dtype])
    seen = []
    subject.engine.model.layers[0].ffn.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    before = subject.engine.model.layers[0].ffn.w1.weight.detach().clone()
    with subject.ready(point) as step:
        step()
    assert seen == [model.DTYPES[dtype]]
    assert not torch.equal(before, subject.engine.model.layers[0].ffn.w1.weight), "the scaler left no step out"


def test_checkpointing_trades_memory_for_time(tmp_path):
    peaks = []
    for checkpoint in (None, 1):
        shape = {"sizes": ["tiny"], "contexts": [256], "dtypes": ["fp32"], "modes": ["forward_backward"]}
        (row,) = measured_rows(parameters(**shape, checkpoint=checkpoint), tmp_path)
        peaks.append(row["peak_mib"])
    assert peaks[1] < 0.9 * peaks[0]


def test_compiled_blocks_are_compiled_once_a_shape_and_never_run_eager(monkeypatch, tmp_path):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **options: compile_(*a, **options | {"backend": counting}))
    shape = {"sizes": ["tiny"], "contexts": [16, 32], "dtypes": ["fp32"], "modes": ["forward", "full_step"]}
    rows = measured_rows(parameters(**shape, compile=["blocks"]), tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * 4
    # A context: the block for inference; the block for training, and the loss. Two layers share a block's graph.
    assert len(graphs) == 2 * (1 + 2)
    graphs.clear()
    rows = measured_rows(parameters(**shape, compile=["model"]), tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * 4 and len(graphs) == 2 * (1 + 2), "the whole model is one graph"


# --- Rows -----------------------------------------------------------------------------------------


def test_rows_follow_from_their_samples(tmp_path):
    p = model.NOTEBOOK.parameters({"scale": "smoke", "device": "cpu"})
    frame = experiment.run(model.RESULTS, p, folder=tmp_path)
    assert len(frame) == 12 and (frame.status == "ok").all()
    for row in frame.itertuples():
        samples = pd.Series([float(value) for value in row.times_ms.split()])
        assert row.samples == len(samples) == 3 and row.mean_ms == pytest.approx(samples.mean(), rel=1e-4)
        assert row.std_ms == pytest.approx(samples.std(), rel=1e-2, abs=1e-4)  # the CSV's samples are rounded
        assert row.median_ms == pytest.approx(samples.median(), rel=1e-4)
        assert row.warmup_done == 2 and row.first_ms > 0
        assert row.tokens_per_s == pytest.approx(2 * row.context_length / row.median_ms * 1e3, rel=1e-4)
        flops = cost.train_flops_per_token(model_size("tiny"), row.context_length) / (3 if row.mode == "forward" else 1)
        assert row.tflops == pytest.approx(row.tokens_per_s * flops / 1e12, rel=1e-4)
    assert frame.mfu.isna().all(), "no peak of a CPU is known"
    peaks = frame[frame["dtype"] == "fp32"].pivot(index="context_length", columns="mode", values="peak_mib")
    assert (peaks.forward < peaks.forward_backward).all() and (peaks.forward_backward < peaks.full_step).all()
    least = model.least_bytes(model.points(p)[2], model_size("tiny", context_length=64))
    assert peaks.full_step[32] > least / 2**20
    stamp = json.loads((tmp_path / "model_benchmark_results.json").read_text())
    assert stamp["method"]["empty_step_ms"] < 0.01 * frame.median_ms.min()
    again = experiment.run(model.REPEAT, p, folder=tmp_path)
    compared = records.compare(tmp_path / "model_benchmark_results.csv", tmp_path / "model_benchmark_repeat.csv")
    assert len(again) == 1 and (compared.verdict != "only in A").sum() == 1


def test_a_planted_out_of_memory_ends_its_series_and_no_other(monkeypatch, tmp_path):
    plain = model.Subject._step

    def step(self, point):
        run = plain(self, point)
        fits = point["size"] == "mini" or point["context_length"] == 16 or point["mode"] == "forward"

        def full():
            run()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        return run if fits else full

    monkeypatch.setattr(model.Subject, "_step", step)
    p = parameters(sizes=["tiny", "mini"], contexts=[16, 32, 64], dtypes=["fp32"], warmup=0, steps=1)
    rows = {(row["size"], row["context_length"], row["mode"]): row for row in measured_rows(p, tmp_path)}
    status = {key: row["status"] for key, row in rows.items()}
    assert {mode: status["tiny", 16, mode] for mode in model.MODES} == dict.fromkeys(model.MODES, "ok")
    assert [status["tiny", 32, mode] for mode in model.MODES] == ["ok", "oom", "oom_skipped"]
    assert [status["tiny", 64, mode] for mode in model.MODES] == ["ok", "oom_skipped", "oom_skipped"]
    assert all(status["mini", length, mode] == "ok" for length in (16, 32, 64) for mode in model.MODES)
    assert "2 GiB" in rows["tiny", 32, "forward_backward"]["note"]
    assert rows["tiny", 64, "full_step"]["note"] == "memory ran out at context 32, forward_backward"


def test_one_model_at_a_time(monkeypatch, tmp_path):
    """The next size is made when the one before has left the memory."""
    made = []
    plain = model.Subject.__init__

    def recorded(self, *args, **options):
        assert all(before() is None for before in made)
        plain(self, *args, **options)
        made.append(weakref.ref(self.engine.model))

    monkeypatch.setattr(model.Subject, "__init__", recorded)
    rows = measured_rows(parameters(sizes=["tiny", "mini"], contexts=[16], dtypes=["fp32"], nvtx=True), tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * 6 and len(made) == 2


def test_other_failures_are_rows_too(monkeypatch, tmp_path):
    shape = {"sizes": ["tiny"], "contexts": [16], "modes": ["forward"]}
    rows = measured_rows(parameters(**shape, dtypes=["fp32", "tf32"]), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "unsupported"] and "tensor cores" in rows[1]["note"]
    rows = measured_rows(parameters(**shape, attention_kernels=["torch_sdpa_cudnn"]), tmp_path)
    assert {row["status"] for row in rows} == {"unsupported"} and "torch_sdpa_cudnn" in rows[0]["note"]

    def broken(self, point):
        raise RuntimeError("mine\nsecond line")

    monkeypatch.setattr(model.Subject, "_step", broken)
    (row,) = measured_rows(parameters(**shape, dtypes=["fp32"]), tmp_path)
    assert (row["status"], row["note"]) == ("error", "RuntimeError: mine")


def test_what_a_compiler_or_a_library_says_of_full_memory_counts_as_such():
    for text in ("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"):
        assert failure(RuntimeError(text))["status"] == "oom"
    assert failure(RuntimeError("shapes differ"))["status"] == "error"


def whose_process(bench, number):
    """What the process was given, and its number."""
    return bench, 2 / number, os.getpid()


def test_each_cold_start_has_a_process_of_its_own():
    bench = model.NOTEBOOK.parameters({"scale": "smoke", "device": "cpu"})
    found = [model._in_fresh_process(whose_process, bench, number) for number in (1, 2)]
    assert [given for *given, _ in found] == [[bench, 2], [bench, 1]]
    assert len({os.getpid(), *(process for *_, process in found)}) == 3
    with pytest.raises(ZeroDivisionError):  # its own error
        model._in_fresh_process(whose_process, bench, 0)


def test_what_a_cold_start_pays_for():
    bench = model.NOTEBOOK.parameters({"scale": "smoke", "device": "cpu"})
    assert len(model._cold_times(bench, steps=3)) == 3
    paid = model._cold_profile(bench, later=2)
    product = next(row for row in paid if row["name"] == "aten::mm")
    assert product["first_calls"] == product["later_calls"] > 0 and product["first_ms"] > 0


def test_windows_of_a_cold_start():
    times = pd.DataFrame({"step": range(8), "time_ms": [100.0, 20, 10, 10, 10, 10, 10, 10]})
    found = {window["warm-up steps"]: window for window in model.warmup_windows(times, steps=3)}
    assert found[0]["mean_ms"] == pytest.approx(130 / 3) and found[1]["mean_ms"] == pytest.approx(40 / 3)
    assert found[5]["mean_ms"] == 10 and found[5]["std_ms"] == 0 and found[0]["std_ms"] > 40


# --- Traces and memory ----------------------------------------------------------------------------


def test_trace_and_memory_profile_of_a_point(tmp_path):
    point, subject, p = one(trace=True, memory_profile=True)
    frame = experiment.run(model.RESULTS, p, folder=tmp_path)
    path = records.artifacts_dir() / f"model_benchmark_{model.point_name(point)}"
    events = json.loads(path.with_name(path.name + ".trace.json").read_text())["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}
    assert path.with_name(path.name + ".memory.png").stat().st_size > 1000
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
        found.append([p.detach().clone() for p in subject.engine.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- Two runs -------------------------------------------------------------------------------------


def results(path, times, statuses=("ok", "ok", "ok", "ok")):
    """A result file with a row a size: median, p20, p80."""
    rows = []
    for size, row, status in zip(("small", "medium", "large", "xl"), times, statuses, strict=True):
        base = dict.fromkeys(model.RESULTS.columns[:15]) | {
            "size": size,
            "context_length": 128,
            "mode": "forward",
        }
        if status == "ok":
            base |= dict(zip(("median_ms", "p20_ms", "p80_ms"), row, strict=True))
        rows.append(base | {"status": status, "kernel": "k", "checkpoint": None})
    columns = [*model.RESULTS.columns[:15], "p20_ms", "p80_ms", "kernel", "checkpoint"]
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
