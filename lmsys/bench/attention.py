"""The attention sweep: kernels x shapes x passes, each point checked and then timed.

Four groups of shapes (the column tier), each with a question of its own:

- throughput: lengths x head dims, causal and not, at a constant number of tokens and a constant heads x head_dim, as in
  FlashAttention's benchmarks (arXiv:2307.08691, section 4.1): which kernel is how fast.
- grouped_query: several query heads a key head, causal.
- few_blocks: few queries and heads with long keys, where a tile of queries for each processor is not to be had.
- tiers: one batch and number of heads at pairs of lengths, with the kernels that store all scores beside those that
  do not.

A point's output is compared with the float64 oracle on one key head, beside PyTorch's plain attention in the same
dtype, before it is timed; a kernel whose error passes twice PyTorch's is a row with status error, not a time. All
kernels of a shape are checked (and so compiled) first, then timed one after the other, so that a ratio compares times
taken seconds apart. Where the default path of flash_attention_triton is not the portable one, the portable one is
measured as well: see the column path.
"""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lmsys import cost, records
from lmsys.attention import KERNELS, attention, check_support, explain
from lmsys.attention.reference import reference_attention, scaled_dot_prod_attention
from lmsys.bench import ahead
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_names, require_numbers, scales
from lmsys.bench.measure import DTYPES, Measurement, available_bytes, failure, measure, method, release
from lmsys.bench.standings import CASE as SHAPE
from lmsys.bench.standings import GROUPS, of_group, with_series
from lmsys.config import require
from lmsys.device import resolve_device

PASSES = ("forward", "backward", "forward_backward")
_REFERENCE_ELEMENTS = 2**28  # scores that the float64 check may hold: 2 GiB each for scores and softmax
_BUDGET_S = 0.6  # a kernel that takes long at a point gets fewer samples there, not under three
_SLOW_BUDGET_S = 0.2  # of the slow kernels, whose times are not compared to the percent
_COMPILE_LIMIT_S = 240.0  # compiling ahead ends here; what is not done by then is compiled when it is measured
_ERROR_FLOOR = 4e-6  # fp32 of a few keys: PyTorch's own error is near 0 there, another order of operations' is not

# --- Parameters -----------------------------------------------------------------------------------

SCALES = scales("attention_shapes")  # of each: tiers, name -> (queries, keys), and the sizes of the other groups


def check(p: Parameters) -> None:
    """Raises ValueError: unknown names, numbers out of range, tiers of no power of two, groups that do not fit."""
    if p.kernels is None:  # without those that compile for seconds a shape where only that all works is shown
        p.kernels = [name for name in KERNELS if p.scale == "full" or KERNELS[name].compiled_per != "shape"]
    require_names(p, {"kernels": KERNELS, "groups": GROUPS, "dtypes": DTYPES, "passes": PASSES})
    require_numbers(p, dict.fromkeys(("batch", "heads", "head_dim", "kv_heads", "iters"), 1))
    require_numbers(p, {"warmup": 0, "compile_ahead": 0})
    p.kv_heads = p.heads if p.kv_heads is None else p.kv_heads
    require(p.heads % p.kv_heads == 0, f"heads {p.heads} is not a multiple of kv_heads {p.kv_heads}")
    p.tiers = dict(map(parse_tier, p.custom_tiers)) if p.custom_tiers else SCALES[p.scale]["tiers"]
    resolve_device(p.device)
    _select_groups(p)


def _select_groups(p: Parameters) -> None:
    """A shape of the tiers, where one is given, selects that group, unless groups are given too."""
    of_tiers = any(map(p.is_given, ("custom_tiers", "batch", "heads", "kv_heads", "head_dim")))
    beyond = not all(KERNELS[kernel].slow for kernel in p.kernels)
    if not p.is_given("groups"):
        p.groups = p.groups if beyond and not of_tiers else ["tiers"]
    require(
        not of_tiers or "tiers" in p.groups,
        "custom_tiers, batch, heads, kv_heads and head_dim are of the group 'tiers', which is not among those given",
    )
    require(beyond or p.groups == ["tiers"], f"{', '.join(p.kernels)}: measured in the group 'tiers' only")


