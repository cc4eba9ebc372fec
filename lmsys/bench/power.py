"""A GPU's clock and power while work runs on it, sampled by nvidia-smi in a process beside this one.

A GPU at its power limit lowers its clock, and everything on it slows down, what moves memory too. A step's time then
hangs on the energy that it needs and not on units that wait; launches and overlap no longer buy anything.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from datetime import datetime
from typing import NamedTuple

import torch

INTERVAL_MS = 50
_FIELDS = ("timestamp", "clocks.sm", "power.draw.instant", "clocks.max.sm", "power.limit")
_TIME = "%Y/%m/%d %H:%M:%S.%f"


class Sample(NamedTuple):
    """Megahertz and watts at a moment, with what the GPU may have at most."""

    at: datetime
    sm_mhz: float
    power_w: float
    max_sm_mhz: float
    limit_w: float


class PowerWatch:
    """Samples while the context is open; none where there is no GPU, or no nvidia-smi that knows these fields."""

    def __init__(self, device: torch.device):
        self._device = device
        self._process: subprocess.Popen | None = None
        self._samples: list[Sample] = []

    def __enter__(self) -> PowerWatch:
        if self._device.type == "cuda":
            self._start(f"GPU-{torch.cuda.get_device_properties(self._device).uuid}")
        return self

    def _start(self, gpu: str) -> None:
        file = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (open as long as the context is)
        query = (f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "-lms", str(INTERVAL_MS))
        try:
            self._process = subprocess.Popen(["nvidia-smi", "-i", gpu, *query], stdout=file, stderr=subprocess.DEVNULL)
        except OSError:
            file.close()
        self._file = file

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        self._process.kill()  # it writes whole lines; one that is cut off is left out
        self._process.wait()
        self._file.seek(0)
        self._samples = [sample for line in self._file if (sample := parsed(line))]
        self._file.close()

    def between(self, start: datetime, end: datetime) -> dict[str, float | None]:
        """Medians of what was sampled then, on this host's clock, by Sample's names. None without samples."""
        then = [sample[1:] for sample in self._samples if start <= sample.at <= end]
        medians = map(statistics.median, zip(*then, strict=True)) if then else [None] * 4
        return dict(zip(Sample._fields[1:], medians, strict=True))


def parsed(line: str) -> Sample | None:
    """A line of nvidia-smi; None for one that is cut off or says that a field is not known."""
    values = [value.strip() for value in line.split(",")]
    try:
        at, *numbers = values
        return Sample(datetime.strptime(at, _TIME), *map(float, numbers))
    except (ValueError, TypeError):
        return None
