import html
import json
import re

import pandas as pd
import pytest

from lmsys import assignment, records, report
from lmsys.assignment import PROBLEMS
from lmsys.bench import model, precision, profile

REPOSITORY = records.REPOSITORY


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    """A repository without results; write(machine, name, rows) adds some."""
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)

    def write(machine, name, rows):
        path = tmp_path / "artifacts" / machine / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        empty = dict.fromkeys(records.SCHEMAS[name])
        pd.DataFrame([empty | row for row in rows]).to_csv(path, index=False)

    return write


def answer(name):
    return assignment.answer(next(problem for problem in PROBLEMS if problem.name == name))


def test_points_are_those_of_the_handouts():
    """The sums of both handouts' problems; the 2025 board was optional."""
    assert {edition: assignment.points(edition) for edition in assignment.EDITIONS} == {"2025": 107, "2026": 137}
    names = [problem.name for problem in PROBLEMS]
    assert len(set(names)) == len(names)
    both = [problem for problem in PROBLEMS if None not in problem.points]
    assert all(problem.points[0] == problem.points[1] for problem in both)


def test_what_a_problem_names_is_there():
    for problem in PROBLEMS:
        assert problem.parts or problem.code
        assert all((REPOSITORY / name).exists() for name in problem.code), problem.name
        for part in problem.parts:
            assert part.notebook is None or part.notebook in report.titles()


def test_without_results_each_problem_names_what_brings_them(artifacts):
    for problem in PROBLEMS:
        text = assignment.answer(problem)
        for part in problem.parts:
            if part.notebook is not None:
                assert f"Not measured yet; `python -m lmsys report {part.notebook} --scale full --machine h200" in text
        assert text
    assert "h200-x2` measures it" in answer("fsdp_accounting")
    assert assignment.table().count("\n") == len(PROBLEMS) + 2


def test_measured_numbers_reach_the_table(artifacts, tmp_path):
    point = dict.fromkeys(model.EXTRA_COLUMNS) | {"kernel": "vectorized_torch", "device": "GPU X", "status": "ok"}
    point |= {
        "size": "small",
        "context_length": 512,
        "batch": 4,
        "dtype": "fp32",
        "compiled": "no",
        "warmup": 5,
    }
    rows = [
        point | {"mode": mode, "mean_ms": ms, "std_ms": 0.5, "median_ms": ms}
        for mode, ms in (("forward", 10.0), ("forward_backward", 31.0))
    ]
    rows.append(rows[1] | {"dtype": "bf16", "mean_ms": 20.0})
    artifacts("h200", "model_benchmark_results", rows)
    artifacts(
        "h200",
        "model_benchmark_warmup",
        [rows[1] | {"step": i, "time_ms": ms} for i, ms in enumerate((900.0, 12.0, 10.0, 11.0))],
    )
    text = answer("benchmarking_script")
    assert (
        "small 10.0 ± 0.50 and 21.0 ms" in text
        and "(small, 512 tokens, fp32, forward and backward), which takes 900 ms; the second takes 12.0 ms and the later ones 10.5 ms"
        in text
    )
    assert "Not measured" not in text
    assert "report model_benchmark" in answer("torch_compile")  # no compiled point in these rows
    assert "(c) Forward and backward in bf16, times as fast as in fp32 at 512 tokens: small 1.55." in answer(
        "benchmarking_mixed_precision"
    )

    step = {"study": "wrappers", "size": "xl", "gpus": 2, "status": "ok"}
    artifacts(
        "h200-x4",
        "data_parallel_results",
        [step | {"wrapper": "naive", "gpus": 4, "step_ms": 1.0, "exposed_comm_ms": 0.5}],
    )
    rows_of_naive = [step | {"wrapper": "naive", "step_ms": 200.0, "exposed_comm_ms": 50.0}]
    artifacts("h200-x2", "data_parallel_results", rows_of_naive)
    assert "`naive`, xl on 2 GPUs: 200 ms a step, of which communication adds 50.00 ms (25.0%)." in answer(
        "naive_ddp_benchmarking"
    )
    assert "Not measured yet" in answer("minimal_ddp_flat_benchmarking")  # the file is there, the wrapper is not
    within = step | {"wrapper": "flat", "step_ms": 200.0, "p20_ms": 190.0, "p80_ms": 220.0, "exposed_comm_ms": 14.0}
    artifacts("h200-x2", "data_parallel_results", [*rows_of_naive, within])
    assert "200 ms a step; what communication adds does not show" in answer("minimal_ddp_flat_benchmarking")

    boards = [
        {"board": "2025", "implementation": n, "status": "ok", "median_ms": ms, "path": path}
        for n, ms, path in (("b", 5.0, None), ("a", 4.0, "hopper"))
    ]
    artifacts("h200", "leaderboard_results", boards)
    assert answer("leaderboard (attention)") == "`a` (hopper path) 4.00 ms; `b` 5.00 ms."
    assert answer("leaderboard (training step)").startswith("Not measured yet")

    executed = tmp_path / "book" / "h200-x2" / "data_parallel.ipynb"
    executed.parent.mkdir(parents=True)
    executed.write_text(json.dumps({}))
    row = next(line for line in assignment.table().splitlines() if "(25.0%)" in line)
    assert row.startswith("| naive\\_<wbr>ddp\\_<wbr>benchmarking | 3 | 3 | `naive`, xl on 2 GPUs")
    assert row.endswith("*In* [data_parallel](h200-x2/data_parallel.ipynb). |")


def test_answers_of_whole_experiments(artifacts, tmp_path):
    folder = tmp_path / "artifacts" / "h200"
    profile.run(profile.settings("smoke", contexts=[8], device="cpu"), folder)
    precision.run(precision.settings("smoke"), folder)
    text = answer("nsys_profile")
    assert all(f"({letter}) tiny, 8 tokens, fp32" in text for letter in "abcde")
    assert "The truth is" in answer("mixed_precision_accumulation")
    assert "(a) " in answer("benchmarking_mixed_precision") and "(b) " in answer("benchmarking_mixed_precision")


def test_long_code_may_break():
    """Names that would set the width of a table's column break after underscores; short ones stay as they are."""
    name = "elementwise_kernel<4, array<char*, 2> >"
    assert assignment.breakable("a `short_name` b") == "a `short_name` b"
    made = assignment.breakable(f"a `{name}` b")
    assert made == (
        'a <code class="docutils literal">elementwise&#95;<wbr>kernel&lt;4,<wbr> array&lt;char&#42;,<wbr> 2&gt; &gt;</code> b'
    )
    assert html.unescape(re.sub("<[^>]*>", "", made)) == f"a {name} b"


def test_calculated_answers_have_their_numbers(artifacts):
    """B W / C = 2^20 x 1.8e11 / 4.6e14 = 410.3; 3 F W / (2 C) = 31.3."""
    assert "up to 411 devices" in answer("data_parallel_calcs") and "up to 411 devices" in answer("fsdp_calcs")
    assert "up to 32 devices" in answer("tp_calcs")
    assert "up to 13,2" in answer("fsdp_tp_calcs")


def test_the_page_is_filled():
    page = (REPOSITORY / "book" / "assignment.md").read_text(encoding="utf-8")
    assert "<!-- fill: assignment_table -->" in page
    assert report.fill("assignment_table") == assignment.table()
