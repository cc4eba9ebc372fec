"""ShardedOptimizer: the plain optimizer's parameters and state, with 1/N of the state on each rank."""

import random
import time
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from parallel_cases import STEPS, TIME_LIMIT_S, batch, difference, loss, share, toy, twin
from torch import nn

from lmsys.parallel import wrap
from lmsys.parallel.group import spawn
from lmsys.parallel.zero1 import ShardedOptimizer
from lmsys.step.optimizer import AdamW

# name -> optimizer, its options, how it is sharded
CASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}, {}),
    "adamw_fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}, {"bucket_size_mb": 0.002}),
    "own_adamw": (AdamW, {"lr": 0.01}, {"bucket_size_mb": 0.002}),
    "whole_parameters": (AdamW, {"lr": 0.01}, {"partition": "parameters", "bucket_size_mb": 0.002}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.01}, {}),
    "scattered": (AdamW, {"lr": 0.01}, {"reduce_scatter_gradients": True, "bucket_size_mb": 0.002}),
    "scattered_whole": (
        AdamW,
        {"lr": 0.01},
        {"reduce_scatter_gradients": True, "partition": "parameters", "bucket_size_mb": 0.002},
    ),
}


WRAPPED = {
    "naive": ("naive", {}),
    "flat": ("flat", {}),
    "overlap": ("overlap", {}),
    "flashddp": ("flashddp", {}),
    "flashddp_flat": ("flashddp", {"layout": "flat"}),
    "torch_ddp": ("torch_ddp", {"find_unused": True}),
}


def groups(module: nn.Module) -> list[dict]:
    """Two groups with options of their own, the second all vectors; the first has the frozen matrix, the tied twice."""
    matrices = [p for p in module.parameters() if p.ndim >= 2] + [module.head.weight]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 0.02},
    ]


def plain_groups(module: nn.Module) -> list[dict]:
    first, second = groups(module)
    return [first | {"params": first["params"][:-1]}, second]


