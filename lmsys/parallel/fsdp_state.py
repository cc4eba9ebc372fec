"""Full sharding at rest: flat buffers in which matrices are sharded; a module's whole weights and state from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmsys.parallel import shards
from lmsys.parallel.group import broadcast_from_rank0, current
from lmsys.parallel.shards import FlatLayout, Piece


class Flat(FlatLayout):
    """Parameters of one dtype, sharded together. All have a gradient, or none.

    Attributes:
        whole: (size,) in compute_dtype; the parameters are views of it; its storage is empty but while it is gathered.
        shard: (size / ranks,), this rank's part in the parameters' own dtype.
        pieces: of each parameter what the optimizer sees, a view of shard: (1, n) of a matrix, (n,) of a vector, so
            that their dimensions still tell them apart; n may be 0.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        compute_dtype: torch.dtype | None,
        communication_dtype: torch.dtype | None,
    ):
        super().__init__(list(named.values()))
        rank, self.world_size = current()
        self.shares = shards.even_shares(self.size, self.world_size)
        self.own = slice(*self.shares[rank])
        size = self.shares[-1][1]
        masters = self.flatten(size)
        broadcast_from_rank0([masters])
        self.shard = masters[self.own].clone()
        self.whole = masters.new_empty(size, dtype=compute_dtype or masters.dtype)
        self.whole_views = self.views(self.whole)
        self.communication_dtype = communication_dtype or self.whole.dtype
        nothing = self.whole.new_full((), torch.nan)
        self.nothing = [nothing.expand(shape) for shape in self.shapes]  # who reads it sees NaN, not freed memory
        self.requires_grad = self.parameters[0].requires_grad
        self.pieces: list[Piece] = []
        cuts = self.cut(self.own.start, self.own.stop)
        for name, shape, offset, (start, stop) in zip(named, self.shapes, self.offsets, cuts, strict=True):
            at = offset + start - self.own.start if start < stop else 0
            part = self.shard[at : at + stop - start]
            leaf = nn.Parameter(part[None] if len(shape) >= 2 else part, requires_grad=self.requires_grad)
            self.pieces.append(Piece(name, tuple(shape), start, leaf))
        self.work: dist.Work | None = None
        self.gathered = True
        self.free()

    def point_to(self, tensors: Sequence[Tensor]) -> None:
        """Give the parameters other data. Their version counters stay: to autograd, gathering again is no change."""
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    @torch.no_grad()
    def gather_into(self, whole: Tensor) -> dist.Work | None:
        """Start to fill whole (size,) with all ranks' shards, in its dtype."""
        whole[self.own].copy_(self.shard)
        return None if self.world_size == 1 else shards.all_gather(whole, whole[self.own])

    def gather(self) -> None:
        if not self.gathered:
            self.whole.untyped_storage().resize_(self.whole.nbytes)
            self.work = self.gather_into(self.whole)
            self.point_to(self.whole_views)
            self.gathered = True

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    def free(self) -> None:
        if self.gathered:
            self.wait()
            self.point_to(self.nothing)
            self.whole.untyped_storage().resize_(0)
            self.gathered = False


