"""Named ranges in a training step for Nsight Systems and PyTorch's profiler: step, phases, blocks, parts of attention,
and their backward.

A range is pushed as an NVTX range on a GPU and as a record_function of PyTorch's profiler, so that one set of names
serves both. Autograd runs the backward pass in a thread of its own, where no range of the caller is open. So each
part's inputs and output pass through an identity with a gradient: that of the output runs first of the part's backward
pass, and opens `backward PART` in the thread that computes it; that of the inputs runs last, and closes it.

Parts of attention (scores, softmax, values) are found by the call of softmax between them, for the kernels that make
one. A kernel that is one operation, and a compiled block, is one range. Names cost microseconds each on the host: time
without them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmsys.model import TransformerLM

PLAIN_KERNELS = ("scaled_dot_prod_attention", "vectorized_torch")  # that call softmax
_SOFTMAX = (torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax)
_threads = threading.local()  # .open: the ranges open in this thread, innermost last


def push(name: str) -> None:
    """Open a range in this thread."""
    range_ = torch.profiler.record_function(name)
    range_.__enter__()
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_push(name)
    _open().append(range_)


def pop() -> None:
    """Close the innermost range of this thread."""
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_pop()
    _open().pop().__exit__(None, None, None)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """A range around a block of code."""
    push(name)
    try:
        yield
    finally:
        pop()


def _open() -> list[Any]:
    if not hasattr(_threads, "open"):
        _threads.open = []
    return _threads.open


class _Entry(torch.autograd.Function):
    """Identity on a part's inputs. Its backward pass is the last of the part's, and closes the range."""

    @staticmethod
    def forward(ctx, *tensors: Tensor):
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        pop()
        return gradients


class _Exit(torch.autograd.Function):
    """Identity on a part's output. Its backward pass is the first of the part's, and opens the range."""

    @staticmethod
    def forward(ctx, name: str, tensor: Tensor):
        ctx.name = name
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        push(f"backward {ctx.name}")
        return None, gradient


def _entered(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    push(name)
    traced = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _Entry.apply(*tensors) if traced else tensors


def _left(name: str, tensor: Tensor) -> Tensor:
    pop()
    return _Exit.apply(name, tensor) if torch.is_grad_enabled() and tensor.requires_grad else tensor


class _Parts(TorchFunctionMode):
    """While a plain kernel runs: scores up to its softmax, softmax, values after it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in _SOFTMAX:
            return function(*args, **(kwargs or {}))
        scores = _left("scores", args[0])
        (scores,) = _entered("softmax", scores)
        probabilities = _left("softmax", function(scores, *args[1:], **(kwargs or {})))
        return _entered("values", probabilities)[0]


def _attend_in_parts(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k = _entered("scores", q, k)
    with _Parts():
        o = attend(q, k, v, causal)
    return _left("values", o)


def _attend_whole(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return _left("attention kernel", attend(*_entered("attention kernel", q, k, v), causal))


def name_parts(model: TransformerLM) -> None:
    """Give the parts of a model ranges: `block N`, in it `attention`, `feed-forward`; `final norm`, `head`."""
    for index, layer in enumerate(model.layers):
        _name_module(layer, f"block {index}")
        _name_module(layer.attn, "attention")
        _name_module(layer.ffn, "feed-forward")
        attend = _attend_in_parts if layer.attn.kernel in PLAIN_KERNELS else _attend_whole
        layer.attn.attend = functools.partial(attend, layer.attn.attend)
    _name_module(model.ln_final, "final norm")
    logits = model.logits
    model.logits = lambda hidden: _left("head", logits(*_entered("head", hidden)))


def _name_module(module: nn.Module, name: str) -> None:
    module.register_forward_pre_hook(lambda _, args: (*_entered(name, args[0]), *args[1:]))
    module.register_forward_hook(lambda _, args, output: _left(name, output))
