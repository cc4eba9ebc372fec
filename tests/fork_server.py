"""Processes that start at once: in the tests, what asks multiprocessing for the start method "spawn" gets forks of a server.

A new interpreter needs 2 s of a core to import torch and 2 more for torch.compile; the server imports both once for each worker of
pytest. As after a real spawn, a process has no thread, memory or file of its parent, only the parent's environment and what is
pickled for it. It differs in that all processes hash strings alike. New interpreters are left to test_parallel_group, which tests
the start itself, to whatever is started by torchrun, and to machines with a GPU, as CUDA does not survive a fork.
"""

import gc
import multiprocessing
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess

PRELOADED = ["torch._inductor.compile_fx", "torch.distributed.fsdp", "lmsys.bench.replicas", "lmsys.pipeline"]
new_context = multiprocessing.get_context  # the true one


class Process(ForkServerProcess):
    """A fork of the server, with the environment of its parent as it is at the start."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.environment = dict(os.environ)

    def run(self):
        os.environ.clear()
        os.environ.update(self.environment)
        gc.freeze()  # what the server imported, so that collections are as short as after an import or two
        super().run()


class Context(ForkServerContext):
    Process = Process


def get_context(method=None):
    """multiprocessing.get_context, in whose place it is."""
    import torch  # late: pytest's first process never needs it

    if method != "spawn" or torch.cuda.is_available():
        return new_context(method)
    context = Context()
    context.set_forkserver_preload(PRELOADED)
    return context
