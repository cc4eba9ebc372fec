"""What lmsys.parallel.copy_engine asks of GPUs, by processes that map one file: queues are the program's own order, a wait polls."""

import contextlib
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lmsys.parallel.copy_engine import CopyEngine

_PATIENCE_S = 30.0


class SharedFabric:
    """A Fabric of processes on one machine. Each makes its own part of the file's memory; folder: one that all of them see."""

    def __init__(self, folder, memory_bytes, flags_at):
        self._rank = dist.get_rank()
        self._regions, path = [], Path(folder)
        for rank in range(dist.get_world_size()):
            name = path / f"rank-{rank}"
            if rank == self._rank:
                name.write_bytes(bytes(memory_bytes))
            dist.barrier()
            self._regions.append(torch.from_file(str(name), shared=True, size=memory_bytes, dtype=torch.uint8))
        self._flags = [region[flags_at:].view(torch.int32) for region in self._regions]
        self.delay = lambda queue: None  # called before each piece of a queue: how tests make ranks run apart

    def regions(self):
        return self._regions

    def start(self, *queues):
        pass

    def on(self, queue):
        self.delay(queue)
        return contextlib.nullcontext()

    def tell(self, queue, rank, flag, value):
        self._flags[rank][flag] = value

    def wait(self, queue, flag, value):
        end = time.monotonic() + _PATIENCE_S
        while self._flags[self._rank][flag] < value:
            if time.monotonic() > end:
                raise TimeoutError(f"rank {self._rank}: flag {flag} is not {value} yet")
            time.sleep(0)

    def end(self, *queues):
        return _Done()


class _Done:
    def wait(self):
        pass


def engine(folder, **options) -> CopyEngine:
    """A CopyEngine of the group's processes by a file in folder."""
    return CopyEngine(
        dist.group.WORLD, torch.device("cpu"), fabric=lambda *sizes: SharedFabric(folder, *sizes), **options
    )
