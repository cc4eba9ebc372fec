"""FlashAttention-2 in plain PyTorch, forward and backward, tile by tile: to read before the Triton kernels.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (arXiv:2307.08691),
algorithm 1 (forward) and algorithm 2 (backward). As there, no (T, S) array exists: the forward pass keeps a running
maximum and sum a row, and saves one number a row, the log-sum-exp L, from which the backward pass makes the
probabilities again.

Differences: the tiles of all batches and heads are worked on at once, as batched products; tiles above the causal
diagonal are skipped; the query heads of a group are stacked as rows of one tile, so dK and dV sum over them.
Products run in the inputs' dtype, sums and the softmax in float32 (float64 for float64).

Limits: a readable version, not a fast one: each tile is a handful of small PyTorch operations.

Legend: B batch, H heads, H_kv key heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsys.attention import autograd

# A tile's side. On a GPU each operation on a tile is a launch, so few large tiles: on an H200, causal, bf16, batch 4,
# 12 heads, head_dim 64, 16,384 tokens, forward takes 1002 ms with 128, 267 with 256, 130 with 512, 111 with 1024 and
# 110 with 2048, at a peak with its backward of 1315, 1315, 1330, 1726 and 4054 MiB. On a CPU 128 stays in the cache.
TILE = {"cpu": 128, "cuda": 512}


class FlashAttentionTorch(torch.autograd.Function):
    """apply(q, k, v, is_causal=False, scale=None, q_tile=None, k_tile=None).

    Shapes, and what is saved, as in lmsys.attention.autograd. q_tile, k_tile: rows of a tile; None: TILE of the device.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, scale: float | None = None,
        q_tile: int | None = None, k_tile: int | None = None,
    ) -> Tensor:  # fmt: skip
        tiles = (TILE[q.device.type] if tile is None else tile for tile in (q_tile, k_tile))
        return autograd.forward(ctx, flash_forward, q, k, v, is_causal, scale, *tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return autograd.backward(ctx, flash_backward, do)


def flash_attention_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> (B, H, T, D)."""
    return FlashAttentionTorch.apply(q, k, v, causal, scale)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, q_tile: int, k_tile: int
) -> tuple[Tensor, Tensor]:
    """Algorithm 1. q: (B, H, T, D), k, v: (B, H_kv, S, D) -> o (B, H, T, D), lse (B, H, T)."""
    q_len, k_len = q.shape[2], k.shape[2]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=_accumulator(q), device=q.device)
    for i in range(0, q_len, q_tile):
        q_i, rows = _stack(q[:, :, i : i + q_tile], k.shape[1]), min(q_tile, q_len - i)
        maximum = torch.full((*q_i.shape[:-1], 1), -math.inf, dtype=lse.dtype, device=q.device)
        total = torch.zeros_like(maximum)
        o_i = torch.zeros(q_i.shape, dtype=lse.dtype, device=q.device)
        for j in range(0, min(k_len, i + q_tile) if causal else k_len, k_tile):
            k_j, v_j = k[:, :, j : j + k_tile], v[:, :, j : j + k_tile]
            scores = _scores(q_i, k_j, scale, i, j, rows, causal)
            new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            p = torch.exp(scores - new_maximum)
            correction = torch.exp(maximum - new_maximum)
            total = correction * total + p.sum(-1, keepdim=True)
            o_i = correction * o_i + p.to(q.dtype) @ v_j
            maximum = new_maximum
        o[:, :, i : i + q_tile] = _unstack(o_i / total, rows)
        lse[:, :, i : i + q_tile] = _unstack(maximum + torch.log(total), rows).squeeze(-1)
    return o, lse


def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor,
    causal: bool, scale: float, q_tile: int, k_tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Algorithm 2: dq, dk, dv, shaped as q, k, v. do: (B, H, T, D), the gradient of o; lse: (B, H, T)."""
    q_len, k_len = q.shape[2], k.shape[2]
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    delta = (do.to(lse.dtype) * o).sum(-1, keepdim=True)  # D in the paper: rowsum(dO o O)
    for j in range(0, k_len, k_tile):
        k_j, v_j = k[:, :, j : j + k_tile], v[:, :, j : j + k_tile]
        dk_j, dv_j = (torch.zeros(k_j.shape, dtype=lse.dtype, device=k.device) for _ in range(2))
        for i in range(j // q_tile * q_tile if causal else 0, q_len, q_tile):
            tile, rows = slice(i, i + q_tile), min(q_tile, q_len - i)
            q_i, do_i, delta_i, lse_i = (_stack(t[:, :, tile], k.shape[1]) for t in (q, do, delta, lse.unsqueeze(-1)))
            p = torch.exp(_scores(q_i, k_j, scale, i, j, rows, causal) - lse_i)
            dv_j += p.to(q.dtype).transpose(-2, -1) @ do_i
            dp = do_i @ v_j.transpose(-2, -1)
            ds = (p * (dp - delta_i)).to(q.dtype)
            dq[:, :, tile] += _unstack(ds @ k_j, rows)
            dk_j += ds.transpose(-2, -1) @ q_i
        dk[:, :, j : j + k_tile] = dk_j * scale
        dv[:, :, j : j + k_tile] = dv_j
    return (dq * scale).to(q.dtype), dk, dv


def _scores(q_i: Tensor, k_j: Tensor, scale: float, i: int, j: int, rows: int, causal: bool) -> Tensor:
    """Scaled scores (B, H_kv, H / H_kv * rows, keys) of the tile from query i and key j on; hidden ones -inf."""
    scores = (q_i @ k_j.transpose(-2, -1)).to(_accumulator(q_i)) * scale
    keys = k_j.shape[2]
    if causal and j + keys - 1 > i:
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=q_i.device).triu(i - j + 1)
        scores.unflatten(-2, (-1, rows)).masked_fill_(hidden, -math.inf)
    return scores


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _stack(t: Tensor, kv_heads: int) -> Tensor:
    """(B, H, rows, D) -> (B, H_kv, H / H_kv * rows, D): the query heads of a group below each other."""
    return t.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _unstack(t: Tensor, rows: int) -> Tensor:
    """The inverse of _stack."""
    return t.unflatten(2, (-1, rows)).flatten(1, 2)
