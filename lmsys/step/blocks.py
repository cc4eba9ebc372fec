"""A Transformer block whose backward pass is written out, so that what it keeps and what it computes again is a choice by name.

torch.utils.checkpoint keeps a block's input and computes all else again; its selective form marks operations, and under torch.compile
the partitioner has the last word. Here a block of lmsys.model is one autograd.Function: forward saves its input and the kinds of KINDS
that it is told to, backward makes the others again, each when it is first needed, and frees them when they are done with.
Gradients overwrite what they replace (SwiGLU's those of gate and up, a norm's that of its output). So the bytes that a block keeps are
known beforehand, as lmsys.step.planner needs them, and are the same with every version of torch. Different from the plain block beside:
- Q and K are rotated in place: what is kept of attention is one (N, 3 d) tensor, of which Q, K and V are views, its output and
  log-sum-exp.
- The residual addition and the second norm are one pass; the last addition happens inside the product. What is rounded to bf16 in
  between in the plain block is not here.
- The head's gradient, which lmsys.step.loss adds up in fp32 while it computes the loss, is scaled and rounded there and then: what lies
  there at the moment when all activations do is half as large.

Norms and SwiGLU are Triton kernels on a GPU (lmsys.step.block_kernels, lmsys.step.kernels), plain PyTorch elsewhere. On a GPU nothing is
compiled but these.

Limits: fp32 or bf16, the matrices in the dtype of the block's input (no autocast); attention by a kernel of ATTENTION; one backward pass, no second
derivative; positions 0 to T - 1.

Legend: B batch, T tokens, N = B T, H heads, D head_dim, d = d_model = H D, f = d_ff.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lmsys.config import unknown_name
from lmsys.model import RMSNorm, TransformerBlock, TransformerLM, rotate
from lmsys.step.loss import losses_op
from lmsys.step.rope import rotate_back_op

# What a block can keep beside its input: rows of d (norm1, middle, norm2), 3 d (qkv), f (gate, up); attention: its output, (N, d), and the
# log-sum-exp, (B, H, T) in fp32. The product of silu(gate) and up falls off when their gradients are made, and is never kept.
KINDS = ("norm1", "qkv", "attention", "middle", "norm2", "gate", "up")
# What keeps backward from making products again: only the norms, which cost a pass over memory.
NO_PRODUCTS_AGAIN = ("qkv", "attention", "middle", "gate", "up")
ATTENTION = ("flash_attention_triton", "flash_attention_torch")


class _Spec(NamedTuple):
    heads: int
    kernel: str
    eps: float
    keep: tuple[str, ...]


class SelectiveBlock(TransformerBlock):
    """TransformerBlock that keeps the kinds of `keep`; made of one by select()."""

    keep: tuple[str, ...]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor] | None = None) -> Tensor:
        """As TransformerBlock's; with attend, it is that."""
        if attend is not None:
            return super().forward(x, cos, sin, attend)
        attn, ffn = self.attn, self.ffn
        spec = _Spec(attn.num_heads, attn.kernel, self.ln1.eps, self.keep)
        weights = attn.qkv_proj.weight, attn.output_proj.weight, ffn.w1.weight, ffn.w2.weight, ffn.w3.weight
        if any(weight.dtype != x.dtype for weight in weights) or torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"a selective block's input is {x.dtype} and its matrices are {weights[0].dtype}; they must be of one dtype: shard the model "
                "with compute_dtype, or cast it, in place of autocast"
            )
        if cos.ndim != 2:
            raise ValueError(
                f"a selective block takes positions 0 to T - 1, cos and sin of (T, D/2); got {tuple(cos.shape)}"
            )
        return _Block.apply(x, self.ln1.weight, self.ln2.weight, *weights, cos, sin, spec)


class SelectiveNorm(RMSNorm):
    """RMSNorm that keeps its input and nothing else; made of one by select()."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d)."""
        return _Norm.apply(x, self.weight, self.eps)


