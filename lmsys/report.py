"""The report: notebooks executed by papermill, and the site that jupyter-book builds from them.

As a Sphinx extension (named in _config.yml) this module writes formulas as MathML; lmsys.values fills in the numbers.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmsys import records, values
from lmsys.config import shortened, unknown_name
from lmsys.records import HEADLINE_MACHINE


class NotebookError(RuntimeError):
    """A notebook that failed: which cell, its error, and where what ran is. exit_code: 2 for a user's mistake, else 1."""

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
    """Take papermill's own metadata and the paths of this machine out of an executed notebook; tell the site what its images show."""
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
    """Printed text with paths as anyone has them: of packages from their names on, of this repository, where results go, and the home folder
    from there."""
    text = re.sub(r"(?<![^\s'\"(])/\S*?/(?:site|dist)-packages/", "", text)
    for folder in (records.REPOSITORY, records.output_root()):
        text = text.replace(f"{folder}/", "")
    return re.sub(rf"{re.escape(str(Path.home()))}(?=/|\b)", "~", text) if Path.home() != Path("/") else text


def take_parameters(
    function: Callable, namespace: Mapping[str, Any], also: Sequence[str] = ("machine",)
) -> dict[str, Any]:
    """A notebook's parameters, as arguments of a function of the package.

    Args:
        function: its argument names are the parameters that the notebook may be given.
        namespace: the notebook's globals().
        also: parameters that the notebook uses by itself.
    Raises:
        ValueError: papermill was given a parameter that the function does not have.
    """
    known = list(inspect.signature(function).parameters)
    for source in namespace.get("In", ()):
        if source.startswith("# Parameters"):  # the cell that papermill injects
            for statement in ast.parse(source).body:
                for target in getattr(statement, "targets", ()):
                    if target.id not in (*known, *also):
                        raise unknown_name("notebook parameter", target.id, [*known, *also])
    return {name: namespace[name] for name in known if name in namespace}


def show(settings: Any) -> Any:
    """A config dataclass as what a notebook displays: a Markdown table, a line for each setting or section."""
    from IPython.display import Markdown

    def text(value: Any) -> str:
        if dataclasses.is_dataclass(value):
            pairs = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
            return ", ".join(f"{name} {text(item)}" for name, item in pairs if item is not None)
        if isinstance(value, tuple):  # of values, or of options, each of them pairs
            return ", ".join(f"`{records.option_text(item) if isinstance(item, tuple) else item}`" for item in value)
        return f"`{value}`"

    values = [(field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings)]
    lines = [{"setting": name, "value": text(value)} for name, value in values if value is not None]
    return Markdown(records.markdown_table(lines))


def say(sentences: Iterable[str]) -> None:
    """Display sentences as a list."""
    from IPython.display import Markdown, display

    display(Markdown("\n".join(f"- {sentence}" for sentence in sentences)))


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
    """Sphinx's entry: fill the marked places of each page as it is read, and write formulas as MathML.

    Browsers draw MathML by themselves; Sphinx's own renderer loads a script from a foreign server when a page is read. Pages with marked
    places are read in every build, as what fills them changes without them.
    """

    def outdated(app, env, added, changed, removed) -> list[str]:
        pages = {name: Path(env.doc2path(name)) for name in env.found_docs}
        return [
            name for name, path in pages.items() if path.suffix == ".md" and "<!-- fill: " in path.read_text("utf-8")
        ]

    def source_read(app, docname: str, source: list[str]) -> None:
        source[0] = re.sub(r"<!-- fill: (\w+) -->", lambda match: fill(match[1]), source[0])

    app.connect("env-get-outdated", outdated)
    app.connect("source-read", source_read)
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


def fill(name: str) -> str:
    """The Markdown of one marked place: of FILLS, or of the chapters on the assignment."""
    from lmsys import chapters

    fills = FILLS | chapters.FILLS
    if name not in fills:
        raise unknown_name("fill", name, fills)
    return fills[name]()


def _artifact(name: str) -> Path:
    return records.REPOSITORY / "artifacts" / HEADLINE_MACHINE / name


def _stamp(name: str) -> dict[str, Any]:
    return json.loads(_artifact(f"{name}.json").read_text(encoding="utf-8"))


def _missing(name: str) -> str:
    return f"*Not measured yet: artifacts/{HEADLINE_MACHINE}/{name}.csv is not there.*"


