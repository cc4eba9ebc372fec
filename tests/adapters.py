"""The seam to the public tests of the course (Stanford CS336, assignments 1 and 2): its function names, our package."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmsys import model
from lmsys.config import ModelConfig
from lmsys.data.bpe import train_bpe
from lmsys.data.tokenizer import Tokenizer
from lmsys.step import optimizer as optim


def run_train_bpe(
    input_path: str | os.PathLike, vocab_size: int, special_tokens: list[str], **kwargs: Any
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    return train_bpe(input_path, vocab_size, special_tokens, **kwargs)


def get_tokenizer(
    vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None
) -> Tokenizer:
    return Tokenizer(vocab, merges, special_tokens)


def run_linear(d_in: int, d_out: int, weights: Tensor, in_features: Tensor) -> Tensor:
    module = model.Linear(d_in, d_out)
    module.load_state_dict({"weight": weights})
    return module(in_features)


def run_embedding(vocab_size: int, d_model: int, weights: Tensor, token_ids: Tensor) -> Tensor:
    module = model.Embedding(vocab_size, d_model)
    module.load_state_dict({"weight": weights})
    return module(token_ids)


def run_rmsnorm(d_model: int, eps: float, weights: Tensor, in_features: Tensor) -> Tensor:
    module = model.RMSNorm(d_model, eps)
    module.load_state_dict({"weight": weights})
    return module(in_features)


def run_swiglu(
    d_model: int, d_ff: int, w1_weight: Tensor, w2_weight: Tensor, w3_weight: Tensor, in_features: Tensor
) -> Tensor:
    module = model.SwiGLU(d_model, d_ff)
    module.load_state_dict({"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight})
    return module(in_features)


def run_rope(d_k: int, theta: float, max_seq_len: int, in_query_or_key: Tensor, token_positions: Tensor) -> Tensor:
    return model.RotaryEmbedding(d_k, max_seq_len, theta)(in_query_or_key, token_positions)


def _state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The course's parameter names as ours: Q, K and V are one matrix here."""
    state = dict(weights)
    for name in [name for name in weights if name.endswith("attn.q_proj.weight")]:
        prefix = name.removesuffix("q_proj.weight")
        state[f"{prefix}qkv_proj.weight"] = torch.cat([state.pop(f"{prefix}{part}_proj.weight") for part in "qkv"])
    return state


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: dict[str, Tensor],
    in_features: Tensor,
) -> Tensor:
    shape = ModelConfig(d_model, d_ff, 1, num_heads, max_seq_len, 1, theta)
    block = model.TransformerBlock(shape, "vectorized_torch")
    block.load_state_dict(_state_dict(weights))
    rope, length = model.RotaryEmbedding(shape.head_dim, max_seq_len, theta), in_features.shape[-2]
    return block(in_features, rope.cos[:length], rope.sin[:length])


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    in_indices: Tensor,
) -> Tensor:
    lm = model.TransformerLM(ModelConfig(d_model, d_ff, num_layers, num_heads, context_length, vocab_size, rope_theta))
    lm.load_state_dict(_state_dict(weights))
    return lm(in_indices)


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    return model.cross_entropy(inputs, targets)


def run_gradient_clipping(parameters: Iterable[torch.nn.Parameter], max_l2_norm: float) -> None:
    optim.clip_grad_norm(parameters, max_l2_norm)


def get_adamw_cls() -> type[torch.optim.Optimizer]:
    return optim.AdamW


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    return optim.cosine_schedule(
        it,
        learning_rate=max_learning_rate,
        min_learning_rate=min_learning_rate,
        warmup_steps=warmup_iters,
        total_steps=cosine_cycle_iters,
    )
