"""flash_attention_triton: its autograd function, its custom operators, and its portable kernels.

lmsys.attention.paths chooses between the portable path (here) and the Hopper path (flash_hopper) at each pass. The
portable path is FlashAttention-2 in Triton, for any GPU that Triton knows and for its CPU interpreter.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2. Differences:
- Base-2 exponentials, with scale * log2(e) folded into one multiplication.
- Tiles that every query sees in full run in a loop without masks; tiles on the causal diagonal or past the end in
  another. Causal programs start with the longest rows.
- The backward pass is one kernel with a program for each key tile (dK, dV) and one with a program for each query tile
  (dQ): seven products a tile instead of five, but no atomics: gradients are the same bits in every run.
- Grouped-query heads: a key tile's program loops over the query heads that read it and writes dK and dV once.
- Any strides, any lengths >= 1, any head dim up to 256 (padded to a power of two in registers, never in memory).
A call like an earlier one launches the compiled kernel itself (_Launcher), past Triton's autotuner and binding.

Limits: no dropout, no bias. The log-sum-exp is kept in float32, so with logits in the hundreds float32 gradients lose
digits (as with torch's flash kernels, and less). The CPU interpreter (no GPU, or TRITON_INTERPRET=1) is there to check,
not to be fast, and takes float32 and float16 only, since its bfloat16 product is wrong.

Legend: B batch, H heads, H_kv key heads, T queries, S keys, D head dim, D_PAD the power of two that holds D.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsys.attention import autograd
from lmsys.attention.paths import choose

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's decorators below run
    warnings.warn(
        "no CUDA GPU: the Triton kernels run in Triton's CPU interpreter, which is for checking and not for speed",
        stacklevel=2,
    )

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))

# tl.max, tl.sum and tl.cdiv are Triton functions themselves, and interpreted only where TRITON_INTERPRET was set before
# the first import of Triton, which torch.compile may have made. Reductions with these functions work in either order.
_MAX, _SUM = tl.standard._elementwise_max, tl.standard._sum_combine


# --- Kernels --------------------------------------------------------------------------------------


@triton.jit
def _load(base, rows, stride_row, stride_col, n_rows, D: tl.constexpr, D_PAD: tl.constexpr, BOUNDED: tl.constexpr):
    """The (len(rows), D_PAD) tile at base, zero past column D and, where BOUNDED, from row n_rows on."""
    columns = tl.arange(0, D_PAD)
    pointers = base + rows[:, None] * stride_row + columns[None, :] * stride_col
    if BOUNDED:
        tile = tl.load(pointers, mask=(rows[:, None] < n_rows) & (columns[None, :] < D), other=0.0)
    elif D == D_PAD:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    return tile


@triton.jit
def _store(base, tile, rows, stride_row, stride_col, n_rows, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write the rows below n_rows and columns below D of a (len(rows), D_PAD) tile to base."""
    columns = tl.arange(0, D_PAD)
    pointers = base + rows[:, None] * stride_row + columns[None, :] * stride_col
    mask = (rows[:, None] < n_rows) & (columns[None, :] < D)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _head(base, head, heads, stride_b, stride_h):
    """Where head number `head` of all batches' heads starts. 64-bit: B * H * T * D may pass 2^31."""
    return base + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h


