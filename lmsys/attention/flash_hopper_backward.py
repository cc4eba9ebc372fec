"""FlashAttention for Hopper GPUs (sm_90) in Gluon: the backward pass; the launch helpers are flash_hopper's.

Sources: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithm 2; Shah et al., "FlashAttention-3" (arXiv:2407.08608),
section 3 and its appendix on the backward pass.

How it works:
- _prepare_kernel: delta = rowsum(O dO), the log-sum-exp in base 2, and zeros for dQ's float32 sum.
- One item of work is 128 keys of a key head: it walks over the queries of all heads that read them, with dK and dV in
  registers; or of a part of these heads where items are few, the sums of the parts being added up at the end. Two
  groups of four warps (consumers) take 64 keys each, and a producer group copies Q and dO tiles of 64 queries into a
  ring.
- Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T feed dV and dK as left operands
  from registers. Only dS goes through shared memory, for dQ.
- dQ leaves as float32 by the copy unit's reduce-add: the order of its sums, so its last bits, differ from run to run.
- _finish_kernel: dQ times the scale, in the inputs' dtype.

Head dim 64: a step is two query tiles, of which consumer g adds up dQ of tile g over all 128 keys; K and V stay in
registers as left operands, since 64 x 64 products from shared memory alone would take all of its bandwidth (on an H200,
16k causal: 456 without, 490 TFLOP/s with). Head dim 128: a step is one query tile, and consumer g adds up half g of
dQ's columns.

Limits: those of flash_hopper, and gradients are not the same bits in every run.

Legend: B batch, H heads, H_kv key heads, X heads of dK and dV as they are summed, T queries, S keys, D head dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lmsys.attention.flash_hopper import (
    Launcher,
    barriers,
    ceil_div,
    device_sizes,
    finish_list,
    get_item,
    group_barrier,
    in_eights,
    list_counter,
    named_barrier,
    next_item,
    pieces_of,
    put_item,
    tiles_of,
)

_KEYS = gl.constexpr(128)  # of an item
_ROWS = gl.constexpr(64)  # queries of a tile, and keys of a consumer
_LOG2_E = gl.constexpr(math.log2(math.e))


# --- What Gluon does not offer --------------------------------------------------------------------


@builtin
def _reduce_add(desc, coordinates, source, _semantic=None):
    """Add a shared-memory tile to global memory by the copy unit (cp.reduce.async.bulk.tensor)."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coordinates, source.handle)


_reduce_add.__module__ = "triton.experimental.gluon.language.user"  # Gluon calls its own builtins only


@gluon.jit
def _consumers_barrier():
    """Both consumers."""
    named_barrier("sync", 9)


# --- Before and after -----------------------------------------------------------------------------


# In units of eight elements, of which Triton then knows that addresses are aligned.
_STRIDES = ["stride_b", "stride_h", "stride_t"]


