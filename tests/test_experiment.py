import json
import os
import subprocess
import sys

import pytest
import torch

from lmsys import records
from lmsys.bench import experiment
from lmsys.bench.experiment import Experiment, Measured, Notebook, Parameter, Parameters
from lmsys.bench.measure import failure

CELL = """scale = "auto"  # auto, smoke, cpu, full
machine: str = None
kernels: list[str] = None  # by name
causal: list[bool] = None
gpus: list[int] = None
rate: float = None  # of learning
steps = 3
device = "cpu"
"""
PRESETS = {"smoke": {"rate": 0.5, "kernels": ["a", "b"]}, "cpu": {"rate": 1.0}, "full": {"rate": 2.0}}


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A notebook in a repository of its own."""
    (tmp_path / "notebooks").mkdir()
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": CELL.splitlines(True)}
    (tmp_path / "notebooks" / "toy.ipynb").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    experiment.declared.cache_clear()
    toy = Notebook("toy")
    toy.__dict__["presets"] = PRESETS
    yield toy
    experiment.declared.cache_clear()


def test_parameters_are_read_from_the_notebooks_cell(notebook):
    declared = experiment.declared("toy")
    assert list(declared) == ["scale", "machine", "kernels", "causal", "gpus", "rate", "steps", "device"]
    assert declared["kernels"] == Parameter("kernels", "list[str]", None, "by name")
    p = notebook.parameters({"scale": "smoke", "steps": 5})
    assert (p.scale, p.kernels, p.rate, p.steps, p.machine) == ("smoke", ["a", "b"], 0.5, 5, None)
    assert p.is_given("steps") and not p.is_given("rate")
    with pytest.raises(ValueError, match="unknown notebook parameter 'step'. Did you mean 'steps'"):
        notebook.parameters({"step": 5})
    injected = {"In": ["", "# Parameters\nstep = 5\n"], "scale": "smoke", "other": 1}
    with pytest.raises(ValueError, match="unknown notebook parameter 'step'"):
        notebook.parameters(injected)
    assert notebook.parameters(injected | {"In": ["", "# Parameters\nsteps = 5\n"], "steps": 5}).steps == 5
    with pytest.raises(ValueError, match="unknown notebook 'toys'. Did you mean 'toy'"):
        experiment.declared("toys")


@pytest.mark.parametrize(
    ("annotation", "given", "wanted"),
    [
        ("list[bool]", "false", [False]),
        ("list[bool]", False, [False]),
        ("list[bool]", "true false", [True, False]),
        ("list[str]", "vectorized_torch", ["vectorized_torch"]),
        ("list[str]", "['a', 'b']", ["a", "b"]),
        ("list[int]", 2, [2]),
        ("list[int]", "1,2", [1, 2]),
        ("list[float]", [1, "2.5"], [1.0, 2.5]),
        ("bool", "True", True),
        ("int", "7", 7),
        ("float", 3, 3.0),
        ("str", 2025, "2025"),
        ("list[int]", "None", None),
    ],
)
def test_text_is_read_by_type(annotation, given, wanted):
    found = Parameter("name", annotation, None, "").read(given)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        ("bool", "no"),
        ("bool", 1),
        ("int", 2.5),
        ("int", True),
        ("int", "two"),
        ("list[int]", [1, "x"]),
        ("float", "1e"),
    ],
)
def test_what_cannot_be_read_names_the_parameter(annotation, given):
    with pytest.raises(ValueError, match="parameter causal is .*; it takes"):
        Parameter("causal", annotation, None, "").read(given)


# --- Runs -------------------------------------------------------------------------------------------

MEASURED = []


def measure(point, p):
    MEASURED.append((point["shape"], point["kernel"]))
    if point["kernel"] == "refuses":
        raise ValueError("takes no shape\nsecond line")
    if point["kernel"] == "large":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    if point["kernel"] == "breaks":
        raise RuntimeError("no kernel image")
    return Measured([{"time_ms": point["shape"] * 1.5}], {"toy_curve": [{"shape": point["shape"], "step": 1}]})


def relative(row, siblings):
    return {"ratio": row["time_ms"] / siblings[0]["time_ms"]} if siblings and "time_ms" in row else {}


TOY = Experiment(
    name="toy_results",
    columns=("kernel", "shape", "status", "time_ms", "ratio", "device", "note"),
    points=lambda p: [{"shape": shape, "kernel": kernel} for kernel in p.kernels for shape in (1, 2)],
    measure=measure,
    group=("shape",),
    tables={"toy_curve": ("shape", "step")},
    derive=relative,
)


def test_a_run_measures_groups_and_writes_rows_stamp_and_tables(notebook):
    MEASURED.clear()
    lines = []
    p = notebook.parameters({"scale": "smoke", "kernels": ["first", "refuses", "large", "breaks"]})
    frame = experiment.run(TOY, p, say=lines.append)
    assert [(shape, kernel) for shape in (1, 2) for kernel in ("first", "refuses", "large", "breaks")] == MEASURED
    assert list(frame.status) == ["ok"] * 2 + ["unsupported"] * 2 + ["oom"] * 2 + ["error"] * 2
    assert list(frame.note.dropna().unique()) == [
        "takes no shape",
        "CUDA out of memory. Tried",
        "RuntimeError: no kernel image",
    ]
    folder = records.artifacts_dir()
    stamp = json.loads((folder / "toy_results.json").read_text())
    assert stamp["parameters"]["kernels"] == p.kernels and len(stamp["environment"]["sources"]) == 64
    assert list(records.read_results(folder / "toy_curve.csv")["shape"]) == [1, 2]
    assert not list(folder.glob("*.partial.*")) and "8 points in 2 groups" in lines[0] and len(lines) == 9
    assert "[8/8, 0 s left] 2 breaks: error: RuntimeError" in lines[-1]
    experiment.run(TOY, p, say=lines.append)
    assert "in place of the results of" in lines[9]


def test_columns_that_compare_rows_of_a_group(notebook):
    frame = experiment.run(TOY, notebook.parameters({"scale": "smoke"}), say=lambda line: None)
    assert frame.set_index(["kernel", "shape"]).ratio.dropna().to_dict() == {("b", 1): 1.0, ("b", 2): 1.0}


def test_an_interrupted_run_goes_on_with_the_groups_that_are_missing(notebook):
    p = notebook.parameters({"scale": "smoke"})

    def cut(point, p):
        if (point["shape"], point["kernel"]) == (2, "b"):
            raise KeyboardInterrupt
        return measure(point, p)

    quiet = {"say": lambda line: None}
    MEASURED.clear()
    with pytest.raises(KeyboardInterrupt):
        experiment.run(experiment.dataclasses.replace(TOY, measure=cut), p, **quiet)
    journal = records.artifacts_dir() / "toy_results.partial.jsonl"
    journal.write_text(journal.read_text() + '{"point": "cut o')
    MEASURED.clear()
    frame = experiment.run(TOY, p, **quiet)
    assert MEASURED == [(2, "a"), (2, "b")] and len(frame) == 4 and not journal.exists()
    assert len(json.loads((journal.with_name("toy_results.json")).read_text())["went_on_from"]) == 1


def test_rows_of_other_parameters_are_put_aside_not_mixed(notebook):
    p = notebook.parameters({"scale": "smoke"})

    def cut(point, p):
        if point["shape"] == 2:
            raise KeyboardInterrupt
        return measure(point, p)

    with pytest.raises(KeyboardInterrupt):
        experiment.run(experiment.dataclasses.replace(TOY, measure=cut), p, say=lambda line: None)
    MEASURED.clear()
    experiment.run(TOY, notebook.parameters({"scale": "smoke", "rate": 0.25}), say=lambda line: None)
    assert len(MEASURED) == 4 and (records.artifacts_dir() / "toy_results.earlier.jsonl").exists()


def test_rows_of_the_earlier_results_can_stay(notebook):
    quiet = {"say": lambda line: None}
    experiment.run(TOY, notebook.parameters({"scale": "smoke", "kernels": ["a"]}), **quiet)
    p = notebook.parameters({"scale": "smoke", "kernels": ["b"]})
    frame = experiment.run(TOY, p, keep=lambda row: row["kernel"] not in p.kernels, **quiet)
    assert list(frame.kernel) == ["a", "a", "b", "b"]


def test_a_known_status_is_a_row_and_nothing_to_measure_is_refused(notebook):
    p = notebook.parameters({"scale": "smoke"})
    known = experiment.dataclasses.replace(
        TOY, points=lambda p: [{"shape": 1, "kernel": "a", "status": "unsupported", "note": "no GPU"}]
    )
    MEASURED.clear()
    frame = experiment.run(known, p, say=lambda line: None)
    assert not MEASURED and frame.note[0] == "no GPU" and frame.status[0] == "unsupported"
    with pytest.raises(ValueError, match="leave nothing to measure"):
        experiment.run(experiment.dataclasses.replace(TOY, points=lambda p: []), p)


def in_group(point, p, process):
    if point["kernel"] == "dies":
        os._exit(3)
    if point["kernel"] == "refuses":
        raise ValueError(f"rank {process.rank} refuses")
    return {"time_ms": float(process.world_size)} if process.rank == 0 else None


def test_points_in_processes_of_their_own(notebook):
    """A process that dies is its point's row; those after it go on in a new group."""
    p = notebook.parameters({"scale": "smoke", "kernels": ["a", "dies", "b"]})
    parallel = experiment.dataclasses.replace(
        TOY, measure=in_group, processes=lambda point, p: point["shape"], tables={}, group=(), derive=None
    )
    frame = experiment.run(parallel, p, say=lambda line: None)
    rows = frame.set_index(["kernel", "shape"])
    assert rows.loc["a"].time_ms.to_list() == [1.0, 2.0] and rows.loc["b"].time_ms.to_list() == [1.0, 2.0]
    assert set(rows.loc["dies"].status) == {"error"}


def test_one_rule_for_failures():
    assert failure(MemoryError())["status"] == "oom"
    assert failure(RuntimeError("DefaultCPUAllocator: can't allocate memory"))["status"] == "oom"
    assert failure(RuntimeError("rank 0 failed: torch.OutOfMemoryError: CUDA out of memory"))["status"] == "oom"
    assert failure(ValueError("x"))["status"] == "unsupported" and failure(KeyError("x"))["status"] == "error"


def test_every_notebook_declares_its_parameters():
    names = sorted(path.stem for path in (records.REPOSITORY / "notebooks").glob("*.ipynb"))
    for name in names:
        declared = experiment.declared(name)
        assert {"scale", "machine"} <= set(declared), name
        assert all(parameter.help for parameter in declared.values()), name


def test_parameters_pickle():
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).is_given('a'))"
    import pickle

    sent = pickle.dumps(Parameters(a=1, _given={"a"})).hex()
    done = subprocess.run([sys.executable, "-c", code, sent], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
