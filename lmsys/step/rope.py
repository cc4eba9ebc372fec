"""rotated_heads: from the product of Q, K and V to what attention takes, in one pass forward and one backward.

Rotary embedding (Su et al., arXiv 2104.09864, eq. 34, pairs interleaved, as lmsys.model has it) is bound by memory. Forward reads Q and
K and writes them rotated, each head's rows together; V stays where it is, a view. Backward reads the three gradients in whatever
strides attention gave them and writes the product's, rotated back: no gradient is put together by copies. On a CPU plain PyTorch does
the same.

Limits: positions 0 to T - 1; no gradient of the angles; no second derivative.

Legend: B batch, T tokens, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotated_heads(qkv: Tensor, cos: Tensor, sin: Tensor, path: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """qkv: (B, T, 3, H, D), contiguous; cos, sin: (T, D/2) fp32 -> q and k, rotated, and v, a view of qkv: (B, H, T, D) each.

    path: triton, torch, or auto, which is triton on a GPU.
    Raises:
        ValueError: another shape.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or cos.shape != (qkv.shape[1], qkv.shape[4] // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; they must be (B, T, 3, H, D) and twice "
            "(T, D/2)"
        )
    if path == "auto":
        path = "triton" if qkv.is_cuda else "torch"
    return RotatedHeads.apply(qkv.contiguous(), cos.contiguous(), sin.contiguous(), path)


# --- Operators ------------------------------------------------------------------------------------


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """q and k, (B, H, T, D), contiguous."""
    q, k = (qkv[:, :, index].transpose(1, 2) for index in (0, 1))
    if path == "triton":
        from lmsys.step.kernels import rotate_

        made = _empty_heads(qkv)
        rotate_((q, k, None), (*made, None), cos, sin, 1.0)
        return made
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _rotate_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, path: str) -> Tensor:
    """The gradient of qkv, (B, T, 3, H, D), contiguous."""
    batch, heads, length, head_dim = dq.shape
    dqkv = dq.new_empty(batch, length, 3, heads, head_dim)
    targets = tuple(dqkv[:, :, index].transpose(1, 2) for index in range(3))
    if path == "triton":
        from lmsys.step.kernels import rotate_

        sources = tuple(one if one.stride(-1) == 1 else one.contiguous() for one in (dq, dk, dv))
        rotate_(sources, targets, cos, sin, -1.0)
    else:
        for source, target in zip((_turned(dq, cos, -sin), _turned(dk, cos, -sin), dv), targets, strict=True):
            target.copy_(source)
    return dqkv


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, D), each pair of neighbours rotated; contiguous."""
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _empty_heads(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, head_dim = qkv.shape
    return tuple(qkv.new_empty(batch, heads, length, head_dim) for _ in range(2))


rotate_op = torch.library.custom_op("lmsys::rotate_heads", _rotate, mutates_args=())
rotate_back_op = torch.library.custom_op("lmsys::rotate_heads_back", _rotate_back, mutates_args=())


@rotate_op.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, path: str) -> tuple[Tensor, Tensor]:
    return _empty_heads(qkv)


@rotate_back_op.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, path: str) -> Tensor:
    batch, heads, length, head_dim = dq.shape
    return dq.new_empty(batch, length, 3, heads, head_dim)


# --- Autograd -------------------------------------------------------------------------------------


class RotatedHeads(torch.autograd.Function):
    """apply(qkv, cos, sin, path) -> q, k, v; saves the angles only."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (rotate_op if torch.compiler.is_compiling() else _rotate)(qkv, cos, sin, path)
        ctx.save_for_backward(cos, sin)
        ctx.path = path
        return q, k, qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        launch = rotate_back_op if torch.compiler.is_compiling() else _rotate_back
        return launch(dq, dk, dv, *ctx.saved_tensors, ctx.path), None, None, None
