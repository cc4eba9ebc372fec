"""Work spread over processes, in order and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any

from lmsys.config import require


def resolve_workers(num_workers: int | None) -> int:
    """The number given, or that of the cores which this process may use. ValueError below 1."""
    if num_workers is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    require(num_workers >= 1, f"num_workers is {num_workers}; it must be at least 1")
    return num_workers


def map_in_order(function: Callable, state: Any, tasks: Iterable, workers: int) -> Iterator[Any]:
    """function(state, task) for each task, in order, in processes that get state once.

    At most two tasks a worker are under way or waiting to be taken, so memory does not grow with their number.
    function: of a module, without torch.
    """
    if workers == 1:
        yield from (function(state, task) for task in tasks)
        return
    # fork where it is at home: workers start in milliseconds, and neither a notebook nor a script without a __main__
    # guard is imported anew, as spawn would. It is safe beside CUDA and threads, as functions use no torch, no locks.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _set_worker_state, (state,))
    tasks = iter(tasks)
    try:
        with warnings.catch_warnings():  # Python 3.12 warns of any fork beside threads
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            waiting = deque(pool.submit(_call_in_worker, function, task) for task in islice(tasks, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_call_in_worker, function, task) for task in islice(tasks, 1))
    finally:
        pool.shutdown(cancel_futures=True)


_worker_state: Any = None


def _set_worker_state(state: Any) -> None:
    global _worker_state
    _worker_state = state


def _call_in_worker(function: Callable, task: Any) -> Any:
    return function(_worker_state, task)
