"""What ZeRO-1 and full sharding share: flat buffers, collectives on them, and state that lies in pieces on the ranks.

A piece is a run of a flattened tensor. Pieces become whole tensors on rank 0 (gather_pieces), or are written as they
lie (save_pieces) and read again, cut otherwise, by any number of processes (load_pieces):

    index.json                  which pieces there are, in which file, each with its SHA-256; what belongs to all ranks
    <save>-<rank>.safetensors   a rank's pieces; <save> tells the files of one saving from those of another

torch.distributed.checkpoint does the same with a pickle for an index, whose reading can run any code. The index is put
in place when all else is on the disk, so that what was saved before stays whole until then. All processes must see the
folder. Of an optimizer that updates pieces of parameters, state shaped like the piece holds a value for each element
and is cut like it; everything else (a step count) belongs to the parameter as a whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmsys.parallel.group import by_rank, current, gather_objects, together
from lmsys.records import flush

INDEX_FILE = "index.json"
ALIGNMENT = 64  # elements, where a tensor starts in a flat buffer: at least 128 bytes; kernels read 16 at a time

# torch 2.13 renamed them.
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def align(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def on_gradient(parameter: Tensor, method: Callable[..., None], *args: Any) -> RemovableHandle:
    """Have backward call method(*args, parameter), while its object lives, when it has added to parameter.grad.

    A parameter holds its hooks in C++, where the garbage collector does not look: a hook that held its wrapper, which
    holds the parameter, would keep the model for ever. args: plain values, or the circle is there again.
    """
    weak = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        alive = weak()
        if alive is not None:
            alive(*args, parameter)

    return parameter.register_post_accumulate_grad_hook(hook)


class FlatLayout:
    """Where parameters lie in a flat buffer of `size` elements: one after another, at multiples of ALIGNMENT."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self.shapes = [parameter.shape for parameter in parameters]
        self.offsets: list[int] = []
        self.size = 0
        for parameter in parameters:
            self.offsets.append(self.size)
            self.size = align(self.size + parameter.numel())

    def views(self, flat: Tensor) -> list[Tensor]:
        places = zip(self.offsets, self.shapes, strict=True)
        return [flat[offset : offset + shape.numel()].view(shape) for offset, shape in places]

    def flatten(self, size: int) -> Tensor:
        """The parameters' values in a new buffer of at least self.size elements, zeros elsewhere."""
        first = self.parameters[0]
        flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        torch._foreach_copy_(self.views(flat), [parameter.detach() for parameter in self.parameters])
        return flat

    def cut(self, low: int, high: int) -> list[tuple[int, int]]:
        """For each parameter, which of its elements lie in [low, high) of the buffer: (start, stop), equal if none."""
        cuts = []
        for offset, shape in zip(self.offsets, self.shapes, strict=True):
            start = min(max(low - offset, 0), shape.numel())
            cuts.append((start, max(min(high - offset, shape.numel()), start)))
        return cuts

    def take_gradients(self, size: int, dtype: torch.dtype) -> Tensor:
        """The gradients in a buffer of that size, zeros where there is none; the parameters keep none."""
        first, *others = gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if not others and first is not None and (first.numel(), first.dtype) == (size, dtype) and first.is_contiguous():
            return first.view(-1)  # an embedding, a head: large, and nothing to put together
        flat = torch.empty(size, dtype=dtype, device=self.parameters[0].device)
        if any(gradient is None for gradient in gradients):
            flat.zero_()
        copy_present(self.views(flat), gradients)
        return flat


def flags_of(used: Sequence[bool], device: torch.device) -> Tensor:
    """(parameters,) ones and zeros on the device. Where all are used the host does not wait for a copy to it."""
    flags = torch.ones(len(used), device=device)
    return flags if all(used) else flags.copy_(torch.tensor(used))


def used_anywhere(used: list[bool], flags: Tensor) -> list[bool]:
    """Which parameters some rank used, of the mean of flags_of. Only a rank that left one unused waits to read it."""
    return used if all(used) else (flags > 0).tolist()


