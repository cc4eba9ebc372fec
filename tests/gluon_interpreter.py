"""An interpreter of the part of Gluon that lmsys.attention's Hopper kernels use: it runs them on the CPU and looks for
races.

Triton's CPU interpreter has no Gluon. Here the Python functions behind @gluon.jit run as they are, with gluon.language,
mbarrier, tma and the wgmma functions replaced by the ones below, over torch tensors. A partition of gl.warp_specialize
is a thread; one runs at a time, and a random generator with a seed says which, so that a run can be repeated. All
programs of a grid run beside each other.

What is asynchronous on the GPU is as late or as early as it may be, by the seed:
- A TMA load fills its target with NaN when it is issued, and with data at any time before its barrier's phase can end.
- A wgmma reads shared memory when it is issued or in the warpgroup_mma_wait that completes it. Its result cannot be
  read before.
- A TMA store or reduce-add reads shared memory when it is issued or in the store_wait that completes it.
- Shared memory starts as NaN. When no partition can go on, Deadlock says where each one stands.
So a missing wait, a wrong phase or a buffer overwritten too early gives NaN, a wrong value or a Deadlock under some
seed.

Beside that, every access to shared memory is checked against those before it by vector clocks (as in FastTrack,
Flanagan and Freund 2009): two accesses to the same bytes, one of them a write, must be ordered by barriers and waits,
whatever their timing was in this run. What a partition wrote by ordinary stores and the asynchronous units then read
also needs a fence_async_shared of the writer in between; a buffer that a TMA store has left may be written after
store_wait and a barrier of the threads. Violations raise Hazard.

Limits. A group of warps runs in lockstep: barriers among its own threads, which Triton adds, are not checked. Integers
have no size. A division of a negative number rounds down, on the GPU towards zero. exp2 and the order of sums are
torch's. Of an access by a strided view the bytes from its first to its last are checked. There are no clusters, no
multicast, no fp8. Nothing is said about speed, registers, spills, bank conflicts, layouts that do not fit each other,
or global memory beyond out-of-bounds and twice-written elements.

Use: Interpreted(kernel, seed)[grid](*arguments, **constants), with CPU tensors and the TensorDescriptors that the GPU
    would get.
"""

from __future__ import annotations

import math
import operator
import random
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TORCH_DTYPES = {
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.float32: torch.float32,
    gl.int16: torch.int16,
    gl.int32: torch.int32,
}
GLUON_DTYPES = {ours: theirs for theirs, ours in TORCH_DTYPES.items()}


class Hazard(Exception):
    """The kernel does what is undefined, or depends on timing, on the GPU."""


class Deadlock(Hazard):
    """No partition can go on and no copy is under way."""


# --- Scheduler ------------------------------------------------------------------------------------


class _Abort(BaseException):
    """Ends the threads that are left when one has failed."""


Clock = dict[Any, int]  # how much of what each partition and each asynchronous unit has done is known to have happened


def _join(clock: Clock, other: Clock) -> None:
    for key, value in other.items():
        if clock.get(key, 0) < value:
            clock[key] = value


class Task:
    """A partition, or a program before it has any."""

    def __init__(self, name: str, program: Program, function: Callable, arguments: tuple, clock: Clock, threads: int):
        self.name, self.program, self.threads = name, program, threads
        self.clock = {**clock, self: 1}
        self.ready: Callable[[], bool] | None = None
        self.waits_for: Any = ""
        self.site = ""
        self.done = False
        self.wgmmas: list[Wgmma] = []  # in flight
        self.wgmmas_issued = 0
        self.stores: list[Store] = []  # in flight
        self.stores_issued = 0
        self.stores_waited = 0  # known to the thread that waited, and to the others from the next barrier on
        self.weight = 10 ** program.scheduler.random.uniform(-1.5, 0)
        self.baton = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self.thread.start()

    def _run(self, function, arguments):
        scheduler = self.program.scheduler
        self.baton.acquire()
        try:
            if not scheduler.aborting:
                function(*arguments)
                if self.wgmmas or self.stores:
                    raise Hazard(f"{self.name} ends with wgmmas or TMA stores in flight")
        except _Abort:
            pass
        except BaseException as error:  # handed to the thread that launched
            error.add_note(f"in {self.name}")
            scheduler.error = scheduler.error or error
        self.done = True
        scheduler.baton.release()

    def release(self) -> Clock:
        """What a partition that acquires this knows from now on."""
        known = dict(self.clock)
        self.clock[self] += 1
        return known

    def pause(self, ready: Callable[[], bool] | None = None, waits_for: Any = "") -> None:
        """Let others run, and go on once `ready`. waits_for: for the message, printed when nobody can go on."""
        scheduler = self.program.scheduler
        self.ready, self.waits_for, self.site = ready, waits_for, _site()
        scheduler.baton.release()
        self.baton.acquire()
        if scheduler.aborting:
            raise _Abort
        scheduler.now = self


