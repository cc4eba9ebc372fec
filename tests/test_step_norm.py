"""The norm's two passes against fp64.

Plain PyTorch, and the Triton kernels in their interpreter or on a GPU; what it keeps.
"""

import pytest
import torch

from lmsys.config import ModelConfig
from lmsys.model import RMSNorm, TransformerLM
from lmsys.step import blocks
from lmsys.step.norm import Norm, norm_backward, norm_forward

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-5
PATHS = pytest.mark.parametrize("path", ["torch", "triton"])


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*shape, device=DEVICE) * torch.rand(*shape[:-1], 1, device=DEVICE).exp()
    return x.to(dtype), 1 + 0.2 * torch.randn(shape[-1], device=DEVICE)


def exact(x, gain, dy, residual=None):
    """The norm and its gradients in fp64."""
    x, gain = (tensor.detach().double().requires_grad_() for tensor in (x, gain))
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain
    torch.autograd.backward((y, x * 1), (dy.double(), torch.zeros_like(x) if residual is None else residual.double()))
    return y.detach(), x.grad, gain.grad


def near(ours, theirs, error):
    """Nowhere further apart than that part of the largest value."""
    assert (ours.double() - theirs).abs().max() <= error * theirs.abs().max()


# More tiles of rows than programs, with rows over; the columns of a half tile; odd ones; a row that is more than a
# tile; one row.
SHAPES = [(134, 64), (9, 768), (15, 7), (4, 2500), (1, 48)]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_gradients(shape, dtype, path):
    x, gain = inputs(shape, dtype)
    error = 1e-6 if dtype == torch.float32 else 2**-7
    dy, residual = torch.randn_like(x), torch.randn_like(x)
    total, y = norm_forward(x, gain, EPS, path=path)
    assert torch.equal(total, x)
    for added in (None, residual):
        theirs = exact(x, gain, dy, added)
        dx, dgain = norm_backward(dy.clone(), x, gain, EPS, added, path)
        assert (y.dtype, dx.dtype, dgain.dtype) == (dtype, dtype, torch.float32)
        near(y, theirs[0], error)
        near(dx, theirs[1], error)
        near(dgain, theirs[2], 2e-6)  # added up in fp32 from the values as they are


def test_gradients_are_the_same_bits_each_time():
    x, gain = inputs((300, 96))
    dy = torch.randn_like(x)
    first, second = (norm_backward(dy.clone(), x, gain, EPS, path="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_every_element_is_written_whatever_the_layout(layout, monkeypatch):
    """Of a gradient that is transposed in memory, or one number in many places."""
    x, gain = (tensor.requires_grad_() for tensor in inputs((5, 14, 24)))
    dy = torch.randn(5, 14, 24, device=DEVICE)
    if layout != "contiguous":
        dy = dy.mT.contiguous().mT if layout == "transposed" else dy[..., :1].expand_as(dy)
    for name in ("empty", "empty_like"):
        empty = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, empty=empty, **o: empty(*a, **o).fill_(torch.nan))
    y = Norm.apply(x, gain, EPS)
    y.backward(dy)
    for ours, theirs in zip((y, x.grad, gain.grad), exact(x, gain, dy), strict=True):
        near(ours, theirs, 2e-6)


def test_kept_is_the_input_itself():
    x, gain = (tensor.requires_grad_() for tensor in inputs((2, 5, 24), torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        Norm.apply(x, gain, EPS)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), gain.data_ptr()]


def test_the_last_norm_of_a_model_is_the_plain_one():
    x, _ = inputs((2, 5, 24), torch.bfloat16)
    config = ModelConfig(24, 24, 1, 2, 6, 10)
    model = blocks.select(TransformerLM(config, attention_kernel="flash_attention_torch").to(DEVICE), [()])
    assert torch.equal(model.ln_final(x), RMSNorm(24).to(DEVICE)(x))


def test_what_does_not_fit_is_refused():
    x, gain = inputs((3, 20))
    with pytest.raises(ValueError, match="path is 'cuda'"):
        norm_forward(x, gain, EPS, path="cuda")
    with pytest.raises(ValueError, match="rows of 8200"):
        norm_forward(torch.zeros(2, 8200), torch.ones(8200), EPS, path="triton")
