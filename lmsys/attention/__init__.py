"""Attention kernels behind one table: attention(q, k, v, causal=..., kernel="flash_attention_triton").

KERNELS says for each kernel what it is, and as data what it takes. check_support answers before any tensor exists whether a
kernel takes a device, dtype and head dim; attention checks the same at each call. Nothing falls back to another kernel.
A kernel's module, and with it Triton or a compiler, is imported when the kernel is first called. flash_attention_triton has two paths
of one contract: explain says which runs, and why.

Contract: q (..., H, T, D), k and v (..., H_kv, S, D), floating point, same device and dtype; T, S >= 1; H a multiple of H_kv
(grouped-query heads: query head h reads key head h // (H / H_kv)). Returns (..., H, T, D). The scale of the scores is 1 / sqrt(D)
or the caller's. Causal masks align at the top left: query i sees keys j <= i.
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
_ANY = {"cpu": (_F32, _F16, _BF16, _F64), "cuda": (_F32, _F16, _BF16, _F64)}


@dataclass(frozen=True)
class Kernel:
    """One attention implementation and its limits.

    Attributes:
        description: one line, with its source.
        ours: written in this package, not a library's.
        module, function: where fn(q, k, v, causal=False, scale=None, **options) lies; it takes q (B, H, T, D), k and v (B, H_kv, S, D).
        dtypes: those that it takes on each type of device; a device that is not there is not taken.
        max_head_dim: None where there is no limit.
        head_dim_multiple: the head dim must be a multiple of it.
        backward: the types of device on which it has a backward pass.
        unavailable: why it cannot run on a device type with a dtype on this machine, or None where it can.
        options: what else its function takes by name, and the values allowed.
        slow: ten to a hundred times slower than the rest at long sequences: benchmarks give it few shapes and samples.
        score_arrays: how many arrays of q_len x k_len a forward pass holds at once at the least.
        compiled_per: "shape" or "kind" (head dim, mask, heads) where the first call of each compiles for seconds.
        label, colour: its name and colour in every figure. A peer, which is not ours, is dashed there.
    """

    name: str
    description: str
    ours: bool
    module: str
    function: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    min_head_dim: int = 1
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    backward: tuple[str, ...] = ("cpu", "cuda")
    unavailable: Callable[[str, torch.dtype], str | None] | None = None
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    slow: bool = False
    score_arrays: int = 0
    compiled_per: str = ""
    label: str = ""
    colour: str | None = None

    @property
    def style(self) -> tuple[str, str | None, bool]:
        """(label, colour, dashed), as figures take it."""
        return self.label or self.name, self.colour, not self.ours

    def load(self) -> Callable[..., Tensor]:
        """The kernel's function; imports its module."""
        return getattr(importlib.import_module(f"lmsys.attention.{self.module}"), self.function)

    def check(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, backward: bool
    ) -> None:
        """ValueError unless the kernel takes this. Cheap, and leaves no trace in a compiled graph."""
        if device.type not in self.dtypes:
            raise self._refuse(f"device '{device}'", f"runs on {' or '.join(self.dtypes)}")
        if dtype not in self.dtypes[device.type]:
            raise self._refuse(
                _short(dtype), f"takes {', '.join(map(_short, self.dtypes[device.type]))} on {device.type}"
            )
        too_large = self.max_head_dim is not None and head_dim > self.max_head_dim
        if head_dim < self.min_head_dim or too_large or head_dim % self.head_dim_multiple != 0:
            raise self._refuse(f"head_dim {head_dim}", f"takes {self._head_dims()}")
        if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
            raise self._refuse(f"{heads} query heads and {kv_heads} key heads", "takes a multiple of the key heads")
        if backward and device.type not in self.backward:
            raise self._refuse(f"a backward pass on {device.type}", "has none there; choose another kernel to train")
        if self.unavailable is not None:
            reason = _unavailable(self.name, device.type, dtype)
            if reason is not None:
                raise self._refuse(f"{_short(dtype)} on {device.type}", reason)

    def check_arguments(self, scale: float | None, options: Mapping[str, Any]) -> None:
        """ValueError unless scale and options are such as the kernel takes."""
        if scale is not None and not (_is_number(scale) and scale > 0 and math.isfinite(scale)):
            raise self._refuse(f"scale {scale!r}", "takes a finite number above 0, or None for 1 / sqrt(head_dim)")
        for name, value in options.items():
            if name not in self.options:
                known = f"takes {', '.join(self.options)}" if self.options else "takes no options"
                raise self._refuse(f"the option {name}={value!r}", known)
            if not any(type(value) is type(allowed) and value == allowed for allowed in self.options[name]):
                raise self._refuse(f"{name}={value!r}", f"takes {', '.join(map(repr, self.options[name]))}")

    def _head_dims(self) -> str:
        most = "" if self.max_head_dim is None else f" to {self.max_head_dim}"
        step = "" if self.head_dim_multiple == 1 else f" in multiples of {self.head_dim_multiple}"
        return f"{self.min_head_dim}{most}{step}"

    def _refuse(self, given: str, allowed: str) -> ValueError:
        return ValueError(f"attention kernel '{self.name}': got {given}; it {allowed}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


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


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "scaled_dot_prod_attention",
            "the formula, an operation a line (Attention Is All You Need, section 3.2.1)",
            True,
            "reference",
            "scaled_dot_prod_attention",
            _ANY,
            slow=True,
            score_arrays=3,
            label="naive attention",
            colour="#8C8C8C",
        ),
        Kernel(
            "vectorized_torch",
            "two batched products and a softmax, in as few passes as eager PyTorch needs",
            True,
            "reference",
            "vectorized_torch",
            _ANY,
            slow=True,
            score_arrays=2,
            label="vectorized PyTorch",
            colour="#56B4E9",
        ),
        Kernel(
            "vectorized_torch_compiled",
            "vectorized_torch under torch.compile, compiled for each shape",
            True,
            "reference",
            "vectorized_torch_compiled",
            _ANY,
            unavailable=_no_compiler,
            slow=True,
            score_arrays=1,
            label="vectorized PyTorch, compiled",
            colour="#0072B2",
        ),
        Kernel(
            "flash_attention_torch",
            "FlashAttention-2 (arXiv:2307.08691), tiled forward and backward in plain PyTorch",
            True,
            "flash_torch",
            "flash_attention_torch",
            _ANY,
            slow=True,
            label="flash, tiled PyTorch",
            colour="#009E73",
        ),
        Kernel(
            "flash_attention_triton",
            "FlashAttention-2 (arXiv:2307.08691) in Triton, forward and backward, with a path for Hopper GPUs in Gluon",
            True,
            "flash_triton",
            "flash_attention_triton",
            {"cpu": (_F32, _F16, _BF16), "cuda": (_F32, _F16, _BF16)},
            max_head_dim=256,
            unavailable=_no_triton,
            options={"deterministic": (False, True), "path": PATHS},
            compiled_per="kind",
            label="flash, Triton",
            colour="#D55E00",
        ),
        Kernel(
            "flash_attention_cuda",
            "FlashAttention-2 (arXiv:2307.08691), forward and backward in CUDA C++, compiled at its first call",
            True,
            "flash_cuda",
            "flash_attention_cuda",
            {"cuda": (_F16, _BF16)},
            min_head_dim=64,
            max_head_dim=128,
            head_dim_multiple=64,
            backward=("cuda",),
            unavailable=_no_cuda_kernel,
            label="flash, CUDA C++",
            colour="#C23B5E",
        ),
        Kernel(
            "torch_sdpa_flash",
            "torch's scaled_dot_product_attention, FlashAttention-2 backend (on a CPU, its own flash kernel)",
            False,
            "baselines",
            "torch_sdpa_flash",
            {"cpu": (_F32, _F16, _BF16, _F64), "cuda": (_F16, _BF16)},
            max_head_dim=256,
            unavailable=_needs_ampere,
            label="torch SDPA, flash",
            colour="#9A7B4F",
        ),
        Kernel(
            "torch_sdpa_cudnn",
            "torch's scaled_dot_product_attention, cuDNN backend",
            False,
            "baselines",
            "torch_sdpa_cudnn",
            {"cuda": (_F16, _BF16)},
            max_head_dim=128,
            head_dim_multiple=8,
            unavailable=_needs_ampere,
            label="torch SDPA, cuDNN",
            colour="#E69F00",
        ),
        Kernel(
            "torch_flex",
            "torch's FlexAttention (arXiv:2412.05496) with a causal block mask, compiled for each shape",
            False,
            "baselines",
            "torch_flex",
            {"cpu": (_F32, _F16, _BF16), "cuda": (_F32, _F16, _BF16)},
            min_head_dim=16,
            max_head_dim=256,
            backward=("cuda",),
            unavailable=_no_compiler,
            compiled_per="shape",
            label="torch FlexAttention",
            colour="#CC79A7",
        ),
        Kernel(
            "flash_attention_4",
            "FlashAttention-4 (Tri Dao's package flash-attn-4), CuTe kernels for compute capability 9.0 and later",
            False,
            "baselines",
            "flash_attention_4",
            {"cuda": (_F16, _BF16)},
            min_head_dim=64,
            max_head_dim=128,
            head_dim_multiple=8,
            backward=("cuda",),
            unavailable=_no_flash_attention_4,
            compiled_per="kind",
            label="FlashAttention-4",
            colour="#7A5FC0",
        ),
    )
}


