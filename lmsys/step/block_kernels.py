"""Triton kernels of a Transformer block beside its products: RMSNorm with the residual addition, SwiGLU and its gradient in place.

All are bound by memory: each element is read and written once. Sums are in fp32. What is overwritten is said at each function;
lmsys.step.blocks, the caller, imports this module where tensors lie on a GPU. On the CPU interpreter it is there to check.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmsys.attention.flash_triton import tl, triton  # which sets up the interpreter where there is no GPU
from lmsys.step.kernels import sigmoid

_sum = tl.standard._sum_combine  # interpreted whenever the kernel is, as tl.sum may not be


# --- RMSNorm --------------------------------------------------------------------------------------


_NORM_TILE, _NORM_WARPS = 2048, 4  # elements of a program, in whole rows, and its warps; of a longer row more of them


@triton.jit
def _rms_norm_kernel(
    x, added, gain, total, y, N, d, eps, ADD: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """ROWS rows of y = norm(x) gain; where ADD, of total = x + added, rounded to its dtype, and y = norm(total) gain.

    From the last row to the first: what the kernel before wrote last is still in the cache.
    """
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, D_PAD)[None, :]
    mask = (rows < N) & (columns < d)
    at = rows.to(tl.int64) * d + columns
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gain + columns, mask=columns < d, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        v = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.reduce(v * v, 1, _sum)[:, None] / d + eps)
    tl.store(y + at, (v * scale * g).to(y.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, gain: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x, added: (N, d), contiguous; gain: (d,) -> x + added (x itself without added) and its norm times gain, both in x's dtype."""
    count, d = x.shape
    y, padded = torch.empty_like(x), triton.next_power_of_2(d)
    total = x if added is None else torch.empty_like(x)
    rows, warps = max(1, _NORM_TILE // padded), _NORM_WARPS * min(4, max(1, padded // _NORM_TILE))
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(-(-count // rows),)](
            x, x if added is None else added, gain, total, y, count, d, eps,
            ADD=added is not None, D_PAD=padded, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    return total, y


# --- SwiGLU ---------------------------------------------------------------------------------------
#
# From the last element to the first, as the norm. MASKED: the elements are no multiple of a program's.

_SWIGLU_BLOCK, _SWIGLU_WARPS = 2048, 8  # elements of a program: a vector of 16-bit ones for each of 256 threads


@triton.jit
def _swiglu_kernel(gate, up, product, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count if MASKED else None
    g = tl.load(gate + at, mask=mask).to(tl.float32)
    u = tl.load(up + at, mask=mask).to(tl.float32)
    tl.store(product + at, (g * sigmoid(g) * u).to(product.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(gate, up, grad, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count if MASKED else None
    g = tl.load(gate + at, mask=mask).to(tl.float32)
    u = tl.load(up + at, mask=mask).to(tl.float32)
    da = tl.load(grad + at, mask=mask).to(tl.float32)
    slope = sigmoid(g)
    silu = g * slope
    tl.store(grad + at, (silu * u).to(grad.dtype.element_ty), mask=mask)
    tl.store(up + at, (da * silu).to(up.dtype.element_ty), mask=mask)
    tl.store(gate + at, (da * u * slope * (1.0 + g - silu)).to(gate.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Both contiguous."""
    product = torch.empty_like(gate)
    grid, constants = _swiglu_grid(gate.numel())
    with torch.cuda.device_of(gate):
        _swiglu_kernel[grid](gate, up, product, gate.numel(), **constants)
    return product


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """grad, the product's gradient, becomes the product, gate and up become their gradients: nothing is allocated. All contiguous."""
    grid, constants = _swiglu_grid(gate.numel())
    with torch.cuda.device_of(gate):
        _swiglu_backward_kernel[grid](gate, up, grad, gate.numel(), **constants)


def _swiglu_grid(count: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the constants of both kernels."""
    constants = {"MASKED": count % _SWIGLU_BLOCK != 0, "BLOCK": _SWIGLU_BLOCK, "num_warps": _SWIGLU_WARPS}
    return (-(-count // _SWIGLU_BLOCK),), constants
