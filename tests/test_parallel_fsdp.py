"""Full sharding: the unsharded twin's parameters, with whole ones in memory only while they are used."""

import random
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from parallel_cases import STEPS, TIME_LIMIT_S, Toy, batch, difference, loss, same, sgd, share, toy, twin, twin_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmsys.config import ModelConfig
from lmsys.model import TransformerLM, cross_entropy
from lmsys.parallel import shards
from lmsys.parallel.fsdp import FullyShardedModule, fully_shard, torch_fsdp2
from lmsys.parallel.group import spawn
from lmsys.step.optimizer import AdamW, parameter_groups

TINY = ModelConfig(vocab_size=61, context_length=12, d_model=32, num_layers=4, num_heads=2, d_ff=64)


class Checkpointed(Toy):
    """A Toy that computes its blocks again in backward: the first alone, the others together."""

    def forward(self, tokens):
        x = checkpoint(self.blocks[0], self.embedding(tokens), use_reentrant=False)
        x = checkpoint(lambda y: self.blocks[2](self.blocks[1](y)), x, use_reentrant=False)
        if tokens[0, 0] % 2 == 0:
            x = x + self.sometimes(x)
        return self.head(x) * self.scale


class Twice(nn.Module):
    """A block that is called at two places, one that returns a dictionary, and a matrix shared by two blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), Named(), nn.Linear(8, 8)])
        self.layers[2].weight = self.layers[1].linear.weight

    def forward(self, x):
        x = self.layers[0](x).tanh()
        x = self.layers[1](x)["y"]
        return self.layers[2](self.layers[0](x).tanh())


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return {"y": self.linear(x).tanh() + x, "unused": None}


def step_once(module, optimizer, step, process, micro_batches=1, max_norm=None):
    """One step on this rank's share of the batch."""
    optimizer.zero_grad()
    tokens, targets = (share(one, process.rank, process.world_size).chunk(micro_batches) for one in batch(step))
    for i, part in enumerate(zip(tokens, targets, strict=True)):
        with module.no_sync() if i + 1 < micro_batches else nullcontext():
            (loss(module, *part) / micro_batches).backward()
    module.finish_gradient_synchronization()
    norm = None if max_norm is None else module.clip_grad_norm_(max_norm).item()
    optimizer.step()
    return norm


def trained(process, module, *, optimizer=sgd, steps=STEPS, slow=False, micro_batches=1, max_norm=None, **options):
    """The whole parameters after some steps: on rank 0 a state_dict."""
    wrapped = fully_shard(module, **options)
    if slow:
        delay_at_random(wrapped, process.rank)
    update = optimizer([parameter for parameter in wrapped.parameters() if parameter.requires_grad])
    for step in range(steps):
        step_once(wrapped, update, step, process, micro_batches, max_norm)
    return wrapped.full_state_dict()


def delay_at_random(wrapped, rank):
    """Ranks fall behind each other: within blocks, forward and backward."""
    generator = random.Random(rank)

    def sleep(*_):
        time.sleep(generator.random() * 0.002)

    for block in wrapped.module.blocks:
        block.register_forward_pre_hook(sleep)
        block.register_full_backward_pre_hook(sleep)


def is_free(wrapped: FullyShardedModule) -> bool:
    """Whether no whole matrix has memory."""
    assert wrapped._flats
    return all(flat.whole.untyped_storage().size() == 0 for flat in wrapped._flats)


