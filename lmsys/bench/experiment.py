"""One shape of experiment: a notebook's parameters -> points -> rows in a CSV file.

An Experiment has points(parameters), tidy dicts, and measure(point, parameters), a dict of measured columns. run() does
the rest, once for all experiments: order, progress, failures as rows by one rule, every row on disk as it is measured,
the stamp, release of memory, several processes where a point needs them, and going on after a cut with the groups that
are missing, as long as code, machine, versions and parameters are those of the rows there.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import time
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lmsys import config, records
from lmsys.config import require, resolve_scale, unknown_name

if TYPE_CHECKING:
    import pandas as pd

# --- Parameters -----------------------------------------------------------------------------------

TYPES: dict[str, tuple[type, bool]] = {  # annotation in a parameters cell -> type of a value, whether it is a list
    name: (kind, listed)
    for kind in (bool, int, float, str)
    for name, listed in ((kind.__name__, False), (f"list[{kind.__name__}]", True))
}


@dataclass(frozen=True)
class Parameter:
    """A line of a parameters cell.

    `name: list[int] = None  # help`. Without an annotation the type is the default's.
    """

    name: str
    annotation: str
    default: Any
    help: str

    def read(self, value: Any) -> Any:
        """The value by type, ValueError where it cannot be.

        Text, as `papermill -p` and a command line give it, is parsed; one value of a list is a list of one.
        """
        kind, listed = TYPES[self.annotation]
        if value is None or (isinstance(value, str) and value.strip() in ("None", "none", "null") and kind is not str):
            return None
        if not listed:
            return self._read_one(value, kind)
        if isinstance(value, str):
            value = value.strip().strip("[]()").replace(",", " ").split()
            value = [text.strip("'\"") for text in value]
        return [self._read_one(item, kind) for item in (value if isinstance(value, (list, tuple)) else [value])]

    def _read_one(self, value: Any, kind: type) -> Any:
        if type(value) is kind:
            return value
        text = value.strip() if isinstance(value, str) else None
        if kind is str and isinstance(value, (int, float, os.PathLike)):
            return str(value)
        if kind is bool and text and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float) and (text or (kind is float and type(value) is int)):
            with contextlib.suppress(ValueError):
                return kind(text or value)
        wanted = {bool: "true or false", int: "whole numbers", float: "numbers", str: "text"}[kind]
        raise ValueError(f"parameter {self.name} is {value!r}; it takes {wanted}")


@functools.cache
def declared(notebook: str) -> dict[str, Parameter]:
    """The parameters of notebooks/NOTEBOOK.ipynb, as its cell tagged `parameters` declares them.

    Raises:
        ValueError: no such notebook.
    """
    path = records.REPOSITORY / "notebooks" / f"{notebook}.ipynb"
    if not path.exists():
        raise unknown_name("notebook", notebook, sorted(file.stem for file in path.parent.glob("*.ipynb")))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))["source"])
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for statement in ast.parse(source).body:
        default = ast.literal_eval(statement.value)
        if isinstance(statement, ast.AnnAssign):
            target, annotation = statement.target, ast.unparse(statement.annotation)
        else:
            target, annotation = statement.targets[0], type(default).__name__
        assert annotation in TYPES, f"{path}: {target.id}: annotate it with one of {', '.join(TYPES)}"
        lines = range(statement.lineno, statement.end_lineno + 1)
        text = " ".join(comments[line] for line in lines if line in comments)
        found[target.id] = Parameter(target.id, annotation, default, text)
    return found


class Parameters(SimpleNamespace):
    """Values of a notebook's parameters as attributes; scale is resolved."""

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def is_given(self, name: str) -> bool:
        """Whether the user chose the value: it is not the cell's default, from which the scale's preset is taken."""
        return name in self._given


