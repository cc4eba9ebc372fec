"""The report: notebooks executed by papermill, and the site that jupyter-book builds from them.

As a Sphinx extension (named in _config.yml) this module writes formulas as MathML; lmsys.values fills in the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmsys import records, values
from lmsys.config import shortened, unknown_name


class NotebookError(RuntimeError):
    """A notebook that failed: which cell, its error, where what ran is. exit_code: 2 for a user's mistake, else 1."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


# --- Notebooks ------------------------------------------------------------------------------------


def titles() -> dict[str, str]:
    """The notebooks by name, with the heading of each."""
    found = {}
    for path in sorted((records.REPOSITORY / "notebooks").glob("*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        found[path.stem] = first.partition("\n")[0].lstrip("# ")
    return found


def listed() -> list[str]:
    """The notebooks of the report, in order; the others run where they are named."""
    return (records.REPOSITORY / "notebooks" / "report.txt").read_text(encoding="utf-8").split()


def run_notebooks(names: Sequence[str], *, scale: str = "auto", machine: str | None = None) -> list[str]:
    """Execute notebooks one after the other, as they measure, and return the names of those that failed."""
    for name in names:
        _source(name)
    failed = []
    for name in names:
        try:
            run_notebook(name, parameters={"scale": scale}, machine=machine)
        except NotebookError as error:
            print(f"[{name}] {error}", file=sys.stderr)
            failed.append(name)
    return failed


def run_notebook(
    name: str,
    *,
    machine: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    target: Path | None = None,
) -> Path:
    """Execute notebooks/NAME.ipynb with papermill; what it prints is printed as it comes.

    Args:
        target: the executed notebook, which is replaced once it has succeeded; None: book/<machine>/NAME.ipynb.
    Raises:
        ValueError: unknown notebook. NotebookError: a cell failed, or the kernel died; what ran until then is in
            artifacts/<machine>/NAME.failed.ipynb.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    source = _source(name)
    folder = records.artifacts_dir(machine)
    target = records.book_dir(machine) / f"{name}.ipynb" if target is None else target
    running, failed = folder / f"{name}.running.ipynb", folder / f"{name}.failed.ipynb"
    start = time.perf_counter()
    print(f"[{name}] running ...", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="lmsys-") as sockets:
            # Files of this user alone in place of ports, which another kernel that starts now may take first.
            connection = {
                "connection_file": f"{sockets}/kernel.json",
                "transport": "ipc" if len(sockets) < 80 else "tcp",
            }
            papermill.execute_notebook(
                source,
                running,
                {**(parameters or {}), "machine": records.machine_tag(machine)},
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                shutdown_kernel="immediate",  # what it leaves is on disk: taking all its modules apart takes 1 to 2 s
                config=Config({"KernelManager": connection}),
            )
    except BaseException as error:  # Ctrl-C and SIGTERM, too
        place = os.path.relpath(_put_aside(running, failed))
        if isinstance(error, papermill.exceptions.PapermillExecutionError):
            text = " ".join(f"{error.ename}: {error.evalue}".split())
            message = f"cell [{error.exec_count}] of notebook {name} failed: {shortened(text, 500)}\n"
            raise NotebookError(f"{message}what ran is in {place}", 2 if error.ename == "ValueError" else 1) from None
        if isinstance(error, DeadKernelError):
            message = f"the kernel of notebook {name} died; was it killed, or out of memory?"
            raise NotebookError(f"{message}\nwhat ran is in {place}") from None
        raise
    _clean(running)
    os.replace(running, target)
    failed.unlink(missing_ok=True)
    print(f"[{name}] done in {time.perf_counter() - start:.0f} s: {os.path.relpath(target)}")
    return target


def _source(name: str) -> Path:
    path = records.REPOSITORY / "notebooks" / f"{name}.ipynb"
    if not path.exists():
        raise unknown_name("notebook", name, titles())
    return path


def _put_aside(running: Path, failed: Path) -> Path:
    """What ran of a notebook that did not end, cleaned."""
    if running.exists():
        _clean(running)
        os.replace(running, failed)
    return failed


def _clean(notebook: Path) -> None:
    """Take papermill's metadata and this machine's paths out of a notebook; tell the site what its images show."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("papermill", None)
    for cell in content.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        alternatives = []
        if cell.get("outputs"):
            cell.outputs = _merged(cell.outputs)
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = without_paths(output.text)
            about = output.get("metadata", {})
            alternatives += [
                about[kind]["alt"] for kind in ("image/png", "image/svg+xml") if "alt" in about.get(kind, {})
            ]
        if alternatives:  # which myst-nb reads of a cell, not of an output
            cell.metadata["mystnb"] = {"image": {"alt": "; ".join(alternatives)}}
    records.write_text(notebook, nbformat.writes(content) + "\n")


def _merged(outputs: Sequence[Any]) -> list[Any]:
    """Outputs with what one stream printed in a row as one, and of a progress bar what it showed last."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?=[^\n])", "", output.text)
    return found


def without_paths(text: str) -> str:
    """Printed text with paths as anyone has them: of packages from their names on, of this repository, where results
    go, and the home folder from there."""
    text = re.sub(r"(?<![^\s'\"(])/\S*?/(?:site|dist)-packages/", "", text)
    for folder in (records.REPOSITORY, records.output_root()):
        text = text.replace(f"{folder}/", "")
    return re.sub(rf"{re.escape(str(Path.home()))}(?=/|\b)", "~", text) if Path.home() != Path("/") else text


def show(config: Any) -> Any:
    """A config dataclass as what a notebook displays: a Markdown table, a line for each setting or section."""
    from IPython.display import Markdown

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {text(item)}" for name, item in value.items() if item is not None)
        return ", ".join(f"`{item}`" for item in (value if isinstance(value, tuple) else (value,)))

    values = dataclasses.asdict(config).items()
    return Markdown(records.markdown_table({"setting": name, "value": text(value)} for name, value in values))


# --- The site -------------------------------------------------------------------------------------


def build_site() -> Path:
    """Bring the README's numbers up to date and build the site; return its first page.

    Raises:
        OSError: jupyter-book failed; its output says why.
    """
    values.refresh_readme()
    book = records.REPOSITORY / "book"
    command = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"  # the package has no __main__
    done = subprocess.run(
        [sys.executable, "-c", command, "build", str(book), "--quiet"],
        cwd=records.REPOSITORY,
    )
    if done.returncode != 0:
        raise OSError(f"jupyter-book build book failed with exit code {done.returncode}")
    return book / "_build" / "html" / "index.html"


def setup(app) -> dict[str, Any]:
    """Sphinx's entry: formulas as MathML, which browsers draw by themselves; its own way loads a foreign script."""
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_displayed_formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline_formula(translator, node) -> None:
    """Sphinx's visitor of a formula in a line."""
    from docutils.nodes import SkipNode
    from docutils.utils.math.latex2mathml import tex2mathml

    translator.body.append(tex2mathml(node.astext()))
    raise SkipNode


def _displayed_formula(translator, node) -> None:
    """Sphinx's visitor of a formula on lines of its own."""
    from docutils.nodes import SkipNode
    from docutils.utils.math.latex2mathml import tex2mathml

    translator.body.append(f"<div style='margin: 1em 0'>{tex2mathml(node.astext(), as_block=True)}</div>")
    raise SkipNode
