"""The command line: help, and one clear line with exit code 2 for each bad input."""

import io
import os
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import papermill
import pytest

from lmsys import records, report
from lmsys.__main__ import main

COMMANDS = ["pipeline", "compare", "benchmark", "train", "generate", "attention-sweep", "bench-tokenizer", "report"]
SMOKE = ["pipeline", "--scale", "smoke"]


def fails(capsys, *arguments):
    """Run a command that must end with exit code 2 and one line; return the line."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith(f"lmsys {arguments[0]}: ")]
    assert len(lines) == 1 and error.splitlines()[-1] == lines[0] and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS)], ids=lambda command: " ".join(command) or "all"
)
def test_help(command, capsys):
    assert main([*command, "--help"]) == 0
    assert f"Usage: python -m lmsys {' '.join(command)}" in capsys.readouterr().out


def test_import_is_light():
    """`import lmsys` and the command's help import neither torch nor anything else that is slow."""
    code = "import sys, lmsys.__main__; sys.exit(bool({'torch', 'pandas', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        (b"", "is empty"),
        (b" \n", "white space"),
        (b"ab\xff", "not UTF-8"),
        (b"short text\nof two lines\n", ""),
    ],
    ids=["missing", "empty", "blank", "binary", "short"],
)
def test_bad_text_files(tmp_path, capsys, content, message):
    path = tmp_path / "my.txt"
    if content is not None:
        path.write_bytes(content)
    line = fails(capsys, *SMOKE, "--text", path, "--run_dir", tmp_path / "run")
    assert (message in line and "my.txt" in line) or (message == "" and "context" in line)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_overrides_in_one_flag_or_several(capsys):
    """The last one wins, however they are given; here the last one is the mistake."""
    given = ["--override", "train.steps=5", "train.seed=1", "--override", "train.steps=-3"]
    assert "train.steps is -3" in fails(capsys, *SMOKE, *given)


def test_vocabulary_below_257(capsys):
    assert "at least 257" in fails(capsys, *SMOKE, "--override", "tokenizer.vocab_size=200")


def test_token_ids_beyond_the_vocabulary(tmp_path, capsys):
    for name in ("train", "valid"):
        np.save(tmp_path / f"{name}.npy", np.arange(1000, dtype=np.uint16))
    overrides = [
        "data.dataset_mode=local_npy",
        f"data.train_tokens_path={tmp_path / 'train.npy'}",
        f"data.valid_tokens_path={tmp_path / 'valid.npy'}",
        "model.vocab_size=500",
    ]
    line = fails(capsys, *SMOKE, *(part for override in overrides for part in ("--override", override)))
    assert "999" in line and "500" in line


