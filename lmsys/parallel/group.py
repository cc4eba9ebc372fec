"""Processes: the group that trains together, how it is started, and how it ends when one of its processes fails.

Each process has one device: GPU LOCAL_RANK with NCCL, or the CPU with Gloo. A process that fails tells its error once,
before it leaves the group: the others then lose a peer, a consequence that is not reported beside the cause. Nobody
waits for a peer that is gone: Gloo's sockets close, NCCL's communicators are aborted, and spawn() and torchrun end what
is left. Only a process that hangs without failing is found by timeout_s alone.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_S = 600.0  # of one collective operation; torch's own for NCCL
_GRACE_S = 1.0  # how long spawn collects other ranks' errors after the first, to report the one that came first
_EXIT_S = 20.0  # a process that failed is gone after this, whatever its threads and its GPU do
_LAST_LINES = 20  # of a failed run's output, in the error where nothing better is known
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# In the output of a run that failed: our line; where torchrun's own report begins, and its root cause.
_FAILED = re.compile(r"rank (\d+) of \d+ failed: .*")
_REPORT = re.compile(r"[WE]\d+ .*torch/distributed/elastic/.*(closing signal|failed \(exitcode)")
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank +: (\d+).*?exitcode +: -(\d+)", re.DOTALL)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Process:
    """One process of a group. backend is nccl, gloo, or empty where there is no group because there is one process."""

    rank: int
    local_rank: int  # on this machine
    world_size: int
    local_world_size: int
    device: torch.device
    backend: str


class RankError(RuntimeError):
    """A process failed: what happened, the rank that failed first, and the signal that ended it, or None."""

    def __init__(self, message: str, rank: int | None = None, signal: int | None = None):
        super().__init__(message)
        self.rank, self.signal = rank, signal


def current() -> tuple[int, int]:
    """Rank and number of processes; 0 and 1 where no group has been initialized."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def process_group(device: str = "auto", timeout_s: float = TIMEOUT_S) -> Iterator[Process]:
    """The group of a program under torchrun, on one node or several; for one process no group, and errors pass.

    If the body raises, the rank and the error are printed once for the whole group, and this process ends with exit
    code 1 (SystemExit), its communicators aborted, so that torchrun ends the others.

    Args:
        device: auto (GPUs if there are any), cpu or cuda.
        timeout_s: after which a collective operation that not every process has joined fails.
    Raises:
        ValueError: an environment or a device that cannot work.
    """
    process = _from_environment(device)
    if process.world_size == 1:
        yield process
        return
    limit = timedelta(seconds=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", process.rank, process.world_size, timeout=limit))
    try:
        _join(process, store, timeout_s)
        yield process
        dist.destroy_process_group()
    except BaseException as error:
        _leave_by_force(process, store, error)
        if isinstance(error, Exception):
            raise SystemExit(1) from None
        raise


def _from_environment(device: str) -> Process:
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return Process(0, 0, 1, 1, _device(device, 0, 1), "")
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    fix = "start the program with torchrun, which sets all of them, or unset them for one process"
    given = {name: os.environ[name] for name in needed if name in os.environ}
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"the environment has {', '.join(given)} but not {', '.join(missing)}; {fix}")
    try:
        rank, world_size, local_rank, local_world_size = (int(given[name]) for name in needed[:4])
    except ValueError:
        numbers = ", ".join(f"{name}={given[name]!r}" for name in needed[:4])
        raise ValueError(f"{numbers}: these must be integers; {fix}") from None
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise ValueError(
            f"RANK={rank} of WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} of "
            f"LOCAL_WORLD_SIZE={local_world_size} do not go together; {fix}"
        )
    try:
        where = _device(device, local_rank, local_world_size)
    except ValueError:
        if local_rank == 0:
            raise
        raise SystemExit(1) from None  # rank 0 of this machine says it
    backend = "" if world_size == 1 else _BACKENDS[where.type]
    return Process(rank, local_rank, world_size, local_world_size, where, backend)