@triton.jit
def _attend(
    acc, total, maximum, q, k_base, v_base, start, end, q_rows, S, scale_log2,
    stride_ks, stride_kd, stride_vs, stride_vd,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles in [start, end): algorithm 1, lines 7 to 10. k_base, v_base: at start."""
    local = tl.arange(0, BLOCK_K)
    for j in tl.range(start, end, BLOCK_K):
        k = _load(k_base, local, stride_ks, stride_kd, S - j, D, D_PAD, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            visible = (j + local)[None, :] < S
            if CAUSAL:
                visible = visible & (q_rows[:, None] >= (j + local)[None, :])
            scores = tl.where(visible, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.reduce(scores, 1, _MAX) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - new_maximum[:, None])
        correction = tl.math.exp2(maximum - new_maximum)
        total = total * correction + tl.reduce(p, 1, _SUM)
        acc = acc * correction[:, None]
        v = _load(v_base, local, stride_vs, stride_vd, S - j, D, D_PAD, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        maximum = new_maximum
        k_base += BLOCK_K * stride_ks
        v_base += BLOCK_K * stride_vs
    return acc, total, maximum


@triton.jit(do_not_specialize=["length_class"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, scale, H, H_kv, T, S, length_class,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    D: tl.constexpr, D_PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN_S: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: o and lse (B, H, T), the natural log-sum-exp. Algorithm 1."""
    tiles = (T + BLOCK_Q - 1) // BLOCK_Q
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # longest rows first
    kv_head = head // (H // H_kv)
    first = tile * BLOCK_Q
    local = tl.arange(0, BLOCK_Q)
    q_base = _head(q_ptr, head, H, stride_qb, stride_qh) + first.to(tl.int64) * stride_qt
    k_base = _head(k_ptr, kv_head, H_kv, stride_kb, stride_kh)
    v_base = _head(v_ptr, kv_head, H_kv, stride_vb, stride_vh)

    full = S // BLOCK_K * BLOCK_K  # keys below are in tiles without a mask
    end = S
    if CAUSAL:
        full = tl.minimum(full, (first + 1) // BLOCK_K * BLOCK_K)
        end = tl.minimum(end, first + BLOCK_Q)
    q = _load(q_base, local, stride_qt, stride_qd, T - first, D, D_PAD, True)
    acc = tl.full([BLOCK_Q, D_PAD], 0.0, tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    maximum = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    scale_log2 = scale * _LOG2_E
    acc, total, maximum = _attend(
        acc, total, maximum, q, k_base, v_base, 0, full, first + local, S, scale_log2,
        stride_ks, stride_kd, stride_vs, stride_vd, D, D_PAD, BLOCK_K, CAUSAL, False, PRECISION,
    )  # fmt: skip
    k_base += full.to(tl.int64) * stride_ks
    v_base += full.to(tl.int64) * stride_vs
    if CAUSAL or not EVEN_S:
        acc, total, maximum = _attend(
            acc, total, maximum, q, k_base, v_base, full, end, first + local, S, scale_log2,
            stride_ks, stride_kd, stride_vs, stride_vd, D, D_PAD, BLOCK_K, CAUSAL, True, PRECISION,
        )  # fmt: skip
    # Every query sees key 0, so total >= 1 for finite inputs.
    lse = (maximum + tl.math.log2(total)) * _LN_2
    tl.store(lse_ptr + head.to(tl.int64) * T + first + local, lse, mask=first + local < T)
    o_base = _head(o_ptr, head, H, stride_ob, stride_oh) + first.to(tl.int64) * stride_ot
    _store(o_base, acc / total[:, None], local, stride_ot, stride_od, T - first, D, D_PAD)


@triton.jit
def _accumulate_dq(
    dq, q, do, lse_log2, delta, k_base, v_base, start, end, q_rows, S, scale_log2,
    stride_ks, stride_kd, stride_vs, stride_vd,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the key tiles in [start, end)."""
    local = tl.arange(0, BLOCK_K)
    for j in tl.range(start, end, BLOCK_K):
        k = _load(k_base, local, stride_ks, stride_kd, S - j, D, D_PAD, MASKED)
        v = _load(v_base, local, stride_vs, stride_vd, S - j, D, D_PAD, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale_log2 - lse_log2[:, None])
        if MASKED:
            visible = (j + local)[None, :] < S
            if CAUSAL:
                visible = visible & (q_rows[:, None] >= (j + local)[None, :])
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_base += BLOCK_K * stride_ks
        v_base += BLOCK_K * stride_vs
    return dq


@triton.jit(do_not_specialize=["length_class"])
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, scale, H, H_kv, T, S, length_class,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_dqb, stride_dqh, stride_dqt, stride_dqd,
    D: tl.constexpr, D_PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN_S: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: dq, and delta (B, H, T) = rowsum(o * do). Algorithm 2, lines 4 and 15."""
    tiles = (T + BLOCK_Q - 1) // BLOCK_Q
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # longest rows first
    kv_head = head // (H // H_kv)
    first = tile * BLOCK_Q
    local = tl.arange(0, BLOCK_Q)
    q_base = _head(q_ptr, head, H, stride_qb, stride_qh) + first.to(tl.int64) * stride_qt
    do_base = _head(do_ptr, head, H, stride_gb, stride_gh) + first.to(tl.int64) * stride_gt
    k_base = _head(k_ptr, kv_head, H_kv, stride_kb, stride_kh)
    v_base = _head(v_ptr, kv_head, H_kv, stride_vb, stride_vh)
    row = head.to(tl.int64) * T + first

    full = S // BLOCK_K * BLOCK_K
    end = S
    if CAUSAL:
        full = tl.minimum(full, (first + 1) // BLOCK_K * BLOCK_K)
        end = tl.minimum(end, first + BLOCK_Q)
    q = _load(q_base, local, stride_qt, stride_qd, T - first, D, D_PAD, True)
    do = _load(do_base, local, stride_gt, stride_gd, T - first, D, D_PAD, True)
    lse_log2 = tl.load(lse_ptr + row + local, mask=first + local < T, other=float("inf")) * _LOG2_E
    o_base = _head(o_ptr, head, H, stride_ob, stride_oh) + first.to(tl.int64) * stride_ot
    o = _load(o_base, local, stride_ot, stride_od, T - first, D, D_PAD, True)
    delta = tl.reduce(o.to(tl.float32) * do.to(tl.float32), 1, _SUM)
    tl.store(delta_ptr + row + local, delta, mask=first + local < T)
    dq = tl.full([BLOCK_Q, D_PAD], 0.0, tl.float32)
    scale_log2 = scale * _LOG2_E
    dq = _accumulate_dq(
        dq, q, do, lse_log2, delta, k_base, v_base, 0, full, first + local, S, scale_log2,
        stride_ks, stride_kd, stride_vs, stride_vd, D, D_PAD, BLOCK_K, CAUSAL, False, PRECISION,
    )  # fmt: skip
    k_base += full.to(tl.int64) * stride_ks
    v_base += full.to(tl.int64) * stride_vs
    if CAUSAL or not EVEN_S:
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, k_base, v_base, full, end, first + local, S, scale_log2,
            stride_ks, stride_kd, stride_vs, stride_vd, D, D_PAD, BLOCK_K, CAUSAL, True, PRECISION,
        )  # fmt: skip
    dq_base = _head(dq_ptr, head, H, stride_dqb, stride_dqh) + first.to(tl.int64) * stride_dqt
    _store(dq_base, dq * scale, local, stride_dqt, stride_dqd, T - first, D, D_PAD)


@triton.jit
def _accumulate_dk_dv(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, start, end, k_rows, T, scale_log2,
    stride_qt, stride_qd, stride_gt, stride_gd,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr,
    MASKED: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the query tiles in [start, end). The scores are transposed, so that P^T and dS^T are left operands.

    Queries past T get P = 0 from their log-sum-exp of infinity. Keys past S get anything: their rows are not stored.
    """
    local = tl.arange(0, BLOCK_Q)
    for i in tl.range(start, end, BLOCK_Q):
        q = _load(q_base, local, stride_qt, stride_qd, T - i, D, D_PAD, BOUNDED)
        lse = (
            tl.load(lse_base + local, mask=local < T - i, other=float("inf")) if BOUNDED else tl.load(lse_base + local)
        )
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.math.exp2(scores * scale_log2 - (lse * _LOG2_E)[None, :])
        if MASKED:
            p = tl.where(local[None, :] >= (k_rows - i)[:, None], p, 0.0)
        do = _load(do_base, local, stride_gt, stride_gd, T - i, D, D_PAD, BOUNDED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        delta = tl.load(delta_base + local, mask=local < T - i, other=0.0) if BOUNDED else tl.load(delta_base + local)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_base += BLOCK_Q * stride_qt
        do_base += BLOCK_Q * stride_gt
        lse_base += BLOCK_Q
        delta_base += BLOCK_Q
    return dk, dv


@triton.jit(do_not_specialize=["length_class"])
def _dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale, H, H_kv, T, S, length_class,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_dkb, stride_dkh, stride_dks, stride_dkd, stride_dvb, stride_dvh, stride_dvs, stride_dvd,
    D: tl.constexpr, D_PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, EVEN_T: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One key tile of one key head: dk and dv over the query heads that read it. Algorithm 2 without line 15."""
    tiles = (S + BLOCK_K - 1) // BLOCK_K
    tile, kv_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    first = tile * BLOCK_K
    local = tl.arange(0, BLOCK_K)
    k_base = _head(k_ptr, kv_head, H_kv, stride_kb, stride_kh) + first.to(tl.int64) * stride_ks
    v_base = _head(v_ptr, kv_head, H_kv, stride_vb, stride_vh) + first.to(tl.int64) * stride_vs
    k = _load(k_base, local, stride_ks, stride_kd, S - first, D, D_PAD, True)
    v = _load(v_base, local, stride_vs, stride_vd, S - first, D, D_PAD, True)
    dk = tl.full([BLOCK_K, D_PAD], 0.0, tl.float32)
    dv = tl.full([BLOCK_K, D_PAD], 0.0, tl.float32)
    scale_log2 = scale * _LOG2_E
    start, diagonal = first * 0, first * 0  # query tiles in [start, diagonal) cross the causal diagonal
    if CAUSAL:
        start = tl.minimum(first // BLOCK_Q * BLOCK_Q, T)
        diagonal = tl.minimum(
            (first + BLOCK_K + BLOCK_Q - 2) // BLOCK_Q * BLOCK_Q, (T + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
        )
    for member in range(GROUP):  # a constant: a loop of one round is gone, and with it the registers that it holds
        head = kv_head * GROUP + member
        q_base = _head(q_ptr, head, H, stride_qb, stride_qh) + start.to(tl.int64) * stride_qt
        do_base = _head(do_ptr, head, H, stride_gb, stride_gh) + start.to(tl.int64) * stride_gt
        lse_base = lse_ptr + head.to(tl.int64) * T + start
        delta_base = delta_ptr + head.to(tl.int64) * T + start
        if CAUSAL:
            dk, dv = _accumulate_dk_dv(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, start, diagonal, first + local, T, scale_log2,
                stride_qt, stride_qd, stride_gt, stride_gd, D, D_PAD, BLOCK_Q, True, not EVEN_T, PRECISION,
            )  # fmt: skip
            q_base += (diagonal - start).to(tl.int64) * stride_qt
            do_base += (diagonal - start).to(tl.int64) * stride_gt
            lse_base += diagonal - start
            delta_base += diagonal - start
        dk, dv = _accumulate_dk_dv(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, diagonal, T, first + local, T, scale_log2,
            stride_qt, stride_qd, stride_gt, stride_gd, D, D_PAD, BLOCK_Q, False, not EVEN_T, PRECISION,
        )  # fmt: skip
    dk_base = _head(dk_ptr, kv_head, H_kv, stride_dkb, stride_dkh) + first.to(tl.int64) * stride_dks
    dv_base = _head(dv_ptr, kv_head, H_kv, stride_dvb, stride_dvh) + first.to(tl.int64) * stride_dvs
    _store(dk_base, dk * scale, local, stride_dks, stride_dkd, S - first, D, D_PAD)
    _store(dv_base, dv, local, stride_dvs, stride_dvd, S - first, D, D_PAD)


# --- Tiles ----------------------------------------------------------------------------------------

# (BLOCK_Q, BLOCK_K, warps, stages) to choose among, by D_PAD: forward, dQ, dK and dV. Chosen on an H200 (Triton 3.6) at
# 16k tokens of heads x head_dim = 2048, seq 1024 to 16384, TFLOP/s of a kernel's own products. The last of a list needs
# less shared memory, for GPUs with 100 KiB or less; one that does not fit is passed over.
_HALF = {  # float16, bfloat16
    64: (
        [(64, 64, 4, 3), (128, 64, 4, 4)],  # causal 1024: 273 and 251; 16384: 374 and 396; 128 x 128 with 8 warps 362
        [(64, 64, 4, 3), (64, 32, 4, 4)],  # causal 4096: 497 and 478; 128 x 64 with 8 warps 401
        [(64, 64, 4, 3), (32, 64, 4, 4)],  # causal 1024: 344 and 365; 16384: 476 and 475; 64 x 128 with 8 warps 456
    ),
    128: (
        [(64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 2)],  # causal 1024: 313 and 279; full 16384: 420 and 465
        [(128, 64, 8, 3), (64, 32, 4, 3)],  # causal 4096: 575 and 473
        [(32, 64, 4, 3), (64, 128, 8, 3)],  # causal 1024: 388 and 349; 16384: 524 and 544
    ),
    256: ([(64, 64, 8, 2), (64, 32, 4, 2)], [(64, 32, 8, 2), (32, 32, 4, 1)], [(32, 64, 8, 2), (16, 64, 8, 2)]),
}
_SINGLE = {  # float32
    64: ([(128, 64, 8, 2), (64, 32, 4, 2)], [(64, 32, 4, 2), (32, 32, 4, 2)], [(64, 128, 8, 1), (32, 64, 4, 2)]),
    128: ([(64, 64, 4, 2), (64, 32, 4, 2)], [(64, 32, 4, 2), (32, 32, 4, 1)], [(32, 64, 4, 2), (32, 32, 4, 1)]),
    256: ([(32, 32, 4, 1), (16, 16, 4, 1)], [(32, 32, 4, 1), (16, 16, 4, 1)], [(32, 32, 4, 1), (16, 16, 4, 1)]),
}
_INTERPRETER = (32, 32, 4, 1)
_EVEN = 128  # lengths that are multiples of it have no tail in any tile above


def _tuned(kernel: Any, which: int) -> Any:
    """The kernel with its tiles, the fastest found once for each head dim, dtype, mask and class of length."""

    def config(tile: tuple[int, int, int, int]) -> triton.Config:
        return triton.Config({"BLOCK_Q": tile[0], "BLOCK_K": tile[1]}, num_warps=tile[2], num_stages=tile[3])

    def candidates(configs: list[triton.Config], named: dict[str, Any], **_: Any) -> list[triton.Config]:
        table = _SINGLE if named["q_ptr"].dtype == torch.float32 else _HALF
        return [config(tile) for tile in table[max(64, named["D_PAD"])][which]]

    if INTERPRETED:
        return triton.autotune([config(_INTERPRETER)], key=[])(kernel)
    # The configurations given here only say that there are several: candidates() names the ones to try.
    return triton.autotune(
        [config(tile) for tile in _HALF[64][which]],
        key=["D", "CAUSAL", "length_class"],
        prune_configs_by={"early_config_prune": candidates},
    )(kernel)


# --- Launch ---------------------------------------------------------------------------------------

_SIGNATURES = 4096  # most that a launcher remembers: a training run has a few, serving with free lengths has many


class _Launcher:
    """A tuned kernel, called as launcher(tensors, scale, causal): q, k, v first, then in the kernel's order.

    Triton's own way to a launch, through the autotuner and the binding of 40 arguments by name, costs the host several
    times the launch itself. What it finds depends on the dtypes, the integers that it specializes on (equal to 1,
    multiple of 16) and the alignment of the pointers. So the compiled kernel, its grid and its integers are kept for
    each signature: all shapes, strides and dtypes, where all pointers are 16-byte aligned (others go Triton's way). A
    later call of the signature launches with the pointers and the scale alone. On AMD GPUs Triton also specializes on
    a storage's size, and in the interpreter nothing is compiled: there each call goes Triton's way. Profilers' launch
    hooks run as ever; Triton's debug settings are those of a signature's first call.
    """

    def __init__(self, kernel: Any, which: int, constants: Callable, grid: Callable) -> None:
        """constants(q, k): the kernel's own; grid(q, k, BLOCK_Q, BLOCK_K). which: of the lists of tiles above."""
        self.tuned = _tuned(kernel, which)
        self.constants, self.grid = constants, grid
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[int, int, int], tuple[Any, ...]]] = {}

    def __call__(self, tensors: tuple[Tensor, ...], scale: float, causal: bool) -> None:
        q, k, v = tensors[:3]
        pointers = [t.data_ptr() for t in tensors]
        misaligned = 0
        for pointer in pointers:
            misaligned |= pointer
        signature = (
            causal, misaligned & 15, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.shape, k.shape, v.shape,
            *[t.stride() for t in tensors],
        )  # fmt: skip
        with torch.cuda.device_of(q):
            known = self.compiled.get(signature)
            if known is None:
                self._first(signature, tensors, scale, causal)
            else:
                kernel, grid, constants = known
                kernel[grid](*pointers, scale, *constants)

    def _first(self, signature: tuple[Any, ...], tensors: tuple[Tensor, ...], scale: float, causal: bool) -> None:
        """Tune and compile where needed, launch, and remember how."""
        q, k, v = tensors[:3]
        if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
            got = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in zip("qkv", (q, k, v), strict=True))
            raise ValueError(f"attention kernel 'flash_attention_triton': got {got}; it takes one dtype and one device")
        constants = (
            q.shape[1], k.shape[1], q.shape[2], k.shape[2], _length_class(q, k),
            *[stride for t in tensors if t.ndim == 4 for stride in t.stride()],
            q.shape[3], _padded(q.shape[3]), causal, _precision(q), *self.constants(q, k),
        )  # fmt: skip
        blocks = (0, 0)

        def grid(chosen: dict[str, Any]) -> tuple[int, int, int]:
            nonlocal blocks
            blocks = chosen["BLOCK_Q"], chosen["BLOCK_K"]
            return self.grid(q, k, *blocks)

        kernel = self.tuned[grid](*tensors, scale, *constants)
        if INTERPRETED or torch.version.hip is not None or signature[1]:  # misaligned
            return
        if len(self.compiled) >= _SIGNATURES:
            self.compiled.clear()
        self.compiled[signature] = kernel, self.grid(q, k, *blocks), (*constants, *blocks)


def _query_tiles(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[int, int, int]:
    return -(-q.shape[2] // block_q) * q.shape[0] * q.shape[1], 1, 1


def _key_tiles(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[int, int, int]:
    return -(-k.shape[2] // block_k) * k.shape[0] * k.shape[1], 1, 1


def _length_class(q: Tensor, k: Tensor) -> int:
    """A power of four, so that a new length rarely tunes again."""
    return (max(q.shape[2], k.shape[2], 256) - 1).bit_length() // 2


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _precision(q: Tensor) -> str:
    """How float32 products are made: from three TF32 ones on NVIDIA GPUs that have them, as accurate as float32.

    H200, float64 the reference, seq 1024, head_dim 64: o is off by 5.5e-7, with IEEE products and in PyTorch by 9.9e-7;
    at seq 2048 the forward pass takes 2.97 ms for 16k tokens of 32 heads, four times that with IEEE products.
    """
    if q.dtype != torch.float32 or INTERPRETED or torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.cuda.get_device_capability(q.device) >= (8, 0) else "ieee"


_launch_forward = _Launcher(_forward_kernel, 0, lambda q, k: (k.shape[2] % _EVEN == 0,), _query_tiles)
_launch_dq = _Launcher(_dq_kernel, 1, lambda q, k: (k.shape[2] % _EVEN == 0,), _query_tiles)
_launch_dk_dv = _Launcher(
    _dk_dv_kernel, 2, lambda q, k: (q.shape[2] % _EVEN == 0, q.shape[1] // k.shape[1]), _key_tiles
)


def portable_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> o (B, H, T, D), lse (B, H, T) in float32."""
    o, lse = _empty_outputs(q)
    _launch_forward((q, k, v, o, lse), scale, causal)
    return o, lse


def portable_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped as q, k, v. o, do: (B, H, T, D); lse: (B, H, T), contiguous."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    _launch_dq((q, k, v, o, do, lse, delta, dq), scale, causal)
    _launch_dk_dv((q, k, v, do, lse, delta, dk, dv), scale, causal)
    return dq, dk, dv


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """o is laid out (B, T, H, D), as the output projection wants it, and seen as (B, H, T, D)."""
    batch, heads, q_len, head_dim = q.shape
    o = q.new_empty_strided(q.shape, (q_len * heads * head_dim, head_dim, heads * head_dim, 1))
    return o, q.new_empty((batch, heads, q_len), dtype=torch.float32)


# --- Operators: the choice of the path, and what torch.compile sees -------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, deterministic: bool, path: str
) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> o (B, H, T, D), laid out (B, T, H, D), and lse (B, H, T) in float32."""
    if choose(q, k, v, causal=causal, backward=False, deterministic=deterministic, path=path).name == "hopper":
        from lmsys.attention import flash_hopper

        return flash_hopper.forward(q, k, v, causal, scale)
    return portable_forward(q, k, v, causal, scale)


flash_forward = torch.library.custom_op("lmsys::flash_attention_triton_forward", _forward, mutates_args=())


@flash_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
    causal: bool, scale: float, deterministic: bool, path: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, shaped as q, k, v. o, do: (B, H, T, D), any strides; lse: (B, H, T), contiguous."""
    if choose(q, k, v, causal=causal, backward=True, deterministic=deterministic, path=path).name == "hopper":
        from lmsys.attention import flash_hopper_backward

        return flash_hopper_backward.backward(q, k, v, o, lse, do, causal, scale)
    return portable_backward(q, k, v, o, lse, do, causal, scale)


flash_backward = torch.library.custom_op("lmsys::flash_attention_triton_backward", _backward, mutates_args=())


@flash_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# --- Autograd -------------------------------------------------------------------------------------


class FlashAttentionTriton(torch.autograd.Function):
    """apply(q, k, v, is_causal=False, scale=None, deterministic=False, path="auto").

    Shapes, and what is saved, as in lmsys.attention.autograd. deterministic, path: see lmsys.attention.paths.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, scale: float | None = None,
        deterministic: bool = False, path: str = "auto",
    ) -> Tensor:  # fmt: skip
        launch = flash_forward if torch.compiler.is_compiling() else _forward  # eager, the op would only cost 20 us
        return autograd.forward(ctx, launch, q, k, v, is_causal, scale, deterministic, path)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return autograd.backward(ctx, flash_backward if torch.compiler.is_compiling() else _backward, do)


def flash_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None,
    deterministic: bool = False, path: str = "auto",
) -> Tensor:  # fmt: skip
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> (B, H, T, D)."""
    return FlashAttentionTriton.apply(q, k, v, causal, scale, deterministic, path)
