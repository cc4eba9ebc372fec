"""The accuracy sweep: our attention kernels on random shapes against float64, output, log-sum-exp and gradients.

The measure is FlashAttention's (its tests/test_flash_attn.py, arXiv:2205.14135): a kernel's largest error against
float64 may be twice that of PyTorch's plain attention in the same dtype, plus a floor, made from what rounding must do,
for where that error is nothing, as with a single key. Beyond that, here: the log-sum-exp that the backward pass reads
is checked as well; every uninitialized tensor that a kernel makes is filled with NaN first, so that an element it does
not write shows; and what should be the same bits in every run is compared bit by bit, the forward pass always, the
gradients where a kernel has an option to make them so.

A case is drawn from a seed: lengths that no tile divides and lengths that all do, queries and keys of different
numbers, causal or not, grouped-query heads, layouts that a model produces, a scale of the user's, scores so large that
the softmax is nearly one-hot.
Lengths are either all multiples of 16 or none is, and heads are never 1 or 16: Triton compiles a kernel anew for each
such property, and the sweep would spend its time there. A few cases of one query, one key or one head make up for it.
For the same reason most cases are of head dim 64 or 128, where all kernels take part.

On a GPU the cases run in several processes, each compiling what its own need. A case that fails is a row, never the
end.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmsys import records
from lmsys.attention import KERNELS, attention, check_support, get_kernel
from lmsys.attention.reference import causal_mask, reference_attention, repeat_heads
from lmsys.bench.measure import DTYPES, is_out_of_memory, release
from lmsys.config import require, resolve_scale
from lmsys.device import device_name, resolve_device
from lmsys.parallel.group import context

NAME = "attention_accuracy_results"
EXTRA_COLUMNS = ("device", "note")
KERNEL_NAMES = ("flash_attention_triton", "flash_attention_cuda", "flash_attention_torch")
OUTPUTS = ("o", "lse", "dq", "dk", "dv")
LIMIT = 2.0  # times PyTorch's error
COMMON_HEAD_DIMS, OTHER_HEAD_DIMS = (64, 128), (16, 24, 32, 48, 80, 96, 160, 192, 256)
LAYOUTS = ("heads first", "tokens first", "packed")
_SCORES = 2**25  # most that a case has: 256 MiB in float64
_PRESETS = {
    "smoke": {"cases": 4, "longest": 48, "workers": 0},
    "cpu": {"cases": 16, "longest": 144, "workers": 0},
    "full": {"cases": 320, "longest": 2200, "workers": 12},  # 200 of them in half precision at head_dim 64 and 128
}


@dataclass(frozen=True)
class Case:
    """One random problem. scale.

    None is 1 / sqrt(head_dim). magnitude: of the elements of q and k; those of v and the gradient are of 1.
    """

    case: int
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    dtype: str
    causal: bool
    layout: str
    scale: float | None
    magnitude: float


@dataclass(frozen=True)
class AccuracySettings:
    """What the sweep runs; make it with settings()."""

    scale: str
    kernels: tuple[str, ...]
    cases: int
    longest: int
    workers: int
    device: str
    seed: int


def settings(
    scale: str = "auto",
    kernels: Sequence[str] | None = None,
    cases: int | None = None,
    longest: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> AccuracySettings:
    """The settings of a sweep: the scale's, with what is given in their place.

    Args:
        cases: how many. longest: most queries or keys. workers: processes; 0 runs all in this one.
    Raises:
        ValueError: unknown kernel or scale, a number out of range, a device that is not here.
    """
    scale = resolve_scale(scale)
    given = {"cases": cases, "longest": longest, "workers": workers}
    values = _PRESETS[scale] | {key: value for key, value in given.items() if value is not None}
    for key, least in (("cases", 1), ("longest", 16), ("workers", 0)):
        require(
            type(values[key]) is int and values[key] >= least, f"{key} is {values[key]!r}; it must be {least} or more"
        )
    kernels = KERNEL_NAMES if kernels is None else tuple(kernels)
    require(len(kernels) > 0, "kernels must not be empty")
    for kernel in kernels:
        get_kernel(kernel)
    resolve_device(device)
    return AccuracySettings(scale=scale, kernels=kernels, device=device, seed=seed, **values)


@dataclass(frozen=True)
class Runner:
    """A kernel as it is measured: with which options, and which path each pass then takes."""

    kernel: str
    options: dict[str, Any]
    paths: dict[str, str]


def runners(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> list[Runner]:
    """The kernel as it comes, and flash_attention_triton's portable path beside its default where that is another."""
    from lmsys.bench.attention import variants

    names = {dtype: name for name, dtype in DTYPES.items()}
    shape = {"batch": q.shape[0], "heads": q.shape[1], "kv_heads": k.shape[1], "q_len": q.shape[2], "k_len": k.shape[2]}
    shape |= {"head_dim": q.shape[3], "dtype": names[q.dtype], "causal": causal}
    return [Runner(kernel, *variant) for variant in variants(kernel, shape, q.device)]


