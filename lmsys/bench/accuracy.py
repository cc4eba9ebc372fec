"""The accuracy sweep: our attention kernels on random shapes against float64, output, log-sum-exp and gradients.

The measure is FlashAttention's (its tests/test_flash_attn.py, arXiv:2205.14135): a kernel's largest error against
float64 may be twice that of PyTorch's plain attention in the same dtype, plus a floor, made from what rounding must do,
for where that error is nothing, as with a single key. Beyond that, here: the log-sum-exp that the backward pass reads
is checked as well; every uninitialized tensor that a kernel makes is filled with NaN first, so that an element it does
not write shows; and what should be the same bits in every run is compared bit by bit, the forward pass always, the
gradients where a kernel has an option to make them so.

Cases are drawn from a seed. Lengths are either all multiples of 16 or none is, and heads are never 1 or 16: Triton
compiles a kernel anew for each such property, and the sweep would spend its time there. A few cases of one query, one
key or one head make up for it. For the same reason most cases are of head dim 64 or 128, where all kernels take part.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmsys.attention import KERNELS, attention, check_support
from lmsys.attention.reference import causal_mask, reference_attention, repeat_heads
from lmsys.bench import ahead
from lmsys.bench.attention import variants
from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_names, require_numbers
from lmsys.bench.measure import DTYPES
from lmsys.device import resolve_device

OUTPUTS = ("o", "lse", "dq", "dk", "dv")
LIMIT = 2.0  # times PyTorch's error
COMMON_HEAD_DIMS, OTHER_HEAD_DIMS = (64, 128), (16, 24, 32, 48, 80, 96, 160, 192, 256)
LAYOUTS = ("heads first", "tokens first", "packed")
_SCORES = 2**25  # most that a case has: 256 MiB in float64
_COMPILE_LIMIT_S = 400.0  # compiling ahead ends here; what is not done by then is compiled when it is checked


def check(p: Parameters) -> None:
    """Raises ValueError: an unknown kernel, a number out of range, a device that is not here."""
    require_names(p, {"kernels": KERNELS})
    require_numbers(p, {"cases": 1, "longest": 16, "workers": 0})
    resolve_device(p.device)


NOTEBOOK = Notebook("attention_accuracy", check)

# --- Cases ----------------------------------------------------------------------------------------


# magnitude: of the elements of q and k; those of v and the gradient are of 1. scale None: 1 / sqrt(head_dim).
CASE = ("case", "batch", "heads", "kv_heads", "q_len", "k_len", "head_dim", "dtype", "causal", "layout", "scale")
CASE += ("magnitude",)


def cases(p: Parameters) -> list[Point]:
    """The problems of a sweep, the same for the same seed, number and longest length."""
    draw = random.Random(p.seed)
    return [dict(zip(CASE, _case(draw, index, p.longest), strict=True)) for index in range(p.cases)]


def _case(draw: random.Random, index: int, longest: int) -> tuple:
    """Of eight cases, five are in half precision at the common head dims, one in float32 there, two of another."""
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
        even = head_dim in OTHER_HEAD_DIMS[::2] and dtype == "bf16"
        causal = (other % len(OTHER_HEAD_DIMS) + which) % 2 == 0
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
    return index, batch, heads, kv_heads, q_len, k_len, head_dim, dtype, causal, layout, scale, magnitude


def _length(draw: random.Random, longest: int, even: bool) -> int:
    """From 2 to longest, as many under the geometric middle as over it; a multiple of 16 (at times of 128), or none."""
    length = round(math.exp(draw.uniform(math.log(2), math.log(longest))))
    if not even:
        return length - 1 if length % 16 == 0 else length
    step = 128 if draw.random() < 0.4 and longest >= 128 else 16
    return max(step, length // step * step)


def inputs(case: Point, device: torch.device, seed: int) -> list[torch.Tensor]:
    """q, k, v, leaves that ask for gradients, and the output's: random normal, (B, H, T, D) in the case's layout."""
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + case["case"])
    batch, heads, kv_heads, q_len, k_len, head_dim = (case[name] for name in CASE[1:7])
    dtype, magnitude = DTYPES[case["dtype"]], case["magnitude"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    sizes = [(heads, q_len), (kv_heads, k_len), (kv_heads, k_len), (heads, q_len)]
    if case["layout"] == "packed":  # one projection's output, cut into q, k and v
        packed = normal(batch, q_len, heads + 2 * kv_heads, head_dim).transpose(1, 2)
        packed[:, : heads + kv_heads] *= magnitude
        tensors = [*packed.to(dtype).split((heads, kv_heads, kv_heads), 1), normal(batch, heads, q_len, head_dim)]
    else:
        if case["layout"] == "heads first":
            q, k, v, do = (normal(batch, h, length, head_dim) for h, length in sizes)
        else:
            q, k, v, do = (normal(batch, length, h, head_dim).transpose(1, 2) for h, length in sizes)
        tensors = [q * magnitude, k * magnitude, v, do]
    return [t.to(dtype).detach().requires_grad_(t is not tensors[3]) for t in tensors]


# --- Points ---------------------------------------------------------------------------------------


def points(p: Parameters) -> list[Point]:
    """Each case with the kernels that take it, flash_attention_triton's portable path too where not the default."""
    device, found = resolve_device(p.device), []
    for case in cases(p):
        shape = {name: case[name] for name in ("head_dim", "heads", "kv_heads")}
        for kernel in p.kernels:
            with contextlib.suppress(ValueError):  # what a kernel does not take is none of its cases
                check_support(kernel, device=device, dtype=DTYPES[case["dtype"]], **shape, backward=True)
                for options, paths in variants(kernel, case, device):
                    path = paths.get("forward_backward", "")
                    found.append(case | {"kernel": kernel, "path": path, "options": options})
    return found