class Scheduler:
    """Runs one task at a time, and lets the copies of the TMA unit land."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.baton = threading.Semaphore(0)
        self.tasks: list[Task] = []
        self.loads: list[Load] = []
        self.load_weight = 10 ** self.random.uniform(-1.5, 0.5)
        self.error: BaseException | None = None
        self.aborting = False
        self.now: Task | None = None

    def chance(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    def run(self) -> None:
        while self.tasks and self.error is None:
            able = [task for task in self.tasks if task.ready is None or task.ready()]
            weights = [task.weight for task in able]
            if self.loads:
                able.append(None)
                weights.append(self.load_weight)
            if not able:
                states = "\n".join(f"  {task.name} at {task.site}: waits for {task.waits_for}" for task in self.tasks)
                self.error = Deadlock(f"nobody can go on:\n{states}")
                break
            task = self.random.choices(able, weights)[0]
            if task is None:
                self.loads.pop(self.random.randrange(len(self.loads))).land()
                continue
            self.now = task
            task.baton.release()
            self.baton.acquire()
            if task.done:
                self.tasks.remove(task)
        self.aborting = True
        for task in self.tasks:
            if not task.done:
                task.baton.release()
                task.thread.join()
        if self.error is not None:
            raise self.error


class Program:
    """One program of the grid: a multiprocessor's shared memory and named barriers."""

    def __init__(self, index: int, grid: int, scheduler: Scheduler, written: dict[int, Tensor]):
        self.index, self.grid, self.scheduler = index, grid, scheduler
        self.named: dict[int, NamedBarrier] = {}
        self.allocations = 0
        self.written = written


_scheduler: Scheduler | None = None  # of the launch that is running


def _task() -> Task:
    return _scheduler.now


