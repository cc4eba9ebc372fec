"""Attention kernels behind one table: attention(q, k, v, causal=..., kernel="flash_attention_triton").

KERNELS says for each kernel what it is, and as data what it takes. check_support answers before any tensor exists;
attention checks the same at each call. Nothing falls back to another kernel. A kernel's module, and with it Triton or a
compiler, is imported when the kernel is first called. flash_attention_triton has two paths of one contract: explain
says which runs, and why.

Contract: q (..., H, T, D), k and v (..., H_kv, S, D), floating point, same device and dtype; T, S >= 1; H a multiple of
H_kv (grouped-query heads: query head h reads key head h // (H / H_kv)). Returns (..., H, T, D). The scale of the scores
is 1 / sqrt(D) or the caller's. Causal masks align at the top left: query i sees keys j <= i.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lmsys.attention.paths import PATHS, Explanation, explain, interpreted
from lmsys.config import unknown_name

__all__ = ["KERNELS", "Explanation", "Kernel", "attention", "check_support", "explain", "get_kernel"]

_F16, _BF16, _F32, _F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
_HALF, _SINGLE = (_F16, _BF16), (_F32, _F16, _BF16)
_ALL = (*_SINGLE, _F64)


@dataclass(frozen=True)
class Kernel:
    """One attention implementation and its limits.

    Attributes:
        label, colour: its name and colour in every figure. A peer, which is not ours, is dashed there.
        description: one line, with its source.
        module: where its function, of the kernel's name, lies: fn(q, k, v, causal=False, scale=None, **options), q
            (B, H, T, D), k and v (B, H_kv, S, D).
        dtypes: those that it takes on each type of device; a device that is not there is not taken.
        head_dims: the least, the most (None: no limit), and what it must be a multiple of.
        ours: written in this package, not a library's.
        backward: the types of device on which it has a backward pass.
        unavailable: why it cannot run on a device type with a dtype on this machine, or None where it can.
        options: what else its function takes by name, and the values allowed.
        slow: ten to a hundred times slower than the rest at long sequences: benchmarks give it few shapes and samples.
        score_arrays: how many arrays of q_len x k_len a forward pass holds at once at the least.
        compiled_per: "shape" or "kind" (head dim, mask, heads) where the first call of each compiles for seconds.
    """

    name: str
    label: str
    colour: str
    description: str
    module: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    head_dims: tuple[int, int | None, int] = (1, None, 1)
    ours: bool = True
    backward: tuple[str, ...] = ("cpu", "cuda")
    unavailable: Callable[[str, torch.dtype], str | None] | None = None
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    slow: bool = False
    score_arrays: int = 0
    compiled_per: str = ""

    @property
    def style(self) -> tuple[str, str, bool]:
        """(label, colour, dashed), as figures take it."""
        return self.label, self.colour, not self.ours

    def load(self) -> Callable[..., Tensor]:
        """The kernel's function; imports its module."""
        return getattr(importlib.import_module(f"lmsys.attention.{self.module}"), self.name)

    def check(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, backward: bool
    ) -> None:
        """ValueError unless the kernel takes this. Cheap, and leaves no trace in a compiled graph."""
        if device.type not in self.dtypes:
            raise self._refuse(f"device '{device}'", f"runs on {' or '.join(self.dtypes)}")
        if dtype not in self.dtypes[device.type]:
            taken = ", ".join(map(_short, self.dtypes[device.type]))
            raise self._refuse(_short(dtype), f"takes {taken} on {device.type}")
        least, most, multiple = self.head_dims
        if head_dim < least or (most is not None and head_dim > most) or head_dim % multiple != 0:
            taken = str(least) + f" to {most}" * (most is not None) + f" in multiples of {multiple}" * (multiple > 1)
            raise self._refuse(f"head_dim {head_dim}", f"takes {taken}")
        if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
            raise self._refuse(f"{heads} query heads and {kv_heads} key heads", "takes a multiple of the key heads")
        if backward and device.type not in self.backward:
            raise self._refuse(f"a backward pass on {device.type}", "has none there; choose another kernel to train")
        if self.unavailable is not None and (reason := _unavailable(self.name, device.type, dtype)) is not None:
            raise self._refuse(f"{_short(dtype)} on {device.type}", reason)

    def check_arguments(self, scale: float | None, options: Mapping[str, Any]) -> None:
        """ValueError unless scale and options are such as the kernel takes."""
        number = isinstance(scale, Real) and not isinstance(scale, bool)
        if scale is not None and not (number and 0 < scale < math.inf):
            raise self._refuse(f"scale {scale!r}", "takes a finite number above 0, or None for 1 / sqrt(head_dim)")
        for name, value in options.items():
            if name not in self.options:
                known = f"takes {', '.join(self.options)}" if self.options else "takes no options"
                raise self._refuse(f"the option {name}={value!r}", known)
            if not any(type(value) is type(allowed) and value == allowed for allowed in self.options[name]):
                raise self._refuse(f"{name}={value!r}", f"takes {', '.join(map(repr, self.options[name]))}")

    def _refuse(self, given: str, allowed: str) -> ValueError:
        return ValueError(f"attention kernel '{self.name}': got {given}; it {allowed}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _no_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if interpreted() and dtype == _BF16:
        return "runs in Triton's CPU interpreter here, whose bfloat16 products are wrong; use float32 or float16"
    if device_type == "cpu" and not interpreted():
        return "takes CPU tensors in Triton's interpreter only: set TRITON_INTERPRET=1 before Python starts"
    return None


def _no_compiler(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))):
        return "is compiled by torch.compile, which needs a C++ compiler on the CPU; install g++"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "is compiled by torch.compile, which needs the package triton on a GPU"
    return None


