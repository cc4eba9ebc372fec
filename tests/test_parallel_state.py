"""Sharded state at other numbers of ranks: saved by two, loaded by three and by one; shares that are not even."""

from pathlib import Path

import pytest
import torch
from parallel_cases import TIME_LIMIT_S, batch, difference, loss, same, share, toy, twin
from torch import nn

from lmsys.parallel.fsdp import fully_shard
from lmsys.parallel.group import Process, mean_over_ranks, spawn
from lmsys.parallel.zero1 import ShardedOptimizer
from lmsys.step.optimizer import AdamW

FIRST, LAST = range(3), range(3, 5)  # steps before and after


def adamw(parameters):
    return AdamW(parameters, lr=0.01)


def trained_by(module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def backward(module, step, process) -> None:
    loss(module, *(share(one, process.rank, process.world_size) for one in batch(step))).backward()


class Zero1:
    """A toy with ZeRO-1, its gradients averaged here."""

    name = "zero1"

    def __init__(self, process, seed=0):
        self.process, self.module = process, toy(seed)
        self.optimizer = ShardedOptimizer(trained_by(self.module), AdamW, lr=0.01, bucket_size_mb=0.002)

    def step(self, step) -> None:
        self.optimizer.zero_grad()
        backward(self.module, step, self.process)
        if self.process.world_size > 1:
            for parameter in trained_by(self.module):
                used = mean_over_ranks(torch.tensor(float(parameter.grad is not None)))
                if used > 0:
                    zero = torch.zeros_like(parameter)
                    parameter.grad = mean_over_ranks(zero if parameter.grad is None else parameter.grad)
        self.optimizer.step()

    def save(self, folder) -> None:
        self.optimizer.save_sharded(folder)

    def whole(self) -> dict:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.full_state_dict()}

    def load(self, whole, folder=None) -> None:
        self.module.load_state_dict(whole["module"])
        if folder is None:
            self.optimizer.load_full_state_dict(whole["optimizer"])
        else:
            self.optimizer.load_sharded(folder)


class FullySharded:
    name = "fsdp"

    def __init__(self, process, seed=0):
        self.process, self.module = process, fully_shard(toy(seed))
        self.optimizer = adamw(trained_by(self.module))

    def step(self, step) -> None:
        self.optimizer.zero_grad()
        backward(self.module, step, self.process)
        self.module.finish_gradient_synchronization()
        self.optimizer.step()

    def save(self, folder) -> None:
        self.module.save_sharded(folder, self.optimizer)

    def whole(self) -> dict:
        return {
            "module": self.module.full_state_dict(),
            "optimizer": self.module.gather_optimizer_state(self.optimizer),
        }

    def load(self, whole, folder=None) -> None:
        if folder is None:
            self.module.load_full_state_dict(whole["module"])
            self.module.scatter_optimizer_state(self.optimizer, whole["optimizer"])
        else:
            self.module.load_sharded(folder, self.optimizer)


def saved(process: Process, folder: Path) -> None:
    """Ranks train and save."""
    for kind in (Zero1, FullySharded):
        run = kind(process)
        for step in FIRST:
            run.step(step)
        run.save(folder / kind.name)
        whole = run.whole()
        if process.rank == 0:
            torch.save(whole, folder / f"{kind.name}.pt")


def loaded(kind, process, folder) -> list:
    """The state loaded whole, and from pieces: whether it is what was saved, and the weights after the last steps."""
    whole = torch.load(folder / f"{kind.name}.pt")
    results = []
    for source in (None, folder / kind.name):
        run = kind(process, seed=5)
        run.load(whole, source)
        state = run.whole()  # on all ranks, to be compared before the module goes on
        is_same = process.rank != 0 or same(state, whole)
        for step in LAST:
            run.step(step)
        results.append((is_same, run.whole()["module"]))
    return results


def ranks(process: Process, folder: Path) -> dict:
    """Ranks load what others saved, and train on their own from the start too."""
    results = {}
    for kind in (Zero1, FullySharded):
        results[kind.name] = loaded(kind, process, folder)
        run = kind(process)
        for step in (*FIRST, *LAST):
            run.step(step)
        results[f"{kind.name}_from_start"] = run.whole()["module"]
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def results(folder):
    spawn(saved, 2, folder, device="cpu", timeout_s=TIME_LIMIT_S)
    return spawn(ranks, 3, folder, device="cpu", timeout_s=TIME_LIMIT_S)


def from_state(state) -> nn.Module:
    module = toy(seed=9)
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("name", ["zero1", "fsdp"])
def test_uneven_shares_equal_the_twin(results, name):
    assert difference(from_state(results[0][f"{name}_from_start"]), twin(3, optimizer=adamw)) < 1e-5


@pytest.mark.parametrize("name", ["zero1", "fsdp"])
def test_what_two_ranks_saved_is_loaded_by_three(results, folder, name):
    (whole_is_same, whole), (pieces_are_same, pieces) = results[0][name]
    assert whole_is_same
    assert pieces_are_same
    assert same(whole, pieces)
    plain = from_state(torch.load(folder / f"{name}.pt")["module"])
    assert difference(plain, twin(2, len(FIRST), optimizer=adamw)) < 1e-5
    assert difference(plain, from_state(whole)) > 1e-3  # it did train on


def test_zero1_is_loaded_by_one_process_and_by_the_plain_optimizer(results, folder):
    alone = Process(0, 0, 1, 1, torch.device("cpu"), "")
    whole = torch.load(folder / "zero1.pt")
    plain = from_state(whole["module"])
    optimizer = adamw(trained_by(plain))
    optimizer.load_state_dict(whole["optimizer"])
    for step in LAST:
        optimizer.zero_grad()
        backward(plain, step, alone)
        optimizer.step()
    for is_same, weights in loaded(Zero1, alone, folder):
        assert is_same
        assert difference(from_state(weights), plain) == 0


def test_a_fully_sharded_state_is_the_plain_optimizers(results, folder):
    """Of fully sharded training, rank 0's whole state continues in one process as ZeRO-1's does."""
    fully, other = (torch.load(folder / f"{name}.pt") for name in ("fsdp", "zero1"))
    assert fully["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    assert fully["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for index, state in other["optimizer"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(fully["optimizer"]["state"][index][key], value, atol=1e-6, rtol=1e-4)