def _site(outermost: bool = False) -> str:
    """File and line of the kernel's code that called us, or of the kernel itself."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while outermost and frame.f_back.f_code.co_filename != __file__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


# --- Registers ------------------------------------------------------------------------------------


class Tile:
    """A tensor in registers."""

    def __init__(self, value: Tensor, layout: Any = None):
        self.value, self.layout = value, layout

    @property
    def dtype(self):
        return GLUON_DTYPES[self.value.dtype]

    @property
    def type(self):
        return types.SimpleNamespace(layout=self.layout)

    def __bool__(self):
        raise TypeError("a tensor as a condition")

    def __getitem__(self, index):
        return Tile(self.value[index], self.layout)

    def reshape(self, shape):
        return Tile(self.value.reshape(shape))

    def permute(self, order):
        return Tile(self.value.permute(order))

    def split(self):
        low, high = self.value.unbind(-1)
        return Tile(low), Tile(high)

    def to(self, dtype, bitcast=False):
        dtype = TORCH_DTYPES[dtype]
        return Tile(self.value.view(dtype) if bitcast else self.value.to(dtype), self.layout)


def _raw(x):
    if isinstance(x, Accumulator):
        raise Hazard(f"{_site()}: the result of a wgmma is read before warpgroup_mma_wait has returned it")
    return x.value if isinstance(x, Tile) else x


def _layout_of(*operands):
    return next((x.layout for x in operands if isinstance(x, Tile) and x.layout is not None), None)


def _binary(function, swapped=False):
    def method(self, other):
        left, right = (other, self) if swapped else (self, other)
        return Tile(function(_raw(left), _raw(right)), _layout_of(self, other))

    return method


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge"):
    setattr(Tile, f"__{_name}__", _binary(getattr(operator, _name)))
    if f"__r{_name}__" in dir(int):
        setattr(Tile, f"__r{_name}__", _binary(getattr(operator, _name), swapped=True))


class Pointer:
    """Into a tensor in global memory; offset: a number or a tensor of them, in elements."""

    def __init__(self, base: Tensor, offset=0):
        assert base.is_contiguous()
        self.base, self.offset = base, offset

    def __add__(self, offset):
        return Pointer(self.base, self.offset + _raw(offset))


# --- Barriers -------------------------------------------------------------------------------------


class Mbarrier:
    def __init__(self, name: str):
        self.name, self.count, self.phase = name, 0, 0
        self.clock: Clock = {}  # of the arrivals of this phase
        self.ended: Clock = {}  # of the phases that have ended

    def __str__(self):
        return (
            f"{self.name}, phase {self.phase}, {self.pending} of {self.count} arrivals and {self.bytes} bytes to come"
        )

    def init(self, count: int, task: Task):
        self.count = self.pending = count
        self.bytes = 0
        self.made = task, task.clock[task]

    def arrive(self, count: int, clock: Clock):
        _join(self.clock, clock)
        self.pending -= count
        if self.pending < 0:
            raise Hazard(f"{_site()}: more arrivals at {self.name} than its {self.count}")
        self._end()

    def received(self, load: Load):
        self.bytes -= load.bytes
        if self.bytes < 0:
            raise Hazard(f"{load.site}: {self.name} gets more bytes than it expects")
        _join(self.clock, {self: load.epoch})
        self._end()

    def _end(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            _join(self.ended, self.clock)
            self.clock = {}


class MbarrierArray:
    def __init__(self, name: str, count: int):
        self.barriers = [Mbarrier(f"mbarrier {name}[{i}]") for i in range(count)]

    def index(self, i: int) -> Mbarrier:
        assert 0 <= i < len(self.barriers)
        return self.barriers[i]


class _MbarrierModule:
    """triton.experimental.gluon.language.nvidia.hopper.mbarrier"""

    class MBarrierLayout:
        pass

    @staticmethod
    def init(barrier: Mbarrier, count: int):
        barrier.init(count, _task())

    @staticmethod
    def arrive(barrier: Mbarrier, *, count: int = 1):
        task = _task()
        barrier.arrive(count, task.release())
        if _scheduler.chance():
            task.pause()

    @staticmethod
    def expect(barrier: Mbarrier, nbytes: int):
        barrier.bytes += nbytes
        barrier.arrive(1, _task().release())

    @staticmethod
    def wait(barrier: Mbarrier, phase: int):
        """Until the phase of this parity has ended: the one before the current one, or the current one."""
        assert phase in (0, 1)
        task = _task()

        def ready():
            return barrier.phase & 1 != phase

        if not ready() or _scheduler.chance():
            task.pause(ready, barrier)
        _join(task.clock, barrier.ended)


class NamedBarrier:
    def __init__(self, number: int):
        self.number = number
        self.rounds = 0
        self.arrived: dict[Task, bool] = {}
        self.clock: Clock = {}
        self.ended: Clock = {}

    def arrive(self, task: Task, threads: int):
        if task in self.arrived:
            raise Hazard(f"{_site()}: {task.name} arrives twice in one round of named barrier {self.number}")
        known = task.release()
        known[task, "store"] = task.stores_waited
        _join(self.clock, known)
        self.arrived[task] = True
        total = sum(one.threads for one in self.arrived)
        if total > threads:
            raise Hazard(f"{_site()}: {total} threads at named barrier {self.number} of {threads}")
        if total == threads:
            self.rounds += 1
            _join(self.ended, self.clock)
            self.arrived, self.clock = {}, {}


def _named_barrier(kind: str, number: int, threads: int):
    task = _task()
    barrier = task.program.named.setdefault(number, NamedBarrier(number))
    before = barrier.rounds
    barrier.arrive(task, threads)
    if kind == "sync":
        task.clock[task, "store"] = task.stores_waited
        task.pause(lambda: barrier.rounds > before, f"the others at named barrier {number}")
        _join(task.clock, barrier.ended)
    elif _scheduler.chance():
        task.pause()


def _group_barrier():
    """All threads of a partition: what one of them has waited for, all know."""
    task = _task()
    task.clock[task, "store"] = task.stores_waited


# --- Shared memory --------------------------------------------------------------------------------


class Allocation:
    """Bytes of shared memory, and the accesses that a later one must be ordered after."""

    def __init__(self, name: str, nbytes: int):
        self.name = name
        self.bytes = torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN in all floating-point types
        self.accesses: list[tuple[int, int, bool, bool, Any, int, str]] = []

    def access(self, view: Tensor, write: bool, unit: Any, epoch: int, known: Clock) -> None:
        """Record the access and check it.

        unit: the task, or (task, "wgmma"), (task, "store") or the mbarrier of a TMA load.
        """
        asynchronous = not isinstance(unit, Task)
        start = view.storage_offset() * view.itemsize
        extent = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True)) + 1
        end = start + extent * view.itemsize
        kept = []
        for other in self.accesses:
            other_start, other_end, other_write, other_asynchronous, other_unit, other_epoch, other_site = other
            if other_end <= start or end <= other_start:
                kept.append(other)
                continue
            if write or other_write:
                text = (
                    f"{_site()}: {'write' if write else 'read'} of {self.name} bytes {start} to {end} "
                    f"by {_unit(unit)}, and at {other_site} {'write' if other_write else 'read'} by {_unit(other_unit)}"
                )
                if known.get(other_unit, 0) < other_epoch:
                    raise Hazard(f"{text}: not ordered")
                unfenced = known.get((other_unit, "fence"), 0) < other_epoch
                if asynchronous and other_write and not other_asynchronous and unfenced:
                    raise Hazard(f"{text}: no fence_async_shared by the writer")
            covered = start <= other_start and other_end <= end
            if not (covered and (write or (not other_write and other_unit == unit))):
                kept.append(other)
        kept.append((start, end, write, asynchronous, unit, epoch, _site()))
        self.accesses = kept


def _unit(unit: Any) -> str:
    if isinstance(unit, Task):
        return unit.name
    if isinstance(unit, Mbarrier):
        return f"the TMA load of {unit.name}"
    return f"the {unit[1]} of {unit[0].name}"


class Shared:
    """A view of shared memory."""

    def __init__(self, allocation: Allocation, view: Tensor):
        self.allocation, self.view = allocation, view

    @property
    def dtype(self):
        return GLUON_DTYPES[self.view.dtype]

    def index(self, i: int):
        assert 0 <= i < len(self.view), f"index {i} of {len(self.view)}"
        return Shared(self.allocation, self.view[i])

    def slice(self, start: int, length: int, dim: int = 0):
        return Shared(self.allocation, self.view.narrow(dim, start, length))

    def reshape(self, shape):
        return Shared(self.allocation, self.view.view(shape))

    def permute(self, order):
        return Shared(self.allocation, self.view.permute(order))

    def _reinterpret(self, dtype, shape, layout):
        """From the first byte of this view on; may reach past its end."""
        dtype = TORCH_DTYPES[dtype]
        assert self.view.is_contiguous()
        start = self.view.storage_offset() * self.view.itemsize
        nbytes = math.prod(shape) * dtype.itemsize
        assert start + nbytes <= len(self.allocation.bytes), "a view past the end of its allocation"
        return Shared(self.allocation, self.allocation.bytes[start : start + nbytes].view(dtype).view(shape))

    def load(self, layout):
        task = _task()
        self.allocation.access(self.view, False, task, task.clock[task], task.clock)
        return Tile(self.view.clone(), layout)

    def store(self, tile: Tile):
        task = _task()
        value = _raw(tile)
        assert (value.shape, value.dtype) == (self.view.shape, self.view.dtype)
        self.allocation.access(self.view, True, task, task.clock[task], task.clock)
        self.view.copy_(value)


def _fence_async_shared():
    task = _task()
    task.clock[task, "fence"] = task.clock[task]
    task.clock[task] += 1


# --- TMA ------------------------------------------------------------------------------------------


class Descriptor:
    """What a kernel sees of a TensorDescriptor."""

    def __init__(self, host: TensorDescriptor):
        self.tensor = host.base.as_strided(host.shape, host.strides, host.base.storage_offset())
        self.block_shape, self.layout = list(host.block_shape), host.layout
        self.dtype = GLUON_DTYPES[host.base.dtype]
        self.block_type = types.SimpleNamespace(nbytes=math.prod(self.block_shape) * host.base.itemsize)

    def inside(self, coordinates) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a block that lies in the tensor, as slices of the tensor and of the block."""
        assert len(coordinates) == len(self.block_shape)
        source, target = [], []
        for first, block, size in zip(coordinates, self.block_shape, self.tensor.shape, strict=True):
            low, high = max(first, 0), min(first + block, size)
            high = max(high, low)
            source.append(slice(low, high))
            target.append(slice(low - first, high - first))
        return tuple(source), tuple(target)


