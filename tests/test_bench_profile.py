from dataclasses import dataclass

import pandas as pd
import pytest
import torch

from lmsys import records
from lmsys.attention.reference import scaled_dot_prod_attention
from lmsys.bench import experiment, profile, traces
from lmsys.bench.profile import Subject
from lmsys.bench.traces import MATMUL, PHASES

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def parameters(**given):
    return profile.NOTEBOOK.parameters({"scale": "smoke", "device": "cpu"} | given)


@dataclass
class Event:
    """A raw event as the profiler gives it. Times in µs."""

    text: str
    begin: float
    end: float
    id: int = 0
    linked: int = 0
    sequence: int = -1
    thread: int = 1
    device: object = CPU

    name = property(lambda self: lambda: self.text)
    device_type = property(lambda self: lambda: self.device)
    correlation_id = property(lambda self: lambda: self.id)
    linked_correlation_id = property(lambda self: lambda: self.linked)
    sequence_nr = property(lambda self: lambda: self.sequence)
    start_thread_id = property(lambda self: lambda: self.thread)
    start_ns = property(lambda self: lambda: int(self.begin * 1e3))
    end_ns = property(lambda self: lambda: int(self.end * 1e3))


def gpu_step():
    """A training step as a GPU's trace has it: kernels run later than they are launched, the backward pass in thread 2.

    The call of CUDA's runtime with id 3 has a number of its own, that of the operator softmax.
    """
    return [
        Event("lmsys.forward", 0, 100, 1),
        Event("lmsys.layer 4", 5, 60, 2),
        Event("lmsys.softmax", 10, 20, 9),
        Event("aten::softmax", 11, 19, 10, sequence=7),
        Event("aten::_softmax", 12, 18, 3, sequence=7),
        Event("cudaLaunchKernel", 13, 14, 3, linked=3),
        Event("aten::add", 30, 40, 4, sequence=8),
        Event("lmsys.head", 70, 90, 5),
        Event("aten::mm", 75, 85, 6, sequence=9),
        Event("lmsys.backward", 100, 200, 7),
        Event("autograd::engine::evaluate_function: MmBackward0", 110, 130, 20, sequence=9, thread=2),
        Event("aten::mm", 112, 120, 21, thread=2),
        Event("autograd::engine::evaluate_function: SoftmaxBackward0", 130, 150, 22, sequence=7, thread=2),
        Event("aten::_softmax_backward_data", 135, 140, 23, thread=2),
        Event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 150, 160, 24, thread=2),
        Event("aten::add_", 151, 155, 25, thread=2),
        Event("lmsys.optimizer", 200, 220, 8),
        Event("aten::_foreach_mul_", 201, 210, 11),
        Event("cudaDeviceSynchronize", 220, 400, 3),
        Event("lmsys.forward", 50, 90, 1, linked=1, device=CUDA),
        Event("softmax_kernel", 50, 60, 100, linked=3, device=CUDA),
        Event("add_kernel", 60, 64, 101, linked=4, device=CUDA),
        Event("gemm", 64, 90, 102, linked=6, device=CUDA),
        Event("gemm", 130, 160, 103, linked=21, device=CUDA),
        Event("splitK", 160, 162, 104, linked=21, device=CUDA),
        Event("softmax_back", 165, 170, 105, linked=23, device=CUDA),
        Event("add_kernel", 171, 172, 106, linked=25, device=CUDA),
        Event("multi_tensor", 300, 320, 107, linked=11, device=CUDA),
    ]


def test_kernels_of_a_gpu_are_traced_back_to_operator_part_and_phase():
    traced = traces.attribute(gpu_step(), gpu=True)
    found = [(k.name, k.operator, k.phase, k.part, k.layer, k.category) for k in traced.kernels]
    assert found == [
        ("softmax_kernel", "aten::_softmax", "forward", "softmax", 4, "softmax"),
        ("add_kernel", "aten::add", "forward", "residual", 4, "element-wise"),
        ("gemm", "aten::mm", "forward", "head", None, MATMUL),
        ("gemm", "aten::mm", "backward", "head", None, MATMUL),
        ("splitK", "aten::mm", "backward", "head", None, MATMUL),
        ("softmax_back", "aten::_softmax_backward_data", "backward", "softmax", 4, "softmax"),
        ("add_kernel", "aten::add_", "backward", "gradients", None, "element-wise"),
        ("multi_tensor", "aten::_foreach_mul_", "optimizer", "optimizer", None, "optimizer"),
    ]
    # From the first kernel of a phase to the end of its last, not as long as the host was in it.
    assert traced.phases_ms == pytest.approx({"forward": 0.040, "backward": 0.042, "optimizer": 0.020})
    assert traces.busy_ms(traced.kernels) == pytest.approx(0.040 + 0.032 + 0.005 + 0.001 + 0.020)