def _device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device '{device}' cannot be given to {local_world_size} process(es), each of which takes the GPU of its "
            "local rank; give auto, cpu, cuda"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and count == 0:
        raise ValueError("device 'cuda' is not here: this machine has no CUDA GPU; give auto or cpu")
    if device == "cpu" or count == 0:
        return torch.device("cpu")
    if local_world_size > count:
        raise ValueError(
            f"{local_world_size} processes on this machine, which has {count} CUDA GPU(s): each process needs its own; "
            f"start at most {count}, or give device=cpu"
        )
    return torch.device("cuda", local_rank)


def _join(process: Process, store: dist.Store, timeout_s: float) -> None:
    """Initialize the default group; on a GPU its communicator too, so that a bad link fails here, not in a step."""
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    dist.init_process_group(
        process.backend,
        store=dist.PrefixStore("lmsys", store),
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=process.device if process.device.type == "cuda" else None,
    )


def _leave_by_force(process: Process, store: dist.Store, error: BaseException) -> None:
    """Print the error unless another rank has printed one, and make sure that this process ends."""
    if isinstance(error, Exception):
        try:
            first = store.add("lmsys/failed", 1) == 1
        except Exception:  # the store went with the process that held it
            first = True
        if first:
            clear = isinstance(error, (ValueError, OSError, FloatingPointError)) or _is_lost_peer(error)
            if os.environ.get("LMSYS_TRACEBACK") or not clear:
                traceback.print_exception(error)
            sys.stderr.write(_describe(process, error) + "\n")  # in one piece: others write to the same place
            sys.stderr.flush()
    last = threading.Timer(_EXIT_S, os._exit, (1,))
    last.daemon = True
    last.start()
    if process.backend == "nccl" and dist.is_initialized():
        dist.distributed_c10d._abort_process_group()  # a plain destroy waits for collectives that never end


def _describe(process: Process, error: BaseException) -> str:
    what = "lost another rank, which ended first" if _is_lost_peer(error) else "failed"
    return f"rank {process.rank} of {process.world_size} {what}: {type(error).__name__}: {error}"


def _is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process went away, rather than what went wrong."""
    if isinstance(error, dist.DistNetworkError):
        return True
    signs = ("gloo/transport", "ncclRemoteError", "remote process exited")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def context(device: torch.device, *modules: str) -> BaseContext:
    """What starts processes that compute on the device: on a CPU forks of a server, for a GPU new interpreters.

    The server is started once, and imports what the modules and torch's optimizers need, 3 s of work. CUDA does not
    survive a fork: neither the server nor its forks see a GPU.
    """
    if device.type == "cuda":
        return multiprocessing.get_context("spawn")
    forks = _Forks()
    forks.set_forkserver_preload([*modules, "torch._dynamo"])
    seen = os.environ.get(_VISIBLE)
    os.environ[_VISIBLE] = ""
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[_VISIBLE]
        if seen is not None:
            os.environ[_VISIBLE] = seen
    return forks


_VISIBLE = "CUDA_VISIBLE_DEVICES"


class _Fork(ForkServerProcess):
    """A fork of the server, with the environment that its parent has now."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ) | {_VISIBLE: ""}

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        gc.freeze()  # what the server imported, which the collector need not look through
        super().run()


class _Forks(ForkServerContext):
    Process = _Fork


