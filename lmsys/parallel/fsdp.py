"""Fully sharded data parallel: every rank keeps 1/N of each weight matrix, and whole ones exist only while they are used.

Sources: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5.3 (stage 3); Zhao et al., PyTorch FSDP, arXiv 2304.11277.

    block i         a child of a ModuleList or Sequential: its matrices are one flat buffer, so one all-gather, and every
                    matrix a view of what arrives: nothing is copied out. Gathered `prefetch` blocks ahead, freed after use,
                    gathered again in reverse order for backward, where the last block of the forward pass is still there.
    the rest        embedding, head: a buffer each, gathered when the module is called, freed when its gradients are there.
    shard           1/N of each buffer, in the parameters' own dtype (fp32), which is what the optimizer updates; cast to
                    compute_dtype before the all-gather, into the rank's part of the buffer, so that the operation is in place.
    gradients       of a block: copied into one buffer as its backward ends, the mean reduce-scattered while the next block's
                    runs, added to the shards' gradients in their dtype.
    replicated      all that the predicate leaves (norms): whole on each rank, gradients averaged at the end of a step.

Different from torch's FSDP2, which shards each parameter by rows and copies each out of every gathered buffer; groups all that
is in no block, so that the head's gradient waits for the embedding's; and swaps the modules' parameters. Here a parameter
stays the object that it is, and a view of one storage, whose memory comes and goes: what autograd saved of it is whole again in
backward. In between a parameter reads as NaN.

Memory and streams. A buffer is allocated and freed on the compute stream. The collective starts on NCCL's stream after the
compute stream's work so far and the compute stream waits for it before use, so every reuse of memory is ordered by stream, no
allocation waits for an event, and the host never waits. At most prefetch + 1 blocks are whole at a time, and one block's
gradients are in flight: the next block's wait for them.

Every rank must issue the same collectives in the same order: ranks run the same blocks in the same order, but may differ in
which parameters they use. A block's gradients leave at a point of the graph (where the backward pass of the block before it
begins), not when they happen to be complete. A gradient counts as zero on a rank that did not use its parameter; where no rank
did it is None, as with one process: the flags travel with the replicated gradients, and only a rank that left one unused waits to
read them.

no_sync() changes nothing: gradients accumulate in the shards, which costs no memory, and each backward pass reduces its own.

Activation checkpointing and compile by block (block.compile(), before or after) work: gathering is in the block's __call__,
outside of what is compiled. A module compiled whole is not supported. Under autocast give its dtype as compute_dtype, or the
casts that autocast keeps are a second model.

Limits: a block must be called, not have its weights read by others (tied weights are found and kept with the rest), and return
tensors or lists, tuples and dictionaries of them; the optimizer must be elementwise, as for ZeRO-1 by elements; requires_grad is read once; no CUDA graphs around blocks; the module
can no longer be pickled, cast or moved; double backward is not supported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmsys.parallel import shards
from lmsys.parallel.group import broadcast_from_rank0, check_same_everywhere
from lmsys.parallel.hooks import on_gradient
from lmsys.parallel.shards import Piece, Shard, align

# Vector-only modules of torch that do not take an input of another dtype than their weights' on every device.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """The default choice of what is sharded: two or more dimensions."""
    return parameter.ndim >= 2


def fully_shard(
    module: nn.Module,
    *,
    is_sharded: Callable[[str, nn.Parameter], bool] = is_matrix,
    compute_dtype: torch.dtype | None = None,
    communication_dtype: torch.dtype | None = None,
    prefetch: int = 2,
    group: dist.ProcessGroup | None = None,
) -> FullyShardedModule:
    """Shard a module's matrices over the ranks. Make its optimizer from the result's parameters.

    Args:
        module: on the device of this rank; its parameters and buffers become rank 0's.
        is_sharded: of a parameter's name and itself.
        compute_dtype: of whole matrices, and of the biases beside them; inputs in floating point are cast to it. None: the shards'.
        communication_dtype: of gradients as they are averaged. None: compute_dtype.
        prefetch: blocks gathered ahead, 0 or more.
        group: the ranks; None: all.
    Raises:
        ValueError: an option, no process group, or parameters that differ between ranks.
    """
    return FullyShardedModule(module, is_sharded, compute_dtype, communication_dtype, prefetch, group)


# --- A flat buffer --------------------------------------------------------------------------------


class _Flat:
    """Parameters of one dtype, sharded together. All have a gradient, or none.

    Attributes:
        whole: (size,) in compute_dtype; the parameters are views of it; its storage is empty but while it is gathered.
        shard: (size / N,), this rank's part in the parameters' own dtype.
        pieces: for each parameter what the optimizer sees of it, a view of shard: (1, n) of a matrix, (n,) of a vector, so
            that code which tells them apart by their dimensions still does; n may be 0.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        compute_dtype: torch.dtype | None,
        communication_dtype: torch.dtype | None,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
    ):
        self.names, self.parameters = list(named), list(named.values())
        self.rank, self.world_size, self.group = rank, world_size, group
        first = self.parameters[0]
        self.requires_grad = first.requires_grad
        self.offsets: list[int] = []
        size = 0
        for parameter in self.parameters:
            self.offsets.append(size)
            size = align(size + parameter.numel())
        size = align(size, world_size * shards.ALIGNMENT)
        self.share = size // world_size
        masters = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.shapes = [parameter.shape for parameter in self.parameters]
        for view, parameter in zip(self.views(masters), self.parameters, strict=True):
            view.copy_(parameter.detach())
        broadcast_from_rank0([masters], group)
        low = rank * self.share
        self.shard = masters[low : low + self.share].clone()
        self.whole = torch.empty(size, dtype=compute_dtype or first.dtype, device=first.device)
        self.communication_dtype = communication_dtype or self.whole.dtype
        self.whole_views = self.views(self.whole)
        nothing = self.whole.new_full((), torch.nan)
        self.nothing = [nothing.expand(shape) for shape in self.shapes]  # who reads it sees NaN, not freed memory
        self.point_to(self.whole_views)
        self.starts: list[int] = []  # of each piece in its parameter, flattened
        self.pieces: list[nn.Parameter] = []
        for offset, shape in zip(self.offsets, self.shapes, strict=True):
            start = min(max(low - offset, 0), shape.numel())
            stop = max(min(low + self.share - offset, shape.numel()), start)
            at = min(max(offset + start - low, 0), self.share)
            piece = self.shard[at : at + stop - start]
            self.starts.append(start)
            self.pieces.append(
                nn.Parameter(piece[None] if len(shape) >= 2 else piece, requires_grad=self.requires_grad)
            )
        self.work: dist.Work | None = None
        self.gathered = True
        self.free()

    def views(self, flat: Tensor) -> list[Tensor]:
        """A buffer of the size of whole as tensors like the parameters."""
        return [
            flat[offset : offset + shape.numel()].view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]

    def point_to(self, tensors: Sequence[Tensor]) -> None:
        """Give the parameters other data. Their own version counters stay, so that gathering again is no change to autograd."""
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    @torch.no_grad()
    def gather(self) -> None:
        """Start to gather, unless it is gathered."""
        if self.gathered:
            return
        self.whole.untyped_storage().resize_(self.whole.nbytes)
        own = self.whole[self.rank * self.share : (self.rank + 1) * self.share]
        own.copy_(self.shard)
        if self.world_size > 1:
            self.work = shards.all_gather(self.whole, own, self.group)
        self.point_to(self.whole_views)
        self.gathered = True

    def wait(self) -> None:
        """Have the compute stream wait for the gathering."""
        if self.work is not None:
            self.work.wait()
            self.work = None

    def free(self) -> None:
        """Give the memory of the whole parameters back."""
        if self.gathered:
            self.wait()
            self.point_to(self.nothing)
            self.whole.untyped_storage().resize_(0)
            self.gathered = False

    def take_gradients(self) -> Tensor:
        """The parameters' gradients as one flat buffer in communication_dtype, zeros where there is none; they keep none."""
        found = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        first = found[0]
        if (
            len(found) == 1
            and first is not None
            and first.numel() == self.whole.numel()
            and first.dtype == self.communication_dtype
            and first.is_contiguous()
        ):
            return first.view(-1)  # an embedding, a head: large, and nothing to put together
        flat = torch.empty(self.whole.numel(), dtype=self.communication_dtype, device=self.whole.device)
        present = [(view, one) for view, one in zip(self.views(flat), found, strict=True) if one is not None]
        if len(present) < len(found):
            flat.zero_()
        if present:
            torch._foreach_copy_(*map(list, zip(*present, strict=True)))
        return flat

    @torch.no_grad()
    def gather_masters(self) -> Tensor:
        """The whole parameters in their own dtype, in a new buffer."""
        masters = self.shard.new_empty(self.whole.numel())
        own = masters[self.rank * self.share : (self.rank + 1) * self.share]
        own.copy_(self.shard)
        if self.world_size > 1:
            shards.all_gather(masters, own, self.group).wait()
        return masters


