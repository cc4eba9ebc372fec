"""A Transformer block with a written backward pass: what it keeps and what it recomputes is a choice by name.

Here a block of lmsys.model is one autograd.Function: forward saves its input and the kinds of KINDS that it is told to,
backward recomputes the others, each when it is first needed, and frees them when they are done with. Gradients
overwrite what they replace (SwiGLU's those of gate and up, a norm's that of its output). So the bytes that a block
keeps are known beforehand, as lmsys.step.planner needs them, which torch.utils.checkpoint and torch.compile's
partitioner do not offer. What differs from the plain block:
- Q and K are rotated in place: what is kept of attention is one (N, 3 d) tensor, of which Q, K and V are views, its
  output and log-sum-exp.
- The residual addition and the second norm are one pass; the last addition happens inside the matmul. What is rounded
  to bf16 in between in the plain block is not here.
- The head's gradient, which lmsys.step.loss adds up in fp32, is scaled and rounded at once: half as large at the moment
  when all activations are there.

Limits: fp32 or bf16; attention by a kernel of ATTENTION; one backward pass, no second derivative; positions 0 to T - 1.

Legend: B batch, T tokens, N = B T, H heads, D head_dim, d = d_model = H D, f = d_ff.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsys.config import unknown_name
from lmsys.options import WRITTEN_BACKWARD_ATTENTION as ATTENTION
from lmsys.step.gate import swiglu, swiglu_backward
from lmsys.step.norm import Norm, norm_backward, norm_forward, rows
from lmsys.step.planner import KINDS
from lmsys.step.rope import rotate_backward, rotate_in_place

if TYPE_CHECKING:
    from lmsys.model import TransformerBlock, TransformerLM

# What keeps backward from recomputing matmuls, only the norms.
NO_MATMUL_RECOMPUTED = ("qkv", "attention", "middle", "gate", "up")


class _Spec(NamedTuple):
    heads: int
    kernel: str
    eps: float
    keep: tuple[str, ...]


def select(model: TransformerLM, keep: Sequence[Collection[str]]) -> TransformerLM:
    """Give a model's blocks, last norm and loss a written backward pass, each block with the kinds that it keeps.

    Returns the model. Do this before a data-parallel wrapper sees it. Doing it again changes what is kept.
    """
    if len(keep) != len(model.layers):
        raise ValueError(f"keep names the kinds of {len(keep)} blocks; the model has {len(model.layers)}")
    for layer, kinds in zip(model.layers, keep, strict=True):
        for kind in kinds:
            if kind not in KINDS:
                raise unknown_name("kind of activation", kind, KINDS)
        if layer.attn.kernel not in ATTENTION:
            raise unknown_name("attention kernel of a written backward pass", layer.attn.kernel, ATTENTION)
        layer.function = partial(_block, keep=tuple(kind for kind in KINDS if kind in kinds))
    model.ln_final.function, model.rounded_loss = Norm.apply, True
    return model


def _block(block: TransformerBlock, x: Tensor, cos: Tensor, sin: Tensor, *, keep: tuple[str, ...]) -> Tensor:
    """A block's forward pass, all of it in the autocast dtype, or in the input's where autocast is off."""
    attn, ffn = block.attn, block.ffn
    weights = [one.weight for one in (attn.qkv_proj, attn.output_proj, ffn.w1, ffn.w2, ffn.w3)]
    if torch.is_autocast_enabled(x.device.type):
        x, *weights = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, *weights))
    if any(weight.dtype != x.dtype for weight in weights):
        raise ValueError(f"input is {x.dtype} and matrices {weights[0].dtype}; they must be of one dtype")
    if cos.ndim != 2:
        raise ValueError(f"a written backward pass takes positions 0 to T - 1, (T, D/2); got {tuple(cos.shape)}")
    spec = _Spec(attn.num_heads, attn.kernel, block.ln1.eps, keep)
    with torch.autocast(x.device.type, enabled=False):  # attention's inner sums stay in fp32
        return _Block.apply(x, block.ln1.weight, block.ln2.weight, *weights, cos, sin, spec)


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, T, D) -> o (B, H, T, D), lse (B, H, T)."""
    module, options = _attention(kernel, q)
    return module.flash_forward(q, k, v, True, 1 / math.sqrt(q.shape[-1]), *options)


