"""The attention contract, the oracle, and the kernels in plain PyTorch."""

import importlib.util
import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, assert_as_good_as_pytorch, inputs, with_gradients

from lmsys.attention import KERNELS, attention, check_support, get_kernel
from lmsys.attention.baselines import flash_attention_4
from lmsys.attention.flash_torch import FlashAttentionTorch
from lmsys.attention.reference import reference_attention

EAGER = ["scaled_dot_prod_attention", "vectorized_torch", "flash_attention_torch"]


# --- The oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_the_oracle_is_the_formula_a_query_at_a_time(causal):
    q, k, v, _ = inputs(5, 7, 4, heads=4, kv_heads=2, dtype=torch.float64)
    o, lse = reference_attention(q, k, v, causal=causal)
    for head in range(4):
        for i in range(5):
            keys = range(i + 1) if causal else range(7)
            scores = [float(q[0, head, i] @ k[0, head // 2, j]) / 2 for j in keys]
            weights = [math.exp(s) for s in scores]
            row = sum(w * v[0, head // 2, j] for w, j in zip(weights, keys, strict=True)) / sum(weights)
            torch.testing.assert_close(o[0, head, i], row)
            assert lse[0, head, i].item() == pytest.approx(math.log(sum(weights)))


def test_the_oracle_agrees_with_torch():
    q, k, v, _ = inputs(9, 9, 16, heads=2, dtype=torch.float64)
    o, _ = reference_attention(q, k, v, causal=True, scale=0.3)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))


# --- Kernels in plain PyTorch ---------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kernel", EAGER)
def test_forward_and_backward(kernel, case, causal):
    assert_as_good_as_pytorch(kernel, *inputs(*case), causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", EAGER)
def test_large_logits(kernel, causal):
    q, k, v, do = inputs(65, 65, 32)
    assert_as_good_as_pytorch(kernel, 5 * q, 5 * k, v, do, causal)
    outputs = with_gradients(lambda *qkv: attention(*qkv, causal=causal, kernel=kernel), 100 * q, 100 * k, v, do)
    assert all(t.isfinite().all() for t in outputs)


@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize("kernel", [*EAGER, "torch_sdpa_flash"])
def test_a_scale_of_the_callers(kernel, scale):
    case = inputs(33, 40, 16, heads=4, kv_heads=2)
    for causal in (False, True):
        assert_as_good_as_pytorch(kernel, *case, causal, scale=scale)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] <= c[1]], ids=str)
def test_torch_sdpa_flash(case):
    for causal in (False, True):
        assert_as_good_as_pytorch("torch_sdpa_flash", *inputs(*case), causal)


@pytest.mark.parametrize("kernel", [*EAGER, "torch_sdpa_flash"])
def test_strided_inputs_and_more_batch_dimensions(kernel):
    q, k, v, _ = inputs(9, 9, 8, heads=2, batch=6)
    o = attention(q, k, v, causal=True, kernel=kernel)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(attention(*strided, causal=True, kernel=kernel), o)
    deeper = [t.unflatten(0, (2, 3)) for t in (q, k, v)]
    torch.testing.assert_close(attention(*deeper, causal=True, kernel=kernel), o.unflatten(0, (2, 3)))
    torch.testing.assert_close(attention(q[0], k[0], v[0], causal=True, kernel=kernel), o[0])


@pytest.mark.parametrize("q_tile,k_tile", [(16, 16), (16, 48), (48, 16), (17, 25), (200, 200)])
def test_tiles_do_not_change_the_result(q_tile, k_tile):
    q, k, v, do = inputs(70, 90, 8, heads=4, kv_heads=2, dtype=torch.float64)
    for causal in (False, True):
        tiled = with_gradients(
            lambda *qkv, c=causal: FlashAttentionTorch.apply(*qkv, c, None, q_tile, k_tile), q, k, v, do
        )
        whole = with_gradients(lambda *qkv, c=causal: reference_attention(*qkv, causal=c)[0], q, k, v, do)
        for a, b in zip(tiled, whole, strict=True):
            torch.testing.assert_close(a, b)


def test_the_tiled_gradient_is_that_of_finite_differences():
    q, k, v, _ = (t.requires_grad_() for t in inputs(5, 6, 3, heads=2, kv_heads=1, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *qkv: FlashAttentionTorch.apply(*qkv, True, 0.4, 2, 3), (q, k, v))


def test_a_second_derivative_is_refused():
    q, k, v, _ = (t.requires_grad_() for t in inputs(4, 4, 8))
    (dq,) = torch.autograd.grad(FlashAttentionTorch.apply(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("causal", [False, True])
def test_tiled_pytorch_saves_the_log_sum_exp_alone(causal):
    q, k, v = (torch.randn(4, n, 32, requires_grad=True) for n in (65, 80, 80))
    o = FlashAttentionTorch.apply(q, k, v, causal)
    (lse,) = (t for t in o.grad_fn.saved_tensors if t.shape == (4, 65))
    expected, expected_lse = reference_attention(q[:, None], k[:, None], v[:, None], causal=causal)
    torch.testing.assert_close(lse, expected_lse[:, 0])
    torch.testing.assert_close(o, expected[:, 0])
    assert max(t.numel() for t in o.grad_fn.saved_tensors) == 4 * 80 * 32  # nothing of q_len x k_len


# --- The table and bad inputs ---------------------------------------------------------------------


def test_the_table():
    assert list(KERNELS) == [
        "scaled_dot_prod_attention",
        "vectorized_torch",
        "vectorized_torch_compiled",
        "flash_attention_torch",
        "flash_attention_triton",
        "flash_attention_cuda",
        "torch_sdpa_flash",
        "torch_sdpa_cudnn",
        "torch_flex",
        "flash_attention_4",
    ]
    assert all(kernel.name == name and "\n" not in kernel.description for name, kernel in KERNELS.items())
    assert {name for name, kernel in KERNELS.items() if not kernel.ours} == {
        "torch_sdpa_flash",
        "torch_sdpa_cudnn",
        "torch_flex",
        "flash_attention_4",
    }


def test_the_table_imports_no_backend():
    code = "import sys, lmsys.attention; print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_unknown_kernel_lists_the_known_ones():
    for call in (
        lambda: get_kernel("flash_attention_triton2"),
        lambda: check_support("flash_attention_triton2", device="cpu", dtype=torch.float32, head_dim=16),
        lambda: attention(*[torch.zeros(1, 1, 1, 16)] * 3, causal=True, kernel="flash_attention_triton2"),
    ):
        with pytest.raises(ValueError, match=r"Did you mean 'flash_attention_triton'\?.*vectorized_torch"):
            call()


def z(*shape, **options):
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    "q,k,v,message",
    [
        (z(2, 4, 8, 16), z(2, 3, 8, 16), z(2, 3, 8, 16), "4 query heads and 3 key heads"),
        (z(2, 2, 8, 16), z(2, 4, 8, 16), z(2, 4, 8, 16), "2 query heads and 4 key heads"),
        (z(2, 2, 8, 16), z(3, 2, 8, 16), z(3, 2, 8, 16), "leading dimensions"),
        (z(2, 2, 8, 16), z(2, 2, 8, 32), z(2, 2, 8, 32), "head_dim"),
        (z(2, 2, 8, 16), z(2, 2, 8, 16), z(2, 2, 9, 16), "k and v differ"),
        (z(2, 2, 8, 16), z(2, 8, 16), z(2, 8, 16), "number of dimensions"),
        (z(8, 16), z(8, 16), z(8, 16), "three or more"),
        (z(2, 2, 0, 16), z(2, 2, 8, 16), z(2, 2, 8, 16), "empty"),
        (z(2, 2, 8, 16), z(2, 2, 0, 16), z(2, 2, 0, 16), "empty"),
        (
            z(2, 2, 8, 16),
            z(2, 2, 8, 16, dtype=torch.float16),
            z(2, 2, 8, 16),
            "dtypes differ; got q float32, k float16",
        ),
        (z(2, 2, 8, 16), z(2, 2, 8, 16, device="meta"), z(2, 2, 8, 16), "devices differ; got q cpu, k meta"),
        (*[z(2, 2, 8, 16, dtype=torch.int64)] * 3, "got int64; it takes float32"),
        (*[z(2, 2, 8, 16, dtype=torch.bool)] * 3, "got bool; it takes float32"),
        (*[z(2, 2, 8, 16, device="meta")] * 3, "got device 'meta'; it runs on cpu or cuda"),
    ],
)
def test_bad_tensors_are_refused(q, k, v, message):
    for kernel in ("vectorized_torch", "flash_attention_torch"):
        with pytest.raises(ValueError, match=f"^attention kernel '{kernel}': .*{message}"):
            attention(q, k, v, causal=True, kernel=kernel)


@pytest.mark.parametrize("kernel", ["vectorized_torch", "flash_attention_triton"])
@pytest.mark.parametrize("scale", [0.0, -0.1, math.inf, math.nan, "1", True, torch.ones(())], ids=str)
def test_bad_scales_are_refused(kernel, scale):
    with pytest.raises(ValueError, match=f"'{kernel}': got scale .*; it takes a finite number above 0, or None"):
        attention(*[z(1, 1, 4, 16)] * 3, causal=True, kernel=kernel, scale=scale)


@pytest.mark.parametrize(
    "kernel,options,message",
    [
        ("vectorized_torch", {"deterministic": True}, "got the option deterministic=True; it takes no options"),
        ("flash_attention_triton", {"tile": 64}, "got the option tile=64; it takes deterministic, path"),
        ("flash_attention_triton", {"deterministic": 1}, "got deterministic=1; it takes False, True"),
        ("flash_attention_triton", {"path": "cuda"}, "got path='cuda'; it takes 'auto', 'portable', 'hopper'"),
        ("flash_attention_triton", {"path": ["auto"]}, r"got path=\['auto'\]; it takes 'auto'"),
    ],
)
def test_unknown_options_are_refused(kernel, options, message):
    with pytest.raises(ValueError, match=f"^attention kernel '{kernel}': {message}"):
        attention(*[z(1, 1, 4, 16)] * 3, causal=True, kernel=kernel, **options)


@pytest.mark.parametrize(
    "kernel,options,message",
    [
        ("flash_attention_triton", {"head_dim": 257}, "'flash_attention_triton': got head_dim 257; it takes 1 to 256"),
        ("flash_attention_triton", {"dtype": torch.float64}, "got float64; it takes float32, float16, bfloat16 on cpu"),
        ("flash_attention_triton", {"heads": 6, "kv_heads": 4}, "6 query heads and 4 key heads"),
        ("torch_sdpa_cudnn", {}, "got device 'cpu'; it runs on cuda"),
        ("torch_sdpa_cudnn", {"device": "cuda", "dtype": torch.float32}, "takes float16, bfloat16 on cuda"),
        ("torch_sdpa_cudnn", {"device": "cuda", "dtype": torch.float16, "head_dim": 100}, "multiples of 8"),
        ("vectorized_torch", {"dtype": torch.int32, "backward": True}, "got int32; it takes float32"),
        ("flash_attention_cuda", {}, "got device 'cpu'; it runs on cuda"),
        ("flash_attention_cuda", {"device": "cuda"}, "got float32; it takes float16, bfloat16 on cuda"),
        (
            "flash_attention_cuda",
            {"device": "cuda", "dtype": torch.float16, "head_dim": 96},
            "got head_dim 96; it takes 64 to 128 in multiples of 64",
        ),
        (
            "flash_attention_4",
            {"device": "cuda", "dtype": torch.float16, "head_dim": 256},
            "got head_dim 256; it takes 64",
        ),
        ("torch_sdpa_flash", {"device": "cuda"}, "got float32; it takes float16, bfloat16 on cuda"),
        ("torch_flex", {"head_dim": 8}, "got head_dim 8; it takes 16 to 256"),
        ("torch_flex", {"backward": True}, "got a backward pass on cpu"),
        ("vectorized_torch", {"head_dim": 0}, "got head_dim 0"),
    ],
)
def test_support_is_known_before_there_is_a_tensor(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        check_support(kernel, **({"device": "cpu", "dtype": torch.float32, "head_dim": 64} | options))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="FlashAttention-4 may be installed")
def test_the_missing_peer_says_what_to_install():
    with pytest.raises(ValueError, match="'flash_attention_4'.*flash_attn.cute.*pip install flash-attn-4"):
        check_support("flash_attention_4", device="cuda", dtype=torch.float16, head_dim=64)


def test_flash_attention_4_gets_what_its_package_takes(monkeypatch):
    """A stand-in for the package: (B, T, H, D) tensors, a mask from the bottom right, and a pair as the result."""

    def flash_attn_func(q, k, v, causal, softmax_scale):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        assert q.is_contiguous()  # what the caller has, not a copy
        if causal:
            assert q.shape[2] == k.shape[2]
        o, lse = reference_attention(q, k, v, causal=causal, scale=softmax_scale)
        return o.transpose(1, 2), lse

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    q, k, v, _ = inputs(9, 13, 16, heads=4, kv_heads=2)
    for causal in (False, True):
        for scale in (None, 0.3):
            expected, _ = reference_attention(q, k, v, causal=causal, scale=scale)
            torch.testing.assert_close(flash_attention_4(q, k, v, causal, scale), expected)
    with pytest.raises(ValueError, match="'flash_attention_4': got causal with q_len 9 > k_len 5"):
        flash_attention_4(q, k[:, :, :5], v[:, :, :5], True)


def test_what_is_supported_passes():
    for kernel in EAGER:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            check_support(kernel, device="cpu", dtype=dtype, head_dim=80, heads=8, kv_heads=2, backward=True)


def test_sdpa_refuses_causal_with_more_queries_than_keys():
    q, k, v, _ = inputs(9, 5, 16)
    with pytest.raises(ValueError, match="'torch_sdpa_flash'.*q_len 9 > k_len 5"):
        attention(q, k, v, causal=True, kernel="torch_sdpa_flash")
    assert_as_good_as_pytorch("torch_sdpa_flash", q, k, v, torch.ones_like(q), False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_bf16_on_a_gpu(kernel):
    if (reason := get_kernel(kernel).unavailable) and (reason := reason("cuda", torch.bfloat16)):
        pytest.skip(reason)
    for causal in (False, True):
        q, k, v, do = inputs(256, 256, 64, heads=4, kv_heads=2, dtype=torch.bfloat16, batch=2, device="cuda")
        assert_as_good_as_pytorch(kernel, q, k, v, do, causal)