def scales(name: str) -> dict[str, dict[str, Any]]:
    """What configs/NAME.toml says of each scale."""
    path = Path(config.__file__).with_name("configs") / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Notebook:
    """A notebook's parameters.

    Attributes:
        name: of notebooks/NAME.ipynb, and of configs/NAME.toml: for each scale, the values of parameters that are None.
        check: raises ValueError for values that cannot be, before anything runs, and may fill in what follows from
            others.
    """

    name: str
    check: Callable[[Parameters], None] | None = None

    @functools.cached_property
    def presets(self) -> dict[str, dict[str, Any]]:
        """For each scale the values of parameters that are left at None."""
        return scales(self.name)

    def parameters(self, given: Mapping[str, Any] | None = None) -> Parameters:
        """The parameters: those given, else the scale's, else the cell's defaults.

        Args:
            given: the notebook's globals(), or values by name.
        Raises:
            ValueError: an unknown parameter, or a value that is not taken.
        """
        known, given = declared(self.name), dict(given or {})
        for name in _injected(given["In"]) if "In" in given else given:
            if name not in known:
                raise unknown_name("notebook parameter", name, known)
        values = {name: parameter.read(given.get(name, parameter.default)) for name, parameter in known.items()}
        chosen = {name for name, value in values.items() if value != known[name].default}
        values["scale"] = resolve_scale(values["scale"])
        for name, value in self.presets[values["scale"]].items():
            assert name in known, f"{self.name}: the preset {name} is no parameter of the notebook"
            if values[name] is None:
                values[name] = value
        parameters = Parameters(**values, _given=chosen)
        records.machine_tag(values.get("machine"))
        if self.check is not None:
            self.check(parameters)
        return parameters


def _injected(sources: Iterable[str]) -> Iterator[str]:
    """The names that papermill's cell assigns, which begins with `# Parameters`."""
    for source in sources:
        if source.startswith("# Parameters"):
            for statement in ast.parse(source).body:
                for target in getattr(statement, "targets", ()):
                    yield target.id


def require_numbers(parameters: Parameters, least: Mapping[str, float]) -> None:
    """ValueError unless each named parameter, where it is not None, and each value of a list, is at least so much."""
    for name, bound in least.items():
        value = getattr(parameters, name)
        for number in value if isinstance(value, list) else [value]:
            require(number is None or number >= bound, f"{name} is {number!r}; it must be {bound} or more")


def require_names(parameters: Parameters, known: Mapping[str, Iterable[str]]) -> None:
    """ValueError unless the named parameters hold known names, a list at least one."""
    for name, names in known.items():
        value = getattr(parameters, name)
        require(value != [], f"{name} must not be empty; known: {', '.join(names)}")
        for given in value if isinstance(value, list) else [value]:
            if given is not None and given not in names:
                raise unknown_name(name.removesuffix("s"), given, names)


# --- Experiments ----------------------------------------------------------------------------------

