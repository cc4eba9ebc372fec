"""rotated_heads: from the matmul of Q, K and V to what attention takes, in one pass forward and one backward.

Rotary embedding (lmsys.step.reference.rotate) is bound by memory. Forward reads Q and K and writes them rotated, each
head's rows together; V stays where it is, a view. Backward reads the three gradients in whatever strides attention gave
them and writes the matmul's, rotated back: no gradient is put together by copies. On a CPU plain PyTorch does the same.

Limits: positions 0 to T - 1; no gradient of the angles; no second derivative.

Legend: B batch, T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsys.step.kernels import operator, resolve_path, tl, triton
from lmsys.step.reference import rotate

_ROWS, _HEADS, _WARPS = 16, 4, 4  # tokens and, at most, heads of a program


@triton.jit
def _rotated(x, cos, sin, ROWS: tl.constexpr, D_PAD: tl.constexpr):
    """The (ROWS, D_PAD) tile x, each pair of neighbours rotated by the angle of cos and sin (ROWS, D_PAD / 2)."""
    a, b = tl.split(tl.reshape(x.to(tl.float32), (ROWS, D_PAD // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (ROWS, D_PAD))


@triton.jit
def _rotate_kernel(
    q, k, v, q_out, k_out, v_out, cos, sin, T,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    out_qb, out_qh, out_qt, out_kb, out_kh, out_kt, out_vb, out_vh, out_vt,
    sign, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, COPY_V: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of HEADS heads: q and k rotated, by the angles or, with sign -1, back; v copied where COPY_V.

    The angles are read once for all heads, and a token's heads, together in qkv, are accessed at about one time.
    """
    batch = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)  # from the last, which is in the cache
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns, half = tl.arange(0, D_PAD), tl.arange(0, D_PAD // 2)
    mask = (rows < T)[:, None] & (columns < D)[None, :]
    angles = rows[:, None] * (D // 2) + half[None, :]
    angle_mask = (rows < T)[:, None] & (half < D // 2)[None, :]
    c = tl.load(cos + angles, mask=angle_mask, other=0.0)
    s = tl.load(sin + angles, mask=angle_mask, other=0.0) * sign
    rows = rows.to(tl.int64)[:, None]
    columns = columns[None, :]
    for index in tl.static_range(HEADS):
        head = (tl.program_id(0) * HEADS + index).to(tl.int64)
        x = tl.load(q + batch * stride_qb + head * stride_qh + rows * stride_qt + columns, mask=mask)
        y = tl.load(k + batch * stride_kb + head * stride_kh + rows * stride_kt + columns, mask=mask)
        if COPY_V:
            z = tl.load(v + batch * stride_vb + head * stride_vh + rows * stride_vt + columns, mask=mask)
        x = _rotated(x, c, s, ROWS, D_PAD).to(q_out.dtype.element_ty)
        tl.store(q_out + batch * out_qb + head * out_qh + rows * out_qt + columns, x, mask=mask)
        y = _rotated(y, c, s, ROWS, D_PAD).to(k_out.dtype.element_ty)
        tl.store(k_out + batch * out_kb + head * out_kh + rows * out_kt + columns, y, mask=mask)
        if COPY_V:
            tl.store(v_out + batch * out_vb + head * out_vh + rows * out_vt + columns, z, mask=mask)


def rotate_(sources: tuple[Tensor, ...], targets: tuple[Tensor, ...], cos: Tensor, sin: Tensor, sign: float) -> None:
    """Write q and k rotated, and v, where there is one, as it is, to the targets, which may be the sources.

    All (B, H, T, D) with a stride of 1 in the last dimension, and any others; cos, sin: (T, D/2) fp32, contiguous.
    """
    batch, heads, length, head_dim = sources[0].shape
    copied = len(sources) == 3
    sources, targets = (some if copied else (*some, some[0]) for some in (sources, targets))
    each = math.gcd(heads, _HEADS)
    with torch.cuda.device_of(cos):
        _rotate_kernel[(heads // each, -(-length // _ROWS), batch)](
            *sources, *targets, cos, sin, length,
            *[stride for tensor in (*sources, *targets) for stride in tensor.stride()[:3]],
            sign, D=head_dim, D_PAD=max(16, triton.next_power_of_2(head_dim)), ROWS=_ROWS, HEADS=each, COPY_V=copied,
            num_warps=_WARPS,
        )  # fmt: skip


def rotate_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate Q and K of qkv (B, T, 3, H, D) where they lie."""
    heads = tuple(qkv[:, :, index].transpose(1, 2) for index in (0, 1))
    if qkv.is_cuda:
        rotate_(heads, heads, cos, sin, 1.0)
    else:
        for one in heads:
            one.copy_(rotate(one, cos, sin))


def _empty_heads(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, head_dim = qkv.shape
    return tuple(qkv.new_empty(batch, heads, length, head_dim) for _ in range(2))


def _empty_qkv(dq: Tensor) -> Tensor:
    batch, heads, length, head_dim = dq.shape
    return dq.new_empty(batch, length, 3, heads, head_dim)


@operator("rotate_heads", fake=lambda qkv, cos, sin, path: _empty_heads(qkv))
def rotate_forward(qkv: Tensor, cos: Tensor, sin: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """q and k, (B, H, T, D), contiguous. path: triton or torch."""
    sources = tuple(qkv[:, :, index].transpose(1, 2) for index in (0, 1))
    if path == "torch":
        return tuple(rotate(one.contiguous(), cos, sin) for one in sources)
    heads = _empty_heads(qkv)
    rotate_(sources, heads, cos, sin, 1.0)
    return heads


@operator("rotate_heads_back", fake=lambda dq, dk, dv, cos, sin, path: _empty_qkv(dq))
def rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, path: str) -> Tensor:
    """The gradient of qkv, (B, T, 3, H, D), contiguous. path: triton or torch."""
    dqkv = _empty_qkv(dq)
    targets = tuple(dqkv[:, :, index].transpose(1, 2) for index in range(3))
    if path == "triton":
        rotate_(
            tuple(one if one.stride(-1) == 1 else one.contiguous() for one in (dq, dk, dv)), targets, cos, sin, -1.0
        )
    else:
        rotated = (rotate(one.contiguous(), cos, -sin) for one in (dq, dk))
        for source, target in zip((*rotated, dv), targets, strict=True):
            target.copy_(source)
    return dqkv


class RotatedHeads(torch.autograd.Function):
    """apply(qkv, cos, sin, path) -> q, k, v; saves the angles only."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k = rotate_forward(qkv, cos, sin, path)
        ctx.save_for_backward(cos, sin)
        ctx.path = path
        return q, k, qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return rotate_backward(dq, dk, dv, *ctx.saved_tensors, ctx.path), None, None, None


def rotated_heads(qkv: Tensor, cos: Tensor, sin: Tensor, path: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """qkv: (B, T, 3, H, D); cos, sin: (T, D/2) fp32 -> q and k, rotated, and v, a view of qkv: (B, H, T, D) each.

    path: triton, torch, or auto, which is triton on a GPU.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or cos.shape != (qkv.shape[1], qkv.shape[4] // 2) or sin.shape != cos.shape:
        shapes = f"qkv is {tuple(qkv.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"{shapes}; they must be (B, T, 3, H, D) and twice (T, D/2)")
    return RotatedHeads.apply(qkv.contiguous(), cos.contiguous(), sin.contiguous(), resolve_path(path, qkv))
