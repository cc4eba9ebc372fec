"""Data-parallel wrappers: their registry, and the way from a name to a wrapped module.

A wrapper makes replicas of a module in several processes train as one: it broadcasts parameters and buffers from rank 0,
and its finish_gradient_synchronization(), called after backward and before the optimizer step, leaves every process with
the gradients' mean. `none` is one process and leaves the module as it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmsys.config import unknown_name

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Wrapper:
    """One entry of WRAPPERS. wrap(module, **options) returns the module to train."""

    description: str
    many_processes: bool  # True: needs more than one process; False: is for exactly one
    wrap: Callable[..., nn.Module]


def _lazy(module: str, name: str) -> Callable[..., nn.Module]:
    """What `name` of lmsys.parallel.MODULE makes of a module; imported, and torch.distributed with it, when it is first called."""

    def wrap(wrapped: nn.Module, **options: Any) -> nn.Module:
        return getattr(importlib.import_module(f"lmsys.parallel.{module}"), name)(wrapped, **options)

    return wrap


WRAPPERS: dict[str, Wrapper] = {
    "none": Wrapper("one process, nothing to synchronize", many_processes=False, wrap=lambda module: module),
    "naive": Wrapper("one all-reduce a parameter, after backward", True, _lazy("ddp", "Naive")),
    "flat": Wrapper("one all-reduce of all gradients, after backward", True, _lazy("ddp", "Flat")),
    "overlap": Wrapper("one asynchronous all-reduce a parameter, during backward", True, _lazy("ddp", "Overlap")),
    "flashddp": Wrapper("buckets in order of arrival, during backward", True, _lazy("ddp", "FlashDDP")),
    "torch_ddp": Wrapper("torch's DistributedDataParallel", True, _lazy("ddp", "TorchDDP")),
    "fsdp": Wrapper("fully sharded parameters, gradients and optimizer state", True, _lazy("fsdp", "fully_shard")),
    "torch_fsdp2": Wrapper("torch's fully_shard", True, _lazy("fsdp", "torch_fsdp2")),
}


def check_wrapper(name: str, world_size: int) -> None:
    """Raise ValueError unless the wrapper exists and fits the number of processes."""
    if name not in WRAPPERS:
        raise unknown_name("ddp_wrapper", name, WRAPPERS)
    many = [known for known, wrapper in WRAPPERS.items() if wrapper.many_processes]
    if world_size == 1 and name in many:
        raise ValueError(
            f"ddp_wrapper '{name}' averages gradients between processes and needs more than one; "
            "this run has 1 (start it with torchrun, or use none)"
        )
    if world_size > 1 and name not in many:
        raise ValueError(
            f"ddp_wrapper '{name}' is for one process and this run has {world_size}, which would train apart; "
            f"start it without torchrun, or use one of {', '.join(many)}"
        )


def wrap(module: nn.Module, wrapper: str, **options: Any) -> nn.Module:
    """The module under a wrapper of WRAPPERS; for `none`, the module itself. Call check_wrapper first."""
    if wrapper not in WRAPPERS:
        raise unknown_name("ddp_wrapper", wrapper, WRAPPERS)
    return WRAPPERS[wrapper].wrap(module, **options)