def average(module: nn.Module) -> None:
    """The oracle's all-reduce; a gradient that no rank has is None."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    used = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    dist.all_reduce(used)
    trained = [parameter for parameter, ranks in zip(trained, used, strict=True) if ranks]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad / dist.get_world_size() for p in trained]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for parameter, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def train(module, optimizer, scheduler, process, steps, *, scattered=None, max_norm=None, micro_batches=1):
    """scattered: the optimizer averages the gradients."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        tokens, targets = (share(one, process.rank, process.world_size) for one in batch(step))
        for i, (inputs, labels) in enumerate(
            zip(tokens.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
        ):
            if scattered and i + 1 < micro_batches:
                with scattered.no_sync():
                    (loss(module, inputs, labels) / micro_batches).backward()
            else:
                (loss(module, inputs, labels) / micro_batches).backward()
        if not scattered:
            average(module)
        if max_norm is not None:
            if isinstance(optimizer, ShardedOptimizer):
                norms.append(optimizer.clip_grad_norm_(max_norm).item())
            else:
                norms.append(nn.utils.clip_grad_norm_(module.parameters(), max_norm).item())
        optimizer.step()
        scheduler.step()
    return norms


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def same_state(ours: dict, theirs: dict) -> bool:
    """Whether two state_dicts are equal, bit for bit."""
    if ours["param_groups"] != theirs["param_groups"] or ours["state"].keys() != theirs["state"].keys():
        return False
    return all(
        ours["state"][index].keys() == state.keys()
        and all(torch.equal(torch.as_tensor(ours["state"][index][key]), torch.as_tensor(state[key])) for key in state)
        for index, state in theirs["state"].items()
    )


def compare(process, optimizer_cls, options, sharding, **training) -> dict:
    """Train two toys, one with the plain optimizer, and say how they differ."""
    plain, ours = toy(), toy(seed=process.rank)  # the optimizer makes them the same, but for what is frozen
    ours.blocks[1].up.weight.data.copy_(plain.blocks[1].up.weight)
    scatter = sharding.get("reduce_scatter_gradients", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whole parameters of a toy are not balanced
        sharded = ShardedOptimizer(groups(ours), optimizer_cls, **sharding, **options)
    optimizer = optimizer_cls(plain_groups(plain), **options)
    schedules = schedule(sharded), schedule(optimizer)
    first, second = range(3), range(3, STEPS)
    scattered = sharded if scatter else None
    ours_norms = train(ours, sharded, schedules[0], process, first, scattered=scattered, **training)
    norms = train(plain, optimizer, schedules[1], process, first, **training)
    added, plain_added = nn.Parameter(torch.ones(7, 3)), nn.Parameter(torch.ones(7, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded.add_param_group({"params": [added], "lr": 0.05})
    optimizer.add_param_group({"params": [plain_added], "lr": 0.05})
    for schedule_of in schedules:
        schedule_of.base_lrs.append(0.05)
        schedule_of.lr_lambdas.append(schedule_of.lr_lambdas[0])
    for module, parameter in ((ours, added), (plain, plain_added)):
        module.added = parameter
        module.forward = lambda tokens, module=module: type(module).forward(module, tokens) * module.added.mean()
    ours_norms += train(ours, sharded, schedules[0], process, second, scattered=scattered, **training)
    norms += train(plain, optimizer, schedules[1], process, second, **training)
    state = sharded.full_state_dict()
    result = {
        "partition": sharded.partition,
        "difference": difference(ours, plain),
        "norms": max((abs(a - b) for a, b in zip(ours_norms, norms, strict=True)), default=0.0),
        "same_state": same_state(state, optimizer.state_dict()) if process.rank == 0 else state["state"] == {},
        "lr": [group["lr"] for group in sharded.param_groups] == [group["lr"] for group in optimizer.param_groups],
        "full_gradients": sum(p.grad is not None and p.grad.numel() == p.numel() for p in ours.parameters()),
    }
    sharded.close()
    return result


def own_adamw(parameters):
    return AdamW(parameters, lr=0.01)


def under_wrappers(process) -> dict:
    """Steps under each data-parallel wrapper, which or whose optimizer averages gradients, less the twin's."""
    expected = twin(process.world_size, optimizer=own_adamw)
    differences = {}
    for name, (wrapper, options) in WRAPPED.items():
        for scattered in (False, True):
            module = toy(seed=process.rank)
            wrapped = wrap(module, wrapper, **options)
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            optimizer = ShardedOptimizer(trained, AdamW, lr=0.01, reduce_scatter_gradients=scattered)
            for step in range(STEPS):
                optimizer.zero_grad()
                tokens, targets = (share(one, process.rank, process.world_size) for one in batch(step))
                with wrapped.no_sync() if scattered else nullcontext():
                    loss(wrapped, tokens, targets).backward()
                (optimizer if scattered else wrapped).finish_gradient_synchronization()
                optimizer.step()
            optimizer.close()
            differences[name, scattered] = difference(module, expected)
    return differences


def repeated(process) -> list[bool]:
    """Twenty runs with scattered gradients whose ranks fall behind each other; whether each ends as the first did."""
    generator = random.Random(process.rank)
    ends = []
    for _ in range(20):
        module = toy()
        for block in module.blocks:
            block.register_full_backward_pre_hook(lambda *_: time.sleep(generator.random() * 0.002))
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = ShardedOptimizer(trained, AdamW, lr=0.01, reduce_scatter_gradients=True, bucket_size_mb=0.002)
        train(module, optimizer, schedule(optimizer), process, range(3), scattered=optimizer)
        ends.append(module)
    return [difference(end, ends[0]) == 0 for end in ends]


def balanced(process) -> dict:
    """State of a model whose embedding is half of it, and of one that whole parameters can share."""
    skewed = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 64), nn.Linear(64, 1000))
    even = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    shares = {}
    for name, module, partition in (("elements", skewed, "elements"), ("parameters", even, "parameters")):
        optimizer = ShardedOptimizer(module.parameters(), torch.optim.Adam, partition=partition)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        whole = 2 * sum(parameter.nbytes for parameter in module.parameters())
        steps = 4 * len(list(optimizer._leaves()))
        shares[name] = (optimizer.state_nbytes() - steps) * process.world_size / whole
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ShardedOptimizer(skewed.parameters(), torch.optim.Adam, partition="parameters")
    shares["warned"] = [str(one.message) for one in caught if "whole parameters leave" in str(one.message)]
    return shares


class Counting(torch.optim.SGD):
    """SGD that counts its steps in its groups, as schedule-free optimizers do."""

    def step(self, closure=None, *, by=1):
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + by


def counted(process) -> dict:
    """The counts that a state has after two steps, and after another that follows its loading."""
    counts = []
    for partition in ("elements", "parameters"):
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1000))]
        optimizer = ShardedOptimizer([{"params": [one]} for one in parameters], Counting, partition=partition, lr=0.1)
        for _ in range(2):
            optimizer.step(by=2)
        state = optimizer.full_state_dict()
        again = ShardedOptimizer([{"params": [one]} for one in parameters], Counting, partition=partition, lr=0.1)
        again.load_full_state_dict(state)
        again.step()
        counts += [[group["count"] for group in one["param_groups"]] for one in (state, again.full_state_dict())]
    return counts


def misuse(process) -> dict:
    """The messages of errors that must be the same on both ranks."""
    messages = {}

    def caught(name, function):
        with pytest.raises((ValueError, RuntimeError)) as error:
            function()
        messages[name] = str(error.value)

    module = toy()
    caught("mismatch", lambda: ShardedOptimizer([nn.Parameter(torch.zeros(3 + process.rank))], AdamW))
    optimizer = ShardedOptimizer(module.parameters(), AdamW, reduce_scatter_gradients=True)
    optimizer.step()  # agrees on an order
    loss(module, *batch(0)).backward()
    optimizer.zero_grad()
    optimizer.finish_gradient_synchronization()
    optimizer.close()
    module = toy()
    optimizer = ShardedOptimizer(module.parameters(), AdamW)
    module.double()
    caught("moved", optimizer.step)
    module = nn.Linear(2, 2)
    optimizer = ShardedOptimizer(module.parameters(), AdamW, reduce_scatter_gradients=True)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    module(torch.ones(1, 2)).sum().backward()
    caught("second", lambda: module(torch.ones(1, 2)).sum().backward())
    optimizer.finish_gradient_synchronization()
    optimizer.close()
    return messages


