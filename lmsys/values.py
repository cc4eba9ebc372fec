"""Named values and tables of the site's pages, read from the committed result files when the site is built.

Sentences are written by hand; a number in them is `{{ name }}`, with its meaning in book/values.yaml, whose head
describes the format. A name that is unknown, or whose file, row or number is missing, ends the build with a message of
page, name and file. In the README, which is read unbuilt, a value stands between `<!-- {{ name }} -->` and
`<!-- end -->`; refresh_readme() brings it up to date.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from lmsys import records
from lmsys.config import unknown_name

_NAME = re.compile(r"\{\{ ([\w.]+) \}\}")
_README_NAME = re.compile(r"(<!-- \{\{ ([\w.]+) \}\} -->\n?).*?(\n?<!-- end -->)", re.DOTALL)
_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


class Values:
    """What names stand for, by a YAML file of names and the folder of the result files that it speaks of."""

    def __init__(self, source: Path | None = None, artifacts: Path | None = None):
        import yaml

        self.source = source or records.REPOSITORY / "book" / "values.yaml"
        self.artifacts = artifacts or records.REPOSITORY / "artifacts"
        sections = yaml.safe_load(self.source.read_text(encoding="utf-8"))
        self.values: dict[str, dict[str, Any]] = sections.get("values") or {}
        self.tables: dict[str, dict[str, Any]] = sections.get("tables") or {}
        self._frame = functools.cache(self._read)

    def fill(self, text: str, page: str) -> str:
        """A page's text with each `{{ name }}` replaced; ValueError names the page, the name and what is wrong."""
        return _NAME.sub(lambda match: self.text(match[1], page), text)

    def fill_readme(self, text: str) -> str:
        """A text with what stands between `<!-- {{ name }} -->` and `<!-- end -->` brought up to date."""
        return _README_NAME.sub(lambda match: match[1] + self.text(match[2], "README.md") + match[3], text)

    def text(self, name: str, page: str) -> str:
        """A value as its format has it, or a table as Markdown; ValueError as fill() raises it."""
        entry = (self.values | self.tables).get(name.partition(".")[0], {})
        try:
            if name in self.tables:
                return self._table(entry)
            counted = name.endswith((".count", ".nunique"))
            return formatted(self.value(name), "," if counted else entry.get("format", ""))
        except Exception as error:
            raise ValueError(f"{page}: {{{{ {name} }}}} ({entry.get('file', self.source.name)}): {error}") from error

    def value(self, name: str) -> Any:
        """A named value before it is formatted: a number, or a text of the result file or its stamp.

        `name.min` is the least over the rows that match, and so max, median, mean, sum, count, nunique, geomean.
        """
        name, _, reduction = name.partition(".")
        if name not in self.values:
            raise unknown_name("name", name, [*self.values, *self.tables])
        entry = self.values[name]
        if "expr" in entry:
            return eval(re.sub(r"\b[a-zA-Z_][\w.]*", lambda match: repr(float(self.value(match[0]))), entry["expr"]))
        if "stamp" in entry:
            found = json.loads((self.artifacts / f"{entry['file']}.json").read_text(encoding="utf-8"))
            return functools.reduce(lambda part, key: part[key], entry["stamp"].split("."), found)
        column = self.rows(entry).eval(entry["value"], engine="python")
        if not reduction and len(column) > 1:
            raise ValueError(f"{len(column)} rows, not one, match: {entry.get('where')}")
        if reduction == "geomean":
            result = column.prod() ** (1 / column.count())
        else:
            result = getattr(column, reduction)() if reduction else column.iloc[0]
        if result != result:  # NaN
            raise ValueError(f"no number as {entry['value']} where {entry.get('where')}")
        return result

    def rows(self, entry: dict[str, Any]):
        """The rows of an entry's file that it asks for: labelled, pivoted, with derived columns, and sorted."""
        frame = self._frame(entry["file"])
        if "where" in entry:
            frame = frame.query(entry["where"], engine="python")
        if frame.empty:
            raise ValueError(f"no row matches: {entry.get('where')}")
        frame = frame.replace(entry.get("labels", {}))
        if "pivot" in entry:
            index = entry["pivot"]["index"]
            wide = (frame.pivot_table if "aggfunc" in entry["pivot"] else frame.pivot)(**entry["pivot"])
            wide.columns = [" ".join(str(part) for part in key if part != "") for key in wide.columns]
            frame = frame[index].drop_duplicates().merge(wide.reset_index(), on=index)  # in the file's order
        for name, expression in entry.get("derive", {}).items():
            frame = frame.assign(**{name: frame.eval(expression, engine="python")})
        if "sort" in entry:
            keys = [key.removeprefix("-") for key in entry["sort"]]
            frame = frame.sort_values(keys, ascending=[key in entry["sort"] for key in keys], kind="stable")
        return frame.head(entry.get("head", len(frame)))

    def _table(self, entry: dict[str, Any]) -> str:
        rows = self.rows(entry).to_dict("records")
        lines = [{heading: _cell(cell, row) for heading, cell in entry["columns"].items()} for row in rows]
        return records.markdown_table(lines).rstrip()

    def _read(self, file: str):
        import pandas as pd

        frame = pd.read_csv(self.artifacts / f"{file}.csv")
        return frame.assign(**{name: frame[name].fillna("") for name in frame.select_dtypes(["object", "str"])})


def formatted(value: Any, spec: str) -> str:
    """A value by Python's format specification, or by `s3`: three significant digits, written out (0.00812, 1,084)."""
    return records.significant(float(value), int(spec[1:])) if re.fullmatch(r"s\d", spec) else format(value, spec)


def _cell(template: str, row: dict[str, Any]) -> str:
    """A table's cell: `{column:format}`; in place of a number that a failed point does not have, its status."""

    def field(match: re.Match) -> str:
        column, spec = match[1], match[2] or ""
        if spec != "spread":
            return formatted(row[column], spec)
        name, _, rest = column.partition(" ")  # such as step_ms, and what a pivot put behind it
        unit = name.rpartition("_")[2].replace("seconds", "s")
        low, high = (f"{which}_{unit} {rest}".rstrip() for which in ("p20", "p80"))
        return records.spread(row[column], row[low], row[high])

    for column, _ in _FIELD.findall(template):
        if row[column] != row[column]:  # NaN
            status = row.get(" ".join(["status", *column.split(" ")[1:]]), "")
            return str(status) if status == status and status != "ok" else ""
    return _FIELD.sub(field, template)


def refresh_readme() -> None:
    """Bring the README's numbers up to date."""
    path = records.REPOSITORY / "README.md"
    records.write_text(path, Values().fill_readme(path.read_text(encoding="utf-8")))


def setup(app) -> dict[str, Any]:
    """Sphinx's entry: fill each Markdown page as it is read, and read all of them in every build."""
    values = Values()

    def outdated(app, env, added, changed, removed) -> list[str]:
        return [name for name in env.found_docs if env.doc2path(name, base=False).endswith(".md")]

    def source_read(app, docname: str, source: list[str]) -> None:
        page = str(app.env.doc2path(docname, base=False))
        if page.endswith(".md"):
            source[0] = values.fill(source[0], page)

    app.connect("env-get-outdated", outdated)
    app.connect("source-read", source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