def _check_block(descriptor: Descriptor, shared: Shared):
    assert shared.view.is_contiguous() and shared.dtype == descriptor.dtype
    assert list(shared.view.shape) == descriptor.block_shape, "the buffer is not the descriptor's block"


class Load:
    def __init__(self, descriptor: Descriptor, coordinates: list[int], barrier: Mbarrier, target: Shared):
        task = _task()
        self.descriptor, self.coordinates, self.barrier, self.target = descriptor, list(coordinates), barrier, target
        self.bytes, self.epoch, self.site = descriptor.block_type.nbytes, barrier.phase + 1, _site()
        maker, epoch = barrier.made
        if task.clock.get((maker, "fence"), 0) < epoch:
            raise Hazard(
                f"{self.site}: no fence_async_shared between the making of {barrier.name} and its first TMA load"
            )
        target.allocation.access(target.view, True, barrier, self.epoch, task.clock)
        target.view.fill_(math.nan)

    def land(self):
        block = torch.zeros(self.descriptor.block_shape, dtype=self.target.view.dtype)
        source, inside = self.descriptor.inside(self.coordinates)
        block[inside] = self.descriptor.tensor[source]
        self.target.view.copy_(block)
        self.barrier.received(self)


class Store:
    """A TMA store, or a reduce-add."""

    def __init__(self, descriptor: Descriptor, coordinates: list[int], source: Shared, add: bool):
        self.descriptor, self.coordinates, self.source, self.add = descriptor, list(coordinates), source, add
        self.site, self.read = _site(), False

    def run(self):
        if self.read:
            return
        self.read = True
        target, inside = self.descriptor.inside(self.coordinates)
        if self.add:
            self.descriptor.tensor[target] += self.source.view[inside]
            return
        tensor = self.descriptor.tensor
        written = _task().program.written
        done = written.setdefault(tensor.data_ptr(), torch.zeros(tensor.shape, dtype=torch.bool))
        if done[target].any():
            raise Hazard(f"{self.site}: a tile at {self.coordinates} is written twice")
        done[target] = True
        tensor[target] = self.source.view[inside]


