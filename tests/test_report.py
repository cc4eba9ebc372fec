import json
import re
import types
from pathlib import Path

import nbformat
import pytest

from lmsys import records, report
from lmsys.records import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def test_the_report_lists_notebooks_that_are_there():
    assert set(report.listed()) <= set(report.titles()) == {path.stem for path in NOTEBOOKS}
    assert len(set(report.listed())) == len(report.listed())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stripped_and_parameterized(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata.tags
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    assert all(len(cell.source.splitlines()) <= 40 for cell in code[1:])
    parameters: dict = {}
    exec(code[0].source, parameters)
    assert parameters["scale"] == "auto" and parameters["machine"] is None


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="unknown notebook 'x'"):
        report.run_notebook("x")
    with pytest.raises(ValueError, match="unknown notebook 'x'"):
        report.run_notebooks(["pipeline", "x"])


def test_committed_notebooks_and_stamps_are_clean():
    """What is committed of the reference machines holds no traceback and no path of the machine it ran on."""
    for path in (REPOSITORY / "book").glob("h200*/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert outputs and all(output.output_type != "error" for output in outputs), path
        text = "".join(output.text for output in outputs if output.output_type == "stream")
        assert not re.search(r"\s/(?:root|home|tmp|opt|work)/", f" {text}"), path
        assert "papermill" not in notebook.metadata
    for path in (REPOSITORY / "artifacts").glob("h200*/*.csv"):
        stamp = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert stamp["environment"]["gpu"] == "NVIDIA H200", path


def test_the_site_is_told_what_an_image_shows(tmp_path):
    metadata = {"image/png": {"alt": "a curve"}, "image/svg+xml": {"alt": "a line"}}
    image = nbformat.v4.new_output("display_data", data={"image/png": "aGk="}, metadata=metadata)
    plain = nbformat.v4.new_output("display_data", data={"text/plain": "x"})
    cells = [nbformat.v4.new_code_cell("1", outputs=[plain, image]), nbformat.v4.new_code_cell("2", outputs=[plain])]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    report._clean(path)
    first, second = nbformat.read(path, as_version=4).cells
    assert first.metadata.mystnb.image.alt == "a curve; a line" and "mystnb" not in second.metadata


def test_printed_paths_lose_what_is_of_one_machine():
    home, repository = Path.home(), REPOSITORY
    text = f"/opt/lib/site-packages/torch/x.py:1: W\n  {repository}/lmsys/a.py '{home}/.cache/b' {home}body /tmp/x"
    assert report.without_paths(text) == f"torch/x.py:1: W\n  lmsys/a.py '~/.cache/b' {home}body /tmp/x"
    assert report.without_paths(f"resuming from {records.output_path('runs/a')}") == "resuming from runs/a"


def test_of_a_progress_bar_the_end_is_kept(tmp_path):
    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    outputs = [
        stream("stderr", text)
        for text in ("a warning\n", "\rtraining: 0%", "\rtraining: 50%", "\rtraining: 100%\n", "\r")
    ]
    outputs += [stream("stdout", "[plan] 3\n"), stream("stderr", "\r1 of 2"), stream("stderr", "\r2 of 2\r\n")]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs)]), path)
    report._clean(path)
    (cell,) = nbformat.read(path, as_version=4).cells
    texts = [(output.name, output.text) for output in cell.outputs]
    assert texts == [("stderr", "a warning\ntraining: 100%\n\r"), ("stdout", "[plan] 3\n"), ("stderr", "2 of 2\r\n")]


@pytest.mark.parametrize(
    "visit,start",
    [(report._inline_formula, "<math "), (report._displayed_formula, "<div style='margin: 1em 0'><math ")],
)
def test_formulas_are_mathml(visit, start):
    from docutils import nodes

    translator = types.SimpleNamespace(body=[])
    with pytest.raises(nodes.SkipNode):
        visit(translator, nodes.math("", r"\sqrt{\frac{s}{w o}}"))
    (written,) = translator.body
    assert written.startswith(start) and "<msqrt>" in written and "<mfrac>" in written
