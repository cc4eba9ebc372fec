"""Blocks with a written backward pass against the plain ones.

Outputs, gradients, what is kept, and the Triton kernels beside plain PyTorch.
"""

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lmsys.config import ModelConfig
from lmsys.model import RotaryEmbedding, TransformerLM
from lmsys.step import blocks, planner
from lmsys.step.loss import linear_cross_entropy

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EXACT = torch.float32 if ON_GPU else torch.float64  # the kernels on a GPU compute in fp32
TIGHT = {"rtol": 1e-3, "atol": 1e-5} if ON_GPU else {"rtol": 1e-5, "atol": 1e-7}
CONFIG = ModelConfig(d_model=32, d_ff=48, num_layers=2, num_heads=2, context_length=24, vocab_size=50)
SETS = [
    (),
    blocks.KINDS,
    ("qkv",),
    ("attention", "gate"),
    ("qkv", "attention", "middle", "gate", "up"),
    ("norm2", "up"),
]


def models(keep, dtype=EXACT, kernel="flash_attention_torch"):
    """A plain model, and its twin with a written backward pass."""
    torch.manual_seed(0)
    plain = TransformerLM(CONFIG, attention_kernel=kernel).to(DEVICE, dtype)
    twin = TransformerLM(CONFIG, attention_kernel=kernel).to(DEVICE, dtype)
    twin.load_state_dict(plain.state_dict())
    return plain, blocks.select(twin, [keep] * CONFIG.num_layers)


def tokens(length=20):
    torch.manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (2, 3, length), device=DEVICE)


@pytest.mark.parametrize("keep", SETS, ids=str)
def test_loss_and_gradients_are_the_plain_models(keep):
    plain, twin = models(keep)
    for model in (plain, twin):
        loss = model(*tokens())
        loss.backward()
        model.loss = loss.detach()
    torch.testing.assert_close(twin.loss, plain.loss)
    for (name, a), b in zip(twin.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(twin(tokens()[0]), plain(tokens()[0]), rtol=1e-4, atol=1e-6)  # norms in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_what_the_planner_counts(dtype):
    """Bytes that autograd saves in a block, its parameters apart, for each kind alone and for sets of several."""
    shape = planner.Shape(CONFIG, 3, 20, gpus=2, dtype="fp32" if dtype == torch.float32 else "bf16")
    for keep in [*SETS, *itertools.combinations(blocks.KINDS, 1)]:
        _, twin = models(keep, dtype)
        block = twin.layers[0]
        x = torch.randn(3, 20, 32, device=DEVICE, dtype=dtype, requires_grad=True)
        cos, sin = twin.rope.cos[:20].float(), twin.rope.sin[:20].float()
        apart = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), cos, sin)}
        seen = {}

        def pack(tensor, seen=seen, apart=apart):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in apart:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x, cos, sin)
        assert sum(seen.values()) == shape.residual + sum(shape.kind_bytes(kind) for kind in keep), keep


