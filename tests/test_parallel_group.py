"""Process groups: what an environment means, what spawn and launch return, and that the first error ends all, soon."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import TIME_LIMIT_S

from lmsys.parallel import group
from lmsys.parallel.group import Process, RankError, check_same_everywhere, launch, spawn

SOON_S = 30.0  # an error ends all within this, starting the interpreters included; the limit is a minute
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.fixture
def new_interpreters(monkeypatch):
    """spawn() starts what it starts where processes use a GPU."""
    monkeypatch.setattr(group, "context", lambda *_: multiprocessing.get_context("spawn"))


@pytest.fixture
def environment(monkeypatch):
    """Sets torchrun's variables to those given, and removes the others."""

    def set_to(**values):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


# --- What an environment means --------------------------------------------------------------------


def test_one_process_has_no_group(environment):
    environment()
    with group.process_group(device="cpu") as process:
        assert process == Process(0, 0, 1, 1, torch.device("cpu"), "")
        assert group.current() == (0, 1) and not dist.is_initialized()
    environment(**TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    with group.process_group(device="cpu") as process:
        assert process.world_size == 1 and not dist.is_initialized()


def test_without_a_group_errors_pass_through(environment):
    environment()
    with pytest.raises(KeyError, match="mine"), group.process_group(device="cpu"):
        raise KeyError("mine")


def test_a_rank_takes_the_gpu_of_its_local_rank(environment, monkeypatch):
    environment(**TORCHRUN)
    gpus(monkeypatch, 2)
    assert group._from_environment("auto") == Process(1, 1, 4, 2, torch.device("cuda", 1), "nccl")
    assert group._from_environment("cpu") == Process(1, 1, 4, 2, torch.device("cpu"), "gloo")
    gpus(monkeypatch, 0)
    assert group._from_environment("auto").backend == "gloo"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start .*torchrun"),
        ({"RANK": "0"}, "has RANK but not WORLD_SIZE"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one', WORLD_SIZE='4'.* must be integers"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 of WORLD_SIZE=4 .* do not go together"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 do not go together"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_work_is_named(environment, values, message):
    environment(**values)
    with pytest.raises(ValueError, match=message) as error, group.process_group(device="cpu"):
        pass
    assert "\n" not in str(error.value)


def test_devices_that_cannot_work_are_named(environment, monkeypatch):
    environment(**TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"})
    gpus(monkeypatch, 0)
    with pytest.raises(ValueError, match="this machine has no CUDA GPU"):
        group._from_environment("cuda")
    with pytest.raises(ValueError, match="device 'cuda:1' cannot be given to 2 process.*auto, cpu, cuda"):
        group._from_environment("cuda:1")
    gpus(monkeypatch, 1)
    with pytest.raises(ValueError, match=r"2 processes on this machine, which has 1 CUDA GPU\(s\).*at most 1"):
        group._from_environment("auto")
    with pytest.raises(ValueError, match="3 processes on this machine"):
        spawn(sys.exit, 3)
    monkeypatch.setenv("LOCAL_RANK", "1")  # says nothing: local rank 0 has said it
    with pytest.raises(SystemExit):
        group._from_environment("auto")


# --- Spawned processes ----------------------------------------------------------------------------


def collectives(process: Process, offset: int) -> dict:
    """What the small collectives return in a process."""
    transposed = torch.full((2, 3), float(process.rank + offset)).t()
    counts = torch.full((2,), process.rank + offset)
    group.broadcast_from_rank0([transposed, counts])
    mean = group.mean_over_ranks(torch.tensor(float(process.rank)))
    check_same_everywhere("a\nb", "the settings")
    messages = []
    for description in (f"a\nb{process.rank}", "a\nb" + "\nc" * process.rank):
        with pytest.raises(ValueError) as error:
            check_same_everywhere(description, "the settings")
        messages.append(str(error.value))
    return {
        "process": process,
        "current": group.current(),
        "broadcast": (transposed, counts),
        "mean": mean.item(),
        "messages": messages,
        "large": torch.zeros(1_000_000) + process.rank,  # more than a pipe holds
    }


def test_spawn_returns_results_by_rank(new_interpreters):
    results = spawn(collectives, 3, 5, device="cpu", timeout_s=TIME_LIMIT_S)
    for rank, found in enumerate(results):
        assert found["process"] == Process(rank, rank, 3, 3, torch.device("cpu"), "gloo")
        assert found["current"] == (rank, 3)
        assert torch.equal(found["broadcast"][0], torch.full((3, 2), 5.0))
        assert torch.equal(found["broadcast"][1], torch.full((2,), 5))
        assert found["mean"] == 1.0
        assert found["large"].unique().item() == rank
        assert found["messages"] == [
            "the settings differs between processes: rank(s) 1, 2 from rank 0; first where rank 0 has "
            f"{first}, rank 1 has {other}; start every process with the same settings"
            for first, other in (("'b0'", "'b1'"), ("'(nothing)'", "'c'"))
        ]
    assert not dist.is_initialized()


def of_its_own(process: Process) -> tuple[str | None, str | None, bool, int]:
    """What a process has of its parent's environment, whether it is in a group, and which process started it."""
    return os.environ.get("LMSYS_TEST"), os.environ.get("CUDA_VISIBLE_DEVICES"), dist.is_initialized(), os.getppid()


def test_processes_on_a_cpu_are_forks_of_one_server(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    servers = set()
    for value in ("first", "second"):
        monkeypatch.setenv("LMSYS_TEST", value)
        for given, gpus_seen, joined, server in spawn(of_its_own, 2, device="cpu", timeout_s=TIME_LIMIT_S):
            assert (given, gpus_seen, joined) == (value, "", True)
            servers.add(server)
    assert len(servers) == 1 and os.getpid() not in servers
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert group.context(torch.device("cuda", 0)).get_start_method() == "spawn"


def fail(process: Process, how: str) -> None:
    """The last rank fails, while another one waits for it in a collective."""
    if process.rank == process.world_size - 1:
        if how == "raises":
            raise KeyError("a mistake of rank 1")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(3)
        time.sleep(1000)
    dist.all_reduce(torch.ones(2))


@pytest.mark.parametrize(
    ("how", "world_size", "message", "number"),
    [
        ("raises", 2, r"^rank 1 of 2 failed: KeyError: 'a mistake of rank 1'\n\nTraceback(?s:.*) in fail\n", None),
        ("is killed", 2, r"^rank 1 of 2 was killed by SIGKILL; was this machine out of memory\?$", signal.SIGKILL),
        ("exits", 1, r"^rank 0 of 1 exited with code 3 and no result$", None),
    ],
)
def test_the_first_error_ends_all(how, world_size, message, number, request):
    if number:
        request.getfixturevalue(
            "new_interpreters"
        )  # a fork's server tells of a signal, an interpreter's own end does so here
    started = time.monotonic()
    with pytest.raises(RankError, match=message) as error:
        spawn(fail, world_size, how, device="cpu", timeout_s=TIME_LIMIT_S)
    assert (error.value.rank, error.value.signal) == (world_size - 1, number)
    assert time.monotonic() - started < SOON_S


def test_the_time_limit_ends_all():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank\(s\) 0 of 1 were still running after 1 s; all are stopped"):
        spawn(fail, 1, "hangs", device="cpu", timeout_s=1)
    assert time.monotonic() - started < SOON_S


def test_what_cannot_be_sent_is_named():
    with pytest.raises(ValueError, match="spawn cannot send .*lambda.*defined at the top of a module"):
        spawn(lambda process: None, 2, device="cpu")
    for world_size in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"world_size is {world_size}; it must be a positive integer"):
            spawn(fail, world_size, "raises", device="cpu")


# --- torchrun -------------------------------------------------------------------------------------


def main(how: str) -> None:
    """What launch runs below: python -m test_parallel_group HOW."""
    with group.process_group(device="cpu", timeout_s=60) as process:
        sys.stdout.write(f"rank {process.rank} on local rank {process.local_rank} of {process.local_world_size}\n")
        if process.rank == 1 and how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.ones(1)
        dist.all_reduce(total)
        sys.stdout.write(f"the sum is {total.item():g}\n")


def launched(how: str, processes: int, **options) -> list[str]:
    """The lines that a run prints; if it fails, its error is the last."""
    lines = []
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    try:
        launch(
            [how],
            processes,
            module="test_parallel_group",
            on_line=lines.append,
            environment={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            **options,
        )
    except RankError as error:
        lines.append(error)
    return lines


def test_two_torchrun_agents_on_one_machine_make_one_group():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free.getsockname()[1]}"]
    found = {}

    def node(rank):
        found[rank] = launched("works", 1 + rank, options=[*meet, f"--node_rank={rank}"])

    agents = [threading.Thread(target=node, args=(rank,)) for rank in range(2)]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join(TIME_LIMIT_S)
    lines = found[0] + found[1]
    assert sum(line == "the sum is 3" for line in lines) == 3, lines
    places = {line for line in lines if line.startswith("rank ")}
    assert {line.partition(" on ")[0] for line in places} == {"rank 0", "rank 1", "rank 2"}
    assert sorted(line.partition(" on ")[2] for line in places) == [
        "local rank 0 of 1",
        "local rank 0 of 2",
        "local rank 1 of 2",
    ]


def test_a_killed_run_ends_in_one_error():
    """One that raises is in test_train_parallel: out of memory."""
    started = time.monotonic()
    *lines, error = launched("is killed", 2)
    assert time.monotonic() - started < SOON_S
    assert str(error) == "rank 1 of 2 was killed by SIGKILL; was this machine out of memory?"
    assert (error.rank, error.signal) == (1, signal.SIGKILL)
    (said,) = [line for line in lines if " failed: " in line or " lost another rank" in line]
    assert said.startswith("rank 0 of 2 lost another rank, which ended first")
    assert not any("Traceback" in line or "elastic" in line for line in lines)


def test_a_run_that_cannot_start_shows_its_last_lines():
    with pytest.raises(
        RankError, match=r"torchrun ended with code 1; the last lines:(?s:.*)No module named no_such_module"
    ):
        launch([], 1, module="no_such_module", on_line=lambda line: None)


if __name__ == "__main__":
    main(sys.argv[1])
