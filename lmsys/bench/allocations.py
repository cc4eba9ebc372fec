"""Every allocation and release of a step, and the category of each.

They are recorded on a GPU by the caching allocator's history (torch.cuda.memory._record_memory_history, sizes as asked
for, not as rounded or reserved), on a CPU by the profiler's memory events. Each is then of one category: parameters and
optimizer state (there before the step), gradients (held by a parameter after the backward pass), activations (made in
the forward pass and there at its end: what the backward pass was kept, and the loss), temporary (all else), other
(there before the step: inputs, tables, libraries' workspaces). Marks divide the record into phases and blocks: on a GPU
a mark is an allocation that its stack trace tells from all others, as the history knows no other kind of event; on a
CPU it is a range of the profiler's.

Limits: a GPU's autograd thread has no Python stack, so allocations of a backward pass are told by size alone there;
memory that bypasses PyTorch's allocator (the CUDA context, NCCL) is not seen.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmsys import records
from lmsys.bench.measure import without_native_stderr

CATEGORIES = ("parameters", "optimizer", "other", "gradients", "activations", "temporary")
FORWARD_END, BACKWARD_END, STEP_END = "end of forward", "end of backward", "end of optimizer step"
ENDS = {"forward": FORWARD_END, "backward": BACKWARD_END, "optimizer": STEP_END}  # of the engine's phases
_POINTS = 400  # of a timeline that are written
_MARK_PREFIX = "lmsys.mark."


@dataclass(frozen=True)
class Change:
    """An allocation of size bytes, or its release, negative. where: the operation, then frames, the innermost first."""

    address: int
    size: int
    where: tuple[str, ...] = ()


@dataclass
class Recording:
    """The changes of a step in their order; marks: name -> how many changes came before it."""

    changes: list[Change] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)
    device: torch.device | None = None
    names: list[str] = field(default_factory=list)  # of a GPU's marks, in order

    def mark(self, name: str) -> None:
        """Note this place of the record by a name."""
        if self.device.type == "cuda":
            self.names.append(name)
            _lmsys_memory_mark(self.device)
        else:
            with torch.profiler.record_function(_MARK_PREFIX + name):
                pass


@contextlib.contextmanager
def recording(device: torch.device, *, stacks: bool = False) -> Iterator[Recording]:
    """Records what its body allocates and releases on a device; the Recording is filled when the body is done.

    stacks: on a CPU, with Python frames (slower).
    """
    record = Recording(device=device)
    if device.type == "cuda":
        history = torch.cuda.memory._record_memory_history
        torch.cuda.synchronize(device)
        history("all", context="alloc", stacks="python", clear_history=True)
        try:
            yield record
            torch.cuda.synchronize(device)
            index = torch.cuda.current_device() if device.index is None else device.index
            trace = torch.cuda.memory._snapshot(device)["device_traces"][index]
        finally:
            history(None)
        from_trace(trace, record.names, record)
        return
    options = {"activities": [torch.profiler.ProfilerActivity.CPU], "profile_memory": True, "with_stack": stacks}
    with without_native_stderr(), torch.profiler.profile(**options) as profile:
        yield record
    from_profile(profile.profiler.kineto_results.experimental_event_tree(), record)


def _lmsys_memory_mark(device: torch.device) -> None:
    """An allocation that is told from others by this function's name in its stack trace."""
    torch.empty(1, dtype=torch.uint8, device=device)


def from_trace(trace: Iterable[Mapping[str, Any]], names: Sequence[str], found: Recording) -> None:
    """Fill a Recording from a device trace of the caching allocator's snapshot. names: of the marks in it, in order."""
    live: dict[int, int] = {}
    left = iter(names)
    for entry in trace:
        if entry["action"] == "alloc":
            address = entry["addr"]
            frames = entry.get("frames") or ()
            if any(frame["name"] == _lmsys_memory_mark.__name__ for frame in frames):
                found.marks[next(left)] = len(found.changes)
                continue
            live[address] = entry["size"]
            where = tuple(filter(None, (frame_name(f["filename"], f["line"], f["name"]) for f in frames)))
            found.changes.append(Change(address, entry["size"], ("", *where)))
        elif entry["action"] == "free_completed" and entry["addr"] in live:
            found.changes.append(Change(entry["addr"], -live.pop(entry["addr"])))
    assert next(left, None) is None, "the allocator's history lacks marks"


def from_profile(roots: Sequence[Any], found: Recording) -> None:
    """Fill a Recording from the event tree of PyTorch's profiler on a CPU."""
    changes: list[tuple[int, Change]] = []
    marks: list[tuple[int, str]] = []
    stack = [(root, ()) for root in roots]
    while stack:
        event, above = stack.pop()
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            where = _names_to_where(above) if fields.alloc_size > 0 else ()
            changes.append((event.start_time_ns, Change(fields.ptr, fields.alloc_size, where)))
        elif event.name.startswith(_MARK_PREFIX):
            marks.append((event.start_time_ns, event.name.removeprefix(_MARK_PREFIX)))
        stack += [(child, (event.name, *above)) for child in event.children]
    live, times = set(), []
    for time_ns, change in sorted(changes, key=lambda item: item[0]):
        if change.size > 0:
            live.add(change.address)
        elif change.address in live:
            live.discard(change.address)
        else:
            continue  # was there before
        times.append(time_ns)
        found.changes.append(change)
    for time_ns, name in sorted(marks):
        found.marks[name] = int(np.searchsorted(times, time_ns))


