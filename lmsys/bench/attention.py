"""The attention sweep: kernels x tiers of query and key lengths, each point checked and then timed.

A point's output is compared with the float64 oracle on one head, beside PyTorch's plain attention in the same dtype, before
it is timed; a kernel whose error passes twice PyTorch's is a row with status error, not a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmsys import cost, records
from lmsys.attention import KERNELS, attention, check_support, get_kernel
from lmsys.attention.reference import reference_attention, scaled_dot_prod_attention
from lmsys.bench.measure import Measurement, is_out_of_memory, measure, method, release
from lmsys.config import require, resolve_scale, unknown_name
from lmsys.device import device_name, resolve_device

PASSES = ("forward", "backward", "forward_backward")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXTRA_COLUMNS = ("tier", "kv_heads", "error", "error_pytorch", "device", "note")
_REFERENCE_ELEMENTS = 2**28  # scores that the float64 check of one head may hold: 2 GiB each for scores and softmax
_BUDGET_S = 1.0  # a kernel that takes seconds at a point gets three samples there, not thirty
_ERROR_FLOOR = (
    4e-6  # fp32 of a few keys: PyTorch's own error is near 0 there, that of another order of operations is not
)

# Kernels that hold all q_len x k_len scores: how many such arrays a forward pass holds at once at the least.
_QUADRATIC = {"scaled_dot_prod_attention": 3, "vectorized_torch": 2, "vectorized_torch_compiled": 1}


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
    "smoke": (Tier("small", 128, 128), Tier("wide", 64, 128)),
    "cpu": (
        *(Tier(name, n, n) for name, n in [("small", 128), ("smallish", 256), ("compact", 512), ("base", 1024)]),
        Tier("wide", 128, 512),
        Tier("tall", 512, 128),
    ),
    "full": (*(Tier(name, n, n) for name, n in _SQUARE), *_RECTANGULAR),
}


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep runs; make it with settings(), which fills it from a scale and checks it."""

    scale: str
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


_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "batch": 1,
        "heads": 1,
        "head_dim": 16,
        "dtypes": ("fp32",),
        "causal": (True,),
        "warmup": 1,
        "iterations": 2,
    },
    "cpu": {
        "batch": 1,
        "heads": 1,
        "head_dim": 64,
        "dtypes": ("fp32",),
        "causal": (True,),
        "warmup": 1,
        "iterations": 5,
    },
    "full": {
        "batch": 4,
        "heads": 12,
        "head_dim": 64,
        "dtypes": ("bf16",),
        "causal": (True, False),
        "warmup": 5,
        "iterations": 30,
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
) -> SweepSettings:
    """The settings of a sweep: the scale's, with what is given in their place. custom_tiers replace the scale's tiers.

    Raises:
        ValueError: unknown kernel, dtype, pass or scale; a tier that is no power of two; a number out of range.
    """
    scale = resolve_scale(scale)
    given = {
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "dtypes": dtypes,
        "causal": (causal,) if isinstance(causal, bool) else causal,
        "warmup": warmup,
        "iterations": iterations,
    }
    values = {**_PRESETS[scale], **{key: value for key, value in given.items() if value is not None}}
    kernels = tuple(KERNELS) if kernels is None else tuple(kernels)
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
    require(
        type(values["warmup"]) is int and values["warmup"] >= 0, f"warmup is {values['warmup']!r}; it must be 0 or more"
    )
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
        **{key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in values.items()},
    )


def run(
    sweep: SweepSettings,
    folder: str | Path,
    *,
    on_row: Callable[[dict[str, Any]], None] | None = None,
):
    """Run a sweep; write attention_sweep_results.csv and its .json to folder; return the rows as a DataFrame.

    on_row: called with each row as it is measured, to show progress.
    """
    device = resolve_device(sweep.device)
    stamp = dataclasses.asdict(sweep) | {"tiers": [str(tier) for tier in sweep.tiers]}
    writer = records.ResultWriter(
        "attention_sweep_results",
        folder,
        method=method(device, sweep.warmup, sweep.iterations),
        parameters=stamp,
        extra_columns=EXTRA_COLUMNS,
    )
    with writer:
        for row in rows(sweep, device):
            writer.write(row)
            if on_row:
                on_row(row)
    return records.read_results(writer.path)