def spawn(
    function: Callable[..., Any], world_size: int, *args: Any, device: str = "auto", timeout_s: float | None = None
) -> list[Any]:
    """Run function(process, *args) in world_size new processes of one group; return the results by rank.

    The function must be importable by name (not a lambda, not defined in a notebook); arguments and results must
    pickle. Processes on the CPU share its threads.

    Args:
        device: as process_group's.
        timeout_s: of the whole call and, if it is shorter than TIMEOUT_S, of a collective operation; None: no limit.
    Raises:
        ValueError: more processes than GPUs, or a function that another process cannot import.
        RankError: a process failed or was killed: the first that did. The others have been stopped.
        TimeoutError: timeout_s passed. All have been stopped.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size is {world_size!r}; it must be a positive integer")
    devices = [_device(device, rank, world_size) for rank in range(world_size)]
    try:
        payload = pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        fix = "give a function defined at the top of a module, and arguments that pickle"
        raise ValueError(f"spawn cannot send {function!r} and its arguments ({error}); {fix}") from None
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    listener = socket.create_server(("127.0.0.1", 0))  # given none, the store listens on every interface
    port = listener.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    collective_s = TIMEOUT_S if timeout_s is None else min(timeout_s, TIMEOUT_S)
    threads = max(1, torch.get_num_threads() // world_size)
    starts = context(devices[0], function.__module__)
    processes, connections = [], {}
    try:
        for rank, where in enumerate(devices):
            ours, theirs = starts.Pipe(duplex=False)
            process = Process(rank, rank, world_size, world_size, where, _BACKENDS[where.type])
            arguments = (payload, theirs, process, store.port, collective_s, threads)
            processes.append(starts.Process(target=_rank_main, args=arguments))
            processes[-1].start()
            theirs.close()
            connections[ours] = rank
        results = _collect(processes, connections, deadline, timeout_s)
        for process in processes:
            process.join(_EXIT_S)
        return results
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


class _Failure(NamedTuple):  # in place of a result; the one to report is the least
    lost_peer: bool
    at: float  # time.monotonic(), which all processes of a machine share
    rank: int
    text: str
    signal: int | None = None


def _collect(
    processes: Sequence[Any], connections: dict[Connection, int], deadline: float | None, timeout_s: float | None
) -> list[Any]:
    """The results by rank, or the first failure as a RankError."""
    world_size = len(processes)
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    while connections:
        left = None if deadline is None else deadline - time.monotonic()
        ready = wait(list(connections), left)
        if not ready:
            if failures:
                break
            running = ", ".join(map(str, connections.values()))
            raise TimeoutError(
                f"rank(s) {running} of {world_size} were still running after {timeout_s:g} s; all are stopped"
            )
        for connection in ready:
            rank = connections.pop(connection)
            try:
                message = pickle.loads(connection.recv_bytes())
            except EOFError:
                message = _ended(rank, world_size, processes[rank])
            if isinstance(message, _Failure):
                failures.append(message)
            else:
                results[rank] = message[0]
        if len(failures) == 1:
            grace = time.monotonic() + _GRACE_S
            deadline = grace if deadline is None else min(deadline, grace)
    if failures:
        first = min(failures)
        raise RankError(first.text, first.rank, first.signal)
    return [results[rank] for rank in range(world_size)]


def _ended(rank: int, world_size: int, process: Any) -> _Failure:
    at, name = time.monotonic(), f"rank {rank} of {world_size}"
    process.join()
    if process.exitcode < 0:
        return _Failure(False, at, rank, _killed(name, -process.exitcode), -process.exitcode)
    return _Failure(False, at, rank, f"{name} exited with code {process.exitcode} and no result")


def _killed(name: str, number: int) -> str:
    hint = "; was this machine out of memory?" if number == signal.SIGKILL else ""
    return f"{name} was killed by {signal.Signals(number).name}{hint}"


def _rank_main(
    payload: bytes, connection: Connection, process: Process, port: int, timeout_s: float, threads: int
) -> None:
    """A spawned process: join the group, run the function, send its result or its error."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function, args = pickle.loads(payload)
        if process.device.type == "cpu":
            torch.set_num_threads(threads)
        _join(process, dist.TCPStore("127.0.0.1", port, is_master=False), timeout_s)
        dist.barrier()  # a rank that is done at once must not leave while others still connect to it
        message = pickle.dumps((function(process, *args),))
        dist.destroy_process_group()
    except BaseException as error:
        at = time.monotonic()
        text = _describe(process, error) + "\n\n" + "".join(traceback.format_exception(error))
        connection.send_bytes(pickle.dumps(_Failure(_is_lost_peer(error), at, process.rank, text)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a plain exit may wait for a GPU whose collectives never end
    connection.send_bytes(message)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def launch(
    arguments: Sequence[str],
    processes: int,
    *,
    module: str = "lmsys",
    on_line: Callable[[str], None] = print,
    options: Sequence[str] = ("--standalone",),
    environment: dict[str, str] | None = None,
) -> None:
    """Run `python -m MODULE ARGUMENTS` in so many processes of this node under torchrun, passing on what they print.

    Args:
        on_line: gets each line of stdout and stderr, without its end, as it comes.
        options: torchrun's, which say where nodes meet; on several nodes call this on each.
        environment: variables beside those of this process.
    Raises:
        RankError: the run failed; says the first error, or the last lines where none was recognized.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}"]
    threads = max(1, torch.get_num_threads() // processes)  # torchrun's own choice is 1
    run = subprocess.Popen(
        [*torchrun, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={"OMP_NUM_THREADS": str(threads)} | os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    report: list[str] = []  # torchrun's own, of a failure: it becomes the error
    failure: re.Match[str] | None = None
    try:
        for line in run.stdout:
            line = line.rstrip("\n")
            failure = failure or _FAILED.search(line)
            if report or _REPORT.match(line):
                report.append(line)
                continue
            last.append(line)
            on_line(line)
        code = run.wait()
    finally:
        run.terminate()  # torchrun passes it on
        try:
            run.wait(30)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
        run.stdout.close()
    if code == 0:
        return
    if failure is not None:
        raise RankError(failure[0], int(failure[1]))
    if killed := _ROOT_CAUSE.search("\n".join(report)):
        rank, number = int(killed[1]), int(killed[2])
        name = f"rank {rank} of {processes}" if "--standalone" in options else f"rank {rank}"
        raise RankError(_killed(name, number), rank, number)
    raise RankError(f"torchrun ended with code {code}; the last lines:\n" + "\n".join(last))


def check_initialized(what: str) -> None:
    if not dist.is_initialized():
        raise ValueError(f"{what} needs a process group; start the program with torchrun and open process_group")


@torch.no_grad()
def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors, of the same shapes and dtypes in every process, with rank 0's."""
    if current()[1] == 1:
        return
    tensors = list(tensors)
    sent = [tensor.contiguous() for tensor in tensors]
    works = [dist.broadcast(one, src=0, async_op=True) for one in sent]
    for tensor, one, work in zip(tensors, sent, works, strict=True):
        work.wait()
        if one is not tensor:
            tensor.copy_(one)


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a floating-point tensor over the processes, a new tensor. Does not wait for a GPU."""
    mean = tensor.detach().clone()
    if current()[1] > 1:
        mean /= dist.get_world_size()
        dist.all_reduce(mean)
    return mean


def gather_objects(value: Result) -> list[Result]:
    """The values of all processes, by rank, in every process. They must pickle."""
    world_size = current()[1]
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def together(function: Callable[[], Result]) -> Result:
    """What the function returns here; a ValueError or OSError of any rank is raised on all. All processes call it."""
    outcome, error = None, None
    try:
        outcome = function()
    except (ValueError, OSError) as caught:
        error = caught
    for raised in filter(None, gather_objects(error)):
        raise raised
    return outcome


def by_rank(function: Callable[[], Result]) -> list[Result]:
    """What the function returns in each process, by rank, in every process. Raises as together() does."""
    return gather_objects(together(function))


def from_rank0(function: Callable[[], Result]) -> Result:
    """What the function returns, or the error that it raises, on rank 0: in every process, which wait for it."""
    return by_rank(function if current()[0] == 0 else lambda: None)[0]


def check_same_everywhere(description: str, what: str, fix: str = "start every process with the same settings") -> None:
    """Raise the same ValueError in every process unless all give the same description, one line an item."""
    digests = gather_objects(hashlib.sha256(description.encode()).hexdigest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not differing:
        return
    texts = gather_objects(description.splitlines())
    pairs = itertools.zip_longest(texts[0], texts[differing[0]], fillvalue="(nothing)")
    ours, theirs = next(((a, b) for a, b in pairs if a != b), ("", ""))
    raise ValueError(
        f"{what} differs between processes: rank(s) {', '.join(map(str, differing))} from rank 0; first where rank 0 "
        f"has '{ours}', rank {differing[0]} has '{theirs}'; {fix}"
    )
