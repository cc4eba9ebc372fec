"""gated_product against fp64.

Plain PyTorch, and the Triton kernels in their interpreter or on a GPU; what it keeps; compiled.
"""

import pytest
import torch
from block_cases import outcome, small_block, small_inputs
from torch.nn import functional as F

from lmsys.model import SwiGLU
from lmsys.step.gate import gate_backward, gate_forward, gated_product

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

PATHS = pytest.mark.parametrize("path", ["torch", "triton"])


def inputs(shape, d_ff, d_model=24, dtype=torch.float32):
    torch.manual_seed(0)
    merged = 2 * torch.randn(*shape, 2 * d_ff, device=DEVICE)
    return merged.to(dtype), (torch.randn(d_model, d_ff, device=DEVICE) * d_ff**-0.5).to(dtype)


def plain(merged, weight):
    gate, up = merged.chunk(2, -1)
    return F.linear(F.silu(gate) * up, weight)


def gradients(function, merged, weight, dy, **options):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (merged, weight)]
    y = function(*leaves, **options)
    y.backward(dy.to(y.dtype))
    return y, *(leaf.grad for leaf in leaves)


def near(ours, exact, error):
    """Nowhere further apart than that part of the largest value."""
    assert (ours.double() - exact).abs().max() <= error * exact.abs().max()


def incoming(shape, d_model, layout):
    """A gradient (*shape, d_model): contiguous, transposed in memory, or one number in many places."""
    dy = torch.randn(*shape, d_model, device=DEVICE)
    if layout == "transposed":
        return dy.mT.contiguous().mT
    return dy if layout == "contiguous" else dy[..., :1].expand_as(dy)


# Whole tiles of one row; of several rows, and with rows over; columns over; few columns, fewer than a tile's.
SHAPES = [((3,), 2048), ((2, 8), 256), ((1, 9), 192), ((5,), 2730), ((2, 3, 2), 7)]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "d_ff"), SHAPES, ids=str)
def test_product_and_gradients(shape, d_ff, dtype, path):
    merged, weight = inputs(shape, d_ff, dtype=dtype)
    for layout in ("contiguous", "transposed", "expanded") if len(shape) == 2 else ("contiguous",):
        dy = incoming(shape, weight.shape[0], layout).to(dtype)
        ours = gradients(gated_product, merged, weight, dy, path=path)
        exact = gradients(plain, merged.double(), weight.double(), dy)
        for a, b in zip(ours, exact, strict=True):
            assert a.dtype == dtype
            near(a, b, 2e-6 if dtype == torch.float32 else 1.5e-2)
        assert ours[1].is_contiguous()


def test_the_kernels_round_once():
    """In bf16, no further from fp64 than the rounding of each result; the interpreter cuts digits off."""
    merged, _ = inputs((6,), 256, dtype=torch.bfloat16)
    dproduct = torch.randn(6, 256, device=DEVICE).bfloat16()
    exact = merged.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    product = F.silu(gate) * up
    product.backward(dproduct.double())
    dmerged, again = gate_backward(merged, dproduct, "triton")
    assert torch.equal(again, gate_forward(merged, "triton"))
    for ours, theirs in ((again, product.detach()), (dmerged, exact.grad)):
        assert ((ours.double() - theirs).abs() <= (2**-8 if ON_GPU else 2**-7) * theirs.abs() + 1e-6).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_far_from_zero_nothing_overflows():
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4], device=DEVICE)
    merged = torch.cat((gate, torch.full_like(gate, 3.0)))[None]
    dmerged, product = gate_backward(merged, torch.ones(1, 6, device=DEVICE), "triton")
    expected = torch.tensor([0, 0, 0, 0, 270, 3e4], device=DEVICE)[None]
    torch.testing.assert_close(product, expected)
    silu_slope = torch.tensor([0, 0, 0, 0.5, 1, 1], device=DEVICE)
    torch.testing.assert_close(dmerged, torch.cat((3 * silu_slope, expected[0] / 3))[None])


@PATHS
def test_every_element_is_written(path, monkeypatch):
    merged, weight = inputs((3,), 70)
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **o: empty(self, *a, **o).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: empty_like(*a, **o).fill_(torch.nan))
    for made in gradients(gated_product, merged, weight, torch.ones(3, 24, device=DEVICE), path=path):
        assert made.isfinite().all()


def test_merged_computes_what_apart_does():
    if ON_GPU:
        pytest.skip("products of other sizes round otherwise on a GPU")
    torch.manual_seed(0)
    layer, made = SwiGLU(24, 64), []
    x, dy = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    for layer.gated_product in (None, gated_product):
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        made.append([y, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_product_of_gate_and_up_is_not_kept(dtype):
    """Kept are merged and the weight, as they are: nothing else that has a row a token."""
    merged, weight = (tensor.requires_grad_() for tensor in inputs((40,), 64))
    kept = []
    with (
        torch.autocast(DEVICE, dtype, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        gated_product(merged, weight)
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [
        (merged.shape, dtype or torch.float32),
        (weight.shape, torch.float32),
    ]


def test_autocast_sets_the_products_dtype_and_not_the_gradients():
    merged, weight = inputs((4, 6), 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, dmerged, dweight = gradients(gated_product, merged, weight, torch.ones(4, 6, 24, device=DEVICE))
    assert (y.dtype, dmerged.dtype, dweight.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = gradients(plain, merged, weight, torch.ones(4, 6, 24, device=DEVICE))
    for a, b in zip((y, dmerged, dweight), exact, strict=True):
        near(a, b, 2e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_as_one_graph_is_as_eager(autocast):
    """A block with the layer in it, its products apart from its operators."""
    torch.manual_seed(0)
    block = small_block()
    block.ffn.gated_product = gated_product
    given = small_inputs()
    made = [outcome(block, *given, compiled=compiled, autocast=autocast) for compiled in (False, True)]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_the_compiler_sees_the_products_and_keeps_no_product_of_gate_and_up():
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = []
    backend = aot_autograd(
        fw_compiler=lambda graph, _: graphs.append(graph) or make_boxed_func(graph),
        bw_compiler=lambda graph, _: graphs.append(graph) or make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    x, w13, w2 = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((40, 16), (128, 16), (16, 64)))
    function = torch.compile(lambda x, w13, w2: gated_product(F.linear(x, w13), w2), backend=backend, fullgraph=True)
    function(x, w13, w2).sum().backward()
    forward, backward = (
        [str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs
    )
    assert [forward.count(name) for name in ("aten.mm.default", "lmsys.gate.default")] == [2, 1]
    assert [backward.count(name) for name in ("aten.mm.default", "lmsys.gate_back.default")] == [4, 1]
    assert not any("lmsys.gate.default" in name or "cat" in name for name in backward)
    kept = next(node for node in graphs[0].graph.nodes if node.op == "output").args[0]
    assert (40, 128) in [tuple(node.meta["val"].shape) for node in kept]
    assert (40, 64) not in [tuple(node.meta["val"].shape) for node in kept]


@PATHS
def test_operators_are_as_torch_library_has_them(path):
    merged, _ = inputs((2, 3), 20)
    torch.library.opcheck(gate_forward.op, (merged, path), test_utils=("test_schema", "test_faketensor"))
    arguments = (merged, torch.randn(2, 3, 20, device=DEVICE), path)
    torch.library.opcheck(gate_backward.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused():
    merged, weight = inputs((3,), 20)
    for given, message in (
        ((merged[:, :30], weight), "must be"),
        ((merged, weight[0]), "must be"),
        ((merged, weight.double()), "of one dtype"),
        ((merged, weight, "cuda"), "path is 'cuda'"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_product(*given)
