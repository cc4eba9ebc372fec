"""Averaging over the GPUs of one machine by their copy engines, which leaves the SMs to the backward pass.

A collective of NCCL is a kernel: its blocks hold SMs for as long as bytes travel, and a matrix product that wants all SMs waits for
them or runs in two waves. Here the bytes travel by cudaMemcpyAsync between the GPUs' memories, and a GPU waits for another by a
stream operation (cuStreamWaitValue32), not by a kernel that spins. What is left for the SMs is the addition and a local copy.

A list of tensors, taken as one vector, is cut into pieces, and a piece into one chunk a rank. Each piece passes three queues, which
are CUDA streams; piece by piece they overlap:

    send     copy each peer's chunk of what is here into that peer's inbox          then tell it: sent
    add      wait for sent from all; add their chunks to the own one, divide;
             copy the mean into every peer's outbox slot for this rank               then tell it: added
    receive  wait for added from all; copy their means from the outbox to their
             places                                                                  then tell it: received

Inbox and outbox are memory that all ranks have mapped (torch's symmetric memory); their slots are used in turn, and whoever fills a
slot waits until the peer has emptied it. The tensors themselves stay where they are, and every rank gets the same bits.

A rank's wait depends only on work that all ranks enqueue earlier, so queues that share a hardware channel cannot block each other.

Sources: reduce-scatter and all-gather as halves of an all-reduce, Thakur, Rabenseifner, Gropp, "Optimization of Collective
Communication Operations in MPICH" (2005); copies in place of kernels, as in torch's asynchronous tensor parallelism.
Limits: GPUs that reach each other's memory, on one machine; dense tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lmsys.parallel.group import check_same_everywhere

QUEUES = SEND, ADD, RECEIVE = 0, 1, 2
# What a rank tells another when the queue of that number has dealt with a piece: sent, added, received.
_FLAGS = len(QUEUES)
_ALIGNMENT = 256  # bytes, of chunks


class Range(NamedTuple):
    """Elements start to stop of a tensor, and where they begin in their chunk."""

    tensor: int
    start: int
    stop: int
    offset: int


Piece = tuple[tuple[Range, ...], ...]  # a chunk a rank


class Fabric(Protocol):
    """Memory that ranks share, and queues of work on it. Queues run beside each other, each in order."""

    def regions(self) -> list[Tensor]:
        """Every rank's memory, bytes, zeros at the start."""

    def start(self, *queues: int) -> None:
        """The queues go on after what the caller has enqueued so far."""

    def on(self, queue: int) -> contextlib.AbstractContextManager[Any]:
        """Operations in here go to the queue."""

    def tell(self, queue: int, rank: int, flag: int, value: int) -> None:
        """After the queue's work so far, write value to a flag of a rank."""

    def wait(self, queue: int, flag: int, value: int) -> None:
        """The queue's later work waits until a flag of this rank is at least value."""

    def end(self, *queues: int) -> Any:
        """An object whose wait() makes the caller's later work wait for the queues' work so far."""