class _Unit:
    """What is gathered at once: the flat buffers of a block, or of the rest of the module."""

    def __init__(self, name: str, flats: Sequence[_Flat]):
        self.name, self.flats = name, list(flats)

    @property
    def gathered(self) -> bool:
        return any(flat.gathered for flat in self.flats)

    def gather(self) -> None:
        for flat in self.flats:
            flat.gather()

    def wait(self) -> None:
        for flat in self.flats:
            flat.wait()

    def free(self) -> None:
        for flat in self.flats:
            flat.free()


@dataclass
class _Flight:
    """Gradients on their way. Both buffers stay here until the compute stream has waited: then their memory may be reused."""

    flat: _Flat
    gradients: Tensor
    mean: Tensor  # of this rank's share
    work: dist.Work | None


class _Call(NamedTuple):
    """A call of a block."""

    number: int  # of all calls
    position: int  # in its forward pass


@functools.cache
def _gathering(cls: type[nn.Module]) -> type[nn.Module]:
    """The class whose instances gather their parameters around a call, outside of hooks and of a compiled forward."""

    class Gathering(cls):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            owner, unit = self.__dict__["_fully_sharded"]
            if owner._is_whole:
                return super().__call__(*args, **kwargs)
            call = owner._before_forward(unit)
            return owner._after_forward(unit, call, super().__call__(*args, **kwargs))

    Gathering.__name__, Gathering.__qualname__, Gathering.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Gathering