def two_ranks(process) -> dict:
    torch.manual_seed(0)
    results = {name: compare(process, *case) for name, case in CASES.items()}
    results["accumulated"] = compare(process, *CASES["scattered"], micro_batches=2)
    for name in ("own_adamw", "scattered"):
        results[f"clipped_{name}"] = compare(process, *CASES[name], max_norm=0.5)
    results["wrappers"] = under_wrappers(process)
    results["repeats"] = repeated(process)
    results["balance"] = balanced(process)
    results["misuse"] = misuse(process)
    results["counted"] = counted(process)
    return results


@pytest.fixture(scope="module")
def results():
    return spawn(two_ranks, 2, device="cpu", timeout_s=TIME_LIMIT_S)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_optimizer(results, name):
    for rank in results:
        assert rank[name]["lr"]
        if name.startswith("scattered"):  # the mean is summed in another order
            assert rank[name]["difference"] < 1e-6
            assert rank[name]["full_gradients"] < results[0]["own_adamw"]["full_gradients"] / 1.5
        else:
            assert rank[name]["difference"] == 0.0
            assert rank[name]["same_state"]


def test_partition_follows_the_optimizer(results):
    chosen = {name: results[0][name]["partition"] for name in CASES}
    assert {name for name, partition in chosen.items() if partition == "parameters"} == {
        "adafactor",
        "whole_parameters",
        "scattered_whole",
    }


def test_micro_batches_accumulate(results):
    assert all(rank["accumulated"]["difference"] < 1e-6 for rank in results)


@pytest.mark.parametrize("name", ["own_adamw", "scattered"])
def test_clipping_by_global_norm(results, name):
    for rank in results:
        assert rank[f"clipped_{name}"]["norms"] < 1e-5
        assert rank[f"clipped_{name}"]["difference"] < 1e-6


@pytest.mark.parametrize("scattered", [False, True], ids=["all_reduced", "scattered"])
@pytest.mark.parametrize("name", WRAPPED)
def test_under_each_wrapper(results, name, scattered):
    assert all(rank["wrappers"][name, scattered] < 1e-5 for rank in results)


def test_twenty_repeats_with_delays_are_one(results):
    assert all(rank["repeats"] == [True] * 20 for rank in results)


def test_state_is_balanced(results):
    for rank in results:
        assert rank["balance"]["elements"] == pytest.approx(1, abs=0.05)
        assert rank["balance"]["parameters"] == pytest.approx(1, abs=0.05)
    (warning,) = results[0]["balance"]["warned"]
    assert "times the mean" in warning
    assert "partition='elements'" in warning


def test_state_has_the_options_as_the_inner_optimizer_left_them(results):
    assert all(rank["counted"] == [[4, 4], [5, 5], [4, 4], [5, 5]] for rank in results)


def test_errors_of_several_ranks(results):
    for rank in results:
        assert "parameter group 0 of the optimizer differs between processes: rank(s) 1" in rank["misuse"]["mismatch"]
        assert "has moved since the optimizer was made" in rank["misuse"]["moved"]
        assert "run all but the last under the optimizer's no_sync()" in rank["misuse"]["second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partition": "rows"}, "partition is 'rows'; give elements or parameters"),
        ({"bucket_size_mb": 0}, "bucket_size_mb is 0; it must be above 0"),
        ({"optimizer_cls": torch.optim.LBFGS}, "LBFGS evaluates the loss .* cannot be sharded"),
        ({"optimizer_cls": torch.optim.Adafactor, "partition": "elements"}, "use partition='parameters'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"params": []}, "no parameters"),
    ],
)
def test_a_users_mistake_is_said(arguments, message):
    arguments = {"params": [nn.Parameter(torch.zeros(4, 4))], "optimizer_cls": AdamW} | arguments
    with pytest.raises(ValueError, match=message):
        ShardedOptimizer(arguments.pop("params"), arguments.pop("optimizer_cls"), **arguments)


def test_numbers_are_no_parameters():
    with pytest.raises(TypeError, match="takes tensors, and one of the params is float"):
        ShardedOptimizer([1.0, 2.0], AdamW)


def test_the_whole_state_is_not_read_from_one_rank(tmp_path):
    optimizer = ShardedOptimizer(nn.Linear(3, 3).parameters(), AdamW)
    with pytest.raises(RuntimeError, match=r"full_state_dict\(\) or save_sharded"):
        optimizer.state_dict()
    with pytest.raises(ValueError, match="no sharded state at"):
        optimizer.load_sharded(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters and this optimizer's have \[2\]"):
        optimizer.load_state_dict(AdamW([nn.Parameter(torch.zeros(3))]).state_dict())


def test_an_unfrozen_parameter_is_refused():
    module = nn.Linear(3, 3)
    module.bias.requires_grad_(False)
    optimizer = ShardedOptimizer(module.parameters(), AdamW)
    module.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="was frozen when the optimizer was made"):
        optimizer.step()
