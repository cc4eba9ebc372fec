"""linear_cross_entropy: the language-model head and its loss in one, which never holds the logits of all tokens.

The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al., arXiv 2410.10989, section 3.2) and of Apple's Cut
Cross-Entropy (Wijmans et al., arXiv 2411.09009): a chunk of tokens at a time, logits, loss and the gradient of the logits in their
place, and from it, in the forward pass, the gradients of the hidden states and the weight. What is done here:
- Products are cuBLAS's, on chunks that fill whole waves of its tiles on the GPU (chunk_tokens).
- The weight's gradient adds up in fp32 over the chunks, inside the product, and leaves rounded once to the weight's dtype.
- The gradient of a logit is softmax - one_hot, of size 1 and not 1 / tokens: divided, and multiplied by the incoming gradient (a loss
  scale), only at the end and in fp32, so that fp16 loses nothing to underflow.

Beside logits and their log-softmax in fp32, that saves at N tokens and a vocabulary of V some 10 N V bytes of memory and, at least, a
write and two reads of N V in fp32. Of N V d, 6 FLOPs as without it; a backward pass afterwards costs two small multiplications.

Limits: one loss, the mean; no second derivative; the gradients of a call that is never followed by a backward pass are work for nothing
(under no_grad none are made).

Legend: N tokens, V vocabulary, d = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 3 * 2**29  # of a chunk's logits, at the most, where chunk_tokens chooses
_TILE = 128, 256  # rows and columns of the tiles in which cuBLAS makes a product of 16-bit matrices on Hopper
_ROW_ALIGNMENT = 64  # elements: a vocabulary of odd size would have rows that tensor cores cannot read
_GRADIENT_SCALE = {torch.float16: 256.0}  # a probability of 1 / 50,304 is below fp16's normal numbers


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    ignore_index: int = -100,
    path: str = "auto",
) -> Tensor:
    """Mean of -log softmax(hidden weight^T)[target] over the targets that are not ignore_index, a scalar in fp32 (or fp64).

    Under autocast, products are in its dtype, as F.linear's are.

    Args:
        hidden: (..., d). weight: (V, d). targets: (...), int64.
        chunk: tokens whose logits exist at a time; None: chunk_tokens().
        path: of softmax and gradient: triton, torch, or auto, which is triton on a GPU.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU, a target outside of the vocabulary. On a GPU such a
            target makes the loss NaN, as looking for it would wait for the device.
    """
    _check(hidden, weight, targets, chunk, path)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if path == "auto":
        path = "triton" if hidden.is_cuda else "torch"
    rows = targets.numel()
    if not torch.is_grad_enabled():  # which the autograd function could not know
        hidden, weight = hidden.detach(), weight.detach()
    flat = hidden.reshape(rows, weight.shape[1])
    return LinearCrossEntropy.apply(flat, weight, targets.reshape(rows), dtype, chunk or 0, ignore_index, path)


def chunk_tokens(tokens: int, vocabulary: int, d_model: int, itemsize: int, multiprocessors: int) -> int:
    """Tokens of a chunk: as many as have logits of CHUNK_BYTES, rounded so that no product leaves the GPU half idle.

    The product that decides is the hidden states' gradient, (chunk, V) (V, d): it has few tiles, each long. Their number is kept just
    under a multiple of the multiprocessors, and the chunks of one size. 11,008 for 32,768 tokens of the 124M shape on an H200:
    86 x 3 tiles on 132 multiprocessors, three times. Fewer chunks also read and write the weight's gradient less often.
    """
    rows, columns = _TILE
    across = -(-d_model // columns)
    most = max(1, CHUNK_BYTES // (vocabulary * itemsize * rows))  # tiles down a chunk
    waves = most * across // multiprocessors
    down = max(1, waves * multiprocessors // across) if waves else most
    chunks = max(1, -(-tokens // (down * rows)))
    each = -(-tokens // chunks)
    return max(rows, -(-each // rows) * rows)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None, path: str) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; they must be (..., d_model) and (vocabulary, d_model)"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64 or targets.numel() == 0:
        raise ValueError(
            f"targets are {tuple(targets.shape)} of {targets.dtype}; they must be {tuple(hidden.shape[:-1])} of torch.int64, one a row of "
            "hidden, and at least one"
        )
    kind = hidden.device.type
    if not (hidden.is_floating_point() and weight.is_floating_point()) or (
        hidden.dtype != weight.dtype and not torch.is_autocast_enabled(kind)
    ):
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; outside of autocast they must be of one floating-point dtype"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device} and targets on {targets.device}; move them to one device"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 token or more, or None")
    if path not in ("auto", "triton", "torch"):
        raise ValueError(f"path is '{path}'; it must be auto, triton or torch")


# --- Loss and gradients, chunk by chunk -----------------------------------------------------------


def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int,
    ignore_index: int,
    path: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss; the factor that its gradients lack; the hidden states' gradient in dtype, (N, d), and the weight's in fp32, (V, d),
    both without that factor. A gradient that is not wanted is empty. chunk 0: chunk_tokens()."""
    rows, d_model = hidden.shape
    vocabulary, device = weight.shape[0], hidden.device
    wide = torch.promote_types(dtype, torch.float32)
    chunk = chunk or chunk_tokens(rows, vocabulary, d_model, dtype.itemsize, _multiprocessors(device))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        hidden, weight, targets = hidden.to(dtype), weight.to(dtype), targets.contiguous()
        if device.type == "cpu":
            _check_targets(targets, vocabulary, ignore_index)
        gradient, scale = wants_hidden or wants_weight, _GRADIENT_SCALE.get(dtype, 1.0)
        losses = torch.empty(rows, dtype=wide, device=device)
        grad_hidden = torch.empty((rows, d_model) if wants_hidden else 0, dtype=dtype, device=device)
        grad_weight = torch.empty((vocabulary, d_model) if wants_weight else 0, dtype=wide, device=device)
        stride = -(-vocabulary // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        buffer = torch.empty(min(chunk, rows), stride, dtype=dtype, device=device)[:, :vocabulary]
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = buffer[: hidden[part].shape[0]]
            torch.mm(hidden[part], weight.t(), out=logits)
            _cross_entropy_(logits, targets[part], losses[part], ignore_index, scale, gradient, path)
            if wants_hidden:
                torch.mm(logits, weight, out=grad_hidden[part])
            if wants_weight:
                _add_product(grad_weight, logits.t(), hidden[part], is_first=start == 0)
        count = (targets != ignore_index).sum()
        return losses.sum() / count, 1 / (scale * count.to(wide)), grad_hidden, grad_weight


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a b, or total = a b where is_first; a and b may be of a narrower dtype than the sum, whose product is not rounded to it."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total)
    elif not total.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=0 if is_first else 1, out=total)
    elif is_first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, scale: float, gradient: bool, path: str
) -> None:
    """losses (n,) of logits (n, V); where gradient, the logits become their gradient times scale."""
    if path == "triton":
        from lmsys.step.kernels import cross_entropy_

        cross_entropy_(logits, targets, losses, ignore_index, scale, gradient)
        return
    is_ignored = targets == ignore_index
    index = targets.where(~is_ignored, 0).unsqueeze(1)
    log_p = logits.to(losses.dtype).log_softmax(1)
    losses.copy_(-log_p.gather(1, index).squeeze(1).masked_fill(is_ignored, 0))
    if gradient:
        p = log_p.exp_()
        p.scatter_add_(1, index, p.new_full(index.shape, -1.0))
        logits.copy_(p.mul_(scale).masked_fill_(is_ignored.unsqueeze(1), 0))


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = targets[((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"target {int(wrong[0])} is outside the vocabulary of {vocabulary}; use the tokenizer that the model was made for, or "
            f"ignore_index, which is {ignore_index}"
        )


# --- What torch.compile sees ----------------------------------------------------------------------

losses_op = torch.library.custom_op("lmsys::linear_cross_entropy", _losses, mutates_args=())


@losses_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int,
    ignore_index: int,
    path: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if wants_hidden else 0, dtype=dtype),
        hidden.new_empty(weight.shape if wants_weight else 0, dtype=wide),
    )


# --- Autograd -------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """apply(hidden (N, d), weight (V, d), targets (N,), dtype of products, chunk, ignore_index, path); saves the two gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk: int,
        ignore_index: int,
        path: str,
    ) -> Tensor:
        launch = losses_op if torch.compiler.is_compiling() else _losses
        wants = ctx.needs_input_grad[:2]
        loss, factor, grad_hidden, grad_weight = launch(
            hidden, weight, targets, dtype, chunk, ignore_index, path, *wants
        )
        ctx.save_for_backward(factor, grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        factor = (factor * grad).view(
            1
        )  # of one dimension, so that the products are in its dtype, not in a gradient's bf16
        made = [
            (gradient * factor).to(dtype) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *made, None, None, None, None, None