def parse_tier(text: str) -> tuple[str, tuple[int, int]]:
    """'128:64' -> a tier of 128 queries and 64 keys. Both must be powers of two."""
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    require(match is not None, f"tier '{text}' is not of the form q:k, such as 128:64")
    q_len, k_len = map(int, match.groups())
    for length in (q_len, k_len):
        power = length > 0 and length & (length - 1) == 0
        require(power, f"tier '{text}': {length} is not a power of two; give 1, 2, 4, 8, ... such as 128:64")
    return text, (q_len, k_len)


NOTEBOOK = Notebook("attention_sweep", check)

# --- Points ---------------------------------------------------------------------------------------


def shapes(p: Parameters) -> list[Point]:
    """The shapes of a sweep, group by group."""
    keys = [key for key in SHAPE if key not in ("tier", "dtype")]
    groups = [name for name in GROUPS if name in p.groups]
    return [
        {"tier": tier} | dict(zip(keys, values, strict=True)) | {"dtype": dtype}
        for dtype in p.dtypes
        for group in groups
        for tier, *values in _shapes(p, group)
    ]


def _shapes(p: Parameters, group: str) -> Iterator[tuple]:
    """Tier, batch, heads, kv_heads, q_len, k_len, head_dim and causal of a group's shapes."""
    sizes = SCALES[p.scale]
    tokens, width, head_dims = sizes["tokens"], sizes["width"], sizes["head_dims"]
    if group == "tiers":
        for causal, (name, lengths) in itertools.product(p.causal, p.tiers.items()):
            yield name, p.batch, p.heads, p.kv_heads, *lengths, p.head_dim, causal
    elif group == "throughput":
        for causal, d, n in itertools.product(p.causal, head_dims, sizes["lengths"]):
            yield group, max(1, tokens // n), width // d, width // d, n, n, d, causal
    elif group == "grouped_query":
        for d, ratio, n in itertools.product(head_dims, sizes["ratios"], sizes["grouped_lengths"]):
            yield group, tokens // n, width // d, width // d // ratio, n, n, d, True
    else:
        heads = sizes["few_heads"]
        for d, q_len in itertools.product(head_dims, sizes["few_queries"]):
            yield group, 1, heads, heads, q_len, sizes["few_keys"], d, False


def points(p: Parameters) -> list[Point]:
    """Each shape with its kernels, and the paths of flash_attention_triton, pass by pass."""
    device = resolve_device(p.device)
    return [
        shape | {"kernel": kernel, "pass": which, "path": paths.get(which, ""), "options": options}
        for shape in shapes(p)
        for which in p.passes
        for kernel in p.kernels
        if shape["tier"] not in GROUPS or not KERNELS[kernel].slow
        for options, paths in variants(kernel, shape, device)
    ]


def variants(kernel: str, shape: Point, device: torch.device) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Options that a kernel is measured with, and the path of each pass.

    As it comes, and where that is another, portable.
    """
    if "path" not in KERNELS[kernel].options:
        return [({}, {})]
    sizes = [
        (shape["batch"], shape[h], shape[n], shape["head_dim"]) for h, n in (("heads", "q_len"), ("kv_heads", "k_len"))
    ]
    q, k = (torch.empty(size, dtype=DTYPES[shape["dtype"]], device=device) for size in sizes)
    found: list[tuple[dict[str, Any], dict[str, str]]] = []
    for options in ({}, {"path": "portable"}):
        try:
            chosen = explain(q, k, k, shape["causal"], **options)
        except ValueError:  # the environment asks for a path that refuses this; so does the call, and that is its row
            found.append((options, {}))
            continue
        both = chosen.forward if chosen.forward == chosen.backward else f"{chosen.forward}+{chosen.backward}"
        paths = {"forward": chosen.forward, "backward": chosen.backward, "forward_backward": both}
        if not found or paths != found[0][1]:
            found.append((options, paths))
    return found


# --- Measuring ------------------------------------------------------------------------------------

_current: Case | None = None  # the shape at hand: its inputs, its float64 answer, and what was checked


def case_of(point: Point, p: Parameters, kind: type[Case] | None = None) -> Case:
    """The point's shape, made anew where the one at hand is another. kind: Case, or a class derived from it."""
    global _current
    shape, kind = {key: point[key] for key in SHAPE}, kind or Case
    if type(_current) is not kind or _current.key != (shape, p):
        _current = None  # its memory first
        release(resolve_device(p.device))
        _current = kind(shape, p)
    return _current


def prepare(group: list[Point], p: Parameters) -> None:
    """Check, and so compile, all kernels of a shape before the first is timed."""
    for point in group:
        case_of(point, p).check(point["kernel"], point["options"])
    gc.collect()
    gc.freeze()  # what compilers keep, which release() need not look through before each measurement


def measure_point(point: Point, p: Parameters) -> Row:
    """Errors beside float64, then times and memory, of one kernel in one pass."""
    return measured(case_of(point, p), point)


def measured(case: Case, point: Point) -> Row:
    """The columns of a point whose inputs the case holds."""
    kernel, options, which = point["kernel"], point["options"], point["pass"]
    checked = case.check(kernel, options)[which]
    if "status" in checked:
        return checked
    try:
        result = case.measure(kernel, options, which)
    except Exception as error:
        return checked | failure(error)
    interpreted = case.device.type == "cpu" and "triton" in kernel
    row = checked | {"note": "in Triton's CPU interpreter" * interpreted} | result.columns()
    size = [point[name] for name in ("batch", "heads", "q_len", "k_len", "head_dim", "causal")]
    return row | {"status": "ok", "tflops": cost.attention_flops(*size, which) / result.median_ms / 1e9}


class Case:
    """The inputs of one shape, and the float64 answer for its first key head and the query heads that read it."""

    def __init__(self, shape: Point, p: Parameters):
        self.key, self.p, self.shape = (shape, p), p, shape
        self.device, self.dtype, self.causal = resolve_device(p.device), DTYPES[shape["dtype"]], shape["causal"]
        self.backward = any(which != "forward" for which in p.passes)
        generator = torch.Generator(self.device).manual_seed(p.seed)

        def random(heads: str, length: str) -> torch.Tensor:
            size = (shape["batch"], shape[heads], shape[length], shape["head_dim"])
            return torch.randn(size, generator=generator, device=self.device, dtype=torch.float32).to(self.dtype)

        self.q, self.k, self.v = random("heads", "q_len"), random("kv_heads", "k_len"), random("kv_heads", "k_len")
        self.grad = random("heads", "q_len")
        # A causal mask aligned top left makes the first rows of the queries a smaller problem of the same kind.
        self.heads_a_key_head = shape["heads"] // shape["kv_heads"]
        elements_a_row = shape["k_len"] * self.heads_a_key_head
        self.checked_rows = min(shape["q_len"], max(1, _REFERENCE_ELEMENTS // elements_a_row))
        self._expected: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        self._checked: dict[str, dict[str, Row]] = {}

    def check(self, kernel: str, options: Mapping[str, Any]) -> dict[str, Row]:
        """For each pass, what a row says before it is timed: errors, or a status with its reason. Compiles, too."""
        key = f"{kernel} {sorted(options.items())}"
        if key not in self._checked:
            self._checked[key] = self._check(kernel, options)
        return self._checked[key]

    def _check(self, kernel: str, options: Mapping[str, Any]) -> dict[str, Row]:
        refused: dict[str, Row] = {}

        def errors_of(passes: list[str], backward: bool) -> dict[str, Row]:
            try:
                return self._errors(kernel, options, passes, backward)
            except Exception as reason:  # one kernel's failure is a row, not the end of the others' measurements
                return dict.fromkeys(passes, failure(reason))

        for which in self.p.passes:
            try:
                self._check_support(kernel, which)
            except (ValueError, MemoryError) as reason:  # the kernel does not take this shape, dtype or device
                refused[which] = failure(reason)
        passes = [which for which in self.p.passes if which not in refused]
        backward = any(which != "forward" for which in passes)
        errors = errors_of(passes, backward) if passes else {}
        release(self.device)
        if backward and "forward" in passes and "status" in errors["forward"]:  # which may be fine without gradients
            errors |= errors_of(["forward"], False)
        return errors | refused

    def measure(self, kernel: str, options: Mapping[str, Any], which: str) -> Measurement:
        """Times and memory of one pass."""
        # Where a backward pass is measured too, the forward pass keeps what that needs, as in training: it is then the
        # same compiled graph, which torch.compile would make anew without gradients.
        gradients = self.backward and self.device.type in KERNELS[kernel].backward
        inputs = self.inputs(gradients)

        def forward() -> torch.Tensor:
            with torch.set_grad_enabled(gradients):
                return self.call(kernel, options)

        def backward(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(output, inputs, self.grad)

        functions = {
            "forward": (forward, None),
            "backward": (backward, lambda: (forward(),)),
            "forward_backward": (lambda: backward(forward()), None),
        }
        return measure(
            functions[which][0],
            device=self.device,
            warmup=self.p.warmup,
            iterations=self.p.iters,
            prepare=functions[which][1],
            resident=(*inputs, self.grad),
            budget_s=getattr(self.p, "budget_s", _SLOW_BUDGET_S if KERNELS[kernel].slow else _BUDGET_S),
        )

    def outputs(self, kernel: str, options: Mapping[str, Any], backward: bool) -> list[torch.Tensor]:
        """o, and dq, dk, dv where a backward pass is asked for."""
        inputs = self.inputs(backward)
        with torch.set_grad_enabled(backward):
            output = self.call(kernel, options)
        return [output.detach(), *torch.autograd.grad(output, inputs, self.grad)] if backward else [output]

    def inputs(self, backward: bool) -> tuple[torch.Tensor, ...]:
        for tensor in (self.q, self.k, self.v):
            tensor.requires_grad_(backward)
        return self.q, self.k, self.v

    def call(self, kernel: str, options: Mapping[str, Any]) -> torch.Tensor:
        return attention(self.q, self.k, self.v, causal=self.causal, kernel=kernel, **options)

    def _check_support(self, kernel: str, which: str) -> None:
        """Raises ValueError: the kernel does not take it. MemoryError: a CPU has none, whose OOM ends the process."""
        shape = {name: self.shape[name] for name in ("head_dim", "heads", "kv_heads")}
        check_support(kernel, device=self.device, dtype=self.dtype, backward=which != "forward", **shape)
        arrays = KERNELS[kernel].score_arrays
        if self.device.type == "cuda" or not arrays:
            return
        scores = self.q.shape[0] * self.q.shape[1] * self.q.shape[2] * self.k.shape[2] * self.q.element_size()
        needed, free = (arrays + 2 * (which != "forward")) * scores, available_bytes()
        if free is not None and needed >= 0.8 * free:
            raise MemoryError(f"the scores alone need {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free")

    def _errors(self, kernel: str, options: Mapping[str, Any], passes: Sequence[str], backward: bool) -> dict[str, Row]:
        """For each pass, the largest relative error (2-norm) of its checked tensors, and PyTorch's in the same dtype.

        An error row where it is more than twice PyTorch's.
        """
        if self._expected is None:
            exact = self._one_key_head(
                lambda q, k, v: reference_attention(q, k, v, causal=self.causal)[0], torch.float64
            )
            plain = self._one_key_head(lambda q, k, v: scaled_dot_prod_attention(q, k, v, self.causal), self.dtype)
            self._expected = exact, plain
        exact, plain = self._expected
        tensors = self.outputs(kernel, options, backward)
        actual = [t[0, : self.heads_a_key_head, : self.checked_rows] for t in tensors[:2]]  # o, dq
        if self.checked_rows == self.shape["q_len"]:  # dk and dv sum over all queries
            actual += [t[0, :1] for t in tensors[2:]]
        errors: dict[str, Row] = {}
        for which in passes:
            last = 1 if which == "forward" else len(actual)
            error, error_pytorch = (_largest_error(each[:last], exact[:last]) for each in (actual, plain))
            errors[which] = {"error": error, "error_pytorch": error_pytorch}
            if not error <= 2 * error_pytorch + _ERROR_FLOOR:
                note = f"wrong: error {error:.2e} against float64, PyTorch's {error_pytorch:.2e}"
                errors[which] |= {"status": "error", "note": note}
        return errors

    def _one_key_head(self, function: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        rows, heads = self.checked_rows, self.heads_a_key_head
        q = self.q.detach()[0, :heads, :rows].to(dtype).requires_grad_(self.backward)
        k, v = (t.detach()[0, :1].to(dtype).requires_grad_(self.backward) for t in (self.k, self.v))
        with torch.set_grad_enabled(self.backward):
            output = function(q, k, v)
        if not self.backward:
            return [output]
        gradients = torch.autograd.grad(output, (q, k, v), self.grad[0, :heads, :rows].to(dtype))
        return [output.detach(), *gradients]


def _largest_error(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest ||a - e|| / ||e|| of the pairs, ||a - e|| where e is zero; NaN counts as infinite."""
    errors = []
    for a, e in zip(actual, exact, strict=True):
        norm = e.double().norm()
        errors.append(((a.double() - e.double()).norm() / torch.where(norm > 0, norm, 1.0)).item())
    return max(float("inf") if error != error else error for error in errors)


# --- Compiling ahead ------------------------------------------------------------------------------


def other_groups(p: Parameters) -> Callable[[Row], bool]:
    """Which rows of earlier results are of groups that this run does not measure."""
    return lambda row: (row["tier"] if row["tier"] in GROUPS else "tiers") not in p.groups


def compile_ahead(p: Parameters) -> None:
    """Compile each shape, or each head dim, mask and group of shapes, that a kernel compiles by itself."""
    found: dict[tuple, Point] = {}
    for point in points(p) if p.compile_ahead else ():
        group = point["tier"] if point["tier"] in GROUPS else "tiers"
        kind = (group, *(point[key] for key in ("head_dim", "causal", "kv_heads", "dtype")), point["q_len"] <= 128)
        per = {"shape": tuple(point[key] for key in SHAPE), "kind": kind}.get(KERNELS[point["kernel"]].compiled_per)
        if per:
            found.setdefault((point["kernel"], str(point["options"]), per), point)
    ahead.compile_points(compile_point, list(found.values()), p, p.compile_ahead, _COMPILE_LIMIT_S)


def compile_point(point: Point, p: Parameters) -> None:
    """Run the kernel once, backward too where a pass needs it."""
    case, kernel = case_of(point, p), point["kernel"]
    case.outputs(kernel, point["options"], case.backward and case.device.type in KERNELS[kernel].backward)


SWEEP = Experiment(
    name="attention_sweep_results",
    columns=(
        *("kernel", "batch", "heads", "q_len", "k_len", "head_dim", "dtype", "causal", "pass", "status"),
        *("median_ms", "p20_ms", "p80_ms", "samples", "tflops", "peak_mib"),
        *("tier", "kv_heads", "path", "error", "error_pytorch", "device", "note"),
    ),
    points=points,
    measure=measure_point,
    group=SHAPE,
    method=lambda p: method(resolve_device(p.device), p.warmup, p.iters),
    prepare=prepare,
    before=compile_ahead,
)


# --- Tables ---------------------------------------------------------------------------------------


def styles(series: Sequence[str]) -> dict[str, tuple[str, str | None, bool]]:
    """Label, colour and whether dashed (a peer, or the portable path) of each series, from the kernels' table."""
    found = {}
    for name in series:
        kernel = KERNELS[name.split(" ")[0]]
        portable = name != kernel.name
        found[name] = (kernel.label + portable * " (portable)", kernel.colour, portable or not kernel.ours)
    return found


def report_text(frame) -> str:
    """Every time as Markdown: kernels down, shapes across, and why others have none."""
    frame = with_series(frame)
    frame["shape"] = frame.q_len.astype(str) + ":" + frame.k_len.astype(str)
    grouped = frame.heads != frame.kv_heads
    frame.loc[grouped, "shape"] += " / " + (frame.heads // frame.kv_heads).astype(str)
    frame["cell"] = [
        records.spread(row.median_ms, row.p20_ms, row.p80_ms) if row.status == "ok" else row.status
        for row in frame.itertuples()
    ]
    parts = [f"# Attention sweep\n\nMeasured on {frame.device.iloc[0]}. Times in ms: median [20th, 80th percentile]."]
    for group in GROUPS:
        sections = of_group(frame, group).groupby(["pass", "dtype", "head_dim", "causal"], sort=False)
        for (which, dtype, head_dim, causal), rows in sections:
            mask = "causal" if causal else "not causal"
            parts.append(f"## {group.replace('_', ' ')}: {which}, {dtype}, head_dim {head_dim}, {mask}")
            table = rows.pivot_table(index="series", columns="shape", values="cell", aggfunc="first", sort=False)
            parts.append(records.table(table.reset_index()))
    failed = frame[frame.status != "ok"].drop_duplicates(["series", "status", "note"])
    if len(failed):
        parts += ["## No time", records.table(failed[["series", "shape", "pass", "status", "note"]])]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
