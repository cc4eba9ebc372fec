"""Averaging over the GPUs of one machine by their copy engines, which leaves the SMs to the backward pass.

A collective of NCCL is a kernel, whose blocks hold SMs for as long as bytes travel. Here the bytes travel by copies
between the GPUs' memories, and a GPU waits for another by a stream operation (cuStreamWaitValue32). What is left for
the SMs is the addition and a local copy.

A list of tensors, taken as one vector, is cut into pieces, and a piece into one chunk a rank. Each piece passes three
queues, which are CUDA streams and overlap:

    send     copy each peer's chunk of what is here into that peer's inbox            then tell it: sent
    add      wait for sent from all; add their chunks to the own one, divide;
             copy the mean into every peer's outbox slot for this rank                then tell it: added
    receive  wait for added from all; copy their means from the outbox to their place then tell it: received

Inbox and outbox are memory that all ranks have mapped (torch's symmetric memory); their slots are used in turn, and
whoever fills a slot waits until the peer has emptied it. Every rank gets the same bits.

A rank's wait depends only on work that all ranks enqueue earlier, so queues that share a hardware channel cannot block
each other. Pieces are counted from 1 in each round, such as a training step; close() ends one, which can then be
replayed as a CUDA graph, where a piece's queues also wait for each other, as CUDA enqueues branches in any order.

Sources: reduce-scatter and all-gather as halves of an all-reduce, Thakur, Rabenseifner, Gropp, "Optimization of
Collective Communication Operations in MPICH" (2005); copies as in torch's asynchronous tensor parallelism.
Limits: GPUs that reach each other's memory, on one machine; dense tensors.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lmsys.parallel.group import check_same_everywhere, gather_objects

QUEUES = SEND, ADD, RECEIVE = 0, 1, 2
_READY = len(QUEUES)  # the flag that says that a rank has closed its round
PIECE_MB = 128.0  # 10^6 bytes of tensors that travel as one piece: few pieces, as each costs the host some 0.1 ms
_ALIGNMENT = 256  # bytes, of chunks


class Range(NamedTuple):
    """Elements start to stop of a tensor, and where they begin in their chunk."""

    tensor: int
    start: int
    stop: int
    offset: int


Piece = tuple[tuple[Range, ...], ...]  # a chunk a rank
# To or from a peer: its flag here, ours there, and a chunk's parts: address in a box, tensor, byte therein, bytes.
Message = tuple[int, int, list[tuple[int, int, int, int]]]


class _Pass(NamedTuple):
    """What a piece does in a slot, worked out once."""

    sends: list[Message]
    arrived: list[int]  # flags here
    sums: list[tuple[Range, list[Tensor]]]  # of the own chunk, and what each peer sent for it
    means: list[Message]
    takes: list[Message]


class CopyEngine:
    """average(tensors) of all ranks, in rounds. They call it in one order, with tensors of the same shapes.

    piece_mb: of tensors that travel as one piece. slots: pieces under way. A rank shares about the product of both.
    fabric: makes what carries the bytes, of the size of a rank's memory; as Links, which None stands for.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        piece_mb: float = PIECE_MB,
        slots: int = 2,
        fabric: Callable[[int], Links] | None = None,
    ):
        if not piece_mb > 0 or slots < 1:
            raise ValueError(f"piece_mb is {piece_mb} and slots {slots}; they must be above 0, and 1 or more")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._slots, self._sequence, self._first_round = slots, 0, True
        self._chunk_bytes = _round_up(-(-int(piece_mb * 1e6) // self.world_size), _ALIGNMENT)
        self._peers = [(self.rank + step) % self.world_size for step in range(1, self.world_size)]
        self._box_bytes = slots * len(self._peers) * self._chunk_bytes
        self.memory_bytes = 2 * self._box_bytes + _round_up(4 * (_READY + 1) * self.world_size, _ALIGNMENT)
        self._fabric = Links(device, self.memory_bytes) if fabric is None else fabric(self.memory_bytes)
        self._addresses = self._fabric.addresses()
        self._plans: dict[tuple, tuple[Piece, ...]] = {}
        self._passes: dict[tuple, _Pass] = {}

    def average(self, tensors: Sequence[Tensor]) -> Any:
        """Start to average contiguous tensors of one dtype in place; until its result's wait() they are left alone."""
        dtype, *sizes = key = (tensors[0].dtype, *(tensor.numel() for tensor in tensors))
        if key not in self._plans:
            self._plans[key] = pieces(sizes, self.world_size, self._chunk_bytes // dtype.itemsize)
        addresses = [tensor.data_ptr() for tensor in tensors]
        self._fabric.start(*QUEUES)  # receive too, which would else be no part of a graph that is captured
        if self._sequence == 0 and not self._first_round:
            for peer in self._peers:  # it waits for numbers from 1 again
                ready = self._flag(self.rank, _READY, peer)
                self._fabric.wait(SEND, ready, 1)
                self._fabric.tell(SEND, ready, 0)
        for index, piece in enumerate(self._plans[key]):
            slot = self._sequence % self._slots
            if (key, index, slot) not in self._passes:
                self._passes[key, index, slot] = self._pass(piece, slot, dtype)
            self._sequence += 1
            self._enqueue(self._passes[key, index, slot], tensors, addresses)
        return self._fabric.end(*QUEUES)

    def close(self) -> Any:
        """End a round. What it returns is as average's; the next round begins after it."""
        fabric, last = self._fabric, self._sequence
        if last == 0:
            return fabric.end(RECEIVE)
        flags = [self._flag(self.rank, queue, peer) for queue in QUEUES for peer in self._peers]
        for flag in flags:  # set back only when all that peers write to it has come
            fabric.wait(RECEIVE, flag, last)
        for flag in flags:
            fabric.tell(RECEIVE, flag, 0)
        for peer in self._peers:
            fabric.tell(RECEIVE, self._flag(peer, _READY, self.rank), 1)
        self._sequence, self._first_round = 0, False
        return fabric.end(RECEIVE)

    def _enqueue(self, piece: _Pass, tensors: Sequence[Tensor], addresses: list[int]) -> None:
        fabric = self._fabric
        copy, tell, wait = fabric.copy, fabric.tell, fabric.wait
        done, emptied = self._sequence, self._sequence - self._slots

        def move(queue: int, messages: list[Message], when: int, incoming: bool = False) -> None:
            for theirs, ours, parts in messages:
                wait(queue, theirs, when)
                for place, tensor, start, size in parts:
                    here = addresses[tensor] + start
                    copy(queue, here if incoming else place, place if incoming else here, size)
                tell(queue, ours, done)

        move(SEND, piece.sends, emptied)
        fabric.order(SEND, ADD)
        for flag in piece.arrived:
            wait(ADD, flag, done)
        if piece.sums:
            own = [tensors[r.tensor].view(-1)[r.start : r.stop] for r, _ in piece.sums]
            by_peer = list(zip(*(sent for _, sent in piece.sums), strict=True))
            with fabric.on(ADD):
                if self.world_size == 2:
                    torch._foreach_lerp_(own, by_peer[0], 0.5)  # the mean of two in one pass
                else:
                    for sent in by_peer:
                        torch._foreach_add_(own, sent)
                    torch._foreach_div_(own, self.world_size)
        move(ADD, piece.means, emptied)
        fabric.order(ADD, RECEIVE)
        move(RECEIVE, piece.takes, done, incoming=True)

    def _pass(self, piece: Piece, slot: int, dtype: torch.dtype) -> _Pass:
        own, inbox, outbox, size = piece[self.rank], 0, 1, dtype.itemsize

        def sent(part: Range, peer: int) -> Tensor:
            start = self._place(inbox, slot, self.rank, peer) + part.offset * size
            return self._fabric.inside(start, part.stop - part.start, dtype)

        def message(queue: int, own_queue: int, peer: int, chunk: tuple[Range, ...], place: int) -> Message:
            """queue: the peer's, whose flag is waited for. own_queue: this rank's, which tells. place: of the chunk."""
            parts = [(place + r.offset * size, r.tensor, r.start * size, (r.stop - r.start) * size) for r in chunk]
            return self._flag(self.rank, queue, peer), self._flag(peer, own_queue, self.rank), parts

        def there(box: int, peer: int) -> int:
            return self._addresses[peer] + self._place(box, slot, peer, self.rank)

        here = self._addresses[self.rank]
        return _Pass(
            # A peer that has added a piece has emptied its slot of the inbox.
            sends=[message(ADD, SEND, peer, piece[peer], there(inbox, peer)) for peer in self._peers],
            arrived=[self._flag(self.rank, SEND, peer) for peer in self._peers],
            sums=[(r, [sent(r, peer) for peer in self._peers]) for r in own],
            means=[message(RECEIVE, ADD, peer, own, there(outbox, peer)) for peer in self._peers],
            takes=[
                message(ADD, RECEIVE, peer, piece[peer], here + self._place(outbox, slot, self.rank, peer))
                for peer in self._peers
            ],
        )

    def _place(self, box: int, slot: int, owner: int, writer: int) -> int:
        """Where in owner's memory the chunk begins that writer fills, bytes. box: 0, the inbox, or 1, the outbox."""
        position = (writer - owner - 1) % self.world_size
        return box * self._box_bytes + (slot * len(self._peers) + position) * self._chunk_bytes

    def _flag(self, owner: int, queue: int, writer: int) -> int:
        """Where in owner's memory writer tells how many pieces its queue has dealt with, or that it is ready."""
        return self._addresses[owner] + 2 * self._box_bytes + 4 * (queue * self.world_size + writer)


def pieces(sizes: Sequence[int], world_size: int, chunk: int) -> tuple[Piece, ...]:
    """Cut tensors of so many elements into pieces of even length with a chunk of at most `chunk` elements a rank.

    Chunks begin at multiples of 64 elements of the whole; the last ones may be short or empty.
    """
    total = sum(sizes)
    count = -(-total // (chunk * world_size))
    length = min(chunk, _round_up(-(-total // (count * world_size)), 64))
    bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))  # start and end of each tensor

    def ranges(first: int, last: int) -> tuple[Range, ...]:
        return tuple(
            Range(index, max(first, start) - start, min(last, end) - start, max(first, start) - first)
            for index, (start, end) in enumerate(bounds)
            if max(first, start) < min(last, end)
        )

    chunks = [ranges(first, min(total, first + length)) for first in range(0, total, length)]
    chunks += [()] * (-len(chunks) % world_size)
    return tuple(tuple(chunks[i : i + world_size]) for i in range(0, len(chunks), world_size))


def reachable() -> bool:
    """Whether the GPUs that this process sees are several and reach each other's memory."""
    gpus = range(torch.cuda.device_count())
    return len(gpus) > 1 and all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


def everywhere(device: torch.device) -> bool:
    """Whether all processes are on one machine whose GPUs reach each other's memory; the same answer in each."""
    if device.type != "cuda" or dist.get_backend() != "nccl":
        return False
    return set(gather_objects((_machine(), reachable()))) == {(_machine(), True)}


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


class _Ended(NamedTuple):
    events: list[torch.cuda.Event]

    def wait(self) -> None:
        for event in self.events:
            event.wait()


class Links:
    """What CopyEngine asks of GPUs of one machine: memory that ranks share, by address, and queues of work on it.

    Queues run beside each other, each in order. They are streams, on which the driver is called directly, as torch's
    copies of slices cost the host several times as much.
    """

    def __init__(self, device: torch.device, memory_bytes: int):
        if device.type != "cuda":
            raise ValueError(f"copy engines are a GPU's, and the parameters are on {device}; give transport='nccl'")
        check_same_everywhere(_machine(), "the machine", "give transport='nccl'")
        from torch.distributed import _symmetric_memory

        try:
            self._memory = _symmetric_memory.empty(memory_bytes, dtype=torch.uint8, device=device)
            self._memory.zero_()
            torch.cuda.synchronize(device)
            self._handle = _symmetric_memory.rendezvous(self._memory, dist.group.WORLD)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"these GPUs cannot share memory ({reason}); give transport='nccl'") from error
        # Above backward's priority: the additions are short, and everything behind them waits.
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in QUEUES]
        self._pointers = [ctypes.c_void_p(stream.cuda_stream) for stream in self._streams]
        self._driver = _driver()
        dist.barrier()  # nobody writes to memory that its owner has yet to clear

    def addresses(self) -> list[int]:
        """Of every rank's memory, for this rank."""
        size, ranks = self._memory.numel(), range(self._handle.world_size)
        return [self._handle.get_buffer(rank, (size,), torch.uint8).data_ptr() for rank in ranks]

    def inside(self, start: int, elements: int, dtype: torch.dtype) -> Tensor:
        """Elements of this rank's memory, from a byte on."""
        return self._memory[start : start + elements * dtype.itemsize].view(dtype)

    def start(self, *queues: int) -> None:
        """The queues go on after what the caller has enqueued so far."""
        here = torch.cuda.current_stream().record_event()
        for queue in queues:
            self._streams[queue].wait_event(here)

    def on(self, queue: int) -> torch.cuda.StreamContext:
        """A context in which torch's operations go to the queue."""
        return torch.cuda.stream(self._streams[queue])

    def copy(self, queue: int, destination: int, source: int, size: int) -> None:
        """Copy so many bytes from address to address, on no SM."""
        _check(self._driver.cuMemcpyDtoDAsync_v2(destination, source, size, self._pointers[queue]))

    def tell(self, queue: int, address: int, value: int) -> None:
        """After the queue's work so far, write value, 32 bits, to an address."""
        _check(self._driver.cuStreamWriteValue32_v2(self._pointers[queue], address, value, 0))

    def wait(self, queue: int, address: int, value: int) -> None:
        """The queue's later work waits until the 32 bits at an address of this rank are at least value."""
        _check(self._driver.cuStreamWaitValue32_v2(self._pointers[queue], address, value, 0))

    def order(self, first: int, then: int) -> None:
        """In a graph, what `then` does from here on comes after what `first` has; else the program's order does."""
        if torch.cuda.is_current_stream_capturing():
            self._streams[then].wait_stream(self._streams[first])

    def end(self, *queues: int) -> _Ended:
        """An object whose wait() makes the caller's later work wait for the queues' work so far."""
        return _Ended([self._streams[queue].record_event() for queue in queues])


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the driver refused an operation on a stream with error {status}")


@functools.cache
def _driver() -> ctypes.CDLL:
    """CUDA's driver. Flags 0 of a wait: until the value is reached; of a write: after the stream's writes before."""
    driver = ctypes.CDLL("libcuda.so.1")
    for function in (driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2):
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    driver.cuMemcpyDtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    return driver
