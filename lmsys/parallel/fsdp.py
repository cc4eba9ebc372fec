"""Fully sharded data parallel: every rank keeps 1/N of each weight matrix; whole ones exist only while they are used.

Sources: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.3 (stage 3); Zhao et al., PyTorch FSDP, arXiv 2304.11277.

    block i      a child of a ModuleList or Sequential: its matrices are one flat buffer, so one all-gather, and every
                 matrix a view of what arrives: nothing is copied out. Gathered `prefetch` blocks ahead, freed after
                 use, gathered again in reverse order for backward, where forward's last block is still there.
    the rest     embedding, head: a buffer each, gathered when the module is called, freed when its gradients are there.
    shard        1/N of each buffer, in the parameters' own dtype (fp32), which is what the optimizer updates; cast to
                 compute_dtype before the all-gather, into the rank's part of the buffer: the operation is in place.
    gradients    of a block: copied into one buffer as its backward ends, the mean reduce-scattered while the next
                 block's runs, added to the shards' gradients in their dtype.
    replicated   all that the predicate leaves (norms): whole on each rank, gradients averaged at the end of a step.

Unlike in torch's FSDP2 a parameter stays the object that it is, and a view of one storage, whose memory comes and goes:
what autograd saved of it is whole again in backward. In between it reads as NaN. A buffer is allocated and freed on the
compute stream, which waits for the collective before use: every reuse of memory is ordered by stream, and the host
never waits. At most prefetch + 1 blocks are whole at a time, and one block's gradients are in flight.

All ranks run the same blocks in one order, as their collectives must match, but may differ in which parameters they
use: a block's gradients leave at a point of the graph (where the backward pass of the block before it begins), not when
they happen to be complete. A gradient counts as zero on a rank that did not use its parameter; where no rank did it is
None, as with one process.

Activation checkpointing and compile by block work: gathering is in the block's __call__, outside of what is compiled.
Under autocast give its dtype as compute_dtype, or the casts that autocast keeps are a second model.

Limits: a block must be called, not have its weights read by others (tied weights are found and kept with the rest), and
return tensors or lists, tuples and dictionaries of them; the optimizer must be elementwise; requires_grad is read once;
the module is not compiled whole, pickled, cast or moved; no CUDA graphs around blocks, no double backward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lmsys.parallel import shards
from lmsys.parallel.fsdp_state import Flat, ShardedState
from lmsys.parallel.group import broadcast_from_rank0, check_initialized, check_same_everywhere, gather_objects
from lmsys.parallel.shards import MeanInFlight

_graph_task = torch._C._current_graph_task_id  # which backward pass this thread is in; -1 for none
# Of torch, with weights that keep their dtype: they compute in that and return the dtype of their input.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """The default choice of what is sharded: two or more dimensions."""
    return parameter.ndim >= 2


class _Unit:
    """What is gathered at once: the flat buffers of a block, or of the rest of the module."""

    def __init__(self, name: str, flats: Sequence[Flat]):
        self.name, self.flats = name, flats

    def gather(self) -> None:
        for flat in self.flats:
            flat.gather()

    def wait(self) -> None:
        for flat in self.flats:
            flat.wait()

    def free(self) -> None:
        for flat in self.flats:
            flat.free()


@functools.cache
def _gathering(cls: type[nn.Module]) -> type[nn.Module]:
    """The class whose instances gather their parameters around a call, outside of hooks and of a compiled forward."""

    class Gathering(cls):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            owner, unit = self.__dict__["_fully_sharded"]
            if owner._is_whole:
                return super().__call__(*args, **kwargs)
            number, position = owner._before_forward(unit)
            return owner._after_forward(unit, number, position, super().__call__(*args, **kwargs))

    Gathering.__name__, Gathering.__qualname__, Gathering.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Gathering


class FullyShardedModule(ShardedState):
    """A module with its matrices sharded over the ranks. Make its optimizer from its parameters(), this rank's part.

    Args:
        module: on the device of this rank; its parameters and buffers become rank 0's.
        is_sharded: of a parameter's name and itself.
        compute_dtype: of whole matrices and the biases beside them; floating-point inputs are cast to it. None: own.
        communication_dtype: of gradients as they are averaged. None: compute_dtype.
        prefetch: blocks gathered ahead, 0 or more.
    Raises:
        ValueError: an option, no process group, or parameters that differ between ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        is_sharded: Callable[[str, nn.Parameter], bool] = is_matrix,
        compute_dtype: torch.dtype | None = None,
        communication_dtype: torch.dtype | None = None,
        prefetch: int = 2,
    ):
        check_initialized("fully_shard")
        if not isinstance(prefetch, int) or prefetch < 0:
            raise ValueError(f"prefetch is {prefetch!r}; it must be an integer of 0 or more")
        for name, dtype in (("compute_dtype", compute_dtype), ("communication_dtype", communication_dtype)):
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ValueError(f"{name} is {dtype!r}; give a floating-point dtype, such as torch.bfloat16, or None")
        named = dict(module.named_parameters())
        lines = (f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in named.items())
        check_same_everywhere("\n".join(lines), "the module")
        filled = {name: parameter for name, parameter in named.items() if parameter.numel()}
        names = {name for name, parameter in filled.items() if is_sharded(name, parameter)}
        modules = {name.rpartition(".")[0] for name in names} if compute_dtype is not None else set()
        # with compute_dtype also the vectors beside the matrices, which need their dtype
        sharded = [name for name in filled if name in names or name.rpartition(".")[0] in modules]
        if not sharded:
            raise ValueError("is_sharded chose no parameter of the module; use a wrapper such as flashddp")
        blocks = _blocks(module)
        owners: dict[int, set[str]] = {}  # id of a parameter -> names of its blocks, "" for what is in none
        for name, parameter in module.named_parameters(remove_duplicate=False):
            block = next((block for block in blocks if name.startswith(f"{block}.")), "")
            owners.setdefault(id(parameter), set()).add(block)
        parts: dict[tuple[Any, ...], dict[str, nn.Parameter]] = {}  # what lies in one buffer; first the block, or ""
        for name in sharded:
            parameter = named[name]
            block = owners[id(parameter)].pop() if len(owners[id(parameter)]) == 1 else ""
            key = (block, parameter.dtype, parameter.requires_grad) if block else (block, name)
            parts.setdefault(key, {})[name] = parameter
        flats: dict[str, list[Flat]] = {"": []}
        for (block, *_), part in parts.items():
            flats.setdefault(block, []).append(Flat(part, compute_dtype, communication_dtype))
        super().__init__(module, [flat for unit in flats.values() for flat in unit])
        broadcast_from_rank0([*(p.data for p in self._replicated), *module.buffers()])
        self.compute_dtype, self.prefetch = compute_dtype, prefetch
        for part in module.modules() if compute_dtype is not None else ():
            parameter = next(part.parameters(recurse=False), None)
            if isinstance(part, _NORMS) and parameter is not None and parameter.dtype != compute_dtype:
                part.forward = functools.partial(_in_own_dtype, part.forward, parameter.dtype)
        self._rest = _Unit("the rest", flats.pop(""))
        self._units = [_Unit(name, unit) for name, unit in flats.items()]
        for unit in self._units:
            block = blocks[unit.name]
            block.__class__ = _gathering(type(block))
            block.__dict__["_fully_sharded"] = (self, unit)
        self._trained = [flat for flat in self._flats if flat.requires_grad]
        for flat in self._trained:
            for parameter in flat.parameters:
                shards.on_gradient(parameter, self._gradient_arrived)

        self._order: list[_Unit] = []  # blocks as the last forward pass called them
        self._called: list[_Unit] = []  # in the pass that runs
        self._calls = 0  # of blocks, ever
        self._forwards = 0  # passes whose backward is to come
        self._used: set[int] = set()  # sharded parameters that got a gradient since the last step, by id
        self._plan: dict[Flat, int] | None = None  # of the rest: after how many blocks of backward its gradients leave
        self._completed: dict[Flat, int] = {}  # what the first backward pass saw of that
        self._flight: tuple[Flat, MeanInFlight] | None = None
        self._reset()

    def _reset(self) -> None:
        """What a backward pass keeps, as it is between passes."""
        self._in_backward = False
        self._begun: dict[_Unit, int] = {}  # blocks whose backward has begun -> the number of the call
        self._entered = 0  # how often a block's backward has begun
        self._missing = {flat: {id(parameter) for parameter in flat.parameters} for flat in self._trained}
        self._reduced: set[Flat] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_whole:
            return self.module(*args, **kwargs)
        if self.compute_dtype is not None:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        recomputing = _graph_task() != -1  # the whole module is checkpointed
        if not recomputing:
            self._receive()  # of a backward pass before, whose step is still to come
            self._reset()
            self.free()  # what is there may be of before the last step
            self._called = []
        self._rest.gather()
        if not recomputing:
            for unit in self._order[: self.prefetch]:
                unit.gather()
        self._rest.wait()
        output = self.module(*args, **kwargs)
        if recomputing:
            return output
        self._order, self._called = self._called, []
        trained = _trained(output)
        for tensor in trained:
            tensor.register_hook(self._begin_backward)
        if trained:
            self._forwards += 1
        else:
            self._rest.free()
        return output

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.compute_dtype) if value.is_floating_point() else value

    def _before_forward(self, unit: _Unit) -> tuple[int, int]:
        """Gather a block, and start on those that come after it. Returns the call's number, ever and in the pass."""
        position = len(self._called)
        unit.gather()
        if _graph_task() == -1:
            self._called.append(unit)
            if position < len(self._order) and self._order[position] is unit:
                for ahead in self._order[position + 1 : position + 1 + self.prefetch]:
                    ahead.gather()
        unit.wait()
        self._calls += 1
        return self._calls, position

    def _after_forward(self, unit: _Unit, number: int, position: int, output: Any) -> Any:
        if _graph_task() != -1:  # a checkpoint computes the block again for its backward, which needs it right after
            if unit not in self._begun:
                unit.free()
            return output
        trained = _trained(output)
        for tensor in trained:
            tensor.register_hook(functools.partial(self._before_backward, unit, number, position))
        is_last = position == len(self._order) - 1 and self._order[-1] is unit
        if not (is_last and trained):  # the last one's backward comes next
            unit.free()
        return output

    def _begin_backward(self, gradient: Tensor | None = None) -> None:
        """The gradient of the module's output has come."""
        if self._in_backward:
            return
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._rest.gather()
        for unit in self._order[::-1][: self.prefetch]:
            unit.gather()
        self._rest.wait()

    def _before_backward(self, unit: _Unit, number: int, position: int, gradient: Tensor) -> None:
        """The gradient of a block's output has come: the blocks after it are done."""
        self._begin_backward()
        if self._begun.get(unit) == number:  # another of its outputs
            return
        for done, begun in list(self._begun.items()):
            if begun > number:
                self._finish_block(done)
        self._begun[unit] = number
        self._entered += 1
        if self._plan is not None and self._forwards == 1:
            for flat, entered in self._plan.items():
                if entered < self._entered and flat not in self._reduced:
                    self._reduce(flat)
                    flat.free()
        unit.gather()
        for ahead in self._order[max(position - self.prefetch, 0) : position][::-1]:
            ahead.gather()
        unit.wait()

    def _finish_block(self, unit: _Unit) -> None:
        """The backward of a block has run: free it, and send what gradients it has, unless the block is used again."""
        del self._begun[unit]
        for flat in unit.flats:
            if flat.requires_grad and len(self._missing[flat]) < len(flat.parameters) and flat not in self._reduced:
                self._reduce(flat)
            flat.free()

    def _gradient_arrived(self, parameter: Tensor) -> None:
        flat = self._flat_of[id(parameter)]
        if flat in self._reduced:
            name = flat.pieces[next(i for i, own in enumerate(flat.parameters) if own is parameter)].name
            raise RuntimeError(
                f"a gradient of {name} came after the others of its buffer had left: the blocks ran in another order "
                "than before, or the module was called within its own backward pass"
            )
        self._used.add(id(parameter))
        self._missing[flat].discard(id(parameter))
        if not self._missing[flat]:
            self._completed[flat] = self._entered

    @torch.no_grad()
    def _reduce(self, flat: Flat) -> None:
        """Start to average a buffer's gradients over ranks; those that are missing count as zero."""
        self._receive()
        self._reduced.add(flat)
        gradients = flat.take_gradients(flat.whole.numel(), flat.communication_dtype)
        self._flight = flat, MeanInFlight(gradients, flat.shares)

    @torch.no_grad()
    def _receive(self) -> None:
        """Wait, on the stream, for the gradients in flight, and add them to those of the pieces."""
        if self._flight is None:
            return
        (flat, flight), self._flight = self._flight, None
        mean = flight.wait().to(flat.shard.dtype)
        for _, _, _, leaf in flat.pieces:
            if leaf.numel():
                at = leaf.storage_offset()
                gradient = mean[at : at + leaf.numel()].view(leaf.shape)
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)

    def _end_backward(self) -> None:
        """All gradients are there: send what has not left, free what is whole, and learn when the rest was complete."""
        for flat in self._trained:
            if flat not in self._reduced:
                self._reduce(flat)
        self.free()
        if self._plan is None and self._forwards == 1:
            mine = [self._completed.get(flat, -1) for flat in self._rest.flats]
            latest = map(max, zip(*gather_objects(mine), strict=True))  # on the last rank
            plan = zip(self._rest.flats, latest, strict=True)
            self._plan = {flat: entered for flat, entered in plan if 0 <= entered < len(self._order)}
        self._forwards = 0
        self._reset()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Changes nothing: gradients accumulate in the shards, each backward pass reducing its own."""
        yield

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """After backward, before the step: average what is replicated; the stream waits for gradients on their way."""
        self._receive()
        replicated = [parameter for parameter in self._replicated if parameter.requires_grad]
        sharded = [pair for flat in self._trained for pair in zip(flat.pieces, flat.parameters, strict=True)]
        here = [parameter.grad is not None for parameter in replicated]
        here += [id(parameter) in self._used for _, parameter in sharded]
        self._used = set()
        sizes = [parameter.numel() for parameter in replicated]
        flat = torch.zeros(sum(sizes) + len(here), device=self._device)
        *parts, flags = flat.split([*sizes, len(here)])
        means = [part.view(parameter.shape) for part, parameter in zip(parts, replicated, strict=True)]
        shards.copy_present(means, [parameter.grad for parameter in replicated])
        flags.copy_(shards.flags_of(here, self._device))
        if self._world_size > 1:
            dist.all_reduce(flat, op=shards.mean_operation(flat))
        used = iter(shards.used_anywhere(here, flags))
        for parameter, mean in zip(replicated, means, strict=True):
            parameter.grad = mean.to(parameter.dtype) if next(used) else None
        for piece, _ in sharded:
            if not next(used):
                piece.tensor.grad = None

    @property
    def gathered(self) -> list[str]:
        """The names of the blocks that are whole or on their way."""
        return [unit.name for unit in self._units if unit.flats[0].gathered]


fully_shard = FullyShardedModule  # torch's name for it


class TorchFSDP2(nn.Module):
    """torch's fully_shard on each block and on the module, with the interface that the registry names: the peer.

    Its parameters() are DTensors, sharded by rows; the module is changed in place, as torch does.
    compute_dtype: its param_dtype, of norms too.
    """

    def __init__(self, module: nn.Module, *, compute_dtype: torch.dtype | None = None):
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__()
        check_initialized("torch_fsdp2")
        broadcast_from_rank0([*(p.data for p in module.parameters()), *module.buffers()])
        mesh = DeviceMesh.from_group(dist.group.WORLD, next(module.parameters()).device.type)
        # Blocks' inputs stay as they are: a table of angles must not be rounded; autocast casts what matmuls take.
        policy = MixedPrecisionPolicy(compute_dtype, cast_forward_inputs=False)
        for block in _blocks(module).values():
            if next(block.parameters(), None) is not None:
                fully_shard(block, mesh=mesh, mp_policy=policy)
        self.module = fully_shard(module, mesh=mesh, mp_policy=policy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients accumulate whole on each rank."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def finish_gradient_synchronization(self) -> None:
        """Nothing is left to do: torch waits at the end of backward."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        norm = nn.utils.get_total_norm(p.grad for p in self.parameters() if p.grad is not None)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters(), max_norm, norm)
        return norm

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(*args, **kwargs)

    def full_state_dict(self) -> dict[str, Tensor]:
        state = self.module.state_dict(keep_vars=True)
        whole = {id(tensor): _whole(tensor.detach()) for tensor in {id(t): t for t in state.values()}.values()}
        return {name: whole[id(tensor)] for name, tensor in state.items()} if dist.get_rank() == 0 else {}

    def gather_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        states = {index: {key: _whole(value) for key, value in one.items()} for index, one in state["state"].items()}
        return state | {"state": states if dist.get_rank() == 0 else {}}

    def scatter_optimizer_state(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        from torch.distributed.tensor import distribute_tensor

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {index: copy.deepcopy(one) for index, one in state_dict["state"].items()}
        for index, state in states.items():
            like = parameters[index]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == like.shape:
                    whole = value.to(like.device)
                    state[key] = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        optimizer.load_state_dict({**state_dict, "state": states})


torch_fsdp2 = TorchFSDP2


def _whole(value: Any) -> Any:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu().clone() if isinstance(value, Tensor) else value


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost children of ModuleLists and Sequentials, by name."""
    blocks: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        container = module.get_submodule(path.rpartition(".")[0])
        is_child = (
            path and isinstance(container, (nn.ModuleList, nn.Sequential)) and not isinstance(part, nn.ModuleList)
        )
        if is_child and not any(path.startswith(f"{block}.") for block in blocks):
            blocks[path] = part
    return blocks


def _in_own_dtype(forward: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    return forward(x.to(dtype)).to(x.dtype)


def _trained(output: Any) -> list[Tensor]:
    """The tensors of what a module returned that have a backward pass."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
