import pytest
import torch

from lmsys.attention import Explanation
from lmsys.attention.reference import reference_attention
from lmsys.bench import accuracy, experiment
from lmsys.bench import attention as sweeps

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton runs nothing on the CPU")


def problem(*values):
    return dict(zip(accuracy.CASE, values, strict=True))


CASE = problem(0, 2, 4, 2, 33, 47, 16, "fp32", True, "tokens first", 0.3, 4.0)


class Fake(torch.autograd.Function):
    """Right attention that saves its log-sum-exp, except for what `wrong` says."""

    wrong = ""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            o, lse = reference_attention(*leaves, causal=causal, scale=scale)
        ctx.graph = o, leaves
        result = torch.empty_like(o)
        rows = slice(0, -1) if Fake.wrong == "unwritten" else slice(None)
        result[:, :, rows] = o.detach()[:, :, rows]
        if Fake.wrong == "random":
            result = result + 1e-8 * torch.randn_like(result)
        saved = lse.detach() + (0.5 if Fake.wrong == "lse" else 0)
        ctx.save_for_backward(q, saved)
        return result

    @staticmethod
    def backward(ctx, do):
        o, leaves = ctx.graph
        dq, dk, dv = torch.autograd.grad(o, leaves, do, retain_graph=True)
        out = torch.empty_like(dk)  # made without values: NaN in the sweep, also in the backward pass
        if Fake.wrong != "dk unwritten":
            out.copy_(dk)
        return dq, out, dv * (1.5 if Fake.wrong == "dv" else 1), None, None


def fake_attention(q, k, v, *, causal, kernel, scale=None, **options):
    return Fake.apply(q, k, v, causal, scale)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(accuracy, "attention", fake_attention)
    monkeypatch.setattr(Fake, "wrong", "")
    return lambda wrong: monkeypatch.setattr(Fake, "wrong", wrong)


def parameters(scale="smoke", **given):
    return accuracy.NOTEBOOK.parameters({"scale": scale, "device": "cpu"} | given)


def rows_of(monkeypatch, case, *names):
    """The rows of one case."""
    monkeypatch.setattr(accuracy, "cases", lambda p: [case])
    accuracy.answers.cache_clear()
    p = parameters(kernels=list(names))
    return [point | {"status": "ok"} | accuracy.measure_point(point, p) for point in accuracy.points(p)]


