"""The Triton kernels: in Triton's interpreter where there is no GPU, compiled where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import CASES, assert_as_good_as_pytorch, inputs, with_gradients
from torch.utils.checkpoint import checkpoint

from lmsys.attention import attention, check_support
from lmsys.attention.reference import reference_attention

KERNEL = "flash_attention_triton"
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:no CUDA GPU")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, causal):
    assert_as_good_as_pytorch(KERNEL, *inputs(*case, device=DEVICE), causal)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_a_scale_of_the_callers(scale):
    for causal in (False, True):
        assert_as_good_as_pytorch(KERNEL, *inputs(33, 40, 16, 4, 2, device=DEVICE), causal, scale=scale)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter's bfloat16 product is wrong; needs a CUDA GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_bf16(head_dim, causal):
    for lengths in ((1000, 1000), (129, 500), (500, 129), (1024, 1024)):
        case = inputs(*lengths, head_dim, 4, 2, torch.bfloat16, batch=2, device=DEVICE)
        assert_as_good_as_pytorch(KERNEL, *case, causal)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of hidden scores, before the mask puts zeros there
def test_large_logits():
    q, k, v, do = inputs(40, 70, 32, device=DEVICE)
    # The backward pass makes probabilities from the log-sum-exp, whose rounding in float32 is a relative error of
    # theirs.
    lse = reference_attention(5 * q, 5 * k, v, causal=False)[1].abs().max().item()
    for causal in (False, True):
        assert_as_good_as_pytorch(KERNEL, 5 * q, 5 * k, v, do, causal, floor=lse * torch.finfo(torch.float32).eps)
        outputs = with_gradients(
            lambda *qkv, c=causal: attention(*qkv, causal=c, kernel=KERNEL), 100 * q, 100 * k, v, do
        )
        assert all(t.isfinite().all() for t in outputs)


def test_strides_are_taken_as_they_are():
    """(B, T, 3, H, D) as a model makes it, a transposed head dim, a gradient without memory of its own."""
    packed = torch.randn(2, 40, 3, 2, 24, device=DEVICE)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    k = k.transpose(-2, -1).contiguous().transpose(-2, -1)
    do = torch.ones((), device=DEVICE).expand(q.shape)
    assert_as_good_as_pytorch(KERNEL, q, k, v, do, True)
    o = attention(q, k, v, causal=True, kernel=KERNEL)
    assert o.transpose(1, 2).is_contiguous()  # so that flattening the heads copies nothing


def test_gradients_are_the_same_bits_every_time():
    length, head_dim = (70, 64) if ON_GPU else (20, 16)
    case = inputs(length, length, head_dim, heads=4, kv_heads=2, dtype=torch.float16, device=DEVICE)
    for options in ({"path": "portable"}, {"deterministic": True}):
        first, second = (
            with_gradients(lambda *qkv, o=options: attention(*qkv, causal=True, kernel=KERNEL, **o), *case)
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- Autograd -------------------------------------------------------------------------------------


def test_a_graph_is_used_twice():
    q, k, v, do = inputs(20, 20, 16, device=DEVICE)
    q.requires_grad_()
    o = attention(q, k, v, causal=True, kernel=KERNEL)
    (once,) = torch.autograd.grad(o, q, do, retain_graph=True)
    (twice,) = torch.autograd.grad(o, q, 2 * do)
    torch.testing.assert_close(twice, 2 * once)


def test_a_second_derivative_is_refused():
    from lmsys.attention.flash_triton import FlashAttentionTriton

    q, k, v, _ = (t.requires_grad_() for t in inputs(4, 4, 16, device=DEVICE))
    (dq,) = torch.autograd.grad(FlashAttentionTriton.apply(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_activation_checkpointing_gives_the_same_gradients():
    q, k, v, do = inputs(20, 30, 16, heads=4, kv_heads=2, device=DEVICE)

    def layer(q, k, v):
        return attention(q.sin(), k, v, causal=True, kernel=KERNEL)

    plain = with_gradients(layer, q, k, v, do)
    again = with_gradients(lambda *qkv: checkpoint(layer, *qkv, use_reentrant=False), q, k, v, do)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_four_dimensions_save_the_inputs_the_output_and_the_log_sum_exp():
    q, k, v, _ = inputs(37, 50, 16, heads=4, kv_heads=2, batch=2, device=DEVICE)
    q.requires_grad_()
    o = attention(q, k, v, causal=True, kernel=KERNEL)
    saved = o.grad_fn.saved_tensors
    assert [t.shape for t in saved] == [q.shape, k.shape, v.shape, o.shape, (2, 4, 37)]
    torch.testing.assert_close(saved[4], reference_attention(q, k, v, causal=True)[1], rtol=1e-5, atol=1e-5)
    assert [t.data_ptr() for t in saved[:4]] == [t.data_ptr() for t in (q, k, v, o)]  # no copies


@pytest.mark.parametrize("causal", [False, True])
def test_the_log_sum_exp_alone_is_saved(causal):
    from lmsys.attention.flash_triton import FlashAttentionTriton

    q, k, v = (torch.randn(3, n, 16, device=DEVICE, requires_grad=True) for n in (37, 50, 50))
    o = FlashAttentionTriton.apply(q, k, v, causal)
    (lse,) = (t for t in o.grad_fn.saved_tensors if t.shape == (3, 37))
    expected, expected_lse = reference_attention(q[:, None], k[:, None], v[:, None], causal=causal)
    torch.testing.assert_close(lse, expected_lse[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(o, expected[:, 0], rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]


def test_no_output_is_left_unwritten(monkeypatch):
    """Every array that the kernels fill starts as NaN."""
    from lmsys.attention import flash_triton

    def poisoned(function):
        return lambda *args, **options: function(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    q, k, v, do = inputs(35, 45, 20, heads=2, device=DEVICE)
    for causal in (False, True):
        options = causal, 0.2, False, "portable"
        o, lse = flash_triton.flash_forward(q, k, v, *options)
        for t in (o, lse, *flash_triton.flash_backward(q, k, v, o, lse, do, *options)):
            assert t.isfinite().all()


# --- Launches -------------------------------------------------------------------------------------


class Compiled:
    """As a compiled kernel: kernel[grid](*arguments) launches."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Tuned:
    """As an autotuned kernel: it asks for the grid, and returns the compiled kernel."""

    def __init__(self):
        self.calls, self.launches = [], []

    def __getitem__(self, grid):
        def run(*arguments):
            self.calls.append((grid({"BLOCK_Q": 16, "BLOCK_K": 32}), arguments))
            return Compiled(self.launches)

        return run