def _store(descriptor: Descriptor, coordinates: list[int], source: Shared, add: bool):
    task = _task()
    _check_block(descriptor, source)
    task.stores_issued += 1
    source.allocation.access(source.view, False, (task, "store"), task.stores_issued, task.clock)
    store = Store(descriptor, coordinates, source, add)
    task.stores.append(store)
    if _scheduler.chance():
        store.run()
    task.pause()


def reduce_add(descriptor: Descriptor, coordinates: list[int], source: Shared):
    """cp.reduce.async.bulk.tensor, for kernels that have a builtin of their own for it."""
    _store(descriptor, coordinates, source, True)


class _TmaModule:
    """triton.experimental.gluon.language.nvidia.hopper.tma"""

    @staticmethod
    def async_copy_global_to_shared(descriptor: Descriptor, coordinates: list[int], barrier: Mbarrier, target: Shared):
        _check_block(descriptor, target)
        _scheduler.loads.append(Load(descriptor, coordinates, barrier, target))
        if _scheduler.chance():
            _task().pause()

    @staticmethod
    def async_copy_shared_to_global(descriptor: Descriptor, coordinates: list[int], source: Shared):
        _store(descriptor, coordinates, source, False)

    @staticmethod
    def store_wait(pendings: int):
        """Until all but the newest `pendings` have read shared memory. Only the thread that issued them knows."""
        task = _task()
        while len(task.stores) > pendings:
            task.stores.pop(0).run()
        task.stores_waited = task.stores_issued - len(task.stores)


