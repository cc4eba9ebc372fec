"""Attention that holds all scores: the oracle, the naive kernel, and the best plain PyTorch, eager and compiled.

Source: scaled dot-product attention, section 3.2.1 of "Attention Is All You Need" (arXiv:1706.03762):
softmax(Q K^T / sqrt(D)) V. All functions take q (..., H, T, D) and k, v (..., H_kv, S, D) with H a multiple of H_kv
(query head h reads key head h // (H / H_kv)). Causal masks align at the top left: query i sees keys j <= i. scale:
None is 1 / sqrt(D). Memory is quadratic: every function holds one or more (T, S) arrays a head.

How the three kernels differ:
- scaled_dot_prod_attention is the formula, an operation a line: keys and values repeated for grouped heads, then
  scores, scaled scores, masked scores and probabilities, each an array of its own.
- vectorized_torch makes the same product with fewer passes over memory: the scale goes into q, the mask is applied in
  place, and the query heads of a group are stacked as rows of one product, so that nothing is repeated.
- vectorized_torch_compiled is vectorized_torch under torch.compile, which fuses scale, mask and softmax. Where the
  compiler recognizes attention it may put torch's fused scaled_dot_product_attention in its place (inductor's
  fuse_attention patterns), so a fast time here is not proof of a fast naive attention.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def causal_mask(q_len: int, k_len: int, device: torch.device) -> Tensor:
    """(q_len, k_len) booleans, True where the key lies after the query and is hidden."""
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).triu(1)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle of all tests and benchmarks, computed in the dtype that it is given: call it with float64.

    Returns o (..., H, T, D), and lse (..., H, T), the natural logarithm of each row's sum of exponentials.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = repeat_heads(q, k), repeat_heads(q, v)
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        scores = scores.masked_fill(causal_mask(q.shape[-2], k.shape[-2], q.device), -math.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse[..., None]) @ v, lse


def repeat_heads(q: Tensor, kv: Tensor) -> Tensor:
    """Keys or values (..., H_kv, S, D) with each head repeated for the query heads that read it: (..., H, S, D)."""
    if q.ndim < 3 or q.shape[-3] == kv.shape[-3]:
        return kv
    return kv.repeat_interleave(q.shape[-3] // kv.shape[-3], -3)


def scaled_dot_prod_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None
) -> Tensor:
    """The formula, an operation a line. q: (..., H, T, D), k, v: (..., H_kv, S, D) -> (..., H, T, D)."""
    k, v = repeat_heads(q, k), repeat_heads(q, v)
    scores = q @ k.transpose(-2, -1)
    scores = scores / math.sqrt(q.shape[-1]) if scale is None else scores * scale
    if causal:
        scores = scores.masked_fill(causal_mask(q.shape[-2], k.shape[-2], q.device), -math.inf)
    probabilities = torch.softmax(scores, -1)
    return probabilities @ v


def vectorized_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """Two batched products and a softmax with as few passes as eager PyTorch needs. Shapes as above."""
    heads, q_len, head_dim = q.shape[-3:]
    kv_heads, k_len = k.shape[-3:-1]
    scale = head_dim**-0.5 if scale is None else scale
    rows = (q * scale).reshape(*q.shape[:-3], kv_heads, heads // kv_heads * q_len, head_dim)
    scores = rows @ k.transpose(-2, -1)  # (..., H_kv, H / H_kv * T, S)
    if causal:
        scores.unflatten(-2, (-1, q_len)).masked_fill_(causal_mask(q_len, k_len, q.device), -math.inf)
    return (torch.softmax(scores, -1) @ v).reshape(q.shape)


def vectorized_torch_compiled(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None
) -> Tensor:
    """vectorized_torch under torch.compile, compiled for each shape and scale, which takes seconds."""
    if torch.compiler.is_compiling():  # already inside a compiled region, which compiles this too
        return vectorized_torch(q, k, v, causal, scale)
    return _compiled(q.shape, k.shape, q.dtype, q.device, scale)(q, k, v, causal, scale)


@functools.cache
def _compiled(*kind: Any) -> Callable:
    """One compiled function for each kind of call."""
    return torch.compile(own_code(vectorized_torch), dynamic=False, fullgraph=True)


def own_code(function: types.FunctionType) -> types.FunctionType:
    """The same function with a code object of its own.

    Dynamo counts recompilations by code object and, past eight, runs the function uncompiled without a word. A function
    compiled for many shapes therefore needs one a shape (and fullgraph=True, with which Dynamo raises instead).
    """
    code, name = function.__code__.replace(), function.__name__
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
