"""The attention sweep: kernels x shapes x passes, each point checked and then timed.

Four groups of shapes (the column tier), each with a question of its own:

- throughput: lengths x head dims, causal and not, at a constant number of tokens and a constant heads x head_dim, as in
  FlashAttention's benchmarks (arXiv:2307.08691, section 4.1): which kernel is how fast.
- grouped_query: several query heads a key head, causal.
- few_blocks: few queries and heads with long keys, where a tile of queries for each processor is not to be had.
- tiers: one batch and number of heads at pairs of lengths, with the kernels that store all scores beside those that do not.

A point's output is compared with the float64 oracle on one key head, beside PyTorch's plain attention in the same dtype, before
it is timed; a kernel whose error passes twice PyTorch's is a row with status error, not a time. All kernels of a point are
checked (and so compiled) first, then timed one after the other, so that a ratio compares times taken seconds apart.
Where the default path of flash_attention_triton is not the portable one, the portable one is measured as well: see the column path.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmsys import cost, records
from lmsys.attention import KERNELS, attention, check_support, get_kernel
from lmsys.attention.reference import reference_attention, scaled_dot_prod_attention
from lmsys.bench import ahead, standings
from lmsys.bench.measure import Measurement, available_bytes, is_out_of_memory, measure, method, release
from lmsys.bench.standings import GROUPS
from lmsys.config import require, resolve_scale, unknown_name
from lmsys.device import device_name, resolve_device

PASSES = ("forward", "backward", "forward_backward")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAME = "attention_sweep_results"
EXTRA_COLUMNS = ("tier", "kv_heads", "path", "error", "error_pytorch", "device", "note")
_REFERENCE_ELEMENTS = 2**28  # scores that the float64 check may hold: 2 GiB each for scores and softmax
_BUDGET_S = 0.6  # a kernel that takes long at a point gets fewer samples there, not under three
_LONG_COMPILED = ("torch_flex",)  # for seconds a shape: at the scales that only show that all works, where it is named
_SLOW_BUDGET_S = 0.2  # of the kernels that are slower by far: their times are not compared to the percent
_COMPILE_LIMIT_S = 240.0  # compiling ahead ends here; what is not done by then is compiled when it is measured
_ERROR_FLOOR = (
    4e-6  # fp32 of a few keys: PyTorch's own error is near 0 there, that of another order of operations is not
)

# Kernels that hold all q_len x k_len scores: how many such arrays a forward pass holds at once at the least.
_QUADRATIC = {"scaled_dot_prod_attention": 3, "vectorized_torch": 2, "vectorized_torch_compiled": 1}
_TIERS_ONLY = (*_QUADRATIC, "flash_attention_torch")  # ten to a hundred times slower than the rest
_COMPILED = ("torch_flex", "flash_attention_4", "flash_attention_triton")  # in seconds, to a cache on disk


@dataclass(frozen=True)
class Tier:
    """One pair of lengths."""

    name: str
    q_len: int
    k_len: int

    def __str__(self) -> str:
        return f"{self.q_len}:{self.k_len}"


_SQUARE = [("small", 128), ("compact", 512), ("medium", 2048), ("large", 4096), ("XL", 8192), ("XXL", 16384)]
_RECTANGULAR = [Tier("wide", 1024, 4096), Tier("tall", 4096, 1024), Tier("wide XL", 2048, 16384)]
TIERS: dict[str, tuple[Tier, ...]] = {
    "smoke": (Tier("small", 64, 64), Tier("wide", 32, 64)),
    "cpu": (
        *(Tier(name, n, n) for name, n in [("small", 128), ("smallish", 256)]),
        Tier("wide", 128, 256),
    ),
    "full": (*(Tier(name, n, n) for name, n in _SQUARE), *_RECTANGULAR),
}


@dataclass(frozen=True)
class Grid:
    """The shapes of the groups beside the tiers.

    Attributes:
        tokens: batch x length of throughput and grouped_query (batch 1 where a length is more than that).
        width: heads x head_dim. lengths, head_dims: of throughput.
        grouped_lengths, ratios: lengths and query heads a key head, of grouped_query.
        few: (heads, query lengths, key length) of few_blocks, at batch 1.
    """

    tokens: int
    width: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    grouped_lengths: tuple[int, ...]
    ratios: tuple[int, ...]
    few: tuple[int, tuple[int, ...], int]


GRIDS = {
    "smoke": Grid(64, 32, (64,), (16,), (64,), (2,), (1, (16,), 128)),
    "cpu": Grid(128, 128, (64, 128), (64,), (64,), (2,), (1, (16,), 256)),
    "full": Grid(
        tokens=16384,
        width=2048,
        lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768),
        head_dims=(64, 128),
        grouped_lengths=(4096, 16384),
        ratios=(4, 8),
        few=(4, (128, 1024), 32768),
    ),
}


@dataclass(frozen=True)
class Case:
    """One shape; tier is the group's name, or in the group tiers the tier's own."""

    tier: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    dtype: str
    causal: bool

    @property
    def group(self) -> str:
        return self.tier if self.tier in GROUPS else "tiers"


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep runs; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    groups: tuple[str, ...]
    kernels: tuple[str, ...]
    tiers: tuple[Tier, ...]
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtypes: tuple[str, ...]
    causal: tuple[bool, ...]
    passes: tuple[str, ...]
    warmup: int
    iterations: int
    device: str
    seed: int
    keep: bool
    compile_ahead: int


_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "groups": ("throughput", "tiers"),
        "batch": 1,
        "heads": 1,
        "head_dim": 16,
        "dtypes": ("fp32",),
        "causal": (True,),
        "warmup": 1,
        "iterations": 2,
        "compile_ahead": 0,
    },
    "cpu": {
        "groups": ("throughput", "grouped_query", "tiers"),
        "batch": 1,
        "heads": 1,
        "head_dim": 64,
        "dtypes": ("fp32",),
        "causal": (True,),
        "warmup": 1,
        "iterations": 5,
        "compile_ahead": 0,
    },
    "full": {
        "groups": GROUPS,
        "batch": 4,
        "heads": 12,
        "head_dim": 64,
        "dtypes": ("bf16",),
        "causal": (True, False),
        "warmup": 4,
        "iterations": 20,
        "compile_ahead": 12,
    },
}


def parse_tier(text: str) -> Tier:
    """'128:64' -> 128 queries and 64 keys. Both must be powers of two."""
    q_text, colon, k_text = text.partition(":")
    lengths = []
    for what, number in (("q_len", q_text), ("k_len", k_text)):
        require(colon == ":" and number.isdigit(), f"tier '{text}' is not of the form q:k, such as 128:64")
        length = int(number)
        require(
            length > 0 and length & (length - 1) == 0,
            f"tier '{text}': {what} {length} is not a power of two; give 1, 2, 4, 8, ... such as 128:64",
        )
        lengths.append(length)
    return Tier(text, *lengths)


def settings(
    scale: str = "auto",
    groups: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    custom_tiers: Sequence[str] | None = None,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    dtypes: Sequence[str] | None = None,
    causal: Sequence[bool] | bool | None = None,
    passes: Sequence[str] | None = None,
    warmup: int | None = None,
    iterations: int | None = None,
    device: str = "auto",
    seed: int = 0,
    keep: bool = False,
    compile_ahead: int | None = None,
) -> SweepSettings:
    """The settings of a sweep: the scale's, with what is given in their place.

    Args:
        kernels: by name; None: all, without torch_flex where the scale is not full, as it takes seconds to compile for each shape.
        groups: of shapes, from GROUPS.
        custom_tiers: replace the scale's tiers. They, batch, heads, kv_heads and head_dim are the tiers': giving one runs the
            group tiers alone, unless groups says otherwise.
        causal: of throughput and tiers; grouped_query is causal, few_blocks is not.
        keep: rows of groups that this run does not measure stay in the results.
        compile_ahead: processes that compile before anything is timed; 0 for none.
    Raises:
        ValueError: unknown kernel, dtype, pass, group or scale; a tier that is no power of two; a number out of range.
    """
    scale = resolve_scale(scale)
    shape = {"batch": batch, "heads": heads, "head_dim": head_dim}
    given = shape | {
        "dtypes": dtypes,
        "causal": (causal,) if isinstance(causal, bool) else causal,
        "warmup": warmup,
        "iterations": iterations,
        "compile_ahead": compile_ahead,
    }
    values = {**_PRESETS[scale], **{key: value for key, value in given.items() if value is not None}}
    left_out = () if scale == "full" else _LONG_COMPILED
    kernels = tuple(name for name in KERNELS if name not in left_out) if kernels is None else tuple(kernels)
    passes = ("forward",) if passes is None else tuple(passes)
    for kernel in kernels:
        get_kernel(kernel)
    for name in values["dtypes"]:
        if name not in DTYPES:
            raise unknown_name("dtype", name, DTYPES)
    for name in passes:
        if name not in PASSES:
            raise unknown_name("pass", name, PASSES)
    for key in ("batch", "heads", "head_dim", "iterations"):
        require(
            type(values[key]) is int and values[key] >= 1,
            f"{key} is {values[key]!r}; it must be a whole number of 1 or more",
        )
    for key in ("warmup", "compile_ahead"):
        require(type(values[key]) is int and values[key] >= 0, f"{key} is {values[key]!r}; it must be 0 or more")
    of_tiers = bool(custom_tiers) or kv_heads is not None or any(value is not None for value in shape.values())
    values["groups"] = _groups(groups, values["groups"], kernels, of_tiers)
    kv_heads = values["heads"] if kv_heads is None else kv_heads
    require(
        kv_heads >= 1 and values["heads"] % kv_heads == 0,
        f"heads {values['heads']} is not a multiple of kv_heads {kv_heads}",
    )
    require(
        len(kernels) > 0 and len(passes) > 0 and len(values["dtypes"]) > 0,
        "kernels, passes and dtypes must not be empty",
    )
    tiers = TIERS[scale] if not custom_tiers else tuple(parse_tier(text) for text in custom_tiers)
    resolve_device(device)
    return SweepSettings(
        scale=scale,
        kernels=kernels,
        tiers=tiers,
        kv_heads=kv_heads,
        passes=passes,
        device=device,
        seed=seed,
        keep=keep,
        **{key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in values.items()},
    )


def _groups(
    given: Sequence[str] | None, preset: tuple[str, ...], kernels: tuple[str, ...], of_tiers: bool
) -> tuple[str, ...]:
    """The groups to run: those given, else the scale's, less those that what else was given has no part in."""
    beyond = any(kernel not in _TIERS_ONLY for kernel in kernels)
    if given is None:
        return preset if beyond and not of_tiers else ("tiers",)
    for name in given:
        if name not in GROUPS:
            raise unknown_name("group", name, GROUPS)
    require(len(given) > 0, f"groups must not be empty; known: {', '.join(GROUPS)}")
    require(
        not of_tiers or "tiers" in given,
        "custom_tiers, batch, heads, kv_heads and head_dim are of the group 'tiers', which is not among the groups given",
    )
    require(beyond or tuple(given) == ("tiers",), f"{', '.join(kernels)}: measured in the group 'tiers' only")
    return tuple(name for name in GROUPS if name in given)


