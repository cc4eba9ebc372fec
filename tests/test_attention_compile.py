"""Kernels that torch.compile makes, and kernels inside a compiled model."""

import shutil

import pytest
import torch
from attention_cases import assert_as_good_as_pytorch, inputs, with_gradients
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lmsys.attention import attention
from lmsys.attention.reference import own_code, vectorized_torch

pytestmark = [
    pytest.mark.filterwarnings("ignore:no CUDA GPU"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU"),
]


@pytest.mark.parametrize("case", [(40, 70, 32, 4, 2), (63, 33, 16)], ids=str)
def test_vectorized_torch_compiled(case):
    assert_as_good_as_pytorch("vectorized_torch_compiled", *inputs(*case), True)


@pytest.mark.parametrize(
    "case,causal", [((40, 70, 32, 4, 2), True), ((70, 33, 16), True), ((1, 9, 16), False)], ids=str
)
def test_torch_flex_forward(case, causal):
    assert_as_good_as_pytorch("torch_flex", *inputs(*case), causal, backward=False)


def test_more_shapes_than_dynamo_recompiles_for_stay_compiled():
    """Dynamo's limit counts by code object: a compiled function a shape, each with its own, passes it."""
    counter = CompileCounter()
    for length in range(2, 14):
        q, k, v, _ = inputs(length, length, 8)
        compiled = torch.compile(own_code(vectorized_torch), backend=counter, dynamic=False, fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v, True), vectorized_torch(q, k, v, True))
    assert counter.frame_count == 12


@pytest.mark.parametrize("kernel", ["vectorized_torch_compiled", "torch_flex"])
def test_a_scale_of_the_callers(kernel):
    assert_as_good_as_pytorch(kernel, *inputs(20, 20, 16), True, backward=kernel != "torch_flex", scale=0.3)


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "packed"])
def test_the_operators_fakes_are_as_their_results(layout):
    """Shapes, strides and dtypes of what torch.compile is told beside what comes, and a schema that is true."""
    from lmsys.attention.flash_triton import flash_backward, flash_forward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if layout == "packed":
        q, k, v = torch.randn(2, 20, 3, 4, 16, device=device).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v, _ = inputs(20, 30, 16, heads=4, kv_heads=2, batch=2, device=device)
    if layout == "tokens first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    options = (True, 0.25, False, "auto")
    o, lse = flash_forward(q, k, v, *options)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(flash_forward, (q, k, v, *options), test_utils=tests)
    do = torch.ones((), device=device).expand(o.shape)
    torch.library.opcheck(flash_backward, (q, k, v, o, lse, do, *options), test_utils=tests)


@pytest.mark.parametrize(
    "kernel", ["scaled_dot_prod_attention", "vectorized_torch", "flash_attention_torch", "flash_attention_triton"]
)
def test_attention_compiles_without_a_graph_break(kernel):
    """The checks, the choice of the kernel and the kernel itself, forward and backward, in one graph each."""
    torch._dynamo.reset()

    options = {"deterministic": True, "path": "portable"} if kernel == "flash_attention_triton" else {}

    def layer(x):
        q, k, v = x.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v, causal=True, kernel=kernel, scale=0.3, **options).transpose(1, 2).flatten(-2)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(1, 20, 96, device=device, requires_grad=True)
    eager, compiled = layer(x), torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), x)[0], torch.autograd.grad(eager.sum(), x)[0], rtol=1e-4, atol=1e-5
    )


def test_activation_checkpointing_compiles_without_a_graph_break():
    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def layer(q, k, v):
        return attention(q.sin(), k, v, causal=True, kernel="flash_attention_triton", path="portable")

    case = inputs(20, 20, 16, device=device)
    compiled = torch.compile(
        lambda *qkv: checkpoint(layer, *qkv, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    for a, b in zip(with_gradients(compiled, *case), with_gradients(layer, *case), strict=True):
        torch.testing.assert_close(a, b)