def memory(process) -> dict:
    """Which blocks are whole as each block runs, one gathered ahead; a step's number of all-gathers; what stays."""
    module = toy()
    wrapped = fully_shard(module, prefetch=1)
    optimizer = sgd(wrapped.parameters())
    found = {"start": is_free(wrapped)}
    forward, backward = [], []
    for block in module.blocks:
        block.register_forward_pre_hook(lambda *_: forward.append(wrapped.gathered))
        block.register_full_backward_pre_hook(lambda *_: backward.append(wrapped.gathered))
    gathers = 0
    original = shards.all_gather

    def counted(*arguments):
        nonlocal gathers
        gathers += 1
        return original(*arguments)

    shards.all_gather = counted
    try:
        for step in range(3):
            gathers = 0
            forward.clear()
            backward.clear()
            step_once(wrapped, optimizer, step, process)
    finally:
        shards.all_gather = original
    found |= {"gathers": gathers, "step": is_free(wrapped), "forward": list(forward), "backward": list(backward)}
    tokens = share(batch(0)[0], process.rank, process.world_size)
    wrapped(tokens)  # without a backward pass
    found["between"] = wrapped.gathered
    with torch.no_grad():
        wrapped(tokens)
    found["evaluated"] = is_free(wrapped)
    elements = sum(p.numel() for p in wrapped.parameters() if p.ndim >= 2)
    found["share"] = elements / sum(p.numel() for p in toy().parameters() if p.ndim >= 2)
    found["nan"] = module.blocks[0].up.weight.isnan().all().item()
    with pytest.raises(RuntimeError, match="no rank holds the whole state"):
        module.state_dict()
    return found


def whole_parameters(process) -> dict:
    """gather_full_params: values, and a call by one rank alone."""
    wrapped = fully_shard(toy(), compute_dtype=torch.float16)
    state = wrapped.full_state_dict()
    outputs = None
    with wrapped.gather_full_params() as module:
        same = process.rank != 0 or all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        if process.rank == 0:
            with torch.no_grad():
                outputs = torch.equal(wrapped(batch(0)[0]), toy()(batch(0)[0]))
    free = is_free(wrapped)
    with torch.no_grad():
        half = wrapped(batch(0)[0])
    return {"same": same, "outputs": outputs, "free": free, "dtype": half.dtype}


def half_precision(process, **options) -> dict:
    """Parameters after steps in fp16, less those of the twin that computes with matrices and biases cast to fp16."""
    state = trained(process, toy(), compute_dtype=torch.float16, **options)
    module = toy()
    optimizer = sgd([parameter for parameter in module.parameters() if parameter.requires_grad])
    norms = ("norm.weight", "norm.bias")

    def forward(tokens):
        half = {name: p if name.endswith(norms) else p.half() for name, p in module.named_parameters()}
        return torch.func.functional_call(module, half, (tokens,), tie_weights=True)

    def norm_in_fp32(norm, args):
        return (args[0].float(),)

    for block in module.blocks:
        block.norm.register_forward_pre_hook(norm_in_fp32)
        block.norm.register_forward_hook(lambda norm, args, output: output.half())
    for step in range(STEPS):
        optimizer.zero_grad()
        twin_loss(forward, step, process.world_size).backward()
        optimizer.step()
    return {"difference": gap(state, dict(module.named_parameters()))}


def gap(state: dict, expected: dict) -> float:
    """The largest difference between two states; 0 on a rank that has none."""
    return max((state[name] - value).abs().max().item() for name, value in expected.items()) if state else 0.0


def language_model(process, compiled=None, tied=False) -> float:
    """A TransformerLM after steps of AdamW in two groups, less its twin's. compiled: before or after wrapping."""
    models = []
    tokens = torch.randint(
        0, TINY.vocab_size, (STEPS, 4, TINY.context_length + 1), generator=torch.Generator().manual_seed(0)
    )
    for sharded in (False, True):
        torch.manual_seed(0)
        model = trained_model = TransformerLM(replace(TINY, tie_embeddings=tied))
        if compiled and sharded:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
        if compiled == "before" and sharded:
            model.compile_blocks(backend="aot_eager", fullgraph=True)
        if sharded:
            trained_model = fully_shard(model)
        if compiled == "after" and sharded:
            model.compile_blocks(backend="aot_eager", fullgraph=True)
        optimizer = AdamW(parameter_groups(trained_model, 0.1), lr=1e-2)
        for ids in tokens:
            ids = share(ids, process.rank, process.world_size) if sharded else ids
            optimizer.zero_grad()
            cross_entropy(trained_model(ids[:, :-1]), ids[:, 1:]).backward()
            if sharded:
                trained_model.finish_gradient_synchronization()
            optimizer.step()
        models.append(trained_model.full_state_dict() if sharded else model.state_dict())
    expected, state = models
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    return gap(state, expected)