def cases(sweep: SweepSettings) -> list[Case]:
    """The shapes of a sweep, group by group."""
    grid, made = GRIDS[sweep.scale], []
    for dtype in sweep.dtypes:
        for group in sweep.groups:
            if group == "tiers":
                shape = (sweep.batch, sweep.heads, sweep.kv_heads)
                made += [
                    Case(tier.name, *shape, tier.q_len, tier.k_len, sweep.head_dim, dtype, causal)
                    for causal in sweep.causal
                    for tier in sweep.tiers
                ]
            elif group == "throughput":
                made += [
                    Case(group, max(1, grid.tokens // n), grid.width // d, grid.width // d, n, n, d, dtype, causal)
                    for causal in sweep.causal
                    for d in grid.head_dims
                    for n in grid.lengths
                ]
            elif group == "grouped_query":
                made += [
                    Case(group, grid.tokens // n, grid.width // d, grid.width // d // ratio, n, n, d, dtype, True)
                    for d in grid.head_dims
                    for ratio in grid.ratios
                    for n in grid.grouped_lengths
                ]
            else:
                heads, q_lens, k_len = grid.few
                made += [
                    Case(group, 1, heads, heads, q_len, k_len, d, dtype, False)
                    for d in grid.head_dims
                    for q_len in q_lens
                ]
    return made


def kernels_of(sweep: SweepSettings, case: Case) -> tuple[str, ...]:
    """The kernels that a case is measured with."""
    return tuple(name for name in sweep.kernels if case.group == "tiers" or name not in _TIERS_ONLY)


def run(
    sweep: SweepSettings,
    folder: str | Path,
    *,
    on_row: Callable[[dict[str, Any]], None] | None = None,
):
    """Run a sweep; write attention_sweep_results.csv and its .json to folder; return all rows as a DataFrame.

    on_row: called with each row as it is measured, to show progress.
    Raises:
        ValueError: sweep.keep, and the results in folder do not go with this run's.
    """
    device = resolve_device(sweep.device)
    kept, kept_stamp = _kept(sweep, Path(folder), device) if sweep.keep else ([], None)
    stamp = dataclasses.asdict(sweep) | {"tiers": [str(tier) for tier in sweep.tiers]}
    if kept_stamp is not None:
        stamp["kept"] = kept_stamp
    writer = records.ResultWriter(
        NAME,
        folder,
        method=method(device, sweep.warmup, sweep.iterations),
        parameters=stamp,
        extra_columns=EXTRA_COLUMNS,
    )
    with writer:
        for row in kept:
            writer.write(row)
        compile_ahead(sweep)
        for row in rows(sweep, device):
            writer.write(row)
            if on_row:
                on_row(row)
    return records.read_results(writer.path)


def _kept(
    sweep: SweepSettings, folder: Path, device: torch.device
) -> tuple[list[dict[str, str]], dict[str, Any] | None]:
    """The rows in folder of groups that this sweep does not measure, as they are written there, and the stamp of their run."""
    path = folder / f"{NAME}.csv"
    if not path.exists():
        return [], None
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    columns = [*records.SCHEMAS[NAME], *EXTRA_COLUMNS]
    require(
        reader.fieldnames == columns,
        f"{path}: its columns are not those of this version; measure it anew, without keep",
    )
    for row in found:
        require(
            row["device"] == device_name(device),
            f"{path} was measured on {row['device']}, this is {device_name(device)}; measure it anew, without keep",
        )
    kept = [row for row in found if (row["tier"] if row["tier"] in GROUPS else "tiers") not in sweep.groups]
    stamp = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    groups = list(dict.fromkeys(row["tier"] if row["tier"] in GROUPS else "tiers" for row in kept))
    return kept, {"groups": groups, **stamp} if kept else None


# --- Compiling ahead ------------------------------------------------------------------------------


def compile_ahead(sweep: SweepSettings) -> None:
    """Compile what the sweep needs; see lmsys.bench.ahead. What fails here fails again when it is measured, and is a row there."""
    shares = min(sweep.compile_ahead, os.cpu_count() or 1, len(_compilations(sweep)))
    if shares < 1:
        return
    late = ahead.compile_shares(_compile_share, sweep, shares, _COMPILE_LIMIT_S)
    if late:
        print(f"compile ahead: {late} of {shares} processes were not done after {_COMPILE_LIMIT_S:g} s and were ended")


def _compilations(sweep: SweepSettings) -> list[tuple[str, Case]]:
    """(kernel, case) for each compilation of its own: every shape of torch_flex, every head dim, mask and group of the others."""
    found = {}
    for kernel in _COMPILED:
        for case in cases(sweep):
            if kernel in kernels_of(sweep, case):
                own = (case.group, case.head_dim, case.causal, case.kv_heads, case.dtype, case.q_len <= 128)
                found.setdefault((kernel, case if kernel == "torch_flex" else own), (kernel, case))
    return list(found.values())


def _compile_share(sweep: SweepSettings, share: int, shares: int) -> None:
    """One process's part: every shares-th compilation."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # the processes are the parallelism
    device = resolve_device(sweep.device)
    for kernel, case in _compilations(sweep)[share::shares]:
        point = Point(sweep, case, device)
        for runner in point.runners(kernel):
            try:
                point.outputs(runner, point.backward and device.type in KERNELS[kernel].backward)
            except Exception as reason:
                print(f"compile ahead: {kernel}: {type(reason).__name__}: {_first_line(reason)}")
        del point
        release(device)


# --- Points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """A kernel as it is measured: with which options, and which path each pass then takes."""

    kernel: str
    options: Mapping[str, Any] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)


def runners(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> list[Runner]:
    """The kernel as it comes, and flash_attention_triton's portable path beside its default where that is another."""
    if kernel != standings.TRITON:
        return [Runner(kernel)]
    from lmsys.attention import explain

    found: list[Runner] = []
    for options in ({}, {"path": "portable"}):
        try:
            chosen = explain(q, k, v, causal, **options)
        except ValueError:  # the environment asks for a path that refuses this; so does the call, and that is its row
            found.append(Runner(kernel, options))
            continue
        both = chosen.forward if chosen.forward == chosen.backward else f"{chosen.forward}+{chosen.backward}"
        paths = {"forward": chosen.forward, "backward": chosen.backward, "forward_backward": both}
        if not found or paths != found[0].paths:
            found.append(Runner(kernel, options, paths))
    return found


def rows(sweep: SweepSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure each point of a sweep and yield it as a row of the schema."""
    try:
        for case in cases(sweep):
            point = Point(sweep, case, device)
            runners = [runner for kernel in kernels_of(sweep, case) for runner in point.runners(kernel)]
            checks = [point.check(runner) for runner in runners]
            gc.collect()
            gc.freeze()  # what compilers keep, which release() need not look through before each measurement
            base = dataclasses.asdict(case) | {"device": device_name(device)}
            for which in sweep.passes:
                for runner, checked in zip(runners, checks, strict=True):
                    named = {"kernel": runner.kernel, "pass": which, "path": runner.paths.get(which, "")}
                    yield base | named | point.row(runner, which, checked[which])
            del point
            release(device)
    finally:
        gc.unfreeze()


class Point:
    """The inputs of one case, and the float64 answer for its first key head and the query heads that read it."""

    def __init__(self, sweep: SweepSettings, case: Case, device: torch.device):
        self.sweep, self.case, self.device, self.dtype = sweep, case, device, DTYPES[case.dtype]
        self.causal = case.causal
        self.backward = any(which != "forward" for which in sweep.passes)
        generator = torch.Generator(device).manual_seed(sweep.seed)

        def random(heads: int, length: int) -> torch.Tensor:
            shape = (case.batch, heads, length, case.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.dtype)

        self.q = random(case.heads, case.q_len)
        self.k = random(case.kv_heads, case.k_len)
        self.v = random(case.kv_heads, case.k_len)
        self.grad = random(case.heads, case.q_len)
        # A causal mask aligned top left makes the first rows of the queries a smaller problem of the same kind.
        self.group = case.heads // case.kv_heads
        self.checked_rows = min(case.q_len, max(1, _REFERENCE_ELEMENTS // (case.k_len * self.group)))
        self._expected: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def runners(self, kernel: str) -> list[Runner]:
        """The ways in which a kernel is measured here."""
        return runners(kernel, self.q, self.k, self.v, self.causal)

    def check(self, runner: Runner) -> dict[str, dict[str, Any]]:
        """For each pass, what a row says of it before it is timed: its errors, or a status with its reason. Compiles, too."""
        found: dict[str, dict[str, Any]] = {}
        for which in self.sweep.passes:
            try:
                self._support(runner, which)
                shortage = self._cpu_shortage(runner.kernel, which)
                if shortage:
                    found[which] = {"status": "oom", "note": shortage}
            except ValueError as reason:  # the kernel does not take this shape, dtype or device, and says so
                found[which] = {"status": "unsupported", "note": str(reason)}
        open_passes = [which for which in self.sweep.passes if which not in found]
        backward = any(which != "forward" for which in open_passes)
        try:
            errors = self._errors(runner, backward) if open_passes else {}
        except Exception as reason:  # one kernel's failure is a row, not the end of the others' measurements
            failed = self.failure(reason)
            errors = dict.fromkeys(open_passes, failed)
            if backward and "forward" in open_passes:  # which may be fine where only the backward pass is not
                try:
                    errors |= self._errors(runner, backward=False)
                except Exception as again:
                    errors["forward"] = self.failure(again)
        return {which: found.get(which) or errors[which] for which in self.sweep.passes}

    def row(self, runner: Runner, which: str, checked: dict[str, Any]) -> dict[str, Any]:
        """The measured part of a row. Whatever a kernel raises becomes the row's status and note."""
        if "status" in checked:
            return checked
        try:
            result = self._measure(runner, which)
        except Exception as reason:
            return checked | self.failure(reason)
        interpreted = self.device.type == "cpu" and "triton" in runner.kernel
        note = result.note or ("in Triton's CPU interpreter" if interpreted else "")
        row: dict[str, Any] = checked | {"status": result.status, "note": note}
        if result.status == "ok":
            case = self.case
            lengths = (case.q_len, case.k_len)
            flops = cost.attention_flops(case.batch, case.heads, *lengths, case.head_dim, case.causal, which)
            row |= {
                "median_ms": result.median_ms,
                "p20_ms": result.p20_ms,
                "p80_ms": result.p80_ms,
                "samples": result.samples,
                "tflops": flops / result.median_ms / 1e9,
                "peak_mib": result.peak_mib,
            }
        return row

    def outputs(self, runner: Runner, backward: bool) -> list[torch.Tensor]:
        """o, and dq, dk, dv where a backward pass is asked for."""
        inputs = self._inputs(backward)
        with torch.set_grad_enabled(backward):
            output = self._call(runner)
        return [output.detach(), *torch.autograd.grad(output, inputs, self.grad)] if backward else [output]

    def _inputs(self, backward: bool) -> tuple[torch.Tensor, ...]:
        for tensor in (self.q, self.k, self.v):
            tensor.requires_grad_(backward)
        return self.q, self.k, self.v

    def _call(self, runner: Runner) -> torch.Tensor:
        return attention(self.q, self.k, self.v, causal=self.causal, kernel=runner.kernel, **runner.options)

    def _support(self, runner: Runner, which: str) -> None:
        check_support(
            runner.kernel,
            device=self.device,
            dtype=self.dtype,
            head_dim=self.case.head_dim,
            heads=self.case.heads,
            kv_heads=self.case.kv_heads,
            backward=which != "forward",
        )

    def failure(self, reason: Exception) -> dict[str, Any]:
        """Status and note of what a kernel raised."""
        release(self.device)
        if isinstance(reason, ValueError):
            return {"status": "unsupported", "note": str(reason)}
        status = "oom" if is_out_of_memory(reason) else "error"
        return {"status": status, "note": f"{type(reason).__name__}: {_first_line(reason)}"}

    def _measure(self, runner: Runner, which: str) -> Measurement:
        # Where a backward pass is measured too, the forward pass keeps what that needs, as in training: it is then the same
        # compiled graph, which torch.compile would make anew without gradients.
        gradients = self.backward and self.device.type in KERNELS[runner.kernel].backward
        inputs = self._inputs(gradients)

        def forward() -> torch.Tensor:
            with torch.set_grad_enabled(gradients):
                return self._call(runner)

        def backward(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(output, inputs, self.grad)

        functions = {
            "forward": (forward, None),
            "backward": (backward, lambda: (forward(),)),
            "forward_backward": (lambda: backward(forward()), None),
        }
        function, prepare = functions[which]
        return measure(
            function,
            device=self.device,
            warmup=self.sweep.warmup,
            iterations=self.sweep.iterations,
            prepare=prepare,
            resident=(*inputs, self.grad),
            budget_s=_SLOW_BUDGET_S if runner.kernel in _TIERS_ONLY else _BUDGET_S,
        )

    def _errors(self, runner: Runner, backward: bool) -> dict[str, dict[str, Any]]:
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
        tensors = self.outputs(runner, backward)
        actual = [t[0, : self.group, : self.checked_rows] for t in tensors[:2]]  # o, dq
        if self.checked_rows == self.case.q_len:  # dk and dv sum over all queries
            actual += [t[0, :1] for t in tensors[2:]]
        found = {}
        for which in self.sweep.passes if backward else ("forward",):
            last = 1 if which == "forward" else len(actual)
            error = _largest_error(actual[:last], exact[:last])
            error_pytorch = _largest_error(plain[:last], exact[:last])
            found[which] = {"error": error, "error_pytorch": error_pytorch}
            if not error <= 2 * error_pytorch + _ERROR_FLOOR:
                note = f"wrong: error {error:.2e} against float64, PyTorch's {error_pytorch:.2e}"
                found[which] |= {"status": "error", "note": note}
        return found

    def _one_key_head(self, function: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        rows, group = self.checked_rows, self.group
        q = self.q.detach()[0, :group, :rows].to(dtype).requires_grad_(self.backward)
        k, v = (t.detach()[0, :1].to(dtype).requires_grad_(self.backward) for t in (self.k, self.v))
        with torch.set_grad_enabled(self.backward):
            output = function(q, k, v)
        if not self.backward:
            return [output]
        gradients = torch.autograd.grad(output, (q, k, v), self.grad[0, :group, :rows].to(dtype))
        return [output.detach(), *gradients]

    def _cpu_shortage(self, kernel: str, which: str) -> str:
        """Why this point would not fit the machine's free memory; empty where it does. A CPU's own OOM ends the process."""
        if self.device.type == "cuda" or kernel not in _QUADRATIC:
            return ""
        arrays = _QUADRATIC[kernel] + (0 if which == "forward" else 2)
        elements = self.case.batch * self.case.heads * self.case.q_len * self.case.k_len
        needed, free = arrays * elements * self.q.element_size(), available_bytes()
        if free is None or needed < 0.8 * free:
            return ""
        return f"the scores alone need {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"


def _first_line(reason: Exception) -> str:
    return (str(reason).strip().splitlines() or [""])[0]


def _largest_error(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest ||a - e|| / ||e|| of the pairs, ||a - e|| where e is zero; NaN counts as infinite."""
    errors = []
    for a, e in zip(actual, exact, strict=True):
        norm = e.double().norm()
        errors.append(((a.double() - e.double()).norm() / torch.where(norm > 0, norm, 1.0)).item())
    return max(float("inf") if error != error else error for error in errors)


# --- What a sweep says ----------------------------------------------------------------------------


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    where = f"{row['dtype']} {'causal' if row['causal'] else 'full  '} {row['q_len']:>6}:{row['k_len']:<6} d {row['head_dim']:<4}"
    kernel = f"{row['kernel']}/{row['path']}" if row["path"] else row["kernel"]
    what = f"{kernel:<32} {row['pass']:<16}"
    if row["status"] != "ok":
        return f"{where} {what} {row['status']}: {row.get('note', '')}"
    return (
        f"{where} {what} {row['median_ms']:>10.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}] "
        f"{row['tflops']:>8.4g} TFLOP/s {row['peak_mib']:>9.1f} MiB"
    )


def conclusions(frame) -> list[str]:
    """What the rows of a sweep show, in sentences made from their numbers."""
    said = [] if _interpreted(frame) else standings.sentences(frame)
    frame = standings.with_series(frame)
    ok = frame[frame.status == "ok"]
    tiers = standings.of_group(ok, "tiers")
    for (dtype, causal, which), group in tiers.groupby(["dtype", "causal", "pass"], sort=False):
        square = group[group.q_len == group.k_len]
        if square.empty:
            continue
        longest = square[square.q_len == square.q_len.max()].set_index("series").median_ms
        first = square.iloc[0]
        setting = (
            f"{which.replace('_', ' + ')}, {dtype}, {'causal' if causal else 'not causal'}, batch {first.batch}, {first.heads} heads, "
            f"head_dim {first.head_dim}, {square.q_len.max()} tokens"
        )
        fastest = longest.idxmin()
        text = f"{setting}: **{fastest}** is the fastest at {records.significant(longest.min())} ms"
        if "scaled_dot_prod_attention" in longest and fastest != "scaled_dot_prod_attention":
            text += f", {longest['scaled_dot_prod_attention'] / longest.min():.1f} times the speed of naive attention"
        ours = longest[[name for name in longest.index if _is_ours(name)]].sort_values()
        peers = [name for name in longest.index if not _is_ours(name)]
        if len(ours) and peers:
            ratios = [f"{longest[peer] / ours.iloc[0]:.2f} times the speed of {peer}" for peer in peers]
            text += f". The best of ours, {ours.index[0]}, takes {records.significant(ours.iloc[0])} ms: {', '.join(ratios)}"
        said.append(text + ".")
    lost = frame[frame.status == "oom"]
    for kernel, group in lost.groupby("series", sort=False):
        said.append(f"{kernel} ran out of memory from {group.q_len.min()} queries x {group.k_len.min()} keys.")
    for kernel, group in frame[frame.status == "error"].groupby("series", sort=False):
        said.append(f"{kernel} failed at {len(group)} point(s): {group.note.iloc[0]}")
    for kernel in ok[_in_interpreter(ok)].kernel.unique():
        said.append(f"{kernel} ran in Triton's CPU interpreter, which checks it; its times say nothing about a GPU.")
    if not ok.empty:
        worst = (ok.error / ok.error_pytorch).max()
        said.append(
            f"Every timed kernel agreed with float64: its error was at most {worst:.2f} times that of PyTorch's plain "
            "attention in the same precision."
        )
    return said


def against_peers(frame) -> str:
    """The standings as Markdown, or why there are none."""
    if _interpreted(frame):
        return "The Triton kernels ran in Triton's CPU interpreter, whose times are not to be compared."
    rows = standings.standings(frame)
    return standings.table(rows) if rows else "None of ours was measured beside a peer that it is held against."


def _is_ours(series: str) -> bool:
    return KERNELS[series.partition(" ")[0]].ours


def _in_interpreter(frame):
    return frame.note.map(lambda note: isinstance(note, str) and note.startswith("in Triton's CPU interpreter"))


def _interpreted(frame) -> bool:
    """Whether Triton's kernels ran in its interpreter, where comparing their speed says nothing."""
    return bool(_in_interpreter(frame).any())


def write_report(frame, folder: str | Path) -> dict[str, Path]:
    """Write the figures and attention_sweep_report.md of a sweep's rows to folder; return their paths by their short names."""
    from lmsys import plots

    folder = Path(folder)
    figures = {}
    passes = [name for name in PASSES if name in set(frame["pass"])]
    throughput, tiers = standings.of_group(frame, "throughput"), standings.of_group(frame, "tiers")
    for which in passes:
        if len(throughput):
            figures[which] = plots.attention_throughput(throughput, which)
        if len(tiers):
            figures[f"tiers_{which}" if len(throughput) else which] = plots.attention_bars(tiers, which)
    for which in () if len(throughput) or len(tiers) else passes:  # grouped_query or few_blocks alone
        figures[which] = plots.attention_bars(frame, which)
    figures["heatmap"] = plots.attention_heatmap(frame)
    figures["scaling"] = plots.attention_scaling(frame)
    written = {name: plots.save(figure, folder / f"attention_sweep_{name}.png") for name, figure in figures.items()}
    written["report"] = records.write_text(folder / "attention_sweep_report.md", report_text(frame))
    return written


def report_text(frame) -> str:
    """attention_sweep_report.md: what to conclude, the standings, and every time."""
    text = [
        "# Attention sweep",
        "",
        f"Measured on {frame.device.iloc[0]}. Times in ms: median [20th, 80th percentile].",
        "",
    ]
    text += [f"- {sentence}" for sentence in conclusions(frame)]
    text += [
        "",
        "## Against the peers",
        "",
        "The peer's time over ours: above 1, ours is faster.",
        "",
        against_peers(frame),
    ]
    for group in GROUPS:
        sections = standings.of_group(frame, group).groupby(["pass", "dtype", "causal", "head_dim"], sort=False)
        for (which, dtype, causal, head_dim), points in sections:
            title = f"{group.replace('_', ' ')}: {which.replace('_', ' + ')}, {dtype}, head_dim {head_dim}"
            text += ["", f"## {title}, {'causal' if causal else 'not causal'}", "", _table(points)]
    return "\n".join(text) + "\n"


def _table(points) -> str:
    """Kernels down, shapes across; a time with its spread and the TFLOP/s, or the status."""
    table = []
    for series, group in standings.with_series(points).groupby("series", sort=False):
        line = {"kernel": series}
        for point in group.itertuples():
            shape = f"{point.q_len}:{point.k_len}"
            if point.heads != point.kv_heads:
                shape += f", {point.heads // point.kv_heads} heads a key head"
            spread = point.status
            if point.status == "ok":
                spread = records.spread(point.median_ms, point.p20_ms, point.p80_ms)
                spread += f"; {records.significant(point.tflops)} TFLOP/s"
            line[shape] = spread
        table.append(line)
    return records.markdown_table(table)