def attend_backward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, (B, H, T, D) each."""
    module, options = _attention(kernel, q)
    return module.flash_backward(q, k, v, o, lse, do, True, 1 / math.sqrt(q.shape[-1]), *options)


def _attention(kernel: str, q: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The module of a kernel of ATTENTION, and what its passes take after the scale."""
    module = importlib.import_module(f"lmsys.attention.{kernel.replace('_attention', '')}")
    return module, (False, "auto") if kernel.endswith("triton") else (module.TILE[q.device.type],) * 2


class _Values:
    """What a block computes on its way to the output: each when it is first asked for, from what is there.

    x, norm1, middle, norm2 (N, d); qkv (B, T, 3, H, D), rotated; attention: o (N, d), lse (B, H, T); gate, up (N, f).
    """

    def __init__(self, x: Tensor, parameters: Sequence[Tensor], spec: _Spec, kept: dict[str, Any]):
        self.shape, self.x = x.shape, rows(x)
        self.gain1, self.gain2, self.qkv_weight, self.output_weight, self.w1, self.w2, self.w3 = parameters[:7]
        self.cos, self.sin = parameters[7:]
        self.spec, self.there = spec, dict(kept)

    def get(self, kind: str) -> Any:
        if kind not in self.there:
            getattr(self, f"_{kind}")()
        return self.there[kind]

    def drop(self, *kinds: str) -> None:
        for kind in kinds:
            self.there.pop(kind, None)

    def _norm1(self) -> None:
        _, self.there["norm1"] = norm_forward(self.x, self.gain1, self.spec.eps)

    def _qkv(self) -> None:
        qkv = (self.get("norm1") @ self.qkv_weight.t()).view(*self.shape[:2], 3, self.spec.heads, -1)
        rotate_in_place(qkv, self.cos, self.sin)
        self.there["qkv"] = qkv

    def _attention(self) -> None:
        o, lse = attend(self.spec.kernel, *self.heads(self.get("qkv")))
        self.there["attention"] = o.transpose(1, 2).reshape(self.x.shape), lse

    def _middle(self) -> None:
        added = self.get("attention")[0] @ self.output_weight.t()
        self.there["middle"], norm2 = norm_forward(self.x, self.gain2, self.spec.eps, added)
        self.there.setdefault("norm2", norm2)

    def _norm2(self) -> None:
        middle = self.get("middle")
        if "norm2" not in self.there:
            _, self.there["norm2"] = norm_forward(middle, self.gain2, self.spec.eps)

    def _gate(self) -> None:
        self.there["gate"] = self.get("norm2") @ self.w1.t()

    def _up(self) -> None:
        self.there["up"] = self.get("norm2") @ self.w3.t()

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
            for kind in kinds:
                if kind in spec.keep:
                    kept[kind] = values.there[kind]
                values.drop(kind)

        values.get("qkv")
        done("norm1")
        values.get("attention")
        done("qkv")
        values.get("middle")
        done("attention")
        gate, up = values.get("gate"), values.get("up")
        done("norm2")
        product = swiglu(gate, up)
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
        dout = rows(dout)

        gate, up = v.get("gate"), v.get("up")
        product = dout @ v.w2  # its gradient, until the next line, where gradients overwrite what they are of
        swiglu_backward(gate, up, product, gate, up, product)
        torch.autograd.graph.increment_version((gate, up))
        dw2 = dout.t() @ product
        del product
        dnorm = gate @ v.w1
        dnorm.addmm_(up, v.w3)
        dw1, dw3 = gate.t() @ v.get("norm2"), up.t() @ v.get("norm2")
        del gate, up
        v.drop("gate", "up", "norm2")
        dmiddle, dgain2 = norm_backward(dnorm, v.get("middle"), v.gain2, spec.eps, dout)
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
        dqkv = rotate_backward(*gradients, v.cos, v.sin, path).view(x.shape[0] * x.shape[1], -1)
        del gradients
        dqkv_weight = dqkv.t() @ v.get("norm1")
        v.drop("norm1")
        dnorm = dqkv @ v.qkv_weight
        del dqkv
        dx, dgain1 = norm_backward(dnorm, v.x, v.gain1, spec.eps, dmiddle)
        return dx.view(x.shape), dgain1, dgain2, dqkv_weight, doutput, dw1, dw2, dw3, None, None, None
