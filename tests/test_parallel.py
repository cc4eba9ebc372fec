"""The registry of data-parallel wrappers: which name fits which number of processes."""

import subprocess
import sys

import pytest
from torch import nn

from lmsys.config import TrainConfig
from lmsys.parallel import WRAPPERS, check_wrapper, drawn_as, wrap

MANY = [name for name in WRAPPERS if name != "none"]


def test_wrapper_selection():
    module = nn.Linear(2, 2)
    check_wrapper("none", 1)
    assert wrap(module, "none") is module
    assert MANY == ["naive", "flat", "overlap", "flashddp", "torch_ddp", "fsdp", "torch_fsdp2"]


@pytest.mark.parametrize("name", MANY)
def test_wrappers_need_more_than_one_process(name):
    check_wrapper(name, 2)
    with pytest.raises(
        ValueError, match=f"'{name}' averages gradients .* needs more than one; this run has 1 .*torchrun"
    ):
        check_wrapper(name, 1)


def test_none_is_for_one_process():
    with pytest.raises(ValueError, match="'none' is for one process and this run has 2.*use one of naive, flat"):
        check_wrapper("none", 2)


def test_the_registry_imports_no_torch():
    script = "import sys, lmsys.parallel; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_wrapper_says_what_it_takes_and_how_it_is_drawn():
    assert all(hasattr(TrainConfig, option) for wrapper in WRAPPERS.values() for option in wrapper.options)
    shown = [drawn_as(name) for name in (*WRAPPERS, "flashddp+zero1")]
    assert len({wrapper.colour for wrapper in shown}) == len({wrapper.label for wrapper in shown}) == len(shown)
    assert [name for name, wrapper in WRAPPERS.items() if wrapper.peer] == ["torch_ddp", "torch_fsdp2"]


def test_unknown_names_list_the_known():
    with pytest.raises(
        ValueError, match=r"unknown ddp_wrapper 'flashdp'\. Did you mean 'flashddp'\? Known: none, naive"
    ):
        check_wrapper("flashdp", 1)
    with pytest.raises(ValueError, match="Known: none"):
        wrap(nn.Linear(2, 2), "zzz")