def attention_headline() -> str:
    """The kernels at the longest causal square tier: time, TFLOP/s and memory, forward and backward."""
    name = "attention_sweep_results"
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    frame = _tiers(name)
    frame = frame[frame.causal & (frame.q_len == frame.k_len)]
    if frame.empty:
        return _missing(name)
    frame = frame[frame.q_len == frame.q_len.max()]
    forward = frame[frame["pass"] == "forward"].set_index("series")
    backward = frame[frame["pass"] == "backward"].set_index("series")
    first = frame.iloc[0]
    lines = []
    for series, row in forward.sort_values("median_ms").iterrows():
        line = {
            "kernel": _series(series),
            "forward": _time(row),
            "tflops": _number(row.tflops, row),
            "peak": _number(row.peak_mib, row),
        }
        if series in backward.index:
            line |= {
                "backward": _time(backward.loc[series]),
                "btflops": _number(backward.loc[series].tflops, backward.loc[series]),
            }
        lines.append(line)
    columns = {"kernel": "kernel", "forward": "forward, ms", "tflops": "TFLOP/s", "peak": "peak MiB"}
    if len(backward):
        columns |= {"backward": "backward, ms", "btflops": "TFLOP/s"}
    caption = (
        f"Causal attention on {_gpu(name)}: batch {first.batch}, {first.heads} heads, head_dim {first.head_dim}, "
        f"{first.q_len:,} tokens, {first['dtype']}; medians of up to {int(forward.samples.max())} runs with the 20th and 80th percentile."
    )
    return f"{caption}\n\n{records.markdown_table(lines, columns)}".rstrip()


def _tiers(name: str):
    """The rows of the sweep's tiers, with the column series."""
    from lmsys.bench import standings

    return standings.with_series(standings.of_group(records.read_results(_artifact(f"{name}.csv")), "tiers"))


def _series(series: str) -> str:
    kernel, _, path = series.partition(" ")
    return f"`{kernel}` {path}".rstrip()


def attention_standings() -> str:
    """Our kernels against each peer: ratios over the grid, and the bars they are held to."""
    from lmsys.bench import standings

    name = "attention_sweep_results"
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    rows = standings.standings(records.read_results(_artifact(f"{name}.csv")))
    if not rows:
        return _missing(name)
    caption = f"The peer's time over ours on {_gpu(name)}: above 1, ours is faster."
    return f"{caption}\n\n{standings.table(rows)}".rstrip()


def attention_throughput() -> str:
    """TFLOP/s forward / backward of each kernel at 1,024, 4,096 and 16,384 tokens."""
    from lmsys.bench import standings

    name = "attention_sweep_results"
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    frame = standings.of_group(records.read_results(_artifact(f"{name}.csv")), "throughput")
    frame = standings.with_series(frame[frame.q_len.isin((1024, 4096, 16384))])
    if frame.empty:
        return _missing(name)
    lines = []
    for (head_dim, causal, length), points in frame.groupby(["head_dim", "causal", "q_len"]):
        line = {"head_dim": head_dim, "causal": "yes" if causal else "no", "tokens": f"{length:,}"}
        for series, rows in points.groupby("series", sort=False):
            passes = rows.set_index("pass")
            shown = [_number(passes.loc[which].tflops, passes.loc[which]) or "-" for which in passes.index]
            line[_series(series)] = " / ".join(shown)
        lines.append(line)
    caption = f"TFLOP/s, {' / '.join(dict.fromkeys(frame['pass']))}, on {_gpu(name)}."
    return f"{caption}\n\n{records.markdown_table(lines)}".rstrip()


def attention_accuracy() -> str:
    """The accuracy sweep: what it shows, and its summary."""
    from lmsys.bench import accuracy

    name = accuracy.NAME
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    frame = records.read_results(_artifact(f"{name}.csv"))
    return "\n\n".join([" ".join(accuracy.conclusions(frame)), accuracy.table(frame)]).rstrip()


def attention_leaderboard() -> str:
    """The course's 2025 board."""
    from lmsys.bench import leaderboard

    name = leaderboard.NAME
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    frame = records.read_results(_artifact(f"{name}.csv"))
    frame = frame[frame.board.astype(str) == leaderboard.BOARD]
    return "\n\n".join([" ".join(leaderboard.conclusions(frame)), leaderboard.table(frame)]).rstrip()


