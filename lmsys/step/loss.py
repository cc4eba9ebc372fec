"""linear_cross_entropy: the language-model head and its loss in one, which never holds the logits of all tokens.

The idea is that of Liger-Kernel's fused linear cross-entropy (Hsu et al., arXiv 2410.10989, section 3.2) and of Apple's
Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009): a chunk of tokens at a time, logits, loss and the gradient of the
logits in their place, and from it, in the forward pass, the gradients of hidden states and weight. What is done here:
- Matmuls are cuBLAS's, on chunks that fill whole waves of its tiles on the GPU (chunk_tokens).
- The weight's gradient adds up in fp32 over the chunks, inside the matmul, and is rounded once to the weight's dtype.
- The gradient of a logit is softmax - one_hot: divided by the tokens, and multiplied by the incoming gradient (a loss
  scale), only at the end and in fp32, so that fp16 loses nothing to underflow.

Against logits and their log-softmax in fp32, that saves some 10 N V bytes of memory and, at least, a write and two
reads of N V in fp32. Limits: one loss, the mean; no second derivative.

Legend: N tokens, V vocabulary, d = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsys.step.kernels import IS_HIP, LN_2, LOG2_E, MAX, SUM, operator, resolve_path, tl, triton

# A row's program runs over it twice, for the log-sum-exp and for the gradient. With 32 warps of at most 32 registers a
# thread there are two programs on an SM: one waits for memory while the other computes, and the rows in flight (264 of
# 100 KB at 50,304 logits in bf16) fit an H200's L2 of 60 MB, so that the second read need not go to memory. A row is
# whole vectors, and less than one more.

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 2)  # times log2(e) is finite
_STAGES = 1  # of the loops over a row: two, with the next vectors under way to shared memory, take half as long again
OPTIONS = {} if IS_HIP else {"maxnreg": 32}


@triton.jit
def _logits(base, columns, end):
    """In fp32, -inf from column `end` on."""
    return tl.load(base + columns, mask=columns < end, other=-float("inf")).to(tl.float32)


@triton.jit
def _add_exponentials(x, maximum, total):
    """Online softmax a lane: x (LANES, WIDTH), the rest (LANES,). WIDTH lies in one thread: nothing is exchanged.

    Differences come before the factor log2(e), whose rounded product with logits in the hundreds would lose digits.
    """
    new_maximum = tl.maximum(maximum, tl.reduce(x, 1, MAX))
    exponentials = tl.math.exp2((x - new_maximum[:, None]) * LOG2_E)
    total = total * tl.math.exp2((maximum - new_maximum) * LOG2_E) + tl.reduce(exponentials, 1, SUM)
    return new_maximum, total


@triton.jit
def _store_gradient(base, x, columns, end, maximum, rest, target, target_gradient, is_ignored, holds_target):
    """Replace logits x by scale (softmax - one_hot(target)). rest: log2 of the sum of exp(x - maximum) / scale."""
    gradient = tl.math.exp2((x - maximum) * LOG2_E - rest)
    if holds_target:
        gradient = tl.where(columns == target, target_gradient, gradient)
    if is_ignored:
        gradient = tl.full(gradient.shape, 0.0, tl.float32)
    tl.store(base + columns, gradient.to(base.dtype.element_ty), mask=columns < end)


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, row_stride, vocabulary, ignore_index, scale,
    GRADIENT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """losses[row] = -log softmax(logits[row])[target]; where GRADIENT, logits[row] becomes its gradient times scale.

    A target that is no column gives NaN: nothing is read or written out of bounds.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    is_ignored = target == ignore_index
    inside = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(base + target, mask=inside, other=float("nan")).to(tl.float32)

    BLOCK: tl.constexpr = LANES * WIDTH
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = vocabulary // WIDTH * WIDTH
    last = whole + tl.arange(0, LANES)[:, None]  # the columns after the last whole vector
    maximum = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.full([LANES], 0.0, tl.float32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        maximum, total = _add_exponentials(_logits(base, start + columns, whole), maximum, total)
    if whole < vocabulary:
        maximum, total = _add_exponentials(_logits(base, last, vocabulary), maximum, total)
    top = tl.reduce(maximum, 0, MAX)
    rest = tl.math.log2(tl.reduce(total * tl.math.exp2((maximum - top) * LOG2_E), 0, SUM))
    loss = rest * LN_2 + (top - target_logit)
    tl.store(losses + row, tl.where(is_ignored, 0.0, loss))
    if GRADIENT:
        target_gradient = (tl.math.exp2(loss * -LOG2_E) - 1.0) * scale
        rest -= tl.math.log2(scale)
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            x = _logits(base, start + columns, whole)
            holds = (target >= start) & (target < start + BLOCK)
            _store_gradient(base, x, start + columns, whole, top, rest, target, target_gradient, is_ignored, holds)
        if whole < vocabulary:
            x = _logits(base, last, vocabulary)
            _store_gradient(base, x, last, vocabulary, top, rest, target, target_gradient, is_ignored, target >= whole)


def cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, scale: float, gradient: bool
) -> None:
    """Write the loss of each row, and, where asked, over the logits their gradient times scale.

    logits: (N, V), rows of any stride; targets: (N,) int64; losses: (N,) fp32; the last two contiguous.
    """
    rows, vocabulary = logits.shape
    width = 16 // logits.element_size()  # a vector load a thread
    lanes = min(1024, max(32, triton.next_power_of_2(-(-vocabulary // width))))
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(rows,)](
            logits, targets, losses, logits.stride(0), vocabulary, ignore_index, scale,
            GRADIENT=gradient, LANES=lanes, WIDTH=width, STAGES=_STAGES, num_warps=lanes // 32, **OPTIONS,
        )  # fmt: skip


CHUNK_BYTES = 3 * 2**29  # of a chunk's logits, at the most, where chunk_tokens chooses
_TILE = 128, 256  # rows and columns of the tiles of cuBLAS's matmul of 16-bit matrices on Hopper
_ROW_ALIGNMENT = 64  # elements: a vocabulary of odd size would have rows that tensor cores cannot read
_GRADIENT_SCALE = {torch.float16: 256.0}  # a probability of 1 / 50,304 is below fp16's normal numbers


def chunk_tokens(tokens: int, vocabulary: int, d_model: int, itemsize: int, multiprocessors: int) -> int:
    """Tokens of a chunk: as many as have logits of CHUNK_BYTES, rounded so that no matmul leaves the GPU half idle.

    The matmul that decides is the hidden states' gradient, (chunk, V) (V, d): it has few tiles, each long. Their number
    is kept just under a multiple of the multiprocessors, and the chunks of one size. 11,008 for 32,768 tokens of the
    124M shape on an H200: 86 x 3 tiles on 132 multiprocessors, three times.
    """
    rows, columns = _TILE
    across = -(-d_model // columns)
    most = max(1, CHUNK_BYTES // (vocabulary * itemsize * rows))  # tiles down a chunk
    waves = most * across // multiprocessors
    down = max(1, waves * multiprocessors // across) if waves else most
    chunks = max(1, -(-tokens // (down * rows)))
    each = -(-tokens // chunks)
    return max(rows, -(-each // rows) * rows)


def _empty(hidden, weight, targets, dtype, chunk, ignore_index, path, wants_hidden, wants_weight):
    """What losses_and_gradients gives, without values."""
    wide = torch.promote_types(dtype, torch.float32)
    grad_hidden = hidden.new_empty(hidden.shape if wants_hidden else 0, dtype=dtype)
    grad_weight = hidden.new_empty(weight.shape if wants_weight else 0, dtype=wide)
    return hidden.new_empty((), dtype=wide), hidden.new_empty((), dtype=wide), grad_hidden, grad_weight


@operator("linear_cross_entropy", fake=_empty)
def losses_and_gradients(
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
    """The mean loss; the factor that its gradients lack; the hidden states' gradient in dtype, (N, d), and the weight's
    in fp32, (V, d), both without that factor. A gradient that is not wanted is empty. chunk 0: chunk_tokens()."""
    rows, d_model = hidden.shape
    vocabulary, device = weight.shape[0], hidden.device
    wide = torch.promote_types(dtype, torch.float32)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if hidden.is_cuda else 1
    chunk = chunk or chunk_tokens(rows, vocabulary, d_model, dtype.itemsize, processors)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        hidden, weight, targets = hidden.to(dtype), weight.to(dtype), targets.contiguous()
        if device.type == "cpu":
            _check_targets(targets, vocabulary, ignore_index)
        gradient, scale = wants_hidden or wants_weight, _GRADIENT_SCALE.get(dtype, 1.0)
        losses = torch.empty(rows, dtype=wide, device=device)
        *_, grad_hidden, grad_weight = _empty(
            hidden, weight, targets, dtype, chunk, ignore_index, path, wants_hidden, wants_weight
        )
        stride = -(-vocabulary // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        buffer = torch.empty(min(chunk, rows), stride, dtype=dtype, device=device)
        buffer[:, vocabulary:] = 0  # oneDNN's bf16 matmul on a CPU multiplies what lies there by zero: no NaN may
        buffer = buffer[:, :vocabulary]
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = buffer[: hidden[part].shape[0]]
            torch.mm(hidden[part], weight.t(), out=logits)
            _cross_entropy(logits, targets[part], losses[part], ignore_index, scale, gradient, path)
            if wants_hidden:
                torch.mm(logits, weight, out=grad_hidden[part])
            if wants_weight:
                _add_matmul(grad_weight, logits.t(), hidden[part], is_first=start == 0)
        count = (targets != ignore_index).sum()
        return losses.sum() / count, 1 / (scale * count.to(wide)), grad_hidden, grad_weight


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a b, or total = a b where is_first; of narrower a and b, the matmul is not rounded to their dtype."""
    if not total.is_cuda:
        a, b = a.to(total.dtype), b.to(total.dtype)
    options = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    if is_first:
        torch.mm(a, b, out=total, **options)
    else:
        torch.addmm(total, a, b, out=total, **options)


def _cross_entropy(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, scale: float, gradient: bool, path: str
) -> None:
    """losses (n,) of logits (n, V); where gradient, the logits become their gradient times scale."""
    if path == "triton":
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
        fix = f"use the tokenizer that the model was made for, or ignore_index, which is {ignore_index}"
        raise ValueError(f"target {int(wrong[0])} is outside the vocabulary of {vocabulary}; {fix}")


class LinearCrossEntropy(torch.autograd.Function):
    """apply(hidden (N, d), weight (V, d), targets (N,), dtype of matmuls, chunk, ignore_index, path, rounded).

    Saves the two gradients; rounded: scaled and rounded at once to the inputs' dtypes; backward scales them in place.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, *settings: Any) -> Tensor:
        *given, rounded = settings
        loss, factor, *gradients = losses_and_gradients(hidden, weight, targets, *given, *ctx.needs_input_grad[:2])
        factor = factor.view(1)  # of one dimension, so that products with it are in its dtype, not in a gradient's bf16
        if rounded:
            gradients = [
                torch.mul(one, factor, out=one if one.dtype == like.dtype else torch.empty_like(one, dtype=like.dtype))
                for one, like in zip(gradients, (hidden, weight), strict=True)
            ]
        ctx.save_for_backward(factor, *gradients)
        ctx.rounded, ctx.dtypes = rounded, (hidden.dtype, weight.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, *gradients = ctx.saved_tensors
        if ctx.rounded:
            gradients = [one.mul_(grad.view(1)) for one in gradients]
        else:
            gradients = [(one * (factor * grad)).to(dtype) for one, dtype in zip(gradients, ctx.dtypes, strict=True)]
        wanted = ctx.needs_input_grad[:2]
        return *(one if wants else None for one, wants in zip(gradients, wanted, strict=True)), *(None,) * 6


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    ignore_index: int = -100,
    rounded: bool = False,
    path: str = "auto",
) -> Tensor:
    """Mean of -log softmax(hidden weight^T)[target] over targets that are not ignore_index, a scalar in fp32 (or fp64).

    Under autocast, matmuls are in its dtype, as F.linear's are.

    Args:
        hidden: (..., d). weight: (V, d). targets: (...), int64.
        chunk: tokens whose logits exist at a time; None: chunk_tokens().
        rounded: gradients wait for backward in their own dtypes, the weight's not in fp32: half as large at the peak.
        path: of softmax and gradient: triton, torch, or auto, which is triton on a GPU.
    Raises:
        ValueError: shapes or dtypes that do not fit; on the CPU, a target outside of the vocabulary, which on a GPU
            makes the loss NaN, as looking for it would wait for the device.
    """
    _check(hidden, weight, targets, chunk)
    kind, rows = hidden.device.type, targets.numel()
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if not torch.is_grad_enabled():  # which the autograd function could not know
        hidden, weight = hidden.detach(), weight.detach()
    flat = hidden.reshape(rows, weight.shape[1])
    path = resolve_path(path, hidden)
    return LinearCrossEntropy.apply(flat, weight, targets.reshape(rows), dtype, chunk or 0, ignore_index, path, rounded)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> None:
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}; they must be (..., d_model) and (vocabulary, d_model)")
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64 or targets.numel() == 0:
        raise ValueError(
            f"targets are {tuple(targets.shape)} of {targets.dtype}; they must be {tuple(hidden.shape[:-1])} of "
            "torch.int64, one a row of hidden, and at least one"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; outside of autocast they must be of one dtype"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be 1 token or more, or None")
