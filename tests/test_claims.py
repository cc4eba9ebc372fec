"""The sentences of the pages that rank or judge, checked against the committed rows, spread included.

A page marks such a sentence with `<!-- claim: NAME -->`; the function NAME here says what the rows must show. When a new measurement breaks
one, the sentence has to be rewritten.
"""

import functools
import re

import pandas as pd
import pytest

from lmsys.records import REPOSITORY, within_spread

PAGES = [
    *(REPOSITORY / "book").glob("*.md"),
    *(REPOSITORY / "book" / "chapters").glob("*.md"),
    REPOSITORY / "README.md",
]
CHECKS = {}


def claim(check):
    CHECKS[check.__name__] = check
    return check


@functools.cache
def rows(name):
    return pd.read_csv(REPOSITORY / "artifacts" / f"{name}.csv")


def one(frame):
    (index,) = frame.index
    return frame.loc[index]


def ahead(fast, slow):
    """Whether one row is faster than another beyond their spread."""
    time = "step_ms" if "step_ms" in fast else "median_ms"
    return slow[time] > fast[time] and not within_spread(slow[time] - fast[time], fast, slow)


def alike(frame):
    """Whether no two rows differ beyond their spread."""
    listed = [row for _, row in frame.iterrows()]
    return not any(ahead(a, b) for a in listed for b in listed)


def fastest(frame, mask):
    """Whether the one row of the mask is ahead of all others."""
    return all(ahead(one(frame[mask]), row) for _, row in frame[~mask].iterrows())


def longest(which):
    sweep = rows("h200/attention_sweep_results").query("tier == 'XXL' and causal and `pass` == @which")
    return {name: one(sweep[(sweep.kernel == name) & (sweep.path != "portable")]) for name in sweep.kernel.unique()}


@claim
def attention_longest():
    forward, backward = longest("forward"), longest("backward")
    ours, theirs = forward.pop("flash_attention_triton"), backward.pop("flash_attention_4")
    assert all(ahead(ours, row) for row in forward.values())
    assert all(ahead(theirs, row) for row in backward.values())


def steps(size):
    frame = rows("h200/train_step_results").query("size == @size")
    return {row.option if row.implementation == "lmsys" else "PyTorch": row for _, row in frame.iterrows()}


@claim
def step_faster():
    for size in ("gpt2", "gpt2-medium"):
        step = steps(size)
        assert ahead(step["all"], step["PyTorch"]) and step["all"].peak_mib < step["PyTorch"].peak_mib


def race(arm):
    return rows("h200-x2/race_results").query("arm == @arm and valid_loss == valid_loss").set_index("step")


@claim
def race_faster():
    target = race("naive").valid_loss.iloc[-1]
    for arm, step in (("ours", 450), ("ours_ddp", 400)):
        assert race(arm).valid_loss[step] < target and race(arm).seconds[step] < race("naive").seconds.iloc[-1] / 3


@claim
def race_same_loss():
    for a, b in (("naive", "ours"), ("naive", "ours_ddp"), ("ours", "ours_ddp")):
        assert (race(a).valid_loss - race(b).valid_loss).abs().max() < 0.01


def matrix(size):
    return rows("h200-x2/lm_matrix_results").query("kernel == 'flash_attention_triton' and size == @size and gpus == 2")


UNSHARDED = ["naive", "flat", "overlap", "flashddp", "torch_ddp"]


@claim
def scaling_within_noise():
    assert alike(matrix("gpt2").query("wrapper in @UNSHARDED"))
    medium = matrix("gpt2-medium").query("wrapper in @UNSHARDED")
    assert alike(medium[medium.wrapper != "naive"]) and not alike(medium)


@claim
def fsdp_medium():
    frame = matrix("gpt2-medium")
    assert fastest(frame, frame.wrapper == "fsdp")


@claim
def captured_copy_engines():
    frame = rows("h200-x2/data_parallel_results").query(
        "study == 'captured' and gpus == 2 and wrapper in ('flashddp', 'torch_ddp')"
    )
    xl = frame[frame["size"] == "xl"]
    assert len(xl) == 3 and fastest(xl, xl.options.str.contains("copy_engine"))
    assert all(alike(frame[frame["size"] == size]) for size in ("gpt2", "gpt2-medium"))


@claim
def board_2026_faster():
    board = rows("h200-x2/leaderboard_results").query("board == 2026")
    assert fastest(board, board.implementation == "lmsys")


@claim
def tokenizer_faster():
    frame = rows("h200/tokenizer_benchmark_results")
    for task in ("train", "encode"):
        speeds = frame[(frame.task == task) & (frame.text_mb < 60)].set_index("implementation")
        others = speeds.drop("lmsys")
        assert (others.p20_s > speeds.p80_s["lmsys"]).all()
        assert task == "train" or others.filter(like="tiktoken", axis=0).seconds.idxmin() == "tiktoken encode"


def test_every_claim_of_a_page_has_a_check_and_every_check_a_page():
    claimed = set(re.findall(r"<!-- claim: (\w+) -->", "\n".join(page.read_text(encoding="utf-8") for page in PAGES)))
    assert claimed == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_claim_holds(name):
    CHECKS[name]()
