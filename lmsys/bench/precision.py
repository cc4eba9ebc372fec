"""What fewer bits cost: sums in several precisions, the dtypes that autocast chooses, and what layer norm loses.

Three questions of Stanford CS336, assignment 2 (mixed_precision_accumulation, benchmarking_mixed_precision (a) and (b)):

- sums: 0.01 added a thousand times, with accumulator and addend in fp32 or fewer bits, every partial sum beside the truth.
- dtypes: a small model under fp16 and bf16 autocast; what each of its tensors is made of, read from the running model.
- layer_norm: the layer's output, computed with more or less of it in fp32, against the same in float64. The reference starts from the rounded
  input, so that an error is the layer's own. Sums that are not in fp32 add one element after another and round each time, which is the worst order;
  a kernel that adds in a tree loses less, and PyTorch's kernels keep statistics in fp32.

Rounding is that of IEEE 754 on every device: sums and layer_norm are computed on the CPU. What autocast chooses depends on the device type.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmsys import records
from lmsys.bench.attention import DTYPES as TORCH_DTYPES
from lmsys.config import require, resolve_scale
from lmsys.device import device_name, resolve_device

SUMS, DTYPES, LAYER_NORM = "mixed_precision_sums", "mixed_precision_dtypes", "mixed_precision_layer_norm"
ADDEND = 0.01
# (accumulator, addend as it is made, whether it is cast to the accumulator's dtype first): the course's four, and bf16.
ACCUMULATIONS = (
    ("fp32", "fp32", False),
    ("fp16", "fp16", False),
    ("fp32", "fp16", False),
    ("fp32", "fp16", True),
    ("bf16", "bf16", False),
)
LOW = ("fp16", "bf16")
EPS = 1e-5  # of layer norm, PyTorch's own
STATISTICS = ("all low", "sums fp32", "inside fp32")
_PRESETS: dict[str, dict[str, int]] = {
    "smoke": {"width": 64, "rows": 2},
    "cpu": {"width": 1024, "rows": 16},
    "full": {"width": 1024, "rows": 64},
}


@dataclass(frozen=True)
class PrecisionSettings:
    """What is run; make it with settings(), which fills it from a scale and checks it."""

    scale: str
    additions: int
    width: int
    rows: int
    device: str
    seed: int


def settings(
    scale: str = "auto",
    additions: int = 1000,
    width: int | None = None,
    rows: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> PrecisionSettings:
    """The settings of a scale, with what is given in their place.

    Args:
        additions: terms of each sum. width, rows: of the input of layer norm. device: that the small model runs on.
    Raises:
        ValueError: a number out of range, or a device that is not here.
    """
    scale = resolve_scale(scale)
    given = {"width": width, "rows": rows}
    values = _PRESETS[scale] | {key: value for key, value in given.items() if value is not None}
    for name, value in (("additions", additions), *values.items()):
        require(type(value) is int and value >= 1, f"{name} is {value!r}; it must be a whole number of 1 or more")
    require(values["width"] >= 2, "width is 1; layer norm of one element is 0, give 2 or more")
    resolve_device(device)
    return PrecisionSettings(scale, additions, device=device, seed=seed, **values)


def run(chosen: PrecisionSettings, folder: str | Path) -> tuple[Any, Any, Any]:
    """Answer the three questions; write a CSV of each to folder and return them as DataFrames."""
    stamp = {
        "method": {"rounding": "as each dtype's own additions and products round, on the CPU; nothing is timed"},
        "parameters": dataclasses.asdict(chosen),
    }
    made: dict[str, Callable[[], Sequence[dict[str, Any]]]] = {
        SUMS: lambda: sums(chosen.additions),
        DTYPES: lambda: autocast_dtypes(resolve_device(chosen.device), chosen.seed),
        LAYER_NORM: lambda: layer_norm_errors(chosen.width, chosen.rows, chosen.seed),
    }
    frames = []
    for name, rows in made.items():
        with records.ResultWriter(name, folder, **stamp) as writer:
            for row in rows():
                writer.write(row)
        frames.append(records.read_results(writer.path))
    return tuple(frames)


# --- Sums -----------------------------------------------------------------------------------------


def accumulate(accumulator: str, addend: str, cast: bool, additions: int) -> list[float]:
    """The partial sums of ADDEND added so many times to 0. cast: the addend is cast to the accumulator's dtype before it is added."""
    total = torch.zeros((), dtype=TORCH_DTYPES[accumulator])
    term = torch.tensor(ADDEND, dtype=TORCH_DTYPES[addend])
    term = term.to(total.dtype) if cast else term
    partial = []
    for _ in range(additions):
        total += term
        partial.append(total.item())
    return partial


