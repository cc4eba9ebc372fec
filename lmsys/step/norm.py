"""RMSNorm with the residual addition in one pass, and its backward pass in one: the norms of lmsys.step.blocks.

Forward adds and normalizes; backward writes the input's gradient, plus that of the residual that passes the norm by,
over the incoming one: programs walk over the rows, write the input's gradient and add the gain's up in registers; their
sums are added up in the end, in an order that a GPU does not change. 1 / rms is recomputed: nothing but the input is
kept. At N tokens forward moves 4 N d elements, backward 4 N d.

Limits: on a GPU d of at most 8,192; no second derivative.

Legend: N tokens, d = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsys.step.kernels import IS_HIP, SUM, resolve_path, tl, triton
from lmsys.step.reference import rms_norm

_MOST = 8192  # elements of a row that a program of the kernel holds

_FORWARD_TILE, _FORWARD_WARPS = 2048, 4  # elements of a program, in whole rows, and its warps, more for a longer row


@triton.jit
def _rms_norm_kernel(
    x, added, gain, total, y, N, d, eps, ADD: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """ROWS rows, from the last (in the cache), of y = norm(x) gain; where ADD, of total = x + added, y of total."""
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
    scale = 1.0 / tl.sqrt(tl.reduce(v * v, 1, SUM)[:, None] / d + eps)
    tl.store(y + at, (v * scale * g).to(y.dtype.element_ty), mask=mask)


def _launch_forward(x: Tensor, gain: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor]:
    count, d = x.shape
    if d > _MOST:
        raise ValueError(f"rows of {d} elements; the kernel takes {_MOST} at most: use path torch")
    y, padded = torch.empty_like(x), triton.next_power_of_2(d)
    total = x if added is None else torch.empty_like(x)
    rows, warps = max(1, _FORWARD_TILE // padded), _FORWARD_WARPS * min(4, max(1, padded // _FORWARD_TILE))
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(-(-count // rows),)](
            x, x if added is None else added, gain, total, y, count, d, eps,
            ADD=added is not None, D_PAD=padded, ROWS=rows, num_warps=warps,
        )  # fmt: skip
    return total, y


# As many programs a multiprocessor as run at once, each of which takes tiles of rows from all over the tensor and adds
# the gain's gradient up in registers: a row is read once for both gradients. The next tile is under way to shared
# memory while one is computed.

_TILE = 1024  # elements, or a row: a 16-bit vector for each of 128 threads, and few that wait for each other's sums
_STAGES = 2
OPTIONS = {} if IS_HIP else {"maxnreg": 64}  # 1,024 threads at once; to d 4,096 nothing spills: above, one has all


@triton.jit
def _norm_back_kernel(
    dy, x, gain, residual, dx, partials, N, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of y = norm(x) gain: dx (N, D), plus residual where RESIDUAL; partials[program] (D,), gain's.

    dx may be dy: a tile is read before it is written, and by one program.
    """
    columns = tl.arange(0, D_PAD)[None, :]
    exists = columns < D
    g = tl.load(gain + columns, mask=exists, other=0.0).to(tl.float32)
    dgain = tl.full([ROWS, D_PAD], 0.0, tl.float32)
    tiles = (N + ROWS - 1) // ROWS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = ((tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # from the last, as forward
        at, mask = rows * D + columns, (rows < N) & exists
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:  # under way with the others, not after the sums
            aside = tl.load(residual + at, mask=mask, other=0.0)
        scale = 1.0 / tl.sqrt(tl.reduce(v * v, 1, SUM)[:, None] / D + eps)
        v = v * scale
        dgain += grad * v
        grad = grad * g
        out = (grad - v * (tl.reduce(grad * v, 1, SUM)[:, None] / D)) * scale
        if RESIDUAL:
            out += aside.to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
    total = tl.reduce(dgain, 0, SUM)
    local = tl.arange(0, D_PAD)
    tl.store(partials + tl.program_id(0) * D + local, total, mask=local < D)


_SUM_COLUMNS = 16  # of a program: two sectors of 32 bytes
_SUM_ROWS = 1024  # that are under way at once
_SUM_WARPS = 16


@triton.jit
def _column_sums_kernel(matrix, sums, N, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums (D,) of the columns of matrix (N, D), fp32. torch's takes several times as long, in few programs."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for start in range(0, N, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(matrix + rows * D + columns[None, :], mask=(rows < N) & (columns < D)[None, :], other=0.0)
    tl.store(sums + columns, tl.reduce(total, 0, SUM), mask=columns < D)


def _launch_backward(dy: Tensor, x: Tensor, gain: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """dy becomes x's gradient, plus residual; returns gain's, (d,) in fp32. The sums' order depends on the GPU."""
    count, d = x.shape
    padded = max(16, triton.next_power_of_2(d))
    rows, warps = max(1, _TILE // padded), min(16, max(_TILE, padded) // 256)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    at_once, options = (32 // warps, OPTIONS) if padded <= 4096 else (1, {})
    programs = max(1, min(-(-count // rows), processors * at_once))
    partials = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    sums = partials.new_empty(d)
    with torch.cuda.device_of(x):
        _norm_back_kernel[(programs,)](
            dy, x, gain, x if residual is None else residual, dy, partials, count, eps,
            D=d, D_PAD=padded, ROWS=rows, RESIDUAL=residual is not None, STAGES=_STAGES, num_warps=warps, **options,
        )  # fmt: skip
        _column_sums_kernel[(-(-d // _SUM_COLUMNS),)](
            partials, sums, programs, D=d, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=_SUM_WARPS
        )
    return sums


def norm_forward(
    x: Tensor, gain: Tensor, eps: float, added: Tensor | None = None, path: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x, added: (N, d), contiguous; gain: (d,) -> x + added (without, x itself) and its norm times gain, in x's dtype.

    path: triton, torch, or auto, which is triton on a GPU.
    """
    if resolve_path(path, x) == "triton":
        return _launch_forward(x, gain, eps, added)
    total = x if added is None else x + added
    return total, rms_norm(total, gain, eps)


def norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None, path: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The gradients of x, plus residual, in place of dy, and of gain. dy, x, residual: (N, d), contiguous."""
    if resolve_path(path, x) == "triton":
        return dy, _launch_backward(dy, x, gain, eps, residual).to(gain.dtype)
    v, grad = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (x, dy))
    scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    v = v * scale
    dgain = (grad * v).sum(0)
    grad = grad * gain
    dx = (grad - v * (grad * v).mean(-1, keepdim=True)) * scale
    return dy.copy_(dx if residual is None else dx + residual), dgain.to(gain.dtype)


class Norm(torch.autograd.Function):
    """apply(x (..., d), gain (d,), eps) -> the norm, in x's dtype; saves its input and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return norm_forward(rows(x), gain, eps)[1].view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        own = rows(dy).clone(memory_format=torch.contiguous_format)
        dx, dgain = norm_backward(own, rows(x), gain, ctx.eps)
        return dx.view(x.shape), dgain, None


def rows(x: Tensor) -> Tensor:
    """(..., d) -> (N, d), contiguous, as the kernels read it: a sum's gradient is one number in many places."""
    return x.reshape(-1, x.shape[-1]).contiguous()
