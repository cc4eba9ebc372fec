"""What fewer bits cost: sums in several precisions, the dtypes that autocast chooses, and what layer norm loses.

Three questions of Stanford CS336, assignment 2 (mixed_precision_accumulation, benchmarking_mixed_precision (a), (b)):

- sums: 0.01 added a thousand times, with accumulator and addend in fp32 or fewer bits, every partial sum beside the
  truth.
- dtypes: a small model under fp16 and bf16 autocast; what each of its tensors is made of, read from the running model.
- layer_norm: the layer's output, computed with more or less of it in fp32, against the same in float64. The reference
  starts from the rounded input, so that an error is the layer's own. Sums that are not in fp32 add one element after
  another and round each time, which is the worst order; a kernel that adds in a tree loses less, and PyTorch's kernels
  keep statistics in fp32.

Rounding is that of IEEE 754 on every device: sums and layer_norm are computed on the CPU. What autocast chooses depends
on the device type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmsys.bench.experiment import Experiment, Notebook, Parameters, Point, Row, require_numbers
from lmsys.bench.measure import DTYPES as TORCH_DTYPES
from lmsys.device import device_name, resolve_device

ADDEND = 0.01
# (accumulator, addend as it is made, whether it is cast to the accumulator's dtype first): the course's four, and bf16.
ACCUMULATIONS = (
    *(("fp32", "fp32", False), ("fp16", "fp16", False), ("fp32", "fp16", False)),
    *(("fp32", "fp16", True), ("bf16", "bf16", False)),
)
LOW = ("fp16", "bf16")
EPS = 1e-5  # of layer norm, PyTorch's own
STATISTICS = ("all low", "sums fp32", "inside fp32")


def check(p: Parameters) -> None:
    """Raises ValueError: a number out of range, or a device that is not here."""
    require_numbers(p, {"additions": 1, "width": 2, "rows": 1})  # layer norm of one element is 0
    resolve_device(p.device)


NOTEBOOK = Notebook("mixed_precision", check)


def accumulate(accumulator: str, addend: str, cast: bool, additions: int) -> list[float]:
    """The partial sums of ADDEND added so many times to 0; cast: in the accumulator's dtype before it is added."""
    total = torch.zeros((), dtype=TORCH_DTYPES[accumulator])
    term = torch.tensor(ADDEND, dtype=TORCH_DTYPES[addend])
    term = term.to(total.dtype) if cast else term
    return [total.add_(term).item() for _ in range(additions)]


def sums(additions: int) -> list[dict[str, Any]]:
    """For each partial sum of each of ACCUMULATIONS its error, and the spacing of the accumulator's numbers there."""
    rows = []
    for accumulator, addend, cast in ACCUMULATIONS:
        for index, value in enumerate(accumulate(accumulator, addend, cast, additions), 1):
            row = {"accumulator": accumulator, "addend": addend, "cast": cast, "additions": index, "sum": value}
            rows.append(row | {"error": value - ADDEND * index, "spacing": spacing(value, accumulator)})
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
        outputs: dict[nn.Module, Tensor] = {}
        for module in (model.fc1, model.ln):
            module.register_forward_hook(lambda module, _inputs, output, seen=outputs: seen.update({module: output}))
        inputs, targets = torch.randn(16, 8, device=device), torch.randint(5, (16,), device=device)
        with torch.autocast(device.type, TORCH_DTYPES[dtype]):
            logits = model(inputs)
            loss = F.cross_entropy(logits, targets)
            parameters = {parameter.dtype for parameter in model.parameters()}  # inside the autocast context
        loss.backward()
        found = {
            "parameters": parameters,
            "output of the first layer": {outputs[model.fc1].dtype},
            "output of layer norm": {outputs[model.ln].dtype},
            "logits": {logits.dtype},
            "loss": {loss.dtype},
            "gradients": {parameter.grad.dtype for parameter in model.parameters()},
        }
        for name, kinds in found.items():
            names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            row = {"autocast": dtype, "tensor": name, "dtype": names, "device_type": device.type}
            rows.append(row | {"device": device_name(device)})
    return rows


def running_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, one element after another, each partial sum rounded to the dtype of x."""
    total = torch.zeros_like(x[..., 0])
    for column in x.unbind(-1):
        total += column
    return total.unsqueeze(-1)


def layer_norm(x: Tensor, statistics: str) -> Tensor:
    """(x - mean) / sqrt(variance + EPS) over the last dimension, in and out in the dtype of x.

    statistics: "all low": everything is rounded to that dtype, partial sums too; "sums fp32": sums are made in fp32 and
    what is between them is rounded; "inside fp32": only input and output are in that dtype.
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
    """For each input, dtype and place of fp32: ||output - exact|| / ||exact||, and whether it or its squares overflow.

    Inputs are normal: of mean 0 and growing standard deviation (what: scale), or of standard deviation 1 and growing
    mean (what: mean).
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
                    row = {"what": what, "value": value, "dtype": dtype, "statistics": statistics}
                    row |= {"error": 1.0 if lost else error[index].item(), "lost": lost}
                    found.append(row | {"square_overflows": overflows})
    return found


def _experiment(name: str, columns: Sequence[str], measure: Callable[[Point, Parameters], list[Row]]) -> Experiment:
    """One question: a single point, many rows, nothing timed."""
    method = {"rounding": "as each dtype's own additions and multiplications round, on the CPU; nothing is timed"}
    return Experiment(name, columns, lambda p: [{"question": name}], measure, method=lambda p: method)


SUMS = _experiment(
    "mixed_precision_sums",
    ("accumulator", "addend", "cast", "additions", "sum", "error", "spacing"),
    lambda point, p: sums(p.additions),
)
DTYPES = _experiment(
    "mixed_precision_dtypes",
    ("autocast", "tensor", "dtype", "device_type", "device"),
    lambda point, p: autocast_dtypes(resolve_device(p.device), p.seed),
)
LAYER_NORM = _experiment(
    "mixed_precision_layer_norm",
    ("what", "value", "dtype", "statistics", "error", "lost", "square_overflows"),
    lambda point, p: layer_norm_errors(p.width, p.rows, p.seed),
)
