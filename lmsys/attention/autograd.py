"""What the autograd functions of the FlashAttention kernels share: single heads, and what is saved for the backward.

q: (B, T, D) and k, v: (B, S, D), or q: (B, H, T, D) and k, v: (B, H_kv, S, D). The log-sum-exp is (B, T) or (B, H, T).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor


def forward(
    ctx: Any, launch: Callable, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, *options: Any
) -> Tensor:
    """o of launch(q, k, v, causal, scale, *options), which takes tensors with heads and returns o and the log-sum-exp.

    q, k, v, o and the log-sum-exp are saved. scale: None is 1 / sqrt(D).
    """
    options = causal, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, *options
    if q.ndim == 4:
        o, lse = launch(q, k, v, *options)
    else:
        o, lse = [t.squeeze(1) for t in launch(*[t.unsqueeze(1) for t in (q, k, v)], *options)]
    ctx.save_for_backward(q, k, v, o, lse)
    ctx.options = options
    return o


def backward(ctx: Any, launch: Callable, do: Tensor) -> tuple[Tensor | None, ...]:
    """dq, dk, dv of launch(q, k, v, o, lse, do, *options), and None for each option."""
    tensors = (*ctx.saved_tensors, do)
    if do.ndim == 4:
        gradients = launch(*tensors, *ctx.options)
    else:
        gradients = [t.squeeze(1) for t in launch(*[t.unsqueeze(1) for t in tensors], *ctx.options)]
    return (*gradients, *[None] * len(ctx.options))