def test_the_kind_of_a_kernel_is_that_of_its_operator():
    for operator, kind in {
        "aten::bmm": MATMUL,
        "aten::mm_extra": "other",
        "aten::_log_softmax": "softmax",
        "aten::masked_fill": "element-wise",
        "aten::mul_": "element-wise",
        "aten::copy_": "copies and casts",
        "aten::mean": "reductions",
        "aten::embedding": "lookups",
        "aten::view": "other",
    }.items():
        assert traces.category(operator) == kind, operator


def test_annotated_attention_is_the_formula():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    for causal in (True, False):
        assert torch.equal(profile.annotated_attention(q, k, v, causal), scaled_dot_prod_attention(q, k, v, causal))


@pytest.fixture(scope="module")
def tiny():
    return Subject("tiny", "fp32", parameters(contexts=[16]))


def test_ranges_change_no_result_and_leave_no_trace(tiny):
    inputs, _ = tiny.batch(2, 16)
    plain = tiny.engine.model(inputs)
    with profile.ranges(tiny.engine.model):
        assert torch.equal(tiny.engine.model(inputs), plain)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in tiny.engine.model.modules())
    assert tiny.engine.model.layers[0].attn.attend is scaled_dot_prod_attention


def test_a_training_step_on_the_cpu(tiny):
    """Counts of products: 7 a layer forward (attention 2) and the head's, twice that backward."""
    batch = tiny.batch(2, 16)
    with profile.ranges(tiny.engine.model):
        traced = traces.trace(lambda: tiny.step("training", batch), tiny.device)
    assert tuple(traced.phases_ms) == PHASES
    products = [k for k in traced.kernels if k.category == MATMUL]
    parts = ("projections", "feed-forward", "scores", "values", "head")
    layers = tiny.engine.config.model.num_layers
    expected = dict(zip(parts, (2 * layers, 3 * layers, layers, layers, 1), strict=True))
    for phase, times in (("forward", 1), ("backward", 2)):
        counts = {part: sum(k.part == part and k.phase == phase for k in products) for part in parts}
        assert counts == {part: times * count for part, count in expected.items()}, phase
    softmaxes = [k for k in traced.kernels if k.operator == "aten::_softmax_backward_data"]
    assert sorted(k.layer for k in softmaxes) == list(range(layers))
    assert {k.category for k in traced.kernels if k.phase == "optimizer"} == {"optimizer"}
    assert {k.part for k in traced.kernels if k.operator == "aten::embedding_dense_backward"} == {"embedding"}


def test_timed_phases_add_up_to_the_step(tiny):
    batch = tiny.batch(1, 8)
    times = tiny.timed(lambda mark: tiny.step("training", batch, mark), samples=3)
    assert set(times) == {*PHASES, "step"} and all(len(values) == 3 for values in times.values())
    for sample in range(3):
        parts = sum(times[phase][sample] for phase in PHASES)
        assert 0.5 * times["step"][sample] < parts <= times["step"][sample]


def frames():
    """Results and kernels with known answers: a forward pass of 10 ms by the clock."""
    point = {"size": "tiny", "context_length": 64, "batch": 2, "dtype": "bf16"}
    results = [
        point
        | {"mode": "inference", "phase": phase, "status": "ok", "timed_ms": 10.0, "p20_ms": 9.0, "p80_ms": 11.0}
        | {"samples": 3, "traced_ms": 12.0, "busy_ms": 6.0, "kernels": 4, "device": "GPU X"}
        for phase in ("forward", "step")
    ]
    results.append(
        {**point, "context_length": 128, "mode": "inference", "phase": "step", "status": "oom", "device": "GPU X"}
    )
    rows = (
        ("inference", "forward", "scores", MATMUL, "gemm_a", 4, 1.0),
        ("inference", "forward", "values", MATMUL, "gemm_b", 4, 1.0),
        ("inference", "forward", "softmax", "softmax", "softmax", 4, 4.0),
        ("inference", "forward", "norm", "element-wise", "mul", 6, 2.0),
        ("training", "forward", "scores", MATMUL, "gemm_a", 4, 1.0),
        ("training", "backward", "scores", MATMUL, "gemm_c", 8, 5.0),
        ("training", "optimizer", "optimizer", "optimizer", "multi", 2, 14.0),
    )
    keys = ("mode", "phase", "part", "category", "name", "count", "total_ms")
    return pd.DataFrame(results), pd.DataFrame([point | dict(zip(keys, row, strict=True)) for row in rows])


