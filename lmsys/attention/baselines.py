"""The peers that ours are measured against: torch's SDPA backends, FlexAttention and FlashAttention-4.

Each takes q (B, H, T, D), k and v (B, H_kv, S, D) and a top-left causal mask, and runs the implementation that its name
says or raises ValueError: no other backend steps in.

- torch_sdpa_flash, torch_sdpa_cudnn: torch.nn.functional.scaled_dot_product_attention with one backend allowed. Their
  causal mask is for T = S. With T < S the keys after the last query are cut off, which is exact; T > S is refused.
- torch_flex: torch.nn.attention.flex_attention (arXiv:2412.05496) under torch.compile.
- flash_attention_4: flash_attn.cute of the package flash-attn-4, CuTe kernels for compute capability 9.0 and later. Its
  causal mask aligns at the bottom right, which for T = S is the same, so T != S goes as in SDPA.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lmsys.attention.reference import own_code


def torch_sdpa_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """SDPA with the FlashAttention backend."""
    return _sdpa(q, k, v, causal, scale, SDPBackend.FLASH_ATTENTION, "torch_sdpa_flash")


def torch_sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """SDPA with the cuDNN backend."""
    return _sdpa(q, k, v, causal, scale, SDPBackend.CUDNN_ATTENTION, "torch_sdpa_cudnn")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, backend: SDPBackend, name: str) -> Tensor:
    if causal:
        k, v = _visible(q, k, v, name)
    grouped = q.shape[1] != k.shape[1]
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        got = f"q {tuple(q.shape)}, k {tuple(k.shape)}, {q.dtype} on {q.device}"
        raise ValueError(
            f"attention kernel '{name}': torch's backend takes no {got} here; its warnings say why"
        ) from error


def _visible(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The keys and values that a causal mask from the top left lets anyone see, as many as there are queries."""
    q_len, k_len = q.shape[2], k.shape[2]
    if q_len > k_len:
        raise ValueError(
            f"attention kernel '{name}': got causal with q_len {q_len} > k_len {k_len}; it takes q_len <= k_len"
        )
    if q_len == k_len:  # a slice would cost the backward pass a copy
        return k, v
    return k[:, :, :q_len], v[:, :, :q_len]


def torch_flex(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """FlexAttention, compiled for each shape and scale (the first call of each takes seconds)."""
    mask = _block_mask(q.shape[2], k.shape[2], q.device) if causal else None
    if torch.compiler.is_compiling():
        return _flex(q, k, v, mask, scale)
    return _compiled_flex(q.shape, k.shape, q.dtype, q.device, causal, scale)(q, k, v, mask, scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, scale: float | None) -> Tensor:
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled_flex(*kind: Any) -> Callable:
    """One compiled function for each kind of call."""
    return torch.compile(own_code(_flex), dynamic=False, fullgraph=True)


def _sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@functools.lru_cache(maxsize=64)
def _block_mask(q_len: int, k_len: int, device: torch.device) -> BlockMask:
    return create_block_mask(_sees, None, None, q_len, k_len, device=device)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """FlashAttention-4, compiled by its own compiler for each kind of call (the first call of each takes seconds)."""
    flash_attn_func = _flash_attention_4()
    if causal:
        k, v = _visible(q, k, v, "flash_attention_4")
    result = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, softmax_scale=scale)
    o = result[0] if isinstance(result, tuple) else result  # some releases also give the log-sum-exp
    return o.transpose(1, 2)


@functools.cache
def _flash_attention_4() -> Callable:
    from flash_attn.cute import flash_attn_func

    # Its compiler says so, for every kernel, of an argument of FlashAttention-4's own.
    warnings.filterwarnings("ignore", message=".*cannot be converted to a JitArgument", category=UserWarning)
    return flash_attn_func
