"""Which implementation of flash_attention_triton runs: a table of rules, each with the reason for which it refuses.

Two paths give the same results within rounding, and each reads what the other saved:
- portable: lmsys.attention.flash_triton, any GPU that Triton knows and Triton's CPU interpreter.
- hopper: lmsys.attention.flash_hopper, in Gluon, for GPUs of compute capability 9.0; RULES says for which inputs.

path="auto" follows the environment variable LMSYS_FLASH_PATH where it is set, and else takes hopper where no rule
refuses it: there it is the faster one. "portable" always goes; "hopper" raises ValueError, with the reasons, where a
rule refuses. The choice is made at each call, in the forward and again in the backward pass, and reads no
device memory.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["HEAD_DIMS", "PATHS", "RULES", "VARIABLE", "Explanation", "Path", "choose", "explain", "interpreted"]

PATHS = ("auto", "portable", "hopper")
VARIABLE = "LMSYS_FLASH_PATH"
HEAD_DIMS = (64, 128)  # those of the hopper path
_ALIGNMENT = 16  # bytes; of base pointers and strides that the TMA unit takes


class Path(NamedTuple):
    """A choice. reasons: the first refusal of the hopper path, or who asked for it; empty where auto took hopper."""

    name: str
    reasons: tuple[str, ...]


def interpreted() -> bool:
    """Whether Triton's kernels run in its CPU interpreter in this process."""
    return not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


# --- The rules of the hopper path -----------------------------------------------------------------


class _Call(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    backward: bool
    deterministic: bool


@functools.cache
def _machine_of(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device.type}; it needs a CUDA GPU of compute capability 9.0"
    if interpreted():
        return "Triton's interpreter is on; it needs compiled kernels"
    if torch.version.hip is not None:
        return "the GPU is AMD's; it needs a CUDA GPU of compute capability 9.0"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the GPU has compute capability {major}.{minor}; it needs 9.0"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon (triton.experimental.gluon); install Triton 3.6 or later"
    return None


def _dtype(call: _Call) -> str | None:
    if call.q.dtype in (torch.float16, torch.bfloat16):
        return None
    return f"dtype is {str(call.q.dtype).removeprefix('torch.')}; it takes float16 and bfloat16"


def _head_dim(call: _Call) -> str | None:
    head_dim = call.q.shape[-1]
    return None if head_dim in HEAD_DIMS else f"head_dim is {head_dim}; it takes {' and '.join(map(str, HEAD_DIMS))}"


def _layout(call: _Call) -> str | None:
    on_gpu = call.q.device.type == "cuda"
    for name, tensor in zip("qkv", call[:3], strict=True):
        reason = _layout_of(tensor.shape, tensor.stride(), tensor.itemsize)
        if reason is not None:
            return f"{name} {reason}"
        if on_gpu and tensor.data_ptr() % _ALIGNMENT != 0:
            return f"{name} starts at an address that is no multiple of {_ALIGNMENT} bytes"
    return None


@functools.lru_cache(maxsize=4096)
def _layout_of(shape: torch.Size, stride: tuple[int, ...], itemsize: int) -> str | None:
    if stride[-1] != 1 and shape[-1] > 1:
        return f"has stride {stride[-1]} in its last dimension; it takes 1"
    for length, step in zip(shape[:-1], stride[:-1], strict=True):
        if length > 1 and (step <= 0 or step * itemsize % _ALIGNMENT != 0):
            return f"has strides {tuple(stride)}; it takes positive multiples of {_ALIGNMENT} bytes"
    return None


def _rows(call: _Call) -> str | None:
    rows = call.q.numel() // call.q.shape[-1]
    return None if rows < 2**31 else f"batch * heads * q_len is {rows}; it takes less than 2^31"


def _determinism(call: _Call) -> str | None:
    if call.backward and (call.deterministic or torch.are_deterministic_algorithms_enabled()):
        return "deterministic gradients are asked for; its backward pass sums dQ by atomic adds"
    return None


# What the hopper path asks for. Each gives the reason for which it refuses a call, or None. They run at each call, in
# this order, so what the machine or a layout alone decides is remembered.
RULES: dict[str, Callable[[_Call], str | None]] = {
    "machine": lambda call: _machine_of(call.q.device),
    "dtype": _dtype,
    "head_dim": _head_dim,
    "layout": _layout,
    "rows": _rows,
    "determinism": _determinism,
}


# --- The choice -----------------------------------------------------------------------------------


def choose(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backward: bool, deterministic: bool = False, path: str = "auto"
) -> Path:
    """The path of one pass, forward or backward, over q (..., H, T, D), k and v (..., H_kv, S, D).

    Args:
        causal: no rule asks for it today.
        deterministic: gradients must be the same bits in every run; torch.use_deterministic_algorithms asks for it too.
    Raises:
        ValueError: an unknown path, in the argument or the environment variable; or hopper, where a rule refuses it.
    """
    source = f"path='{path}'"
    if path == "auto":
        path = os.environ.get(VARIABLE) or "auto"
        source = f"the environment variable {VARIABLE}={path}"
    if path not in PATHS:
        raise ValueError(f"attention kernel 'flash_attention_triton': got {source}; it takes {', '.join(PATHS)}")
    if path == "portable":
        return Path("portable", (f"{source} asks for it",))
    call = _Call(q, k, v, backward, deterministic)
    refusal = next(_refusals(call), None)
    if refusal is None:
        return Path("hopper", () if path == "auto" else (f"{source} asks for it",))
    if path == "hopper":
        side = "backward" if backward else "forward"
        raise ValueError(
            f"attention kernel 'flash_attention_triton': got {source}, and the hopper path's {side} pass does not take "
            f"this call: {'; '.join(_refusals(call))}. Take 'portable', or 'auto' to have it where it goes"
        )
    return Path("portable", (refusal,))


def _refusals(call: _Call) -> Iterator[str]:
    return (reason for rule in RULES.values() if (reason := rule(call)) is not None)


@dataclass(frozen=True)
class Explanation:
    """What flash_attention_triton would run. reasons: of all rules that refuse hopper, or who asked for this path."""

    forward: str
    backward: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"forward: {self.forward}, backward: {self.backward}"]
        return "\n".join(lines + [f"- {reason}" for reason in self.reasons or ("no rule refuses the hopper path",)])


def explain(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, *, deterministic: bool = False, path: str = "auto"
) -> Explanation:
    """Which path flash_attention_triton takes for these tensors, and why. Launches nothing.

    Meta tensors do, but only real ones have the device and the address that the choice depends on.
    """
    forward, backward = (
        choose(q, k, v, causal=causal, backward=side, deterministic=deterministic, path=path) for side in (False, True)
    )
    asked = path != "auto" or os.environ.get(VARIABLE, "auto") not in ("", "auto")
    reasons = (not asked and tuple(_refusals(_Call(q, k, v, True, deterministic)))) or forward.reasons
    return Explanation(forward.name, backward.name, reasons)