def _names_to_where(names: Sequence[str]) -> tuple[str, ...]:
    """Change.where of profiler events' names, the innermost first: what Python or autograd called, then our frames."""
    operator, frames = "", []
    for name in names:
        if name.startswith("aten::") or (name.endswith(("Backward", "Backward0", "Backward1")) and "::" not in name):
            operator = name
        elif match := re.fullmatch(r"(.+\.py)\((\d+)\): (.+)", name):
            frames.append(frame_name(match[1], int(match[2]), match[3]))
    return (operator, *filter(None, frames))


@functools.cache
def frame_name(filename: str, line: int, name: str) -> str | None:
    """'model.py:142 SwiGLU.forward' of a frame in this package, None of others and of this module's.

    A profiler gives the line of the definition, the allocator's history that being executed.
    """
    match = re.search(r"(?:^|/)lmsys/(.+\.py)$", filename)
    if match is None or match[1] in ("bench/memory.py", "bench/allocations.py", "bench/repeated.py"):
        return None
    around = [(first, full) for first, last, full in _functions(match[1]) if first <= line <= last]
    return f"{match[1]}:{line} {max(around)[1] if around else name}"


@functools.cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    """(first line, last line, qualified name) of the functions of a file of this package."""
    file = Path(records.__file__).parent / path
    if not file.exists():
        return []
    found, left = [], [(node, "") for node in ast.parse(file.read_text(encoding="utf-8")).body]
    while left:
        node, prefix = left.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            first = min(item.lineno for item in (node, *node.decorator_list))
            if isinstance(node, ast.FunctionDef):
                found.append((first, node.end_lineno, prefix + node.name))
            left += [(child, f"{prefix}{node.name}.") for child in node.body]
    return found


@dataclass(frozen=True)
class Timeline:
    """A recorded step. held: bytes there before it, by category. gradients: addresses after the backward pass."""

    recording: Recording
    held: dict[str, int]
    gradients: frozenset[int]
    allocator_peak: int | None = None  # bytes, as a GPU's allocator has counted them, with its rounding

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        return int(self.total.max()) if self.allocator_peak is None else self.allocator_peak

    @functools.cached_property
    def allocations(self) -> list[tuple[Change, int, int]]:
        """(allocation, index of its change, index of its release, or the number of changes)."""
        started: dict[int, int] = {}
        found, changes = [], self.recording.changes
        for index, change in enumerate(changes):
            if change.size > 0:
                started[change.address] = index
            else:
                begin = started.pop(change.address)
                found.append((changes[begin], begin, index))
        found += [(changes[begin], begin, len(changes)) for begin in started.values()]
        return sorted(found, key=lambda item: item[1])

    def category(self, change: Change, begin: int, end: int) -> str:
        """Of an allocation, by when it was there: see the module."""
        marks = self.recording.marks
        if begin < marks[FORWARD_END] <= end:
            return "activations"
        if BACKWARD_END in marks and begin < marks[BACKWARD_END] <= end and change.address in self.gradients:
            return "gradients"
        return "temporary"

    def phase(self, index: int) -> str:
        """The part of the step that a change is in."""
        marks = self.recording.marks
        return next((name for name, mark in ENDS.items() if mark in marks and index < marks[mark]), "after")

    @functools.cached_property
    def series(self) -> dict[str, np.ndarray]:
        """Category -> bytes before the first change and after each."""
        length = len(self.recording.changes) + 1
        deltas = {name: np.zeros(length + 1, dtype=np.int64) for name in CATEGORIES}
        for change, begin, end in self.allocations:
            delta = deltas[self.category(change, begin, end)]
            delta[begin + 1] += change.size
            delta[end + 1] -= change.size
        return {name: np.cumsum(delta)[:length] + self.held.get(name, 0) for name, delta in deltas.items()}

    @functools.cached_property
    def total(self) -> np.ndarray:
        return sum(self.series.values())

    def at(self, mark: str) -> int:
        """Bytes in all at a mark."""
        return int(self.total[self.recording.marks[mark]])

    @property
    def peak_activations(self) -> int:
        """Most bytes until the backward pass ends, beside parameters, optimizer state, gradients and the rest."""
        end = self.recording.marks.get(BACKWARD_END, len(self.recording.changes)) + 1
        return int((self.series["activations"] + self.series["temporary"])[:end].max())


def sampled(timeline: Timeline, points: int = _POINTS) -> Iterator[dict[str, Any]]:
    """Rows of a timeline: of each stretch of changes the one with the most memory, MiB by category."""
    total = timeline.total
    edges = np.unique(np.linspace(0, len(total), min(points, len(total)) + 1).astype(int))
    for begin, end in itertools.pairwise(edges):
        index = int(begin + np.argmax(total[begin:end]))
        row = {f"{name}_mib": timeline.series[name][index] / 2**20 for name in CATEGORIES}
        yield {"change": index, "phase": timeline.phase(max(0, index - 1))} | row


def largest(timeline: Timeline, *, size: int | None = None, category: str | None = None) -> list[dict[str, Any]]:
    """The eight largest allocations, those of one size, category and place together; size, category: only those."""
    counts: Counter = Counter()
    for change, begin, end in timeline.allocations:
        kind = timeline.category(change, begin, end)
        if size in (None, change.size) and category in (None, kind):
            counts[change.size, kind, timeline.phase(begin), change.where] += 1
    rows = []
    for (each, kind, phase, where), count in sorted(counts.items(), key=lambda item: (-item[0][0], -item[1]))[:8]:
        row = {"size_mib": each / 2**20, "count": count, "category": kind, "phase": phase}
        rows.append(row | {"operator": where[0] if where else "", "stack": " < ".join(where[1:5])})
    return rows