def _needs_ampere(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    return None


def _no_cuda_kernel(device_type: str, dtype: torch.dtype) -> str | None:
    return importlib.import_module("lmsys.attention.flash_cuda").unavailable(device_type, dtype)


def _no_flash_attention_4(device_type: str, dtype: torch.dtype) -> str | None:
    if not (importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")):
        return "needs the package flash_attn.cute, which is not installed: pip install flash-attn-4"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "needs a GPU of compute capability 9.0 or more"
    return None


# fmt: off
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (
    Kernel("scaled_dot_prod_attention", "naive attention", "#8C8C8C",
           "the formula, an operation a line (Attention Is All You Need, section 3.2.1)",
           "reference", {"cpu": _ALL, "cuda": _ALL}, slow=True, score_arrays=3),
    Kernel("vectorized_torch", "vectorized PyTorch", "#56B4E9",
           "two batched products and a softmax, in as few passes as eager PyTorch needs",
           "reference", {"cpu": _ALL, "cuda": _ALL}, slow=True, score_arrays=2),
    Kernel("vectorized_torch_compiled", "vectorized PyTorch, compiled", "#0072B2",
           "vectorized_torch under torch.compile, compiled for each shape",
           "reference", {"cpu": _ALL, "cuda": _ALL}, unavailable=_no_compiler, slow=True, score_arrays=1),
    Kernel("flash_attention_torch", "flash, tiled PyTorch", "#009E73",
           "FlashAttention-2 (arXiv:2307.08691), tiled forward and backward in plain PyTorch",
           "flash_torch", {"cpu": _ALL, "cuda": _ALL}, slow=True),
    Kernel("flash_attention_triton", "flash, Triton", "#D55E00",
           "FlashAttention-2 (arXiv:2307.08691) in Triton, forward and backward, with a path for Hopper GPUs in Gluon",
           "flash_triton", {"cpu": _SINGLE, "cuda": _SINGLE}, (1, 256, 1), unavailable=_no_triton,
           options={"deterministic": (False, True), "path": PATHS}, compiled_per="kind"),
    Kernel("flash_attention_cuda", "flash, CUDA C++", "#C23B5E",
           "FlashAttention-2 (arXiv:2307.08691), forward and backward in CUDA C++, compiled at its first call",
           "flash_cuda", {"cuda": _HALF}, (64, 128, 64), backward=("cuda",), unavailable=_no_cuda_kernel),
    Kernel("torch_sdpa_flash", "torch SDPA, flash", "#9A7B4F",
           "torch's scaled_dot_product_attention, FlashAttention-2 backend (on a CPU, its own flash kernel)",
           "baselines", {"cpu": _ALL, "cuda": _HALF}, (1, 256, 1), ours=False, unavailable=_needs_ampere),
    Kernel("torch_sdpa_cudnn", "torch SDPA, cuDNN", "#E69F00",
           "torch's scaled_dot_product_attention, cuDNN backend",
           "baselines", {"cuda": _HALF}, (1, 128, 8), ours=False, unavailable=_needs_ampere),
    Kernel("torch_flex", "torch FlexAttention", "#CC79A7",
           "torch's FlexAttention (arXiv:2412.05496) with a causal block mask, compiled for each shape",
           "baselines", {"cpu": _SINGLE, "cuda": _SINGLE}, (16, 256, 1), ours=False, backward=("cuda",),
           unavailable=_no_compiler, compiled_per="shape"),
    Kernel("flash_attention_4", "FlashAttention-4", "#7A5FC0",
           "FlashAttention-4 (Tri Dao's package flash-attn-4), CuTe kernels for compute capability 9.0 and later",
           "baselines", {"cuda": _HALF}, (64, 128, 8), ours=False, backward=("cuda",),
           unavailable=_no_flash_attention_4, compiled_per="kind"),
)}
# fmt: on


def get_kernel(name: str) -> Kernel:
    """The table's entry; ValueError, which lists those there are, where there is none."""
    if name not in KERNELS:
        raise unknown_name("attention kernel", name, KERNELS)
    return KERNELS[name]


def check_support(
    kernel: str, *, device: str | torch.device, dtype: torch.dtype, head_dim: int,
    heads: int = 1, kv_heads: int | None = None, backward: bool = False,
) -> None:  # fmt: skip
    """ValueError, naming the kernel, what was given and what it takes, unless the kernel takes this on this machine."""
    kv_heads = heads if kv_heads is None else kv_heads
    get_kernel(kernel).check(torch.device(device), dtype, head_dim, heads, kv_heads, backward)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, kernel: str, scale: float | None = None, **options: Any
) -> Tensor:
    """softmax(scale * q k^T) v by the named kernel.

    Args:
        q: (..., H, T, D). k, v: (..., H_kv, S, D), with q's leading dimensions, device and dtype.
        scale: of the scores, above 0; None: 1 / sqrt(D).
        kernel, options: a name in KERNELS, and the options of its entry.
    Returns:
        (..., H, T, D) in q's dtype.
    Raises:
        ValueError: shapes, dtypes or devices that do not go together, or that the kernel does not take.
    """
    entry = get_kernel(kernel)
    _check_tensors(q, k, v, kernel)
    if scale is not None or options:
        entry.check_arguments(scale, options)
        scale = None if scale is None else float(scale)
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    entry.check(q.device, q.dtype, q.shape[-1], q.shape[-3], k.shape[-3], backward)
    _load(kernel)
    function = _LOADED[kernel]
    if q.ndim == 4:
        return function(q, k, v, causal, scale, **options)
    four = (t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    return function(*four, causal, scale, **options).reshape(q.shape)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> None:
    if q.ndim < 3 or k.ndim != q.ndim or v.ndim != q.ndim:
        problem = "q, k and v need the same number of dimensions, three or more"
    elif k.shape != v.shape:
        problem = "k and v differ in shape"
    elif q.shape[:-3] != k.shape[:-3]:
        problem = "q and k differ in their leading dimensions"
    elif q.shape[-1] != k.shape[-1]:
        problem = "q and k differ in head_dim"
    elif q.numel() == 0 or k.numel() == 0:
        problem = "a dimension is empty"
    elif not (q.dtype == k.dtype == v.dtype):
        got = f"q {_short(q.dtype)}, k {_short(k.dtype)}, v {_short(v.dtype)}"
        raise ValueError(f"attention kernel '{kernel}': dtypes differ; got {got}, it takes one dtype")
    elif not (q.device == k.device == v.device):
        got = f"q {q.device}, k {k.device}, v {v.device}"
        raise ValueError(f"attention kernel '{kernel}': devices differ; got {got}, it takes one device")
    else:
        return
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    wanted = "q (..., H, T, D), k and v (..., H_kv, S, D), none of them empty"
    raise ValueError(f"attention kernel '{kernel}': {problem}; got {shapes}, it takes {wanted}")


_LOADED: dict[str, Callable[..., Tensor]] = {}


def _constant_in_graphs(function: Callable) -> Callable:
    """Under torch.compile the function runs while the graph is traced, and its result counts as a constant.

    This is all that torch.compiler.assume_constant_result does, but calling that imports Dynamo, which imports Triton.
    """
    function._dynamo_marked_constant = True
    return function


@_constant_in_graphs
def _load(kernel: str) -> None:
    if kernel not in _LOADED:
        _LOADED[kernel] = KERNELS[kernel].load()


@_constant_in_graphs
def _unavailable(kernel: str, device_type: str, dtype: torch.dtype) -> str | None:
    return _reason(kernel, device_type, dtype)


@functools.cache
def _reason(kernel: str, device_type: str, dtype: torch.dtype) -> str | None:
    check = KERNELS[kernel].unavailable
    return None if check is None else check(device_type, dtype)