def test_cases_are_the_ones_asked_for():
    found = accuracy.cases(parameters("full"))
    assert found == accuracy.cases(parameters("full")) and found != accuracy.cases(parameters("full", seed=1))

    def values(name):
        return [case[name] for case in found]

    common = [c for c in found if c["head_dim"] in (64, 128) and c["dtype"] in ("fp16", "bf16")]
    assert len(common) >= 200  # all of them the hopper path's and the CUDA kernel's
    assert {(c["head_dim"], c["dtype"], c["causal"]) for c in common} == {
        (d, t, causal) for d in (64, 128) for t in ("fp16", "bf16") for causal in (True, False)
    }
    assert set(values("head_dim")) == {16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256}
    assert set(values("layout")) == set(accuracy.LAYOUTS) and set(values("batch")) == {1, 2, 3}
    assert {c["heads"] // c["kv_heads"] for c in found} == {1, 2, 4}
    assert max(values("q_len")) > 2000 and min(values("q_len")) == min(values("k_len")) == 1
    assert all(c["batch"] * c["heads"] * c["q_len"] * c["k_len"] <= 2**25 for c in found)
    assert sum(n % 16 != 0 for n in values("q_len")) > 150 and any(n % 128 == 0 for n in values("q_len"))
    assert sum(c["q_len"] > c["k_len"] for c in found) > 30 and sum(c["q_len"] < c["k_len"] for c in found) > 30
    assert sum(m > 3 for m in values("magnitude")) > 50 and sum(s is not None for s in values("scale")) > 50


@pytest.mark.parametrize("layout", accuracy.LAYOUTS)
def test_inputs_have_their_layout(layout):
    case = problem(3, 2, 6, 3, 20, 20, 16, "fp16", False, layout, None, 5.0)
    q, k, v, do = accuracy.inputs(case, torch.device("cpu"), seed=1)
    assert q.shape == do.shape == (2, 6, 20, 16) and k.shape == v.shape == (2, 3, 20, 16)
    strides = {"heads first": (1920, 320, 16, 1), "tokens first": (1920, 16, 96, 1), "packed": (3840, 16, 192, 1)}
    assert q.stride() == strides[layout] and k.stride(-1) == 1
    assert all(t.is_leaf and t.requires_grad and t.dtype == torch.float16 for t in (q, k, v))
    deviations = [t.detach().float().std().item() for t in (q, k, v, do)]
    assert deviations == pytest.approx([5, 5, 1, 1], rel=0.15)
    again = accuracy.inputs(case, torch.device("cpu"), seed=1)
    assert torch.equal(q, again[0]) and not torch.equal(q, accuracy.inputs(case, torch.device("cpu"), seed=2)[0])


def test_a_right_kernel_passes(fake, monkeypatch):
    (row,) = rows_of(monkeypatch, CASE, "flash_attention_torch")
    assert row["status"] == "ok" and row["deterministic"] is True and "note" not in row
    assert all(0 <= row[f"{name}_ratio"] <= 1 and row[f"{name}_error"] < 1e-5 for name in accuracy.OUTPUTS)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_floor_is_what_rounding_does_and_no_more(dtype, monkeypatch):
    """With a single key PyTorch's dq and dk are exactly 0 and FlashAttention's are not.

    Where there are many, the floor is small.
    """
    single = problem(1, 1, 12, 3, 28, 1, 128, dtype, False, "heads first", 0.497, 1.0)
    (row,) = rows_of(monkeypatch, single, "flash_attention_torch")
    assert row["status"] == "ok" and 0 < row["dk_ratio"] < accuracy.LIMIT
    usual = problem(2, 1, 2, 2, 200, 150, 64, dtype, False, "heads first", None, 1.0)
    tensors = accuracy.inputs(usual, torch.device("cpu"), seed=0)
    exact = accuracy._reference(usual, tensors, torch.float64)
    floors = accuracy._floors(usual, tensors, exact)
    eps = torch.finfo(accuracy.DTYPES[dtype]).eps * (16 if dtype == "fp32" else 1)
    for name, t in zip(("o", "dq", "dk", "dv"), (exact[0], *exact[2:]), strict=True):
        assert floors[name] < 2 * eps * t.abs().max().item(), name


@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        ("unwritten", "o is off by inf times PyTorch's error"),
        ("dk unwritten", "dk is off by inf times PyTorch's error"),
        ("lse", "lse is off by "),
        ("dv", "dv is off by "),
        ("random", "o: not the same bits in a second run"),
    ],
)
def test_a_wrong_kernel_is_found_out(fake, monkeypatch, wrong, note):
    """An output that is not written whole, a wrong log-sum-exp, a wrong gradient, a result that changes from run to
    run.
    """
    fake(wrong)
    (row,) = rows_of(monkeypatch, CASE, "flash_attention_torch")
    assert row["status"] == "error" and note in row["note"]
    assert row["deterministic"] is (wrong != "random")


@interpreted
def test_gradients_that_must_be_the_same_bits(fake, monkeypatch):
    """A kernel with the option deterministic is asked for it, and its gradients are compared."""
    asked = []

    def noisy(q, k, v, *, causal, kernel, scale=None, deterministic=False, **options):
        asked.append(deterministic)
        o = fake_attention(q, k, v, causal=causal, kernel=kernel, scale=scale)
        v.register_hook(lambda grad: grad * (1 + 1e-6 * len(asked)))
        return o

    monkeypatch.setattr(accuracy, "attention", noisy)
    (row,) = rows_of(monkeypatch, CASE, "flash_attention_triton")
    assert asked == [False, True, True]
    assert row["deterministic"] is False and row["note"] == "dv: not the same bits in a second run"