def copy_present(to: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Copy the values that there are, in as few kernels as can be."""
    pairs = [(view, value) for view, value in zip(to, values, strict=True) if value is not None]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


def all_gather(whole: Tensor, share: Tensor) -> dist.Work:
    """Start to fill whole (n S,) with each rank's share (S,), which may be its part of whole."""
    return all_gather_tensor(whole, share, async_op=True)


def mean_operation(tensor: Tensor) -> dist.ReduceOp.RedOpType:
    """The collective's operation for a mean: NCCL divides by itself; Gloo sums what is divided here, in place."""
    if tensor.device.type == "cuda":
        return dist.ReduceOp.AVG
    tensor /= dist.get_world_size()
    return dist.ReduceOp.SUM


class MeanInFlight:
    """Gradients (elements,), kept here and overwritten, on their way to be this rank's share of the ranks' mean.

    shares: [start, stop) of each rank; all of one length: a reduce-scatter; else a reduce to each rank.
    """

    def __init__(self, gradients: Tensor, shares: Sequence[tuple[int, int]]):
        rank, world_size = current()
        start, stop = shares[rank]
        self._gradients, self._mean, self._works = gradients, gradients[start:stop], []
        if world_size == 1:
            return
        operation = mean_operation(gradients)
        if len({high - low for low, high in shares}) == 1:
            self._mean = gradients.new_empty(stop - start)
            self._works = [reduce_scatter_tensor(self._mean, gradients, op=operation, async_op=True)]
        else:
            self._works = [
                dist.reduce(gradients[low:high], dst=owner, op=operation, async_op=True)
                for owner, (low, high) in enumerate(shares)
                if low < high
            ]

    def wait(self) -> Tensor:
        """The mean, (stop - start,), which the current stream now waits for."""
        for work in self._works:
            work.wait()
        return self._mean


def even_shares(size: int, world_size: int) -> list[tuple[int, int]]:
    """[start, stop) of each rank in a buffer of at least that size; all as long, multiples of ALIGNMENT."""
    share = align(-(-size // world_size))
    return [(rank * share, (rank + 1) * share) for rank in range(world_size)]


def clip_gradients(
    sharded: list[Tensor] | None, replicated: list[Tensor], max_norm: float, device: torch.device
) -> Tensor:
    """Scale gradients in place so that their 2-norm over the whole model is at most max_norm; 0 or less: only measure.

    sharded: this rank's part of what is spread over the ranks; None: nothing is. replicated: what every rank has.
    Returns the norm before clipping, a scalar on the device, for which nothing has waited.
    """

    def norm_of(gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=device)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)))

    norm = norm_of(replicated)
    if sharded is not None:
        total = norm_of(sharded).square()
        if current()[1] > 1:
            dist.all_reduce(total)
        norm = (total + norm.square()).sqrt()
    gradients = (sharded or []) + replicated
    if max_norm > 0 and gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


# --- Pieces ---------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Elements [start, start + tensor.numel()) of the whole tensor of that name and shape, flattened."""

    name: str
    shape: tuple[int, ...]  # of the whole
    start: int
    tensor: Tensor

    @property
    def is_whole(self) -> bool:
        return self.tensor.numel() == math.prod(self.shape)

    @property
    def run(self) -> tuple[str, int, int]:
        """Name, start and stop."""
        return self.name, self.start, self.start + self.tensor.numel()

    def cut(self, whole: Tensor) -> Tensor:
        """What it is to hold of a whole tensor: a view."""
        return whole.reshape(-1)[self.start : self.run[2]].view(self.tensor.shape)


_Entry = tuple[str, tuple[int, ...], int, int, torch.dtype]  # a piece's name, shape, start, stop, dtype