def test_a_call_like_an_earlier_one_launches_what_was_compiled(monkeypatch):
    from lmsys.attention import flash_triton

    monkeypatch.setattr(flash_triton, "INTERPRETED", False)
    monkeypatch.setattr(flash_triton, "_precision", lambda q: "ieee")
    launcher = flash_triton._Launcher(flash_triton._forward_kernel, 0, lambda q, k: (False,), flash_triton._query_tiles)
    launcher.tuned = tuned = Tuned()

    def call(q_len=40, dtype=torch.float32, causal=True, scale=0.5, offset=0, transposed=False):
        q = torch.zeros(2 * 3 * q_len * 16 + offset, dtype=dtype)[offset:].view(2, 3, q_len, 16)
        if transposed:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        tensors = (q, q, q, q.clone(), torch.zeros(2, 3, q_len))
        before = len(tuned.calls), len(tuned.launches)
        launcher(tensors, scale, causal)
        return tensors, (len(tuned.calls) - before[0], len(tuned.launches) - before[1])

    assert call()[1] == (1, 0)
    tensors, counts = call(scale=0.25)
    assert counts == (0, 1)
    (grid, bound), (fast_grid, launched) = tuned.calls[0], tuned.launches[0]
    assert fast_grid == grid == (3 * 2 * 3, 1, 1)  # 40 queries in tiles of 16, for 2 * 3 heads
    assert launched[:5] == tuple(t.data_ptr() for t in tensors)
    assert launched[5:] == (0.25, *bound[6:], 16, 32)  # all of the kernel's arguments, in its order
    assert len(launched) == len(flash_triton._forward_kernel.arg_names)
    for other in ({"q_len": 41}, {"dtype": torch.float16}, {"causal": False}, {"transposed": True}):
        assert call(**other)[1] == (1, 0), other
        assert call(**other)[1] == (0, 1), other
    for _ in range(2):  # Triton compiles such pointers apart, so it sees each of them
        assert call(offset=1)[1] == (1, 0)
    monkeypatch.setattr(flash_triton, "_SIGNATURES", 2)
    assert call(q_len=42)[1] == (1, 0) and len(launcher.compiled) == 1


@pytest.mark.skipif(not ON_GPU, reason="in the interpreter nothing is compiled")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_relaunches_are_right(dtype):
    """Call after call, with lengths, strides and addresses that Triton specializes on between them."""
    for _ in range(3):
        for q_len, k_len, offset in ((64, 64, 0), (64, 64, 1), (1, 33, 0), (33, 1, 0), (48, 48, 0), (48, 48, 8)):
            q, k, v, do = inputs(q_len, k_len, 32, 4, 2, dtype, 2, DEVICE)
            moved = torch.empty(q.numel() + offset, dtype=dtype, device=DEVICE)[offset:].view(q.shape).copy_(q)
            assert_as_good_as_pytorch(KERNEL, moved, k, v, do, True, path="portable")


def test_mixed_dtypes_are_refused_by_the_function_itself():
    from lmsys.attention.flash_triton import FlashAttentionTriton

    q, k, v, _ = inputs(4, 4, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"'flash_attention_triton': got .*k torch.float16.*one dtype and one device"):
        FlashAttentionTriton.apply(q, k.half(), v)


@pytest.mark.skipif(ON_GPU, reason="on a GPU bfloat16 is right")
def test_the_interpreter_refuses_bf16():
    with pytest.raises(ValueError, match=r"bfloat16.*interpreter"):
        check_support(KERNEL, device="cpu", dtype=torch.bfloat16, head_dim=64)
    with pytest.raises(ValueError, match=r"'flash_attention_triton'.*use float32 or float16"):
        attention(*inputs(4, 4, 16, dtype=torch.bfloat16)[:3], causal=True, kernel=KERNEL)


@pytest.mark.skipif(ON_GPU, reason="about machines without a GPU")
@pytest.mark.parametrize("first", ["", "import triton\n"], ids=["first to import Triton", "Triton imported before"])
def test_the_interpreter_starts_by_itself_and_says_so(first):
    code = f"""{first}import torch, warnings
from lmsys.attention import attention
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = torch.randn(1, 1, 5, 16)
    o = attention(q, q, q, causal=True, kernel="flash_attention_triton")
assert sum("interpreter" in str(w.message) for w in caught) == 1, caught
torch.testing.assert_close(o[..., 0, :], q[..., 0, :])
print("fine")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "fine", result.stderr