def sums(additions: int) -> list[dict[str, Any]]:
    """A row for each partial sum of each of ACCUMULATIONS: its value, its error, and the spacing of the accumulator's numbers there."""
    rows = []
    for accumulator, addend, cast in ACCUMULATIONS:
        for index, value in enumerate(accumulate(accumulator, addend, cast, additions), 1):
            rows.append(
                {
                    "accumulator": accumulator,
                    "addend": addend,
                    "cast": cast,
                    "additions": index,
                    "sum": value,
                    "error": value - ADDEND * index,
                    "spacing": spacing(value, accumulator),
                }
            )
    return rows


def spacing(value: float, dtype: str) -> float:
    """The distance from a positive number to the next larger one of the dtype."""
    info = torch.finfo(TORCH_DTYPES[dtype])
    return 2.0 ** math.floor(math.log2(max(value, info.tiny))) * info.eps


def sum_name(accumulator: str, addend: str, cast: bool) -> str:
    """How a sum is called in tables and figures."""
    if accumulator == addend:
        return accumulator
    return f"{addend} into {accumulator}" + (", cast first" if cast else "")


def sums_table(frame) -> str:
    """The last sum of each accumulation, with what its addend rounds to, as Markdown."""
    lines = []
    for (accumulator, addend, cast), group in frame.groupby(["accumulator", "addend", "cast"], sort=False):
        last = group.iloc[-1]
        term = torch.tensor(ADDEND, dtype=TORCH_DTYPES[addend]).item()
        lines.append(
            {
                "accumulator": accumulator,
                "addend": addend + (", cast first" if cast else ""),
                "an addend": f"{term:.10f}",
                "sum": f"{last['sum']:.7g}",
                "error": f"{last.error:+.2g}",
                "of it from the addend": f"{(term - ADDEND) * last.additions:+.2g}",
            }
        )
    return records.markdown_table(lines)


def sums_conclusions(frame) -> list[str]:
    """Where the errors come from, in sentences made from the rows."""
    last = {
        sum_name(*key): group.iloc[-1] for key, group in frame.groupby(["accumulator", "addend", "cast"], sort=False)
    }
    exact = ADDEND * last["fp32"].additions
    addend = torch.tensor(ADDEND, dtype=torch.float16).item()
    said = [
        f"The truth is {exact:g}. An fp32 accumulator ends {abs(last['fp32'].error):.2g} away, an fp16 one {abs(last['fp16'].error):.2g}.",
        f"fp16 addends in an fp32 accumulator end {abs(last['fp16 into fp32'].error):.2g} away: 0.01 is {addend:.8f} in fp16, and "
        f"{last['fp32'].additions} times that difference is {abs(addend - ADDEND) * last['fp32'].additions:.2g}. The additions themselves lose {abs(last['fp16 into fp32'].error - (addend - ADDEND) * last['fp32'].additions):.1g}.",
    ]
    same = last["fp16 into fp32"]["sum"] == last["fp16 into fp32, cast first"]["sum"]
    said.append(
        f"Casting the addend first {'changes nothing: adding in place casts it as well' if same else 'changes the sum'}."
    )
    said.append(
        f"At its end the fp16 accumulator's numbers lie {last['fp16'].spacing:.3g} apart, those of fp32 {last['fp32'].spacing:.2g}: each addition rounds to "
        "one of them, and always in the same direction while the sum is between two powers of two, so the errors add up instead of cancelling."
    )
    bf16 = frame[frame.accumulator == "bf16"]
    stuck = bf16[bf16["sum"] == bf16["sum"].iloc[-1]]
    if len(stuck) > 1:
        first = stuck.iloc[0]
        said.append(
            f"A bf16 accumulator stops at {first['sum']:g} after {int(first.additions)} additions: its numbers lie {first.spacing:.3g} apart there, and less than "
            "half of that rounds away."
        )
    return said


# --- Autocast -------------------------------------------------------------------------------------


