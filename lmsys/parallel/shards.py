"""What ZeRO-1 and full sharding share: collectives on flat tensors, and state that lies in pieces on several ranks.

A piece is a run of a flattened tensor. Pieces become whole tensors on rank 0 (gather_pieces), or are written by
torch.distributed.checkpoint as they lie (save_pieces) and read again, cut otherwise, by any number of processes (load_pieces).
The state of an optimizer that updates pieces of parameters becomes pieces by one rule: a tensor shaped like the piece holds a
value for each element and is cut like it; everything else (a step count) belongs to the parameter as a whole.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

ALIGNMENT = (
    64  # elements, where a tensor starts in a flat buffer: at least 128 bytes, of which kernels read 16 at a time
)


def align(elements: int, to: int = ALIGNMENT) -> int:
    """The next multiple of `to`."""
    return -(-elements // to) * to


# torch 2.13 renamed them.
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(whole: Tensor, share: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Start to fill whole (n S,) with each rank's share (S,), which may be its part of whole: then nothing is copied."""
    return all_gather_tensor(whole, share, group=group, async_op=True)


def reduce_scatter_mean(share: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Start to fill share (S,) with this rank's part of the ranks' mean of whole (n S,), which may be overwritten."""
    return reduce_scatter_tensor(share, whole, op=mean_operation(whole, group), group=group, async_op=True)


def mean_operation(tensor: Tensor, group: dist.ProcessGroup | None) -> dist.ReduceOp.RedOpType:
    """What a collective on the tensor is to do for a mean: NCCL divides by itself; Gloo sums what is divided here, in place."""
    if tensor.device.type == "cuda":
        return dist.ReduceOp.AVG
    tensor /= dist.get_world_size(group)
    return dist.ReduceOp.SUM


# --- Pieces ---------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Elements [start, start + tensor.numel()) of the whole tensor of that name and shape, flattened."""

    name: str
    shape: tuple[int, ...]  # of the whole
    start: int
    tensor: Tensor


def gather_pieces(pieces: Sequence[Piece], group: dist.ProcessGroup | None, device: torch.device) -> dict[str, Tensor]:
    """The whole tensors on rank 0, on the CPU; nothing on the other ranks. All ranks call it.

    Tensors of more than one element travel on the device, one at a time, so that the GPU holds one more piece and no more.
    """
    world_size = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    described = [
        (
            *piece[:3],
            piece.tensor.dtype,
            piece.tensor.numel(),
            piece.tensor.cpu() if piece.tensor.numel() <= 1 else None,
        )
        for piece in pieces
    ]
    plans: list[Any] = [described]
    if world_size > 1:
        plans = [None] * world_size
        dist.gather_object(described, plans if rank == 0 else None, group=group, group_dst=0)
        if rank != 0:
            for piece in pieces:
                if piece.tensor.numel() > 1:
                    dist.send(piece.tensor.detach().to(device).contiguous().view(-1), group=group, group_dst=0)
            return {}
    whole: dict[str, Tensor] = {}
    for source, plan in enumerate(plans):
        for index, (name, shape, start, dtype, numel, small) in enumerate(plan):
            if small is not None:
                part = small.detach()
            elif source == 0:
                part = pieces[index].tensor.detach()
            else:
                part = torch.empty(numel, dtype=dtype, device=device)
                dist.recv(part, group=group, group_src=source)
            if name not in whole:
                whole[name] = torch.empty(shape, dtype=dtype)
            whole[name].view(-1)[start : start + numel].copy_(part.reshape(-1))
    return whole


def save_pieces(
    pieces: Iterable[Piece], shared: Mapping[str, Any], folder: str | Path, group: dist.ProcessGroup | None
) -> None:
    """Write every rank's pieces to the folder with torch.distributed.checkpoint. All ranks call it.

    shared: what belongs to all ranks; dictionaries under one key are united over the ranks.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, Any] = {}
    for name, shape, start, tensor in pieces:
        shapes[name] = tuple(shape)
        tensors[f"{name}/{start}"] = tensor.detach().reshape(-1)
    mine = {"shapes": shapes, **shared}
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    united = dict(everyone[0])
    for other in everyone[1:]:
        united |= {key: united[key] | value for key, value in other.items() if isinstance(value, dict)}
    packed = pickle.dumps(united)  # as one item: the checkpoint would take a dictionary apart
    dcp.save(
        {**tensors, "shared": packed}, checkpoint_id=folder, process_group=group, no_dist=not dist.is_initialized()
    )


def load_shared(folder: str | Path, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What save_pieces got as `shared`, with the whole tensors' shapes by name under "shapes".

    Raises:
        ValueError: no such checkpoint.
    """
    if not (Path(folder) / ".metadata").exists():
        raise ValueError(f"no sharded state at {folder}; give the folder that it was saved to")
    state: dict[str, Any] = {"shared": b""}
    _read(state, folder, group)
    return pickle.loads(state["shared"])


def load_pieces(
    wanted: Sequence[tuple[str, int, int]], folder: str | Path, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """For each (name, start, stop) the elements of that tensor, flat, on the CPU. All ranks call it, each for its own.

    Reads the saved pieces that overlap what is wanted, whole.
    """
    saved: dict[str, list[tuple[int, int, torch.dtype]]] = {}
    for key, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if key != "shared":
            name, _, start = key.rpartition("/")
            saved.setdefault(name, []).append((int(start), int(start) + entry.size.numel(), entry.properties.dtype))
    tensors: dict[str, Tensor] = {}
    for name, start, stop in wanted:
        for a, b, dtype in saved[name]:
            if a < stop and start < b:
                tensors[f"{name}/{a}"] = torch.empty(b - a, dtype=dtype)
    _read(tensors, folder, group)
    parts = []
    for name, start, stop in wanted:
        part = torch.empty(stop - start, dtype=saved[name][0][2])
        for a, b, _ in saved[name]:
            low, high = max(a, start), min(b, stop)
            if low < high:
                part[low - start : high - start] = tensors[f"{name}/{a}"][low - a : high - a]
        parts.append(part)
    return parts


def _read(state: dict[str, Any], folder: str | Path, group: dist.ProcessGroup | None) -> None:
    """Fill the dictionary's entries with what was saved under their names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as intended
        dcp.load(state, checkpoint_id=folder, process_group=group, no_dist=not dist.is_initialized())


# --- Optimizer state ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """This rank's elements [start, start + leaf.numel()) of a parameter, flattened. The optimizer updates the leaf."""

    index: int  # of the parameter in its optimizer
    shape: torch.Size  # of the whole parameter
    start: int
    leaf: Tensor

    @property
    def is_whole(self) -> bool:
        return self.leaf.numel() == self.shape.numel()


State = dict[str, Any]  # of one parameter


def _state_pieces(states: Iterable[tuple[Shard, State]]) -> tuple[list[Piece], dict[str, Any]]:
    """The tensors as pieces named INDEX/KEY, and the rest by the same names."""
    pieces, rest = [], {}
    for shard, state in states:
        for key, value in state.items():
            name = f"{shard.index}/{key}"
            if not isinstance(value, Tensor):
                rest[name] = value
            elif value.ndim and value.shape == shard.leaf.shape:
                pieces.append(Piece(name, tuple(shard.shape), shard.start, value))
            elif value.ndim and not shard.is_whole:
                raise ValueError(
                    f"the optimizer keeps a '{key}' of shape {tuple(value.shape)} for {shard.leaf.numel()} elements of a "
                    f"parameter of shape {tuple(shard.shape)}: it is not elementwise, and cannot be sharded by elements"
                )
            else:
                pieces.append(Piece(name, tuple(value.shape), 0, value))
    return pieces, rest


def gather_states(
    states: Sequence[tuple[Shard, State]], group: dist.ProcessGroup | None, device: torch.device
) -> dict[int, State]:
    """The states of whole parameters by index, on rank 0 and its CPU; nothing on other ranks. All ranks call it."""
    pieces, rest = _state_pieces(states)
    whole: dict[str, Any] = gather_pieces(pieces, group, device)
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
        dist.gather_object(rest, everyone, group=group, group_dst=0)
        for one in everyone or []:
            whole |= one
    else:
        whole |= rest
    gathered: dict[int, State] = {}
    for name in sorted(whole, key=lambda name: int(name.partition("/")[0])):
        index, _, key = name.partition("/")
        gathered.setdefault(int(index), {})[key] = whole[name]
    return gathered


def cut_state(whole: Mapping[str, Any], shard: Shard) -> State:
    """This rank's part of a whole parameter's state: tensors like the parameter are cut, all else is taken as it is."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim and value.shape == shard.shape:
            value = value.reshape(-1)[shard.start : shard.start + shard.leaf.numel()].view(shard.leaf.shape)
        return value.clone()

    return {key: cut(value) for key, value in whole.items()}


def save_states(
    states: Iterable[tuple[Shard, State]],
    shared: Mapping[str, Any],
    folder: str | Path,
    group: dist.ProcessGroup | None,
) -> None:
    """Write the states with torch.distributed.checkpoint, each rank its own. All ranks call it."""
    pieces, rest = _state_pieces(states)
    save_pieces(pieces, {"rest": rest, **shared}, folder, group)


def load_states(
    shards: Sequence[Shard], folder: str | Path, group: dist.ProcessGroup | None
) -> tuple[list[State], Any]:
    """The states of the shards, whatever the number of ranks that saved them, and what save_states got as `shared`."""
    shared = load_shared(folder, group)
    by_index: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shared["shapes"].items():
        index, _, key = name.partition("/")
        by_index.setdefault(int(index), {})[key] = tuple(shape)
    wanted: list[tuple[str, int, int]] = []
    shapes: list[tuple[int, str, tuple[int, ...]]] = []  # which state, which key, what shape there
    for position, shard in enumerate(shards):
        for key, shape in by_index.get(shard.index, {}).items():
            split = len(shape) > 0 and shape == tuple(shard.shape)
            start, count = (shard.start, shard.leaf.numel()) if split else (0, torch.Size(shape).numel())
            wanted.append((f"{shard.index}/{key}", start, start + count))
            shapes.append((position, key, tuple(shard.leaf.shape) if split else shape))
    states: list[State] = [{} for _ in shards]
    for (position, key, shape), tensor in zip(shapes, load_pieces(wanted, folder, group), strict=True):
        states[position][key] = tensor.view(shape)
    for position, shard in enumerate(shards):
        prefix = f"{shard.index}/"
        states[position] |= {
            name.removeprefix(prefix): value for name, value in shared["rest"].items() if name.startswith(prefix)
        }
    return states, shared