class SelectiveLM(TransformerLM):
    """TransformerLM whose loss keeps the gradients of its inputs in their own dtype; made of one by select()."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """As TransformerLM's."""
        if targets is None or not torch.is_grad_enabled():
            return super().forward(ids, targets)
        hidden = self.hidden(ids)
        return _Loss.apply(hidden.reshape(-1, hidden.shape[-1]), self.head, targets.reshape(-1))


def select(model: TransformerLM, keep: Sequence[Collection[str]]) -> SelectiveLM:
    """Make a model's blocks selective, each with the kinds that it keeps, its last norm and its loss; returns the model.

    Do this before a data-parallel wrapper sees the model. Doing it again changes what is kept.
    Raises:
        ValueError: an unknown kind, another number of blocks than the model has, or an attention kernel that is not one of ATTENTION.
    """
    if len(keep) != len(model.layers):
        raise ValueError(f"keep names the kinds of {len(keep)} blocks; the model has {len(model.layers)}")
    for layer, kinds in zip(model.layers, keep, strict=True):
        for kind in kinds:
            if kind not in KINDS:
                raise unknown_name("kind of activation", kind, KINDS)
        if layer.attn.kernel not in ATTENTION:
            raise unknown_name("attention kernel of a selective block", layer.attn.kernel, ATTENTION)
        if not isinstance(layer, SelectiveBlock):
            layer.__class__ = SelectiveBlock
        layer.keep = tuple(kind for kind in KINDS if kind in kinds)
    if not isinstance(model, SelectiveLM):
        model.__class__, model.ln_final.__class__ = SelectiveLM, SelectiveNorm
    return model


# --- Norm and SwiGLU ------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """(..., d) -> (N, d), contiguous, as the kernels read it: a sum's gradient is one number in many places."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _rms_norm(x: Tensor, gain: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + added, and its norm times gain; see lmsys.step.block_kernels."""
    if x.is_cuda:
        from lmsys.step import block_kernels

        return block_kernels.rms_norm(x, gain, eps, added)
    total = x if added is None else x + added
    y = total.to(torch.promote_types(x.dtype, torch.float32))
    return total, (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def _rms_norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x, plus residual, in place of dy, and of gain."""
    if x.is_cuda:
        from lmsys.step.kernels import norm_back_

        return dy, norm_back_(dy, x, None, gain, residual, dy, eps).to(gain.dtype)
    v, grad = (tensor.to(torch.promote_types(x.dtype, torch.float32)) for tensor in (x, dy))
    scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    v = v * scale
    dgain = (grad * v).sum(0)
    grad = grad * gain
    dx = (grad - v * (grad * v).mean(-1, keepdim=True)) * scale
    return dy.copy_(dx if residual is None else dx + residual), dgain.to(gain.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if gate.is_cuda:
        from lmsys.step import block_kernels

        return block_kernels.swiglu(gate, up)
    return F.silu(gate).mul_(up)


def _swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """grad, the product's gradient, becomes the product; gate and up become their gradients."""
    if gate.is_cuda:
        from lmsys.step import block_kernels

        block_kernels.swiglu_backward_(gate, up, grad)
    else:
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        product = silu * up
        gate.add_(1).sub_(silu).mul_(sigmoid).mul_(up).mul_(grad)
        up.copy_(grad * silu)
        grad.copy_(product)
    torch.autograd.graph.increment_version((gate, up))


# --- Attention ------------------------------------------------------------------------------------


def _rotate_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate Q and K of qkv (B, T, 3, H, D) where they lie."""
    q, k = (qkv[:, :, index].transpose(1, 2) for index in (0, 1))
    if qkv.is_cuda:
        from lmsys.step.kernels import rotate_

        rotate_((q, k, None), (q, k, None), cos, sin, 1.0)
    else:
        for one in (q, k):
            one.copy_(rotate(one, cos, sin))


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, D) -> o (B, H, T, D), lse (B, H, T)."""
    scale = 1 / math.sqrt(q.shape[-1])
    if kernel == "flash_attention_triton":
        from lmsys.attention.flash_triton import flash_forward

        return flash_forward(q, k, v, True, scale, False, "auto")
    from lmsys.attention.flash_torch import TILE, flash_forward

    return flash_forward(q, k, v, True, scale, TILE[q.device.type], TILE[q.device.type])


def attend_backward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1])
    if kernel == "flash_attention_triton":
        from lmsys.attention.flash_triton import flash_backward

        return flash_backward(q, k, v, o, lse, do, True, scale, False, "auto")
    from lmsys.attention.flash_torch import TILE, flash_backward

    return flash_backward(q, k, v, o, lse, do, True, scale, TILE[q.device.type], TILE[q.device.type])