def odd_modules(process) -> float:
    """Two steps of Twice on both its inputs, the second loss of two forward passes, less the twin's."""
    modules = []
    for sharded in (False, True):
        torch.manual_seed(0)
        module = Twice()
        wrapped = fully_shard(module) if sharded else module
        optimizer = sgd(wrapped.parameters())
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        for step in range(3):
            optimizer.zero_grad()
            if step == 1:
                (wrapped(x).square().mean() + wrapped(2 * x).mean()).backward()
            else:
                wrapped(x).square().mean().backward()
            if sharded:
                wrapped.finish_gradient_synchronization()
            optimizer.step()
        modules.append(wrapped.full_state_dict() if sharded else module.state_dict())
    return gap(modules[1], modules[0])


def peer(process) -> float:
    """torch's FSDP2 on a TransformerLM, its state loaded and gathered, less the same twin."""
    torch.manual_seed(0)
    model = TransformerLM(TINY)
    tokens = torch.randint(0, TINY.vocab_size, (4, TINY.context_length + 1), generator=torch.Generator().manual_seed(0))
    ids = share(tokens, process.rank, process.world_size)
    torch.manual_seed(0)
    wrapped = torch_fsdp2(TransformerLM(TINY))
    optimizers = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    for step in range(3):
        for one, own, optimizer in ((model, tokens, optimizers[0]), (wrapped, ids, optimizers[1])):
            optimizer.zero_grad()
            cross_entropy(one(own[:, :-1]), own[:, 1:]).backward()
            if one is wrapped:
                wrapped.finish_gradient_synchronization()
                norm = wrapped.clip_grad_norm_(0.5)
            else:
                expected = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        if step == 0:
            wrapped.full_state_dict()
            optimizers[1].load_state_dict(optimizers[1].state_dict())
            wrapped.scatter_optimizer_state(optimizers[1], optimizers[0].state_dict())
    states = wrapped.gather_optimizer_state(optimizers[1])["state"]
    assert (process.rank == 0) == bool(states)
    assert abs(norm - expected) < 1e-5
    return gap(wrapped.full_state_dict(), model.state_dict())