Point = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What measure() returns where it is more than one row.

    Rows, and rows of the experiment's other tables by their names.
    """

    rows: Sequence[Row]
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """What is measured, and how a point of it is.

    Attributes:
        name: of artifacts/<machine>/NAME.csv. columns: of that file, in order; a point's keys among them are filled by
            the engine, as are status, note and device. A point's key that is no column, such as a config, is for
            measure() alone.
        points: the points of a run, JSON values; one with a `status` (and `note`) is a row as it is, known before it is
            tried.
        measure: (point, parameters) -> measured columns, a list of them, or Measured. What it raises is the row's
            status: ValueError unsupported, no memory oom, else error.
        group: the keys of points that are compared: they are measured together, and go on together. Empty: all of them
            apart.
        method: how it is measured, for the stamp.
        tables: further files that Measured.tables fills, with their columns.
        processes: how many processes measure a point; measure then gets a third argument, its Process, in each of them,
            and rank 0's result, JSON values, counts. A point may take limit_s.
        prepare: called with a group's points before the first is measured, to compile and to check. before: once,
            before all.
        derive: (row, earlier ok rows of the group) -> columns that compare them; a list of them makes a row of each.
    """

    name: str
    columns: Sequence[str]
    points: Callable[[Parameters], list[Point]]
    measure: Callable[..., Row | Sequence[Row] | Measured]
    group: Sequence[str] = ()
    method: Callable[[Parameters], dict[str, Any]] = lambda parameters: {}
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    processes: Callable[[Point, Parameters], int] | None = None
    limit_s: float = 600.0
    prepare: Callable[[list[Point], Parameters], None] | None = None
    before: Callable[[Parameters], None] | None = None
    derive: Callable[[Row, list[Row]], Row | list[Row]] | None = None


def run(
    experiment: Experiment,
    parameters: Parameters,
    *,
    folder: str | Path | None = None,
    keep: Callable[[Row], bool] | None = None,
    say: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Measure the points, write NAME.csv, its stamp NAME.json and other tables, and return the rows.

    Rows lie in NAME.partial.jsonl until all are there; the earlier results stay until then.

    Args:
        folder: where results go; None: artifacts/<machine>/ of the parameters.
        keep: which rows of the earlier results stay in front of the new ones, their stamp as `kept` of the new one.
        say: takes the lines of progress.
    Raises:
        ValueError: no points, or rows to keep that are of another device or version. OSError: a folder that cannot be
            written.
    """
    from lmsys.bench import measure as measuring
    from lmsys.device import environment, resolve_device

    say = say or functools.partial(print, flush=True)
    device = resolve_device(getattr(parameters, "device", "auto"))
    folder = records.artifacts_dir(parameters.machine) if folder is None else records.writable_dir(folder)
    points = experiment.points(parameters)
    require(len(points) > 0, f"{experiment.name}: these parameters leave nothing to measure")
    stamp = {
        "environment": environment(),
        "method": experiment.method(parameters),
        "parameters": parameters.as_dict(),
    }
    path = folder / f"{experiment.name}.csv"
    kept = _kept(path, experiment, device, keep) if keep else []
    if kept and path.with_suffix(".json").exists():
        stamp["kept"] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    journal = Journal(folder / f"{experiment.name}.partial.jsonl", stamp)
    groups = _grouped(points, experiment.group)
    missing = [group for group in groups if not all(_key(point) in journal.entries for point in group)]
    say(_announcement(experiment.name, path, points, groups, missing))
    progress = _Progress(len(points), sum(map(len, missing)), points, say)
    with journal, measuring.settled():
        if experiment.before is not None and missing:
            experiment.before(parameters)
        for point, measured in _measure_all(experiment, missing, parameters, device, journal):
            rows = [_row(point, row, experiment, device) for row in measured.rows]
            if experiment.derive is not None:
                siblings = _siblings(journal, experiment, point)
                rows = [row | more for row in rows for more in _as_measured(experiment.derive(row, siblings)).rows]
            journal.add(point, rows, measured.tables)
            progress.tell(rows[-1] if rows else point)
    entries = [journal.entries[_key(point)] for point in points]
    if journal.resumed:
        stamp["went_on_from"] = journal.resumed
    rows = [*kept, *(row for entry in entries for row in entry["rows"])]
    records.write_results(path, experiment.columns, rows, stamp)
    for name, columns in experiment.tables.items():
        rows = [row for entry in entries for row in entry["tables"].get(name, ())]
        records.write_results(folder / f"{name}.csv", columns, rows, stamp)
    journal.remove()
    return records.read_results(path)


def _grouped(points: Sequence[Point], keys: Sequence[str]) -> list[list[Point]]:
    """Points that agree in the keys, in the order of the first of each group; all apart where there are no keys."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(_key({key: point[key] for key in keys or point}), []).append(point)
    return list(found.values())


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True, default=str)


def _siblings(journal: Journal, experiment: Experiment, point: Point) -> list[Row]:
    """The ok rows of the point's group that are there already."""
    same = {key: point[key] for key in experiment.group}
    rows = [row for entry in journal.entries.values() for row in entry["rows"]]
    return [row for row in rows if row["status"] == "ok" and all(row.get(key) == value for key, value in same.items())]


