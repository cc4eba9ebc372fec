"""The course's 2026 leaderboard: a full training step of an 8B model on two GPUs, 2 x 32,768 tokens, bf16.

A step is forward, loss, backward and AdamW, from tokens on the device to updated weights; the model is Stanford CS336's, assignment 2
(2026): vocabulary 151,936, d_model 4096, d_ff 11,008, 34 layers, 32 heads. A sequence a GPU.

- lmsys: matrices and optimizer state sharded (lmsys.parallel.fsdp: fp32 shards, gathered in bf16), blocks that keep what a plan says
  (lmsys.step.blocks and planner), our attention, head and loss in one (lmsys.step.loss), AdamW in one kernel (lmsys.step.adamw).
- torch_native, the peer: what PyTorch itself has, put together as its own training recipes do: FSDP2, cuDNN attention, each block
  compiled and checkpointed, the loss in compiled chunks, fused AdamW; weights, gradients and moments in bf16, which is less to hold and to
  move than ours. Its model is that of lmsys.bench.peers.

Before that, in the same processes: the same code on a small twin, whose blocks each keep something else, beside the plain model on the
whole batch in float64, with the plain model's error in the step's dtype as the measure; and the device's rates at the step's own
shapes, and its free memory, from which the plan is made. A step that runs out of memory is a row with its plan, and is tried once more with
a plan for less. Times are between events at the ends of steps, the largest over the ranks; both start from the same weights and tokens, and
the loss of the first step is kept.

On a CPU, two processes and a small model show that all of this works; the memory that is planned for is then half way between what
keeping inputs alone takes and what keeping everything takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lmsys import cost, parallel, records
from lmsys.bench import leaderboard, replicas
from lmsys.bench.attention import DTYPES as TORCH_DTYPES
from lmsys.bench.measure import peak_bytes_cpu, quantiles
from lmsys.bench.peers import NativeLM
from lmsys.bench.processes import Clock, largest
from lmsys.bench.steps import live_bytes
from lmsys.config import ModelConfig, require, resolve_scale, unknown_name
from lmsys.device import device_name, peak_flops, resolve_device
from lmsys.model import TransformerLM
from lmsys.parallel import group
from lmsys.parallel.group import Process
from lmsys.parallel.shards import all_gather
from lmsys.step import blocks, planner
from lmsys.step.adamw import FusedAdamW

BOARD, OURS, PEER = "2026", "lmsys", "torch_native"
IMPLEMENTATIONS = (OURS, PEER)
GPUS = 2
MODEL = ModelConfig(4096, 11_008, 34, 32, 32_768, 151_936)
LESS = 3.0  # a second try after running out of memory leaves so many times the margin
_LIMIT_S = 270.0  # of one point, compilation included
_PEER_CHUNK = 4096  # tokens whose logits the peer's loss makes at a time
_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
# The twin's blocks: from the input alone to everything.
TWIN_KEEP = ((), ("attention",), ("qkv", "attention", "norm2"), ("qkv", "middle", "gate"), blocks.KINDS)


# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepBoard:
    """What is run; make it with settings().

    Attributes:
        model, twin: the shapes that are timed and checked. local_batch: sequences a GPU.
        margin_gib: of the device's free memory, left for what the plan does not count: the allocator's gaps, NCCL, libraries.
        warmup_steps: first, the compiling one among them. compiled: the peer's blocks and loss.
    """

    scale: str
    implementations: tuple[str, ...]
    model: ModelConfig
    twin: ModelConfig
    local_batch: int
    dtype: str
    kernel: str
    compiled: bool
    margin_gib: float
    warmup_steps: int
    timed_steps: int
    learning_rate: float
    device: str
    seed: int


_SMALL = {"dtype": "fp32", "kernel": "flash_attention_torch", "compiled": False}
_PRESETS: dict[str, dict[str, Any]] = {
    "smoke": _SMALL
    | {"model": ModelConfig(32, 88, 3, 2, 32, 128), "twin": ModelConfig(16, 40, 5, 2, 16, 61), "timed_steps": 2},
    "cpu": _SMALL
    | {"model": ModelConfig(128, 344, 8, 4, 128, 1024), "twin": ModelConfig(32, 88, 5, 2, 24, 61), "timed_steps": 5},
    "full": {
        "dtype": "bf16",
        "kernel": "flash_attention_triton",
        "compiled": True,
        "model": MODEL,
        "twin": ModelConfig(512, 1376, 5, 4, 1024, 2003),  # head_dim 128, so the kernels of the step itself
        "timed_steps": 7,
    },
}


def settings(
    scale: str = "auto",
    implementations: Sequence[str] | None = None,
    margin_gib: float = 4.0,
    warmup_steps: int = 2,
    timed_steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> StepBoard:
    """The settings of a scale, with what is given in their place.

    Raises:
        ValueError: an unknown name, a number out of range, or scale full on a machine without two GPUs.
    """
    scale = resolve_scale(scale)
    values = {"local_batch": 1, "learning_rate": 3e-4} | _PRESETS[scale]
    names = IMPLEMENTATIONS if implementations is None else tuple(implementations)
    require(len(names) > 0, "implementations must not be empty")
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise unknown_name("implementation of the 2026 board", name, IMPLEMENTATIONS)
    steps = values["timed_steps"] if timed_steps is None else timed_steps
    for name, value in (("warmup_steps", warmup_steps), ("timed_steps", steps)):
        require(type(value) is int and value >= 1, f"{name} is {value!r}; it takes whole numbers of 1 or more")
    require(
        isinstance(margin_gib, (int, float)) and math.isfinite(margin_gib) and margin_gib >= 0,
        f"margin_gib is {margin_gib!r}; it takes 0 or more",
    )
    if scale == "full":
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        require(
            device != "cpu" and here >= GPUS,
            f"the 2026 board at scale full takes {GPUS} GPUs, and this run has {0 if device == 'cpu' else here}; scale cpu shows a small "
            "model on two processes, and --plan what would be kept on two H200s",
        )
    elif device == "auto":
        device = "cpu"
    replicas.process_counts(device, [GPUS])
    made = values | {
        "scale": scale,
        "implementations": names,
        "margin_gib": float(margin_gib),
        "warmup_steps": warmup_steps,
        "timed_steps": steps,
        "device": device,
        "seed": seed,
    }
    return StepBoard(**made)


def shape(board: StepBoard) -> planner.Shape:
    """The step of one GPU, for the planner."""
    return planner.Shape(board.model, board.local_batch, board.model.context_length, GPUS, board.dtype)


def paper_plan(margin_gib: float = 4.0) -> planner.Plan:
    """The plan of the board's shape for two H200s, at rates measured on one."""
    full = planner.Shape(MODEL, 1, MODEL.context_length, GPUS, "bf16")
    return planner.plan(full, planner.H200_BYTES - margin_gib * 2**30)


