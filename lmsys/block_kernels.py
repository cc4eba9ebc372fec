"""Triton kernels of a Transformer block beside its products: RMSNorm with the residual addition, SwiGLU and its gradient in place.

All are bound by memory: each element is read and written once. Sums are in fp32. What is overwritten is said at each function;
lmsys.selective, the caller, imports this module where tensors lie on a GPU. On the CPU interpreter it is there to check.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmsys.attention.flash_triton import tl, triton  # which sets up the interpreter where there is no GPU

_sum = tl.standard._sum_combine  # interpreted whenever the kernel is, as tl.sum may not be
_BLOCK = 4096  # elements of a program of SwiGLU: 16 a thread, two vector loads of 16-bit elements


# --- RMSNorm --------------------------------------------------------------------------------------


@triton.jit
def _rms_norm_kernel(x, added, gain, total, y, d, eps, ADD: tl.constexpr, D_PAD: tl.constexpr):  # fmt: skip
    """A row of y = norm(x) gain; where ADD, of total = x + added, rounded to its dtype, and y = norm(total) gain."""
    row = tl.program_id(0).to(tl.int64) * d
    columns = tl.arange(0, D_PAD)
    mask = columns < d
    v = tl.load(x + row + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(added + row + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row + columns, rounded, mask=mask)
        v = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.reduce(v * v, 0, _sum) / d + eps)
    g = tl.load(gain + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row + columns, (v * scale * g).to(y.dtype.element_ty), mask=mask)


def _warps(padded: int) -> int:
    return max(1, min(16, padded // 512))


def rms_norm(x: Tensor, gain: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x, added: (N, d), contiguous; gain: (d,) -> x + added (x itself without added) and its norm times gain, both in x's dtype."""
    rows, d = x.shape
    y, padded = torch.empty_like(x), triton.next_power_of_2(d)
    total = x if added is None else torch.empty_like(x)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(rows,)](
            x, x if added is None else added, gain, total, y, d, eps,
            ADD=added is not None, D_PAD=padded, num_warps=_warps(padded),
        )  # fmt: skip
    return total, y


# --- SwiGLU ---------------------------------------------------------------------------------------


@triton.jit
def _swiglu_kernel(gate, up, product, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(product + at, (g / (1.0 + tl.exp(-g)) * u).to(product.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(gate, up, grad, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = g * sigmoid
    tl.store(grad + at, (silu * u).to(grad.dtype.element_ty), mask=mask)
    tl.store(up + at, (da * silu).to(up.dtype.element_ty), mask=mask)
    tl.store(gate + at, (da * u * sigmoid * (1.0 + g - silu)).to(gate.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Both contiguous."""
    product = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[(-(-gate.numel() // _BLOCK),)](gate, up, product, gate.numel(), BLOCK=_BLOCK, num_warps=8)
    return product


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """grad, the product's gradient, becomes the product, gate and up become their gradients: nothing is allocated. All contiguous."""
    with torch.cuda.device_of(gate):
        _swiglu_backward_kernel[(-(-gate.numel() // _BLOCK),)](gate, up, grad, gate.numel(), BLOCK=_BLOCK, num_warps=8)