def compile_ahead(p: Parameters) -> None:
    """Compile what a kernel compiles by itself."""
    compiled = [point for point in (points(p) if p.workers else ()) if KERNELS[point["kernel"]].compiled_per]
    ahead.compile_points(compile_point, compiled, p, p.workers, _COMPILE_LIMIT_S)


def compile_point(point: Point, p: Parameters) -> None:
    """Run the kernel as measure_point() does."""
    tensors = inputs(point, resolve_device(p.device), p.seed)
    for options in ({}, {"deterministic": True}):
        outputs(point, tensors, **options)


# --- One case -------------------------------------------------------------------------------------


class Poisoned(TorchDispatchMode):
    """In its block, a floating-point tensor that is made without values holds NaN, so that what is never written shows.

    PyTorch does the same under torch.use_deterministic_algorithms, which would also choose other kernels.
    """

    _EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self._EMPTY and result.is_floating_point():
            result.fill_(math.nan)
        return result


@functools.lru_cache(maxsize=1)  # the case at hand
def answers(values: tuple, device: str, seed: int) -> tuple[list, list, list, dict[str, float]]:
    """A case's inputs; o, lse, dq, dk, dv in float64 and in its own dtype by plain PyTorch; the floor of each."""
    case = dict(zip(CASE, values, strict=True))
    tensors = inputs(case, resolve_device(device), seed)
    exact, plain = (_reference(case, tensors, dtype) for dtype in (torch.float64, DTYPES[case["dtype"]]))
    return tensors, exact, plain, _floors(case, tensors, exact)


def _reference(case: Point, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors[:3])
    o, lse = reference_attention(q, k, v, causal=case["causal"], scale=case["scale"])
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), tensors[3].to(dtype))]


