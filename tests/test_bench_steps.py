"""The step that benchmarks measure is the trainer's; how results come back from groups of processes."""

import functools
import gc
import time
import weakref

import numpy as np
import pytest
import torch

from lmsys.bench import peers, processes, steps, traces
from lmsys.bench.measure import quantiles
from lmsys.config import model_size
from lmsys.parallel import group
from lmsys.step import graphs
from lmsys.train import checkpoint, train

MODEL = model_size("tiny", vocab_size=64, context_length=16)
CPU = steps.alone(torch.device("cpu"))
PLAN = steps.Plan(loss_steps=3, timed_steps=3, quiet_steps=2)
TOKENS = steps.pattern_tokens(64, 4096, 0)
WRAPPED = {
    "flashddp": {"ddp_wrapper": "flashddp"},
    "zero2": {"ddp_wrapper": "naive", "sharded_optimizer": True, "reduce_scatter_gradients": True},
    "fsdp": {"ddp_wrapper": "fsdp"},
    "torch_fsdp2": {"ddp_wrapper": "torch_fsdp2"},
}


def config(**train):
    return steps.step_config(MODEL, batch_size=2, **train)


# --- One training step ----------------------------------------------------------------------------


def trained_both_ways(process, folder, settings):
    """Whether a benchmark's steps and `lmsys train`'s leave the same losses, weights and moments, bit for bit."""
    ours = config(steps=4, device="cpu", eval_interval=0, log_interval=1, **settings)
    subject, losses = steps.Subject(process, ours, TOKENS), []
    measured = [subject.step().item() for _ in range(4)]
    weights, optimizer = subject.engine.strategy.whole_state()
    torch.set_num_threads(1)
    train(
        ours,
        train_tokens=TOKENS,
        valid_tokens=TOKENS[:200],
        run_dir=folder,
        progress=False,
        on_step=lambda step, loss: losses.append(loss.item()),
    )
    saved = checkpoint.load(checkpoint.latest(folder / "checkpoints"))
    same = measured == losses
    if process.rank == 0:
        same &= all(torch.equal(weights[name], tensor) for name, tensor in saved.weights.items())
        moments = [optimizer["state"][index]["exp_avg"] for index in saved.optimizer["state"]]
        same &= all(map(torch.equal, moments, (state["exp_avg"] for state in saved.optimizer["state"].values())))
    return same


@pytest.mark.parametrize(
    "settings", [{}, {"fused_loss": True, "fused_optimizer": True, "gradient_accumulation_steps": 2}]
)
def test_a_benchmark_steps_as_training_does(tmp_path, settings):
    assert trained_both_ways(CPU, tmp_path, settings)


def measure_all(process, folder):
    """For spawn: every wrapper trained both ways, and measured beside one process; what is left of each model."""
    torch.set_num_threads(1)
    same = {name: trained_both_ways(process, folder / name, settings) for name, settings in WRAPPED.items()}
    results = {"none": steps.measure_step(process, config(), PLAN, valid_tokens=TOKENS, traced=True)}
    left = {}
    for name, settings in WRAPPED.items():
        made, engine = [], steps.Engine

        def watched(*arguments, made=made, engine=engine, **options):
            made.append(engine(*arguments, **options))
            return made[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "Engine", watched)
            results[name] = steps.measure_step(process, config(**settings), PLAN, valid_tokens=TOKENS)
        there = [weakref.ref(parameter) for parameter in made.pop().module.parameters()]
        gc.collect()
        left[name] = sum(parameter() is not None for parameter in there)
    return same, results, left


def test_two_processes_step_as_training_does_and_as_one_does(tmp_path):
    by_rank = group.spawn(measure_all, 2, tmp_path, device="cpu", timeout_s=200)
    (same, results, left), (same_1, results_1, _) = by_rank
    assert same == same_1 == dict.fromkeys(WRAPPED, True) and left == dict.fromkeys(WRAPPED, 0)
    alone = results.pop("none")
    assert results_1.pop("none") is None and alone["timeline"] and "quiet_ms" not in alone
    for name, result in results.items():
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)  # one process takes both shares in turn
        assert result["valid_loss"] == pytest.approx(alone["valid_loss"], rel=1e-5)
        assert ("quiet_ms" in result) == (name == "flashddp")
        assert len(result["times_ms"]) == 3 and len(result["backward_ms"]) == len(result["finish_ms"]) == 5
        assert list(result["memory"]) == list(steps.POINTS) and result["peak_bytes"] > max(result["memory"].values())
    for point in steps.POINTS:  # a half of what is not sharded, and the gains
        assert results["fsdp"]["memory"][point] < 0.55 * alone["memory"][point]


def test_the_peer_is_measured_like_the_step():
    ours, theirs = (steps.measure_step(CPU, config(), PLAN, peer=peer) for peer in (None, peers.NativeStep))
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5) and "backward_ms" not in theirs
    assert len(theirs["times_ms"]) == 3 and theirs["peak_bytes"] > 0


