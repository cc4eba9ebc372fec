"""Data-parallel wrappers: their registry, and the way from a name to a wrapped module.

A wrapper makes replicas of a module in several processes train as one: it broadcasts parameters and buffers from rank
0, and its finish_gradient_synchronization(), called after backward and before the optimizer step, leaves every process
with the gradients' mean. What others need to know of it is data in its entry. Importing this imports no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmsys.config import unknown_name

if TYPE_CHECKING:
    from torch import nn

ZERO1 = "+zero1"  # after a wrapper's name in results: with the sharded optimizer
_ZERO1_COLOUR = "#882255"


@dataclass(frozen=True)
class Wrapper:
    """One entry of WRAPPERS."""

    description: str
    source: str  # MODULE.NAME of lmsys.parallel: (module, **options) -> the module to train; empty: the module itself
    label: str  # in tables and figures
    colour: str
    peer: bool = False  # PyTorch's own, which ours are compared with
    many_processes: bool = True  # needs more than one process; else is for exactly one
    options: tuple[str, ...] = ()  # settings of train that are arguments of its own
    # Each process holds its part of parameters, gradients and optimizer state. The module then has clip_grad_norm_,
    # full_state_dict, gather_optimizer_state and scatter_optimizer_state, takes compute_dtype, and its no_sync() still
    # communicates, as it gathers parameters.
    sharded: bool = False
    plain_tensors: bool = True  # of parameters, as kernels of our own read them
    captured_options: Mapping[str, Any] = field(default_factory=dict)  # where the pass is captured as a CUDA graph
    message: str = "bucket"  # the gradients that travel together: of a parameter, all, or a bucket
    overlaps: bool = True  # during backward

    @property
    def replicated(self) -> bool:
        """Each of several processes has all parameters and gradients, as the sharded optimizer (ZeRO-1) expects it."""
        return self.many_processes and not self.sharded

    @property
    def capturable(self) -> bool:
        """Its gradients stay where a captured pass left them: it trains in CUDA graphs."""
        return not self.sharded


WRAPPERS: dict[str, Wrapper] = {
    "none": Wrapper("one process, nothing to synchronize", "", "one process", "#999999", many_processes=False),
    "naive": Wrapper(
        "one all-reduce a parameter, after backward", "ddp.Naive", "naive", "#56B4E9",
        message="parameter", overlaps=False,
    ),
    "flat": Wrapper(
        "one all-reduce of all gradients, after backward", "ddp.Flat", "flat", "#0072B2", message="all", overlaps=False
    ),
    "overlap": Wrapper(
        "one asynchronous all-reduce a parameter, during backward", "ddp.Overlap", "overlap", "#009E73",
        options=("communication_dtype",), message="parameter",
    ),
    "flashddp": Wrapper(
        "buckets in order of arrival, during backward", "ddp.FlashDDP", "FlashDDP", "#D55E00",
        options=("bucket_size_mb", "communication_dtype", "transport"),
        captured_options={"transport": "auto"},  # copies are the fastest once the host does not launch each
    ),
    "torch_ddp": Wrapper(
        "torch's DistributedDataParallel", "ddp.TorchDDP", "PyTorch DDP", "#F0C808",
        peer=True, options=("bucket_size_mb", "communication_dtype"),
    ),
    "fsdp": Wrapper(
        "fully sharded parameters, gradients and optimizer state", "fsdp.fully_shard", "FSDP", "#CC79A7", sharded=True
    ),
    "torch_fsdp2": Wrapper(
        "torch's fully_shard", "fsdp.torch_fsdp2", "PyTorch FSDP2", "#E69F00",
        peer=True, sharded=True, plain_tensors=False,
    ),
}  # fmt: skip


def get_wrapper(name: str) -> Wrapper:
    if name not in WRAPPERS:
        raise unknown_name("ddp_wrapper", name, WRAPPERS)
    return WRAPPERS[name]


def drawn_as(name: str) -> Wrapper:
    """What tables and figures show of a wrapper of a result: of NAME+zero1 with a label and a colour of its own."""
    wrapper = get_wrapper(name.removesuffix(ZERO1))
    if not name.endswith(ZERO1):
        return wrapper
    return dataclasses.replace(wrapper, label=f"{wrapper.label} + ZeRO-1", colour=_ZERO1_COLOUR)


def takers(option: str) -> list[str]:
    return [name for name, wrapper in WRAPPERS.items() if option in wrapper.options]


def check_wrapper(name: str, world_size: int) -> None:
    """Raise ValueError unless the wrapper exists and fits the number of processes."""
    many_processes = get_wrapper(name).many_processes
    if world_size == 1 and many_processes:
        raise ValueError(
            f"ddp_wrapper '{name}' averages gradients between processes and needs more than one; "
            "this run has 1 (start it with torchrun, or use none)"
        )
    if world_size > 1 and not many_processes:
        many = ", ".join(known for known, wrapper in WRAPPERS.items() if wrapper.many_processes)
        raise ValueError(
            f"ddp_wrapper '{name}' is for one process and this run has {world_size}, which would train apart; "
            f"start it without torchrun, or use one of {many}"
        )


def wrap(module: nn.Module, wrapper: str, **options: Any) -> nn.Module:
    """The module under a wrapper of WRAPPERS; for `none`, the module itself. Call check_wrapper first."""
    source = get_wrapper(wrapper).source
    if not source:
        return module
    file, name = source.split(".")
    return getattr(importlib.import_module(f"lmsys.parallel.{file}"), name)(module, **options)