# --- Cases ----------------------------------------------------------------------------------------


def cases(sweep: AccuracySettings) -> list[Case]:
    """The problems of a sweep, the same for the same seed, number and longest length."""
    draw = random.Random(sweep.seed)
    return [_case(draw, index, sweep.longest) for index in range(sweep.cases)]


def _case(draw: random.Random, index: int, longest: int) -> Case:
    """Of eight cases, five are in half precision at the common head dims, one is float32 there, two have another head
    dim.
    """
    kind, turn = index % 8, index // 8
    even, causal = draw.random() < 0.4, draw.random() < 0.5
    if kind < 5:
        head_dim, dtype = COMMON_HEAD_DIMS[(index + turn) % 2], ("bf16", "fp16")[(index // 2 + turn) % 2]
        even = even and dtype == "bf16"
    elif kind == 5:
        head_dim, dtype, even = COMMON_HEAD_DIMS[turn % 2], "fp32", False
    else:  # one kind of length and mask for each head dim and dtype, for the compiler's sake
        other = 2 * turn + kind - 6
        which = other // len(OTHER_HEAD_DIMS) % 3
        head_dim, dtype = OTHER_HEAD_DIMS[other % len(OTHER_HEAD_DIMS)], ("bf16", "fp16", "fp32")[which]
        even, causal = (
            head_dim in OTHER_HEAD_DIMS[::2] and dtype == "bf16",
            (other % len(OTHER_HEAD_DIMS) + which) % 2 == 0,
        )
    q_len, k_len = _length(draw, longest, even), _length(draw, longest, even)
    if draw.random() < 0.4:
        k_len = q_len
    batch, kv_heads = draw.randint(1, 3), draw.choice((2, 3))
    heads = kv_heads * (draw.choices((1, 2, 4), (6, 3, 1))[0] if kind < 5 else draw.choice((1, 2)))
    if kind < 5 and draw.random() < 0.06:
        edge = draw.choice(("one query", "one key", "one head"))
        q_len, k_len = (1 if edge == "one query" else q_len), (1 if edge == "one key" else k_len)
        batch, heads, kv_heads = (batch, 1, 1) if edge == "one head" else (batch, heads, kv_heads)
    while batch * heads * q_len * k_len > _SCORES:
        batch, heads = (batch - 1, heads) if batch > 1 else (1, kv_heads)
    layout = draw.choice(LAYOUTS if q_len == k_len else LAYOUTS[:2])
    scale = round(draw.uniform(0.02, 0.5), 3) if draw.random() < 0.3 else None
    magnitude = round(draw.uniform(3, 8), 2) if draw.random() < 0.3 else 1.0
    return Case(index, batch, heads, kv_heads, q_len, k_len, head_dim, dtype, causal, layout, scale, magnitude)


def _length(draw: random.Random, longest: int, even: bool) -> int:
    """From 2 to longest, as many under the geometric middle as over it; a multiple of 16 (at times of 128), or none."""
    length = round(math.exp(draw.uniform(math.log(2), math.log(longest))))
    if not even:
        return length - 1 if length % 16 == 0 else length
    step = 128 if draw.random() < 0.4 and longest >= 128 else 16
    return max(step, length // step * step)


def inputs(case: Case, device: torch.device, seed: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, random normal, (B, H, T, D) in the case's layout.

    Q, k and v are leaves that ask for gradients.
    """
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + case.case)
    dtype, (batch, q_len, k_len, head_dim) = DTYPES[case.dtype], (case.batch, case.q_len, case.k_len, case.head_dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    if case.layout == "heads first":
        lengths = [(case.heads, q_len), (case.kv_heads, k_len), (case.kv_heads, k_len), (case.heads, q_len)]
        q, k, v, do = (normal(batch, heads, length, head_dim) for heads, length in lengths)
    elif case.layout == "tokens first":
        lengths = [(q_len, case.heads), (k_len, case.kv_heads), (k_len, case.kv_heads), (q_len, case.heads)]
        q, k, v, do = (normal(batch, length, heads, head_dim).transpose(1, 2) for length, heads in lengths)
    else:  # one projection's output, cut into q, k and v
        packed = normal(batch, q_len, case.heads + 2 * case.kv_heads, head_dim).transpose(1, 2)
        packed[:, : case.heads + case.kv_heads] *= case.magnitude
        q, k, v = packed.to(dtype).split((case.heads, case.kv_heads, case.kv_heads), 1)
        do = normal(batch, case.heads, q_len, head_dim)
    if case.layout != "packed":
        q, k = q * case.magnitude, k * case.magnitude
    q, k, v = (t.to(dtype).detach().requires_grad_() for t in (q, k, v))
    return [q, k, v, do.to(dtype)]


# --- One case -------------------------------------------------------------------------------------


class Poisoned(TorchDispatchMode):
    """In its block, a floating-point tensor that is made without values holds NaN, so that what is never written shows.

    PyTorch does the same under torch.use_deterministic_algorithms, which would also choose other kernels.
    """

    _EMPTY = tuple(
        getattr(torch.ops.aten, name)
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in self._EMPTY and result.is_floating_point():
            result.fill_(math.nan)
        return result


def case_rows(sweep: AccuracySettings, case: Case) -> Iterator[dict[str, Any]]:
    """A row for each kernel, and path of it, that takes the case."""
    device = resolve_device(sweep.device)
    taking = [kernel for kernel in sweep.kernels if _takes(kernel, case, device)]
    base = dataclasses.asdict(case) | {"device": device_name(device)}
    try:
        tensors = inputs(case, device, sweep.seed)
        exact, plain = (_reference(case, tensors, dtype) for dtype in (torch.float64, DTYPES[case.dtype]))
        floors = _floors(case, tensors, exact)
        found = [runner for kernel in taking for runner in runners(kernel, *tensors[:3], case.causal)]
    except Exception as reason:  # no reference, as for want of memory: every kernel's row says so
        failure = _failure(reason, device)
        yield from (base | {"kernel": kernel, "path": ""} | failure for kernel in taking)
        return
    for runner in found:
        named = {"kernel": runner.kernel, "path": runner.paths.get("forward_backward", "")}
        try:
            measured = _compare(case, runner, tensors, exact, plain, floors)
        except Exception as reason:  # one kernel's failure is a row, not the end of the sweep
            measured = _failure(reason, device)
        yield base | named | measured


def _takes(kernel: str, case: Case, device: torch.device) -> bool:
    try:
        check_support(
            kernel,
            device=device,
            dtype=DTYPES[case.dtype],
            head_dim=case.head_dim,
            heads=case.heads,
            kv_heads=case.kv_heads,
            backward=True,
        )
    except ValueError:  # not the kernel's to take; the report says how many cases each had
        return False
    return True


def _failure(reason: Exception, device: torch.device) -> dict[str, Any]:
    status = "oom" if is_out_of_memory(reason) else "error"
    if device.type == "cpu" or status == "oom":  # after a CUDA error even this would raise
        release(device)
    return {"status": status, "note": f"{type(reason).__name__}: {(str(reason).strip().splitlines() or [''])[0]}"}


def _reference(case: Case, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors[:3])
    o, lse = reference_attention(q, k, v, causal=case.causal, scale=case.scale)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), tensors[3].to(dtype))]


def _outputs(case: Case, runner: Runner, tensors: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """o, lse, dq, dk, dv of a kernel. lse is what its autograd.Function saved for the backward pass."""
    q, k, v, do = tensors
    with Poisoned(), torch.autograd.set_multithreading_enabled(False):  # backward in this thread, under the mode
        o = attention(q, k, v, causal=case.causal, kernel=runner.kernel, scale=case.scale, **runner.options, **options)
        (lse,) = [t for t in o.grad_fn.saved_tensors if t.shape == q.shape[:-1]]
        return [o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def _compare(
    case: Case,
    runner: Runner,
    tensors: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    floors: Mapping[str, float],
) -> dict[str, Any]:
    """The measured part of a row."""
    actual = _outputs(case, runner, tensors)
    row: dict[str, Any] = {}
    wrong = []
    for name, a, p, e in zip(OUTPUTS, actual, plain, exact, strict=True):
        if a.shape != e.shape or (name != "lse" and a.dtype != p.dtype):
            wrong.append(f"{name} is {a.dtype} {tuple(a.shape)}, not {p.dtype} {tuple(e.shape)}")
            continue
        row[f"{name}_ratio"] = _ratio(a, p, e, floors[name])
        row[f"{name}_error"] = _relative(a, e)
        if row[f"{name}_ratio"] > LIMIT:
            wrong.append(f"{name} is off by {row[f'{name}_ratio']:.3g} times PyTorch's error")
    differ = _differing(case, runner, tensors, actual)
    if differ:
        wrong.append(f"{' and '.join(differ)}: not the same bits in a second run")
    status = {"status": "error", "note": "; ".join(wrong)} if wrong else {"status": "ok"}
    return row | status | {"deterministic": not differ}


def _differing(case: Case, runner: Runner, tensors: Sequence[torch.Tensor], first: Sequence[torch.Tensor]) -> list[str]:
    """Which tensors two runs do not give the same bits of.

    O and lse of any two, gradients of two that are asked for it.
    """
    if "deterministic" not in KERNELS[runner.kernel].options:
        pairs = list(zip(OUTPUTS, first, _outputs(case, runner, tensors), strict=True))[:2]
    else:
        one, two = (_outputs(case, runner, tensors, deterministic=True) for _ in range(2))
        pairs = [("o", first[0], one[0]), ("lse", first[1], one[1]), *zip(OUTPUTS, one, two, strict=True)]
    return list(dict.fromkeys(name for name, a, b in pairs if not _same_bits(a, b)))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8) for t in (a, b)))


def _floors(case: Case, tensors: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    """For each output, the error that is allowed where PyTorch's is zero, as at a single key: half of it counts as
    PyTorch's.

    An output is rounded to its dtype: eps of its largest element. FlashAttention's backward pass (arXiv:2307.08691,
    algorithm 2) takes delta = rowsum(dO o) from the rounded o, where PyTorch's softmax takes the same sum from its
    probabilities: a rounding has a standard deviation of at most 0.29 eps |o|, and five of those, carried through dS =
    P (dP - delta) to dQ and dK, are added there. It also makes P = exp(S - lse) anew, where PyTorch keeps P: three
    roundings (the score, lse, and lse in base 2) of numbers that for scores in the hundreds are as large, in float32
    whatever the inputs' dtype; three times their standard deviation, carried through dV = P^T dO, is added there.
    """
    q, k, _, do = (t.detach().double() for t in tensors)
    o, lse = exact[:2]
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    eps = torch.finfo(DTYPES[case.dtype]).eps
    if case.dtype == "fp32":  # sums are made in it too, in another order than PyTorch's
        eps *= 16
    keys = repeat_heads(q, k)
    p = torch.exp(q @ keys.transpose(-2, -1) * scale - lse[..., None])
    if case.causal:
        p.masked_fill_(causal_mask(case.q_len, case.k_len, q.device), 0)
    delta = 5 * 0.29 * eps * scale * (do * o).square().sum(-1, keepdim=True).sqrt()
    at_dq = (delta * (p @ keys)).abs().max()
    squares = (p * delta).square().transpose(-2, -1) @ q.square()  # (B, H, S, D); the heads of a group add up
    at_dk = squares.unflatten(1, (case.kv_heads, -1)).sum(2).max().sqrt()
    rounding = 3 * 0.29 * math.sqrt(3) * torch.finfo(torch.float32).eps * lse.abs()[..., None]
    squares = (p * rounding).square().transpose(-2, -1) @ do.square()
    at_dv = squares.unflatten(1, (case.kv_heads, -1)).sum(2).max().sqrt()
    largest = {name: t.abs().max().item() for name, t in zip(OUTPUTS, exact, strict=True)}
    floors = {name: eps * largest[name] for name in OUTPUTS}
    floors["lse"] = 8 * torch.finfo(torch.float32).eps * max(1.0, largest["lse"])  # float32 whatever the inputs' dtype
    added = {"dq": at_dq, "dk": at_dk, "dv": at_dv}
    return floors | {name: floors[name] + value.item() for name, value in added.items()}


def _ratio(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, floor: float) -> float:
    """Largest error over PyTorch's, to which half the floor is added.

    At most 2 is an error of at most twice PyTorch's plus the floor.
    """
    error, pytorch = ((t.double() - exact).abs().max().item() for t in (actual, plain))
    ratio = error / (pytorch + floor / 2)
    return math.inf if math.isnan(ratio) else ratio


def _relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||a - e|| / ||e||, or ||a - e|| where e is zero."""
    norm = exact.norm().item()
    return (actual.double() - exact).norm().item() / (norm or 1.0)


# --- The sweep ------------------------------------------------------------------------------------


def run(sweep: AccuracySettings, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] | None = None):
    """Run a sweep; write attention_accuracy_results.csv and its .json to folder; return the rows as a DataFrame."""
    parameters = dataclasses.asdict(sweep)
    how = {
        "oracle": "float64, the inputs as rounded to the kernel's dtype",
        "ratio": "largest error over that of PyTorch's plain attention in the same dtype plus half the floor; 2 is allowed",
        "error": "norm of the difference over the norm",
        "floor": "rounding of the output; in dq and dk what the rounding of o does to rowsum(dO o), in dv that of scores and lse to P",
        "memory": "uninitialized tensors hold NaN",
    }
    with records.ResultWriter(NAME, folder, method=how, parameters=parameters, extra_columns=EXTRA_COLUMNS) as writer:
        for row in rows(sweep):
            writer.write(row)
            if on_row:
                on_row(row)
    return records.read_results(writer.path)


def rows(sweep: AccuracySettings) -> Iterator[dict[str, Any]]:
    """The rows of all cases, as they are ready."""
    groups = _groups(cases(sweep))
    workers = min(sweep.workers, os.cpu_count() or 1, len(groups))
    if workers < 1:
        for group in groups:
            yield from _group_rows(sweep, group)
        return
    _build(sweep)
    device = device_name(resolve_device(sweep.device))
    with ProcessPoolExecutor(workers, mp_context=context(resolve_device(sweep.device), __name__)) as pool:
        waiting = {pool.submit(_group_rows, sweep, group): group for group in groups}
        for done in as_completed(waiting):
            try:
                yield from done.result()
            except BrokenProcessPool as reason:  # a process died, and with it all that was not done
                note = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}"
                base = {"kernel": ", ".join(sweep.kernels), "status": "error", "note": note, "device": device}
                yield from (base | dataclasses.asdict(case) for case in waiting[done])


def _groups(found: Sequence[Case]) -> list[list[Case]]:
    """Cases that share compiled kernels together, the largest group first."""
    groups: dict[tuple, list[Case]] = {}
    for case in found:
        groups.setdefault((case.head_dim, case.dtype, case.causal, case.q_len % 16 == 0), []).append(case)
    return sorted(groups.values(), key=len, reverse=True)


def _group_rows(sweep: AccuracySettings, group: Sequence[Case]) -> list[dict[str, Any]]:
    if sweep.workers:
        torch.set_num_threads(1)  # a process of several
    return [row for case in group for row in case_rows(sweep, case)]


def _build(sweep: AccuracySettings) -> None:
    """Build the CUDA kernel here, once, before several processes ask for it.

    What fails then fails again in its rows.
    """
    kernel, device = "flash_attention_cuda", resolve_device(sweep.device)
    case = Case(0, 1, 2, 2, 16, 16, 64, "bf16", False, "heads first", None, 1.0)
    if kernel in sweep.kernels and _takes(kernel, case, device):
        tuple(case_rows(dataclasses.replace(sweep, kernels=(kernel,)), case))


# --- What it says ---------------------------------------------------------------------------------


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    what = f"{row['kernel']}/{row['path']}" if row.get("path") else row["kernel"]
    if row["status"] != "ok":
        return f"case {row['case']:>3} {what:<32} {row['status']}: {case_name(row)}: {row['note']}"
    ratios = " ".join(f"{name} {row[f'{name}_ratio']:.2f}" for name in OUTPUTS)
    return f"case {row['case']:>3} {what:<32} ok, times PyTorch's error: {ratios}; {case_name(row)}"


def case_name(row: Any) -> str:
    """A case in words. row: a row as a mapping, or of a DataFrame."""
    name = (
        f"batch {row['batch']}, heads {row['heads']}/{row['kv_heads']}, {row['q_len']}:{row['k_len']}, head_dim {row['head_dim']}, "
        f"{row['dtype']}, {'causal' if row['causal'] else 'not causal'}, {row['layout']}"
    )
    if row["scale"] is not None and row["scale"] == row["scale"]:
        name += f", scale {row['scale']:g}"
    return name + (f", q and k times {row['magnitude']:g}" if row["magnitude"] != 1 else "")


def summary(frame) -> list[dict[str, Any]]:
    """A line for each kernel, path and dtype.

    Cases, how many passed, the worst ratio of each output, and the worst case.
    """
    frame = frame.assign(path=frame.path.astype(object).where(frame.path.notna(), ""))
    lines = []
    for (kernel, path, dtype), group in frame.groupby(["kernel", "path", "dtype"], sort=False):
        line = {"kernel": kernel, "path": path, "dtype": dtype, "cases": len(group)}
        line["passed"] = int((group.status == "ok").sum())
        ratios = group[[f"{name}_ratio" for name in OUTPUTS]].astype(float)
        line |= {name: ratios[f"{name}_ratio"].max() for name in OUTPUTS}
        worst = ratios.max(axis=1)
        line["worst"] = case_name(group.loc[worst.idxmax()]) if worst.notna().any() else ""
        lines.append(line)
    return lines


def table(frame) -> str:
    """The summary as Markdown."""
    lines = [
        {
            "kernel": f"`{line['kernel']}`" + (f", {line['path']} path" if line["path"] else ""),
            "dtype": line["dtype"],
            "passed": f"{line['passed']} of {line['cases']}",
            **{name: "" if line[name] != line[name] else f"{line[name]:.2f}" for name in OUTPUTS},
            "worst": line["worst"],
        }
        for line in summary(frame)
    ]
    return records.markdown_table(lines, {key: key for key in lines[0]} | {"worst": "the worst case"})


def conclusions(frame) -> list[str]:
    """What the sweep shows, in sentences made from its rows."""
    said = []
    failed = frame[frame.status != "ok"]
    shapes = frame.case.nunique()
    if failed.empty:
        worst = frame[[f"{name}_ratio" for name in OUTPUTS]].max(axis=1)
        said.append(
            f"All {len(frame)} checks on {shapes} random shapes pass: no output, log-sum-exp or gradient is off by more than "
            f"{worst.max():.2f} times the error of PyTorch's plain attention in the same precision, where {LIMIT:g} is allowed, and no "
            "element is left unwritten."
        )
    else:
        said.append(f"**{len(failed)} of {len(frame)} checks on {shapes} random shapes fail.**")
        said += [f"{row['kernel']}, {case_name(row)}: {row['status']}: {row['note']}" for _, row in failed.iterrows()]
    same = frame.deterministic.dropna().astype(bool)
    if len(same) and same.all():
        said.append(
            "Two runs of a case gave the same bits: of the output and the log-sum-exp always, of the gradients where asked to (deterministic)."
        )
    return said


def write_report(frame, folder: str | Path) -> Path:
    """Write attention_accuracy_report.md of a sweep's rows to folder; return its path."""
    text = [
        "# Accuracy of the attention kernels",
        "",
        f"Measured on {frame.device.iloc[0]}. Each number is the largest error against float64 over that of PyTorch's plain "
        f"attention in the same dtype; {LIMIT:g} is allowed.",
        "",
        *(f"- {sentence}" for sentence in conclusions(frame)),
        "",
        table(frame),
    ]
    return records.write_text(Path(folder) / "attention_accuracy_report.md", "\n".join(text))
