"""The data-parallel wrappers in two Gloo processes against the unsharded twin: one spawn runs all cases."""

import random
import time

import pytest
import torch
import torch.distributed as dist
from parallel_cases import STEPS, TIME_LIMIT_S, VOCABULARY, Toy, batch, difference, loss, sgd, share, toy, twin
from torch import nn

from lmsys.parallel import wrap
from lmsys.parallel.group import Process, spawn

RANKS = 2
SMALL_MB = 0.003  # a few of the toy's parameters
ROUNDING = 2e-6  # in fp32, between sums in different orders, after a few steps

WRAPPED = {
    "naive": ("naive", {}),
    "flat": ("flat", {}),
    "overlap": ("overlap", {}),
    "flashddp grouped": ("flashddp", {"bucket_size_mb": SMALL_MB, "layout": "grouped"}),
    "flashddp flat": ("flashddp", {"bucket_size_mb": SMALL_MB, "layout": "flat"}),
    "flashddp one bucket": ("flashddp", {}),
    "flashddp a bucket a parameter": ("flashddp", {"bucket_size_mb": 0, "layout": "flat"}),
    "torch_ddp": ("torch_ddp", {"find_unused": True}),
}


def step_of(wrapped, optimizer, step, rank, max_norm=None):
    """One training step on the rank's share of the step's batch."""
    optimizer.zero_grad(set_to_none=True)
    tokens, targets = (share(tensor, rank, RANKS) for tensor in batch(step))
    loss(wrapped, tokens, targets).backward()
    wrapped.finish_gradient_synchronization()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(wrapped.module.parameters(), max_norm)
    optimizer.step()


def trained(process, name, options, *, steps=STEPS, max_norm=None, prepare=lambda module: None):
    """The toy after some steps under a wrapper. It starts with the rank as its seed: rank 0's parameters must win."""
    module = toy(seed=process.rank)
    with torch.no_grad():
        module.scale += process.rank
    prepare(module)
    wrapped = wrap(module, name, **options)
    optimizer = sgd([p for p in module.parameters() if p.requires_grad])
    for step in range(steps):
        step_of(wrapped, optimizer, step, process.rank, max_norm)
    return module


# --- The cases: each runs in every process and returns what its test looks at ---------------------


def equality(process):
    found = {}
    expected = twin(RANKS)
    for case, (name, options) in WRAPPED.items():
        module = trained(process, name, options)
        found[case] = {
            "difference": difference(module, expected),
            "scale": module.scale.item(),
            "grads": {name for name, p in module.named_parameters() if p.grad is not None},
        }
    found["expected grads"] = {name for name, p in expected.named_parameters() if p.grad is not None}
    return found


def clipping(process):
    return {
        case: difference(trained(process, name, options, max_norm=0.1), twin(RANKS, max_norm=0.1))
        for case, (name, options) in WRAPPED.items()
        if case.startswith("flashddp")
    }


def accumulation(process):
    """Two backward passes a step: the twin of four processes has the same parts. Counts collectives by no_sync."""
    found = {}
    expected = twin(2 * RANKS)
    for case, (name, options) in WRAPPED.items():
        module = toy()
        wrapped = wrap(module, name, **options)
        counts = {"inside": 0, "outside": 0}
        where = "outside"
        if name != "torch_ddp":
            average = wrapped._transport.average

            def counted(*args, average=average, **kwargs):
                counts[where] += 1  # noqa: B023 (called in this turn of the loop only)
                return average(*args, **kwargs)

            wrapped._transport.average = counted
        optimizer = sgd([p for p in module.parameters() if p.requires_grad])
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            parts = [share(tensor, process.rank, RANKS).chunk(2) for tensor in batch(step)]
            where = "inside"
            with wrapped.no_sync():
                (loss(wrapped, parts[0][0], parts[1][0]) / 2).backward()
            where = "outside"
            (loss(wrapped, parts[0][1], parts[1][1]) / 2).backward()
            wrapped.finish_gradient_synchronization()
            optimizer.step()
        found[case] = {"difference": difference(module, expected), **counts}
    return found


def delays(process):
    """20 steps in which each rank sleeps at random before gradients, so that buckets fill at different times."""
    rng = random.Random(process.rank)

    def slow(module):
        def sleep(_):
            time.sleep(rng.choice((0.0, 0.0, 0.002)))

        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(sleep)

    expected = twin(RANKS, steps=20)
    return {
        case: difference(trained(process, name, options, steps=20, prepare=slow), expected)
        for case, (name, options) in WRAPPED.items()
        if case in ("overlap", "flashddp grouped", "flashddp flat")
    }


