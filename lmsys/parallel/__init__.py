"""Data-parallel wrappers: their registry, and the way from a name to a wrapped module.

A wrapper makes replicas of a module in several processes train as one: it broadcasts parameters and buffers from rank 0,
and its finish_gradient_synchronization(), called after backward and before the optimizer step, leaves every process with
the gradients' mean. `none` is one process and leaves the module as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmsys.config import unknown_name

if TYPE_CHECKING:
    from torch import nn

# The names of the data-parallel contract. WRAPPERS says which of them this version has.
NAMES = ("none", "naive", "flat", "overlap", "flashddp", "torch_ddp", "fsdp", "torch_fsdp2")


@dataclass(frozen=True)
class Wrapper:
    """One entry of WRAPPERS. wrap(module, **options) returns the module to train."""

    description: str
    many_processes: bool  # True: needs more than one process; False: is for exactly one
    wrap: Callable[..., nn.Module]


WRAPPERS: dict[str, Wrapper] = {
    "none": Wrapper("one process, nothing to synchronize", many_processes=False, wrap=lambda module: module),
}


def check_wrapper(name: str, world_size: int) -> None:
    """Raise ValueError unless the wrapper exists and fits the number of processes."""
    if name not in NAMES:
        raise unknown_name("ddp_wrapper", name, NAMES)
    if world_size == 1 and name != "none":
        raise ValueError(
            f"ddp_wrapper '{name}' averages gradients between processes and needs more than one; "
            "this run has 1 (start it with torchrun, or use none)"
        )
    if name not in WRAPPERS:
        raise ValueError(f"ddp_wrapper '{name}' is not in this version, which has: {', '.join(WRAPPERS)}")
    if world_size > 1 and not WRAPPERS[name].many_processes:
        raise ValueError(
            f"ddp_wrapper '{name}' is for one process and this run has {world_size}, which would train apart; "
            f"start it without torchrun (this version has: {', '.join(WRAPPERS)})"
        )


def wrap(module: nn.Module, wrapper: str, **options: Any) -> nn.Module:
    """The module under a wrapper of WRAPPERS; for `none`, the module itself. Call check_wrapper first."""
    if wrapper not in WRAPPERS:
        raise unknown_name("ddp_wrapper", wrapper, WRAPPERS)
    return WRAPPERS[wrapper].wrap(module, **options)