# --- wgmma ----------------------------------------------------------------------------------------


class Wgmma:
    def __init__(self, a: Tile | Shared, b: Shared, accumulator: Tile | Accumulator | None):
        self.a, self.b, self.accumulator = a, b, accumulator
        self.result: Tile | None = None
        self.complete = False

    def run(self):
        if self.result is not None:
            return
        a = self.a.view if isinstance(self.a, Shared) else self.a.value
        product = a.float() @ self.b.view.float()
        before, layout = self.accumulator, None
        if isinstance(before, Accumulator):
            before = before.wgmma.result
        if before is not None:
            layout = before.layout
            if self.adds:
                product += before.value
        self.result = Tile(product, layout)


class Accumulator:
    """The result of a wgmma in flight: another wgmma may add to it, nothing else may read it."""

    def __init__(self, wgmma: Wgmma, layout: Any):
        self.wgmma, self.layout = wgmma, layout

    @property
    def type(self):
        return types.SimpleNamespace(layout=self.layout)

    def __getattr__(self, name):
        return getattr(_raw(self), name)  # which raises

    def __mul__(self, other):
        return _raw(self)

    __add__ = __sub__ = __truediv__ = __getitem__ = __mul__


def _warpgroup_mma(a, b, accumulator, *, use_acc=True, is_async=False):
    task = _task()
    operands = [_raw(a) if isinstance(a, (Tile, Accumulator)) else a.view, b.view]
    shape = accumulator.value.shape if isinstance(accumulator, Tile) else None
    assert operands[0].dtype == operands[1].dtype and operands[0].itemsize == 2 and len(operands[0]) == 64
    assert operands[0].shape[1] == operands[1].shape[0]
    assert shape is None or shape == (operands[0].shape[0], operands[1].shape[1])
    task.wgmmas_issued += 1
    for operand in (a, b):
        if isinstance(operand, Shared):
            operand.allocation.access(operand.view, False, (task, "wgmma"), task.wgmmas_issued, task.clock)
    wgmma = Wgmma(a, b, accumulator)
    wgmma.adds = use_acc
    task.wgmmas.append(wgmma)
    if _scheduler.chance():
        for earlier in task.wgmmas:
            earlier.run()
    result = Accumulator(wgmma, accumulator.layout)
    if not is_async:
        return _warpgroup_mma_wait(0, deps=[result])
    return result


def _warpgroup_mma_wait(outstanding: int = 0, deps=None):
    task = _task()
    task.pause()
    while len(task.wgmmas) > outstanding:
        wgmma = task.wgmmas.pop(0)
        wgmma.run()
        wgmma.complete = True
    task.clock[task, "wgmma"] = task.wgmmas_issued - len(task.wgmmas)
    results = []
    for dep in deps:
        if isinstance(dep, Accumulator):
            if not dep.wgmma.complete:
                raise Hazard(f"{_site()}: warpgroup_mma_wait({outstanding}) returns a result that is still in flight")
            dep = dep.wgmma.result
        results.append(dep)
    return results[0] if len(results) == 1 else tuple(results)


# --- gluon.language -------------------------------------------------------------------------------


