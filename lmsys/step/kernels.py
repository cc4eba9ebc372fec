"""What the Triton kernels of lmsys.step share.

An operation's module is imported when its option is set, so that nothing else needs Triton. Without a GPU the kernels
run in Triton's interpreter, which is there to check and not to be fast: path "auto" is plain PyTorch there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if not torch.cuda.is_available():
    triton.knobs.runtime.interpret = True  # read by triton.jit

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# Interpreted whenever the kernel is, as tl.max and tl.sum may not be.
MAX, SUM = tl.standard._elementwise_max, tl.standard._sum_combine
IS_HIP = torch.version.hip is not None
PATHS = ("auto", "triton", "torch")


def resolve_path(path: str, tensor: Tensor) -> str:
    """triton or torch; auto is triton where the tensor is on a GPU. ValueError for another name."""
    if path not in PATHS:
        raise ValueError(f"path is '{path}'; it must be auto, triton or torch")
    if path != "auto":
        return path
    return "triton" if tensor.is_cuda else "torch"


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: under torch.compile the function is an operator; else it is called without the dispatcher's cost.

    fake: its result's shapes and dtypes, from its arguments. The operator itself is the function's `op`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"lmsys::{name}", function, mutates_args=())
        op.register_fake(fake)

        def call(*arguments: Any) -> Any:
            return (op if torch.compiler.is_compiling() else function)(*arguments)

        call.op = op
        return call

    return decorate
