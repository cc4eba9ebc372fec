"""Clock and power of a GPU, from a program that stands in for nvidia-smi."""

import os
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest
import torch

from lmsys.bench.power import PowerWatch, parsed

PROGRAM = """#!{python}
import sys, time
from datetime import datetime
assert sys.argv[1:3] == ["-i", "GPU-7"] and sys.argv[5:] == ["-lms", "50"], sys.argv
assert "power.draw.instant" in sys.argv[3], sys.argv
for clock in (1400, 1500, 1600) * 1000:
    at = datetime.now().strftime("%Y/%m/%d %H:%M:%S.%f")[:-3]
    print(f"{{at}}, {{clock}}, {{clock / 2 - 55}}, 1980, 700", flush=True)
    time.sleep(0.01)
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def watched(seconds):
    watch = PowerWatch(torch.device("cuda", 0))
    watch._start("GPU-7")
    start = datetime.now()
    time.sleep(seconds)
    watch.__exit__(None, None, None)
    return watch, start, datetime.now()


def test_medians_are_of_the_samples_in_between(nvidia_smi):
    watch, start, end = watched(1.0)
    found = watch.between(start, end)
    assert found == {"sm_mhz": 1500.0, "power_w": 695.0, "max_sm_mhz": 1980.0, "limit_w": 700.0}
    later = end + timedelta(hours=1)
    assert set(watch.between(later, later).values()) == {None}
    assert watch._process.returncode is not None


def test_without_the_program_nothing_is_known(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "Popen", missing)
    watch, start, end = watched(0.0)
    found = watch.between(start, end)
    assert set(found.values()) == {None}
    with PowerWatch(torch.device("cpu")) as watch:
        pass
    assert watch.between(start, end)["power_w"] is None


def test_lines_that_are_not_samples_are_left_out():
    assert parsed("2026/11/22 02:10:11.123, 1980, 690.5, 1980, 700.00").power_w == 690.5
    for line in (
        "",
        "2026/11/22 02:10:11.123, 19",
        'Field "power.draw.instant" is not a valid field to query.',
        "a, b, c, d, e",
    ):
        assert parsed(line) is None