def _measure_all(
    experiment: Experiment, groups: list[list[Point]], parameters: Parameters, device: Any, journal: Journal
) -> Iterator[tuple[Point, Measured]]:
    """Each point that is missing with what was measured, in order; what fails is a row."""
    from lmsys.bench import measure as measuring

    for group in groups:
        for point in group:  # of a group that is not whole: it is measured again, whole
            journal.entries.pop(_key(point), None)
        yield from ((point, Measured([{}])) for point in group if "status" in point)
    groups = [[point for point in group if "status" not in point] for group in groups]
    if experiment.processes is not None:
        yield from _measure_in_processes(experiment, list(itertools.chain(*groups)), parameters)
        return
    for group in groups:
        if experiment.prepare is not None:
            experiment.prepare(group, parameters)
        for point in group:
            try:
                result = _as_measured(experiment.measure(point, parameters))
            except Exception as error:
                result = Measured([measuring.failure(error)])
            measuring.release(device)  # out of the except block, whose traceback holds tensors
            yield point, result


def _measure_in_processes(
    experiment: Experiment, points: list[Point], parameters: Parameters
) -> Iterator[tuple[Point, Measured]]:
    from lmsys.bench import processes

    items = [(experiment.processes(point, parameters), point) for point in points]
    call = functools.partial(_in_process, experiment.measure, parameters)
    for point, result in processes.stream(call, items, device=parameters.device, limit_s=experiment.limit_s):
        yield point, Measured(result["rows"], result["tables"]) if "rows" in result else Measured([result])


def _in_process(measure: Callable, parameters: Parameters, process: Any, point: Point) -> dict[str, Any] | None:
    """A point in one process of its group; JSON for the parent."""
    result = measure(point, parameters, process)
    return None if result is None else dataclasses.asdict(_as_measured(result))


def _as_measured(result: Row | Sequence[Row] | Measured) -> Measured:
    if isinstance(result, Measured):
        return result
    return Measured([result] if isinstance(result, dict) else list(result))


def _row(point: Point, measured: Row, experiment: Experiment, device: Any) -> Row:
    from lmsys.device import device_name

    known = {*experiment.columns, "status"}
    row = {"status": "ok", "device": device_name(device)} | point
    unknown = set(measured) - known - {"note"}
    assert not unknown, f"{experiment.name}: measured columns that it does not declare: {sorted(unknown)}"
    return {name: value for name, value in row.items() if name in known} | measured


def _kept(path: Path, experiment: Experiment, device: Any, keep: Callable[[Row], bool]) -> list[Row]:
    """Rows of the earlier results that stay. ValueError where they are of another machine's device or version."""
    from lmsys.device import device_name, resolve_device

    if not path.exists():
        return []
    frame = records.read_results(path)
    again = "measure all of it again, or name another machine for the results"
    same = list(frame.columns) == list(experiment.columns)
    require(same, f"the columns of {path} are not those of this version; {again}")
    rows = [row for row in frame.to_dict("records") if keep(row)]
    here = {device_name(one) for one in (device, resolve_device("auto"), resolve_device("cpu"))}
    others = ", ".join(str(row["device"]) for row in rows if row.get("device", device_name(device)) not in here)
    require(not others, f"{path} was measured on {others}, this is {device_name(device)}; {again}")
    return rows


# --- Rows on disk ---------------------------------------------------------------------------------


