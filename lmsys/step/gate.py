"""gated_product: the second half of SwiGLU, (silu(gate) * up) W2^T, from gate and up side by side in one tensor.

SwiGLU is Shazeer's (arXiv 2002.05202, eq. 6). With W1 and W3 as one matrix, gate and up are the halves of one matmul's
rows, and its backward pass takes their gradients as halves of rows again, which a compiler puts together by a copy.
Here one kernel reads gate, up and the gradient of h = silu(gate) * up, and writes both gradients where they belong, and
h again: h is computed twice and never kept. W2's matmuls are torch's, in sight of the compiler. lmsys.step.blocks has
gate and up apart, and their gradients in their place.

At N tokens the kernels move 3 N F elements forward and 6 N F backward. Limits: no second derivative.

Legend: N tokens, d = d_model, F = d_ff.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lmsys.step.kernels import IS_HIP, LOG2_E, operator, resolve_path, tl, triton

# A program has a tile of ROWS x COLUMNS elements, and programs follow each other as memory does, but from its end: what
# the kernel before wrote last is still in the cache, and what the one after reads first will be. COLUMNS divides F
# wherever F is a multiple of 64, so that only a number of rows that does not fit leaves masks. F and STRIDE are
# constants: Triton then knows the alignment of each row.

_TILE = 2048  # elements: a vector of 16-bit ones for each of 256 threads
_WARPS = 8
_HAS_RCP = tl.constexpr(not triton.knobs.runtime.interpret and not IS_HIP)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)): by the GPU's own reciprocal, off by one in fp32's last digit, not a full division."""
    denominator = 1.0 + tl.math.exp2(x * -LOG2_E)
    if _HAS_RCP:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / denominator


@triton.jit
def _tile(N, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows (ROWS, 1) and columns (1, COLUMNS) of a program's tile, and which of its elements there are."""
    across: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < N) & (columns < F)


