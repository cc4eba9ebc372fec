"""gated_product: the second half of SwiGLU, (silu(gate) * up) W2^T, from gate and up as one product left them, side by side.

SwiGLU is Shazeer's (arXiv 2002.05202, eq. 6). With W1 and W3 as one matrix, gate and up are the halves of one product's rows, and that
product's backward pass takes their gradients as halves of rows again. A compiler that is given two gradients puts them together by a
copy that reads each of its inputs twice. Here one kernel reads gate, up and the gradient of h = silu(gate) * up, and writes both
gradients where they belong, and h again: h, as large as gate, is computed twice and never kept. W2's products are torch's, in sight of
the compiler. On a CPU plain PyTorch does the same.

At N tokens the kernels move 3 N F elements forward and 6 N F backward.

Limits: no second derivative.

Legend: N tokens, d = d_model, F = d_ff.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gated_product(merged: Tensor, weight: Tensor, path: str = "auto") -> Tensor:
    """silu(gate) * up times weight^T, (..., d). merged: (..., 2 F), gate's F columns and then up's; weight: (d, F).

    Under autocast products are in its dtype, as F.linear's are.

    Args:
        path: of what is between the products: triton, torch, or auto, which is triton on a GPU.
    Raises:
        ValueError: shapes or dtypes that do not fit, or another path.
    """
    kind = merged.device.type
    if torch.is_autocast_enabled(kind):
        merged = merged.to(torch.get_autocast_dtype(kind))
    elif merged.dtype != weight.dtype:
        raise ValueError(
            f"merged is {merged.dtype} and weight {weight.dtype}; outside of autocast they must be of one dtype"
        )
    if weight.ndim != 2 or merged.ndim < 1 or merged.shape[-1] != 2 * weight.shape[1]:
        raise ValueError(
            f"merged is {tuple(merged.shape)} and weight {tuple(weight.shape)}; they must be (..., 2 d_ff) and (d_model, d_ff)"
        )
    if path not in ("auto", "triton", "torch"):
        raise ValueError(f"path is '{path}'; it must be auto, triton or torch")
    if path == "auto":
        path = "triton" if merged.is_cuda else "torch"
    return GatedProduct.apply(merged, weight, path)


# --- Operators ------------------------------------------------------------------------------------


def _gate(merged: Tensor, path: str) -> Tensor:
    """silu(gate) * up, (..., F), contiguous."""
    if path == "triton":
        from lmsys.step.kernels import gate_

        product = _empty_product(merged)
        gate_(merged.contiguous(), product)
        return product
    gate, up = merged.chunk(2, -1)
    return F.silu(gate) * up


def _gate_back(merged: Tensor, dproduct: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """From the gradient of silu(gate) * up, (..., F): the gradient of merged, and silu(gate) * up itself, both contiguous."""
    dmerged = torch.empty_like(merged, memory_format=torch.contiguous_format)
    if path == "triton":
        from lmsys.step.kernels import gate_back_

        product = _empty_product(merged)
        gate_back_(merged.contiguous(), dproduct.contiguous(), dmerged, product)
        return dmerged, product
    gate, up = merged.chunk(2, -1)
    dgate, dup = dmerged.chunk(2, -1)
    silu = F.silu(gate)
    dgate.copy_(torch.ops.aten.silu_backward(dproduct * up, gate))
    dup.copy_(dproduct * silu)
    return dmerged, silu * up


def _empty_product(merged: Tensor) -> Tensor:
    return merged.new_empty(*merged.shape[:-1], merged.shape[-1] // 2)


gate_op = torch.library.custom_op("lmsys::gate", _gate, mutates_args=())
gate_back_op = torch.library.custom_op("lmsys::gate_back", _gate_back, mutates_args=())


@gate_op.register_fake
def _(merged: Tensor, path: str) -> Tensor:
    return _empty_product(merged)


@gate_back_op.register_fake
def _(merged: Tensor, dproduct: Tensor, path: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(merged, memory_format=torch.contiguous_format), _empty_product(merged)


# --- Autograd -------------------------------------------------------------------------------------


class GatedProduct(torch.autograd.Function):
    """apply(merged (..., 2 F), weight (d, F), path) -> (..., d), in the dtype of merged; saves merged and weight."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, weight: Tensor, path: str) -> Tensor:
        product = (gate_op if torch.compiler.is_compiling() else _gate)(merged, path)
        ctx.save_for_backward(merged, weight)
        ctx.path = path
        return F.linear(product, weight.to(merged.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        merged, weight = ctx.saved_tensors
        launch = gate_back_op if torch.compiler.is_compiling() else _gate_back
        rows = dy.reshape(-1, dy.shape[-1])
        dproduct = torch.mm(rows, weight.to(dy.dtype))
        dmerged, product = launch(merged, dproduct.view(*merged.shape[:-1], -1), ctx.path)
        dweight = torch.mm(rows.t(), product.view(-1, product.shape[-1])).to(weight.dtype)
        return dmerged, dweight, None