class ShardedState(nn.Module):
    """A module with some of its parameters in flats: its parameters() are this rank's pieces and what is replicated."""

    def __init__(self, module: nn.Module, flats: Sequence[Flat]):
        super().__init__()
        self.module = module
        self._flats = flats
        self._rank, self._world_size = current()
        self._device = flats[0].shard.device
        self._flat_of = {id(parameter): flat for flat in flats for parameter in flat.parameters}
        self._sharded = [piece for flat in flats for piece in flat.pieces]
        named = dict(module.named_parameters())
        leaves = {piece.name: piece.tensor for piece in self._sharded}
        self._named = {name: leaves.get(name, parameter) for name, parameter in named.items()}
        self._replicated = [parameter for parameter in named.values() if id(parameter) not in self._flat_of]
        self._is_whole = False  # within gather_full_params
        module.register_state_dict_pre_hook(self._refuse_state_dict)

    def named_parameters(self, prefix: str = "", *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's names with this rank's pieces, and with the parameters themselves where they are replicated."""
        for name, parameter in self._named.items():
            yield f"{prefix}.{name}" if prefix else name, parameter

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        sharded = [piece.tensor for piece in self._sharded]
        gradients = [[leaf.grad for leaf in leaves if leaf.grad is not None] for leaves in (sharded, self._replicated)]
        return shards.clip_gradients(*gradients, max_norm, self._device)

    def free(self) -> None:
        for flat in self._flats:
            flat.free()

    @contextmanager
    def gather_full_params(self) -> Iterator[nn.Module]:
        """The module with whole parameters in their own dtype, to read and to call without communication.

        All ranks enter and leave. What is written to sharded parameters within is lost.
        """
        if self._is_whole:
            raise RuntimeError("gather_full_params is already open")
        self.free()
        for flat in self._flats:
            masters = flat.shard.new_empty(flat.whole.numel())
            flat.work = flat.gather_into(masters)
            flat.wait()
            flat.point_to(flat.views(masters))
        self._is_whole = True
        try:
            yield self.module
        finally:
            self._is_whole = False
            for flat in self._flats:
                flat.point_to(flat.nothing)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise RuntimeError("no rank holds the whole state: call full_state_dict() or save_sharded(folder) on all ranks")

    def _refuse_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not (self._is_whole or keep_vars):
            self.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        self.load_full_state_dict(state_dict)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The module's state_dict in its parameters' own dtype, on rank 0 and its CPU; empty on other ranks.

        All ranks call it. A tied tensor is one tensor under its names.
        """
        whole = shards.gather_pieces(self._pieces(), self._device)
        if self._rank != 0:
            return {}
        first: dict[int, str] = {}  # of a tensor's names, by id
        state = self.module.state_dict(keep_vars=True)
        return {name: whole[first.setdefault(id(tensor), name)] for name, tensor in state.items()}

    @torch.no_grad()
    def load_full_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole state_dict that every rank has. ValueError: it is another module's."""
        wanted = self.module.state_dict(keep_vars=True)
        _check_shapes(*({n: tuple(t.shape) for n, t in one.items()} for one in (state_dict, wanted)), "the state")
        for piece in self._pieces():
            piece.tensor.copy_(piece.cut(state_dict[piece.name]))

    def _pieces(self) -> list[Piece]:
        """What this rank has of the parameters and of the buffers that a state_dict holds, each tensor once."""
        whole: dict[int, Piece] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if id(tensor) not in self._flat_of:
                whole.setdefault(id(tensor), Piece(name, tuple(tensor.shape), 0, tensor))
        return [*self._sharded, *whole.values()]

    def save_sharded(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write weights, buffers and the optimizer's state, each rank its own part (shards.save_pieces)."""
        shards.save_pieces(self._pieces(), {}, Path(folder) / "weights")
        if optimizer is not None:
            shared = {"param_groups": optimizer.state_dict()["param_groups"]}
            shards.save_states(self._states(optimizer), shared, Path(folder) / "optimizer")

    @torch.no_grad()
    def load_sharded(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Read what save_sharded wrote, at any number of ranks. ValueError: nothing there, or another module's."""
        weights, pieces = Path(folder) / "weights", self._pieces()
        saved = shards.load_shared(weights)["shapes"]
        saved = {name: tuple(shape) for name, shape in saved.items()}
        _check_shapes(saved, {piece.name: piece.shape for piece in pieces}, folder)
        values = shards.load_pieces([piece.run for piece in pieces], weights)
        for piece, value in zip(pieces, values, strict=True):
            piece.tensor.copy_(value.view(piece.tensor.shape))
        if optimizer is not None:
            parts = self._pieces_of(optimizer)
            states, shared = shards.load_states(parts, Path(folder) / "optimizer")
            _load(optimizer, shared["param_groups"], parts, states)

    def gather_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state_dict of the optimizer over whole parameters, on rank 0 and its CPU. All ranks call it."""
        states = shards.gather_states(self._states(optimizer), self._device)
        return {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}

    def scatter_optimizer_state(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Load what gather_optimizer_state returned, or a plain optimizer's state_dict, which every rank is given."""
        pieces = self._pieces_of(optimizer)
        _load(optimizer, state_dict["param_groups"], pieces, shards.cut_states(state_dict["state"], pieces))

    def _pieces_of(self, optimizer: torch.optim.Optimizer) -> list[Piece]:
        """What this rank has of the optimizer's parameters, named by their indices. Replicated ones are whole."""
        known = {id(piece.tensor): piece for piece in self._sharded}
        leaves = (leaf for group in optimizer.param_groups for leaf in group["params"])
        return [
            known.get(id(leaf), Piece("", leaf.shape, 0, leaf))._replace(name=str(index))
            for index, leaf in enumerate(leaves)
            if leaf.numel()
        ]

    def _states(self, optimizer: torch.optim.Optimizer) -> shards.States:
        return [(piece, optimizer.state.get(piece.tensor, {})) for piece in self._pieces_of(optimizer)]


def _load(
    optimizer: torch.optim.Optimizer, groups: Any, pieces: Sequence[Piece], states: Sequence[dict[str, Any]]
) -> None:
    state = {int(piece.name): one for piece, one in zip(pieces, states, strict=True) if one}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_shapes(given: Mapping[str, tuple], wanted: Mapping[str, tuple], where: str | Path) -> None:
    """Raise ValueError, naming the first tensor that does not fit, unless names and shapes are the module's."""
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            raise ValueError(
                f"the weights do not fit: {name} is {given.get(name, 'absent')} in {where} and "
                f"{wanted.get(name, 'absent')} in the module"
            )