def test_kernels_of_the_path_for_gpus():
    """A block with attention in Triton, whose head_dim is that of a GPU's fast path."""
    plain, twin = models(("attention",), torch.float32, "flash_attention_triton")
    losses = [model(*tokens(9)[:, :1]) for model in (plain, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for a, b in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows,d", [(5, 48), (9, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else []), ids=str)
def test_triton_kernels(rows, d, dtype):
    pytest.importorskip("triton")
    from lmsys.step.gate import swiglu, swiglu_backward
    from lmsys.step.norm import norm_backward, norm_forward

    torch.manual_seed(0)
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    x, added, dy, residual = torch.randn(4, rows, d, device=DEVICE).to(dtype)
    gain = torch.randn(d, device=DEVICE)
    total, y = norm_forward(x, gain, 1e-5, added, "triton")
    assert torch.equal(total, x + added)
    leaf, weight = (tensor.double().requires_grad_() for tensor in (total, gain))
    norm = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(y.double(), norm, **tight)
    torch.testing.assert_close(norm_forward(total, gain, 1e-5, path="triton")[1], y)
    norm.backward(dy.double())
    alone, _ = norm_backward(dy.clone(), total, gain, 1e-5, path="triton")
    torch.testing.assert_close(alone.double(), leaf.grad, **tight)
    _, dgain = norm_backward(dy, total, gain, 1e-5, residual, "triton")  # in place
    torch.testing.assert_close(dy.double(), leaf.grad + residual.double(), **tight)
    torch.testing.assert_close(dgain.double(), weight.grad, **tight)

    gate, up, grad = torch.randn(3, rows, d, device=DEVICE).to(dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (gate, up)]
    product = torch.nn.functional.silu(leaves[0]) * leaves[1]
    product.backward(grad.double())
    torch.testing.assert_close(swiglu(gate, up, "triton").double(), product, **tight)
    swiglu_backward(gate, up, grad, gate, up, grad, "triton")
    for ours, theirs in ((grad, product), (gate, leaves[0].grad), (up, leaves[1].grad)):
        torch.testing.assert_close(ours.double(), theirs.detach(), **tight)


@pytest.mark.filterwarnings("ignore:no CUDA GPU")
def test_rotation_in_place_is_rotation():
    pytest.importorskip("triton")
    from lmsys.step.rope import rotate_

    rope = RotaryEmbedding(24, 70).to(DEVICE)
    qkv = torch.randn(2, 70, 3, 2, 24, device=DEVICE)
    q, k, v = (part.transpose(1, 2) for part in qkv.clone().unbind(2))
    mine = qkv.clone()
    here = tuple(mine[:, :, index].transpose(1, 2) for index in range(2))
    rotate_(here, here, rope.cos, rope.sin, 1.0)
    for index, one in enumerate((rope(q), rope(k), v)):
        torch.testing.assert_close(mine[:, :, index].transpose(1, 2), one)


def test_tensors_in_any_layout():
    """An input whose rows are apart, and the gradient of a sum, which has no memory of its own."""
    plain, twin = models(("middle",))
    wide = torch.randn(3, 9, 64, device=DEVICE, dtype=EXACT)
    found = []
    for model in (plain, twin):
        leaf = wide.clone().requires_grad_()
        out = model.ln_final(model.layers[0](leaf[..., ::2], model.rope.cos[:9], model.rope.sin[:9]))
        out.sum().backward()
        found.append((out.detach(), leaf.grad, model.ln_final.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_losss_gradients_have_no_common_factor():
    """One over the number of tokens and a loss scale, neither a number in bf16, are not rounded to it.

    No gradient is off as a whole.
    """
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for n in (792, 50))
    targets, scale = torch.randint(50, (792,), device=DEVICE), 1.003
    (scale * linear_cross_entropy(hidden, weight, targets, rounded=True)).backward()
    wide = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    (scale * torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), targets)).backward()
    for one, exact in zip((hidden, weight), wide, strict=True):
        along = (one.grad.double() * exact.grad).sum() / exact.grad.square().sum()
        assert along.item() == pytest.approx(1, abs=6e-4)  # a factor rounded to bf16 is off by up to 2e-3


def test_a_second_backward_pass_is_refused():
    _, twin = models(("gate", "up"))
    loss = twin(*tokens())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_is_said():
    _, twin = models(())
    for message, keep in (
        ("unknown kind of activation 'gat'", [("gat",), ()]),
        ("kinds of 1 blocks; the model has 2", [()]),
    ):
        with pytest.raises(ValueError, match=message):
            blocks.select(twin, keep)
    with pytest.raises(ValueError, match="unknown attention kernel of a written backward pass 'vectorized_torch'"):
        models((), kernel="vectorized_torch")
    x = torch.randn(1, 4, 32, device=DEVICE, dtype=EXACT)
    with pytest.raises(ValueError, match=r"positions 0 to T - 1, .* got \(1, 1, 4, 8\)"):
        twin.layers[0](x, *(table[:4].expand(1, 1, 4, 8) for table in (twin.rope.cos, twin.rope.sin)))
    with pytest.raises(ValueError, match="must be of one dtype"):
        twin.layers[0](x.half(), twin.rope.cos, twin.rope.sin)
