import collections
import math
from concurrent.futures.process import BrokenProcessPool

import pandas as pd
import pytest
import torch

from lmsys import attention as kernels
from lmsys.attention.reference import reference_attention
from lmsys.bench import accuracy
from lmsys.records import SCHEMAS

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton runs nothing on the CPU")
CASE = accuracy.Case(0, 2, 4, 2, 33, 47, 16, "fp32", True, "tokens first", 0.3, 4.0)


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


def rows_of(case, *names):
    return list(accuracy.case_rows(accuracy.settings("smoke", kernels=names, device="cpu"), case))


def test_cases_are_the_ones_asked_for():
    sweep = accuracy.settings("full", device="cpu")
    found = accuracy.cases(sweep)
    assert found == accuracy.cases(sweep) and found != accuracy.cases(accuracy.settings("full", device="cpu", seed=1))
    common = [c for c in found if c.head_dim in (64, 128) and c.dtype in ("fp16", "bf16")]
    assert len(common) >= 200  # all of them the hopper path's and the CUDA kernel's
    assert {(c.head_dim, c.dtype, c.causal) for c in common} == {
        (d, t, causal) for d in (64, 128) for t in ("fp16", "bf16") for causal in (True, False)
    }
    assert {c.head_dim for c in found} == {16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256}
    assert {c.layout for c in found} == set(accuracy.LAYOUTS)
    assert {c.heads // c.kv_heads for c in found} == {1, 2, 4} and {c.batch for c in found} == {1, 2, 3}
    assert max(max(c.q_len, c.k_len) for c in found) > 2000 and min(min(c.q_len, c.k_len) for c in found) == 1
    assert all(c.batch * c.heads * c.q_len * c.k_len <= 2**25 for c in found)
    assert sum(c.q_len % 16 != 0 for c in found) > 150 and any(c.q_len % 128 == 0 for c in found)
    assert sum(c.q_len > c.k_len for c in found) > 30 and sum(c.q_len < c.k_len for c in found) > 30
    assert sum(c.magnitude > 3 for c in found) > 50 and sum(c.scale is not None for c in found) > 50
    groups = accuracy._groups(found)
    assert sum(map(len, groups)) == len(found) and len(groups) < 60
    assert all(len({(c.head_dim, c.dtype, c.causal) for c in group}) == 1 for group in groups)


@pytest.mark.parametrize("layout", accuracy.LAYOUTS)
def test_inputs_have_their_layout(layout):
    case = accuracy.Case(3, 2, 6, 3, 20, 20, 16, "fp16", False, layout, None, 5.0)
    q, k, v, do = accuracy.inputs(case, torch.device("cpu"), seed=1)
    assert q.shape == do.shape == (2, 6, 20, 16) and k.shape == v.shape == (2, 3, 20, 16)
    strides = {"heads first": (1920, 320, 16, 1), "tokens first": (1920, 16, 96, 1), "packed": (3840, 16, 192, 1)}
    assert q.stride() == strides[layout] and k.stride(-1) == 1
    assert all(t.is_leaf and t.requires_grad and t.dtype == torch.float16 for t in (q, k, v))
    deviations = [t.detach().float().std().item() for t in (q, k, v, do)]
    assert deviations == pytest.approx([5, 5, 1, 1], rel=0.15)
    again = accuracy.inputs(case, torch.device("cpu"), seed=1)
    assert torch.equal(q, again[0]) and not torch.equal(q, accuracy.inputs(case, torch.device("cpu"), seed=2)[0])


def test_a_right_kernel_passes(fake):
    (row,) = rows_of(CASE, "flash_attention_torch")
    assert row["status"] == "ok" and row["deterministic"] is True and "note" not in row
    assert all(0 <= row[f"{name}_ratio"] <= 1 and row[f"{name}_error"] < 1e-5 for name in accuracy.OUTPUTS)
    assert set(row) <= {*SCHEMAS[accuracy.NAME], *accuracy.EXTRA_COLUMNS}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_floor_is_what_rounding_does_and_no_more(dtype):
    """With a single key PyTorch's dq and dk are exactly 0 and FlashAttention's are not; where there are many, the floor is small."""
    single = accuracy.Case(1, 1, 12, 3, 28, 1, 128, dtype, False, "heads first", 0.497, 1.0)
    (row,) = rows_of(single, "flash_attention_torch")
    assert row["status"] == "ok" and 0 < row["dk_ratio"] < accuracy.LIMIT
    usual = accuracy.Case(2, 1, 2, 2, 200, 150, 64, dtype, False, "heads first", None, 1.0)
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
def test_a_wrong_kernel_is_found_out(fake, wrong, note):
    """An output that is not written whole, a wrong log-sum-exp, a wrong gradient, a result that changes from run to run."""
    fake(wrong)
    (row,) = rows_of(CASE, "flash_attention_torch")
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
    (row,) = rows_of(CASE, "flash_attention_triton")
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
        return kernels.Explanation(*(default if path == "auto" else (path, path)), ())

    monkeypatch.setattr(kernels, "explain", explain)
    assert [(row["path"], row["status"]) for row in rows_of(CASE, "flash_attention_triton")] == [
        ("hopper", "ok"),
        ("portable", "ok"),
    ]
    assert asked == ["auto"] * 3 + ["portable"] * 3
    default[1] = "portable"
    assert [row["path"] for row in rows_of(CASE, "flash_attention_triton")] == ["hopper+portable", "portable"]


def test_what_a_kernel_raises_is_a_row(fake, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: misaligned address\nmore")

    monkeypatch.setattr(accuracy, "attention", broken)
    (row,) = rows_of(CASE, "flash_attention_torch")
    assert row["status"] == "error" and row["note"] == "RuntimeError: CUDA error: misaligned address"

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(accuracy, "_reference", no_memory)
    (row,) = rows_of(CASE, "flash_attention_torch")
    assert row["status"] == "oom" and "out of memory" in row["note"]


def test_a_kernel_has_only_the_cases_that_it_takes():
    case = accuracy.Case(0, 1, 2, 2, 8, 8, 64, "bf16", False, "heads first", None, 1.0)
    taken = [row["kernel"] for row in rows_of(case, *accuracy.KERNEL_NAMES)]
    assert taken == ["flash_attention_torch"]  # no bf16 in Triton's interpreter, no CUDA C++ on the CPU


def test_a_sweep_leaves_its_artifacts(tmp_path):
    sweep = accuracy.settings("smoke", kernels=["flash_attention_torch"], cases=10, device="cpu")
    shown = []
    frame = accuracy.run(sweep, tmp_path, on_row=lambda row: shown.append(accuracy.row_line(row)))
    assert tuple(frame.columns) == (*SCHEMAS[accuracy.NAME], *accuracy.EXTRA_COLUMNS)
    assert (
        len(frame) == len(shown) == 10 and set(frame.status) == {"ok"} and (tmp_path / f"{accuracy.NAME}.json").exists()
    )
    report = accuracy.write_report(frame, tmp_path).read_text()
    assert "All 10 checks on 10 random shapes pass" in report and "the same bits" in report
    summary = accuracy.summary(frame)
    assert {line["dtype"]: line["passed"] for line in summary} == dict(collections.Counter(frame.dtype))
    assert all(0 < line["dq"] <= accuracy.LIMIT and "head_dim" in line["worst"] for line in summary)
    failed = {"status": "error", "note": "o is off", "o_ratio": math.inf, "deterministic": False}
    frame = pd.DataFrame([row | (failed if i == 0 else {}) for i, row in enumerate(frame.to_dict("records"))])
    said = accuracy.conclusions(frame)
    assert "**1 of 10 checks" in said[0] and "o is off" in said[1] and not any("same bits" in text for text in said)
    assert "inf" in accuracy.table(frame)


def test_several_processes_give_the_same_rows():
    one = accuracy.settings("smoke", kernels=["flash_attention_torch"], cases=3, device="cpu")
    two = accuracy.settings("smoke", kernels=["flash_attention_torch"], cases=3, workers=2, device="cpu")
    key = lambda row: row["case"]  # noqa: E731
    rows = sorted(accuracy.rows(two), key=key)
    assert [row["status"] for row in rows] == ["ok"] * 3
    for a, b in zip(sorted(accuracy.rows(one), key=key), rows, strict=True):
        assert a["o_error"] == pytest.approx(b["o_error"], rel=0.2) and a["q_len"] == b["q_len"]


def test_a_process_that_dies_is_an_error_row_for_each_case(monkeypatch, tmp_path):
    class Dead:
        def result(self):
            raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, *_):
            return Dead()

    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(accuracy, "as_completed", list)
    sweep = accuracy.settings("smoke", kernels=["flash_attention_torch"], workers=2, device="cpu")
    frame = accuracy.run(sweep, tmp_path, on_row=accuracy.row_line)
    assert len(frame) == 4 and set(frame.status) == {"error"} and frame.note.str.contains("terminated abruptly").all()
    assert "**4 of 4 checks" in accuracy.write_report(frame, tmp_path).read_text()


def test_bad_settings():
    for bad in ({"cases": 0}, {"longest": 3}, {"workers": -1}, {"cases": 2.5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            accuracy.settings("smoke", **bad)
    with pytest.raises(ValueError, match="unknown attention kernel 'flash'"):
        accuracy.settings("smoke", kernels=["flash"])
    with pytest.raises(ValueError, match="kernels must not be empty"):
        accuracy.settings("smoke", kernels=[])