class _Language:
    """triton.experimental.gluon.language: what is not here, no kernel may use."""

    BlockedLayout, SliceLayout, DotOperandLayout = gl.BlockedLayout, gl.SliceLayout, gl.DotOperandLayout
    NVMMADistributedLayout, NVMMASharedLayout = gl.NVMMADistributedLayout, gl.NVMMASharedLayout
    SwizzledSharedLayout = gl.SwizzledSharedLayout
    float16, bfloat16, float32 = gl.float16, gl.bfloat16, gl.float32
    int16, int32, int64 = gl.int16, gl.int32, gl.int64

    static_range = staticmethod(range)

    @staticmethod
    def constexpr(value):
        return value

    @staticmethod
    def static_assert(condition):
        assert condition

    @staticmethod
    def program_id(axis):
        assert axis == 0
        return _task().program.index

    @staticmethod
    def num_programs(axis):
        assert axis == 0
        return _task().program.grid

    @staticmethod
    def cdiv(x, y):
        return -(-x // y)

    @staticmethod
    def arange(start, end, layout):
        return Tile(torch.arange(start, end, dtype=torch.int32), layout)

    @staticmethod
    def full(shape, value, dtype, layout):
        return Tile(torch.full(tuple(shape), value, dtype=TORCH_DTYPES[dtype]), layout)

    @staticmethod
    def zeros(shape, dtype, layout):
        return Tile(torch.zeros(tuple(shape), dtype=TORCH_DTYPES[dtype]), layout)

    @staticmethod
    def zeros_like(tile):
        return Tile(torch.zeros_like(_raw(tile)), tile.layout)

    @staticmethod
    def where(condition, x, y):
        return Tile(torch.where(_raw(condition), _raw(x), _raw(y)), _layout_of(x, y, condition))

    @staticmethod
    def exp2(x):
        return Tile(torch.exp2(_raw(x)), x.layout)

    @staticmethod
    def log2(x):
        return Tile(torch.log2(_raw(x)), x.layout)

    @staticmethod
    def maximum(x, y):
        return _extremum(torch.clamp_min, torch.maximum, max, x, y)

    @staticmethod
    def minimum(x, y):
        return _extremum(torch.clamp_max, torch.minimum, min, x, y)

    @staticmethod
    def max(x, axis):
        return Tile(_raw(x).amax(axis))

    @staticmethod
    def sum(x, axis):
        total = _raw(x).sum(axis, dtype=x.value.dtype)
        return Tile(total) if total.ndim else total.item()

    @staticmethod
    def convert_layout(x, layout):
        return Tile(_raw(x), layout)

    @staticmethod
    def join(low, high):
        return Tile(torch.stack((_raw(low), _raw(high)), -1))

    @staticmethod
    def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
        barrier = re.fullmatch(r"bar\.(sync|arrive) (\d+), (\d+); mov\.u32 \$0, 0;", asm)
        if barrier:
            return _named_barrier(barrier[1], int(barrier[2]), int(barrier[3]))
        if asm == "mov.b32 {$0, $1}, $2;":
            pairs = _raw(args[0]).contiguous().view(torch.int16).unflatten(-1, (-1, 2))
            return Tile(pairs[..., 0]), Tile(pairs[..., 1])
        packs = re.fullmatch(r"cvt\.rn\.(bf16|f16)x2\.f32 \$0, \$(\d), \$(\d);", asm)
        if packs is None:
            raise NotImplementedError(f"inline assembly {asm!r}")
        to = torch.bfloat16 if packs[1] == "bf16" else torch.float16
        high, low = (_raw(args[int(packs[i]) - 1]).to(to) for i in (2, 3))
        return Tile(torch.stack((low, high), -1).view(torch.int32)[..., 0])

    @staticmethod
    def allocate_shared_memory(dtype, shape, layout):
        program = _task().program
        name = f"{program.allocations} (made at {_site(outermost=True)})"
        program.allocations += 1
        if isinstance(layout, _MbarrierModule.MBarrierLayout):
            return MbarrierArray(name, shape[0])
        dtype = TORCH_DTYPES[dtype]
        allocation = Allocation(f"shared memory {name}", math.prod(shape) * dtype.itemsize)
        return Shared(allocation, allocation.bytes.view(dtype).view(tuple(shape)))

    @staticmethod
    def atomic_add(pointer, value, sem):
        flat = pointer.base.view(-1)
        before = int(flat[pointer.offset])
        flat[pointer.offset] = before + value
        _task().pause()
        return before

    @staticmethod
    def store(pointer, value, mask=None):
        flat = pointer.base.view(-1)
        value = _raw(value)
        offset = torch.as_tensor(pointer.offset)
        if mask is not None:
            offset, value = offset[_raw(mask)], value[_raw(mask)]
        assert ((offset >= 0) & (offset < len(flat))).all(), f"{_site()}: a store out of bounds"
        if flat.dtype.is_floating_point:
            written = _task().program.written
            done = written.setdefault(flat.data_ptr(), torch.zeros(len(flat), dtype=torch.bool))
            if done[offset].any():
                raise Hazard(f"{_site()}: elements are written twice")
            done[offset] = True
        flat[offset.long()] = value

    @staticmethod
    def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs):
        task = _task()
        assert len(worker_num_warps) == len(worker_num_regs) == len(functions_and_args) - 1
        warps = [task.threads // 32, *worker_num_warps]
        known = task.release()
        partitions = []
        for i, ((function, arguments), count) in enumerate(zip(functions_and_args, warps, strict=True)):
            name = f"program {task.program.index} partition {i} ({function.__name__})"
            partitions.append(Task(name, task.program, function, arguments, known, 32 * count))
        _scheduler.tasks += partitions
        task.pause(lambda: all(partition.done for partition in partitions), "its partitions")


def _extremum(with_number, of_tensors, of_numbers, x, y):
    x, y = (x, y) if isinstance(x, (Tile, Accumulator)) else (y, x)
    if not isinstance(x, (Tile, Accumulator)):
        return of_numbers(x, y)
    function = of_tensors if isinstance(y, (Tile, Accumulator)) else with_number
    return Tile(function(_raw(x), _raw(y)), _layout_of(x, y))


_LANGUAGE, _MBARRIER, _TMA = _Language(), _MbarrierModule(), _TmaModule()

# --- Launch ---------------------------------------------------------------------------------------


class Interpreted:
    """A @gluon.jit kernel that runs here: Interpreted(kernel, seed)[grid](*arguments, **constants).

    builtins: further functions of the kernel's own to replace, old -> new.
    """

    def __init__(self, kernel: GluonJITFunction, seed: int = 0, builtins: dict[Callable, Callable] | None = None):
        self.seed = seed
        self.replaced = {
            id(gl): _LANGUAGE,
            id(hopper.mbarrier): _MBARRIER,
            id(hopper.tma): _TMA,
            id(hopper.fence_async_shared): _fence_async_shared,
            id(hopper.warpgroup_mma): _warpgroup_mma,
            id(hopper.warpgroup_mma_wait): _warpgroup_mma_wait,
            id(gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier): _group_barrier,
        }
        self.replaced.update((id(old), new) for old, new in (builtins or {}).items())
        self.namespaces: dict[int, dict[str, Any]] = {}
        self.function = self._rebind(kernel)

    def _rebind(self, value: Any) -> Any:
        """A global of a kernel as the interpreter has it."""
        if id(value) in self.replaced:
            return self.replaced[id(value)]
        if isinstance(value, gl.constexpr):
            return value.value
        if not isinstance(value, GluonJITFunction):
            return value
        function = value.fn
        names = function.__globals__
        if id(names) not in self.namespaces:
            namespace = self.namespaces[id(names)] = {}
            namespace.update((name, self._rebind(each)) for name, each in names.items())
        rebound = types.FunctionType(function.__code__, self.namespaces[id(names)], function.__name__)
        rebound.__defaults__, rebound.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        return rebound

    def __getitem__(self, grid: tuple[int]) -> Callable:
        return lambda *arguments, **constants: self.launch(grid, arguments, constants)

    def launch(self, grid: tuple[int], arguments: tuple, constants: dict[str, Any]) -> None:
        global _scheduler
        (programs,) = grid
        warps = constants.pop("num_warps", 4)
        scheduler = _scheduler = Scheduler(self.seed)
        written: dict[int, Tensor] = {}
        arguments = tuple(_argument(each) for each in arguments)
        for index in range(programs):
            program = Program(index, programs, scheduler, written)
            scheduler.tasks.append(
                Task(f"program {index}", program, lambda: self.function(*arguments, **constants), (), {}, 32 * warps)
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiles are small
        try:
            scheduler.run()
        finally:
            torch.set_num_threads(threads)
            _scheduler = None


def _argument(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    return Pointer(value) if isinstance(value, Tensor) else value
