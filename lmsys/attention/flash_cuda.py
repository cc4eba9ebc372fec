"""FlashAttention-2 in CUDA C++ (lmsys/csrc/flash_attention.cu), forward and backward, built by nvcc on first use.

Source: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithms 1 and 2, on mma.sync tensor cores with asynchronous
copies. The kernel file explains layouts and tiles. This module finds the tools, builds the file for the GPU that is
there, and calls its two C functions with pointers and strides: the kernels include no torch header, so a build takes
seconds and fits any torch version.

Limits: float16 and bfloat16; head dim 64 or 128; compute capability 8.0 and up; a positive scale. dQ is summed by
atomic additions in float32, whose order differs between runs: dq may differ in its last bits, o, dk and dv never.
Inputs whose last dimension is not contiguous, or whose rows do not start at multiples of 16 bytes, are copied first.

Legend: B batch, H heads, H_kv key heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmsys.attention import autograd

NAME = "flash_attention_cuda"
SOURCE = Path(__file__).parents[1] / "csrc" / "flash_attention.cu"
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)

_QUERY_TILE = 64  # rows of scratch come in multiples of it


# --- Build ----------------------------------------------------------------------------------------


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run here, or None. Asks for the GPU and the tools; builds nothing."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return "needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or more; this one has {major}.{minor}"
    return _missing_tool()


def _missing_tool() -> str | None:
    if _nvcc() is None:
        missing = "by nvcc, which was not found; install the CUDA toolkit, or set CUDA_HOME to where it is"
    elif shutil.which("ninja") is None:
        missing = "with ninja, which was not found; pip install ninja"
    elif shutil.which(os.environ.get("CXX", "c++")) is None:
        missing = "with a C++ compiler, which was not found; install g++, or set CXX"
    else:
        return None
    return f"is built on first use {missing}"


def _nvcc() -> str | None:
    """Where torch.utils.cpp_extension looks too: CUDA_HOME or CUDA_PATH, the path, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is not None:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_flags(arch: str, small_shared_memory: bool = False) -> list[str]:
    """Of a build for arch, "sm_90" for example; small_shared_memory: the GPU gives a block less than 177 KiB."""
    flags = ["-O3", "-std=c++17", f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"]
    return flags + ["-DLMSYS_SMALL_SHARED_MEMORY"] * small_shared_memory


@functools.cache
def _library(device_index: int) -> ctypes.CDLL:
    """The kernels for that GPU; RuntimeError, which says why, where they cannot be built for it."""
    if (problem := _missing_tool()) is not None:
        raise RuntimeError(f"{NAME} {problem}")
    properties = torch.cuda.get_device_properties(device_index)
    arch = f"sm_{properties.major}{properties.minor}"
    targets = subprocess.run([_nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if arch not in targets:
        raise RuntimeError(
            f"{NAME}: {_nvcc()} cannot build for this GPU, {properties.name} ({arch}); it knows {', '.join(targets)}. "
            "Install a CUDA toolkit that does and set CUDA_HOME to it"
        )
    return _build(arch, small_shared_memory=properties.shared_memory_per_block_optin < 177 * 1024)


def _build(arch: str, small_shared_memory: bool) -> ctypes.CDLL:
    """Builds the kernels unless an earlier run or another process has, and loads them."""
    from torch.utils import cpp_extension

    flags = nvcc_flags(arch, small_shared_memory)
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:12]
    name = f"lmsys_flash_attention_{arch}_{key}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")) / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{name}.so").exists():
        print(f"{NAME}: building {SOURCE.name} for {arch} in {folder}; less than a minute, once", file=sys.stderr)
    # A lock file in the folder lets one process build and the others wait.
    path = cpp_extension.load(
        name, [str(SOURCE)], extra_cuda_cflags=flags, build_directory=str(folder), is_python_module=False
    )
    library = ctypes.CDLL(path)
    library.lmsys_error.restype = ctypes.c_char_p
    for backward, params in enumerate((_ForwardParams, _BackwardParams)):
        assert library.lmsys_params_bytes(backward) == ctypes.sizeof(params), "a struct here differs from the kernels'"
    return library


# --- Launch ---------------------------------------------------------------------------------------

_Strides = ctypes.c_int64 * 3  # batch, head, row; in elements


def _fields(pointers: str, strided: str) -> tuple[tuple[str, Any], ...]:
    """Of a struct of the kernel file, in its order."""
    sizes = ("batch", "heads", "kv_heads", "q_len", "k_len", "causal")
    return (
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((f"{name}_strides", _Strides) for name in strided.split()),
        *((name, ctypes.c_int32) for name in sizes),
        ("scale", ctypes.c_float),
        ("section", ctypes.c_int32),
    )


class _ForwardParams(ctypes.Structure):
    _fields_ = _fields("q k v o lse", "q k v o")


class _BackwardParams(ctypes.Structure):
    _fields_ = _fields("q k v o do lse dq dk dv rows dq_sum", "q k v o do dq dk dv")


