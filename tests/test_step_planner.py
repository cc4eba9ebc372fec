"""The planner: its walk through memory against a profiler's, its choices against all there are, its formulas against
lmsys.cost.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist

from lmsys import cost, parallel
from lmsys.bench.measure import peak_bytes_cpu
from lmsys.bench.steps import live_bytes
from lmsys.config import ModelConfig
from lmsys.model import TransformerLM
from lmsys.step import blocks, planner
from lmsys.step import loss as fused_loss
from lmsys.step.adamw import FusedAdamW

CONFIG = ModelConfig(d_model=64, d_ff=176, num_layers=3, num_heads=2, context_length=512, vocab_size=50)
SHAPE = planner.Shape(CONFIG, batch=2, length=512, gpus=2, dtype="fp32")
BOARD = planner.Shape(ModelConfig(4096, 11_008, 34, 32, 32_768, 151_936), 1, 32_768, 2, "bf16")
SETS = [
    frozenset(kinds)
    for kinds in (
        (),
        ("attention",),
        ("qkv", "attention"),
        ("qkv", "attention", "middle"),
        ("qkv", "attention", "middle", "gate", "up"),
        ("norm1", "middle", "up"),
        ("gate", "up"),
        blocks.KINDS,
    )
]


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def frugal(monkeypatch):
    """A block's operations beside its products, which allocate what those on a GPU do and no more.

    What they compute is no matter.
    """

    def rms_norm(x, gain, eps, added=None):
        return (x if added is None else torch.empty_like(x)), torch.empty_like(x)

    def attend_backward(kernel, q, k, v, o, lse, do):
        made = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.empty(q.shape, dtype=torch.float32)  # what dq is added up in
        return made

    def attend(kernel, q, k, v):
        batch, heads, length, head_dim = q.shape
        return q.new_empty(batch, length, heads, head_dim).transpose(1, 2), q.new_empty(batch, heads, length)

    def rotate_back(dq, dk, dv, cos, sin, path):
        return dq.new_empty(dq.shape[0], dq.shape[2], 3, dq.shape[1], dq.shape[3])

    monkeypatch.setattr(blocks, "norm_forward", rms_norm)
    monkeypatch.setattr(blocks, "norm_backward", lambda dy, x, gain, eps, residual=None: (dy, gain))
    monkeypatch.setattr(blocks, "swiglu", lambda gate, up: torch.empty_like(gate))
    monkeypatch.setattr(blocks, "swiglu_backward", lambda *_: None)
    monkeypatch.setattr(blocks, "rotate_in_place", lambda qkv, cos, sin: None)
    monkeypatch.setattr(blocks, "attend", attend)
    monkeypatch.setattr(blocks, "attend_backward", attend_backward)
    monkeypatch.setattr(blocks, "rotate_backward", rotate_back)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler of the CPU's allocations")
@pytest.mark.parametrize("keep", SETS, ids=lambda keep: ",".join(sorted(keep)) or "nothing")
def test_peaks_of_a_block_are_the_profilers(frugal, keep):
    torch.manual_seed(0)
    model = TransformerLM(CONFIG, attention_kernel="flash_attention_torch")
    block = blocks.select(model, [keep] * 3).layers[0]
    x = torch.randn(2, 512, 64, requires_grad=True)
    dout = torch.randn(2, 512, 64)
    made = []
    forward = peak_bytes_cpu(lambda: made.append(block(x, model.rope.cos, model.rope.sin)), lambda: ())
    kept = sum(map(SHAPE.kind_bytes, keep)) + SHAPE.residual  # and the output
    assert forward == kept + SHAPE.forward_peak(keep)
    assert peak_bytes_cpu(lambda: made[-1].backward(dout), lambda: ()) == SHAPE.backward_peak(keep)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler of the CPU's allocations")
@pytest.mark.parametrize("vocabulary", [64, 4000])
def test_the_peak_of_the_loss_is_the_profilers(monkeypatch, vocabulary):
    monkeypatch.setattr(fused_loss, "_cross_entropy", lambda *_: None)
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary)
    shape = planner.Shape(config, 2, 512, 2, "fp32")
    hidden, weight = torch.randn(1024, 64, requires_grad=True), torch.randn(vocabulary, 64, requires_grad=True)
    targets = torch.randint(vocabulary, (1024,))
    peak = hidden.nbytes + peak_bytes_cpu(
        lambda: fused_loss.linear_cross_entropy(hidden, weight, targets, rounded=True), lambda: ()
    )
    assert peak == pytest.approx(shape.loss_peak(), rel=0.03)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler of the CPU's allocations")
@pytest.mark.parametrize("vocabulary,where", [(2048, "loss"), (64, "backward 3")])
@pytest.mark.parametrize("keep", [SETS[0], SETS[3], SETS[-1]], ids=lambda keep: f"{len(keep)} kinds")
def test_the_peak_of_a_step_is_the_profilers(frugal, alone, monkeypatch, keep, vocabulary, where):
    """Forward, loss and backward of the sharded model, in a first step and in a later one, which gathers ahead."""
    monkeypatch.setattr(fused_loss, "_cross_entropy", lambda *_: None)
    config = dataclasses.replace(CONFIG, num_layers=4, context_length=1024, vocab_size=vocabulary)
    shape = planner.Shape(config, 1, 1024, 1, "fp32")
    torch.manual_seed(0)
    model = blocks.select(TransformerLM(config, attention_kernel="flash_attention_torch"), [keep] * 4)
    module = parallel.wrap(model, "fsdp", prefetch=planner.PREFETCH)
    optimizer = FusedAdamW(module.parameters())
    data = torch.randint(vocabulary, (2, 1, 1024))
    held = live_bytes(torch.device("cpu"), module) - data.nbytes
    padding = held - shape.state - shape.tables  # of flat buffers, which at this size is a part of all
    moments = planner.moments(shape, [keep] * 4)
    name, predicted = max(moments[:-1], key=lambda moment: moment[1])
    assert name == where or not keep
    for _ in range(2):
        peak = held + peak_bytes_cpu(lambda: module(*data).backward(), lambda: ()) - padding
        assert 0.96 * predicted < peak <= 1.001 * predicted
        module.finish_gradient_synchronization()
        optimizer.zero_grad(set_to_none=True)


def test_greedy_is_one_tensor_from_the_best():
    """Every way to keep, by numbers of blocks, at three budgets between nothing and everything."""
    config = ModelConfig(d_model=64, d_ff=176, num_layers=2, num_heads=2, context_length=256, vocab_size=50)
    shape = planner.Shape(config, 2, 256, 2, "bf16")
    subsets = [frozenset(some) for n in range(8) for some in itertools.combinations(planner.KINDS, n)]
    plans = [planner.Plan(shape, planner.H200, 0.0, keep) for keep in itertools.product(subsets, subsets)]
    found = [(plan.peak_bytes, plan.recompute_seconds) for plan in plans]
    low, high = (choose(peak for peak, _ in found) for choose in (min, max))
    dearest = max(shape.kind_seconds(kind, planner.H200) for kind in planner.KINDS if kind != "attention")
    last = float("inf")
    for share in (0.15, 0.5, 0.85):
        made = planner.plan(shape, low + share * (high - low))
        best = min(seconds for peak, seconds in found if peak <= made.budget)
        assert made.fits and best <= made.recompute_seconds <= best + 2 * dearest
        assert made.recompute_seconds < last
        last = made.recompute_seconds
    assert planner.plan(shape, high).recompute_seconds == 0


def test_the_boards_plan():
    made = planner.plan(BOARD, planner.H200_BYTES - 6 * 2**30)
    counts = {kind: sum(kind in kinds for kinds in made.keep) for kind in planner.KINDS}
    assert counts["attention"] == counts["qkv"] == 34 and 0 < counts["up"] < 34 and counts["norm1"] == 0
    assert made.fits and made.budget - made.peak_bytes < BOARD.wide
    assert [kinds for kinds in made.keep if "up" in kinds] == list(made.keep[-counts["up"] :])
    nothing = planner.keep_nothing(BOARD, made.budget)
    assert 0.8 < nothing.recompute_seconds - made.recompute_seconds < 0.9
    assert "DOES NOT FIT" not in str(made) and "attention 34" in str(made)
    assert sum(made.seconds().values()) == pytest.approx(4.07, abs=0.02)
    less = planner.plan(BOARD, 100 * 2**30)
    assert less.fits and less.recompute_seconds > made.recompute_seconds and all("attention" in k for k in less.keep)


def test_flops_are_those_of_the_cost_model():
    """Making everything again is a forward pass without the head and the products of w2."""
    n, config = BOARD.tokens, BOARD.config
    whole = cost.forward_flops(config, 1, config.context_length)
    left = 2.0 * n * (config.vocab_size + config.num_layers * config.d_ff) * config.d_model
    assert planner.keep_nothing(BOARD, 0.0).recomputed_flops == pytest.approx(whole - left)
    seconds = BOARD.step_seconds(planner.Rates(1.0, 1.0, 1.0, float("inf"), float("inf")))
    pairs = cost.attention_flops(1, 32, 32_768, 32_768, 128, True, "backward") * 34
    flops = 6.0 * cost.matmul_parameters_in_products(config) * n + 1.4 * pairs
    assert sum(seconds.values()) == pytest.approx(flops)


def test_memory_is_walked_through():
    moments = dict(planner.moments(BOARD, [frozenset(planner.KINDS)] * 34))
    assert list(moments)[33:36] == ["forward 33", "loss", "backward 33"] and len(moments) == 70
    assert moments["backward 0"] < moments["backward 33"] and moments["forward 0"] < moments["forward 33"]
    kinds = sum(map(BOARD.kind_bytes, planner.KINDS))
    nothing = dict(planner.moments(BOARD, [frozenset()] * 34))
    assert moments["loss"] - nothing["loss"] == 34 * kinds
    # The state as the cost model of fully sharded training has it: fp32 parameters and two moments.
    state = cost.training_state(BOARD.config, "fsdp", 2)
    assert BOARD.state == pytest.approx(state["parameters"] + state["optimizer"])


def test_what_cannot_be_is_said():
    with pytest.raises(
        ValueError, match="66.* GiB a GPU where blocks keep their inputs alone, more than the budget of 40 GiB"
    ):
        planner.plan(BOARD, 40 * 2**30)
    with pytest.raises(ValueError, match="unknown kind of activation 'ups'"):
        BOARD.kind_bytes("ups")
    with pytest.raises(ValueError, match="unknown dtype 'fp8'"):
        planner.Shape(CONFIG, 1, 8, 2, "fp8")
    tied = ModelConfig(64, 176, 1, 2, 8, 50, tie_embeddings=True)
    with pytest.raises(ValueError, match="untied"):
        planner.Shape(tied, 1, 8, 2, "bf16")
    assert planner.CHUNK_BYTES == fused_loss.CHUNK_BYTES
