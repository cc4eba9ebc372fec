"""Compiling ahead, in several processes, so that the measuring process finds compiled code on disk.

Compilers are single threads for the most part: on a host of many cores this takes most of the waiting out of a run.
Triton and inductor keep such a cache by default, FlashAttention-4 where FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 is
set. The processes are fresh interpreters: in one that multiprocessing spawns, inductor's cache keys are others than in
the measuring process.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def compile_points(
    compile_point: Callable[[Any, Any], None], points: Sequence[Any], parameters: Any, processes: int, limit_s: float
) -> None:
    """Run compile_point(point, parameters) for every point, in several processes, which end at limit_s at the latest.

    What fails here fails again when it is measured, and is a row there.

    Args:
        compile_point: a function of a module. points, parameters: what pickles.
    """
    processes = min(processes, os.cpu_count() or 1, len(points))
    if processes < 1:
        return
    code = "import pickle, sys; from lmsys.bench import ahead; ahead.compile_share(*pickle.load(sys.stdin.buffer))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    end = time.monotonic() + limit_s
    running = []
    for share in range(processes):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE)
        work = compile_point.__module__, compile_point.__name__, points[share::processes], parameters
        process.stdin.write(pickle.dumps(work))
        process.stdin.close()
        running.append(process)
    late = 0
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    if late:
        print(f"compile ahead: {late} of {processes} processes were not done after {limit_s:g} s and were ended")


def compile_share(module: str, name: str, points: Sequence[Any], parameters: Any) -> None:
    """One process's part of compile_points."""
    import torch
    import torch._inductor.config as inductor

    from lmsys.bench.measure import failure, release

    inductor.compile_threads = 1  # the processes are the parallelism
    compile_point = getattr(importlib.import_module(module), name)
    for point in points:
        try:
            compile_point(point, parameters)
        except Exception as error:
            print(f"compile ahead: {failure(error)['note']}", file=sys.stderr)
        release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