def test_what_cannot_run_says_so():
    for settings, message in (
        ({"attention_kernel": "torch_sdpa_cudnn"}, "torch_sdpa_cudnn"),
        ({"cuda_graph": True}, "train.cuda_graph is for a GPU"),
        ({"ddp_wrapper": "flashddp"}, "needs more than one"),
    ):
        with pytest.raises(ValueError, match=message):
            steps.measure_step(CPU, config(**settings), PLAN)
    with pytest.raises(ValueError, match="captures passes .* not those of train.ddp_wrapper 'fsdp'"):
        config(ddp_wrapper="fsdp", cuda_graph=True)
    with pytest.raises(FloatingPointError, match="the losses are"):
        steps.measure_step(CPU, steps.step_config(MODEL, batch_size=2, learning_rate=1e30), PLAN)


def test_a_captured_point_is_free_when_it_is_measured(monkeypatch):
    """Its passes hold it, and NCCL waits for what they captured."""
    made, replays = [], []

    class Known(steps.Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    def capture(function, pool):
        replays.append(len(replays))
        return function(), lambda: None

    monkeypatch.setattr(steps, "Engine", Known)
    monkeypatch.setattr(steps, "check_setup", lambda *_: None)
    monkeypatch.setattr(graphs, "on_own_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "GraphedPass", functools.partial(graphs.GraphedPass, capture=capture))
    try:
        result = steps.measure_step(CPU, config(cuda_graph=True), steps.Plan(2, 2))
        gc.collect()
        assert replays == [0] and "backward_ms" not in result and made[0]() is None
    finally:
        gc.unfreeze()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_point_trains_as_the_others_and_frees_its_memory():
    process = steps.alone(torch.device("cuda", 0))
    plan = steps.Plan(loss_steps=4, timed_steps=5, quiet_steps=2)
    plain, captured = (steps.measure_step(process, config(cuda_graph=graph), plan) for graph in (False, True))
    assert captured["losses"] == pytest.approx(plain["losses"], rel=1e-5) and len(captured["times_ms"]) == 5
    assert captured["peak_bytes"] < 2 * plain["peak_bytes"] and "backward_ms" not in captured


# --- Columns and data -----------------------------------------------------------------------------


def test_a_row_is_made_of_what_was_measured(monkeypatch):
    result = {"times_ms": [12.0, 16.0, 20.0], "quiet_ms": [15.0], "peak_bytes": 2.0**21, "losses": [3, 2]}
    row = steps.step_columns(config(), result, device=torch.device("cpu"), gpus=2)
    assert (row["step_ms"], row["p20_ms"], row["p80_ms"]) == quantiles([12.0, 16.0, 20.0]) and row["step_ms"] == 16.0
    assert row["tokens_per_s"] == pytest.approx(2 * 2 * 16 / 16e-3)
    assert row["exposed_comm_ms"] == pytest.approx(1.0) and row["peak_mib"] == 2 and row["final_loss"] == 2
    assert steps.beside_one_gpu(row, 10.0) == {"scaling_efficiency": pytest.approx(10 / 16)} and row["mfu"] is None
    row = steps.step_columns(config(), result | {"quiet_ms": []}, device=torch.device("cpu"), gpus=2)
    assert steps.beside_one_gpu(row, 10.0)["exposed_comm_ms"] == 6.0  # no_sync still gathers: less the step of one GPU
    assert "not known" in steps.step_method(PLAN, torch.device("cpu"), "bf16")["mfu"]
    monkeypatch.setattr(steps, "device_name", lambda device: "NVIDIA H200")
    assert steps.step_method(PLAN, torch.device("cuda"), "bf16")["mfu"] == "against 989.5 TFLOP/s a GPU"
    assert steps.step_method(PLAN, torch.device("cuda"), "fp32")["mfu"] == "against 494.7 TFLOP/s a GPU"


def test_pattern_tokens_can_be_learned():
    tokens = steps.pattern_tokens(50, 20_000, seed=3)
    assert np.array_equal(tokens, steps.pattern_tokens(50, 20_000, seed=3)) and tokens.max() < 50
    counts = np.bincount(tokens, minlength=50)
    assert len(tokens) == 20_000 and counts[:5].mean() > 1.5 * counts[-5:].mean()
    pairs = np.zeros((50, 50))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    assert 0.7 < (pairs.max(1) / pairs.sum(1)).mean() < 0.85  # each token's follower


def test_live_bytes_counts_storages_once():
    before = steps.live_bytes(torch.device("cpu"))
    kept = torch.zeros(1000)
    view = kept[10:]
    assert steps.live_bytes(torch.device("cpu")) - before == 4000
    del kept, view
    assert steps.live_bytes(torch.device("cpu")) == before


def test_live_bytes_leaves_out_tensors_without_memory(monkeypatch):
    """As a compiler's tracing leaves behind: their storage has no address."""
    before = steps.live_bytes(torch.device("cpu"))
    traced, storage_of = torch.zeros(1000), torch.Tensor.untyped_storage

    class WithoutMemory:
        def nbytes(self):
            return 4000

        def data_ptr(self):
            raise RuntimeError("Attempted to access the data pointer on an invalid python storage.")

    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda t: WithoutMemory() if t is traced else storage_of(t))
    assert steps.live_bytes(torch.device("cpu")) == before


# --- Groups of processes --------------------------------------------------------------------------


def act(process, deed):
    """What a point does in its process."""
    if deed == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    if deed == "hang":
        time.sleep(60)
    return {"status": "ok", "processes": process.world_size}


def test_a_failed_point_is_a_row_and_the_others_go_on():
    deeds = ["work", "out of memory", "work", "hang"]
    got = list(processes.stream(act, [(1, deed) for deed in deeds], device="cpu", limit_s=2.0))
    assert [deed for deed, _ in got] == deeds
    results = [result for _, result in got]
    assert results[0] == results[2] == {"status": "ok", "processes": 1}
    assert results[1]["status"] == "oom" and "Tried to allocate 1 GiB" in results[1]["note"]
    assert results[3]["status"] == "error" and "a point may take 2 s" in results[3]["note"]


def test_results_come_while_the_group_runs_and_leaving_ends_it():
    stream = processes.stream(act, [(1, "work"), (1, "hang")], device="cpu", limit_s=100.0)
    assert next(stream)[1]["status"] == "ok"  # the second is still hanging
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 10


def test_process_counts():
    assert processes.process_counts("cpu", None) == (1, 2)
    assert processes.process_counts("cpu", [4, 1, 4]) == (1, 4)
    for wrong in ([0], [], [1.5]):
        with pytest.raises(ValueError, match="gpus"):
            processes.process_counts("cpu", wrong)
    with pytest.raises(ValueError, match="give auto, cpu or cuda"):
        processes.process_counts("cuda:1", None)


def test_one_gpu_leaves_several_processes_to_the_cpu(monkeypatch):
    for count, expected in ((0, ("full", "auto")), (1, ("cpu", "cpu")), (2, ("full", "auto"))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert processes.several("full", "auto") == expected
        assert processes.several("smoke", "cuda") == ("smoke", "cuda")


# --- Traces ---------------------------------------------------------------------------------------


def test_overlap_counts_each_moment_once():
    rows = [
        {"lane": "compute", "start_ms": 0.0, "duration_ms": 10.0},
        {"lane": "communication", "start_ms": 8.0, "duration_ms": 4.0},
        {"lane": "communication", "start_ms": 9.0, "duration_ms": 2.0},  # within the other
        {"lane": "compute", "start_ms": 11.0, "duration_ms": 10.0},
        {"lane": "phase", "start_ms": 0.0, "duration_ms": 30.0},
    ]
    assert traces.overlap(rows) == {"communication_ms": 4.0, "hidden_ms": 3.0}
    assert traces.union([(3, 4), (0, 1), (1.5, 2)], gap=0.5) == [(0, 2), (3, 4)]


class Event:
    """As the profiler gives them; times in microseconds."""

    def __init__(self, name, start, end, gpu=True, id=0):
        types = torch.autograd.DeviceType
        self.name, self.device_type, self.id = name, types.CUDA if gpu else types.CPU, id
        self.is_user_annotation = name.startswith(("lmsys.", "nccl:", "Optimizer"))
        self.time_range = type("Range", (), {"start": start, "end": end})


def test_a_gpus_trace_tells_nccl_from_the_rest():
    """Phases are those of the host when it launches, in any thread and in annotations within; shadows do not count."""
    launches = {1: 100, 2: 600, 3: 700, 4: 1050}
    events = [
        Event("lmsys.forward", 0, 500, gpu=False),
        Event("lmsys.backward", 500, 900, gpu=False),
        Event("lmsys.optimizer", 1000, 1100, gpu=False),
        *(Event("cudaLaunchKernel", start, start + 5, gpu=False, id=id) for id, start in launches.items()),
        Event("lmsys.forward", 1000, 3000),
        Event("lmsys.backward", 3050, 3051),
        Event("gemm", 1000, 3000, id=1),
        Event("gemm", 3100, 6000, id=2),
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 5000, 8000, id=3),
        Event("nccl:all_reduce", 5000, 8000),
        Event("Optimizer.step#AdamW.step", 8000, 9000),
        Event("adam", 8000, 9000, id=4),
        Event("aten::mm", 0, 9000, gpu=False, id=2),
    ]
    rows = traces.lane_rows(events, gpu=True)
    found = {(row["lane"], row["name"], row["start_ms"], row["duration_ms"]) for row in rows}
    assert {("phase", "forward", 0.0, 2.0), ("phase", "backward", 2.1, 2.9), ("phase", "optimizer", 7.0, 1.0)} <= found
    assert ("communication", "NCCL", 4.0, 3.0) in found and sum(row["lane"] == "phase" for row in rows) == 3
    assert traces.overlap(rows) == {"communication_ms": 3.0, "hidden_ms": pytest.approx(1.0)}
    assert sum(row["duration_ms"] for row in rows if row["lane"] == "compute") == pytest.approx(2.0 + 2.9 + 1.0)
