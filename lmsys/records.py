"""Results: where they go, how they are written, read, compared and shown.

A result file is tidy CSV, one measurement a row. Beside NAME.csv lies NAME.json with the environment, the method and
the full parameters.
"""

from __future__ import annotations

import csv
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
        raise ValueError(
            f"machine '{tag}' must be lower-case letters, digits, '.', '_' or '-', such as 'local' or 'h200'"
        )
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
        raise OSError(
            error.errno, f"cannot write to this folder ({error.strerror}); free it or choose another", str(path)
        ) from error
    return path


@contextmanager
def atomic_path(path: str | Path):
    """A temporary path in the same folder that replaces `path` when the block ends well and is removed when it does not.

    An OSError of the block that names no file, as that of a full disk does, or only the temporary one, then names `path`.
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
    """Write a result file and its stamp, NAME.csv and NAME.json, each atomically. A value that a row lacks stays empty."""
    path = Path(path)
    table = [[cell(row.get(column)) for column in columns] for row in rows]
    published = is_published(path)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(
            [without_home(value) if published and isinstance(value, str) else value for value in row] for row in table
        )
    write_json(path.with_suffix(".json"), stamp)


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
    """A number with so many significant digits or, where that is more, all before the point; never in exponent form: 0.00812, 3.50, 1,084."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{round(value, decimals):,.{decimals}f}"


def within_spread(difference: float, *rows: Any) -> bool:
    """Whether a difference of times does not show: it is below half of the widest range of these rows, p20_ms to p80_ms."""
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

_TIMES = {"median_ms": ("p20_ms", "p80_ms"), "step_ms": ("p20_ms", "p80_ms"), "seconds": ("p20_s", "p80_s")}
# Keys of a row behind those in front of its status.
_FURTHER_KEYS = ("kernel", "checkpoint", "tier", "kv_heads", "path", "processes", "options")
VERDICTS = ("slower", "gone", "faster", "same", "only in A", "only in B")  # the first two are a regression


def compare(a: str | Path, b: str | Path, *, threshold: float = 0.05):
    """Two result files of one kind, row by row, as a DataFrame: their key columns, medians a and b with spread, ratio b / a, verdict.

    A row is slower (faster) where its median changed by more than threshold and the 20th to 80th percentiles of the two do not overlap; gone
    where it was ok in a and is not in b.
    Raises:
        ValueError: a file that is missing, that holds no times, or whose rows cannot be told apart; files with no row in common.
    """
    import pandas as pd

    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; it must be 0 or more, such as 0.05 for 5%")
    tables = [_by_key(Path(path)) for path in (a, b)]
    (keys, first, time), (other_keys, second, other_time) = tables
    if (keys, time) != (other_keys, other_time):
        raise ValueError(
            f"{a} and {b} are results of different kinds: {', '.join(keys)} against {', '.join(other_keys)}"
        )
    if not set(first) & set(second):
        raise ValueError(f"{a} and {b} have no row in common by {', '.join(keys)}")
    rows = []
    for key in dict.fromkeys((*first, *second)):
        row = dict(zip(keys, key, strict=True))
        for name, found in (("a", first.get(key)), ("b", second.get(key))):
            row[name] = "" if found is None else found["status"] if found["status"] != "ok" else spread(*found["times"])
        rows.append(row | _verdict(first.get(key), second.get(key), threshold))
    return pd.DataFrame(rows)


def _by_key(path: Path) -> tuple[list[str], dict[tuple, dict[str, Any]], str]:
    """The columns that name a row, the rows by them, and the column of times."""
    frame = read_results(path)
    time = next((name for name in _TIMES if name in frame and set(_TIMES[name]) <= set(frame)), None)
    if time is None or "status" not in frame:
        known = "; ".join(", ".join((name, *spread)) for name, spread in _TIMES.items())
        raise ValueError(f"{path} has no times to compare: it takes a column status and one of these: {known}")
    columns = list(frame.columns)
    keys = columns[: columns.index("status")]
    keys += [name for name in _FURTHER_KEYS if name in columns and name not in keys]
    found: dict[tuple, dict[str, Any]] = {}
    for row in frame.to_dict("records"):
        key = tuple(str(cell(row[name])) for name in keys)
        if key in found:
            raise ValueError(
                f"{path} has two rows of {', '.join(keys)} = {', '.join(key)}; compare files of one run each"
            )
        found[key] = {"status": row["status"], "times": [row[name] for name in (time, *_TIMES[time])]}
    return keys, found, time


def _verdict(a: dict[str, Any] | None, b: dict[str, Any] | None, threshold: float) -> dict[str, Any]:
    if a is None or b is None:
        return {"ratio": math.nan, "verdict": "only in B" if a is None else "only in A"}
    if a["status"] != "ok" or b["status"] != "ok":
        return {"ratio": math.nan, "verdict": "gone" if a["status"] == "ok" else "same"}
    (median_a, low_a, high_a), (median_b, low_b, high_b) = a["times"], b["times"]
    ratio = median_b / median_a
    verdict = "same"
    if ratio > 1 + threshold and low_b > high_a:
        verdict = "slower"
    elif ratio < 1 / (1 + threshold) and high_b < low_a:
        verdict = "faster"
    return {"ratio": ratio, "verdict": verdict}


def comparison_table(frame) -> str:
    """What compare() gave, as Markdown, without the columns that are the same in every row."""
    keys = [name for name in frame.columns if name not in ("a", "b", "ratio", "verdict")]
    shown = [name for name in keys if frame[name].nunique() > 1] or keys[:1]
    heads = {name: name for name in shown} | {"a": "A", "b": "B", "ratio": "B / A", "verdict": "verdict"}
    lines = [
        row | {"ratio": "" if math.isnan(row["ratio"]) else f"{row['ratio']:.3f}"} for row in frame.to_dict("records")
    ]
    return markdown_table(lines, heads)


# --- Tables -----------------------------------------------------------------------------------------


def units(frame) -> tuple[str, str]:
    """What the column gpus counts in rows with a column device, one and several: processes where that is this machine's CPU."""
    from lmsys.device import cpu_name

    return ("process", "processes") if set(frame.device) == {cpu_name()} else ("GPU", "GPUs")


def table(frame, formats: Mapping[str, str] | None = None, headings: Mapping[str, str] | None = None) -> str:
    """A DataFrame as Markdown: columns by format strings, else whole numbers whole, others with three digits; NaN empty."""

    def text(name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        if isinstance(value, int):
            return formats[name].format(value) if formats and name in formats else f"{value:,}"
        if math.isnan(value):
            return ""
        return formats[name].format(value) if formats and name in formats else significant(value)

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
