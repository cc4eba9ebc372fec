"""Which device a run is on, what its peak is, and the stamp of the environment that every result carries."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Dense peak in TFLOP/s by GPU name (as torch.cuda.get_device_name gives it) and dtype. bf16 and fp16 peak alike.
# fp32 is the plain CUDA-core rate; tf32 the tensor cores'. Sources: NVIDIA's datasheets of each part, dense figures
# (the sheets print the sparse ones, twice as high, for A100 and later).
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "NVIDIA H200": {"bf16": 989.5, "fp16": 989.5, "tf32": 494.7, "fp32": 66.9},  # H200 Tensor Core GPU datasheet, SXM
    "NVIDIA H100 80GB HBM3": {"bf16": 989.5, "fp16": 989.5, "tf32": 494.7, "fp32": 66.9},  # H100 datasheet, SXM
    "NVIDIA H100 PCIe": {"bf16": 756.5, "fp16": 756.5, "tf32": 378.0, "fp32": 51.2},  # H100 datasheet, PCIe
    "NVIDIA A100-SXM4-80GB": {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},  # A100 datasheet
    "NVIDIA A100-SXM4-40GB": {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "NVIDIA A100 80GB PCIe": {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "NVIDIA L4": {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3},  # L4 datasheet, half of the sparse figures
    "Tesla T4": {"fp16": 65.0, "fp32": 8.1},  # T4 datasheet; no bf16, no tf32
    "NVIDIA GeForce RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},  # Ada whitepaper, appendix A
    "NVIDIA GeForce RTX 3090": {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6},  # GA102 whitepaper, table 3
}


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device of a setting: auto (CUDA if there is one, else CPU), cpu, cuda or cuda:N.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{name}' is not one that lmsys runs on; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device '{name}' is not here: this machine has {count} CUDA GPU(s); give auto or cpu")
    return device


@contextmanager
def fp32_products(precision: str | None) -> Iterator[None]:
    """Matrix products of fp32 in here are "highest" (IEEE) or "high" (TF32, where there is it); None: as they are."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before if precision is None else precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@functools.cache
def cpu_name() -> str:
    """The CPU's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_flops(name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of a GPU by its name, in fp32, tf32, bf16 or fp16; None where it is not known."""
    tflops = PEAK_TFLOPS.get(name, {}).get(dtype)
    return None if tflops is None else tflops * 1e12


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, Any]:
    """Commit of the package's repository and whether its tracked files differ from it.

    LMSYS_GIT_COMMIT gives the commit on a host that runs a copy of the tree without its history.
    """
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("LMSYS_GIT_COMMIT"), "dirty": None}
    return {"commit": commit, "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))}


@functools.cache
def sources_hash() -> str:
    """SHA-256 of the package's sources, their paths and contents: what code measured, without its history too."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".json", ".toml")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Where a result was measured: code, GPUs with driver and clocks as found, CUDA, torch, Triton, NCCL, CPU, date."""
    import torch

    stamp: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": sources_hash(),
        "git": git_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if find_spec("triton") else None,
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "gpu": None,
        "gpu_count": 0,
    }
    if torch.cuda.is_available():
        stamp |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_count": torch.cuda.device_count(),
            "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        }
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        query = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
        if query:
            names = ("driver", "clock_sm", "clock_sm_max", "clock_memory", "power_limit")
            stamp |= dict(zip(names, map(str.strip, query.splitlines()[0].split(",")), strict=False))
    return stamp