def mistakes(process) -> dict:
    messages = {}
    for name, module, options in (
        ("mismatch", nn.Linear(2 + process.rank, 2), {}),
        ("prefetch", nn.Linear(2, 2), {"prefetch": -1}),
        ("dtype", nn.Linear(2, 2), {"compute_dtype": torch.int8}),
        ("nothing", nn.Linear(2, 2), {"is_sharded": lambda name, parameter: False}),
    ):
        with pytest.raises(ValueError) as error:
            fully_shard(module, **options)
        messages[name] = str(error.value)
    wrapped = fully_shard(nn.Linear(2, 2))
    with pytest.raises(RuntimeError) as error:
        wrapped.state_dict()
    messages["state"] = str(error.value)
    with pytest.raises(ValueError) as error:
        wrapped.load_full_state_dict({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    messages["shape"] = str(error.value)
    return messages


CASES = {
    "default": {},
    "not_ahead": {"prefetch": 0},
    "one_ahead": {"prefetch": 1},
    "far_ahead": {"prefetch": 9},
    "all_but_the_frozen": {"is_sharded": lambda name, parameter: parameter.requires_grad},
    "embedding_alone": {"is_sharded": lambda name, parameter: name == "embedding.weight"},
    "micro_batches": {"micro_batches": 2},
}


def two_ranks(process) -> dict:
    results = {name: trained(process, toy(process.rank), **options) for name, options in CASES.items()}
    torch.manual_seed(0)
    results["checkpointed"] = trained(process, Checkpointed())
    results["clipped"] = trained(process, toy(), max_norm=0.3)
    repeats = [trained(process, toy(), slow=True, steps=3, prefetch=repeat % 3) for repeat in range(20)]
    results["repeats"] = [same(repeat, repeats[0]) for repeat in repeats]
    results["memory"] = memory(process)
    results["whole"] = whole_parameters(process)
    results["half"] = half_precision(process)
    results["half_reduced_in_fp32"] = half_precision(process, communication_dtype=torch.float32)
    results["model"] = language_model(process)
    results["tied_model"] = language_model(process, tied=True)
    results["compiled_before"] = language_model(process, "before")
    results["compiled_after"] = language_model(process, "after")
    results["odd"] = odd_modules(process)
    results["peer"] = peer(process)
    results["mistakes"] = mistakes(process)
    return results


@pytest.fixture(scope="module")
def results():
    return spawn(two_ranks, 2, device="cpu", timeout_s=TIME_LIMIT_S)


def state_difference(state, module) -> float:
    own = toy()
    own.load_state_dict(state)
    return difference(own, module)


@pytest.mark.parametrize("name", [*CASES, "checkpointed"])
def test_equals_the_twin(results, name):
    assert state_difference(results[0][name], twin(2)) < 1e-6
    assert results[1][name] == {}  # one copy of the whole


def test_clipping_by_global_norm(results):
    clipped = twin(2, max_norm=0.3)
    assert state_difference(results[0]["clipped"], clipped) < 1e-6
    assert difference(clipped, twin(2)) > 1e-3


def test_twenty_repeats_with_delays_are_one(results):
    assert results[0]["repeats"] == [True] * 20


def test_memory_is_freed_and_gathered_ahead(results):
    for rank in results:
        found = rank["memory"]
        assert found["start"]
        assert found["forward"] == [["blocks.0", "blocks.1"], ["blocks.1", "blocks.2"], ["blocks.2"]]
        assert found["backward"] == [["blocks.1", "blocks.2"], ["blocks.0", "blocks.1"], ["blocks.0"]]
        # Forward: 3 blocks, one of which has a buffer for what is frozen, and 3 matrices outside; backward: 2 blocks.
        assert found["gathers"] == (3 + 1 + 3) + (2 + 1)
        assert found["step"]
        assert found["between"] == ["blocks.2"]
        assert found["evaluated"]
        assert found["nan"]
        assert found["share"] == pytest.approx(1 / 2, rel=0.2)  # padding of a toy


def test_gather_full_params(results):
    for rank in results:
        assert rank["whole"]["same"]
        assert rank["whole"]["free"]
        assert rank["whole"]["dtype"] == torch.float16
    assert results[0]["whole"]["outputs"]


def test_half_precision_equals_its_twin(results):
    assert results[0]["half"]["difference"] < 1e-4
    assert results[0]["half_reduced_in_fp32"]["difference"] < 1e-4


@pytest.mark.parametrize("name", ["model", "tied_model", "compiled_before", "compiled_after"])
def test_transformer(results, name):
    assert results[0][name] < 1e-4  # AdamW's first steps are lr sign(g), whatever the size of g


def test_blocks_that_are_called_twice_share_or_return_dictionaries(results):
    assert results[0]["odd"] < 1e-6


def test_peer_behind_the_same_interface(results):
    assert results[0]["peer"] < 1e-5


def test_mistakes_are_said(results):
    for rank in results:
        said = rank["mistakes"]
        assert "the module differs between processes: rank(s) 1" in said["mismatch"]
        assert "prefetch is -1; it must be an integer of 0 or more" in said["prefetch"]
        assert "compute_dtype is torch.int8; give a floating-point dtype" in said["dtype"]
        assert "chose no parameter" in said["nothing"]
        assert "full_state_dict() or save_sharded" in said["state"]
        assert "weight is (2, 3) in the state and (2, 2) in the module" in said["shape"]


def test_needs_a_process_group():
    for wrap in (fully_shard, torch_fsdp2):
        with pytest.raises(ValueError, match="needs a process group; start the program with torchrun"):
            wrap(nn.Linear(2, 2))