def _time(row) -> str:
    return records.spread(row.median_ms, row.p20_ms, row.p80_ms) if row.status == "ok" else str(row.status)


def _number(value: float, row) -> str:
    return f"{value:,.0f}" if row.status == "ok" else ""


def _gpu(name: str) -> str:
    gpu = _stamp(name)["environment"].get("gpu") or "a CPU"
    return f"an {gpu}" if gpu.startswith("NVIDIA") else gpu


def tiled_torch() -> str:
    """What tiles cost in plain PyTorch: time and memory beside naive attention and the Triton kernel."""
    name = "attention_sweep_results"
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    frame = _tiers(name)
    frame = frame[frame.causal & (frame.q_len == frame.k_len) & (frame["pass"] == "forward") & (frame.status == "ok")]
    kernels = {
        "scaled_dot_prod_attention": "naive",
        "flash_attention_torch": "tiled PyTorch",
        "flash_attention_triton": "Triton",
    }
    lines = []
    for length, group in frame.groupby("q_len"):
        rows = group.set_index("series")
        there = {name: short for name, short in kernels.items() if name in rows.index}
        times = {f"{short}, ms": records.significant(rows.median_ms[name]) for name, short in there.items()}
        peaks = {f"{short}, MiB": f"{rows.peak_mib[name]:,.0f}" for name, short in there.items()}
        lines.append({"tokens": f"{length:,}"} | times | peaks)
    return records.markdown_table(lines).rstrip()


def pipeline_headline() -> str:
    """What the reference pipeline run reached."""
    name = "pipeline_metrics"
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    frame = records.read_results(_artifact(f"{name}.csv"))
    parameters = _stamp(name)["parameters"]
    valid, last = frame.valid_loss.dropna(), frame.iloc[-1]
    sentence = (
        f"On {_gpu(name)}, with the kernel `{parameters['train']['attention_kernel']}`: {int(last.tokens):,} tokens in "
        f"{last.elapsed_s:,.0f} s, a median of {frame.tokens_per_s.median():,.0f} tokens/s"
    )
    if frame.mfu.notna().any():
        sentence += f" ({100 * frame.mfu.median():.1f}% MFU)"
    return (
        sentence
        + f"; validation loss {valid.iloc[0]:.3f} at the first evaluation, {valid.min():.3f} at its best, {valid.iloc[-1]:.3f} at the end."
    )


def tokenizer_headline() -> str:
    """The tokenizer beside its peers."""
    name = "tokenizer_benchmark_results"
    if not _artifact(f"{name}.csv").exists():
        return _missing(name)
    frame = records.read_results(_artifact(f"{name}.csv"))
    lines = [
        {
            "task": row.task,
            "implementation": f"`{row.implementation}`",
            "workers": row.workers,
            "text_mb": f"{row.text_mb:,.0f}",
            "seconds": records.spread(row.seconds, row.p20_s, row.p80_s),
            "mb_per_s": records.significant(row.mb_per_s),
            "peak_mib": f"{row.peak_mib:,.0f}",
        }
        for row in frame[frame.status == "ok"].itertuples()
    ]
    columns = {"task": "task", "implementation": "implementation", "workers": "workers"}
    return records.markdown_table(
        lines, columns | {"text_mb": "text, MB", "seconds": "seconds", "mb_per_s": "MB/s", "peak_mib": "peak MiB"}
    ).rstrip()


def environment() -> str:
    """Where the reference results were measured."""
    name = "attention_sweep_results"
    if not _artifact(f"{name}.json").exists():
        return _missing(name)
    stamp = _stamp(name)["environment"]
    labels = {
        "gpu": "GPU",
        "driver": "driver",
        "cuda": "CUDA",
        "torch": "PyTorch",
        "triton": "Triton",
        "cudnn": "cuDNN",
        "cpu": "CPU",
        "clock_sm": "SM clock, as found",
        "clock_sm_max": "SM clock, highest",
        "power_limit": "power limit",
        "date": "date",
    }
    lines = [{"what": label, "value": stamp[key]} for key, label in labels.items() if stamp.get(key)]
    lines.append({"what": "commit", "value": f"`{(stamp['git']['commit'] or 'unknown')[:12]}`"})
    return records.markdown_table(lines, {"what": "what", "value": HEADLINE_MACHINE}).rstrip()