# --- Points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What the processes do: twin, plan, or an implementation's name."""

    what: str
    processes: int = GPUS


def measure(process: Process, point: Point, board: StepBoard) -> dict[str, Any]:
    """A point's result; see twin, prepare and timed."""
    if point.what == "twin":
        return twin(process, board)
    if point.what == "plan":
        rates, free = prepare(process, board)
        return {"status": "ok", "rates": dataclasses.asdict(rates), "free": free}
    return timed(process, point.what, board)


def batch(config: ModelConfig, sequences: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids and targets, (sequences, context_length) each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(config.vocab_size, (sequences, config.context_length + 1), generator=generator).to(device)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


# --- Ours -----------------------------------------------------------------------------------------


def initial_weights(config: ModelConfig, kernel: str, seed: int, device: torch.device) -> TransformerLM:
    """The plain model with the weights of the seed, in fp32, on the device."""
    torch.manual_seed(seed)
    with device:
        return TransformerLM(config, attention_kernel=kernel)


def sharded(
    config: ModelConfig, keep: Sequence[Any], board: StepBoard, device: torch.device
) -> parallel.fsdp.FullyShardedModule:
    """Our model: blocks with a written backward pass, sharded."""
    model = blocks.select(initial_weights(config, board.kernel, board.seed, device), keep)
    low = {"compute_dtype": TORCH_DTYPES[board.dtype]} if board.dtype != "fp32" else {}
    return parallel.wrap(model, "fsdp", prefetch=planner.PREFETCH, **low)


class Step:
    """A training step of either implementation."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]):
        self.module, self.optimizer, self.data = module, optimizer, data

    def __call__(self) -> Tensor:
        """The loss of this rank's sequences, on the device."""
        loss = self.module(*self.data)
        loss.backward()
        self.module.finish_gradient_synchronization()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def ours(process: Process, board: StepBoard, keep: Sequence[Any]) -> Step:
    """Our step. All parameters decay, as the peer's do."""
    module = sharded(board.model, keep, board, process.device)
    parameters = [parameter for parameter in module.parameters() if parameter.numel()]
    data = batch(board.model, board.local_batch, board.seed + 1 + process.rank, process.device)
    return Step(module, FusedAdamW(parameters, lr=board.learning_rate), data)


# --- The peer -------------------------------------------------------------------------------------


class PeerLM(NativeLM):
    """NativeLM whose loss never has more than _PEER_CHUNK tokens' logits."""

    chunk_loss: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.token_embeddings(ids)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        parts = (tensor.flatten(0, 1).split(_PEER_CHUNK) for tensor in (self.ln_final(x), targets))
        losses = [
            checkpoint(self.chunk_loss, hidden, self.lm_head.weight, target, use_reentrant=False)
            for hidden, target in zip(*parts, strict=True)
        ]
        return torch.stack(losses).sum() / targets.numel()


def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def peer(process: Process, board: StepBoard) -> Step:
    """The peer's step, from the weights that ours begins with."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    device, dtype = process.device, TORCH_DTYPES[board.dtype]
    weights = initial_weights(board.model, board.kernel, board.seed, device).state_dict()
    with device:
        model = PeerLM(board.model)
    model.load_state_dict(weights)
    del weights
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.chunk_loss = torch.compile(chunk_loss, dynamic=False) if board.compiled else chunk_loss
    for index, layer in enumerate(model.layers):
        layer = checkpoint_wrapper(layer, preserve_rng_state=False)
        model.layers[index] = torch.compile(layer, dynamic=False) if board.compiled else layer
    module = parallel.wrap(model, "torch_fsdp2")
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=board.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    data = batch(board.model, board.local_batch, board.seed + 1 + process.rank, device)
    return Step(module, optimizer, data)


@contextlib.contextmanager
def cudnn_attention(device: torch.device) -> Iterator[None]:
    """PyTorch's attention in here, forward and backward, is cuDNN's on a GPU."""
    if device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield


# --- Correctness ----------------------------------------------------------------------------------


def twin(process: Process, board: StepBoard) -> dict[str, Any]:
    """The loss and all gradients of a small model by our code, in as many processes, beside the plain model's in float64.

    Returns:
        on rank 0: loss_error and gradient_error, relative, of ours and (plain_) of the plain model in the step's dtype.
    """
    config, device = board.twin, process.device
    module = sharded(config, TWIN_KEEP, board, device)
    ids, targets = batch(config, process.world_size, board.seed + 1, device)
    mine = slice(process.rank, process.rank + 1)
    loss = module(ids[mine], targets[mine])
    loss.backward()
    module.finish_gradient_synchronization()
    # An optimizer that moves nothing, whose state after its first step is the gradient: what gathers states gathers gradients.
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
    optimizer.step()
    names = [name for name, _ in module.named_parameters()]
    state = module.gather_optimizer_state(optimizer)["state"]
    mean = group.mean_over_ranks(loss).item()
    if process.rank != 0:
        return {}
    gradients = {name: state[index]["momentum_buffer"].to(device).double() for index, name in enumerate(names)}
    exact_loss, exact = _plain(config, board, torch.float64, ids, targets, device)
    plain_loss, plain = _plain(config, board, TORCH_DTYPES[board.dtype], ids, targets, device)
    result = {
        "loss_error": abs(mean - exact_loss) / exact_loss,
        "plain_loss_error": abs(plain_loss - exact_loss) / exact_loss,
        "gradient_error": _distance(gradients, exact),
        "plain_gradient_error": _distance(plain, exact),
    }
    return result | {"status": "ok"} | _verdict(result, board.dtype)


# What rounding may add to twice the plain model's distance from float64: by chance that is next to nothing, of a loss above all.
_FLOORS = {"fp32": {"gradient": 1e-6, "loss": 1e-6}, "bf16": {"gradient": 1e-3, "loss": 1e-3}}


def _verdict(result: dict[str, float], dtype: str) -> dict[str, str]:
    """An error where ours is more than twice as far from float64 as the plain model in the step's dtype; see _FLOORS."""
    if all(
        result[f"{what}_error"] <= 2 * result[f"plain_{what}_error"] + floor for what, floor in _FLOORS[dtype].items()
    ):
        return {}
    numbers = ", ".join(f"{name} {value:.2g}" for name, value in result.items())
    return {"status": "error", "note": f"the twin is wrong: {numbers}"}


def _plain(
    config: ModelConfig, board: StepBoard, dtype: torch.dtype, ids: Tensor, targets: Tensor, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, in float64, of the plain model with its matrices in dtype, on the whole batch."""
    model = initial_weights(config, "vectorized_torch", board.seed, device)
    for parameter in model.parameters():
        if parameter.ndim >= 2 or dtype == torch.float64:
            parameter.data = parameter.data.to(dtype)
    losses = []
    for one, wanted in zip(ids.split(1), targets.split(1), strict=True):  # a sequence at a time, as a rank has it
        logits = model(one)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits[0].to(wide), wanted[0]) / len(ids)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def _distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest over the parameters of |found - exact| / |exact|."""
    assert found.keys() == exact.keys()
    return max(((found[name] - one).norm() / one.norm()).item() for name, one in exact.items())


# --- Rates and memory -----------------------------------------------------------------------------


@functools.cache
def prepare(process: Process, board: StepBoard) -> tuple[planner.Rates, float | None]:
    """The device's rates at the step's shapes, means over the ranks, and the least free memory of a rank in bytes; None on a CPU.

    Measured once a process: all ranks plan from the same numbers.
    """
    device = process.device
    measured = [_product_rate(board, device), *_attention_rates(board, device), _memory_rate(board, device)]
    measured.append(_link_rate(board, process))
    found = torch.tensor(measured, dtype=torch.float64, device=device)
    rates = planner.Rates(*group.mean_over_ranks(found).tolist())
    if device.type != "cuda":
        return rates, None
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.tensor(float(torch.cuda.mem_get_info(device)[0]), dtype=torch.float64, device=device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return rates, free.item()


def _product_rate(board: StepBoard, device: torch.device) -> float:
    """FLOP/s of the feed-forward layer's first product."""
    step, config = shape(board), board.model
    x, weight = (
        torch.randn(rows, config.d_model, device=device, dtype=TORCH_DTYPES[board.dtype])
        for rows in (step.tokens, config.d_ff)
    )
    return 2.0 * step.tokens * config.d_model * config.d_ff / _seconds(device, lambda: x @ weight.t())


def _attention_rates(board: StepBoard, device: torch.device) -> list[float]:
    """FLOP/s of the forward and the backward pass, Q, K and V as a block has them."""
    config, length, kernel = board.model, board.model.context_length, board.kernel
    size = (board.local_batch, length, 3, config.num_heads, config.head_dim)
    qkv = torch.randn(size, device=device, dtype=TORCH_DTYPES[board.dtype])
    q, k, v = (qkv[:, :, index].transpose(1, 2) for index in range(3))
    o, lse = blocks.attend(kernel, q, k, v)
    do = torch.randn_like(o)
    seconds = {
        "forward": _seconds(device, lambda: blocks.attend(kernel, q, k, v)),
        "backward": _seconds(device, lambda: blocks.attend_backward(kernel, q, k, v, o, lse, do)),
    }
    flops = (board.local_batch, config.num_heads, length, length, config.head_dim, True)
    return [cost.attention_flops(*flops, which) / taken for which, taken in seconds.items()]


def _memory_rate(board: StepBoard, device: torch.device) -> float:
    """Bytes a second read and written by a copy of a feed-forward activation."""
    source = torch.randn(shape(board).tokens, board.model.d_ff, device=device, dtype=TORCH_DTYPES[board.dtype])
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _link_rate(board: StepBoard, process: Process) -> float:
    """Bus bytes a second of gathering a block's matrices."""
    each = -(-shape(board).block_parameters // process.world_size)
    share = torch.zeros(each, device=process.device, dtype=TORCH_DTYPES[board.dtype])
    whole = share.new_empty(each * process.world_size)
    seconds = _seconds(process.device, lambda: all_gather(whole, share, None).wait())
    return cost.bus_factor("all_gather", process.world_size) * whole.nbytes / seconds


def _seconds(device: torch.device, function: Callable[[], Any]) -> float:
    """The median time of a call among others like it: on a GPU in a row of some 0.2 s, as clocks under load are not those of one call."""
    function()
    samples, clock = (40 if device.type == "cuda" else 3), Clock(device)
    clock.tick()
    for _ in range(samples):
        function()
        clock.tick()
    return quantiles(clock.times_ms())[0] / 1e3


def make_plan(board: StepBoard, rates: planner.Rates, free: float | None) -> planner.Plan:
    """The plan for free memory less the margin; without a number, for half of what the activations could take.

    Raises:
        ValueError: it does not fit.
    """
    step = shape(board)
    if free is None:
        every = planner.Plan(step, rates, 0.0, (frozenset(planner.KINDS),) * board.model.num_layers)
        free = (planner.keep_nothing(step, 0.0, rates).peak_bytes + every.peak_bytes) / 2
        return planner.plan(step, free, rates)
    return planner.plan(step, free - board.margin_gib * 2**30, rates)


# --- Time -----------------------------------------------------------------------------------------


def timed(process: Process, implementation: str, board: StepBoard) -> dict[str, Any]:
    """Times of steps, the largest over the ranks; the first step's loss, the mean over the ranks; peak bytes of all steps."""
    device, start = process.device, time.perf_counter()
    result: dict[str, Any] = {"status": "ok"}
    if board.compiled:
        torch._dynamo.reset()
        torch._dynamo.config.fail_on_recompile_limit_hit = (
            True  # or the rest of the peer would run eager without a word
        )
    held = live_bytes(device)
    with contextlib.ExitStack() as stack:
        if implementation == OURS:
            plan = make_plan(board, *prepare(process, board))
            result |= told(plan)
            step = ours(process, board, plan.keep)
        else:
            stack.enter_context(cudnn_attention(device))
            step = peer(process, board)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        losses = [step() for _ in range(board.warmup_steps)]
        result["losses"] = group.mean_over_ranks(torch.stack(losses)).tolist()
        result["ready_s"] = time.perf_counter() - start
        dist.barrier()
        clock = Clock(device)
        clock.tick()
        for _ in range(board.timed_steps):
            step()
            clock.tick()
        result["times_ms"] = largest(process, clock.times_ms())
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:
            peak = live_bytes(device, step.module) + peak_bytes_cpu(step, lambda: ())
        result["peak_bytes"] = largest(process, [peak - held])[0]
    if not all(map(math.isfinite, result["losses"])):
        result |= {"status": "error", "note": f"the losses are {result['losses']}"}
    return result


def told(plan: planner.Plan) -> dict[str, Any]:
    """What a row says of a plan."""
    rates = plan.rates
    return {
        "plan": str(plan),
        "predicted_ms": 1e3 * sum(plan.seconds().values()),
        "predicted_peak_mib": plan.peak_bytes / 2**20,
        "rates": f"products {rates.product / 1e12:.4g} TFLOP/s, attention {rates.attention_forward / 1e12:.4g} and "
        f"{rates.attention_backward / 1e12:.4g}, memory {rates.memory / 1e12:.3g} TB/s, link {rates.link / 1e9:.4g} GB/s",
    }


# --- Running --------------------------------------------------------------------------------------


def run(board: StepBoard, folder: str | Path, *, on_row: Callable[[dict[str, Any]], None] = lambda row: None):
    """Measure the board; write its rows to leaderboard_results.csv, beside the other board's; return them as a DataFrame."""
    device = resolve_device(board.device)
    with leaderboard.writer(BOARD, folder, method=method(board, device), parameters=dataclasses.asdict(board)) as out:
        for row in rows(board, device):
            out.write(row)
            on_row(row)
    return leaderboard.read(folder, BOARD)


def method(board: StepBoard, device: torch.device) -> dict[str, str]:
    """How the board is measured, for the stamp of a result."""
    gpu = device.type == "cuda"
    return {
        "timer": f"{'CUDA events' if gpu else 'time.perf_counter'} between steps; of each step the largest over the ranks",
        "warmup": f"{board.warmup_steps} steps",
        "samples": f"{board.timed_steps}",
        "statistic": "median, 20th and 80th percentile",
        "step": "forward, loss, backward, reduction, AdamW; tokens on the device; no clipping",
        "memory": "peak allocated of all steps" + ("" if gpu else " (live tensors and the profiler)"),
        "error": "of the twin: the largest relative error of a parameter's gradient against float64",
    }


@contextlib.contextmanager
def growing_segments() -> Iterator[None]:
    """Processes started in here have an allocator whose segments grow: gathered blocks and activations of many sizes leave fewer gaps."""
    before = os.environ.get(_ALLOCATOR)
    os.environ.setdefault(_ALLOCATOR, "expandable_segments:True")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_ALLOCATOR, None)


def rows(board: StepBoard, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row an implementation, ours twice where the first ran out of memory."""
    start = time.perf_counter()
    points = [Point(what) for what in (("twin", "plan") if OURS in board.implementations else ())]
    points += [Point(name) for name in board.implementations]
    twin_result: dict[str, Any] = {}
    planned: dict[str, Any] = {}

    def finished(name: str, board: StepBoard, result: dict[str, Any]) -> dict[str, Any]:
        checked = {"twin": twin_result, "plan": planned} if name == OURS else {}
        return _row(board, name, result, checked, device) | {"elapsed_s": time.perf_counter() - start}

    with growing_segments():
        for point, result in replicas.stream(measure, points, board, device=board.device, limit_s=_LIMIT_S):
            if point.what == "twin":
                twin_result = result
            elif point.what == "plan":
                planned = _planned(board, result)
            else:
                yield finished(point.what, board, result)
                if point.what == OURS and result["status"] == "oom":
                    less = dataclasses.replace(board, margin_gib=LESS * board.margin_gib)
                    again = [Point("plan"), Point(OURS)]
                    for other, retried in replicas.stream(measure, again, less, device=board.device, limit_s=_LIMIT_S):
                        if other.what == OURS:
                            yield finished(OURS, less, retried) | {"path": "second plan"}
                        else:
                            planned = _planned(less, retried)


def _planned(board: StepBoard, result: dict[str, Any]) -> dict[str, Any]:
    """What rows say of the plan that the processes make from these rates; of a failure, that."""
    if result["status"] != "ok":
        return {"note": result["note"]}
    try:
        return told(make_plan(board, planner.Rates(**result["rates"]), result["free"]))
    except ValueError as error:
        return {"note": str(error)}


def _row(
    board: StepBoard, name: str, result: dict[str, Any], checked: dict[str, dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """checked: of ours, the twin's result and what is told of the plan."""
    config = board.model
    told_of = {key: value for key, value in checked.get("plan", {}).items() if key != "note"}
    told_of |= {key: result[key] for key in told_of if key in result}
    found = checked.get("twin", {})
    notes = [result.get("note"), found.get("note"), None if told_of or name != OURS else checked["plan"].get("note")]
    notes += ["not the board's shape"] if board.scale != "full" else []
    if name == PEER:
        notes.append(f"weights, gradients and moments in {board.dtype}")
    row: dict[str, Any] = {
        "board": BOARD,
        "implementation": name,
        "gpus": GPUS,
        "batch": GPUS * board.local_batch,
        "heads": config.num_heads,
        "seq_len": config.context_length,
        "head_dim": config.head_dim,
        "dtype": board.dtype,
        "compiled": board.compiled and name == PEER,
        "status": result["status"] if result["status"] != "ok" else found.get("status", "ok"),
        "error": found.get("gradient_error"),
        "error_pytorch": found.get("plain_gradient_error"),
        "device": device_name(device),
        "note": "; ".join(dict.fromkeys(filter(None, notes))),
    } | told_of
    if result["status"] != "ok":
        return row
    median, p20, p80 = quantiles(result["times_ms"])
    rate = GPUS * board.local_batch * config.context_length / median * 1e3
    flops = cost.train_flops_per_token(config)
    return row | {
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "samples": len(result["times_ms"]),
        "tflops": rate * flops / GPUS / 1e12,
        "mfu": cost.mfu(rate / GPUS, flops, peak_flops(device_name(device), board.dtype)),
        "peak_mib": result["peak_bytes"] / 2**20,
        "tokens_per_s": rate,
        "loss": result["losses"][0],
        "ready_s": result["ready_s"],
    }


# --- What it says ---------------------------------------------------------------------------------


def explain_plan(plan: planner.Plan) -> str:
    """A plan as Markdown: each kind of activation, then memory at the moments that matter, and the time by part."""
    step, layers = plan.shape, len(plan.keep)
    kinds = [
        {
            "kind": kind,
            "bytes": f"{step.kind_bytes(kind) / 2**20:,.4g}",
            "again": f"{1e3 * step.kind_seconds(kind, plan.rates):,.3g}",
            "price": f"{1e3 * step.kind_seconds(kind, plan.rates) / (step.kind_bytes(kind) / 2**30):,.3g}",
            "kept": f"{sum(kind in kinds for kinds in plan.keep)} of {layers}",
        }
        for kind in planner.KINDS
    ]
    columns = {
        "kind": "kind",
        "bytes": "MiB a block",
        "again": "ms to make again",
        "price": "ms a GiB",
        "kept": "blocks that keep it",
    }
    found = dict(planner.moments(step, plan.keep))
    named = {
        "loss": "the loss",
        f"backward {layers - 1}": "the last block's backward",
        "backward 0": "the first block's backward",
    }
    memory = [f"state {step.state / 2**30:,.4g} GiB", f"activations kept {plan.kept_bytes / 2**30:,.4g}"]
    memory += [f"all at {name} {found[key] / 2**30:,.4g}" for key, name in named.items()]
    parts = [f"{name} {1e3 * seconds:,.4g} ms" for name, seconds in plan.seconds().items()]
    keep_nothing = planner.keep_nothing(step, plan.budget, plan.rates)
    return "\n".join(
        [
            records.markdown_table(kinds, columns),
            f"- Plan: {plan}.",
            f"- Memory: {', '.join(memory)}.",
            f"- Time: {', '.join(parts)}; {1e3 * sum(plan.seconds().values()):,.4g} ms in all.",
            f"- With inputs alone: peak {keep_nothing.peak_bytes / 2**30:,.4g} GiB, {1e3 * sum(keep_nothing.seconds().values()):,.4g} ms.",
        ]
    )


def row_line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    if row["status"] != "ok":
        plan = f" ({row['plan']})" if row.get("plan") else ""
        return f"{row['implementation']:<13} {row['status']}: {row['note']}{plan}"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    return (
        f"{row['implementation']:<13} {row['median_ms']:,.5g} ms [{row['p20_ms']:,.5g}, {row['p80_ms']:,.5g}]{mfu}, peak "
        f"{row['peak_mib'] / 1024:.3g} GiB, loss {row['loss']:.4f}, ready after {row['ready_s']:.0f} s"
    )


def table(frame) -> str:
    """The board as Markdown, fastest first."""
    lines = []
    for row in frame.sort_values("median_ms").to_dict("records"):
        line = {"implementation": f"`{row['implementation']}`", "ours": "ours" if row["implementation"] == OURS else ""}
        if row["status"] != "ok":
            lines.append(line | {"time": row["status"]})
            continue
        lines.append(
            line
            | {
                "time": records.spread(row["median_ms"], row["p20_ms"], row["p80_ms"]),
                "tokens": f"{row['tokens_per_s']:,.0f}",
                "mfu": "" if math.isnan(row["mfu"]) else f"{row['mfu']:.1%}",
                "peak": f"{row['peak_mib']:,.0f}",
                "predicted": ""
                if math.isnan(row["predicted_ms"])
                else f"{records.significant(row['predicted_ms'])} ms, {row['predicted_peak_mib']:,.0f} MiB",
                "loss": f"{row['loss']:.5f}",
            }
        )
    columns = {
        "implementation": "implementation",
        "ours": "",
        "time": "the step, ms",
        "tokens": "tokens/s",
        "mfu": "MFU",
    }
    columns |= {"peak": "peak MiB a GPU", "predicted": "planned", "loss": "first loss"}
    return records.markdown_table(lines, columns)


def conclusions(frame) -> list[str]:
    """What the board shows, in sentences made from its rows."""
    said = []
    ok = frame[frame.status == "ok"].drop_duplicates("implementation", keep="last").set_index("implementation")
    if OURS in ok.index:
        row = ok.loc[OURS]
        mfu = "" if row.mfu != row.mfu else f", an MFU of {row.mfu:.1%}"
        said.append(
            f"A training step of {row.batch} x {row.seq_len:,} tokens in {row['dtype']} takes **{records.significant(row.median_ms)} ms** on "
            f"{row.gpus} x {row.device}{mfu}; peak memory {row.peak_mib / 1024:.3g} GiB."
        )
        said.append(f"The plan: {row.plan}.")
        said.append(
            f"It foretold {records.significant(row.predicted_ms)} ms from rates measured before ({row.rates}) and a peak of "
            f"{row.predicted_peak_mib / 1024:.3g} GiB."
        )
        said.append(
            f"On the twin, gradients are within {row.error:.2g} of float64's; the plain model's in {row['dtype']} are within "
            f"{row.error_pytorch:.2g}."
        )
    if {OURS, PEER} <= set(ok.index):
        a, b = ok.loc[OURS], ok.loc[PEER]
        said.append(
            f"PyTorch's own step takes {records.significant(b.median_ms)} ms: {b.median_ms / a.median_ms:.3g} times ours, with "
            f"{b.peak_mib / a.peak_mib:.2g} of the memory; the first losses differ by {abs(a.loss - b.loss):.2g}."
        )
    if len(ok):
        said.append(f"All of it took {frame.elapsed_s.max():.0f} s.")
    for row in frame[frame.status != "ok"].to_dict("records"):
        plan = f" The plan was: {row['plan']}." if isinstance(row["plan"], str) else ""
        said.append(f"{row['implementation']} has no time, {row['status']}: {row['note']}.{plan}")
    return said


def write_report(frame, folder: str | Path) -> Path:
    """Write leaderboard_2026_report.md of the board's rows to folder; return its path."""
    text = ["# The 2026 board", "", f"Measured on {frame.gpus.iloc[0]} x {frame.device.iloc[0]}.", ""]
    text += [*(f"- {sentence}" for sentence in conclusions(frame)), "", table(frame), leaderboard.public(BOARD)]
    return records.write_text(Path(folder) / "leaderboard_2026_report.md", "\n".join(text))
