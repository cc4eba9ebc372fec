"""What lmsys.bench.board_2026 has of processes.stream() until it is on the experiment engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmsys.bench import processes
from lmsys.bench.processes import process_counts, several  # noqa: F401
from lmsys.parallel.group import Process


def stream(
    measure: Callable[..., dict[str, Any] | None], points: Sequence[Any], *args: Any, device: str, limit_s: float
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """processes.stream of points that say how many processes they take, with further arguments for measure."""
    items = [(point.processes, point) for point in points]
    return processes.stream(functools.partial(_call, measure, args), items, device=device, limit_s=limit_s)


def _call(measure: Callable[..., Any], args: tuple, process: Process, point: Any) -> Any:
    return measure(process, point, *args)
