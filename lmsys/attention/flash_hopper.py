"""FlashAttention for Hopper GPUs (sm_90) in Gluon, Triton's lower-level dialect: the forward pass.

Sources: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithm 1; Shah et al., "FlashAttention-3" (arXiv:2407.08608),
for the division of labour: one group of warps only copies (TMA), groups of four warps only compute (wgmma), and the
next block's Q K^T runs while this block's softmax and P V do. Plain Triton 3.6 waits for each product before it goes
on, so none of this can be said in it.

How it works:
- A tile is GROUPS x 64 queries of one head, a group of warps (a "consumer") for each 64. Consumers read the same keys
  and values from a ring of STAGES shared-memory blocks, which the producer fills; full and empty barriers tell each
  when to go on.
- Keys go from the diagonal back to the start, so that only a tile's first block needs a mask.
- Programs are persistent: one a multiprocessor, taking tiles from a list by an atomic counter. The list is longest
  first within sections of heads whose keys and values fit the L2 cache.
- P stays in registers between the products, two 16-bit values to a register.
- Where a call has fewer tiles than half the multiprocessors (few queries, many keys, no causal mask), each tile's keys
  are split among several programs, and a second kernel adds their results.

Limits: float16 and bfloat16, head_dim 64 and 128. Tensors are read where they lie: any strides that are multiples of 16
bytes, with the last 1. Triton's CPU interpreter has no Gluon: without a GPU the tests run the kernels in their own.

Legend: B batch, H heads, H_kv key heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lmsys.attention.paths import HEAD_DIMS

# Triton 3.7 renamed it.
group_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

_LN_2 = gl.constexpr(math.log(2))
_ROWS = 64  # queries of a consumer: the rows of one wgmma


# --- Work list ------------------------------------------------------------------------------------


@gluon.jit
def put_item(slots, ready, n, item):
    """The producer hands the n-th item of its list to the consumers.

    Two slots need no empty barrier: before the producer writes a slot again, it has waited for buffers that the
    consumers released after they had read it.
    """
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slots.index(n % 2).store(gl.full([1], 0, gl.int32, scalar) + item)
    mbarrier.arrive(ready.index(n % 2), count=1)


@gluon.jit
def get_item(slots, ready, n):
    """The n-th item; -1 where there is none left."""
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(ready.index(n % 2), (n // 2) & 1)
    return gl.sum(slots.index(n % 2).load(scalar), 0)


@gluon.jit
def next_item(counter):
    return gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")


@gluon.jit
def finish_list(counter):
    """The last program to finish leaves both counters at zero for the next launch on this stream."""
    if gl.atomic_add(counter + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _tile(
    item, heads, section, T, S, splits,
    GROUPS: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """An item's head (of all batches' heads), first query, first key block, number of key blocks, and split.

    Tiles are counted from the last query back, so that what no tile divides is missing from the front, where a causal
    tile is shortest: the first query of a head's last item may be negative.
    """
    TILE: gl.constexpr = GROUPS * ROWS
    split = item % splits
    item = item // splits
    tiles = gl.cdiv(T, TILE)
    first_head = item // (section * tiles) * section
    rest = item - first_head * tiles
    width = gl.minimum(section, heads - first_head)
    row = rest // width
    head = first_head + rest - row * width
    blocks = gl.cdiv(S, BLOCK)
    start = 0
    first = gl.cdiv(T, ROWS) * ROWS - (row + 1) * TILE
    if CAUSAL:
        blocks = gl.minimum(gl.cdiv(first + TILE, BLOCK), blocks)
    else:
        start = blocks * split // splits
        blocks = blocks * (split + 1) // splits - start
    return head, first, start, blocks, split


# --- Softmax in registers -------------------------------------------------------------------------


@gluon.jit
def _sum_in_thread(p, ROWS: gl.constexpr, BLOCK: gl.constexpr):
    """Row sums over each thread's own columns; the four threads of a row are added once, after the last block."""
    return gl.sum(p.reshape([ROWS, BLOCK // 8, 4, 2]).permute((0, 2, 1, 3)).reshape([ROWS, 4, BLOCK // 4]), 2)


@gluon.jit
def _pack(p, ROWS: gl.constexpr, BLOCK: gl.constexpr, dtype: gl.constexpr):
    """Pairs of columns as one 32-bit register: 16-bit values carried around a loop are split and joined in every round.

    At head_dim 64 the loop shrinks from 479 to 414 instructions; on an H200, 16k causal, 474 TFLOP/s become 503.
    """
    low, high = p.reshape([ROWS, BLOCK // 2, 2]).split()
    if dtype == gl.bfloat16:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    return packed


@gluon.jit
def _unpack(packed, ROWS: gl.constexpr, BLOCK: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """The packed columns as a left operand of wgmma; no instruction is left of it."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    return gl.convert_layout(gl.join(low, high).reshape([ROWS, BLOCK]).to(dtype, bitcast=True), layout)


# --- Turns ----------------------------------------------------------------------------------------


@gluon.jit
def named_barrier(KIND: gl.constexpr, NUMBER: gl.constexpr):
    """Two consumers, 256 threads: sync waits for the other, arrive does not. Triton uses barriers 0 to 8."""
    gl.inline_asm_elementwise(
        f"bar.{KIND} {NUMBER}, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_turn(RING: gl.constexpr, G: gl.constexpr):
    """With RING, consumers issue Q K^T one after the other, so that one's softmax runs beside another's products.

    A named barrier for each consumer: this one waits, the one before it arrives.
    On an H200 worth 3 to 8% with three consumers (head_dim 64), nothing or less with two (head_dim 128).
    """
    if RING:
        named_barrier("sync", 9 + G)


@gluon.jit
def _pass_turn(RING: gl.constexpr, G: gl.constexpr):
    """To consumer G."""
    if RING:
        named_barrier("arrive", 9 + G)


# --- Kernel ---------------------------------------------------------------------------------------


@gluon.jit
def _producer(
    inputs, counter, state,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Takes tiles from the list and copies their queries, keys and values into shared memory."""
    q_desc, k_desc, v_desc = inputs
    buffers, slots, slots_ready, full, empty, sizes = state
    q_s, k_s, v_s, _o_s = buffers
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    H, H_kv, heads, section, T, S, splits = sizes
    items = heads * gl.cdiv(T, GROUPS * ROWS) * splits
    item = gl.program_id(0)
    n = 0  # tiles, and
    blocks_done = 0  # key blocks that this program has seen
    while item < items:
        following = next_item(counter)
        put_item(slots, slots_ready, n, item)
        head, first, start, blocks, _split = _tile(item, heads, section, T, S, splits, GROUPS, ROWS, BLOCK, CAUSAL)
        b = head // H
        h = head - b * H
        h_kv = h // (H // H_kv)
        for i in range(blocks):
            stage = blocks_done % STAGES
            phase = ((blocks_done // STAGES) & 1) ^ 1
            key = (start + blocks - 1 - i) * BLOCK
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [b, h_kv, key, 0], k_full.index(stage), k_s.index(stage))
            if i == 0:
                for g in gl.static_range(GROUPS):
                    mbarrier.wait(q_empty.index(g), (n & 1) ^ 1)
                    mbarrier.expect(q_full.index(g), q_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(q_desc, [b, h, first + g * ROWS, 0], q_full.index(g), q_s.index(g))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [b, h_kv, key, 0], v_full.index(stage), v_s.index(stage))
            blocks_done += 1
        n += 1
        item = following
    put_item(slots, slots_ready, n, -1)
    finish_list(counter)


@gluon.jit
def _next_block(
    c, acc, packed, maximum, total, q, k_s, v_s, full, empty, zeros, scale_log2, G: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    D: gl.constexpr, P_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Block c's scores and softmax, beside the product of block c - 1's P (packed) and V."""
    _q_full, k_full, v_full = full
    _q_empty, k_empty, v_empty = empty
    dtype: gl.constexpr = k_s.dtype
    stage = c % STAGES
    before = (c - 1) % STAGES
    p = _unpack(packed, ROWS, BLOCK, dtype, P_LAYOUT)
    mbarrier.wait(k_full.index(stage), (c // STAGES) & 1)
    _wait_for_turn(RING, G)
    k = k_s.index(stage).reshape([BLOCK, D])
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((c - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_s.index(before).reshape([BLOCK, D]), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    _pass_turn(RING, (G + 1) % GROUPS)
    mbarrier.arrive(k_empty.index(stage), count=1)
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale_log2)
    correction = gl.exp2(maximum - new_maximum)
    new_p = gl.exp2(scores * scale_log2 - new_maximum[:, None])
    total = total * gl.convert_layout(correction, gl.SliceLayout(1, total.type.layout))[:, None]
    total += _sum_in_thread(new_p, ROWS, BLOCK)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return acc, _pack(new_p, ROWS, BLOCK, dtype), new_maximum, total


@gluon.jit
def _consumer_tile(
    n, c, o_desc, lse_ptr, buffers, full, empty, b_out, h, lse_row, first, start, blocks, T, S, scale_log2,
    G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, ROWS: gl.constexpr,
    BLOCK: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """o and log-sum-exp of the ROWS queries from `first` on, over `blocks` >= 1 key blocks from block `start` on."""
    q_s, k_s, v_s, o_s = buffers
    q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    dtype: gl.constexpr = q_s.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    q = q_s.index(G).reshape([ROWS, D])
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    # The block with the diagonal and the end of the keys: the only one that needs a mask.
    stage = c % STAGES
    mbarrier.wait(q_full.index(G), n & 1)
    mbarrier.wait(k_full.index(stage), (c // STAGES) & 1)
    _wait_for_turn(RING, G)
    k = k_s.index(stage).reshape([BLOCK, D])
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    _pass_turn(RING, (G + 1) % GROUPS)
    mbarrier.arrive(k_empty.index(stage), count=1)
    first_key = (start + blocks - 1) * BLOCK
    visible = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, S_LAYOUT)) + (S - first_key)
    if CAUSAL:
        visible = gl.minimum(visible, rows + (1 - first_key))
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, S_LAYOUT))
    scores = gl.where(columns[None, :] < visible[:, None], scores, -float("inf"))
    maximum = gl.maximum(gl.max(scores, 1) * scale_log2, -1e30)  # finite: a row past T gives no NaN
    p = gl.exp2(scores * scale_log2 - maximum[:, None])
    total = _sum_in_thread(p, ROWS, BLOCK)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    packed = _pack(p, ROWS, BLOCK, dtype)
    for i in range(1, blocks):
        acc, packed, maximum, total = _next_block(
            c + i, acc, packed, maximum, total, q, k_s, v_s, full, empty, zeros, scale_log2, G,
            GROUPS, STAGES, RING, ROWS, BLOCK, D, P_LAYOUT, O_LAYOUT,
        )  # fmt: skip
    mbarrier.arrive(q_empty.index(G), count=1)
    last = c + blocks - 1
    stage = last % STAGES
    p = _unpack(packed, ROWS, BLOCK, dtype, P_LAYOUT)
    mbarrier.wait(v_full.index(stage), (last // STAGES) & 1)
    acc = warpgroup_mma(p, v_s.index(stage).reshape([BLOCK, D]), acc, is_async=True)
    row_total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S_LAYOUT))
    gl.store(lse_ptr + lse_row + rows, (maximum + gl.log2(row_total)) * _LN_2, mask=rows < T)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(stage), count=1)
    o = acc * gl.convert_layout(1.0 / row_total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    tma.store_wait(0)  # the tile before has left the buffer
    group_barrier()
    o_s.index(G).reshape([ROWS, D]).store(o.to(o_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b_out, h, first, 0], o_s.index(G))


@gluon.jit
def _consumer(
    G: gl.constexpr, o_desc, lse_ptr, scale_log2, state,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    D: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Rows G * ROWS to (G + 1) * ROWS of each tile."""
    buffers, slots, slots_ready, full, empty, sizes = state
    _q_full, k_full, v_full = full
    q_empty, k_empty, v_empty = empty
    H, _H_kv, heads, section, T, S, splits = sizes
    if G == GROUPS - 1:
        _pass_turn(RING, 0)
    n = 0
    c = 0
    item = get_item(slots, slots_ready, 0)
    while item >= 0:
        head, first, start, blocks, split = _tile(item, heads, section, T, S, splits, GROUPS, ROWS, BLOCK, CAUSAL)
        b = head // H
        first += G * ROWS
        own = blocks
        if CAUSAL:
            own = gl.minimum((first + ROWS - 1) // BLOCK + 1, blocks)
        if first < 0:
            own = 0
        for _ in range(blocks - own):  # blocks that other consumers need and this one does not
            stage = c % STAGES
            phase = (c // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            _wait_for_turn(RING, G)
            _pass_turn(RING, (G + 1) % GROUPS)
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(v_empty.index(stage), count=1)
            c += 1
        if own > 0:
            _consumer_tile(
                n, c, o_desc, lse_ptr, buffers, full, empty, split * (heads // H) + b, head - b * H,
                (split * heads + head) * T, first, start, own, T, S, scale_log2,
                G, GROUPS, STAGES, RING, ROWS, BLOCK, D, CAUSAL,
            )  # fmt: skip
        else:
            mbarrier.wait(_q_full.index(G), n & 1)
            mbarrier.arrive(q_empty.index(G), count=1)
        c += own
        n += 1
        item = get_item(slots, slots_ready, n)
    tma.store_wait(0)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


# Sizes are not specialized: a new length must not compile anew.
@gluon.jit(do_not_specialize=["H", "H_kv", "heads", "section", "T", "S", "splits"])
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, counter, scale_log2, H, H_kv, heads, section, T, S, splits,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    D: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """o and lse (splits, B, H, T), natural logarithms. Descriptors: (1, 1, ROWS or BLOCK, D) blocks of (B, H, T, D)."""
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout)
    o_s = gl.allocate_shared_memory(o_desc.dtype, [GROUPS, 1, 1, ROWS, D], o_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, D], v_desc.layout)
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slots_ready = barriers(2, 1)
    full = (barriers(GROUPS, 1), barriers(STAGES, 1), barriers(STAGES, 1))  # q, k, v
    empty = (barriers(GROUPS, 1), barriers(STAGES, GROUPS), barriers(STAGES, GROUPS))
    fence_async_shared()
    sizes = (H, H_kv, heads, section, T, S, splits)
    buffers = (q_s, k_s, v_s, o_s)
    state = (buffers, slots, slots_ready, full, empty, sizes)
    # Registers: the producer takes what the consumers leave of 64 Ki: 24 or 32 a thread.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_producer, ((q_desc, k_desc, v_desc), counter, state, GROUPS, STAGES, ROWS, BLOCK, CAUSAL)),
                (_consumer, (
                    gl.constexpr(0), o_desc, lse_ptr, scale_log2, state, GROUPS, STAGES, RING, ROWS, BLOCK, D, CAUSAL,
                )),
                (_consumer, (
                    gl.constexpr(1), o_desc, lse_ptr, scale_log2, state, GROUPS, STAGES, RING, ROWS, BLOCK, D, CAUSAL,
                )),
            ],
            [4, 4], [240, 240],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_producer, ((q_desc, k_desc, v_desc), counter, state, GROUPS, STAGES, ROWS, BLOCK, CAUSAL)),
                (_consumer, (
                    gl.constexpr(0), o_desc, lse_ptr, scale_log2, state, GROUPS, STAGES, RING, ROWS, BLOCK, D, CAUSAL,
                )),
                (_consumer, (
                    gl.constexpr(1), o_desc, lse_ptr, scale_log2, state, GROUPS, STAGES, RING, ROWS, BLOCK, D, CAUSAL,
                )),
                (_consumer, (
                    gl.constexpr(2), o_desc, lse_ptr, scale_log2, state, GROUPS, STAGES, RING, ROWS, BLOCK, D, CAUSAL,
                )),
            ],
            [4, 4, 4], [160, 160, 160],
        )  # fmt: skip


@triton.jit(do_not_specialize=["H", "T", "rows", "splits", "stride_b", "stride_h", "stride_t"])
def _combine_kernel(
    parts_ptr, lse_parts_ptr, o_ptr, lse_ptr, H, T, rows, splits, stride_b, stride_h, stride_t,
    D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Add what `splits` programs found for the same queries: the mean of their o, weighted by exp(lse).

    parts (splits, B, H, T, D) and their lse (splits, B, H, T) -> o (B, H, T, D), lse (B, H, T). rows: B * H * T.
    Strides in units of eight elements, of which Triton then knows that addresses are aligned.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < rows
    columns = tl.arange(0, D)
    maximum = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    for i in range(splits):
        maximum = tl.maximum(maximum, tl.load(lse_parts_ptr + i * rows + row, mask=inside, other=0.0))
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    acc = tl.full([BLOCK_Q, D], 0.0, tl.float32)
    for i in range(splits):
        weight = tl.exp(tl.load(lse_parts_ptr + i * rows + row, mask=inside, other=0.0) - maximum)
        part = tl.load(parts_ptr + (i * rows + row)[:, None] * D + columns[None, :], mask=inside[:, None], other=0.0)
        total += weight
        acc += weight[:, None] * part
    tl.store(lse_ptr + row, maximum + tl.log(total), mask=inside)
    head = row // T
    o = o_ptr + (head // H * stride_b + head % H * stride_h + row % T * stride_t) * 8
    tl.store(o[:, None] + columns[None, :], (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside[:, None])


# --- Launch ---------------------------------------------------------------------------------------

# By head dim: consumers, ring stages, whether they take turns, and keys of a block. FlashAttention-3's tiles. H200,
# Triton 3.6, causal, 16k tokens, TFLOP/s at 16384: head_dim 64 with two consumers of 240 registers 437, with three 520;
# 128 keys a block against 64: 305 and 318 at 1024, and ahead from 2048 on; five stages are within noise of four.
_TILES = {
    64: {"GROUPS": 3, "STAGES": 4, "RING": True, "BLOCK": 128},
    128: {"GROUPS": 2, "STAGES": 2, "RING": False, "BLOCK": 128},
}
_ELEMENT = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
_COMBINE_ROWS = 32
_L2_SHARE = 0.95  # of the L2 cache, for the keys and values of a section of heads


_descriptions: dict[tuple[Any, ...], dict[str, Any]] = {}
_REMEMBERED = 4096  # layouts of tensors


def tiles_of(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy unit needs to know to move (rows, columns) tiles of a (B, H, T, D) tensor of any TMA-able strides.

    Four dimensions, so that a tile at a head's end neither reads nor writes the next head. The stride of a dimension of
    length 1 may be any number; the unit wants a multiple of 16 bytes.
    """
    key = tensor.shape, tensor.stride(), tensor.dtype, rows, columns
    if key not in _descriptions:
        lengths = zip(tensor.shape, tensor.stride(), strict=True)
        strides = [*[stride if length > 1 else columns for length, stride in lengths][:-1], 1]
        block = [1, 1, rows, columns]
        layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENT[tensor.dtype])
        _describe(key, tensor, strides, block, layout)
    return _descriptor(tensor, key)


def pieces_of(vector: Tensor, length: int) -> TensorDescriptor:
    """The same for pieces of a contiguous (n,) tensor."""
    key = vector.shape, vector.dtype, length
    if key not in _descriptions:
        _describe(key, vector, [1], [length], gl.NVMMASharedLayout(0, 32, 1))
    return _descriptor(vector, key)


def _describe(key: tuple, tensor: Tensor, strides: list[int], block: list[int], layout: Any) -> None:
    """Remember a descriptor's attributes but for the tensor: TensorDescriptor's own checks are made once a layout."""
    known = vars(TensorDescriptor(tensor, list(tensor.shape), strides, block, layout)) | {"base": None}
    if len(_descriptions) >= _REMEMBERED:
        _descriptions.clear()
    _descriptions[key] = known


def _descriptor(tensor: Tensor, key: tuple) -> TensorDescriptor:
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(_descriptions[key], base=tensor)
    return descriptor


class Launcher:
    """Launches a kernel, past Triton's binding of its arguments where the compiled kernel is known.

    The binding costs the host several times the launch. What Triton compiles depends on the constants, on the tensors'
    dtypes and alignment, and on the integers that it specializes on; here these are none, and tensors are aligned, so
    that constants, dtype and device name the compiled kernel. Profilers' launch hooks run as ever.
    """

    def __init__(self, kernel: Any) -> None:
        """kernel: its constants come after its arguments."""
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: int, kind: tuple, arguments: tuple, constants: tuple) -> None:
        """kind: what tells the device and the tensors' dtypes."""
        key = kind, constants
        known = self.compiled.get(key)
        if known is None:
            self.compiled[key] = self.kernel[(grid,)](*arguments, *constants, num_warps=4)
        else:
            known[(grid, 1, 1)](*arguments, *constants)


_launch_forward, _launch_combine = Launcher(_forward_kernel), Launcher(_combine_kernel)


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv, which also runs within kernels, costs the host ten times as much."""
    return -(-a // b)


def in_eights(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a (B, H, T, D) tensor in units of eight elements."""
    return tuple(stride // 8 for stride in tensor.stride()[:3])


@functools.cache
def device_sizes(index: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of L2 cache."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.L2_cache_size


_counters: dict[tuple[int, int], Tensor] = {}


def list_counter(device: torch.device) -> Tensor:
    """Two int32 zeros, which each kernel leaves as zeros: a pair a stream, as two launches at once must not share them.

    A CUDA graph that is being captured gets a pair of its own and its zeroing: replays may run on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> o (B, H, T, D), lse (B, H, T) in float32, natural logarithms.

    lmsys.attention.paths says which inputs it takes.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    assert head_dim in HEAD_DIMS
    tile = _TILES[head_dim]
    processors, cache = device_sizes(q.device.index)
    tiles = batch * heads * ceil_div(q_len, tile["GROUPS"] * _ROWS)
    splits = (
        1  # programs that share a tile's keys, so that all multiprocessors have work: four key blocks each at least
    )
    if not causal:
        splits = max(1, min(processors // tiles, ceil_div(k_len, tile["BLOCK"]) // 4))
    o = q.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    target, lse_target = o, lse
    if splits > 1:
        target = q.new_empty(splits * batch, heads, q_len, head_dim, dtype=torch.float32)
        lse_target = q.new_empty(splits, batch, heads, q_len, dtype=torch.float32)
    head_bytes = 2 * k_len * head_dim * k.itemsize * kv_heads / heads
    section = max(1, min(batch * heads, 2 ** int(math.log2(max(1.0, _L2_SHARE * cache / head_bytes)))))
    with torch.cuda.device(q.device):
        _launch_forward(
            min(tiles * splits, processors), (q.device.index, q.dtype, target.dtype),
            (
                tiles_of(q, _ROWS, head_dim), tiles_of(k, tile["BLOCK"], head_dim),
                tiles_of(v, tile["BLOCK"], head_dim), tiles_of(target, _ROWS, head_dim),
                lse_target, list_counter(q.device), scale * math.log2(math.e),
                heads, kv_heads, batch * heads, section, q_len, k_len, splits,
            ),
            (tile["GROUPS"], tile["STAGES"], tile["RING"], _ROWS, tile["BLOCK"], head_dim, causal),
        )  # fmt: skip
        if splits > 1:
            rows = batch * heads * q_len
            _launch_combine(
                ceil_div(rows, _COMBINE_ROWS), (q.device.index, q.dtype),
                (target, lse_target, o, lse, heads, q_len, rows, splits, *in_eights(o)),
                (head_dim, _COMBINE_ROWS),
            )  # fmt: skip
    return o, lse