def low_precision(process):
    """Relative error of averaged gradients that travelled in half precision, against those in fp32."""

    def gradients(name, **options):
        module = toy()
        wrapped = wrap(module, name, **options)
        for step in (0, 2):  # the same ranks use the same parameters; the second step has buckets
            module.zero_grad()
            loss(wrapped, *(share(t, process.rank, RANKS) for t in batch(step))).backward()
            wrapped.finish_gradient_synchronization()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    exact = gradients("flashddp")
    rounded = {
        "bf16": gradients("flashddp", communication_dtype=torch.bfloat16, bucket_size_mb=SMALL_MB),
        "fp16": gradients("flashddp", communication_dtype=torch.float16, bucket_size_mb=SMALL_MB),
        "torch_ddp in fp16": gradients("torch_ddp", communication_dtype=torch.float16, find_unused=True),
    }
    return {name: ((value - exact).norm() / exact.norm()).item() for name, value in rounded.items()}


class Mixed(nn.Module):
    """Parameters of two dtypes, in turn."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.bfloat16 if i % 2 else torch.float32) for i in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return x.float()


def dtypes(process):
    """bf16 gradients beside fp32 ones: equal on both ranks, a bucket has one dtype."""
    module = Mixed()
    wrapped = wrap(module, "flashddp", bucket_size_mb=0.0001)
    for _ in range(2):
        module.zero_grad()
        wrapped(torch.full((3, 4), 1.0 + process.rank)).square().mean().backward()
        wrapped.finish_gradient_synchronization()
    ranks = [None] * RANKS
    dist.all_gather_object(ranks, [p.grad.float().tolist() for p in module.parameters()])
    return {
        "buckets": [[str(p.dtype) for p in bucket] for bucket in wrapped.buckets],
        "equal": ranks[0] == ranks[1],
        "moved": any(any(row) if isinstance(row, list) else row for grad in ranks[0] for row in grad),
    }


def arrival(process):
    """Names in the order of their gradients on rank 0 in the first backward pass, and in the order of the buckets."""
    module = toy()
    names = {parameter: name for name, parameter in module.named_parameters()}
    seen = []
    for parameter in names:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(names[p]))
    wrapped = wrap(module, "flashddp", bucket_size_mb=SMALL_MB)
    loss(wrapped, *(share(t, process.rank, RANKS) for t in batch(0))).backward()
    wrapped.finish_gradient_synchronization()
    return {
        "seen": seen,
        "buckets": [[names[p] for p in bucket] for bucket in wrapped.buckets],
        "bytes": [sum(p.numel() * 4 for p in bucket) for bucket in wrapped.buckets],
        "registered": [name for parameter, name in names.items() if parameter.requires_grad],
    }


def early(process):
    """How many buckets had left before backward ended, in the first step and the second, which uses all parameters."""
    found = {}
    for layout in ("grouped", "flat"):
        module = toy()
        module.unused.requires_grad_(False)
        fresh = {}  # where backward put each gradient, before the wrapper's hook
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, fresh=fresh: fresh.update({p: p.grad.data_ptr()})
                )
        wrapped = wrap(module, "flashddp", bucket_size_mb=SMALL_MB, layout=layout)
        sent = []
        for _ in range(2):
            module.zero_grad()
            tokens, targets = (share(t, process.rank, RANKS) for t in batch(0))
            tokens[0, 0] = 0
            loss(wrapped, tokens, targets).backward()
            sent.append(len(wrapped._sent))
            wrapped.finish_gradient_synchronization()
        found[layout] = {
            "sent": sent,
            "buckets": len(wrapped.buckets),
            "stayed": [parameter.grad.data_ptr() == place for parameter, place in fresh.items()],
            "storages": [len({p.grad.untyped_storage().data_ptr() for p in bucket}) for bucket in wrapped.buckets],
            "aligned": all(p.grad.data_ptr() % 16 == 0 for bucket in wrapped.buckets for p in bucket),
            "sizes": [len(bucket) for bucket in wrapped.buckets],
        }
    return found


def message(function, *args, error=ValueError, **kwargs):
    """What a call says that must raise."""
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    return str(raised.value)


def mismatches(process):
    """Modules that differ between ranks: each rank must raise, and say the same."""
    found = {}
    one_more = toy()
    if process.rank == 1:
        one_more.blocks.append(nn.Linear(2, 2))
    found["one more"] = message(wrap, one_more, "flashddp")
    wider = nn.Linear(3, 4 + process.rank)
    found["wider"] = message(wrap, wider, "naive")
    frozen = nn.Linear(3, 4)
    frozen.bias.requires_grad_(process.rank == 1)
    found["frozen"] = message(wrap, frozen, "flat")
    return found


def mistakes(process):
    found = {}
    for name in ("naive", "flat", "overlap", "flashddp"):
        wrapped = wrap(nn.Linear(3, 1), name)
        wrapped(torch.ones(4 + process.rank, 3)).mean().backward()
        again = wrapped.module(torch.ones(4, 3)).mean()
        found[f"forgotten {name}"] = message(again.backward, error=RuntimeError)
        found[f"uneven first {name}"] = message(wrapped.finish_gradient_synchronization)
    wrapped = wrap(nn.Linear(3, 1), "flashddp")
    wrapped(torch.ones(4, 3)).mean().backward()
    wrapped.finish_gradient_synchronization()
    found["uneven later"] = message(wrapped, torch.ones(2, 3)) if process.rank == 1 else "rank 0 has a whole batch"
    with torch.no_grad():
        wrapped(torch.ones(2, 3))
    wrapped = wrap(nn.Linear(3, 1), "flashddp", check_batches=False)
    for rows in (4, 2):
        wrapped(torch.ones(rows, 3)).mean().backward()
        wrapped.finish_gradient_synchronization()
    wrapped(torch.ones(4, 3)).mean().backward()
    found["backward twice"] = message(wrapped(torch.ones(4, 3)).mean().backward, error=RuntimeError)
    module = nn.Linear(2, 2)
    for options in ({"bucket_size_mb": -1}, {"layout": "grid"}, {"communication_dtype": torch.int8}, {"max_ctas": 4}):
        found[str(next(iter(options)))] = message(wrap, module, "flashddp", **options)
    found["torch in bf16"] = message(wrap, module, "torch_ddp", communication_dtype=torch.bfloat16)
    found["no parameters"] = message(wrap, nn.ReLU(), "naive")
    found["sparse"] = message(wrap, nn.Embedding(4, 2, sparse=True), "flashddp")
    return found


def compiled(process):
    """Blocks under torch.compile, whose backward is one autograd node a block, and the whole module."""

    def by_block(module):
        for block in module.blocks:
            block.compile(backend="aot_eager", dynamic=False)

    def whole(module):
        module.compile(backend="aot_eager", dynamic=False)

    options = {"bucket_size_mb": SMALL_MB}
    expected = twin(RANKS, steps=3)
    return {
        how.__name__: difference(trained(process, "flashddp", options, steps=3, prepare=how), expected)
        for how in (by_block, whole)
    }


ALL = (equality, clipping, accumulation, delays, low_precision, dtypes, arrival, early, mismatches, mistakes, compiled)


def run_cases(process: Process) -> dict:
    return {case.__name__: case(process) for case in ALL}


@pytest.fixture(scope="module")
def results():
    """What each case returned, by case and then by rank."""
    by_rank = spawn(run_cases, RANKS, device="cpu", timeout_s=TIME_LIMIT_S)
    return {case.__name__: [found[case.__name__] for found in by_rank] for case in ALL}


# --- The tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRAPPED)
def test_parameters_equal_the_unsharded_twins(results, case):
    for found in results["equality"]:
        assert found[case]["difference"] < ROUNDING
        assert found[case]["scale"] == 1.5  # rank 0's buffer


@pytest.mark.parametrize("case", [case for case in WRAPPED if case != "torch_ddp"])
def test_a_parameter_that_no_rank_used_has_no_gradient(results, case):
    for found in results["equality"]:
        assert found[case]["grads"] == found["expected grads"]
        assert "sometimes.weight" in found["expected grads"] and "unused.weight" not in found["expected grads"]


def test_the_twin_trains():
    assert difference(twin(RANKS), toy()) > 0.05
    assert difference(twin(RANKS), twin(RANKS, steps=STEPS - 1)) > 1e-3


def test_clipping_by_global_norm(results):
    assert difference(twin(RANKS, max_norm=0.1), twin(RANKS)) > 0.05
    for found in results["clipping"]:
        assert len(found) == 4 and max(found.values()) < ROUNDING


@pytest.mark.parametrize("case", WRAPPED)
def test_accumulation_communicates_once_a_step(results, case):
    for found in results["accumulation"]:
        assert found[case]["difference"] < ROUNDING
        assert found[case]["inside"] == 0
        if case == "torch_ddp":
            continue
        if case == "flashddp one bucket":
            assert found[case]["outside"] == STEPS
        else:
            assert found[case]["outside"] % STEPS == 0 and found[case]["outside"] > STEPS


def test_ranks_that_are_late_at_random_do_not_race(results):
    for found in results["delays"]:
        assert len(found) == 3 and max(found.values()) < 4 * ROUNDING


def test_error_of_communication_in_half_precision(results):
    for found in results["low_precision"]:
        # Each gradient is rounded, to 8 bits in bf16 and to 11 in fp16, before the sum of two and after it.
        assert 2**-11 < found["bf16"] < 2**-8
        assert 2**-14 < found["fp16"] < 2**-11
        assert found["fp16"] < 1.5 * found["torch_ddp in fp16"]


def test_a_bucket_has_one_dtype(results):
    for found in results["dtypes"]:
        assert found["equal"] and found["moved"]
        assert all(len(set(bucket)) == 1 for bucket in found["buckets"])
        assert {dtype for bucket in found["buckets"] for dtype in bucket} == {"torch.float32", "torch.bfloat16"}
        assert any(len(bucket) > 1 for bucket in found["buckets"])


def test_buckets_follow_rank_0s_order_of_arrival(results):
    first, second = results["arrival"]
    seen = first["seen"]
    assert first["buckets"] == second["buckets"]
    order = [name for bucket in first["buckets"] for name in bucket]
    assert order[: len(seen)] == seen
    assert second["seen"] != seen  # rank 1 did not use `sometimes` in this step
    # Registered before the blocks and used after them, `sometimes` arrives before them; the unused come last.
    assert order != first["registered"][::-1]
    assert set(order[:2]) == {"sometimes.weight", "sometimes.bias"}
    assert set(order[-2:]) == {"unused.weight", "unused.bias"}
    assert len(first["buckets"]) > 3
    assert all(size >= SMALL_MB * 1e6 for size in first["bytes"][:-1])


@pytest.mark.parametrize("layout", ["grouped", "flat"])
def test_buckets_leave_during_backward(results, layout):
    for found in results["early"]:
        assert found[layout]["buckets"] > 3
        assert found[layout]["sent"] == [0, found[layout]["buckets"]]


def test_gradients_stay_or_share_a_buffer(results):
    for found in results["early"]:
        assert all(found["grouped"]["stayed"]) and found["grouped"]["storages"] == found["grouped"]["sizes"]
        assert not any(found["flat"]["stayed"]) and set(found["flat"]["storages"]) == {1}
        assert max(found["flat"]["sizes"]) > 1 and found["flat"]["aligned"]


def test_mismatched_models_end_in_one_error(results):
    first, second = results["mismatches"]
    assert first == second
    assert "the model differs between processes: rank(s) 1 from rank 0" in first["one more"]
    assert "rank 0 has 'weight (4, 3) torch.float32', rank 1 has 'weight (5, 3) torch.float32'" in first["wider"]
    assert "rank 0 has 'bias (4,) torch.float32 frozen', rank 1 has 'bias (4,) torch.float32'" in first["frozen"]


def test_mistakes_are_named(results):
    for rank, found in enumerate(results["mistakes"]):
        for name in ("naive", "flat", "overlap", "flashddp"):
            assert found[f"uneven first {name}"] == (
                "the shape of the batch differs between processes: rank(s) 1 from rank 0; first where rank 0 has "
                "'(4, 3)', rank 1 has '(5, 3)'; drop an incomplete last batch"
            )
            assert "call finish_gradient_synchronization() after each" in found[f"forgotten {name}"]
        if rank == 1:
            assert "this batch has shape (2, 3), the first had (4, 3)" in found["uneven later"]
        assert "call finish_gradient_synchronization() after" in found["backward twice"]
        assert "bucket_size_mb is -1; it must be 0" in found["bucket_size_mb"]
        assert "layout is 'grid'; it must be grouped or flat" in found["layout"]
        assert "communication_dtype is torch.int8" in found["communication_dtype"]
        assert "max_ctas and high_priority are NCCL's" in found["max_ctas"]
        assert "bfloat16 with NCCL only" in found["torch in bf16"]
        assert "no parameter that requires a gradient" in found["no parameters"]
        assert "sparse gradients" in found["sparse"]


def test_compiled_modules_equal_the_eager_twin(results):
    for found in results["compiled"]:
        assert found.keys() == {"by_block", "whole"} and max(found.values()) < ROUNDING


def test_a_wrapper_needs_a_group():
    with pytest.raises(ValueError, match="FlashDDP needs a process group; start the program with torchrun"):
        wrap(nn.Linear(2, 2), "flashddp")


def test_the_toy_has_what_the_cases_need():
    module = Toy()
    assert module.head.weight is module.embedding.weight and module.embedding.num_embeddings == VOCABULARY
    assert not module.blocks[1].up.weight.requires_grad
    for step in (0, 1):
        firsts = [share(batch(step)[0], rank, RANKS)[0, 0].item() % 2 for rank in range(RANKS)]
        assert sorted(firsts) == [0, 1] and firsts[0] == step % 2
