"""python -m lmsys COMMAND ...: a notebook, whose parameters cell gives the flags, or a function of commands.py.

Bad input ends in one line on standard error and exit code 2, a notebook that failed in exit code 1. LMSYS_TRACEBACK=1
shows the traceback as well. A command that SIGTERM ends leaves nothing half-written and has exit code 143; one that
trains saves a checkpoint first, and on SIGINT too (exit code 130).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter, Token

from lmsys import __version__, commands, records, report

ALIASES = {"benchmark": "model_benchmark", "bench_tokenizer": "tokenizer_benchmark"}  # command -> notebook
FUNCTIONS = (
    commands.pipeline,
    commands.train,
    commands.generate,
    commands.export,
    commands.import_hf,
    commands.compare,
    commands.report,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 for a slowdown that compare found or a notebook that failed; 2 for bad input and a run that it made impossible.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    command = tokens[0].replace("_", "-") if tokens else "--help"
    # OpenMP threads that spin while they wait take each other's core on a busy machine. A small model's step on two
    # cores, ms, alone and beside ten busy processes: 48 and 2,000 by default, 69 and 330 when passive, 57 and 180 so.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        with _ended_by_sigterm(command):
            function, bound = _parse([command, *tokens[1:]])
            return function(*bound.args, **bound.kwargs) or (0 if tokens else 2)
    except KeyboardInterrupt:
        print(f"lmsys {command}: interrupted; what was written so far stays", file=sys.stderr)
        return 130
    except (CycloptsError, ValueError, OSError, FloatingPointError, report.NotebookError) as error:
        if os.environ.get("LMSYS_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others under torchrun were given the same
            print(f"lmsys {command}: {_message(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, report.NotebookError) else 2


@contextlib.contextmanager
def _ended_by_sigterm(command: str) -> Iterator[None]:
    """Within the block, SIGTERM is an exception, so that temporary files go and processes that were started end."""
    owner = os.getpid()

    def end(number: int, _frame: object) -> None:
        if os.getpid() != owner:  # a worker that was forked here
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)  # once is enough: what it starts must not be cut off
        print(f"lmsys {command}: ended by SIGTERM; what was written so far stays", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _message(error: BaseException) -> str:
    if isinstance(error, report.NotebookError):
        return str(error)  # of a few lines
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


# --- The commands ---------------------------------------------------------------------------------


def _parse(tokens: Sequence[str]) -> tuple[Callable[..., int | None], inspect.BoundArguments]:
    """The function of a command line and its arguments; of the notebooks only the one that is asked for is read."""
    app = App(
        name="python -m lmsys",
        help="Fast Transformer language-model training, written from scratch and measured beside the best.",
        help_epilogue="python -m lmsys COMMAND --help describes a command.",
        version=__version__,
        help_format="plaintext",
        default_parameter=Parameter(name_transform=str, consume_multiple=(1, None), negative=(), show_default=False),
    )
    for function in FUNCTIONS:
        app.command(function, name=function.__name__.replace("_", "-"))
    for notebook, title in report.titles().items():
        names = [name.replace("_", "-") for name in (notebook, *(a for a, of in ALIASES.items() if of == notebook))]
        if notebook == "pipeline":  # text to a trained model is a command of its own
            continue
        if tokens[0] in names:
            run = _experiment(notebook)
            tokens = _joined(tokens, run)
        else:
            run = print  # never called
        app.command(run, name=names[0], alias=names[1:], help=title)
    function, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    return function, bound


def _experiment(notebook: str) -> Callable[..., None]:
    """The command of a notebook: a function with the signature that its parameters cell gives."""
    from lmsys.bench.experiment import TYPES, declared
    from lmsys.bench.experiment import Parameter as Declared

    known = declared(notebook)

    def run(**given: object) -> None:
        values = {name: known[name].read(value) for name, value in given.items() if value is not None}
        machine = values.pop("machine", None)
        executed = records.artifacts_dir(machine) / f"{notebook}.executed.ipynb"
        report.run_notebook(notebook, parameters=values, machine=machine, target=executed)

    def keyword(parameter: Declared) -> inspect.Parameter:
        def whole(_hint: type, tokens: Sequence[Token]) -> object:  # cyclopts would round
            return parameter.read([token.value for token in tokens] if is_list else tokens[0].value)

        kind, is_list = TYPES[parameter.annotation]
        hint = list[str if kind is bool else kind] if is_list else kind  # true and false are read by read()
        text = parameter.help + ("" if parameter.default is None else f" (default: {parameter.default})")
        negative, converter = None if hint is bool else (), whole if kind is int else None
        annotation = Annotated[hint | None, Parameter(help=text, negative=negative, converter=converter)]
        return inspect.Parameter(parameter.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    run.__signature__ = inspect.Signature([keyword(parameter) for parameter in known.values()])
    return run


def _joined(tokens: Sequence[str], run: Callable) -> list[str]:
    """`--keep false` as `--keep=false`: what is on or off may be followed by its value."""
    flags = [f"--{p.name}" for p in run.__signature__.parameters.values() if p.annotation.__origin__ == bool | None]
    joined: list[str] = []
    for token in tokens:
        if joined and joined[-1] in flags and token.lower() in ("true", "false"):
            joined[-1] += f"={token.lower()}"
        else:
            joined.append(token)
    return joined


if __name__ == "__main__":
    sys.exit(main())
