"""What a computation costs by formula: parameters, FLOPs, bytes. No torch; each formula states its source.

Legend: B batch, H heads, T tokens of context, D head_dim, V vocabulary, L layers, d = d_model, f = d_ff.
A product of (m, k) and (k, n) matrices counts 2 m k n FLOPs.
"""

from __future__ import annotations

from lmsys.config import ModelConfig


def model_parameters(config: ModelConfig) -> int:
    """Parameters of TransformerLM: L (4 d^2 + 3 d f + 2 d) + d + V d, and V d more for an untied head."""
    d, f = config.d_model, config.d_ff
    per_layer = 4 * d * d + 3 * d * f + 2 * d  # Q, K, V, O; the three SwiGLU matrices; two norm gains
    embedding = _vocab(config) * d
    return config.num_layers * per_layer + d + embedding * (1 if config.tie_embeddings else 2)


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters without the input embedding, which is a lookup; a tied head counts once, as the product it is."""
    return model_parameters(config) - (0 if config.tie_embeddings else _vocab(config) * config.d_model)


def _vocab(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not set: take the tokenizer's before counting parameters")
    return config.vocab_size


def visible_pairs(q_len: int, k_len: int, causal: bool) -> float:
    """Query-key pairs that attention computes. Causal, top left aligned: half a square of min(q_len, k_len), and all
    keys for the queries past it. The diagonal is not counted apart, as is the convention (FlashAttention's benchmarks).
    """
    if not causal:
        return float(q_len * k_len)
    side = min(q_len, k_len)
    return side * side / 2 + (q_len - side) * k_len


def attention_flops(batch: int, heads: int, q_len: int, k_len: int, head_dim: int, causal: bool, which: str) -> float:
    """FLOPs of attention. Forward: 4 B H D pairs (QK^T and PV). Backward: 2.5 times that (five products for two).

    Source: FlashAttention-2, arXiv 2307.08691, section 4.1.
    """
    forward = 4.0 * batch * heads * head_dim * visible_pairs(q_len, k_len, causal)
    return forward * {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[which]


def train_flops_per_token(config: ModelConfig, context_length: int | None = None) -> float:
    """FLOPs of forward and backward a token: 6 x parameters (without the input embedding) + 6 L d T.

    The second term is causal attention: forward 4 T d a layer, halved by the mask; forward and backward three times that.
    Source: PaLM, arXiv 2204.02311, appendix B, with attention halved. This is the count that MFU uses here.
    """
    context = config.context_length if context_length is None else context_length
    return 6.0 * matmul_parameters(config) + 6.0 * config.num_layers * config.d_model * context


def forward_flops(config: ModelConfig, batch: int, context_length: int, *, causal: bool = True) -> float:
    """FLOPs of one forward pass: the matrix products of the weights, and attention."""
    products = 2.0 * matmul_parameters_in_products(config) * batch * context_length
    scores = attention_flops(
        batch, config.num_heads, context_length, context_length, config.head_dim, causal, "forward"
    )
    return products + config.num_layers * scores


def matmul_parameters_in_products(config: ModelConfig) -> int:
    """Parameters that are matrices of a product: matmul_parameters without the norms' gains."""
    return matmul_parameters(config) - (2 * config.num_layers + 1) * config.d_model


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilization: FLOPs a second over the device's dense peak in that dtype; None where the peak is unknown."""
    return None if peak_flops is None else tokens_per_s * flops_per_token / peak_flops
