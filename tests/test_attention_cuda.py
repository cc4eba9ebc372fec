"""The CUDA C++ kernels: compiled by nvcc wherever it is, run where there is a GPU."""

import ctypes
import re
import subprocess

import pytest
import torch
from attention_cases import FLOOR, inputs, with_gradients

from lmsys.attention import flash_cuda
from lmsys.attention.flash_cuda import FlashAttentionCUDA, flash_attention_cuda
from lmsys.attention.reference import reference_attention

NVCC = flash_cuda._nvcc()
ON_GPU = flash_cuda.unavailable("cuda", torch.bfloat16) is None

gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU of compute capability 8.0 or more, nvcc, ninja and g++")
compiler = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


# --- Without a GPU --------------------------------------------------------------------------------


@compiler
@pytest.mark.parametrize(
    ("arch", "small"), [("sm_80", False), ("sm_86", True), ("sm_90", False)], ids=["sm_80", "small sm_86", "sm_90"]
)
@pytest.mark.parametrize("dtype,head_dim", [("__nv_bfloat16", 64), ("__half", 128)])
def test_compiles_without_spills(arch, dtype, head_dim, small, tmp_path):
    """Accumulators stay in registers; the backward pass, at the limit of 255, may spill a few addresses."""
    instance = [f"-DLMSYS_ONLY_TYPE={dtype}", f"-DLMSYS_ONLY_DIM={head_dim}"]
    command = [NVCC, *flash_cuda.nvcc_flags(arch, small), *instance, "-cubin", "-Xptxas", "-v", "-o", tmp_path / "x"]
    result = subprocess.run([*command, flash_cuda.SOURCE], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    kernels = {}
    for name, *numbers in re.findall(pattern, result.stderr, re.DOTALL):
        kernels[re.search(r"(forward|backward|prepare|finish)_kernel", name)[1]] = [int(n) for n in numbers]
    assert set(kernels) == {"forward", "backward", "prepare", "finish"}
    for name, (stores, loads, registers) in kernels.items():
        allowed = 128 if name == "backward" else 0
        assert max(stores, loads) <= allowed, f"{name}: {stores} bytes of spill stores, {loads} of loads"
        assert registers <= 255


@compiler
def test_the_structs_are_those_of_the_kernel_file(tmp_path):
    """ctypes lays the parameters out as the C++ compiler does: every offset and size."""
    checks = []
    for name, struct in (("ForwardParams", flash_cuda._ForwardParams), ("BackwardParams", flash_cuda._BackwardParams)):
        checks.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        for field, _ in struct._fields_:
            c_name = "d_o" if field == "do" else field  # do is C++'s
            checks.append(f"static_assert(offsetof({name}, {c_name}) == {getattr(struct, field).offset});")
    source = tmp_path / "offsets.cu"
    source.write_text(f'#include <stddef.h>\n#include "{flash_cuda.SOURCE}"\n' + "\n".join(checks))
    instance = ["-DLMSYS_ONLY_TYPE=__half", "-DLMSYS_ONLY_DIM=64"]
    command = [NVCC, *flash_cuda.nvcc_flags("sm_80"), *instance, "-ptx", "-o", tmp_path / "x", source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "shape,kv_shape,dtype,scale,message",
    [
        ((1, 2, 4, 80), (1, 2, 4, 80), torch.float16, None, "80.*head_dim 64 or 128"),
        ((1, 3, 4, 64), (1, 2, 4, 64), torch.float16, None, r"\(1, 3, 4, 64\).*multiple of the key heads"),
        ((1, 2, 4, 64), (2, 2, 4, 64), torch.float16, None, "it takes q"),
        ((1, 2, 4, 64), (1, 2, 4, 64), torch.float32, None, "float32.*float16 or bfloat16"),
        ((1, 2, 0, 64), (1, 2, 4, 64), torch.float16, None, "empty"),
        ((1, 2, 4, 64), (1, 2, 4, 64), torch.float16, None, "cpu.*CUDA GPU"),
    ],
    ids=["head_dim", "heads", "batch", "dtype", "empty", "device"],
)
def test_refuses_what_it_does_not_take(shape, kv_shape, dtype, scale, message):
    q, k = torch.zeros(shape, dtype=dtype), torch.zeros(kv_shape, dtype=dtype)
    with pytest.raises(ValueError, match=f"'flash_attention_cuda'.*{message}"):
        flash_attention_cuda(q, k, k, scale=scale)


def test_names_the_missing_tool(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert "CUDA_HOME" in flash_cuda._missing_tool()
    with pytest.raises(RuntimeError, match=r"flash_attention_cuda.*nvcc.*CUDA toolkit"):
        flash_cuda._library.__wrapped__(0)
    monkeypatch.setattr(flash_cuda, "_nvcc", lambda: "nvcc")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(flash_cuda.shutil, "which", lambda tool: tool if tool == "ninja" else None)
    assert "g++" in flash_cuda._missing_tool()
    monkeypatch.setattr(flash_cuda.shutil, "which", lambda tool: None)
    assert "pip install ninja" in flash_cuda._missing_tool()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_says_that_it_needs_a_gpu():
    assert flash_cuda.unavailable("cuda", torch.bfloat16) == "needs a CUDA GPU"


def test_fakes_have_the_shapes_of_the_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 6, 33, 64, dtype=torch.float16), torch.empty(2, 3, 50, 64, dtype=torch.float16)
        o, lse = flash_cuda.flash_forward(q, k, k, True, 0.1)
        assert (o.shape, o.dtype) == (q.shape, q.dtype) and o.transpose(1, 2).is_contiguous()
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
        gradients = flash_cuda.flash_backward(q, k, k, o, lse, o, True, 0.1)
        assert [t.shape for t in gradients] == [q.shape, k.shape, k.shape]


# --- On a GPU -------------------------------------------------------------------------------------


def assert_accurate(q, k, v, do, causal, scale=None):
    """o, dq, dk, dv are at most twice as far from float64 as PyTorch in the same dtype.

    The log-sum-exp is float32's.
    """

    def reference(q, k, v):
        return reference_attention(q, k, v, causal=causal, scale=scale)[0]

    actual = with_gradients(lambda *qkv: flash_attention_cuda(*qkv, causal, scale), q, k, v, do)
    same_dtype = with_gradients(reference, q, k, v, do)
    exact = with_gradients(reference, *(t.double() for t in (q, k, v, do)))
    for name, a, p, e in zip(("o", "dq", "dk", "dv"), actual, same_dtype, exact, strict=True):
        assert a.shape == e.shape and a.dtype == q.dtype, name
        error, allowed = (a - e).abs().max(), 2 * (p - e).abs().max() + 0.1 * FLOOR[q.dtype]
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


LENGTHS = [(1, 1), (1, 129), (63, 63), (129, 500), (500, 129), (128, 128), (1000, 64), (64, 1000), (1024, 1024)]


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("q_len,k_len", LENGTHS)
def test_forward_and_backward(q_len, k_len, head_dim, dtype):
    for causal in (False, True):
        for heads, kv_heads in ((2, 2), (4, 1), (6, 2)):
            assert_accurate(*inputs(q_len, k_len, head_dim, heads, kv_heads, dtype, 2, "cuda"), causal)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_tiles_for_small_shared_memory(head_dim, dtype, small_library, monkeypatch):
    """Those of GPUs with 99 KiB a block run on any."""
    monkeypatch.setattr(flash_cuda, "_library", lambda device_index: small_library)
    for q_len, k_len in LENGTHS:
        for causal in (False, True):
            assert_accurate(*inputs(q_len, k_len, head_dim, 4, 2, dtype, 2, "cuda"), causal)


@pytest.fixture(scope="module")
def small_library():
    major, minor = torch.cuda.get_device_capability()
    return flash_cuda._build(f"sm_{major}{minor}", small_shared_memory=True)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_log_sum_exp(head_dim):
    """Of small and of large scores, with and without a scale of the user's."""
    for factor in (1, 10):
        for scale in (head_dim**-0.5, 0.3):
            q, k, v, _ = inputs(257, 300, head_dim, 4, 2, torch.bfloat16, 2, "cuda")
            q = factor * q
            _, lse = flash_cuda.flash_forward(q, k, v, True, scale)
            _, exact = reference_attention(q.double(), k.double(), v.double(), causal=True, scale=scale)
            torch.testing.assert_close(lse.double(), exact, rtol=2e-6, atol=2e-5)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scale_and_large_logits(head_dim):
    q, k, v, do = inputs(300, 257, head_dim, 4, 2, torch.bfloat16, device="cuda")
    for causal in (False, True):
        assert_accurate(q, k, v, do, causal, scale=0.3)
        assert_accurate(5 * q, 5 * k, v, do, causal)
        outputs = with_gradients(lambda *qkv, c=causal: flash_attention_cuda(*qkv, c), 100 * q, 100 * k, v, do)
        assert all(t.isfinite().all() for t in outputs)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_grow_along_the_keys(head_dim):
    """Each tile holds larger scores than all before.

    The sums are rescaled at each, while earlier halves wait for their values.
    """
    q, k, v, do = inputs(200, 700, head_dim, device="cuda", dtype=torch.float16)
    q, k = q.abs(), k.abs() * torch.linspace(0.1, 4, 700, device="cuda", dtype=torch.float16)[:, None]
    for causal in (False, True):
        assert_accurate(q, k, v, do, causal)
        assert_accurate(q, k.flip(2), v, do, causal)


@gpu
def test_strides_are_taken_as_they_are():
    """(B, T, 3, H, D) as a model makes it, a transposed head dim, rows off 16 bytes, a gradient without memory of its
    own.
    """
    packed = torch.randn(2, 140, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    do = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(q.shape)
    assert_accurate(q, k, v, do, True)
    assert_accurate(q, k.transpose(-2, -1).contiguous().transpose(-2, -1), v, do, True)
    odd = torch.randn(q.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:].view(q.shape)
    assert_accurate(odd, k, v, do, True)
    o = flash_attention_cuda(q, k, v, True)
    assert o.transpose(1, 2).is_contiguous()  # so that flattening the heads copies nothing


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_output_is_left_unwritten(head_dim, monkeypatch):
    """Every array that the kernels fill starts as NaN."""

    def poisoned(function):
        return lambda *args, **options: function(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    for lengths in ((135, 245), (245, 135)):
        q, k, v, do = inputs(*lengths, head_dim, heads=2, dtype=torch.float16, device="cuda")
        for causal in (False, True):
            o, lse = flash_cuda._forward(q, k, v, causal, 0.1)
            for t in (o, lse, *flash_cuda._backward(q, k, v, o, lse, do, causal, 0.1)):
                assert t.isfinite().all()


@gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_run_to_run(head_dim):
    """All but dq, which is summed in any order, are the same bits every time."""
    case = inputs(700, 900, head_dim, heads=4, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    runs = [with_gradients(lambda *qkv: flash_attention_cuda(*qkv, True), *case) for _ in range(5)]
    for o, dq, dk, dv in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip((o, dk, dv), (runs[0][0], *runs[0][2:]), strict=True))
        torch.testing.assert_close(dq, runs[0][1], rtol=2**-7, atol=1e-4)


@gpu
@pytest.mark.parametrize("causal", [False, True])
def test_the_log_sum_exp_alone_is_saved(causal):
    q, k, v = (torch.randn(3, n, 64, device="cuda", dtype=torch.float16, requires_grad=True) for n in (37, 50, 50))
    o = FlashAttentionCUDA.apply(q, k, v, causal)
    (lse,) = (t for t in o.grad_fn.saved_tensors if t.shape == (3, 37))
    expected, expected_lse = reference_attention(*(t[:, None].double() for t in (q, k, v)), causal=causal)
    torch.testing.assert_close(lse.double(), expected_lse[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o.double(), expected[:, 0], rtol=1e-3, atol=2e-3)
    first = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(o.sum(), (q, k, v))
    for a, b, t in zip(first, second, (q, k, v), strict=True):
        assert a.shape == t.shape
        torch.testing.assert_close(a, b)


@gpu
def test_a_stream_of_its_own():
    """The kernels wait for what their stream waits for."""
    stream = torch.cuda.Stream()
    x = torch.randn(1, 8, 2048, 64, device="cuda", dtype=torch.bfloat16)
    expected = flash_attention_cuda(2 * x, x, x, True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q = 2 * x
        o = flash_attention_cuda(q, x, x, True)
    stream.synchronize()
    assert torch.equal(o, expected)


@gpu
def test_compiles_without_a_graph_break():
    torch._dynamo.reset()

    def layer(x):
        q, k, v = x.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4).unbind(0)
        return flash_attention_cuda(q, k, v, True).transpose(1, 2).flatten(-2)

    x = torch.randn(1, 70, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    eager, compiled = layer(x), torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(o.float().sum(), x)[0] for o in (compiled, eager)]
    torch.testing.assert_close(*gradients)


@gpu
@pytest.mark.parametrize("scale", [0.0, -0.1, float("inf")])
def test_refuses_a_scale(scale):
    q = torch.zeros(1, 1, 4, 64, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match="positive, finite"):
        flash_attention_cuda(q, q, q, scale=scale)