# --- The wrapper ----------------------------------------------------------------------------------


class FullyShardedModule(nn.Module):
    """A module whose matrices are sharded; see fully_shard. Its parameters() are this rank's pieces and what is replicated."""

    def __init__(
        self,
        module: nn.Module,
        is_sharded: Callable[[str, nn.Parameter], bool],
        compute_dtype: torch.dtype | None,
        communication_dtype: torch.dtype | None,
        prefetch: int,
        group: dist.ProcessGroup | None,
    ):
        super().__init__()
        if not dist.is_initialized():
            raise ValueError(
                "fully_shard needs a process group; start the program with torchrun and open lmsys.parallel.group.process_group"
            )
        if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0:
            raise ValueError(f"prefetch is {prefetch!r}; it must be an integer of 0 or more")
        for name, dtype in (("compute_dtype", compute_dtype), ("communication_dtype", communication_dtype)):
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ValueError(f"{name} is {dtype!r}; give a floating-point dtype, such as torch.bfloat16, or None")
        self.module = module
        self.compute_dtype, self.prefetch = compute_dtype, prefetch
        self._group = group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        named = dict(module.named_parameters())
        check_same_everywhere(
            "\n".join(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in named.items()),
            "the module",
            group,
        )
        chosen = self._choose(named, is_sharded)
        if not chosen:
            raise ValueError(
                "is_sharded chose no parameter of the module; use a data-parallel wrapper such as flashddp"
            )

        blocks = _blocks(module)
        owners: dict[int, set[str]] = {}  # id of a parameter -> names of its blocks, "" for what is in none
        for path, part in module.named_modules(remove_duplicate=False):
            block = next((name for name in blocks if path == name or path.startswith(f"{name}.")), "")
            for parameter in part.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(block)

        def flat(part: Mapping[str, nn.Parameter]) -> _Flat:
            return _Flat(part, compute_dtype, communication_dtype, self._rank, self._world_size, group)

        kinds: dict[str, dict[Any, dict[str, nn.Parameter]]] = {}
        rest: list[str] = []
        for name in chosen:
            blocks_of = owners[id(named[name])]
            if len(blocks_of) == 1 and "" not in blocks_of:
                key = (named[name].dtype, named[name].requires_grad)
                kinds.setdefault(*blocks_of, {}).setdefault(key, {})[name] = named[name]
            else:
                rest.append(name)
        self._rest = _Unit("the rest", [flat({name: named[name]}) for name in rest])
        self._units: list[_Unit] = []
        for name, parts in kinds.items():
            unit = _Unit(name, [flat(part) for part in parts.values()])
            self._units.append(unit)
            block = blocks[name]
            block.__class__ = _gathering(type(block))
            block.__dict__["_fully_sharded"] = (self, unit)
        self._flats = [flat for unit in (self._rest, *self._units) for flat in unit.flats]
        self._replicated = {name: parameter for name, parameter in named.items() if name not in chosen}
        broadcast_from_rank0([*(p.data for p in self._replicated.values()), *module.buffers()], group)
        if compute_dtype is not None:
            self._cast_norms()

        pieces = {name: piece for flat in self._flats for name, piece in zip(flat.names, flat.pieces, strict=True)}
        self._named = {name: pieces.get(name, parameter) for name, parameter in named.items()}
        self._flat_of = {id(parameter): flat for flat in self._flats for parameter in flat.parameters}
        for flat in self._flats:
            if flat.requires_grad:
                for parameter in flat.parameters:
                    on_gradient(parameter, self._gradient_arrived)

        self._is_whole = False  # within gather_full_params
        module.register_state_dict_pre_hook(self._refuse_state_dict)
        self._order: list[_Unit] = []  # blocks as the last forward pass called them
        self._called: list[_Unit] = []  # in the pass that runs
        self._calls = 0  # of blocks, ever
        self._forwards = 0  # passes whose backward is to come
        self._used: set[int] = set()  # sharded parameters that got a gradient since the last step, by id
        self._plan: dict[_Flat, int] | None = None  # of the rest: after how many blocks of backward its gradients leave
        self._completed: dict[_Flat, int] = {}  # what the first backward pass saw of that
        self._reset()

    def _reset(self) -> None:
        """What a backward pass keeps, as it is between passes."""
        self._in_backward = False
        self._begun: dict[_Unit, int] = {}  # blocks whose backward has begun -> the number of the call
        self._entered = 0  # how often a block's backward has begun
        self._missing = {
            flat: {id(parameter) for parameter in flat.parameters} for flat in self._flats if flat.requires_grad
        }
        self._reduced: set[_Flat] = set()
        self._flight: _Flight | None = None

    def _choose(self, named: Mapping[str, nn.Parameter], is_sharded: Callable[[str, nn.Parameter], bool]) -> list[str]:
        """The names of what is sharded: the predicate's, and vectors beside them that must have their dtype (biases)."""
        filled = {name: parameter for name, parameter in named.items() if parameter.numel()}
        chosen = [name for name, parameter in filled.items() if is_sharded(name, parameter)]
        if self.compute_dtype is not None:
            owners = {name.rpartition(".")[0] for name in chosen}
            chosen = [name for name in filled if name in chosen or name.rpartition(".")[0] in owners]
        return chosen

    def _cast_norms(self) -> None:
        """Have torch's norms, whose weights keep their dtype, compute in that and return the dtype that they were given."""
        for part in self.module.modules():
            parameter = next(part.parameters(recurse=False), None)
            if isinstance(part, _NORMS) and parameter is not None and parameter.dtype != self.compute_dtype:
                part.forward = functools.partial(_in_own_dtype, part.forward, parameter.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        if self._is_whole:
            return self.module(*args, **kwargs)
        args, kwargs = self._cast(args), self._cast(kwargs)
        recomputing = _graph_task() != -1  # the whole module is checkpointed
        if not recomputing:
            self._land()  # of a backward pass before, whose step is still to come
            self._reset()
            for unit in self._units:
                unit.free()
            self._rest.free()  # it may be of before the last step
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
        trained = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        for tensor in trained:
            tensor.register_hook(self._begin_backward)
        if trained:
            self._forwards += 1
        else:
            self._rest.free()
        return output

    def _cast(self, values: Any) -> Any:
        if self.compute_dtype is None:
            return values
        if isinstance(values, dict):
            return dict(zip(values, self._cast(tuple(values.values())), strict=True))
        return tuple(
            value.to(self.compute_dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in values
        )

    # --- Forward of a block -----------------------------------------------------------------------

    def _before_forward(self, unit: _Unit) -> _Call:
        """Gather a block, and start on those that come after it."""
        position = len(self._called)
        unit.gather()
        if _graph_task() == -1:
            self._called.append(unit)
            if position < len(self._order) and self._order[position] is unit:
                for ahead in self._order[position + 1 : position + 1 + self.prefetch]:
                    ahead.gather()
        unit.wait()
        self._calls += 1
        return _Call(self._calls, position)

    def _after_forward(self, unit: _Unit, call: _Call, output: Any) -> Any:
        if _graph_task() != -1:  # a checkpoint computes the block again for its backward, which needs it right after
            if unit not in self._begun:
                unit.free()
            return output
        trained = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        for tensor in trained:
            tensor.register_hook(functools.partial(self._before_backward, unit, call))
        is_last = call.position == len(self._order) - 1 and self._order[-1] is unit
        if not (is_last and trained):  # the last one's backward comes next
            unit.free()
        return output

    # --- Backward ---------------------------------------------------------------------------------

    def _begin_backward(self, gradient: Tensor | None = None) -> None:
        """The gradient of the module's output has come: gather the rest, and the blocks that come first."""
        if self._in_backward:
            return
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        self._rest.gather()
        for unit in self._order[::-1][: self.prefetch]:
            unit.gather()
        self._rest.wait()

    def _before_backward(self, unit: _Unit, call: _Call, gradient: Tensor) -> None:
        """The gradient of a block's output has come: the blocks after it are done."""
        self._begin_backward()
        if self._begun.get(unit) == call.number:  # another of its outputs
            return
        for done, number in list(self._begun.items()):
            if number > call.number:
                self._finish_block(done)
        self._begun[unit] = call.number
        self._entered += 1
        if self._plan is not None and self._forwards == 1:
            for flat, entered in self._plan.items():
                if entered < self._entered and flat not in self._reduced:
                    self._reduce(flat)
                    flat.free()
        unit.gather()
        for ahead in self._order[max(call.position - self.prefetch, 0) : call.position][::-1]:
            ahead.gather()
        unit.wait()

    def _finish_block(self, unit: _Unit) -> None:
        """The backward of a block has run: free it, and send what gradients it has. Those of a block that is used again come later."""
        del self._begun[unit]
        for flat in unit.flats:
            if flat.requires_grad and len(self._missing[flat]) < len(flat.parameters) and flat not in self._reduced:
                self._reduce(flat)
            flat.free()

    def _gradient_arrived(self, parameter: Tensor) -> None:
        flat = self._flat_of[id(parameter)]
        if flat in self._reduced:
            raise RuntimeError(
                f"a gradient of {flat.names[flat.parameters.index(parameter)]} came after the others of its buffer had left: "
                "the blocks ran in another order than before, or the module was called within its own backward pass"
            )
        self._used.add(id(parameter))
        missing = self._missing[flat]
        missing.discard(id(parameter))
        if not missing and self._plan is None:
            self._completed[flat] = self._entered

    @torch.no_grad()
    def _reduce(self, flat: _Flat) -> None:
        """Start to average a buffer's gradients over ranks; those that are missing count as zero."""
        self._land()
        gradients = flat.take_gradients()
        self._reduced.add(flat)
        if self._world_size == 1:
            self._flight = _Flight(flat, gradients, gradients, None)
            return
        mean = gradients.new_empty(flat.share)
        work = shards.reduce_scatter_mean(mean, gradients, self._group)
        self._flight = _Flight(flat, gradients, mean, work)

    @torch.no_grad()
    def _land(self) -> None:
        """Wait, on the stream, for the gradients in flight, and add them to those of the pieces."""
        if self._flight is None:
            return
        flat, mean = self._flight.flat, self._flight.mean
        if self._flight.work is not None:
            self._flight.work.wait()
        self._flight = None
        mean = mean.to(flat.shard.dtype)
        for piece in flat.pieces:
            if piece.numel():
                at = piece.storage_offset()
                gradient = mean[at : at + piece.numel()].view(piece.shape)
                if piece.grad is None:
                    piece.grad = gradient
                else:
                    piece.grad += gradient

    def _end_backward(self) -> None:
        """All gradients are there: send those that have not left, free what is left, and learn when the rest's were complete."""
        for flat in self._flats:
            if flat.requires_grad and flat not in self._reduced:
                self._reduce(flat)
            flat.free()
        if self._plan is None and self._forwards == 1:
            self._plan = self._agree()
        self._forwards = 0
        flight = self._flight
        self._reset()
        self._flight = flight

    def _agree(self) -> dict[_Flat, int]:
        """For each buffer of the rest after how many blocks it was complete, on the rank where that was last."""
        mine = [self._completed.get(flat, -1) for flat in self._rest.flats]
        everyone: list[Any] = [None] * self._world_size
        dist.all_gather_object(everyone, mine, group=self._group)
        latest = [max(seen) for seen in zip(*everyone, strict=True)]
        blocks = len(self._order)
        return {
            flat: entered
            for flat, entered in zip(self._rest.flats, latest, strict=True)
            if flat.requires_grad and 0 <= entered < blocks
        }

    # --- A step -----------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Changes nothing: gradients accumulate in the shards, each backward pass reducing its own."""
        yield

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """Wait, on the stream, for gradients on their way, and average those that are replicated. After backward, before the step."""
        self._land()
        replicated = [parameter for parameter in self._replicated.values() if parameter.requires_grad]
        sharded = [
            (piece, id(parameter) in self._used)
            for flat in self._flats
            if flat.requires_grad
            for piece, parameter in zip(flat.pieces, flat.parameters, strict=True)
        ]
        self._used = set()
        here = [parameter.grad is not None for parameter in replicated] + [used for _, used in sharded]
        device = self._flats[0].shard.device
        sizes = [parameter.numel() for parameter in replicated]
        flat = torch.zeros(sum(sizes) + len(here), device=device)
        *views, flags = flat.split([*sizes, len(here)])
        present = [
            (view.view(parameter.shape), parameter.grad)
            for view, parameter in zip(views, replicated, strict=True)
            if parameter.grad is not None
        ]
        if present:
            torch._foreach_copy_(*map(list, zip(*present, strict=True)))
        if all(here):
            flags.fill_(1)
        else:
            flags.copy_(torch.tensor(here, dtype=flags.dtype))
        if self._world_size > 1:
            dist.all_reduce(flat, op=shards.mean_operation(flat, self._group), group=self._group)
        somewhere = here if all(here) else (flags > 0).tolist()  # waits for the GPU, on a rank that left one unused
        for parameter, view, used in zip(replicated, views, somewhere, strict=False):
            parameter.grad = view.view(parameter.shape).to(parameter.dtype) if used else None
        for (piece, _), used in zip(sharded, somewhere[len(replicated) :], strict=True):
            if not used:
                piece.grad = None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their 2-norm over the whole model is at most max_norm. max_norm 0 or less: measure only.

        Returns:
            the norm before clipping, the same on every rank, a scalar on the device, for which nothing has waited.
        """
        pieces = [piece.grad for flat in self._flats for piece in flat.pieces if piece.grad is not None]
        replicated = [parameter.grad for parameter in self._replicated.values() if parameter.grad is not None]

        def squared(gradients: list[Tensor]) -> Tensor:
            if not gradients:
                return torch.zeros((), device=self._flats[0].shard.device)
            return torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()

        total = squared(pieces)
        if self._world_size > 1:
            dist.all_reduce(total, group=self._group)
        norm = (total + squared(replicated)).sqrt()
        if max_norm > 0 and pieces + replicated:
            torch._foreach_mul_(pieces + replicated, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's names with this rank's pieces, and with the parameters themselves where they are replicated."""
        for name, parameter in self._named.items():
            yield f"{prefix}.{name}" if prefix else name, parameter

    @property
    def gathered(self) -> list[str]:
        """The names of the blocks that are whole or on their way."""
        return [unit.name for unit in self._units if unit.gathered]

    # --- Whole parameters and state ---------------------------------------------------------------

    @contextmanager
    def gather_full_params(self) -> Iterator[nn.Module]:
        """The module with whole parameters in their own dtype, to read and to call without communication. All ranks enter and leave.

        What is written to sharded parameters within is lost.
        """
        if self._is_whole:
            raise RuntimeError("gather_full_params is already open")
        for unit in (self._rest, *self._units):
            unit.free()
        for flat in self._flats:
            flat.point_to(flat.views(flat.gather_masters()))
        self._is_whole = True
        try:
            yield self.module
        finally:
            self._is_whole = False
            for flat in self._flats:
                flat.point_to(flat.nothing)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refused: no rank has the whole state."""
        raise RuntimeError(
            "no rank holds the whole state: call full_state_dict() or save_sharded(folder) on all ranks instead"
        )

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not (self._is_whole or keep_vars):
            self.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """load_full_state_dict."""
        self.load_full_state_dict(state_dict)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The module's state_dict with its own names, in the parameters' own dtype, on rank 0 and its CPU; empty on other ranks.

        All ranks call it. A tied tensor is one tensor under its names.
        """
        whole = shards.gather_pieces(self._weight_pieces(), self._group, self._flats[0].shard.device)
        if self._rank != 0:
            return {}
        by_id = {id(parameter): name for name, parameter in self.module.named_parameters()}
        copies: dict[int, Tensor] = {}
        state = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            own = by_id.get(id(tensor))
            if own in whole:
                state[name] = whole[own]
            else:
                state[name] = copies.setdefault(id(tensor), tensor.detach().cpu().clone())
        return state

    @torch.no_grad()
    def load_full_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole state_dict, which every rank is given. Nothing is communicated.

        Raises:
            ValueError: names or shapes are not the module's.
        """
        wanted = self.module.state_dict(keep_vars=True)
        for name in sorted(wanted.keys() | state_dict.keys()):
            shapes = [tuple(some[name].shape) if name in some else "absent" for some in (state_dict, wanted)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the weights do not fit: {name} is {shapes[0]} in the state and {shapes[1]} in the module"
                )
        for flat in self._flats:
            for name, start, piece in zip(flat.names, flat.starts, flat.pieces, strict=True):
                piece.copy_(state_dict[name].reshape(-1)[start : start + piece.numel()].view(piece.shape))
        for name, tensor in wanted.items():
            if id(tensor) not in self._flat_of:
                tensor.copy_(state_dict[name])

    def save_sharded(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write weights, buffers and the optimizer's state, each rank its own part (shards.save_pieces)."""
        pieces = self._weight_pieces()
        if self._rank == 0:
            pieces += [Piece(name, tuple(t.shape), 0, t.detach()) for name, t in self._whole_tensors().items()]
        shards.save_pieces(pieces, {}, Path(folder) / "weights", self._group)
        if optimizer is not None:
            shared = {"param_groups": optimizer.state_dict()["param_groups"]}
            shards.save_states(self._states(optimizer), shared, Path(folder) / "optimizer", self._group)

    @torch.no_grad()
    def load_sharded(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read what save_sharded wrote, at any number of ranks. All ranks call it.

        Raises:
            ValueError: nothing there, or names or shapes are not the module's.
        """
        saved = shards.load_shared(Path(folder) / "weights", self._group)["shapes"]
        named, tensors = dict(self._weight_shapes()), self._whole_tensors()
        given = {name: tuple(shape) for name, shape in saved.items()}
        wanted = named | {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if given != wanted:
            name = min(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
            raise ValueError(
                f"the weights do not fit: {name} is {given.get(name, 'absent')} in {folder} and "
                f"{wanted.get(name, 'absent')} in the module"
            )
        targets = [
            (name, start, piece)
            for flat in self._flats
            for name, start, piece in zip(flat.names, flat.starts, flat.pieces, strict=True)
        ] + [(name, 0, tensor) for name, tensor in tensors.items()]
        runs = [(name, start, start + tensor.numel()) for name, start, tensor in targets]
        parts = shards.load_pieces(runs, Path(folder) / "weights", self._group)
        for (_, _, tensor), part in zip(targets, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
        if optimizer is not None:
            owned = self._shards(optimizer)
            states, shared = shards.load_states(owned, Path(folder) / "optimizer", self._group)
            self._load(optimizer, shared["param_groups"], owned, states)

    def gather_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state_dict that the optimizer would have over whole parameters, on rank 0 and its CPU; on others, without states.

        optimizer: of parameters of this wrapper. All ranks call it.
        """
        states = shards.gather_states(self._states(optimizer), self._group, self._flats[0].shard.device)
        return {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}

    def scatter_optimizer_state(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Load what gather_optimizer_state returned, or a plain optimizer's state_dict, which every rank is given."""
        owned = self._shards(optimizer)
        states = [shards.cut_state(state_dict["state"].get(shard.index, {}), shard) for shard in owned]
        self._load(optimizer, state_dict["param_groups"], owned, states)

    def _weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for flat in self._flats:
            for name, shape in zip(flat.names, flat.shapes, strict=True):
                yield name, tuple(shape)

    def _weight_pieces(self) -> list[Piece]:
        return [
            Piece(name, tuple(shape), start, piece.detach())
            for flat in self._flats
            for name, shape, start, piece in zip(flat.names, flat.shapes, flat.starts, flat.pieces, strict=True)
            if piece.numel()
        ]

    def _whole_tensors(self) -> dict[str, Tensor]:
        """What every rank has whole, each tensor once: replicated parameters, and buffers that a state_dict holds."""
        tensors: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if id(tensor) not in self._flat_of:
                tensors.setdefault(id(tensor), (name, tensor))
        return dict(tensors.values())

    def _shards(self, optimizer: torch.optim.Optimizer) -> list[Shard]:
        """What this rank has of the optimizer's parameters. Replicated ones are whole."""
        pieces = {
            id(piece): (shape, start)
            for flat in self._flats
            for piece, shape, start in zip(flat.pieces, flat.shapes, flat.starts, strict=True)
        }
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        owned = []
        for index, parameter in enumerate(parameters):
            shape, start = pieces.get(id(parameter), (parameter.shape, 0))
            if parameter.numel():
                owned.append(Shard(index, shape, start, parameter))
        return owned

    def _states(self, optimizer: torch.optim.Optimizer) -> list[tuple[Shard, dict[str, Any]]]:
        """The states of _shards, replicated ones on rank 0 alone."""
        replicated = {id(parameter) for parameter in self._replicated.values()}
        return [
            (shard, optimizer.state.get(shard.leaf, {}))
            for shard in self._shards(optimizer)
            if self._rank == 0 or id(shard.leaf) not in replicated
        ]

    @staticmethod
    def _load(
        optimizer: torch.optim.Optimizer,
        groups: list[dict[str, Any]],
        owned: Sequence[Shard],
        states: Sequence[dict[str, Any]],
    ) -> None:
        state = {shard.index: one for shard, one in zip(owned, states, strict=True) if one}
        optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- The peer -------------------------------------------------------------------------------------


def torch_fsdp2(
    module: nn.Module,
    *,
    compute_dtype: torch.dtype | None = None,
    communication_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> TorchFSDP2:
    """torch's fully_shard on each block and on the module, behind the interface of FullyShardedModule: what we compare with.

    Args:
        compute_dtype: its param_dtype, of norms too. communication_dtype: its reduce_dtype.
    Raises:
        ValueError: no process group.
    """
    return TorchFSDP2(module, compute_dtype, communication_dtype, group)


class TorchFSDP2(nn.Module):
    """See torch_fsdp2. Its parameters() are DTensors, sharded by rows; the module is changed in place, as torch does."""

    def __init__(
        self,
        module: nn.Module,
        compute_dtype: torch.dtype | None,
        communication_dtype: torch.dtype | None,
        group: dist.ProcessGroup | None,
    ):
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__()
        if not dist.is_initialized():
            raise ValueError(
                "torch_fsdp2 needs a process group; start the program with torchrun and open lmsys.parallel.group.process_group"
            )
        broadcast_from_rank0([*(p.data for p in module.parameters()), *module.buffers()], group)
        kind = next(module.parameters()).device.type
        options = {
            "mesh": DeviceMesh.from_group(group or dist.group.WORLD, kind),
            # Inputs of blocks stay as they are: a table of angles must not be rounded, and autocast casts what products take.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=communication_dtype, cast_forward_inputs=False
            ),
        }
        for block in _blocks(module).values():
            if any(True for _ in block.parameters()):
                fully_shard(block, **options)
        self.module = fully_shard(module, **options)
        self._rank = dist.get_rank(group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
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
        """As FullyShardedModule's."""
        parameters = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """With the module's names."""
        return self.module.named_parameters(prefix, recurse, remove_duplicate)

    @contextmanager
    def gather_full_params(self) -> Iterator[nn.Module]:
        """The module with whole parameters, in compute_dtype, to read: calling it shards them again."""
        parts = [part for part in self.module.modules() if hasattr(part, "unshard")]
        for part in parts:
            part.unshard()
        try:
            yield self.module
        finally:
            for part in parts:
                part.reshard()

    def full_state_dict(self) -> dict[str, Tensor]:
        """As FullyShardedModule's."""
        whole: dict[int, Tensor] = {}
        state = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if id(tensor) not in whole:
                whole[id(tensor)] = _whole(tensor.detach())
            state[name] = whole[id(tensor)]
        return state if self._rank == 0 else {}

    @torch.no_grad()
    def load_full_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """As FullyShardedModule's."""
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            tensor.copy_(_like(state_dict[name], tensor))

    def gather_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As FullyShardedModule's."""
        state = optimizer.state_dict()
        states = {index: {key: _whole(value) for key, value in one.items()} for index, one in state["state"].items()}
        return state | {"state": states if self._rank == 0 else {}}

    def scatter_optimizer_state(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """As FullyShardedModule's."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {
            index: {
                key: _like(value.clone(), parameters[index] if value.shape == parameters[index].shape else value)
                if isinstance(value, Tensor)
                else value
                for key, value in one.items()
            }
            for index, one in state_dict["state"].items()
        }
        optimizer.load_state_dict({**state_dict, "state": states})


def _whole(value: Any) -> Any:
    """A DTensor as a whole tensor; tensors on the CPU."""
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu().clone() if isinstance(value, Tensor) else value


def _like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, placed as another one is."""
    if not hasattr(tensor, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


# --- Helpers --------------------------------------------------------------------------------------


def _blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost children of ModuleLists and Sequentials, by name."""
    blocks: dict[str, nn.Module] = {}

    def search(part: nn.Module, path: str) -> None:
        is_container = isinstance(part, (nn.ModuleList, nn.Sequential))
        for name, child in part.named_children():
            child_path = f"{path}.{name}" if path else name
            if not is_container or isinstance(child, nn.ModuleList):
                search(child, child_path)
            elif child not in blocks.values():
                blocks[child_path] = child

    search(module, "")
    return blocks


def _in_own_dtype(forward: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    return forward(x.to(dtype)).to(x.dtype)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _graph_task() -> int:
    """Which backward pass this thread is in; -1 for none."""
    return torch._C._current_graph_task_id()
