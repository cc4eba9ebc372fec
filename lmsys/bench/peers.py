"""The peer of the training step: the same model and step, written plainly with what PyTorch itself has.

nn.Linear, nn.RMSNorm, F.scaled_dot_product_attention as PyTorch chooses it, F.cross_entropy of whole logits, the whole
model with its loss under torch.compile as one graph, bf16 autocast over fp32 parameters, torch.optim.AdamW(fused=True),
gradients clipped: the shape of nanoGPT's training script. Parameters have the names of lmsys.model.TransformerLM's, so
that either loads the other's weights.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lmsys import parallel
from lmsys.config import ModelConfig, PipelineConfig
from lmsys.data import BatchSampler
from lmsys.model import TransformerLM
from lmsys.step.optimizer import parameter_groups
from lmsys.train.engine import AUTOCAST, autocast, to_device


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.output_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.output_proj(y.transpose(1, 2).flatten(-2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln1 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.attn = Attention(config)
        self.ln2 = nn.RMSNorm(config.d_model, eps=1e-5)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), cos, sin)
        return x + self.ffn(self.ln2(x))


class NativeLM(nn.Module):
    """Token ids and targets (B, T) -> their mean cross-entropy."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_final = nn.RMSNorm(config.d_model, eps=1e-5)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embeddings.weight
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angles = torch.arange(config.context_length, dtype=torch.float64)[:, None] * config.rope_theta**-half
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.token_embeddings(ids)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        return self.loss(self.ln_final(x), targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(x)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


class NativeStep:
    """The peer's training, with the methods of the trainer's engine that a step takes: accumulate and update.

    The weights are those that the trainer begins with. Of config: model, optim, and of train seed, dtype, compile.
    """

    language_model = NativeLM

    def __init__(self, config: PipelineConfig, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.train.seed)
        with device:
            weights = TransformerLM(config.model).state_dict()
            self.model = self.language_model(config.model)
        self.model.load_state_dict(weights)
        del weights
        self.module, self.forward = self.prepared(config)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module, optim.weight_decay),
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def prepared(self, config: PipelineConfig) -> tuple[nn.Module, nn.Module]:
        """What holds the parameters, and what is called."""
        return self.model, torch.compile(self.model, dynamic=False) if config.train.compile else self.model

    def accumulate(self, sampler: BatchSampler) -> Tensor:
        inputs, targets = (to_device(array, self.device) for array in sampler.next())
        with autocast(self.device, self.config.train.dtype):
            loss = self.forward(inputs, targets)
        loss.backward()
        return loss.detach()

    def update(self, learning_rate: float) -> Tensor:
        norm = self.clip(self.config.optim.max_grad_norm)
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def clip(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def close(self) -> None:
        """Nothing is kept from step to step."""


def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


class ChunkedLM(NativeLM):
    """NativeLM whose loss never has more than `chunk` tokens' logits."""

    chunk = 4096
    chunk_loss = staticmethod(chunk_loss)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        parts = (tensor.flatten(0, 1).split(self.chunk) for tensor in (x, targets))
        losses = [
            checkpoint(self.chunk_loss, hidden, self.lm_head.weight, target, use_reentrant=False)
            for hidden, target in zip(*parts, strict=True)
        ]
        return torch.stack(losses).sum() / targets.numel()


class FullyShardedStep(NativeStep):
    """The peer's training on several GPUs, for a model that one does not hold.

    FSDP2, cuDNN attention, each block compiled and checkpointed, the loss in compiled chunks; weights, gradients and
    moments in the config's dtype.
    """

    language_model = ChunkedLM

    def prepared(self, config: PipelineConfig) -> tuple[nn.Module, nn.Module]:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(AUTOCAST.get(config.train.dtype, torch.float32))
        compiled = functools.partial(torch.compile, dynamic=False) if config.train.compile else lambda call: call
        self.model.chunk_loss = compiled(chunk_loss)
        for index, layer in enumerate(self.model.layers):
            self.model.layers[index] = compiled(checkpoint_wrapper(layer, preserve_rng_state=False))
        module = parallel.wrap(self.model, "torch_fsdp2")
        return module, module

    def accumulate(self, sampler: BatchSampler) -> Tensor:
        on_gpu = self.device.type == "cuda"
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else nullcontext():  # forward and backward
            loss = self.module(*(to_device(array, self.device) for array in sampler.next()))
            loss.backward()
        self.module.finish_gradient_synchronization()
        return loss.detach()

    def clip(self, max_norm: float) -> Tensor:
        return self.module.clip_grad_norm_(max_norm)