@interpreted
def test_both_paths_are_checked_where_there_are_two(fake, monkeypatch):
    asked = []

    def recorded(q, k, v, *, causal, kernel, path="auto", **options):
        asked.append(path)
        return fake_attention(q, k, v, causal=causal, kernel=kernel, scale=options["scale"])

    monkeypatch.setattr(accuracy, "attention", recorded)
    default = ["hopper", "hopper"]

    def explain(q, k, v, causal, *, path="auto"):
        return Explanation(*(default if path == "auto" else (path, path)), ())

    monkeypatch.setattr(sweeps, "explain", explain)
    assert [(row["path"], row["status"]) for row in rows_of(monkeypatch, CASE, "flash_attention_triton")] == [
        ("hopper", "ok"),
        ("portable", "ok"),
    ]
    assert asked == ["auto"] * 3 + ["portable"] * 3
    default[1] = "portable"
    assert [row["path"] for row in rows_of(monkeypatch, CASE, "flash_attention_triton")] == [
        "hopper+portable",
        "portable",
    ]


def test_what_a_kernel_raises_is_a_row(fake, monkeypatch, tmp_path):
    """Of that case alone: the others have theirs."""

    def broken(q, k, v, **options):
        if q.shape[1] == broken.heads:
            raise RuntimeError("CUDA error: misaligned address\nmore")
        return fake_attention(q, k, v, **options)

    p = parameters(kernels=["flash_attention_torch"])
    drawn = accuracy.cases(p)
    broken.heads = drawn[0]["heads"]
    monkeypatch.setattr(accuracy, "attention", broken)
    frame = experiment.run(accuracy.ACCURACY, p, folder=tmp_path, say=lambda text: None)
    failed = frame[frame.status == "error"]
    assert set(failed.heads) == {broken.heads} and set(failed.note) == {"RuntimeError: CUDA error: misaligned address"}
    assert set(frame[frame.heads != broken.heads].status) == {"ok"} and len(frame) == len(drawn)


def test_a_kernel_has_only_the_cases_that_it_takes(monkeypatch):
    case = problem(0, 1, 2, 2, 8, 8, 64, "bf16", False, "heads first", None, 1.0)
    names = ("flash_attention_triton", "flash_attention_cuda", "flash_attention_torch")
    taken = [row["kernel"] for row in rows_of(monkeypatch, case, *names)]
    assert taken == ["flash_attention_torch"]  # no bf16 in Triton's interpreter, no CUDA C++ on the CPU


def test_a_sweep_leaves_its_rows(tmp_path):
    p = parameters(kernels=["flash_attention_torch"], cases=10)
    frame = experiment.run(accuracy.ACCURACY, p, folder=tmp_path, say=lambda text: None)
    assert tuple(frame.columns) == (
        *("kernel", "path", "case", "batch", "heads", "kv_heads", "q_len", "k_len", "head_dim", "dtype", "causal"),
        *("layout", "scale", "magnitude", "status", "o_ratio", "lse_ratio", "dq_ratio", "dk_ratio", "dv_ratio"),
        *("o_error", "lse_error", "dq_error", "dk_error", "dv_error", "deterministic", "device", "note"),
    )
    assert len(frame) == 10 and set(frame.status) == {"ok"} and frame.deterministic.all()
    assert (frame[[f"{name}_ratio" for name in accuracy.OUTPUTS]] <= accuracy.LIMIT).all(axis=None)


def test_compiling_ahead_is_of_the_kernels_that_compile(fake, monkeypatch):
    asked = []
    monkeypatch.setattr(
        accuracy.ahead, "compile_points", lambda call, points, p, processes, limit_s: asked.extend(points)
    )
    accuracy.compile_ahead(parameters("full", cases=16, workers=2))
    assert {point["kernel"] for point in asked} == {"flash_attention_triton"}
    accuracy.compile_ahead(parameters("smoke"))
    recorded = []
    monkeypatch.setattr(
        accuracy, "attention", lambda *qkv, **options: recorded.append(options) or fake_attention(*qkv, **options)
    )
    accuracy.compile_point(CASE | {"kernel": "flash_attention_torch", "options": {}}, parameters())
    assert [options.get("deterministic") for options in recorded] == [None, True]


def test_bad_parameters():
    for bad in ({"cases": 0}, {"longest": 3}, {"workers": -1}, {"cases": 2.5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            parameters(**bad)
    with pytest.raises(ValueError, match="unknown kernel 'flash'"):
        parameters(kernels=["flash"])
    with pytest.raises(ValueError, match="kernels must not be empty"):
        parameters(kernels=[])