def _exchange_entries(pieces: Mapping[str, Piece]) -> list[dict[str, _Entry]]:
    """By rank and key the pieces of all ranks; what several have whole is the first one's. Empty ones are left out."""
    entries = {
        key: (piece.name, tuple(piece.shape), *piece.run[1:], piece.tensor.dtype)
        for key, piece in pieces.items()
        if piece.tensor.numel() or piece.is_whole
    }
    seen: set[str] = set()
    by_rank = []
    for theirs in gather_objects(entries):
        by_rank.append({key: entry for key, entry in theirs.items() if key not in seen})
        seen |= theirs.keys()
    return by_rank


def gather_pieces(pieces: Iterable[Piece], device: torch.device) -> dict[str, Tensor]:
    """The whole tensors on rank 0's CPU; nothing on other ranks. All ranks call it. One piece at a time travels."""
    rank, _ = current()
    mine = {_key(*piece.run): piece for piece in pieces}
    whole: dict[str, Tensor] = {}
    for source, entries in enumerate(_exchange_entries(mine)):
        for key, (name, shape, start, stop, dtype) in entries.items():
            if rank == source:
                part = mine[key].tensor.detach().reshape(-1)
                if rank != 0 and start < stop:
                    dist.send(part.to(device).contiguous(), dst=0)
            elif rank == 0:
                part = torch.empty(stop - start, dtype=dtype, device=device)
                if start < stop:
                    dist.recv(part, src=source)
            if rank == 0:
                if name not in whole:
                    whole[name] = torch.empty(shape, dtype=dtype)
                whole[name].view(-1)[start:stop].copy_(part)
    return whole


def save_pieces(pieces: Iterable[Piece], shared: Mapping[str, Any], folder: str | Path) -> None:
    """Write every rank's pieces to the folder, in place of what was saved there before. All ranks call it.

    shared: what belongs to all ranks, the same on each, JSON-ready.
    Raises:
        OSError: a full disk, an unwritable folder; in every process. What was saved there before stays.
    """
    folder = Path(folder)
    rank, _ = current()
    mine = {_key(*piece.run): piece for piece in pieces}
    entries = _exchange_entries(mine)[rank]
    save = gather_objects(secrets.token_hex(4))[0]

    def write() -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
        file = folder / f"{save}-{rank:05d}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        # each with a storage of its own, as the format needs
        tensors = {key: mine[key].tensor.detach().reshape(-1).to("cpu", copy=True) for key in entries}
        try:
            save_file(tensors, file)
        except SafetensorError as error:  # it wraps the system's error
            raise OSError(f"cannot write {file}: {error}") from error
        flush(file)
        places = []
        for key, (name, shape, start, stop, dtype) in entries.items():
            place = {"file": file.name, "start": start, "stop": stop, "dtype": str(dtype).removeprefix("torch.")}
            places.append((name, shape, place | {"sha256": _sha256(tensors[key])}))
        return places

    written = itertools.chain(*by_rank(write))

    def put_index() -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, list[dict[str, Any]]] = {}
        for name, shape, place in written:
            shapes[name] = shape
            places.setdefault(name, []).append(place)
        temporary = folder / f".{INDEX_FILE}.tmp"
        temporary.write_text(json.dumps({**shared, "shapes": shapes, "pieces": places}), encoding="utf-8")
        flush(temporary)
        os.replace(temporary, folder / INDEX_FILE)
        flush(folder)
        for old in folder.glob("*.safetensors"):
            if not old.name.startswith(f"{save}-"):
                old.unlink()

    together(put_index if rank == 0 else lambda: None)


def load_shared(folder: str | Path) -> dict[str, Any]:
    """What save_pieces got as `shared`, with shapes by name under "shapes". ValueError: nothing there, or damaged."""
    return {key: value for key, value in _read_index(folder).items() if key != "pieces"}


def load_pieces(wanted: Sequence[tuple[str, int, int]], folder: str | Path) -> list[Tensor]:
    """For each (name, start, stop) the elements of that tensor, flat, on the CPU. All ranks call it, each for its own.

    Raises:
        ValueError: a file is missing or damaged; in every process.
    """
    folder = Path(folder)

    def read() -> list[Tensor]:
        places = _read_index(folder)["pieces"]
        return [_read_run(folder, name, start, stop, places.get(name, [])) for name, start, stop in wanted]

    return together(read)


