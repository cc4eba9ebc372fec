"""How results come back from groups of processes, and what a trained point is made of."""

import dataclasses
import functools
import gc
import time
import weakref

import numpy as np
import pytest
import torch

from lmsys.bench import replicas, timeline
from lmsys.bench.measure import quantiles
from lmsys.config import model_size
from lmsys.parallel import group
from lmsys.step import graphs

WORKLOAD = replicas.Workload(
    "tiny", model_size("tiny", vocab_size=64, context_length=16), "vectorized_torch", 2, "fp32", compiled=False
)


@dataclasses.dataclass(frozen=True)
class Deed:
    """A point that does what its name says."""

    name: str
    processes: int = 1


def act(process, deed, greeting):
    """What Deed points do in their process."""
    if deed.name == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    if deed.name == "hang":
        time.sleep(60)
    return {"status": "ok", "said": f"{greeting} from {process.world_size}"}


def test_a_failed_point_is_a_row_and_the_others_go_on():
    deeds = [Deed("work"), Deed("out of memory"), Deed("work"), Deed("hang")]
    got = list(replicas.stream(act, deeds, "hello", device="cpu", limit_s=2.0))
    assert [deed for deed, _ in got] == deeds
    results = [result for _, result in got]
    assert results[0] == results[2] == {"status": "ok", "said": "hello from 1"}
    assert results[1]["status"] == "oom" and "Tried to allocate 1 GiB" in results[1]["note"]
    assert results[3]["status"] == "error" and "a point may take 2 s" in results[3]["note"]


def test_results_come_while_the_group_runs_and_leaving_ends_it():
    deeds = [Deed("work"), Deed("hang")]
    stream = replicas.stream(act, deeds, "hello", device="cpu", limit_s=100.0)
    assert next(stream)[1]["status"] == "ok"  # the second is still hanging
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 10


FREED = {
    "flashddp": {"wrapper": "flashddp"},
    "fsdp": {"wrapper": "fsdp"},
    "zero2": {
        "wrapper": "naive",
        "sharded_optimizer": True,
        "optimizer_options": (("reduce_scatter_gradients", True),),
    },
}


def train_and_count(process):
    """How many parameters of each measured model are still there."""
    left = {}
    for name, fields in FREED.items():
        point = replicas.TrainPoint(WORKLOAD, gpus=2, processes=2, **fields)
        replica = replicas.Replica(process, point, replicas.Plan(1, 1, 1))
        there = [weakref.ref(parameter) for parameter in replica.trained.parameters()]
        replica.measure()
        del replica
        gc.collect()
        left[name] = sum(parameter() is not None for parameter in there)
    return left


def test_a_measured_model_is_freed():
    assert group.spawn(train_and_count, 2, device="cpu", timeout_s=120)[1] == dict.fromkeys(FREED, 0)


def test_process_counts():
    assert replicas.process_counts("cpu", None) == (1, 2)
    assert replicas.process_counts("cpu", [4, 1, 4]) == (1, 4)
    for wrong in ([0], [], [1.5]):
        with pytest.raises(ValueError, match="gpus"):
            replicas.process_counts("cpu", wrong)
    with pytest.raises(ValueError, match="give auto, cpu or cuda"):
        replicas.process_counts("cuda:1", None)


