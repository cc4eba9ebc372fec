"""Compiling ahead: what compiles for seconds is compiled once, in several processes, so that the measuring process finds it on disk.

Compilers are single threads for the most part: on a host of many cores this takes most of the waiting out of a run. Triton and
inductor keep such a cache by default, FlashAttention-4 where FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 is set. The processes are
fresh interpreters: in one that multiprocessing spawns, inductor's cache keys are others than in the measuring process.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


def compile_shares(compile_share: Callable[[Any, int, int], None], settings: Any, shares: int, limit_s: float) -> int:
    """Run compile_share(settings, share, shares) for every share in a process of its own; those that take longer than limit_s are ended.

    Args:
        compile_share: a function of a module. settings: what pickles.
    Returns:
        how many were ended.
    """
    names = compile_share.__module__, compile_share.__name__
    code = "import importlib, pickle, sys; module, name, *arguments = pickle.loads(bytes.fromhex(sys.argv[1])); "
    code += "getattr(importlib.import_module(module), name)(*arguments)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    end = time.monotonic() + limit_s
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, pickle.dumps((*names, settings, share, shares)).hex()], env=environment
        )
        for share in range(shares)
    ]
    late = 0
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    return late