def outputs(point: Point, tensors: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """o, lse, dq, dk, dv of a kernel. lse is what its autograd.Function saved for the backward pass."""
    q, k, v, do = tensors
    options |= {"kernel": point["kernel"], "causal": point["causal"], "scale": point["scale"], **point["options"]}
    with Poisoned(), torch.autograd.set_multithreading_enabled(False):  # backward in this thread, under the mode
        o = attention(q, k, v, **options)
        (lse,) = [t for t in o.grad_fn.saved_tensors if t.shape == q.shape[:-1]]
        return [o.detach(), lse.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def measure_point(point: Point, p: Parameters) -> Row:
    """Errors of one kernel at one case, over PyTorch's and relative; an error row where one is too large."""
    tensors, exact, plain, floors = answers(tuple(point[name] for name in CASE), p.device, p.seed)
    actual = outputs(point, tensors)
    row, wrong = {}, []
    for name, a, b, e in zip(OUTPUTS, actual, plain, exact, strict=True):
        if a.shape != e.shape or (name != "lse" and a.dtype != b.dtype):
            wrong.append(f"{name} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(e.shape)}")
            continue
        row[f"{name}_ratio"], row[f"{name}_error"] = _errors(a, b, e, floors[name])
        if row[f"{name}_ratio"] > LIMIT:
            wrong.append(f"{name} is off by {row[f'{name}_ratio']:.3g} times PyTorch's error")
    if differ := _differing(point, tensors, actual):
        wrong.append(f"{' and '.join(differ)}: not the same bits in a second run")
    return row | {"deterministic": not differ} | ({"status": "error", "note": "; ".join(wrong)} if wrong else {})


def _differing(point: Point, tensors: Sequence[torch.Tensor], first: Sequence[torch.Tensor]) -> list[str]:
    """Which tensors two runs differ in: o and lse of any two, gradients of two that are asked to be deterministic."""
    if "deterministic" not in KERNELS[point["kernel"]].options:
        pairs = list(zip(OUTPUTS, first, outputs(point, tensors), strict=True))[:2]
    else:
        one, two = (outputs(point, tensors, deterministic=True) for _ in range(2))
        pairs = [*zip(OUTPUTS[:2], first, one, strict=False), *zip(OUTPUTS, one, two, strict=True)]
    bits = [(name, *(t.contiguous().view(torch.uint8) for t in pair)) for name, *pair in pairs]
    return list(dict.fromkeys(name for name, a, b in bits if not torch.equal(a, b)))


def _floors(case: Point, tensors: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    """For each output, the error that is allowed where PyTorch's is zero, as at a single key.

    An output is rounded to its dtype: eps of its largest element. FlashAttention's backward pass (arXiv:2307.08691,
    algorithm 2) takes delta = rowsum(dO o) from the rounded o, where PyTorch's softmax takes the same sum from its
    probabilities: a rounding has a standard deviation of at most 0.29 eps |o|, and five of those, carried through dS =
    P (dP - delta) to dQ and dK, are added there. It also makes P = exp(S - lse) anew, where PyTorch keeps P: three
    roundings (the score, lse, and lse in base 2) of numbers that for scores in the hundreds are as large, in float32
    whatever the inputs' dtype; three times their standard deviation, carried through dV = P^T dO, is added there.
    """
    q, k, _, do = (t.detach().double() for t in tensors)
    o, lse = exact[:2]
    scale = 1 / math.sqrt(case["head_dim"]) if case["scale"] is None else case["scale"]
    eps = torch.finfo(DTYPES[case["dtype"]]).eps
    if case["dtype"] == "fp32":  # sums are made in it too, in another order than PyTorch's
        eps *= 16
    keys = repeat_heads(q, k)
    p = torch.exp(q @ keys.transpose(-2, -1) * scale - lse[..., None])
    if case["causal"]:
        p.masked_fill_(causal_mask(case["q_len"], case["k_len"], q.device), 0)
    delta = 5 * 0.29 * eps * scale * (do * o).square().sum(-1, keepdim=True).sqrt()
    at_dq = (delta * (p @ keys)).abs().max()
    squares = (p * delta).square().transpose(-2, -1) @ q.square()  # (B, H, S, D); the heads of a group add up
    at_dk = squares.unflatten(1, (case["kv_heads"], -1)).sum(2).max().sqrt()
    rounding = 3 * 0.29 * math.sqrt(3) * torch.finfo(torch.float32).eps * lse.abs()[..., None]
    squares = (p * rounding).square().transpose(-2, -1) @ do.square()
    at_dv = squares.unflatten(1, (case["kv_heads"], -1)).sum(2).max().sqrt()
    floors = {name: eps * t.abs().max().item() for name, t in zip(OUTPUTS, exact, strict=True)}
    # The log-sum-exp is in float32 whatever the inputs' dtype.
    floors["lse"] = 8 * torch.finfo(torch.float32).eps * max(1.0, lse.abs().max().item())
    added = {"dq": at_dq, "dk": at_dk, "dv": at_dv}
    return floors | {name: floors[name] + value.item() for name, value in added.items()}


def _errors(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, floor: float) -> tuple[float, float]:
    """The largest error over PyTorch's, to which half the floor is added: at most 2 where it is at most twice PyTorch's
    plus the floor. And ||a - e|| / ||e||, or ||a - e|| where e is zero.
    """
    difference, pytorch = (t.double() - exact for t in (actual, plain))
    ratio = (difference.abs().max() / (pytorch.abs().max() + floor / 2)).item()
    return math.inf if math.isnan(ratio) else ratio, difference.norm().item() / (exact.norm().item() or 1.0)


ACCURACY = Experiment(
    name="attention_accuracy_results",
    columns=(
        *("kernel", "path", *CASE, "status", *(f"{name}_ratio" for name in OUTPUTS)),
        *(*(f"{name}_error" for name in OUTPUTS), "deterministic", "device", "note"),
    ),
    points=points,
    measure=measure_point,
    group=("case",),
    method=lambda p: {
        "oracle": "float64, the inputs as rounded to the kernel's dtype",
        "ratio": "largest error over PyTorch's plain attention's in the same dtype plus half the floor; 2 is allowed",
        "error": "norm of the difference over the norm",
        "floor": "rounding of the output; of gradients also of what FlashAttention's backward reads or recomputes",
        "memory": "uninitialized tensors hold NaN",
    },
    before=compile_ahead,
)