class CopyEngine:
    """average(tensors) of the ranks of a group. All ranks call it in one order, with tensors of the same shapes.

    Args:
        group, device: the processes, each with its GPU.
        piece_mb: 10^6 bytes of tensors that travel as one piece. slots: pieces under way at most.
        fabric: what carries the bytes; None: the GPUs' own links. Called with the bytes that each rank shares.
    Raises:
        ValueError: numbers out of range, or GPUs that cannot reach each other's memory.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        piece_mb: float = 32.0,
        slots: int = 4,
        fabric: Any = None,
    ):
        if not piece_mb > 0 or slots < 1:
            raise ValueError(f"piece_mb is {piece_mb} and slots {slots}; they must be above 0, and 1 or more")
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._slots, self._sequence = slots, 0
        self._chunk_bytes = _round_up(-(-int(piece_mb * 1e6) // self.world_size), _ALIGNMENT)
        self._peers = [(self.rank + step) % self.world_size for step in range(1, self.world_size)]
        box = slots * len(self._peers) * self._chunk_bytes
        self.memory_bytes = 2 * box + _round_up(4 * _FLAGS * self.world_size, _ALIGNMENT)
        make = functools.partial(Links, group, device) if fabric is None else fabric
        self._fabric: Fabric = make(self.memory_bytes, 2 * box)
        self._boxes = [region[: 2 * box].view(2, slots, len(self._peers), -1) for region in self._fabric.regions()]
        self._views: dict[tuple[torch.dtype, int, int, int, int], Tensor] = {}
        self._plans: dict[tuple, tuple[Piece, ...]] = {}

    def average(self, tensors: Sequence[Tensor]) -> Any:
        """Start to average tensors of one dtype, contiguous, in place; the object's wait() orders the caller's later work after it.

        The caller keeps the tensors, and leaves them alone, until then.
        """
        dtype = tensors[0].dtype
        key = (dtype, *(tensor.numel() for tensor in tensors))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = pieces(key[1:], self.world_size, self._chunk_bytes // dtype.itemsize)
        flat = [tensor.view(-1) for tensor in tensors]
        self._fabric.start(SEND, ADD)
        for piece in plan:
            self._pass(piece, flat, dtype)
        return self._fabric.end(ADD, RECEIVE)

    def _pass(self, piece: Piece, flat: list[Tensor], dtype: torch.dtype) -> None:
        """Enqueue a piece."""
        fabric, number = self._fabric, self._sequence
        self._sequence += 1
        slot, done, emptied = number % self._slots, number + 1, number + 1 - self._slots
        parts = [[(flat[r.tensor][r.start : r.stop], r.offset) for r in chunk] for chunk in piece]
        own = [part for part, _ in parts[self.rank]]
        with fabric.on(SEND):
            for peer in self._peers:
                if emptied > 0:
                    fabric.wait(SEND, self._flag(ADD, peer), emptied)
                self._push(parts[peer], peer, 0, slot, dtype)
                fabric.tell(SEND, peer, self._flag(SEND, self.rank), done)
        with fabric.on(ADD):
            for peer in self._peers:
                fabric.wait(ADD, self._flag(SEND, peer), done)
            if own:
                sent = [self._slices(parts[self.rank], 0, slot, peer, dtype) for peer in self._peers]
                if len(sent) == 1:
                    torch._foreach_lerp_(own, sent[0], 0.5)  # the mean of two in one pass
                else:
                    for tensors in sent:
                        torch._foreach_add_(own, tensors)
                    torch._foreach_div_(own, self.world_size)
            for peer in self._peers:
                if emptied > 0:
                    fabric.wait(ADD, self._flag(RECEIVE, peer), emptied)
                self._push(parts[self.rank], peer, 1, slot, dtype)
                fabric.tell(ADD, peer, self._flag(ADD, self.rank), done)
        with fabric.on(RECEIVE):
            for peer in self._peers:
                fabric.wait(RECEIVE, self._flag(ADD, peer), done)
            theirs = [
                (part, view) for peer in self._peers for part, view in self._received(parts[peer], slot, peer, dtype)
            ]
            if theirs:
                torch._foreach_copy_(*map(list, zip(*theirs, strict=True)))
            for peer in self._peers:
                fabric.tell(RECEIVE, peer, self._flag(RECEIVE, self.rank), done)

    def _push(self, parts: list[tuple[Tensor, int]], peer: int, box: int, slot: int, dtype: torch.dtype) -> None:
        """Copy parts into a peer's box, one copy each, as only copies of single tensors are left to the copy engines."""
        place = self._box(peer, box, slot, self.rank, dtype)
        for part, offset in parts:
            place[offset : offset + part.numel()].copy_(part, non_blocking=True)

    def _slices(
        self, parts: list[tuple[Tensor, int]], box: int, slot: int, peer: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """What a peer has put for these parts into a box of this rank."""
        place = self._box(self.rank, box, slot, peer, dtype)
        return [place[offset : offset + part.numel()] for part, offset in parts]

    def _received(self, parts: list[tuple[Tensor, int]], slot: int, peer: int, dtype: torch.dtype) -> Iterator:
        return zip([part for part, _ in parts], self._slices(parts, 1, slot, peer, dtype), strict=True)

    def _box(self, owner: int, box: int, slot: int, writer: int, dtype: torch.dtype) -> Tensor:
        """A chunk of owner's inbox (0) or outbox (1) that writer fills, as elements."""
        key = (dtype, owner, box, slot, writer)
        if key not in self._views:
            self._views[key] = self._boxes[owner][box, slot, (writer - owner - 1) % self.world_size].view(dtype)
        return self._views[key]

    def _flag(self, queue: int, writer: int) -> int:
        return queue * self.world_size + writer


def pieces(sizes: Sequence[int], world_size: int, chunk: int) -> tuple[Piece, ...]:
    """Cut tensors of so many elements into pieces of even length with a chunk of at most `chunk` elements a rank.

    Chunks begin at multiples of 64 elements of the whole; the last ones may be short or empty.
    """
    total = sum(sizes)
    count = -(-total // (chunk * world_size))
    length = min(chunk, _round_up(-(-total // (count * world_size)), 64))
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)

    def ranges(first: int, last: int) -> tuple[Range, ...]:
        return tuple(
            Range(index, max(first, start) - start, min(last, end) - start, max(first, start) - first)
            for index, (start, end) in enumerate(itertools.pairwise(starts))
            if max(first, start) < min(last, end)
        )

    chunks = [ranges(first, min(total, first + length)) for first in range(0, total, length)]
    chunks += [()] * (-len(chunks) % world_size)
    return tuple(tuple(chunks[i : i + world_size]) for i in range(0, len(chunks), world_size))


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# --- The GPUs' own links --------------------------------------------------------------------------


class _Ended:
    """Events after which some queues' work is done."""

    def __init__(self, events: list[torch.cuda.Event]):
        self._events = events

    def wait(self) -> None:
        for event in self._events:
            torch.cuda.current_stream().wait_event(event)


class Links:
    """A Fabric of GPUs of one machine: torch's symmetric memory, a stream a queue, and the driver's operations on streams."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, memory_bytes: int, flags_at: int):
        if device.type != "cuda":
            raise ValueError(f"copy engines are a GPU's, and the parameters are on {device}; give transport='nccl'")
        check_same_everywhere(
            Path("/proc/sys/kernel/random/boot_id").read_text(),
            "the machine",
            group,
            "copies reach GPUs of one machine: give transport='nccl'",
        )
        from torch.distributed import _symmetric_memory

        try:
            self._memory = _symmetric_memory.empty(memory_bytes, dtype=torch.uint8, device=device)
            self._memory.zero_()
            torch.cuda.synchronize(device)
            self._handle = _symmetric_memory.rendezvous(self._memory, group)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"these GPUs cannot share memory ({reason}); give transport='nccl'") from error
        ranks = range(dist.get_world_size(group))
        self._regions = [self._handle.get_buffer(rank, (memory_bytes,), torch.uint8) for rank in ranks]
        self._flags = [region.data_ptr() + flags_at for region in self._regions]
        self._rank = dist.get_rank(group)
        # Above backward's priority: the additions are short, and everything behind them waits.
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in QUEUES]
        self._pointers = [ctypes.c_void_p(stream.cuda_stream) for stream in self._streams]
        driver = _driver()
        self._write, self._wait = driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2
        dist.barrier(group)  # nobody writes to memory that its owner has yet to clear

    def regions(self) -> list[Tensor]:
        return self._regions

    def start(self, *queues: int) -> None:
        here = torch.cuda.Event()
        here.record()
        for queue in queues:
            self._streams[queue].wait_event(here)

    def on(self, queue: int) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[queue])

    def tell(self, queue: int, rank: int, flag: int, value: int) -> None:
        self._check(self._write(self._pointers[queue], self._flags[rank] + 4 * flag, value & 0xFFFFFFFF, 0))

    def wait(self, queue: int, flag: int, value: int) -> None:
        self._check(self._wait(self._pointers[queue], self._flags[self._rank] + 4 * flag, value & 0xFFFFFFFF, 0))

    def end(self, *queues: int) -> _Ended:
        events = []
        for queue in queues:
            events.append(torch.cuda.Event())
            events[-1].record(self._streams[queue])
        return _Ended(events)

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"the driver refused an operation on a stream with error {status}")


@functools.cache
def _driver() -> ctypes.CDLL:
    """CUDA's driver, with the operations on streams that torch does not offer. Flags 0 of a wait: until the value is reached,
    in a comparison that a counter may overflow; of a write: after all that the stream wrote before."""
    driver = ctypes.CDLL("libcuda.so.1")
    for function in (driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2):
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        function.restype = ctypes.c_int
    return driver
