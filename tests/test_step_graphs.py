"""Captured passes: what is replayed, on the CPU with a capture that runs the function again in place, and on a GPU with
CUDA's.
"""

import dataclasses
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lmsys.bench.steps import pattern_tokens
from lmsys.config import TrainConfig, pipeline_config
from lmsys.data import BatchSampler
from lmsys.step import graphs
from lmsys.step.graphs import GraphedPass
from lmsys.train import check_setup, engine


class Tape:
    """A capture that keeps what a function left behind and fills it again at each replay, as a CUDA graph would."""

    def __init__(self, parameters):
        self.parameters, self.captures, self.replays, self.pools = list(parameters), 0, 0, []

    def __call__(self, function, pool):
        self.captures += 1
        self.pools.append(pool)
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        loss = function()
        kept = [p.grad for p in self.parameters]
        for gradient, old in zip(kept, before, strict=True):  # capturing computes nothing
            if gradient is not None:
                gradient.copy_(torch.zeros_like(gradient) if old is None else old)
        adds = [old is not None for old in before]

        def replay():
            self.replays += 1
            for parameter in self.parameters:
                parameter.grad = None
            loss.copy_(function())
            for parameter, gradient, add in zip(self.parameters, kept, adds, strict=True):
                gradient.add_(parameter.grad) if add else gradient.copy_(parameter.grad)

        return loss, replay


def step_on(layer):
    def run(inputs, targets):
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        return loss.detach()

    return run


def batches(count, rows=4):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(rows, size, generator=generator) for size in (3, 2)] for _ in range(count)]


def test_a_replay_gives_new_inputs_losses_and_gradients_in_the_tensors_of_the_capture():
    layer, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    tape = Tape(layer.parameters())
    captured = GraphedPass(step_on(layer), layer.parameters(), capture=tape)
    places = set()
    for batch in batches(4):
        loss, wanted = captured(*batch), step_on(twin)(*batch)
        assert torch.equal(loss, wanted)
        for mine, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        places.add(layer.weight.grad.data_ptr())
        layer.zero_grad(set_to_none=True)
        twin.zero_grad(set_to_none=True)
    assert (tape.captures, tape.replays) == (1, 4) and len(places) == 1


def test_a_second_pass_adds_to_the_gradients_of_the_first():
    layer, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    tape = Tape(layer.parameters())
    first, second = (GraphedPass(step_on(layer), layer.parameters(), pool="shared", capture=tape) for _ in range(2))
    for _ in range(3):
        one, two, three = batches(3)
        first(*one), second(*two), second(*three)
        for batch in (one, two, three):
            step_on(twin)(*batch)
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
        layer.zero_grad(set_to_none=True)
        twin.zero_grad(set_to_none=True)
    assert tape.captures == 2 and tape.pools == ["shared", "shared"]


def test_a_batch_of_another_shape_is_refused_before_anything_changes():
    layer = nn.Linear(3, 2)
    tape = Tape(layer.parameters())
    captured = GraphedPass(step_on(layer), layer.parameters(), capture=tape)
    captured(*batches(1)[0])
    with pytest.raises(ValueError, match=r"inputs of shape \(4, 3\), not \(5, 3\)"):
        captured(*batches(1, rows=5)[0])
    assert tape.replays == 1


