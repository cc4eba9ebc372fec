"""rms_norm and norm_beside against fp64: plain PyTorch, and the Triton kernel in its interpreter or on a GPU; compiled; what they keep."""

import pytest
import torch
from block_cases import outcome, small_block, small_inputs

from lmsys.config import ModelConfig
from lmsys.model import RMSNorm, TransformerLM
from lmsys.step.norm import norm_back_op, norm_beside, rms_norm

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-5

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:no CUDA GPU")
PATHS = pytest.mark.parametrize("path", ["torch", "triton"])


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*shape, device=DEVICE) * torch.rand(*shape[:-1], 1, device=DEVICE).exp()
    return x.to(dtype), 1 + 0.2 * torch.randn(shape[-1], device=DEVICE)


def exact(x, gain, dy, beside=None):
    """The norm and its gradients in fp64."""
    x, gain = (tensor.detach().double().requires_grad_() for tensor in (x, gain))
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain
    torch.autograd.backward((y, x * 1), (dy.double(), torch.zeros_like(x) if beside is None else beside.double()))
    return y.detach(), x.grad, gain.grad


def near(ours, theirs, error):
    """Nowhere further apart than that part of the largest value."""
    assert (ours.double() - theirs).abs().max() <= error * theirs.abs().max()


def gradient(shape, layout):
    dy = torch.randn(*shape, device=DEVICE)
    if layout == "transposed":
        return dy.mT.contiguous().mT
    return dy if layout == "contiguous" else dy[..., :1].expand_as(dy)


# More tiles of rows than programs, with rows over; the columns of a half tile; odd ones; a row that is more than a tile; one row.
SHAPES = [(2, 67, 64), (9, 768), (3, 5, 7), (2, 2, 2500), (48,)]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_gradients(shape, dtype, path):
    x, gain = inputs(shape, dtype)
    error = 1e-6 if dtype == torch.float32 else 2**-7
    for layout in ("contiguous", "transposed", "expanded") if len(shape) == 3 else ("contiguous",):
        dy, beside = gradient(shape, layout).to(dtype), gradient(shape, layout).to(dtype)
        for function in (rms_norm, norm_beside):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, gain)]
            made = function(*leaves, EPS, path)
            if function is norm_beside:
                assert torch.equal(made[0], x)
                torch.autograd.backward(made, (beside, dy))
            else:
                made.backward(dy)
            y = made if function is rms_norm else made[1]
            assert (y.dtype, leaves[0].grad.dtype, leaves[1].grad.dtype) == (dtype, dtype, torch.float32)
            theirs = exact(x, gain, dy, beside if function is norm_beside else None)
            near(y, theirs[0], error)
            near(leaves[0].grad, theirs[1], error)
            near(leaves[1].grad, theirs[2], 2e-6)  # added up in fp32 from the values as they are


def test_gradients_are_the_same_bits_each_time():
    x, gain = inputs((300, 96))
    dy = torch.randn_like(x)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    first, second = (norm_back_op(dy, x, rstd, gain, None, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@PATHS
def test_every_element_is_written(path, monkeypatch):
    x, gain = (tensor.requires_grad_() for tensor in inputs((70, 24)))
    for name in ("empty", "empty_like"):
        empty = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, empty=empty, **o: empty(*a, **o).fill_(torch.nan))
    sum(made.sum() for made in norm_beside(x, gain, EPS, path)).backward()
    assert x.grad.isfinite().all() and gain.grad.isfinite().all()


def test_the_module_is_the_plain_one():
    x, _ = inputs((2, 5, 24), torch.bfloat16)
    norm = RMSNorm(24).to(DEVICE)
    expected = norm(x)
    assert norm.beside(x)[0] is x
    norm.fused = True
    assert torch.equal(norm(x), expected) and torch.equal(norm.beside(x)[1], expected)


def test_kept_are_the_input_itself_and_one_number_a_row():
    x, gain = (tensor.requires_grad_() for tensor in inputs((2, 5, 24), torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_beside(x, gain, EPS)
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [
        (x.shape, torch.bfloat16),
        ((2, 5, 1), torch.float32),
        (gain.shape, torch.float32),
    ]
    assert kept[0].data_ptr() == x.data_ptr()


@PATHS
def test_under_autocast_no_gradient_is_cast_to_fp32(path):
    """The norm of an fp32 stream is in the autocast dtype, as is its gradient, and both are what casts would have made."""
    x, gain = inputs((6, 24))
    dy, beside = torch.randn_like(x).bfloat16(), torch.randn_like(x)
    made = []
    for enabled in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gain)]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            stream, y = norm_beside(*leaves, EPS, path)
        assert (stream.dtype, y.dtype) == (torch.float32, torch.bfloat16 if enabled else torch.float32)
        torch.autograd.backward((stream, y), (beside, dy.to(y.dtype)))
        made.append((y.bfloat16(), *(leaf.grad for leaf in leaves)))
    (y, *gradients), (other_y, *others) = made
    assert torch.equal(y, other_y)
    for a, b in zip(gradients, others, strict=True):  # kernels compiled for two dtypes of dy need not add in one order
        near(a, b.double(), 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_compiled_as_one_graph_is_as_eager_and_as_the_plain_one(autocast):
    torch.manual_seed(0)
    block, made = small_block(), []
    given = small_inputs()
    for fused, compiled in ((False, False), (True, False), (True, True)):
        block.ln1.fused = block.ln2.fused = fused
        made.append(outcome(block, *given, compiled=compiled, autocast=autocast))
    for plain, *others in zip(*made, strict=True):
        for other in others:
            near(other, plain.double(), 2e-2 if autocast else 2e-6)


def test_the_compiler_adds_no_gradients_beside_the_norms():
    """In a compiled block's backward pass, one operator a norm, and no addition of activations' gradients."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    graphs = []
    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph),
        bw_compiler=lambda graph, _: graphs.append(graph) or make_boxed_func(graph),
    )
    block, (x, angles) = small_block(), small_inputs()
    block.ln1.fused = block.ln2.fused = block.ffn.merged = True
    torch.compile(block, backend=backend, fullgraph=True)(
        x.requires_grad_(), angles.cos(), angles.sin()
    ).sum().backward()
    nodes = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in nodes].count("lmsys.norm_back.default") == 2
    assert not [node for node in nodes if "aten.add" in str(node.target) and node.meta["val"].shape == x.shape]


def test_all_norms_of_a_model_are_chosen():
    model = TransformerLM(ModelConfig(16, 24, 2, 2, 6, 10))
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 5 and not any(norm.fused for norm in norms)
    assert all(norm.fused for norm in norms if model.fuse(norm=True))


@PATHS
def test_the_operator_is_as_torch_library_has_it(path):
    x, gain = inputs((2, 3, 20), torch.bfloat16)
    dy, rstd = torch.randn_like(x), torch.rand(2, 3, 1, device=DEVICE)
    for beside in (None, torch.randn_like(x)):
        arguments = (dy, x, rstd, gain, beside, path)
        torch.library.opcheck(norm_back_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused():
    x, gain = inputs((3, 20))
    for given, message in (
        ((x, gain[:10], EPS), "must be"),
        ((x, gain, EPS, "cuda"), "path is 'cuda'"),
        ((torch.zeros(2, 8200), torch.ones(8200), EPS, "triton"), "rows of 8200"),
    ):
        for function in (rms_norm, norm_beside):
            with pytest.raises(ValueError, match=message):
                function(*given)