def test_context_beyond_the_models(tmp_path, capsys):
    np.save(tmp_path / "tokens.npy", np.zeros(50, dtype=np.uint16))
    overrides = [
        "data.dataset_mode=local_npy",
        f"data.train_tokens_path={tmp_path / 'tokens.npy'}",
        f"data.valid_tokens_path={tmp_path / 'tokens.npy'}",
        "model.vocab_size=500",
    ]
    line = fails(capsys, *SMOKE, *(part for override in overrides for part in ("--override", override)))
    assert "context" in line and "tokens.npy" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention_kernel", "flash"], "unknown attention kernel 'flash'"),
        (["--attention_kernel", "torch_sdpa_cudnn", "--override", "train.device=cpu"], "torch_sdpa_cudnn"),
        (["--ddp_wrapper", "flashddp", "--override", "train.device=cpu"], "more than one"),
        (
            ["--attention_kernel", "flash_attention_triton", "--override", "train.compile=true", "train.device=cpu"],
            "'flash_attention_triton'",
        ),
        (["--ddp_wrapper", "flashddp", "--processes", "0"], "train.processes is 0"),
        (["--processes", "2", "--override", "train.device=cpu"], "'none' is for one process and this run has 2"),
        (["--sharded_optimizer"], "train.sharded_optimizer=true does not go with train.ddp_wrapper=none"),
        (["--ddp_wrapper", "dpp"], "unknown ddp_wrapper 'dpp'"),
        (["--override", "train.device=cuda:64"], "cuda:64"),
        (["--config", "none.json"], "no config file"),
        (["--override", "model.vocab_size=300"], "below tokenizer.vocab_size 400"),
        (["--machine", "../up"], "machine '../up'"),
        (["--skip_data"], "an earlier run"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_pipeline_settings(arguments, message, capsys, output_root):
    assert message in fails(capsys, *SMOKE, *arguments)
    assert not list(output_root.rglob("train.txt")), "it must be found before any work"


def test_a_failed_process_is_one_line(capsys, monkeypatch):
    from lmsys.parallel import group

    def launch(arguments, processes, **_):
        assert (arguments[:2], processes) == (["train", "--config"], 2)
        raise error

    monkeypatch.setattr(group, "launch", launch)
    command = [*SMOKE, "--ddp_wrapper", "flashddp", "--processes", "2", "--override", "train.device=cpu"]
    error = group.RankError("rank 1 of 2 failed: OSError: out of memory")
    assert fails(capsys, *command) == "lmsys pipeline: rank 1 of 2 failed: OSError: out of memory"
    error = group.RankError("a process was killed by SIGKILL", signal=9)
    assert fails(capsys, *command) == "lmsys pipeline: a process was killed by SIGKILL (no checkpoint was saved)"


def test_what_all_processes_are_told_is_said_by_one(capsys, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert main(["train", "--size", "huge"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if "unknown model size 'huge'" in line]) == 1


def notebook_cell(source, tags=()):
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


PARAMETERS = """machine: str = None  # results go there
masks: list[bool] = None  # causal or not
keep: bool = False  # rows that are there
heads: int = 2  # of queries
fault: str = None  # how to fail"""
BODY = """import os, time
print("row", masks, keep, heads, machine, os.getpid())
time.sleep(1)
if fault == "killed":
    os.kill(os.getpid(), 9)
if fault:
    raise {"value": ValueError, "other": RuntimeError}[fault]("heads is bad\\nhere")"""


@pytest.fixture
def tiny(tmp_path, monkeypatch, output_root):
    """The only notebook, `tiny_study`; the folder of its results."""
    title = nbformat.v4.new_markdown_cell("# A tiny study\n\nWhat for.")
    cells = [title, notebook_cell(PARAMETERS, ["parameters"]), notebook_cell(BODY)]
    folder = tmp_path / "repository" / "notebooks"
    folder.mkdir(parents=True)
    for name, more in (("tiny_study", []), ("broken", [notebook_cell("1 / 0")])):
        nbformat.write(nbformat.v4.new_notebook(cells=[*cells, *more]), folder / f"{name}.ipynb")
    monkeypatch.setattr(records, "REPOSITORY", folder.parent)
    return output_root / "artifacts" / "local"


def test_a_notebooks_parameters_are_its_commands_flags(tiny, capsys):
    assert main(["--help"]) == 0 and "tiny-study" in (shown := capsys.readouterr().out) and "A tiny study" in shown
    assert main(["tiny_study", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--heads INT of queries (default: 2)" in shown and "--keep --no-keep rows that are there" in shown


def test_sigterm_ends_a_notebooks_kernel(tiny, monkeypatch):
    kernels = []

    def write(text):
        if text.startswith("row"):
            kernels.append(int(text.split()[-1]))
            os.kill(os.getpid(), signal.SIGTERM)

    stream = io.StringIO()
    stream.write = write
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        main(["tiny-study"])
    assert ended.value.code == 143 and [path.name for path in tiny.iterdir()] == ["tiny_study.failed.ipynb"]
    with pytest.raises(ProcessLookupError):
        os.kill(kernels[0], 0)


def test_a_notebook_runs_and_its_rows_come_as_they_are_printed(tiny, monkeypatch):
    written = []
    stream = io.StringIO()
    stream.write = lambda text: written.append((time.monotonic(), text))
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["tiny-study", "--masks", "true", "false", "--keep", "true", "--heads", "4"]) == 0
    row = next(at for at, text in written if "row [True, False] True 4 local" in text)
    assert written[-1][0] - row > 0.8, "the cell was still running"
    assert {path.name for path in tiny.iterdir()} == {"tiny_study.executed.ipynb"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "two"], "parameter heads is 'two'; it takes whole numbers"),
        (["--heads", "1.5"], "parameter heads is '1.5'; it takes whole numbers"),
        (["--masks", "true", "f"], "parameter masks is 'f'; it takes true or false"),
        (["--keep", "maybe"], "maybe"),
        (["--haeds", "2"], "Did you mean --heads"),
        (["--machine", "../up"], "machine '../up'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_parameters_are_found_before_a_kernel_starts(arguments, message, tiny, capsys, monkeypatch):
    monkeypatch.setattr(papermill, "execute_notebook", None)
    assert message in fails(capsys, "tiny-study", *arguments)
    assert not tiny.exists()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("value", 2, "cell [3] of notebook tiny_study failed: ValueError: heads is bad here"),
        ("other", 1, "cell [3] of notebook tiny_study failed: RuntimeError: heads is bad here"),
        ("killed", 1, "the kernel of notebook tiny_study died"),
    ],
)
def test_a_failed_notebook_says_cell_error_and_place(fault, code, message, tiny, capsys):
    assert main(["tiny-study", "--fault", fault]) == code
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert message in first and second.endswith("tiny_study.failed.ipynb")
    assert [path.name for path in tiny.iterdir()] == ["tiny_study.failed.ipynb"]


def test_a_failed_notebook_does_not_stop_the_report(tiny, capsys, monkeypatch):
    monkeypatch.setattr(report, "build_site", lambda: "index.html")
    assert main(["report", "broken", "tiny-study", "--scale", "smoke"]) == 1
    shown = capsys.readouterr()
    assert "ZeroDivisionError" in shown.err and shown.err.endswith("lmsys report: failed: broken\n")
    assert "site: index.html" in shown.out
    assert [path.name for path in (tiny.parents[1] / "book" / "local").iterdir()] == ["tiny_study.ipynb"]
    assert "unknown notebook 'x'" in fails(capsys, "report", "tiny_study", "x")


def test_unwritable_artifacts_folder_is_found_before_any_work(capsys, output_root):
    output_root.mkdir()
    (output_root / "artifacts").write_text("a file in the way")
    line = fails(capsys, "attention-sweep", "--scale", "smoke")
    assert "cannot write to this folder" in line and str(output_root / "artifacts") in line
    assert fails(capsys, *SMOKE) == line.replace("attention-sweep", "pipeline")
    assert not (output_root / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_artifacts_folder_keeps_what_it_held(capsys, output_root):
    folder = output_root / "artifacts" / "local"
    folder.mkdir(parents=True)
    (folder / "attention_sweep_results.csv").write_text("old")
    folder.chmod(0o500)
    assert "cannot write" in fails(capsys, "attention-sweep", "--scale", "smoke")
    assert (folder / "attention_sweep_results.csv").read_text() == "old"


def test_full_disk_leaves_what_was_there(tiny, capsys, monkeypatch):
    """A write that fails for want of space ends in one line, and the earlier results stay."""
    (records.writable_dir(tiny) / "tiny_study.executed.ipynb").write_text("old")

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(records, "write_text", full)
    assert "No space left on device" in fails(capsys, "tiny-study")
    assert (tiny / "tiny_study.executed.ipynb").read_text() == "old"


def test_generate_needs_a_checkpoint(tmp_path, capsys):
    assert "no checkpoint or run folder" in fails(
        capsys, "generate", "--checkpoint", tmp_path / "none", "--prompt", "x"
    )
    (tmp_path / "checkpoints").mkdir()
    assert "no good checkpoint" in fails(capsys, "generate", "--checkpoint", tmp_path, "--prompt", "x")