def rows(sweep: SweepSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure each point of a sweep and yield it as a row of the schema."""
    for dtype_name in sweep.dtypes:
        for causal in sweep.causal:
            for tier in sweep.tiers:
                point = _Point(sweep, tier, DTYPES[dtype_name], causal, device)
                base = {
                    "tier": tier.name,
                    "batch": sweep.batch,
                    "heads": sweep.heads,
                    "kv_heads": sweep.kv_heads,
                    "q_len": tier.q_len,
                    "k_len": tier.k_len,
                    "head_dim": sweep.head_dim,
                    "dtype": dtype_name,
                    "causal": causal,
                    "device": device_name(device),
                }
                for kernel in sweep.kernels:
                    for which in sweep.passes:
                        yield base | {"kernel": kernel, "pass": which} | point.row(kernel, which)
                del point
                release(device)


class _Point:
    """The inputs of one (tier, dtype, causal), and the float64 answer for its first head."""

    def __init__(self, sweep: SweepSettings, tier: Tier, dtype: torch.dtype, causal: bool, device: torch.device):
        self.tier, self.dtype, self.causal, self.device = tier, dtype, causal, device
        self.sweep = sweep
        generator = torch.Generator(device).manual_seed(sweep.seed)

        def random(heads: int, length: int) -> torch.Tensor:
            shape = (sweep.batch, heads, length, sweep.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        self.q = random(sweep.heads, tier.q_len)
        self.k = random(sweep.kv_heads, tier.k_len)
        self.v = random(sweep.kv_heads, tier.k_len)
        self.grad = random(sweep.heads, tier.q_len)
        # A causal mask aligned top left makes the first rows of the queries a smaller problem of the same kind.
        self.checked_rows = min(tier.q_len, max(1, _REFERENCE_ELEMENTS // tier.k_len))
        self._expected: dict[str, tuple[list[torch.Tensor], float]] = {}

    def row(self, kernel: str, which: str) -> dict[str, Any]:
        """The measured part of a row. Whatever a kernel raises becomes the row's status and note."""
        sweep = self.sweep
        for tensor in (self.q, self.k, self.v):
            tensor.requires_grad_(which != "forward")
        try:
            check_support(
                kernel,
                device=self.device,
                dtype=self.dtype,
                head_dim=sweep.head_dim,
                heads=sweep.heads,
                kv_heads=sweep.kv_heads,
                backward=which != "forward",
            )
            shortage = self._cpu_shortage(kernel, which)
            if shortage:
                return {"status": "oom", "note": shortage}
            error, error_pytorch = self._errors(kernel, which)
            if not error <= 2 * error_pytorch + _ERROR_FLOOR:
                note = f"wrong: error {error:.2e} against float64, PyTorch's {error_pytorch:.2e}"
                return {"status": "error", "error": error, "error_pytorch": error_pytorch, "note": note}
            result = self._measure(kernel, which)
        except ValueError as reason:  # the kernel does not take this shape, dtype or device, and says so
            return {"status": "unsupported", "note": str(reason)}
        except Exception as reason:  # one kernel's failure is a row, not the end of the others' measurements
            release(self.device)
            first = (str(reason).strip().splitlines() or [""])[0]
            return {
                "status": "oom" if is_out_of_memory(reason) else "error",
                "note": f"{type(reason).__name__}: {first}",
            }
        interpreted = self.device.type == "cpu" and "triton" in kernel
        row: dict[str, Any] = {
            "status": result.status,
            "note": result.note or ("in Triton's CPU interpreter" if interpreted else ""),
            "error": error,
            "error_pytorch": error_pytorch,
        }
        if result.status == "ok":
            lengths = (self.tier.q_len, self.tier.k_len)
            flops = cost.attention_flops(sweep.batch, sweep.heads, *lengths, sweep.head_dim, self.causal, which)
            row |= {
                "median_ms": result.median_ms,
                "p20_ms": result.p20_ms,
                "p80_ms": result.p80_ms,
                "samples": result.samples,
                "tflops": flops / result.median_ms / 1e9,
                "peak_mib": result.peak_mib,
            }
        return row

    def _call(self, kernel: str) -> torch.Tensor:
        return attention(self.q, self.k, self.v, causal=self.causal, kernel=kernel)

    def _measure(self, kernel: str, which: str) -> Measurement:
        inputs = (self.q, self.k, self.v)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return self._call(kernel)

        def backward(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(output, inputs, self.grad)

        functions = {
            "forward": (forward, None),
            "backward": (backward, lambda: (self._call(kernel),)),
            "forward_backward": (lambda: backward(self._call(kernel)), None),
        }
        function, prepare = functions[which]
        return measure(
            function,
            device=self.device,
            warmup=self.sweep.warmup,
            iterations=self.sweep.iterations,
            prepare=prepare,
            resident=(*inputs, self.grad),
            budget_s=_BUDGET_S,
        )

    def _errors(self, kernel: str, which: str) -> tuple[float, float]:
        """Largest relative error (2-norm) of the checked tensors of this kernel, and PyTorch's in the same dtype."""
        backward = which != "forward"
        if which not in self._expected:
            exact = self._one_head(
                lambda q, k, v: reference_attention(q, k, v, causal=self.causal)[0], torch.float64, backward
            )
            plain = self._one_head(
                lambda q, k, v: scaled_dot_prod_attention(q, k, v, self.causal), self.dtype, backward
            )
            self._expected[which] = exact, _largest_error(plain, exact)
        exact, error_pytorch = self._expected[which]
        with torch.set_grad_enabled(backward):
            output = self._call(kernel)
        tensors = [output]
        if backward:
            tensors += torch.autograd.grad(output, (self.q, self.k, self.v), self.grad)
        group = self.sweep.heads // self.sweep.kv_heads
        actual = [t[0, :1] for t in tensors]
        actual[:2] = [t[:, : self.checked_rows] for t in actual[:2]]  # o, dq
        if self.checked_rows < self.tier.q_len or group > 1:
            actual, exact = actual[:2], exact[:2]  # dk and dv sum over all queries of all heads of the group
        return _largest_error(actual, exact), error_pytorch

    def _one_head(self, function: Callable, dtype: torch.dtype, backward: bool) -> list[torch.Tensor]:
        rows = self.checked_rows
        q = self.q.detach()[:1, :1, :rows].to(dtype).requires_grad_(backward)
        k, v = (t.detach()[:1, :1].to(dtype).requires_grad_(backward) for t in (self.k, self.v))
        output = function(q, k, v)
        tensors = [output.detach()]
        if backward:
            tensors += torch.autograd.grad(output, (q, k, v), self.grad[:1, :1, :rows].to(dtype))
        return [t[0] for t in tensors]

    def _cpu_shortage(self, kernel: str, which: str) -> str:
        """Why this point would not fit the machine's free memory; empty where it does. A CPU's own OOM ends the process."""
        if self.device.type == "cuda" or kernel not in _QUADRATIC:
            return ""
        arrays = _QUADRATIC[kernel] + (0 if which == "forward" else 2)
        elements = self.sweep.batch * self.sweep.heads * self.tier.q_len * self.tier.k_len
        needed, free = arrays * elements * self.q.element_size(), _available_bytes()
        if free is None or needed < 0.8 * free:
            return ""
        return f"the scores alone need {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"


def _largest_error(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest ||a - e|| / ||e|| of the pairs, ||a - e|| where e is zero; NaN counts as infinite."""
    errors = []
    for a, e in zip(actual, exact, strict=True):
        norm = e.double().norm()
        errors.append(((a.double() - e.double()).norm() / torch.where(norm > 0, norm, 1.0)).item())
    return max(float("inf") if error != error else error for error in errors)


def _available_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


# --- What a sweep says ----------------------------------------------------------------------------


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    where = f"{row['dtype']} {'causal' if row['causal'] else 'full  '} {row['q_len']:>6}:{row['k_len']:<6}"
    what = f"{row['kernel']:<28} {row['pass']:<16}"
    if row["status"] != "ok":
        return f"{where} {what} {row['status']}: {row.get('note', '')}"
    return (
        f"{where} {what} {row['median_ms']:>10.4g} ms [{row['p20_ms']:.4g}, {row['p80_ms']:.4g}] "
        f"{row['tflops']:>8.4g} TFLOP/s {row['peak_mib']:>9.1f} MiB"
    )


def conclusions(frame) -> list[str]:
    """What the rows of a sweep show, in sentences made from their numbers."""
    said = []
    ok = frame[frame.status == "ok"]
    for (dtype, causal, which), group in ok.groupby(["dtype", "causal", "pass"], sort=False):
        square = group[group.q_len == group.k_len]
        if square.empty:
            continue
        longest = square[square.q_len == square.q_len.max()].set_index("kernel").median_ms
        setting = (
            f"{which.replace('_', ' + ')}, {dtype}, {'causal' if causal else 'not causal'}, {square.q_len.max()} tokens"
        )
        fastest = longest.idxmin()
        text = f"{setting}: **{fastest}** is the fastest at {records.significant(longest.min())} ms"
        if "scaled_dot_prod_attention" in longest and fastest != "scaled_dot_prod_attention":
            text += f", {longest['scaled_dot_prod_attention'] / longest.min():.1f} times the speed of naive attention"
        ours = longest[[name for name in longest.index if KERNELS[name].ours]].sort_values()
        peers = [name for name in longest.index if not KERNELS[name].ours]
        if len(ours) and peers:
            ratios = [f"{longest[peer] / ours.iloc[0]:.2f} times the speed of {peer}" for peer in peers]
            text += f". The best of ours, {ours.index[0]}, takes {records.significant(ours.iloc[0])} ms: {', '.join(ratios)}"
        said.append(text + ".")
    lost = frame[frame.status == "oom"]
    for kernel, group in lost.groupby("kernel", sort=False):
        said.append(f"{kernel} ran out of memory from {group.q_len.min()} queries x {group.k_len.min()} keys.")
    for kernel, group in frame[frame.status == "error"].groupby("kernel", sort=False):
        said.append(f"{kernel} failed at {len(group)} point(s): {group.note.iloc[0]}")
    for kernel in ok[ok.note == "in Triton's CPU interpreter"].kernel.unique():
        said.append(f"{kernel} ran in Triton's CPU interpreter, which checks it; its times say nothing about a GPU.")
    if not ok.empty:
        worst = (ok.error / ok.error_pytorch).max()
        said.append(
            f"Every timed kernel agreed with float64: its error was at most {worst:.2f} times that of PyTorch's plain "
            "attention in the same precision."
        )
    return said


def write_report(frame, folder: str | Path) -> list[Path]:
    """Write the figures and attention_sweep_report.md of a sweep's rows to folder; return their paths."""
    from lmsys import plots

    folder = Path(folder)
    written = []
    for which in [name for name in PASSES if name in set(frame["pass"])]:
        written.append(plots.save(plots.attention_bars(frame, which), folder / f"attention_sweep_{which}.png"))
    written.append(plots.save(plots.attention_heatmap(frame), folder / "attention_sweep_heatmap.png"))
    written.append(plots.save(plots.attention_scaling(frame), folder / "attention_sweep_scaling.png"))
    text = [
        "# Attention sweep",
        "",
        f"Measured on {frame.device.iloc[0]}. Times in ms: median [20th, 80th percentile].",
        "",
    ]
    text += [f"- {sentence}" for sentence in conclusions(frame)]
    for (dtype, causal, which), group in frame.groupby(["dtype", "causal", "pass"], sort=False):
        text += ["", f"## {which}, {dtype}, {'causal' if causal else 'not causal'}", "", _table(group)]
    written.append(records.write_text(folder / "attention_sweep_report.md", "\n".join(text) + "\n"))
    return written


def _table(group) -> str:
    """Kernels down, tiers across; a time with its spread, or the status."""
    table = []
    for kernel, points in group.groupby("kernel", sort=False):
        line = {"kernel": kernel}
        for point in points.itertuples():
            timed = point.status == "ok"
            spread = records.spread(point.median_ms, point.p20_ms, point.p80_ms) if timed else point.status
            line[f"{point.q_len}:{point.k_len}"] = spread
        table.append(line)
    return records.markdown_table(table)