def get_kernel(name: str) -> Kernel:
    """The table's entry.

    Raises:
        ValueError: no such kernel; the message lists those there are.
    """
    if name not in KERNELS:
        raise unknown_name("attention kernel", name, KERNELS)
    return KERNELS[name]


def check_support(
    kernel: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    head_dim: int,
    heads: int = 1,
    kv_heads: int | None = None,
    backward: bool = False,
) -> None:
    """ValueError, naming the kernel, what was given and what it takes, unless the kernel takes this on this machine."""
    get_kernel(kernel).check(
        torch.device(device), dtype, head_dim, heads, heads if kv_heads is None else kv_heads, backward
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, kernel: str, scale: float | None = None, **options: Any
) -> Tensor:
    """softmax(scale * q k^T) v by the named kernel.

    Args:
        q: (..., H, T, D). k, v: (..., H_kv, S, D), with q's leading dimensions, device and dtype.
        causal: query i sees keys j <= i only.
        kernel: a name in KERNELS.
        scale: of the scores, above 0; None: 1 / sqrt(D).
        options: those of the kernel's entry in KERNELS.
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
    def refuse(problem: str) -> ValueError:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        wanted = "q (..., H, T, D), k and v (..., H_kv, S, D), none of them empty"
        return ValueError(f"attention kernel '{kernel}': {problem}; got {shapes}, it takes {wanted}")

    if q.ndim < 3 or k.ndim != q.ndim or v.ndim != q.ndim:
        raise refuse("q, k and v need the same number of dimensions, three or more")
    if k.shape != v.shape:
        raise refuse("k and v differ in shape")
    if q.shape[:-3] != k.shape[:-3]:
        raise refuse("q and k differ in their leading dimensions")
    if q.shape[-1] != k.shape[-1]:
        raise refuse("q and k differ in head_dim")
    if q.numel() == 0 or k.numel() == 0:
        raise refuse("a dimension is empty")
    if not (q.dtype == k.dtype == v.dtype):
        got = f"q {_short(q.dtype)}, k {_short(k.dtype)}, v {_short(v.dtype)}"
        raise ValueError(f"attention kernel '{kernel}': dtypes differ; got {got}, it takes one dtype")
    if not (q.device == k.device == v.device):
        got = f"q {q.device}, k {k.device}, v {v.device}"
        raise ValueError(f"attention kernel '{kernel}': devices differ; got {got}, it takes one device")


_LOADED: dict[str, Callable[..., Tensor]] = {}


def _constant_in_graphs(function: Callable) -> Callable:
    """Under torch.compile the function runs while the graph is traced, and its result counts as a constant.

    This is all that torch.compiler.assume_constant_result does, but calling that imports Dynamo, and Dynamo imports Triton.
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
