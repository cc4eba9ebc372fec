"""Results: where they go, how they are written, read, compared and shown.

A result file is tidy CSV, one measurement a row. Beside NAME.csv lies NAME.json with the environment, the method and
the full parameters.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def output_root() -> Path:
    """Where artifacts/, runs/ and executed notebooks go: LMSYS_OUTPUT if set, else the repository."""
    return Path(os.environ.get("LMSYS_OUTPUT") or REPOSITORY)


def output_path(path: str | Path) -> Path:
    """A path of a setting that is written to: a relative one lies in the output root."""
    return output_root() / Path(path).expanduser()


def machine_tag(machine: str | None = None) -> str:
    """The machine that results belong to: the argument, else LMSYS_MACHINE, else local."""
    tag = machine or os.environ.get("LMSYS_MACHINE") or "local"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", tag):
        raise ValueError(f"machine '{tag}' must be lower-case letters, digits, '.', '_' or '-', such as 'local'")
    return tag


def artifacts_dir(machine: str | None = None) -> Path:
    """artifacts/<machine>/, made if missing. Raises OSError, before any work, where it cannot be written."""
    return writable_dir(output_root() / "artifacts" / machine_tag(machine))


def book_dir(machine: str | None = None) -> Path:
    """book/<machine>/, where executed notebooks go."""
    return writable_dir(output_root() / "book" / machine_tag(machine))


def writable_dir(path: str | Path) -> Path:
    """The folder, made if missing and proved writable by writing to it. Raises OSError naming it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable-"):
            pass
    except OSError as error:
        problem = f"cannot write to this folder ({error.strerror}); free it or choose another"
        raise OSError(error.errno, problem, str(path)) from error
    return path


@contextmanager
def atomic_path(path: str | Path):
    """A temporary path in the same folder that replaces `path` when the block ends well, else is removed.

    An OSError of the block that names no file, as that of a full disk, or only the temporary one, then names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until the disk holds a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path):
    """Name `path` in an OSError of the block that names no file, or only a temporary one."""
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(error.filename).name
        if error.errno is None or (named is not None and not (named.startswith(".") and named.endswith(".tmp"))):
            raise
        raise OSError(error.errno, f"cannot write this file ({error.strerror})", str(path)) from error


def without_home(text: str) -> str:
    """The text with the user's home folder as ~, for what others read."""
    home = os.path.expanduser("~").rstrip("/")
    if not home.startswith("/") or home == "":
        return text
    return re.sub(rf"(file://|(?<![\w/.-])){re.escape(home)}(?![\w.-])", r"\1~", text)


def is_published(path: str | Path) -> bool:
    """Whether a file lies in artifacts/ or book/, which others read."""
    path = Path(path).absolute()
    return any(path.is_relative_to((output_root() / name).absolute()) for name in ("artifacts", "book"))


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file atomically. What is published does not name the user's home folder."""
    if is_published(path):
        text = without_home(text)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write a JSON file atomically."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def write_results(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], stamp: Mapping) -> None:
    """Write a result file and its stamp, NAME.csv and NAME.json, each atomically. What a row lacks stays empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([cell(row.get(column)) for column in columns] for row in rows)
    write_text(path, text.getvalue())
    write_json(Path(path).with_suffix(".json"), stamp)


def cell(value: Any) -> Any:
    """A value as the CSV shows it: floats with six digits, None and NaN empty, truth as true and false."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, or all before the point; no exponents: 0.00812, 3.50, 1,084."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{round(value, decimals):,.{decimals}f}"


def within_spread(difference: float, *rows: Any) -> bool:
    """Whether a difference of times does not show: below half of the widest range of these rows, p20_ms to p80_ms."""
    return abs(difference) < max(row.p80_ms - row.p20_ms for row in rows) / 2


def verdict(a: Any, b: Any, time: str = "median_ms") -> str:
    """What b is beside a, two rows of one run: ahead (faster), behind, or within noise (within_spread)."""
    if within_spread(a[time] - b[time], a, b):
        return "within noise"
    return "ahead" if b[time] < a[time] else "behind"


def spread(median: float, p20: float, p80: float) -> str:
    """A median with its 20th and 80th percentile."""
    return f"{significant(median)} [{significant(p20)}, {significant(p80)}]"


def read_results(path: str | Path):
    """A result file as a DataFrame; ValueError where it is missing."""
    import pandas as pd

    path = Path(path)
    if not path.exists():
        raise ValueError(f"no results at {path}")
    return pd.read_csv(path)


# --- Two runs ---------------------------------------------------------------------------------------

_TIMES = (("median_ms", "p20_ms", "p80_ms"), ("step_ms", "p20_ms", "p80_ms"), ("seconds", "p20_s", "p80_s"))
# Keys of a row behind those in front of its status.
_FURTHER_KEYS = ("kernel", "checkpoint", "tier", "kv_heads", "path", "processes", "options")
VERDICTS = ("slower", "gone", "faster", "same", "only in A", "only in B")  # the first two are a regression


