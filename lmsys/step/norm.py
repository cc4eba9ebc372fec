"""rms_norm: RMSNorm whose backward pass is one kernel, with the gradient of what passes the norm by.

The norm is that of lmsys.model (Zhang and Sennrich, arXiv 1910.07467, eq. 4). Forward is plain PyTorch, which a compiler fuses with
the addition before and the cast after; it keeps its input and one number a row. The gradients of input and gain go along a row and
along the columns: as two reductions each reads everything. Here programs walk over the rows, write the input's gradient and add the
gain's up in registers; their sums are added up in the end, in an order that a GPU does not change.

In a pre-norm block the norm's input also passes it by, x + f(norm(x)), and its two gradients add up. norm_beside gives x back with its
norm, so that the same kernel adds them: as an operator, which no compiler looks into, it would otherwise cost a pass of its own. At N
tokens backward moves 4 N d elements (3 N d without the addition).

Limits: on a GPU d of at most 8,192; no second derivative.

Legend: N tokens, d = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MOST = 8192  # elements of a row that a program of the kernel holds


def rms_norm(x: Tensor, gain: Tensor, eps: float, path: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension, computed in fp32, in the dtype of x. x: (..., d), gain: (d,).

    Under autocast the norm of an fp32 x is in its dtype: the product that takes it would cast it, and its gradient back.

    Args:
        path: of the backward pass: triton, torch, or auto, which is triton on a GPU.
    Raises:
        ValueError: shapes that do not fit, rows that are too long, or another path.
    """
    return Norm.apply(x, gain, eps, _dtype(x), _checked(x, gain, path))


def norm_beside(x: Tensor, gain: Tensor, eps: float, path: str = "auto") -> tuple[Tensor, Tensor]:
    """x, and rms_norm of it. What takes x beside the norm is to take this one: its gradient is added in the norm's kernel."""
    return NormBeside.apply(x, gain, eps, _dtype(x), _checked(x, gain, path))


def _dtype(x: Tensor) -> torch.dtype:
    """Of the norm of x."""
    kind = x.device.type
    is_cast = x.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else x.dtype


def _checked(x: Tensor, gain: Tensor, path: str) -> str:
    """The path, triton or torch."""
    if x.ndim < 1 or gain.shape != x.shape[-1:]:
        raise ValueError(f"x is {tuple(x.shape)} and gain {tuple(gain.shape)}; they must be (..., d) and (d,)")
    if path not in ("auto", "triton", "torch"):
        raise ValueError(f"path is '{path}'; it must be auto, triton or torch")
    if path == "auto":
        path = "triton" if x.is_cuda else "torch"
    if path == "triton" and len(gain) > _MOST:
        raise ValueError(
            f"rows of {len(gain)} elements; the kernel takes {_MOST} at most: use lmsys.model's norm, or path torch"
        )
    return path


# --- Operator -------------------------------------------------------------------------------------


def _norm_back(
    dy: Tensor, x: Tensor, rstd: Tensor, gain: Tensor, beside: Tensor | None, path: str
) -> tuple[Tensor, Tensor]:
    """The gradient of x, plus beside, contiguous, and that of gain, in fp32. dy, x, beside: (..., d); rstd: (..., 1); gain: (d,)."""
    if path == "triton":
        from lmsys.step.kernels import norm_back_

        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat = [None if one is None else one.reshape(-1, len(gain)).contiguous() for one in (dy, x, beside)]
        dgain = norm_back_(flat[0], flat[1], rstd.contiguous(), gain.contiguous(), flat[2], dx.view(-1, len(gain)))
        return dx, dgain
    v, grad = x.float() * rstd, dy.float()
    dgain = (grad * v).reshape(-1, len(gain)).sum(0)
    grad = grad * gain
    dx = (grad - v * (grad * v).mean(-1, keepdim=True)) * rstd
    dx = dx if beside is None else dx + beside
    return dx.to(x.dtype, memory_format=torch.contiguous_format), dgain


norm_back_op = torch.library.custom_op("lmsys::norm_back", _norm_back, mutates_args=())


@norm_back_op.register_fake
def _(dy: Tensor, x: Tensor, rstd: Tensor, gain: Tensor, beside: Tensor | None, path: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), gain.new_empty(gain.shape, dtype=torch.float32)


# --- Autograd -------------------------------------------------------------------------------------


def _normed(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, path: str) -> Tensor:
    """The norm of x in dtype; saves x, gain and 1 / rms."""
    v = x.float()
    rstd = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    ctx.save_for_backward(x, rstd, gain)
    ctx.path = path
    y = v * rstd * gain
    return y if y.dtype == dtype else y.to(dtype)  # torch 2.11 compiles no gradient of a cast that is none


def _gradients(ctx: Any, dy: Tensor, beside: Tensor | None) -> tuple[Tensor | None, ...]:
    x, rstd, gain = ctx.saved_tensors
    launch = norm_back_op if torch.compiler.is_compiling() else _norm_back
    dx, dgain = launch(dy, x, rstd, gain, beside, ctx.path)
    return dx, dgain.to(gain.dtype), None, None, None


class Norm(torch.autograd.Function):
    """apply(x (..., d), gain (d,), eps, dtype, path) -> the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, path: str) -> Tensor:
        return _normed(ctx, x, gain, eps, dtype, path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, None)


class NormBeside(torch.autograd.Function):
    """apply(x (..., d), gain (d,), eps, dtype, path) -> x and the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype, path: str) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _normed(ctx, x, gain, eps, dtype, path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, beside: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, beside)
