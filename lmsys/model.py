"""TransformerLM: a decoder-only Transformer language model. Pre-norm, RMSNorm, RoPE, SwiGLU, no biases, no dropout.

Sources: pre-norm, Xiong et al., arXiv 2002.04745; RMSNorm, Zhang and Sennrich, arXiv 1910.07467, eq. 4; RoPE, Su et al.
(RoFormer), arXiv 2104.09864, eq. 15 and 34, pairs interleaved; SwiGLU, Shazeer, arXiv 2002.05202, eq. 6. The shape and
the initialization are those of Stanford CS336, assignment 1; Q, K and V are one matrix here, rows in that order.
Parameters are fp32; bf16 is autocast's business. Attention is any kernel of lmsys.attention, chosen by name.

Legend: B batch, T tokens, V vocabulary, H heads, D head_dim, d = d_model = H D, f = d_ff.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lmsys.attention import check_support, get_kernel
from lmsys.config import ModelConfig
from lmsys.step.reference import rms_norm, rotate


class Linear(nn.Module):
    """y = x W^T without a bias. Weights: normal of variance 2 / (in + out), truncated at three standard deviations."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        _truncated_normal(self.weight, math.sqrt(2 / (in_features + out_features)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """A vector for each token id, in output_dtype if that is set. Weights: normal, truncated at three std."""

    def __init__(self, vocab_size: int, d_model: int, std: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.output_dtype: torch.dtype | None = None
        _truncated_normal(self.weight, std)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.output_dtype or self.weight.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension, computed in fp32, returned in the dtype of x."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps
        self.function: Callable[..., Tensor] = rms_norm  # lmsys.step.blocks has another

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """RoPE: pair i of a vector at position t is rotated by the angle t theta^(-2i/D). Pairs are neighbours (2i, 2i+1).

    The tables, (context_length, D/2) in fp32, are buffers that no checkpoint holds. Cast to bf16 they would no longer
    tell far positions apart.
    """

    def __init__(self, head_dim: int, context_length: int, theta: float = 10_000.0):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(context_length, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x: (..., T, D), rotated. positions: (..., T) int, 0 to T - 1 where not given."""
        if positions is None:
            return rotate(x, self.cos[: x.shape[-2]], self.sin[: x.shape[-2]])
        return rotate(x, self.cos[positions], self.sin[positions])


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with RoPE on queries and keys."""

    def __init__(self, config: ModelConfig, kernel: str):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rotated_heads: Callable[..., tuple[Tensor, ...]] | None = None  # lmsys.step.rope's, where fuse() sets it
        self.set_kernel(kernel)
        self.qkv_proj = Linear(config.d_model, 3 * config.d_model)
        _truncated_normal(self.qkv_proj.weight, config.d_model**-0.5)  # three square matrices, each at its own scale
        self.output_proj = Linear(config.d_model, config.d_model)

    def set_kernel(self, name: str) -> None:
        """Load the kernel here and not in forward, so that a compiled block is one graph with the kernel in it."""
        self.kernel, self.attend = name, get_kernel(name).load()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor] | None = None) -> Tensor:
        """x: (B, T, d), likewise returned. cos, sin: (T, D/2) or (B, 1, T, D/2). attend: (q, k, v, causal) -> y."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if self.rotated_heads is not None and cos.ndim == 2:
            q, k, v = self.rotated_heads(qkv, cos, sin)
        else:
            heads = qkv.permute(2, 0, 3, 1, 4)
            q, k, v = *rotate(heads[:2], cos, sin).unbind(0), heads[2]  # (B, H, T, D) each
        y = (attend or self.attend)(q, k, v, True)
        return self.output_proj(y.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """W2 (silu(W1 x) * W3 x). With lmsys.step.gate, W1 and W3 are one matmul, put together in forward."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gated_product: Callable[..., Tensor] | None = None  # lmsys.step.gate's, where fuse() sets it
        self.w1 = Linear(d_model, d_ff)
        self.w2 = Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated_product is not None:
            return self.gated_product(F.linear(x, torch.cat((self.w1.weight, self.w3.weight))), self.w2.weight)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: ModelConfig, kernel: str):
        super().__init__()
        self.ln1 = RMSNorm(config.d_model)
        self.attn = CausalSelfAttention(config, kernel)
        self.ln2 = RMSNorm(config.d_model)
        self.ffn = SwiGLU(config.d_model, config.d_ff)
        self.function: Callable[..., Tensor] | None = None  # in place of forward, where lmsys.step.blocks sets it

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor] | None = None) -> Tensor:
        if self.function is not None and attend is None:
            return self.function(self, x, cos, sin)
        x = x + self.attn(self.ln1(x), cos, sin, attend)
        return x + self.ffn(self.ln2(x))


class TransformerLM(nn.Module):
    """Token ids (B, T) -> next-token logits (B, T, V).

    A tied head is the embedding itself, which then starts at standard deviation 1 / sqrt(d) instead of 1, so that the
    first logits have unit variance and the first loss is near ln V.
    """

    def __init__(self, config: ModelConfig, *, attention_kernel: str = "vectorized_torch"):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: give it the tokenizer's vocabulary size")
        self.config = config
        self.compiled = False
        self.rounded_loss = False  # gradients of the fused loss wait in their own dtypes
        self.checkpointing: tuple[int | None, bool] = (None, False)
        std = config.d_model**-0.5 if config.tie_embeddings else 1.0
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, std)
        self.rope = RotaryEmbedding(config.head_dim, config.context_length, config.rope_theta)
        self.layers = nn.ModuleList(TransformerBlock(config, attention_kernel) for _ in range(config.num_layers))
        self.ln_final = RMSNorm(config.d_model)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """ids: (B, T) int64 -> logits (B, T, V), in the autocast dtype where autocast is on.

        targets: (B, T) int64; given, the result is their mean cross-entropy in fp32, and no logits are kept.
        Raises:
            ValueError: T beyond context_length; a device or dtype that the attention kernel does not take; on the CPU,
                an id outside the vocabulary, for which a GPU would have to be waited for.
        """
        hidden = self.hidden(ids)
        if targets is None:
            return self.logits(hidden)
        from lmsys.step.loss import linear_cross_entropy

        return linear_cross_entropy(hidden, self.head, targets, rounded=self.rounded_loss)

    def hidden(
        self, ids: Tensor, *, positions: Tensor | None = None, attend: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """ids: (B, T) -> what the head reads, (B, T, d).

        positions: (B, T) int of the tokens in their texts; 0 to T - 1 where not given.
        attend: (layer, q, k, v, causal) -> y in place of the kernels, as a key-value cache has it.
        """
        length = ids.shape[-1]
        if length > self.config.context_length:
            raise ValueError(f"{length} tokens are more than the model's context_length {self.config.context_length}")
        if not torch.compiler.is_compiling():
            self._check(ids)
        x = self.token_embeddings(ids)
        where = slice(length) if positions is None else positions.unsqueeze(1)  # the same for all heads
        cos, sin = self.rope.cos[where], self.rope.sin[where]
        if attend is not None:
            for index, layer in enumerate(self.layers):
                x = layer(x, cos, sin, partial(attend, index))
            return self.ln_final(x)
        size, nested = self.checkpointing
        if size is None or not torch.is_grad_enabled():
            x = _run(self.layers, x, cos, sin)
        elif nested:
            x = _run_halves(self.layers, x, cos, sin, size)
        else:
            for start in range(0, len(self.layers), size):
                x = _recomputed(_run, self.layers[start : start + size], x, cos, sin)
        return self.ln_final(x)

    def _check(self, ids: Tensor) -> None:
        """Once a forward pass: ValueError unless the kernel takes device and dtype, and the ids are tokens."""
        device, config = ids.device, self.config
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.token_embeddings.weight.dtype
        shape = {"head_dim": config.head_dim, "heads": config.num_heads, "backward": torch.is_grad_enabled()}
        check_support(self.layers[0].attn.kernel, device=device, dtype=dtype, **shape)
        if device.type == "cpu" and ids.numel():
            low, high = (int(extreme) for extreme in ids.aminmax())
            if low < 0 or high >= config.vocab_size:
                wrong, fix = low if low < 0 else high, "use the tokenizer that the model was made for"
                raise ValueError(f"token id {wrong} is outside the model's vocabulary of {config.vocab_size}; {fix}")

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., V)."""
        return F.linear(hidden, self.head)

    @property
    def head(self) -> nn.Parameter:
        """(V, d): the last matrix, or, tied, the embedding."""
        return (self.token_embeddings if self.lm_head is None else self.lm_head).weight

    def set_attention_kernel(self, name: str) -> None:
        for layer in self.layers:
            layer.attn.set_kernel(name)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile each block at its first call, with torch.compile's options. One compilation serves them all."""
        for layer in self.layers:
            layer.compile(**options)
        self.compiled = True

    def fuse(
        self, *, rope: bool = False, gate: bool = False, residual_dtype: torch.dtype | None = None
    ) -> TransformerLM:
        """Choose how the step computes the same model; returns the model.

        rope: rotation and the splitting of Q, K and V as one kernel each way. gate: the feed-forward layer's W1 and W3
        as one matmul, then one kernel each way. residual_dtype: from block to block; None: the embedding's.
        """
        rotated_heads = gated_product = None
        if rope:
            from lmsys.step.rope import rotated_heads
        if gate:
            from lmsys.step.gate import gated_product
        self.token_embeddings.output_dtype = residual_dtype
        for layer in self.layers:
            layer.attn.rotated_heads, layer.ffn.gated_product = rotated_heads, gated_product
        return self

    def checkpoint_blocks(self, size: int | None, *, nested: bool = False) -> None:
        """Activation checkpointing: keep the input of each group of `size` blocks, and recompute the rest in backward.

        size: None keeps everything (Chen et al., arXiv 1604.06174). nested: halve the blocks, each half a checkpoint
        whose recomputation halves it again, down to `size` blocks: memory of O(log L) inputs and `size` blocks for
        O(L log L) block forwards (Griewank and Walther's recursion, ACM TOMS 26:1).
        """
        if size is not None and size < 1:
            raise ValueError(f"checkpointed groups of {size} blocks; give 1 or more, or None to keep everything")
        self.checkpointing = size, nested

    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] over all tokens, in fp32. logits: (..., V); targets: (...) int64."""
    return -logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()


def _run(layers: Sequence[nn.Module], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, cos, sin)
    return x


def _run_halves(layers: Sequence[nn.Module], x: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
    """Checkpoint each half of the layers, in which the same is done, until no more than size are left."""
    if len(layers) <= size:
        return _run(layers, x, cos, sin)
    middle = len(layers) // 2
    for half in (layers[:middle], layers[middle:]):
        x = _recomputed(_run_halves, half, x, cos, sin, size)
    return x


def _recomputed(function: Any, *args: Any) -> Tensor:
    """function(*args), whose saved tensors backward recomputes. No block draws random numbers: none are restored."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _truncated_normal(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
