import re

import pytest

from lmsys.records import REPOSITORY
from lmsys.values import Values, formatted

PAGES = [
    *(REPOSITORY / "book").glob("*.md"),
    *(REPOSITORY / "book" / "chapters").glob("*.md"),
    REPOSITORY / "README.md",
]
NAMES = """
values:
  a: {file: m/times, where: kernel == "a", value: step_ms, format: s3}
  b: {file: m/times, where: kernel == "b" and `pass` == "forward", value: step_ms / 2, format: ",.1f"}
  ratio: {expr: b / a, format: .2f}
  both: {file: m/times, where: step_ms == step_ms, value: step_ms, format: .1f}
  gpu: {file: m/times, stamp: environment.gpu}
  none: {file: m/times, where: kernel == "x", value: step_ms}
  failed: {file: m/times, where: kernel == "c", value: step_ms}
  absent: {file: m/absent, value: step_ms}
tables:
  times:
    file: m/times
    labels: {kernel: {a: ours}}
    sort: [-kernel]
    columns: {kernel: "`{kernel}`", "step, ms": "{step_ms:spread}"}
  wide:
    file: m/times
    pivot: {index: [gpus], columns: [kernel], values: [status, step_ms, p20_ms, p80_ms]}
    derive: {ratio: "`step_ms b` / `step_ms a`"}
    columns: {GPUs: "{gpus}", a: "{step_ms a:spread}", c: "{step_ms c:s3}", b / a: "{ratio:.1f}"}
"""


@pytest.fixture
def values(tmp_path):
    (tmp_path / "values.yaml").write_text(NAMES)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "times.csv").write_text(
        "kernel,gpus,pass,status,step_ms,p20_ms,p80_ms\na,1,forward,ok,1.5,1.4,1.75\nb,1,forward,ok,6000,5999,6001\n"
        "c,1,forward,oom,,,\n"
    )
    (tmp_path / "m" / "times.json").write_text('{"environment": {"gpu": "NVIDIA H200"}}')
    return Values(tmp_path / "values.yaml", tmp_path)


@pytest.mark.parametrize(
    "name,text",
    [
        *(("a", "1.50"), ("b", "3,000.0"), ("ratio", "2000.00"), ("gpu", "NVIDIA H200")),
        *(("both.max", "6000.0"), ("both.min", "1.5"), ("both.geomean", "94.9"), ("both.count", "2")),
    ],
)
def test_a_name_is_filled_with_its_value(values, name, text):
    assert values.fill(f"It takes {{{{ {name} }}}} ms, $x^{{{{2}}}}$.", "p.md") == f"It takes {text} ms, $x^{{{{2}}}}$."


def test_a_table_has_spreads_and_the_status_of_what_failed(values):
    assert values.text("times", "p.md").splitlines()[2:] == [
        "| `ours` | 1.50 [1.40, 1.75] |",
        "| `c` | oom |",
        "| `b` | 6,000 [5,999, 6,001] |",
    ]
    assert values.text("wide", "p.md").splitlines()[2:] == ["| 1 | 1.50 [1.40, 1.75] | oom | 4000.0 |"]


@pytest.mark.parametrize(
    "name,message",
    [
        ("rato", r"book/p.md: \{\{ rato \}\} \(values.yaml\): unknown name 'rato'. Did you mean 'ratio'"),
        ("absent", r"book/p.md: \{\{ absent \}\} \(m/absent\): .*No such file.*m/absent.csv"),
        ("none", r"\{\{ none \}\} \(m/times\): no row matches: kernel == \"x\""),
        ("both", r"\{\{ both \}\} \(m/times\): 2 rows, not one, match"),
        ("failed", r"\{\{ failed \}\} \(m/times\): no number as step_ms where"),
    ],
)
def test_what_cannot_be_filled_names_page_name_and_file(values, name, message):
    with pytest.raises(ValueError, match=message):
        values.fill(f"{{{{ {name} }}}}", "book/p.md")


def test_a_readme_is_filled_between_its_marks(values):
    text = "It takes <!-- {{ a }} -->old<!-- end --> ms.\n<!-- {{ times }} -->\nold\n<!-- end -->\n"
    filled = values.fill_readme(text)
    assert filled.startswith("It takes <!-- {{ a }} -->1.50<!-- end --> ms.\n<!-- {{ times }} -->\n| kernel |")
    assert filled.endswith(" |\n<!-- end -->\n") and values.fill_readme(filled) == filled


def test_formats():
    assert formatted(0.00812, "s3") == "0.00812" and formatted(1084.4, "s3") == "1,084"
    assert formatted(0.4321, ".1%") == "43.2%" and formatted("text", "") == "text"


def test_every_page_can_be_filled_and_every_name_is_used():
    values, used = Values(), ""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        used += text
        assert not re.search(r"\{\{ [\w.]+ \}\}", values.fill(text, page.name)), page
    names = set(re.findall(r"\{\{ (\w+)", used))
    for entry in values.values.values():
        names |= set(re.findall(r"\w+", entry.get("expr", "")))
    assert [name for name in (*values.values, *values.tables) if name not in names] == []


def test_files_that_pages_name_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:lmsys|tests|notebooks)/[\w./]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (REPOSITORY / path).exists(), (page.name, path)


def test_the_readme_holds_the_values_of_the_artifacts():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert Values().fill_readme(readme) == readme, "run: python -m lmsys report --site_only"
