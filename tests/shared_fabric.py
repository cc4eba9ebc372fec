"""What lmsys.parallel.copy_engine asks of GPUs, by processes that map one file each: queues in order, a wait polls."""

import contextlib
import ctypes
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lmsys.parallel.copy_engine import CopyEngine

_PATIENCE_S = 30.0


class SharedFabric:
    """A Fabric of processes on one machine. Each makes the file of its own memory; folder: one that all of them see."""

    def __init__(self, folder, memory_bytes):
        self._own, self._regions = dist.get_rank(), []
        for rank in range(dist.get_world_size()):
            name = Path(folder) / f"rank-{rank}"
            if rank == self._own:
                name.write_bytes(bytes(memory_bytes))
            dist.barrier()
            self._regions.append(torch.from_file(str(name), shared=True, size=memory_bytes, dtype=torch.uint8))
        self.delay = lambda: None  # called before each wait: how tests make ranks run apart
        self.started, self.unjoined = set(), set()  # queues: in this round, and with work that no end() has covered

    def addresses(self):
        return [region.data_ptr() for region in self._regions]

    def inside(self, start, elements, dtype):
        return self._regions[self._own][start : start + elements * dtype.itemsize].view(dtype)

    def start(self, *queues):
        self.started |= set(queues)

    def on(self, queue):
        self._uses(queue)
        return contextlib.nullcontext()

    def order(self, first, then):
        pass

    def _uses(self, queue):
        """A CUDA graph has only what was forked from the stream that is captured, and that must join it again."""
        assert queue in self.started, f"queue {queue} goes on without the caller"
        self.unjoined.add(queue)

    def copy(self, queue, destination, source, size):
        self._uses(queue)
        ctypes.memmove(destination, source, size)

    def tell(self, queue, address, value):
        self._uses(queue)
        ctypes.c_int32.from_address(address).value = value

    def wait(self, queue, address, value):
        self._uses(queue)
        self.delay()
        flag, end = ctypes.c_int32.from_address(address), time.monotonic() + _PATIENCE_S
        while flag.value < value:
            if time.monotonic() > end:
                raise TimeoutError(f"rank {self._own}, queue {queue}: still {flag.value}, not {value}")
            time.sleep(0)

    def end(self, *queues):
        self.unjoined -= set(queues)
        return _Done()


class _Done:
    def wait(self):
        pass


def engine(folder, **options) -> CopyEngine:
    """A CopyEngine of the group's processes by files in folder."""
    make = lambda memory_bytes: SharedFabric(folder, memory_bytes)  # noqa: E731
    return CopyEngine(torch.device("cpu"), fabric=make, **options)
