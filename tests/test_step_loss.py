"""The fused head and loss against model.cross_entropy of whole logits.

Plain PyTorch, and the Triton kernel in its interpreter or on a GPU.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lmsys.model import cross_entropy
from lmsys.step.loss import CHUNK_BYTES, chunk_tokens, linear_cross_entropy

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def inputs(tokens, d_model, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, d_model, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, d_model, generator=generator, dtype=torch.float64) / d_model**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    made = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (hidden, weight)]
    return *made, targets.to(DEVICE)


def gradients(function, hidden, weight, targets, scale=1.0):
    """Loss and gradients of the leaves, the loss scaled as a gradient scaler does."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    loss = function(*leaves, targets)
    (loss * scale).backward()
    return loss.detach(), *(leaf.grad / scale for leaf in leaves)


def plain(hidden, weight, targets):
    return cross_entropy(F.linear(hidden, weight), targets)


def exact(hidden, weight, targets):
    logits = hidden.double() @ weight.double().t()
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()


def assert_as_good_as_plain(hidden, weight, targets, **options):
    """Errors against float64 at most twice those of the plain head and loss in the same dtype."""
    wanted = gradients(exact, hidden.double(), weight.double(), targets)
    theirs = gradients(plain, hidden, weight, targets)
    ours = gradients(lambda h, w, t: linear_cross_entropy(h, w, t, **options), hidden, weight, targets)
    for mine, other, want, like in zip(ours, theirs, wanted, (theirs[0], hidden, weight), strict=True):
        assert mine.dtype == like.dtype
        error, floor = (mine.double() - want).norm() / want.norm(), torch.finfo(mine.dtype).eps
        assert error <= 2 * (other.double() - want).norm() / want.norm() + floor


DTYPES = [torch.float32, torch.float16] + (
    [torch.bfloat16] if ON_GPU else []
)  # the interpreter has no bf16 to speak of


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 16, 300), (7, 24, 33), (1, 8, 2), (20, 8, 8200)], ids=str)
def test_loss_and_gradients(shape, dtype, path):
    for chunk in (None, 5):
        assert_as_good_as_plain(*inputs(*shape, dtype), chunk=chunk, path=path)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_large_and_equal_logits(path):
    hidden, weight, targets = inputs(12, 16, 70)
    assert_as_good_as_plain(100 * hidden.detach(), weight, targets, path=path)
    loss = linear_cross_entropy(torch.zeros_like(hidden), weight, targets, path=path)
    torch.testing.assert_close(loss, torch.tensor(70.0, device=DEVICE).log())


def test_float64_by_finite_differences():
    hidden, weight, targets = (tensor.cpu() for tensor in inputs(6, 4, 9, torch.float64))
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, chunk=4), leaves)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_ignored_targets_count_for_nothing(path):
    hidden, weight, targets = inputs(11, 8, 40)
    kept = torch.arange(11, device=DEVICE) % 3 > 0
    masked = targets.where(kept, -1)
    ours = gradients(
        lambda h, w, t: linear_cross_entropy(h, w, t, chunk=4, ignore_index=-1, path=path), hidden, weight, masked
    )
    wanted = gradients(lambda h, w, t: plain(h[kept], w, t[kept]), hidden, weight, targets)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_scaled_losses_lose_nothing_in_fp16(path):
    """A gradient of 1 / 4096 of a probability of 1 / 300 is no fp16 number; scaled at the end, it comes out."""
    hidden, weight, targets = inputs(64, 16, 300, torch.float16)
    wanted = gradients(exact, hidden.double(), weight.double(), targets)
    ours = gradients(lambda h, w, t: linear_cross_entropy(h, w, t, path=path), hidden, weight, targets, scale=2.0**12)
    for a, b in zip(ours[1:], wanted[1:], strict=True):
        assert (a.double() - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_every_element_is_written(path, monkeypatch):
    """Memory that begins as NaN shows what is read before it is written, or not written.

    The gaps between rows stay NaN.
    """
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    case = inputs(13, 8, 45)
    wanted = gradients(plain, *case)
    monkeypatch.setattr(torch, "empty", poisoned)
    ours = gradients(lambda h, w, t: linear_cross_entropy(h, w, t, chunk=5, path=path), *case)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_strides(path):
    hidden, weight, targets = inputs(12, 8, 40)
    strided = hidden.detach().repeat_interleave(2, 0)[::2].view(3, 4, 8).transpose(0, 1)
    order = targets.repeat_interleave(2)[::2].view(3, 4).t()
    turned = weight.detach().t().contiguous().t()
    assert not strided.is_contiguous() and not order.is_contiguous() and not turned.is_contiguous()
    options = {"chunk": 5, "path": path}
    ours = gradients(lambda h, w, t: linear_cross_entropy(h, w, t, **options), strided, turned, order)
    wanted = gradients(plain, strided, turned, order)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_none_are_made(monkeypatch):
    hidden, weight, targets = inputs(12, 8, 40)
    seen = []
    from lmsys.step import loss as fused_loss

    original = fused_loss.losses_and_gradients
    monkeypatch.setattr(fused_loss, "losses_and_gradients", lambda *args: seen.append(args[-2:]) or original(*args))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets).detach())
    frozen = weight.detach()
    grad = torch.autograd.grad(linear_cross_entropy(hidden, frozen, targets), hidden)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(plain(hidden, frozen, targets), hidden)[0])
    assert seen == [(False, False), (True, False)]