def _params(kind: type, causal: bool, scale: float, strided: dict[str, Tensor], **contiguous: Tensor) -> Any:
    (batch, heads, q_len, _), (_, kv_heads, k_len, _) = strided["q"].shape, strided["k"].shape
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "q_len": q_len, "k_len": k_len}
    pointers = {name: tensor.data_ptr() for name, tensor in (strided | contiguous).items()}
    strides = {f"{name}_strides": _Strides(*tensor.stride()[:3]) for name, tensor in strided.items()}
    return kind(**pointers, **strides, **sizes, causal=causal, scale=scale)


def _call(function: str, params: Any, q: Tensor) -> None:
    library = _library(q.device.index)
    stream = ctypes.c_void_p(torch.cuda.current_stream(q.device).cuda_stream)
    error = getattr(library, function)(ctypes.byref(params), q.shape[3], int(q.dtype == torch.bfloat16), stream)
    if error != 0:
        raise RuntimeError(f"{NAME}: {function} failed: {library.lmsys_error(error).decode()}")


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy where its rows are not contiguous or do not start at multiples of 16 bytes."""
    *outer, last = t.stride()
    in_eights = all(n == 1 or stride % 8 == 0 for n, stride in zip(t.shape, outer, strict=False))
    if last == 1 and in_eights and t.data_ptr() % 16 == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> o (B, H, T, D), lse (B, H, T) in float32."""
    o, lse = _empty_outputs(q)
    with torch.cuda.device_of(q):
        strided = {"q": _aligned(q), "k": _aligned(k), "v": _aligned(v), "o": o}
        _call("lmsys_forward", _params(_ForwardParams, causal, scale, strided, lse=lse), q)
    return o, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped as q, k, v. o, do: (B, H, T, D); lse: (B, H, T), contiguous."""
    batch, heads, q_len, head_dim = q.shape
    padded = -(-q_len // _QUERY_TILE) * _QUERY_TILE
    with torch.cuda.device_of(q):
        inputs = {name: _aligned(t) for name, t in {"q": q, "k": k, "v": v, "o": o, "do": do}.items()}
        gradients = dict(zip(("dq", "dk", "dv"), _empty_gradients(q, k, v), strict=True))
        scratch = {
            "rows": q.new_empty(2, batch, heads, padded, dtype=torch.float32),
            "dq_sum": q.new_empty(batch, heads, padded, head_dim, dtype=torch.float32),
        }
        _call("lmsys_backward", _params(_BackwardParams, causal, scale, inputs | gradients, lse=lse, **scratch), q)
    return gradients["dq"], gradients["dk"], gradients["dv"]


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """o is laid out (B, T, H, D), as the output projection wants it, and seen as (B, H, T, D)."""
    batch, heads, q_len, head_dim = q.shape
    o = q.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    return o, q.new_empty(batch, heads, q_len, dtype=torch.float32)


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Laid out as o is: whatever the strides of the inputs, rows start at multiples of 16 bytes."""
    return tuple(
        torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2) for t in inputs
    )


flash_forward = torch.library.custom_op("lmsys::flash_attention_cuda_forward", _forward, mutates_args=())
flash_backward = torch.library.custom_op("lmsys::flash_attention_cuda_backward", _backward, mutates_args=())


@flash_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


@flash_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v)


# --- Autograd -------------------------------------------------------------------------------------


class FlashAttentionCUDA(torch.autograd.Function):
    """apply(q, k, v, is_causal=False, scale=None); shapes, and what is saved, as in lmsys.attention.autograd."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, scale: float | None = None
    ) -> Tensor:
        _check(q, k, v, scale)
        launch = flash_forward if torch.compiler.is_compiling() else _forward  # eager, the op would only cost time
        return autograd.forward(ctx, launch, q, k, v, is_causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return autograd.backward(ctx, flash_backward if torch.compiler.is_compiling() else _backward, do)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    got = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim not in (3, 4) or k.ndim != q.ndim or k.shape != v.shape or q.shape[0] != k.shape[0]:
        taken = "q (B, H, T, D) and k, v (B, H_kv, S, D), or q (B, T, D) and k, v (B, S, D)"
    elif q.shape[-1] != k.shape[-1] or q.shape[-1] not in HEAD_DIMS:
        taken = f"head_dim {' or '.join(map(str, HEAD_DIMS))}, the same for all"
    elif q.numel() == 0 or k.numel() == 0:
        taken = "no empty dimension"
    elif q.ndim == 4 and q.shape[1] % k.shape[1] != 0:
        taken = "a number of query heads that is a multiple of the key heads"
    elif not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        got, taken = f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "float16 or bfloat16, the same for all"
    elif not (q.is_cuda and q.device == k.device == v.device):
        got, taken = f"q on {q.device}, k on {k.device}, v on {v.device}", "tensors on one CUDA GPU"
    elif scale is not None and not 0 < scale < math.inf:
        got, taken = f"scale {scale}", "a positive, finite one"
    else:
        return
    raise ValueError(f"attention kernel '{NAME}': got {got}; it takes {taken}")


def flash_attention_cuda(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """q: (B, H, T, D), k, v: (B, H_kv, S, D) -> (B, H, T, D). The scale is 1 / sqrt(D) where it is None."""
    return FlashAttentionCUDA.apply(q, k, v, causal, scale)
