"""Two forward kernels on the way from portable Triton to the Hopper path, for notebooks/flash_attention.ipynb.

Source: FlashAttention-2 (arXiv:2307.08691), algorithm 1, and for the second FlashAttention-3 (arXiv:2407.08608),
section 3.1. Each differs from the step before it in one thing, so the difference of their times is that thing's worth:
- tma_forward: plain Triton as in flash_triton, but tiles come and go through tensor descriptors. On Hopper that is the
  TMA unit: one thread asks for a whole tile, and no register holds an address. Elsewhere these are ordinary loads.
- specialized_forward: Gluon, sm_90. A group of warps only loads, into a ring of buffers guarded by barriers; two groups
  of four warps with 64 queries each only compute. Every product is waited for before the next instruction, as in
  FlashAttention-3's figure 1: one group's softmax overlaps with the other's products, nothing inside a group.
flash_hopper goes on from there: the next block's scores are computed while this block's values are multiplied.

Limits: forward only, and nothing here is tuned further than its tile. Any lengths >= 1 and strides that descriptors
take: the last 1, the others and the base multiples of 16 bytes.

Legend: B batch, H heads, H_kv key heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# isort: off
from lmsys.attention.flash_triton import INTERPRETED  # first: where there is no GPU it turns the interpreter on

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# isort: on

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_MAX, _SUM = tl.standard._elementwise_max, tl.standard._sum_combine  # see flash_triton
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.7 renamed it

SPECIALIZED_HEAD_DIMS = (64, 128)


# --- TMA: plain Triton with tensor descriptors ----------------------------------------------------


@triton.jit
def _tma_attend(
    acc, total, maximum, q, k_desc, v_desc, batch, kv_head, start, end, q_rows, S, scale_log2,
    D_PAD: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles in [start, end)."""
    for j in tl.range(start, end, BLOCK_K):
        k = k_desc.load([batch, kv_head, j, 0]).reshape(BLOCK_K, D_PAD)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:  # keys past S come as zeros, whose scores are not -inf
            keys = j + tl.arange(0, BLOCK_K)
            visible = (keys < S)[None, :]
            if CAUSAL:
                visible = visible & (q_rows[:, None] >= keys[None, :])
            scores = tl.where(visible, scores, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.reduce(scores, 1, _MAX) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - new_maximum[:, None])
        correction = tl.math.exp2(maximum - new_maximum)
        total = total * correction + tl.reduce(p, 1, _SUM)
        acc = acc * correction[:, None]
        v = v_desc.load([batch, kv_head, j, 0]).reshape(BLOCK_K, D_PAD)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        maximum = new_maximum
    return acc, total, maximum