def compare(a: str | Path, b: str | Path, *, threshold: float = 0.05):
    """Two result files of one kind, row by row: their keys, medians a and b with spread, ratio b / a, and verdict.

    A row is slower (faster) where its median changed by more than threshold and the 20th to 80th percentiles of the two
    do not overlap; gone where it was ok in a and is not in b.
    Raises:
        ValueError: a file is missing, holds no times, or has two rows of the same keys; no row is in both.
    """
    import numpy as np
    import pandas as pd

    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it must be 0 or more, such as 0.05 for 5%")
    (first, time), (second, other_time) = _by_key(a), _by_key(b)
    keys, other_keys = list(first.index.names), list(second.index.names)
    if (keys, time) != (other_keys, other_time):
        raise ValueError(
            f"{a} and {b} are results of different kinds: {', '.join(keys)} against {', '.join(other_keys)}"
        )
    if first.index.intersection(second.index).empty:
        raise ValueError(f"{a} and {b} have no row in common by {', '.join(keys)}")
    rows = first.index.append(second.index.difference(first.index, sort=False))
    old, new = first.reindex(rows), second.reindex(rows)
    ratio = (new["median"] / old["median"]).where((old.status == "ok") & (new.status == "ok"))
    verdicts = {
        "only in B": old.status.isna(),
        "only in A": new.status.isna(),
        "gone": (old.status == "ok") & (new.status != "ok"),
        "slower": (ratio > 1 + threshold) & (new.low > old.high),
        "faster": (ratio < 1 / (1 + threshold)) & (new.high < old.low),
    }
    verdict = np.select(list(verdicts.values()), list(verdicts), "same")
    columns = {"a": old.shown.fillna(""), "b": new.shown.fillna(""), "ratio": ratio, "verdict": verdict}
    return pd.DataFrame(columns, index=rows).reset_index()


def _by_key(path: str | Path):
    """A result file's status, median, low and high, and how they are shown, by the row's keys; the column of times."""
    frame = read_results(path)
    times = next((names for names in _TIMES if {"status", *names} <= set(frame)), None)
    if times is None:
        known = "; ".join(map(", ".join, _TIMES))
        raise ValueError(f"{path} has no times to compare: it takes a column status and one of these: {known}")
    keys = list(frame.columns[: frame.columns.get_loc("status")])
    keys += [name for name in _FURTHER_KEYS if name in frame and name not in keys]
    rows = frame[["status", *times]].set_axis(["status", "median", "low", "high"], axis=1)
    rows["shown"] = [spread(*row[1:]) if row[0] == "ok" else row[0] for row in rows.itertuples(index=False)]
    rows = rows.set_index([frame[name].map(cell).map(str) for name in keys])
    if (again := rows.index[rows.index.duplicated()]).size:
        key = again[0] if len(keys) > 1 else again[:1]
        raise ValueError(f"{path} has two rows of {', '.join(keys)} = {', '.join(key)}; compare files of one run each")
    return rows, times[0]


def comparison_table(frame) -> str:
    """What compare() gave, as Markdown, without the columns that are the same in every row."""
    keys = [name for name in frame.columns if name not in ("a", "b", "ratio", "verdict")]
    shown = [name for name in keys if frame[name].nunique() > 1] or keys[:1]
    headings = {"a": "A", "b": "B", "ratio": "B / A"}
    return table(frame[[*shown, "a", "b", "ratio", "verdict"]], {"ratio": "{:.3f}"}, headings)


# --- Tables -----------------------------------------------------------------------------------------


def units(frame) -> tuple[str, str]:
    """What gpus counts in rows with a column device, one and several: processes where that is this machine's CPU."""
    from lmsys.device import cpu_name

    return ("process", "processes") if set(frame.device) == {cpu_name()} else ("GPU", "GPUs")


def table(frame, formats: Mapping[str, str] | None = None, headings: Mapping[str, str] | None = None) -> str:
    """A DataFrame as Markdown: by format strings, else whole numbers whole, others with three digits; NaN empty."""

    def text(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        if math.isnan(value):
            return ""
        if formats and name in formats:
            return formats[name].format(value)
        return f"{value:,}" if isinstance(value, int) else significant(value)

    rows = [{name: text(name, value) for name, value in row.items()} for row in frame.to_dict("records")]
    return markdown_table(rows, {str(name): (headings or {}).get(name, str(name)) for name in frame.columns})


def markdown_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """Rows as a Markdown table. columns: key -> heading; by default the keys of the first row."""
    rows = list(rows)
    if columns is None:
        columns = {key: key for key in (rows[0] if rows else {})}
    lines = ["| " + " | ".join(columns.values()) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(str(cell(row.get(key))).replace("|", "\\|") for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