class ToyModel(nn.Module):
    """The course's model: a linear layer, ReLU, layer norm, a linear layer."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, 10, bias=False)
        self.ln = nn.LayerNorm(10)
        self.fc2 = nn.Linear(10, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ln(F.relu(self.fc1(x))))


def autocast_dtypes(device: torch.device, seed: int) -> list[dict[str, Any]]:
    """A row for each tensor of ToyModel's training step under autocast: the dtype that it had."""
    rows = []
    for dtype in LOW:
        torch.manual_seed(seed)
        model = ToyModel(8, 5).to(device)
        first, norm = (_outputs(module) for module in (model.fc1, model.ln))
        inputs, targets = torch.randn(16, 8, device=device), torch.randint(5, (16,), device=device)
        with torch.autocast(device.type, TORCH_DTYPES[dtype]):
            logits = model(inputs)
            loss = F.cross_entropy(logits, targets)
            parameters = {parameter.dtype for parameter in model.parameters()}  # inside the autocast context
        loss.backward()
        found = {
            "parameters": parameters,
            "output of the first layer": {tensor.dtype for tensor in first},
            "output of layer norm": {tensor.dtype for tensor in norm},
            "logits": {logits.dtype},
            "loss": {loss.dtype},
            "gradients": {parameter.grad.dtype for parameter in model.parameters()},
        }
        rows += [
            {
                "autocast": dtype,
                "tensor": name,
                "dtype": ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)),
                "device_type": device.type,
                "device": device_name(device),
            }
            for name, kinds in found.items()
        ]
    return rows


def _outputs(module: nn.Module) -> list[Tensor]:
    """A list that fills with the module's outputs."""
    outputs: list[Tensor] = []
    module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


def dtypes_table(frame) -> str:
    """The dtype of each tensor under each autocast, as Markdown."""
    lines = [
        {"tensor": name} | {f"{kind} autocast": dtype for kind, dtype in zip(rows.autocast, rows["dtype"], strict=True)}
        for name, rows in frame.groupby("tensor", sort=False)
    ]
    return records.markdown_table(lines)


def dtypes_conclusions(frame) -> list[str]:
    """What autocast leaves in fp32, in sentences made from the rows."""
    said = []
    for dtype, rows in frame.groupby("autocast", sort=False):
        kinds = dict(zip(rows.tensor, rows["dtype"], strict=True))
        full = [name for name, kind in kinds.items() if kind == "float32"]
        low = [name for name, kind in kinds.items() if kind != "float32"]
        said.append(
            f"{dtype} autocast: fp32 {', '.join(full)}; {' and '.join(sorted({kinds[n] for n in low}))} {', '.join(low)}."
        )
    if (frame.device_type == "cpu").all():
        said.append(
            "This is a CPU, whose autocast leaves layer norm in the dtype of its input; on a CUDA device layer norm is among the operations that run in fp32."
        )
    return said


# --- Layer norm -----------------------------------------------------------------------------------