@triton.jit
def _tma_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, scale, H, H_kv, T, S,
    D_PAD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One query tile of one head. Descriptors have four dimensions, so no tile reaches into the next head."""
    tiles = (T + BLOCK_Q - 1) // BLOCK_Q
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # longest rows first
    batch, head = row // H, row % H
    kv_head = head // (H // H_kv)
    first = tile * BLOCK_Q
    q_rows = first + tl.arange(0, BLOCK_Q)

    full = S // BLOCK_K * BLOCK_K  # keys below are in tiles without a mask
    end = S
    if CAUSAL:
        full = tl.minimum(full, (first + 1) // BLOCK_K * BLOCK_K)
        end = tl.minimum(end, first + BLOCK_Q)
    q = q_desc.load([batch, head, first, 0]).reshape(BLOCK_Q, D_PAD)
    acc = tl.full([BLOCK_Q, D_PAD], 0.0, tl.float32)
    total = tl.full([BLOCK_Q], 0.0, tl.float32)
    maximum = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    scale_log2 = scale * _LOG2_E
    acc, total, maximum = _tma_attend(
        acc, total, maximum, q, k_desc, v_desc, batch, kv_head, 0, full, q_rows, S, scale_log2,
        D_PAD, BLOCK_K, CAUSAL, False, PRECISION,
    )  # fmt: skip
    acc, total, maximum = _tma_attend(
        acc, total, maximum, q, k_desc, v_desc, batch, kv_head, full, end, q_rows, S, scale_log2,
        D_PAD, BLOCK_K, CAUSAL, True, PRECISION,
    )  # fmt: skip
    lse = (maximum + tl.math.log2(total)) * _LN_2
    tl.store(lse_ptr + row.to(tl.int64) * T + q_rows, lse, mask=q_rows < T)
    o = (acc / total[:, None]).to(o_desc.dtype)
    o_desc.store([batch, head, first, 0], o.reshape(1, 1, BLOCK_Q, D_PAD))


# (BLOCK_Q, BLOCK_K, warps, stages) by D_PAD. On an H200, bf16, causal, heads x head_dim 2048, a prototype with these
# tiles reached 373 (64) and 433 (128) TFLOP/s at 16,384 tokens; this one 318 (64) at 4 x 4,096 tokens.
_TMA_TILES = {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)}
_TMA_TILES_F32 = {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (16, 16, 4, 1)}
_TMA_TILE_INTERPRETED = (32, 32, 4, 1)


def tma_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> o (B, H, T, D), lse (B, H, T) in float32."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    d_pad = max(16, triton.next_power_of_2(q.shape[3]))
    tiles = _TMA_TILES_F32 if q.dtype == torch.float32 else _TMA_TILES
    block_q, block_k, warps, stages = _TMA_TILE_INTERPRETED if INTERPRETED else tiles[max(64, d_pad)]

    def descriptor(t: Tensor, rows: int) -> Any:
        return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, rows, d_pad])

    precision = "tf32x3" if q.dtype == torch.float32 and not INTERPRETED else "ieee"
    constants = {"D_PAD": d_pad, "CAUSAL": causal, "PRECISION": precision, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    return _launch(_tma_kernel, descriptor, q, k, v, block_q, block_k, **constants, num_warps=warps, num_stages=stages)


def _launch(
    kernel: Any, descriptor: Callable, q: Tensor, k: Tensor, v: Tensor, rows: int, keys: int, groups: int = 1, **options
) -> tuple[Tensor, Tensor]:
    """o and lse of a program for each groups * rows queries of a head. descriptor(tensor, rows of a tile)."""
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):
        kernel[(triton.cdiv(q.shape[2], groups * rows) * q.shape[0] * q.shape[1],)](
            descriptor(q, rows), descriptor(k, keys), descriptor(v, keys), descriptor(o, rows), lse,
            1 / math.sqrt(q.shape[3]), q.shape[1], k.shape[1], q.shape[2], k.shape[2], **options,
        )  # fmt: skip
    return o, lse


# --- Warp specialization: Gluon, nothing overlapped inside a group ----------------------------------


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, full, empty, batch, head, kv_head, first, blocks,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The loading warps: the queries once, then the key blocks from the last to the first, as buffers become free."""
    mbarrier.expect(q_full, GROUPS * q_desc.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_desc, [batch, head, first + group * ROWS, 0], q_full, q_smem.index(group))
    for i in range(blocks):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)  # the first round finds every buffer free
        mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        key = (blocks - 1 - i) * BLOCK_K
        tma.async_copy_global_to_shared(k_desc, [batch, kv_head, key, 0], full.index(stage), k_smem.index(stage))
        tma.async_copy_global_to_shared(v_desc, [batch, kv_head, key, 0], full.index(stage), v_smem.index(stage))