SCALING_MACHINES = ("h200-x8", "h200-x4", "h200-x2")  # of those measured, the first is shown


def training_leaderboard() -> str:
    """The course's 2026 board, of the machine with several GPUs that measured it."""
    from lmsys.bench import board_2026, leaderboard

    for machine in reversed(SCALING_MACHINES):
        folder = records.REPOSITORY / "artifacts" / machine
        if (folder / f"{leaderboard.NAME}.csv").exists():
            frame = leaderboard.read(folder, board_2026.BOARD)
            if len(frame):
                said = [board_2026.conclusions(frame)[0], leaderboard.public(board_2026.BOARD).strip()]
                return f"{' '.join(said)}\n\n{board_2026.table(frame)}".rstrip()
    return f"*Not measured yet: artifacts/{SCALING_MACHINES[-1]}/{leaderboard.NAME}.csv has no rows of the 2026 board.*"


def step_headline() -> str:
    """The trainer's step with and without its options beside PyTorch's own, and where to read on."""
    from lmsys.bench import train_step

    if not _artifact(f"{train_step.NAME}.csv").exists():
        return _missing(train_step.NAME)
    frame = records.read_results(_artifact(f"{train_step.NAME}.csv"))
    frame = frame[(frame.status == "ok") & frame.option.isin((train_step.ALL, train_step.NONE))]
    lines = []
    for size, rows in frame.groupby("size", sort=False):
        peer = rows[rows.implementation == train_step.PEER]
        for row in rows.sort_values("step_ms").itertuples():
            lines.append(
                {
                    "size": size,
                    "step": train_step.label(row.implementation, row.option),
                    "ms": records.spread(row.step_ms, row.p20_ms, row.p80_ms),
                    "mfu": "" if math.isnan(row.mfu) else f"{row.mfu:.1%}",
                    "speed": f"{peer.step_ms.iloc[0] / row.step_ms:.2f}" if len(peer) else "",
                    "peak": f"{row.peak_mib:,.0f}",
                }
            )
    columns = {"size": "model", "step": "step", "ms": "ms", "mfu": "MFU", "speed": "times PyTorch's speed"}
    first = frame.iloc[0]
    parts = [
        f"The same model, batch and AdamW on {_gpu(train_step.NAME)}, {first.context_length:,} tokens a sequence, {first['dtype']}: our "
        "trainer's step, and PyTorch's (its attention, `torch.compile` of the whole model, its fused AdamW).",
        records.markdown_table(lines, columns | {"peak": "peak MiB"}).rstrip(),
    ]
    if (records.REPOSITORY / "book" / HEADLINE_MACHINE / "train_step.ipynb").exists():
        parts.append(f"What each option brings: []({HEADLINE_MACHINE}/train_step.ipynb).")
    return "\n\n".join(parts)


def race_headline() -> str:
    """Time to the same loss, naive and ours, of the machine that ran most arms; its figure, and where to read on."""
    from lmsys.bench import race

    for machine in (*reversed(SCALING_MACHINES), HEADLINE_MACHINE):
        folder = records.REPOSITORY / "artifacts" / machine
        if not (folder / f"{race.NAME}.csv").exists():
            continue
        frame = records.read_results(folder / f"{race.NAME}.csv")
        parts = [" ".join(race.conclusions(frame)), race.table(frame).rstrip()]
        if (folder / "race_loss.png").exists():
            parts.append(f"![Validation loss against seconds and against tokens](../artifacts/{machine}/race_loss.png)")
        if (records.REPOSITORY / "book" / machine / "race.ipynb").exists():
            parts.append(f"How it was run: []({machine}/race.ipynb).")
        return "\n\n".join(parts)
    return f"*Not measured yet: artifacts/{SCALING_MACHINES[-1]}/{race.NAME}.csv is not there.*"