class Journal:
    """NAME.partial.jsonl: a stamp, then a line a point with its rows. A line that was cut off is not there."""

    def __init__(self, path: Path, stamp: Mapping[str, Any]):
        self.path, self.stamp = path, stamp
        self.entries: dict[str, dict[str, Any]] = {}
        self.resumed: list[str] = []  # dates of the runs that this one goes on from
        lines = _json_lines(path)
        if lines and _comparable(lines[0].get("stamp")) == _comparable(stamp):
            self.resumed = [*lines[0].get("resumed", ()), lines[0]["stamp"]["environment"]["date"]]
            self.entries = {entry["point"]: entry for entry in lines[1:]}
        elif lines:  # of other code, another machine or other parameters: put aside, not lost
            os.replace(path, path.with_name(path.name.replace(".partial.", ".earlier.")))

    def __enter__(self) -> Journal:
        head = {"stamp": self.stamp, "resumed": self.resumed}
        with records.atomic_path(self.path) as temporary:
            lines = [head, *self.entries.values()]
            temporary.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, point: Point, rows: Sequence[Row], tables: Mapping[str, Sequence[Row]]) -> None:
        entry = json.dumps({"point": _key(point), "rows": rows, "tables": tables}, default=str)
        self.entries[_key(point)] = json.loads(entry)
        self._file.write(entry + "\n")
        self._file.flush()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where there is no file, or its first line is not whole."""
    lines = []
    with contextlib.suppress(ValueError, FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            lines.append(json.loads(line))
    return lines if lines and "stamp" in lines[0] else []


def _comparable(stamp: Mapping[str, Any] | None) -> Any:
    """What two runs must share for the rows of one to stand beside those of the other."""
    if not stamp:
        return None
    changing = ("date", "git", "clock_sm", "clock_memory")
    environment = {name: value for name, value in stamp["environment"].items() if name not in changing}
    parameters = {name: value for name, value in stamp["parameters"].items() if name != "machine"}
    return json.loads(json.dumps([environment, parameters], default=str))


# --- Progress -------------------------------------------------------------------------------------


def _announcement(name: str, path: Path, points: Sequence, groups: Sequence, missing: Sequence) -> str:
    text = f"{name}: {len(points)} points in {len(groups)} groups, to {os.path.relpath(path)}"
    if path.exists():
        stamp = path.with_suffix(".json")
        environment = json.loads(stamp.read_text(encoding="utf-8"))["environment"] if stamp.exists() else {}
        where = environment.get("gpu") or environment.get("cpu") or "an unknown machine"
        text += f", in place of the results of {environment.get('date', 'an unknown date')[:16]} on {where}"
    if len(missing) < len(groups):
        text += f"; going on, {len(groups) - len(missing)} groups are there"
    return text


class _Progress:
    """A line a point: how many, how long it takes yet, what tells it from the others, its status or its first time."""

    def __init__(self, total: int, left: int, points: Sequence[Point], say: Callable[[str], None]):
        self.total, self.done, self.first = total, total - left, total - left
        self.start, self.say = time.monotonic(), say
        keys = [key for key in points[0] if key not in ("status", "note")]
        self.keys = [key for key in keys if len({_key({key: point.get(key)}) for point in points}) > 1] or keys[:1]

    def tell(self, row: Row) -> None:
        """A point is done; row: its last."""
        self.done += 1
        seconds = (time.monotonic() - self.start) / (self.done - self.first) * (self.total - self.done)
        left = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        what = " ".join(str(row.get(key)) for key in self.keys if isinstance(row.get(key), (str, int, float)))
        time_ms = next((v for name, v in row.items() if name.endswith("_ms") and isinstance(v, (int, float))), None)
        if row.get("status", "ok") != "ok":
            result = f"{row['status']}: {row.get('note') or ''}"
        elif time_ms is None:
            result = "done"
        elif None in (row.get("p20_ms"), row.get("p80_ms")):
            result = f"{records.significant(time_ms)} ms"
        else:
            result = f"{records.spread(time_ms, row['p20_ms'], row['p80_ms'])} ms"
        self.say(f"[{self.done}/{self.total}, {left} left] {what}: {result}")