def test_one_gpu_leaves_several_processes_to_the_cpu(monkeypatch):
    for count, expected in ((0, ("full", "auto")), (1, ("cpu", "cpu")), (2, ("full", "auto"))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert replicas.several("full", "auto") == expected
        assert replicas.several("smoke", "cuda") == ("smoke", "cuda")


def test_points_share_groups_and_one_gpu_is_measured_once():
    points = replicas.points_of([WORKLOAD], (1, 2, 4), lambda workload: [{"wrapper": "naive"}])
    assert [(p.wrapper, p.gpus, p.processes) for p in points] == [("none", 1, 2), ("naive", 2, 2), ("naive", 4, 4)]
    alone = replicas.points_of([WORKLOAD], (1,), lambda workload: [{"wrapper": "naive"}])
    assert [(p.wrapper, p.gpus, p.processes) for p in alone] == [("none", 1, 1)]


def test_a_row_is_made_of_what_was_measured():
    point = replicas.TrainPoint(WORKLOAD, "naive", 2, 2)
    one = {"status": "ok", "times_ms": [10.0] * 3}
    result = {
        "status": "ok",
        "times_ms": [12.0, 16.0, 20.0],
        "quiet_ms": [15.0],
        "peak_bytes": 2.0**21,
        "losses": [3, 2],
    }
    row = replicas._row(point, result, one, torch.device("cpu"))
    assert row["step_ms"] == 16.0 and (row["step_ms"], row["p20_ms"], row["p80_ms"]) == quantiles([12.0, 16.0, 20.0])
    assert row["tokens_per_s"] == pytest.approx(2 * 2 * 16 / 16e-3)
    assert row["exposed_comm_ms"] == pytest.approx(1.0) and row["peak_mib"] == 2 and row["final_loss"] == 2
    assert row["scaling_efficiency"] == pytest.approx(10 / 16) and row["mfu"] is None
    sharded = dataclasses.replace(point, wrapper="fsdp")  # no_sync still gathers: less the step of one GPU
    assert replicas._row(sharded, result | {"quiet_ms": []}, one, torch.device("cpu"))["exposed_comm_ms"] == 6.0
    assert "step_ms" not in replicas._row(point, {"status": "oom", "note": "full"}, one, torch.device("cpu"))


def test_a_kernel_that_cannot_train_here_is_unsupported():
    cuda_only = dataclasses.replace(WORKLOAD, kernel="torch_sdpa_cudnn")
    ((_, row, result),) = replicas.rows(
        [replicas.TrainPoint(cuda_only, "none", 1, 1)], replicas.Plan(1, 1, 0), device="cpu", limit_s=10
    )
    assert row["status"] == "unsupported" and "torch_sdpa_cudnn" in row["note"] and result == {}


def test_a_graph_is_captured_on_gpus_and_of_replicas():
    for wrapper, device in (("none", "cpu"), ("none", "cuda")):
        point = replicas.TrainPoint(WORKLOAD, wrapper, 1, 1, captured=True)
        reason = replicas.unsupported(point, torch.device(device))
        assert (reason is None) == (device == "cuda")
    point = replicas.TrainPoint(WORKLOAD, "fsdp", 2, 2, captured=True)
    assert "captured on a GPU, of replicas; this is fsdp" in replicas.unsupported(point, torch.device("cuda"))


def test_a_captured_point_is_free_when_it_is_measured(monkeypatch):
    """Its passes hold it, it was frozen, and NCCL waits for what they captured."""
    made, captures = [], []

    class Known(replicas.Replica):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

        def step(self, *args, **options):
            captures.append(self._may_capture)
            return super().step(*args, **options)

    def capture(function, pool):
        return function(), lambda: None

    monkeypatch.setattr(replicas, "Replica", Known)
    monkeypatch.setattr(replicas.graphs, "on_own_stream", lambda device: None)
    monkeypatch.setattr(replicas.graphs, "GraphedPass", functools.partial(graphs.GraphedPass, capture=capture))
    point = replicas.TrainPoint(WORKLOAD, "none", 1, 1, captured=True)
    process = group.Process(0, 0, 1, 1, torch.device("cpu"), "")
    try:
        result = replicas.train(process, point, replicas.Plan(loss_steps=2, timed_steps=2, quiet_steps=0))
        gc.collect()
        assert result["status"] == "ok" and captures.index(True) == graphs.WARMUP
        assert made[0]() is None
    finally:
        gc.unfreeze()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_point_trains_as_the_others_and_frees_its_memory():
    plan = replicas.Plan(loss_steps=4, timed_steps=5, quiet_steps=2)
    points = [replicas.TrainPoint(WORKLOAD, "none", 1, 1, captured=captured) for captured in (False, True)]
    plain, captured = (
        result for _, result in replicas.stream(replicas.train, points, plan, device="cuda", limit_s=100)
    )
    assert plain["status"] == captured["status"] == "ok" and len(captured["times_ms"]) == 5
    assert captured["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert captured["peak_bytes"] < 2 * plain["peak_bytes"] and "backward_ms" not in captured


def test_pattern_tokens_can_be_learned():
    tokens = replicas.pattern_tokens(50, 20_000, seed=3)
    assert np.array_equal(tokens, replicas.pattern_tokens(50, 20_000, seed=3)) and tokens.max() < 50
    counts = np.bincount(tokens, minlength=50)
    assert len(tokens) == 20_000 and counts[:5].mean() > 1.5 * counts[-5:].mean()
    pairs = np.zeros((50, 50))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    assert 0.7 < (pairs.max(1) / pairs.sum(1)).mean() < 0.85  # each token's follower


def test_live_bytes_counts_storages_once():
    before = replicas.live_bytes(torch.device("cpu"))
    kept = torch.zeros(1000)
    view = kept[10:]
    assert replicas.live_bytes(torch.device("cpu")) - before == 4000
    del kept, view
    assert replicas.live_bytes(torch.device("cpu")) == before


def test_live_bytes_leaves_out_tensors_without_memory(monkeypatch):
    """As a compiler's tracing leaves behind: their storage has no address."""
    before = replicas.live_bytes(torch.device("cpu"))
    traced, storage_of = torch.zeros(1000), torch.Tensor.untyped_storage

    class WithoutMemory:
        def nbytes(self):
            return 4000

        def data_ptr(self):
            raise RuntimeError("Attempted to access the data pointer on an invalid python storage.")

    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda t: WithoutMemory() if t is traced else storage_of(t))
    assert replicas.live_bytes(torch.device("cpu")) == before


def test_overlap_counts_each_moment_once():
    rows = [
        {"lane": "compute", "start_ms": 0.0, "duration_ms": 10.0},
        {"lane": "communication", "start_ms": 8.0, "duration_ms": 4.0},
        {"lane": "communication", "start_ms": 9.0, "duration_ms": 2.0},  # within the other
        {"lane": "compute", "start_ms": 11.0, "duration_ms": 10.0},
        {"lane": "phase", "start_ms": 0.0, "duration_ms": 30.0},
    ]
    assert timeline.overlap(rows) == {"communication_ms": 4.0, "hidden_ms": 3.0}
    assert timeline.union([(3, 4), (0, 1), (1.5, 2)], gap=0.5) == [(0, 2), (3, 4)]


class Event:
    """As the profiler gives them; times in microseconds."""

    def __init__(self, name, start, end, gpu=True, annotation=False):
        types = torch.autograd.DeviceType
        self.name, self.device_type = name, types.CUDA if gpu else types.CPU
        self.is_user_annotation = annotation
        self.time_range = type("Range", (), {"start": start, "end": end})


def test_a_gpus_trace_tells_nccl_from_the_rest():
    events = [
        Event("lmsys.forward", 1000, 3000, annotation=True),
        Event("lmsys.forward", 0, 500, gpu=False, annotation=True),
        Event("gemm", 1000, 2990),
        Event("gemm", 3100, 6000),
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 5000, 8000),
        Event("nccl:all_reduce", 5000, 8000, annotation=True),
        Event("lmsys.optimizer", 8000, 9000, annotation=True),
        Event("adam", 8000, 9000),
        Event("aten::mm", 0, 9000, gpu=False),
    ]
    rows = timeline._rows(timeline._intervals(events, torch.device("cuda")))
    found = {(row["lane"], row["name"], row["start_ms"], row["duration_ms"]) for row in rows}
    assert ("phase", "backward", 2.0, 5.0) in found and ("communication", "NCCL", 4.0, 3.0) in found
    assert timeline.overlap(rows) == {"communication_ms": 3.0, "hidden_ms": pytest.approx(1.0)}
    assert sum(row["duration_ms"] for row in rows if row["lane"] == "compute") == pytest.approx(1.99 + 2.9 + 1.0)


def test_the_stamp_says_what_mfu_is_against(monkeypatch):
    plan = replicas.Plan(1, 1, 0)
    assert "not known" in replicas.method(plan, torch.device("cpu"), "bf16")["mfu"]
    monkeypatch.setattr(replicas, "device_name", lambda device: "NVIDIA H200")
    assert replicas.method(plan, torch.device("cuda"), "bf16")["mfu"] == "against 989.5 TFLOP/s a GPU"
    assert replicas.method(plan, torch.device("cuda"), "fp32")["mfu"] == "against 494.7 TFLOP/s a GPU"
