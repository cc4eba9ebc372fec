"""For all tests: results and runs go to a temporary folder, wandb stays offline, Triton runs in its interpreter."""

import gc
import os
import signal
import threading
from multiprocessing import forkserver

import pytest

# What the server of a worker of pytest imports beside what its first test asks for, and so no process of a later test.
PRELOADED = ("torch._inductor.compile_fx", "torch.distributed.fsdp", "lmsys.bench.steps", "lmsys.pipeline")

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, as lmsys.__main__ does
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core: more threads would wait for each other
_set_preload = forkserver.set_forkserver_preload
forkserver.set_forkserver_preload = lambda modules: _set_preload([*modules, *PRELOADED])
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so would what it starts


@pytest.fixture(autouse=True)
def output_root(tmp_path, monkeypatch):
    """artifacts/, runs/ and book/ of a test lie in its own temporary folder."""
    root = tmp_path / "output"
    monkeypatch.setenv("LMSYS_OUTPUT", str(root))
    monkeypatch.delenv("LMSYS_MACHINE", raising=False)
    monkeypatch.delenv("LMSYS_SCALE", raising=False)
    return root


@pytest.fixture(autouse=True, scope="module")
def little_to_collect():
    """Measurements collect garbage before each point, which takes long among all that is imported: here they do not."""
    gc.collect()
    gc.freeze()