def _read_run(folder: Path, name: str, start: int, stop: int, places: Sequence[Mapping[str, Any]]) -> Tensor:
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
        assert index["shapes"].keys() == index["pieces"].keys(), "its shapes and pieces are of other tensors"
        for name, shape in index["shapes"].items():
            assert all(type(size) is int and size >= 0 for size in shape), name
            places = index["pieces"][name]
            assert sum(place["stop"] - place["start"] for place in places) == math.prod(shape), name
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


# --- Optimizer state ------------------------------------------------------------------------------

State = dict[str, Any]  # of one parameter
States = Iterable[tuple[Piece, State]]  # each of a parameter's piece, named by its index in the optimizer


def _state_pieces(states: States) -> tuple[list[Piece], dict[str, Any]]:
    """This rank's tensors as pieces named INDEX/KEY, and the rest of all ranks by the same names."""
    pieces, rest = [], {}
    for of, state in states:
        for key, value in state.items():
            name = f"{of.name}/{key}"
            if not isinstance(value, Tensor):
                rest[name] = value
            elif value.ndim and value.shape == of.tensor.shape:
                pieces.append(Piece(name, of.shape, of.start, value))
            elif value.ndim and not of.is_whole:
                raise ValueError(
                    f"the optimizer keeps a '{key}' of shape {tuple(value.shape)} for {of.tensor.numel()} elements of "
                    f"a parameter of shape {tuple(of.shape)}: it is not elementwise, and cannot be sharded by elements"
                )
            else:
                pieces.append(Piece(name, tuple(value.shape), 0, value))
    return pieces, {name: value for theirs in gather_objects(rest) for name, value in theirs.items()}


def gather_states(states: States, device: torch.device) -> dict[int, State]:
    """The states of whole parameters by index, on rank 0 and its CPU; nothing on other ranks. All ranks call it."""
    pieces, rest = _state_pieces(states)
    whole = gather_pieces(pieces, device) | rest
    gathered: dict[int, State] = {}
    for name in sorted(whole, key=lambda name: int(name.partition("/")[0])):
        index, _, key = name.partition("/")
        gathered.setdefault(int(index), {})[key] = whole[name]
    return gathered if current()[0] == 0 else {}


def cut_states(states: Mapping[int, State], pieces: Iterable[Piece]) -> list[State]:
    """For each piece its part of the whole parameter's state: tensors like the parameter are cut, all else is taken."""

    def cut(value: Any, of: Piece) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (of.cut(value) if value.ndim and value.shape == of.shape else value).clone()

    return [{key: cut(value, of) for key, value in states.get(int(of.name), {}).items()} for of in pieces]


def save_states(states: States, shared: Mapping[str, Any], folder: str | Path) -> None:
    pieces, rest = _state_pieces(states)
    save_pieces(pieces, {"rest": rest, **shared}, folder)


def load_states(pieces: Sequence[Piece], folder: str | Path) -> tuple[list[State], dict[str, Any]]:
    """The states of the pieces, whatever the number of ranks that saved them, and what save_states got as `shared`."""
    shared = load_shared(folder)
    wanted: list[tuple[int, str, Piece]] = []  # which state, which key, the shape and the run there
    states: list[State] = []
    for position, of in enumerate(pieces):
        prefix = f"{of.name}/"
        states.append({n.removeprefix(prefix): v for n, v in shared["rest"].items() if n.startswith(prefix)})
        for name, shape in shared["shapes"].items():
            if name.startswith(prefix):
                is_cut = len(shape) > 0 and tuple(shape) == tuple(of.shape)
                part = of._replace(name=name) if is_cut else Piece(name, tuple(shape), 0, torch.empty(shape))
                wanted.append((position, name.removeprefix(prefix), part))
    values = load_pieces([part.run for _, _, part in wanted], folder)
    for (position, key, part), value in zip(wanted, values, strict=True):
        states[position][key] = value.view(part.tensor.shape)
    return states, shared