@triton.jit
def _swiglu_kernel(
    gate, up, product, N,
    F: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """product (N, F) = silu(gate) * up, both (N, F) with rows STRIDE elements apart."""
    rows, columns, inside = _tile(N, F, ROWS, COLUMNS)
    mask = inside if MASKED else None
    at = rows * STRIDE + columns
    g = tl.load(gate + at, mask=mask).to(tl.float32)
    u = tl.load(up + at, mask=mask).to(tl.float32)
    tl.store(product + rows * F + columns, (g * _sigmoid(g) * u).to(product.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_back_kernel(
    gate, up, dproduct, dgate, dup, product, N,
    F: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate and dup, in rows as gate and up, from dproduct (N, F), and product; what is written may be what is read."""
    rows, columns, inside = _tile(N, F, ROWS, COLUMNS)
    mask = inside if MASKED else None
    at, at_product = rows * STRIDE + columns, rows * F + columns
    g = tl.load(gate + at, mask=mask).to(tl.float32)
    u = tl.load(up + at, mask=mask).to(tl.float32)
    dh = tl.load(dproduct + at_product, mask=mask).to(tl.float32)
    slope = _sigmoid(g)
    silu = g * slope
    # In this order 40 registers a thread; the product first, 47.
    tl.store(dgate + at, (dh * u * slope * (1.0 + g - silu)).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + at, (dh * silu).to(dup.dtype.element_ty), mask=mask)
    tl.store(product + at_product, (silu * u).to(product.dtype.element_ty), mask=mask)


def _launch(kernel: Any, gate: Tensor, up: Tensor, *others: Tensor) -> None:
    """others: in the kernel's order; those of gate's and up's gradients have their strides, the rest are contiguous."""
    width, count, apart = gate.shape[-1], gate.numel(), gate.is_contiguous()
    if apart and count % _TILE == 0:
        width = _TILE  # rows as long as suits the kernel
    rows = count // width
    columns = min(_TILE, max(64, width & -width))  # the power of two that divides the width
    down = _TILE // columns
    masked = width % columns != 0 or rows % down != 0
    with torch.cuda.device_of(gate):
        kernel[(-(-rows // down) * -(-width // columns),)](
            gate, up, *others, rows,
            F=width, STRIDE=width if apart else 2 * width, MASKED=masked, ROWS=down, COLUMNS=columns, num_warps=_WARPS,
        )  # fmt: skip


def swiglu(gate: Tensor, up: Tensor, path: str = "auto") -> Tensor:
    """silu(gate) * up, (..., F), contiguous. gate, up: (..., F), both contiguous, or halves of one tensor's rows."""
    if resolve_path(path, gate) == "torch":
        return F.silu(gate).mul_(up)
    product = gate.new_empty(gate.shape)
    _launch(_swiglu_kernel, gate, up, product)
    return product


def swiglu_backward(
    gate: Tensor, up: Tensor, dproduct: Tensor, dgate: Tensor, dup: Tensor, product: Tensor, path: str = "auto"
) -> None:
    """Write dgate, dup and product, silu(gate) * up; dgate and dup lie as gate and up do.

    They may be gate and up themselves, and product may be dproduct: then nothing is allocated on a GPU.
    """
    if resolve_path(path, gate) == "triton":
        _launch(_swiglu_back_kernel, gate, up, dproduct, dgate, dup, product)
        return
    silu = F.silu(gate)
    gate_gradient = torch.ops.aten.silu_backward(dproduct * up, gate)
    h = silu * up
    dup.copy_(silu.mul_(dproduct))
    dgate.copy_(gate_gradient)
    product.copy_(h)


def _empty_product(merged: Tensor) -> Tensor:
    return merged.new_empty(*merged.shape[:-1], merged.shape[-1] // 2)


def _empty_gradients(merged: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(merged, memory_format=torch.contiguous_format), _empty_product(merged)


@operator("gate", fake=lambda merged, path: _empty_product(merged))
def gate_forward(merged: Tensor, path: str) -> Tensor:
    """silu(gate) * up, (..., F), contiguous."""
    return swiglu(*merged.contiguous().chunk(2, -1), path)


@operator("gate_back", fake=_empty_gradients)
def gate_backward(merged: Tensor, dproduct: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """From the gradient of silu(gate) * up, (..., F), that of merged, and silu(gate) * up itself, both contiguous."""
    dmerged, product = _empty_gradients(merged)
    gate_and_up, gradients = merged.contiguous().chunk(2, -1), dmerged.chunk(2, -1)
    swiglu_backward(*gate_and_up, dproduct.contiguous(), *gradients, product, path)
    return dmerged, product


class GatedProduct(torch.autograd.Function):
    """apply(merged (..., 2 F), weight (d, F), path) -> (..., d), in the dtype of merged; saves merged and weight."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, weight: Tensor, path: str) -> Tensor:
        product = gate_forward(merged, path)
        ctx.save_for_backward(merged, weight)
        ctx.path = path
        return F.linear(product, weight.to(merged.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        merged, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dproduct = torch.mm(rows, weight.to(dy.dtype))
        dmerged, product = gate_backward(merged, dproduct.view(*merged.shape[:-1], -1), ctx.path)
        dweight = torch.mm(rows.t(), product.view(-1, product.shape[-1])).to(weight.dtype)
        return dmerged, dweight, None


def gated_product(merged: Tensor, weight: Tensor, path: str = "auto") -> Tensor:
    """silu(gate) * up times weight^T, (..., d). merged: (..., 2 F), gate's F columns and then up's; weight: (d, F).

    Under autocast matmuls are in its dtype, as F.linear's are. path: triton, torch, or auto, which is triton on a GPU.
    """
    kind = merged.device.type
    if torch.is_autocast_enabled(kind):
        merged = merged.to(torch.get_autocast_dtype(kind))
    elif merged.dtype != weight.dtype:
        raise ValueError(f"merged is {merged.dtype} and weight {weight.dtype}; they must be of one dtype")
    if weight.ndim != 2 or merged.shape[-1] != 2 * weight.shape[1]:
        shapes = f"merged is {tuple(merged.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}; they must be (..., 2 d_ff) and (d_model, d_ff)")
    return GatedProduct.apply(merged, weight, resolve_path(path, merged))
