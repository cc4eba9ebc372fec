"""The registry of data-parallel wrappers: which name fits which number of processes."""

import pytest
from torch import nn

from lmsys.parallel import NAMES, WRAPPERS, check_wrapper, wrap


def test_wrapper_selection():
    module = nn.Linear(2, 2)
    check_wrapper("none", 1)
    assert wrap(module, "none") is module
    assert set(WRAPPERS) <= set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_wrappers_need_more_than_one_process(name):
    with pytest.raises(
        ValueError, match=f"'{name}' averages gradients .* needs more than one; this run has 1 .*torchrun"
    ):
        check_wrapper(name, 1)


def test_none_is_for_one_process():
    with pytest.raises(ValueError, match="'none' is for one process and this run has 2"):
        check_wrapper("none", 2)


def test_a_wrapper_of_another_version_is_said_to_be_missing():
    for name in set(NAMES) - set(WRAPPERS):
        with pytest.raises(ValueError, match=f"'{name}' is not in this version, which has: none"):
            check_wrapper(name, 2)


def test_unknown_names_list_the_known():
    with pytest.raises(
        ValueError, match=r"unknown ddp_wrapper 'flashdp'\. Did you mean 'flashddp'\? Known: none, naive"
    ):
        check_wrapper("flashdp", 1)
    with pytest.raises(ValueError, match="Known: none"):
        wrap(nn.Linear(2, 2), "zzz")