def scaling_headline() -> str:
    """Data parallelism on the most GPUs measured: tokens a second and the share of linear scaling, and where to read on."""
    machine = _scaling_machine()
    if machine is None:
        return f"*Not measured yet: artifacts/{SCALING_MACHINES[-1]}/lm_matrix_results.csv is not there.*"
    frame = _scaling_rows(machine)
    several = frame[frame.gpus == frame.gpus.max()]
    lines = {}
    for row in several.itertuples():
        line = lines.setdefault(row.wrapper, {"wrapper": f"`{row.wrapper}`"})
        line[f"{row.size}, ms"] = records.spread(row.step_ms, row.p20_ms, row.p80_ms)
        line[f"{row.size}, of linear"] = f"{100 * row.scaling_efficiency:.1f}%"
    columns = {key: key for line in lines.values() for key in line}
    first = frame.iloc[0]
    caption = f"A training step on {frame.gpus.max()} x {first.device}, {first['dtype']}; one GPU is measured in the same run."
    return f"{caption}\n\n{records.markdown_table(lines.values(), columns)}".rstrip()


def captured_headline() -> str:
    """The same with the step as one CUDA graph, in sentences; empty where it was not measured."""
    from lmsys.bench import data_parallel

    machine = _scaling_machine()
    path = records.REPOSITORY / "artifacts" / str(machine) / f"{data_parallel.NAME}.csv"
    frame = records.read_results(path) if machine and path.exists() else None
    if frame is None or "captured" not in set(frame.study):
        return ""
    said = "\n".join(f"- {sentence}" for sentence in data_parallel.conclusions(frame, "captured"))
    return (
        f"With forward pass, backward pass and communication as one CUDA graph, which no slow host holds up:\n\n{said}"
    )


def scaling_figure() -> str:
    """The speed-up over one GPU as a figure of the book, and links to the notebooks that were executed there."""
    machine = _scaling_machine()
    if machine is None:
        return ""
    names = ("lm_matrix", "data_parallel", "sharding")
    executed = [name for name in names if (records.REPOSITORY / "book" / machine / f"{name}.ipynb").exists()]
    links = ", ".join(f"[]({machine}/{name}.ipynb)" for name in executed)
    figure = f"![Speed-up over one GPU](../artifacts/{machine}/lm_matrix_speedup.png)"
    return f"{figure}\n\nRead on: {links}." if links else figure


def _scaling_machine() -> str | None:
    """The machine of the most GPUs whose LM matrix was measured."""
    folder = records.REPOSITORY / "artifacts"
    return next((name for name in SCALING_MACHINES if (folder / name / "lm_matrix_results.csv").exists()), None)


def _scaling_rows(machine: str):
    """What was measured, at the kernel that each size was measured with first."""
    frame = records.read_results(records.REPOSITORY / "artifacts" / machine / "lm_matrix_results.csv")
    frame = frame[frame.status == "ok"]
    return frame[frame.kernel == frame.groupby("size").kernel.transform("first")]


# Sections of the front page that are there once they have been measured, and the fills that make them.
_SECTIONS = {
    "A training step": ("step_headline",),
    "Time to the same loss": ("race_headline",),
    "Several GPUs": ("scaling_headline", "captured_headline", "scaling_figure"),
    "A training step of eight billion parameters": ("training_leaderboard",),
}


def more_results() -> str:
    """The sections that have been measured; those that have not are named in a line."""
    parts, missing = [], []
    for title, names in _SECTIONS.items():
        content = "\n\n".join(filter(None, (FILLS[name]() for name in names)))
        if content.startswith("*Not measured yet"):
            missing.append(title[0].lower() + title[1:])
        else:
            parts.append(f"## {title}\n\n{content}")
    if missing:
        parts.append(f"*Not measured yet on H200s, with notebooks that are ready to: {', '.join(missing)}.*")
    return "\n\n".join(parts)


def assignment_table() -> str:
    """The problems of the course's assignment and their answers."""
    from lmsys import assignment

    return assignment.table()


FILLS: dict[str, Callable[[], str]] = {
    "assignment_table": assignment_table,
    "scaling_headline": scaling_headline,
    "captured_headline": captured_headline,
    "scaling_figure": scaling_figure,
    "attention_headline": attention_headline,
    "attention_standings": attention_standings,
    "attention_throughput": attention_throughput,
    "attention_accuracy": attention_accuracy,
    "attention_leaderboard": attention_leaderboard,
    "training_leaderboard": training_leaderboard,
    "pipeline_headline": pipeline_headline,
    "step_headline": step_headline,
    "race_headline": race_headline,
    "more_results": more_results,
    "tiled_torch": tiled_torch,
    "tokenizer_headline": tokenizer_headline,
    "environment": environment,
}