# --- The block ------------------------------------------------------------------------------------


class _Values:
    """What a block computes on its way to the output: each made when it is first asked for, from what is there.

    Rows: x, norm1, middle, norm2 (N, d); qkv (B, T, 3, H, D), rotated; attention: o (N, d) and lse (B, H, T); gate, up (N, f).
    """

    def __init__(self, x: Tensor, parameters: Sequence[Tensor], spec: _Spec, kept: dict[str, Any]):
        self.shape, self.x = x.shape, _rows(x)
        self.gain1, self.gain2, self.qkv_weight, self.output_weight, self.w1, self.w2, self.w3 = parameters[:7]
        self.cos, self.sin = parameters[7:]
        self.spec, self.made = spec, dict(kept)

    def get(self, kind: str) -> Any:
        if kind not in self.made:
            getattr(self, f"_{kind}")()
        return self.made[kind]

    def drop(self, *kinds: str) -> None:
        for kind in kinds:
            self.made.pop(kind, None)

    def _norm1(self) -> None:
        _, self.made["norm1"] = _rms_norm(self.x, self.gain1, self.spec.eps)

    def _qkv(self) -> None:
        batch, length, d_model = self.shape
        qkv = self.get("norm1") @ self.qkv_weight.t()
        qkv = qkv.view(batch, length, 3, self.spec.heads, d_model // self.spec.heads)
        _rotate_(qkv, self.cos, self.sin)
        self.made["qkv"] = qkv

    def _attention(self) -> None:
        o, lse = attend(self.spec.kernel, *self.heads(self.get("qkv")))
        self.made["attention"] = o.transpose(1, 2).reshape(self.x.shape), lse

    def _middle(self) -> None:
        added = self.get("attention")[0] @ self.output_weight.t()
        self.made["middle"], norm2 = _rms_norm(self.x, self.gain2, self.spec.eps, added)
        self.made.setdefault("norm2", norm2)

    def _norm2(self) -> None:
        middle = self.get("middle")
        if "norm2" not in self.made:
            _, self.made["norm2"] = _rms_norm(middle, self.gain2, self.spec.eps)

    def _gate(self) -> None:
        self.made["gate"] = self.get("norm2") @ self.w1.t()

    def _up(self) -> None:
        self.made["up"] = self.get("norm2") @ self.w3.t()

    @staticmethod
    def heads(qkv: Tensor) -> tuple[Tensor, ...]:
        """Q, K and V, (B, H, T, D) each, views."""
        return tuple(qkv[:, :, index].transpose(1, 2) for index in range(3))


class _Block(torch.autograd.Function):
    """apply(x (B, T, d), gain1, gain2, qkv, output, w1, w2, w3, cos, sin, spec) -> (B, T, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *parameters, spec = arguments
        values = _Values(x, parameters, spec, {})
        kept: dict[str, Any] = {}

        def done(*kinds: str) -> None:
            """Forget what is not kept as soon as it is not needed."""
            for kind in kinds:
                if kind in spec.keep:
                    kept[kind] = values.made[kind]
                values.drop(kind)

        values.get("qkv")
        done("norm1")
        values.get("attention")
        done("qkv")
        values.get("middle")
        done("attention")
        gate, up = values.get("gate"), values.get("up")
        done("norm2")
        product = _swiglu(gate, up)
        done("gate", "up")
        del gate, up
        out = torch.addmm(values.get("middle"), product, values.w2.t())
        done("middle")
        flat: list[Tensor] = []
        for kind in spec.keep:
            flat += kept[kind] if kind == "attention" else [kept[kind]]
        ctx.save_for_backward(x, *parameters, *flat)
        ctx.spec = spec
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        spec = ctx.spec
        x, *saved = ctx.saved_tensors
        parameters, flat = saved[:9], iter(saved[9:])
        kept = {kind: (next(flat), next(flat)) if kind == "attention" else next(flat) for kind in spec.keep}
        v = _Values(x, parameters, spec, kept)
        dout = _rows(dout)

        gate, up = v.get("gate"), v.get("up")
        product = dout @ v.w2  # its gradient, until the next line
        _swiglu_backward_(gate, up, product)
        dw2 = dout.t() @ product
        del product
        dnorm = gate @ v.w1
        dnorm.addmm_(up, v.w3)
        dw1, dw3 = gate.t() @ v.get("norm2"), up.t() @ v.get("norm2")
        del gate, up
        v.drop("gate", "up", "norm2")
        dmiddle, dgain2 = _rms_norm_backward(dnorm, v.get("middle"), v.gain2, spec.eps, dout)
        del dnorm, dout
        v.drop("middle")

        o, lse = v.get("attention")
        doutput = dmiddle.t() @ o
        qkv = v.get("qkv")
        per_head = qkv.shape[:2] + qkv.shape[3:]
        do = (dmiddle @ v.output_weight).view(per_head).transpose(1, 2)
        gradients = attend_backward(spec.kernel, *v.heads(qkv), o.view(per_head).transpose(1, 2), lse, do)
        del o, lse, qkv, do
        v.drop("attention", "qkv")
        path = "triton" if x.is_cuda else "torch"
        dqkv = rotate_back_op(*gradients, v.cos, v.sin, path).view(x.shape[0] * x.shape[1], -1)
        del gradients
        dqkv_weight = dqkv.t() @ v.get("norm1")
        v.drop("norm1")
        dnorm = dqkv @ v.qkv_weight
        del dqkv
        dx, dgain1 = _rms_norm_backward(dnorm, v.x, v.gain1, spec.eps, dmiddle)
        return dx.view(x.shape), dgain1, dgain2, dqkv_weight, doutput, dw1, dw2, dw3, None, None, None


class _Norm(torch.autograd.Function):
    """apply(x (..., d), gain, eps); saves both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return _rms_norm(_rows(x), gain, eps)[1].view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        own = _rows(dy).clone(memory_format=torch.contiguous_format)
        dx, dgain = _rms_norm_backward(own, _rows(x), gain, ctx.eps)
        return dx.view(x.shape), dgain, None


class _Loss(torch.autograd.Function):
    """apply(hidden (N, d), weight (V, d), targets (N,)) -> the mean cross-entropy; saves the two gradients, which backward returns."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        path = "triton" if hidden.is_cuda else "torch"
        loss, factor, grad_hidden, grad_weight = losses_op(
            hidden, weight, targets, hidden.dtype, 0, -100, path, True, True
        )
        factor = factor.view(1)  # of one dimension, so that products are in its dtype, not in a gradient's bf16
        rounded = torch.empty_like(weight)
        torch.mul(grad_weight, factor, out=rounded)
        ctx.save_for_backward(grad_hidden.mul_(factor), rounded)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.view(1)  # as the factor
        return *(gradient.mul_(grad) for gradient in ctx.saved_tensors), None
