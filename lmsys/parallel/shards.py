"""What ZeRO-1 and full sharding share: collectives on flat tensors, and state that lies in pieces on several ranks.

A piece is a run of a flattened tensor. Pieces become whole tensors on rank 0 (gather_pieces), or are written as they lie
(save_pieces) and read again, cut otherwise, by any number of processes (load_pieces):

    index.json                    which pieces there are, in which file, each with its SHA-256; and what belongs to all ranks
    <save>-<rank>.safetensors     a rank's pieces; <save> tells the files of one saving from those of another

torch.distributed.checkpoint does the same with an index that is a pickle, whose reading can run any code; hence this one. The
index is put in place when all else is on the disk, so that what was saved before stays whole until then. The folder must be
one that all processes see.
The state of an optimizer that updates pieces of parameters becomes pieces by one rule: a tensor shaped like the piece holds a
value for each element and is cut like it; everything else (a step count) belongs to the parameter as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmsys.records import flush

INDEX_FILE = "index.json"

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
    """Write every rank's pieces to the folder. All ranks call it. What was saved there before is replaced.

    shared: what belongs to all ranks, JSON-ready; dictionaries under one key are united over the ranks.
    Raises:
        OSError: a full disk, an unwritable folder; in every process. What was saved there before stays.
    """
    folder = Path(folder)
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    mine = {_key(piece.name, piece.start, piece.start + piece.tensor.numel()): piece for piece in pieces}
    described = [
        (key, piece.name, tuple(piece.shape), piece.start, piece.tensor.numel(), str(piece.tensor.dtype))
        for key, piece in mine.items()
    ]
    plans = _everyone((described, dict(shared), secrets.token_hex(4)), group)
    save = plans[0][2]
    writer: dict[str, int] = {}  # a piece that several ranks have whole is written by the first of them
    for source, (others, _, _) in enumerate(plans):
        for key, *_ in others:
            writer.setdefault(key, source)
    file = f"{save}-{rank:05d}.safetensors"

    def write() -> dict[str, str]:
        """This rank's file; returns its pieces' SHA-256."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: piece.tensor.detach().reshape(-1).to("cpu", copy=True)  # a storage of its own, as the format needs
            for key, piece in mine.items()
            if writer[key] == rank
        }
        try:
            save_file(tensors, folder / file)
        except SafetensorError as error:  # it wraps the system's error
            raise OSError(f"cannot write {folder / file}: {error}") from error
        flush(folder / file)
        return {key: _sha256(tensor) for key, tensor in tensors.items()}

    sums = _everyone(_together(write, group), group)

    def put_index() -> None:
        united: dict[str, Any] = {}
        shapes: dict[str, list[int]] = {}
        places: dict[str, list[dict[str, Any]]] = {}
        for source, (others, given, _) in enumerate(plans):
            for key, value in given.items():
                united[key] = united[key] | value if isinstance(united.get(key), dict) else united.get(key, value)
            for key, name, shape, start, numel, dtype in others:
                shapes[name] = list(shape)
                if writer[key] == source:
                    where = {"file": f"{save}-{source:05d}.safetensors", "start": start, "stop": start + numel}
                    where |= {"dtype": dtype.removeprefix("torch."), "sha256": sums[source][key]}
                    places.setdefault(name, []).append(where)
        temporary = folder / f".{INDEX_FILE}.tmp"
        temporary.write_text(json.dumps({**united, "shapes": shapes, "pieces": places}), encoding="utf-8")
        flush(temporary)
        os.replace(temporary, folder / INDEX_FILE)
        flush(folder)
        for old in folder.glob("*.safetensors"):
            if not old.name.startswith(f"{save}-"):
                old.unlink()

    _together(put_index if rank == 0 else lambda: None, group)


def load_shared(folder: str | Path, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What save_pieces got as `shared`, with the whole tensors' shapes by name under "shapes".

    Raises:
        ValueError: no such checkpoint, or a damaged one.
    """
    return {key: value for key, value in _read_index(folder).items() if key != "pieces"}


def load_pieces(
    wanted: Sequence[tuple[str, int, int]], folder: str | Path, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """For each (name, start, stop) the elements of that tensor, flat, on the CPU. All ranks call it, each for its own.

    Reads the saved pieces that overlap what is wanted, whole, and checks them.
    Raises:
        ValueError: a file is missing or damaged; in every process.
    """
    folder = Path(folder)

    def read() -> list[Tensor]:
        places = _read_index(folder)["pieces"]
        return [_read_run(folder, name, start, stop, places.get(name, [])) for name, start, stop in wanted]

    return _together(read, group)


def _read_run(folder: Path, name: str, start: int, stop: int, places: Sequence[Mapping[str, Any]]) -> Tensor:
    """Elements [start, stop) of a tensor, of the pieces that hold some."""
    if not places:
        raise ValueError(f"{folder} is damaged: it holds nothing of {name}")
    run = torch.empty(stop - start, dtype=getattr(torch, places[0]["dtype"]))
    filled = 0
    for place in places:
        low, high = max(place["start"], start), min(place["stop"], stop)
        if low < high:
            piece = _read_piece(folder, name, place)
            if piece.dtype != run.dtype:
                raise ValueError(f"{folder} is damaged: of {name}, one piece is {piece.dtype} and another {run.dtype}")
            run[low - start : high - start] = piece[low - place["start"] : high - place["start"]]
            filled += high - low
    if filled != stop - start:
        raise ValueError(f"{folder} is damaged: it holds {filled} of the elements {start} to {stop} of {name}")
    return run


def _read_index(folder: str | Path) -> dict[str, Any]:
    """index.json, of the right form."""
    file = Path(folder) / INDEX_FILE
    if not file.exists():
        raise ValueError(f"no sharded state at {folder}; give the folder that it was saved to")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        for name, shape in index["shapes"].items():
            assert all(type(size) is int and size >= 0 for size in shape), name
        assert index["shapes"].keys() == index["pieces"].keys(), "its shapes and pieces are of other tensors"
        for name, places in index["pieces"].items():
            assert sum(place["stop"] - place["start"] for place in places) == math.prod(index["shapes"][name]), name
            for place in places:
                assert type(place["start"]) is type(place["stop"]) is int and 0 <= place["start"] <= place["stop"]
                assert type(place["sha256"]) is str and Path(place["file"]).name == place["file"], place["file"]
                assert type(getattr(torch, place["dtype"])) is torch.dtype, place["dtype"]
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{file} is damaged: it is not an index of pieces ({what})") from None
    return index


def _read_piece(folder: Path, name: str, place: Mapping[str, Any]) -> Tensor:
    file, key = folder / place["file"], _key(name, place["start"], place["stop"])
    try:
        with safe_open(file, framework="pt") as opened:
            piece = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or damaged: {str(error)[:200]}") from None
    if tuple(piece.shape) != (place["stop"] - place["start"],) or _sha256(piece) != place["sha256"]:
        raise ValueError(f"{file} is damaged: the SHA-256 of {key} is not the one in {INDEX_FILE}")
    return piece


def _key(name: str, start: int, stop: int) -> str:
    return f"{name}/{start}:{stop}"


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()


def _everyone(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Each rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _together(function: Callable[[], Any], group: dist.ProcessGroup | None) -> Any:
    """What the function returns here; a ValueError or OSError of any rank is raised on all."""
    outcome, error = None, None
    try:
        outcome = function()
    except (ValueError, OSError) as caught:
        error = caught
    for each in _everyone(error, group):
        if each is not None:
            raise each
    return outcome


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
    """Write the states, each rank its own pieces. All ranks call it."""
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