@triton.jit(do_not_specialize=["H", "T", "T_PAD", "stride_gb", "stride_gh", "stride_gt", *_STRIDES])
def _prepare_kernel(
    o_ptr, do_ptr, lse_ptr, dq_sum_ptr, lse_log2_ptr, delta_ptr, H, T, T_PAD,
    stride_b, stride_h, stride_t, stride_gb, stride_gh, stride_gt, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta and lse_log2 (B * H, T_PAD), the latter +inf past T so that P is 0 there; dq_sum (B, H, T, D) = 0."""
    tiles = T_PAD // ROWS
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    inside = row < T
    tile = row[:, None].to(tl.int64)
    o_row = (head // H * stride_b + head % H * stride_h + tile * stride_t) * 8
    do_row = (head // H * stride_gb + head % H * stride_gh + tile * stride_gt) * 8
    o = tl.load(o_ptr + o_row + column[None, :], mask=inside[:, None], other=0.0)
    do = tl.load(do_ptr + do_row + column[None, :], mask=inside[:, None], other=0.0)
    lse = tl.load(lse_ptr + head * T + row, mask=inside, other=0.0)
    tl.store(delta_ptr + head * T_PAD + row, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1))
    tl.store(lse_log2_ptr + head * T_PAD + row, tl.where(inside, lse * _LOG2_E, float("inf")))
    tl.store(
        dq_sum_ptr + (head * T + tile) * D + column[None, :], tl.zeros([ROWS, D], tl.float32), mask=inside[:, None]
    )


@triton.jit(do_not_specialize=["H", "T", "rows", *_STRIDES])
def _finish_kernel(
    dq_sum_ptr, dq_ptr, scale, H, T, rows, stride_b, stride_h, stride_t, D: tl.constexpr, ROWS: tl.constexpr
):
    """dq (B, H, T, D) = dq_sum * scale. rows: B * H * T."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    inside = (row < rows)[:, None]
    x = tl.load(dq_sum_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)
    head = row // T
    dq_row = (head // H * stride_b + head % H * stride_h + row % T * stride_t) * 8
    tl.store(dq_ptr + dq_row[:, None] + column[None, :], (x * scale).to(dq_ptr.dtype.element_ty), mask=inside)


# --- Work -----------------------------------------------------------------------------------------


@gluon.jit
def _item(item, sizes, D: gl.constexpr, CAUSAL: gl.constexpr):
    """Batch, head (of X), first key, first query tile, query tiles of a head, and how many of them need a mask.

    Sections of heads follow each other, and in each the longest items of all its heads come first.
    At head_dim 64 tiles come in pairs.
    """
    _H, X, _parts, section, T, S, _T_PAD, items = sizes
    per_head = gl.cdiv(S, _KEYS)
    first_head = item // (section * per_head) * section
    rest = item - first_head * per_head
    width = gl.minimum(section, items // per_head - first_head)
    block = rest // width
    head = first_head + rest - block * width
    b = head // X
    first_key = block * _KEYS
    tiles = gl.cdiv(T, _ROWS)
    if D == 64:
        tiles = gl.cdiv(T, 2 * _ROWS) * 2
    first = 0
    masked = 0
    if CAUSAL:
        first = gl.minimum(first_key // _ROWS, tiles)
        masked = _KEYS // _ROWS
    tiles -= first
    if first_key + _KEYS > S:
        masked = tiles
    return b, head - b * X, first_key, first, tiles, masked


@gluon.jit
def _load_pair(desc, b, h, row, ready, empty, tiles, n):
    """128 rows of K or V, once the consumers have released those of the item before."""
    mbarrier.wait(empty, (n & 1) ^ 1)
    mbarrier.expect(ready, 2 * desc.block_type.nbytes)
    for g in gl.static_range(2):
        tma.async_copy_global_to_shared(desc, [b, h, row + g * _ROWS, 0], ready, tiles.index(g))


@gluon.jit
def _producer(inputs, counter, state, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr):
    """Takes items from the list and copies their keys, values and query tiles into shared memory."""
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc = inputs
    buffers, slots, slots_ready, full, empty, sizes = state
    q_s, do_s, k_s, v_s, lse_s, delta_s, _ds_s, _dq_s = buffers
    k_full, v_full, q_full, do_full = full
    k_empty, v_empty, q_empty = empty
    H, X, parts, _section, _T, _S, T_PAD, items = sizes
    group = H // X
    item = gl.program_id(0)
    n = 0  # items, and
    done = 0  # query tiles that this program has seen
    while item < items:
        following = next_item(counter)
        put_item(slots, slots_ready, n, item)
        b, x, first_key, first, tiles, _masked = _item(item, sizes, D, CAUSAL)
        h_kv = x // parts
        _load_pair(k_desc, b, h_kv, first_key, k_full.index(0), k_empty.index(0), k_s, n)
        total = tiles * group
        if D == 64 or total == 0:
            _load_pair(v_desc, b, h_kv, first_key, v_full.index(0), v_empty.index(0), v_s, n)
        for i in range(total):
            stage = (done + i) % STAGES
            member = i // tiles
            h = x * group + member
            row = (first + i - member * tiles) * _ROWS
            vector = (b * H + h) * T_PAD + row
            ready = q_full.index(stage)
            mbarrier.wait(q_empty.index(stage), (((done + i) // STAGES) & 1) ^ 1)
            # At head_dim 64 one barrier for all four copies: each costs every step a wait.
            if D == 64:
                mbarrier.expect(ready, 2 * q_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes)
            else:
                mbarrier.expect(ready, q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(lse_desc, [vector], ready, lse_s.index(stage))
            tma.async_copy_global_to_shared(q_desc, [b, h, row, 0], ready, q_s.index(stage))
            if D == 128:
                if i == 0:
                    _load_pair(v_desc, b, h_kv, first_key, v_full.index(0), v_empty.index(0), v_s, n)
                ready = do_full.index(stage)
                mbarrier.expect(ready, do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(delta_desc, [vector], ready, delta_s.index(stage))
            tma.async_copy_global_to_shared(do_desc, [b, h, row, 0], ready, do_s.index(stage))
        done += total
        n += 1
        item = following
    put_item(slots, slots_ready, n, -1)
    finish_list(counter)


@gluon.jit
def _first_query(first_key, S, G: gl.constexpr, CAUSAL: gl.constexpr, LAYOUT: gl.constexpr):
    """For each key of consumer G, the first query that sees it: keys past the end are seen by none."""
    key = first_key + G * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, LAYOUT))
    query = key
    if not CAUSAL:
        query = gl.zeros_like(key)
    return gl.where(key < S, query, 1 << 30)


@gluon.jit
def _probabilities(scores, lse, first_query, row, masks, scale_log2, MASK: gl.constexpr, LAYOUT: gl.constexpr):
    """P^T of the query tile that starts at `row`; masks: whether this tile needs one."""
    if MASK:  # noqa: SIM102 (one is a constant, the other is not)
        if masks:
            columns = gl.arange(0, _ROWS, gl.SliceLayout(0, LAYOUT))
            scores = gl.where(columns[None, :] >= (first_query - row)[:, None], scores, -float("inf"))
    return gl.exp2(scores * scale_log2 - lse[None, :])


# --- Head dim 64 ----------------------------------------------------------------------------------


@gluon.jit
def _issue_64(c, k, v, q_s, do_s, q_full, zeros, STAGES: gl.constexpr):
    """S^T and dP^T of query tile c, in flight."""
    stage = c % STAGES
    mbarrier.wait(q_full.index(stage), (c // STAGES) & 1)
    q = q_s.index(stage).reshape([_ROWS, 64])
    do = do_s.index(stage).reshape([_ROWS, 64])
    scores = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return scores, dp


@gluon.jit
def _tile_64(
    c, row, masks, scores, dp, dk, dv, buffers, ds_s, first_query, scale_log2,
    STAGES: gl.constexpr, MASK: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """From S^T and dP^T of query tile c to its parts of dK and dV, in flight, and dS^T in shared memory."""
    q_s, do_s, _k_s, _v_s, lse_s, delta_s, _ds_s, _dq_s = buffers
    dtype: gl.constexpr = q_s.dtype
    operand: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    stage = c % STAGES
    lse = lse_s.index(stage).load(gl.SliceLayout(0, LAYOUT))
    scores = warpgroup_mma_wait(1, deps=[scores])
    p = _probabilities(scores, lse, first_query, row, masks, scale_log2, MASK, LAYOUT)
    p_operand = gl.convert_layout(p.to(dtype), operand)
    dv = warpgroup_mma(p_operand, do_s.index(stage).reshape([_ROWS, 64]), dv, is_async=True)
    delta = delta_s.index(stage).load(gl.SliceLayout(0, LAYOUT))
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = (p * (dp - delta[None, :])).to(dtype)
    ds_operand = gl.convert_layout(ds, operand)
    ds_s.store(ds)
    dk = warpgroup_mma(ds_operand, q_s.index(stage).reshape([_ROWS, 64]), dk, is_async=True)
    return dk, dv, p_operand, ds_operand


@gluon.jit
def _step_64(
    i, c, tiles, masked, first, k, v, dk, dv, dq_desc, buffers, q_full, q_empty, zeros, first_query, b, h0, scale_log2,
    G: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, GROUPED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Query tiles i and i + 1 of an item, c and c + 1 of the program; consumer G adds tile i + G to dQ."""
    q_s, do_s, k_s, _v_s, _lse_s, _delta_s, ds_s, dq_s = buffers
    member = 0
    if GROUPED:
        member = i // tiles
    tile = i - member * tiles
    row = (first + tile) * _ROWS
    half = (c // 2) % 2 * 4  # of the dS buffers: four tiles a step, two steps in turn
    scores0, dp0 = _issue_64(c, k, v, q_s, do_s, q_full, zeros, STAGES)
    dk, dv, p0, ds0 = _tile_64(
        c, row, tile < masked, scores0, dp0, dk, dv, buffers, ds_s.index(half + G), first_query, scale_log2,
        STAGES, MASK, LAYOUT,
    )  # fmt: skip
    dv, p0 = warpgroup_mma_wait(1, deps=[dv, p0])
    scores1, dp1 = _issue_64(c + 1, k, v, q_s, do_s, q_full, zeros, STAGES)
    dk, ds0 = warpgroup_mma_wait(2, deps=[dk, ds0])
    dk, dv, p1, ds1 = _tile_64(
        c + 1, row + _ROWS, tile + 1 < masked, scores1, dp1, dk, dv, buffers, ds_s.index(half + 2 + G), first_query,
        scale_log2, STAGES, MASK, LAYOUT,
    )  # fmt: skip
    fence_async_shared()
    _consumers_barrier()
    mine = half + 2 * G
    dq = warpgroup_mma(
        ds_s.index(mine).permute((1, 0)), k_s.index(0).reshape([_ROWS, 64]), zeros, use_acc=False, is_async=True
    )
    dq = warpgroup_mma(ds_s.index(mine + 1).permute((1, 0)), k_s.index(1).reshape([_ROWS, 64]), dq, is_async=True)
    dk, dv, p0, ds0, p1, ds1 = warpgroup_mma_wait(2, deps=[dk, dv, p0, ds0, p1, ds1])
    mbarrier.arrive(q_empty.index(c % STAGES), count=1)
    mbarrier.arrive(q_empty.index((c + 1) % STAGES), count=1)
    tma.store_wait(0)  # the step before has left the buffer
    group_barrier()
    dq = warpgroup_mma_wait(0, deps=[dq])
    dq_s.index(G).reshape([_ROWS, 64]).store(dq)
    fence_async_shared()
    _reduce_add(dq_desc, [b, h0 + member, row + G * _ROWS, 0], dq_s.index(G))
    return dk, dv


@gluon.jit
def _consumer_64(
    G: gl.constexpr, outputs, scale, state, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASK: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    dq_desc, dk_desc, dv_desc = outputs
    buffers, slots, slots_ready, full, empty, sizes = state
    _q_s, _do_s, k_s, v_s, _lse_s, _delta_s, ds_s, _dq_s = buffers
    k_full, v_full, q_full, _do_full = full
    k_empty, v_empty, q_empty = empty
    H, X, _parts, _section, _T, S, _T_PAD, _items = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zeros = gl.zeros([_ROWS, 64], gl.float32, LAYOUT)
    group = H // X
    n = 0
    done = 0
    item = get_item(slots, slots_ready, 0)
    while item >= 0:
        b, x, first_key, first, tiles, masked = _item(item, sizes, 64, CAUSAL)
        total = tiles * group
        first_query = _first_query(first_key, S, G, CAUSAL, LAYOUT)
        dk = zeros
        dv = zeros
        tma.store_wait(0)  # dK and dV of the item before have left the buffers of dS, for both consumers
        mbarrier.wait(k_full.index(0), n & 1)
        _consumers_barrier()
        k = k_s.index(G).reshape([_ROWS, 64]).load(gl.DotOperandLayout(0, LAYOUT, 2))
        mbarrier.wait(v_full.index(0), n & 1)
        v = v_s.index(G).reshape([_ROWS, 64]).load(gl.DotOperandLayout(0, LAYOUT, 2))
        mbarrier.arrive(v_empty.index(0), count=1)
        for i in range(0, total, 2):
            dk, dv = _step_64(
                i, done + i, tiles, masked, first, k, v, dk, dv, dq_desc, buffers, q_full, q_empty, zeros, first_query,
                b, x * group, scale * _LOG2_E, G, STAGES, MASK, GROUPED, LAYOUT,
            )  # fmt: skip
        mbarrier.arrive(k_empty.index(0), count=1)
        _consumers_barrier()  # nobody reads dS any more: dK and dV leave through its buffers
        dk_s = ds_s.index(2 * G)._reinterpret(dk_desc.dtype, [1, 1, _ROWS, 64], dk_desc.layout)
        dv_s = ds_s.index(2 * G + 1)._reinterpret(dv_desc.dtype, [1, 1, _ROWS, 64], dv_desc.layout)
        dk_s.reshape([_ROWS, 64]).store((dk * scale).to(dk_desc.dtype))
        dv_s.reshape([_ROWS, 64]).store(dv.to(dv_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dk_desc, [b, x, first_key + G * _ROWS, 0], dk_s)
        tma.async_copy_shared_to_global(dv_desc, [b, x, first_key + G * _ROWS, 0], dv_s)
        done += total
        n += 1
        item = get_item(slots, slots_ready, n)
    tma.store_wait(0)


# --- Head dim 128 ---------------------------------------------------------------------------------


@gluon.jit
def _step_128(
    i, c, tiles, masked, first, dk, dv, dq_desc, buffers, q_full, do_full, q_empty, zeros, first_query, b, h0,
    scale_log2, G: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, GROUPED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Query tile i of an item, c of the program; consumer G adds columns G * 64 to G * 64 + 63 to dQ."""
    q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s = buffers
    dtype: gl.constexpr = q_s.dtype
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    stage = c % STAGES
    phase = (c // STAGES) & 1
    member = 0
    if GROUPED:
        member = i // tiles
    tile = i - member * tiles
    row = (first + tile) * _ROWS
    q = q_s.index(stage).reshape([_ROWS, 128])
    do = do_s.index(stage).reshape([_ROWS, 128])
    mbarrier.wait(q_full.index(stage), phase)
    k = k_s.index(G).reshape([_ROWS, 128])
    scores = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = lse_s.index(stage).load(gl.SliceLayout(0, LAYOUT))
    mbarrier.wait(do_full.index(stage), phase)
    v = v_s.index(G).reshape([_ROWS, 128])
    dp = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    p = _probabilities(scores, lse, first_query, row, tile < masked, scale_log2, MASK, LAYOUT)
    p_operand = gl.convert_layout(p.to(dtype), operand)
    delta = delta_s.index(stage).load(gl.SliceLayout(0, LAYOUT))
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = (p * (dp - delta[None, :])).to(dtype)
    pair = c % 2 * 2  # dS buffers: two tiles a step, two steps in turn
    ds_s.index(pair + G).store(ds)
    ds_operand = gl.convert_layout(ds, operand)
    dv = warpgroup_mma(p_operand, do, dv, is_async=True)
    tma.store_wait(0)  # the step before has left dQ's buffer, for all after the barrier
    fence_async_shared()
    _consumers_barrier()
    k0 = k_s.index(0).reshape([_ROWS, 128]).slice(64 * G, 64, 1)
    k1 = k_s.index(1).reshape([_ROWS, 128]).slice(64 * G, 64, 1)
    dq = warpgroup_mma(ds_s.index(pair).permute((1, 0)), k0, zeros, use_acc=False, is_async=True)
    dq = warpgroup_mma(ds_s.index(pair + 1).permute((1, 0)), k1, dq, is_async=True)
    dv, p_operand = warpgroup_mma_wait(2, deps=[dv, p_operand])
    dk = warpgroup_mma(ds_operand, q, dk, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    dq_s.index(G).reshape([_ROWS, 64]).store(dq)
    fence_async_shared()
    _reduce_add(dq_desc, [b, h0 + member, row, G * 64], dq_s.index(G))
    dk, ds_operand = warpgroup_mma_wait(0, deps=[dk, ds_operand])
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _consumer_128(
    G: gl.constexpr, outputs, scale, state, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASK: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    dq_desc, dk_desc, dv_desc = outputs
    buffers, slots, slots_ready, full, empty, sizes = state
    _q_s, _do_s, _k_s, _v_s, _lse_s, _delta_s, ds_s, dq_s = buffers
    k_full, v_full, q_full, do_full = full
    k_empty, v_empty, q_empty = empty
    H, X, _parts, _section, _T, S, _T_PAD, _items = sizes
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    zeros = gl.zeros([_ROWS, 64], gl.float32, LAYOUT)
    group = H // X
    n = 0
    done = 0
    item = get_item(slots, slots_ready, 0)
    while item >= 0:
        b, x, first_key, first, tiles, masked = _item(item, sizes, 128, CAUSAL)
        total = tiles * group
        first_query = _first_query(first_key, S, G, CAUSAL, LAYOUT)
        dk = gl.zeros([_ROWS, 128], gl.float32, WIDE)
        dv = gl.zeros([_ROWS, 128], gl.float32, WIDE)
        mbarrier.wait(k_full.index(0), n & 1)
        mbarrier.wait(v_full.index(0), n & 1)
        tma.store_wait(0)  # dK and dV of the item before have left the buffers of dS and dQ, for both consumers
        _consumers_barrier()
        for i in range(total):
            dk, dv = _step_128(
                i, done + i, tiles, masked, first, dk, dv, dq_desc, buffers, q_full, do_full, q_empty, zeros,
                first_query, b, x * group, scale * _LOG2_E, G, STAGES, MASK, GROUPED, LAYOUT,
            )  # fmt: skip
        mbarrier.arrive(v_empty.index(0), count=1)
        mbarrier.arrive(k_empty.index(0), count=1)
        _consumers_barrier()  # nobody reads dS any more: dK leaves through its buffers, dV through dQ's
        dk_s = ds_s.index(2 * G)._reinterpret(dk_desc.dtype, [1, 1, _ROWS, 128], dk_desc.layout)
        dv_s = dq_s.index(G)._reinterpret(dv_desc.dtype, [1, 1, _ROWS, 128], dv_desc.layout)
        dk_s.reshape([_ROWS, 128]).store((dk * scale).to(dk_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dk_desc, [b, x, first_key + G * _ROWS, 0], dk_s)
        tma.store_wait(1)  # all but dK's copy: the last part of dQ
        group_barrier()
        dv_s.reshape([_ROWS, 128]).store(dv.to(dv_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dv_desc, [b, x, first_key + G * _ROWS, 0], dv_s)
        done += total
        n += 1
        item = get_item(slots, slots_ready, n)
    tma.store_wait(0)


# --- Kernel ---------------------------------------------------------------------------------------


@gluon.jit
def _consumer(
    G: gl.constexpr, outputs, scale, state, D: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, MASK: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    if D == 64:
        _consumer_64(G, outputs, scale, state, STAGES, CAUSAL, MASK, GROUPED)
    else:
        _consumer_128(G, outputs, scale, state, STAGES, CAUSAL, MASK, GROUPED)


@gluon.jit(do_not_specialize=["H", "X", "parts", "section", "items", "T", "S", "T_PAD"])
def _backward_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc, lse_desc, delta_desc, counter, scale,
    H, X, parts, section, items, T, S, T_PAD,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """dK, dV, and dQ's float32 sum without the scale. MASK: causal, or S is no multiple of 128. GROUPED: H > X.

    dK and dV have X = H_kv * parts heads: each is the sum over H / X of the H / H_kv query heads that read a key head.
    """
    dtype: gl.constexpr = q_desc.dtype
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 1, _ROWS, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 1, _ROWS, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, _ROWS, D], do_desc.layout)
    ds_s = gl.allocate_shared_memory(dtype, [512 // D, _ROWS, 64], gl.NVMMASharedLayout(128, 16, 2))
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 1, 1, _ROWS, 64], dq_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, _ROWS], lse_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, _ROWS], delta_desc.layout)
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slots_ready = barriers(2, 1)
    full = (barriers(1, 1), barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1))  # k, v, q, do
    empty = (barriers(1, 2), barriers(1, 2), barriers(STAGES, 2))  # k, v, q and do
    fence_async_shared()
    buffers = (q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s)
    state = (buffers, slots, slots_ready, full, empty, (H, X, parts, section, T, S, T_PAD, items))
    inputs = (q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc)
    outputs = (dq_desc, dk_desc, dv_desc)
    gl.warp_specialize(
        [
            (_producer, (inputs, counter, state, D, STAGES, CAUSAL)),
            (_consumer, (gl.constexpr(0), outputs, scale, state, D, STAGES, CAUSAL, MASK, GROUPED)),
            (_consumer, (gl.constexpr(1), outputs, scale, state, D, STAGES, CAUSAL, MASK, GROUPED)),
        ],
        [4, 4],
        [240, 240],
    )


# --- Launch ---------------------------------------------------------------------------------------

_STAGES = {64: 4, 128: 2}  # by head dim: what shared memory holds
# By head dim: up to this many queries programs are persistent, one a multiprocessor; with more, one an item. H200, 16k
# tokens, heads x head_dim 2048, causal, TFLOP/s: head_dim 64 at 1024 298 and 273, 2048 378 and 362, 4096 425 and 423,
# 16384 472 and 488; head_dim 128 at 512 219 and 212, 1024 321 and 315, 2048 384 and 404, 4096 433 and 474.
_PERSISTENT_QUERIES = {64: 4096, 128: 1024}
_ITEMS_EACH = 6  # a multiprocessor, from which the query heads of a key head need no parting
_launch_prepare, _launch_backward, _launch_finish = map(Launcher, (_prepare_kernel, _backward_kernel, _finish_kernel))


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped as q, k, v.

    Args:
        q: (B, H, T, D). k, v: (B, H_kv, S, D). lmsys.attention.paths says which it takes.
        o, lse: of the forward pass. do: (B, H, T, D), the gradient of o, any strides.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    o, do = _readable(o), _readable(do)
    padded = ceil_div(q_len, 128) * 128
    rows = batch * heads * q_len
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    processors, _ = device_sizes(q.device.index)
    blocks = ceil_div(k_len, _KEYS.value)
    parts = _parting(batch * kv_heads * blocks, heads // kv_heads, processors)
    item_heads = kv_heads * parts
    items = batch * item_heads * blocks
    section = max(1, processors // blocks) if causal else 1  # heads at work at once: their queries stay in the L2 cache
    dk_parts, dv_parts = (dk, dv) if parts == 1 else k.new_empty(2, batch, item_heads, k_len, head_dim)
    dq_sum = torch.empty(batch, heads, q_len, head_dim, dtype=torch.float32, device=q.device)
    lse_log2, delta = torch.empty(2, batch * heads * padded, dtype=torch.float32, device=q.device)
    tile = _ROWS.value
    kind = q.device.index, q.dtype
    with torch.cuda.device(q.device):
        _launch_prepare(
            batch * heads * padded // tile, kind,
            (o, do, lse, dq_sum, lse_log2, delta, heads, q_len, padded, *in_eights(o), *in_eights(do)),
            (head_dim, tile),
        )  # fmt: skip
        _launch_backward(
            min(items, processors) if q_len <= _PERSISTENT_QUERIES[head_dim] else items, kind,
            (
                *(tiles_of(tensor, tile, head_dim) for tensor in (q, do, k, v)),
                tiles_of(dq_sum, tile, 64), tiles_of(dk_parts, tile, head_dim), tiles_of(dv_parts, tile, head_dim),
                pieces_of(lse_log2, tile), pieces_of(delta, tile), list_counter(q.device), scale,
                heads, item_heads, parts, section, items, q_len, k_len, padded,
            ),
            (head_dim, _STAGES[head_dim], causal, causal or k_len % _KEYS.value != 0, heads != item_heads),
        )  # fmt: skip
        _launch_finish(
            ceil_div(rows, tile), kind, (dq_sum, dq, scale, heads, q_len, rows, *in_eights(dq)), (head_dim, tile)
        )
        if parts > 1:
            for part, gradient in ((dk_parts, dk), (dv_parts, dv)):
                torch.sum(part.unflatten(1, (kv_heads, parts)), 2, out=gradient)
    return dq, dk, dv


def _parting(items: int, group: int, processors: int) -> int:
    """Into how many the query heads of a key head are parted: every multiprocessor gets several, uneven, items."""
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if items * n >= _ITEMS_EACH * processors), group)


def _readable(tensor: Tensor) -> Tensor:
    """With strides and an address that the copy unit takes: a sum's gradient is one number in many places."""
    in_eights = all(s > 0 and s % 8 == 0 for s in tensor.stride()[:-1])
    if in_eights and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