def test_a_second_backward_pass_finds_the_same():
    hidden, weight, targets = inputs(12, 8, 40)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_autocast_makes_products_in_its_dtype_and_gradients_in_the_parameters():
    hidden, weight, targets = inputs(32, 16, 60)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = gradients(lambda h, w, t: linear_cross_entropy(h, w, t, path="torch"), hidden, weight, targets)
        theirs = gradients(plain, hidden, weight, targets)
    wanted = gradients(exact, hidden.double(), weight.double(), targets)
    for a, b, want in zip(ours, theirs, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - want).norm() <= 1.5 * (b.double() - want).norm() + 1e-6 * want.norm()
    assert not torch.equal(ours[1], gradients(plain, hidden, weight, targets)[1])


class Head(nn.Module):
    """Tied: the embedding is the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16, device=DEVICE)
        self.layer = nn.Linear(16, 16, device=DEVICE)
        self.fused = True

    def forward(self, ids, targets):
        hidden = self.layer(self.embedding(ids))
        if self.fused:
            return linear_cross_entropy(hidden, self.embedding.weight, targets, path="torch")
        return plain(hidden, self.embedding.weight, targets)


def test_tied_weights_get_their_gradient_once_and_hooks_see_it():
    ids = torch.randint(50, (4, 6), device=DEVICE)
    targets = torch.randint(50, (4, 6), device=DEVICE)
    one, two = Head(), Head()
    two.fused = False
    seen = []
    one.embedding.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    for model in (one, two):
        model(ids, targets).backward()
    assert len(seen) == 1
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(seen[0], two.embedding.weight.grad)


def test_compiled_as_one_graph():
    ids = torch.randint(50, (4, 6), device=DEVICE)
    targets = torch.randint(50, (4, 6), device=DEVICE)
    model = Head()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for one in (model, compiled):
        with torch.autocast(DEVICE, torch.bfloat16):
            one(ids, targets).backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_operator_is_as_torch_library_has_it():
    hidden, weight, targets = inputs(12, 8, 40)
    from lmsys.step.loss import losses_and_gradients

    for wants in ((True, True), (False, True), (False, False)):
        arguments = (hidden.detach(), weight.detach(), targets, torch.float32, 5, -100, "torch", *wants)
        torch.library.opcheck(losses_and_gradients.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_target_outside_of_the_vocabulary():
    hidden, weight, targets = inputs(12, 8, 40)
    for wrong in (40, -1):
        targets[7] = wrong
        if ON_GPU:
            assert linear_cross_entropy(hidden, weight, targets).isnan()
        else:
            with pytest.raises(ValueError, match=f"target {wrong} is outside the vocabulary of 40"):
                linear_cross_entropy(hidden, weight, targets)


def test_the_kernel_reads_nothing_of_a_target_outside():
    from lmsys.step.loss import cross_entropy_

    logits = torch.randn(3, 40, device=DEVICE)
    losses = torch.empty(3, device=DEVICE)
    cross_entropy_(logits, torch.tensor([1, 40, -7], device=DEVICE), losses, -100, 1.0, False)
    assert losses.isnan().tolist() == [False, True, True]


def test_mistakes_are_told():
    hidden, weight, targets = inputs(12, 8, 40)
    cases = {
        r"hidden is \(12, 8\) and weight \(40, 7\)": (hidden, weight[:, :7], targets, {}),
        r"targets are \(11,\)": (hidden, weight, targets[:11], {}),
        "torch.int32": (hidden, weight, targets.int(), {}),
        "at least one": (hidden[:0], weight, targets[:0], {}),
        "outside of autocast": (hidden.half(), weight, targets, {}),
        "chunk is 0": (hidden, weight, targets, {"chunk": 0}),
        "path is 'cuda'": (hidden, weight, targets, {"path": "cuda"}),
    }
    for message, (*tensors, options) in cases.items():
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*tensors, **options)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((32768, 50304, 768), 11008),
        ((16384, 50304, 1024), 8192),
        ((65536, 151936, 4096), 4096),
        ((100, 50304, 768), 128),
    ],
)
def test_chunks_fill_an_h200(shape, chunk):
    tokens, vocabulary, d_model = shape
    assert chunk_tokens(tokens, vocabulary, d_model, 2, 132) == chunk
    assert chunk * vocabulary * 2 <= CHUNK_BYTES
    tiles = chunk // 128 * -(-d_model // 256)
    assert tokens < chunk or tiles / (-(-tiles // 132) * 132) > 0.95