def test_a_replica_captures_after_its_warm_up_and_is_free_once_it_is_closed(monkeypatch):
    """Its passes hold it, and NCCL waits for what they captured: nothing may be left to the collector."""
    replays = []

    def capture(function, pool):
        number = len(replays)
        replays.append(0)

        def replay():
            replays[number] += 1

        return function(), replay

    monkeypatch.setattr(engine.graphs, "on_own_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(engine.graphs, "GraphedPass", functools.partial(GraphedPass, capture=capture))
    config = pipeline_config("smoke", overrides=["train.cuda_graph=true", "train.gradient_accumulation_steps=2"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=64))
    made = engine.Engine(config, torch.device("cpu"), None)
    sampler = BatchSampler(
        pattern_tokens(64, 4096, 0), config.train.batch_size, config.model.context_length, micro_batches=2
    )
    for _ in range(graphs.WARMUP + 2):
        made.accumulate(sampler)
        made.update(1e-3)
    assert replays == [2, 2]
    there = weakref.ref(made)
    gc.disable()
    try:
        made.close()
        del made
        assert there() is None
    finally:
        gc.enable()


def test_a_thread_gets_one_stream_of_its_own(monkeypatch):
    class Stream:
        def __init__(self, device=None):
            self.waited_for = None

        def wait_stream(self, other):
            self.waited_for = other

    default = Stream()
    current = [default]
    for name, value in (
        ("Stream", Stream),
        ("current_stream", lambda device: current[-1]),
        ("default_stream", lambda device: default),
        ("set_stream", current.append),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    graphs.on_own_stream(torch.device("cuda", 0))
    graphs.on_own_stream(torch.device("cuda", 0))
    assert len(current) == 2 and current[1] is not default and current[1].waited_for is default


def test_what_failed_is_told_and_not_that_the_capture_could_not_end(monkeypatch):
    class Broken:
        def __init__(self, *_, **__): ...

        def __enter__(self): ...

        def __exit__(self, *_):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def reads():
        raise RuntimeError("a value is read")

    given_back = []
    for name, value in (
        ("CUDAGraph", object),
        ("current_stream", lambda: SimpleNamespace(device_index=0)),
        ("default_stream", lambda: None),
        ("default_generators", [SimpleNamespace(clone_state=lambda: 7, graphsafe_set_state=given_back.append)]),
        ("graph", Broken),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph \(a value is read\)"):
        GraphedPass(reads, [])()
    assert given_back == [7], "random numbers go on from before the capture"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ddp_wrapper": "fsdp"}, "not those of train.ddp_wrapper 'fsdp'"),
        ({"ddp_wrapper": "flashddp", "sharded_optimizer": True}, "train.sharded_optimizer=true"),
    ],
)
def test_what_cannot_be_captured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(cuda_graph=True, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_setting_is_an_error():
    with pytest.raises(ValueError, match="train.cuda_graph is for a GPU"):
        check_setup(pipeline_config("smoke", overrides=["train.cuda_graph=true"]))


@pytest.mark.parametrize(("options", "transport"), [({}, "auto"), ({"transport": "nccl"}, "nccl")])
def test_captured_gradients_take_the_copy_engines_where_there_are_some(monkeypatch, options, transport):
    given = {}
    monkeypatch.setattr(engine.graphs, "on_own_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("lmsys.parallel.wrap", lambda model, name, **given_: given.update(given_) or model)
    for captured in (True, False):
        given.clear()
        config = pipeline_config("smoke", overrides=["train.ddp_wrapper=flashddp", "model.vocab_size=64"])
        settings = dataclasses.replace(config.train, cuda_graph=captured, **options)
        engine.Engine(dataclasses.replace(config, train=settings), torch.device("cpu"), None)
        assert given.get("transport") == (transport if captured else options.get("transport"))


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_captured_training_is_the_same_training(tmp_path, micro_batches):
    """Steps of the trainer's replica with and without captured passes.

    Losses equal to rounding, the captured ones replayed.
    """
    losses = {}
    before = torch.cuda.current_stream()
    try:
        for captured in (False, True):
            config = pipeline_config(
                "smoke",
                overrides=[
                    f"train.cuda_graph={str(captured).lower()}",
                    f"train.gradient_accumulation_steps={micro_batches}",
                    "train.device=cuda",
                ],
            )
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=64))
            trained = engine.Engine(config, torch.device("cuda", 0), None)
            tokens = pattern_tokens(config.model.vocab_size, 4096, 0)
            sampler = BatchSampler(
                tokens,
                config.train.batch_size,
                config.model.context_length,
                micro_batches=micro_batches,
                seed=0,
            )
            seen = []
            for _ in range(graphs.WARMUP + 7):
                seen.append(trained.accumulate(sampler))
                trained.update(1e-3)
            losses[captured] = torch.stack(seen)
            assert len(trained._passes) == (0 if not captured else min(micro_batches, 3))
    finally:
        torch.cuda.set_stream(before)
    torch.cuda.synchronize()  # the captured losses were computed on a stream of their own
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pass_that_reads_a_value_says_that_it_cannot_be_captured():
    before = torch.cuda.current_stream()
    try:
        graphs.on_own_stream(torch.device("cuda", 0))
        weight = torch.ones(3, device="cuda", requires_grad=True)

        def reads(inputs):
            loss = (weight * inputs).sum()
            loss.backward()
            return loss / loss.item()

        with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph"):
            GraphedPass(reads, [weight])(torch.ones(3, device="cuda"))
        assert torch.randn(3, device="cuda").isfinite().all(), "what comes after a failed capture draws random numbers"
    finally:
        torch.cuda.set_stream(before)