def test_the_answers_are_those_of_the_rows():
    _, kernels = frames()
    top = profile.top_kernels(kernels).set_index("mode")
    assert (top.name["inference"], top["count"]["inference"], top.share["inference"]) == ("`softmax`", 4, 0.5)
    assert (top.name["training"], top.total_ms["training"]) == ("`gemm_c`", 5.0)
    (inference,), (training,) = (profile.shares(kernels, mode).itertuples() for mode in profile.MODES)
    assert (inference.matmuls, inference.softmax) == (0.25, 0.5)
    assert (training.matmuls, training.optimizer) == (0.3, 0.7)
    # tiny: 2 layers, 2 heads of 32: matmuls 4 x 32 FLOPs an element, softmax 5.
    (row,) = profile.attention_rows(kernels).to_dict("records")
    assert row["time ratio"] == 2.0 and row["FLOP ratio"] == pytest.approx(5 / 128)
    assert row["matmul TFLOP/s"] * row["matmul_ms"] * 1e9 == 4 * 32 * (2 * 2 * 2 * 64 * 64)


def test_a_run_writes_everything(tmp_path):
    results = experiment.run(profile.PROFILE, parameters(contexts=[8, 16]), folder=tmp_path)
    kernels, lanes = (records.read_results(tmp_path / f"profiling_{name}.csv") for name in ("kernels", "timeline"))
    assert len(results) == 2 * (2 + 5) and set(results.status) == {"ok"}
    assert set(lanes.context_length) == {16} and {"phase", "layer", MATMUL} <= set(lanes.lane)
    step = results[(results["mode"] == "training") & (results.context_length == 8)].set_index("phase")
    same = kernels[(kernels["mode"] == "training") & (kernels.context_length == 8)]
    assert same.total_ms.sum() == pytest.approx(step.kernel_ms["step"], rel=1e-4)
    assert same["count"].sum() == step.kernels["step"]


def test_a_point_out_of_memory_is_a_row(tmp_path, monkeypatch):
    def step(self, mode, batch, mark=profile.phase):
        if mode == "training" and batch[0].shape[1] == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(self, mode, batch, mark)

    original = Subject.step
    monkeypatch.setattr(Subject, "step", step)
    results = experiment.run(profile.PROFILE, parameters(contexts=[8, 16]), folder=tmp_path)
    (row,) = results[results.status == "oom"].itertuples()
    assert (row.context_length, row.mode) == (16, "training") and "out of memory" in row.note
    assert records.read_results(tmp_path / "profiling_timeline.csv").empty


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": ["larg"]}, "unknown size 'larg'. Did you mean"),
        ({"dtypes": ["fp8"]}, "unknown dtype 'fp8'"),
        ({"contexts": [1]}, "it must be 2 or more"),
        ({"contexts": []}, "must not be empty"),
        ({"samples": 0}, "samples is 0; it must be 3 or more"),
        ({"dtypes": ["tf32"], "device": "cpu"}, "tf32 is a format of GPUs"),
    ],
)
def test_bad_input_is_one_clear_error(given, message):
    with pytest.raises(ValueError, match=message):
        parameters(**given)


def test_names_of_kernels_are_short():
    short = "softmax_warp_forward<float, float, float, 10, false, false>"
    assert profile.short_name(f"void at::native::(anonymous namespace)::{short}(float*, int)") == short
    assert len(profile.short_name("x" * 300)) == 60


def test_the_commands_for_nsight_systems_are_commands(monkeypatch):
    """The part after nsys runs.

    With the CPU for a GPU, each names the ranges of the step, attention and its backward pass.
    """
    from lmsys import __main__ as cli
    from lmsys import report
    from lmsys.bench import experiment, model, ranges

    profiled, *stats = profile.nsys_commands(parameters(contexts=[8, 16]))
    assert profiled.startswith("nsys profile --trace=cuda,nvtx ") and len(stats) == 2
    pushed = []
    push = ranges.push
    monkeypatch.setattr(ranges, "push", lambda name: (pushed.append(name), push(name)))
    arguments = profiled.split("python -m lmsys ")[1].split()
    given = {}
    monkeypatch.setattr(report, "run_notebook", lambda name, **options: given.update(options, name=name))
    assert cli.main([*arguments, "--warmup", "1", "--steps", "1", "--device", "cpu", "--scale", "smoke"]) == 0
    assert given["name"] == model.NOTEBOOK.name
    experiment.run(model.RESULTS, model.NOTEBOOK.parameters(given["parameters"]))
    assert {"attention", "scores", "softmax", "values", "backward softmax", "backward scores", "block 0"} <= set(pushed)