@gluon.jit
def _consume_block(
    acc, total, maximum, q, k_smem, v_smem, full, empty, i, visible, scale_log2, MASKED: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The i-th key block: product, wait, softmax, product, wait. visible: (ROWS) keys of it that each query sees."""
    s_layout: gl.constexpr = maximum.type.layout.parent
    o_layout: gl.constexpr = acc.type.layout
    stage = i % STAGES
    mbarrier.wait(full.index(stage), (i // STAGES) & 1)
    k = k_smem.index(stage).reshape([BLOCK_K, D]).permute((1, 0))
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
    scores = hopper.warpgroup_mma(q, k, zeros, use_acc=False)
    if MASKED:
        columns = gl.arange(0, BLOCK_K, gl.SliceLayout(0, s_layout))
        scores = gl.where(columns[None, :] < visible[:, None], scores, -float("inf"))
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_maximum[:, None])
    correction = gl.exp2(maximum - new_maximum)
    total = total * correction + gl.sum(p, 1)
    acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, o_layout))[:, None]
    p = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
    acc = hopper.warpgroup_mma(p, v_smem.index(stage).reshape([BLOCK_K, D]), acc)
    mbarrier.arrive(empty.index(stage), count=1)
    return acc, total, new_maximum


@gluon.jit
def _consume(
    GROUP: gl.constexpr, o_desc, lse_ptr, q_smem, k_smem, v_smem, q_full, full, empty,
    batch, head, lse_row, first, blocks, T, S, scale_log2, CAUSAL: gl.constexpr,
    STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """One computing group of warps: ROWS queries against all blocks, then o and lse."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q_rows = first + GROUP * ROWS + gl.arange(0, ROWS, row_layout)
    maximum = gl.full([ROWS], -float("inf"), gl.float32, row_layout)
    total = gl.zeros([ROWS], gl.float32, row_layout)
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    q = q_smem.index(GROUP).reshape([ROWS, D])
    # The block taken first ends with the keys or holds the diagonal of both groups; every query sees a key of it.
    last = (blocks - 1) * BLOCK_K
    visible = gl.full([ROWS], 0, gl.int32, row_layout) + (S - last)
    if CAUSAL:
        visible = gl.minimum(visible, q_rows + 1 - last)
    mbarrier.wait(q_full, 0)
    acc, total, maximum = _consume_block(
        acc, total, maximum, q, k_smem, v_smem, full, empty, 0, visible, scale_log2, True, STAGES, ROWS, BLOCK_K, D
    )
    for i in range(1, blocks):
        acc, total, maximum = _consume_block(
            acc, total, maximum, q, k_smem, v_smem, full, empty, i, visible, scale_log2, False, STAGES, ROWS, BLOCK_K, D
        )
    gl.store(lse_ptr + lse_row + q_rows, (maximum + gl.log2(total)) * _LN_2, mask=q_rows < T)
    o = acc / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    _barrier()  # all four warps are done with these queries: their buffer takes the output
    q.store(o.to(o_desc.dtype))
    hopper.fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [batch, head, first + GROUP * ROWS, 0], q_smem.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def _specialized_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, scale, H, H_kv, T, S,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Two groups of ROWS queries of one head; one program a tile. Needs 2 * ROWS = BLOCK_K: see _consume."""
    GROUPS: gl.constexpr = 2
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    hopper.fence_async_shared()

    tiles = gl.cdiv(T, GROUPS * ROWS)
    tile, row = gl.program_id(0) % tiles, gl.program_id(0) // tiles
    blocks = gl.cdiv(S, BLOCK_K)
    if CAUSAL:
        tile = tiles - 1 - tile  # longest rows first
        blocks = gl.minimum(blocks, tile + 1)
    batch, head = row // H, row % H
    kv_head = head // (H // H_kv)
    first = tile * (GROUPS * ROWS)
    lse_row = row.to(gl.int64) * T
    scale_log2 = scale * _LOG2_E
    gl.warp_specialize(
        [
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, full, empty,
                batch, head, kv_head, first, blocks, GROUPS, STAGES, ROWS, BLOCK_K,
            )),
            (_consume, (
                gl.constexpr(0), o_desc, lse_ptr, q_smem, k_smem, v_smem, q_full, full, empty,
                batch, head, lse_row, first, blocks, T, S, scale_log2, CAUSAL, STAGES, ROWS, BLOCK_K, D,
            )),
            (_consume, (
                gl.constexpr(1), o_desc, lse_ptr, q_smem, k_smem, v_smem, q_full, full, empty,
                batch, head, lse_row, first, blocks, T, S, scale_log2, CAUSAL, STAGES, ROWS, BLOCK_K, D,
            )),
        ],
        [4, 4], [240, 240],
    )  # fmt: skip


_STAGES = {64: 4, 128: 2}  # what fits 227 KiB of shared memory beside the queries: 144 and 160 KiB
_ROWS, _BLOCK_K = 64, 128


def specialized_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D), 16-bit floats -> o (B, H, T, D), lse (B, H, T) in float32. sm_90."""
    from lmsys.attention.flash_hopper import tiles_of

    head_dim = q.shape[3]
    constants = {"CAUSAL": causal, "STAGES": _STAGES[head_dim], "ROWS": _ROWS, "BLOCK_K": _BLOCK_K, "D": head_dim}

    def descriptor(t: Tensor, rows: int) -> Any:
        return tiles_of(t, rows, head_dim)

    return _launch(_specialized_kernel, descriptor, q, k, v, _ROWS, _BLOCK_K, 2, **constants, num_warps=4)


def no_tma(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why tma_forward does not run there as it should, or None: without TMA its descriptors are ordinary loads."""
    if device.type == "cpu":
        runs = INTERPRETED and dtype != torch.bfloat16
        return None if runs else "on a CPU it needs Triton's interpreter, and float32 or float16"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        return f"needs a GPU with TMA (compute capability 9.0); {torch.cuda.get_device_name(device)} has none"
    if head_dim * dtype.itemsize % 16 != 0 or head_dim > 256:
        return f"head_dim {head_dim}: a row must be a multiple of 16 bytes and at most 256 numbers"
    return None


def no_specialization(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why specialized_forward does not run there, or None."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU (compute capability 9.0)"
    if INTERPRETED:
        return "Gluon does not run in Triton's interpreter"
    if dtype not in (torch.float16, torch.bfloat16) or head_dim not in SPECIALIZED_HEAD_DIMS:
        return f"takes float16 and bfloat16 with head_dim {SPECIALIZED_HEAD_DIMS}"
    return None
