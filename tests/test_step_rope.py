"""rotated_heads against lmsys.model.rotate: plain PyTorch, and the Triton kernel in its interpreter or on a GPU."""

import pytest
import torch

from lmsys.model import RotaryEmbedding
from lmsys.step.reference import rotate
from lmsys.step.rope import rotate_backward, rotate_forward, rotated_heads

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

PATHS = pytest.mark.parametrize("path", ["torch", "triton"])


def inputs(batch, length, heads, head_dim, dtype=torch.float32):
    torch.manual_seed(0)
    rope = RotaryEmbedding(head_dim, length).to(DEVICE)
    return torch.randn(batch, length, 3, heads, head_dim, device=DEVICE).to(dtype), rope.cos, rope.sin


def plain(qkv, cos, sin):
    heads = qkv.permute(2, 0, 3, 1, 4)
    return *rotate(heads[:2], cos, sin).unbind(0), heads[2]


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else []), ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 70, 2, 24), (1, 64, 1, 64)], ids=str)
def test_heads_and_gradient(shape, dtype, path):
    qkv, cos, sin = inputs(*shape, dtype)
    ours, theirs = (qkv.clone().requires_grad_() for _ in range(2))
    outputs = [rotated_heads(ours, cos, sin, path), plain(theirs, cos, sin)]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    # Gradients in three layouts: as attention's kernels give them, transposed, and without memory of their own.
    gradients = (torch.randn_like(outputs[0][0]), torch.randn(qkv[:, :, 0].shape, device=DEVICE).to(dtype))
    gradients = gradients[0], gradients[1].transpose(1, 2), torch.ones((), dtype=dtype, device=DEVICE)
    gradients = (*gradients[:2], gradients[2].expand(outputs[0][2].shape))
    for some in outputs:
        torch.autograd.backward(some, gradients)
    torch.testing.assert_close(ours.grad, theirs.grad)


@PATHS
def test_every_element_is_written(path, monkeypatch):
    qkv, cos, sin = inputs(1, 5, 2, 16)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *shape, **options: empty(self, *shape, **options).fill_(torch.nan)
    )
    qkv.requires_grad_()
    q, k, v = rotated_heads(qkv, cos, sin, path)
    (q.sum() + k.sum() + v.sum()).backward()
    assert all(tensor.isfinite().all() for tensor in (q, k, v, qkv.grad))


def test_v_is_not_copied():
    qkv, cos, sin = inputs(1, 5, 2, 16)
    assert rotated_heads(qkv, cos, sin)[2].data_ptr() == qkv[:, :, 2].data_ptr()


def test_compiled_as_one_graph():
    qkv, cos, sin = inputs(1, 6, 2, 16)
    results = []
    for compiled in (False, True):
        leaf = qkv.clone().requires_grad_()
        function = torch.compile(rotated_heads, backend="aot_eager", fullgraph=True) if compiled else rotated_heads
        q, k, v = function(leaf * 1, cos, sin)
        (q * k + v.square()).sum().backward()
        results.append((q, leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_are_as_torch_library_has_them():
    qkv, cos, sin = inputs(1, 6, 2, 16)
    dq, dk, dv = (torch.randn(1, 2, 6, 16, device=DEVICE) for _ in range(3))
    torch.library.opcheck(rotate_forward.op, (qkv, cos, sin, "torch"), test_utils=("test_schema", "test_faketensor"))
    arguments = (dq, dk, dv, cos, sin, "torch")
    torch.library.opcheck(rotate_backward.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_other_shapes_are_refused():
    qkv, cos, sin = inputs(1, 6, 2, 16)
    for given in ((qkv[0], cos, sin), (qkv[:, :, :2], cos, sin), (qkv, cos[:5], sin[:5]), (qkv, cos, sin[:, :4])):
        with pytest.raises(ValueError, match="they must be"):
            rotated_heads(*given)