def running_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, one element after another, each partial sum rounded to the dtype of x."""
    total = torch.zeros_like(x[..., 0])
    for column in x.unbind(-1):
        total += column
    return total.unsqueeze(-1)


def layer_norm(x: Tensor, statistics: str) -> Tensor:
    """(x - mean) / sqrt(variance + EPS) over the last dimension, in and out in the dtype of x.

    statistics: "all low": everything is rounded to that dtype, partial sums too; "sums fp32": sums are made in fp32 and what is between them is
    rounded; "inside fp32": only input and output are in that dtype.
    """
    if statistics == "inside fp32":
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    def mean(values: Tensor) -> Tensor:
        if statistics == "all low":
            return running_sum(values) / values.shape[-1]
        return values.float().mean(-1, keepdim=True).to(values.dtype)

    y = x - mean(x)
    return y * torch.rsqrt(mean(y * y) + EPS)


def layer_norm_errors(width: int, rows: int, seed: int) -> list[dict[str, Any]]:
    """A row for each input, dtype and place of fp32: ||output - exact|| / ||exact||, and the largest square's and the variance's fate.

    Inputs are normal: of mean 0 and growing standard deviation (what: scale), or of standard deviation 1 and growing mean (what: mean).
    """
    noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scales = [2.0**power for power in range(-12, 13)]
    means = [2.0**power for power in range(0, 11)]
    inputs = {"scale": (scales, torch.stack([noise * scale for scale in scales]))}
    inputs["mean"] = (means, torch.stack([noise + mean for mean in means]))
    found = []
    for what, (values, x) in inputs.items():
        for dtype in LOW:
            low = x.to(TORCH_DTYPES[dtype])
            exact = F.layer_norm(low.double(), (width,), eps=EPS)
            squares = (low - low.double().mean(-1, keepdim=True).to(low.dtype)).square()
            for statistics in STATISTICS:
                output = layer_norm(low, statistics).double()
                error = (output - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
                for index, value in enumerate(values):
                    finite = bool(output[index].isfinite().all())
                    overflows = not bool(squares[index].isfinite().all())
                    # An infinite sum of squares makes every output 0: finite, and nothing of the input is left.
                    lost = not finite or not bool(output[index].any())
                    found.append(
                        {
                            "what": what,
                            "value": value,
                            "dtype": dtype,
                            "statistics": statistics,
                            "error": 1.0 if lost else error[index].item(),
                            "lost": lost,
                            "square_overflows": overflows,
                        }
                    )
    return found


def layer_norm_table(frame) -> str:
    """Errors at some inputs, as Markdown: rows inputs, columns dtype and what is in fp32."""
    shown = {"scale": (2.0**-12, 1.0, 16.0, 256.0), "mean": (16.0, 256.0)}
    lines = []
    for what, values in shown.items():
        for value in values:
            rows = frame[(frame.what == what) & ((frame.value / value - 1).abs() < 1e-4)]
            line = {"input": f"std {value:g}" if what == "scale" else f"std 1, mean {value:g}"}
            for row in rows.itertuples():
                line[f"{row.dtype}, {row.statistics}"] = "lost" if row.lost else f"{row.error:.1e}"
            lines.append(line)
    return records.markdown_table(lines)


def layer_norm_conclusions(frame) -> list[str]:
    """What layer norm loses in each dtype, in sentences made from the rows."""
    said = []
    scale = frame[frame.what == "scale"]
    for dtype in LOW:
        rows = scale[scale.dtype == dtype]
        whole = rows[rows.statistics == "all low"]
        squares = rows[rows.square_overflows]
        text = f"{dtype}: "
        if len(squares):
            lost = whole[whole.lost & (whole.value >= 1)].value.min()
            most = torch.finfo(TORCH_DTYPES[dtype]).max
            text += (
                f"the largest number is {most:g}, so squares overflow at a standard deviation of {squares.value.min():g} and their sum at {lost:g}; "
                "the variance is then infinite and the output 0. "
            )
        else:
            text += f"no square overflows up to a standard deviation of {rows.value.max():g}. "
        at_one = rows[rows.value == 1].set_index("statistics").error
        text += (
            f"At standard deviation 1 the error is {at_one['all low']:.1e} with everything in {dtype}, {at_one['sums fp32']:.1e} with sums in fp32 and "
            f"{at_one['inside fp32']:.1e} with all of it in fp32."
        )
        said.append(text)
    bf16 = scale[(scale.dtype == "bf16") & (scale.value == 1)].set_index("statistics").error
    mean = frame[(frame.what == "mean") & (frame.dtype == "bf16")]
    worst = mean[mean.statistics == "all low"].sort_values("value").iloc[-1]
    best = mean[(mean.statistics == "inside fp32") & (mean.value == worst.value)].iloc[0]
    said.append(
        f"bf16 has the range of fp32, so nothing overflows, but 8 bits: once a running sum is some 256 times an addend, the addend is lost, and the variance "
        f"comes out too small. Statistics in fp32 divide that error by {bf16['all low'] / bf16['inside fp32']:.0f}. The mean has to be subtracted in fp32, too: at "
        f"mean {worst.value:g} the error is {'total' if worst.lost else format(worst.error, '.1e')} in bf16 and {best.error:.1e} in fp32."
    )
    return said


def write_report(sums_frame, dtypes_frame, layer_norm_frame, folder: str | Path) -> dict[str, Path]:
    """Write the figures and mixed_precision_report.md to folder; return their paths by their short names."""
    from lmsys import plots

    folder = Path(folder)
    figures = {
        "sums": plots.partial_sums(sums_frame.assign(name=_names(sums_frame))),
        "layer_norm": plots.layer_norm_errors(layer_norm_frame),
    }
    written = {name: plots.save(figure, folder / f"mixed_precision_{name}.png") for name, figure in figures.items()}
    text = ["# Mixed precision", ""]
    parts = (
        ("Sums", sums_conclusions(sums_frame), sums_table(sums_frame)),
        ("Autocast", dtypes_conclusions(dtypes_frame), dtypes_table(dtypes_frame)),
        ("Layer norm", layer_norm_conclusions(layer_norm_frame), layer_norm_table(layer_norm_frame)),
    )
    for title, said, table in parts:
        text += [f"## {title}", "", *(f"- {sentence}" for sentence in said), "", table]
    written["report"] = records.write_text(folder / "mixed_precision_report.md", "\n".join(text))
    return written


def _names(frame) -> list[str]:
    return [sum_name(row.accumulator, row.addend, row.cast) for row in frame.itertuples()]
